//! Dense weights -> the same in the formats of other tools, written down from their descriptions and not from the code that reads them.
//! Each encoder also gives the numbers that it really stored, computed on its own; scales have eight bits, so that those are exact.

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::path::Path;

/// A tensor to be stored.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name, or what comes after the module's path.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub bytes: Vec<u8>,
}

/// One packed weight.
pub struct Packed {
    /// Named by what comes after the module's path: `.qweight`.
    pub tensors: Vec<Tensor>,
    /// What they stand for, `[out, in]`.
    pub back: Vec<f32>,
}

/// A format, with its numbers.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Packing {
    /// 2, 3, 4 or 8 bits; inputs sorted by importance or not; zero points stored less one or not.
    Gptq {
        bits: usize,
        group: usize,
        act_order: bool,
        less_one: bool,
    },
    Awq {
        group: usize,
    },
    /// compressed-tensors, symmetric.
    Ints {
        bits: usize,
        group: usize,
    },
    /// compressed-tensors, a byte a weight, a scale a row.
    Int8,
    /// DeepSeek's.
    Fp8 {
        block: [usize; 2],
    },
    /// compressed-tensors' NVFP4.
    Nvfp4,
    /// BitNet's codes; whether the scale divides.
    Ternary {
        divides: bool,
    },
}

/// `.name`, i32 of these words.
fn words(name: &str, shape: [usize; 2], words: Vec<u32>) -> Tensor {
    let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
    Tensor { name: name.into(), dtype: Dtype::I32, shape: shape.into(), bytes }
}

/// `.name`, f16 or bf16 of numbers that either can hold.
fn halves(name: &str, dtype: Dtype, shape: &[usize], x: impl Iterator<Item = f32>) -> Tensor {
    let bf16 = |x: f32| (x.to_bits() >> 16) as u16;
    // For normal numbers only: an exponent with another bias, the mantissa's upper ten bits.
    let f16 = |x: f32| ((x.to_bits() >> 13) - (112 << 10)) as u16;
    let bytes = x.flat_map(|x| if dtype == Dtype::F16 { f16(x) } else { bf16(x) }.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype, shape: shape.into(), bytes }
}

fn floats(name: &str, shape: &[usize], x: &[f32]) -> Tensor {
    let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
}

/// A bit stream of numbers in 32-bit words.
fn stream(numbers: impl Iterator<Item = u32>, bits: usize, len: usize) -> Vec<u32> {
    let mut words = vec![0u32; len];
    for (i, q) in numbers.enumerate() {
        for bit in 0..bits {
            let at = i * bits + bit;
            words[at / 32] |= (q >> bit & 1) << (at % 32);
        }
    }
    words
}

/// The byte that E4M3 has for the number nearest below |x|, and that number: found among all of them.
pub fn e4m3(x: f32) -> (u8, f32) {
    let value = |b: u8| {
        let (e, m) = (i32::from(b >> 3 & 15), f32::from(b & 7));
        if e == 0 { m / 8.0 * 2f32.powi(-6) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) }
    };
    let best = (0u8..0x7f).filter(|&b| value(b) <= x.abs()).max_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap_or(0);
    let sign = if x < 0.0 { (0x80, -1.0) } else { (0, 1.0) };
    (best | sign.0, value(best) * sign.1)
}

/// At most eight significant bits.
fn eight_bits(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

/// Integers of a matrix: number, zero point and scale of each weight's group.
struct Grouped {
    q: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f32>,
}

/// Groups by `group_of[column]`; zero points differ unless `symmetric`.
fn grouped(w: &[f32], cols: usize, bits: usize, group_of: &[usize], symmetric: bool) -> Grouped {
    let (groups, top) = (group_of.iter().max().unwrap_or(&0) + 1, (1u32 << bits) - 1);
    let mut g = Grouped { q: Vec::new(), zeros: Vec::new(), scales: Vec::new() };
    for (r, row) in w.chunks(cols).enumerate() {
        for group in 0..groups {
            let mine = || row.iter().zip(group_of).filter(|(_, of)| **of == group).map(|(w, _)| w.abs());
            g.scales.push(eight_bits(mine().fold(0.001, f32::max) * 2.2 / top as f32));
            let middle = 1 << (bits - 1);
            // Never 0: stored less one, that would not fit.
            g.zeros.push(if symmetric { middle } else { (middle + (r + group) as u32 % 3).clamp(1, top) });
        }
        for (w, of) in row.iter().zip(group_of) {
            let (s, z) = (g.scales[r * groups + of], g.zeros[r * groups + of]);
            g.q.push((w / s + z as f32).round().clamp(0.0, top as f32) as u32);
        }
    }
    g
}

impl Grouped {
    fn back(&self, cols: usize, group_of: &[usize]) -> Vec<f32> {
        let groups = self.scales.len() / (self.q.len() / cols);
        let one = |(i, q): (usize, &u32)| {
            let at = i / cols * groups + group_of[i % cols];
            (*q as f32 - self.zeros[at] as f32) * self.scales[at]
        };
        self.q.iter().enumerate().map(one).collect()
    }
}

fn turned<T: Copy>(x: &[T], cols: usize) -> impl Iterator<Item = T> + '_ {
    (0..cols).flat_map(move |c| x.iter().skip(c).step_by(cols).copied())
}

impl Packing {
    /// What config.json says under `quantization_config`.
    pub fn config(self) -> Value {
        match self {
            Packing::Gptq { bits, group, act_order, less_one } => json!({
                "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": false,
                "checkpoint_format": if less_one { "gptq" } else { "gptq_v2" },
            }),
            Packing::Awq { group } => {
                json!({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": true})
            }
            Packing::Ints { .. } => json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            Packing::Int8 => json!({"quant_method": "compressed-tensors", "format": "int-quantized"}),
            Packing::Nvfp4 => json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            Packing::Fp8 { block } => {
                json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block})
            }
            Packing::Ternary { divides } => json!({
                "quant_method": "bitnet", "linear_class": if divides { "bitlinear" } else { "autobitlinear" },
                "quantization_mode": "offline",
            }),
        }
    }

    /// Packs `w` `[rows, cols]`; rows a multiple of 8, columns of the group.
    pub fn pack(self, w: &[f32], cols: usize) -> Packed {
        let rows = w.len() / cols;
        match self {
            Packing::Gptq { bits, group, act_order, less_one } => {
                let groups = cols / group;
                // 5 has no factor in common with the columns in use.
                let group_of: Vec<usize> =
                    (0..cols).map(|c| if act_order { c * 5 % cols } else { c } / group).collect();
                let g = grouped(w, cols, bits, &group_of, false);
                let columns: Vec<u32> =
                    g.q.chunks(cols).flat_map(|q| stream(q.iter().copied(), bits, cols * bits / 32)).collect();
                let stored: Vec<u32> = g.zeros.iter().map(|z| z - u32::from(less_one)).collect();
                let zeros: Vec<u32> = turned(&stored, groups).collect();
                let zeros =
                    zeros.chunks(rows).flat_map(|z| stream(z.iter().copied(), bits, (rows * bits).div_ceil(32)));
                let index = group_of.iter().map(|&g| g as u32).collect();
                let mut g_idx = words(".g_idx", [cols, 1], index);
                g_idx.shape = vec![cols];
                let tensors = vec![
                    words(".qweight", [cols * bits / 32, rows], turned(&columns, cols * bits / 32).collect()),
                    words(".qzeros", [groups, (rows * bits).div_ceil(32)], zeros.collect()),
                    halves(".scales", Dtype::F16, &[groups, rows], turned(&g.scales, groups)),
                    g_idx,
                ];
                Packed { tensors, back: g.back(cols, &group_of) }
            }
            Packing::Awq { group } => {
                let groups = cols / group;
                let group_of: Vec<usize> = (0..cols).map(|c| c / group).collect();
                let g = grouped(w, cols, 4, &group_of, false);
                // Output 8 c + order[i] in nibble i.
                let word = |eight: &[u32]| {
                    [0, 2, 4, 6, 1, 3, 5, 7].iter().enumerate().fold(0, |word, (i, &j)| word | eight[j] << (4 * i))
                };
                let lines = |x: &[u32], cols: usize| turned(x, cols).collect::<Vec<_>>().chunks(8).map(word).collect();
                let tensors = vec![
                    words(".qweight", [cols, rows / 8], lines(&g.q, cols)),
                    words(".qzeros", [groups, rows / 8], lines(&g.zeros, groups)),
                    halves(".scales", Dtype::F16, &[groups, rows], turned(&g.scales, groups)),
                ];
                Packed { tensors, back: g.back(cols, &group_of) }
            }
            Packing::Ints { bits, group } => {
                let group_of: Vec<usize> = (0..cols).map(|c| c / group).collect();
                let g = grouped(w, cols, bits, &group_of, true);
                let len = (cols * bits).div_ceil(32);
                let packed = g.q.chunks(cols).flat_map(|q| stream(q.iter().copied(), bits, len)).collect();
                let shape = [rows as i64, cols as i64].into_iter().flat_map(i64::to_le_bytes).collect();
                let tensors = vec![
                    words(".weight_packed", [rows, len], packed),
                    halves(".weight_scale", Dtype::BF16, &[rows, cols / group], g.scales.iter().copied()),
                    Tensor { name: ".weight_shape".into(), dtype: Dtype::I64, shape: vec![2], bytes: shape },
                ];
                Packed { tensors, back: g.back(cols, &group_of) }
            }
            Packing::Int8 => {
                let g = grouped(w, cols, 8, &vec![0; cols], true);
                let bytes = g.q.iter().map(|&q| (q as i32 - 128) as i8 as u8).collect();
                let tensors = vec![
                    Tensor { name: ".weight".into(), dtype: Dtype::I8, shape: vec![rows, cols], bytes },
                    halves(".weight_scale", Dtype::BF16, &[rows, 1], g.scales.iter().copied()),
                ];
                Packed { tensors, back: g.back(cols, &vec![0; cols]) }
            }
            Packing::Fp8 { block: [high, wide] } => {
                let (down, across) = (rows.div_ceil(high), cols.div_ceil(wide));
                let scales: Vec<f32> = (0..down * across).map(|i| eight_bits(0.0013 * (1.0 + i as f32))).collect();
                let scale = |i: usize| scales[i / cols / high * across + i % cols / wide];
                let coded: Vec<(u8, f32)> = w.iter().enumerate().map(|(i, w)| e4m3(w / scale(i))).collect();
                let bytes = coded.iter().map(|(b, _)| *b).collect();
                let tensors = vec![
                    Tensor { name: ".weight".into(), dtype: Dtype::F8_E4M3, shape: vec![rows, cols], bytes },
                    floats(".weight_scale_inv", &[down, across], &scales),
                    floats(".input_scale", &[], &[1.0]),
                ];
                Packed { tensors, back: coded.iter().enumerate().map(|(i, (_, x))| x * scale(i)).collect() }
            }
            Packing::Nvfp4 => {
                const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
                // A power of two, so that dividing by it and multiplying by its inverse are the same.
                let global = 2048.0;
                let (mut data, mut scales, mut back) = (Vec::new(), Vec::new(), Vec::new());
                for w in w.chunks(16) {
                    let (byte, scale) = e4m3(w.iter().fold(0.001f32, |peak, w| peak.max(w.abs())) / 6.0 * global);
                    scales.push(byte);
                    let near = |w: &f32| {
                        let distance = |i: usize| (VALUES[i] - w.abs() / (scale / global)).abs();
                        let code = (0..8).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
                        if *w < 0.0 { (code as u8 | 8, -VALUES[code]) } else { (code as u8, VALUES[code]) }
                    };
                    let coded: Vec<(u8, f32)> = w.iter().map(near).collect();
                    data.extend(coded.chunks(2).map(|pair| pair[0].0 | pair[1].0 << 4));
                    back.extend(coded.iter().map(|(_, x)| x * (scale / global)));
                }
                let tensor = |name: &str, dtype, cols, bytes| Tensor {
                    name: name.into(),
                    dtype,
                    shape: vec![rows, cols],
                    bytes,
                };
                let tensors = vec![
                    tensor(".weight_packed", Dtype::U8, cols / 2, data),
                    tensor(".weight_scale", Dtype::F8_E4M3, cols / 16, scales),
                    floats(".weight_global_scale", &[1], &[global]),
                    floats(".input_global_scale", &[1], &[1.0]),
                ];
                Packed { tensors, back }
            }
            Packing::Ternary { divides } => {
                let scale = eight_bits(w.iter().fold(0.0f32, |peak, w| peak.max(w.abs())) / 2.0);
                let code = |w: f32| (w / scale).round_ties_even().clamp(-1.0, 1.0);
                let mut data = vec![0u8; w.len() / 4];
                for (i, &w) in w.iter().enumerate() {
                    let quarter = rows * cols / 4;
                    data[i % quarter] |= ((code(w) + 1.0) as u8) << (2 * (i / quarter));
                }
                let stored = if divides { 1.0 / scale } else { scale };
                let used = if divides { 1.0 / stored } else { scale };
                let tensors = vec![
                    Tensor { name: ".weight".into(), dtype: Dtype::U8, shape: vec![rows / 4, cols], bytes: data },
                    floats(".weight_scale", &[1], &[stored]),
                ];
                Packed { tensors, back: w.iter().map(|&w| code(w) * used).collect() }
            }
        }
    }
}

/// Writes a safetensors file.
pub fn write(tensors: &[Tensor], file: &Path) -> crate::tiny::Result<()> {
    let views = tensors
        .iter()
        .map(|t| Ok((&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)))
        .collect::<crate::tiny::Result<Vec<_>>>()?;
    Ok(safetensors::serialize_to_file(views, None, file)?)
}
