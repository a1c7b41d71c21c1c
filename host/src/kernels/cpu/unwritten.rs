//! Room for what a kernel writes. Zeros put there beforehand, by one thread while the others wait, take up to a tenth of a prompt's time.

use super::team::each_chunk;

/// Numbers that are worth a task of their own to be cleared.
const TASK: usize = 1 << 16;

/// What any bits are.
pub(super) trait Plain: Copy {}
impl Plain for i8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

/// `count` numbers.
///
/// # Safety
/// All of them are written before one is read.
// Kernels write into slices of numbers, which clippy fears for before they are.
#[allow(clippy::uninit_vec)]
pub(super) unsafe fn unwritten<T: Plain>(count: usize) -> Vec<T> {
    let mut room = Vec::with_capacity(count);
    // SAFETY: there is room for them; the caller vouches that they are written first, and nothing of them is to be dropped.
    unsafe { room.set_len(count) };
    room
}

/// `count` zeros, put there by all threads where there are many.
pub fn zeros(count: usize) -> Vec<f32> {
    if count <= TASK {
        return vec![0.0; count];
    }
    // SAFETY: all of them are written at once.
    let mut numbers = unsafe { unwritten::<f32>(count) };
    each_chunk(&mut numbers, TASK, |_, numbers| numbers.fill(0.0));
    numbers
}
