/* One pass of the network over up to 128 tokens: what the threads do between their meetings.
 *
 * A plain layer has five meetings: q/k/v (each thread whole heads, with norm, RoPE and the cache's slot), attention,
 * output projection, gate and up, down. Tokens whose logits nobody wants leave before the last layers that add nothing
 * to a cache.
 */
#ifndef __clang__
#pragma GCC optimize("O3")                           /* makes vectors of the plain loops below, as clang does anyway */
#endif
#define _GNU_SOURCE
#include "pass.h"
#include <math.h>
#include <stdio.h>

enum { RUN = 8 };                                    /* tokens of one attention unit, of a short pass */

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

/* logits [wanted_tokens][vocab], and what is sought in them. */
static void head(pass *p) {
    const ew_model *m = p->m;
    const matrix *w = m->head_matrix;
    const float cap = m->config.logits_softcap;
    const int t0 = share(p, w->tiles, 0), t1 = share(p, w->tiles, 1), end = t1 * TILE < w->rows ? t1 * TILE : w->rows;
    expect_tile(w, t0);
    activations a = prepare(p, p->wanted_tokens, m->config.hidden, &m->final_norm, p->wanted);
    m->kernels->multiply(w, &a, p->wanted_tokens, p->logits, m->config.vocab, t0, t1);
    for (int i = 0; cap && i < p->wanted_tokens; i++) {
        float *logits = p->logits + (size_t)i * m->config.vocab;
        for (int c = t0 * TILE; c < end; c++) logits[c] = cap * tanhf(logits[c] / cap);
    }
    meet(p, EW_PART_HEAD);
    for (int i = p->id; p->choices && i < p->wanted_tokens; i += p->threads)
        if (p->choices[i].k)
            seek(m->kernels, &p->choices[i], p->logits + (size_t)i * m->config.vocab, m->config.vocab);
}

/* Consecutive tokens of one row share the reading of their cache, up to RUN of them, or LONG_RUN of a long prompt. */
static void find_runs(pass *p) {
    const int most = p->tokens >= EW_MANY ? LONG_RUN : RUN;
    p->runs = p->segments = p->longest = p->high = 0;
    for (int i = 0; i < p->tokens; i++) {
        int first = p->runs ? p->run[p->runs - 1] : 0;
        int joins = i && p->row[i] == p->row[i - 1] && p->slot[i] == p->slot[i - 1] + 1;
        if (!joins) p->segment[p->segments++] = i;
        if (!joins || i - first >= most) p->run[p->runs++] = first = i;
        if (i - first >= p->longest) p->longest = i - first + 1;
        if (p->slot[i] >= p->high) p->high = p->slot[i] + 1;
    }
    p->run[p->runs] = p->segment[p->segments] = p->tokens;
}

/* The tokens of a pass whose logits are wanted, as a pass of their own. */
typedef struct { int tokens; int32_t origin[EW_PASS], row[EW_PASS], slot[EW_PASS], wanted[EW_PASS]; } tail;

static void find_tail(const pass *p, tail *t) {
    int place[EW_PASS] = {0};
    for (int i = 0; i < p->wanted_tokens; i++) place[p->wanted[i]] = 1;
    for (int i = 0; i < p->tokens; i++) {
        if (!place[i]) continue;
        place[i] = t->tokens;
        t->origin[t->tokens] = i, t->row[t->tokens] = p->row[i], t->slot[t->tokens++] = p->slot[i];
    }
    for (int i = 0; i < p->wanted_tokens; i++) t->wanted[i] = place[p->wanted[i]];
}

/* Goes on with the wanted tokens alone. */
static void drop_tokens(pass *p, const tail *t) {
    const size_t bytes = p->m->config.hidden * sizeof(float);
    if (p->id == 0)
        for (int i = 0; i < t->tokens; i++)
            if (t->origin[i] != i)
                memcpy(p->s->x + (size_t)i * p->m->widest, p->s->x + (size_t)t->origin[i] * p->m->widest, bytes);
    p->tokens = t->tokens, p->row = t->row, p->slot = t->slot, p->wanted = t->wanted, p->origin = t->origin;
    find_runs(p);
    meet(p, EW_PART_OTHER);
}

typedef struct { pass pass; tail tail; } job;

static void work(void *context, int id, int threads) {
    static void (*const mix[])(pass *, const layer *) = {attention, short_convolution, delta_rule, mamba};
    const job *whole = context;
    pass mine = whole->pass, *p = &mine;
    const ew_model *m = p->m;
    p->id = id, p->threads = threads;
    start_clock(p);
    embed(p);
    meet(p, EW_PART_OTHER);
    if (m->config.per_layer) per_layer_inputs(p);
    for (p->layer = 0; p->layer < m->config.layers; p->layer++) {
        const layer *l = &m->layers[p->layer];
        if (p->layer == m->tail && whole->tail.tokens < p->tokens) {
            if (!whole->tail.tokens) break;
            drop_tokens(p, &whole->tail);
        }
        mix[l->is.mixer](p, l);
        meet(p, EW_PART_ATTENTION);
        add_product(p, &l->out, l->is.mixer == EW_MAMBA ? &l->state_norm : NULL, &l->mixer_post, 1);
        meet(p, EW_PART_OUTPUT);
        feed(p, l, m->config.per_layer ? 1 : l->scalar);
        if (m->config.per_layer) add_per_layer(p, l);
    }
    if (p->wanted_tokens) head(p);
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

/* The same of recurrent states. */
static const char *refuse_states(const pass *p) {
    for (int s = 0; p->m->state_floats && s < p->segments; s++) {
        const int i = p->segment[s];
        if (!p->states || !p->states->data) return "a model with recurrent layers needs their states";
        if (p->states->from[i] < -1 || p->states->from[i] > 1 || p->states->to[i] < 0 || p->states->to[i] > 1)
            return "a state has two copies";
        for (int before = 0; before < s; before++)
            if (p->row[p->segment[before]] == p->row[i]) return "the tokens of a row must come one after the other";
    }
    return NULL;
}

int ew_forward(ew_model *m, ew_cache *cache, const ew_states *states, int tokens, const int32_t *token,
               const int32_t *row, const int32_t *slot, int n_wanted, const int32_t *wanted, ew_choice *choices,
               float *logits, char *error) {
    job whole = {.pass = {.m = m, .s = m->scratch, .cache = cache, .states = states, .tokens = tokens, .token = token,
                          .wanted_tokens = n_wanted, .row = row, .slot = slot, .wanted = wanted, .logits = logits,
                          .choices = choices}};
    pass *p = &whole.pass;
    const char *why = refuse(p);
    if (!why) find_runs(p), why = refuse_states(p);
    if (why) {
        snprintf(error, 256, "%s", why);
        return -1;
    }
    if (m->tail < m->config.layers) find_tail(p, &whole.tail);
    enter(m);
    const int fits = chunks_fit(p);
    m->scratch->bad = 0;
    if (fits) pool_run(m->pool, work, &whole);
    else snprintf(error, 256, "out of memory for attention over %d slots", p->high);
    const int bad = m->scratch->bad;
    if (bad) snprintf(error, 256, "the own inputs of token %d hold a value that is not a finite number", bad - 1);
    pool_leave(m->pool);
    return fits && !bad ? 0 : -1;
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
