//! Every Metal kernel on random numbers of odd shapes, against sums in f64 or the CPU's recurrences. On macOS the GPU runs them; elsewhere
//! a C++ compiler makes programs of the same text, which play them (`tests::metal_stage`).

mod attention;
mod matmul;
mod recurrence;
mod rows;

use candle_core::{DType, Device, Tensor};
use dylm::{
    device::{DeviceChoice, DtypeChoice, Placement},
    kernels::metal::{device, launch::Launch},
};
use tests::metal_stage;

/// Where the kernels run; none if they cannot, which was said.
fn stage() -> Option<Device> {
    let choice = metal_stage::device()?;
    if choice == DeviceChoice::CpuByCandle {
        let _ = device::PLAYER.set(metal_stage::play);
    }
    Some(Placement::new(choice, DtypeChoice::Float32, DType::F32).unwrap().device)
}

/// Numbers that look random, between -1 and 1.
struct Dice(u64);

impl Dice {
    fn bits(&mut self) -> u64 {
        // SplitMix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.bits() as u8).collect()
    }

    /// The numbers as they are in `dtype`, and the tensor of them.
    fn tensor(&mut self, dims: &[usize], dtype: DType) -> (Vec<f32>, Tensor) {
        let numbers = self.numbers(dims.iter().product());
        let tensor = tensor(&numbers, dims).to_dtype(dtype).unwrap();
        (floats(&tensor), tensor)
    }
}

fn tensor(numbers: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(numbers, dims, &Device::Cpu).unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// What a number may be off: by its type's rounding, and by f32's over so many additions of numbers around 1.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
        _ => 1e-6,
    }
}

/// A launch with what should come out.
struct Case {
    what: String,
    launch: Launch,
    inputs: Vec<Tensor>,
    /// Of each output its numbers, and how large the terms are that they are sums of.
    expected: Vec<(Vec<f64>, f64)>,
}

impl Case {
    fn new(
        what: impl Into<String>,
        launch: Option<Launch>,
        inputs: &[&Tensor],
        expected: Vec<(Vec<f64>, f64)>,
    ) -> Case {
        let what = what.into();
        let Some(launch) = launch else { panic!("{what}: there is no kernel for it") };
        assert_eq!(launch.outputs.len(), expected.len(), "{what}");
        Case { what, launch, inputs: inputs.iter().map(|&t| t.clone()).collect(), expected }
    }

    fn check(&self, device: &Device) {
        let inputs: Vec<Tensor> = self.inputs.iter().map(|t| t.to_device(device).unwrap()).collect();
        let outputs = device::run(&self.launch, &inputs.iter().collect::<Vec<_>>());
        let outputs = outputs.unwrap_or_else(|e| panic!("{}: {e}", self.what));
        assert_eq!(outputs.len(), self.expected.len(), "{}", self.what);
        for ((output, (expected, terms)), (dims, dtype)) in outputs.iter().zip(&self.expected).zip(&self.launch.outputs)
        {
            assert_eq!((output.dims(), output.dtype()), (dims.as_slice(), *dtype), "{}", self.what);
            let found = floats(output);
            assert_eq!(found.len(), expected.len(), "{}", self.what);
            for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
                // The type's own rounding, and f32's in the sum.
                let off = rounding(*dtype) * expected.abs() + 4e-6 * terms;
                let near = (f64::from(found) - expected).abs() <= off;
                assert!(near, "{}: number {i} of {dims:?} is {found}, not {expected}", self.what);
            }
        }
    }
}

/// Plays all cases, where kernels can be played.
fn check(cases: impl FnOnce() -> Vec<Case>) {
    let Some(device) = stage() else { return };
    let cases = cases();
    if device.is_cpu() {
        metal_stage::learn(cases.iter().map(|case| &case.launch.kernel));
    }
    assert!(!cases.is_empty());
    cases.iter().for_each(|case| case.check(&device));
}
