//! Shapes of an attention with few queries -> the two kernels that do it. See attention.metal.

use super::launch::{Kernel, Launch, Source, number, word};
use candle_core::DType;

/// Up to this many queries of a sequence are done so.
pub const FEW: usize = 8;

/// Waves of a group, see `KEY_WAVES`.
const WAVES: usize = 8;

/// Stretches that a cache is cut into at most, and entries below which a stretch is not worth a group.
const STRETCHES: usize = 32;
const STRETCH: usize = 128;

/// Sizes, and how scores are made; names are those of `kernels::cpu::Attend`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attention {
    /// Queries.
    pub tokens: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, which divide those of queries.
    pub kv_heads: usize,
    /// Keys.
    pub entries: usize,
    /// Lanes of a key.
    pub d: usize,
    /// Lanes of a value.
    pub e: usize,
    /// Whether a key's first `e` lanes are its value.
    pub values_in_keys: bool,
    /// Multiplies q·k.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// Keys seen, counting the query's own.
    pub window: Option<usize>,
    /// Keys at positions below this are seen beyond the window.
    pub keep: usize,
    /// Keys are seen from the last multiple of this on.
    pub chunk: Option<usize>,
    /// Where the first query stands; the others follow it.
    pub first_query: usize,
    /// Where the first key stands, if the others follow it; without, positions are given.
    pub first_key: Option<usize>,
    /// Whether scores fall with the distance.
    pub slopes: bool,
    /// Whether a sink joins each softmax.
    pub sinks: bool,
}

impl Attention {
    fn stretch(&self) -> usize {
        self.entries.div_ceil(STRETCHES).max(STRETCH)
    }

    fn stretches(&self) -> usize {
        self.entries.div_ceil(self.stretch()).max(1)
    }

    fn numbers(&self) -> Vec<u32> {
        let sizes = [self.heads, self.kv_heads, self.entries, self.stretch(), self.stretches()];
        let sight = [self.window.unwrap_or(0), self.keep, self.chunk.unwrap_or(0)];
        let mut numbers: Vec<u32> = sizes.into_iter().map(number).collect();
        numbers.push(number(if self.values_in_keys { self.d } else { self.e }));
        numbers.extend(sight.map(number));
        numbers.extend([self.scale.to_bits(), self.softcap.unwrap_or(0.0).to_bits()]);
        numbers.extend([u32::from(self.slopes), u32::from(self.sinks), number(self.first_query)]);
        numbers.extend([number(self.first_key.unwrap_or(0)), u32::from(self.first_key.is_none())]);
        numbers
    }

    fn kernel(maker: &'static str, dtype: DType, sizes: &[usize]) -> Option<Kernel> {
        let of = std::iter::once(word(dtype)?.to_owned()).chain(sizes.iter().map(usize::to_string)).collect();
        Some(Kernel { source: Source::Attention, maker, of })
    }

    /// Inputs: q `[tokens, heads, d]`, keys `[entries, kv_heads, d]`, values `[entries, kv_heads, e]`, all of one type; positions (u32)
    /// `[entries]` and slopes `[heads]`, or any tensors where there are none. Output: sums of each stretch.
    pub fn stretched(&self, dtype: DType) -> Option<Launch> {
        let (heads, stretches, width) = (self.heads, self.stretches(), 2 + self.e);
        Some(Launch {
            kernel: Self::kernel("ATTEND", dtype, &[self.d, self.e])?,
            numbers: self.numbers(),
            groups: [heads, self.tokens, stretches],
            threads: 32 * WAVES,
            shared: WAVES * width * 4,
            outputs: vec![(vec![self.tokens, heads, stretches, width], DType::F32)],
        })
    }

    /// Inputs: those sums, and sinks `[heads]` or any tensor where there are none. Output `[tokens, heads, e]`.
    pub fn joined(&self, dtype: DType) -> Option<Launch> {
        Some(Launch {
            kernel: Self::kernel("JOIN", dtype, &[self.e])?,
            numbers: self.numbers(),
            groups: [self.heads, self.tokens, 1],
            threads: 256,
            shared: 0,
            outputs: vec![(vec![self.tokens, self.heads, self.e], dtype)],
        })
    }
}
