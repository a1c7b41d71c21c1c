//! Launches on an NVIDIA GPU that wait until somebody reads what they write: an op gives its tensor at once, and the op that reads it may
//! have swallowed the launch. A norm joins the product behind it, a sum the product before it, a gate both products, and what queries and
//! keys go through is one launch. Of many tokens products do not wait, and a sum joins the norm behind it.
//!
//! Any other reader ([`Later::read`], which the arena calls) has the tensor written first, so whatever is not foreseen here is slower and
//! never wrong. A tensor whose last owner goes without having read it is not written at all.

mod work;

use crate::{
    kernels::{
        cpu::Turn,
        cuda::{
            experts::{Routed, Stacked},
            norm::{self, joint},
            packed::Tiles,
            product::{MOST_NORMED, Norming, Product, outputs},
            route::Route,
            rows::{self, Chain, RowOp},
            step::{device_of, unwritten},
            turn::Turned,
        },
    },
    layers::{experts::Activation, norm::Norm},
    parallel::ranks::Summing,
};
use candle_core::{DType, Result, Tensor, TensorId};
use std::{cell::RefCell, sync::Arc};
use work::{Normed, Work, run};

/// Most tokens of a step whose products wait. Beyond [`MOST_NORMED`] of them products still join a residual, but no norm and no gate.
pub const MOST: usize = 32;

struct Waiting {
    writes: Vec<Tensor>,
    work: Work,
    written: bool,
}

/// What waits.
#[derive(Default)]
pub struct Later {
    waiting: RefCell<Vec<Waiting>>,
    /// Sums of the squares of tensors that were written with them.
    squares: RefCell<Vec<(TensorId, Tensor)>>,
    /// Small ops on rows, which wait together.
    rows: RefCell<Chain>,
    /// Those that another kernel has done, of which what stands between has not been written.
    done: RefCell<Vec<Chain>>,
}

impl Later {
    /// Has a tensor written, if that waits.
    pub fn read(&self, id: TensorId) -> Result<()> {
        if self.rows.borrow().writes(id) {
            return self.rows.take().run();
        }
        let done = self.done.borrow().iter().position(|chain| chain.writes(id));
        if let Some(at) = done {
            return self.done.borrow_mut().swap_remove(at).run();
        }
        let work = {
            let mut waiting = self.waiting.borrow_mut();
            let it = waiting.iter_mut().find(|w| !w.written && w.writes.iter().any(|y| y.id() == id));
            let Some(it) = it else { return Ok(()) };
            it.written = true;
            (it.work.clone(), it.writes.clone())
        };
        run(&work.0, &work.1, None)
    }

    /// Has everything written.
    pub fn read_all(&self) -> Result<()> {
        let ids: Vec<TensorId> = self.waiting.borrow().iter().filter_map(|w| Some(w.writes.first()?.id())).collect();
        ids.into_iter().try_for_each(|id| self.read(id))?;
        self.done.take().into_iter().try_for_each(Chain::run)?;
        self.rows.take().run()
    }

    /// A small op on rows `[rows, ..]` of x, and perhaps of another; gives rows of `width`, and where they come from if the largest are chosen.
    pub fn row(
        &self,
        op: RowOp,
        x: &Tensor,
        other: Option<&Tensor>,
        width: usize,
        numbers: [f32; 2],
    ) -> Result<Option<(Tensor, Option<Tensor>)>> {
        let rows = match *x.dims() {
            [rows, _] if rows <= MOST => rows,
            _ => return Ok(None),
        };
        if ![Some(x), other].into_iter().flatten().all(|t| rows::fits(t, rows)) || width == 0 || width > rows::WIDEST {
            return Ok(None);
        }
        if !self.rows.borrow().has_room(rows) {
            self.rows.take().run()?;
        }
        for t in [Some(x), other].into_iter().flatten().filter(|t| !self.rows.borrow().writes(t.id())) {
            self.read(t.id())?;
        }
        self.rows.borrow_mut().push(op, x, other, (rows, width, x.dtype()), numbers).map(Some)
    }

    /// Whether a row op that waits writes it.
    pub fn is_in_chain(&self, id: TensorId) -> bool {
        self.rows.borrow().writes(id)
    }

    /// The same numbers in f32, written with the row ops that give them if these wait.
    pub fn wide(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)?;
        if x.dtype() == DType::F32 || !self.rows.borrow().writes(x.id()) || !self.rows.borrow().has_room(rows) {
            self.read(x.id())?;
            return x.to_dtype(DType::F32);
        }
        let to = (rows, x.dim(1)?, DType::F32);
        let (wide, _) = self.rows.borrow_mut().push(RowOp::Affine, x, None, to, [1.0, 0.0])?;
        self.rows.take().run()?;
        Ok(wide)
    }

    /// How experts and their weights are found, if what waits is just that, and the weights that the experts' kernel will have written.
    pub fn route(&self, chosen: &Tensor, weights: &Tensor) -> Result<Option<(Route, Tensor)>> {
        let Some(route) = Route::of(&self.rows.borrow(), chosen, weights) else { return Ok(None) };
        self.done.borrow_mut().push(self.rows.take());
        let wide = unwritten(weights.dims(), DType::F32, device_of(weights)?)?;
        Ok(Some((route, wide)))
    }

    /// Nobody will read it any more.
    pub fn forget(&self, id: TensorId) {
        self.waiting.borrow_mut().retain(|w| w.writes.len() != 1 || w.writes[0].id() != id);
    }

    fn wait(&self, writes: Vec<Tensor>, work: Work) {
        self.waiting.borrow_mut().push(Waiting { writes, work, written: false });
    }

    fn find<T>(&self, id: TensorId, of: impl Fn(&Work) -> Option<T>) -> Option<T> {
        let waiting = self.waiting.borrow();
        let mut it = waiting.iter().filter(|w| !w.written && w.writes.len() == 1 && w.writes[0].id() == id);
        it.next().and_then(|w| of(&w.work))
    }

    /// The norm of x, which [`Norm::is_plain`].
    pub fn norm(&self, layer: &Norm, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(&dim) = x.dims().last() else { return Ok(None) };
        if x.dtype() != DType::BF16 || !norm::covers(dim) || !layer.is_plain(dim) {
            return Ok(None);
        }
        if let Some(terms) =
            self.find(x.id(), |work| if let Work::Sum(terms) = work { Some(terms.clone()) } else { None })
        {
            let y = unwritten(x.dims(), DType::BF16, device_of(x)?)?;
            norm::of_sum_into([&terms[0], &terms[1]], layer.weight.as_ref(), layer.eps, [x, &y])?;
            self.has_written(x.id());
            return Ok(Some(y));
        }
        self.read(x.id())?;
        let squares = self.squares.borrow().iter().rev().find(|(id, _)| *id == x.id()).map(|(_, s)| s.clone());
        let narrow = layer.narrow.clone().filter(|_| squares.is_some());
        let y = unwritten(x.dims(), DType::BF16, device_of(x)?)?;
        let normed = Normed { x: x.clone(), weight: layer.weight.clone(), narrow, eps: layer.eps, squares };
        self.wait(vec![y.clone()], Work::Norm(normed));
        Ok(Some(y))
    }

    /// What a product is to read for x: x, or what a norm that waits reads, and that norm.
    fn input(&self, x: &Tensor) -> Result<(Tensor, Option<Norming>)> {
        let normed = self.find(x.id(), |work| match work {
            Work::Norm(Normed { x, narrow: Some(weight), squares: Some(squares), eps, .. }) => {
                Some((x.clone(), Norming { weight: weight.clone(), squares: squares.clone(), eps: *eps }))
            }
            _ => None,
        });
        match normed {
            Some((x, norm)) => Ok((x, Some(norm))),
            None => self.read(x.id()).map(|()| (x.clone(), None)),
        }
    }

    /// x `[.., cols]`, few tokens, times a matrix, or what a product with several has for it.
    pub fn product(
        &self,
        tiles: &Tiles,
        bias: Option<&Tensor>,
        x: &Tensor,
        summing: Option<Summing>,
    ) -> Result<Option<Tensor>> {
        let tokens = x.elem_count() / tiles.cols.max(1);
        if x.dtype() != DType::BF16 || tokens > MOST || tokens > tiles.layout.few() {
            return Ok(None);
        }
        let Some((together, place)) = &tiles.together else {
            let (from, norm) = self.input(x)?;
            let y = outputs(&[tiles], x)?;
            let work = Work::One { tiles: tiles.clone(), bias: bias.cloned(), x: from, norm };
            self.wait(y.clone(), work.of_rank(summing));
            return Ok(y.into_iter().next());
        };
        if summing.is_some() {
            return Ok(None);
        }
        let is_it = |w: &&Waiting| matches!(&w.work, Work::Group { together: other, of, .. } if *of == x.id() && Arc::ptr_eq(other, together));
        if let Some(known) = self.waiting.borrow().iter().find(is_it) {
            return Ok(known.writes.get(*place).cloned());
        }
        let (from, norm) = self.input(x)?;
        let y = together.outputs(x)?;
        self.wait(y.clone(), Work::Group { together: together.clone(), of: x.id(), x: from, norm });
        Ok(y.into_iter().nth(*place))
    }

    /// a + b, where one of them is a product that nobody has read yet, or where there are so many tokens that a norm may join it.
    pub fn sum(&self, a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
        if a.dims() != b.dims() || [a.dtype(), b.dtype()] != [DType::BF16; 2] {
            return Ok(None);
        }
        if a.rank() == 2 && a.dim(0)? > MOST && u32::try_from(a.elem_count()).is_ok() {
            self.read(a.id())?;
            self.read(b.id())?;
            let y = unwritten(a.dims(), DType::BF16, device_of(a)?)?;
            self.wait(vec![y.clone()], Work::Sum([a.clone(), b.clone()]));
            return Ok(Some(y));
        }
        for (residual, product) in [(a, b), (b, a)] {
            let work = self.find(product.id(), |work| match work {
                Work::One { .. } | Work::Experts { .. } | Work::Summand { .. } => Some(work.clone()),
                _ => None,
            });
            let Some(work) = work else { continue };
            self.read(residual.id())?;
            let device = device_of(a)?;
            let y = unwritten(a.dims(), DType::BF16, device)?;
            let width = a.dims().last().copied().unwrap_or_default();
            let tokens = a.elem_count() / width.max(1);
            let written =
                if let Work::Summand { summing, .. } = &work { summing.group.writes_squares(a) } else { true };
            let squares = match written && width.is_multiple_of(64) && (1..=MOST_NORMED).contains(&tokens) {
                true => Some(unwritten(&[tokens, width / 16], DType::F32, device)?),
                false => None,
            };
            run(&work, std::slice::from_ref(&y), Some((&residual.contiguous()?, squares.as_ref())))?;
            self.squares.borrow_mut().extend(squares.map(|squares| (y.id(), squares)));
            return Ok(Some(y));
        }
        Ok(None)
    }

    /// What a gate lets through, where both are products of one input that nobody has read yet.
    pub fn gated(&self, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Option<Tensor>> {
        let work = self.waiting.borrow().iter().find_map(|w| match (&w.work, &w.writes[..]) {
            (Work::Group { together, x, norm, .. }, [a, b])
                if !w.written
                    && [a.id(), b.id()] == [gate.id(), up.id()]
                    && a.dims() == b.dims()
                    && a.elem_count() <= MOST_NORMED * a.dims().last().copied().unwrap_or_default() =>
            {
                Some((together.clone(), x.clone(), norm.clone()))
            }
            _ => None,
        });
        let Some((together, x, norm)) = work else { return Ok(None) };
        let y = unwritten(gate.dims(), DType::BF16, device_of(gate)?)?;
        let (matrices, norm, written) = (together.matrices(), norm.as_ref(), [y.clone()]);
        let product = Product { matrices: &matrices, x: &x, y: &written, norm, residual: None, squares: None };
        product.run_gated(joint(activation))?;
        Ok(Some(y))
    }

    /// Turns x `[tokens, heads, d]` by its positions.
    pub fn turn(
        &self,
        x: &Tensor,
        positions: &Tensor,
        (frequencies, amplitude): (&Tensor, f32),
        every: usize,
        turn: Turn,
    ) -> Result<Option<Tensor>> {
        if x.dtype() != DType::BF16 {
            return Ok(None);
        }
        let normed = self.find(x.id(), |work| match work {
            Work::Norm(Normed { x, weight, eps, .. }) => Some((x.clone(), (weight.clone(), *eps))),
            _ => None,
        });
        let (from, norm) = match normed {
            Some((x, norm)) => (x, Some(norm)),
            None => self.read(x.id()).map(|()| (x.clone(), None))?,
        };
        let y = unwritten(x.dims(), DType::BF16, device_of(x)?)?;
        let frequencies = frequencies.clone();
        let turned = Turned { x: from, y: y.clone(), norm, frequencies, amplitude, every, turn };
        self.wait(vec![y.clone()], Work::Turn { turned, positions: positions.clone() });
        Ok(Some(y))
    }

    /// How a tensor is still to be turned, if it is.
    pub fn turned(&self, id: TensorId) -> Option<Turned> {
        self.find(id, |work| if let Work::Turn { turned, .. } = work { Some(turned.clone()) } else { None })
    }

    /// Somebody else has written it.
    pub fn has_written(&self, id: TensorId) {
        self.forget(id);
    }

    /// Few tokens through their experts.
    pub fn experts(
        &self,
        stacked: &Arc<Stacked>,
        x: &Tensor,
        mut routed: Routed,
        summing: Option<Summing>,
    ) -> Result<Option<Tensor>> {
        if x.dtype() != DType::BF16 || x.rank() != 2 || routed.chosen.rank() != 2 {
            return Ok(None);
        }
        (routed.x, routed.norm) = if routed.kind.identity == 0 {
            self.input(x)?
        } else {
            self.read(x.id())?;
            (x.clone(), None)
        };
        let y = unwritten(x.dims(), DType::BF16, device_of(x)?)?;
        let work = Work::Experts { stacked: stacked.clone(), routed };
        self.wait(vec![y.clone()], work.of_rank(summing));
        Ok(Some(y))
    }
}
