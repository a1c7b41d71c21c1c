//! Turning on CUDA, where positions lie on the device. A step that is to be replayed when the text is longer must not look at its length; but
//! most ropes that do so have two sets of frequencies, and a text goes over from the one to the other once: then it is recorded anew.

use super::{ByLength, Rope, Span};
use crate::{
    kernels::{cpu::Turn, cuda::step},
    ops::running::Places,
};
use candle_core::{Device, Result, Tensor, bail};

impl Rope {
    /// Which of two sets of frequencies a text of `len` tokens has; none where each length has its own.
    pub fn set(&self, len: usize) -> Option<usize> {
        match &self.by_length {
            ByLength::Never => Some(0),
            ByLength::Long { original, .. } => Some(usize::from(len as f64 > *original)),
            ByLength::Dynamic { max, .. } => (len as f64 <= *max).then_some(0),
        }
    }

    /// Whether the length of the text matters.
    pub fn looks_at_length(&self) -> bool {
        !matches!(self.by_length, ByLength::Never)
    }

    fn of_set(&self, set: usize, device: &Device) -> Result<(&Tensor, f32)> {
        let (frequencies, amplitude) = match &self.by_length {
            ByLength::Long { long, amplitude, .. } if set == 1 => (long, *amplitude),
            _ => (&self.inv_freq, self.amplitude),
        };
        let kept = &self.there[set.min(1)];
        let there = match kept.get() {
            Some(there) => there,
            None => {
                let there = Tensor::new(&frequencies[..], device)?;
                kept.get_or_init(|| there)
            }
        };
        Ok((there, amplitude))
    }

    /// Frequencies on the GPU, and the amplitude, if they are the same for texts of all these lengths and of the next ones.
    pub fn on_cuda(&self, device: &Device, lengths: impl Iterator<Item = usize>) -> Result<Option<(&Tensor, f32)>> {
        let mut sets = lengths.map(|len| self.set(len));
        let first = sets.next().flatten();
        match first.filter(|_| sets.all(|set| set == first)) {
            Some(set) => self.of_set(set, device).map(Some),
            None => Ok(None),
        }
    }

    /// Turns x `[tokens, heads, head_dim]` at positions `[tokens]`; `spans` say which tokens are of which text.
    pub fn rotate_on_cuda(
        &self,
        x: &Tensor,
        spans: &[Span],
        Places { positions, recorded }: &Places,
        block: usize,
        turn: Turn,
    ) -> Result<Tensor> {
        if let Some(how) = self.on_cuda(x.device(), spans.iter().map(Span::text))? {
            return step::rope(x, positions, how, block, turn);
        }
        let (mut turned, mut start) = (Vec::with_capacity(spans.len()), 0);
        for span in spans {
            let rows = |t: &Tensor| t.narrow(0, start, span.len);
            let own;
            let how = match self.set(span.text()) {
                Some(set) => self.of_set(set, x.device())?,
                None if *recorded => bail!("a rope that turns by the length of the text"),
                None => {
                    own = Tensor::new(&*self.frequencies(span.text()), x.device())?;
                    (&own, self.amplitude(span.text()))
                }
            };
            turned.push(step::rope(&rows(x)?, &rows(positions)?, how, block, turn)?);
            start += span.len;
        }
        if turned.len() == 1 { Ok(turned.remove(0)) } else { Tensor::cat(&turned, 0) }
    }
}
