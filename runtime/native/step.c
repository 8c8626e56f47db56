/* One pass of the network over up to 128 tokens: what the threads do between their meetings.
 *
 * A layer has five meetings: q/k/v (each thread whole heads, with norm, RoPE and the cache's slot), attention, output
 * projection, gate and up, down. Norms and activation quantization of a few rows are repeated by every thread, which
 * costs less than meeting once more; of many rows they are shared out. Attention of few tokens over a long cache is
 * shared out by chunks of slots, and whoever finishes a head last merges its chunks, in slot order.
 */
#ifndef __clang__
#pragma GCC optimize("O3")                           /* makes vectors of the plain loops below, as clang does anyway */
#endif
#define _GNU_SOURCE
#include "core.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { FEW = 4 };                                    /* rows that every thread prepares for itself */
enum { RUN = 8, LONG_RUN = 32 };                     /* tokens of one attention unit */
enum { WIDE = 4 };                                   /* tiles of gate and up that EW_PASS tokens pass before the next */

/* The buffers of a pass; widest is the model's. A state is of attention_job: [2 + padded_dim]. */
struct scratch {
    float *x;                                        /* [EW_PASS][widest] residual stream: hidden floats a token */
    float *y;                                        /* [EW_PASS][widest] queries; outputs of o and down */
    float *keys;                                     /* [EW_PASS][widest] on their way into the cache */
    float *middle;                                   /* [EW_PASS][widest] values on their way; inputs of o and down */
    activations shared;                              /* [EW_PASS] rows of [widest]: inputs of a product */
    activations own[MAX_THREADS];                    /* [FEW] rows of [widest]: the same, of each thread */
    float *wide[MAX_THREADS];                        /* [2][EW_PASS * WIDE * TILE] outputs of gate and of up */
    float *state[MAX_THREADS];                       /* [2][LONG_RUN * most_queries] states: so far, next chunk's */
    float *chunks;                                   /* [runs * kv heads][chunks][longest * most_queries] states */
    size_t chunk_floats;                             /* that `chunks` has room for */
    int finished[4 * MAX_THREADS];                   /* chunks done, of each run and kv head */
};

/* A pass; each thread has a copy of its own and moves through the layers by itself. */
typedef struct {
    ew_model *m;
    struct scratch *s;
    ew_cache *cache;
    int tokens, wanted_tokens;
    const int32_t *token, *row, *slot;               /* [tokens] */
    const int32_t *wanted;                           /* [wanted_tokens]: of the pass, whose logits are asked */
    float *logits;                                   /* [wanted_tokens][vocab] */
    int runs, longest, high;                         /* attention units, tokens of the longest, slots at most */
    int run[EW_PASS + 1];                            /* [runs + 1]: first token of each */
    int id, threads, layer;
    double clock;
} pass;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void meet(pass *p, int part) {
    pool_barrier(p->m->pool, p->threads);
    if (p->id == 0 && p->m->profile) {
        double t = now();
        p->m->seconds[part] += t - p->clock;
        p->clock = t;
    }
}

/* Where the part of n things begins that is this thread's; or the `next` one's. */
static int share(const pass *p, int n, int next) { return (int)((int64_t)n * (p->id + next) / p->threads); }

static int activations_new(ew_model *m, activations *a, int rows) {
    size_t n = (size_t)rows * m->widest;
    a->f = keep(m, n * sizeof(float));
    a->q = keep(m, n * 2);                           /* of bfloat16 in amx.h, else half of it */
    a->scale = keep(m, n / BLOCK * sizeof(float));
    a->sum = keep(m, n / BLOCK * sizeof(int32_t));
    return a->f && a->q && a->scale && a->sum;
}

int scratch_new(ew_model *m) {
    struct scratch *s = m->scratch = keep(m, sizeof *s);
    if (!s || !activations_new(m, &s->shared, EW_PASS)) return -1;
    float **rows[] = {&s->x, &s->y, &s->keys, &s->middle};
    for (int i = 0; i < 4; i++)
        if (!(*rows[i] = keep(m, (size_t)EW_PASS * m->widest * sizeof(float)))) return -1;
    size_t states = (size_t)LONG_RUN * m->most_queries * (2 + m->padded_dim);
    for (int i = 0; i < m->threads; i++) {
        s->wide[i] = keep(m, 2 * EW_PASS * WIDE * TILE * sizeof(float));
        s->state[i] = keep(m, 2 * states * sizeof(float));
        if (!s->wide[i] || !s->state[i] || !activations_new(m, &s->own[i], FEW)) return -1;
    }
    return 0;
}

void scratch_free(ew_model *m) { if (m->scratch) free(m->scratch->chunks); }

/* Waits for a turn with the model. What a pass that a fork has cut off left half done is made anew. (Its chunks may be
 * freed or not: they are left.) */
static void enter(ew_model *m) {
    if (!pool_enter(m->pool)) return;
    memset(m->scratch->finished, 0, sizeof m->scratch->finished);
    m->scratch->chunks = NULL, m->scratch->chunk_floats = 0;
}

/* Rows [n] of the residual stream (those that `pick` lists, if given), normalized by weight and bias [n], ready for a
 * product; or of `middle` as they are, where weight is NULL. */
static activations prepare(pass *p, int rows, int n, const float *weight, const float *bias, const int32_t *pick) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const int few = rows <= FEW, first = few ? 0 : share(p, rows, 0), last = few ? rows : share(p, rows, 1);
    activations a = few ? p->s->own[p->id] : p->s->shared;
    a.blocks = ceil_div(n, BLOCK);
    if (!weight) a.f = p->s->middle;
    for (int r = first; r < last; r++) {
        const float *x = p->s->x + (size_t)(pick ? pick[r] : r) * m->widest;
        float *f = a.f + (size_t)r * a.blocks * BLOCK;
        if (weight) k->normalize(x, weight, bias, m->config.norm_eps, m->config.layer_norm, f, n);
        if (n % BLOCK) memset(f + n, 0, (a.blocks * BLOCK - n) * sizeof(float));
    }
    if (m->fp32) a.q = NULL;
    else k->quantize(&a, rows, first, last);
    if (!few) pool_barrier(m->pool, p->threads);
    return a;
}

/* x [tokens][hidden] = rows of the table (plus those of the positions). */
static void embed(pass *p) {
    const ew_model *m = p->m;
    for (int i = share(p, p->tokens, 0); i < share(p, p->tokens, 1); i++) {
        float *x = p->s->x + (size_t)i * m->widest, position[m->widest];
        matrix_read_row(&m->embed, p->token[i], x);
        if (!m->config.learned_positions) continue;
        matrix_read_row(&m->positions, p->slot[i], position);
        for (int d = 0; d < m->config.hidden; d++) x[d] += position[d];
    }
}

/* Heads h0..h1-1 of q (which 0), k (1) or v (2): project, normalize, rotate, and put k and v into the cache. */
static void project_heads(pass *p, const activations *a, const layer *l, int which, int h0, int h1) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const matrix *w = which == 0 ? &l->q : which == 1 ? &l->k : &l->v;
    const float *norm = which == 0 ? l->q_norm : l->k_norm, scale = 1 / sqrtf(m->config.head_dim);
    float *out = which == 0 ? p->s->y : which == 1 ? p->s->keys : p->s->middle;
    const int dim = m->config.head_dim, half = dim / 2;
    k->multiply(w, a, p->tokens, out, m->widest, h0 * dim / TILE, ceil_div(h1 * dim, TILE));
    for (int i = 0; i < p->tokens; i++)
        for (int h = h0; h < h1; h++) {
            float *x = out + (size_t)i * m->widest + h * dim;
            const size_t angle = (size_t)p->slot[i] * half;
            if (which < 2 && m->config.qk_norm) k->normalize(x, norm, NULL, m->config.norm_eps, 0, x, dim);
            if (which < 2 && m->cos) k->rotate(x, m->cos + angle, m->sin + angle, half);
            if (which) k->append(&p->cache->layer[p->layer], p->row[i], h, p->slot[i], x, which == 2);
            else for (int d = 0; d < dim; d++) x[d] *= scale;
        }
}

/* Queries to y, keys and values to the cache: each thread some heads of them. */
static void project(pass *p, const layer *l) {
    const ew_model *m = p->m;
    activations a = prepare(p, p->tokens, m->config.hidden, l->attn_norm, l->attn_norm_bias, NULL);
    const int whole = m->config.head_dim % TILE != 0;    /* tiles that straddle heads: q, k and v are not divided */
    const int heads = whole ? 1 : l->heads, kv_heads = whole ? 1 : l->kv_heads, units = heads + 2 * kv_heads;
    for (int u = share(p, units, 0); u < share(p, units, 1); u++) {
        const int which = u < heads ? 0 : u < heads + kv_heads ? 1 : 2;
        const int h = u - (which > 0) * heads - (which > 1) * kv_heads;
        project_heads(p, &a, l, which, h, whole ? (which ? l->kv_heads : l->heads) : h + 1);
    }
}

/* middle [tokens][heads * head_dim] = attention of y over the cache. A unit is a run of tokens and a kv head, or, where
 * that gives few units (split), one chunk of slots of these. */
static void attention(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const int dim = m->config.head_dim, window = m->config.sliding_window, group = l->heads / l->kv_heads;
    const int most = p->longest * m->most_queries, pairs = p->runs * l->kv_heads, chunks = ceil_div(p->high, CHUNK);
    const int split = chunks > 1 && pairs < 4 * p->threads, units = split ? pairs * chunks : pairs;
    const size_t stride = 2 + m->padded_dim, one = most * stride, width = (size_t)l->o.blocks * BLOCK;
    const float *query[most];
    float *out[most];
    int low[most], high[most];
    for (int u = p->id; u < units; u += p->threads) {        /* in turns: later tokens of a prompt see more slots */
        const int pair = split ? u / chunks : u, run = pair / l->kv_heads, head = pair % l->kv_heads;
        int n = 0;
        for (int i = p->run[run]; i < p->run[run + 1]; i++)
            for (int h = head * group; h < (head + 1) * group; h++, n++) {
                query[n] = p->s->y + (size_t)i * m->widest + h * dim;
                out[n] = p->s->middle + i * width + h * dim;
                high[n] = p->slot[i] + 1;
                low[n] = window && high[n] > window ? high[n] - window : 0;
            }
        const attention_job job = {&p->cache->layer[p->layer], p->row[p->run[run]], head, n,
                                   p->tokens >= EW_MANY && !m->fp32, query, low, high};
        const int begin = low[0] / CHUNK, end = ceil_div(high[n - 1], CHUNK);
        float *into = split ? p->s->chunks + ((size_t)pair * chunks + begin) * one : p->s->state[p->id];
        if (split) {
            const int chunk = u % chunks;
            if (chunk < begin || chunk >= end) continue;
            k->attend(&job, chunk * CHUNK, into + (chunk - begin) * one, stride);
            if (__atomic_add_fetch(&p->s->finished[pair], 1, __ATOMIC_ACQ_REL) < end - begin) continue;
            p->s->finished[pair] = 0;
        } else k->attend(&job, begin * CHUNK, into, stride);
        for (int c = begin + 1; c < end; c++) {
            float *next = into + (split ? c - begin : 1) * one;
            if (!split) k->attend(&job, c * CHUNK, next, stride);
            for (size_t q = 0; q < n * stride; q += stride) k->merge(into + q, next + q, m->padded_dim);
        }
        for (int q = 0; q < n; q++, into += stride)
            for (int d = 0; d < dim; d++) out[q][d] = into[2 + d] / into[1];
    }
}

/* x [tokens][hidden] += w * middle (plus bias), each thread its own columns. */
static void add_product(pass *p, const matrix *w) {
    const ew_model *m = p->m;
    activations a = prepare(p, p->tokens, w->inputs, NULL, NULL, NULL);
    const int t0 = share(p, w->tiles, 0), t1 = share(p, w->tiles, 1), end = t1 * TILE < w->rows ? t1 * TILE : w->rows;
    m->kernels->multiply(w, &a, p->tokens, p->s->y, m->widest, t0, t1);
    for (int i = 0; i < p->tokens; i++) {
        float *x = p->s->x + (size_t)i * m->widest, *y = p->s->y + (size_t)i * m->widest;
        for (int c = t0 * TILE; c < end; c++) x[c] += y[c];
    }
}

/* middle [tokens][mlp] = activation(gate) * up, each thread its own columns, as many at once as its buffer takes for
 * all tokens. */
static void widen(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    activations a = prepare(p, p->tokens, m->config.hidden, l->mlp_norm, l->mlp_norm_bias, NULL);
    const int end = share(p, l->up.tiles, 1), at_once = EW_PASS * WIDE / p->tokens, gated = l->gate.rows > 0;
    float *gate = p->s->wide[p->id], *up = gate + EW_PASS * WIDE * TILE;
    for (int t = share(p, l->up.tiles, 0), last; t < end; t = last) {
        last = t + at_once < end ? t + at_once : end;
        const int columns = (last - t) * TILE;
        if (gated) k->multiply(&l->gate, &a, p->tokens, gate - t * TILE, columns, t, last);
        k->multiply(&l->up, &a, p->tokens, up - t * TILE, columns, t, last);
        for (int i = 0; i < p->tokens; i++) {
            float *out = p->s->middle + (size_t)i * l->down.blocks * BLOCK + t * TILE;
            k->activate(gated ? gate + i * columns : NULL, up + i * columns, out, columns, m->config.activation);
        }
    }
}

/* logits [wanted_tokens][vocab]. */
static void head(pass *p) {
    const ew_model *m = p->m;
    const matrix *w = m->head_matrix;
    activations a = prepare(p, p->wanted_tokens, m->config.hidden, m->final_norm, m->final_norm_bias, p->wanted);
    const int t0 = share(p, w->tiles, 0), t1 = share(p, w->tiles, 1);
    m->kernels->multiply(w, &a, p->wanted_tokens, p->logits, m->config.vocab, t0, t1);
}

static void work(void *context, int id, int threads) {
    pass mine = *(pass *)context, *p = &mine;
    p->id = id, p->threads = threads, p->clock = id == 0 ? now() : 0;
    embed(p);
    meet(p, EW_PART_OTHER);
    for (p->layer = 0; p->layer < p->m->config.layers; p->layer++) {
        const layer *l = &p->m->layers[p->layer];
        project(p, l);
        meet(p, EW_PART_QKV);
        attention(p, l);
        meet(p, EW_PART_ATTENTION);
        add_product(p, &l->o);
        meet(p, EW_PART_OUTPUT);
        widen(p, l);
        meet(p, EW_PART_GATE_UP);
        add_product(p, &l->down);
        meet(p, EW_PART_DOWN);
    }
    if (p->wanted_tokens) head(p);
    meet(p, EW_PART_HEAD);
}

/* Why a pass cannot be, or NULL. */
static const char *refuse(const pass *p) {
    const ew_config *config = &p->m->config;
    if (p->tokens < 1 || p->tokens > EW_PASS || p->wanted_tokens < 0 || p->wanted_tokens > EW_PASS)
        return "a pass takes 1 to 128 tokens";
    for (int i = 0; i < p->tokens; i++) {
        if (p->token[i] < 0 || p->token[i] >= config->vocab) return "a token is outside the vocabulary";
        if (p->row[i] < 0 || p->row[i] >= p->cache->rows) return "a row is outside the cache";
        if (p->slot[i] < 0 || p->slot[i] >= p->cache->capacity || p->slot[i] >= config->max_context)
            return "a position is outside the cache or the context";
    }
    for (int i = 0; i < p->wanted_tokens; i++)
        if (p->wanted[i] < 0 || p->wanted[i] >= p->tokens) return "logits are asked of a token that is not in the pass";
    return NULL;
}

/* Consecutive tokens of one row share the reading of their cache, up to RUN of them, or LONG_RUN of a long prompt. */
static void find_runs(pass *p) {
    const int most = p->tokens >= EW_MANY ? LONG_RUN : RUN;
    for (int i = 0; i < p->tokens; i++) {
        int first = p->runs ? p->run[p->runs - 1] : 0;
        int joins = i && p->row[i] == p->row[i - 1] && p->slot[i] == p->slot[i - 1] + 1 && i - first < most;
        if (!joins) p->run[p->runs++] = first = i;
        if (i - first >= p->longest) p->longest = i - first + 1;
        if (p->slot[i] >= p->high) p->high = p->slot[i] + 1;
    }
    p->run[p->runs] = p->tokens;
}

/* Room for attention split by chunks, for as many pairs as attention() splits. 0 where memory lacks. */
static int chunks_fit(const pass *p) {
    struct scratch *s = p->s;
    const int pairs = p->m->threads * 4, chunks = ceil_div(p->high, CHUNK);
    size_t floats = (size_t)pairs * chunks * p->longest * p->m->most_queries * (2 + p->m->padded_dim);
    if (chunks == 1 || floats <= s->chunk_floats) return 1;
    free(s->chunks);
    s->chunks = malloc(floats * sizeof(float));
    s->chunk_floats = s->chunks ? floats : 0;
    return s->chunks != NULL;
}

int ew_forward(ew_model *m, ew_cache *cache, int tokens, const int32_t *token, const int32_t *row, const int32_t *slot,
               int n_wanted, const int32_t *wanted, float *logits, char *error) {
    pass p = {.m = m, .s = m->scratch, .cache = cache, .tokens = tokens, .wanted_tokens = n_wanted, .token = token,
              .row = row, .slot = slot, .wanted = wanted, .logits = logits};
    const char *why = refuse(&p);
    if (why) {
        snprintf(error, 256, "%s", why);
        return -1;
    }
    find_runs(&p);
    enter(m);
    const int fits = chunks_fit(&p);
    if (fits) pool_run(m->pool, work, &p);
    else snprintf(error, 256, "out of memory for attention over %d slots", p.high);
    pool_leave(m->pool);
    return fits ? 0 : -1;
}

void ew_profile(ew_model *m, int on, double *microseconds) {
    enter(m);
    for (int i = 0; i < EW_PARTS; i++) {
        if (microseconds) microseconds[i] = m->seconds[i] * 1e6;
        m->seconds[i] = 0;
    }
    m->profile = on;
    pool_leave(m->pool);
}
