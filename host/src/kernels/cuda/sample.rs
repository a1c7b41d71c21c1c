//! `sample.cu` from Rust: a sampler's settings, its number of draws and its text, kept on the device so that tokens are drawn there from
//! step to step, one ahead of the host.

use super::{
    program::{Arg, Shape, function},
    step::{address, device_of},
};
use crate::sampler::{Sampler, Sampling};
use candle_core::{
    CudaDevice, DType, Device, Result, Tensor,
    cuda_backend::{WrapErr, cudarc::driver::sys::CUdevice_attribute},
};

/// Threads of a block, blocks at most, and the bytes of what they share on the device and in a block, as sample.cu has them.
const THREADS: u32 = 512;
const MOST_BLOCKS: usize = 256;
const BINS: usize = 2048;
const BOARD: usize = 3 * BINS * 12 + 16 + MOST_BLOCKS * (8 + 4 + 12);
const SHARED: usize = BINS * 12;
/// Tokens that weights as whole numbers have room for.
const WIDEST: usize = 1 << 19;

/// As sample.cu has it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Draw {
    temp: f64,
    top_p: f64,
    min_p: f64,
    seed: u64,
    drawn: u64,
    bias: u64,
    seen: [u64; 3],
    by: [f32; 3],
    top_k: u32,
    tally: [u64; 3],
    window: [u32; 3],
    tallies: u32,
    latest: u64,
    room: u32,
    length: u32,
}

/// One sequence's sampler on the device.
pub struct Drawing {
    sampling: Sampling,
    seed: u64,
    /// Where the device is: numbers drawn, and the text, if it is looked at.
    drawn: u64,
    text: Option<Vec<u32>>,
    width: usize,
    blocks: u32,
    draw: Tensor,
    board: Tensor,
    changed: Tensor,
    /// What `draw` points to.
    _kept: Vec<Tensor>,
}

fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: a plain struct without padding, of numbers alone.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Drawing {
    /// A sampler that has come so far in `text`, for rows of `width` logits. None where its settings name a token that is not there, or the
    /// rows are too wide.
    pub fn new(sampler: &Sampler, text: &[u32], width: usize, device: &CudaDevice) -> Result<Option<Self>> {
        let (sampling, on) = (sampler.sampling(), &Device::Cuda(device.clone()));
        if width > WIDEST || width == 0 || sampling.logit_bias.iter().any(|&(id, _)| id as usize >= width) {
            return Ok(None);
        }
        let (mut kept, mut draw) = (Vec::new(), Draw::default());
        (draw.temp, draw.top_p, draw.min_p) = (sampling.temp.into(), sampling.top_p.into(), sampling.min_p.into());
        (draw.seed, draw.drawn) = (sampler.seed(), sampler.drawn());
        draw.top_k = sampling.top_k.min(width) as u32;
        if !sampling.logit_bias.is_empty() {
            let mut bias = vec![0f32; width];
            sampling.logit_bias.iter().for_each(|&(id, by)| bias[id as usize] += by);
            kept.push(Tensor::from_vec(bias, width, on)?);
            draw.bias = address(&kept[0])?;
        }
        let penalties = [
            (sampling.repetition_penalty.filter(|by| *by != 1.0), sampling.repetition_context_size),
            (Some(sampling.presence_penalty).filter(|by| *by != 0.0), sampling.presence_context_size),
            (Some(sampling.frequency_penalty).filter(|by| *by != 0.0), sampling.frequency_context_size),
        ];
        let mut windows: Vec<Option<usize>> = Vec::new();
        for (i, (by, window)) in penalties.into_iter().enumerate() {
            let Some(by) = by else { continue };
            // A window of nothing sees nothing.
            if window == Some(0) {
                continue;
            }
            let known = windows.iter().position(|w| *w == window);
            if known.is_none() {
                windows.push(window);
                kept.push(Tensor::from_vec(counts(text, window, width), width, on)?);
                let at = windows.len() - 1;
                draw.tally[at] = address(&kept[kept.len() - 1])?;
                draw.window[at] = window.map_or(0, |w| w.min(u32::MAX as usize) as u32);
            }
            (draw.seen[i], draw.by[i]) = (draw.tally[known.unwrap_or(windows.len() - 1)], by);
        }
        draw.tallies = windows.len() as u32;
        draw.length = text.len() as u32;
        // A window that the text has not filled is left later, if ever.
        if let Some(room) = windows.iter().flatten().max().map(|&w| w.min(text.len() + (1 << 20))) {
            let mut latest = vec![0u32; room];
            let start = text.len().saturating_sub(room);
            text.iter().enumerate().skip(start).for_each(|(at, &id)| latest[at % room] = id);
            kept.push(Tensor::from_vec(latest, room, on)?);
            (draw.latest, draw.room) = (address(&kept[kept.len() - 1])?, room as u32);
        }
        let changes = draw.bias != 0 || draw.tallies > 0;
        let sms = device
            .cuda_stream()
            .context()
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .w()?;
        Ok(Some(Drawing {
            sampling: sampling.clone(),
            seed: sampler.seed(),
            drawn: sampler.drawn(),
            text: (draw.tallies > 0).then(|| text.to_vec()),
            width,
            blocks: (sms.max(1) as usize).min(MOST_BLOCKS).min(width.div_ceil(256)) as u32,
            draw: Tensor::from_slice(bytes_of(&draw), size_of::<Draw>(), on)?,
            board: Tensor::zeros(BOARD, DType::U8, on)?,
            changed: Tensor::zeros(if changes { width } else { 1 }, DType::F32, on)?,
            _kept: kept,
        }))
    }

    /// Whether the device is where this sampler is.
    pub fn is_at(&self, sampler: &Sampler, text: &[u32], width: usize) -> bool {
        self.width == width
            && (self.seed, self.drawn) == (sampler.seed(), sampler.drawn())
            && self.sampling == *sampler.sampling()
            && self.text.as_ref().is_none_or(|known| known == text)
    }

    /// The token that was drawn has been heard of.
    pub fn heard(&mut self, id: u32) {
        self.drawn += u64::from(self.sampling.temp > 0.0);
        if let Some(text) = &mut self.text {
            text.push(id);
        }
    }

    /// Draws a token from logits `[1, width]` in f32, which are such as bf16 has if they are `coarse`, and the largest
    /// of which `told` has already if it is `known`: to `id`, and with its log-probability and soundness to `told`.
    pub fn run(&self, logits: &Tensor, [coarse, known]: [bool; 2], id: &Tensor, told: &Tensor) -> Result<()> {
        let device = device_of(logits)?;
        let tensors = [logits, &self.changed, &self.draw, &self.board, id, told];
        let mut args = tensors.iter().map(|t| Ok(Arg::Ptr(address(t)?))).collect::<Result<Vec<_>>>()?;
        args.extend([Arg::U32(self.width as u32), Arg::U32(coarse.into()), Arg::U32(known.into())]);
        let shape = Shape { grid: [self.blocks, 1, 1], block: THREADS, shared: SHARED as u32, early: false };
        // SAFETY: as sample.cu says; the board is zeros, as every launch leaves it, and there are no more blocks than multiprocessors.
        unsafe { function(device, "sample", "draw")?.launch_together(device, shape, &args) }
    }
}

/// How often each token occurs among the latest `window`.
fn counts(text: &[u32], window: Option<usize>, width: usize) -> Vec<u32> {
    let mut counts = vec![0u32; width];
    let start = text.len().saturating_sub(window.unwrap_or(usize::MAX));
    for &id in text.get(start..).unwrap_or_default() {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1;
        }
    }
    counts
}
