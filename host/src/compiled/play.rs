//! The kernels of a compiled step, one after the other. A buffer that is written is taken out of the list meanwhile, so that the others can
//! be read.

use super::{Compiled, Kernel, Step, Whole, maps};
use crate::{
    cache::memory::Memory,
    kernels::cpu::{self, Angles, multiply_all},
    layers::{Layer, experts::Activation, rope::Span, slices::with_f32, weight::Weight},
    model::{Input, Model},
    ops::value::{Fault, Value},
    weights::plan::Wanted,
};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use plugin_api::abi::Slot;

impl Compiled {
    /// Logits of the tokens `ids`, one of each sequence; these join the sequences' caches.
    pub(super) fn play(&mut self, model: &Model, inputs: &mut [Input], ids: &[u32]) -> Result<Vec<Vec<f32>>> {
        let span = |i: &Input| Span { offset: i.state.offset, len: 1, horizon: i.state.horizon };
        let spans: Vec<Span> = inputs.iter().map(span).collect();
        let mut angles = Vec::with_capacity(self.angles.len());
        for &(slot, block) in &self.angles {
            let Some(Wanted::Rope(rope)) = model.wanted.get(slot.0 as usize) else { bail!("a rope that is gone") };
            angles.push(rope.angles(&spans, block));
        }
        for input in inputs.iter_mut() {
            for (&cache, &shape) in &self.shapes {
                if let Some(kv) = input.state.layers.get_mut(cache as usize).and_then(Memory::key_value_mut) {
                    kv.shaped(shape)?;
                }
            }
        }
        for step in &self.steps {
            let mut out: Vec<Vec<f32>> = step.writes.iter().map(|&w| std::mem::take(&mut self.buffers[w])).collect();
            let reads = |i: usize| self.buffers[step.reads[i]].as_slice();
            let done = step.run(model, inputs, ids, &angles, &reads, &mut out);
            step.writes.iter().zip(out).for_each(|(&w, out)| self.buffers[w] = out);
            done?;
        }
        let logits = &self.buffers[self.logits];
        Ok(logits.chunks_exact(logits.len() / ids.len()).map(<[f32]>::to_vec).collect())
    }
}

impl Step {
    fn run<'b>(
        &self,
        model: &Model,
        inputs: &mut [Input],
        ids: &[u32],
        angles: &[Vec<Angles>],
        reads: &dyn Fn(usize) -> &'b [f32],
        outs: &mut [Vec<f32>],
    ) -> Result<()> {
        let Some(out) = outs.first_mut() else { return Ok(()) };
        match &self.kernel {
            Kernel::Gather(slot) => {
                let numbers = |x: &[f32]| x.iter().map(|&x| x as u32).collect::<Vec<_>>();
                let read = (!self.reads.is_empty()).then(|| numbers(reads(0)));
                let ids = read.as_deref().unwrap_or(ids);
                match weight(model, *slot)? {
                    (w, _) if ids.iter().any(|&id| id as usize >= w.rows()) => {
                        bail!("an id beyond an embedding of {}", w.rows())
                    }
                    (Weight::Packed(m), _) => m.gather_rows(ids, out),
                    (Weight::Panels(m), _) => m.gather_rows(ids, out),
                    (Weight::Coded(m), _) => m.gather_rows(ids, out),
                    _ => bail!("an embedding that moved"),
                }
            }
            Kernel::Positions => out.iter_mut().zip(inputs).for_each(|(out, i)| *out = i.state.offset as f32),
            Kernel::Products(slots) => {
                let mut products = Vec::with_capacity(slots.len());
                for (&slot, out) in slots.iter().zip(outs.iter_mut()) {
                    let Some(factor) = weight(model, slot)?.0.factor() else { bail!("a weight that moved") };
                    products.push((factor, out.as_mut_slice()));
                }
                multiply_all(products, reads(0));
                for (&slot, out) in slots.iter().zip(outs) {
                    if let (_, Some(bias)) = weight(model, slot)? {
                        let bias = bias.to_dtype(DType::F32)?;
                        with_f32(&bias, |bias| {
                            out.chunks_exact_mut(bias.len())
                                .for_each(|out| out.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
                        })?;
                    }
                }
            }
            Kernel::Norm { weight, bias, eps, dim, centred } => {
                let (weight, bias) = (weight.as_deref(), bias.as_deref());
                match centred {
                    true => cpu::layer_norm(reads(0), weight, bias, *eps, *dim, out),
                    false => cpu::rms_norm(reads(0), weight, *eps, *dim, out),
                }
            }
            Kernel::Rotate { angles: set, heads, dim, turn } => {
                out.copy_from_slice(reads(0));
                for (row, angles) in out.chunks_exact_mut(heads * dim).zip(&angles[*set]) {
                    angles.rotate(row, *heads, *dim, *turn);
                }
            }
            Kernel::Attend(how) => how.run(inputs, reads, out)?,
            Kernel::Gate(Activation::Geglu) => cpu::gelu_tanh_mul(reads(0), reads(1), out),
            Kernel::Gate(_) => cpu::silu_mul(reads(0), reads(1), out),
            Kernel::Map(map) => map.run(reads(0), out),
            Kernel::Zip(f, spread) => maps::zip(*f, [reads(0), reads(1)], spread, out),
            Kernel::Narrow { of, start, len } => {
                let rows = reads(0).chunks_exact(*of).zip(out.chunks_exact_mut(*len));
                rows.for_each(|(x, out)| out.copy_from_slice(&x[*start..start + len]));
            }
            Kernel::Join(widths) => {
                let (all, mut start) = (widths.iter().sum::<usize>(), 0);
                for (i, &width) in widths.iter().enumerate() {
                    let rows = out.chunks_exact_mut(all).zip(reads(i).chunks_exact(width));
                    rows.for_each(|(out, x)| out[start..start + width].copy_from_slice(x));
                    start += width;
                }
            }
            Kernel::Largest { of, k } => {
                let (values, indices) = outs.split_at_mut(1);
                let mut indices = indices.first_mut().map(|indices| indices.chunks_exact_mut(*k));
                for (row, values) in reads(0).chunks_exact(*of).zip(values[0].chunks_exact_mut(*k)) {
                    let chosen = cpu::largest(row, *k);
                    values.iter_mut().zip(&chosen).for_each(|(value, &i)| *value = row[i as usize]);
                    if let Some(indices) = indices.as_mut().and_then(Iterator::next) {
                        indices.iter_mut().zip(&chosen).for_each(|(index, &i)| *index = i as f32);
                    }
                }
            }
            Kernel::Recur(how) => how.run(model, inputs, reads, out)?,
            Kernel::Whole(op, dims) => {
                let tensor = |(i, dims): (usize, &Vec<usize>)| Tensor::from_slice(reads(i), &dims[..], &Device::Cpu);
                let read = dims.iter().enumerate().map(tensor).collect::<Result<Vec<_>>>()?;
                let y = op.run(model, &read)?.to_dtype(DType::F32)?;
                with_f32(&y, |y| out.copy_from_slice(y))?;
            }
        }
        Ok(())
    }
}

impl Whole {
    fn run(self, model: &Model, read: &[Tensor]) -> Result<Tensor> {
        let [x, others @ ..] = read else { bail!("an op of nothing") };
        let x = Value::Real(x.clone());
        let made = match (self, others) {
            (Whole::Softmax, _) => x.softmax(),
            (Whole::Softplus, _) => x.softplus(),
            (Whole::Round, _) => x.round(),
            (Whole::Sum, _) => x.fold(|x| x.sum_keepdim(D::Minus1)),
            (Whole::Mean, _) => x.fold(|x| x.mean_keepdim(D::Minus1)),
            (Whole::Max, _) => x.fold(|x| x.max_keepdim(D::Minus1)),
            (Whole::TopMask(k), _) => x.top_mask(k),
            (Whole::Taken, [indices, ..]) => x.gather(&Value::Real(indices.clone())),
            (Whole::MultiLinear(slot), _) => match (model.layers.get(slot.0 as usize), &x) {
                (Some(Layer::MultiLinear(l)), Value::Real(x)) => return l.forward(x),
                _ => bail!("this layer is not linear by heads"),
            },
            (Whole::Experts(slot), [chosen, weights]) => match (model.layers.get(slot.0 as usize), &x) {
                (Some(Layer::Experts(e)), Value::Real(x)) => return e.forward(x, chosen, weights),
                _ => bail!("this layer has no experts"),
            },
            _ => bail!("an op without its inputs"),
        };
        match made {
            Ok(Value::Real(y)) => Ok(y),
            Err(Fault::New(why)) => bail!("{why}"),
            _ => bail!("an op gave nothing"),
        }
    }
}

/// The matrix of a layer, and its bias.
fn weight(model: &Model, slot: Slot) -> Result<(&Weight, Option<&Tensor>)> {
    match model.layers.get(slot.0 as usize) {
        Some(Layer::Linear(l)) => Ok((&l.weight, l.bias.as_ref())),
        Some(Layer::Embedding(e)) => Ok((&e.weight, None)),
        _ => bail!("a layer that is not loaded"),
    }
}
