/* Inputs of a layer's own (Gemma 4): for each layer, a token has a small vector, made of a row of a large table, which
 * stays in the weights file, and of a projection of its embedding. After the MLP, x += norm(proj(act(gate x) vector)).
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"
#include <math.h>

void per_layer_inputs(pass *p) {
    const ew_model *m = p->m;
    const matrix *w = &m->per_layer_projection;
    const int size = m->config.per_layer, all = m->config.layers * size, units = p->tokens * m->config.layers;
    activations a = prepare(p, p->tokens, m->config.hidden, &(norm){0}, NULL);
    m->kernels->multiply(w, &a, p->tokens, p->s->per_layer, all, share(p, w->tiles, 0), share(p, w->tiles, 1));
    pool_barrier(m->pool, p->threads);
    float row[size];
    for (int u = share(p, units, 0); u < share(p, units, 1); u++) {
        const int token = p->token[u / m->config.layers];
        float *x = p->s->per_layer + (size_t)u * size, sum = 0;
        source_read(&m->per_layer_embed, &m->per_layer_source, token, u % m->config.layers * size, size, row);
        m->kernels->normalize(x, m->per_layer_norm, NULL, m->config.norm_eps, 0, x, size);
        for (int d = 0; d < size; d++) x[d] += row[d], sum += row[d];
        if (!isfinite(sum)) __atomic_store_n(&p->s->bad, token + 1, __ATOMIC_RELAXED);
    }
    meet(p, EW_PART_OTHER);
}

void add_per_layer(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const matrix *w = &l->per_layer_gate;
    activations a = prepare(p, p->tokens, m->config.hidden, &(norm){0}, NULL);
    const int size = m->config.per_layer, t0 = share(p, w->tiles, 0), t1 = share(p, w->tiles, 1);
    m->kernels->multiply(w, &a, p->tokens, p->s->y, m->widest, t0, t1);
    for (int i = 0; i < p->tokens && t0 < t1; i++) {
        const int token = p->origin ? p->origin[i] : i, c = t0 * TILE;
        const float *own = p->s->per_layer + ((size_t)token * m->config.layers + p->layer) * size;
        m->kernels->activate(p->s->y + (size_t)i * m->widest + c, own + c,
                             p->s->middle + (size_t)i * l->per_layer_proj.blocks * BLOCK + c, (t1 - t0) * TILE,
                             m->config.activation);
    }
    pool_barrier(m->pool, p->threads);
    add_product(p, &l->per_layer_proj, NULL, &l->per_layer_norm, l->scalar);
    meet(p, EW_PART_OTHER);
}
