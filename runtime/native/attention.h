/* Attention over a cache in chunks of 128 slots with an online softmax (Milakov and Gimelshein, 2018; FlashAttention,
 * Dao et al., 2022), compiled by each isa_*.c after kernels.h.
 *
 * Chunks begin at multiples of 128 slots whatever is asked, each yields (maximum, sum, accumulator) for itself, and
 * these are merged in slot order: threads may take chunks as they like without changing a bit of the result. Keys lie
 * transposed in blocks of 16 slots, so the scores of W slots are one vector and need no sum across lanes.
 */
#define NO_SCORE (-1e30f)
#define ABREAST (W == 16 ? 2 * TILE : TILE)          /* slots scored at once, to hide an addition's latency */
enum { MOST_QUERIES = W == 16 ? 8 : 4 };             /* that share a reading, as registers allow */

/* W elements of a cache from `index` on. */
INLINE vf load_cached(const void *base, size_t index, const int kind) {
    if (kind == EW_FLOAT32) return load((const float *)base + index);
    if (kind == EW_FLOAT16) return load_half((const uint16_t *)base + index);
    return to_float((load_bytes((const uint8_t *)base + index) ^ 128) - 128);      /* signed */
}

/* Asks for the cache lines of `bytes` from p on, which may lie beyond the cache's end. */
INLINE void fetch(const uint8_t *p, size_t bytes) {
    for (size_t n = 0; n < bytes; n += 64) __builtin_prefetch(p + n, 0, 2);
}

/* N queries (from the job's i-th) over the chunk. Values are fetched while keys are read, and the next keys while
 * values are: memory would be waited for twice as long as the arithmetic takes. */
INLINE void attend_some(const attention_job *job, int first, const int N, const int kind, int start, float *state,
                        size_t stride) {
    const cache_layer *c = job->cache;
    const int dim = c->dim, padded = c->padded;
    const size_t head = (size_t)job->row * c->kv_heads + job->head, element = element_bytes(kind);
    const uint8_t *k = c->k + head * c->capacity * dim * element;        /* [capacity / 16][dim][16] */
    const uint8_t *v = c->v + head * c->capacity * padded * element;     /* [capacity][padded] */
    const float *k_scale = c->k_scale + (kind == EW_INT8 ? head * c->capacity : 0);      /* [capacity] */
    const float *v_scale = c->v_scale + (kind == EW_INT8 ? head * c->capacity : 0);      /* [capacity] */
    int low = start + CHUNK, high = start;
    for (int i = first; i < first + N; i++) {
        if (job->low[i] < low) low = job->low[i];
        if (job->high[i] > high) high = job->high[i];
    }
    if (low < start) low = start;
    if (high > start + CHUNK) high = start + CHUNK;
    if (high > c->capacity) high = c->capacity;
    const size_t step = high > low ? align64(job->ahead_slots * dim * element / (high - low)) : 0;   /* bytes a slot */
    float score[MOST_QUERIES][CHUNK];                /* then weights: exp(score - most), times the value's scale */
    vf most[MOST_QUERIES], lanes = {0};
    for (int i = 0; i < W; i++) lanes[i] = i;
    EACH(i, N) most[i] = splat(NO_SCORE);
    const float *query[MOST_QUERIES];
    EACH(i, N) query[i] = job->query[first + i];
    const int from = low / ABREAST * ABREAST;
    for (int slot = from; slot < high; slot += ABREAST) {
        vf s[MOST_QUERIES][ABREAST / W];
        EACH(i, N) EACH(p, ABREAST / W) s[i][p] = splat(0);
        const size_t block = (size_t)slot * dim;
        for (int d = 0; d < dim; d++) {
            if (!first) fetch(v + ((size_t)slot * padded + d * ABREAST) * element, ABREAST * element);
            EACH(p, ABREAST / W) {
                vf key = load_cached(k, block + (p / PARTS * dim + d) * TILE + p % PARTS * W, kind);
                EACH(i, N) s[i][p] = key * splat_at(query[i] + d) + s[i][p];
            }
        }
        EACH(p, ABREAST / W) {
            vf at = lanes + (float)(slot + p * W);           /* exact: slots are far below 2^24 */
            EACH(i, N) {
                vf x = kind == EW_INT8 ? s[i][p] * load(k_scale + slot + p * W) : s[i][p];
                if (job->softcap) x = (1.f - 2.f / (exponential(x * (2 / job->softcap)) + 1.f)) * job->softcap;
                x = pick((at >= splat(job->low[first + i])) & (at < splat(job->high[first + i])), x, splat(NO_SCORE));
                store(&score[i][slot - start + p * W], x);
                most[i] = maximum(most[i], x);
            }
        }
    }
    EACH(i, N) {
        float *out = state + (size_t)(first + i) * stride, top = largest(most[i]);
        vf sum = splat(0);
        for (int slot = from - start; slot < high - start; slot += W) {
            vf x = load(&score[i][slot]), e = exponential(x - top);
            e = pick(x > splat(NO_SCORE), e, splat(0));
            sum += e;
            store(&score[i][slot], kind == EW_INT8 ? e * load(v_scale + start + slot) : e);
        }
        out[0] = top, out[1] = total(sum);
    }
    const int vectors = (N > 4 ? 32 : 64) / W;       /* of values at once: each query has as many sums */
    for (int d = 0; d < padded; d += vectors * W) {
        const int used = padded - d < vectors * W ? (padded - d) / W : vectors;
        vf acc[MOST_QUERIES][64 / W];
        EACH(i, N) EACH(n, vectors) acc[i][n] = splat(0);
        if (used == vectors)
            for (int slot = low; slot < high; slot++) {
                if (!d && !first && step) fetch(job->ahead + (slot - low) * step, step);
                EACH(n, vectors) {
                    vf value = load_cached(v, (size_t)slot * padded + d + n * W, kind);
                    EACH(i, N) acc[i][n] = value * splat_at(&score[i][slot - start]) + acc[i][n];
                }
            }
        else
            for (int slot = low; slot < high; slot++)
                for (int n = 0; n < used; n++) {
                    vf value = load_cached(v, (size_t)slot * padded + d + n * W, kind);
                    EACH(i, N) acc[i][n] = value * splat_at(&score[i][slot - start]) + acc[i][n];
                }
        EACH(i, N)
            for (int n = 0; n < used; n++) store(state + (size_t)(first + i) * stride + 2 + d + n * W, acc[i][n]);
    }
}

/* A function for so many queries and each kind of cache. */
typedef void attend_kernel(const attention_job *, int first, int start, float *state, size_t stride);
#define ATTEND_KERNEL(N, kind) \
    FUNCTION void attend_##N##_##kind(const attention_job *job, int first, int start, float *state, size_t stride) { \
        attend_some(job, first, N, kind, start, state, stride); }
#define ATTEND_ENTRY(N, kind) [N][kind] = attend_##N##_##kind,
#if W == 16
#define EVERY_COUNT(X, kind) X(1, kind) X(2, kind) X(3, kind) X(4, kind) X(8, kind)
#else
#define EVERY_COUNT(X, kind) X(1, kind) X(2, kind) X(3, kind) X(4, kind)
#endif
#define EVERY_KIND(X) EVERY_COUNT(X, EW_FLOAT32) EVERY_COUNT(X, EW_FLOAT16) EVERY_COUNT(X, EW_INT8)
EVERY_KIND(ATTEND_KERNEL)
static attend_kernel *const attend_by[MOST_QUERIES + 1][EW_INT8 + 1] = {EVERY_KIND(ATTEND_ENTRY)};

/* One chunk of the job (core.h), to state [queries][stride]. */
FUNCTION void attend(const attention_job *job, int start, float *state, size_t stride) {
    for (int i = 0, n; i < job->queries; i += n) {
        n = job->queries - i >= MOST_QUERIES ? MOST_QUERIES : job->queries - i >= 4 ? 4 : job->queries - i;
        attend_by[n][job->cache->kind](job, i, start, state, stride);
    }
}

/* The state [2 + padded] of an earlier chunk takes in that of the next one. */
FUNCTION void merge(float *into, const float *from, int padded) {
    float top = into[0] > from[0] ? into[0] : from[0];
    float a = exponential(splat(into[0] - top))[0], b = exponential(splat(from[0] - top))[0];
    into[0] = top;
    into[1] = into[1] * a + from[1] * b;
    for (int d = 2; d < 2 + padded; d += W) store(into + d, load(into + d) * a + load(from + d) * b);
}

/* Put the key (or value) x [dim] of one slot of one head (the at-th, of all rows) into the cache. */
INLINE void append_some(const cache_layer *c, size_t at, int slot, const float *x, const int value, const int kind) {
    const size_t element = element_bytes(kind);
    float scale = 1;
    if (kind == EW_INT8) {
        float top = 0;
        for (int d = 0; d < c->dim; d++) top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
        (value ? c->v_scale : c->k_scale)[at * c->capacity + slot] = top / 127;
        scale = top > 0 ? 127 / top : 0;
    }
    uint8_t *to = value ? c->v + (at * c->capacity + slot) * c->padded * element
                        : c->k + ((at * c->capacity + slot / TILE * TILE) * c->dim + slot % TILE) * element;
    for (int d = 0; d < c->dim; d += W) {
        const int n = c->dim - d < W ? c->dim - d : W;
        float f[W] = {0};
        uint8_t stored[4 * W];
        if (n == W) memcpy(f, x + d, sizeof f);                         /* of known size: no call */
        else memcpy(f, x + d, n * sizeof(float));
        if (kind == EW_FLOAT32) memcpy(stored, f, sizeof f);
        else if (kind == EW_FLOAT16) store_half((uint16_t *)stored, load(f));
        else {
            vb bytes = __builtin_convertvector(round_int(load(f) * scale), vb);
            memcpy(stored, &bytes, W);
        }
        if (value && n == W) memcpy(to + d * element, stored, W * element);
        else if (value) memcpy(to + d * element, stored, n * element);
        else for (int i = 0; i < n; i++) memcpy(to + (d + i) * TILE * element, stored + i * element, element);
    }
}

FUNCTION void append(const cache_layer *c, int row, int head, int slot, const float *x, int value) {
    const size_t at = (size_t)row * c->kv_heads + head;
    if (c->kind == EW_FLOAT32) append_some(c, at, slot, x, value, EW_FLOAT32);
    else if (c->kind == EW_FLOAT16) append_some(c, at, slot, x, value, EW_FLOAT16);
    else append_some(c, at, slot, x, value, EW_INT8);
}

#define KERNELS_WITH(variable, title, multiply, quantize, attend) \
    const kernels variable = {title, multiply, quantize, normalize, activate, attend, merge, rotate, append, peak, \
                              recur}
#define KERNELS(variable, title) KERNELS_WITH(variable, title, multiply, quantize, attend)
