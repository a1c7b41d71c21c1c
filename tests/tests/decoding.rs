//! Decoding as a whole: seeds, drafts, limited and quantized caches, stop strings, reuse; on tiny models, through the library.

use dylm::{
    GenerateOptions, Generation, LanguageModel, LoadOptions,
    cache::{CacheOptions, State},
    device::DtypeChoice,
    model::{Input, Want},
    sampler::Sampling,
    statistics::FinishReason,
};
use tests::tiny;

fn load(name: &str) -> LanguageModel {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(name), folder.path()).unwrap();
    let options = LoadOptions { dtype: DtypeChoice::Float32, ..Default::default() };
    dylm::load(folder.path().to_str(), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Greedy, long, not ended by the model.
fn options() -> GenerateOptions {
    GenerateOptions { max_tokens: 40, ignore_eos: true, ..Default::default() }
}

fn hot(seed: u64) -> GenerateOptions {
    GenerateOptions { sampling: Sampling { temp: 1.5, seed: Some(seed), ..Default::default() }, ..options() }
}

const PROMPT: [u32; 9] = [5, 17, 42, 8, 33, 60, 21, 13, 7];

fn ids(lm: &LanguageModel, options: &GenerateOptions) -> Vec<u32> {
    Generation::new(lm, &PROMPT, options, None, None).unwrap().map(|r| r.unwrap().token).collect()
}

#[test]
fn one_seed_gives_one_text_and_another_seed_another() {
    let lm = load("llama");
    assert_eq!(ids(&lm, &hot(1)), ids(&lm, &hot(1)));
    assert_ne!(ids(&lm, &hot(1)), ids(&lm, &hot(2)));
}

#[test]
fn a_draft_changes_no_greedy_token() {
    let (lm, other) = (load("llama"), load("gemma3_text"));
    let plain = ids(&lm, &options());
    for draft in [&lm, &other] {
        for num_draft_tokens in [1, 2, 5] {
            let options = GenerateOptions { num_draft_tokens, ..options() };
            let generation = Generation::new(&lm, &PROMPT, &options, None, Some(draft)).unwrap();
            let drafted: Vec<_> = generation.map(|r| r.unwrap()).collect();
            assert_eq!(drafted.iter().map(|r| r.token).collect::<Vec<_>>(), plain);
            if std::ptr::eq(draft, &lm) {
                // Its own draft is always right: of every k + 1 tokens only the last is not drafted.
                assert!(
                    drafted.iter().filter(|r| r.from_draft).count()
                        >= 40 * num_draft_tokens / (num_draft_tokens + 1) - 1
                );
            }
        }
    }
}

#[test]
fn a_drafted_text_of_one_seed_is_reproducible() {
    let lm = load("llama");
    let run = |seed| -> Vec<u32> {
        Generation::new(&lm, &PROMPT, &hot(seed), None, Some(&lm)).unwrap().map(|r| r.unwrap().token).collect()
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn a_draft_works_over_sliding_windows() {
    let lm = load("gemma3_text");
    let drafted: Vec<u32> =
        Generation::new(&lm, &PROMPT, &options(), None, Some(&lm)).unwrap().map(|r| r.unwrap().token).collect();
    assert_eq!(drafted, ids(&lm, &options()));
}

#[test]
fn a_draft_changes_no_greedy_token_where_states_must_go_back() {
    let models = ["mamba2", "jamba", "falcon_h1"].map(load);
    for (lm, draft) in models.iter().zip(models.iter().cycle().skip(1)) {
        let plain = ids(lm, &options());
        for num_draft_tokens in [1, 4] {
            let options = GenerateOptions { num_draft_tokens, ..options() };
            let drafted = Generation::new(lm, &PROMPT, &options, None, Some(draft)).unwrap();
            let drafted: Vec<_> = drafted.map(|r| r.unwrap()).collect();
            assert!(drafted.iter().any(|r| !r.from_draft), "some drafts are refused");
            assert_eq!(drafted.iter().map(|r| r.token).collect::<Vec<_>>(), plain, "{}", lm.model.plugin.name);
        }
    }
}

#[test]
fn a_draft_of_another_vocabulary_is_refused_in_one_sentence() {
    let (lm, other) = (load("llama"), load("llama-bias"));
    let error = Generation::new(&lm, &PROMPT, &options(), None, Some(&other)).err().unwrap().to_string();
    assert!(error.contains("vocabulary"), "{error}");
}

fn kept(max_kv_size: usize) -> CacheOptions {
    CacheOptions { max_kv_size: Some(max_kv_size), ..Default::default() }
}

#[test]
fn a_limited_cache_changes_nothing_while_the_text_is_shorter() {
    for name in ["llama", "qwen3", "gemma3_text"] {
        let lm = load(name);
        let limited = GenerateOptions { cache: kept(64), ..options() };
        assert_eq!(ids(&lm, &limited), ids(&lm, &options()), "{name}");
    }
}

/// Logits of each token, read in chunks of these sizes over and over.
fn chunked(lm: &LanguageModel, cache: &CacheOptions, tokens: &[u32], sizes: &[usize]) -> (Vec<Vec<f32>>, State) {
    let mut state = lm.model.state(cache).unwrap();
    let (mut rows, mut rest) = (Vec::new(), tokens);
    for &size in sizes.iter().cycle() {
        let (chunk, after) = rest.split_at(size.min(rest.len()));
        rows.extend(
            lm.model.step(&mut [Input { state: &mut state, tokens: chunk, want: Want::All }]).unwrap().remove(0),
        );
        rest = after;
        if rest.is_empty() {
            return (rows, state);
        }
    }
    unreachable!("sizes is not empty")
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let rows = a.iter().zip(b).map(|(a, b)| {
        let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale
    });
    rows.fold(0f32, f32::max)
}

#[test]
fn a_limited_cache_gives_the_same_logits_however_the_text_is_cut() {
    // Long enough that entries are dropped, in every architecture.
    let text: Vec<u32> = (0..1500u32).map(|i| (i * 37 + i / 7) % 90).collect();
    for name in ["llama", "mistral", "qwen3_moe", "gemma3_text"] {
        let lm = load(name);
        let (whole, state) = chunked(&lm, &kept(20), &text, &[700]);
        let (cut, _) = chunked(&lm, &kept(20), &text, &[1, 130, 64, 3]);
        assert!(worst(&cut, &whole) < 1e-5, "{name}: {}", worst(&cut, &whole));
        let entries = state.layers.iter().filter_map(|l| l.key_value()).map(|kv| kv.positions.len()).max().unwrap();
        assert!(entries < 1200, "{name} still holds {entries} entries");
        // Mistral's own window is the narrower one.
        let unlimited = chunked(&lm, &CacheOptions::default(), &text, &[700]).0;
        assert_eq!(whole == unlimited, name == "mistral", "{name}");
    }
}

#[test]
fn a_cache_that_dropped_entries_refuses_to_go_back_and_says_so() {
    let lm = load("llama");
    let text: Vec<u32> = (0..1500u32).map(|i| i % 90).collect();
    let (_, mut state) = chunked(&lm, &kept(20), &text, &[500]);
    assert!(state.can_trim(100), "a few tokens can be taken back");
    assert!(!state.can_trim(1400));
    assert!(state.trim(1400).unwrap_err().to_string().contains("dropped"));
    assert_eq!(state.offset, 1500);
}

fn packed(bits: u32, kv_group_size: usize) -> CacheOptions {
    CacheOptions { kv_bits: Some(bits), kv_group_size, quantized_kv_start: 10, ..Default::default() }
}

#[test]
fn a_quantized_cache_stays_near_the_exact_one() {
    // The real model: tiny ones have heads that no group divides.
    let Some(folder) = tests::smollm2::folder(tests::smollm2::Form::Mlx8bit) else { return };
    let options = LoadOptions { dtype: DtypeChoice::Float32, ..Default::default() };
    let lm = dylm::load(folder.to_str(), &options).unwrap();
    let text: Vec<u32> = (0..40u32).map(|i| 100 + i * 911 % 40_000).collect();
    let (exact, dense) = chunked(&lm, &CacheOptions::default(), &text, &[40]);
    // Relative to the largest logit; 0.02 and 0.17 were seen, and instruction sets differ a little.
    for (bits, bound) in [(8, 0.05), (4, 0.4)] {
        let (rows, state) = chunked(&lm, &packed(bits, 64), &text, &[12, 5]);
        let error = worst(&rows, &exact);
        println!("{bits} bits: off by {error:.1e}");
        assert!(error > 0.0 && error < bound, "{bits} bits: {error}");
        assert!(state.bytes() < dense.bytes() / 2, "{bits} bits take {} bytes, f32 {}", state.bytes(), dense.bytes());
    }
}

#[test]
fn a_cache_whose_heads_do_not_split_into_groups_is_refused() {
    let lm = load("llama");
    let error = Generation::new(&lm, &PROMPT, &GenerateOptions { cache: packed(8, 64), ..options() }, None, None);
    let error = error.unwrap().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("--kv-bits") && error.contains("groups of 64"), "{error}");
}

#[test]
fn a_known_beginning_is_not_read_again() {
    let lm = load("llama");
    let mut first = Generation::new(&lm, &PROMPT, &options(), None, None).unwrap();
    let text: Vec<u32> = PROMPT.iter().copied().chain(first.by_ref().map(|r| r.unwrap().token)).collect();
    let mut longer = text.clone();
    longer.extend([3, 4, 5]);
    let mut second = Generation::new(&lm, &longer, &options(), Some(first.into_state()), None).unwrap();
    let (mut read, total) = (usize::MAX, longer.len());
    second.prefill(&mut |done, _| read = read.min(total - done)).unwrap();
    assert!(read <= 5, "{read} of {total} tokens were read again");
    let reused: Vec<u32> = second.map(|r| r.unwrap().token).collect();
    let afresh: Vec<u32> =
        Generation::new(&lm, &longer, &options(), None, None).unwrap().map(|r| r.unwrap().token).collect();
    assert_eq!(reused, afresh);
}

#[test]
fn the_last_token_of_a_prompt_is_read_together_with_those_before_it() {
    let lm = load("llama");
    let afresh = ids(&lm, &options());
    // Tokens at a time, and what is left for the step that gives the first token.
    for (prefill_step_size, left) in [(2048, 9), (9, 9), (4, 1), (5, 4), (1, 1)] {
        let options = GenerateOptions { prefill_step_size, ..options() };
        let mut generation = Generation::new(&lm, &PROMPT, &options, None, None).unwrap();
        let mut read = 0;
        generation.prefill(&mut |done, _| read = done).unwrap();
        assert_eq!(PROMPT.len() - read, left, "{prefill_step_size} at a time");
        let tokens: Vec<u32> = generation.by_ref().map(|r| r.unwrap().token).collect();
        assert_eq!(tokens, afresh, "{prefill_step_size} at a time");
        assert!(generation.statistics().prompt_tps > 0.0);
    }
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_part_of_it() {
    let lm = load("llama");
    let run = |stop: Vec<String>| {
        let options = GenerateOptions { stop, ..options() };
        let mut generation = Generation::new(&lm, &PROMPT, &options, None, None).unwrap();
        let text: String = generation.by_ref().map(|r| r.unwrap().text).collect();
        (text, generation.statistics().finish_reason)
    };
    let (whole, reason) = run(Vec::new());
    assert_eq!(reason, Some(FinishReason::Length));
    let middle: Vec<char> = whole.chars().collect();
    let stop: String = middle[middle.len() / 2..middle.len() / 2 + 2].iter().collect();
    let (cut, reason) = run(vec![stop.clone()]);
    assert_eq!(reason, Some(FinishReason::Stop));
    assert_eq!(cut, whole[..whole.find(&stop).unwrap()]);
}
