//! A step whose token the device draws by itself, and why it does not where it does not.

use super::{Input, Model};
use crate::{
    error::Result,
    sampler::{Choice, Sampler},
};

impl Model {
    /// The next token of a sequence, drawn by the sampler's settings after a step of one token, where the device can draw it by itself; none,
    /// and nothing done, where it cannot. `text` is all tokens so far.
    pub fn draw(
        &self,
        #[allow(unused)] input: Input,
        #[allow(unused)] sampler: &mut Sampler,
        #[allow(unused)] text: &[u32],
    ) -> Result<Option<Choice>> {
        #[cfg(feature = "cuda")]
        if self.not_drawn(sampler).is_none() {
            self.knows(input.tokens.iter())?;
            return self.drawn(input, sampler, text);
        }
        Ok(None)
    }

    /// Why a GPU that the model is on does not draw this sampler's tokens, if it does not.
    pub fn not_drawn(&self, sampler: &Sampler) -> Option<&'static str> {
        match &self.followers {
            Some(_) if !sampler.takes_the_most_likely() => Some("the model is shared out over several GPUs"),
            _ => sampler.not_on_a_gpu(),
        }
    }
}
