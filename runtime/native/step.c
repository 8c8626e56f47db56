/* One pass of the network over up to 128 tokens: what the threads do between their meetings.
 *
 * A layer has five meetings: q/k/v (each thread whole heads, with norm, RoPE and the cache's slot), attention, output
 * projection, gate and up, down. Norms and activation quantization of a few rows are repeated by every thread, which
 * costs less than meeting once more; of many rows they are shared out. Attention of few tokens over a long cache is
 * shared out by chunks of slots, and whoever finishes a head last merges its chunks, in slot order.
 */
#pragma GCC optimize("O3")                           /* makes vectors of the plain loops below */
#define _GNU_SOURCE
#include "core.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { FEW = 4 };                                    /* rows that every thread prepares for itself */
enum { RUN = 8, LONG_RUN = 32 };                     /* tokens of one attention unit */
enum { WIDE = 4 };                                   /* tiles of gate and up that EW_PASS tokens run through before the next */

struct scratch {
    float *x, *y, *gate, *middle;                    /* [EW_PASS][widest] */
    activations shared, own[MAX_THREADS];
    float *wide[MAX_THREADS];                        /* outputs of gate and up */
    float *state[MAX_THREADS];                       /* two states for every query of an attention unit */
    float *chunks;                                   /* states of attention split by chunks */
    size_t chunk_floats;
    int *finished;                                   /* chunks done, per run and head */
};

typedef struct {
    ew_model *m;
    struct scratch *s;
    int tokens, n_wanted, runs, longest, threads, high;
    const int32_t *token, *row, *slot, *wanted;
    float *logits;
    cache_layer cache;
    ew_cache *whole;
    int run[EW_PASS + 1];                            /* first token of each attention unit */
    double clock;
} step;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void meet(step *s, int id, int part) {
    pool_barrier(s->m->pool, s->threads);
    if (id == 0 && s->m->profile) {
        double t = now();
        s->m->seconds[part] += t - s->clock;
        s->clock = t;
    }
}

static int share(int n, int id, int threads) { return (int)((int64_t)n * id / threads); }

static int activations_new(activations *a, int rows, int width, int with_floats) {
    size_t n = (size_t)rows * width;
    a->f = with_floats ? calloc(n, sizeof(float)) : NULL;
    a->q = calloc(n, 2);                             /* of bfloat16 in amx.h, else half of it */
    a->scale = calloc(n / BLOCK, sizeof(float));
    a->sum = calloc(n / BLOCK, sizeof(int32_t));
    return (with_floats && !a->f) || !a->q || !a->scale || !a->sum;
}

int scratch_new(ew_model *m) {
    struct scratch *s = m->scratch = calloc(1, sizeof *s);
    if (!s) return -1;
    size_t pass = (size_t)EW_PASS * m->widest;
    int bad = 0;
    float **buffers[] = {&s->x, &s->y, &s->gate, &s->middle};
    for (int i = 0; i < 4; i++) bad |= !(*buffers[i] = calloc(pass, sizeof(float)));
    bad |= activations_new(&s->shared, EW_PASS, m->widest, 1);
    bad |= !(s->finished = calloc(4 * MAX_THREADS, sizeof(int)));
    for (int i = 0; i < m->threads; i++) {
        bad |= activations_new(&s->own[i], FEW, m->widest, 1);
        bad |= !(s->wide[i] = calloc(2 * EW_PASS * WIDE * TILE, sizeof(float)));
        bad |= !(s->state[i] = malloc(2 * (size_t)LONG_RUN * m->most_queries * (2 + m->padded_dim) * sizeof(float)));
    }
    return bad ? -1 : 0;
}

/* After a pass that a fork has cut off: what it kept for the next. (Chunks may be freed or not: they are left.) */
static void scratch_renew(struct scratch *s) {
    memset(s->finished, 0, 4 * MAX_THREADS * sizeof(int));
    s->chunks = NULL, s->chunk_floats = 0;
}

static void activations_free(activations *a) { free(a->f); free(a->q); free(a->scale); free(a->sum); }

void scratch_free(ew_model *m) {
    struct scratch *s = m->scratch;
    if (!s) return;
    free(s->x); free(s->y); free(s->gate); free(s->middle); free(s->chunks); free(s->finished);
    activations_free(&s->shared);
    for (int i = 0; i < MAX_THREADS; i++) { activations_free(&s->own[i]); free(s->wide[i]); free(s->state[i]); }
    free(s);
}

/* Rows of the residual stream, normalized (weight given), or of `middle` as it is, ready for a product. */
static activations prepare(step *s, int id, int rows, int n, const float *weight, const float *bias, const int32_t *pick) {
    const ew_model *m = s->m;
    int few = rows <= FEW, first = few ? 0 : share(rows, id, s->threads), last = few ? rows : share(rows, id + 1, s->threads);
    activations a = few ? s->s->own[id] : s->s->shared;
    a.blocks = ceil_div(n, BLOCK);
    if (!weight) a.f = s->s->middle;
    for (int r = first; r < last; r++) {
        float *f = a.f + (size_t)r * a.blocks * BLOCK;
        if (weight) m->kernels->normalize(s->s->x + (size_t)(pick ? pick[r] : r) * m->widest, weight, bias, m->config.norm_eps, m->config.layer_norm, f, n);
        if (n % BLOCK) memset(f + n, 0, (a.blocks * BLOCK - n) * sizeof(float));
    }
    if (m->fp32) a.q = NULL;
    else m->kernels->quantize(&a, rows, first, last);
    if (!few) pool_barrier(m->pool, s->threads);
    return a;
}

static void embed(step *s, int id) {
    const ew_model *m = s->m;
    for (int i = share(s->tokens, id, s->threads); i < share(s->tokens, id + 1, s->threads); i++) {
        float *x = s->s->x + (size_t)i * m->widest, position[m->widest];
        matrix_read_row(&m->embed, s->token[i], x);
        if (!m->config.learned_positions) continue;
        matrix_read_row(&m->positions, s->slot[i], position);
        for (int d = 0; d < m->config.hidden; d++) x[d] += position[d];
    }
}

/* Heads h0..h1 of q (which 0), k (1) or v (2): project, normalize, rotate, and put k and v into the cache. */
static void project_heads(step *s, const activations *a, const layer *y, int which, int h0, int h1) {
    const ew_model *m = s->m;
    const matrix *w = which == 0 ? &y->q : which == 1 ? &y->k : &y->v;
    const float *norm = which == 0 ? y->q_norm : y->k_norm;
    float *out = which == 0 ? s->s->y : which == 1 ? s->s->gate : s->s->middle, scale = 1 / sqrtf(m->config.head_dim);
    int dim = m->config.head_dim, half = dim / 2;
    m->kernels->multiply(w, a, s->tokens, out, m->widest, h0 * dim / TILE, ceil_div(h1 * dim, TILE));
    for (int i = 0; i < s->tokens; i++)
        for (int h = h0; h < h1; h++) {
            float *x = out + (size_t)i * m->widest + h * dim;
            if (which < 2) {
                if (m->config.qk_norm) m->kernels->normalize(x, norm, NULL, m->config.norm_eps, 0, x, dim);
                if (m->cos) m->kernels->rotate(x, m->cos + (size_t)s->slot[i] * half, m->sin + (size_t)s->slot[i] * half, half);
            }
            if (which) m->kernels->append(&s->cache, s->row[i], h, s->slot[i], x, which == 2);
            else for (int d = 0; d < dim; d++) x[d] *= scale;
        }
}

static void project(step *s, int id, const layer *y) {
    const ew_model *m = s->m;
    activations a = prepare(s, id, s->tokens, m->config.hidden, y->attn_norm, y->attn_norm_bias, NULL);
    int whole = m->config.head_dim % TILE != 0;      /* tiles that straddle heads: q, k and v are not divided */
    int heads[3] = {whole ? 1 : y->heads, whole ? 1 : y->kv_heads, whole ? 1 : y->kv_heads};
    int units = heads[0] + 2 * heads[1];
    for (int u = share(units, id, s->threads); u < share(units, id + 1, s->threads); u++) {
        int which = u < heads[0] ? 0 : u < heads[0] + heads[1] ? 1 : 2, h = u - (which > 0) * heads[0] - (which > 1) * heads[1];
        project_heads(s, &a, y, which, h, whole ? (which ? y->kv_heads : y->heads) : h + 1);
    }
}

/* The queries of kv head `head` in attention unit `run`; arrays of `most` entries. */
static attention_job queries_of(step *s, const layer *y, int run, int head, const float **query, int *low, int *high) {
    const ew_model *m = s->m;
    int group = y->heads / y->kv_heads, first = s->run[run], n = 0;
    for (int i = first; i < s->run[run + 1]; i++)
        for (int h = 0; h < group; h++, n++) {
            query[n] = s->s->y + (size_t)i * m->widest + (head * group + h) * m->config.head_dim;
            high[n] = s->slot[i] + 1;
            low[n] = m->config.sliding_window && high[n] > m->config.sliding_window ? high[n] - m->config.sliding_window : 0;
        }
    return (attention_job){&s->cache, s->row[first], head, n, s->tokens >= EW_MANY && !m->fp32, query, low, high};
}

static void write_heads(step *s, const layer *y, int run, int head, const float *state, size_t stride) {
    const ew_model *m = s->m;
    int dim = m->config.head_dim, group = y->heads / y->kv_heads, n = 0;
    size_t width = (size_t)y->o.blocks * BLOCK;
    for (int i = s->run[run]; i < s->run[run + 1]; i++)
        for (int h = 0; h < group; h++, n++, state += stride)
            for (int d = 0; d < dim; d++) s->s->middle[i * width + (head * group + h) * dim + d] = state[2 + d] / state[1];
}

static void attention(step *s, int id, const layer *y) {
    const ew_model *m = s->m;
    const int most = s->longest * m->most_queries, pairs = s->runs * y->kv_heads;
    const size_t stride = 2 + m->padded_dim;
    const float *query[most];
    int low[most], high[most];
    int chunks = ceil_div(s->high, CHUNK), split = chunks > 1 && pairs < 4 * s->threads;
    int units = split ? pairs * chunks : pairs;
    for (int u = id; u < units; u += s->threads) {           /* in turns: later tokens of a prompt see more slots */
        int pair = split ? u / chunks : u;
        attention_job job = queries_of(s, y, pair / y->kv_heads, pair % y->kv_heads, query, low, high);
        int begin = low[0] / CHUNK, end = ceil_div(high[job.queries - 1], CHUNK);
        size_t floats = job.queries * stride;
        if (split) {
            int chunk = u % chunks;
            if (chunk < begin || chunk >= end) continue;
            float *states = s->s->chunks + (size_t)pair * chunks * most * stride;
            m->kernels->attend(&job, chunk * CHUNK, states + (size_t)chunk * most * stride, stride);
            if (__atomic_add_fetch(&s->s->finished[pair], 1, __ATOMIC_ACQ_REL) < end - begin) continue;
            s->s->finished[pair] = 0;
            float *into = states + (size_t)begin * most * stride;
            for (int c = begin + 1; c < end; c++)
                for (size_t q = 0; q < floats; q += stride) m->kernels->merge(into + q, states + (size_t)c * most * stride + q, m->padded_dim);
            write_heads(s, y, pair / y->kv_heads, pair % y->kv_heads, into, stride);
        } else {
            float *into = s->s->state[id], *next = into + floats;
            m->kernels->attend(&job, begin * CHUNK, into, stride);
            for (int c = begin + 1; c < end; c++) {
                m->kernels->attend(&job, c * CHUNK, next, stride);
                for (size_t q = 0; q < floats; q += stride) m->kernels->merge(into + q, next + q, m->padded_dim);
            }
            write_heads(s, y, pair / y->kv_heads, pair % y->kv_heads, into, stride);
        }
    }
}

/* x += w * middle (plus bias), each thread its own columns. */
static void add_product(step *s, int id, const matrix *w) {
    const ew_model *m = s->m;
    activations a = prepare(s, id, s->tokens, w->inputs, NULL, NULL, NULL);
    int t0 = share(w->tiles, id, s->threads), t1 = share(w->tiles, id + 1, s->threads);
    int end = t1 * TILE < w->rows ? t1 * TILE : w->rows;
    m->kernels->multiply(w, &a, s->tokens, s->s->y, m->widest, t0, t1);
    for (int i = 0; i < s->tokens; i++) {
        float *x = s->s->x + (size_t)i * m->widest, *y = s->s->y + (size_t)i * m->widest;
        for (int c = t0 * TILE; c < end; c++) x[c] += y[c];
    }
}

/* middle = activation(gate) * up, each thread its own columns, as many at once as its buffer takes for all tokens. */
static void widen(step *s, int id, const layer *y) {
    const ew_model *m = s->m;
    activations a = prepare(s, id, s->tokens, m->config.hidden, y->mlp_norm, y->mlp_norm_bias, NULL);
    const int end = share(y->up.tiles, id + 1, s->threads), at_once = EW_PASS * WIDE / s->tokens, gated = y->gate.rows > 0;
    float *gate = s->s->wide[id], *up = gate + EW_PASS * WIDE * TILE;
    for (int t = share(y->up.tiles, id, s->threads), last; t < end; t = last) {
        last = t + at_once < end ? t + at_once : end;
        const int columns = (last - t) * TILE;
        if (gated) m->kernels->multiply(&y->gate, &a, s->tokens, gate - t * TILE, columns, t, last);
        m->kernels->multiply(&y->up, &a, s->tokens, up - t * TILE, columns, t, last);
        for (int i = 0; i < s->tokens; i++)
            m->kernels->activate(gated ? gate + i * columns : NULL, up + i * columns,
                                 s->s->middle + (size_t)i * y->down.blocks * BLOCK + t * TILE, columns, m->config.activation);
    }
}

static void head(step *s, int id) {
    const ew_model *m = s->m;
    const matrix *w = m->head_matrix;
    activations a = prepare(s, id, s->n_wanted, m->config.hidden, m->final_norm, m->final_norm_bias, s->wanted);
    m->kernels->multiply(w, &a, s->n_wanted, s->logits, m->config.vocab, share(w->tiles, id, s->threads), share(w->tiles, id + 1, s->threads));
}

static void work(void *context, int id, int threads) {
    step *shared = context, mine = *shared, *s = &mine;      /* each thread moves through the layers by itself */
    s->threads = threads;
    if (id == 0) s->clock = now();
    embed(s, id);
    meet(s, id, EW_PART_OTHER);
    for (int l = 0; l < s->m->config.layers; l++) {
        const layer *y = &s->m->layers[l];
        s->cache = cache_of_layer(s->m, s->whole, l);
        project(s, id, y);
        meet(s, id, EW_PART_QKV);
        attention(s, id, y);
        meet(s, id, EW_PART_ATTENTION);
        add_product(s, id, &y->o);
        meet(s, id, EW_PART_OUTPUT);
        widen(s, id, y);
        meet(s, id, EW_PART_GATE_UP);
        add_product(s, id, &y->down);
        meet(s, id, EW_PART_DOWN);
    }
    if (s->n_wanted) head(s, id);
    meet(s, id, EW_PART_HEAD);
}

static int refuse(const ew_model *m, const ew_cache *c, const step *s, char *error) {
    const char *why = NULL;
    if (s->tokens < 1 || s->tokens > EW_PASS || s->n_wanted < 0 || s->n_wanted > EW_PASS) why = "a pass takes 1 to 128 tokens";
    for (int i = 0; i < s->tokens && !why; i++) {
        if (s->token[i] < 0 || s->token[i] >= m->config.vocab) why = "a token is outside the vocabulary";
        else if (s->row[i] < 0 || s->row[i] >= c->rows) why = "a row is outside the cache";
        else if (s->slot[i] < 0 || s->slot[i] >= c->capacity || s->slot[i] >= m->config.max_context) why = "a position is outside the cache or the context";
    }
    for (int i = 0; i < s->n_wanted && !why; i++) if (s->wanted[i] < 0 || s->wanted[i] >= s->tokens) why = "logits are asked of a token that is not in the pass";
    if (why) snprintf(error, 256, "%s", why);
    return why != NULL;
}

/* Consecutive tokens of one row share the reading of their cache, up to RUN of them, or LONG_RUN of a long prompt. */
static void find_runs(step *s) {
    const int most = s->tokens >= EW_MANY ? LONG_RUN : RUN;
    for (int i = 0; i < s->tokens; i++) {
        int first = s->runs ? s->run[s->runs - 1] : 0;
        int joins = i && s->row[i] == s->row[i - 1] && s->slot[i] == s->slot[i - 1] + 1 && i - first < most;
        if (!joins) s->run[s->runs++] = first = i;
        if (i - first >= s->longest) s->longest = i - first + 1;
        if (s->slot[i] >= s->high) s->high = s->slot[i] + 1;
    }
    s->run[s->runs] = s->tokens;
}

static int forward(step *s, char *error) {
    ew_model *m = s->m;
    s->s = m->scratch, s->threads = m->threads;
    find_runs(s);
    int pairs = s->threads * 4, chunks = ceil_div(s->high, CHUNK);       /* as in attention() */
    size_t floats = (size_t)pairs * chunks * s->longest * m->most_queries * (2 + m->padded_dim);
    if (chunks > 1 && floats > m->scratch->chunk_floats) {
        free(m->scratch->chunks);
        m->scratch->chunk_floats = 0;
        if (!(m->scratch->chunks = malloc(floats * sizeof(float)))) {
            snprintf(error, 256, "out of memory for attention over %d slots", s->high);
            return -1;
        }
        m->scratch->chunk_floats = floats;
    }
    pool_run(m->pool, work, s);
    return 0;
}

int ew_forward(ew_model *m, ew_cache *c, int tokens, const int32_t *token, const int32_t *row, const int32_t *slot,
               int n_wanted, const int32_t *wanted, float *logits, char *error) {
    step s = {.m = m, .tokens = tokens, .n_wanted = n_wanted, .token = token, .row = row, .slot = slot, .wanted = wanted, .logits = logits, .whole = c};
    if (refuse(m, c, &s, error)) return -1;
    if (pool_enter(m->pool)) scratch_renew(m->scratch);
    int result = forward(&s, error);
    pool_leave(m->pool);
    return result;
}

void ew_profile(ew_model *m, int on, double *microseconds) {
    if (pool_enter(m->pool)) scratch_renew(m->scratch);
    for (int i = 0; i < EW_PARTS; i++) {
        if (microseconds) microseconds[i] = m->seconds[i] * 1e6;
        m->seconds[i] = 0;
    }
    m->profile = on;
    pool_leave(m->pool);
}
