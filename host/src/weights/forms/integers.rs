//! Integer weights of any tool -> our affine layout. Theirs: w = (q - zero) * scale for groups along a row; ours: w = q * scale + bias,
//! bias = -zero * scale, in groups of 32, 64 or 128, so that larger groups are cut and repeat their scale. Numbers stay exact: where
//! a bias does not fit the type of the scales, both are kept in f32. What no group of ours divides is unpacked to f32.

use crate::{
    error::{Error, Result},
    kernels::cpu::{Float, Format, Matrix},
    weights::bytes::Bytes,
};
use rayon::prelude::*;

/// Where the numbers come from.
pub enum Numbers<'a> {
    /// Rows of a little-endian bit stream each, whole 32-bit words long.
    Packed(Bytes),
    /// Writes all numbers of a row.
    Row(&'a (dyn Fn(usize, &mut [u8]) + Sync)),
}

/// A matrix `[rows, cols]` of integers.
pub struct Integers<'a> {
    pub rows: usize,
    pub cols: usize,
    /// Of a number; at most 8.
    pub bits: u32,
    pub numbers: Numbers<'a>,
    /// `[rows, groups]`
    pub scales: Vec<f32>,
    /// What the scales are stored in.
    pub float: Float,
    /// One for all, or `[rows, groups]`.
    pub zeros: Vec<f32>,
    /// The group of each column, where columns do not simply follow each other (act-order).
    pub group_of: Option<Vec<usize>>,
}

impl Integers<'_> {
    /// Packed, or dense where that cannot be. The number of groups is that of the scales.
    pub fn matrix(self) -> Result<Matrix> {
        let groups = self.scales.len() / self.rows.max(1);
        let odd = |what: String| Err(Error::Weights(what));
        if groups == 0 || self.scales.len() != self.rows * groups || !self.cols.is_multiple_of(groups) {
            return odd(format!("{} scales do not divide [{}, {}] weights", self.scales.len(), self.rows, self.cols));
        }
        if self.zeros.len() != 1 && self.zeros.len() != self.scales.len() {
            return odd(format!("{} zero points for {} scales", self.zeros.len(), self.scales.len()));
        }
        let group = self.cols / groups;
        let order = match &self.group_of {
            None => None,
            Some(of) if of.len() != self.cols || of.iter().any(|&g| g >= groups) => {
                return odd(format!("g_idx does not name one of {groups} groups for each of {} columns", self.cols));
            }
            Some(of) if of.iter().enumerate().all(|(column, &g)| g == column / group) => None,
            Some(of) => {
                // Columns of one group are brought together, and activations with them: a gather of each token's inputs, where unpacking
                // would cost four times the memory.
                let mut order: Vec<u32> = (0..self.cols as u32).collect();
                order.sort_by_key(|&column| of[column as usize]);
                if order.iter().enumerate().any(|(j, &column)| of[column as usize] != j / group) {
                    return self.dense(groups);
                }
                Some(order)
            }
        };
        let ours = [128, 64, 32].into_iter().find(|unit| group.is_multiple_of(*unit));
        match ours.filter(|_| matches!(self.bits, 2 | 3 | 4 | 5 | 6 | 8)) {
            Some(unit) => self.affine(unit, group / unit, order),
            None => self.dense(groups),
        }
    }

    fn affine(self, unit: usize, repeat: usize, order: Option<Vec<u32>>) -> Result<Matrix> {
        let (rows, cols, bits) = (self.rows, self.cols, self.bits);
        let bias = |i: usize| -self.zero(i) * self.scales[i];
        let fits = (0..self.scales.len()).all(|i| self.float.round(bias(i)) == bias(i));
        let float = if fits { self.float } else { Float::F32 };
        let spread = |value: &dyn Fn(usize) -> f32| {
            let mut bytes = Vec::with_capacity(self.scales.len() * repeat * float.size());
            (0..self.scales.len()).for_each(|i| (0..repeat).for_each(|_| float.write(value(i), &mut bytes)));
            Bytes::from(bytes)
        };
        let (scales, biases) = (spread(&|i| self.scales[i]), spread(&bias));
        let format = Format::Affine { bits, group: unit, scales: float };
        let [row_bytes, ..] = format.row_bytes(cols);
        let data = match &self.numbers {
            Numbers::Packed(bytes) if order.is_none() => bytes.clone(),
            _ => {
                let mut data = vec![0; rows * row_bytes];
                let pack = |numbers: &mut (Vec<u8>, Vec<u8>), (row, out): (usize, &mut [u8])| {
                    let (stored, ordered) = numbers;
                    stored.resize(cols, 0);
                    self.row(row, stored);
                    match &order {
                        Some(order) => {
                            ordered.clear();
                            ordered.extend(order.iter().map(|&column| stored[column as usize]));
                            pack_row(ordered, bits, out);
                        }
                        None => pack_row(stored, bits, out),
                    }
                };
                data.par_chunks_mut(row_bytes).enumerate().for_each_init(Default::default, pack);
                data.into()
            }
        };
        let matrix = Matrix::new(format, rows, cols, data, Some(scales), Some(biases))?;
        match order {
            Some(order) => matrix.with_column_order(order),
            None => Ok(matrix),
        }
    }

    fn dense(&self, groups: usize) -> Result<Matrix> {
        let (cols, group) = (self.cols, self.cols / groups);
        let mut data = vec![0; self.rows * cols * 4];
        data.par_chunks_mut(cols * 4).enumerate().for_each_init(Vec::new, |numbers, (row, out)| {
            numbers.resize(cols, 0);
            self.row(row, numbers);
            for (column, (&q, out)) in numbers.iter().zip(out.as_chunks_mut().0).enumerate() {
                let i = row * groups + self.group_of.as_ref().map_or(column / group, |of| of[column]);
                *out = ((f32::from(q) - self.zero(i)) * self.scales[i]).to_le_bytes();
            }
        });
        Matrix::new(Format::Dense(Float::F32), self.rows, cols, data.into(), None, None)
    }

    fn zero(&self, i: usize) -> f32 {
        if let [one] = self.zeros[..] { one } else { self.zeros[i] }
    }

    fn row(&self, row: usize, numbers: &mut [u8]) {
        match &self.numbers {
            Numbers::Row(write) => write(row, numbers),
            Numbers::Packed(bytes) => {
                let stride = bytes.len() / self.rows.max(1);
                unpack(&bytes[row * stride..(row + 1) * stride], self.bits, numbers);
            }
        }
    }
}

/// Number i of a little-endian bit stream takes bits `i * bits ..`; missing ones are 0.
pub fn unpack(stream: &[u8], bits: u32, numbers: &mut [u8]) {
    for (eight, bytes) in numbers.chunks_mut(8).zip(stream.chunks(bits as usize)) {
        let word = bytes.iter().rev().fold(0u64, |word, &b| word << 8 | u64::from(b));
        for (i, number) in eight.iter_mut().enumerate() {
            *number = (word >> (i as u32 * bits) & ((1 << bits) - 1)) as u8;
        }
    }
}

/// The way back, for a multiple of eight numbers.
fn pack_row(numbers: &[u8], bits: u32, out: &mut [u8]) {
    for (eight, out) in numbers.chunks(8).zip(out.chunks_mut(bits as usize)) {
        let word = eight.iter().rev().fold(0u64, |word, &q| word << bits | u64::from(q));
        out.iter_mut().zip(word.to_le_bytes()).for_each(|(out, byte)| *out = byte);
    }
}

/// `[rows, cols]` to `[cols, rows]`.
pub fn turned<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    let rows = values.len() / cols.max(1);
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}
