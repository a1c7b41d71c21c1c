//! Large tensors on the CPU, number by number, with the threads that products run on. candle has a pool of its own for these: its threads
//! would spin beside ours, and a step would wait for whichever of them has no core just then.

use super::{
    running::Running,
    value::{Outcome, Value, broadcast},
};
use crate::{
    compiled::maps::{Map, Spread, Zip, zip_named},
    kernels::cpu::in_pieces,
    layers::slices::{filled, with_f32},
};
use candle_core::{DType, Tensor};
use plugin_api::abi::Handle;

/// Below so many numbers candle does it on this thread.
const LARGE: usize = 1 << 16;
/// Rows that are not worth a call each.
const NARROW: usize = 16;

impl Running<'_> {
    /// What the op gives, or none where candle is to do it. The bits are candle's.
    pub(super) fn by_team(&self, op: &str, a: Handle, b: Option<Handle>) -> Outcome<Option<Value>> {
        if !self.place.native {
            return Ok(None);
        }
        let given = match b {
            None => Map::named(op).map(|map| self.mapped(map, a)),
            Some(b) => zip_named(op).map(|zip| self.zipped(zip, a, b)),
        };
        given.unwrap_or(Ok(None))
    }

    /// The same for an op of one tensor that is known.
    pub(super) fn mapped(&self, map: Map, x: Handle) -> Outcome<Option<Value>> {
        let Some(x) = large(self.arena.look(x)?).filter(|x| self.place.native && x.elem_count() >= LARGE) else {
            return Ok(None);
        };
        let of = |x: &[f32], y: &mut [f32]| in_pieces(y, 1, |at, y| map.run(&x[at..at + y.len()], y));
        Ok(Some(Value::Real(with_f32(x, |x| filled(x.len(), |y| of(x, y)))??.reshape(x.shape())?)))
    }

    fn zipped(&self, zip: Zip, a: Handle, b: Handle) -> Outcome<Option<Value>> {
        let (Some(a), Some(b)) = (large(self.arena.look(a)?), large(self.arena.look(b)?)) else { return Ok(None) };
        let dims = broadcast(a.dims(), b.dims())?;
        let count = dims.iter().product::<usize>();
        let spreads = [a, b].map(|x| Spread::in_order(x.dims(), &dims));
        let [Some(first), Some(second)] = spreads else { return Ok(None) };
        let alike = first == Spread::Same && second == Spread::Same;
        let width = if alike { count } else { dims.last().copied().unwrap_or(1) };
        let by_rows = first.goes_by_rows(width, a.elem_count()) && second.goes_by_rows(width, b.elem_count());
        if count < LARGE || width < NARROW || !by_rows {
            return Ok(None);
        }
        let row = |a: &[f32], b: &[f32], at: usize, y: &mut [f32], rooms: &mut [Vec<f32>; 2]| {
            let [of_a, of_b] = rooms;
            zip.rows(first.row(a, at, width, of_a), second.row(b, at, width, of_b), y);
        };
        let of = |a: &[f32], b: &[f32], y: &mut [f32]| {
            if alike {
                return in_pieces(y, 1, |at, y| zip.rows(&a[at..at + y.len()], &b[at..at + y.len()], y));
            }
            in_pieces(y, width, |at, y| {
                let mut rooms = [Vec::new(), Vec::new()];
                y.chunks_mut(width).enumerate().for_each(|(i, y)| row(a, b, at + i * width, y, &mut rooms));
            });
        };
        Ok(Some(Value::Real(with_f32(a, |a| with_f32(b, |b| filled(&dims[..], |y| of(a, b, y))))???)))
    }
}

/// Numbers that could be large.
fn large(value: &Value) -> Option<&Tensor> {
    match value {
        Value::Real(t) if t.dtype() == DType::F32 && t.device().is_cpu() => Some(t),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceChoice, DtypeChoice, Placement};
    use candle_core::Device;

    fn numbers(dims: &[usize]) -> Tensor {
        let count: usize = dims.iter().product();
        let numbers = (0..count).map(|i| ((i * 37 + 11) % 1009) as f32 / 100.0 - 5.0).collect::<Vec<f32>>();
        Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn large_tensors_come_out_as_candle_gives_them() {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32).unwrap();
        let mut running = Running::new(&[], &[], &[], &place, Vec::new(), 1);
        type Pair = fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>;
        let pairs: [(&str, Pair); 4] = [
            ("add", |a, b| a.broadcast_add(b)),
            ("sub", |a, b| a.broadcast_sub(b)),
            ("mul", |a, b| a.broadcast_mul(b)),
            ("div", |a, b| a.broadcast_div(b)),
        ];
        let shapes: [&[usize]; 6] = [&[70, 1000], &[1000], &[70, 1], &[1, 1000], &[1], &[1, 1]];
        let whole = numbers(shapes[0]);
        for shape in shapes {
            let other = numbers(shape);
            let handles = [&whole, &other].map(|t| running.arena.put(Value::Real(t.clone())));
            for (op, pair) in pairs {
                for (a, b, x, y) in [(0, 1, &whole, &other), (1, 0, &other, &whole)] {
                    let Ok(Some(Value::Real(got))) = running.by_team(op, handles[a], Some(handles[b])) else {
                        panic!("{op} of {:?} and {:?} is left to candle", x.dims(), y.dims())
                    };
                    let want = pair(x, y).unwrap();
                    assert_eq!(got.dims(), want.dims());
                    assert!(bits(&got) == bits(&want), "{op} of {:?} and {:?}", x.dims(), y.dims());
                }
            }
        }
        let x = running.arena.put(Value::Real(whole.clone()));
        let Ok(Some(Value::Real(got))) = running.by_team("silu", x, None) else { panic!("silu is left to candle") };
        let far = (got - whole.silu().unwrap()).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(far < 1e-6, "{far}");
        let Ok(Some(Value::Real(got))) = running.mapped(Map::Affine(2.5, -1.0), x) else { panic!("left to candle") };
        assert!(bits(&got) == bits(&whole.affine(2.5, -1.0).unwrap()));
    }

    #[test]
    fn what_is_small_or_of_many_short_rows_is_left_to_candle() {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32).unwrap();
        let mut running = Running::new(&[], &[], &[], &place, Vec::new(), 1);
        for (a, b) in [([7, 100], [7, 100]), ([70_000, 2], [1, 2])] {
            let [a, b] = [a, b].map(|dims| running.arena.put(Value::Real(numbers(&dims))));
            assert!(matches!(running.by_team("add", a, Some(b)), Ok(None)));
        }
    }
}
