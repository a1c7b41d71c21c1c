//! LoRA and DoRA against W + scale (A B)ᵀ, summed in f64.

use crate::*;

const ROWS: usize = 24;
const COLS: usize = 64;

fn low_rank(path: &str) -> Vec<Named> {
    vec![named(&format!("{path}.lora_a"), &[COLS, RANK]), named(&format!("{path}.lora_b"), &[RANK, ROWS])]
}

#[test]
fn a_lora_layer_is_the_layer_with_the_product_added_to_its_weight() {
    let parts = low_rank("q");
    let adapters = open_mlx("lora", &parts).unwrap();
    let (w, bias, x) = (numbers("w", ROWS * COLS), numbers("bias", ROWS), numbers("x", 3 * COLS));
    for place in places() {
        for format in formats() {
            let layer = linear(&adapters, "q", weight(&w, ROWS, COLS, format, &place), Some(&bias), &place);
            let explicit = adapted(&held(&layer.weight), &parts[0].values, &parts[1].values, ROWS, COLS, SCALE);
            let expected: Vec<f64> =
                product(&x, &explicit, COLS).iter().enumerate().map(|(i, y)| y + f64::from(bias[i % ROWS])).collect();
            assert_near(&run(&layer, &x), &expected, &format!("{format:?}"));
        }
    }
    adapters.refuse_unused().unwrap();
}

#[test]
fn an_adapter_of_scale_zero_changes_no_bit() {
    let mut config = mlx_config("lora");
    config["lora_parameters"]["scale"] = json!(0);
    let adapters = Adapters::open(folder(&config, "adapters.safetensors", &low_rank("q")).path()).unwrap();
    let (w, x) = (numbers("w", ROWS * COLS), numbers("x", 2 * COLS));
    for place in places() {
        for format in formats() {
            let layer = linear(&adapters, "q", weight(&w, ROWS, COLS, format, &place), None, &place);
            assert!(layer.adapter.is_some());
            let base = Linear { weight: layer.weight.clone(), bias: None, adapter: None };
            assert_eq!(run(&layer, &x), run(&base, &x));
        }
    }
}

#[test]
fn dora_gives_every_output_row_the_length_m_and_adds_the_bias_after() {
    let mut parts = low_rank("q");
    parts.push(named("q.m", &[ROWS]));
    let adapters = open_mlx("dora", &parts).unwrap();
    let (w, bias, x) = (numbers("w", ROWS * COLS), numbers("bias", ROWS), numbers("x", 3 * COLS));
    for place in places() {
        for format in formats() {
            let layer = linear(&adapters, "q", weight(&w, ROWS, COLS, format, &place), Some(&bias), &place);
            let mut explicit = adapted(&held(&layer.weight), &parts[0].values, &parts[1].values, ROWS, COLS, SCALE);
            for (row, m) in explicit.chunks_mut(COLS).zip(&parts[2].values) {
                let norm = row.iter().map(|w| w * w).sum::<f64>().sqrt();
                row.iter_mut().for_each(|w| *w *= f64::from(*m) / norm);
            }
            let expected: Vec<f64> =
                product(&x, &explicit, COLS).iter().enumerate().map(|(i, y)| y + f64::from(bias[i % ROWS])).collect();
            assert_near(&run(&layer, &x), &expected, &format!("{format:?}"));
        }
    }
}

#[test]
fn a_dora_row_of_zeros_stays_zero() {
    let mut parts = low_rank("q");
    parts[1].values.fill(0.0);
    parts.push(named("q.m", &[ROWS]));
    let adapters = open_mlx("dora", &parts).unwrap();
    let place = &places()[0];
    let mut w = numbers("w", ROWS * COLS);
    w[..COLS].fill(0.0);
    let layer = linear(&adapters, "q", weight(&w, ROWS, COLS, formats()[0], place), None, place);
    let y = run(&layer, &numbers("x", COLS));
    assert_eq!(y[0], 0.0);
    assert!(y.iter().all(|y| y.is_finite()) && y[1] != 0.0);
}

#[test]
fn rows_of_a_fused_projection_take_their_part_of_its_adapter() {
    let mut parts = low_rank("qkv");
    parts.push(named("qkv.m", &[ROWS]));
    let adapters = open_mlx("dora", &parts).unwrap();
    let place = &places()[0];
    let (w, x) = (numbers("w", ROWS * COLS), numbers("x", COLS));
    let whole = linear(&adapters, "qkv", weight(&w, ROWS, COLS, formats()[0], place), None, place);
    let cut = weight(&w[8 * COLS..20 * COLS], 12, COLS, formats()[0], place);
    let adapter = adapters.linear_rows("qkv", &(8..20).collect::<Vec<_>>(), ROWS, &cut, place).unwrap();
    let cut = Linear { weight: cut, bias: None, adapter };
    let expected: Vec<f64> = run(&whole, &x)[8..20].iter().map(|y| f64::from(*y)).collect();
    assert_near(&run(&cut, &x), &expected, "rows 8..20");
}

#[test]
fn rows_that_take_turns_in_a_fused_projection_take_their_part_of_its_adapter() {
    let adapters = open_mlx("lora", &low_rank("gate_up")).unwrap();
    let place = &places()[0];
    let (w, x) = (numbers("w", ROWS * COLS), numbers("x", COLS));
    let whole = linear(&adapters, "gate_up", weight(&w, ROWS, COLS, formats()[0], place), None, place);
    let rows: Vec<usize> = (1..ROWS).step_by(2).collect();
    let cut: Vec<f32> = rows.iter().flat_map(|row| w[row * COLS..][..COLS].to_vec()).collect();
    let cut = weight(&cut, rows.len(), COLS, formats()[0], place);
    let adapter = adapters.linear_rows("gate_up", &rows, ROWS, &cut, place).unwrap();
    let cut = Linear { weight: cut, bias: None, adapter };
    let expected: Vec<f64> = run(&whole, &x)[1..].iter().step_by(2).map(|y| f64::from(*y)).collect();
    assert_near(&run(&cut, &x), &expected, "every second row");
}

#[test]
fn an_embedding_changes_the_same_way_in_both_directions() {
    let (vocab, dim) = (40, 64);
    let parts = [named("e.lora_a", &[vocab, RANK]), named("e.lora_b", &[RANK, dim])];
    let adapters = open_mlx("lora", &parts).unwrap();
    let (w, x) = (numbers("w", vocab * dim), numbers("x", 2 * dim));
    for place in places() {
        for format in formats() {
            let layer = embedding(&adapters, "e", weight(&w, vocab, dim, format, &place), &place);
            // W + scale A B is the linear rule with the factors exchanged and turned.
            let turn = |v: &[f32], rows: usize| -> Vec<f32> {
                let cols = v.len() / rows;
                (0..v.len()).map(|i| v[(i % rows) * cols + i / rows]).collect()
            };
            let (a, b) = (turn(&parts[1].values, RANK), turn(&parts[0].values, vocab));
            let explicit = adapted(&held(&layer.weight), &a, &b, vocab, dim, SCALE);
            let ids = Tensor::new(&[39u32, 0, 7], &Device::Cpu).unwrap();
            let expected: Vec<f64> =
                [39, 0, 7].iter().flat_map(|id| explicit[id * dim..(id + 1) * dim].to_vec()).collect();
            assert_near(&flat(layer.forward(&ids).unwrap()), &expected, &format!("rows, {format:?}"));
            let logits = flat(layer.as_linear(&tensor(&x, &[2, dim])).unwrap());
            assert_near(&logits, &product(&x, &explicit, dim), &format!("head, {format:?}"));
        }
    }
}

#[test]
fn experts_find_their_part_in_a_stack_and_one_by_one_whichever_way_the_checkpoint_lies() {
    let experts = 3;
    let stacked = [
        named("mlp.switch_mlp.up_proj.lora_a", &[experts, RANK, COLS]),
        named("mlp.switch_mlp.up_proj.lora_b", &[experts, ROWS, RANK]),
    ];
    let part = |t: &Named, e: usize, rest: &[usize], name: &str| {
        let size = rest.iter().product::<usize>();
        let values = t.values[e * size..(e + 1) * size].to_vec();
        Named { name: format!("base_model.model.mlp.experts.{e}.up_proj.{name}.weight"), shape: rest.into(), values }
    };
    let single: Vec<Named> = (0..experts)
        .flat_map(|e| [part(&stacked[0], e, &[RANK, COLS], "lora_A"), part(&stacked[1], e, &[ROWS, RANK], "lora_B")])
        .collect();
    let (place, w, x) = (&places()[0], numbers("w", ROWS * COLS), numbers("x", COLS));
    let mut outputs: Vec<Vec<f32>> = Vec::new();
    for adapters in [open_mlx("lora", &stacked).unwrap(), open_peft(&peft_config(), &single).unwrap()] {
        for names in ["mlp.switch_mlp.up_proj", "mlp.experts.E.up_proj"] {
            let of_expert = |e: usize| {
                let w = weight(&w, ROWS, COLS, formats()[0], place);
                let adapter =
                    adapters.expert([&*names.replace('E', &e.to_string())], (e, experts), &w, place).unwrap().unwrap();
                run(&Linear { weight: w, bias: None, adapter: Some(adapter) }, &x)
            };
            outputs.push((0..experts).flat_map(of_expert).collect());
        }
        adapters.refuse_unused().unwrap();
    }
    assert!(outputs.iter().all(|o| *o == outputs[0]));
    // Expert 2, by hand: A and B of a stack lie transposed.
    let a: Vec<f32> = (0..COLS * RANK).map(|i| single[4].values[(i % RANK) * COLS + i / RANK]).collect();
    let b: Vec<f32> = (0..RANK * ROWS).map(|i| single[5].values[(i % ROWS) * RANK + i / ROWS]).collect();
    let expected = product(&x, &adapted(&w, &a, &b, ROWS, COLS, SCALE), COLS);
    assert_near(&outputs[0][2 * ROWS..], &expected, "expert 2");
}

#[test]
fn peft_s_layout_of_the_same_adapter_gives_the_same_bits() {
    let parts = low_rank("q");
    let turned = |t: &Named, name: &str| {
        let (n, m) = (t.shape[0], t.shape[1]);
        let values = (0..n * m).map(|i| t.values[(i % n) * m + i / n]).collect();
        Named { name: format!("base_model.model.q.{name}.weight"), shape: vec![m, n], values }
    };
    let same = [turned(&parts[0], "lora_A"), turned(&parts[1], "lora_B")];
    let (place, w, x) = (&places()[0], numbers("w", ROWS * COLS), numbers("x", COLS));
    let y =
        |adapters: Adapters| run(&linear(&adapters, "q", weight(&w, ROWS, COLS, formats()[1], place), None, place), &x);
    let mlx = y(open_mlx("lora", &parts).unwrap());
    assert_eq!(mlx, y(open_peft(&peft_config(), &same).unwrap()));
    // A pattern that fits, after one that does not, outweighs the model's alpha; rsLoRA divides by the root.
    let mut config = peft_config();
    config["lora_alpha"] = json!(1000);
    config["alpha_pattern"] = json!({"uq": 1, "^q$": SCALE * (RANK as f64).sqrt(), "q": 3});
    config["use_rslora"] = json!(true);
    assert_eq!(mlx, y(open_peft(&config, &same).unwrap()));
}

#[test]
fn a_wrapped_model_s_names_are_taken_without_the_wrapper() {
    for prefix in ["language_model.model.layers.0.q", "base_model.model.model.language_model.layers.0.q"] {
        let peft = prefix.starts_with("base");
        let adapters = if peft {
            let tower = named("base_model.model.model.vision_tower.q.lora_A.weight", &[RANK, 8]);
            let parts = [
                named(&format!("{prefix}.lora_A.weight"), &[RANK, COLS]),
                named(&format!("{prefix}.lora_B.weight"), &[ROWS, RANK]),
            ];
            open_peft(&peft_config(), &[&parts[..], &[tower]].concat())
        } else {
            open_mlx("lora", &low_rank(prefix))
        };
        assert_eq!(adapters.unwrap().names().collect::<Vec<_>>(), ["model.layers.0.q"]);
    }
}
