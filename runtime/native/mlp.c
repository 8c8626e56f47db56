/* The MLP of a layer: down(activation(gate x) * up x), or down(activation(up x)). */
#include "pass.h"

void widen(pass *p, const mlp *w, const activations *a, int rows, float *out, int t0, int t1) {
    const kernels *k = p->m->kernels;
    const int at_once = EW_PASS * WIDE / rows, gated = w->gate.rows > 0;     /* tiles that the thread's buffer takes */
    float *gate = p->s->wide[p->id], *up = gate + EW_PASS * WIDE * TILE;
    for (int t = t0, last; t < t1; t = last) {
        last = t + at_once < t1 ? t + at_once : t1;
        const int columns = (last - t) * TILE;
        if (gated) k->multiply(&w->gate, a, rows, gate - t * TILE, columns, t, last);
        k->multiply(&w->up, a, rows, up - t * TILE, columns, t, last);
        for (int i = 0; i < rows; i++)
            k->activate(gated ? gate + i * columns : NULL, up + i * columns,
                        out + (size_t)i * w->down.blocks * BLOCK + t * TILE, columns, p->m->config.activation);
    }
}

void feed(pass *p, const layer *l, float times) {
    if (l->is.experts) {
        feed_experts(p, l, times);
        return;
    }
    const mlp *w = &l->mlp;
    const int t0 = share(p, w->up.tiles, 0), t1 = share(p, w->up.tiles, 1);
    if (w->gate.rows) expect_tile(&w->gate, t0);
    expect_tile(&w->up, t0);
    activations a = prepare(p, p->tokens, p->m->config.hidden, &l->mlp_norm, NULL);
    widen(p, w, &a, p->tokens, p->s->middle, t0, t1);
    meet(p, EW_PART_GATE_UP);
    add_product(p, &w->down, NULL, &l->mlp_post, times);
    meet(p, EW_PART_DOWN);
}
