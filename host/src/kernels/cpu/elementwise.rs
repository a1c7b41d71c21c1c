//! Gated activations, softmax and argmax over plain f32.

use super::lanes::{Isa, Job, Lanes, dispatch, exp};
use super::team::each_chunk;

/// Numbers worth a task of their own.
const TASK: usize = 1 << 14;

/// out = silu(gate) * up, silu x = x / (1 + e^-x).
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated::<Silu>(gate, up, out);
}

/// out = gelu(gate) * up, with the tanh approximation of gelu (Hendrycks and Gimpel 2016).
///
/// # Panics
/// If the lengths differ.
pub fn gelu_tanh_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated::<GeluTanh>(gate, up, out);
}

/// Softmax of each row of `cols`, in place. A row of nothing but -inf becomes zeros.
///
/// # Panics
/// If `x` is not whole rows.
pub fn softmax_rows(x: &mut [f32], cols: usize) {
    assert!(cols > 0 && x.len().is_multiple_of(cols), "softmax: {} numbers in rows of {cols}", x.len());
    let isa = Isa::best();
    // SAFETY: `isa` is available; the job stays inside its slice.
    let one = |row: &mut [f32]| unsafe { dispatch(isa, Softmax(row)) };
    let rows = (TASK / cols).max(1);
    each_chunk(x, rows * cols, |_, x| x.chunks_exact_mut(cols).for_each(one));
}

/// Calls `f` with pieces of `out` and where they begin, multiples of `step` numbers, with all threads.
pub fn in_pieces(out: &mut [f32], step: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let size = TASK.div_ceil(step.max(1)) * step.max(1);
    each_chunk(out, size, |i, out| f(i * size, out));
}

/// Index of the largest number, the first one of equals; numbers that are not comparable (NaN) never win. 0 for no numbers.
pub fn argmax(x: &[f32]) -> usize {
    // SAFETY: the instruction set is available; the job stays inside its slice.
    let peak = unsafe { dispatch(Isa::best(), Peak(x)) };
    x.iter().position(|&x| x == peak).unwrap_or(0)
}

/// Where the `k` largest numbers of `x` are, the largest first and of equals the first one, in the order of [`f32::total_cmp`]; all of them if
/// there are fewer.
pub fn largest(x: &[f32], k: usize) -> Vec<u32> {
    let order = |&a: &u32, &b: &u32| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b));
    let mut all: Vec<u32> = (0..x.len() as u32).collect();
    if k < all.len() {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all.sort_unstable_by(order);
    all
}

/// x / (1 + e^-2y), which is both gates: y = x / 2 for silu.
trait Gate {
    unsafe fn twice_y<L: Lanes>(x: L::F) -> L::F;
}

struct Silu;
impl Gate for Silu {
    #[inline(always)]
    unsafe fn twice_y<L: Lanes>(x: L::F) -> L::F {
        x
    }
}

struct GeluTanh;
impl Gate for GeluTanh {
    #[inline(always)]
    unsafe fn twice_y<L: Lanes>(x: L::F) -> L::F {
        // 0.5 x (1 + tanh y) = x / (1 + e^-2y), y = sqrt(2 / pi) (x + 0.044715 x³)
        const TWICE: f32 = 1.595_769;
        // SAFETY: passed on to the caller.
        unsafe {
            let cubic = L::fma(L::mul(x, x), L::splat(0.044_715 * TWICE), L::splat(TWICE));
            L::mul(x, cubic)
        }
    }
}

struct Gated<'a, G> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
    kind: std::marker::PhantomData<G>,
}

fn gated<G: Gate>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && up.len() == out.len(), "a gate of {} numbers for {}", gate.len(), up.len());
    let isa = Isa::best();
    let task = |((gate, up), out): ((&[f32], &[f32]), &mut [f32])| {
        // SAFETY: `isa` is available; lengths were checked.
        unsafe { dispatch(isa, Gated::<G> { gate, up, out, kind: std::marker::PhantomData }) }
    };
    each_chunk(out, TASK, |i, out| {
        let of = |x| <[f32]>::split_at(x, i * TASK).1.split_at(out.len()).0;
        task(((of(gate), of(up)), out));
    });
}

impl<G: Gate> Job for Gated<'_, G> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let whole = self.out.len() - self.out.len() % L::W;
        // SAFETY: vectors stay inside the slices; the tail goes through buffers of a whole vector.
        unsafe {
            for i in (0..whole).step_by(L::W) {
                let (x, up) = (L::load(self.gate.as_ptr().add(i)), L::load(self.up.as_ptr().add(i)));
                L::store(self.out.as_mut_ptr().add(i), gate::<L, G>(x, up));
            }
            let (mut x, mut up) = ([0.0f32; 16], [0.0f32; 16]);
            let left = self.out.len() - whole;
            x[..left].copy_from_slice(&self.gate[whole..]);
            up[..left].copy_from_slice(&self.up[whole..]);
            let v = gate::<L, G>(L::load(x.as_ptr()), L::load(up.as_ptr()));
            L::store(x.as_mut_ptr(), v);
            self.out[whole..].copy_from_slice(&x[..left]);
        }
    }
}

#[inline(always)]
unsafe fn gate<L: Lanes, G: Gate>(x: L::F, up: L::F) -> L::F {
    // SAFETY: passed on to the caller.
    unsafe {
        let decay = exp::<L>(L::sub(L::splat(0.0), G::twice_y::<L>(x)));
        L::mul(L::div(x, L::add(L::splat(1.0), decay)), up)
    }
}

struct Peak<'a>(&'a [f32]);

impl Job for Peak<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let whole = self.0.len() - self.0.len() % L::W;
        // SAFETY: vectors stay inside the slice.
        let peak = unsafe {
            let mut most = L::splat(f32::NEG_INFINITY);
            for i in (0..whole).step_by(L::W) {
                // In this order a NaN loses: both x86 and our own `max` give the second of two that do not compare.
                most = L::max(L::load(self.0.as_ptr().add(i)), most);
            }
            L::peak(most)
        };
        self.0[whole..].iter().fold(peak, |peak, &x| if x > peak { x } else { peak })
    }
}

struct Softmax<'a>(&'a mut [f32]);

impl Job for Softmax<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let row = self.0;
        // SAFETY: the job stays inside its slice.
        let peak = unsafe { Peak(row).run::<L>() };
        if peak == f32::NEG_INFINITY {
            return row.fill(0.0);
        }
        let whole = row.len() - row.len() % L::W;
        let mut last = [f32::NEG_INFINITY; 16];
        let left = row.len() - whole;
        last[..left].copy_from_slice(&row[whole..]);
        // SAFETY: vectors stay inside the row; the tail is padded to a whole vector.
        unsafe {
            let mut mass = L::splat(0.0);
            for i in (0..whole).step_by(L::W) {
                let v = exp::<L>(L::sub(L::load(row.as_ptr().add(i)), L::splat(peak)));
                L::store(row.as_mut_ptr().add(i), v);
                mass = L::add(mass, v);
            }
            let v = exp::<L>(L::sub(L::load(last.as_ptr()), L::splat(peak)));
            L::store(last.as_mut_ptr(), v);
            let share = 1.0 / L::sum(L::add(mass, v));
            for i in (0..whole).step_by(L::W) {
                L::store(row.as_mut_ptr().add(i), L::mul(L::load(row.as_ptr().add(i)), L::splat(share)));
            }
            for (x, e) in row[whole..].iter_mut().zip(last) {
                *x = e * share;
            }
        }
    }
}
