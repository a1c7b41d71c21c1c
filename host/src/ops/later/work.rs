//! Launches that wait, and how they are started: with all that has joined them by then. A rank's summand goes to the others before anybody
//! reads it, and their sum takes the residual along that a product alone would.

use crate::{
    kernels::cuda::{
        experts::{Routed, Stacked},
        norm,
        packed::Tiles,
        product::{Norming, Product},
        step::{self, device_of, unwritten},
        sum::Onto,
        together::Together,
        turn::Turned,
    },
    parallel::ranks::Summing,
};
use candle_core::{DType, Result, Tensor, TensorId};
use std::sync::Arc;

/// A norm of x.
#[derive(Clone)]
pub(super) struct Normed {
    pub(super) x: Tensor,
    pub(super) weight: Option<Tensor>,
    pub(super) narrow: Option<Tensor>,
    pub(super) eps: f32,
    pub(super) squares: Option<Tensor>,
}

/// What is done when it is read.
#[derive(Clone)]
pub(super) enum Work {
    Norm(Normed),
    One {
        tiles: Tiles,
        bias: Option<Tensor>,
        x: Tensor,
        norm: Option<Norming>,
    },
    /// Products of one input, known by the tensor that the ops were given.
    Group {
        together: Arc<Together>,
        of: TensorId,
        x: Tensor,
        norm: Option<Norming>,
    },
    /// Of many tokens.
    Sum([Tensor; 2]),
    Turn {
        turned: Turned,
        positions: Tensor,
    },
    Experts {
        stacked: Arc<Stacked>,
        routed: Routed,
    },
    /// One rank's part of what they write.
    Summand {
        of: Box<Work>,
        summing: Summing,
    },
}

impl Work {
    /// The same of a rank that has a part of the layer only.
    pub(super) fn of_rank(self, summing: Option<Summing>) -> Self {
        match summing {
            Some(summing) => Work::Summand { of: Box::new(self), summing },
            None => self,
        }
    }
}

/// Starts what waited, to write `y`; a product joins a residual, and says what squares it wrote.
pub(super) fn run(work: &Work, y: &[Tensor], end: Option<(&Tensor, Option<&Tensor>)>) -> Result<()> {
    let (residual, squares) = end.map_or((None, None), |(residual, squares)| (Some(residual), squares));
    match work {
        Work::Norm(Normed { x, weight, eps, .. }) => match y.first() {
            Some(y) => norm::into(x, weight.as_ref(), *eps, y),
            None => Ok(()),
        },
        Work::One { tiles, bias, x, norm } => {
            let matrices = [(tiles, bias.as_ref())];
            Product { matrices: &matrices, x, y, norm: norm.as_ref(), residual, squares }.run()
        }
        Work::Group { together, x, norm, .. } => {
            let matrices = together.matrices();
            Product { matrices: &matrices, x, y, norm: norm.as_ref(), residual, squares }.run()
        }
        Work::Sum([a, b]) => match y.first() {
            Some(y) => norm::add_into(a, b, y),
            None => Ok(()),
        },
        Work::Turn { turned, positions } => {
            let Turned { x, norm, frequencies, amplitude, every, turn, y } = turned;
            let normed = match norm {
                Some((weight, eps)) => {
                    let normed = unwritten(x.dims(), DType::BF16, device_of(x)?)?;
                    norm::into(x, weight.as_ref(), *eps, &normed)?;
                    normed
                }
                None => x.clone(),
            };
            step::rope_into(&normed, positions, (frequencies, *amplitude), *every, *turn, y)
        }
        Work::Experts { stacked, routed } => match y.first() {
            Some(y) => stacked.run(routed, y, residual, squares),
            None => Ok(()),
        },
        Work::Summand { of, summing: Summing { group, rank } } => {
            run(of, y, None)?;
            let onto = residual.map(|residual| Onto { residual, squares });
            y.first().map_or(Ok(()), |y| group.sum_into(*rank, y, onto))
        }
    }
}
