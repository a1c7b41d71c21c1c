//! The running step as an architecture sees it: the layers with their memories, and the ops that know where each token stands in its
//! sequence. Nothing here tells how many sequences there are, nor how long they have become.

use crate::{
    Conv1d, Rope, Tensor,
    abi::{At, AttendSpec, BlockChoiceSpec, Handle, SpecRef},
    cache::Places,
    tensor::Call,
};

/// How [`Layer::attend`] scores keys. Only `scale` has no default.
#[derive(Default)]
pub struct Attend<'a> {
    /// Multiplies q·k; usually `head_dim` to the power of -1/2.
    pub scale: f32,
    /// Keys seen, counting the query's own; `None` for all.
    pub window: Option<usize>,
    /// Keys are seen from the last multiple of this on.
    pub chunk: Option<usize>,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// One logit per query head that joins the softmax and is dropped. <https://arxiv.org/abs/2309.17453>
    pub sinks: Option<&'a Tensor>,
    /// The only keys that are seen, as [`Layer::index`] or [`Layer::index_blocks`] chose them.
    pub selection: Option<&'a Tensor>,
    /// Tokens of a block, where the selection names blocks.
    pub selection_block: Option<usize>,
    /// Which blocks of keys are seen.
    pub blocks: Option<SparseBlocks>,
    /// ALiBi: `[heads]`, by how much a score falls for each position between query and key. <https://arxiv.org/abs/2108.12409>
    pub slopes: Option<&'a Tensor>,
    /// Keys that share the softmax and stand for many tokens each.
    pub pooled: Option<Pooled<'a>>,
}

/// Keys beside a layer's own, one for every few tokens: what remains of those that the window has left behind. They join a memory that
/// [`Cache::pooled`](crate::Cache::pooled) declares, and are seen from the last of their tokens on, whatever the window.
/// <https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash>
pub struct Pooled<'a> {
    /// `[tokens, kv_heads, d]`; the rows of tokens that end a window count, as [`Layer::pool`] gives them.
    pub keys: &'a Tensor,
    /// `[tokens, kv_heads, e]`; without, a key's first lanes are its value, as in [`Layer::attend_latent`].
    pub values: Option<&'a Tensor>,
    /// The only ones that are seen, as [`Layer::index`] over pooled keys chose them.
    pub selection: Option<&'a Tensor>,
}

/// How [`Layer::index_blocks`] chooses.
#[derive(Debug, Clone, Copy)]
pub struct BlockChoice {
    /// Tokens of a block; the first one starts at position 0.
    pub size: usize,
    /// Blocks chosen.
    pub count: usize,
    /// Of these, the last so many, counting the query's own, whatever their scores.
    pub local: usize,
}

/// Block-sparse attention: a query sees the last blocks and, further back, every `stride`-th one, each head others.
/// <https://arxiv.org/abs/2407.19775>
#[derive(Debug, Clone, Copy)]
pub struct SparseBlocks {
    /// Tokens of a block.
    pub size: usize,
    /// Blocks seen, counting the query's own.
    pub local: usize,
    /// Head h also sees block j where `(j + h + 1) mod stride == 0`.
    pub stride: usize,
}

/// One call of the model. Positions, masks and caches are the host's.
pub struct Step {
    pub(crate) places: Places,
}

impl Step {
    /// The layers, in the order of [`Model::caches`](crate::Model::caches). Thread: step.
    pub fn layers(&mut self) -> impl Iterator<Item = Layer> + use<> {
        let places = self.places.clone();
        (0..places.layers()).map(move |index| Layer { places: places.clone(), index, attended: 0, recurred: 0 })
    }

    /// Where each token stands in its sequence, from 0: ids `[tokens]`, for learned position embeddings and arithmetic. Thread: step.
    #[track_caller]
    pub fn positions(&self) -> Tensor {
        positions()
    }

    /// Ids `[tokens]` of the n-grams that end at each token: `Σ id(t - i) * base^i mod modulus` over i < n, with 0 before the start.
    /// Thread: step.
    #[track_caller]
    pub fn ngrams(&self, tokens: &Tensor, n: usize, base: usize, modulus: usize) -> Tensor {
        let call = Call::current();
        let ngrams = call.ops.ngrams();
        Tensor::own(ngrams(call.ctx, tokens.handle(), n as u64, base as u64, modulus as u64, At::caller()))
    }
}

#[track_caller]
fn positions() -> Tensor {
    let call = Call::current();
    Tensor::own(call.ops.positions()(call.ctx, At::caller()))
}

/// One layer of the running step. Its stateful ops take the layer's memories one after the other, as declared.
pub struct Layer {
    places: Places,
    index: usize,
    attended: usize,
    recurred: usize,
}

impl Layer {
    fn next_keys(&mut self) -> u32 {
        self.attended += 1;
        self.places.place(self.index, false, self.attended - 1)
    }

    fn next_pooled(&mut self, how: &Attend) -> Option<u32> {
        how.pooled.as_ref().map(|_| self.next_keys())
    }

    pub(crate) fn next_state(&mut self) -> u32 {
        self.recurred += 1;
        self.places.place(self.index, true, self.recurred - 1)
    }

    /// Where each token stands in its sequence, from 0: ids `[tokens]`. Thread: step.
    #[track_caller]
    pub fn positions(&self) -> Tensor {
        positions()
    }

    /// Turns x `[tokens, heads, head_dim]` by each token's position. Thread: step.
    #[track_caller]
    pub fn rotate(&mut self, rope: &Rope, x: Tensor) -> Tensor {
        let call = Call::current();
        Tensor::own(call.ops.rotate()(call.ctx, rope.slot, x.handle(), rope.flags, At::caller()))
    }

    /// Softmax attention of q `[tokens, heads, d]` over all keys so far; k `[tokens, kv_heads, d]` and v `[tokens, kv_heads, e]` join the
    /// cache first. Grouped heads share keys. Gives `[tokens, heads, e]`. Thread: step.
    #[track_caller]
    pub fn attend(&mut self, q: Tensor, k: Tensor, v: Tensor, how: &Attend) -> Tensor {
        let (cache, pooled) = (self.next_keys(), self.next_pooled(how));
        attend(cache, pooled, q, [k.handle(), v.handle()], 0, how)
    }

    /// Attention where the first `lanes` lanes of a key are its value, as in MLA over latents: k `[tokens, kv_heads, d]` alone joins the
    /// cache. Gives `[tokens, heads, lanes]`. Thread: step.
    #[track_caller]
    pub fn attend_latent(&mut self, q: Tensor, k: Tensor, lanes: usize, how: &Attend) -> Tensor {
        let (cache, pooled) = (self.next_keys(), self.next_pooled(how));
        attend(cache, pooled, q, [k.handle(), Handle::NONE], lanes, how)
    }

    /// Attention over the keys and values of another layer (from 0, and earlier in this step): those of its first `attend`. Thread: step.
    #[track_caller]
    pub fn attend_to(&mut self, layer: usize, q: Tensor, how: &Attend) -> Tensor {
        let (cache, pooled) = (self.places.place(layer, false, 0), self.next_pooled(how));
        attend(cache, pooled, q, [Handle::NONE; 2], 0, how)
    }

    /// The `count` keys worth attending to, by an indexer of its own: q `[tokens, heads, d]`, k `[tokens, 1, d]` (which joins a key cache
    /// of this layer), weights `[tokens, heads]`; a key's score is `Σ weight * relu(q·k)` over the heads. Gives what
    /// [`Attend::selection`] takes. <https://arxiv.org/abs/2512.02556>. Thread: step.
    #[track_caller]
    pub fn index(&mut self, q: Tensor, k: Tensor, weights: Tensor, count: usize) -> Tensor {
        let (call, cache) = (Call::current(), self.next_keys());
        let index = call.ops.index();
        Tensor::own(index(call.ctx, cache, q.handle(), k.handle(), weights.handle(), count as u64, At::caller()))
    }

    /// The blocks of keys worth attending to, by an indexer whose heads choose apart: q `[tokens, heads, d]`, k `[tokens, 1, d]` (which
    /// joins a key cache of this layer); a block's score is the largest q·k of its keys. Gives what [`Attend::selection`] takes beside
    /// [`Attend::selection_block`], `[tokens, heads, count]`; each of these heads stands for a group of query heads, in their order.
    /// <https://arxiv.org/abs/2502.11089>. Thread: step.
    #[track_caller]
    pub fn index_blocks(&mut self, q: Tensor, k: Tensor, choice: BlockChoice) -> Tensor {
        let (call, cache, BlockChoice { size, count, local }) = (Call::current(), self.next_keys(), choice);
        let (block, count, local) = (size as u64, count as u64, local as u64);
        let spec = BlockChoiceSpec { flags: 0, reserved: 0, block, count, local };
        let index_blocks = call.ops.index_blocks();
        Tensor::own(index_blocks(call.ctx, cache, q.handle(), k.handle(), SpecRef::new(&spec), At::caller()))
    }

    /// x `[tokens, channels]`, each channel folded with its kernel over the tokens up to its own. Needs [`Conv1d::cache`]. Thread: step.
    #[track_caller]
    pub fn conv1d(&mut self, conv: &Conv1d, x: &Tensor) -> Tensor {
        let (call, cache) = (Call::current(), self.next_state());
        Tensor::own(call.ops.conv1d()(call.ctx, conv.slot, cache, x.handle(), At::caller()))
    }
}

macro_rules! recurrences {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),*);)*) => {
        impl Layer {
            $($(#[$doc])* #[doc = "Thread: step."] #[track_caller] pub fn $name(&mut self $(, $arg: &Tensor)*) -> Tensor {
                let (call, cache) = (Call::current(), self.next_state());
                Tensor::own(call.ops.$name()(call.ctx, cache $(, $arg.handle())*, At::caller()))
            })*
        }
    };
}

recurrences! {
    /// x `[tokens, dim]` -> each token's predecessor, 0 before a sequence's first. State `[1, dim]`.
    shift(x);
    /// The state space dual of Mamba 2: x `[tokens, heads, d]`, dt `[tokens, heads]`, a `[heads]` (negative), b and c `[tokens, groups, n]` ->
    /// `[tokens, heads, d]` by `h = exp(dt a) h + dt x bᵀ`, `y = h c`. State `[heads, d, n]`. <https://arxiv.org/abs/2405.21060>
    ssd(x, dt, a, b, c);
    /// The selective scan of Mamba 1: x and dt `[tokens, d]`, a `[d, n]` (negative), b and c `[tokens, n]` -> `[tokens, d]` by
    /// `h = exp(dt a) h + dt x bᵀ`, `y = h c`. State `[d, n]`. <https://arxiv.org/abs/2312.00752>
    selective_scan(x, dt, a, b, c);
    /// The gated delta rule: q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g (log decay) `[tokens, heads]` or
    /// `[tokens, heads, d]`, beta `[tokens, heads]` -> `[tokens, heads, e]` by `S = exp(g) S`, `S += k (beta (v - kᵀ S))ᵀ`, `y = qᵀ S`. Grouped heads
    /// share q and k. State `[heads, d, e]`. <https://arxiv.org/abs/2412.06464>
    gated_delta(q, k, v, g, beta);
    /// Linear attention with decay: q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g (log decay) `[heads]`, `[tokens, heads]` or
    /// `[tokens, heads, d]` -> `[tokens, heads, e]` by `S = exp(g) S + k vᵀ`, `y = qᵀ S`. State `[heads, d, e]`. <https://arxiv.org/abs/2312.06635>
    linear_attention(q, k, v, g);
    /// RWKV 7, all `[tokens, heads, d]`, w the log decay: `S = S diag(exp(w)) + (S a) bᵀ + v kᵀ`, `y = S r`. State `[heads, d, d]`.
    /// <https://arxiv.org/abs/2503.14456>
    wkv7(r, w, k, v, a, b);
    /// The real-gated linear recurrent unit: x and log_a `[tokens, dim]` -> `[tokens, dim]` by `h = a h + √(1 - a²) x`, with `h = x` at a
    /// sequence's first token. State `[dim]`. <https://arxiv.org/abs/2402.19427>
    rg_lru(x, log_a);
    /// Windows of `rate` tokens, each made one entry: x and gate `[tokens, n * d]`, bias `[rate, n * d]` -> `[tokens, d]`, in the row of a
    /// window's last token `Σ softmax(gate + bias) x`, lane by lane over the window's tokens, elsewhere 0. With n > 1 entries overlap: the
    /// last d lanes of a token count for its own window, those before them for the next one, and so on. State
    /// [`Cache::pooling`](crate::Cache::pooling)`(n, d)`. <https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash>
    pool(x, gate, bias);
}

#[track_caller]
fn attend(cache: u32, pooled: Option<u32>, q: Tensor, [k, v]: [Handle; 2], value_lanes: usize, how: &Attend) -> Tensor {
    let call = Call::current();
    let blocks = how.blocks.unwrap_or(SparseBlocks { size: 0, local: 0, stride: 0 });
    let handle = |tensor: Option<&Tensor>| tensor.map_or(Handle::NONE, Tensor::handle);
    let pools = how.pooled.as_ref();
    let spec = AttendSpec {
        flags: 0,
        scale: how.scale,
        softcap: how.softcap.unwrap_or(0.0),
        reserved: 0,
        window: how.window.unwrap_or(0) as u64,
        sinks: handle(how.sinks),
        selection: handle(how.selection),
        chunk: how.chunk.unwrap_or(0) as u64,
        value_lanes: value_lanes as u64,
        block: blocks.size as u64,
        local_blocks: blocks.local as u64,
        stride: blocks.stride as u64,
        selection_block: how.selection_block.unwrap_or(0) as u64,
        slopes: handle(how.slopes),
        pooled_cache: pooled.map_or(0, |cache| cache as u64 + 1),
        pooled_keys: handle(pools.map(|p| p.keys)),
        pooled_values: handle(pools.and_then(|p| p.values)),
        pooled_selection: handle(pools.and_then(|p| p.selection)),
    };
    Tensor::own(call.ops.attend()(call.ctx, cache, q.handle(), k, v, SpecRef::new(&spec), At::caller()))
}
