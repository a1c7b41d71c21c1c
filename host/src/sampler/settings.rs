//! What a request may say about sampling, checked once before the first token. The defaults are greedy decoding: the most likely
//! token, always.

use crate::error::{Error, Result};

/// How the next token is chosen from the logits. `Sampling::default()` is greedy; every field is off until it is set.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the log-probabilities; 0 takes the most likely token and nothing else of the filters runs.
    pub temp: f32,
    /// Keeps the most likely tokens that together hold this probability, the crossing one included (Holtzman et al. 2019). 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024). 0 keeps all.
    pub min_p: f32,
    /// The most likely tokens that `min_p` never removes.
    pub min_tokens_to_keep: usize,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// How often, per token, the most obvious candidates are left out ("exclude top choices"). 0 never does.
    pub xtc_probability: f32,
    /// Of the tokens more likely than this, only the least likely one stays when the top choices are excluded.
    pub xtc_threshold: f32,
    /// Tokens that XTC never removes: line breaks, ends of sequence.
    pub xtc_special_tokens: Vec<u32>,
    /// Makes the draws reproducible; without one each sampler draws its own.
    pub seed: Option<u64>,
    /// Added to the logits of these tokens before anything else; negative infinity bans a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Divides positive logits of tokens already seen and multiplies negative ones (Keskar et al. 2019, CTRL).
    pub repetition_penalty: Option<f32>,
    /// How many of the latest tokens the repetition penalty looks at; `None` is the whole history.
    pub repetition_context_size: Option<usize>,
    /// Subtracted once from the logit of every token already seen.
    pub presence_penalty: f32,
    /// How many of the latest tokens the presence penalty looks at; `None` is the whole history.
    pub presence_context_size: Option<usize>,
    /// Subtracted from the logit of a token once for every time it was seen.
    pub frequency_penalty: f32,
    /// How many of the latest tokens the frequency penalty looks at; `None` is the whole history.
    pub frequency_context_size: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temp: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            min_tokens_to_keep: 1,
            top_k: 0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            xtc_special_tokens: Vec::new(),
            seed: None,
            logit_bias: Vec::new(),
            repetition_penalty: None,
            repetition_context_size: None,
            presence_penalty: 0.0,
            presence_context_size: None,
            frequency_penalty: 0.0,
            frequency_context_size: None,
        }
    }
}

impl Sampling {
    /// Refuses settings that have no meaning.
    ///
    /// # Errors
    /// [`Error::Usage`] names the first field that is out of its range, and the range.
    pub fn validate(&self) -> Result<()> {
        let demand = |holds: bool, name: &str, value: f32, cure: &str| match holds {
            true => Ok(()),
            false => Err(Error::Usage(format!("{name} is {value}: give {cure}"))),
        };
        demand(self.temp >= 0.0 && self.temp.is_finite(), "temp", self.temp, "0 (greedy) or a positive number")?;
        demand(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "a number above 0, at most 1 (1 keeps all)",
        )?;
        demand((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "a number from 0 to 1 (0 keeps all)")?;
        let keep = self.min_tokens_to_keep;
        demand(keep >= 1, "min_tokens_to_keep", keep as f32, "1 or more")?;
        let often = self.xtc_probability;
        demand((0.0..=1.0).contains(&often), "xtc_probability", often, "a number from 0 to 1 (0 turns XTC off)")?;
        let threshold = self.xtc_threshold;
        demand((0.0..=0.5).contains(&threshold), "xtc_threshold", threshold, "a number from 0 to 0.5")?;
        if let Some(penalty) = self.repetition_penalty {
            let cure = "a positive number (1 changes nothing)";
            demand(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", penalty, cure)?;
        }
        demand(self.presence_penalty.is_finite(), "presence_penalty", self.presence_penalty, "a finite number")?;
        demand(self.frequency_penalty.is_finite(), "frequency_penalty", self.frequency_penalty, "a finite number")?;
        for &(id, bias) in &self.logit_bias {
            let cure = "a finite number, or negative infinity to ban the token";
            demand(bias < f32::INFINITY, &format!("logit_bias of token {id}"), bias, cure)?;
        }
        Ok(())
    }
}
