//! The op tables themselves: one `extern "C"` function for each op, between the handles outside and the values inside. What happens around
//! every one of them is `call`'s; whose call it is `lending` tells.

use super::{
    call::{build, run, with_running},
    noting::{Argument, Word},
    scanning::scan,
    value::{Outcome, Value, fault},
};
use crate::{layers::experts::Activation, plugin::extension};
use abi_stable::{
    StableAbi,
    prefix_type::PrefixTypeTrait,
    std_types::{RSlice, RStr},
    type_layout::TypeLayout,
};
use plugin_api::abi::{
    At, Ctx, Handle, Pair, Slot, SourceId, SpecRef,
    ops::{OpsRef, newer, oldest},
    root::Host,
};
use std::{
    mem::transmute,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

/// Declares the functions and collects them into the table, so that an op is written in one place.
macro_rules! implement {
    (
        build { $($bname:ident($($barg:ident: $bty:ty),*) $(-> $bret:ty)?: $otherwise:expr, |$b:ident| $bbody:expr;)* }
        slots { $($sname:ident($sslot:ident $(, $sarg:ident: $sty:ty)*): |$s:ident| $sbody:expr;)* }
        run { $($rname:ident($($rarg:ident: $rty:ty),*): |$r:ident| $rbody:expr;)* }
        unary { $($uname:ident: |$ux:ident| $ubody:expr;)* }
        binary { $($zname:ident: |$za:ident, $zb:ident| $zbody:expr;)* }
    ) => {
        $(extern "C" fn $bname(ctx: Ctx, $($barg: $bty,)* at: At) $(-> $bret)? { build(ctx, stringify!($bname), $otherwise, at, |$b| $bbody) })*
        $(extern "C" fn $sname(ctx: Ctx, $sslot: Slot, $($sarg: $sty,)* at: At) -> Handle { run(ctx, stringify!($sname), Some($sslot), at, |_said| { $($sarg.say(_said);)* }, |$s| $sbody) })*
        $(extern "C" fn $rname(ctx: Ctx, $($rarg: $rty,)* at: At) -> Handle { run(ctx, stringify!($rname), None, at, |_said| { $($rarg.say(_said);)* }, |$r| $rbody) })*
        $(extern "C" fn $uname(ctx: Ctx, x: Handle, at: At) -> Handle {
            run(ctx, stringify!($uname), None, at, |said| x.say(said), |r| {
                if let Some(y) = r.row_later(stringify!($uname), x, None)? {
                    return Ok(y);
                }
                let $ux = r.arena.look(x)?;
                $ubody
            })
        })*
        $(extern "C" fn $zname(ctx: Ctx, a: Handle, b: Handle, at: At) -> Handle {
            run(ctx, stringify!($zname), None, at, |said| [a, b].iter().for_each(|x| x.say(said)), |r| {
                if let Some(y) = r.row_later(stringify!($zname), a, Some(b))? {
                    return Ok(y);
                }
                let ($za, $zb) = (r.arena.look(a)?, r.arena.look(b)?);
                $zbody
            })
        })*
    };
}

implement! {
    build {
        has(name: RStr<'_>) -> u8: 0, |b| b.has(&name).into();
        source(name: RStr<'_>) -> SourceId: SourceId::NONE, |b| b.source(&name);
        transform(source: SourceId, kind: u32, ints: RSlice<'_, u64>, factor: f64) -> SourceId: SourceId::NONE,
            |b| b.transform(source, kind, ints.as_slice(), factor);
        stack(sources: RSlice<'_, SourceId>) -> SourceId: SourceId::NONE, |b| b.stack(sources.as_slice());
        join(sources: RSlice<'_, SourceId>, axis: u64) -> SourceId: SourceId::NONE, |b| b.join(sources.as_slice(), axis);
        ignore(prefix: RStr<'_>): (), |b| b.ignored.push(prefix.as_str().to_owned());
        complain(message: RStr<'_>): (), |b| b.complain(message.as_str().to_owned());
        linear_layer(weight: SourceId, bias: SourceId, inputs: u64, outputs: u64) -> Slot: Slot(u32::MAX),
            |b| b.linear_layer(weight, bias, inputs, outputs);
        fuse(slots: RSlice<'_, Slot>): (), |b| b.together.push(slots.to_vec());
        embedding_layer(weight: SourceId, vocab: u64, dim: u64) -> Slot: Slot(u32::MAX), |b| b.embedding_layer(weight, vocab, dim);
        norm_layer(kind: u32, weight: SourceId, bias: SourceId, dim: u64, eps: f64) -> Slot: Slot(u32::MAX),
            |b| b.norm_layer(kind, weight, bias, dim, eps);
        experts_layer(prefix: RStr<'_>, spec: SpecRef<'_>) -> Slot: Slot(u32::MAX), |b| b.experts_layer(&prefix, spec);
        experts_from(sources: RSlice<'_, SourceId>, spec: SpecRef<'_>) -> Slot: Slot(u32::MAX), |b| b.experts_from(sources.as_slice(), spec);
        multi_linear_layer(weight: SourceId, bias: SourceId, heads: u64, inputs: u64, outputs: u64) -> Slot: Slot(u32::MAX),
            |b| b.multi_linear_layer(weight, bias, heads, inputs, outputs);
        conv1d_layer(weight: SourceId, bias: SourceId, channels: u64, kernel: u64) -> Slot: Slot(u32::MAX),
            |b| b.conv1d_layer(weight, bias, channels, kernel);
        parameter_layer(source: SourceId, dims: RSlice<'_, u64>) -> Slot: Slot(u32::MAX), |b| b.parameter_layer(source, dims.as_slice());
        rope_layer(dims: u64, base: f64, scaling: RStr<'_>) -> Slot: Slot(u32::MAX), |b| b.rope_layer(dims, base, &scaling);
        has_shape(name: RStr<'_>, dims: RSlice<'_, u64>) -> u8: 0, |b| b.has_shape(&name, dims.as_slice()).into();
        numbers(values: RSlice<'_, f32>) -> SourceId: SourceId::NONE, |b| b.numbers(values.as_slice());
    }
    slots {
        embed(slot, tokens: Handle): |r| r.embed(slot, tokens);
        unembed(slot, x: Handle): |r| r.unembed(slot, x);
        linear(slot, x: Handle): |r| r.linear(slot, x);
        norm(slot, x: Handle): |r| r.norm(slot, x);
        experts(slot, x: Handle, chosen: Handle, weights: Handle): |r| r.experts(slot, x, chosen, weights);
        multi_linear(slot, x: Handle): |r| r.multi_linear(slot, x);
        conv1d(slot, cache: u32, x: Handle): |r| r.conv1d(slot, cache, x);
        parameter(slot): |r| r.parameter(slot);
        rotate(slot, x: Handle, flags: u32): |r| r.rotate(slot, x, flags);
    }
    run {
        fail(message: RStr<'_>): |_r| Err(fault!("{message}"));
        attend(cache: u32, q: Handle, k: Handle, v: Handle, spec: SpecRef<'_>): |r| r.attend(cache, q, k, v, spec);
        positions(): |r| r.positions();
        ngrams(tokens: Handle, n: u64, base: u64, modulus: u64): |r| r.ngrams(tokens, n, base, modulus);
        index(cache: u32, q: Handle, k: Handle, weights: Handle, count: u64): |r| r.index(cache, q, k, weights, count as usize);
        index_blocks(cache: u32, q: Handle, k: Handle, spec: SpecRef<'_>): |r| r.index_blocks(cache, q, k, spec);
        shift(cache: u32, x: Handle): |r| r.shift(cache, x);
        ssd(cache: u32, x: Handle, dt: Handle, a: Handle, b: Handle, c: Handle): |r| r.ssd(cache, [x, dt, a, b, c]);
        selective_scan(cache: u32, x: Handle, dt: Handle, a: Handle, b: Handle, c: Handle): |r| r.selective_scan(cache, [x, dt, a, b, c]);
        gated_delta(cache: u32, q: Handle, k: Handle, v: Handle, g: Handle, beta: Handle): |r| r.gated_delta(cache, [q, k, v, g, beta]);
        linear_attention(cache: u32, q: Handle, k: Handle, v: Handle, g: Handle): |r| r.linear_attention(cache, [q, k, v, g]);
        wkv7(cache: u32, r: Handle, w: Handle, k: Handle, v: Handle, a: Handle, b: Handle): |run| run.wkv7(cache, [r, w, k, v, a, b]);
        rg_lru(cache: u32, x: Handle, log_a: Handle): |r| r.rg_lru(cache, [x, log_a]);
        pool(cache: u32, x: Handle, gate: Handle, bias: Handle): |r| r.pool(cache, [x, gate, bias]);
        sinkhorn(x: Handle, rounds: u64, eps: f64): |r| r.arena.look(x)?.sinkhorn(rounds, eps);
        top_mask(x: Handle, k: u64): |r| r.arena.look(x)?.top_mask(k as usize);
        split_heads(x: Handle, head_dim: u64): |r| r.arena.look(x)?.split_heads(head_dim as usize);
        narrow(x: Handle, start: u64, len: u64): |r| r.arena.look(x)?.narrow(start as usize, len as usize);
        concat(parts: RSlice<'_, Handle>): |r| {
            Value::concat(&parts.iter().map(|&p| r.arena.get(p)).collect::<Outcome<Vec<_>>>()?)
        };
        swiglu(gate: Handle, up: Handle): |r| r.gate(gate, up, Activation::Swiglu);
        geglu(gate: Handle, up: Handle): |r| r.gate(gate, up, Activation::Geglu);
        unflatten(x: Handle, n: u64): |r| r.arena.look(x)?.unflatten(n as usize);
        affine(x: Handle, scale: f64, offset: f64): |r| r.affine(x, scale, offset);
        add(a: Handle, b: Handle): |r| r.add(a, b);
        clamp(x: Handle, low: f64, high: f64): |r| r.arena.look(x)?.map(|x| x.clamp(low, high));
    }
    unary {
        merge_heads: |x| x.merge_heads();
        flatten: |x| x.flatten();
        transpose: |x| x.transpose();
        neg: |x| x.map(|x| x.neg());
        floor: |x| x.map(|x| x.floor());
        round: |x| x.round();
        abs: |x| x.map(|x| x.abs());
        exp: |x| x.map(|x| x.exp());
        log: |x| x.map(|x| x.log());
        sqrt: |x| x.map(|x| x.sqrt());
        rsqrt: |x| x.map(|x| x.sqrt()?.recip());
        square: |x| x.map(|x| x.sqr());
        sigmoid: |x| x.map(candle_nn::ops::sigmoid);
        tanh: |x| x.map(|x| x.tanh());
        relu: |x| x.map(|x| x.relu());
        silu: |x| x.map(|x| x.silu());
        gelu: |x| x.map(|x| x.gelu_erf());
        gelu_tanh: |x| x.map(|x| x.gelu());
        softplus: |x| x.softplus();
        softmax: |x| x.softmax();
        sum: |x| x.fold(|x| x.sum_keepdim(candle_core::D::Minus1));
        mean: |x| x.fold(|x| x.mean_keepdim(candle_core::D::Minus1));
        max: |x| x.fold(|x| x.max_keepdim(candle_core::D::Minus1));
    }
    binary {
        sub: |a, b| a.zip(b, |a, b| a.broadcast_sub(b));
        mul: |a, b| a.zip(b, |a, b| a.broadcast_mul(b));
        div: |a, b| a.zip(b, |a, b| a.broadcast_div(b));
        maximum: |a, b| a.zip(b, |a, b| a.broadcast_maximum(b));
        minimum: |a, b| a.zip(b, |a, b| a.broadcast_minimum(b));
        greater: |a, b| a.greater(b);
        matmul: |a, b| a.matmul(b);
        gather: |a, b| a.gather(b);
    }
}

extern "C" fn retain(ctx: Ctx, x: Handle, at: At) -> Handle {
    with_running(ctx, "retain", at, |running| running.arena.retain(x));
    x
}

extern "C" fn release(ctx: Ctx, x: Handle, at: At) {
    with_running(ctx, "release", at, |running| running.arena.release(x));
}

extern "C" fn topk(ctx: Ctx, x: Handle, k: u64, at: At) -> Pair {
    let mut indices = Err(fault!("no indices"));
    let said = |said: &mut Vec<Word>| (x.say(said), k.say(said)).0;
    let first = run(ctx, "topk", None, at, said, |r| {
        let (values, chosen) = r.topk(x, k as usize)?;
        indices = Ok(chosen);
        Ok(values)
    });
    // That this is the second of the two is one word more.
    let again = |words: &mut Vec<Word>| (said(words), 1u64.say(words)).0;
    let second = run(ctx, "topk", None, at, again, |r| match indices {
        Ok(chosen) => Ok(chosen),
        // The values say what went wrong.
        Err(_) => r.arena.get(first).and_then(|v| v.dims().map(|_| v.clone())),
    });
    Pair { first, second }
}

/// Every op into its table, in a module of tables; after the oldest ones what came later, table by table.
macro_rules! tables {
    ($($module:ident)::+, build { $($build:tt)* } layers { $($layers:tt)* } tensors { $($tensors:tt)* }) => {{
        use plugin_api::abi::$($module)::+::{BuildOps, LayerOps, Ops, OpsRef, TensorOps};
        static TABLES: OnceLock<OpsRef> = OnceLock::new();
        *TABLES.get_or_init(|| {
            let build = BuildOps {
                has, source, transform, stack, ignore, join, complain, linear_layer, fuse, embedding_layer, norm_layer,
                experts_layer, experts_from, multi_linear_layer, conv1d_layer, parameter_layer, rope_layer, has_shape, numbers,
                $($build)*
            };
            let layers = LayerOps {
                embed, unembed, linear, norm, experts, multi_linear, parameter, rotate, positions, ngrams, attend, index,
                conv1d, shift, ssd, selective_scan, gated_delta, linear_attention, wkv7, rg_lru, scan, index_blocks, pool,
                $($layers)*
            };
            let tensors = TensorOps {
                retain, release, fail, split_heads, merge_heads, narrow, concat, unflatten, flatten, transpose, add, sub,
                mul, div, maximum, minimum, greater, affine, clamp, matmul, neg, floor, round, abs, exp, log, sqrt, rsqrt,
                square, sigmoid, tanh, relu, silu, gelu, gelu_tanh, softplus, swiglu, geglu, softmax, sum, mean, max, topk,
                top_mask, gather, sinkhorn,
                $($tensors)*
            };
            let (build, layers) = (build.leak_into_prefix(), layers.leak_into_prefix());
            Ops { build, layers, tensors: tensors.leak_into_prefix() }.leak_into_prefix()
        })
    }};
}

fn ops() -> OpsRef {
    tables!(ops, build {} layers {} tensors {})
}

/// Which of its ops this process serves: for the tests of plugins that are older or newer than their host.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// All of them.
    Today,
    /// Those of ABI 1.0.
    Oldest,
    /// Two more, as a later dylm will.
    Newer,
}

static TABLES: AtomicU8 = AtomicU8::new(Tables::Today as u8);

/// From here on this process, all threads of it, serves these tables.
#[doc(hidden)]
pub fn play_host(tables: Tables) {
    TABLES.store(tables as u8, Ordering::SeqCst);
}

fn played() -> Tables {
    [Tables::Today, Tables::Oldest, Tables::Newer][TABLES.load(Ordering::Relaxed) as usize]
}

/// The names of the ops that a plugin may need.
pub fn names() -> &'static [&'static str] {
    match played() {
        Tables::Today => plugin_api::abi::ops::NAMES,
        Tables::Oldest => oldest::NAMES,
        Tables::Newer => newer::NAMES,
    }
}

/// What every call of a plugin gets to see of the host.
pub fn host() -> Host {
    let (ops, layout) = tables_of(played());
    Host { ops, layout, extension: extension::of_host }
}

fn tables_of(tables: Tables) -> (OpsRef, &'static TypeLayout) {
    match tables {
        Tables::Today => (ops(), <OpsRef as StableAbi>::LAYOUT),
        Tables::Oldest => {
            let tables = tables!(ops::oldest, build {} layers {} tensors {});
            // SAFETY: both are pointers to tables that begin alike; how long they are their headers say, and the accessors of later ops look.
            let ops = unsafe { transmute::<oldest::OpsRef, OpsRef>(tables) };
            (ops, <oldest::OpsRef as StableAbi>::LAYOUT)
        }
        Tables::Newer => {
            let tables = tables!(ops::newer, build { later_has: has } layers {} tensors { later_neg: neg });
            // SAFETY: as above.
            let ops = unsafe { transmute::<newer::OpsRef, OpsRef>(tables) };
            (ops, <newer::OpsRef as StableAbi>::LAYOUT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_op_is_the_same_function_in_the_table_of_every_minor() {
        let today = ops().addresses();
        assert!(today.iter().all(|(_, function)| !function.is_null()));
        for tables in [Tables::Oldest, Tables::Newer] {
            // What a plugin of any age calls is today's implementation: no minor has a body of its own that could stay behind.
            let theirs = tables_of(tables).0.addresses();
            assert_eq!(theirs, today, "{tables:?}");
        }
        // The same for ops under a new name: the test's own later ones are those that they repeat.
        let newer = tables!(ops::newer, build { later_has: has } layers {} tensors { later_neg: neg });
        let at = |name: &str| newer.addresses().into_iter().find(|(op, _)| *op == name).map(|(_, function)| function);
        assert_eq!(at("later_neg"), at("neg"));
        assert_eq!(at("later_has"), at("has"));
    }
}
