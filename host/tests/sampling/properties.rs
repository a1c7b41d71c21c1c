//! Filters against slow, obvious versions of themselves: whole sorts in f64 on seeded random rows, flat, peaked and full of ties.

use super::{Seeded, probabilities};
use dylm::sampler::Sampling;

fn random_row(seeded: &mut Seeded) -> Vec<f32> {
    let vocabulary = seeded.pick(&[1, 2, 9, 100, 3000]);
    let spread = seeded.pick(&[0.0, 0.01, 1.0, 6.0]);
    let grain = seeded.pick(&[0.0, 0.5]);
    let mut row: Vec<f32> = (0..vocabulary).map(|_| spread * seeded.normal()).collect();
    if grain > 0.0 {
        row.iter_mut().for_each(|x| *x = (*x / grain).round() * grain);
    }
    if vocabulary > 5 && seeded.below(3) == 0 {
        row.iter_mut().step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
    }
    row
}

fn softmax(row: &[f32]) -> Vec<f64> {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = row.iter().map(|x| f64::from(x - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn kept(sampling: &Sampling, row: &[f32]) -> Vec<usize> {
    let p = probabilities(&Sampling { temp: 1.0, ..sampling.clone() }, row, &[]);
    assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5);
    (0..p.len()).filter(|id| p[*id] > 0.0).collect()
}

/// Ids from the most likely on, lower ids first among equals, masked ones left out.
fn ranked(row: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..row.len()).filter(|id| row[*id] > f32::NEG_INFINITY).collect();
    ids.sort_by(|a, b| row[*b].partial_cmp(&row[*a]).unwrap());
    ids
}

#[test]
fn every_mix_of_filters_leaves_a_distribution() {
    let mut seeded = Seeded::new(1);
    for _ in 0..400 {
        let row = random_row(&mut seeded);
        let sampling = Sampling {
            temp: seeded.pick(&[0.05, 0.7, 1.0, 3.0]),
            top_p: seeded.pick(&[0.01, 0.5, 0.99, 1.0]),
            min_p: seeded.pick(&[0.0, 0.05, 1.0]),
            min_tokens_to_keep: seeded.pick(&[1, 3, 5000]),
            top_k: seeded.pick(&[0, 1, 40]),
            xtc_probability: seeded.pick(&[0.0, 1.0]),
            xtc_threshold: seeded.pick(&[0.0, 0.1, 0.5]),
            ..Sampling::default()
        };
        let p = probabilities(&sampling, &row, &[]);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{sampling:?}");
        assert!(p.iter().zip(&row).all(|(p, x)| *p >= 0.0 && (*x > f32::NEG_INFINITY || *p == 0.0)));
        if sampling.top_k > 0 {
            assert!(p.iter().filter(|p| **p > 0.0).count() <= sampling.top_k);
        }
    }
}

#[test]
fn top_k_keeps_exactly_k_and_the_lower_ids_of_equals() {
    let mut seeded = Seeded::new(2);
    for _ in 0..200 {
        let row = random_row(&mut seeded);
        let top_k = seeded.pick(&[1, 2, 7, 64, 2999]);
        let mut expected: Vec<usize> = ranked(&row).into_iter().take(top_k).collect();
        expected.sort();
        assert_eq!(kept(&Sampling { top_k, ..Sampling::default() }, &row), expected);
    }
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_p_and_its_equals() {
    let mut seeded = Seeded::new(3);
    for _ in 0..200 {
        let row = random_row(&mut seeded);
        let top_p = seeded.pick(&[0.037f32, 0.31, 0.77, 0.963, 0.9991]);
        let p = softmax(&row);
        let mut above = 0.0;
        let mut cut = f32::INFINITY;
        for id in ranked(&row) {
            if above >= f64::from(top_p) {
                break;
            }
            cut = row[id];
            above += p[id];
        }
        let expected: Vec<usize> = (0..row.len()).filter(|id| row[*id] >= cut && p[*id] > 0.0).collect();
        assert_eq!(kept(&Sampling { top_p, ..Sampling::default() }, &row), expected, "top_p {top_p}");
    }
}

#[test]
fn min_p_keeps_all_within_its_ratio_of_the_best() {
    let mut seeded = Seeded::new(4);
    for _ in 0..200 {
        let row = random_row(&mut seeded);
        let min_p = seeded.pick(&[0.003f32, 0.11, 0.83]);
        let p = softmax(&row);
        let best = p.iter().copied().fold(0.0, f64::max);
        let expected: Vec<usize> = (0..row.len()).filter(|id| p[*id] / best >= f64::from(min_p)).collect();
        assert_eq!(kept(&Sampling { min_p, ..Sampling::default() }, &row), expected, "min_p {min_p}");
    }
}

#[test]
fn a_large_vocabulary_goes_through_every_filter() {
    let mut seeded = Seeded::new(5);
    let row: Vec<f32> = (0..150_000).map(|_| 0.001 * seeded.normal()).collect();
    let half = kept(&Sampling { top_p: 0.5, ..Sampling::default() }, &row).len();
    assert!((74_000..76_000).contains(&half), "{half} of a nearly flat row hold half of it");
    assert_eq!(kept(&Sampling { top_k: 1000, top_p: 0.9, min_p: 0.5, ..Sampling::default() }, &row).len(), 1000);
}
