/* Choosing tokens inside the core: the k best of a row of logits, and a greedy loop that needs no Python between steps. */
#include "core.h"
#include <stdio.h>
#include <stdlib.h>

int ew_top_k(const float *logits, int n, int k, int32_t *index, float *value) {
    int count = 0;
    for (int i = 0; i < n; i++) {
        if (count == k && !(logits[i] > value[k - 1])) continue;
        int at = count < k ? count++ : k - 1;
        for (; at > 0 && logits[i] > value[at - 1]; at--) value[at] = value[at - 1], index[at] = index[at - 1];
        value[at] = logits[i], index[at] = i;
    }
    return count;
}

static int largest_of(const float *x, int n) {       /* the first of equals; blocks let the compiler use vectors */
    float best = x[0];
    int found = 0;
    for (int i = 0; i < n; i += 64) {
        int end = i + 64 < n ? i + 64 : n;
        float most = x[i];
        for (int j = i; j < end; j++) most = x[j] > most ? x[j] : most;
        if (most > best) best = most, found = i;
    }
    for (int i = found; i < n; i++) if (x[i] == best) return i;
    return found;
}

int ew_decode(ew_model *m, ew_cache *c, int row, int slot, int token, int limit, const int32_t *stop, int stops,
              int (*callback)(int token), char *error) {
    float *logits = malloc((size_t)m->config.vocab * sizeof(float));
    int given = 0, first = 0;
    if (!logits) {
        snprintf(error, 256, "out of memory");
        return -1;
    }
    while (given < limit) {
        int32_t t = token, r = row, s = slot + given;
        if (ew_forward(m, c, 1, &t, &r, &s, 1, &first, logits, error)) { given = -1; break; }
        token = largest_of(logits, m->config.vocab);
        given++;
        int stopped = callback(token);
        for (int i = 0; i < stops; i++) stopped |= token == stop[i];
        if (stopped) break;
    }
    free(logits);
    return given;
}
