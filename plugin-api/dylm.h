// dylm.h: model architectures for dylm in plain C, or in any language that reads C headers. C99, or C++11.
//
// Written by `cargo run -p tests --bin c-header` from plugin-api's op tables; a test holds it to them.
//
// A plugin is one dynamic library. It says which keys of config.json it reads, which tensors a checkpoint has, and in which order ops run.
// Files, dtypes, quantization, devices, positions, masks, caches, batching and sampling are the host's. A whole plugin is
// tests/plugins/c/llama.c; its parts:
//
//     static void new_model(dylm *d, dylm_model *model)                 // reads keys, names tensors, fills model->data and model->caches
//     static dylm_tensor forward(dylm *d, const void *data, dylm_tensor tokens)     // ids [tokens] -> hidden [tokens, dim]
//     static dylm_tensor head(dylm *d, const void *data, dylm_tensor hidden)        // hidden [rows, dim] -> logits [rows, vocab]
//     static void drop(void *data)                                      // frees what new_model allocated
//     DYLM_PLUGIN(new_model, forward, head, drop, "mine", "0.1.0", "MIT", "https://example.org", "my_model_type", "an_alias")
//
//     cc -std=c99 -O2 -fPIC -shared -o libmine.so mine.c -lm            // on macOS: -o libmine.dylib
//     dylm plugins --plugins .                                          // lists it, from its note, without opening it
//     dylm generate --plugins . --model ./a-checkpoint --prompt "Hello"
//
// Shapes. Hidden states are [tokens, dim]: the new tokens of all sequences of the step, one after the other, without padding. A plugin never
// states a batch size or a length. Layers and ops say their shapes below.
//
// Errors stick. An op that fails gives a failed tensor, later ops pass it on, and dylm reports the first failure with the op, the tensor's
// name and your file and line. The same holds for config.json: after a wrong key the readers go on with a harmless value, and new_model
// fails when it returns. So nothing needs to be checked on the way, save before a long loop (dylm_failed) and your own allocations.
//
// Memory. No allocation crosses: what you pass is copied before the call returns, what you are given you do not free. Tensors belong to the
// step. All that were made since the last dylm_keep are released by the next one, or when forward returns; dylm_keep at the end of each
// block so keeps memory at that of one block. A tensor that must live longer is given another owner with dylm_retain.
//
// Threads. new_model runs once, on any thread. forward and head run on one thread at a time for one model and are never re-entered. Ops may
// be called on that thread, while that call runs, with the `d` of that call; anywhere else they do nothing, and the call fails. drop runs on
// any thread, last. Several models may live at once: keep no globals.
//
// The replay contract. forward is a function of shapes: it reads no values, no clock, no file; for equal numbers of tokens it calls equal
// ops in equal order. dylm may record it once and play it back.
//
// Crashes. C has no panics that dylm could catch: a pointer to nowhere ends the process. `dylm check libmine.so` tries a plugin in processes
// of its own.
//
// Versions. DYLM_MAJOR is in the name of the exported symbol: another major finds no plugin. Within a major number tables only grow at their
// ends, structs that ops take grow at their ends and read 0 for what you did not know, and the structs dylm_plugin and dylm_model are frozen.
// So a library built today works with every later dylm of this major. Ops that came after 1.0 leave their names in the library's file when
// you call them, and a dylm that lacks one says so before it opens the library. With `if (dylm_have_NAME(d)) .. else ..` you can do without
// NAME. (Only Microsoft's compiler leaves no names: there list them before you include this: #define DYLM_NEEDS "\"NAME\", \"OTHER\"".)
#ifndef DYLM_H
#define DYLM_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
#define DYLM_BEGIN_C extern "C" {
#define DYLM_END_C }
#define DYLM_ASSERT(claim) static_assert(claim, #claim)
#else
#define DYLM_BEGIN_C
#define DYLM_END_C
// Before C11 there is no other way to say it.
#define DYLM_ASSERT_NAMED(claim, line) typedef char dylm_assert_##line[(claim) ? 1 : -1]
#define DYLM_ASSERT_AT(claim, line) DYLM_ASSERT_NAMED(claim, line)
#define DYLM_ASSERT(claim) DYLM_ASSERT_AT(claim, __LINE__)
#endif

#if defined(_WIN32)
#define DYLM_EXPORT __declspec(dllexport)
#elif defined(__GNUC__)
#define DYLM_EXPORT __attribute__((visibility("default")))
#else
#define DYLM_EXPORT
#endif

#if defined(__GNUC__)
#define DYLM_PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#else
#define DYLM_PRINTF(text, first)
#endif

#define DYLM_MAJOR 1
#define DYLM_MINOR 0

DYLM_BEGIN_C

// ---- what crosses: first the values ----

/// A tensor of the running step. `id` 0 is none.
typedef struct dylm_tensor { uint64_t id; } dylm_tensor;
/// Something with weights that the host built for this model: a linear layer, a norm, a rope table. Valid as long as the model.
typedef struct dylm_layer { uint32_t id; } dylm_layer;
/// A stored tensor, by name, with the transforms still to be applied. Valid while the model is being built. `id` 0 is none.
typedef struct dylm_stored { uint32_t id; } dylm_stored;
/// Two tensors, from an op that makes two.
typedef struct dylm_pair { dylm_tensor first, second; } dylm_pair;

/// Borrowed text in UTF-8.
typedef struct dylm_text { const char *start; size_t len; } dylm_text;
/// Borrowed entries.
typedef struct dylm_list { const void *start; size_t len; } dylm_list;
/// A borrowed struct that grows at its end: its size, as you were compiled, and where it lies.
typedef struct dylm_lent { uint64_t size; const void *start; } dylm_lent;
/// Where in the plugin's source an op was called, for error texts.
typedef struct dylm_at { dylm_text file; uint32_t line; } dylm_at;
/// Two tensors as they cross: plain numbers, since not every calling convention treats a struct of one number as the number.
typedef struct dylm_raw_pair { uint64_t first, second; } dylm_raw_pair;

/// One token's step of a recurrence, which scan calls back; dylm_scan_with makes one of a function with less to look after.
typedef struct dylm_scan_step {
    void *data;
    /// The states before a token and its rows of the inputs (both lists of tensors), all of which are yours from then on, -> 1 and in `out`
    /// the states after it and a row of the result, which are the host's from then on; or 0.
    uint8_t (*run)(void *data, dylm_list states, dylm_list now, dylm_list out);
} dylm_scan_step;

/// The configuration does not make sense to the architecture.
#define DYLM_ERROR_CONFIG 1u
/// The plugin panicked; the message has the panic's text and place.
#define DYLM_ERROR_PANIC 2u
/// Host and plugin do not fit.
#define DYLM_ERROR_ABI 3u
/// `down(silu(gate x) * up x)`
#define DYLM_EXPERTS_SWIGLU 0u
/// `down(gelu_tanh(gate x) * up x)`
#define DYLM_EXPERTS_GEGLU 1u
/// `down(g sigmoid(alpha g) * (u + 1))`, g = gate x up to `limit`, u = up x within ± `limit`
#define DYLM_EXPERTS_CLAMPED_SWIGLU 2u
/// `down(min(silu(gate x), limit) * clamp(up x, ± limit))`
#define DYLM_EXPERTS_LIMITED_SWIGLU 3u
/// `down(relu(up x)²)`, no gate
#define DYLM_EXPERTS_RELU2 4u
/// `down(gelu_tanh(up x))`, no gate
#define DYLM_EXPERTS_GELU_TANH 5u
/// `down(silu(up x))`, no gate
#define DYLM_EXPERTS_SILU 6u
/// `down(alpha tanh(g / alpha) sigmoid(g) * limit tanh(u / limit))`, g = gate x, u = up x; with `limit` 0, u as it is
#define DYLM_EXPERTS_SITU 7u
/// `down(silu(g) * u)`, g = gate x up to `limit`, u = up x within ± `limit`
#define DYLM_EXPERTS_BOUNDED_SWIGLU 8u
/// Every projection has a bias.
#define DYLM_EXPERTS_WITH_BIAS 1u
/// The router's weight multiplies an expert's input, not its output.
#define DYLM_EXPERTS_WITH_SCALED_INPUT 2u
/// Where gate and up are stored as one tensor, their rows take turns.
#define DYLM_EXPERTS_IN_TURNS 4u
/// Normalize by the root mean square.
#define DYLM_NORM_RMS 0u
/// Normalize by mean and variance.
#define DYLM_NORM_LAYER 1u
/// Rows `ints[0]..ints[1]` of the first axis.
#define DYLM_TRANSFORM_ROWS 0u
/// Adds `factor` to every element.
#define DYLM_TRANSFORM_PLUS 1u
/// Multiplies every element by `factor`.
#define DYLM_TRANSFORM_SCALE 2u
/// Exchanges the last two axes.
#define DYLM_TRANSFORM_TRANSPOSE 3u
/// The same elements in the shape `ints`.
#define DYLM_TRANSFORM_RESHAPE 4u
/// Entries `ints[1]..ints[2]` of axis `ints[0]`.
#define DYLM_TRANSFORM_NARROW 5u
/// Entries `ints[1]`, `ints[1] + ints[2]`, `ints[1] + 2 ints[2]` .. of axis `ints[0]`.
#define DYLM_TRANSFORM_EVERY 6u
/// Each row (last axis) divided by its Euclidean length, which counts as `factor` at least.
#define DYLM_TRANSFORM_UNIT_ROWS 7u
/// Keys and values.
#define DYLM_CACHE_KEY_VALUE 0u
/// Numbers of a fixed shape, 0 at first, that every step replaces: what a recurrence or a convolution carries on.
#define DYLM_CACHE_STATE 1u
/// Keys and values of which each stands for `dims[0]` tokens: of the rows that an op brings, only those of tokens that end such a window
/// stay, at that token's position.
#define DYLM_CACHE_POOLED 2u
/// `window` is a chunk: keys before the last multiple of it never matter.
#define DYLM_CACHE_IN_CHUNKS 1u

/// What one layer must remember between steps. Frozen: models hand these over as a list, whose stride both sides must agree on. A later
/// kind of memory gets a number and finds room in `dims`.
typedef struct dylm_cache_spec {
    /// One of the `DYLM_CACHE_*` constants.
    uint32_t kind;
    /// `DYLM_CACHE_IN_CHUNKS`, or 0.
    uint32_t flags;
    /// Keys that ever matter, counting the query's own; 0 for all.
    uint64_t window;
    /// The shape of a state, up to the first 0; of pooled keys their rate, then 0; 0 elsewhere.
    uint64_t dims[6];
} dylm_cache_spec;
DYLM_ASSERT(sizeof(dylm_cache_spec) == 64);

/// How `attend` scores and which keys it sees.
typedef struct dylm_attend_spec {
    /// 1 sees later tokens of the same step too (a bidirectional block); 0 is causal.
    uint32_t flags;
    /// Multiplies q·k.
    float scale;
    /// `softcap * tanh(score / softcap)`; 0 for none.
    float softcap;
    /// 0.
    uint32_t reserved;
    /// Keys seen, counting the query's own; 0 for all.
    uint64_t window;
    /// One logit per query head that joins the softmax and is dropped; none if no tensor.
    dylm_tensor sinks;
    /// Positions `[tokens, count]` of the only keys that each query sees, as `index` gives them, or numbers `[tokens, groups, count]` of
    /// the only blocks that each group of heads sees, as `index_blocks` gives them; none if no tensor.
    dylm_tensor selection;
    /// Keys are seen from the last multiple of this on; 0 for no chunks.
    uint64_t chunk;
    /// Lanes at the start of each key that are its value, where `attend` is given no v; 0 otherwise.
    uint64_t value_lanes;
    /// Tokens of a block of block-sparse attention; 0 for dense attention.
    uint64_t block;
    /// Blocks seen, counting the query's own; the further ones only where `stride` hits.
    uint64_t local_blocks;
    /// Head h also sees block j where `(j + h + 1) mod stride == 0`.
    uint64_t stride;
    /// Tokens of a block that `selection` names; 0 where it names single keys.
    uint64_t selection_block;
    /// One number per query head, by which a score falls for each position between query and key; none if no tensor.
    dylm_tensor slopes;
    /// A cache of pooled keys that share the softmax, its number plus 1; 0 for none.
    uint64_t pooled_cache;
    /// Rows `[tokens, kv_heads, d]` that join it.
    dylm_tensor pooled_keys;
    /// Their values `[tokens, kv_heads, e]`; no tensor where a key's first `value_lanes` are its value.
    dylm_tensor pooled_values;
    /// Positions `[tokens, count]` of the only pooled keys that each query sees; none if no tensor.
    dylm_tensor pooled_selection;
} dylm_attend_spec;
DYLM_ASSERT(sizeof(dylm_attend_spec) == 128);

/// How `index_blocks` chooses.
typedef struct dylm_block_choice_spec {
    /// 0.
    uint32_t flags;
    /// 0.
    uint32_t reserved;
    /// Tokens of a block.
    uint64_t block;
    /// Blocks chosen.
    uint64_t count;
    /// Of these, the last so many, counting the query's own, whatever their scores.
    uint64_t local;
} dylm_block_choice_spec;
DYLM_ASSERT(sizeof(dylm_block_choice_spec) == 32);

/// The shape of a block of routed experts.
typedef struct dylm_experts_spec {
    /// How gate and up are joined, one of the `DYLM_EXPERTS_*` constants.
    uint32_t activation;
    /// Any of the `DYLM_EXPERTS_WITH_*` constants.
    uint32_t flags;
    /// How many experts there are.
    uint64_t experts;
    /// Width of the model.
    uint64_t dim;
    /// Width inside an expert.
    uint64_t hidden;
    /// Choices from `experts` on, so many, give back their input.
    uint64_t identity;
    /// The number in `DYLM_EXPERTS_CLAMPED_SWIGLU`, `DYLM_EXPERTS_LIMITED_SWIGLU` and `DYLM_EXPERTS_BOUNDED_SWIGLU`; 0 for none.
    float limit;
    /// The factor in `DYLM_EXPERTS_CLAMPED_SWIGLU`.
    float alpha;
} dylm_experts_spec;
DYLM_ASSERT(sizeof(dylm_experts_spec) == 48);


// ---- the op tables; call them through the words below ----

/// What a plugin asks for while it describes a model: during `create`.
typedef struct dylm_build_ops {
    uint64_t size;
    uint8_t (*has)(void *ctx, dylm_text name, dylm_at at);
    uint32_t (*source)(void *ctx, dylm_text name, dylm_at at);
    uint32_t (*transform)(void *ctx, uint32_t source, uint32_t kind, dylm_list ints, double factor, dylm_at at);
    uint32_t (*stack)(void *ctx, dylm_list sources, dylm_at at);
    void (*ignore)(void *ctx, dylm_text prefix, dylm_at at);
    uint32_t (*join)(void *ctx, dylm_list sources, uint64_t axis, dylm_at at);
    void (*complain)(void *ctx, dylm_text message, dylm_at at);
    uint32_t (*linear_layer)(void *ctx, uint32_t weight, uint32_t bias, uint64_t inputs, uint64_t outputs, dylm_at at);
    void (*fuse)(void *ctx, dylm_list slots, dylm_at at);
    uint32_t (*embedding_layer)(void *ctx, uint32_t weight, uint64_t vocab, uint64_t dim, dylm_at at);
    uint32_t (*norm_layer)(void *ctx, uint32_t kind, uint32_t weight, uint32_t bias, uint64_t dim, double eps, dylm_at at);
    uint32_t (*experts_layer)(void *ctx, dylm_text prefix, dylm_lent spec, dylm_at at);
    uint32_t (*experts_from)(void *ctx, dylm_list sources, dylm_lent spec, dylm_at at);
    uint32_t (*multi_linear_layer)(void *ctx, uint32_t weight, uint32_t bias, uint64_t heads, uint64_t inputs, uint64_t outputs, dylm_at at);
    uint32_t (*conv1d_layer)(void *ctx, uint32_t weight, uint32_t bias, uint64_t channels, uint64_t kernel, dylm_at at);
    uint32_t (*parameter_layer)(void *ctx, uint32_t source, dylm_list dims, dylm_at at);
    uint32_t (*rope_layer)(void *ctx, uint64_t dims, double base, dylm_text scaling, dylm_at at);
    uint8_t (*has_shape)(void *ctx, dylm_text name, dylm_list dims, dylm_at at);
    uint32_t (*numbers)(void *ctx, dylm_list values, dylm_at at);
} dylm_build_ops;

/// What stands on weights or on the sequence: during `forward` and `head`.
typedef struct dylm_layer_ops {
    uint64_t size;
    uint64_t (*embed)(void *ctx, uint32_t slot, uint64_t tokens, dylm_at at);
    uint64_t (*unembed)(void *ctx, uint32_t slot, uint64_t x, dylm_at at);
    uint64_t (*linear)(void *ctx, uint32_t slot, uint64_t x, dylm_at at);
    uint64_t (*norm)(void *ctx, uint32_t slot, uint64_t x, dylm_at at);
    uint64_t (*experts)(void *ctx, uint32_t slot, uint64_t x, uint64_t chosen, uint64_t weights, dylm_at at);
    uint64_t (*multi_linear)(void *ctx, uint32_t slot, uint64_t x, dylm_at at);
    uint64_t (*parameter)(void *ctx, uint32_t slot, dylm_at at);
    uint64_t (*rotate)(void *ctx, uint32_t slot, uint64_t x, uint32_t flags, dylm_at at);
    uint64_t (*positions)(void *ctx, dylm_at at);
    uint64_t (*ngrams)(void *ctx, uint64_t tokens, uint64_t n, uint64_t base, uint64_t modulus, dylm_at at);
    uint64_t (*attend)(void *ctx, uint32_t cache, uint64_t q, uint64_t k, uint64_t v, dylm_lent spec, dylm_at at);
    uint64_t (*index)(void *ctx, uint32_t cache, uint64_t q, uint64_t k, uint64_t weights, uint64_t count, dylm_at at);
    uint64_t (*conv1d)(void *ctx, uint32_t slot, uint32_t cache, uint64_t x, dylm_at at);
    uint64_t (*shift)(void *ctx, uint32_t cache, uint64_t x, dylm_at at);
    uint64_t (*ssd)(void *ctx, uint32_t cache, uint64_t x, uint64_t dt, uint64_t a, uint64_t b, uint64_t c, dylm_at at);
    uint64_t (*selective_scan)(void *ctx, uint32_t cache, uint64_t x, uint64_t dt, uint64_t a, uint64_t b, uint64_t c, dylm_at at);
    uint64_t (*gated_delta)(void *ctx, uint32_t cache, uint64_t q, uint64_t k, uint64_t v, uint64_t g, uint64_t beta, dylm_at at);
    uint64_t (*linear_attention)(void *ctx, uint32_t cache, uint64_t q, uint64_t k, uint64_t v, uint64_t g, dylm_at at);
    uint64_t (*wkv7)(void *ctx, uint32_t cache, uint64_t r, uint64_t w, uint64_t k, uint64_t v, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*rg_lru)(void *ctx, uint32_t cache, uint64_t x, uint64_t log_a, dylm_at at);
    uint64_t (*scan)(void *ctx, dylm_list caches, dylm_list inputs, dylm_scan_step step, dylm_at at);
    uint64_t (*index_blocks)(void *ctx, uint32_t cache, uint64_t q, uint64_t k, dylm_lent spec, dylm_at at);
    uint64_t (*pool)(void *ctx, uint32_t cache, uint64_t x, uint64_t gate, uint64_t bias, dylm_at at);
} dylm_layer_ops;

/// What needs only its arguments: during `forward` and `head`.
typedef struct dylm_tensor_ops {
    uint64_t size;
    uint64_t (*retain)(void *ctx, uint64_t x, dylm_at at);
    void (*release)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*fail)(void *ctx, dylm_text message, dylm_at at);
    uint64_t (*split_heads)(void *ctx, uint64_t x, uint64_t head_dim, dylm_at at);
    uint64_t (*merge_heads)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*narrow)(void *ctx, uint64_t x, uint64_t start, uint64_t len, dylm_at at);
    uint64_t (*concat)(void *ctx, dylm_list parts, dylm_at at);
    uint64_t (*unflatten)(void *ctx, uint64_t x, uint64_t n, dylm_at at);
    uint64_t (*flatten)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*transpose)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*add)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*sub)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*mul)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*div)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*maximum)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*minimum)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*greater)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*affine)(void *ctx, uint64_t x, double scale, double offset, dylm_at at);
    uint64_t (*clamp)(void *ctx, uint64_t x, double low, double high, dylm_at at);
    uint64_t (*matmul)(void *ctx, uint64_t a, uint64_t b, dylm_at at);
    uint64_t (*neg)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*floor)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*round)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*abs)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*exp)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*log)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*sqrt)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*rsqrt)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*square)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*sigmoid)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*tanh)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*relu)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*silu)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*gelu)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*gelu_tanh)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*softplus)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*swiglu)(void *ctx, uint64_t gate, uint64_t up, dylm_at at);
    uint64_t (*geglu)(void *ctx, uint64_t gate, uint64_t up, dylm_at at);
    uint64_t (*softmax)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*sum)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*mean)(void *ctx, uint64_t x, dylm_at at);
    uint64_t (*max)(void *ctx, uint64_t x, dylm_at at);
    dylm_raw_pair (*topk)(void *ctx, uint64_t x, uint64_t k, dylm_at at);
    uint64_t (*top_mask)(void *ctx, uint64_t x, uint64_t k, dylm_at at);
    uint64_t (*gather)(void *ctx, uint64_t x, uint64_t indices, dylm_at at);
    uint64_t (*sinkhorn)(void *ctx, uint64_t x, uint64_t rounds, double eps, dylm_at at);
} dylm_tensor_ops;

/// config.json's keys, during create; see the words dylm_config_*.
typedef struct dylm_config_ops {
    uint64_t size;
    uint64_t (*whole)(void *ctx, dylm_text key, uint64_t least, uint64_t most, uint64_t otherwise);
    double (*number)(void *ctx, dylm_text key, double otherwise);
    uint32_t (*flag)(void *ctx, dylm_text key, uint32_t otherwise);
    dylm_text (*text)(void *ctx, dylm_text key, dylm_text otherwise);
    dylm_text (*json)(void *ctx, dylm_text key);
    uint64_t (*count)(void *ctx, dylm_text key);
} dylm_config_ops;

/// What the host hands to every call of a plugin.
typedef struct dylm_host {
    uint64_t size;
    uint32_t major, minor;
    const dylm_build_ops *build;
    const dylm_layer_ops *layers;
    const dylm_tensor_ops *tensors;
    const dylm_config_ops *config;
    /// Says why the running call fails, with a DYLM_ERROR_* code. The first one counts.
    void (*error)(void *ctx, uint32_t code, dylm_text message);
    /// Whether `error` was called, by the plugin or by a reader of config.json: its code, or 0.
    uint32_t (*failed)(void *ctx);
    /// A named extension of the host, or NULL. Thread: any.
    const void *(*extension)(dylm_text id);
} dylm_host;

/// A model that a plugin built. Frozen.
typedef struct dylm_model {
    /// As the host knows it.
    uint64_t size;
    /// The plugin's own model.
    void *data;
    /// What each cache must remember; readable until `drop`.
    const dylm_cache_spec *caches;
    uint64_t cache_count;
    uint64_t (*forward)(const void *data, const dylm_host *host, void *ctx, uint64_t tokens);
    uint64_t (*head)(const void *data, const dylm_host *host, void *ctx, uint64_t hidden);
    void (*drop)(void *data);
    /// A named extension of the model, or NULL; the function may be NULL too.
    const void *(*extension)(const void *data, dylm_text id);
} dylm_model;

/// What a plugin exports, as `dylm_c_plugin_1`. Frozen.
typedef struct dylm_plugin {
    uint64_t size;
    /// DYLM_MAJOR, and the lowest minor version of the host that will do.
    uint32_t major, minor;
    /// The text of the note once more: one that somebody changed in the file no longer agrees with it.
    dylm_text note;
    /// Fills in `model`; gives 0, or a DYLM_ERROR_* after which the host drops nothing.
    uint32_t (*create)(const dylm_host *host, void *ctx, dylm_text config, dylm_model *model);
    /// A named extension of the factory, or NULL; the function may be NULL too. Thread: any.
    const void *(*extension)(dylm_text id);
} dylm_plugin;

DYLM_END_C

// ---- a call, as an author sees it ----

/// More tensors than a block makes; those beyond it are released when the step ends.
#ifndef DYLM_MOST_MADE
#define DYLM_MOST_MADE 256
#endif

/// One call of new_model, forward or head: the host's side, and the tensors made in it.
typedef struct dylm {
    const dylm_host *host;
    void *ctx;
    size_t made_count;
    uint64_t made[DYLM_MOST_MADE];
} dylm;

static inline dylm_text dylm_text_of(const char *text)
{
    dylm_text t;
    t.start = text;
    t.len = text ? strlen(text) : 0;
    return t;
}

static inline dylm_list dylm_list_of(const void *start, size_t len)
{
    dylm_list list;
    list.start = start;
    list.len = len;
    return list;
}

static inline dylm_lent dylm_lent_of(const void *start, size_t size)
{
    dylm_lent lent;
    lent.size = size;
    lent.start = start;
    return lent;
}

static inline dylm_at dylm_here(const char *file, size_t len, uint32_t line)
{
    dylm_at at;
    at.file.start = file;
    at.file.len = len;
    at.line = line;
    return at;
}

/// The place of a call in your source.
#define DYLM_HERE dylm_here(__FILE__, sizeof(__FILE__) - 1, __LINE__)

/// Says why this call fails, in one sentence; the first one counts.
DYLM_PRINTF(3, 4) static inline void dylm_error(dylm *d, uint32_t code, const char *format, ...)
{
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    d->host->error(d->ctx, code, dylm_text_of(text));
}

/// Whether something went wrong in this call: a DYLM_ERROR_*, or 0.
static inline uint32_t dylm_failed(dylm *d) { return d->host->failed(d->ctx); }

/// A named extension of the host, or NULL.
static inline const void *dylm_extension(dylm *d, const char *id) { return d->host->extension(dylm_text_of(id)); }

/// Whether the host's table, which may be older than this header, reaches to this op.
#define DYLM_HAS(table, type, op) ((table)->size >= offsetof(type, op) + sizeof((table)->op))

// A few bytes, the op's name, in a section of their own, which reach the file with the code that calls the op.
#if defined(__GNUC__)
#if defined(__APPLE__)
#define DYLM_STAMP_SECTION(kind, op) "__DATA,__dylm_" #kind
#elif defined(_WIN32)
#define DYLM_STAMP_needs ".dylneed"
#define DYLM_STAMP_asks ".dylasks"
#define DYLM_STAMP_SECTION(kind, op) DYLM_STAMP_##kind
#else
#define DYLM_STAMP_SECTION(kind, op) ".dylm." #kind "." #op
#endif
#define DYLM_STAMP(kind, op)                                                                        \
    static const char dylm_stamp[] __attribute__((__section__(DYLM_STAMP_SECTION(kind, op)))) = #op; \
    __asm__ volatile("" : : "r"(dylm_stamp))
#else
#define DYLM_STAMP(kind, op)
#endif

static inline void dylm_lacks(dylm *d, const char *op)
{
    dylm_error(d, DYLM_ERROR_ABI, "the plugin needs the op %s, which this dylm (ABI %u.%u) does not have; update dylm", op,
               (unsigned)d->host->major, (unsigned)d->host->minor);
}

static inline dylm_tensor dylm_made(dylm *d, uint64_t id)
{
    dylm_tensor x;
    x.id = id;
    if (d->made_count < DYLM_MOST_MADE) d->made[d->made_count++] = id;
    return x;
}

static inline void dylm_forget(dylm *d, dylm_tensor x)
{
    size_t i;
    for (i = 0; i < d->made_count; i++)
        if (d->made[i] == x.id) {
            d->made[i] = d->made[--d->made_count];
            return;
        }
}

static inline dylm_layer dylm_layer_of(uint32_t id)
{
    dylm_layer layer;
    layer.id = id;
    return layer;
}

static inline dylm_stored dylm_stored_of(uint32_t id)
{
    dylm_stored stored;
    stored.id = id;
    return stored;
}

static inline dylm_pair dylm_pair_of(dylm *d, dylm_raw_pair raw)
{
    dylm_pair pair;
    pair.first = dylm_made(d, raw.first);
    pair.second = dylm_made(d, raw.second);
    return pair;
}

/// No tensor: no sinks, no keys.
#define DYLM_NO_TENSOR dylm_no_tensor()
static inline dylm_tensor dylm_no_tensor(void)
{
    dylm_tensor none;
    none.id = 0;
    return none;
}

static inline dylm_pair dylm_no_pair(void)
{
    dylm_pair none;
    none.first = none.second = DYLM_NO_TENSOR;
    return none;
}

/// No tensor: a linear layer without bias, a norm without weight.
#define DYLM_NO_STORED dylm_stored_of(0)

// ---- the ops: each takes the call `d` first; texts end with a zero byte, lists are a pointer and a count ----

/// Whether the checkpoint has a tensor of this full name (1) or not (0).
static inline int dylm_has_at(dylm_at at, dylm *d, const char *name)
{
    return (d->host->build->has)(d->ctx, dylm_text_of(name), at);
}
#define dylm_has(d, name) dylm_has_at(DYLM_HERE, d, name)

/// The stored tensor of this full name.
static inline dylm_stored dylm_source_at(dylm_at at, dylm *d, const char *name)
{
    return dylm_stored_of((d->host->build->source)(d->ctx, dylm_text_of(name), at));
}
#define dylm_source(d, name) dylm_source_at(DYLM_HERE, d, name)

/// A `DYLM_TRANSFORM_*` of a source, applied when its bytes are read.
static inline dylm_stored dylm_transform_at(dylm_at at, dylm *d, dylm_stored source, uint32_t kind, const uint64_t *ints, size_t ints_count, double factor)
{
    return dylm_stored_of((d->host->build->transform)(d->ctx, source.id, kind, dylm_list_of(ints, ints_count), factor, at));
}
#define dylm_transform(d, source, kind, ints, ints_count, factor) dylm_transform_at(DYLM_HERE, d, source, kind, ints, ints_count, factor)

/// Sources of one shape, stacked along a new first axis.
static inline dylm_stored dylm_stack_at(dylm_at at, dylm *d, const dylm_stored *sources, size_t sources_count)
{
    return dylm_stored_of((d->host->build->stack)(d->ctx, dylm_list_of(sources, sources_count), at));
}
#define dylm_stack(d, sources, sources_count) dylm_stack_at(DYLM_HERE, d, sources, sources_count)

/// Tensors whose full name starts with this are not the architecture's concern.
static inline void dylm_ignore_at(dylm_at at, dylm *d, const char *prefix)
{
    (d->host->build->ignore)(d->ctx, dylm_text_of(prefix), at);
}
#define dylm_ignore(d, prefix) dylm_ignore_at(DYLM_HERE, d, prefix)

/// Sources joined along an axis that they have.
static inline dylm_stored dylm_join_at(dylm_at at, dylm *d, const dylm_stored *sources, size_t sources_count, uint64_t axis)
{
    return dylm_stored_of((d->host->build->join)(d->ctx, dylm_list_of(sources, sources_count), axis, at));
}
#define dylm_join(d, sources, sources_count, axis) dylm_join_at(DYLM_HERE, d, sources, sources_count, axis)

/// A failure that belongs in the report on the checkpoint.
static inline void dylm_complain_at(dylm_at at, dylm *d, const char *message)
{
    (d->host->build->complain)(d->ctx, dylm_text_of(message), at);
}
#define dylm_complain(d, message) dylm_complain_at(DYLM_HERE, d, message)

/// `x · Wᵀ + b`, W `[outputs, inputs]`, b `[outputs]`.
static inline dylm_layer dylm_linear_layer_at(dylm_at at, dylm *d, dylm_stored weight, dylm_stored bias, uint64_t inputs, uint64_t outputs)
{
    return dylm_layer_of((d->host->build->linear_layer)(d->ctx, weight.id, bias.id, inputs, outputs, at));
}
#define dylm_linear_layer(d, weight, bias, inputs, outputs) dylm_linear_layer_at(DYLM_HERE, d, weight, bias, inputs, outputs)

/// Linear layers that read one input; the host may run them as one.
static inline void dylm_fuse_at(dylm_at at, dylm *d, const dylm_layer *slots, size_t slots_count)
{
    (d->host->build->fuse)(d->ctx, dylm_list_of(slots, slots_count), at);
}
#define dylm_fuse(d, slots, slots_count) dylm_fuse_at(DYLM_HERE, d, slots, slots_count)

/// A table `[vocab, dim]`.
static inline dylm_layer dylm_embedding_layer_at(dylm_at at, dylm *d, dylm_stored weight, uint64_t vocab, uint64_t dim)
{
    return dylm_layer_of((d->host->build->embedding_layer)(d->ctx, weight.id, vocab, dim, at));
}
#define dylm_embedding_layer(d, weight, vocab, dim) dylm_embedding_layer_at(DYLM_HERE, d, weight, vocab, dim)

/// A `DYLM_NORM_*` over the last axis; weight and bias `[dim]`, each optional.
static inline dylm_layer dylm_norm_layer_at(dylm_at at, dylm *d, uint32_t kind, dylm_stored weight, dylm_stored bias, uint64_t dim, double eps)
{
    return dylm_layer_of((d->host->build->norm_layer)(d->ctx, kind, weight.id, bias.id, dim, eps, at));
}
#define dylm_norm_layer(d, kind, weight, bias, dim, eps) dylm_norm_layer_at(DYLM_HERE, d, kind, weight, bias, dim, eps)

/// Routed experts below `prefix`, in any of the layouts that checkpoints use; `spec` is an `dylm_experts_spec`.
static inline dylm_layer dylm_experts_layer_at(dylm_at at, dylm *d, const char *prefix, const dylm_experts_spec *spec)
{
    return dylm_layer_of((d->host->build->experts_layer)(d->ctx, dylm_text_of(prefix), dylm_lent_of(spec, sizeof *spec), at));
}
#define dylm_experts_layer(d, prefix, spec) dylm_experts_layer_at(DYLM_HERE, d, prefix, spec)

/// The same from sources that the plugin found itself: gate, up, down, then their biases; DYLM_NO_STORED for what there is
/// not; `spec` is an `dylm_experts_spec`.
static inline dylm_layer dylm_experts_from_at(dylm_at at, dylm *d, const dylm_stored *sources, size_t sources_count, const dylm_experts_spec *spec)
{
    return dylm_layer_of((d->host->build->experts_from)(d->ctx, dylm_list_of(sources, sources_count), dylm_lent_of(spec, sizeof *spec), at));
}
#define dylm_experts_from(d, sources, sources_count, spec) dylm_experts_from_at(DYLM_HERE, d, sources, sources_count, spec)

/// One linear layer a head: weight `[heads, outputs, inputs]`, bias `[heads, outputs]`.
static inline dylm_layer dylm_multi_linear_layer_at(dylm_at at, dylm *d, dylm_stored weight, dylm_stored bias, uint64_t heads, uint64_t inputs, uint64_t outputs)
{
    return dylm_layer_of((d->host->build->multi_linear_layer)(d->ctx, weight.id, bias.id, heads, inputs, outputs, at));
}
#define dylm_multi_linear_layer(d, weight, bias, heads, inputs, outputs) dylm_multi_linear_layer_at(DYLM_HERE, d, weight, bias, heads, inputs, outputs)

/// A causal convolution of each channel alone: weight of `channels * kernel` numbers, channel by channel; bias `[channels]`.
static inline dylm_layer dylm_conv1d_layer_at(dylm_at at, dylm *d, dylm_stored weight, dylm_stored bias, uint64_t channels, uint64_t kernel)
{
    return dylm_layer_of((d->host->build->conv1d_layer)(d->ctx, weight.id, bias.id, channels, kernel, at));
}
#define dylm_conv1d_layer(d, weight, bias, channels, kernel) dylm_conv1d_layer_at(DYLM_HERE, d, weight, bias, channels, kernel)

/// A tensor used as it is.
static inline dylm_layer dylm_parameter_layer_at(dylm_at at, dylm *d, dylm_stored source, const uint64_t *dims, size_t dims_count)
{
    return dylm_layer_of((d->host->build->parameter_layer)(d->ctx, source.id, dylm_list_of(dims, dims_count), at));
}
#define dylm_parameter_layer(d, source, dims, dims_count) dylm_parameter_layer_at(DYLM_HERE, d, source, dims, dims_count)

/// Rotary angles for the first `dims` lanes of a head; `scaling` is config.json's `rope_scaling` as JSON, or empty.
static inline dylm_layer dylm_rope_layer_at(dylm_at at, dylm *d, uint64_t dims, double base, const char *scaling)
{
    return dylm_layer_of((d->host->build->rope_layer)(d->ctx, dims, base, dylm_text_of(scaling), at));
}
#define dylm_rope_layer(d, dims, base, scaling) dylm_rope_layer_at(DYLM_HERE, d, dims, base, scaling)

/// Whether the checkpoint has a tensor of this full name and these dims (1) or not (0).
static inline int dylm_has_shape_at(dylm_at at, dylm *d, const char *name, const uint64_t *dims, size_t dims_count)
{
    return (d->host->build->has_shape)(d->ctx, dylm_text_of(name), dylm_list_of(dims, dims_count), at);
}
#define dylm_has_shape(d, name, dims, dims_count) dylm_has_shape_at(DYLM_HERE, d, name, dims, dims_count)

/// Numbers `[len]` that no checkpoint stores, since a formula gives them.
static inline dylm_stored dylm_numbers_at(dylm_at at, dylm *d, const float *values, size_t values_count)
{
    return dylm_stored_of((d->host->build->numbers)(d->ctx, dylm_list_of(values, values_count), at));
}
#define dylm_numbers(d, values, values_count) dylm_numbers_at(DYLM_HERE, d, values, values_count)

/// ids `[tokens]` -> `[tokens, dim]`; a table of whole numbers gives ids.
static inline dylm_tensor dylm_embed_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor tokens)
{
    return dylm_made(d, (d->host->layers->embed)(d->ctx, slot.id, tokens.id, at));
}
#define dylm_embed(d, slot, tokens) dylm_embed_at(DYLM_HERE, d, slot, tokens)

/// `[tokens, dim]` -> `[tokens, vocab]`: an embedding used as the output head.
static inline dylm_tensor dylm_unembed_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->unembed)(d->ctx, slot.id, x.id, at));
}
#define dylm_unembed(d, slot, x) dylm_unembed_at(DYLM_HERE, d, slot, x)

/// `[.., inputs]` -> `[.., outputs]`
static inline dylm_tensor dylm_linear_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->linear)(d->ctx, slot.id, x.id, at));
}
#define dylm_linear(d, slot, x) dylm_linear_at(DYLM_HERE, d, slot, x)

/// Normalizes the last axis, in f32.
static inline dylm_tensor dylm_norm_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->norm)(d->ctx, slot.id, x.id, at));
}
#define dylm_norm(d, slot, x) dylm_norm_at(DYLM_HERE, d, slot, x)

/// x `[tokens, dim]`, chosen experts and their weights `[tokens, k]` -> `[tokens, dim]`, the weighted sum.
static inline dylm_tensor dylm_experts_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x, dylm_tensor chosen, dylm_tensor weights)
{
    return dylm_made(d, (d->host->layers->experts)(d->ctx, slot.id, x.id, chosen.id, weights.id, at));
}
#define dylm_experts(d, slot, x, chosen, weights) dylm_experts_at(DYLM_HERE, d, slot, x, chosen, weights)

/// x `[tokens, heads, inputs]` -> `[tokens, heads, outputs]`, each head by its own matrix.
static inline dylm_tensor dylm_multi_linear_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->multi_linear)(d->ctx, slot.id, x.id, at));
}
#define dylm_multi_linear(d, slot, x) dylm_multi_linear_at(DYLM_HERE, d, slot, x)

/// The tensor itself.
static inline dylm_tensor dylm_parameter_at(dylm_at at, dylm *d, dylm_layer slot)
{
    return dylm_made(d, (d->host->layers->parameter)(d->ctx, slot.id, at));
}
#define dylm_parameter(d, slot) dylm_parameter_at(DYLM_HERE, d, slot)

/// x `[tokens, heads, head_dim]` turned by each token's position; `flags` are any of `ROTATE_*`.
static inline dylm_tensor dylm_rotate_at(dylm_at at, dylm *d, dylm_layer slot, dylm_tensor x, uint32_t flags)
{
    return dylm_made(d, (d->host->layers->rotate)(d->ctx, slot.id, x.id, flags, at));
}
#define dylm_rotate(d, slot, x, flags) dylm_rotate_at(DYLM_HERE, d, slot, x, flags)

/// Where each token stands in its sequence, from 0: ids `[tokens]`.
static inline dylm_tensor dylm_positions_at(dylm_at at, dylm *d)
{
    return dylm_made(d, (d->host->layers->positions)(d->ctx, at));
}
#define dylm_positions(d) dylm_positions_at(DYLM_HERE, d)

/// Ids `[tokens]` of the n-grams that end at each token, `Σ id(t - i) * base^i mod modulus` over i < n; 0 stands before the start.
static inline dylm_tensor dylm_ngrams_at(dylm_at at, dylm *d, dylm_tensor tokens, uint64_t n, uint64_t base, uint64_t modulus)
{
    return dylm_made(d, (d->host->layers->ngrams)(d->ctx, tokens.id, n, base, modulus, at));
}
#define dylm_ngrams(d, tokens, n, base, modulus) dylm_ngrams_at(DYLM_HERE, d, tokens, n, base, modulus)

/// q `[tokens, heads, d]`, k `[tokens, kv_heads, d]`, v `[tokens, kv_heads, e]` -> `[tokens, heads, e]`; k and v join the cache, once a
/// step; without k and v it looks at what the step has put there before; `spec` is an `dylm_attend_spec`.
static inline dylm_tensor dylm_attend_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor q, dylm_tensor k, dylm_tensor v, const dylm_attend_spec *spec)
{
    return dylm_made(d, (d->host->layers->attend)(d->ctx, cache, q.id, k.id, v.id, dylm_lent_of(spec, sizeof *spec), at));
}
#define dylm_attend(d, cache, q, k, v, spec) dylm_attend_at(DYLM_HERE, d, cache, q, k, v, spec)

/// Which keys are worth attending to (an indexer's choice): q `[tokens, heads, d]`, k `[tokens, 1, d]`, which joins the cache, weights
/// `[tokens, heads]`; the score of a key is `Σ weight * relu(q·k)` over the heads. Gives the positions `[tokens, count]` of the best, in
/// any order, and `UINT32_MAX` where there are fewer, for `dylm_attend_spec::selection`.
static inline dylm_tensor dylm_index_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor q, dylm_tensor k, dylm_tensor weights, uint64_t count)
{
    return dylm_made(d, (d->host->layers->index)(d->ctx, cache, q.id, k.id, weights.id, count, at));
}
#define dylm_index(d, cache, q, k, weights, count) dylm_index_at(DYLM_HERE, d, cache, q, k, weights, count)

/// x `[tokens, channels]` -> the same, each channel folded with its kernel over the last tokens; state `[kernel - 1, channels]`.
static inline dylm_tensor dylm_conv1d_at(dylm_at at, dylm *d, dylm_layer slot, uint32_t cache, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->conv1d)(d->ctx, slot.id, cache, x.id, at));
}
#define dylm_conv1d(d, slot, cache, x) dylm_conv1d_at(DYLM_HERE, d, slot, cache, x)

/// x `[tokens, dim]` -> each token's predecessor, 0 before the first; state `[1, dim]`.
static inline dylm_tensor dylm_shift_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor x)
{
    return dylm_made(d, (d->host->layers->shift)(d->ctx, cache, x.id, at));
}
#define dylm_shift(d, cache, x) dylm_shift_at(DYLM_HERE, d, cache, x)

/// Mamba 2: x `[tokens, heads, d]`, dt `[tokens, heads]`, a `[heads]`, b and c `[tokens, groups, n]` -> `[tokens, heads, d]`;
/// `h = exp(dt a) h + dt x bᵀ`, `y = h c`; state `[heads, d, n]`.
static inline dylm_tensor dylm_ssd_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor x, dylm_tensor dt, dylm_tensor a, dylm_tensor b, dylm_tensor c)
{
    return dylm_made(d, (d->host->layers->ssd)(d->ctx, cache, x.id, dt.id, a.id, b.id, c.id, at));
}
#define dylm_ssd(d, cache, x, dt, a, b, c) dylm_ssd_at(DYLM_HERE, d, cache, x, dt, a, b, c)

/// Mamba 1: x and dt `[tokens, d]`, a `[d, n]`, b and c `[tokens, n]` -> `[tokens, d]`; `h = exp(dt a) h + dt x bᵀ`, `y = h c`; state
/// `[d, n]`.
static inline dylm_tensor dylm_selective_scan_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor x, dylm_tensor dt, dylm_tensor a, dylm_tensor b, dylm_tensor c)
{
    return dylm_made(d, (d->host->layers->selective_scan)(d->ctx, cache, x.id, dt.id, a.id, b.id, c.id, at));
}
#define dylm_selective_scan(d, cache, x, dt, a, b, c) dylm_selective_scan_at(DYLM_HERE, d, cache, x, dt, a, b, c)

/// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, beta `[tokens, heads]`, g `[tokens, heads]` or `[tokens, heads, d]` ->
/// `[tokens, heads, e]`; `S = exp(g) S`, then `S += k (beta (v - kᵀ S))ᵀ`, `y = qᵀ S`; state `[heads, d, e]`.
static inline dylm_tensor dylm_gated_delta_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor q, dylm_tensor k, dylm_tensor v, dylm_tensor g, dylm_tensor beta)
{
    return dylm_made(d, (d->host->layers->gated_delta)(d->ctx, cache, q.id, k.id, v.id, g.id, beta.id, at));
}
#define dylm_gated_delta(d, cache, q, k, v, g, beta) dylm_gated_delta_at(DYLM_HERE, d, cache, q, k, v, g, beta)

/// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g `[heads]`, `[tokens, heads]` or `[tokens, heads, d]` ->
/// `[tokens, heads, e]`; `S = exp(g) S + k vᵀ`, `y = qᵀ S`; state `[heads, d, e]`.
static inline dylm_tensor dylm_linear_attention_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor q, dylm_tensor k, dylm_tensor v, dylm_tensor g)
{
    return dylm_made(d, (d->host->layers->linear_attention)(d->ctx, cache, q.id, k.id, v.id, g.id, at));
}
#define dylm_linear_attention(d, cache, q, k, v, g) dylm_linear_attention_at(DYLM_HERE, d, cache, q, k, v, g)

/// RWKV 7, all `[tokens, heads, d]`: `S = S diag(exp(w)) + (S a) bᵀ + v kᵀ`, `y = S r`; state `[heads, d, d]`.
static inline dylm_tensor dylm_wkv7_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor r, dylm_tensor w, dylm_tensor k, dylm_tensor v, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->layers->wkv7)(d->ctx, cache, r.id, w.id, k.id, v.id, a.id, b.id, at));
}
#define dylm_wkv7(d, cache, r, w, k, v, a, b) dylm_wkv7_at(DYLM_HERE, d, cache, r, w, k, v, a, b)

/// The real-gated linear recurrent unit, x and log_a `[tokens, dim]`: `h = a h + √(1 - a²) x`, and `h = x` at a sequence's first token;
/// state `[dim]`.
static inline dylm_tensor dylm_rg_lru_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor x, dylm_tensor log_a)
{
    return dylm_made(d, (d->host->layers->rg_lru)(d->ctx, cache, x.id, log_a.id, at));
}
#define dylm_rg_lru(d, cache, x, log_a) dylm_rg_lru_at(DYLM_HERE, d, cache, x, log_a)

/// A recurrence by the plugin's own step, over these states and inputs `[tokens, ..]` -> `[tokens, ..]`; in f32.
static inline dylm_tensor dylm_scan_at(dylm_at at, dylm *d, const uint32_t *caches, size_t caches_count, const dylm_tensor *inputs, size_t inputs_count, dylm_scan_step step)
{
    return dylm_made(d, (d->host->layers->scan)(d->ctx, dylm_list_of(caches, caches_count), dylm_list_of(inputs, inputs_count), step, at));
}
#define dylm_scan(d, caches, caches_count, inputs, inputs_count, step) dylm_scan_at(DYLM_HERE, d, caches, caches_count, inputs, inputs_count, step)

/// Which blocks of keys are worth attending to, each head apart: q `[tokens, heads, d]`, k `[tokens, 1, d]`, which joins the cache; the
/// score of a block is its best key's q·k. Gives the numbers `[tokens, heads, count]` of the best blocks, in any order, and `UINT32_MAX`
/// where there are fewer, for `dylm_attend_spec::selection`; `spec` is a `dylm_block_choice_spec`.
static inline dylm_tensor dylm_index_blocks_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor q, dylm_tensor k, const dylm_block_choice_spec *spec)
{
    return dylm_made(d, (d->host->layers->index_blocks)(d->ctx, cache, q.id, k.id, dylm_lent_of(spec, sizeof *spec), at));
}
#define dylm_index_blocks(d, cache, q, k, spec) dylm_index_blocks_at(DYLM_HERE, d, cache, q, k, spec)

/// Windows of `rate` tokens become one entry each: x and gate `[tokens, n * d]`, bias `[rate, n * d]` -> `[tokens, d]`, where a window
/// ends `Σ softmax(gate + bias) x` for each lane, elsewhere 0; the last d lanes of a token count for its own window, the d before
/// them for the next one, and so on; state `[n, 3, d]`.
static inline dylm_tensor dylm_pool_at(dylm_at at, dylm *d, uint32_t cache, dylm_tensor x, dylm_tensor gate, dylm_tensor bias)
{
    return dylm_made(d, (d->host->layers->pool)(d->ctx, cache, x.id, gate.id, bias.id, at));
}
#define dylm_pool(d, cache, x, gate, bias) dylm_pool_at(DYLM_HERE, d, cache, x, gate, bias)

/// One more owner of a tensor.
static inline dylm_tensor dylm_retain_at(dylm_at at, dylm *d, dylm_tensor x)
{
    (d->host->tensors->retain)(d->ctx, x.id, at);
    return x;
}
#define dylm_retain(d, x) dylm_retain_at(DYLM_HERE, d, x)

/// One owner fewer; outside of the step, on any thread, nothing at all.
static inline void dylm_release_at(dylm_at at, dylm *d, dylm_tensor x)
{
    dylm_forget(d, x);
    (d->host->tensors->release)(d->ctx, x.id, at);
}
#define dylm_release(d, x) dylm_release_at(DYLM_HERE, d, x)

/// A failed tensor that says so.
static inline dylm_tensor dylm_fail_at(dylm_at at, dylm *d, const char *message)
{
    return dylm_made(d, (d->host->tensors->fail)(d->ctx, dylm_text_of(message), at));
}
#define dylm_fail(d, message) dylm_fail_at(DYLM_HERE, d, message)

/// `[tokens, heads * head_dim]` -> `[tokens, heads, head_dim]`
static inline dylm_tensor dylm_split_heads_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t head_dim)
{
    return dylm_made(d, (d->host->tensors->split_heads)(d->ctx, x.id, head_dim, at));
}
#define dylm_split_heads(d, x, head_dim) dylm_split_heads_at(DYLM_HERE, d, x, head_dim)

/// `[tokens, heads, head_dim]` -> `[tokens, heads * head_dim]`
static inline dylm_tensor dylm_merge_heads_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->merge_heads)(d->ctx, x.id, at));
}
#define dylm_merge_heads(d, x) dylm_merge_heads_at(DYLM_HERE, d, x)

/// `len` entries of the last axis from `start`.
static inline dylm_tensor dylm_narrow_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t start, uint64_t len)
{
    return dylm_made(d, (d->host->tensors->narrow)(d->ctx, x.id, start, len, at));
}
#define dylm_narrow(d, x, start, len) dylm_narrow_at(DYLM_HERE, d, x, start, len)

/// Joined along the last axis.
static inline dylm_tensor dylm_concat_at(dylm_at at, dylm *d, const dylm_tensor *parts, size_t parts_count)
{
    return dylm_made(d, (d->host->tensors->concat)(d->ctx, dylm_list_of(parts, parts_count), at));
}
#define dylm_concat(d, parts, parts_count) dylm_concat_at(DYLM_HERE, d, parts, parts_count)

/// The last axis split into `[.., n, len / n]`.
static inline dylm_tensor dylm_unflatten_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t n)
{
    return dylm_made(d, (d->host->tensors->unflatten)(d->ctx, x.id, n, at));
}
#define dylm_unflatten(d, x, n) dylm_unflatten_at(DYLM_HERE, d, x, n)

/// The last two axes joined.
static inline dylm_tensor dylm_flatten_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->flatten)(d->ctx, x.id, at));
}
#define dylm_flatten(d, x) dylm_flatten_at(DYLM_HERE, d, x)

/// The last two axes exchanged.
static inline dylm_tensor dylm_transpose_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->transpose)(d->ctx, x.id, at));
}
#define dylm_transpose(d, x) dylm_transpose_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_add_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->add)(d->ctx, a.id, b.id, at));
}
#define dylm_add(d, a, b) dylm_add_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_sub_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->sub)(d->ctx, a.id, b.id, at));
}
#define dylm_sub(d, a, b) dylm_sub_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_mul_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->mul)(d->ctx, a.id, b.id, at));
}
#define dylm_mul(d, a, b) dylm_mul_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_div_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->div)(d->ctx, a.id, b.id, at));
}
#define dylm_div(d, a, b) dylm_div_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_maximum_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->maximum)(d->ctx, a.id, b.id, at));
}
#define dylm_maximum(d, a, b) dylm_maximum_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_minimum_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->minimum)(d->ctx, a.id, b.id, at));
}
#define dylm_minimum(d, a, b) dylm_minimum_at(DYLM_HERE, d, a, b)

/// 1 where a > b, else 0.
static inline dylm_tensor dylm_greater_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->greater)(d->ctx, a.id, b.id, at));
}
#define dylm_greater(d, a, b) dylm_greater_at(DYLM_HERE, d, a, b)

/// `scale * x + offset`
static inline dylm_tensor dylm_affine_at(dylm_at at, dylm *d, dylm_tensor x, double scale, double offset)
{
    return dylm_made(d, (d->host->tensors->affine)(d->ctx, x.id, scale, offset, at));
}
#define dylm_affine(d, x, scale, offset) dylm_affine_at(DYLM_HERE, d, x, scale, offset)

/// x held between `low` and `high`.
static inline dylm_tensor dylm_clamp_at(dylm_at at, dylm *d, dylm_tensor x, double low, double high)
{
    return dylm_made(d, (d->host->tensors->clamp)(d->ctx, x.id, low, high, at));
}
#define dylm_clamp(d, x, low, high) dylm_clamp_at(DYLM_HERE, d, x, low, high)

/// `[.., n, k] · [.., k, m]`
static inline dylm_tensor dylm_matmul_at(dylm_at at, dylm *d, dylm_tensor a, dylm_tensor b)
{
    return dylm_made(d, (d->host->tensors->matmul)(d->ctx, a.id, b.id, at));
}
#define dylm_matmul(d, a, b) dylm_matmul_at(DYLM_HERE, d, a, b)

static inline dylm_tensor dylm_neg_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->neg)(d->ctx, x.id, at));
}
#define dylm_neg(d, x) dylm_neg_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_floor_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->floor)(d->ctx, x.id, at));
}
#define dylm_floor(d, x) dylm_floor_at(DYLM_HERE, d, x)

/// Halves go to the even neighbour.
static inline dylm_tensor dylm_round_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->round)(d->ctx, x.id, at));
}
#define dylm_round(d, x) dylm_round_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_abs_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->abs)(d->ctx, x.id, at));
}
#define dylm_abs(d, x) dylm_abs_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_exp_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->exp)(d->ctx, x.id, at));
}
#define dylm_exp(d, x) dylm_exp_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_log_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->log)(d->ctx, x.id, at));
}
#define dylm_log(d, x) dylm_log_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_sqrt_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->sqrt)(d->ctx, x.id, at));
}
#define dylm_sqrt(d, x) dylm_sqrt_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_rsqrt_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->rsqrt)(d->ctx, x.id, at));
}
#define dylm_rsqrt(d, x) dylm_rsqrt_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_square_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->square)(d->ctx, x.id, at));
}
#define dylm_square(d, x) dylm_square_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_sigmoid_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->sigmoid)(d->ctx, x.id, at));
}
#define dylm_sigmoid(d, x) dylm_sigmoid_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_tanh_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->tanh)(d->ctx, x.id, at));
}
#define dylm_tanh(d, x) dylm_tanh_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_relu_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->relu)(d->ctx, x.id, at));
}
#define dylm_relu(d, x) dylm_relu_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_silu_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->silu)(d->ctx, x.id, at));
}
#define dylm_silu(d, x) dylm_silu_at(DYLM_HERE, d, x)

/// Exact, by the error function.
static inline dylm_tensor dylm_gelu_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->gelu)(d->ctx, x.id, at));
}
#define dylm_gelu(d, x) dylm_gelu_at(DYLM_HERE, d, x)

/// The tanh approximation.
static inline dylm_tensor dylm_gelu_tanh_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->gelu_tanh)(d->ctx, x.id, at));
}
#define dylm_gelu_tanh(d, x) dylm_gelu_tanh_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_softplus_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->softplus)(d->ctx, x.id, at));
}
#define dylm_softplus(d, x) dylm_softplus_at(DYLM_HERE, d, x)

/// `silu(gate) * up`
static inline dylm_tensor dylm_swiglu_at(dylm_at at, dylm *d, dylm_tensor gate, dylm_tensor up)
{
    return dylm_made(d, (d->host->tensors->swiglu)(d->ctx, gate.id, up.id, at));
}
#define dylm_swiglu(d, gate, up) dylm_swiglu_at(DYLM_HERE, d, gate, up)

/// `gelu_tanh(gate) * up`
static inline dylm_tensor dylm_geglu_at(dylm_at at, dylm *d, dylm_tensor gate, dylm_tensor up)
{
    return dylm_made(d, (d->host->tensors->geglu)(d->ctx, gate.id, up.id, at));
}
#define dylm_geglu(d, gate, up) dylm_geglu_at(DYLM_HERE, d, gate, up)

/// In f32.
static inline dylm_tensor dylm_softmax_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->softmax)(d->ctx, x.id, at));
}
#define dylm_softmax(d, x) dylm_softmax_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_sum_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->sum)(d->ctx, x.id, at));
}
#define dylm_sum(d, x) dylm_sum_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_mean_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->mean)(d->ctx, x.id, at));
}
#define dylm_mean(d, x) dylm_mean_at(DYLM_HERE, d, x)

static inline dylm_tensor dylm_max_at(dylm_at at, dylm *d, dylm_tensor x)
{
    return dylm_made(d, (d->host->tensors->max)(d->ctx, x.id, at));
}
#define dylm_max(d, x) dylm_max_at(DYLM_HERE, d, x)

/// The k largest, largest first (equal values: lower index first), and where they stood.
static inline dylm_pair dylm_topk_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t k)
{
    return dylm_pair_of(d, (d->host->tensors->topk)(d->ctx, x.id, k, at));
}
#define dylm_topk(d, x, k) dylm_topk_at(DYLM_HERE, d, x, k)

/// 1 for the k largest (equal values: lower index first), 0 for the rest.
static inline dylm_tensor dylm_top_mask_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t k)
{
    return dylm_made(d, (d->host->tensors->top_mask)(d->ctx, x.id, k, at));
}
#define dylm_top_mask(d, x, k) dylm_top_mask_at(DYLM_HERE, d, x, k)

/// x `[.., n]`, indices `[.., k]` -> `[.., k]`
static inline dylm_tensor dylm_gather_at(dylm_at at, dylm *d, dylm_tensor x, dylm_tensor indices)
{
    return dylm_made(d, (d->host->tensors->gather)(d->ctx, x.id, indices.id, at));
}
#define dylm_gather(d, x, indices) dylm_gather_at(DYLM_HERE, d, x, indices)

/// Matrices `[.., n, n]` made nearly doubly stochastic, in f32: columns by their sums plus `eps`, then `rounds - 1` times rows and
/// columns. <https://projecteuclid.org/euclid.pjm/1102992505>
static inline dylm_tensor dylm_sinkhorn_at(dylm_at at, dylm *d, dylm_tensor x, uint64_t rounds, double eps)
{
    return dylm_made(d, (d->host->tensors->sinkhorn)(d->ctx, x.id, rounds, eps, at));
}
#define dylm_sinkhorn(d, x, rounds, eps) dylm_sinkhorn_at(DYLM_HERE, d, x, rounds, eps)


/// Releases what was made in this call since the last dylm_keep, but for x, which it gives back.
static inline dylm_tensor dylm_keep(dylm *d, dylm_tensor x)
{
    uint64_t kept = 0;
    size_t i;
    for (i = 0; i < d->made_count; i++) {
        if (d->made[i] == x.id && !kept) kept = x.id;
        else d->host->tensors->release(d->ctx, d->made[i], DYLM_HERE);
    }
    d->made[0] = kept;
    d->made_count = kept != 0;
    return x;
}

/// The states before a token [1, ..] and its rows of the inputs [1, ..] -> in `out` the states after it and a row of the result, one more.
typedef void (*dylm_step_fn)(dylm *d, void *data, const dylm_tensor *states, const dylm_tensor *now, dylm_tensor *out);

typedef struct dylm_stepping {
    dylm *d;
    dylm_step_fn step;
    void *data;
} dylm_stepping;

static inline uint8_t dylm_step_once(void *data, dylm_list states, dylm_list now, dylm_list out)
{
    const dylm_stepping *stepping = (const dylm_stepping *)data;
    const dylm_tensor *before = (const dylm_tensor *)states.start, *inputs = (const dylm_tensor *)now.start;
    dylm_tensor *after = (dylm_tensor *)(uintptr_t)out.start;
    dylm d = *stepping->d;
    size_t i, known;
    d.made_count = 0;
    for (i = 0; i < states.len; i++) dylm_made(&d, before[i].id);
    for (i = 0; i < now.len; i++) dylm_made(&d, inputs[i].id);
    stepping->step(&d, stepping->data, before, inputs, after);
    // What is given back changes hands; what was not made here, or is given twice, gets one more owner.
    for (i = 0; i < out.len; i++) {
        known = d.made_count;
        dylm_forget(&d, after[i]);
        if (d.made_count == known) dylm_retain(&d, after[i]);
    }
    dylm_keep(&d, DYLM_NO_TENSOR);
    return dylm_failed(&d) == 0;
}

/// scan with `step` for the author's own recurrence; `data` is handed to it, and it may call ops with the `d` that it gets.
static inline dylm_tensor dylm_scan_with_at(dylm_at at, dylm *d, const uint32_t *caches, size_t caches_count, const dylm_tensor *inputs,
                                            size_t inputs_count, dylm_step_fn step, void *data)
{
    dylm_stepping stepping;
    dylm_scan_step raw;
    stepping.d = d;
    stepping.step = step;
    stepping.data = data;
    raw.data = &stepping;
    raw.run = dylm_step_once;
    return dylm_scan_at(at, d, caches, caches_count, inputs, inputs_count, raw);
}
#define dylm_scan_with(d, caches, caches_count, inputs, inputs_count, step, data) \
    dylm_scan_with_at(DYLM_HERE, d, caches, caches_count, inputs, inputs_count, step, data)

// ---- config.json; a key may be a path: "rope_parameters.rope_theta", "layer_types.3" ----

/// For dylm_config_u64: the key must be there.
#define DYLM_REQUIRED UINT64_MAX
/// The greatest size that makes sense: above it products of two would overflow.
#define DYLM_LARGEST ((uint64_t)1 << 31)

/// A whole number from `least` to `most`; `otherwise` if the key is absent or null. After an error, `least`: never 0 where 1 is the least.
static inline uint64_t dylm_config_u64(dylm *d, const char *key, uint64_t least, uint64_t most, uint64_t otherwise)
{
    return d->host->config->whole(d->ctx, dylm_text_of(key), least, most, otherwise);
}

/// A number; with `otherwise` NAN the key must be there.
static inline double dylm_config_f64(dylm *d, const char *key, double otherwise)
{
    return d->host->config->number(d->ctx, dylm_text_of(key), otherwise);
}

/// True (1) or false (0); with `otherwise` 2 the key must be there.
static inline int dylm_config_bool(dylm *d, const char *key, int otherwise)
{
    return (int)d->host->config->flag(d->ctx, dylm_text_of(key), (uint32_t)otherwise);
}

/// A text, ended by a zero byte, which lives until new_model returns; with `otherwise` NULL the key must be there.
static inline const char *dylm_config_text(dylm *d, const char *key, const char *otherwise)
{
    return d->host->config->text(d->ctx, dylm_text_of(key), dylm_text_of(otherwise)).start;
}

/// A value as JSON, likewise; "" if the key is absent or null. `rope_scaling` goes to dylm_rope_layer like this.
static inline const char *dylm_config_json(dylm *d, const char *key)
{
    return d->host->config->json(d->ctx, dylm_text_of(key)).start;
}

/// Entries of a list; 0 if the key is absent or null.
static inline uint64_t dylm_config_count(dylm *d, const char *key) { return d->host->config->count(d->ctx, dylm_text_of(key)); }

// ---- structs with their usual values ----

/// Causal attention over all keys; set what differs.
static inline dylm_attend_spec dylm_attend_scaled(float scale)
{
    dylm_attend_spec spec;
    memset(&spec, 0, sizeof spec);
    spec.scale = scale;
    return spec;
}

/// Keys and values; with a window, only the last `window` of them (the query's own included) ever matter; 0 for all.
static inline dylm_cache_spec dylm_key_value_cache(uint64_t window)
{
    dylm_cache_spec spec;
    memset(&spec, 0, sizeof spec);
    spec.kind = DYLM_CACHE_KEY_VALUE;
    spec.window = window;
    return spec;
}

/// Numbers of a shape, at most six axes: what an op with a state asks for.
static inline dylm_cache_spec dylm_state_cache(const uint64_t *dims, size_t count)
{
    dylm_cache_spec spec;
    memset(&spec, 0, sizeof spec);
    spec.kind = DYLM_CACHE_STATE;
    memcpy(spec.dims, dims, (count < 6 ? count : 6) * sizeof *dims);
    return spec;
}

// ---- weights by their names below a prefix ----

/// The part of the checkpoint whose names begin with `prefix`.
typedef struct dylm_weights {
    dylm *d;
    char prefix[256];
} dylm_weights;

/// The whole checkpoint.
static inline dylm_weights dylm_whole(dylm *d)
{
    dylm_weights w;
    w.d = d;
    w.prefix[0] = 0;
    return w;
}

/// `name` with `suffix` below `w`, in `full`.
static inline const char *dylm_full_name(const dylm_weights *w, const char *name, const char *suffix, char full[512])
{
    if (snprintf(full, 512, "%s%s%s", w->prefix, name, suffix) >= 512) dylm_error(w->d, DYLM_ERROR_CONFIG, "%s: a name too long", name);
    return full;
}

/// The part below a name, which is a format with its numbers: dylm_below(&w, "layers.%u", i).
DYLM_PRINTF(2, 3) static inline dylm_weights dylm_below(const dylm_weights *w, const char *format, ...)
{
    dylm_weights below = dylm_whole(w->d);
    char name[256];
    va_list list;
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
    if (strlen(w->prefix) + strlen(name) + 2 > sizeof below.prefix)
        dylm_error(w->d, DYLM_ERROR_CONFIG, "%s: a name too long", name);
    else
        strcat(strcat(strcpy(below.prefix, w->prefix), name), ".");
    return below;
}

/// Whether the checkpoint has this tensor.
static inline int dylm_has_in_at(dylm_at at, const dylm_weights *w, const char *name)
{
    char full[512];
    return dylm_has_at(at, w->d, dylm_full_name(w, name, "", full));
}
#define dylm_has_in(w, name) dylm_has_in_at(DYLM_HERE, w, name)

/// Tensors below this prefix that the architecture does not use: a vision tower, a training head.
static inline void dylm_ignore_in_at(dylm_at at, const dylm_weights *w, const char *prefix)
{
    char full[512];
    dylm_ignore_at(at, w->d, dylm_full_name(w, prefix, "", full));
}
#define dylm_ignore_in(w, prefix) dylm_ignore_in_at(DYLM_HERE, w, prefix)

/// The stored tensor of this name, to be transformed before use.
static inline dylm_stored dylm_source_in_at(dylm_at at, const dylm_weights *w, const char *name)
{
    char full[512];
    return dylm_source_at(at, w->d, dylm_full_name(w, name, "", full));
}
#define dylm_source_in(w, name) dylm_source_in_at(DYLM_HERE, w, name)

/// `name.weight` [outputs, inputs] and, with `bias`, `name.bias` [outputs].
static inline dylm_layer dylm_linear_in_at(dylm_at at, const dylm_weights *w, const char *name, uint64_t inputs, uint64_t outputs, int bias)
{
    char full[512];
    dylm_stored weight = dylm_source_at(at, w->d, dylm_full_name(w, name, ".weight", full));
    dylm_stored added = bias ? dylm_source_at(at, w->d, dylm_full_name(w, name, ".bias", full)) : DYLM_NO_STORED;
    return dylm_linear_layer_at(at, w->d, weight, added, inputs, outputs);
}
#define dylm_linear_in(w, name, inputs, outputs, bias) dylm_linear_in_at(DYLM_HERE, w, name, inputs, outputs, bias)

/// `name.weight` [vocab, dim]
static inline dylm_layer dylm_embedding_in_at(dylm_at at, const dylm_weights *w, const char *name, uint64_t vocab, uint64_t dim)
{
    char full[512];
    return dylm_embedding_layer_at(at, w->d, dylm_source_at(at, w->d, dylm_full_name(w, name, ".weight", full)), vocab, dim);
}
#define dylm_embedding_in(w, name, vocab, dim) dylm_embedding_in_at(DYLM_HERE, w, name, vocab, dim)

/// `name.weight` [dim]
static inline dylm_layer dylm_rms_norm_in_at(dylm_at at, const dylm_weights *w, const char *name, uint64_t dim, double eps)
{
    char full[512];
    dylm_stored weight = dylm_source_at(at, w->d, dylm_full_name(w, name, ".weight", full));
    return dylm_norm_layer_at(at, w->d, DYLM_NORM_RMS, weight, DYLM_NO_STORED, dim, eps);
}
#define dylm_rms_norm_in(w, name, dim, eps) dylm_rms_norm_in_at(DYLM_HERE, w, name, dim, eps)

// ---- the entry: what DYLM_PLUGIN makes of your four functions ----

typedef void (*dylm_new_fn)(dylm *d, dylm_model *model);
typedef dylm_tensor (*dylm_run_fn)(dylm *d, const void *data, dylm_tensor x);

static inline uint64_t dylm_run(dylm_run_fn run, const void *data, const dylm_host *host, void *ctx, uint64_t argument)
{
    dylm d;
    dylm_tensor result;
    d.host = host;
    d.ctx = ctx;
    d.made_count = 0;
    // The argument is ours to release, as all that is made from it.
    result = run(&d, data, dylm_made(&d, argument));
    return dylm_keep(&d, result).id;
}

static inline uint32_t dylm_create(dylm_new_fn make, const dylm_host *host, void *ctx, dylm_model *model)
{
    dylm d;
    d.host = host;
    d.ctx = ctx;
    d.made_count = 0;
    make(&d, model);
    if (dylm_failed(&d) && model->data) model->drop(model->data);
    return dylm_failed(&d);
}

// The note: what the plugin is, in a section of the file that is read without opening the library.
#define DYLM_JSON_(text) #text
#define DYLM_JSON(text) DYLM_JSON_(text)
#define DYLM_JSON_LIST(...) "[" #__VA_ARGS__ "]"
#ifndef DYLM_NEEDS
#define DYLM_NEEDS ""
#endif
#if defined(__VERSION__)
#define DYLM_COMPILER "cc " __VERSION__
#else
#define DYLM_COMPILER "cc"
#endif
#if defined(__x86_64__) || defined(_M_X64)
#define DYLM_MACHINE "x86_64"
#elif defined(__aarch64__) || defined(_M_ARM64)
#define DYLM_MACHINE "aarch64"
#else
#define DYLM_MACHINE "another machine"
#endif
#if defined(__APPLE__)
#define DYLM_SYSTEM "apple-darwin"
#elif defined(_WIN32)
#define DYLM_SYSTEM "windows"
#elif defined(__linux__)
#define DYLM_SYSTEM "linux"
#else
#define DYLM_SYSTEM "another system"
#endif
#define DYLM_NOTE_TEXT(NAME, VERSION, LICENSE, URL, ...)                                                                  \
    "{\"abi\":\"1.0\",\"model_types\":" DYLM_JSON_LIST(__VA_ARGS__) ",\"needs\":[" DYLM_NEEDS "],\"name\":" DYLM_JSON(NAME) \
    ",\"version\":" DYLM_JSON(VERSION) ",\"license\":" DYLM_JSON(LICENSE) ",\"url\":" DYLM_JSON(URL)                      \
    ",\"rustc\":\"" DYLM_COMPILER "\",\"target\":\"" DYLM_MACHINE "-" DYLM_SYSTEM "\",\"panic\":\"none\"}"

#if defined(__APPLE__)
#define DYLM_PLUGIN_NOTE(text) __attribute__((used, section("__DATA,__dylm"))) static const char dylm_note_[] = text;
#elif defined(_MSC_VER)
#define DYLM_PLUGIN_NOTE(text) \
    __pragma(section(".dylm", read)) __declspec(allocate(".dylm")) extern const char dylm_note_[] = text;
#elif defined(_WIN32)
#define DYLM_PLUGIN_NOTE(text) __attribute__((used, section(".dylm"))) static const char dylm_note_[] = text;
#else
// System V ABI, chapter 5, "Note Section": lengths of name and text, type, name in whole words, text.
#define DYLM_PLUGIN_NOTE(text_)                                                                          \
    __attribute__((used, section(".note.dylm"), aligned(4))) static const struct {                       \
        uint32_t name_size, text_size, type;                                                             \
        char name[8], text[sizeof(text_)];                                                               \
    } dylm_note_ = {5, sizeof(text_) - 1, 1, "dylm", text_};
#endif

/// What a plugin offers as `examples/1`: configurations for `dylm check` to build, a list of dylm_text.
typedef struct dylm_examples {
    uint64_t size;
    dylm_list texts;
} dylm_examples;

/// A factory extension called NAME that offers one configuration, written as it is: DYLM_EXAMPLE(example, {"hidden_size": 64}).
#define DYLM_EXAMPLE(NAME, ...)                                                                                           \
    static const void *NAME(dylm_text id)                                                                                 \
    {                                                                                                                     \
        static const char json[] = #__VA_ARGS__, name[] = "examples/1";                                                   \
        static const dylm_text texts[] = {{json, sizeof json - 1}};                                                       \
        static const dylm_examples table = {sizeof(dylm_examples), {texts, 1}};                                           \
        return id.len == sizeof name - 1 && memcmp(id.start, name, sizeof name - 1) == 0 ? &table : NULL;                 \
    }

/// Makes a library into a plugin, once: your four functions (see the top); name, version, licence (SPDX) and address as string literals; the
/// model_types of config.json that it serves.
#define DYLM_PLUGIN(NEW, FORWARD, HEAD, DROP, NAME, VERSION, LICENSE, URL, ...) \
    DYLM_PLUGIN_WITH(NULL, NEW, FORWARD, HEAD, DROP, NAME, VERSION, LICENSE, URL, __VA_ARGS__)

/// The same with a factory extension, as DYLM_EXAMPLE makes one. (A model's is `model->extension`, for new_model to set.)
#define DYLM_PLUGIN_WITH(EXTENSION, NEW, FORWARD, HEAD, DROP, NAME, VERSION, LICENSE, URL, ...)                           \
    DYLM_BEGIN_C                                                                                                          \
    DYLM_PLUGIN_NOTE(DYLM_NOTE_TEXT(NAME, VERSION, LICENSE, URL, __VA_ARGS__))                                            \
    static const char dylm_text_[] = DYLM_NOTE_TEXT(NAME, VERSION, LICENSE, URL, __VA_ARGS__);                            \
    static uint64_t dylm_forward_(const void *data, const dylm_host *host, void *ctx, uint64_t tokens)                    \
    {                                                                                                                     \
        return dylm_run(FORWARD, data, host, ctx, tokens);                                                                \
    }                                                                                                                     \
    static uint64_t dylm_head_(const void *data, const dylm_host *host, void *ctx, uint64_t hidden)                       \
    {                                                                                                                     \
        return dylm_run(HEAD, data, host, ctx, hidden);                                                                   \
    }                                                                                                                     \
    static uint32_t dylm_create_(const dylm_host *host, void *ctx, dylm_text config, dylm_model *model)                   \
    {                                                                                                                     \
        (void)config;                                                                                                     \
        model->forward = dylm_forward_;                                                                                   \
        model->head = dylm_head_;                                                                                         \
        model->drop = DROP;                                                                                               \
        return dylm_create(NEW, host, ctx, model);                                                                        \
    }                                                                                                                     \
    extern DYLM_EXPORT const dylm_plugin dylm_c_plugin_1;                                                                 \
    const dylm_plugin dylm_c_plugin_1 = {                                                                                 \
        sizeof(dylm_plugin), DYLM_MAJOR, 0, {dylm_text_, sizeof dylm_text_ - 1}, dylm_create_, EXTENSION};                   \
    DYLM_END_C                                                                                                            \
    DYLM_ASSERT(sizeof(dylm_plugin) >= 24)

#endif
