//! The stored low-rank part of one layer -> the tensors that compute it, in the activations' type, checked against the layer first.
//! mlx-lm stores A `[inputs, rank]` and B `[rank, outputs]`, PEFT (and mlx-lm for experts) both of them transposed.

use crate::{
    device::Placement,
    error::{Error, Result},
    kernels::cpu::{Format, Matrix},
    layers::{
        adapted::{Adapter, Magnitude, embedding_factors, factors},
        weight::Weight,
    },
    weights::{recipe::float, stored::Stored},
};
use candle_core::{Device, Tensor};
use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whose arithmetic an adapter follows; they differ on embeddings only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// A changed embedding changes the tied head; DoRA has one magnitude a row.
    Mlx,
    /// The tied head stays as it was; DoRA has one magnitude a column.
    Peft,
}

/// A stored matrix, or a stack of them with one for each expert.
#[derive(Debug)]
pub struct Factor {
    /// Its name in the file, for messages.
    pub name: String,
    /// Its bytes.
    pub tensor: Stored,
    /// Stored transposed.
    pub turned: bool,
}

/// What was found under one path.
#[derive(Debug, Default)]
pub struct Found {
    /// A.
    pub a: Option<Factor>,
    /// B.
    pub b: Option<Factor>,
    /// DoRA's magnitudes.
    pub m: Option<Factor>,
}

/// The low-rank part of one layer, as its file holds it.
#[derive(Debug)]
pub struct LowRank {
    a: Factor,
    b: Factor,
    m: Option<Factor>,
    rank: usize,
    scale: f64,
    convention: Convention,
    used: AtomicBool,
}

impl Found {
    /// Checks that the parts belong together. `rank` and `scale` are what adapter_config.json says of this layer.
    pub fn complete(self, path: &str, rank: usize, scale: f64, dora: bool, convention: Convention) -> Result<LowRank> {
        let wrong = |what: &str| Err(Error::Adapter(format!("{path}: {what}: save the adapter again")));
        let (a, b) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (None, _) => return wrong("the adapter has no A for this layer"),
            (_, None) => return wrong("the adapter has no B for this layer"),
        };
        match &self.m {
            Some(_) if a.is_stack() => return wrong("experts do not take DoRA"),
            None if dora => return wrong("the adapter is DoRA and has no magnitudes for this layer"),
            Some(_) if !dora => return wrong("the adapter has magnitudes, but adapter_config.json does not say DoRA"),
            _ => {}
        }
        for (factor, axis_from_end) in [(&a, 1 + usize::from(a.turned)), (&b, 2 - usize::from(b.turned))] {
            let shape = &factor.tensor.shape;
            let found = shape.len().checked_sub(axis_from_end).and_then(|axis| shape.get(axis));
            if shape.len() < 2 || found != Some(&rank) {
                return Err(Error::Adapter(format!(
                    "{}: adapter has {shape:?}, which is not of rank {rank} as adapter_config.json says",
                    factor.name
                )));
            }
        }
        Ok(LowRank { a, b, m: self.m, rank, scale, convention, used: AtomicBool::new(false) })
    }
}

impl Factor {
    fn is_stack(&self) -> bool {
        self.tensor.shape.len() > 2
    }

    /// `[dims[0], dims[1]]` in f32 on the CPU; of expert `e` of `n` where `expert` is `Some((e, n))`.
    fn read(&self, dims: [usize; 2], expert: Option<(usize, usize)>) -> Result<Tensor> {
        let lying = if self.turned { [dims[1], dims[0]] } else { dims };
        let expected: Vec<usize> = expert.iter().map(|(_, of)| *of).chain(lying).collect();
        self.check(&expected)?;
        let count = lying[0] * lying[1];
        let start = expert.map_or(0, |(e, _)| e * count);
        let tensor = Tensor::from_vec(self.numbers(start..start + count)?, &lying, &Device::Cpu)?;
        Ok(if self.turned { tensor.t()? } else { tensor })
    }

    /// `[count]` in f32 on the CPU.
    fn read_vector(&self, count: usize) -> Result<Tensor> {
        self.check(&[count])?;
        Ok(Tensor::from_vec(self.numbers(0..count)?, count, &Device::Cpu)?)
    }

    fn check(&self, expected: &[usize]) -> Result<()> {
        if self.tensor.shape == expected {
            return Ok(());
        }
        let found = &self.tensor.shape;
        Err(Error::Adapter(format!("{}: adapter has {found:?}, the layer takes {expected:?}", self.name)))
    }

    fn numbers(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let dtype = self.tensor.dtype;
        let refused = || Error::Adapter(format!("{}: {dtype} is not a float type that adapters come in", self.name));
        let format = Format::Dense(float(dtype).ok_or_else(refused)?);
        let size = dtype.size_in_bytes(1).unwrap_or(1);
        let bytes = self.tensor.bytes().slice(range.start * size..range.end * size).ok_or_else(refused)?;
        let row = Matrix::new(format, 1, range.len(), bytes, None, None)?;
        let mut numbers = vec![0.0; range.len()];
        row.dequantize_rows(0..1, &mut numbers);
        Ok(numbers)
    }
}

impl LowRank {
    /// Over a linear layer that is these of the `of` rows of a stored matrix.
    pub fn over_linear(&self, weight: &Weight, rows: &[usize], of: usize, place: &Placement) -> Result<Adapter> {
        let ids = rows.iter().map(|&row| row as u32).collect::<Vec<_>>();
        let ids = Tensor::from_vec(ids, rows.len(), &Device::Cpu)?;
        let cut = |t: Tensor, axis| t.contiguous()?.index_select(&ids, axis);
        let a = self.a.read([weight.cols(), self.rank], None)?;
        let b = cut(self.scaled_b(of, None)?, 1)?;
        let magnitude = match &self.m {
            Some(m) => Some(Magnitude::Columns(factors(&cut(m.read_vector(of)?, 0)?, &a, &b, weight)?)),
            None => None,
        };
        self.place(a, b, magnitude, place)
    }

    /// Over expert `expert.0` of `expert.1`; from a stack, or from parts stored one by one.
    pub fn over_expert(&self, weight: &Weight, expert: (usize, usize), place: &Placement) -> Result<Adapter> {
        if !self.a.is_stack() {
            return self.over_linear(weight, &(0..weight.rows()).collect::<Vec<_>>(), weight.rows(), place);
        }
        let a = self.a.read([weight.cols(), self.rank], Some(expert))?;
        let b = self.scaled_b(weight.rows(), Some(expert))?;
        self.place(a, b, None, place)
    }

    /// Over an embedding.
    pub fn over_embedding(&self, weight: &Weight, place: &Placement) -> Result<Adapter> {
        let a = self.a.read([weight.rows(), self.rank], None)?;
        let b = self.scaled_b(weight.cols(), None)?;
        let magnitude = match (&self.m, self.convention) {
            (Some(m), Convention::Mlx) => {
                let m = m.read_vector(weight.rows())?;
                Some(Magnitude::Rows(embedding_factors(&m, &a, &b, weight, true)?))
            }
            (Some(m), Convention::Peft) => {
                let m = m.read_vector(weight.cols())?;
                Some(Magnitude::Columns(embedding_factors(&m, &a, &b, weight, false)?))
            }
            (None, _) => None,
        };
        self.place(a, b, magnitude, place)
    }

    /// Whether a layer took it.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    // Scaled in f32, before it is narrowed: one op less a step.
    fn scaled_b(&self, outputs: usize, expert: Option<(usize, usize)>) -> Result<Tensor> {
        Ok(self.b.read([self.rank, outputs], expert)?.affine(self.scale, 0.0)?)
    }

    fn place(&self, a: Tensor, b: Tensor, magnitude: Option<Magnitude>, place: &Placement) -> Result<Adapter> {
        self.used.store(true, Ordering::Relaxed);
        let put = |t: Tensor| t.contiguous()?.to_dtype(place.activations())?.to_device(&place.device);
        let magnitude = match magnitude {
            Some(Magnitude::Columns(m)) => Some(Magnitude::Columns(put(m)?)),
            Some(Magnitude::Rows(m)) => Some(Magnitude::Rows(put(m)?)),
            None => None,
        };
        Ok(Adapter { a: put(a)?, b: put(b)?, magnitude, tied: self.convention == Convention::Mlx })
    }
}
