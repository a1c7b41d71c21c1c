//! A seed keeps its text, and nothing that a model can return makes the sampler panic or choose at random.

use super::{Seeded, logs};
use dylm::error::Error;
use dylm::sampler::{Sampler, Sampling};

fn draw_ids(sampling: &Sampling, row: &[f32], n: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(sampling).unwrap();
    (0..n).map(|_| sampler.sample(&mut row.to_vec(), &[]).unwrap().id).collect()
}

fn bumpy(vocabulary: usize) -> Vec<f32> {
    let mut seeded = Seeded::new(99);
    (0..vocabulary).map(|_| 2.0 * seeded.normal()).collect()
}

#[test]
fn seed_7_draws_these_tokens_for_ever() {
    let sampling = Sampling { temp: 0.8, top_p: 0.9, min_p: 0.01, seed: Some(7), ..Sampling::default() };
    let expected = [486, 219, 8, 177, 149, 149, 424, 142, 14, 359, 387, 424];
    assert_eq!(draw_ids(&sampling, &bumpy(500), 12), expected);
}

#[test]
fn equal_seeds_draw_equal_tokens_in_any_thread_and_other_seeds_others() {
    let seeded = |seed| Sampling { temp: 1.0, seed: Some(seed), ..Sampling::default() };
    let row = bumpy(200);
    let here = draw_ids(&seeded(1), &row, 40);
    let there = std::thread::scope(|s| s.spawn(|| draw_ids(&seeded(1), &row, 40)).join().unwrap());
    assert_eq!(here, there);
    assert_ne!(here, draw_ids(&seeded(2), &row, 40));
    assert!(here.iter().any(|id| *id != here[0]));
}

#[test]
fn a_sampler_without_a_seed_tells_the_one_that_repeats_it() {
    let row = bumpy(300);
    let mut first = Sampler::new(&Sampling { temp: 1.5, ..Sampling::default() }).unwrap();
    let ids: Vec<u32> = (0..20).map(|_| first.sample(&mut row.clone(), &[]).unwrap().id).collect();
    let again = Sampling { temp: 1.5, seed: Some(first.seed()), ..Sampling::default() };
    assert_eq!(draw_ids(&again, &row, 20), ids);
    assert_ne!(Sampler::new(&Sampling::default()).unwrap().seed(), first.seed());
}

#[test]
fn sampling_is_drawing_from_the_distribution() {
    let sampling = Sampling {
        temp: 1.2,
        top_p: 0.95,
        xtc_probability: 0.5,
        xtc_threshold: 0.02,
        top_k: 30,
        seed: Some(4),
        ..Sampling::default()
    };
    let (mut one, mut two) = (Sampler::new(&sampling).unwrap(), Sampler::new(&sampling).unwrap());
    let row = bumpy(400);
    for _ in 0..200 {
        let distribution = two.distribution(&mut row.clone(), &[]).unwrap();
        assert_eq!(one.sample(&mut row.clone(), &[]).unwrap().id, two.draw(&distribution));
    }
}

#[test]
fn uniforms_stay_below_one_and_fill_the_interval() {
    let mut sampler = Sampler::new(&Sampling { seed: Some(11), ..Sampling::default() }).unwrap();
    let mut bins = [0u32; 20];
    for _ in 0..20_000 {
        let u = sampler.uniform();
        assert!((0.0..1.0).contains(&u));
        bins[(u * 20.0) as usize] += 1;
    }
    // 19 degrees of freedom: chi-square passes 60 once in 300 000 seeds.
    let chi: f64 = bins.iter().map(|n| (f64::from(*n) - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi < 60.0, "{chi}");
}

#[test]
fn rows_from_which_nothing_can_be_chosen_are_errors_that_say_why() {
    for temp in [0.0, 1.0] {
        let sampling = Sampling { temp, top_p: 0.9, ..Sampling::default() };
        let refuse = |row: &[f32]| match Sampler::new(&sampling).unwrap().sample(&mut row.to_vec(), &[]) {
            Err(Error::Generate(text)) => text,
            other => panic!("{row:?} gave {other:?}"),
        };
        assert!(refuse(&[1.0, f32::NAN, 2.0]).starts_with("logits: that of token 1 is NaN"));
        assert!(refuse(&[f32::NAN; 3]).starts_with("logits: that of token 0 is NaN"));
        assert!(refuse(&[0.0, 0.0, f32::INFINITY]).starts_with("logits: that of token 2 is infinite"));
        assert!(refuse(&[f32::NEG_INFINITY; 3]).starts_with("logits: every token is at negative infinity"));
        assert!(refuse(&[]).starts_with("logits: the row is empty"));
    }
}

#[test]
fn masked_tokens_and_extreme_logits_are_no_obstacle() {
    let mut row = vec![f32::NEG_INFINITY; 1000];
    row[613] = f32::MIN;
    for temp in [0.0, 1e-6, 1.0, 1e6] {
        let sampling = Sampling { temp, top_p: 0.5, min_p: 0.1, top_k: 5, seed: Some(0), ..Sampling::default() };
        assert_eq!(draw_ids(&sampling, &row, 5), [613; 5]);
        assert_eq!(draw_ids(&sampling, &[f32::MAX, f32::MIN, -f32::MAX], 5), [0; 5]);
    }
    let never = Sampling { temp: 5.0, seed: Some(0), ..Sampling::default() };
    assert!(draw_ids(&never, &logs(&[0.5, 0.0, 0.5]), 200).iter().all(|id| *id != 1));
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let refuse = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        Sampler::new(&sampling).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(refuse(|s| s.temp = -1.0), "temp is -1: give 0 (greedy) or a positive number");
    assert!(refuse(|s| s.temp = f32::NAN).starts_with("temp is NaN"));
    assert!(refuse(|s| s.top_p = 0.0).starts_with("top_p is 0"));
    assert!(refuse(|s| s.top_p = 1.5).starts_with("top_p is 1.5"));
    assert!(refuse(|s| s.min_p = 1.1).starts_with("min_p is 1.1"));
    assert!(refuse(|s| s.min_tokens_to_keep = 0).starts_with("min_tokens_to_keep is 0"));
    assert!(refuse(|s| s.xtc_probability = 2.0).starts_with("xtc_probability is 2"));
    assert!(refuse(|s| s.xtc_threshold = 0.6).starts_with("xtc_threshold is 0.6"));
    assert!(refuse(|s| s.repetition_penalty = Some(0.0)).starts_with("repetition_penalty is 0"));
    assert!(refuse(|s| s.presence_penalty = f32::INFINITY).starts_with("presence_penalty is inf"));
    assert!(refuse(|s| s.frequency_penalty = f32::NAN).starts_with("frequency_penalty is NaN"));
    assert!(refuse(|s| s.logit_bias = vec![(5, f32::NAN)]).starts_with("logit_bias of token 5 is NaN"));
}
