//! The unit's eight tiles, used in one way: two tiles of A and two of B, and the four sums of their products. A tile of A is up to sixteen
//! rows of up to 64 bytes; one of B holds what meets each four bytes of such a row, up to sixteen times, as one of its own rows.
//!
//! Registers keep their contents from one call to the next: compilers use them only where they are told to, and nobody tells them.

use std::arch::asm;

/// Rows of a tile, and 32-bit numbers of a row.
pub(in crate::kernels::cpu) const TILE: usize = 16;

/// How large the tiles are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels::cpu) struct Shape {
    /// Rows of the tiles of A, and so of the sums.
    pub(in crate::kernels::cpu) a: [usize; 2],
    /// 32-bit columns of the tiles of B, and so of the sums.
    pub(in crate::kernels::cpu) b: [usize; 2],
    /// Bytes of a row of A, which are the rows of B four times.
    pub(in crate::kernels::cpu) depth: usize,
}

/// Where tiles of A and B lie, and how many bytes it is from one row to the next.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels::cpu) struct Operands {
    pub(in crate::kernels::cpu) a: [*const u8; 2],
    pub(in crate::kernels::cpu) a_pitch: usize,
    /// From one step to the next.
    pub(in crate::kernels::cpu) a_step: usize,
    pub(in crate::kernels::cpu) b: [*const u8; 2],
    pub(in crate::kernels::cpu) b_pitch: [usize; 2],
}

/// What the system takes as the sizes of tiles.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles, while it holds them.
pub(in crate::kernels::cpu) struct Tiles {
    shape: Shape,
    /// Of this thread alone.
    _here: std::marker::PhantomData<*const u8>,
}

impl Tiles {
    /// Takes this thread's tiles, of this shape.
    ///
    /// # Safety
    /// [`super::available`], and nothing else on this thread has them.
    pub(in crate::kernels::cpu) unsafe fn new(shape: Shape) -> Self {
        let tiles = Self { shape, _here: std::marker::PhantomData };
        // SAFETY: passed on to the caller.
        unsafe { tiles.configure() };
        tiles
    }

    /// Changes the shape; what the tiles hold is lost if it is another one.
    #[inline]
    pub(in crate::kernels::cpu) fn reshape(&mut self, shape: Shape) {
        if self.shape != shape {
            self.shape = shape;
            // SAFETY: whoever has `Tiles` has the unit.
            unsafe { self.configure() };
        }
    }

    unsafe fn configure(&self) {
        let Shape { a, b, depth } = self.shape;
        debug_assert!([a, b].as_flattened().iter().all(|n| (1..=TILE).contains(n)) && (4..=64).contains(&depth));
        let (mut rows, mut row_bytes) = ([0; 16], [0; 16]);
        for i in 0..2 {
            for j in 0..2 {
                (rows[2 * i + j], row_bytes[2 * i + j]) = (a[i] as u8, 4 * b[j] as u16);
            }
            (rows[4 + i], row_bytes[4 + i]) = (a[i] as u8, depth as u16);
            (rows[6 + i], row_bytes[6 + i]) = ((depth / 4) as u8, 4 * b[i] as u16);
        }
        let all = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: 64 bytes of what the processor expects.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, readonly)) };
    }

    /// Begins new sums.
    #[inline(always)]
    pub(in crate::kernels::cpu) fn zero(&self) {
        // SAFETY: whoever has `Tiles` has the unit.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem),
            );
        }
    }

    /// Sums + products of pairs of bfloat16, of as many steps as wanted, each one step of A and sixteen rows of B further on.
    ///
    /// # Safety
    /// The operands have so many steps of the shape.
    #[inline(always)]
    pub(in crate::kernels::cpu) unsafe fn halves(&self, from: Operands, steps: usize) {
        if steps == 0 {
            return;
        }
        // SAFETY: the caller vouches for the operands; whoever has `Tiles` has the unit.
        unsafe {
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {ap}]",
                "tileloadd tmm6, [{b0} + {bp0}]",
                "tileloadd tmm5, [{a1} + {ap}]",
                "tileloadd tmm7, [{b1} + {bp1}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, {bs0}",
                "add {b1}, {bs1}",
                "dec {steps}",
                "jnz 2b",
                a0 = inout(reg) from.a[0] => _,
                a1 = inout(reg) from.a[1] => _,
                ap = in(reg) from.a_pitch,
                step = in(reg) from.a_step,
                b0 = inout(reg) from.b[0] => _,
                b1 = inout(reg) from.b[1] => _,
                bp0 = in(reg) from.b_pitch[0],
                bp1 = in(reg) from.b_pitch[1],
                bs0 = in(reg) TILE * from.b_pitch[0],
                bs1 = in(reg) TILE * from.b_pitch[1],
                steps = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        }
    }

    /// Takes up sums that were [stored](Self::store).
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    pub(in crate::kernels::cpu) unsafe fn load(&self, from: *const [[u32; TILE]; 4 * TILE]) {
        // SAFETY: the caller vouches.
        unsafe {
            asm!(
                "tileloadd tmm0, [{from} + {pitch}]",
                "tileloadd tmm1, [{from} + {pitch} + 1024]",
                "tileloadd tmm2, [{from} + {pitch} + 2048]",
                "tileloadd tmm3, [{from} + {pitch} + 3072]",
                from = in(reg) from,
                pitch = in(reg) 4 * TILE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, readonly),
            );
        }
    }

    /// The sums of A's first tile with both of B's, then those of its second, sixteen rows each.
    ///
    /// # Safety
    /// There is room.
    #[inline(always)]
    pub(in crate::kernels::cpu) unsafe fn store(&self, to: *mut [[u32; TILE]; 4 * TILE]) {
        // SAFETY: the caller vouches.
        unsafe {
            asm!(
                "tilestored [{to} + {pitch}], tmm0",
                "tilestored [{to} + {pitch} + 1024], tmm1",
                "tilestored [{to} + {pitch} + 2048], tmm2",
                "tilestored [{to} + {pitch} + 3072], tmm3",
                to = in(reg) to,
                pitch = in(reg) 4 * TILE,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever has `Tiles` has the unit.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
