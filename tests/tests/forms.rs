//! Weights as other tools pack them, one at a time: unpacked by us to exactly what those tools unpack (stored file), or to what an
//! encoder of our tests' own really wrote; in memory as packed as they can be; cut and stacked; and with something wrong, one sentence.

use dylm::{
    config::Config,
    device::{DeviceChoice, DtypeChoice, Placement},
    kernels::cpu::{Float, Format, Matrix},
    layers::weight::Weight,
    weights::{
        Checkpoint,
        recipe::{Pantry, Recipe},
    },
};
use safetensors::{SafeTensors, tensor::Dtype};
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};
use tests::packing::{self, Packing, Tensor};

fn pantry(tensors: &[Tensor], quantization_config: &Value) -> dylm::Result<Pantry> {
    let file = tempfile::NamedTempFile::new().unwrap();
    packing::write(tensors, file.path()).unwrap();
    let config = json!({"model_type": "m", "quantization_config": quantization_config});
    let config = Config::from_json(config, &[], "config.json")?;
    Ok(Pantry { checkpoint: Checkpoint::open_file(file.path())?, quantization: config.quantization().cloned() })
}

fn stored(name: &str) -> Recipe {
    Recipe::Stored(name.into())
}

fn back(m: &Matrix) -> Vec<f32> {
    let mut out = vec![0.0; m.rows() * m.cols()];
    m.dequantize_rows(0..m.rows(), &mut out);
    out
}

/// Every tensor of a case in the stored file, as of a layer `x`.
fn case(name: &str) -> Vec<Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quant/forms.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let prefix = format!("{name}.");
    let tensors = file.iter().filter_map(|(full, view)| {
        let part = full.strip_prefix(&prefix)?;
        let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        Some(Tensor { name: format!("x.{part}"), dtype, shape, bytes })
    });
    let tensors: Vec<_> = tensors.collect();
    assert!(!tensors.is_empty(), "{name} is not in the file");
    tensors
}

/// Takes a tensor of f32 out.
fn take(tensors: &mut Vec<Tensor>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let at = tensors.iter().position(|t| t.name == name).unwrap();
    let t = tensors.remove(at);
    (t.shape, t.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
}

fn affine(bits: u32, group: usize, scales: Float) -> Format {
    Format::Affine { bits, group, scales }
}

#[test]
fn what_other_tools_packed_unpacks_to_the_very_numbers_that_they_unpack() {
    let (awq, ct) = (json!({"quant_method": "awq"}), json!({"quant_method": "compressed-tensors"}));
    let fp8 = |rows: u32, cols: u32| json!({"quant_method": "fp8", "weight_block_size": [rows, cols]});
    let bitnet = |class: &str| json!({"quant_method": "bitnet", "linear_class": class});
    let cases = [
        ("fp8.blocks", fp8(16, 32), Format::Fp8 { block: 32 }),
        ("fp8.powers", fp8(32, 32), Format::Mxfp8),
        ("fp8.rows", ct.clone(), Format::Fp8 { block: 192 }),
        ("fp8.tensor", ct.clone(), Format::Fp8 { block: 192 }),
        ("packed.4.32", ct.clone(), affine(4, 32, Float::BF16)),
        ("packed.4.64", ct.clone(), affine(4, 64, Float::BF16)),
        ("packed.8.96", ct.clone(), affine(8, 32, Float::BF16)),
        ("packed.3.32", ct.clone(), affine(3, 32, Float::BF16)),
        ("packed.5.64", ct.clone(), affine(5, 64, Float::BF16)),
        // 88 columns are no groups of ours.
        ("packed.channel", ct.clone(), Format::Dense(Float::F32)),
        ("packed.zeros", ct.clone(), affine(4, 32, Float::F16)),
        ("int8.rows", ct.clone(), affine(8, 64, Float::BF16)),
        ("nvfp4", ct.clone(), Format::Nvfp4Scaled),
        ("mxfp4", ct, Format::Mxfp4),
        ("gpt_oss", json!({"quant_method": "mxfp4"}), Format::Mxfp4),
        ("awq.32", awq.clone(), affine(4, 32, Float::F16)),
        ("awq.64", awq.clone(), affine(4, 64, Float::F16)),
        ("awq.192", awq, affine(4, 64, Float::F16)),
        ("bitnet.divides", bitnet("bitlinear"), affine(2, 64, Float::F32)),
        ("bitnet.multiplies", bitnet("autobitlinear"), affine(2, 64, Float::F32)),
    ];
    for (name, config, format) in cases {
        let mut tensors = case(name);
        let (shape, want) = take(&mut tensors, "x.back");
        let pantry = pantry(&tensors, &config).unwrap();
        let weight = stored("x.weight");
        assert!(pantry.has("x.weight") && !pantry.has("y.weight"), "{name}");
        assert_eq!(pantry.shape(&weight).unwrap(), shape, "{name}");
        let matrix = pantry.matrix(&weight).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(matrix.format(), format, "{name}");
        for (i, (got, want)) in back(&matrix).iter().zip(&want).enumerate() {
            // A third has no end in binary: transformers divides each code by 3, we multiply by the inverse.
            let close = name == "bitnet.divides" && (got - want).abs() < 1e-7;
            assert!(got == want || close, "{name}: weight {i} is {got}, not {want}");
        }
        let mut used = pantry.uses(&weight);
        used.sort();
        let beside = ["x.x", "x.y"];
        let all: Vec<_> = pantry.checkpoint.names().filter(|n| !beside.contains(n)).collect();
        assert_eq!(used, all, "{name}: every tensor belongs to the weight");
    }
}

/// The same tensors under other names, `type` changed where it is given.
fn renamed(tensors: Vec<Tensor>, names: &[(&str, &str, Option<Dtype>)]) -> Vec<Tensor> {
    let rename = |t: Tensor| match names.iter().find(|(from, ..)| *from == t.name) {
        Some((_, to, dtype)) => Tensor { name: (*to).into(), dtype: dtype.unwrap_or(t.dtype), ..t },
        None => t,
    };
    tensors.into_iter().map(rename).collect()
}

#[test]
fn the_same_numbers_under_the_names_of_further_tools_are_the_same_weights() {
    let float = |name: &str, x: f32| Tensor {
        name: name.into(),
        dtype: Dtype::F32,
        shape: vec![],
        bytes: x.to_le_bytes().into(),
    };
    let deepseek = [("x.weight_scale_inv", "x.scale", None)];
    let deepseek_fp4 =
        [("x.weight_packed", "x.weight", Some(Dtype::I8)), ("x.weight_scale", "x.scale", Some(Dtype::F8_E8M0))];
    let modelopt = [("x.weight_packed", "x.weight", None), ("x.weight_global_scale", "x.unused", None)];
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    for (name, names, added, format) in [
        ("fp8.powers", &deepseek[..], None, Format::Mxfp8),
        ("mxfp4", &deepseek_fp4[..], None, Format::Mxfp4),
        ("nvfp4", &modelopt[..], Some(float("x.weight_scale_2", 1.0 / 512.0)), Format::Nvfp4Scaled),
    ] {
        let mut tensors = case(name);
        let (shape, want) = take(&mut tensors, "x.back");
        tensors = renamed(tensors, names);
        tensors.extend(added);
        let pantry = pantry(&tensors, &fp8).unwrap();
        assert_eq!(pantry.shape(&stored("x.weight")).unwrap(), shape, "{name}");
        let matrix = pantry.matrix(&stored("x.weight")).unwrap();
        assert_eq!((matrix.format(), back(&matrix)), (format, want), "{name}");
    }
}

#[test]
fn stacks_of_fp8_matrices_have_scales_of_blocks_or_one_each() {
    let mut tensors = case("fp8.blocks");
    let (_, want) = take(&mut tensors, "x.back");
    for t in &mut tensors {
        t.shape.insert(0, 2);
        t.bytes.extend_from_within(..);
        // Weights that are no linear layer's: their scales come after the whole name.
        t.name = t.name.replace("x.weight", "x.gate_up_proj");
    }
    let config = json!({"quant_method": "fp8", "weight_block_size": [16, 32]});
    let stack = stored("x.gate_up_proj");
    let blocks = pantry(&tensors, &config).unwrap();
    assert_eq!(blocks.shape(&stack).unwrap(), [2, 40, 100]);
    assert_eq!(back(&blocks.matrix(&stack).unwrap()), [want.clone(), want.clone()].concat());
    let plain = {
        let weight = tensors.iter().find(|t| t.dtype == Dtype::F8_E4M3).unwrap().clone();
        back(&pantry(&[weight], &Value::Null).unwrap().matrix(&stack).unwrap())
    };
    for shape in [vec![2], vec![2, 1, 1]] {
        let scales = tensors.iter_mut().find(|t| t.dtype == Dtype::F32).unwrap();
        (scales.shape, scales.bytes) = (shape, [0.5f32, 2.0].into_iter().flat_map(f32::to_le_bytes).collect());
        let got = back(&pantry(&tensors, &config).unwrap().matrix(&stack).unwrap());
        let one = |(i, w): (usize, &f32)| if i < 4000 { w * 0.5 } else { w * 2.0 };
        assert_eq!(got, plain.iter().enumerate().map(one).collect::<Vec<_>>());
    }
}

#[test]
fn bitnet_layers_round_their_inputs_as_transformers_does() {
    for device in [DeviceChoice::Cpu, DeviceChoice::CpuByCandle] {
        let place = Placement::new(device, DtypeChoice::Float32, candle_core::DType::F32).unwrap();
        for (name, class, mode) in [
            ("bitnet.divides", "bitlinear", "offline"),
            ("bitnet.multiplies", "autobitlinear", "offline"),
            ("bitnet.online", "autobitlinear", "online"),
        ] {
            let mut tensors = case(name);
            let ((_, back_want), (shape, x), (_, y)) =
                (take(&mut tensors, "x.back"), take(&mut tensors, "x.x"), take(&mut tensors, "x.y"));
            let config = json!({"quant_method": "bitnet", "linear_class": class, "quantization_mode": mode});
            let (matrix, rounded) = pantry(&tensors, &config).unwrap().linear(&stored("x.weight")).unwrap();
            assert!(rounded && matches!(matrix.format(), Format::Affine { bits: 2, .. }), "{name}: {matrix:?}");
            let worst = back(&matrix).iter().zip(&back_want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-7, "{name}: weights are off by {worst}");
            let weight = Weight::place(matrix, &place).unwrap().for_inputs_of_eight_bits();
            let x = candle_core::Tensor::from_vec(x, shape, &place.device).unwrap();
            let got: Vec<f32> = weight.matmul(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            for (token, (got, want)) in got.chunks(24).zip(y.chunks(24)).enumerate() {
                // Sums in another order; inputs that were not rounded would be off by a hundred times more.
                let peak = want.iter().fold(0f32, |peak, y| peak.max(y.abs()));
                let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 2e-6 * peak, "{name}: token {token} is off by {worst}, its largest output is {peak}");
            }
            let config = json!({"quant_method": "bitnet", "linear_class": class, "quantization_mode": mode,
                                "modules_to_not_convert": ["lm_head", "x"]});
            let (_, rounded) = pantry(&tensors, &config).unwrap().linear(&stored("x.weight")).unwrap();
            assert_eq!(rounded, mode == "offline", "{name}: what is stored in full and listed stays as it is");
        }
    }
}

fn numbers(n: usize) -> Vec<f32> {
    let mut seed = 7u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// One weight `x.weight` and what it stands for.
fn packed(packing: Packing, rows: usize, cols: usize) -> (Vec<Tensor>, Vec<f32>) {
    let packed = packing.pack(&numbers(rows * cols), cols);
    let named = |t: Tensor| Tensor { name: format!("x{}", t.name), ..t };
    (packed.tensors.into_iter().map(named).collect(), packed.back)
}

#[test]
fn gptq_of_every_kind_unpacks_to_what_was_packed_and_stays_packed() {
    for bits in [2, 3, 4, 8] {
        for (group, act_order, less_one) in
            [(32, false, true), (64, false, false), (96, true, false), (32, true, true), (192, true, true)]
        {
            let packing = Packing::Gptq { bits, group, act_order, less_one };
            let (tensors, want) = packed(packing, 24, 192);
            let matrix = pantry(&tensors, &packing.config()).unwrap().matrix(&stored("x.weight")).unwrap();
            let Format::Affine { bits: kept, scales, .. } = matrix.format() else { panic!("{packing:?}: {matrix:?}") };
            assert_eq!(kept as usize, bits, "{packing:?}");
            // Products with zero points of eight bits do not fit f16, those with two do.
            assert!(bits == 3 || bits == 4 || (scales == Float::F32) == (bits == 8), "{packing:?}: {scales:?}");
            assert_eq!(back(&matrix), want, "{packing:?}");
        }
    }
}

#[test]
fn groups_that_are_none_of_ours_are_unpacked_exactly() {
    for packing in [
        Packing::Gptq { bits: 4, group: 16, act_order: false, less_one: true },
        Packing::Gptq { bits: 4, group: 24, act_order: true, less_one: false },
        Packing::Awq { group: 16 },
        Packing::Ints { bits: 4, group: 48 },
        Packing::Ints { bits: 7, group: 32 },
    ] {
        let (tensors, want) = packed(packing, 16, 96);
        let matrix = pantry(&tensors, &packing.config()).unwrap().matrix(&stored("x.weight")).unwrap();
        assert_eq!(matrix.format(), Format::Dense(Float::F32), "{packing:?}");
        assert_eq!(back(&matrix), want, "{packing:?}");
    }
}

#[test]
fn rows_stacks_and_reshapes_of_packed_weights_stay_packed() {
    for packing in [
        Packing::Gptq { bits: 4, group: 32, act_order: true, less_one: true },
        Packing::Awq { group: 32 },
        Packing::Ints { bits: 4, group: 32 },
        Packing::Int8,
        Packing::Fp8 { block: [10, 40] },
        Packing::Nvfp4,
        Packing::Ternary { divides: false },
    ] {
        let (tensors, want) = packed(packing, 24, 96);
        let pantry = pantry(&tensors, &packing.config()).unwrap();
        let whole = Arc::new(stored("x.weight"));
        let format = pantry.matrix(&whole).unwrap().format();
        let rows = |from: usize, to: usize| Recipe::Rows(whole.clone(), from, to);
        for (recipe, expected) in [
            (rows(5, 13), want[5 * 96..13 * 96].to_vec()),
            (Recipe::Stack(vec![rows(1, 9).into(), rows(15, 23).into()]), [&want[96..864], &want[1440..2208]].concat()),
            (Recipe::Reshape(whole.clone(), vec![4, 6, 96]), want.clone()),
            (Recipe::Rows(Recipe::Reshape(whole.clone(), vec![4, 6, 96]).into(), 1, 3), want[576..1728].to_vec()),
        ] {
            let matrix = pantry.matrix(&recipe).unwrap();
            assert_eq!((matrix.format(), back(&matrix)), (format, expected), "{packing:?}: {recipe:?}");
        }
        let mixed = Recipe::Stack(vec![Recipe::Affine(whole.clone(), 1.0, 0.0).into(), whole.clone()]);
        assert_eq!(back(&pantry.matrix(&mixed).unwrap()), [want.clone(), want.clone()].concat(), "{packing:?}");
        let doubled = pantry.matrix(&Recipe::Affine(whole.clone(), 2.0, 1.0)).unwrap();
        assert_eq!(doubled.format(), Format::Dense(Float::F32), "{packing:?}: other transforms unpack");
        assert_eq!(back(&doubled), want.iter().map(|w| w * 2.0 + 1.0).collect::<Vec<_>>(), "{packing:?}");
    }
}

#[test]
fn plain_types_that_kernels_do_not_take_are_widened_or_refused() {
    let plain = |dtype, bytes: &[u8]| {
        let tensor = Tensor { name: "x.weight".into(), dtype, shape: vec![1, 2], bytes: bytes.into() };
        pantry(&[tensor], &Value::Null).unwrap().matrix(&stored("x.weight"))
    };
    let wide: Vec<u8> = [0.1f64, -3.0].into_iter().flat_map(f64::to_le_bytes).collect();
    assert_eq!(back(&plain(Dtype::F64, &wide).unwrap()), [0.1, -3.0]);
    // 1.5 * 2^0 and -2^-16, the smallest number.
    assert_eq!(back(&plain(Dtype::F8_E5M2, &[0x3e, 0x81]).unwrap()), [1.5, -(2f32.powi(-16))]);
    assert_eq!(back(&plain(Dtype::F8_E4M3, &[0x3c, 0x81]).unwrap()), [1.5, -(2f32.powi(-9))]);
    for (dtype, name) in [(Dtype::I8, "I8"), (Dtype::U8, "U8"), (Dtype::BOOL, "BOOL")] {
        let text = plain(dtype, &[1, 0]).unwrap_err().to_string();
        assert_eq!(text, format!("x.weight: {name} is not a type that a layer can compute with"));
    }
}
