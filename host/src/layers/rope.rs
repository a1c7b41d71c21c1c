//! Rotary position angles: one frequency for each pair of lanes, after whichever scaling config.json's `rope_scaling` asks for.
//! <https://arxiv.org/abs/2104.09864>; YaRN: <https://arxiv.org/abs/2309.00071>; LongRoPE: <https://arxiv.org/abs/2402.13753>

#[cfg(feature = "cuda")]
mod on_cuda;

use super::slices::with_f32;
use crate::kernels::cpu;
use candle_core::{D, DType, Device, Tensor};
use serde_json::Value;
use std::{borrow::Cow, f64::consts::TAU};

/// Frequencies of one rope.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Lanes that turn.
    pub dims: usize,
    /// Radians a position, one for each pair of lanes.
    pub inv_freq: Vec<f32>,
    /// Multiplies what was turned (YaRN's and LongRoPE's attention factor).
    pub amplitude: f32,
    by_length: ByLength,
    /// Both sets of frequencies where the model is, once they were needed there.
    #[cfg(feature = "cuda")]
    there: [std::sync::OnceLock<Tensor>; 2],
}

/// Scalings that look at how long the text is.
#[derive(Debug, Clone)]
enum ByLength {
    Never,
    /// Dynamic NTK, for texts beyond `max`.
    Dynamic {
        base: f64,
        factor: f64,
        max: f64,
    },
    /// LongRoPE's second set, for texts beyond `original`.
    Long {
        long: Vec<f32>,
        original: f64,
        amplitude: f32,
    },
}

/// The numbers of a `rope_scaling` object, with the config's as fallback.
struct Scaling<'a> {
    json: &'a Value,
    config: &'a Value,
}

impl Scaling<'_> {
    fn number(&self, key: &str) -> Option<f64> {
        self.json.get(key).and_then(Value::as_f64).filter(|x| x.is_finite())
    }

    fn need(&self, key: &str) -> Result<f64, String> {
        self.number(key).ok_or_else(|| format!("config.json: rope_scaling.{key} is missing or not a number"))
    }

    fn factor(&self) -> Result<f64, String> {
        self.need("factor").and_then(|f| {
            if f > 0.0 { Ok(f) } else { Err(format!("config.json: rope_scaling.factor is {f}, it should be above 0")) }
        })
    }

    fn of_config(&self, key: &str) -> Option<f64> {
        self.config.get(key).and_then(Value::as_f64)
    }

    fn max_positions(&self) -> Option<f64> {
        self.of_config("max_position_embeddings")
    }

    fn original(&self) -> Option<f64> {
        let outside = self.of_config("original_max_position_embeddings");
        outside.or(self.number("original_max_position_embeddings")).or(self.max_positions())
    }

    fn list(&self, key: &str, len: usize) -> Result<Vec<f64>, String> {
        let list: Option<Vec<f64>> =
            self.json.get(key).and_then(Value::as_array).and_then(|a| a.iter().map(Value::as_f64).collect());
        match list {
            Some(list) if list.len() == len => Ok(list),
            Some(list) => {
                Err(format!("config.json: rope_scaling.{key} has {} numbers, the head has {len} pairs", list.len()))
            }
            None => Err(format!("config.json: rope_scaling.{key} is missing or not a list of numbers")),
        }
    }
}

impl Rope {
    /// `scaling` is the `rope_scaling` object (null for none); `config` all of config.json, for lengths that stand outside of it.
    pub fn new(dims: usize, base: f64, scaling: &Value, config: &Value) -> Result<Self, String> {
        if dims == 0 || !dims.is_multiple_of(2) {
            return Err(format!("config.json: rope over {dims} lanes; an even number above 0 can turn"));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(format!("config.json: rope_theta is {base}, it should be above 0"));
        }
        let plain = frequencies(dims, base);
        let s = Scaling { json: scaling, config };
        let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
        let (mut amplitude, mut by_length) = (1.0, ByLength::Never);
        let frequencies = match kind {
            "default" | "mrope" => plain,
            "linear" => {
                let factor = s.factor()?;
                plain.into_iter().map(|f| f / factor).collect()
            }
            "dynamic" => {
                let max = s.original().ok_or("config.json: dynamic rope_scaling needs max_position_embeddings")?;
                by_length = ByLength::Dynamic { base, factor: s.factor()?, max };
                plain
            }
            "llama3" => llama3(plain, &s)?,
            // Gemma 4: the slowest pairs stand still, the others turn as if all did.
            "proportional" => {
                let share = s.number("partial_rotary_factor").or(s.of_config("partial_rotary_factor")).unwrap_or(1.0);
                let (turning, factor) = ((share * dims as f64 / 2.0) as usize, s.number("factor").unwrap_or(1.0));
                plain.into_iter().enumerate().map(|(i, f)| if i < turning { f / factor } else { 0.0 }).collect()
            }
            "yarn" | "deepseek_yarn" | "telechat3-yarn" => {
                let factor = s.factor()?;
                amplitude = yarn_amplitude(factor, &s);
                yarn(plain, dims, base, factor, &s)?
            }
            "longrope" | "su" => {
                let (original, max) = (s.original().unwrap_or(1.0), s.max_positions().unwrap_or(1.0));
                let stretch = s.number("factor").unwrap_or(max / original);
                let grown = if stretch > 1.0 { (1.0 + stretch.ln() / original.ln()).sqrt() } else { 1.0 };
                // PhiMoE has a factor for each of the two sets.
                let long_amplitude = s.number("long_mscale").or(s.number("attention_factor")).unwrap_or(grown) as f32;
                amplitude = s.number("short_mscale").or(s.number("attention_factor")).unwrap_or(grown);
                let over = |by: Vec<f64>| plain.iter().zip(by).map(|(f, by)| f / by).collect::<Vec<_>>();
                let long = over(s.list("long_factor", dims / 2)?).into_iter().map(|f| f as f32).collect();
                by_length = ByLength::Long { long, original, amplitude: long_amplitude };
                over(s.list("short_factor", dims / 2)?)
            }
            other => {
                return Err(format!(
                    "config.json: rope_scaling of type \"{other}\" is not known; default, linear, dynamic, llama3, yarn, longrope, proportional are"
                ));
            }
        };
        Ok(Rope {
            dims,
            inv_freq: frequencies.into_iter().map(|f| f as f32).collect(),
            amplitude: amplitude as f32,
            by_length,
            #[cfg(feature = "cuda")]
            there: Default::default(),
        })
    }

    /// Angles of 0, in place of a rope that could not be made.
    pub fn none() -> Self {
        Rope {
            dims: 0,
            inv_freq: Vec::new(),
            amplitude: 1.0,
            by_length: ByLength::Never,
            #[cfg(feature = "cuda")]
            there: Default::default(),
        }
    }

    /// The frequencies for a text of `len` tokens. Keys that were cached while it was shorter keep theirs, as in transformers.
    pub fn frequencies(&self, len: usize) -> Cow<'_, [f32]> {
        match &self.by_length {
            ByLength::Dynamic { base, factor, max } if len as f64 > *max => {
                let d = self.dims as f64;
                let stretched = base * ((factor * len as f64 / max) - (factor - 1.0)).powf(d / (d - 2.0));
                Cow::Owned(frequencies(self.dims, stretched).into_iter().map(|f| f as f32).collect())
            }
            ByLength::Long { long, original, .. } if len as f64 > *original => Cow::Borrowed(long),
            _ => Cow::Borrowed(&self.inv_freq),
        }
    }
}

impl Rope {
    /// What multiplies the turned lanes of a text of `len` tokens.
    fn amplitude(&self, len: usize) -> f32 {
        match &self.by_length {
            ByLength::Long { original, amplitude, .. } if len as f64 > *original => *amplitude,
            _ => self.amplitude,
        }
    }
}

/// The tokens of one sequence in a step.
pub struct Span {
    /// Position of the first.
    pub offset: usize,
    /// How many.
    pub len: usize,
    /// How long the text is known to become.
    pub horizon: usize,
}

impl Span {
    /// How long the whole text is, or is known to become.
    fn text(&self) -> usize {
        (self.offset + self.len).max(self.horizon)
    }

    /// Where its tokens stand; in blocks, all tokens of one stand where its first does.
    fn positions(&self, block: usize) -> Vec<f32> {
        let block = block.max(1);
        (self.offset..self.offset + self.len).map(|p| (p / block * block) as f32).collect()
    }
}

impl Rope {
    /// Cosines and sines of a step's tokens, one set a sequence, for all layers with this rope; `block` as in the ABI, 0 for none.
    pub fn angles(&self, spans: &[Span], block: usize) -> Vec<cpu::Angles> {
        let of = |span: &Span| {
            let text = span.text();
            cpu::Angles::new(&span.positions(block), &self.frequencies(text), self.amplitude(text))
        };
        spans.iter().map(of).collect()
    }

    /// The same as one tensor `[tokens, 2 * pairs]` on a device.
    pub fn turns(&self, spans: &[Span], block: usize, device: &Device) -> candle_core::Result<Tensor> {
        let numbers: Vec<f32> = self.angles(spans, block).iter().flat_map(|a| a.turns().iter().copied()).collect();
        Tensor::from_vec(numbers, ((), self.dims), device)
    }

    /// Turns x `[tokens, heads, head_dim]` with dylm's own kernel; `angles` are those of `spans`.
    pub fn rotate_on_cpu(
        x: &Tensor,
        spans: &[Span],
        angles: &[cpu::Angles],
        turn: cpu::Turn,
    ) -> candle_core::Result<Tensor> {
        let (_, heads, head_dim) = x.dims3()?;
        let mut numbers = with_f32(x, <[f32]>::to_vec)?;
        let mut rest = numbers.as_mut_slice();
        for (span, angles) in spans.iter().zip(angles) {
            let (rows, after) = rest.split_at_mut(span.len * heads * head_dim);
            angles.rotate(rows, heads, head_dim, turn);
            rest = after;
        }
        Tensor::from_vec(numbers, x.shape(), x.device())
    }

    /// The same by candle's ops, on any device.
    pub fn rotate(&self, x: &Tensor, spans: &[Span], block: usize, turn: cpu::Turn) -> candle_core::Result<Tensor> {
        let mut turned = Vec::with_capacity(spans.len());
        let mut start = 0;
        for span in spans {
            let rows = x.narrow(0, start, span.len)?;
            start += span.len;
            turned.push(self.rotate_by_candle(&rows, span, block, turn)?);
        }
        match turned.len() {
            1 => Ok(turned.remove(0)),
            _ => Tensor::cat(&turned, 0),
        }
    }

    fn rotate_by_candle(&self, x: &Tensor, span: &Span, block: usize, turn: cpu::Turn) -> candle_core::Result<Tensor> {
        let (positions, inv_freq) = (span.positions(block), self.frequencies(span.text()));
        let (tokens, heads, head_dim) = x.dims3()?;
        let half = self.dims / 2;
        let angle = |&p: &f32| inv_freq.iter().map(move |&f| (p as f64 * f as f64) as f32);
        let angles: Vec<f32> = positions.iter().flat_map(angle).collect();
        let angles = Tensor::from_vec(angles, (tokens, 1, half), x.device())?;
        let amplitude = self.amplitude(span.text()) as f64;
        let sign = if turn.back { -1.0 } else { 1.0 };
        let (cos, sin) = (angles.cos()?.affine(amplitude, 0.0)?, angles.sin()?.affine(sign * amplitude, 0.0)?);
        let rest = head_dim - self.dims;
        let (first, resting) = if turn.last { (rest, 0) } else { (0, self.dims) };
        let lanes = x.narrow(D::Minus1, first, self.dims)?.to_dtype(DType::F32)?;
        // Pairs as [.., half, 2] (neighbours) or [.., 2, half] (halves).
        let pairs = if turn.neighbours {
            lanes.reshape((tokens, heads, half, 2))?
        } else {
            lanes.reshape((tokens, heads, 2, half))?
        };
        let axis = if turn.neighbours { 3 } else { 2 };
        let (a, b) = (pairs.narrow(axis, 0, 1)?.squeeze(axis)?, pairs.narrow(axis, 1, 1)?.squeeze(axis)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned =
            Tensor::stack(&[&first, &second], axis)?.reshape((tokens, heads, self.dims))?.to_dtype(x.dtype())?;
        if rest == 0 {
            return Ok(turned);
        }
        let rest = x.narrow(D::Minus1, resting, rest)?;
        Tensor::cat(&if turn.last { [&rest, &turned] } else { [&turned, &rest] }, D::Minus1)
    }
}

fn frequencies(dims: usize, base: f64) -> Vec<f64> {
    (0..dims / 2).map(|i| base.powf(-2.0 * i as f64 / dims as f64)).collect()
}

/// Llama 3.1: long waves are stretched, short ones kept, those between blended.
fn llama3(plain: Vec<f64>, s: &Scaling) -> Result<Vec<f64>, String> {
    let (factor, low, high) =
        (s.factor()?, s.number("low_freq_factor").unwrap_or(1.0), s.number("high_freq_factor").unwrap_or(4.0));
    let original = s.original().unwrap_or(8192.0);
    let scale = |f: f64| {
        let wave = TAU / f;
        if wave > original / low {
            f / factor
        } else if wave < original / high {
            f
        } else {
            let share = (original / wave - low) / (high - low);
            (1.0 - share) * f / factor + share * f
        }
    };
    Ok(plain.into_iter().map(scale).collect())
}

/// YaRN: a ramp over the lanes from "keep" to "stretch", set by how many turns a lane makes within the original length.
fn yarn(plain: Vec<f64>, dims: usize, base: f64, factor: f64, s: &Scaling) -> Result<Vec<f64>, String> {
    let original = s.original().unwrap_or(4096.0);
    let (fast, slow) = (s.number("beta_fast").unwrap_or(32.0), s.number("beta_slow").unwrap_or(1.0));
    let lane = |turns: f64| dims as f64 * (original / (turns * TAU)).ln() / (2.0 * base.ln());
    let (mut from, mut to) = (lane(fast), lane(slow));
    if s.json.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
        (from, to) = (from.floor(), to.ceil());
    }
    let (from, to) = (from.max(0.0), to.min(dims as f64 - 1.0));
    let width = if to == from { 0.001 } else { to - from };
    let blend = |(i, f): (usize, f64)| {
        let stretched = ((i as f64 - from) / width).clamp(0.0, 1.0);
        f / factor * stretched + f * (1.0 - stretched)
    };
    Ok(plain.into_iter().enumerate().map(blend).collect())
}

fn yarn_amplitude(factor: f64, s: &Scaling) -> f64 {
    let grow = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    let both = s.number("mscale").zip(s.number("mscale_all_dim")).filter(|(m, all)| *m != 0.0 && *all != 0.0);
    s.number("attention_factor").unwrap_or_else(|| both.map_or_else(|| grow(1.0), |(m, all)| grow(m) / grow(all)))
}
