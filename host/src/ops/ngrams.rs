//! Ids of n-grams, by which some models look up a table beside that of single tokens.

use super::{
    running::Running,
    value::{Outcome, Value, fault},
};
use plugin_api::abi::Handle;

impl Running<'_> {
    /// Ids of the n-grams that end at each token.
    pub fn ngrams(&mut self, tokens: Handle, n: u64, base: u64, modulus: u64) -> Outcome {
        let tokens = self.arena.get(tokens)?;
        if modulus == 0 || tokens.dims()? != [self.tokens] {
            return Err(fault!("{n}-grams of {:?} modulo {modulus}", tokens.dims()?));
        }
        let Value::Real(ids) = &tokens else { return Ok(tokens) };
        #[cfg(feature = "cuda")]
        if let (1, true, Ok(by)) = (n, ids.device().is_cuda(), u32::try_from(modulus)) {
            return Ok(Value::Real(crate::kernels::cuda::ids::modulo(ids, by)?));
        }
        let (ids, modulus) = (ids.to_vec1::<u32>()?, modulus as u128);
        let mut hashes = Vec::with_capacity(ids.len());
        for part in &self.parts {
            let text: Vec<u32> = part.state.tokens.iter().chain(&ids[part.tokens.clone()]).copied().collect();
            for end in part.state.tokens.len()..text.len() {
                let (mut hash, mut power) = (0u128, 1 % modulus);
                for &id in text[..=end].iter().rev().take(n as usize) {
                    hash = (hash + id as u128 * power) % modulus;
                    power = power * base as u128 % modulus;
                }
                hashes.push(hash as u32);
            }
        }
        Ok(Value::Real(candle_core::Tensor::from_vec(hashes, ids.len(), &self.place.device)?))
    }
}
