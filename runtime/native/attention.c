/* Attention of the tokens of a pass: queries, keys and values with their norms and RoPE, the cache's slots, and what
 * the queries see there.
 *
 * Queries, keys and values are shared out by whole heads. Attention of few tokens over a long cache is shared out by
 * chunks of slots, and whoever finishes a head last merges its chunks, in slot order. A layer that reads another's keys
 * and values has queries alone.
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#define _GNU_SOURCE
#include "pass.h"
#include <stdlib.h>

enum { QUERIES, KEYS, VALUES, GATES, KINDS };

/* Heads h0..h1-1 of token i, which stand at x: normalize, rotate, and put keys and values into the cache. */
static void finish(pass *p, const layer *l, int kind, int i, int h0, int h1, float *x) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const int dim = l->is.head_dim, n = (h1 - h0) * dim, slot = p->slot[i], last = m->config.qk_norm_last;
    const int norms = kind <= KEYS ? m->config.qk_norm : EW_NO_NORM;
    const float *weight = kind == QUERIES ? l->q_norm : l->k_norm, eps = m->config.norm_eps;
    if (kind == GATES) {
        k->activate(NULL, x, x, ceil_div(n, TILE) * TILE, KERNEL_SIGMOID);
        return;
    }
    if (norms == EW_ALL_HEADS && !last) k->normalize(x, weight, NULL, eps, 0, x, n);
    for (int h = 0; h < n; h += dim) {
        if (norms == EW_EACH_HEAD && !last) k->normalize(x + h, weight, NULL, eps, 0, x + h, dim);
        if (kind <= KEYS && l->rope) {
            const size_t angle = (size_t)slot * l->rope->half;
            k->rotate(x + h, l->rope->cos + angle, l->rope->sin + angle, l->rope->half);
        }
        if (norms == EW_EACH_HEAD && last) k->normalize(x + h, weight, NULL, eps, 0, x + h, dim);
        if (kind == VALUES && m->config.v_norm) k->normalize(x + h, m->ones, NULL, eps, 0, x + h, dim);
    }
    if (norms == EW_ALL_HEADS && last) k->normalize(x, weight, NULL, eps, 0, x, n);
    if (kind == QUERIES) {
        const float scale = l->rope && l->rope->query ? l->scale * l->rope->query[slot] : l->scale;
        for (int d = 0; d < n; d++) x[d] *= scale;
    } else for (int h = 0; h < n; h += dim)
        k->append(&p->cache->layer[l->source], p->row[i], h0 + h / dim, slot, x + h, kind == VALUES);
}

/* Has the lines of the cache fetched where the key (or value) of token i and head h goes. */
static void expect(const pass *p, const layer *l, int kind, int i, int h) {
    const cache_layer *c = &p->cache->layer[l->source];
    const int slot = p->slot[i], key = kind == KEYS, element = element_bytes(c->kind);
    const size_t at = ((size_t)p->row[i] * c->kv_heads + h) * c->capacity + (key ? slot / TILE * TILE : slot);
    const size_t width = (size_t)(key ? c->dim : c->padded) * element, bytes = width * (key ? TILE : 1);
    for (size_t n = 0; n < bytes; n += 64) __builtin_prefetch((key ? c->k : c->v) + at * width + n, 1);
}

/* Queries to y, gates to gate, keys and values to the cache: each thread some heads of them; or, where tiles straddle
 * heads or a norm does, or tokens are many (keys take longer than queries), some tiles, and then some tokens. */
static void project(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const int dim = l->is.head_dim, own = l->source == p->layer;
    const struct { const matrix *w; float *to; int heads; } kinds[KINDS] = {
        {&l->q, p->s->y, l->is.heads}, {&l->k, p->s->keys, own ? l->is.kv_heads : 0},
        {&l->v, p->s->middle, own ? l->is.kv_heads : 0}, {&l->gate, p->s->gate, l->gate.rows ? l->is.heads : 0}};
    int heads = 0, tiles = 0, at = 0, t0, t1;
    for (int k = 0; k < KINDS; k++) heads += kinds[k].heads, tiles += kinds[k].heads ? kinds[k].w->tiles : 0;
    const int by_tiles = dim % TILE || m->config.qk_norm == EW_ALL_HEADS || p->tokens > FEW;
    int tile = by_tiles ? share(p, tiles, 0) : share(p, heads, 0) * dim / TILE, kind = 0;    /* the first of its own */
    for (; kind < VALUES && tile >= kinds[kind].w->tiles; kind++) tile -= kinds[kind].w->tiles;
    if (kinds[kind].heads) expect_tile(kinds[kind].w, tile);
    activations a = prepare(p, p->tokens, m->config.hidden, &l->mixer_norm, NULL);
    if (by_tiles) {
        const int i0 = share(p, p->tokens, 0), i1 = share(p, p->tokens, 1);
        for (int i = i0; i < i1; i++)
            for (int h = 0; own && h < l->is.kv_heads; h++) expect(p, l, KEYS, i, h), expect(p, l, VALUES, i, h);
        for (int k = 0; k < KINDS; k++)
            if (kinds[k].heads && own_tiles(p, kinds[k].w, tiles, &at, &t0, &t1))
                m->kernels->multiply(kinds[k].w, &a, p->tokens, kinds[k].to, m->widest, t0, t1);
        pool_barrier(m->pool, p->threads);
        for (int i = i0; i < i1; i++)
            for (int k = 0; k < KINDS; k++)
                if (kinds[k].heads) finish(p, l, k, i, 0, kinds[k].heads, kinds[k].to + (size_t)i * m->widest);
        return;
    }
    for (int u = share(p, heads, 0); u < share(p, heads, 1); u++) {
        int k = 0, h = u;
        for (; h >= kinds[k].heads; k++) h -= kinds[k].heads;
        float *to = kinds[k].to + h * dim;
        m->kernels->multiply(kinds[k].w, &a, p->tokens, kinds[k].to, m->widest, h * dim / TILE, (h + 1) * dim / TILE);
        for (int i = 0; i < p->tokens; i++) finish(p, l, k, i, h, h + 1, to + (size_t)i * m->widest);
    }
}

/* Has the job fetch the keys that come after it: those of a run and a head (a pair), from a chunk of slots on. */
static void look_ahead(const pass *p, const layer *l, attention_job *job, int pair, int chunk) {
    const cache_layer *c = job->cache;
    const int run = pair / c->kv_heads, head = pair % c->kv_heads, window = l->is.window;
    const int high = p->slot[p->run[run + 1] - 1] + 1, seen = p->slot[p->run[run]] + 1 - window;
    const int from = window && seen > chunk * CHUNK ? seen / CHUNK * CHUNK : chunk * CHUNK, left = high - from;
    const size_t at = ((size_t)p->row[p->run[run]] * c->kv_heads + head) * c->capacity + from;
    job->ahead = c->k + at * c->dim * element_bytes(c->kind);
    job->ahead_slots = left < 0 ? 0 : left < CHUNK ? left : CHUNK;
}

/* How attend() shares out its units. */
static int split_by_chunks(const pass *p, const layer *l) {
    return p->high > CHUNK && p->runs * l->is.kv_heads < 4 * p->threads;
}

/* Has the keys fetched that this thread's first unit begins with. */
static void expect_keys(const pass *p, const layer *l) {
    attention_job job = {.cache = &p->cache->layer[l->source]};
    const int pairs = p->runs * l->is.kv_heads;
    if (p->id < pairs || split_by_chunks(p, l)) look_ahead(p, l, &job, p->id % pairs, p->id / pairs);
    const size_t bytes = job.ahead_slots * job.cache->dim * element_bytes(job.cache->kind);
    for (size_t n = 0; n < bytes && n < AHEAD; n += 64) __builtin_prefetch(job.ahead + n, 0, 2);
}

static void merge_states(const kernels *k, float *into, const float *from, int n, size_t stride) {
    for (size_t q = 0; q < n * stride; q += stride) k->merge(into + q, from + q, stride - 2);
}

/* middle [tokens][heads * head_dim] = attention of y over the cache. A unit is a run of tokens and a kv head, or, where
 * that gives few units (split), one chunk of slots of these: all first ones, all second ones, ... */
static void attend(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const int dim = l->is.head_dim, window = l->is.window, kv_heads = l->is.kv_heads, group = l->is.heads / kv_heads;
    const int most = p->longest * group, pairs = p->runs * kv_heads, chunks = ceil_div(p->high, CHUNK);
    const int split = split_by_chunks(p, l), units = split ? pairs * chunks : pairs;
    const size_t stride = 2 + l->padded, one = most * stride, width = (size_t)l->out.blocks * BLOCK;
    const float *query[most];
    float *out[most];
    int low[most], high[most];
    for (int u = p->id; u < units; u += p->threads) {        /* in turns: later tokens of a prompt see more slots */
        const int pair = u % pairs, run = pair / kv_heads, head = pair % kv_heads, next = u + p->threads;
        int n = 0;
        for (int i = p->run[run]; i < p->run[run + 1]; i++)
            for (int h = head * group; h < (head + 1) * group; h++, n++) {
                query[n] = p->s->y + (size_t)i * m->widest + h * dim;
                out[n] = p->s->middle + i * width + h * dim;
                high[n] = p->slot[i] + 1;
                low[n] = window && high[n] > window ? high[n] - window : 0;
            }
        attention_job job = {&p->cache->layer[l->source], p->row[p->run[run]], head, n,
                             p->tokens >= EW_MANY && !m->fp32, query, low, high, m->config.attention_softcap, NULL, 0};
        const int begin = low[0] / CHUNK, end = ceil_div(high[n - 1], CHUNK), first = split ? u / pairs : begin;
        const int brief = high[n - 1] - (end - 1) * CHUNK < BLOCK;   /* the last chunk: it leaves no time to fetch */
        const int last = split || end - 1 == begin ? first : end - 1 - brief;
        float *into = split ? p->s->chunks + ((size_t)pair * chunks + begin) * one : p->s->state[p->id];
        if (first < begin || first >= end) continue;
        for (int c = first; c < (split ? first + 1 : end); c++) {
            float *to = into + (split ? c - begin : c > begin) * one;
            job.ahead_slots = 0;
            if (c < last) look_ahead(p, l, &job, pair, c + 1);
            else if (c == last && next < units) look_ahead(p, l, &job, next % pairs, next / pairs);
            k->attend(&job, c * CHUNK, to, stride);
            if (to > into && !split) merge_states(k, into, to, n, stride);
        }
        if (split) {
            if (__atomic_add_fetch(&p->s->finished[pair], 1, __ATOMIC_ACQ_REL) < end - begin) continue;
            p->s->finished[pair] = 0;
            for (int c = begin + 1; c < end; c++) merge_states(k, into, into + (c - begin) * one, n, stride);
        }
        for (int q = 0; q < n; q++, into += stride) {
            for (int d = 0; d < dim; d++) out[q][d] = into[2 + d] / into[1];
            if (!l->gate.rows) continue;
            const float *gate = p->s->gate + (query[q] - p->s->y);
            for (int d = 0; d < dim; d++) out[q][d] *= gate[d];
        }
    }
}

void attention(pass *p, const layer *l) {
    project(p, l);
    expect_keys(p, l);
    meet(p, EW_PART_QKV);
    attend(p, l);
}

/* Room for attention split by chunks, for as many pairs as attend() splits. */
int chunks_fit(const pass *p) {
    struct scratch *s = p->s;
    const int pairs = p->m->threads * 4, chunks = ceil_div(p->high, CHUNK);
    size_t floats = (size_t)pairs * chunks * p->longest * p->m->attention_floats;
    if (chunks == 1 || floats <= s->chunk_floats) return 1;
    free(s->chunks);
    s->chunks = malloc(floats * sizeof(float));
    s->chunk_floats = s->chunks ? floats : 0;
    return s->chunks != NULL;
}
