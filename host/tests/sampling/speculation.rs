//! Rejection sampling gives the target's distribution exactly: chi-square tests on fixed seeds, good drafts and bad ones.

use super::{assert_close, spread};
use dylm::sampler::{Distribution, Sampler, Sampling};
use dylm::speculate::{Verdict, accept};

const DRAWS: usize = 40_000;

fn sampler(seed: u64) -> Sampler {
    Sampler::new(&Sampling { temp: 1.0, seed: Some(seed), ..Sampling::default() }).unwrap()
}

fn weighted(weights: &[f64]) -> Distribution {
    Distribution::from_weights(weights).unwrap()
}

/// Chi-square's value that noise exceeds about once in 30 000 seeds (4 standard deviations), after Wilson and Hilferty (1931).
fn bound(degrees: usize) -> f64 {
    let k = degrees as f64;
    k * (1.0 - 2.0 / (9.0 * k) + 4.0 * (2.0 / (9.0 * k)).sqrt()).powi(3)
}

/// Chi-square of counts against probabilities, and the degrees of freedom. A count where nothing can fall is infinitely wrong.
fn chi_square(counts: &[usize], expected: &[f64]) -> (f64, usize) {
    let n = counts.iter().sum::<usize>() as f64;
    let chi = counts.iter().zip(expected).map(|(count, p)| match (*count as f64, p * n) {
        (0.0, 0.0) => 0.0,
        (count, mean) => (count - mean).powi(2) / mean,
    });
    (chi.sum(), expected.iter().filter(|p| **p > 0.0).count() - 1)
}

#[track_caller]
fn assert_drawn_from(counts: &[usize], expected: &[f64]) {
    let (chi, degrees) = chi_square(counts, expected);
    assert!(chi < bound(degrees), "chi-square {chi} on {degrees} degrees of freedom, {counts:?} for {expected:?}");
}

const TARGET: [f64; 6] = [0.35, 0.25, 0.2, 0.1, 0.1, 0.0];

/// First output token of speculating one token.
fn first_tokens(seed: u64, target: &Distribution, draft: &Distribution) -> (Vec<usize>, usize) {
    let (mut sampler, mut counts, mut stood) = (sampler(seed), vec![0; 6], 0);
    for _ in 0..DRAWS {
        let token = sampler.draw(draft);
        let verdict = accept(&mut sampler, &[target.clone(), target.clone()], &[(token, draft.clone())]).unwrap();
        counts[if verdict.accepted == 1 { token } else { verdict.next } as usize] += 1;
        stood += verdict.accepted;
    }
    (counts, stood)
}

#[test]
fn the_output_is_the_targets_whatever_the_draft() {
    let target = weighted(&TARGET);
    for (seed, draft) in [
        [0.35, 0.25, 0.2, 0.1, 0.1, 0.0],
        [0.3, 0.3, 0.2, 0.1, 0.1, 0.0],
        [0.0, 0.0, 0.05, 0.05, 0.1, 0.8],
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    ]
    .iter()
    .enumerate()
    {
        let (counts, stood) = first_tokens(seed as u64, &target, &weighted(draft));
        assert_drawn_from(&counts, &TARGET);
        // A draft stands as often as the two distributions overlap.
        let overlap: f64 = draft.iter().zip(&TARGET).map(|(q, p)| q.min(*p)).sum();
        assert!((stood as f64 / DRAWS as f64 - overlap).abs() < 0.011, "{stood} stood, overlap {overlap}");
    }
}

#[test]
fn the_test_itself_notices_a_slightly_wrong_distribution() {
    let (mut sampler, mut counts) = (sampler(9), vec![0; 6]);
    let wrong = weighted(&[0.33, 0.27, 0.2, 0.1, 0.1, 0.0]);
    (0..DRAWS).for_each(|_| counts[sampler.draw(&wrong) as usize] += 1);
    let (chi, degrees) = chi_square(&counts, &TARGET);
    assert!(chi > bound(degrees), "{chi}");
}

#[test]
fn two_drafted_tokens_keep_the_joint_distribution_of_a_chain() {
    // Row 0 is the distribution of the first token, row 1 + t that of the token after t.
    let target = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.1, 0.2], [0.3, 0.3, 0.4]].map(|w| weighted(&w));
    let draft = [[0.2, 0.2, 0.6], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]].map(|w| weighted(&w));
    let (mut sampler, mut counts) = (sampler(21), vec![0; 9]);
    for _ in 0..DRAWS {
        let a = sampler.draw(&draft[0]);
        let b = sampler.draw(&draft[1 + a as usize]);
        let judges = [target[0].clone(), target[1 + a as usize].clone(), target[1 + b as usize].clone()];
        let drafted = [(a, draft[0].clone()), (b, draft[1 + a as usize].clone())];
        let Verdict { accepted, next } = accept(&mut sampler, &judges, &drafted).unwrap();
        let (first, second) = match accepted {
            0 => (next, sampler.draw(&target[1 + next as usize])),
            1 => (a, next),
            _ => (a, b),
        };
        counts[(first * 3 + second) as usize] += 1;
    }
    let joint: Vec<f64> =
        (0..9).map(|i| target[0].probability(i / 3) * target[1 + i as usize / 3].probability(i % 3)).collect();
    assert_drawn_from(&counts, &joint);
}

#[test]
fn greedy_models_accept_exactly_while_they_agree() {
    let greedy = |ids: [u32; 4]| ids.map(Distribution::Greedy);
    let draft = [5, 6, 7].map(|id| (id, Distribution::Greedy(id)));
    let judge = |target: [u32; 4]| accept(&mut sampler(0), &greedy(target), &draft).unwrap();
    assert_eq!(judge([5, 6, 7, 8]), Verdict { accepted: 3, next: 8 });
    assert_eq!(judge([5, 9, 7, 8]), Verdict { accepted: 1, next: 9 });
    assert_eq!(judge([1, 6, 7, 8]), Verdict { accepted: 0, next: 1 });
}

#[test]
fn greedy_and_drawn_distributions_mix() {
    let target = weighted(&TARGET);
    assert_drawn_from(&first_tokens(31, &target, &Distribution::Greedy(1)).0, &TARGET);
    let (counts, _) = first_tokens(32, &Distribution::Greedy(3), &target);
    assert_eq!(counts, [0, 0, 0, DRAWS, 0, 0]);
}

#[test]
fn a_residual_is_the_normalised_positive_part() {
    let p = weighted(&[0.5, 0.3, 0.2, 0.0]);
    let q = weighted(&[0.2, 0.4, 0.1, 0.3]);
    assert_close(&spread(&p.residual(&q).unwrap(), 4), &[0.75, 0.0, 0.25, 0.0], 1e-12);
    assert_eq!(p.residual(&p), None);
    assert_close(&spread(&p.residual(&Distribution::Greedy(0)).unwrap(), 4), &[0.0, 0.6, 0.4, 0.0], 1e-12);
}

#[test]
fn an_empty_draft_is_a_draw_and_missing_judges_are_an_error() {
    let only = Distribution::Greedy(4);
    let one = std::slice::from_ref(&only);
    assert_eq!(accept(&mut sampler(0), one, &[]).unwrap(), Verdict { accepted: 0, next: 4 });
    assert!(accept(&mut sampler(0), &[], &[]).is_err());
    let error = accept(&mut sampler(0), one, &[(4, only.clone())]).unwrap_err().to_string();
    assert_eq!(error, "speculation: 1 drafted tokens need 2 target distributions, got 1");
}
