//! The choice at the end of a step that was replayed: a token that the sampler's settings draw on the device, with the host's numbers
//! of Philox. It is started behind the graph and not recorded with it, so that another sampler needs no other graph.

use super::{Made, Recorded};
use crate::{
    error::{Error, Result},
    kernels::cuda::{sample::Drawing, step::address},
    model::{Input, Model},
    sampler::{Choice, Sampler},
};
use candle_core::cuda_backend::{
    WrapErr,
    cudarc::driver::{CudaEvent, result},
};

/// What is wanted of a step.
#[derive(Clone, Copy)]
pub(super) enum Ending<'a> {
    Logits,
    Largest,
    /// A token of the only sequence, by this sampler, which has come so far in its text.
    Drawn(&'a Sampler, &'a [u32]),
}

impl Model {
    /// One step of one sequence by replay, at the end of which the token is drawn as the sampler would draw it; none, and nothing done, if
    /// the step cannot be replayed.
    pub(crate) fn drawn(&self, input: Input, sampler: &mut Sampler, text: &[u32]) -> Result<Option<Choice>> {
        Ok(match self.replay(&mut [input], Ending::Drawn(sampler, text))? {
            Some(Made::Chosen(chosen)) => {
                sampler.drew();
                chosen.first().map(|&(id, logprob)| Choice { id, logprob })
            }
            // Settings that the device cannot take; the step is done all the same.
            Some(Made::Logits(rows)) => {
                rows.into_iter().next().map(|mut row| sampler.sample(&mut row, text)).transpose()?
            }
            None => None,
        })
    }
}

impl Recorded {
    /// Draws a token from the logits of the step in hand, that of the token at `position`, unless it `has_drawn` one already as this sampler
    /// would; when it will have been heard of. Where the settings cannot be taken to the device there is no `drawing` afterwards.
    pub(super) fn draw_by(
        &mut self,
        sampler: &Sampler,
        text: &[u32],
        has_drawn: bool,
        position: usize,
    ) -> Result<Option<CudaEvent>> {
        let Some(logits) = &self.logits else { return Ok(None) };
        let width = logits.dim(1)?;
        let fits = self.drawing.as_ref().is_some_and(|drawing| drawing.is_at(sampler, text, width));
        if !fits {
            self.drawing = Drawing::new(sampler, text, width, &self.device)?;
        }
        match self.drawing.is_some() && !(fits && has_drawn) {
            true => self.draw(!has_drawn, position).map(Some),
            false => Ok(None),
        }
    }

    /// Draws a token from the logits of the latest step, that of the token at `position`, the largest of which it has told if it is `known`.
    pub(super) fn draw(&mut self, known: bool, position: usize) -> Result<CudaEvent> {
        let (Some(drawing), Some(logits)) = (&self.drawing, &self.logits) else {
            return Err(Error::Device("--device cuda: no sampler is there".into()));
        };
        drawing.run(logits, [self.coarse, known], &self.ids, &self.told)?;
        let (place, from) = (self.place(0, position), address(&self.told)?);
        let stream = self.device.cuda_stream();
        if let Some(heard) = self.heard.as_mut_slice().w()?.get_mut(place) {
            // SAFETY: both have three numbers; nobody reads there before the event below.
            unsafe { result::memcpy_dtoh_async(heard, from, stream.cu_stream()) }.w()?;
        }
        self.end()
    }
}
