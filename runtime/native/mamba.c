/* Mamba-2 (Dao and Gu, 2024), as Granite 4 has it.
 *
 * x, B and C are convolved and go through SiLU. Each head keeps a state S [state][head]: S = exp(decay dt) S +
 * B (dt x)^T, and answers S^T C + skip x, where dt goes through softplus. B and C belong to a group of heads. The
 * answers are multiplied by silu(z) and then normalized group by group, on their way into the last product.
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"
#include <math.h>

/* A head's answers [tokens of the segment], to middle. */
static void answer(pass *p, const layer *l, int segment, int head) {
    const ew_model *m = p->m;
    const int dim = l->is.head_dim, size = l->is.state_dim, groups = l->is.kv_heads, inner = l->is.heads * dim;
    const int first = p->segment[segment], tokens = p->segment[segment + 1] - first;
    const int padded = ceil_div(dim, TILE) * TILE, group = head / (l->is.heads / groups);
    const float *y = p->s->y + (size_t)first * m->widest, *x = y + head * dim;
    const float *b = y + inner + group * size, *c = b + groups * size;
    const size_t at = l->state_at + (size_t)head * l->blocks * size * BLOCK, width = (size_t)l->out.blocks * BLOCK;
    float decay[EW_PASS], dt[EW_PASS], one[EW_PASS], gate[padded], out[padded];
    for (int i = 0; i < tokens; i++) {
        dt[i] = softplus(p->s->narrow[(size_t)(first + i) * m->narrow + head] + l->dt_bias[head]);
        decay[i] = expf(l->decay[head] * dt[i]);
        one[i] = 1;
    }
    float *middle = p->s->middle + first * width + head * dim;
    m->kernels->recur(&(recurrence_job){tokens, size, dim, 0, b, c, x, m->widest, decay, dt, one, one,
                                        state_from(p, segment, at), state_to(p, segment, at), middle, width});
    memset(gate, 0, sizeof gate), memset(out, 0, sizeof out);
    for (int i = 0; i < tokens; i++, middle += width, x += m->widest) {
        memcpy(gate, p->s->keys + (size_t)(first + i) * m->widest + head * dim, dim * sizeof(float));
        for (int d = 0; d < dim; d++) out[d] = middle[d] + l->skip[head] * x[d];
        m->kernels->activate(gate, out, out, padded, EW_SILU);
        memcpy(middle, out, dim * sizeof(float));
    }
}

void mamba(pass *p, const layer *l) { run_states(p, l, answer); }
