//! Rows of a product cut into tasks for the threads, the same way for every kind of product.

use super::team::{each_in_runs, each_with, threads};
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

/// The same for rows that come from memory and are read once: threads read neighbours, in tasks that are short enough to be helped with.
pub(super) fn in_streams<S: Default>(
    rows: usize,
    products: usize,
    step: usize,
    task: impl Fn(&mut S, Range<usize>) + Sync,
) {
    let size = rows.div_ceil(threads() * 8).max(TASK / 2 / products.max(1)).max(1).next_multiple_of(step);
    each_in_runs(rows.div_ceil(size), |scratch: &mut S, i| task(scratch, i * size..rows.min((i + 1) * size)));
}

/// Gives `f` the part of `range` that falls on each of several lists, which lie one behind the other: which list, and which of its rows.
pub(super) fn by_list(
    range: Range<usize>,
    lengths: impl Iterator<Item = usize>,
    mut f: impl FnMut(usize, Range<usize>),
) {
    let mut start = 0;
    for (list, length) in lengths.enumerate() {
        let part = range.start.max(start)..range.end.min(start + length);
        if part.start < part.end {
            f(list, part.start - start..part.end - start);
        }
        start += length;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_over_several_lists_falls_apart_where_they_meet() {
        let parts = |range| {
            let mut parts = Vec::new();
            by_list(range, [3, 0, 5, 2].into_iter(), |list, rows| parts.push((list, rows)));
            parts
        };
        assert_eq!(parts(0..10), [(0, 0..3), (2, 0..5), (3, 0..2)]);
        assert_eq!(parts(2..4), [(0, 2..3), (2, 0..1)]);
        assert_eq!(parts(4..8), [(2, 1..5)]);
        assert_eq!(parts(9..9), []);
    }
}
