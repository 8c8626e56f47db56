/* What the blocks of a pass share: its buffers, meetings, inputs ready for a product, and the residual stream. */
#ifndef __clang__
#pragma GCC optimize("O3")                           /* makes vectors of the plain loops below, as clang does anyway */
#endif
#define _GNU_SOURCE
#include "pass.h"
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void meet(pass *p, int part) {
    pool_barrier(p->m->pool, p->threads);
    if (p->id == 0 && p->m->profile) {
        double t = now();
        p->m->seconds[part] += t - p->clock;
        p->clock = t;
    }
}

void start_clock(pass *p) { p->clock = p->id == 0 ? now() : 0; }

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
    if (m->experts && !activations_new(m, &s->gathered, EW_PASS)) return -1;
    const struct { float **rows; size_t width; } buffers[] = {
        {&s->x, m->widest}, {&s->y, m->widest}, {&s->keys, m->widest}, {&s->middle, m->widest},
        {&s->gate, m->gates ? m->widest : 0}, {&s->narrow, m->narrow},
        {&s->per_layer, (size_t)m->config.layers * m->config.per_layer}};
    for (int i = 0; i < 7; i++)
        if (buffers[i].width && !(*buffers[i].rows = keep(m, EW_PASS * buffers[i].width * sizeof(float)))) return -1;
    for (int i = 0; i < m->threads; i++) {
        s->wide[i] = keep(m, 2 * EW_PASS * WIDE * TILE * sizeof(float));
        s->state[i] = keep(m, 2 * LONG_RUN * m->attention_floats * sizeof(float));
        if (!s->wide[i] || !s->state[i] || !activations_new(m, &s->own[i], FEW)) return -1;
    }
    return 0;
}

void scratch_free(ew_model *m) { if (m->scratch) free(m->scratch->chunks); }

/* What a pass that a fork has cut off left half done is made anew. (Its chunks may be freed or not: they are left.) */
void enter(ew_model *m) {
    if (!pool_enter(m->pool)) return;
    memset(m->scratch->finished, 0, sizeof m->scratch->finished);
    m->scratch->chunks = NULL, m->scratch->chunk_floats = 0;
}

/* Rows `from` (a row every `stride` floats; NULL: middle as it is), to activations. */
static activations prepared(pass *p, int rows, int n, const float *from, size_t stride, const norm *by,
                            const int32_t *pick) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    const int few = rows <= FEW, first = few ? 0 : share(p, rows, 0), last = few ? rows : share(p, rows, 1);
    activations a = few ? p->s->own[p->id] : p->s->shared;
    a.blocks = ceil_div(n, BLOCK);
    if (!from) a.f = p->s->middle;
    for (int r = first; r < last; r++) {
        float *f = a.f + (size_t)r * a.blocks * BLOCK;
        const size_t at = (size_t)(pick ? pick[r] : r) * stride;
        const int part = from && by ? n / by->parts : n;
        for (int d = 0; from && by && d < n; d += part)
            k->normalize(from + at + d, by->weight + d, by->bias ? by->bias + d : NULL, m->config.norm_eps,
                         m->config.layer_norm, f + d, part);
        if (from && !by) memcpy(f, from + at, n * sizeof(float));
        if (n % BLOCK) memset(f + n, 0, (a.blocks * BLOCK - n) * sizeof(float));
    }
    if (m->fp32) a.q = NULL;
    else k->quantize(&a, rows, first, last);
    if (!few) pool_barrier(m->pool, p->threads);
    return a;
}

activations prepare(pass *p, int rows, int n, const norm *by, const int32_t *pick) {
    return prepared(p, rows, n, p->s->x, p->m->widest, by->weight ? by : NULL, pick);
}

activations prepare_middle(pass *p, int rows, int n, const norm *by) {
    return prepared(p, rows, n, by ? p->s->middle : NULL, (size_t)ceil_div(n, BLOCK) * BLOCK, by, NULL);
}

int own_tiles(const pass *p, const matrix *w, int total, int *at, int *t0, int *t1) {
    const int first = share(p, total, 0) - *at, last = share(p, total, 1) - *at;
    *at += w->tiles;
    *t0 = first > 0 ? first : 0, *t1 = last < w->tiles ? last : w->tiles;
    return *t0 < *t1;
}

void expect_tile(const matrix *w, int tile) {
    const size_t from = tile * w->tile_bytes, left = w->tiles * w->tile_bytes - from;
    for (size_t n = 0; n < left && n < AHEAD; n += 64) __builtin_prefetch(w->data + from + n, 0, 2);
}

void add_rows(pass *p, const norm *after, float times) {
    const ew_model *m = p->m;
    const ew_config *c = &m->config;
    for (int i = share(p, p->tokens, 0); i < share(p, p->tokens, 1); i++) {
        float *x = p->s->x + (size_t)i * m->widest, *y = p->s->y + (size_t)i * m->widest;
        if (after->weight)
            m->kernels->normalize(y, after->weight, after->bias, c->norm_eps, c->layer_norm, y, c->hidden);
        for (int d = 0; d < c->hidden; d++) x[d] += y[d];
        if (times != 1) for (int d = 0; d < c->hidden; d++) x[d] *= times;
    }
}

void add_product(pass *p, const matrix *w, const norm *before, const norm *after, float times) {
    const ew_model *m = p->m;
    const int t0 = share(p, w->tiles, 0), t1 = share(p, w->tiles, 1), end = t1 * TILE < w->rows ? t1 * TILE : w->rows;
    expect_tile(w, t0);
    activations a = prepare_middle(p, p->tokens, w->inputs, before);
    m->kernels->multiply(w, &a, p->tokens, p->s->y, m->widest, t0, t1);
    if (after->weight) {
        pool_barrier(m->pool, p->threads);
        add_rows(p, after, times);
        return;
    }
    for (int i = 0; i < p->tokens; i++) {
        float *x = p->s->x + (size_t)i * m->widest, *y = p->s->y + (size_t)i * m->widest;
        for (int c = t0 * TILE; c < end; c++) x[c] += y[c];
        if (times != 1) for (int c = t0 * TILE; c < end; c++) x[c] *= times;
    }
}
