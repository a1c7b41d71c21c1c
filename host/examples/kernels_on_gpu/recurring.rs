//! Recurrences on the GPU beside the CPU's, over two sequences in pieces of several lengths: what they give, and the states that they leave.

use super::Checks;
use candle_core::{DType, Result, Tensor};
use dylm::{
    cache::numbers::Numbers,
    kernels::{
        cpu::recurrence::{self as cpu, Decay, GatedDelta, LinearAttention, Shape, Ssd, Wkv7},
        cuda::recurrence::{Input, Segment, run},
        metal::{
            launch::Launch,
            recurrence::{self as kernels, Rule},
        },
    },
};

/// Tokens of a sequence, piece by piece.
const PIECES: [usize; 6] = [5, 1, 1, 70, 2, 1];

/// Tokens, whether the first is the text's first, the rows, the state and y.
type OnCpu<'a> = dyn Fn(usize, bool, &[&[f32]], &mut [f32], &mut [f32]) + 'a;

/// One recurrence: inputs `[tokens, width]` with their widths, and those that all tokens share, in the kernels' order.
struct Case<'a> {
    name: String,
    launch: &'a dyn Fn(usize) -> Option<Launch>,
    widths: Vec<usize>,
    shared: Vec<Vec<f32>>,
    state: usize,
    y: usize,
    on_cpu: &'a OnCpu<'a>,
}

fn fade(by: kernels::Decay, g: &[f32]) -> Decay<'_> {
    if matches!(by, kernels::Decay::Lane) { Decay::Lane(g) } else { Decay::Token(g) }
}

impl Checks {
    pub fn recurring(&mut self) -> Result<()> {
        for (heads, k_heads, d, e) in [(4, 2, 7, 11), (3, 3, 64, 64), (32, 16, 128, 128), (2, 1, 192, 40)] {
            let shape = |tokens| Shape { tokens, heads, k_heads, d, e };
            let (q, v) = (k_heads * d, heads * e);
            for (by, g) in [(kernels::Decay::Token, heads), (kernels::Decay::Lane, heads * d)] {
                self.case(&Case {
                    name: format!("linear attention, {by:?}, {heads} heads over {k_heads}, {d} x {e}"),
                    launch: &|tokens| kernels::recur(Rule::Linear, by, shape(tokens)),
                    widths: vec![q, q, v, g],
                    shared: Vec::new(),
                    state: heads * d * e,
                    y: v,
                    on_cpu: &|tokens, _, of, state, y| {
                        let g = fade(by, of[3]);
                        cpu::recur(&LinearAttention { shape: shape(tokens), q: of[0], k: of[1], v: of[2], g }, state, y)
                    },
                })?;
                self.case(&Case {
                    name: format!("gated delta, {by:?}, {heads} heads over {k_heads}, {d} x {e}"),
                    launch: &|tokens| kernels::recur(Rule::Delta, by, shape(tokens)),
                    widths: vec![q, q, v, g, heads],
                    shared: Vec::new(),
                    state: heads * d * e,
                    y: v,
                    on_cpu: &|tokens, _, of, state, y| {
                        let (q, k, v, g, beta) = (of[0], of[1], of[2], fade(by, of[3]), of[4]);
                        cpu::recur(&GatedDelta { shape: shape(tokens), q, k, v, g, beta }, state, y)
                    },
                })?;
            }
            let all = heads * d;
            self.case(&Case {
                name: format!("wkv7, {heads} heads of {d}"),
                launch: &|tokens| {
                    kernels::recur(Rule::Wkv7, kernels::Decay::Lane, Shape { tokens, heads, k_heads: heads, d, e: d })
                },
                widths: vec![all; 6],
                shared: Vec::new(),
                state: heads * d * d,
                y: all,
                on_cpu: &|tokens, _, of, state, y| {
                    let (r, k, v, w, a, b) = (of[0], of[1], of[2], of[3], of[4], of[5]);
                    cpu::recur(&Wkv7 { tokens, heads, d, r, w, k, v, a, b }, state, y)
                },
            })?;
        }
        for (heads, d, groups, n) in [(4, 3, 2, 10), (24, 64, 1, 128), (6, 20, 3, 256)] {
            let shape = Ssd { heads, d, groups, n };
            let a = self.random.numbers(heads).iter().map(|x| -x.abs()).collect::<Vec<_>>();
            self.case(&Case {
                name: format!("ssd, {heads} heads of {d} in {groups} groups, {n} numbers"),
                launch: &|tokens| kernels::ssd(tokens, shape),
                widths: vec![heads * d, heads, groups * n, groups * n],
                shared: vec![a.clone()],
                state: heads * d * n,
                y: heads * d,
                on_cpu: &|_, _, of, state, y| cpu::ssd(shape, state, [of[0], of[1], of[2], of[3]], &a, y),
            })?;
        }
        for (d, n) in [(7, 3), (1536, 16), (33, 64)] {
            let a = self.random.numbers(d * n).iter().map(|x| -x.abs()).collect::<Vec<_>>();
            self.case(&Case {
                name: format!("selective scan, {d} channels, {n} numbers"),
                launch: &|tokens| kernels::selective_scan(tokens, [d, n]),
                widths: vec![d, d, n, n],
                shared: vec![a.clone()],
                state: d * n,
                y: d,
                on_cpu: &|_, _, of, state, y| cpu::selective_scan([d, n], state, [of[0], of[1], of[2], of[3]], &a, y),
            })?;
        }
        for (channels, taps) in [(5, 2), (1536, 4), (40, 37)] {
            let (weight, bias) = (self.random.numbers(taps * channels), self.random.numbers(channels));
            self.case(&Case {
                name: format!("convolution of {channels} channels, {taps} taps"),
                launch: &|tokens| kernels::conv1d(tokens, channels, taps, true),
                widths: vec![channels],
                shared: vec![weight.clone(), bias.clone()],
                state: (taps - 1) * channels,
                y: channels,
                on_cpu: &|_, _, of, state, y| cpu::conv1d(state, of[0], &weight, Some(&bias), channels, y),
            })?;
        }
        self.case(&Case {
            name: "the token before".to_owned(),
            launch: &|tokens| kernels::conv1d(tokens, 70, 2, false),
            widths: vec![70],
            shared: Vec::new(),
            state: 70,
            y: 70,
            on_cpu: &|_, _, of, state, y| cpu::shift(state, of[0], y),
        })?;
        self.case(&Case {
            name: "rg-lru".to_owned(),
            launch: &|tokens| Some(kernels::rg_lru(tokens, 300, false)),
            widths: vec![300, 300],
            shared: Vec::new(),
            state: 300,
            y: 300,
            on_cpu: &|_, first, of, state, y| cpu::rg_lru(of[0], of[1], first, state, y),
        })
    }

    fn case(&mut self, case: &Case<'_>) -> Result<()> {
        let f32s = |numbers: &[f32], dims: &[usize]| Tensor::from_slice(numbers, dims, &self.device);
        let shared = case.shared.iter().map(|s| f32s(s, &[s.len()])).collect::<Result<Vec<_>>>()?;
        // The second sequence begins elsewhere, so that their states lie in different places.
        let (mut offsets, mut memories) = ([0, 1], [Numbers::zeros(case.state), Numbers::zeros(case.state)]);
        let mut states = vec![vec![0f32; case.state]; 2];
        let (mut expected, mut ys) = (Vec::new(), Vec::new());
        for piece in PIECES {
            let tokens = 2 * piece;
            // Decays are at most 0, and steps at least 0; small enough that nothing grows.
            let make = |(i, &width): (usize, &usize), random: &mut super::Random| {
                let sign = if case.name.starts_with("ssd") || case.name.starts_with("sel") { i == 1 } else { false };
                let fades = (i == 3 && !case.name.starts_with('s')) || (i == 1 && case.name == "rg-lru");
                let number = |x: f32| match () {
                    () if fades => -x.abs(),
                    () if sign || i == 4 => x.abs(),
                    () => x / (width as f32).sqrt().min(8.0),
                };
                random
                    .numbers(tokens * width)
                    .iter()
                    .map(|&x| dylm::kernels::cpu::Float::BF16.round(number(x)))
                    .collect()
            };
            let rows: Vec<Vec<f32>> = case.widths.iter().enumerate().map(|w| make(w, &mut self.random)).collect();
            let on_gpu = rows.iter().zip(&case.widths).map(|(r, &w)| self.tensor(r, &[tokens, w]));
            let on_gpu = on_gpu.collect::<Result<Vec<_>>>()?;
            let mut inputs: Vec<Input<'_>> = on_gpu.iter().map(Input::Rows).collect();
            inputs.extend(shared.iter().map(Input::Shared));
            let positions: Vec<u32> = offsets.iter().flat_map(|&o| o as u32..(o + piece) as u32).collect();
            let positions = Tensor::new(positions.as_slice(), &self.device)?;
            let y = Tensor::full(f32::NAN, (tokens, case.y), &self.device)?;
            let Some(launch) = (case.launch)(1) else { candle_core::bail!("no kernel for {}", case.name) };
            let mut segments = Vec::new();
            for (i, memory) in memories.iter_mut().enumerate() {
                let states = memory.in_turn(&self.device, offsets[i])?;
                segments.push(Segment { states, from: i * piece, tokens: piece });
            }
            run(&launch, &inputs, &positions, &segments, &y)?;
            for i in 0..2 {
                let of = |all: &'_ [f32], width: usize| (i * piece * width, (i + 1) * piece * width, all.len());
                let cut: Vec<&[f32]> = rows
                    .iter()
                    .zip(&case.widths)
                    .map(|(r, &w)| {
                        let (from, to, _) = of(r, w);
                        &r[from..to]
                    })
                    .collect();
                let mut out = vec![0f32; piece * case.y];
                (case.on_cpu)(piece, offsets[i] == 0, &cut, &mut states[i], &mut out);
                expected.extend(out.iter().map(|&x| f64::from(x)));
                offsets[i] += piece;
                memories[i].turned(offsets[i]);
            }
            ys.push(y.flatten_all()?.to_dtype(DType::F32)?);
        }
        let ys = Tensor::cat(&ys, 0)?;
        self.held(&case.name, &ys, &expected)?;
        for (memory, state) in memories.iter().zip(&states) {
            let left = Tensor::new(memory.read()?.as_ref(), &self.device)?;
            let expected: Vec<f64> = state.iter().map(|&x| f64::from(x)).collect();
            self.held(&format!("{}: its state", case.name), &left, &expected)?;
        }
        Ok(())
    }
}
