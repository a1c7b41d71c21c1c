//! OPT, <https://arxiv.org/abs/2205.01068>, and BioGPT, <https://doi.org/10.1093/bib/bbac409>: learned positions that start at row 2.
//!
//! ```text
//! x = s · E[token] Win + P[position + 2]           Win, and Wout below, in OPT 350M alone
//! h = x + Attention(LayerNorm(x))                  per layer; OPT 350M: h = LayerNorm(x + Attention(x)), and so on
//! y = h + act(LayerNorm(h) W₁ + b₁) · W₂ + b₂
//! logits = LayerNorm(y) Wout · Eᵀ
//!
//! Attention(x) = softmax((x Wq) · (x Wk)ᵀ / √d) · (x Wv) · Wo
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize,
        hidden_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        // The first of each pair is BioGPT's.
        intermediate_size: usize = 4 * hidden_size,
        ffn_dim: usize = intermediate_size,
        hidden_act: Activation = if model_type == "opt" { Activation::Relu } else { Activation::Gelu },
        activation_function: Activation = hidden_act,
        max_position_embeddings: usize = if model_type == "opt" { 2048 } else { 1024 },
        word_embed_proj_dim: usize = hidden_size,
        do_layer_norm_before: bool = true,
        _remove_final_layer_norm: bool = false,
        enable_bias: bool = true,
        layer_norm_elementwise_affine: bool = true,
        scale_embedding: bool = model_type != "opt",
        tie_word_embeddings: bool = true,
    }
}

/// Both programs leave the norms' epsilon to PyTorch.
const EPSILON: f32 = 1e-5;
/// Rows before that of position 0: a padding token's, as fairseq counts.
const FIRST_POSITION: usize = 2;

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        match self.layer_norm_elementwise_affine {
            true => w.layer_norm(name, self.hidden_size, EPSILON, true),
            false => LayerNorm::plain(self.hidden_size, EPSILON),
        }
    }
}

struct Layers {
    self_attn: SelfAttention,
    self_attn_layer_norm: LayerNorm,
    mlp: Mlp,
    final_layer_norm: LayerNorm,
    norm_first: bool,
}

impl Layers {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, bias, attention) = (c.hidden_size, c.enable_bias, w.at("self_attn"));
        let qkv = attention.linears(dim, bias, [("q_proj", dim), ("k_proj", dim), ("v_proj", dim)]);
        let out_proj = attention.linear("out_proj", dim, dim, bias);
        Self {
            self_attn: SelfAttention::of(qkv, out_proj, dim / c.num_attention_heads),
            self_attn_layer_norm: c.norm(w, "self_attn_layer_norm"),
            mlp: Mlp::new(w, ["fc1", "fc2"], dim, c.ffn_dim, bias, c.activation_function),
            final_layer_norm: c.norm(w, "final_layer_norm"),
            norm_first: c.do_layer_norm_before,
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (norm_1, norm_2) = (&self.self_attn_layer_norm, &self.final_layer_norm);
        if self.norm_first {
            let h = x + self.self_attn.forward(&norm_1.forward(x), layer);
            return &h + self.mlp.forward(&norm_2.forward(&h));
        }
        let h = norm_1.forward(&(x + self.self_attn.forward(x, layer)));
        norm_2.forward(&(&h + self.mlp.forward(&h)))
    }
}

struct Opt {
    embed_tokens: Embedding,
    embed_positions: Embedding,
    project_in: Option<Linear>,
    layers: Vec<Layers>,
    final_layer_norm: Option<LayerNorm>,
    project_out: Option<Linear>,
    lm_head: LmHead,
    embed_scale: f32,
}

impl Architecture for Opt {
    const MODEL_TYPES: &'static [&'static str] = &["opt", "biogpt"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (dim, narrow, is_opt) = (c.hidden_size, c.word_embed_proj_dim, c.model_type == "opt");
        // Checkpoints from before transformers 4 lack the first part.
        let prefixes = if is_opt { ["model.decoder", "decoder"] } else { ["biogpt", ""] };
        let prefix = prefixes.into_iter().find(|p| w.at(p).has("embed_tokens.weight")).unwrap_or(prefixes[0]);
        let model = w.at(prefix);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, narrow);
        let positions = c.max_position_embeddings;
        let rows = model.source("embed_positions.weight").rows(FIRST_POSITION..FIRST_POSITION + positions);
        let projects = narrow != dim;
        let (head, last_norm) =
            if is_opt { ("lm_head", "final_layer_norm") } else { ("output_projection", "layer_norm") };
        let has_last_norm = c.do_layer_norm_before && !c._remove_final_layer_norm;
        Ok(Self {
            embed_positions: Embedding::of(rows, positions, dim),
            project_in: projects.then(|| model.linear("project_in", narrow, dim, false)),
            layers: model.at("layers").each(c.num_hidden_layers, |w, _| Ok(Layers::new(&c, w)))?,
            final_layer_norm: has_last_norm.then(|| c.norm(&model, last_norm)),
            project_out: projects.then(|| model.linear("project_out", dim, narrow, false)),
            lm_head: LmHead::named(w, head, &embed_tokens, c.vocab_size, narrow, Some(c.tie_word_embeddings)),
            embed_tokens,
            embed_scale: if c.scale_embedding { (dim as f32).sqrt() } else { 1.0 },
        })
    }
}

impl Model for Opt {
    fn caches(&self) -> Vec<Cache> {
        vec![Cache::key_value(None); self.layers.len()]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let x = self.embed_tokens.forward(tokens) * self.embed_scale;
        let x = self.project_in.as_ref().map_or_else(|| x.clone(), |proj| proj.forward(&x));
        let x = x + self.embed_positions.forward(&step.positions());
        let y = step.through(&self.layers, x, Layers::forward);
        let y = self.final_layer_norm.as_ref().map_or_else(|| y.clone(), |norm| norm.forward(&y));
        self.project_out.as_ref().map_or_else(|| y.clone(), |proj| proj.forward(&y))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }
}

export_plugin!(Opt, examples = ["../../tests/fixtures/tiny/opt/config.json"]);
