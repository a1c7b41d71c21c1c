//! Ops that plugins bring along, as the extension `op/1` hands them over: kept with the model, run where it runs. A GPU for which there
//! is a kernel runs that; otherwise inputs come to the CPU and the result goes back, which is right but slow.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(feature = "cuda", feature = "metal", target_os = "macos"))]
mod gpu;
#[cfg(any(feature = "metal", target_os = "macos"))]
mod metal;

use super::{
    call::{build, run, with_running},
    noting::Argument,
    running::Running,
    value::{Fault, Outcome, Value, fault},
};
use crate::{
    layers::slices::{filled, with_each_f32},
    weights::plan::Wanted,
};
use abi_stable::std_types::{RSlice, RStr};
use candle_core::{DType, Device, Tensor};
use plugin_api::abi::{
    At, Ctx, Handle, Slot,
    extension::Table,
    own_op::{Complaint, Definition, OwnOps, RawLaunch, RawView, Shape, VIEW_F32},
};
use std::{fmt, sync::Arc};

/// What this host answers to `op/1`.
pub static OWN_OPS: Table<OwnOps> = Table::new(OwnOps { register, apply });

/// More numbers than an output has; a shape function that multiplied wrongly is not to end in an allocation that fails.
const MOST_NUMBERS: usize = 1 << 31;

/// A plugin's op. Ends in the plugin when the model does.
pub struct OwnOp {
    /// What the plugin calls it.
    pub name: String,
    /// What it brings for GPUs.
    pub kernels: Vec<Kernel>,
    definition: Definition<'static>,
}

/// A kernel's source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// One of `plugin_api`'s `KERNEL_*`.
    pub device: u32,
    /// The whole text.
    pub source: String,
    /// The function in it.
    pub entry: String,
}

// SAFETY: `op/1` demands functions that may be called from any thread, several at once.
unsafe impl Send for OwnOp {}
// SAFETY: as above.
unsafe impl Sync for OwnOp {}

/// What the plugin asked for; where the op lies in memory is another matter for each model.
impl fmt::Debug for OwnOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnOp").field("name", &self.name).field("kernels", &self.kernels).finish_non_exhaustive()
    }
}

impl Drop for OwnOp {
    fn drop(&mut self) {
        (self.definition.drop)(self.definition.data);
    }
}

/// Asks the plugin something that it may fail at, with a complaint.
fn ask(f: impl FnOnce(&Complaint) -> u32) -> Outcome<()> {
    extern "C" fn say(data: *mut (), text: RStr<'_>) {
        // SAFETY: the `said` below, which nobody else touches while the plugin runs.
        unsafe { *data.cast::<String>() = text.as_str().to_owned() };
    }
    let mut said = String::new();
    let complaint = Complaint { data: (&raw mut said).cast(), say };
    match f(&complaint) {
        1 => Ok(()),
        _ if said.is_empty() => Err(fault!("the plugin failed and does not say why")),
        _ => Err(Fault::New(said)),
    }
}

/// Shapes as they cross, for one call.
fn with_shapes<R>(shapes: &[Vec<u64>], f: impl FnOnce(RSlice<'_, RSlice<'_, u64>>) -> R) -> R {
    let slices: Vec<RSlice<'_, u64>> = shapes.iter().map(|dims| RSlice::from_slice(dims)).collect();
    f(RSlice::from_slice(&slices))
}

impl OwnOp {
    /// Takes over what a plugin registers.
    fn take(name: &str, definition: &Definition<'_>) -> Self {
        let kernel = |k: &plugin_api::abi::own_op::KernelSource<'_>| Kernel {
            device: k.device,
            source: k.source.as_str().to_owned(),
            entry: k.entry.as_str().to_owned(),
        };
        let Definition { size, data, shape, cpu, launch, drop, ref kernels } = *definition;
        let kernels = kernels.iter().map(kernel).collect();
        let definition = Definition { size, data, shape, cpu, launch, drop, kernels: RSlice::from_slice(&[]) };
        OwnOp { name: name.to_owned(), kernels, definition }
    }

    /// The output's shape for these inputs.
    pub fn shape(&self, inputs: &[Vec<u64>]) -> Outcome<Vec<usize>> {
        let (d, mut shape) = (&self.definition, Shape::default());
        ask(|complaint| with_shapes(inputs, |inputs| (d.shape)(d.data, inputs, &mut shape, complaint)))?;
        let dims = shape.dims.get(..shape.rank as usize).unwrap_or_default();
        let dims: Vec<usize> = dims.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        let numbers = dims.iter().fold(1, |n: usize, &d| n.saturating_mul(d));
        if dims.is_empty() || numbers > MOST_NUMBERS {
            return Err(fault!("its output would be {dims:?}; 1 to 8 axes and 2^31 numbers are possible"));
        }
        Ok(dims)
    }

    /// How the plugin wants a kernel for `device` started.
    pub fn launch(&self, device: u32, inputs: &[Vec<u64>], output: &[u64]) -> Outcome<RawLaunch> {
        let (d, mut launch, output) = (&self.definition, RawLaunch::default(), RSlice::from_slice(output));
        ask(|complaint| {
            with_shapes(inputs, |inputs| (d.launch)(d.data, device, inputs, output, &mut launch, complaint))
        })?;
        match launch.count as usize <= launch.numbers.len() {
            true => Ok(launch),
            false => Err(fault!("{} numbers for a kernel; {} are possible", launch.count, launch.numbers.len())),
        }
    }

    /// The numbers of an output of shape `output`, on the CPU: `inputs` are f32 and lie there.
    fn cpu(&self, inputs: &[Tensor], shapes: &[Vec<u64>], output: &[usize]) -> Outcome<Tensor> {
        let d = &self.definition;
        let strides = |dims: &[u64]| {
            let mut strides = vec![1; dims.len()];
            (1..dims.len()).rev().for_each(|i| strides[i - 1] = strides[i] * dims[i]);
            strides
        };
        let view = |dims: &[u64], strides: &[u64], start: *mut f32, len: usize| RawView {
            dtype: VIEW_F32,
            rank: dims.len() as u32,
            dims: dims.as_ptr(),
            strides: strides.as_ptr(),
            start: start.cast(),
            len: len as u64,
        };
        let input_strides: Vec<Vec<u64>> = shapes.iter().map(|dims| strides(dims)).collect();
        let dims: Vec<u64> = output.iter().map(|&d| d as u64).collect();
        let output_strides = strides(&dims);
        let mut done = Ok(());
        let result = with_each_f32(inputs, |slices| {
            let inputs = slices.iter().zip(shapes.iter().zip(&input_strides));
            let inputs: Vec<RawView> =
                inputs.map(|(s, (dims, strides))| view(dims, strides, s.as_ptr().cast_mut(), s.len())).collect();
            filled(output, |out| {
                let out = view(&dims, &output_strides, out.as_mut_ptr(), out.len());
                done = ask(|complaint| (d.cpu)(d.data, RSlice::from_slice(&inputs), &out, complaint));
            })
        })??;
        done.map(|()| result)
    }
}

impl Running<'_> {
    fn own_op(&mut self, slot: Slot, inputs: &[Handle]) -> Outcome {
        let Some(Wanted::Own(op)) = self.wanted.get(slot.0 as usize) else {
            return Err(fault!("an op that this model does not have"));
        };
        let values = inputs.iter().map(|&x| self.arena.get(x)).collect::<Outcome<Vec<_>>>()?;
        let shape = |v: &Value| Ok(v.dims()?.iter().map(|&d| d as u64).collect());
        let shapes = values.iter().map(shape).collect::<Outcome<Vec<Vec<u64>>>>()?;
        let output = op.shape(&shapes)?;
        let real = values.iter().map(|v| if let Value::Real(t) = v { Some(t) } else { None });
        let Some(tensors) = real.collect::<Option<Vec<&Tensor>>>() else { return Ok(Value::planned(&output)) };
        #[cfg(any(feature = "cuda", feature = "metal", target_os = "macos"))]
        if let Some(numbers) = op.on_gpu(&tensors, &shapes, &output, self.place)? {
            return Ok(Value::Real(numbers));
        }
        let here = |t: &&Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
        let here = tensors.iter().map(here).collect::<candle_core::Result<Vec<_>>>()?;
        let result = op.cpu(&here, &shapes, &output)?;
        Ok(Value::Real(result.to_dtype(self.place.activations())?.to_device(&self.place.device)?))
    }
}

extern "C" fn register(ctx: Ctx, name: RStr<'_>, definition: &Definition<'_>, at: At) -> Slot {
    if definition.size != size_of::<Definition<'_>>() as u64 {
        // Of another layout, so not even its `drop` can be found.
        let text = format!("op {name}: the plugin describes it in a form that this dylm does not know; update dylm");
        return build(ctx, "op", Slot(u32::MAX), at, |b| {
            b.complain(text);
            Slot(u32::MAX)
        });
    }
    let op = Arc::new(OwnOp::take(&name, definition));
    build(ctx, "op", Slot(u32::MAX), at, |b| b.slot(Wanted::Own(op)))
}

extern "C" fn apply(ctx: Ctx, slot: Slot, inputs: RSlice<'_, Handle>, at: At) -> Handle {
    let name = with_running(ctx, "op", at, |running| running.name(slot));
    name.map_or(Handle::NONE, |name| {
        run(
            ctx,
            &format!("op {name}"),
            None,
            at,
            |said| inputs.say(said),
            |running| running.own_op(slot, inputs.as_slice()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use plugin_api::abi::own_op::{KERNEL_CUDA, KERNEL_METAL, KernelSource};
    use std::sync::atomic::{AtomicUsize, Ordering};

    extern "C" fn silent(_: *const (), _: RSlice<'_, RSlice<'_, u64>>, _: &mut Shape, _: &Complaint) -> u32 {
        0
    }

    extern "C" fn no_numbers(_: *const (), _: RSlice<'_, RawView>, _: &RawView, _: &Complaint) -> u32 {
        0
    }

    extern "C" fn endless(
        _: *const (),
        _: u32,
        _: RSlice<'_, RSlice<'_, u64>>,
        _: RSlice<'_, u64>,
        launch: &mut RawLaunch,
        _: &Complaint,
    ) -> u32 {
        launch.count = 17;
        1
    }

    extern "C" fn count_drops(data: *const ()) {
        // SAFETY: the counter below, which outlives the op.
        unsafe { &*data.cast::<AtomicUsize>() }.fetch_add(1, Ordering::SeqCst);
    }

    fn op(drops: &AtomicUsize, kernels: &[KernelSource<'_>]) -> OwnOp {
        let definition = Definition {
            size: size_of::<Definition<'_>>() as u64,
            data: std::ptr::from_ref(drops).cast(),
            shape: silent,
            cpu: no_numbers,
            launch: endless,
            kernels: RSlice::from_slice(kernels),
            drop: count_drops,
        };
        OwnOp::take("twice", &definition)
    }

    #[test]
    fn sources_of_kernels_stay_with_the_op_and_the_op_ends_once() {
        let (drops, source) = (AtomicUsize::new(0), String::from("x + x"));
        let kernels = [KERNEL_CUDA, KERNEL_METAL].map(|device| KernelSource {
            device,
            reserved: 0,
            source: source.as_str().into(),
            entry: "twice".into(),
        });
        let op = op(&drops, &kernels);
        drop(source);
        let kept = |device| Kernel { device, source: "x + x".into(), entry: "twice".into() };
        assert_eq!(op.kernels, [kept(KERNEL_CUDA), kept(KERNEL_METAL)]);
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        drop(op);
        assert_eq!(drops.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_op_that_fails_without_a_word_or_says_too_much_is_refused() {
        let drops = AtomicUsize::new(0);
        let op = op(&drops, &[]);
        let text = |outcome: Outcome<()>| format!("{:?}", outcome.unwrap_err());
        assert!(text(op.shape(&[vec![2]]).map(drop)).contains("does not say why"));
        assert!(text(op.cpu(&[], &[], &[2]).map(drop)).contains("does not say why"));
        assert!(text(op.launch(KERNEL_CUDA, &[], &[2]).map(drop)).contains("17 numbers for a kernel; 16 are possible"));
    }
}
