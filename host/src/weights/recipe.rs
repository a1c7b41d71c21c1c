//! What a plugin named, made into numbers: a stored tensor with the transforms that the plugin asked for.
//!
//! Packed weights stay packed through everything that moves whole rows (see `rows`); any other transform unpacks them (see `floats`), since
//! a packed group cannot be cut.

use super::{
    checkpoint::Checkpoint,
    forms::{self, Form, Named},
};
use crate::{
    config::{Quantization, Scheme},
    error::{Error, Result},
    kernels::cpu::{Float, Format, Matrix},
};
use std::sync::Arc;

pub use super::forms::{float, format_of};

/// A stored tensor and what is to be done to it, outermost first.
#[derive(Clone, Debug)]
pub enum Recipe {
    /// The tensor of this full name.
    Stored(String),
    /// Numbers `[len]` that the plugin computed.
    Numbers(Arc<[f32]>),
    /// Entries of the first axis.
    Rows(Arc<Recipe>, usize, usize),
    /// Every element times `.1` plus `.2`.
    Affine(Arc<Recipe>, f32, f32),
    /// The last two axes exchanged.
    Transpose(Arc<Recipe>),
    /// The same elements in another shape.
    Reshape(Arc<Recipe>, Vec<usize>),
    /// Entries `.2..(.3)` of axis `.1`.
    Narrow(Arc<Recipe>, usize, usize, usize),
    /// Entries `.2`, `.2 + .3`, .. of axis `.1`.
    Every(Arc<Recipe>, usize, usize, usize),
    /// Each row divided by its length, which counts as `.1` at least.
    UnitRows(Arc<Recipe>, f32),
    /// A new first axis.
    Stack(Vec<Arc<Recipe>>),
    /// Joined along an axis.
    Join(Vec<Arc<Recipe>>, usize),
}

impl Recipe {
    /// The stored tensors it reads.
    pub fn names<'a>(&'a self, to: &mut Vec<&'a str>) {
        match self {
            Recipe::Stored(name) => to.push(name),
            Recipe::Numbers(_) => {}
            Recipe::Rows(r, ..)
            | Recipe::Affine(r, ..)
            | Recipe::Transpose(r)
            | Recipe::Reshape(r, _)
            | Recipe::Narrow(r, ..)
            | Recipe::Every(r, ..)
            | Recipe::UnitRows(r, _) => r.names(to),
            Recipe::Stack(parts) | Recipe::Join(parts, _) => parts.iter().for_each(|p| p.names(to)),
        }
    }

    /// The first stored tensor it reads, which stands for it in messages.
    pub fn name(&self) -> &str {
        let mut names = Vec::new();
        self.names(&mut names);
        names.first().copied().unwrap_or("nothing")
    }

    /// The path of the module whose weight this is, where it is used untransformed.
    pub fn path(&self) -> Option<&str> {
        match self {
            Recipe::Stored(name) => name.strip_suffix(".weight"),
            _ => None,
        }
    }
}

/// The tensors of a checkpoint as recipes see them: a weight in several tensors (numbers, scales, zero points) is one.
pub struct Pantry {
    /// The files' tensors, by the names that plugins use.
    pub checkpoint: Checkpoint,
    /// What config.json says of packing.
    pub quantization: Option<Quantization>,
}

impl Pantry {
    fn named<'a>(&'a self, name: &'a str) -> Named<'a> {
        Named { name, checkpoint: &self.checkpoint, quantization: self.quantization.as_ref() }
    }

    /// How a weight is stored.
    pub(super) fn form<'a>(&'a self, name: &'a str) -> Result<(Named<'a>, &'static dyn Form)> {
        let named = self.named(name);
        match named.form() {
            Some(form) => Ok((named, form)),
            None => Err(Error::Weights(format!("{name}: not in the checkpoint"))),
        }
    }

    /// Whether there is a weight of this name, whatever it is stored as.
    pub fn has(&self, name: &str) -> bool {
        self.named(name).form().is_some()
    }

    /// The stored tensors that a recipe uses up, those beside packed weights too.
    pub fn uses(&self, recipe: &Recipe) -> Vec<String> {
        let mut names = Vec::new();
        recipe.names(&mut names);
        names.into_iter().flat_map(|name| self.named(name).parts()).collect()
    }

    /// Whether this is a scale of the cache that some tools store beside attention: ours is not FP8, so it is of no use.
    pub fn is_for_an_fp8_cache(&self, name: &str) -> bool {
        let other = matches!(self.quantization, Some(Quantization::Other(_)));
        other && matches!(name.rsplit('.').next(), Some("k_scale" | "v_scale" | "q_scale" | "kv_scale"))
    }

    /// The matrix of a linear layer, and whether its inputs are to be rounded to eight bits: BitNet's were trained so, and what it stores
    /// in full becomes ternary only here.
    pub fn linear(&self, recipe: &Recipe) -> Result<(Matrix, bool)> {
        let Some(Quantization::Other(Scheme::Bitnet(bitnet))) = &self.quantization else {
            return Ok((self.matrix(recipe)?, false));
        };
        let mut names = Vec::new();
        recipe.names(&mut names);
        if names.iter().all(|name| self.named(name).is_ternary()) {
            return Ok((self.matrix(recipe)?, true));
        }
        match self.rows_of_module(recipe)? {
            // The mean magnitude is that of the whole stored matrix.
            Some((path, _, rows)) if bitnet.online && bitnet.converts(path) => {
                let whole = self.matrix(&Recipe::Stored(format!("{path}.weight")))?;
                Ok((forms::ternary(&whole)?.permute_rows(&rows), true))
            }
            _ => Ok((self.matrix(recipe)?, false)),
        }
    }

    /// The ids that a table holds, where it is one of whole numbers.
    pub fn whole_numbers(&self, recipe: &Recipe) -> Result<Option<Vec<u32>>> {
        match recipe {
            Recipe::Stored(name) => self.named(name).ids(),
            _ => Ok(None),
        }
    }

    /// The tensor as a matrix: all axes but the last make up its rows.
    pub fn matrix(&self, recipe: &Recipe) -> Result<Matrix> {
        let shape = self.shape(recipe)?;
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product::<usize>();
        match recipe {
            Recipe::Stored(name) => {
                let (named, form) = self.form(name)?;
                named.matrix(form)
            }
            Recipe::Stack(parts) => {
                let parts = parts.iter().map(|p| self.matrix(p)).collect::<Result<Vec<_>>>()?;
                match parts.iter().zip(parts.iter().skip(1)).all(|(a, b)| a.stacks_on(b)) {
                    true => Matrix::stack(&parts),
                    // A checkpoint may pack some of them otherwise than the rest.
                    false => Matrix::stack(&parts.iter().map(unpacked).collect::<Result<Vec<_>>>()?),
                }
            }
            Recipe::Reshape(inner, _) if self.shape(inner)?.last() == Some(&cols) => self.matrix(inner),
            moved => match self.moved(moved)? {
                Some(matrix) => Ok(matrix),
                None => Matrix::quantize(&self.floats(moved)?, rows, cols, Format::Dense(self.float(moved.name()))),
            },
        }
    }

    /// The float type in which transformed numbers are kept: that of the stored tensor, or what its form asks for.
    pub(super) fn float(&self, name: &str) -> Float {
        self.form(name).map_or(Float::F32, |(named, form)| form.float(&named))
    }
}

fn unpacked(packed: &Matrix) -> Result<Matrix> {
    let mut numbers = vec![0.0; packed.rows() * packed.cols()];
    packed.dequantize_rows(0..packed.rows(), &mut numbers);
    Matrix::quantize(&numbers, packed.rows(), packed.cols(), Format::Dense(Float::F32))
}
