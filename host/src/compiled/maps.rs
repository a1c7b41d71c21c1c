//! Ops on single numbers, with the formulas that the ops have when they run one by one.

use candle_core::op::{Gelu, GeluErf, Relu, Silu, UnaryOpT};

/// One number to one.
#[derive(Clone, Copy)]
pub(crate) enum Map {
    Of(fn(f32) -> f32),
    /// `x * a + b`
    Affine(f32, f32),
    Clamp(f32, f32),
}

/// Two numbers to one.
#[derive(Clone, Copy)]
pub(crate) struct Zip {
    one: fn(f32, f32) -> f32,
    /// The same number by number, in vectors: a call for each number would cost more than all else of a step that is no product.
    each: fn(&[f32], &[f32], &mut [f32]),
}

macro_rules! zip {
    (|$a:ident, $b:ident| $y:expr) => {
        Zip { one: |$a, $b| $y, each: |a, b, out| out.iter_mut().zip(a).zip(b).for_each(|((y, &$a), &$b)| *y = $y) }
    };
}

/// How an operand meets a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Number by number.
    Same,
    /// Again and again from the start.
    Again,
    /// Each number for so many of the result.
    Each(usize),
    /// For each of the result, which number.
    Listed(Vec<u32>),
}

impl Map {
    /// An op by its name in the table.
    pub(crate) fn named(op: &str) -> Option<Map> {
        Some(Map::Of(match op {
            "neg" => |x| -x,
            "floor" => f32::floor,
            "abs" => f32::abs,
            "exp" => f32::exp,
            "log" => f32::ln,
            "sqrt" => f32::sqrt,
            "rsqrt" => |x| x.sqrt().recip(),
            "square" => |x| x * x,
            "sigmoid" => |x| ((-x).exp() + 1.0).recip(),
            "tanh" => f32::tanh,
            "relu" => Relu::f32,
            "silu" => Silu::f32,
            "gelu" => GeluErf::f32,
            "gelu_tanh" => Gelu::f32,
            _ => return None,
        }))
    }

    pub(crate) fn run(self, x: &[f32], out: &mut [f32]) {
        let each = |f: &dyn Fn(f32) -> f32, out: &mut [f32]| out.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x));
        match self {
            Map::Of(f) => each(&f, out),
            Map::Affine(a, b) => out.iter_mut().zip(x).for_each(|(y, &x)| *y = x * a + b),
            Map::Clamp(low, high) => {
                let above = |x| if x < low { low } else { x };
                each(&|x| if above(x) > high { high } else { above(x) }, out)
            }
        }
    }
}

impl Zip {
    /// Number by number of two rows.
    pub(crate) fn rows(self, a: &[f32], b: &[f32], out: &mut [f32]) {
        (self.each)(a, b, out);
    }
}

/// An op by its name in the table.
pub(crate) fn zip_named(op: &str) -> Option<Zip> {
    Some(match op {
        "add" => zip!(|a, b| a + b),
        "sub" => zip!(|a, b| a - b),
        "mul" => zip!(|a, b| a * b),
        "div" => zip!(|a, b| a / b),
        "maximum" => zip!(|a, b| if a < b { b } else { a }),
        "minimum" => zip!(|a, b| if a > b { b } else { a }),
        "greater" => zip!(|a, b| f32::from(a > b)),
        _ => return None,
    })
}

impl Spread {
    /// How an operand of shape `dims` meets a result of shape `out`, which it is broadcast to.
    pub(crate) fn of(dims: &[usize], out: &[usize]) -> Spread {
        let listed = || Spread::Listed((0..out.iter().product()).map(|i| Self::listed(dims, out, i)).collect());
        Self::in_order(dims, out).unwrap_or_else(listed)
    }

    /// The same without a list; none if it takes one.
    pub(crate) fn in_order(dims: &[usize], out: &[usize]) -> Option<Spread> {
        let lead = dims.iter().take_while(|&&d| d == 1).count();
        let (dims, count) = (&dims[lead..], dims.iter().product::<usize>());
        if count == out.iter().product::<usize>() {
            return Some(Spread::Same);
        }
        if out.ends_with(dims) {
            return Some(Spread::Again);
        }
        // [.., n, 1] against [.., n, m], with all axes in front.
        let kept = dims.iter().rposition(|&d| d != 1).map_or(0, |last| last + 1);
        let front = out.len().saturating_sub(dims.len() - kept);
        let each = out[..front].ends_with(&dims[..kept]) && out[..front].iter().product::<usize>() == count;
        each.then(|| Spread::Each(out[front..].iter().product()))
    }

    /// Whether each row of `width` of the result meets either so many numbers side by side or a single one.
    pub(crate) fn goes_by_rows(&self, width: usize, len: usize) -> bool {
        match self {
            Spread::Same => true,
            Spread::Again => len == 1 || len.is_multiple_of(width),
            Spread::Each(of) => of.is_multiple_of(width),
            Spread::Listed(_) => false,
        }
    }

    /// What meets the row of `width` at `i` of the result: from `x`, or in `room` if it is one number again and again.
    pub(crate) fn row<'a>(&self, x: &'a [f32], i: usize, width: usize, room: &'a mut Vec<f32>) -> &'a [f32] {
        let at = self.at(i, x.len());
        if matches!(self, Spread::Each(_)) || x.len() == 1 {
            room.clear();
            room.resize(width, x[at]);
            return room;
        }
        &x[at..at + width]
    }

    /// Which number of the operand meets number `i` of the result.
    fn listed(dims: &[usize], out: &[usize], mut i: usize) -> u32 {
        let (mut at, mut stride) = (0, 1);
        for (axis, &n) in out.iter().rev().enumerate() {
            let d = dims.len().checked_sub(axis + 1).map_or(1, |axis| dims[axis]);
            at += (i % n).min(d - 1) * stride;
            (i, stride) = (i / n, stride * d);
        }
        at as u32
    }

    fn at(&self, i: usize, len: usize) -> usize {
        match self {
            Spread::Same => i,
            Spread::Again => i % len,
            Spread::Each(of) => i / of,
            Spread::Listed(list) => list[i] as usize,
        }
    }
}

/// `out[i] = f(a, b)`, where each operand meets the result in its own way.
pub(crate) fn zip(f: Zip, [a, b]: [&[f32]; 2], spread: &[Spread; 2], out: &mut [f32]) {
    if *spread == [Spread::Same, Spread::Same] {
        return (f.each)(a, b, out);
    }
    for (i, y) in out.iter_mut().enumerate() {
        *y = (f.one)(a[spread[0].at(i, a.len())], b[spread[1].at(i, b.len())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_meet_a_result_as_broadcasting_has_it() {
        let out = [2, 3, 4];
        assert_eq!(Spread::of(&[2, 3, 4], &out), Spread::Same);
        assert_eq!(Spread::of(&[4], &out), Spread::Again);
        assert_eq!(Spread::of(&[1, 3, 4], &out), Spread::Again);
        assert_eq!(Spread::of(&[1], &out), Spread::Again);
        assert_eq!(Spread::of(&[2, 3, 1], &out), Spread::Each(4));
        assert_eq!(Spread::of(&[2, 1, 1], &out), Spread::Each(12));
        let listed = |list: Vec<u32>| Spread::Listed(list);
        assert_eq!(Spread::of(&[3, 1], &out), listed((0..24).map(|i| i / 4 % 3).collect()));
        assert_eq!(Spread::of(&[2, 1, 4], &out), listed((0..24).map(|i| i / 12 * 4 + i % 4).collect()));
        let add = zip_named("add").unwrap();
        let mut sums = [0.0; 6];
        zip(add, [&[1.0, 2.0, 3.0], &[10.0, 20.0]], &[Spread::Again, Spread::Each(3)], &mut sums);
        assert_eq!(sums, [11.0, 12.0, 13.0, 21.0, 22.0, 23.0]);
    }
}
