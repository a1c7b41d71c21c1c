//! `dylm plan MODEL`: which plugin, which tensors, how much memory, told by config.json and headers: of a model on the Hub nothing else is
//! fetched, so that the answer comes before gigabytes do.

use super::{
    Done,
    facts::{facts, shapes, size, width},
    flags::ModelFlags,
    printing::{Paint, json, line},
};
use crate::{
    adapter::Adapters,
    device::DeviceChoice,
    error::{Error, Result},
    fit::{Form, Need},
    hub::Heads,
    load::peek,
    machine::{self, Memory},
    model::{CacheShape, Plan},
};
use clap::Args;
use serde_json::{Map, Value, json};
use std::process::ExitCode;

/// Flags of `dylm plan`.
#[derive(Args)]
#[command(after_help = "\
Exits with 0 if the plugin fits the checkpoint, and with 1 if no plugin serves it or tensors are missing, left over or of another shape;
with --strict also if the model does not fit into this machine's memory.

  dylm plan Qwen/Qwen3-32B                  # some hundred KB are fetched, and nothing is kept
  dylm plan ./model --ctx 32768 --json")]
pub struct PlanModel {
    /// The model, as --model takes it
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    spec: Option<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Tokens to count memory for [default: 4096, or what the model can have if that is less]
    #[arg(long, visible_alias = "context", value_name = "TOKENS")]
    ctx: Option<usize>,
    /// Fail if the model does not fit into memory
    #[arg(long)]
    strict: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Weights in memory, by the name of a row.
const ROWS: [(&str, Form); 4] =
    [("as stored", Form::Stored), ("bf16", Form::Half), ("8-bit", Form::Packed(8)), ("4-bit", Form::Packed(4))];

/// Tokens that a conversation may well come to.
const CONTEXT: usize = 4096;

impl PlanModel {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let options = self.model.options()?;
        let (opened, heads) = peek(self.spec.as_deref().or(self.model.model.as_deref()), &options)?;
        let source = opened.source.clone();
        let mut known = json!({
            "source": source.name,
            "revision": source.revision,
            "model_type": opened.config.model_type,
            "tensors": opened.checkpoint.len(),
            "weight_bytes": opened.checkpoint.total_bytes(),
        });
        if let (Some(heads), Value::Object(known)) = (&heads, &mut known) {
            known.extend(download(heads));
        }
        let adapters = match &options.adapter_path {
            Some(path) => Adapters::open(path)?,
            None => Adapters::default(),
        };
        let plan = match opened.plan(&options, &adapters) {
            Ok(plan) => plan,
            Err(e) => return self.without_plugin(known, e),
        };
        let (shapes, width) = (shapes(&plan)?, width(&plan, &options));
        let limit = plan.config.get("max_position_embeddings").and_then(Value::as_u64).filter(|&n| n > 0);
        let limit = limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let context = self.ctx.unwrap_or_else(|| limit.unwrap_or(CONTEXT).min(CONTEXT));
        let mut told = facts(&source, &plan, &shapes, width, context);
        let agrees = plan.report.agrees();
        let fit = Fit::new(&plan, &shapes, context, width, self.on_gpu());
        if let (Value::Object(told), Value::Object(known)) = (&mut told, known) {
            told.extend(known);
            told.insert("context_limit".into(), limit.into());
            told.extend(fit.json());
        }
        if self.json {
            json(&told)?;
        } else {
            self.print(&told, &plan)?;
            if agrees {
                fit.print(context, limit)?;
            }
        }
        let fails = !agrees || (self.strict && fit.verdict().is_some_and(|fits| !fits));
        Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// Whether the weights will lie unpacked in the memory of a GPU.
    fn on_gpu(&self) -> bool {
        match self.model.options().map(|options| options.device) {
            Ok(DeviceChoice::Cuda | DeviceChoice::Metal) => true,
            Ok(DeviceChoice::Auto) => {
                cfg!(target_os = "macos") || (cfg!(feature = "cuda") && !machine::gpus().is_empty())
            }
            _ => false,
        }
    }

    /// What can be said all the same; the reason comes as the error.
    fn without_plugin(&self, mut known: Value, e: Error) -> Done {
        if !self.json {
            print_known(&known)?;
            return Err(e);
        }
        known["plugin"] = Value::Null;
        known["error"] = e.to_string().into();
        json(&known)?;
        Ok(ExitCode::FAILURE)
    }

    fn print(&self, told: &Value, plan: &Plan) -> Result<()> {
        print_known(told)?;
        row("plugin", format!("{} {} ({})", plan.note.name, plan.note.version, plan.plugin.display()))?;
        let bits = told["bits_per_weight"].as_f64().unwrap_or(0.0);
        row(
            "parameters",
            format!("{} ({bits:.2} bits per weight, computed as {:?})", plan.parameters(), plan.dtype()),
        )?;
        row("fit", plan.report.to_string())
    }
}

fn row(name: &str, value: String) -> Result<()> {
    line(format_args!("{} {value}", Paint::Dim.out(&format!("{name:>14}"))))
}

fn print_known(known: &Value) -> Result<()> {
    let text = |key: &str| known[key].as_str().unwrap_or_default().to_owned();
    let bytes = |key: &str| size(known[key].as_u64().unwrap_or(0));
    row("source", text("source"))?;
    if known["revision"].is_string() {
        row("revision", text("revision"))?;
    }
    row("model_type", text("model_type"))?;
    row("weights", format!("{} in {} tensors", bytes("weight_bytes"), known["tensors"]))?;
    match known["download_bytes"].as_u64() {
        Some(all) => {
            let (files, fetched) = (&known["weight_files"], bytes("fetched_bytes"));
            row(
                "download",
                format!("{} in {files} files of weights; {fetched} of headers were fetched for this", size(all)),
            )
        }
        None => row("download", "nothing: it is on this disk".into()),
    }
}

fn download(heads: &Heads) -> Map<String, Value> {
    let values = [
        ("download_bytes", heads.weight_files_bytes().into()),
        ("weight_files", heads.shards.len().into()),
        ("fetched_bytes", heads.fetched.into()),
    ];
    values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The model beside the machine.
struct Fit {
    rows: Vec<(&'static str, Need)>,
    memory: Option<Memory>,
    gpus: Vec<machine::Gpu>,
    on_gpu: bool,
    whole_context: Box<dyn Fn(usize) -> u64>,
}

impl Fit {
    fn new(plan: &Plan, shapes: &[CacheShape], context: usize, width: usize, on_gpu: bool) -> Self {
        let rows = ROWS.iter().map(|(name, form)| (*name, plan.need(*form, shapes, context, width))).collect();
        let shapes = shapes.to_vec();
        let whole_context = Box::new(move |tokens| {
            let (keys, states) = crate::fit::cache_bytes(&shapes, tokens, width);
            keys.saturating_add(states)
        });
        Fit { rows, memory: machine::memory(), gpus: machine::gpus(), on_gpu, whole_context }
    }

    /// The memory that the model must go into, and what to call it.
    fn place(&self) -> Option<(Memory, String)> {
        match self.gpus.first().filter(|_| self.on_gpu) {
            Some(gpu) => Some((gpu.memory, format!("this machine's {}", gpu.name))),
            None => self.memory.map(|memory| (memory, "this machine".to_owned())),
        }
    }

    /// What this dylm would take on the device it would choose.
    fn chosen(&self) -> Option<&(&'static str, Need)> {
        self.rows.get(usize::from(self.on_gpu))
    }

    /// Whether that fits; `None` where the system does not tell its memory.
    fn verdict(&self) -> Option<bool> {
        let ((_, need), (memory, _)) = (self.chosen()?, self.place()?);
        Some(need.total() <= memory.total)
    }

    fn json(&self) -> Map<String, Value> {
        let need = |need: &Need| {
            json!({ "weights": need.weights, "cache": need.cache, "work": need.work, "total": need.total(),
                    "fits": self.memory.map(|memory| need.total() <= memory.total) })
        };
        let rows: Map<String, Value> =
            self.rows.iter().map(|(name, row)| (name.replace([' ', '-'], "_"), need(row))).collect();
        let gpu = |gpu: &machine::Gpu| json!({ "name": gpu.name, "total": gpu.memory.total, "free": gpu.memory.free });
        let machine = json!({
            "total": self.memory.map(|memory| memory.total),
            "free": self.memory.map(|memory| memory.free),
            "gpus": self.gpus.iter().map(gpu).collect::<Vec<_>>(),
        });
        let values = [
            ("memory", rows.into()),
            ("machine", machine),
            ("device", if self.on_gpu { "gpu" } else { "cpu" }.into()),
            ("fits", self.verdict().into()),
        ];
        values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn print(&self, context: usize, limit: Option<usize>) -> Result<()> {
        line(format_args!("\nmemory, with {context} tokens     weights       cache    work, about     together"))?;
        for (name, need) in &self.rows {
            let [weights, cache, work, all] = [need.weights, need.cache, need.work, need.total()].map(size);
            let (_, chosen) = self.chosen().map_or((false, false), |(row, _)| (true, row == name));
            let text = format!("{name:>25} {weights:>12} {cache:>11} {work:>14} {all:>12}");
            line(if chosen { Paint::Bold.out(&text) } else { text })?;
        }
        if let Some(limit) = limit.filter(|&limit| limit > context) {
            line(format_args!("{:>25} {:>24}", format!("{limit} tokens"), size((self.whole_context)(limit))))?;
        }
        line(Paint::Dim.out(
            "on GPUs every form takes as much as bf16; 8-bit and 4-bit are for checkpoints packed in groups of 64",
        ))?;
        line("")?;
        for gpu in &self.gpus {
            let Memory { total, free } = gpu.memory;
            line(format_args!("{}: {} of memory, {} free", gpu.name, size(total), size(free)))?;
        }
        line(self.sentence())
    }

    /// "this fits", "this is tight" or "this will not fit", with the numbers that say so.
    fn sentence(&self) -> String {
        let (Some((memory, place)), Some((name, need))) = (self.place(), self.chosen()) else {
            return "this system does not tell how much memory it has".into();
        };
        let how = |name: &str| if name == "as stored" { name.to_owned() } else { format!("in {name}") };
        let (all, total, free) = (size(need.total()), size(memory.total), size(memory.free));
        let takes = format!("{} it takes about {all}, {place} has {total}", how(name));
        if need.total() <= memory.free {
            return format!("this fits: {takes}, {free} of it free");
        }
        if need.total() <= memory.total {
            return format!("this is tight: {takes}, but only {free} of it free now");
        }
        let smaller = self.rows.iter().filter(|_| !self.on_gpu).find(|(_, other)| other.total() <= memory.total);
        let cure = match smaller {
            Some((name, other)) => format!("{} it would take {}", how(name), size(other.total())),
            None => "take a smaller model, or a machine with more memory".to_owned(),
        };
        format!("this will not fit: {takes}; {cure}")
    }
}
