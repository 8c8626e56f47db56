/* The gated delta rule (Yang, Kautz and Hatamizadeh, 2024), as Qwen3.5 has it.
 *
 * Queries, keys and values are convolved and go through SiLU; queries and keys have length 1. Each value head keeps a
 * state S [key][value]: S = exp(g) S, then S += k (beta (v - S^T k))^T, and answers S^T q / sqrt(key), where g =
 * decay softplus(alpha + dt_bias) and beta goes through a sigmoid. The answer is normalized and multiplied by silu(z).
 * A key head serves heads / kv_heads value heads, one after the other.
 */
#ifndef __clang__
#pragma GCC optimize("O3")
#endif
#include "pass.h"
#include <math.h>

static float squares(const float *x, int n) {
    float sum[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8) for (int j = 0; j < 8; j++) sum[j] += x[i + j] * x[i + j];
    for (; i < n; i++) sum[0] += x[i] * x[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* A head's answers [tokens of the segment], to middle. */
static void answer(pass *p, const layer *l, int segment, int head) {
    const ew_model *m = p->m;
    const int dim = l->is.head_dim, size = l->is.state_dim, kv_heads = l->is.kv_heads;
    const int first = p->segment[segment], tokens = p->segment[segment + 1] - first;
    const int padded = ceil_div(size, TILE) * TILE, key_head = head / (l->is.heads / kv_heads);
    const float *y = p->s->y + (size_t)first * m->widest, *q = y + key_head * dim, *k = q + kv_heads * dim;
    const float *v = y + 2 * kv_heads * dim + head * size;
    const size_t at = l->state_at + (size_t)head * l->blocks * dim * BLOCK;
    float decay[EW_PASS], beta[EW_PASS], key_scale[EW_PASS], query_scale[EW_PASS], gate[padded], out[padded];
    for (int i = 0; i < tokens; i++) {
        const float *narrow = p->s->narrow + (size_t)(first + i) * m->narrow + head;
        decay[i] = expf(l->decay[head] * softplus(narrow[l->numbers[0].tiles * TILE] + l->dt_bias[head]));
        beta[i] = 1 / (1 + expf(-narrow[0]));
        key_scale[i] = 1 / sqrtf(squares(k + i * m->widest, dim) + 1e-6f);
        query_scale[i] = 1 / sqrtf((squares(q + i * m->widest, dim) + 1e-6f) * dim);
    }
    const size_t width = (size_t)l->out.blocks * BLOCK;
    float *middle = p->s->middle + first * width + head * size;
    m->kernels->recur(&(recurrence_job){tokens, dim, size, 1, k, q, v, m->widest, decay, beta, key_scale, query_scale,
                                        state_from(p, segment, at), state_to(p, segment, at), middle, width});
    memset(gate, 0, sizeof gate), memset(out, 0, sizeof out);
    for (int i = 0; i < tokens; i++, middle += width) {
        memcpy(gate, p->s->keys + (size_t)(first + i) * m->widest + head * size, size * sizeof(float));
        m->kernels->normalize(middle, l->state_norm.weight, NULL, m->config.norm_eps, 0, out, size);
        m->kernels->activate(gate, out, out, padded, EW_SILU);
        memcpy(middle, out, size * sizeof(float));
    }
}

void delta_rule(pass *p, const layer *l) { run_states(p, l, answer); }
