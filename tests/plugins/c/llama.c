// LLaMA in plain C; it compiles as C++ too. https://arxiv.org/abs/2302.13971
//
//     h = x + Attention(RMSNorm(x))            per layer
//     y = h + SwiGLU(RMSNorm(h))
//     logits = RMSNorm(y) E^T
//
//     Attention(x) = softmax(rope(x Wq) rope(x Wk)^T / sqrt(d)) (x Wv) Wo
//     SwiGLU(x) = (silu(x Wgate) * (x Wup)) Wdown

#include "dylm.h"
#include <math.h>
#include <stdlib.h>

typedef struct block {
    dylm_layer attention_norm, q, k, v, o, mlp_norm, gate, up, down;
} block;

typedef struct llama {
    uint64_t head_dim;
    uint32_t layers;
    int tied;
    dylm_layer embed, rope, norm, lm_head;
    block *blocks;
    dylm_cache_spec *caches;
} llama;

static void drop(void *data)
{
    llama *m = (llama *)data;
    free(m->blocks);
    free(m->caches);
    free(m);
}

static void new_model(dylm *d, dylm_model *model)
{
    uint64_t vocab = dylm_config_u64(d, "vocab_size", 1, DYLM_LARGEST, DYLM_REQUIRED);
    uint64_t dim = dylm_config_u64(d, "hidden_size", 1, DYLM_LARGEST, DYLM_REQUIRED);
    uint64_t hidden = dylm_config_u64(d, "intermediate_size", 1, DYLM_LARGEST, DYLM_REQUIRED);
    uint64_t layers = dylm_config_u64(d, "num_hidden_layers", 1, 10000, DYLM_REQUIRED);
    uint64_t heads = dylm_config_u64(d, "num_attention_heads", 1, 10000, DYLM_REQUIRED);
    uint64_t kv_heads = dylm_config_u64(d, "num_key_value_heads", 1, 10000, heads);
    uint64_t head_dim = dylm_config_u64(d, "head_dim", 1, DYLM_LARGEST, dim / heads);
    double eps = dylm_config_f64(d, "rms_norm_eps", NAN);
    int bias = dylm_config_bool(d, "attention_bias", 0), mlp_bias = dylm_config_bool(d, "mlp_bias", 0);
    const char *act = dylm_config_text(d, "hidden_act", "silu");
    dylm_weights whole = dylm_whole(d), w = dylm_below(&whole, "model");
    llama *m = (llama *)calloc(1, sizeof *m);
    if (!(model->data = m)) {
        dylm_error(d, DYLM_ERROR_CONFIG, "out of memory");
        return;
    }
    if (strcmp(act, "silu") != 0) dylm_error(d, DYLM_ERROR_CONFIG, "config.json: hidden_act is %s, it should be silu", act);
    m->blocks = (block *)calloc(layers, sizeof *m->blocks);
    m->caches = (dylm_cache_spec *)calloc(layers, sizeof *m->caches);
    if (!m->blocks || !m->caches) dylm_error(d, DYLM_ERROR_CONFIG, "out of memory for %u layers", (unsigned)layers);
    if (dylm_failed(d)) return;

    m->layers = (uint32_t)layers;
    m->head_dim = head_dim;
    m->embed = dylm_embedding_in(&w, "embed_tokens", vocab, dim);
    m->rope = dylm_rope_layer(d, head_dim, dylm_config_f64(d, "rope_theta", 10000.0), dylm_config_json(d, "rope_scaling"));
    m->norm = dylm_rms_norm_in(&w, "norm", dim, eps);
    m->tied = dylm_config_bool(d, "tie_word_embeddings", !dylm_has_in(&whole, "lm_head.weight"));
    if (m->tied) dylm_ignore_in(&whole, "lm_head.");
    else m->lm_head = dylm_linear_in(&whole, "lm_head", dim, vocab, 0);
    for (uint32_t i = 0; i < m->layers; i++) {
        dylm_weights l = dylm_below(&w, "layers.%u", i), attn = dylm_below(&l, "self_attn"), mlp = dylm_below(&l, "mlp");
        block *b = &m->blocks[i];
        b->attention_norm = dylm_rms_norm_in(&l, "input_layernorm", dim, eps);
        b->q = dylm_linear_in(&attn, "q_proj", dim, heads * head_dim, bias);
        b->k = dylm_linear_in(&attn, "k_proj", dim, kv_heads * head_dim, bias);
        b->v = dylm_linear_in(&attn, "v_proj", dim, kv_heads * head_dim, bias);
        b->o = dylm_linear_in(&attn, "o_proj", heads * head_dim, dim, bias);
        b->mlp_norm = dylm_rms_norm_in(&l, "post_attention_layernorm", dim, eps);
        b->gate = dylm_linear_in(&mlp, "gate_proj", dim, hidden, mlp_bias);
        b->up = dylm_linear_in(&mlp, "up_proj", dim, hidden, mlp_bias);
        b->down = dylm_linear_in(&mlp, "down_proj", hidden, dim, mlp_bias);
        m->caches[i] = dylm_key_value_cache(0);
    }
    model->caches = m->caches;
    model->cache_count = layers;
}

static dylm_tensor attention(dylm *d, const llama *m, uint32_t i, dylm_tensor x)
{
    const block *b = &m->blocks[i];
    dylm_tensor q = dylm_rotate(d, m->rope, dylm_split_heads(d, dylm_linear(d, b->q, x), m->head_dim), 0);
    dylm_tensor k = dylm_rotate(d, m->rope, dylm_split_heads(d, dylm_linear(d, b->k, x), m->head_dim), 0);
    dylm_tensor v = dylm_split_heads(d, dylm_linear(d, b->v, x), m->head_dim);
    dylm_attend_spec how = dylm_attend_scaled(powf((float)m->head_dim, -0.5f));
    return dylm_linear(d, b->o, dylm_merge_heads(d, dylm_attend(d, i, q, k, v, &how)));
}

static dylm_tensor swiglu(dylm *d, const block *b, dylm_tensor x)
{
    return dylm_linear(d, b->down, dylm_swiglu(d, dylm_linear(d, b->gate, x), dylm_linear(d, b->up, x)));
}

static dylm_tensor forward(dylm *d, const void *data, dylm_tensor tokens)
{
    const llama *m = (const llama *)data;
    dylm_tensor x = dylm_embed(d, m->embed, tokens);
    for (uint32_t i = 0; i < m->layers; i++) {
        const block *b = &m->blocks[i];
        dylm_tensor h = dylm_add(d, x, attention(d, m, i, dylm_norm(d, b->attention_norm, x)));
        x = dylm_keep(d, dylm_add(d, h, swiglu(d, b, dylm_norm(d, b->mlp_norm, h))));
    }
    return dylm_norm(d, m->norm, x);
}

static dylm_tensor head(dylm *d, const void *data, dylm_tensor hidden)
{
    const llama *m = (const llama *)data;
    return m->tied ? dylm_unembed(d, m->embed, hidden) : dylm_linear(d, m->lm_head, hidden);
}

#ifndef LLAMA_IS_A_PART // of another plugin, which has an entry of its own
// What `dylm check` tries it with.
DYLM_EXAMPLE(example, {"model_type": "llama_c", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-5})

DYLM_PLUGIN_WITH(example, new_model, forward, head, drop, "llama in C", "0.1.0", "MIT OR Apache-2.0", "", "llama_c");
#endif
