/* What the recurrent mixers share: where a row's states lie, the causal convolution of each channel along a row, and
 * what states are fed with. */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"
#include <math.h>

static float *state(const pass *p, int segment, int copy, size_t at) {
    const int row = p->row[p->segment[segment]];
    return p->states->data + ((size_t)copy * p->cache->rows + row) * p->m->state_floats + at;
}

const float *state_from(const pass *p, int segment, size_t at) {
    const int copy = p->states->from[p->segment[segment]];
    return copy < 0 ? NULL : state(p, segment, copy, at);
}

float *state_to(const pass *p, int segment, size_t at) {
    return state(p, segment, p->states->to[p->segment[segment]], at);
}

float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

/* The inputs of a channel before token i of a segment are the segment's own, then those that its state kept. */
void convolve(const pass *p, const layer *l, const float *in, size_t stride, int c0, int n, float *out,
              size_t out_stride) {
    const int kept = l->is.kernel - 1, channels = l->channels;
    for (int s = 0; s < p->segments; s++) {
        const int first = p->segment[s], count = p->segment[s + 1] - first;
        const float *from = state_from(p, s, l->conv_at);
        float *to = state_to(p, s, l->conv_at) + c0;
        for (int i = 0; i < count; i++) {
            float *y = out + (first + i) * out_stride;
            for (int c = 0; c < n; c++) y[c] = l->conv_bias ? l->conv_bias[c0 + c] : 0;
            for (int t = i < kept && !from ? kept - i : 0; t <= kept; t++) {
                const int at = i + t - kept;
                const float *x = at < 0 ? from + (size_t)(kept + at) * channels + c0 : in + (first + at) * stride;
                const float *w = l->conv_weight + (size_t)t * channels + c0;
                for (int c = 0; c < n; c++) y[c] += w[c] * x[c];
            }
        }
        for (int t = 0; t < kept; t++, to += channels) {     /* in order: `to` may be `from` */
            const int at = count + t - kept;
            if (at >= 0) memcpy(to, in + (first + at) * stride, n * sizeof(float));
            else if (from) memmove(to, from + (size_t)(kept + at) * channels + c0, n * sizeof(float));
            else memset(to, 0, n * sizeof(float));
        }
    }
}

/* The layer's convolved columns of tiles t0..t1-1, through SiLU, to y. */
static void project_convolved(pass *p, const layer *l, const activations *a, int t0, int t1) {
    const kernels *k = p->m->kernels;
    const int at_once = EW_PASS * WIDE / p->tokens;
    float *in = p->s->wide[p->id], *out = in + EW_PASS * WIDE * TILE;
    for (int t = t0, last; t < t1; t = last) {
        last = t + at_once < t1 ? t + at_once : t1;
        const int columns = (last - t) * TILE, c0 = t * TILE, left = l->channels - c0;
        k->multiply(&l->convolved, a, p->tokens, in - c0, columns, t, last);
        convolve(p, l, in, columns, c0, left < columns ? left : columns, out, columns);
        for (int i = 0; i < p->tokens; i++)
            k->activate(NULL, out + i * columns, p->s->y + (size_t)i * p->m->widest + c0, columns, EW_SILU);
    }
}

void run_states(pass *p, const layer *l, void (*answer)(pass *, const layer *, int segment, int head)) {
    const ew_model *m = p->m;
    activations a = prepare(p, p->tokens, m->config.hidden, &l->mixer_norm, NULL);
    const int tiles = l->numbers[0].tiles, total = l->convolved.tiles + l->z.tiles + tiles + l->numbers[1].tiles;
    int at = 0, t0, t1;
    if (own_tiles(p, &l->convolved, total, &at, &t0, &t1)) project_convolved(p, l, &a, t0, t1);
    if (own_tiles(p, &l->z, total, &at, &t0, &t1))
        m->kernels->multiply(&l->z, &a, p->tokens, p->s->keys, m->widest, t0, t1);
    for (int n = 0; n < 2; n++)
        if (own_tiles(p, &l->numbers[n], total, &at, &t0, &t1))
            m->kernels->multiply(&l->numbers[n], &a, p->tokens, p->s->narrow + n * tiles * TILE, m->narrow, t0, t1);
    meet(p, EW_PART_QKV);
    for (int u = p->id; u < p->segments * l->is.heads; u += p->threads) answer(p, l, u / l->is.heads, u % l->is.heads);
}
