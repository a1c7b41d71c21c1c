//! Structs that ops take by reference and that later versions extend at their ends. The layout check would call a longer struct another
//! type, so it sees only [`SpecRef`]: where the struct lies and how long it was when the caller was compiled. What the caller did not know
//! reads as 0, which every field must therefore take for "as before"; what the reader does not know must be 0, else the op is refused.

use super::Handle;
use abi_stable::StableAbi;
use std::{marker::PhantomData, mem::MaybeUninit};

/// A struct that grows at its end only.
///
/// # Safety
/// `repr(C)`, without padding, and of fields for which every bit pattern is a value.
pub unsafe trait Grows: Copy {}

/// A borrowed struct of some version.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct SpecRef<'a> {
    /// Its length in bytes, as the caller was compiled.
    size: u64,
    start: *const u8,
    _borrowed: PhantomData<&'a ()>,
}

impl<'a> SpecRef<'a> {
    /// Lends `spec` for one call.
    pub fn new<T: Grows>(spec: &'a T) -> Self {
        SpecRef { size: size_of::<T>() as u64, start: std::ptr::from_ref(spec).cast(), _borrowed: PhantomData }
    }

    /// From plain C, which says both itself.
    ///
    /// # Safety
    /// `size` bytes from `start` on stay readable for `'a`.
    pub(super) unsafe fn from_parts(size: u64, start: *const u8) -> Self {
        SpecRef { size, start, _borrowed: PhantomData }
    }

    /// The struct as this side knows it; `None` if the caller set something that this side has never heard of.
    pub fn read<T: Grows>(&self) -> Option<T> {
        // SAFETY: `new` takes these from a borrow that is still held, and `from_parts` makes its caller promise the same; without padding every byte is a number.
        let bytes = unsafe { std::slice::from_raw_parts(self.start, self.size as usize) };
        let known = bytes.len().min(size_of::<T>());
        if bytes[known..].iter().any(|&b| b != 0) {
            return None;
        }
        let mut spec = MaybeUninit::<T>::zeroed();
        // SAFETY: `known` bytes fit into both, and any bytes are a `T`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), spec.as_mut_ptr().cast::<u8>(), known);
            Some(spec.assume_init())
        }
    }
}

/// How `attend` scores and which keys it sees.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq)]
pub struct AttendSpec {
    /// 1 sees later tokens of the same step too (a bidirectional block); 0 is causal.
    pub flags: u32,
    /// Multiplies q·k.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)`; 0 for none.
    pub softcap: f32,
    /// 0.
    pub reserved: u32,
    /// Keys seen, counting the query's own; 0 for all.
    pub window: u64,
    /// One logit per query head that joins the softmax and is dropped; none if `Handle::NONE`.
    pub sinks: Handle,
    /// Positions `[tokens, count]` of the only keys that each query sees, as `index` gives them, or numbers `[tokens, groups, count]` of
    /// the only blocks that each group of heads sees, as `index_blocks` gives them; none if `Handle::NONE`.
    pub selection: Handle,
    /// Keys are seen from the last multiple of this on; 0 for no chunks.
    pub chunk: u64,
    /// Lanes at the start of each key that are its value, where `attend` is given no v; 0 otherwise.
    pub value_lanes: u64,
    /// Tokens of a block of block-sparse attention; 0 for dense attention.
    pub block: u64,
    /// Blocks seen, counting the query's own; the further ones only where `stride` hits.
    pub local_blocks: u64,
    /// Head h also sees block j where `(j + h + 1) mod stride == 0`.
    pub stride: u64,
    /// Tokens of a block that `selection` names; 0 where it names single keys.
    pub selection_block: u64,
    /// One number per query head, by which a score falls for each position between query and key; none if `Handle::NONE`.
    pub slopes: Handle,
    /// A cache of pooled keys that share the softmax, its number plus 1; 0 for none.
    pub pooled_cache: u64,
    /// Rows `[tokens, kv_heads, d]` that join it.
    pub pooled_keys: Handle,
    /// Their values `[tokens, kv_heads, e]`; `Handle::NONE` where a key's first `value_lanes` are its value.
    pub pooled_values: Handle,
    /// Positions `[tokens, count]` of the only pooled keys that each query sees; none if `Handle::NONE`.
    pub pooled_selection: Handle,
}

/// How `index_blocks` chooses.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq)]
pub struct BlockChoiceSpec {
    /// 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// Tokens of a block.
    pub block: u64,
    /// Blocks chosen.
    pub count: u64,
    /// Of these, the last so many, counting the query's own, whatever their scores.
    pub local: u64,
}

/// The shape of a block of routed experts.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// How gate and up are joined, one of the `EXPERTS_*` constants.
    pub activation: u32,
    /// Any of the `EXPERTS_WITH_*` constants.
    pub flags: u32,
    /// How many experts there are.
    pub experts: u64,
    /// Width of the model.
    pub dim: u64,
    /// Width inside an expert.
    pub hidden: u64,
    /// Choices from `experts` on, so many, give back their input.
    pub identity: u64,
    /// The number in `EXPERTS_CLAMPED_SWIGLU`, `EXPERTS_LIMITED_SWIGLU` and `EXPERTS_BOUNDED_SWIGLU`; 0 for none.
    pub limit: f32,
    /// The factor in `EXPERTS_CLAMPED_SWIGLU`.
    pub alpha: f32,
}

// SAFETY: `repr(C)`; four fields of 4 bytes, then fourteen of 8.
unsafe impl Grows for AttendSpec {}
// SAFETY: `repr(C)`; two fields of 4 bytes, then three of 8.
unsafe impl Grows for BlockChoiceSpec {}
// SAFETY: `repr(C)`; two fields of 4 bytes, four of 8, two of 4.
unsafe impl Grows for ExpertsSpec {}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Later {
        spec: ExpertsSpec,
        extra: u64,
    }

    // SAFETY: fields of 4 and 8 bytes at their natural places.
    unsafe impl Grows for Later {}

    const SPEC: ExpertsSpec =
        ExpertsSpec { activation: 1, flags: 0, experts: 8, dim: 64, hidden: 32, identity: 0, limit: 0.0, alpha: 0.0 };

    #[test]
    fn what_an_older_caller_did_not_know_reads_as_zero() {
        let read = SpecRef::new(&SPEC).read::<Later>().unwrap();
        assert_eq!((read.spec, read.extra), (SPEC, 0));
    }

    #[test]
    fn a_newer_caller_is_understood_unless_it_uses_what_is_new() {
        assert_eq!(SpecRef::new(&Later { spec: SPEC, extra: 0 }).read(), Some(SPEC));
        assert_eq!(SpecRef::new(&Later { spec: SPEC, extra: 7 }).read::<ExpertsSpec>(), None);
    }
}
