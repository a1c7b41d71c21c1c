//! Room for what a kernel writes. Zeros put there beforehand, by one thread while the others wait, take up to a tenth of a prompt's time.

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
