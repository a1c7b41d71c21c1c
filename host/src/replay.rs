//! A step of one token a sequence, recorded once as a CUDA graph and replayed: the host then starts one thing a token, not some hundred.
//!
//! Plugins promise that `forward` asks for the same ops whenever the shapes are the same. What does change lies on the device, at
//! addresses that stay: ids, positions, and caches with room for more. The graph ends with the choice of the most likely token and leaves
//! it where the next replay reads its ids, so greedy decoding runs a step ahead of the host. Whatever cannot be recorded (an op that is
//! done on the host) makes the model run op by op as before; [`Model::not_replayed`] says why.

mod drawn;
mod memories;

use crate::{
    cache::memory::Memory,
    error::{Error, Result},
    kernels::cuda::{
        keeping,
        sample::Drawing,
        step::{self, address},
    },
    model::{Input, Model, Want},
    ops::running::{Part, Places},
};
use candle_core::{
    CudaDevice, DType, Device, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaEvent, CudaGraph, PinnedHostSlice, result, sys},
    },
};
use drawn::Ending;
use memories::{caches, has_begun, lengths, make_room};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The recorded steps of a model, by their number of sequences.
#[derive(Default)]
pub struct Replays(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    steps: HashMap<usize, Recorded>,
    refused: Option<String>,
}

/// One step and what it reads and writes.
struct Recorded {
    device: CudaDevice,
    /// `[sequences]`, as positions are: read by the step, and left as the next one needs them.
    ids: Tensor,
    positions: Tensor,
    /// `[sequences, 3]`: id, log-probability, soundness.
    told: Tensor,
    /// `[2, sequences, 3]`, the same on the host, where the step writes it at the end: a token at an even position, then one at an odd one,
    /// so that a step ahead leaves the one in hand alone.
    heard: PinnedHostSlice<u32>,
    /// `[sequences, vocab]`, f32; known once the step ran op by op.
    logits: Option<Tensor>,
    /// Whether they are rounded to bf16.
    coarse: bool,
    /// What the step writes and forgets.
    scratch: Vec<Tensor>,
    /// Which of a sequence's memories the step feeds.
    fed: Vec<usize>,
    graph: Option<CudaGraph>,
    /// The caches that the graph was recorded for.
    caches: Vec<u64>,
    /// What `ids` and `positions` hold, or held when the step ahead was started, if the host knows.
    holds: Option<[Vec<u32>; 2]>,
    /// When the step in hand will have been heard of, and whether it drew a token by `drawing`.
    done: Option<(CudaEvent, bool)>,
    /// The same of a step that was started before anybody asked for it.
    ahead: Option<(CudaEvent, bool)>,
    /// The sampler on the device: where the host's is, or a token further where the step in hand or that ahead has drawn one.
    drawing: Option<Drawing>,
}

// SAFETY: graphs may be used on any thread, by one at a time, and the mutex lets in one at a time.
unsafe impl Send for Recorded {}

/// What a step gives.
pub enum Made {
    /// A row for each sequence.
    Logits(Vec<Vec<f32>>),
    /// The most likely token of each, and its log-probability.
    Chosen(Vec<(u32, f32)>),
}

impl Model {
    /// One step by replay, if it is one token for each of these sequences and can be recorded. With `choose` the most likely tokens are
    /// chosen on the device, and the step after them is started at once.
    pub(crate) fn replayed(&self, inputs: &mut [Input], choose: bool) -> Result<Option<Made>> {
        self.replay(inputs, if choose { Ending::Largest } else { Ending::Logits })
    }

    /// As `ending` has it.
    fn replay(&self, inputs: &mut [Input], ending: Ending<'_>) -> Result<Option<Made>> {
        let Device::Cuda(device) = &self.place.device else { return Ok(None) };
        let single = |i: &Input| i.tokens.len() == 1 && i.want == Want::Last && i.state.behind == 0;
        if inputs.is_empty() || self.watch.is_some() || !inputs.iter().all(|i| single(i) && has_begun(i.state)) {
            return Ok(None);
        }
        let mut kept = self.replays.kept();
        if kept.refused.is_none() && std::env::var("DYLM_REPLAY").is_ok_and(|set| set == "off") {
            kept.refused = Some("DYLM_REPLAY=off".into());
        }
        if kept.refused.is_some() {
            return Ok(None);
        }
        let Kept { steps, refused } = &mut *kept;
        let recorded = match steps.entry(inputs.len()) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(Recorded::new(device, inputs.len())?),
        };
        inputs.iter_mut().try_for_each(|i| make_room(i.state, &self.place.device))?;
        let cached = device.enable_cuda_graph_htod_cache();
        let ran = recorded.run(self, inputs, ending);
        // What is read and drawn is not recorded, and a sampler's counts are not to be some constant's.
        drop(cached);
        match ran {
            Ok(()) => {}
            Err(e) if recorded.logits.is_some() && recorded.graph.is_none() => {
                *refused = Some(e.to_string().lines().next().unwrap_or_default().to_owned());
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        recorded.read(self, inputs, ending).map(Some)
    }
}

impl Replays {
    /// Why steps are not replayed, if they were tried and are not.
    pub fn refused(&self) -> Option<String> {
        self.kept().refused.clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // A step ahead still writes to the host; if that cannot be waited for there is nobody to tell.
        let _ = self.device.cuda_stream().synchronize();
    }
}

impl Recorded {
    fn new(device: &CudaDevice, sequences: usize) -> Result<Self> {
        let on = &Device::Cuda(device.clone());
        let numbers = |count: usize| Tensor::zeros(count, DType::U32, on);
        let context = device.cuda_stream().context().clone();
        // SAFETY: nothing is read there before a step that writes it has ended.
        let heard = unsafe { context.alloc_pinned_with_flags::<u32>(2 * 3 * sequences, 0) }.w()?;
        Ok(Recorded {
            device: device.clone(),
            ids: numbers(sequences)?,
            positions: numbers(sequences)?,
            told: Tensor::zeros((sequences, 3), DType::U32, on)?,
            heard,
            logits: None,
            coarse: false,
            scratch: Vec::new(),
            fed: Vec::new(),
            graph: None,
            caches: Vec::new(),
            holds: None,
            done: None,
            ahead: None,
            drawing: None,
        })
    }

    /// Starts the step, unless it was started ahead, and notes in the sequences' memories what it does there.
    fn run(&mut self, model: &Model, inputs: &mut [Input], ending: Ending<'_>) -> Result<()> {
        let tokens: Vec<u32> = inputs.iter().flat_map(|i| i.tokens).copied().collect();
        let positions: Vec<u32> = inputs.iter().map(|i| i.state.offset as u32).collect();
        let caches = caches(model, inputs)?;
        inputs.iter_mut().for_each(|i| drop(i.state.begin(1)));
        if matches!(self.ahead, Some((_, true))) && !matches!(ending, Ending::Drawn(..)) {
            // The largest is not what it has chosen, and the sampler is not where it was.
            (self.drawing, self.holds) = (None, None);
        }
        let recorded = self.logits.is_some();
        let started = self.start(model, inputs, [tokens, positions], caches);
        for input in inputs.iter_mut() {
            match started {
                Ok(()) => input.state.finish(&[], input.tokens)?,
                // Nothing of a step that cannot be written down was done.
                Err(_) if recorded => input.state.unwrite(),
                Err(_) => input.state.undo(&[]),
            }
        }
        started
    }

    fn start(&mut self, model: &Model, inputs: &mut [Input], reads: [Vec<u32>; 2], caches: Vec<u64>) -> Result<()> {
        let (ahead, fits) = (self.ahead.take(), self.graph.is_some() && self.caches == caches);
        let known = self.holds.take().is_some_and(|holds| holds == reads);
        if let Some(done) = ahead {
            if known && fits {
                self.done = Some(done);
                self.note(inputs);
                return Ok(());
            }
            if done.1 {
                self.drawing = None;
            }
            self.upload(&reads)?;
        } else if !known {
            self.upload(&reads)?;
        }
        let Some(logits) = self.logits.clone() else {
            // Once op by op: whatever is made at its first use (kernels, constants, scratch space) is there when the step is recorded.
            let before = lengths(inputs);
            let mut scratch = std::mem::take(&mut self.scratch);
            let kept = keeping(&mut scratch, false, || {
                let logits = self.forward(model, inputs, false)?;
                // Outlives the step, so it is none of the scratch.
                let kept = Tensor::zeros(logits.dims(), DType::F32, logits.device())?;
                self.choose(&logits, &kept)?;
                Ok::<_, Error>((kept, logits.dtype() == DType::BF16))
            });
            self.scratch = scratch;
            let (kept, coarse) = kept?;
            self.coarse = coarse;
            self.fed = (0..)
                .zip(lengths(inputs).into_iter().zip(before))
                .filter(|(_, (now, before))| now != before)
                .map(|(i, _)| i)
                .collect();
            self.logits = Some(kept);
            self.done = Some((self.end()?, false));
            return Ok(());
        };
        if fits {
            self.note(inputs);
        } else {
            self.graph = None;
            self.graph = Some(self.record(model, inputs, &logits)?);
            self.caches = caches;
        }
        self.launch(model)?;
        self.done = Some((self.end()?, false));
        Ok(())
    }

    fn upload(&self, reads: &[Vec<u32>; 2]) -> Result<()> {
        let stream = self.device.cuda_stream();
        for (numbers, to) in reads.iter().zip([&self.ids, &self.positions]) {
            // SAFETY: as many numbers as the tensor has; the driver has copied memory like this before the call returns.
            unsafe { result::memcpy_htod_async(address(to)?, numbers, stream.cu_stream()) }.w()?;
        }
        Ok(())
    }

    /// Logits of the sequences' tokens in `ids`, `[sequences, vocab]`.
    fn forward(&self, model: &Model, inputs: &mut [Input], recorded: bool) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(inputs.len());
        for (at, input) in inputs.iter_mut().enumerate() {
            parts.push(Part { state: &mut *input.state, tokens: at..at + 1, replayed: 0 });
        }
        let places = Places { positions: self.positions.clone(), recorded };
        model.logits(parts, self.ids.clone(), places)
    }

    fn choose(&self, logits: &Tensor, kept: &Tensor) -> candle_core::Result<()> {
        // Pinned memory has one address for the host and the device.
        let heard = self.heard.as_ptr().w()? as u64;
        step::choose(logits, kept, [&self.ids, &self.positions, &self.told], heard)
    }

    fn record(&mut self, model: &Model, inputs: &mut [Input], logits: &Tensor) -> Result<CudaGraph> {
        let stream = self.device.cuda_stream();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).w()?;
        let mut scratch = std::mem::take(&mut self.scratch);
        let made = keeping(&mut scratch, true, || {
            self.forward(model, inputs, true).and_then(|made| Ok(self.choose(&made, logits)?))
        });
        self.scratch = scratch;
        // What the step allocates and frees belongs to the graph.
        let graph =
            stream.end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).w();
        if made.is_err() || graph.is_err() {
            // What could not be freed in a recording that failed is told to whoever uses the device next, unless it is asked for.
            let _ = stream.context().check_err();
        }
        made?;
        match graph? {
            Some(graph) => {
                graph.upload().w()?;
                Ok(graph)
            }
            None => Err(Error::Device("--device cuda: the driver recorded nothing".into())),
        }
    }

    fn launch(&self, model: &Model) -> Result<()> {
        let Some(graph) = &self.graph else { return Err(Error::Device("--device cuda: no step is recorded".into())) };
        match &model.seat {
            Some(seat) => Ok(seat.group.together(|| graph.launch().w())?),
            None => Ok(graph.launch().w()?),
        }
    }

    /// When what is in the stream has been done.
    fn end(&self) -> Result<CudaEvent> {
        Ok(self.device.cuda_stream().record_event(None).w()?)
    }

    /// Where `heard` has what was chosen for a sequence behind the token at a position.
    fn place(&self, sequence: usize, position: usize) -> std::ops::Range<usize> {
        let at = 3 * (position % 2 * (self.heard.len() / 6) + sequence);
        at..at + 3
    }

    /// A replayed step wrote a row for each sequence.
    fn note(&self, inputs: &mut [Input]) {
        for input in inputs {
            let offset = input.state.offset;
            for &layer in &self.fed {
                match input.state.layers.get_mut(layer) {
                    Some(Memory::KeyValue(kv)) => kv.replayed(offset),
                    Some(Memory::State(state)) => state.numbers.turned(offset + 1),
                    None => {}
                }
            }
        }
    }

    fn read(&mut self, model: &Model, inputs: &[Input], ending: Ending<'_>) -> Result<Made> {
        let (Some((mut done, has_drawn)), Some(logits)) = (self.done.take(), self.logits.clone()) else {
            return Err(Error::Device("--device cuda: no step was started".into()));
        };
        if let Ending::Drawn(sampler, text) = ending
            && let Some(drawn) =
                self.draw_by(sampler, text, has_drawn, inputs.first().map_or(0, |i| i.state.offset - 1))?
        {
            done = drawn;
        }
        let draws = matches!(ending, Ending::Drawn(..));
        if matches!(ending, Ending::Logits) || draws && self.drawing.is_none() {
            return Ok(Made::Logits(logits.to_vec2::<f32>()?));
        }
        if self.graph.is_some() && caches(model, inputs)? == self.caches {
            self.launch(model)?;
            let next = inputs.first().map_or(0, |i| i.state.offset);
            self.ahead = Some((if draws { self.draw(true, next)? } else { self.end()? }, draws));
        }
        done.synchronize().w()?;
        let mut chosen = Vec::with_capacity(inputs.len());
        let heard = self.heard.as_slice().w()?;
        for (sequence, input) in inputs.iter().enumerate() {
            let Some(&[id, logprob, sound]) = heard.get(self.place(sequence, input.state.offset - 1)) else { break };
            if sound == 0 {
                return Err(Error::Generate(
                    "logits: one is no number, or infinite, so no token can be chosen: the weights are damaged, or the dtype is too narrow \
                     for this model"
                        .into(),
                ));
            }
            chosen.push((id, f32::from_bits(logprob)));
        }
        if let (true, Some(drawing), Some(&(id, _))) = (draws, &mut self.drawing, chosen.first()) {
            drawing.heard(id);
        }
        let next = inputs.iter().map(|i| i.state.offset as u32).collect();
        self.holds = Some([chosen.iter().map(|&(id, _)| id).collect(), next]);
        Ok(Made::Chosen(chosen))
    }
}
