//! The real SmolLM2-135M-Instruct in every form, held to what transformers computed from the same numbers in f32.
//!
//! Logits within 1e-3 of the reference, relative to the largest; greedy ids equal, all 64 of all three prompts. A run may part from the
//! reference only at a step whose two best logits are closer than the error measured there; then the test prints both.

use dylm::{
    LanguageModel, LoadOptions,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use std::path::Path;
use tests::smollm2::{Form, Reference, folder, gguf, references};

fn load(path: &Path, dtype: DtypeChoice) -> LanguageModel {
    let options = LoadOptions { device: DeviceChoice::Cpu, dtype, ..Default::default() };
    dylm::load(path.to_str(), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Logits at each of the 64 steps, the reference's own tokens read whatever we would have chosen.
fn forced(lm: &LanguageModel, reference: &Reference) -> Vec<Vec<f32>> {
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let mut rows = Vec::new();
    let mut next = reference.prompt.clone();
    for &token in &reference.output {
        let mut logits = lm.model.step(&mut [Input { state: &mut state, tokens: &next, want: Want::Last }]).unwrap();
        rows.push(logits.remove(0).remove(0));
        next = vec![token];
    }
    rows
}

fn best_two(row: &[f32]) -> ((u32, f32), (u32, f32)) {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
    ((order[0], row[order[0] as usize]), (order[1], row[order[1] as usize]))
}

/// Largest and root mean square difference of the stored logits, relative to the largest of them.
fn errors(row: &[f32], reference: &Reference, stored: &[f32]) -> (f32, f32) {
    let scale = stored.iter().fold(0f32, |m, x| m.max(x.abs()));
    let differences = || reference.tokens.iter().zip(stored).map(|(&t, s)| (row[t as usize] - s).abs());
    let mean_square = differences().map(|d| d * d).sum::<f32>() / stored.len() as f32;
    (differences().fold(0f32, f32::max) / scale, mean_square.sqrt() / scale)
}

fn hold(path: &Path, name: &str) {
    let lm = load(path, DtypeChoice::Float32);
    for (p, reference) in references(name).unwrap().iter().enumerate() {
        let rows = forced(&lm, reference);
        let (first, _) = errors(&rows[0], reference, &reference.logits_prompt);
        let (last, _) = errors(&rows[63], reference, &reference.logits_last);
        println!("{name} prompt {p}: logits differ by {first:.1e} after the prompt, {last:.1e} after 63 tokens");
        assert!(first < 1e-3 && last < 1e-3, "{name}, prompt {p}: {first} and {last}");
        for (step, (row, &expected)) in rows.iter().zip(&reference.output).enumerate() {
            let ((best, best_logit), (second, second_logit)) = best_two(row);
            let error = first.max(last) * best_logit.abs();
            if best != expected {
                println!(
                    "{name} prompt {p} step {step}: {best} has {best_logit}, {second} has {second_logit}, the reference chose {expected}"
                );
                assert!(
                    second == expected && best_logit - second_logit < error,
                    "{name}, prompt {p}, step {step}: {best}, not {expected}"
                );
            }
        }
    }
}

#[test]
fn the_dense_model_gives_transformers_logits_and_tokens() {
    let Some(path) = folder(Form::Bf16) else { return };
    hold(&path, "transformers-f32");
}

#[test]
fn eight_bits_give_the_logits_of_their_dequantized_weights() {
    let Some(path) = folder(Form::Mlx8bit) else { return };
    hold(&path, "dequant-f32-8bit");
}

#[test]
fn four_bits_give_the_logits_of_their_dequantized_weights() {
    let Some(path) = folder(Form::Mlx4bit) else { return };
    hold(&path, "dequant-f32-4bit");
}

#[test]
fn mxfp4_gives_the_logits_of_its_dequantized_weights() {
    let Some(path) = folder(Form::MlxMxfp4) else { return };
    hold(&path, "dequant-f32-mxfp4");
}

#[test]
fn the_gguf_gives_the_logits_of_its_dequantized_self() {
    let (Some(gguf), Some(dense)) = (gguf(), folder(Form::F32)) else { return };
    let (a, b) = (load(&gguf, DtypeChoice::Float32), load(&dense, DtypeChoice::Float32));
    for reference in &references("transformers-f32").unwrap() {
        let (x, y) = (forced(&a, reference), forced(&b, reference));
        for step in [0, 63] {
            let scale = y[step].iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = x[step].iter().zip(&y[step]).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
            println!("gguf against its dequantized self at step {step}: {worst:.1e}");
            assert!(worst < 1e-4, "{worst}");
        }
    }
}

/// Root mean square difference of two references' logits after the prompt, relative to the largest of `exact`. Files store every 48th
/// token; the likeliest ones differ, so what both have is compared.
fn apart(exact: &Reference, other: &Reference) -> f32 {
    let common = exact.tokens.iter().enumerate();
    let both: Vec<(usize, usize)> =
        common.filter_map(|(i, t)| Some((i, other.tokens.iter().position(|u| u == t)?))).collect();
    let scale = exact.logits_prompt.iter().fold(0f32, |m, x| m.max(x.abs()));
    let squares: f32 = both.iter().map(|&(i, j)| (exact.logits_prompt[i] - other.logits_prompt[j]).powi(2)).sum();
    (squares / both.len() as f32).sqrt() / scale
}

#[test]
fn in_bf16_logits_are_no_further_off_than_transformers_own_bf16_run() {
    let Some(path) = folder(Form::Bf16) else { return };
    let lm = load(&path, DtypeChoice::Bfloat16);
    let (exact, theirs) = (references("transformers-f32").unwrap(), references("transformers-bf16").unwrap());
    for (reference, bf16) in exact.iter().zip(&theirs) {
        let ours = forced(&lm, reference);
        let (_, our_error) = errors(&ours[0], reference, &reference.logits_prompt);
        let their_error = apart(reference, bf16);
        println!("bf16: off by {our_error:.1e}, transformers by {their_error:.1e}");
        assert!(our_error <= 1.5 * their_error, "{our_error} against {their_error}");
    }
}

#[test]
fn rounding_activations_costs_little_beside_packing_the_weights() {
    let dense = references("transformers-f32").unwrap();
    // Measured: a third of the packing's error at eight bits, where that is small, and a tenth at four.
    for (form, name, most) in [
        (Form::Mlx8bit, "dequant-f32-8bit", 0.5),
        (Form::Mlx4bit, "dequant-f32-4bit", 0.2),
        (Form::MlxMxfp4, "dequant-f32-mxfp4", 0.2),
    ] {
        let Some(path) = folder(form) else { return };
        let lm = load(&path, DtypeChoice::Bfloat16);
        for (reference, dense) in references(name).unwrap().iter().zip(&dense) {
            let ours = forced(&lm, reference);
            let (_, rounding) = errors(&ours[0], reference, &reference.logits_prompt);
            let packing = apart(reference, dense);
            println!("{name}: off by {rounding:.1e} in bf16, packing by {packing:.1e}");
            assert!(rounding > 0.0 && rounding <= most * packing, "{name}: {rounding} against {packing}");
        }
    }
}
