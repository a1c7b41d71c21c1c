//! Tensors that a recorded step writes and forgets, kept between its runs: a step asks for the same ones in the same order each time. In a
//! graph, memory that is allocated and freed is two more nodes a kernel, and no kernel starts early across them.

use candle_core::{CudaDevice, DType, Result, Tensor};
use std::cell::RefCell;

struct Kept {
    /// Flat, in the order in which they are asked for.
    tensors: Vec<Tensor>,
    next: usize,
    /// Whether what is missing may be added.
    fills: bool,
}

thread_local! {
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

/// Runs a step on this thread with `tensors` for all that it writes; those that are missing are added, unless it is being recorded, when
/// nothing may be allocated for good.
pub fn keeping<T>(tensors: &mut Vec<Tensor>, recorded: bool, step: impl FnOnce() -> T) -> T {
    struct Back<'a>(&'a mut Vec<Tensor>);
    impl Drop for Back<'_> {
        fn drop(&mut self) {
            if let Some(kept) = KEPT.take() {
                *self.0 = kept.tensors;
            }
        }
    }
    let kept = Kept { tensors: std::mem::take(tensors), next: 0, fills: !recorded };
    KEPT.set(Some(kept));
    let _back = Back(tensors);
    step()
}

/// The next of the kept tensors, as `dims`; none where none are kept, or another one was asked for in its place.
pub fn next(
    dims: &[usize],
    dtype: DType,
    device: &CudaDevice,
    allocate: impl FnOnce(&[usize], DType, &CudaDevice) -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    KEPT.with_borrow_mut(|kept| {
        let Some(kept) = kept else { return Ok(None) };
        let (at, count) = (kept.next, dims.iter().product());
        kept.next += 1;
        let fits = |t: &Tensor| t.dtype() == dtype && t.elem_count() == count;
        if !kept.tensors.get(at).is_some_and(fits) {
            if !kept.fills || count == 0 {
                return Ok(None);
            }
            let fresh = allocate(&[1, count], dtype, device)?;
            match kept.tensors.get_mut(at) {
                Some(other) => *other = fresh,
                None => kept.tensors.push(fresh),
            }
        }
        // With an id of its own: by their ids, tensors of different steps are told apart.
        kept.tensors.get(at).map(|t| t.unsqueeze(0)?.reshape(dims)).transpose()
    })
}
