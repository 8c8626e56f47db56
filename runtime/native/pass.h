/* A pass of the network, as each thread has it, and what its blocks share.
 *
 * Blocks are functions that every thread calls with its own copy of the pass: each does its share and they meet where
 * one needs what another made. Norms and quantization of a few rows are repeated by every thread, which costs less than
 * meeting once more; of many rows they are shared out.
 */
#ifndef EDGEWRIGHT_PASS_H
#define EDGEWRIGHT_PASS_H

#include "core.h"

enum { FEW = 4 };                                    /* rows that every thread prepares for itself */
enum { LONG_RUN = 32 };                              /* tokens of one attention unit, at most */
enum { WIDE = 4 };                                   /* tiles of gate and up that EW_PASS tokens pass before the next */

/* The buffers of a pass; widest is the model's. A state is of attention_job: [2 + padded]. */
struct scratch {
    float *x;                                        /* [EW_PASS][widest] residual stream: hidden floats a token */
    float *y;                                        /* [EW_PASS][widest] queries, convolved channels; outputs */
    float *keys;                                     /* [EW_PASS][widest] on their way into the cache; z of a state */
    float *middle;                                   /* [EW_PASS][widest] values on their way; last products' inputs */
    float *gate;                                     /* [EW_PASS][widest] of attention's heads, where they have gates */
    float *narrow;                                   /* [EW_PASS][narrow] a number or two of each head or expert */
    float *per_layer;                                /* [EW_PASS][layers * per_layer], where layers have own inputs */
    activations shared;                              /* [EW_PASS] rows of [widest]: inputs of a product */
    activations gathered;                            /* [EW_PASS] the same, of experts */
    activations own[MAX_THREADS];                    /* [FEW] rows of [widest]: the same, of each thread */
    float *wide[MAX_THREADS];                        /* [2][EW_PASS * WIDE * TILE] outputs of two products */
    float *state[MAX_THREADS];                       /* [2] states of the queries of a unit: so far, next chunk's */
    float *chunks;                                   /* [runs * kv heads][chunks][longest] the same of a kv head */
    size_t chunk_floats;                             /* that `chunks` has room for */
    int finished[4 * MAX_THREADS];                   /* chunks done, of each run and kv head */
    int bad;                                         /* 1 + a token whose per-layer input is not finite */
};

typedef struct {
    ew_model *m;
    struct scratch *s;
    ew_cache *cache;
    const ew_states *states;
    int tokens, wanted_tokens;
    const int32_t *token, *row, *slot;               /* [tokens] */
    const int32_t *wanted;                           /* [wanted_tokens]: of the pass, whose logits are asked */
    const int32_t *origin;                           /* [tokens] of the pass, where others were dropped; or NULL */
    float *logits;                                   /* [wanted_tokens][vocab] */
    ew_choice *choices;                              /* [wanted_tokens], or NULL */
    int runs, longest, high;                         /* attention units, tokens of the longest, slots at most */
    int segments;                                    /* of tokens of one row one after the other */
    int run[EW_PASS + 1], segment[EW_PASS + 1];      /* first token of each, and the end */
    int id, threads, layer;
    double clock;
} pass;

/* Where the part of n things begins that is this thread's; or the `next` one's. */
static inline int share(const pass *p, int n, int next) { return (int)((int64_t)n * (p->id + next) / p->threads); }

/* pass.c */
void enter(ew_model *);                              /* waits for a turn with the model */
void start_clock(pass *);
void meet(pass *, int part);                         /* all threads; the time since the last meeting is that part's */

/* Rows [n] of the residual stream (those that `pick` lists, if given), normalized by `by` (if its weight is given),
 * ready for a product. */
activations prepare(pass *, int rows, int n, const norm *by, const int32_t *pick);
/* The same of `middle`, which the rows [n] fill to whole blocks one after the other; by may be NULL. */
activations prepare_middle(pass *, int rows, int n, const norm *by);

/* This thread's tiles t0..t1-1 of the next of several matrices, which have `total` tiles together: `at` (at first 0) is
 * how many came before. 0 where it has none. */
int own_tiles(const pass *, const matrix *, int total, int *at, int *t0, int *t1);

/* Has what a product reads first fetched, from a tile on, while something else is done: what comes later is fetched
 * during the product. */
void expect_tile(const matrix *, int tile);

/* x [tokens][hidden] += w * middle (normalized by `before`, or NULL), the product normalized by `after` (if its weight
 * is given); then x *= times. */
void add_product(pass *, const matrix *w, const norm *before, const norm *after, float times);
/* x += y in the same way, where all threads have met since y was made. */
void add_rows(pass *, const norm *after, float times);

/* Mixers leave what `layer.out` multiplies in middle. */
void attention(pass *, const layer *);
void short_convolution(pass *, const layer *);
void delta_rule(pass *, const layer *);
void mamba(pass *, const layer *);
int chunks_fit(const pass *);                        /* attention.c: 0 where memory lacks */

/* recurrent.c: columns c0..c0+n-1 of the layer's convolution: in [tokens][stride] (their columns alone) to out. */
void convolve(const pass *, const layer *, const float *in, size_t stride, int c0, int n, float *out,
              size_t out_stride);
/* The layer's convolved columns, through SiLU, to y, z to keys, numbers to narrow, the second after the tiles of the
 * first; then each thread answers for some heads: their tokens of a segment to middle. */
void run_states(pass *, const layer *, void (*answer)(pass *, const layer *, int segment, int head));
/* Where the tokens of a segment find a part of their row's states (NULL: zeros) and leave it; at: floats before it. */
const float *state_from(const pass *, int segment, size_t at);
float *state_to(const pass *, int segment, size_t at);
float softplus(float);

/* mlp.c: the block of a layer, x += mlp(norm(x)), with experts (experts.c) where it has them. */
void feed(pass *, const layer *, float times);
/* Tiles t0..t1-1 of activation(gate a) * up a, to out [rows][down.blocks * 32]. */
void widen(pass *, const mlp *, const activations *a, int rows, float *out, int t0, int t1);
void feed_experts(pass *, const layer *, float times);

/* per_layer.c: the inputs of all layers, after the embedding; and the block that adds a layer's. */
void per_layer_inputs(pass *);
void add_per_layer(pass *, const layer *);

/* decode.c: what is sought in a row of logits x [n], which it may penalize; k is at least 1. */
void seek(const kernels *, ew_choice *, float *x, int n);

#endif
