// A llama that makes one mistake: in what it exports, by macros of the compiler's command line, or in a call, by the key `misbehave` of
// config.json. What must come of each stands in tests/tests/c_bad_plugins.rs.

#include "dylm.h"

#include <pthread.h>
#define LLAMA_IS_A_PART
#include "llama.c"

static const char *misbehave = "";
static char marker[256];
static dylm_tensor kept;
static dylm_cache_spec many_caches[100001];

static int does(const char *mistake) { return strcmp(misbehave, mistake) == 0; }

static void make(dylm *d, dylm_model *model)
{
    static char copy[64];
    dylm_weights whole = dylm_whole(d);
    snprintf(copy, sizeof copy, "%s", dylm_config_text(d, "misbehave", ""));
    snprintf(marker, sizeof marker, "%s", dylm_config_text(d, "marker", ""));
    misbehave = copy;
    new_model(d, model);
    if (does("read a key that is missing")) dylm_config_f64(d, "rope_parameters.theta", NAN);
    if (does("read a number of a list")) dylm_config_u64(d, "listed.1", 0, 9, 0);
    if (does("read a key of no name")) d->host->config->number(d->ctx, dylm_text_of("\xff"), 0);
    if (does("read a flag")) dylm_config_bool(d, "hidden_size", 0);
    if (does("read a text")) dylm_config_text(d, "hidden_size", NULL);
    if (does("count")) dylm_config_count(d, "hidden_size");
    if (does("name a tensor in no UTF-8")) dylm_source(d, "model.\xff");
    if (does("run while building")) dylm_positions(d);
    if (does("say a long name")) dylm_below(&whole, "%0300d", 7);
    if (does("forget forward")) model->forward = NULL;
    if (does("put caches nowhere")) model->caches = NULL;
    if (does("ask for endless caches")) {
        model->caches = many_caches;
        model->cache_count = UINT64_MAX;
    }
}

static void *off_the_thread(void *d)
{
    kept = dylm_positions((dylm *)d);
    return NULL;
}

static dylm_tensor misforward(dylm *d, const void *data, dylm_tensor tokens)
{
    dylm_tensor x = dylm_embed(d, ((const llama *)data)->embed, tokens);
    if (does("fail with words")) dylm_error(d, DYLM_ERROR_ABI, "a deliberate failure of %d words", 5);
    if (does("fail with a tensor")) return dylm_fail(d, "a deliberate failure");
    if (does("fail in no UTF-8")) return dylm_fail(d, "\xff");
    if (does("add unlike shapes")) return dylm_add(d, x, dylm_transpose(d, x));
    if (does("build while running")) dylm_source(d, "model.norm.weight");
    if (does("read config.json")) dylm_config_u64(d, "hidden_size", 0, 99, 0);
    if (does("return no tensor")) return DYLM_NO_TENSOR;
    if (does("concatenate nothing from nowhere")) return dylm_concat(d, NULL, 3);
    if (does("attend somehow")) return dylm_attend(d, 0, x, x, x, NULL);
#ifdef LATER_CALLS
    if (does("call what came later")) return dylm_later_neg(d, x);
#endif
#ifdef LATER_ASKS
    if (does("negate") && dylm_have_later_neg(d)) return DYLM_NO_TENSOR;
#endif
    if (does("compute off the thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, off_the_thread, d);
        pthread_join(thread, NULL);
        return kept;
    }
    if (does("keep a tensor")) {
        if (!kept.id) kept = x;
        return dylm_add(d, x, kept);
    }
    if (does("release twice")) {
        dylm_release(d, x);
        dylm_release(d, x);
    }
    return forward(d, data, tokens);
}

static void misdrop(void *data)
{
    FILE *file = marker[0] ? fopen(marker, "a") : NULL;
    if (file) {
        fputs("dropped\n", file);
        fclose(file);
    }
    drop(data);
}

static uint64_t raw_forward(const void *data, const dylm_host *host, void *ctx, uint64_t tokens)
{
    return dylm_run(misforward, data, host, ctx, tokens);
}

static uint64_t raw_head(const void *data, const dylm_host *host, void *ctx, uint64_t hidden)
{
    return dylm_run(head, data, host, ctx, hidden);
}

// Not static, for some builds do not export it.
uint32_t raw_create(const dylm_host *host, void *ctx, dylm_text config, dylm_model *model)
{
    (void)config;
    model->forward = raw_forward;
    model->head = raw_head;
    model->drop = misdrop;
    uint32_t failed = dylm_create(make, host, ctx, model);
    return does("give up without a word") ? 77 : failed;
}

#ifndef SIZE
#define SIZE sizeof(dylm_plugin)
#endif
#ifndef MAJOR
#define MAJOR DYLM_MAJOR
#endif
#ifndef MINOR
#define MINOR 0
#endif
#ifndef CREATE
#define CREATE raw_create
#endif
#ifndef INSIDE
#define INSIDE DYLM_NOTE_TEXT("bad", "0.1.0", "MIT", "", "bad_c")
#endif

DYLM_BEGIN_C
DYLM_PLUGIN_NOTE(DYLM_NOTE_TEXT("bad", "0.1.0", "MIT", "", "bad_c"))
const char inside[] = INSIDE;
#ifndef NO_PLUGIN
extern DYLM_EXPORT const dylm_plugin dylm_c_plugin_1;
const dylm_plugin dylm_c_plugin_1 = {SIZE, MAJOR, MINOR, {inside, sizeof inside - 1}, CREATE, NULL};
#endif
DYLM_END_C
