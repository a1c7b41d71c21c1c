//! `dylm inspect MODEL`: what a model is and what it will need, from config and headers alone, and whether its tensors are those that
//! the architecture asks for.

use super::{
    Done,
    facts::{facts, shapes, size, width},
    flags::ModelFlags,
    printing::{Paint, json, line},
};
use crate::{adapter::Adapters, error::Result, load::open, model::Plan, source::Source};
use clap::Args;
use serde_json::{Value, json};
use std::process::ExitCode;

/// Flags of `dylm inspect`.
#[derive(Args)]
#[command(after_help = "Exits with 1 where files and architecture disagree about a tensor.")]
pub struct Inspect {
    /// The model, as --model takes it
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    spec: Option<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Tokens to count memory for
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// List every tensor: name, type, shape
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Inspect {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let options = self.model.options()?;
        let opened = open(self.spec.as_deref().or(self.model.model.as_deref()), &options)?;
        let source = opened.source.clone();
        let mut text = json!({});
        match opened.tokenizer() {
            Ok(tokenizer) => {
                text["tokenizer"] = tokenizer.vocab_size().into();
                text["chat_template"] = tokenizer.has_chat_template().into();
                let mut eos = opened.config.eos_token_ids.clone();
                if eos.is_empty() {
                    eos.extend(tokenizer.eos_token_id());
                }
                let name = |id: u32| json!({ "id": id, "token": tokenizer.id_to_token(id) });
                text["eos"] = eos.into_iter().map(name).collect();
            }
            Err(e) => text["tokenizer_error"] = e.to_string().into(),
        }
        let adapters = match &options.adapter_path {
            Some(path) => Adapters::open(path)?,
            None => Adapters::default(),
        };
        let plan = opened.plan(&options, &adapters)?;
        let agrees = plan.report.agrees();
        let facts = self.facts(&source, &plan, width(&plan, &options), text)?;
        if self.json {
            json(&facts)?
        } else {
            self.print(&facts, &plan)?
        }
        Ok(if agrees { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn facts(&self, source: &Source, plan: &Plan, width: usize, text: Value) -> Result<Value> {
        let mut facts = facts(source, plan, &shapes(plan)?, width, self.context);
        if let (Value::Object(facts), Value::Object(text)) = (&mut facts, text) {
            facts.extend(text);
        }
        if self.tensors {
            let tensor = |(name, t): (&str, &crate::weights::stored::Stored)| json!({ "name": name, "dtype": t.dtype.name(), "shape": t.shape });
            facts["tensor_list"] = plan.checkpoint().iter().map(tensor).collect();
        }
        Ok(facts)
    }

    fn print(&self, facts: &Value, plan: &Plan) -> Result<()> {
        let text = |key: &str| facts[key].as_str().map_or_else(|| facts[key].to_string(), str::to_owned);
        let bytes = |key: &str| size(facts[key].as_u64().unwrap_or(0));
        let row = |name: &str, value: String| line(format_args!("{} {value}", Paint::Dim.out(&format!("{name:>14}"))));
        row("source", format!("{} ({})", text("source"), text("path")))?;
        if let Some(revision) = facts["revision"].as_str() {
            row("revision", revision.to_owned())?;
        }
        row("model_type", text("model_type"))?;
        row("plugin", format!("{} {} ({})", plan.note.name, plan.note.version, plan.plugin.display()))?;
        let bits = facts["bits_per_weight"].as_f64().unwrap_or(0.0);
        row(
            "parameters",
            format!("{} ({bits:.2} bits per weight, computed as {})", text("parameters"), text("dtype")),
        )?;
        row("weights", format!("{} in {} tensors", bytes("weight_bytes"), text("tensors")))?;
        row("KV cache", format!("{} per token", bytes("kv_bytes_per_token")))?;
        if facts["state_bytes"] != 0 {
            row("states", format!("{} whatever the context", bytes("state_bytes")))?;
        }
        row("memory", format!("{} with {} tokens, beside activations", bytes("memory_bytes"), self.context))?;
        match facts["tokenizer_error"].as_str() {
            Some(why) => row("tokenizer", format!("none: {why}"))?,
            None => {
                let chat = if facts["chat_template"] == true { "with" } else { "without" };
                row("tokenizer", format!("{} tokens, {chat} a chat template", text("tokenizer")))?;
                let names = facts["eos"].as_array().into_iter().flatten();
                let names = names.map(|eos| format!("{} {}", eos["id"], eos["token"].as_str().unwrap_or("?")));
                row("ends with", names.collect::<Vec<_>>().join(", "))?;
            }
        }
        row("tensors", plan.report.to_string())?;
        if self.tensors {
            for (name, tensor) in plan.checkpoint().iter() {
                line(format_args!("{name}  {}  {:?}", tensor.dtype, tensor.shape))?;
            }
        }
        Ok(())
    }
}
