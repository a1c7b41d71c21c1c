//! Attention against the textbook, in f64 and with the whole matrix of scores.

use dylm::kernels::cpu::{
    Attend, Rows, attend,
    attention::{Blocks, Selection},
    quantize_rows,
};

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.bits() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }
}

/// One case's shapes.
#[derive(Clone, Copy, Debug)]
struct Case {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    v_dim: usize,
}

const PLAIN: Attend<'_> = Attend {
    scale: 0.3,
    softcap: None,
    window: None,
    keep: 0,
    chunk: None,
    sinks: None,
    selection: None,
    blocks: None,
    slopes: None,
};

struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    queries: Vec<u32>,
    keys: Vec<u32>,
}

/// `entries` keys at positions 0.., and queries at the last `tokens` of them.
fn inputs(case: Case, tokens: usize, entries: usize, r: &mut Random) -> Inputs {
    Inputs {
        q: r.floats(tokens * case.q_heads * case.dim).iter().map(|x| x * 3.0).collect(),
        k: r.floats(entries * case.kv_heads * case.dim),
        v: r.floats(entries * case.kv_heads * case.v_dim),
        queries: (entries as u32 - tokens as u32..entries as u32).collect(),
        keys: (0..entries as u32).collect(),
    }
}

fn textbook(case: Case, i: &Inputs, how: &Attend<'_>) -> Vec<f64> {
    let Case { q_heads, kv_heads, dim, v_dim } = case;
    let mut out = vec![0.0; i.queries.len() * q_heads * v_dim];
    for (t, &p) in i.queries.iter().enumerate() {
        for head in 0..q_heads {
            let kv = head / (q_heads / kv_heads);
            let mut weights = vec![0.0; i.keys.len()];
            let mut mass = how.sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
            for (e, &at) in i.keys.iter().enumerate() {
                let near =
                    how.window.is_none_or(|w| i64::from(p) - i64::from(at) < w as i64) || (at as usize) < how.keep;
                let in_chunk = how.chunk.is_none_or(|chunk| at as usize >= p as usize - p as usize % chunk);
                let chosen = how.selection.is_none_or(|Selection { lists, groups, heads, block }| {
                    lists[t * groups + head / heads].contains(&(at / block as u32))
                });
                let in_blocks = how.blocks.is_none_or(|Blocks { size, local, stride }| {
                    let (query, key) = (p as usize / size, at as usize / size);
                    key + local > query || (key + head + 1).is_multiple_of(stride)
                });
                if at > p || !near || !in_chunk || !chosen || !in_blocks {
                    continue;
                }
                let q = &i.q[(t * q_heads + head) * dim..][..dim];
                let k = &i.k[(e * kv_heads + kv) * dim..][..dim];
                let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let score = dot * f64::from(how.scale);
                let score = how.softcap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh());
                let slope = how.slopes.map_or(0.0, |slopes| f64::from(slopes[head]));
                let score = score - slope * f64::from(p - at);
                weights[e] = score.exp();
                mass += weights[e];
            }
            for (e, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                for l in 0..v_dim {
                    let v = f64::from(i.v[(e * kv_heads + kv) * v_dim + l]);
                    out[(t * q_heads + head) * v_dim + l] += weight / mass * v;
                }
            }
        }
    }
    out
}

fn run(case: Case, i: &Inputs, keys: Rows<'_>, values: Rows<'_>, how: &Attend<'_>) -> Vec<f32> {
    run_with(case, i, keys, Some(values), how)
}

fn run_with(case: Case, i: &Inputs, keys: Rows<'_>, values: Option<Rows<'_>>, how: &Attend<'_>) -> Vec<f32> {
    let Case { q_heads, kv_heads, dim, v_dim } = case;
    let mut out = vec![f32::NAN; i.queries.len() * q_heads * v_dim];
    attend(&i.q, q_heads, dim, &i.queries, keys, values, kv_heads, v_dim, &i.keys, how, &mut out);
    out
}

fn check(case: Case, i: &Inputs, how: &Attend<'_>, what: &str) {
    let got = run(case, i, Rows::F32(&i.k), Rows::F32(&i.v), how);
    for (at, (got, want)) in got.iter().zip(textbook(case, i, how)).enumerate() {
        assert!((f64::from(*got) - want).abs() < 2e-5, "{what}, {case:?}: output {at} is {got}, not {want}");
    }
}

const CASES: [Case; 6] = [
    Case { q_heads: 4, kv_heads: 4, dim: 20, v_dim: 20 },
    Case { q_heads: 9, kv_heads: 3, dim: 64, v_dim: 64 },
    Case { q_heads: 8, kv_heads: 1, dim: 33, v_dim: 80 },
    Case { q_heads: 16, kv_heads: 2, dim: 80, v_dim: 33 },
    Case { q_heads: 3, kv_heads: 1, dim: 256, v_dim: 256 },
    Case { q_heads: 64, kv_heads: 1, dim: 24, v_dim: 16 },
];

#[test]
fn attention_is_that_of_the_textbook_for_every_shape() {
    let mut r = Random(1);
    for case in CASES {
        for (tokens, entries) in [(1, 1), (1, 70), (2, 130), (7, 7), (50, 64), (33, 150), (1, 2500), (3, 2100)] {
            let i = inputs(case, tokens, entries, &mut r);
            check(case, &i, &PLAIN, &format!("{tokens} of {entries}"));
        }
    }
}

#[test]
fn windows_kept_keys_sinks_and_caps_change_what_the_textbook_says_they_do() {
    let mut r = Random(2);
    for case in CASES {
        let sinks: Vec<f32> = r.floats(case.q_heads);
        for (tokens, entries) in [(1, 90), (40, 90), (3, 1300)] {
            let i = inputs(case, tokens, entries, &mut r);
            check(case, &i, &Attend { window: Some(1), ..PLAIN }, "window of one");
            check(case, &i, &Attend { window: Some(17), ..PLAIN }, "window");
            check(case, &i, &Attend { window: Some(17), keep: 4, ..PLAIN }, "window and kept keys");
            check(case, &i, &Attend { softcap: Some(2.0), ..PLAIN }, "softcap");
            check(case, &i, &Attend { sinks: Some(&sinks), ..PLAIN }, "sinks");
            let all = Attend { sinks: Some(&sinks), softcap: Some(1.5), window: Some(33), keep: 2, ..PLAIN };
            check(case, &i, &all, "everything");
        }
    }
}

#[test]
fn chunks_selections_and_blocks_hide_what_the_textbook_hides() {
    let mut r = Random(8);
    for case in CASES {
        for (tokens, entries) in [(1, 90), (40, 90), (3, 1300)] {
            let i = inputs(case, tokens, entries, &mut r);
            check(case, &i, &Attend { chunk: Some(16), ..PLAIN }, "chunk");
            check(case, &i, &Attend { chunk: Some(30), window: Some(7), ..PLAIN }, "chunk and window");
            let chosen: Vec<Vec<u32>> = i.queries.iter().map(|&p| vec![p / 3, p / 2 + 1, p]).collect();
            let selection = Some(Selection { lists: &chosen, groups: 1, heads: case.q_heads, block: 1 });
            check(case, &i, &Attend { selection, ..PLAIN }, "selection");
            let blocks = Some(Blocks { size: 8, local: 2, stride: 3 });
            check(case, &i, &Attend { blocks, ..PLAIN }, "blocks");
            check(case, &i, &Attend { blocks, selection, window: Some(50), ..PLAIN }, "all three");
            // Groups as large as those of the keys, and heads that choose alone.
            for groups in [case.kv_heads, case.q_heads] {
                let chosen: Vec<Vec<u32>> =
                    i.queries.iter().flat_map(|&p| (0..groups as u32).map(move |g| vec![g, p / 16 + 1 + g])).collect();
                let heads = case.q_heads / groups;
                let selection = Some(Selection { lists: &chosen, groups, heads, block: 8 });
                check(case, &i, &Attend { selection, ..PLAIN }, "selected blocks");
            }
        }
    }
}

#[test]
fn scores_fall_with_distance_by_the_slope_of_the_head() {
    let mut r = Random(12);
    for case in CASES {
        let slopes: Vec<f32> = (0..case.q_heads).map(|head| 0.5f32.powi(head as i32)).collect();
        for (tokens, entries) in [(1, 90), (40, 90), (3, 1300)] {
            let mut i = inputs(case, tokens, entries, &mut r);
            check(case, &i, &Attend { slopes: Some(&slopes), ..PLAIN }, "slopes");
            let all = Attend { slopes: Some(&slopes), softcap: Some(1.5), window: Some(33), ..PLAIN };
            check(case, &i, &all, "slopes, softcap and window");
            i.keys.rotate_left(7);
            check(case, &i, &Attend { slopes: Some(&slopes), ..PLAIN }, "slopes over a ring");
        }
    }
}

#[test]
fn the_first_lanes_of_a_key_can_be_its_value() {
    let mut r = Random(9);
    for case in [Case { v_dim: 20, ..CASES[4] }, Case { v_dim: 24, ..CASES[5] }, CASES[3]] {
        for (tokens, entries) in [(1, 70), (9, 130), (2, 2500)] {
            let mut i = inputs(case, tokens, entries, &mut r);
            i.v = i.k.chunks(case.dim).flat_map(|key| key[..case.v_dim].to_vec()).collect();
            let got = run_with(case, &i, Rows::F32(&i.k), None, &PLAIN);
            for (got, want) in got.iter().zip(textbook(case, &i, &PLAIN)) {
                assert!((f64::from(*got) - want).abs() < 2e-5, "{case:?}: {got}, not {want}");
            }
            assert_eq!(got, run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &PLAIN), "{case:?}: stored twice");
        }
    }
}

#[test]
fn entries_may_lie_in_any_order_and_queries_may_be_ragged() {
    let mut r = Random(3);
    let case = CASES[1];
    let mut i = inputs(case, 6, 200, &mut r);
    i.keys.rotate_left(77);
    i.queries = vec![0, 5, 199, 30, 31, 150];
    check(case, &i, &PLAIN, "ring");
    check(case, &i, &Attend { window: Some(40), keep: 3, ..PLAIN }, "ring with a window");
}

#[test]
fn a_query_that_sees_nothing_gives_zeros() {
    let mut r = Random(4);
    let case = CASES[1];
    let sinks = r.floats(case.q_heads);
    for entries in [0, 100, 1500] {
        let mut i = inputs(case, 0, entries, &mut r);
        i.q = r.floats(2 * case.q_heads * case.dim);
        i.queries = vec![3, 4];
        i.keys = vec![9; entries];
        for sinks in [None, Some(&sinks[..])] {
            let out = run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &Attend { sinks, ..PLAIN });
            assert!(out.iter().all(|x| *x == 0.0), "{entries} entries");
        }
    }
}

#[test]
fn huge_scores_do_not_overflow() {
    let mut r = Random(5);
    let case = CASES[1];
    let i = inputs(case, 5, 100, &mut r);
    let out = run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &Attend { scale: 1e6, ..PLAIN });
    assert!(out.iter().all(|x| x.is_finite() && x.abs() <= 1.0));
}

#[test]
fn small_types_give_what_their_widened_numbers_give() {
    let mut r = Random(6);
    for case in [CASES[1], CASES[2], Case { q_heads: 4, kv_heads: 2, dim: 64, v_dim: 128 }] {
        let mut i = inputs(case, 3, 150, &mut r);
        let narrow = |x: &[f32]| x.iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>();
        let (k, v) = (narrow(&i.k), narrow(&i.v));
        (i.k, i.v) = (k.iter().map(|x| x.to_f32()).collect(), v.iter().map(|x| x.to_f32()).collect());
        let want = run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &PLAIN);
        assert_eq!(run(case, &i, Rows::F16(&k), Rows::F16(&v), &PLAIN), want);

        let narrow = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>();
        let (k, v) = (narrow(&i.k), narrow(&i.v));
        (i.k, i.v) = (k.iter().map(|x| x.to_f32()).collect(), v.iter().map(|x| x.to_f32()).collect());
        let want = run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &PLAIN);
        // Only where both are bfloat16 may they be multiplied as such: see below.
        assert_eq!(run(case, &i, Rows::BF16(&k), Rows::F32(&i.v), &PLAIN), want);
        assert_eq!(run(case, &i, Rows::F32(&i.k), Rows::BF16(&v), &PLAIN), want);

        if case.dim % 32 == 0 {
            for (bits, bound) in [(8, 0.01), (6, 0.04), (4, 0.2)] {
                let pack = |x: &[f32]| {
                    let (mut data, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
                    quantize_rows(x, bits, 32, &mut data, &mut scales, &mut biases);
                    (data, scales, biases)
                };
                let (k, v) = (pack(&i.k), pack(&i.v));
                let rows = |(data, scales, biases)| Rows::Affine { data, scales, biases, bits, group: 32 };
                let got = run(case, &i, rows((&k.0, &k.1, &k.2)), rows((&v.0, &v.1, &v.2)), &PLAIN);
                let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < bound && worst > 0.0, "{bits} bits: off by {worst}");
            }
        }
    }
}

#[test]
fn a_query_gives_the_same_bits_alone_in_chunks_and_on_any_number_of_threads() {
    let mut r = Random(7);
    for case in [CASES[1], CASES[3]] {
        let entries = 2300;
        let tokens = 120;
        let i = inputs(case, tokens, entries, &mut r);
        let whole = run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &PLAIN);
        for chunk in [1, 7, 64] {
            let mut got = Vec::new();
            for first in (0..tokens).step_by(chunk) {
                let last = tokens.min(first + chunk);
                // Only what a cache would hold by then.
                let held = entries - tokens + last;
                let part = Inputs {
                    q: i.q[first * case.q_heads * case.dim..last * case.q_heads * case.dim].to_vec(),
                    k: i.k[..held * case.kv_heads * case.dim].to_vec(),
                    v: i.v[..held * case.kv_heads * case.v_dim].to_vec(),
                    queries: i.queries[first..last].to_vec(),
                    keys: i.keys[..held].to_vec(),
                };
                got.extend(run(case, &part, Rows::F32(&part.k), Rows::F32(&part.v), &PLAIN));
            }
            assert!(got == whole, "{case:?} in chunks of {chunk}");
        }
        for threads in [1, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let got = pool.install(|| run(case, &i, Rows::F32(&i.k), Rows::F32(&i.v), &PLAIN));
            assert!(got == whole, "{case:?} on {threads} threads");
        }
    }
}

#[test]
fn bfloat16_multiplied_as_such_stays_within_the_rounding_of_queries_and_weights() {
    let mut r = Random(13);
    for case in CASES {
        let slopes: Vec<f32> = (0..case.q_heads).map(|head| 0.5f32.powi(head as i32)).collect();
        for (tokens, entries) in [(1, 1), (2, 70), (50, 64), (33, 150), (1, 1300), (3, 2100)] {
            let mut i = inputs(case, tokens, entries, &mut r);
            // Queries that bfloat16 holds: what is left to round are the weights, half a unit in their eighth bit.
            i.q = i.q.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
            let narrow = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>();
            let (k, v) = (narrow(&i.k), narrow(&i.v));
            (i.k, i.v) = (k.iter().map(|x| x.to_f32()).collect(), v.iter().map(|x| x.to_f32()).collect());
            let all = Attend { softcap: Some(1.5), window: Some(33), keep: 2, slopes: Some(&slopes), ..PLAIN };
            let chunk = Attend { chunk: Some(30), ..PLAIN };
            for how in [PLAIN, all, chunk, Attend { blocks: Some(Blocks { size: 8, local: 2, stride: 3 }), ..PLAIN }] {
                let got = run(case, &i, Rows::BF16(&k), Rows::BF16(&v), &how);
                for (got, want) in got.iter().zip(textbook(case, &i, &how)) {
                    // Values are at most 1; each weight and their mass may be off by 2^-9.
                    assert!(
                        (f64::from(*got) - want).abs() < 2.0 / 512.0,
                        "{case:?}, {tokens} of {entries}: {got}, not {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn bfloat16_multiplied_as_such_gives_the_same_bits_alone_in_chunks_and_on_any_number_of_threads() {
    let mut r = Random(14);
    for case in [CASES[1], CASES[3], Case { q_heads: 7, kv_heads: 7, dim: 64, v_dim: 64 }] {
        let (entries, tokens) = (700, 90);
        let i = inputs(case, tokens, entries, &mut r);
        let narrow = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>();
        let (k, v) = (narrow(&i.k), narrow(&i.v));
        let part = |first: usize, last: usize| {
            // Only what a cache would hold by then.
            let held = entries - tokens + last;
            let (q, queries) = (case.q_heads * case.dim, i.queries[first..last].to_vec());
            let q = i.q[first * q..last * q].to_vec();
            let part = Inputs { q, k: Vec::new(), v: Vec::new(), queries, keys: i.keys[..held].to_vec() };
            let (k, v) = (&k[..held * case.kv_heads * case.dim], &v[..held * case.kv_heads * case.v_dim]);
            run(case, &part, Rows::BF16(k), Rows::BF16(v), &PLAIN)
        };
        let whole = part(0, tokens);
        for chunk in [1, 7, 64] {
            let starts = (0..tokens).step_by(chunk);
            let got: Vec<f32> = starts.flat_map(|first| part(first, tokens.min(first + chunk))).collect();
            assert!(got == whole, "{case:?} in chunks of {chunk}");
        }
        for threads in [1, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| part(0, tokens)) == whole, "{case:?} on {threads} threads");
        }
    }
}

/// The instruction set is chosen once a process, so the others are tested in processes of their own.
#[test]
fn all_of_this_holds_with_the_lesser_instruction_sets() {
    if std::env::var_os("DYLM_ISA").is_some() {
        return;
    }
    for isa in dylm::kernels::cpu::Isa::available() {
        let run =
            std::process::Command::new(std::env::current_exe().unwrap()).env("DYLM_ISA", format!("{isa:?}")).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{isa:?}:\n{}", String::from_utf8_lossy(&run.stdout));
    }
}
