//! `rows.cu` from Rust: small ops on rows that were written down one by one, such as a router's, as one launch.

use super::{
    program::{Arg, Shape, function},
    step::{address, device_of, unwritten},
};
use candle_core::{DType, Result, Tensor, TensorId, bail};

/// Numbers of a row at most.
pub const WIDEST: usize = 1024;
const SLOTS: usize = 16;
const STEPS: usize = 12;

/// What a step does with its input, as rows.cu numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOp {
    /// Over the row.
    Softmax = 0,
    /// Of each number.
    Sigmoid = 1,
    /// The largest, and where they are.
    TopK = 2,
    /// Numbers by index.
    Gather = 3,
    /// Of the row.
    Sum = 4,
    /// Times and plus a number.
    Affine = 5,
    /// With another row, or its only number.
    Add = 6,
    /// As above.
    Sub = 7,
    /// As above.
    Mul = 8,
    /// As above.
    Div = 9,
}

/// One op of a chain.
pub(super) struct Step {
    pub op: RowOp,
    pub a: Tensor,
    pub b: Option<Tensor>,
    pub y: Tensor,
    pub indices: Option<Tensor>,
    pub numbers: [f32; 2],
}

/// The steps, in order.
#[derive(Default)]
pub struct Chain {
    steps: Vec<Step>,
    rows: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SlotArgs {
    at: u64,
    width: u32,
    kind: u32,
    start: u32,
    given: u32,
    shared: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct StepArgs {
    op: u32,
    a: u32,
    b: u32,
    y: u32,
    indices: u32,
    k: u32,
    numbers: [f32; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Args {
    slots: [SlotArgs; SLOTS],
    steps: [StepArgs; STEPS],
    slot_count: u32,
    step_count: u32,
}

fn kind(dtype: DType) -> Option<u32> {
    match dtype {
        DType::F32 => Some(0),
        DType::BF16 => Some(1),
        DType::U32 => Some(2),
        _ => None,
    }
}

/// Whether a row op can take it: `[rows, width]`, or `[width]` for all rows.
pub fn fits(t: &Tensor, rows: usize) -> bool {
    let shaped = match *t.dims() {
        [n, width] => n == rows && width <= WIDEST,
        [width] => width <= WIDEST,
        _ => false,
    };
    shaped && t.elem_count() > 0 && t.is_contiguous() && kind(t.dtype()).is_some()
}

impl Chain {
    /// Whether some step writes it.
    pub fn writes(&self, id: TensorId) -> bool {
        self.steps.iter().any(|s| s.y.id() == id || s.indices.as_ref().is_some_and(|i| i.id() == id))
    }

    /// In order.
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether one more step of so many rows has room.
    pub fn has_room(&self, rows: usize) -> bool {
        self.steps.is_empty() || (self.rows == rows && self.steps.len() + 1 < STEPS && self.slots().len() + 4 <= SLOTS)
    }

    fn slots(&self) -> Vec<(TensorId, bool)> {
        let mut slots: Vec<(TensorId, bool)> = Vec::new();
        for step in &self.steps {
            for input in [Some(&step.a), step.b.as_ref()].into_iter().flatten() {
                if !slots.iter().any(|(id, _)| *id == input.id()) {
                    slots.push((input.id(), true));
                }
            }
            slots.extend([Some(&step.y), step.indices.as_ref()].into_iter().flatten().map(|t| (t.id(), false)));
        }
        slots
    }

    /// One more step: what it will have written, rows as wide as `width` in `dtype`, and indices for a choice of the largest.
    pub fn push(
        &mut self,
        op: RowOp,
        a: &Tensor,
        b: Option<&Tensor>,
        (rows, width, dtype): (usize, usize, DType),
        numbers: [f32; 2],
    ) -> Result<(Tensor, Option<Tensor>)> {
        let device = device_of(a)?;
        let y = unwritten(&[rows, width], dtype, device)?;
        let indices = match op {
            RowOp::TopK => Some(unwritten(&[rows, width], DType::U32, device)?),
            _ => None,
        };
        self.rows = rows;
        self.steps.push(Step { op, a: a.clone(), b: b.cloned(), y: y.clone(), indices: indices.clone(), numbers });
        Ok((y, indices))
    }

    /// Starts all steps.
    pub fn run(self) -> Result<()> {
        let Some(first) = self.steps.first() else { return Ok(()) };
        let (slots, mut args, mut start) = (self.slots(), Args::default(), 0);
        if slots.len() > SLOTS || self.steps.len() > STEPS {
            bail!("{} row ops with {} rows in one launch", self.steps.len(), slots.len())
        }
        let place = |t: &Tensor| slots.iter().position(|(id, _)| *id == t.id()).unwrap_or_default();
        for (step, to) in self.steps.iter().zip(&mut args.steps) {
            let b = step.b.as_ref().unwrap_or(&step.a);
            let width = step.y.dims().last().copied().unwrap_or_default();
            let [a, b, y, indices] = [&step.a, b, &step.y, step.indices.as_ref().unwrap_or(&step.y)].map(place);
            let [a, b, y, indices] = [a, b, y, indices].map(|n| n as u32);
            *to = StepArgs { op: step.op as u32, a, b, y, indices, k: width as u32, numbers: step.numbers };
        }
        let tensors = self.steps.iter().flat_map(|s| [Some(&s.a), s.b.as_ref(), Some(&s.y), s.indices.as_ref()]);
        for t in tensors.flatten() {
            let (at, width) = (place(t), t.dims().last().copied().unwrap_or_default());
            if args.slots[at].width != 0 {
                continue;
            }
            let given = u32::from(slots[at].1);
            let shared = u32::from(t.rank() == 1);
            let kind = kind(t.dtype()).unwrap_or_default();
            args.slots[at] = SlotArgs { at: address(t)?, width: width as u32, kind, start, given, shared, unused: 0 };
            start += width as u32;
        }
        (args.slot_count, args.step_count) = (slots.len() as u32, self.steps.len() as u32);
        let shape = Shape { grid: [self.rows as u32, 1, 1], block: 32, shared: 4 * start, early: true };
        let device = device_of(&first.a)?;
        // SAFETY: as rows.cu says; every slot has a row of its width for each row, or one for all.
        unsafe { function(device, "rows", "rows")?.launch(device, shape, &[Arg::of(&args)]) }
    }
}
