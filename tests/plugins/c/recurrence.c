// A recurrence of the author's own beside the built-in op that computes the same: a llama whose attention is the real-gated linear recurrent
// unit, over the lanes of its queries. `by_scan` in config.json picks which. https://arxiv.org/abs/2402.19427
//
//     h = a h + sqrt(1 - a^2) x,  a = exp(-softplus(x));  h = x at a sequence's first token

#define LLAMA_IS_A_PART
#include "llama.c"

typedef struct recurrence {
    llama base;
    int by_scan;
} recurrence;

static void new_recurrence(dylm *d, dylm_model *model)
{
    uint64_t width = dylm_config_u64(d, "num_attention_heads", 1, 100, DYLM_REQUIRED);
    width *= dylm_config_u64(d, "head_dim", 1, 1000, DYLM_REQUIRED);
    new_model(d, model);
    if (dylm_failed(d)) return;
    recurrence *r = (recurrence *)realloc(model->data, sizeof *r);
    if (!r) {
        dylm_error(d, DYLM_ERROR_CONFIG, "out of memory");
        return;
    }
    model->data = r;
    r->by_scan = dylm_config_bool(d, "by_scan", 2);
    for (uint32_t i = 0; i < r->base.layers; i++) r->base.caches[i] = dylm_state_cache(&width, 1);
}

static void step(dylm *d, void *data, const dylm_tensor *states, const dylm_tensor *now, dylm_tensor *out)
{
    dylm_tensor x = now[0], a = dylm_exp(d, now[1]), later = dylm_clamp(d, now[2], 0, 1);
    dylm_tensor fresh = dylm_mul(d, dylm_sqrt(d, dylm_affine(d, dylm_square(d, a), -1, 1)), x);
    dylm_tensor blended = dylm_add(d, dylm_mul(d, states[0], a), fresh);
    dylm_tensor first = dylm_mul(d, x, dylm_affine(d, later, -1, 1));
    ++*(int *)data;
    out[0] = dylm_add(d, dylm_mul(d, blended, later), first);
    out[1] = out[0];
}

static dylm_tensor mix(dylm *d, const recurrence *r, uint32_t i, dylm_tensor x)
{
    const block *b = &r->base.blocks[i];
    dylm_tensor log_a, inputs[3];
    int tokens = 0;
    x = dylm_linear(d, b->q, x);
    log_a = dylm_neg(d, dylm_softplus(d, x));
    if (!r->by_scan) return dylm_linear(d, b->o, dylm_rg_lru(d, i, x, log_a));
    inputs[0] = x;
    inputs[1] = log_a;
    inputs[2] = dylm_positions(d);
    x = dylm_scan_with(d, &i, 1, inputs, 3, step, &tokens);
    if (!tokens) return dylm_fail(d, "no token was stepped through");
    return dylm_linear(d, b->o, x);
}

static dylm_tensor recur(dylm *d, const void *data, dylm_tensor tokens)
{
    const recurrence *r = (const recurrence *)data;
    dylm_tensor x = dylm_embed(d, r->base.embed, tokens);
    for (uint32_t i = 0; i < r->base.layers; i++) {
        const block *b = &r->base.blocks[i];
        dylm_tensor h = dylm_add(d, x, mix(d, r, i, dylm_norm(d, b->attention_norm, x)));
        x = dylm_keep(d, dylm_add(d, h, swiglu(d, b, dylm_norm(d, b->mlp_norm, h))));
    }
    return dylm_norm(d, r->base.norm, x);
}

// llama.c's own, which these take the place of.
dylm_tensor (*const llama_forward)(dylm *d, const void *data, dylm_tensor tokens) = forward;

DYLM_PLUGIN(new_recurrence, recur, head, drop, "recurrence in C", "0.1.0", "MIT", "", "recurrence_c");
