/* The arithmetic of a step, written once over vectors of W floats and compiled by each isa_*.c for its instruction set.
 *
 * The including file defines W, TARGET (the instruction set, an attribute that every function here has: GCC and clang
 * both know it) and the functions marked "isa" below. Products of codes and int8 activations are exact integers, and
 * floats are added per output in a fixed order (groups along the inputs, slots along the cache), so a result does not
 * depend on how many rows, threads or tiles a call has, with one exception: on CPUs with AMX, EW_MANY rows and more are
 * rounded to bfloat16 (amx.h), and depend on that alone. Multiply and add fuse where the CPU has FMA.
 */
#include "core.h"
#include <math.h>

#define FUNCTION static TARGET
#define INLINE static inline __attribute__((always_inline)) TARGET
#define PARTS (TILE / W)
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)     /* n known: arrays over i in registers */

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));     /* wraps around, where damaged weights overflow */
typedef int8_t vb __attribute__((vector_size(W)));

/* isa: dot4(acc, w, x): acc[i] += sum over 4 of (w.byte[4i+j] - CODE_BIAS(bits)) * x[j]; bytes of w are unsigned. */
INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits);
INLINE vf load_half(const uint16_t *p);              /* isa: W halves */
INLINE void store_half(uint16_t *p, vf x);           /* isa: to nearest, ties to even */
INLINE vf maximum(vf a, vf b);                       /* isa: a > b ? a : b, so b where one is no number */
INLINE vf minimum(vf a, vf b);                       /* isa: a < b ? a : b */
INLINE vi load_bytes(const void *p);                 /* isa: W unsigned bytes (GCC 12 widens vectors one by one) */
INLINE vi load_signed(const void *p);                /* isa: W signed bytes */
INLINE vi load_table(const uint8_t table[16]);       /* isa: for look_up, in every 16 bytes of the vector */
INLINE vi look_up(vi table, vi w);                   /* isa: each byte of w, 0 to 15, becomes that of the table */

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vi load_int(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }
INLINE vf splat_at(const float *p) {                 /* an integer's broadcast takes no arithmetic port of Zen 4 */
    int32_t x;
    memcpy(&x, p, 4);
    return (vf)splat_int(x);
}
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vi round_int(vf x) { return (vi)((vu)(x + 12582912.f) - 0x4B400000); }    /* nearest even, |x| < 2^22 */

/* The lanes of x from the n-th on come first, then those before (n a constant). */
#ifdef __clang__
#define AT(i, n) (((i) + (n)) & (W - 1))
#define FOUR_AT(i, n) AT(i, n), AT(i + 1, n), AT(i + 2, n), AT(i + 3, n)
#if W == 16
#define TURNED(x, n) __builtin_shufflevector(x, x, FOUR_AT(0, n), FOUR_AT(4, n), FOUR_AT(8, n), FOUR_AT(12, n))
#elif W == 8
#define TURNED(x, n) __builtin_shufflevector(x, x, FOUR_AT(0, n), FOUR_AT(4, n))
#else
#define TURNED(x, n) __builtin_shufflevector(x, x, FOUR_AT(0, n))
#endif
#else
#define TURNED(x, n) __builtin_shuffle(x, (lanes() + (n)) & (W - 1))
#endif
INLINE vi lanes(void) { vi v = {0}; EACH(i, W) v[i] = i; return v; }

/* Each folds the upper half of its lanes onto the lower one, and so on, always in the same order. */
INLINE float total(vf x) {
    if (W > 8) x += TURNED(x, 8 & (W - 1));
    if (W > 4) x += TURNED(x, 4 & (W - 1));
    x += TURNED(x, 2);
    return (x + TURNED(x, 1))[0];
}
INLINE int32_t total_int(vi x) {
    if (W > 8) x += TURNED(x, 8 & (W - 1));
    if (W > 4) x += TURNED(x, 4 & (W - 1));
    x += TURNED(x, 2);
    return (x + TURNED(x, 1))[0];
}
INLINE float largest(vf x) {
    if (W > 8) x = maximum(x, TURNED(x, 8 & (W - 1)));
    if (W > 4) x = maximum(x, TURNED(x, 4 & (W - 1)));
    x = maximum(x, TURNED(x, 2));
    return maximum(x, TURNED(x, 1))[0];
}
INLINE vf exponential(vf x) {                        /* Cephes' expf: 2 ulp; exactly 1 at 0; x clamped to +-87 */
    x = minimum(maximum(x, splat(-87.f)), splat(87.f));
    vi n = round_int(x * 1.44269504f);
    vf m = to_float(n), r = x - m * 0.693359375f;
    r = r + m * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return (vf)((vu)p + ((vu)n << 23));
}

/* How many rows the kernels take at once when `rows` are left. Rows taken together lie interleaved, block by block, in
 * quantized activations: row r of the group that starts at row g has block b at index g * blocks + b * size + r - g. */
INLINE int group_rows(int rows, int most) {
    int size = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    return size > most ? most : size;
}

/* Step j (inputs 4j..4j+3) of a block of `bits`-wide codes, W rows of a tile: see layout.c for the planes. */
INLINE vi codes_of(const uint8_t *block, const int bits, const int j) {
    vi c = {0};
    int line = 0, shift = 0;
    EACH(i, 4) {
        const int plane = 8 >> i, steps = 8 / plane, down = plane * (j % steps);
        if (!(bits & plane)) continue;
        vi v = load_int(block + 64 * (line + j / steps));
        const int right = down - shift;              /* straight to its place in the code */
        v = right > 0 ? v >> right : right < 0 ? (vi)((vu)v << -right) : v;
        c |= v & (int)((((1u << plane) - 1) * 0x01010101) << shift);
        line += plane, shift += plane;
    }
    return c;
}

/* The same as bytes that dot4 takes: of `levels`, what the codes stand for, which are then 8 bits wide. */
INLINE vi bytes_of(const uint8_t *block, const int bits, const int levels, const int j, vi table) {
    const vi w = codes_of(block, bits, j);
    return levels ? look_up(table, w) : w;
}

/* R rows of activations (the first is row0) times W rows of a tile of codes, the part-th W: to y [R][y_stride].
 * int8: the activations are quantized; else they are floats. one: groups have one block each. narrow: 8-bit scales. */
INLINE void multiply_codes(const matrix *m, const uint8_t *tile, const activations *x, int row0, const int R,
                           const int bits, const int levels, const int int8, const int one, const int narrow, int part,
                           float *y, size_t y_stride) {
    const int dot_bits = levels ? 8 : bits, scale_bytes = narrow ? 1 : 2;
    const uint8_t *scales = tile + m->scales_at + part * W * scale_bytes;
    const uint8_t *zeros = tile + m->zeros_at + part * W, *block = tile + m->codes_at + part * 4 * W;
    const int zero_bits = CODE_BIAS(dot_bits) ? -1 : dot_bits - 1, blocks = m->blocks, asymmetric = m->asymmetric;
    const size_t first = (size_t)row0 * x->blocks, stride = (size_t)x->blocks * BLOCK;
    const int8_t *q = int8 ? x->q + first * BLOCK : NULL;
    const float *f = x->f + first * BLOCK, *scale = x->scale + first;
    const int32_t *sum = x->sum + first;
    const vi table = levels ? load_table(m->level) : splat_int(0);
    vf acc[8];
    EACH(r, R) acc[r] = splat(0);
    for (int g = 0, b = 0; g < m->groups; g++) {
        vf group[8];
        EACH(r, R) group[r] = splat(0);
        const vi zero = asymmetric ? load_bytes(zeros + g * TILE) - (int8 ? CODE_BIAS(bits) : 0)
                                   : splat_int(int8 ? 0 : 1 << (dot_bits - 1));
        const int end = one ? b + 1 : b + m->group_blocks < blocks ? b + m->group_blocks : blocks;
        for (; b < end; b++, block += 64 * bits, q += R * BLOCK, scale += R, sum += R)
            if (int8) {
                vi s[8];
                EACH(i, bits) __builtin_prefetch(block + AHEAD + 64 * i, 0, 2);      /* to L2; beyond this tile */
                EACH(r, R) {                         /* sum holds -8 times the sum of q: what 4 bits take as it is */
                    vi minus = splat_int(sum[r]);
                    s[r] = asymmetric ? (minus >> 3) * zero : zero_bits < 0 ? splat_int(0)
                           : zero_bits < 3 ? minus >> (3 - zero_bits) : (vi)((vu)minus << (zero_bits - 3));
                }
                EACH(j, 8) {
                    vi w = bytes_of(block, bits, levels, j, table);
                    EACH(r, R) s[r] = dot4(s[r], w, q + r * BLOCK + 4 * j, dot_bits);
                }
                EACH(r, R) group[r] = to_float(s[r]) * splat(scale[r]) + group[r];
            } else EACH(j, 8) {
                vi w = bytes_of(block, bits, levels, j, table);
                EACH(i, 4) {
                    vf value = to_float((w >> 8 * i) & 255) - to_float(zero);
                    EACH(r, R) group[r] = value * splat(f[r * stride + b * BLOCK + 4 * j + i]) + group[r];
                }
            }
        const uint8_t *at = scales + g * TILE * scale_bytes;
        if (int8) __builtin_prefetch(at + AHEAD, 0, 2);
        const vf weight = narrow ? to_float(load_signed(at)) : load_half((const uint16_t *)at);
        EACH(r, R) acc[r] = group[r] * weight + acc[r];
    }
    if (narrow) EACH(r, R) acc[r] *= load_half((const uint16_t *)tile + part * W);
    EACH(r, R) store(y + r * y_stride + part * W, acc[r]);
}

/* The same for a tile of floats. */
INLINE void multiply_floats(const matrix *m, const uint8_t *tile, const activations *x, int row0, const int R,
                            const int kind, int part, float *y, size_t y_stride) {
    const size_t stride = (size_t)x->blocks * BLOCK;
    const float *f = x->f + row0 * stride;
    vf acc[8];
    EACH(r, R) acc[r] = splat(0);
    for (int k = 0; k < m->inputs; k++) {
        const uint16_t *half = (const uint16_t *)tile + k * TILE + part * W;
        vf w;
        if (kind == KIND_F32) w = load((const float *)tile + k * TILE + part * W);
        else if (kind == KIND_F16) w = load_half(half);
        else {
            vi wide = {0};
            for (int i = 0; i < W; i++) wide[i] = (int32_t)((uint32_t)half[i] << 16);
            w = (vf)wide;
        }
        EACH(r, R) acc[r] = w * splat(f[r * stride + k]) + acc[r];
    }
    EACH(r, R) store(y + r * y_stride + part * W, acc[r]);
}

/* A function for each width of weights (LEVELS more where they are levels), for quantized activations (by_int8) or
 * floats, and for every number of rows. */
#define LEVELS 10
typedef void tile_kernel(const matrix *, const uint8_t *tile, const activations *, int row, float *y, size_t y_stride);
#define TILE_KERNEL(int8, kind, R) \
    FUNCTION void multiply_##int8##_##kind##_##R(const matrix *m, const uint8_t *tile, const activations *x, int row, \
                                                 float *y, size_t y_stride) { \
        _Pragma("GCC unroll 1") for (int part = 0; part < PARTS; part++) \
            if (kind >= KIND_F16) multiply_floats(m, tile, x, row, R, kind, part, y, y_stride); \
            else if (m->group_blocks == 1 && !m->narrow) \
                multiply_codes(m, tile, x, row, R, kind % LEVELS, kind > LEVELS, int8, 1, 0, part, y, y_stride); \
            else if (int8 && m->group_blocks == 1) \
                multiply_codes(m, tile, x, row, R, kind % LEVELS, kind > LEVELS, int8, 1, 1, part, y, y_stride); \
            else multiply_codes(m, tile, x, row, R, kind % LEVELS, kind > LEVELS, int8, 0, m->narrow, part, y, \
                                y_stride); }
#define ENTRY(int8, kind, R) [kind][R] = multiply_##int8##_##kind##_##R,
#ifdef FEW_REGISTERS                                 /* plain C */
enum { MOST_INT8 = 2, MOST_FLOAT = 2 };
#define ROWS_INT8(X, kind) X(1, kind, 1) X(1, kind, 2)
#define ROWS_FLOAT(X, kind) X(0, kind, 1) X(0, kind, 2)
#else
enum { MOST_INT8 = 8, MOST_FLOAT = 4 };
#define ROWS_INT8(X, kind) X(1, kind, 1) X(1, kind, 2) X(1, kind, 4) X(1, kind, 8)
#define ROWS_FLOAT(X, kind) X(0, kind, 1) X(0, kind, 2) X(0, kind, 4)
#endif
#define EVERY_WIDTH(ROWS, X) ROWS(X, 2) ROWS(X, 3) ROWS(X, 4) ROWS(X, 5) ROWS(X, 6) ROWS(X, 8) \
                             ROWS(X, 12) ROWS(X, 13) ROWS(X, 14)
#define EVERY_FLOAT(ROWS, X) ROWS(X, KIND_F16) ROWS(X, KIND_BF16) ROWS(X, KIND_F32)
EVERY_WIDTH(ROWS_INT8, TILE_KERNEL) EVERY_WIDTH(ROWS_FLOAT, TILE_KERNEL) EVERY_FLOAT(ROWS_FLOAT, TILE_KERNEL)
static tile_kernel *const by_int8[LEVELS + 5][9] = {EVERY_WIDTH(ROWS_INT8, ENTRY)};
static tile_kernel *const by_float[KIND_F32 + 1][9] = {EVERY_WIDTH(ROWS_FLOAT, ENTRY) EVERY_FLOAT(ROWS_FLOAT, ENTRY)};

/* y [rows][y_stride] += the bias of the outputs of tile t, `columns` of them. */
INLINE void add_bias(const matrix *m, int t, int rows, int columns, float *y, size_t y_stride) {
    if (!m->bias) return;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) y[r * y_stride + c] += m->bias[t * TILE + c];
}

/* Columns tile0 * 16 .. tile1 * 16 - 1 of y [rows][y_stride] become x times the tiles (plus bias): a tile is read from
 * memory once and serves all rows. */
FUNCTION void multiply(const matrix *m, const activations *x, int rows, float *y, size_t y_stride, int tile0,
                       int tile1) {
    const int int8 = x->q && m->kind < KIND_F16;
    const int kind = m->kind + (m->levels ? LEVELS : 0);
    tile_kernel *const *kernel = int8 ? by_int8[kind] : by_float[kind];
    for (int t = tile0; t < tile1; t++) {
        const uint8_t *tile = m->data + t * m->tile_bytes;
        const int columns = tile_rows(m, t);
        for (int r = 0, n; r < rows; r += n) {
            float *out = y + r * y_stride + t * TILE, edge[8 * TILE];
            n = group_rows(rows - r, int8 ? MOST_INT8 : MOST_FLOAT);
            if (columns == TILE) kernel[n](m, tile, x, r, out, y_stride);
            else {
                kernel[n](m, tile, x, r, edge, TILE);
                for (int i = 0; i < n; i++) memcpy(out + i * y_stride, edge + i * TILE, columns * sizeof(float));
            }
            add_bias(m, t, n, columns, out, y_stride);
        }
    }
}

/* n blocks of a row, at most BATCH, to every stride-th block of q, scale and sum. Largest values come first, for all
 * blocks: one after the other, a block would wait for its own. */
enum { BATCH = 2 * TILE };
INLINE void quantize_blocks(const float *f, int n, int8_t *q, float *scale, int32_t *sum, int stride) {
    float top[BATCH] = {0}, inverse[BATCH], scales[BATCH];
    int32_t finite[BATCH];
    for (int b = 0; b < n; b++) {
        vi most = splat_int(0);                      /* of |x| by its bits, which order numbers, infinity, NaN */
        for (int k = 0; k < BLOCK; k += W) {
            vi size = (vi)load(f + b * BLOCK + k) & 0x7fffffff, more = size > most;
            most = (more & size) | (~more & most);
        }
        const vi odd = most > 0x7f800000;            /* NaN, which `largest` would lose, becomes infinity */
        top[b] = largest((vf)((odd & 0x7f800000) | (~odd & most)));
    }
    for (int b = 0; b < n; b += W) {
        const vf t = load(top + b);
        const vi number = t < splat(INFINITY);       /* else codes 0, scale NaN: outputs NaN */
        memcpy(finite + b, &number, sizeof number);
        store(inverse + b, pick(t > splat(1e-30f), 127 / t, splat(0)));      /* 127 / t stays finite */
        store(scales + b, pick(number, t / 127, splat(NAN)));
    }
    for (int b = 0; b < n; b++, q += stride * BLOCK) {
        const vi number = splat_int(finite[b]);
        vi all = splat_int(0);
        for (int k = 0; k < BLOCK; k += W) {
            vi rounded = round_int(load(f + b * BLOCK + k) * splat_at(inverse + b)) & number;
            vb bytes = __builtin_convertvector(rounded, vb);
            memcpy(q + k, &bytes, W);
            all += rounded;
        }
        scale[b * stride] = scales[b], sum[b * stride] = -8 * total_int(all);
    }
}

/* x->f [rows][blocks * 32] to int8, per block and row: scale = max|x| / 127, as ONNX Runtime's int4 kernel does it.
 * Rows first..last-1 of `rows`, which say how rows are grouped. */
FUNCTION void quantize(activations *x, int rows, int first, int last) {
    const int blocks = x->blocks;
    for (int g = 0, n; g < last; g += n) {
        n = group_rows(rows - g, MOST_INT8);
        for (int r = g > first ? g : first; r < g + n && r < last; r++)
            for (int b = 0; b < blocks; b += BATCH) {
                const size_t i = (size_t)g * blocks + b * n + r - g;
                quantize_blocks(x->f + ((size_t)r * blocks + b) * BLOCK, blocks - b < BATCH ? blocks - b : BATCH,
                                x->q + i * BLOCK, x->scale + i, x->sum + i, n);
            }
    }
}

/* y [n] = LayerNorm (layer_norm) or RMSNorm of x [n], times weight [n], plus bias [n] (or NULL). */
FUNCTION void normalize(const float *x, const float *weight, const float *bias, float eps, int layer_norm, float *y,
                        int n) {
    vf sum = splat(0);
    float mean = 0, rest = 0;
    int whole = n / W * W;
    if (layer_norm) {
        for (int i = 0; i < whole; i += W) sum += load(x + i);
        for (int i = whole; i < n; i++) rest += x[i];
        mean = (total(sum) + rest) / n;
        sum = splat(0), rest = 0;
    }
    for (int i = 0; i < whole; i += W) { vf d = load(x + i) - mean; sum = d * d + sum; }
    for (int i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf((total(sum) + rest) / n + eps);
    for (int i = 0; i < whole; i += W) {
        vf v = (load(x + i) - mean) * scale * load(weight + i);
        store(y + i, bias ? v + load(bias + i) : v);
    }
    for (int i = whole; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

INLINE vf activation_of(vf g, int kind) {
    if (kind == EW_SILU) return g / (exponential(-g) + 1.f);
    if (kind == KERNEL_SIGMOID) return 1.f / (exponential(-g) + 1.f);
    if (kind == EW_GELU_TANH) return g / (exponential((g * g * g * 0.044715f + g) * -1.59576912f) + 1.f);
    for (int i = 0; i < W; i++) g[i] = 0.5f * g[i] * (1 + erff(g[i] * 0.70710678f));
    return g;
}

/* y [n] = activation(gate [n]) * up [n], or activation(up) where gate is NULL; n is a multiple of 16. */
FUNCTION void activate(const float *gate, const float *up, float *y, int n, int kind) {
    for (int i = 0; i < n; i += W)
        store(y + i, gate ? activation_of(load(gate + i), kind) * load(up + i) : activation_of(load(up + i), kind));
}

/* The largest of x [n]. */
FUNCTION float peak(const float *x, int n) {
    float best = x[0];
    vf most = splat(best);
    for (; n >= W; n -= W, x += W) most = maximum(load(x), most);
    for (int i = 0; i < n; i++) best = x[i] > best ? x[i] : best;
    float all = largest(most);
    return all > best ? all : best;
}

/* RoPE of x [2 * half] by angles whose cosines and sines are cos and sin [half]. */
FUNCTION void rotate(float *x, const float *cos, const float *sin, int half) {
    int i = 0;
    for (; i + W <= half; i += W) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i], x[half + i] = b * cos[i] + a * sin[i];
    }
}
