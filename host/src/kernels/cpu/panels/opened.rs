//! A row of the checkpoint as the strips of a panel: GGUF's blocks lose the scales that lie in them, and numbers of odd bits come apart into
//! planes. Four columns lie in a 32-bit word, a byte each, whenever numbers are moved; so all moves are shifts of whole words.

use super::layout::{Layout, Order, STRIPS};
use crate::kernels::cpu::{
    dequantize::{scale_and_min, six_bit_scale},
    format::Format,
};

/// The strips of one row, kept from row to row for their room.
#[derive(Default)]
pub(super) struct Strips([Vec<u8>; STRIPS]);

impl Strips {
    /// A row's `[data, scales, biases]` as strips. What needs no change stays where it is.
    pub(super) fn of<'a>(&'a mut self, layout: &Layout, row: [&'a [u8]; 3]) -> [&'a [u8]; STRIPS] {
        let [data, scales, biases] = row;
        self.0.iter_mut().for_each(Vec::clear);
        match layout.format {
            Format::Affine { bits: 3 | 5 | 6, .. } => {
                self.stream(layout, data);
                let [low, high, ..] = &self.0;
                return [low, high, scales, biases, &[], &[]];
            }
            _ if layout.order == Order::InTurns && !layout.is_signed() => {
                return [data, &[], scales, if layout.biased { biases } else { &[] }, &[], &[]];
            }
            Format::Q4_0 => self.plain::<18, 16>(layout, data),
            Format::Q8_0 => self.plain::<34, 32>(layout, data),
            Format::Q4_1 => self.plain::<20, 16>(layout, data),
            Format::Q5_0 => self.blocks::<22>(data, |to, block| to.fives(layout, block, [0, 2])),
            Format::Q5_1 => self.blocks::<24>(data, |to, block| to.fives(layout, block, [2, 4])),
            Format::Q2K => self.blocks(data, Self::q2_k),
            Format::Q3K => self.blocks(data, Self::q3_k),
            Format::Q4K => self.blocks(data, Self::q4_k),
            Format::Q5K => self.blocks(data, Self::q5_k),
            _ => self.blocks(data, Self::q6_k),
        }
        self.0.each_ref().map(|strip| &strip[..])
    }

    fn blocks<const SIZE: usize>(&mut self, data: &[u8], each: impl Fn(&mut Self, &[u8; SIZE])) {
        data.as_chunks().0.iter().for_each(|block| each(self, block));
    }

    /// Blocks of a scale, a bias if there is room for one, and numbers as they are.
    fn plain<const SIZE: usize, const NUMBERS: usize>(&mut self, layout: &Layout, data: &[u8]) {
        let [low, _, scales, biases, ..] = &mut self.0;
        let (blocks, _) = data.as_chunks::<SIZE>();
        low.resize(blocks.len() * NUMBERS, 0);
        scales.resize(blocks.len() * 2, 0);
        let sign = if layout.is_signed() { 0x80 } else { 0 };
        let to = low.as_chunks_mut::<NUMBERS>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
        for ((to, scale), block) in to.zip(blocks) {
            *scale = [block[0], block[1]];
            for (to, byte) in to.iter_mut().zip(&block[SIZE - NUMBERS..]) {
                *to = byte ^ sign;
            }
        }
        if layout.biased {
            biases.extend(blocks.iter().flat_map(|block| [block[2], block[3]]));
        }
    }

    /// A scale, a bias, 32 fifth bits, sixteen bytes of halves.
    fn fives(&mut self, layout: &Layout, block: &[u8], [bias, fifths]: [usize; 2]) {
        let [low, high, scales, biases, ..] = &mut self.0;
        scales.extend(&block[..2]);
        if layout.biased {
            biases.extend(&block[bias..fifths]);
        }
        let [fifth, a, b, c, d] = words(&block[fifths..]);
        for shift in [0, 4] {
            put(low, [stacked(&[a, b], shift, 4), stacked(&[c, d], shift, 4)]);
        }
        // Four bits of neighbouring columns to four bytes: the product has bit i of the four at bit 8 i.
        let apart = |v: u32| (((fifth >> (4 * v) & 15) * 0x0020_4081) & 0x0101_0101) << v;
        put(high, [(0..8).fold(0, |all, v| all | apart(v))]);
    }

    fn q2_k(&mut self, block: &[u8; 84]) {
        let [low, _, scales, _, steps, bias_steps] = &mut self.0;
        scales.extend(&block[..16]);
        pairs(low, &block[16..80]);
        steps.extend(&block[80..82]);
        bias_steps.extend(negative(&block[82..84]));
    }

    fn q3_k(&mut self, block: &[u8; 110]) {
        let [low, high, scales, _, steps, _] = &mut self.0;
        pairs(low, &block[32..96]);
        let thirds: [u32; 8] = words(&block[..32]);
        put(high, [0, 1, 2, 3, 4, 5, 6, 7].map(|group| stacked(&thirds, group, 1)));
        scales.extend((0..16).map(|s| six_bit_scale(&block[96..108], s).wrapping_sub(32)));
        steps.extend(&block[108..110]);
    }

    fn q4_k(&mut self, block: &[u8; 144]) {
        self.minima(&block[..16]);
        halves(&mut self.0[0], &block[16..144]);
    }

    fn q5_k(&mut self, block: &[u8; 176]) {
        self.minima(&block[..16]);
        halves(&mut self.0[0], &block[48..176]);
        let fifths: [u32; 8] = words(&block[16..48]);
        put(&mut self.0[1], [0, 1, 2, 3, 4, 5, 6, 7].map(|group| stacked(&fifths, group, 1)));
    }

    fn q6_k(&mut self, block: &[u8; 210]) {
        let [low, high, scales, _, steps, _] = &mut self.0;
        for half in 0..2 {
            let lows: [u32; 16] = words(&block[64 * half..]);
            for part in 0..4 {
                let lows = &lows[part % 2 * 8..part % 2 * 8 + 8];
                put(low, [0, 1, 2, 3].map(|piece| stacked(&lows[2 * piece..2 * piece + 2], part as u32 / 2 * 4, 4)));
            }
        }
        pairs(high, &block[128..192]);
        scales.extend(&block[192..208]);
        steps.extend(&block[208..210]);
    }

    /// What Q4_K and Q5_K begin with: two steps, and eight scales and minima in six bits each. A minimum is what is taken away.
    fn minima(&mut self, block: &[u8]) {
        let [_, _, scales, biases, steps, bias_steps] = &mut self.0;
        steps.extend(&block[..2]);
        bias_steps.extend(negative(&block[2..4]));
        for s in 0..8 {
            let (scale, min) = scale_and_min(&block[4..16], s);
            scales.push(scale);
            biases.push(min);
        }
    }

    /// A stream of numbers, `layout.bits` each, of which eight fill whole bytes.
    fn stream(&mut self, layout: &Layout, data: &[u8]) {
        let (bits, high) = (layout.bits, layout.high as u32);
        let low = bits as u32 - high;
        let mask = (1u64 << bits) - 1;
        let four = |stream: u64| (0..4).fold(0, |all, i| all | ((stream >> (bits * i) & mask) as u32) << (8 * i));
        for block in data.chunks_exact(4 * bits) {
            let mut numbers = [0; 8];
            for (pair, bytes) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(block.chunks_exact(bits)) {
                let stream = bytes.iter().rev().fold(0, |stream, &byte| stream << 8 | u64::from(byte));
                *pair = [four(stream), four(stream >> (4 * bits))];
            }
            numbers.chunks_exact(8 / low as usize).for_each(|words| put(&mut self.0[0], [stacked(words, 0, low)]));
            numbers.chunks_exact(8 / high as usize).for_each(|words| put(&mut self.0[1], [stacked(words, low, high)]));
        }
    }
}

/// Little-endian words of the first bytes.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let all = bytes.as_chunks::<4>().0;
    std::array::from_fn(|i| u32::from_le_bytes(all[i]))
}

fn put<const N: usize>(to: &mut Vec<u8>, pieces: [u32; N]) {
    to.extend_from_slice(pieces.map(u32::to_le_bytes).as_flattened());
}

/// `bits` bits of each byte, from bit `shift` on, of words one after the other: those of the first in the lowest bits of each byte.
fn stacked(words: &[u32], shift: u32, bits: u32) -> u32 {
    let mask = 0x0101_0101 * ((1 << bits) - 1);
    words.iter().rev().fold(0, |all, word| all << bits | (word >> shift & mask))
}

/// Halves of bytes, of which 32 hold 64 columns: first the low halves, then the high ones.
fn halves(low: &mut Vec<u8>, bytes: &[u8]) {
    const LOW: u32 = 0x0f0f_0f0f;
    for bytes in bytes.as_chunks::<32>().0 {
        let (w, mut pieces): ([u32; 8], _) = (words(bytes), [[0; 4]; 8]);
        for piece in 0..4 {
            let [a, b] = [w[2 * piece], w[2 * piece + 1]];
            pieces[piece] = (a & LOW | (b & LOW) << 4).to_le_bytes();
            pieces[4 + piece] = (a >> 4 & LOW | b & !LOW).to_le_bytes();
        }
        low.extend_from_slice(pieces.as_flattened());
    }
}

/// Pairs of bits, of which 32 bytes hold 128 columns: first the lowest of all bytes, then the next ones.
fn pairs(to: &mut Vec<u8>, bytes: &[u8]) {
    for bytes in bytes.as_chunks::<32>().0 {
        let w: [u32; 8] = words(bytes);
        for shift in [0, 2, 4, 6] {
            put(to, [stacked(&w[..4], shift, 2), stacked(&w[4..], shift, 2)]);
        }
    }
}

/// An f16 with its sign turned.
fn negative(half: &[u8]) -> [u8; 2] {
    [half[0], half[1] ^ 0x80]
}
