//! Rows of a product cut into tasks for the threads, the same way for every kind of product.

use super::team::{each_with, threads};
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
    let size = rows.div_ceil(threads() * 4).max(TASK / products.max(1)).min(most).max(1).next_multiple_of(step);
    let tasks = rows.div_ceil(size);
    each_with(tasks, |scratch: &mut S, i| task(scratch, i * size..rows.min((i + 1) * size)));
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
