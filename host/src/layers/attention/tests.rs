//! Attention through the caches, on dylm's kernels and by candle's ops, in steps of any size, held to attention over lists.

use super::*;
use crate::{
    cache::{CacheOptions, State},
    device::{DeviceChoice, DtypeChoice},
};
use plugin_api::abi::{CACHE_IN_CHUNKS, CACHE_KEY_VALUE, CACHE_POOLED, CacheSpec};

const HEADS: usize = 4;
const DIM: usize = 24;
const TOKENS: usize = 40;

fn places() -> [Placement; 2] {
    [DeviceChoice::Cpu, DeviceChoice::CpuByCandle].map(|d| Placement::new(d, DtypeChoice::Float32, DType::F32).unwrap())
}

fn numbers(seed: u64, dims: [usize; 3]) -> Tensor {
    let mut x = seed;
    let next = |_| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let list: Vec<f32> = (0..dims.iter().product()).map(next).collect();
    Tensor::from_vec(list, &dims, &Device::Cpu).unwrap()
}

fn spec(flags: u32, window: usize) -> CacheSpec {
    CacheSpec { kind: CACHE_KEY_VALUE, flags, window: window as u64, dims: [0; 6] }
}

const PLAIN: Scores = Scores {
    scale: 0.4,
    softcap: None,
    window: None,
    chunk: None,
    sinks: None,
    selection: None,
    selection_block: 1,
    blocks: None,
    lanes: None,
    pooled: None,
    slopes: None,
};

/// q over k and v `[TOKENS, 1, _]`, where `sees` says (token, head, key).
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, sees: impl Fn(usize, usize, usize) -> bool) -> Vec<Vec<Vec<f32>>> {
    let lists = |t: &Tensor| t.to_vec3::<f32>().unwrap();
    let (q, k, v) = (lists(q), lists(k), lists(v));
    let row = |p: usize, h: usize| {
        let dot = |j: usize| q[p][h].iter().zip(&k[j][0]).map(|(a, b)| a * b).sum::<f32>();
        let shares: Vec<(usize, f32)> = (0..=p).filter(|&j| sees(p, h, j)).map(|j| (j, (dot(j) * 0.4).exp())).collect();
        let mass: f32 = shares.iter().map(|(_, share)| share).sum();
        (0..v[0][0].len()).map(|lane| shares.iter().map(|&(j, share)| share / mass * v[j][0][lane]).sum()).collect()
    };
    (0..TOKENS).map(|p| (0..HEADS).map(|h| row(p, h)).collect()).collect()
}

/// The same sequence in steps of `size`.
fn in_steps(
    place: &Placement,
    size: usize,
    caches: [CacheSpec; 2],
    step: impl Fn(&mut [Part], usize, usize) -> Tensor,
) -> Tensor {
    let mut state = State::new(&caches, place, &CacheOptions::default()).unwrap();
    let mut outputs = Vec::new();
    for start in (0..TOKENS).step_by(size) {
        let count = size.min(TOKENS - start);
        outputs.push(step(&mut [Part { state: &mut state, tokens: 0..count, replayed: 0 }], start, count));
        state.offset += count;
        for cache in 0..2 {
            let mut part = Part { state: &mut state, tokens: 0..0, replayed: 0 };
            memory(&mut part, cache).unwrap().settle(start + count).unwrap();
        }
    }
    Tensor::cat(&outputs, 0).unwrap()
}

fn near(what: &str, got: &Tensor, want: &[Vec<Vec<f32>>]) {
    let got = got.to_vec3::<f32>().unwrap();
    for (p, (got, want)) in got.iter().zip(want).enumerate() {
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((got - want).abs() < 1e-5, "{what}: token {p} gives {got}, not {want}");
        }
    }
}

/// Both paths, several step sizes; `how` is asked for the scores of tokens `start..start + count`.
fn check(
    what: &str,
    cache: CacheSpec,
    how: impl Fn(usize, usize) -> Scores,
    sees: impl Fn(usize, usize, usize) -> bool,
) {
    let (q, k) = (numbers(1, [TOKENS, HEADS, DIM]), numbers(2, [TOKENS, 1, DIM]));
    let lanes = how(0, 1).lanes;
    let v = lanes.map_or_else(|| numbers(3, [TOKENS, 1, 17]), |lanes| k.narrow(2, 0, lanes).unwrap());
    let want = naive(&q, &k, &v, sees);
    for place in places() {
        for size in [1, 7, TOKENS] {
            let got = in_steps(&place, size, [cache; 2], |parts, start, count| {
                let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
                let new = New { k: Some(cut(&k)), v: lanes.is_none().then(|| cut(&v)) };
                attend(0, &cut(&q), &new, &how(start, count), parts, &place, None).unwrap()
            });
            near(&format!("{what} in steps of {size}, native {}", place.native), &got, &want);
        }
    }
}

#[test]
fn a_chunk_ends_what_a_query_sees() {
    check("chunk", spec(CACHE_IN_CHUNKS, 12), |_, _| Scores { chunk: Some(12), ..PLAIN }, |p, _, k| k >= p / 12 * 12);
    let both = |_, _| Scores { chunk: Some(12), window: Some(5), ..PLAIN };
    check("chunk and window", spec(0, 0), both, |p, _, k| k >= p / 12 * 12 && p - k < 5);
}

#[test]
fn keys_alone_are_kept_where_they_hold_the_values() {
    check("latent", spec(0, 0), |_, _| Scores { lanes: Some(16), ..PLAIN }, |_, _, _| true);
}

#[test]
fn blocks_hide_keys_by_head() {
    let blocks = Some(Blocks { size: 4, local: 2, stride: 3 });
    let sees = |p: usize, h: usize, k: usize| p / 4 - k / 4 < 2 || (k / 4 + h + 1).is_multiple_of(3);
    check("blocks", spec(0, 0), |_, _| Scores { blocks, ..PLAIN }, sees);
}

#[test]
fn a_selection_hides_all_other_keys() {
    let chosen = |p: usize| [p, p / 2, indexer::NONE as usize];
    let how = |start: usize, count: usize| {
        let list: Vec<u32> = (start..start + count).flat_map(chosen).map(|p| p as u32).collect();
        Scores { selection: Some(Tensor::from_vec(list, (count, 3), &Device::Cpu).unwrap()), ..PLAIN }
    };
    check("selection", spec(0, 0), how, |p, _, k| chosen(p).contains(&k));
}

#[test]
fn each_group_of_heads_sees_the_blocks_of_its_own_list() {
    // Two lists for four heads, of blocks of 4 keys.
    let chosen = |p: usize| [[p / 4, 0, 7], [p / 8, indexer::NONE as usize, p / 4 + 1]];
    let how = |start: usize, count: usize| {
        let list: Vec<u32> = (start..start + count).flat_map(chosen).flatten().map(|b| b as u32).collect();
        let selection = Some(Tensor::from_vec(list, (count, 2, 3), &Device::Cpu).unwrap());
        Scores { selection, selection_block: 4, ..PLAIN }
    };
    check("blocks by group", spec(0, 0), how, |p, h, k| chosen(p)[h / 2].contains(&(k / 4)));
}

#[test]
fn scores_fall_with_distance_by_each_heads_slope() {
    let (q, k, v) = (numbers(1, [TOKENS, HEADS, DIM]), numbers(2, [TOKENS, 1, DIM]), numbers(3, [TOKENS, 1, 17]));
    let slopes = [0.5, 0.25, 0.0, 0.03125f32];
    // One more lane a slope: q · k gains slope * position of the key, and the query's own share drops out of the softmax.
    let lane = |f: &dyn Fn(usize, usize) -> f32, heads: usize| {
        let list: Vec<f32> = (0..TOKENS).flat_map(|p| (0..heads).map(move |h| (p, h))).map(|(p, h)| f(p, h)).collect();
        Tensor::from_vec(list, (TOKENS, heads, 1), &Device::Cpu).unwrap()
    };
    let long_q = Tensor::cat(&[&q, &lane(&|_, h| slopes[h] / PLAIN.scale, HEADS)], 2).unwrap();
    let long_k = Tensor::cat(&[&k, &lane(&|p, _| p as f32, 1)], 2).unwrap();
    let want = naive(&long_q, &long_k, &v, |_, _, _| true);
    for place in places() {
        for size in [1, 7, TOKENS] {
            let got = in_steps(&place, size, [spec(0, 0); 2], |parts, start, count| {
                let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
                let new = New { k: Some(cut(&k)), v: Some(cut(&v)) };
                let how = Scores { slopes: Some(Tensor::new(&slopes, &Device::Cpu).unwrap()), ..PLAIN };
                attend(0, &cut(&q), &new, &how, parts, &place, None).unwrap()
            });
            near(&format!("slopes in steps of {size}, native {}", place.native), &got, &want);
        }
    }
}

/// The dot product of a query's head and a key, as lists have them.
fn dot(q: &[Vec<Vec<f32>>], k: &[Vec<Vec<f32>>], p: usize, h: usize, key: usize) -> f32 {
    q[p][h].iter().zip(&k[key][0]).map(|(a, b)| a * b).sum()
}

#[test]
fn each_head_of_an_indexer_chooses_the_blocks_of_the_best_keys_and_the_last_ones() {
    let (q, k) = (numbers(4, [TOKENS, HEADS, DIM]), numbers(5, [TOKENS, 1, DIM]));
    let (ql, kl) = (q.to_vec3::<f32>().unwrap(), k.to_vec3::<f32>().unwrap());
    for (local, place) in (0..3).flat_map(|local| places().map(|place| (local, place))) {
        let how = indexer::Choice { size: 4, count: 3, local };
        for size in [1, 7, TOKENS] {
            let got = in_steps(&place, size, [spec(0, 0); 2], |parts, start, count| {
                let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
                indexer::index_blocks(1, &cut(&q), &cut(&k), how, parts, &place).unwrap()
            });
            for (p, heads) in got.to_vec3::<u32>().unwrap().into_iter().enumerate() {
                for (h, mut chosen) in heads.into_iter().enumerate() {
                    let score = |block: usize| match p / 4 - block < local {
                        true => f32::INFINITY,
                        false => (block * 4..=p.min(block * 4 + 3))
                            .map(|key| dot(&ql, &kl, p, h, key))
                            .fold(f32::MIN, f32::max),
                    };
                    let mut best: Vec<u32> = (0..=p as u32 / 4).collect();
                    best.sort_by(|&a, &b| score(b as usize).total_cmp(&score(a as usize)));
                    best.truncate(3);
                    best.sort_unstable();
                    chosen.retain(|&block| block != indexer::NONE);
                    chosen.sort_unstable();
                    assert_eq!(
                        chosen, best,
                        "token {p}, head {h}, steps of {size}, {local} local, native {}",
                        place.native
                    );
                }
            }
        }
    }
}

#[test]
fn an_indexer_chooses_the_keys_with_the_best_scores() {
    let (q, k, weights) =
        (numbers(4, [TOKENS, HEADS, DIM]), numbers(5, [TOKENS, 1, DIM]), numbers(6, [TOKENS, 1, HEADS]));
    let weights = weights.squeeze(1).unwrap();
    let (ql, kl, wl) = (q.to_vec3::<f32>().unwrap(), k.to_vec3::<f32>().unwrap(), weights.to_vec2::<f32>().unwrap());
    let score = |p: usize, key: usize| (0..HEADS).map(|h| wl[p][h] * dot(&ql, &kl, p, h, key).max(0.0)).sum::<f32>();
    for place in places() {
        for size in [1, 7, TOKENS] {
            let got = in_steps(&place, size, [spec(0, 0); 2], |parts, start, count| {
                let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
                indexer::index(1, &cut(&q), &cut(&k), &cut(&weights), 6, parts, &place).unwrap()
            });
            for (p, chosen) in got.to_vec2::<u32>().unwrap().into_iter().enumerate() {
                let mut best: Vec<usize> = (0..=p).collect();
                best.sort_by(|&a, &b| score(p, b).total_cmp(&score(p, a)));
                best.truncate(6);
                best.sort_unstable();
                let mut chosen: Vec<usize> =
                    chosen.into_iter().filter(|&k| k != indexer::NONE).map(|k| k as usize).collect();
                chosen.sort_unstable();
                assert_eq!(chosen, best, "token {p} in steps of {size}, native {}", place.native);
            }
        }
    }
}

#[test]
fn a_layer_may_look_at_what_another_one_has_put_there() {
    let (q, k, v) = (numbers(1, [TOKENS, HEADS, DIM]), numbers(2, [TOKENS, 1, DIM]), numbers(3, [TOKENS, 1, 17]));
    let (other, nothing) = (numbers(7, [TOKENS, HEADS, DIM]), New { k: None, v: None });
    let want = naive(&other, &k, &v, |_, _, _| true);
    for place in places() {
        let got = in_steps(&place, 7, [spec(0, 0); 2], |parts, start, count| {
            let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
            let new = New { k: Some(cut(&k)), v: Some(cut(&v)) };
            attend(0, &cut(&q), &new, &PLAIN, parts, &place, None).unwrap();
            attend(0, &cut(&other), &nothing, &PLAIN, parts, &place, None).unwrap()
        });
        near("looked at", &got, &want);
    }
}

/// One key for every four tokens, seen from the last of them on.
#[test]
fn pooled_keys_share_the_softmax_with_a_window_and_outlive_it() {
    let [q, k, pooled] = [(1, HEADS), (2, 1), (8, 1)].map(|(seed, heads)| numbers(seed, [TOKENS, heads, DIM]));
    let sinks = numbers(9, [1, 1, HEADS]).flatten_all().unwrap();
    let chosen = |p: usize| [p / 8 * 4 + 3, 3].map(|key| if key <= p { key as u32 } else { indexer::NONE });
    let lists = |t: &Tensor| t.to_vec3::<f32>().unwrap();
    let (ql, kl, pl, sl) = (lists(&q), lists(&k), lists(&pooled), sinks.to_vec1::<f32>().unwrap());
    for selects in [false, true] {
        let row = |p: usize, h: usize| {
            let own = (0..=p).filter(|j| p - j < 5).map(|j| &kl[j][0]);
            let is_seen = |j: &usize| j % 4 == 3 && (!selects || chosen(p).contains(&(*j as u32)));
            let keys = own.chain((0..=p).filter(is_seen).map(|j| &pl[j][0]));
            let share = |key: &Vec<f32>| (ql[p][h].iter().zip(key).map(|(a, b)| a * b).sum::<f32>() * 0.4).exp();
            let shares: Vec<(f32, &Vec<f32>)> = keys.map(|key| (share(key), key)).collect();
            let mass = shares.iter().map(|(share, _)| share).sum::<f32>() + sl[h].exp();
            (0..DIM).map(|lane| shares.iter().map(|(share, key)| share / mass * key[lane]).sum()).collect()
        };
        let want: Vec<Vec<Vec<f32>>> = (0..TOKENS).map(|p| (0..HEADS).map(|h| row(p, h)).collect()).collect();
        let of_four = CacheSpec { kind: CACHE_POOLED, dims: [4, 0, 0, 0, 0, 0], ..spec(0, 0) };
        for place in places() {
            for size in [1, 3, 7, TOKENS] {
                let got = in_steps(&place, size, [spec(0, 5), of_four], |parts, start, count| {
                    let cut = |t: &Tensor| t.narrow(0, start, count).unwrap();
                    let list: Vec<u32> = (start..start + count).flat_map(chosen).collect();
                    let selection = selects.then(|| Tensor::from_vec(list, (count, 2), &Device::Cpu).unwrap());
                    let new = New { k: Some(cut(&pooled)), v: None };
                    let pooled = Some(Pooled { cache: 1, new, selection });
                    let how = Scores { window: Some(5), lanes: Some(DIM), sinks: Some(sinks.clone()), pooled, ..PLAIN };
                    attend(0, &cut(&q), &New { k: Some(cut(&k)), v: None }, &how, parts, &place, None).unwrap()
                });
                near(&format!("pooled in steps of {size}, native {}", place.native), &got, &want);
            }
        }
    }
}
