/* Choosing among tokens inside the core: penalties, and the k best of a row of logits, which Python need not look
 * through. */
#include "core.h"

/* x [n] penalized in float32 and float64 as runtime/sampling.py does it, so that both choose the same tokens. */
static void penalize(float *x, int n, const ew_penalties *p) {
    for (int i = 0; i < n; i++) {
        if (!p->seen[i]) continue;
        if (p->repetition != 1) x[i] = x[i] < 0 ? x[i] * p->repetition : x[i] / p->repetition;
        if (p->counts[i]) x[i] = (float)(x[i] - (p->presence + (double)p->frequency * p->counts[i]));
    }
}

/* The k largest of x [n] to index and value [k], largest first, ties to the lower index. Returns how many there are. */
static int top_k(const kernels *kernel, const float *x, int n, int k, int32_t *index, float *value) {
    int count = 0;
    for (int from = 0; from < n; from += 64) {
        int end = from + 64 < n ? from + 64 : n;
        if (count == k && !(kernel->peak(x + from, end - from) > value[k - 1])) continue;
        for (int i = from; i < end; i++) {
            if (count == k && !(x[i] > value[k - 1])) continue;
            int at = count < k ? count++ : k - 1;
            for (; at > 0 && x[i] > value[at - 1]; at--) value[at] = value[at - 1], index[at] = index[at - 1];
            value[at] = x[i], index[at] = i;
        }
    }
    return count;
}

int ew_next(ew_model *m, ew_cache *c, const ew_states *states, int row, int slot, int token,
            const ew_penalties *penalties, int k, int32_t *index, float *value, float *logits, char *error) {
    int32_t first = 0;
    if (ew_forward(m, c, states, 1, &token, &row, &slot, 1, &first, logits, error)) return -1;
    if (penalties) penalize(logits, m->config.vocab, penalties);
    return top_k(m->kernels, logits, m->config.vocab, k, index, value);
}
