//! Values that mlx-lm's own tests pin, and rows that mlx-lm 0.32.2 was asked about (mlx_lm.json: processors, filters, temperature).

use super::{assert_close, logs, probabilities};
use dylm::processors::Processors;
use dylm::sampler::{Choice, Sampler, Sampling, most_likely};

fn warm() -> Sampling {
    Sampling { temp: 1.0, ..Sampling::default() }
}

#[test]
fn top_p_keeps_the_crossing_token() {
    for (top_p, row, expected) in [
        (0.3, [0.9, 0.0, 0.0, 0.1], [1.0, 0.0, 0.0, 0.0]),
        (0.95, [0.9, 0.0, 0.0, 0.1], [0.9, 0.0, 0.0, 0.1]),
        (0.4, [0.0, 0.5, 0.4, 0.1], [0.0, 1.0, 0.0, 0.0]),
        (0.6, [0.0, 0.5, 0.4, 0.1], [0.0, 0.5556, 0.4444, 0.0]),
        (0.95, [0.0, 0.5, 0.4, 0.1], [0.0, 0.5, 0.4, 0.1]),
    ] {
        assert_close(&probabilities(&Sampling { top_p, ..warm() }, &logs(&row), &[]), &expected, 1e-4);
    }
}

#[test]
fn min_p_and_top_k_keep_what_mlx_lm_keeps() {
    for (min_p, expected) in [(0.8, [1.0, 0.0, 0.0, 0.0]), (0.05, [0.9, 0.0, 0.0, 0.1])] {
        let row = logs(&[0.9, 0.0, 0.0, 0.1]);
        assert_close(&probabilities(&Sampling { min_p, ..warm() }, &row, &[]), &expected, 1e-6);
    }
    let two = Sampling { top_k: 2, ..warm() };
    assert_close(&probabilities(&two, &logs(&[0.6, 0.0, 0.1, 0.3]), &[]), &[0.6667, 0.0, 0.0, 0.3333], 1e-4);
    assert_close(&probabilities(&Sampling { top_k: 9, ..warm() }, &logs(&[0.5, 0.5]), &[]), &[0.5, 0.5], 1e-9);
}

#[test]
fn min_tokens_to_keep_outlasts_min_p() {
    let row = logs(&[0.9, 0.06, 0.03, 0.01]);
    let keep = |min_tokens_to_keep| {
        let kept = probabilities(&Sampling { min_p: 0.5, min_tokens_to_keep, ..warm() }, &row, &[]);
        kept.iter().filter(|p| **p > 0.0).count()
    };
    assert_eq!([1, 2, 3, 8].map(keep), [1, 2, 3, 4]);
}

#[test]
fn xtc_leaves_the_least_likely_of_the_obvious_and_spares_special_tokens() {
    let row = logs(&[0.4, 0.3, 0.15, 0.15]);
    let xtc = |xtc_probability, xtc_threshold, special: &[u32]| {
        let xtc_special_tokens = special.to_vec();
        probabilities(&Sampling { xtc_probability, xtc_threshold, xtc_special_tokens, ..warm() }, &row, &[])
    };
    assert_close(&xtc(1.0, 0.2, &[]), &[0.0, 0.5, 0.25, 0.25], 1e-6);
    assert_close(&xtc(1.0, 0.1, &[]), &[0.0, 0.0, 0.5, 0.5], 1e-6);
    assert_close(&xtc(1.0, 0.1, &[0]), &[4.0 / 7.0, 0.0, 1.5 / 7.0, 1.5 / 7.0], 1e-6);
    assert_close(&xtc(0.0, 0.1, &[]), &[0.4, 0.3, 0.15, 0.15], 1e-6);
}

#[test]
fn xtc_strikes_as_often_as_it_is_told() {
    let sampling = Sampling { xtc_probability: 0.25, xtc_threshold: 0.2, seed: Some(3), ..warm() };
    let mut sampler = Sampler::new(&sampling).unwrap();
    let row = logs(&[0.5, 0.3, 0.2]);
    let struck = (0..4000).filter(|_| sampler.distribution(&mut row.clone(), &[]).unwrap().len() == 2).count();
    // Four standard deviations of a binomial.
    assert!((struck as f64 - 1000.0).abs() < 4.0 * (4000.0f64 * 0.25 * 0.75).sqrt(), "{struck} of 4000");
}

#[test]
fn a_cold_draw_after_xtc_still_has_a_distribution() {
    let sampling = Sampling { temp: 0.01, xtc_probability: 1.0, xtc_threshold: 0.01, ..Sampling::default() };
    assert_close(&probabilities(&sampling, &[90.0, 86.0, 40.0, 30.0], &[]), &[0.0, 1.0, 0.0, 0.0], 1e-9);
}

#[test]
fn penalties_change_logits_as_in_mlx_lm() {
    let history = [0, 0, 0, 1, 1];
    let apply = |sampling: Sampling, row: [f32; 4]| {
        let mut row = row;
        Processors::new(&sampling).apply(&mut row, &history).unwrap();
        row.map(f64::from)
    };
    let presence = Sampling { presence_penalty: 0.5, ..Sampling::default() };
    assert_eq!(apply(presence, [0.0; 4]), [-0.5, -0.5, 0.0, 0.0]);
    let frequency = Sampling { frequency_penalty: 0.5, ..Sampling::default() };
    assert_eq!(apply(frequency, [0.0; 4]), [-1.5, -1.0, 0.0, 0.0]);
    let all = Sampling {
        repetition_penalty: Some(1.5),
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Sampling::default()
    };
    assert_close(&apply(all, [1.0, 0.5, 0.0, -0.5]), &[-0.5833, -0.6667, 0.0, -0.5], 1e-4);
}

#[test]
fn penalties_see_the_whole_history_unless_a_context_size_limits_them() {
    let mut history = vec![3u32; 2];
    history.extend([1; 40]);
    let after = |context: Option<usize>| {
        let sampling = Sampling {
            repetition_penalty: Some(2.0),
            repetition_context_size: context,
            frequency_penalty: 1.0,
            frequency_context_size: Some(3),
            ..Sampling::default()
        };
        let mut row = [4.0f32, 4.0, -4.0, 4.0];
        Processors::new(&sampling).apply(&mut row, &history).unwrap();
        row
    };
    assert_eq!(after(None), [4.0, -1.0, -4.0, 2.0]);
    assert_eq!(after(Some(40)), [4.0, -1.0, -4.0, 4.0]);
    assert_eq!(after(Some(0)), [4.0, 1.0, -4.0, 4.0]);
}

#[test]
fn a_tally_forgets_the_previous_history() {
    let mut processors = Processors::new(&Sampling { frequency_penalty: 1.0, ..Sampling::default() });
    for history in [[0, 0, 1], [1, 2, 2]] {
        let mut row = [0.0f32; 3];
        processors.apply(&mut row, &history).unwrap();
        let expected: Vec<f32> = (0..3).map(|id| -(history.iter().filter(|t| **t == id).count() as f32)).collect();
        assert_eq!(row.to_vec(), expected);
    }
}

#[test]
fn greedy_takes_the_first_of_equals_and_reports_the_models_logprob() {
    let mut sampler = Sampler::new(&Sampling { top_k: 1, ..Sampling::default() }).unwrap();
    let choice = sampler.sample(&mut logs(&[0.1, 0.4, 0.4, 0.1]), &[]).unwrap();
    assert_eq!(choice, Choice { id: 1, logprob: 0.4f32.ln() });
}

#[test]
fn a_bias_moves_the_choice_and_bans_tokens() {
    let biased = |logit_bias: Vec<(u32, f32)>| {
        let sampling = Sampling { logit_bias, ..Sampling::default() };
        Sampler::new(&sampling).unwrap().sample(&mut [1.0, 5.0, 3.0], &[]).map(|choice| choice.id)
    };
    assert_eq!(biased(vec![(0, 2000.0), (1, -20.0)]).unwrap(), 0);
    assert_eq!(biased(vec![(1, f32::NEG_INFINITY)]).unwrap(), 2);
    let outside = biased(vec![(3, 1.0)]).unwrap_err().to_string();
    assert_eq!(outside, "logit_bias: the vocabulary has 3 tokens, 3 is not one: remove it");
}

#[test]
fn the_most_likely_tokens_come_with_their_logprobs_in_order() {
    let best = most_likely(&logs(&[0.1, 0.3, 0.0, 0.3, 0.3]), 3).unwrap();
    assert_eq!(best.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 4]);
    assert!(best.iter().all(|(_, logprob)| (logprob - 0.3f32.ln()).abs() < 1e-6));
    assert_eq!(most_likely(&logs(&[0.5, 0.0, 0.5]), 11).unwrap().len(), 2);
    assert_eq!(most_likely(&[0.0], 0).unwrap(), []);
}

#[test]
fn rows_that_mlx_lm_was_asked_about_give_the_same_distribution() {
    let cases: serde_json::Value = serde_json::from_str(include_str!("mlx_lm.json")).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 36);
    for (n, case) in cases.iter().enumerate() {
        let floats = |key: &str| -> Vec<f64> { serde_json::from_value(case[key].clone()).unwrap() };
        let history: Vec<u32> = serde_json::from_value(case["history"].clone()).unwrap();
        let logits: Vec<f32> = floats("logits").iter().map(|x| *x as f32).collect();
        let given = &case["settings"];
        let number = |key: &str| given.get(key).and_then(|v| v.as_f64()).map(|v| v as f32);
        let count = |key: &str| given.get(key).and_then(|v| v.as_u64()).map(|v| v as usize);
        let bias = given.get("logit_bias").and_then(|v| v.as_object()).into_iter().flatten();
        let special = given.get("xtc_special_tokens").cloned().unwrap_or_else(|| serde_json::json!([]));
        let sampling = Sampling {
            temp: number("temp").unwrap(),
            top_p: number("top_p").unwrap_or(1.0),
            min_p: number("min_p").unwrap_or(0.0),
            min_tokens_to_keep: count("min_tokens_to_keep").unwrap_or(1),
            top_k: count("top_k").unwrap_or(0),
            xtc_probability: number("xtc_threshold").map_or(0.0, |_| 1.0),
            xtc_threshold: number("xtc_threshold").unwrap_or(0.1),
            xtc_special_tokens: serde_json::from_value(special).unwrap(),
            seed: None,
            logit_bias: bias.map(|(id, by)| (id.parse().unwrap(), by.as_f64().unwrap() as f32)).collect(),
            repetition_penalty: number("repetition_penalty"),
            repetition_context_size: count("context_size"),
            presence_penalty: number("presence_penalty").unwrap_or(0.0),
            presence_context_size: count("context_size"),
            frequency_penalty: number("frequency_penalty").unwrap_or(0.0),
            frequency_context_size: count("context_size"),
        };
        println!("case {n}: {given}");
        assert_close(&probabilities(&sampling, &logits, &history), &floats("probabilities"), 2e-5);
        let greedy = Sampling { temp: 0.0, ..sampling };
        let choice = Sampler::new(&greedy).unwrap().sample(&mut logits.clone(), &history).unwrap();
        assert_eq!(u64::from(choice.id), case["greedy"].as_u64().unwrap());
    }
}
