//! Attention in a compiled step: what the plugin asked for, and its queries over each sequence's own keys, of which the newest join first.

use super::{
    Input, Kernel,
    lower::{Lowered, Lowering, Said},
};
use crate::{
    cache::memory::Memory,
    kernels::cpu::{
        Attend, attend_apart,
        attention::{Blocks, Keys},
    },
    ops::noting::{Noted, Word},
};
use candle_core::{Result, bail};
use plugin_api::abi::{AttendSpec, Handle};

/// An attention.
pub(super) struct Attending {
    cache: usize,
    heads: usize,
    dim: usize,
    /// What the cache holds of a token: `[heads, dim]` of keys and of values.
    shape: [usize; 4],
    /// Whether keys, and values, join the cache.
    joins: [bool; 2],
    sinks: bool,
    slopes: bool,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    chunk: Option<usize>,
    blocks: Option<Blocks>,
    /// The first so many lanes of a key are its value.
    lanes: Option<usize>,
}

impl Lowering {
    pub(super) fn attend(&mut self, noted: &Noted, said: &Said) -> Lowered<()> {
        let Some(&Word::Attend(spec)) = noted.said.get(4) else { return Err("attend of an unknown kind".into()) };
        let AttendSpec { selection, pooled_cache, flags, .. } = spec;
        if selection != Handle::NONE || pooled_cache != 0 || flags != 0 {
            return Err("attend to chosen or pooled keys has no kernel here".into());
        }
        let &[_, heads, dim] = self.dims(said, 1)? else { return Err("attend without heads".into()) };
        let (cache, mut reads) = (said.count(0)?, vec![self.input(said, 1)?]);
        let joins = [said.tensor(2)?, said.tensor(3)?].map(|handle| handle != Handle::NONE);
        for (i, _) in joins.iter().enumerate().filter(|(_, joins)| **joins) {
            reads.push(self.input(said, 2 + i)?);
        }
        for handle in [spec.sinks, spec.slopes].into_iter().filter(|handle| *handle != Handle::NONE) {
            reads.push(self.find(handle)?.made.ok_or("sinks of ids")?);
        }
        let shape = *self.shapes.get(&(cache as u32)).ok_or("attend to a cache that this step does not feed")?;
        let some = |n: u64| (n > 0).then_some(n as usize);
        let attending = Attending {
            cache,
            heads,
            dim,
            shape,
            joins,
            sinks: spec.sinks != Handle::NONE,
            slopes: spec.slopes != Handle::NONE,
            scale: spec.scale,
            softcap: (spec.softcap > 0.0).then_some(spec.softcap),
            window: some(spec.window),
            chunk: some(spec.chunk),
            blocks: some(spec.block).map(|size| Blocks {
                size,
                local: spec.local_blocks as usize,
                stride: spec.stride as usize,
            }),
            lanes: some(spec.value_lanes),
        };
        self.step(noted, Kernel::Attend(Box::new(attending)), reads);
        Ok(())
    }
}

impl Attending {
    pub(super) fn run<'b>(
        &self,
        inputs: &mut [Input],
        reads: &dyn Fn(usize) -> &'b [f32],
        out: &mut [f32],
    ) -> Result<()> {
        let [kv_heads, k_dim, _, stored] = self.shape;
        let e = self.lanes.unwrap_or(stored);
        let mut next = 0;
        let mut given = |there: bool| {
            next += usize::from(there);
            there.then(|| reads(next))
        };
        let (k, v) = (given(self.joins[0]), given(self.joins[1]));
        let (sinks, slopes) = (given(self.sinks), given(self.slopes));
        let rows = |x: &'b [f32], width: usize, i: usize| &x[i * width..(i + 1) * width];
        let (mut all, mut at) = (Vec::with_capacity(inputs.len()), Vec::with_capacity(inputs.len()));
        for (i, Input { state, .. }) in inputs.iter_mut().enumerate() {
            let Some(kv) = state.layers.get_mut(self.cache).and_then(Memory::key_value_mut) else {
                bail!("cache {} holds no keys and values", self.cache)
            };
            if let Some(k) = k {
                let v = v.map_or(&[][..], |v| rows(v, kv_heads * stored, i));
                kv.append(rows(k, kv_heads * k_dim, i), v, state.offset, 1);
            }
            let sight = kv.sight(self.window, self.chunk);
            let how = Attend {
                scale: self.scale,
                softcap: self.softcap,
                window: sight.window,
                keep: sight.keep,
                chunk: sight.chunk,
                sinks,
                selection: None,
                blocks: self.blocks,
                slopes,
            };
            let (Some(keys), Some(values)) = (kv.keys.rows(), kv.values.rows()) else {
                bail!("the cache is not on the cpu")
            };
            let values = self.lanes.is_none().then_some(values);
            all.push((keys, values, &kv.positions[..], how));
            at.push(state.offset as u32);
        }
        let caches: Vec<Keys> =
            all.iter().map(|&(keys, values, positions, ref how)| Keys { keys, values, positions, how }).collect();
        attend_apart(reads(0), self.heads, self.dim, &at, &caches, kv_heads, e, out);
        Ok(())
    }
}
