//! Rows of a product cut into tasks for the threads, the same way for every kind of product.

use rayon::prelude::*;
use std::ops::Range;

/// Products of numbers that are worth a task of their own.
const TASK: usize = 1 << 16;

/// Runs `task` for all of `rows`, some of them at a time: as many as are worth a thread's while at `products` each, a multiple of `step`,
/// about `most` at most. Each thread has a scratch of its own.
pub(super) fn in_tasks<S: Default>(
    rows: usize,
    products: usize,
    step: usize,
    most: usize,
    task: impl Fn(&mut S, Range<usize>) + Sync,
) {
    let threads = rayon::current_num_threads();
    let size = rows.div_ceil(threads * 4).max(TASK / products.max(1)).min(most).max(1).next_multiple_of(step);
    let tasks = rows.div_ceil(size);
    let one = |scratch: &mut S, i: usize| task(scratch, i * size..rows.min((i + 1) * size));
    // Entering the pool from outside wakes a thread and waits for it: tens of microseconds that a small product has not.
    let alone = if rayon::current_thread_index().is_some() { TASK } else { 4 * TASK };
    if tasks == 1 || rows * products <= alone {
        let mut scratch = S::default();
        (0..tasks).for_each(|i| one(&mut scratch, i));
    } else {
        (0..tasks).into_par_iter().for_each_init(S::default, one);
    }
}

/// Output that several threads write, each its own rows.
#[derive(Clone, Copy)]
pub(super) struct Output(pub(super) *mut f32);
// SAFETY: threads write disjoint elements: those of the rows of their task.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    pub(super) fn pointer(self) -> *mut f32 {
        self.0
    }
}
