/* Short convolution (LFM2): out(c(u) * conv(b(u) * x(u))), each channel convolved along its row. State: the last inputs
 * b * x, as many as the kernel looks back.
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"

void short_convolution(pass *p, const layer *l) {
    const ew_model *m = p->m;
    const kernels *k = m->kernels;
    activations a = prepare(p, p->tokens, m->config.hidden, &l->mixer_norm, NULL);
    const int t1 = share(p, l->b.tiles, 1), at_once = EW_PASS * WIDE / p->tokens;
    float *u = p->s->wide[p->id], *v = u + EW_PASS * WIDE * TILE;
    for (int t = share(p, l->b.tiles, 0), last; t < t1; t = last) {
        last = t + at_once < t1 ? t + at_once : t1;
        const int columns = (last - t) * TILE, c0 = t * TILE, n = l->b.rows - c0 < columns ? l->b.rows - c0 : columns;
        k->multiply(&l->b, &a, p->tokens, u - c0, columns, t, last);
        k->multiply(&l->x, &a, p->tokens, v - c0, columns, t, last);
        for (int i = 0; i < p->tokens * columns; i++) u[i] *= v[i];
        convolve(p, l, u, columns, c0, n, v, columns);
        k->multiply(&l->c, &a, p->tokens, u - c0, columns, t, last);
        for (int i = 0; i < p->tokens; i++) {
            float *out = p->s->middle + (size_t)i * l->out.blocks * BLOCK + c0;
            for (int c = 0; c < n; c++) out[c] = u[i * columns + c] * v[i * columns + c];
        }
    }
}
