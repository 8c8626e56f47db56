/* A mixture of experts: a router chooses some MLPs for each token, and their results are added up, weighed by it.
 *
 * The router computes in floats. Tokens of an expert are gathered, so that its weights are read once for all of them;
 * as many experts at a time as fill a pass. A token's results are added in the order of its experts, whatever else the
 * pass has; with amx.h their bits depend on whether an expert has EW_MANY tokens or more.
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"
#include <math.h>

/* An expert's tokens: `rows` of them, from the list's `first`; they begin at row `at` of the buffers. */
typedef struct { int expert, first, rows, at; } batch;

/* Scores [n] of a token become weights: 0 where an expert is not chosen. Ties go to the lower number. */
static void choose(const ew_model *m, const layer *l, float *score) {
    const int n = l->is.experts, kind = m->config.router;
    float weight[n], most = score[0], sum = 0;
    int chosen[n];
    for (int e = 1; e < n; e++) most = score[e] > most ? score[e] : most;
    for (int e = 0; e < n; e++) {
        weight[e] = kind == EW_SIGMOID ? 1 / (1 + expf(-score[e])) : expf(score[e] - most);
        chosen[e] = 0, sum += weight[e];
    }
    for (int e = 0; e < n && kind == EW_SOFTMAX; e++) weight[e] /= sum;
    sum = 0;
    for (int i = 0; i < l->is.experts_per_token; i++) {
        int best = -1;
        float top = 0;
        for (int e = 0; e < n; e++) {
            const float value = weight[e] + (l->router_bias ? l->router_bias[e] : 0);
            if (!chosen[e] && (best < 0 || value > top)) best = e, top = value;
        }
        chosen[best] = 1, sum += weight[best];
    }
    if (kind != EW_CHOSEN && !m->config.router_normalized) sum = 1;
    else if (kind == EW_SIGMOID) sum += 1e-6f;
    for (int e = 0; e < n; e++) score[e] = chosen[e] ? weight[e] / sum : 0;
}

/* The buffers' rows from `row` on, of `blocks`. */
static activations rows_from(const ew_model *m, const activations *all, float *f, int blocks, int row) {
    const size_t n = (size_t)row * blocks;
    return (activations){blocks, f + n * BLOCK, m->fp32 ? NULL : all->q + n * BLOCK * 2, all->scale + n, all->sum + n};
}

/* This thread's part of a batch's rows, of `rows` rows in all. */
static void own_rows(const pass *p, const batch *b, int rows, int *first, int *last) {
    *first = share(p, rows, 0) - b->at, *last = share(p, rows, 1) - b->at;
    if (*first < 0) *first = 0;
    if (*last > b->rows) *last = b->rows;
}

/* y += the results of these experts; x: normalized rows of the tokens, list: tokens of all experts. */
static void run(pass *p, const layer *l, const activations *x, const batch *batches, int count, int rows,
                const int *list) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    struct scratch *s = p->s;
    const mlp *some = &l->experts[0];                /* all of one shape */
    const int in = x->blocks, blocks = some->down.blocks, width = blocks * BLOCK;
    int first, last, at = 0, t0, t1;
    for (const batch *b = batches; b < batches + count; b++) {
        activations a = rows_from(m, &s->gathered, s->gathered.f, in, b->at);
        own_rows(p, b, rows, &first, &last);
        for (int r = first; r < last; r++)
            memcpy(a.f + (size_t)r * in * BLOCK, x->f + (size_t)list[b->first + r] * in * BLOCK,
                   in * BLOCK * sizeof(float));
        if (a.q && first < last) k->quantize(&a, b->rows, first, last);
    }
    pool_barrier(m->pool, p->threads);
    for (const batch *b = batches; b < batches + count; b++) {
        const activations a = rows_from(m, &s->gathered, s->gathered.f, in, b->at);
        if (own_tiles(p, &some->up, count * some->up.tiles, &at, &t0, &t1))
            widen(p, &l->experts[b->expert], &a, b->rows, s->middle + (size_t)b->at * width, t0, t1);
    }
    meet(p, EW_PART_GATE_UP);
    for (const batch *b = batches; b < batches + count; b++) {
        activations a = rows_from(m, &s->gathered, s->middle, blocks, b->at);
        own_rows(p, b, rows, &first, &last);
        for (int r = first; r < last; r++)
            memset(a.f + (size_t)r * width + l->is.mlp, 0, (width - l->is.mlp) * sizeof(float));
        if (a.q && first < last) k->quantize(&a, b->rows, first, last);
    }
    pool_barrier(m->pool, p->threads);
    t0 = share(p, some->down.tiles, 0), t1 = share(p, some->down.tiles, 1);
    const int end = t1 * TILE < m->config.hidden ? t1 * TILE : m->config.hidden;
    for (const batch *b = batches; b < batches + count; b++) {
        const activations a = rows_from(m, &s->gathered, s->middle, blocks, b->at);
        k->multiply(&l->experts[b->expert].down, &a, b->rows, s->keys, m->widest, t0, t1);
        for (int r = 0; r < b->rows; r++) {
            const int token = list[b->first + r];
            const float weight = s->narrow[(size_t)token * m->narrow + b->expert];
            const float *from = s->keys + (size_t)r * m->widest;
            float *y = s->y + (size_t)token * m->widest;
            for (int c = t0 * TILE; c < end; c++) y[c] += weight * from[c];
        }
    }
    meet(p, EW_PART_DOWN);
}

void feed_experts(pass *p, const layer *l, float times) {
    const ew_model *m = p->m;
    struct scratch *s = p->s;
    const int hidden = m->config.hidden, tokens = p->tokens, experts = l->is.experts, shared = l->is.shared > 0;
    activations a = prepare(p, tokens, hidden, &l->mlp_norm, NULL), exact = a;
    exact.q = NULL;
    m->kernels->multiply(&l->router, &exact, tokens, s->narrow, m->narrow, share(p, l->router.tiles, 0),
                         share(p, l->router.tiles, 1));
    int tiles = l->shared.up.tiles;
    if (shared) widen(p, &l->shared, &a, tokens, s->middle, share(p, tiles, 0), share(p, tiles, 1));
    pool_barrier(m->pool, p->threads);
    for (int i = share(p, tokens, 0); i < share(p, tokens, 1); i++) {
        choose(m, l, s->narrow + (size_t)i * m->narrow);
        if (!shared) memset(s->y + (size_t)i * m->widest, 0, hidden * sizeof(float));
    }
    if (shared) {
        const activations b = prepare_middle(p, tokens, l->shared.down.inputs, NULL);
        tiles = l->shared.down.tiles;
        m->kernels->multiply(&l->shared.down, &b, tokens, s->y, m->widest, share(p, tiles, 0), share(p, tiles, 1));
    }
    meet(p, EW_PART_GATE_UP);
    int list[EW_PASS * EW_CHOSEN_MOST], n = 0, count = 0, rows = 0;
    batch batches[EW_PASS];
    for (int e = 0; e < experts; e++) {
        const int first = n;
        for (int i = 0; i < tokens; i++) if (s->narrow[(size_t)i * m->narrow + e] != 0) list[n++] = i;
        if (n == first) continue;
        const int room = n - first < EW_MANY ? n - first : ceil_div(n - first, TILE) * TILE;     /* amx.h's registers */
        if (rows + room > EW_PASS) {
            run(p, l, &a, batches, count, rows, list);
            count = rows = 0;
        }
        batches[count++] = (batch){e, first, n - first, rows};
        rows += room;
    }
    if (count) run(p, l, &a, batches, count, rows, list);
    add_rows(p, &l->mlp_post, times);
    meet(p, EW_PART_DOWN);
}
