/* Choosing among tokens inside the core: penalties, and the k best of a row of logits, which Python need not look
 * through. */
#include "pass.h"

/* x [n] penalized in float32 and float64 as runtime/sampling.py does it, so that both choose the same tokens. */
static void penalize(float *x, int n, const ew_choice *c) {
    for (int from = 0; from < n; from += 64) {
        const int end = from + 64 < n ? from + 64 : n;
        uint8_t any = 0;
        for (int i = from; i < end; i++) any |= c->seen[i];
        for (int i = from; any && i < end; i++) {
            if (!c->seen[i]) continue;
            if (c->repetition != 1) x[i] = x[i] < 0 ? x[i] * c->repetition : x[i] / c->repetition;
            if (c->counts[i]) x[i] = (float)(x[i] - (c->presence + (double)c->frequency * c->counts[i]));
        }
    }
}

void seek(const kernels *kernel, ew_choice *c, float *x, int n) {
    int32_t *index = c->index;
    float *value = c->value;
    int k = c->k, count = 0;
    if (c->counts) penalize(x, n, c);
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
}
