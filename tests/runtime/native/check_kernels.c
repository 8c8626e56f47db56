/* The kernels of every instruction set this CPU has, against a scalar reference in double, over random shapes.
 *
 * Runs natively, under AddressSanitizer and UBSan (make test-asan) and as an ARM program under qemu-user (make
 * test-arm). Tensors are laid out as in a weights file, so the repacking is checked too. Heap blocks have the exact
 * size of what they hold: a read beyond one is an error under the sanitizers. Prints what failed; exit code 1 if
 * anything did.
 */
#include "core.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t state = 88172645463325252ull;
static uint32_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}
static int up_to(int n) { return (int)(random_bits() % n); }
static float unit(void) { return random_bits() / 2147483648.f - 1; }
static int failures;
static void expect(int ok, const char *isa, const char *what, int a, int b, int c, double error) {
    if (!ok) failures++, printf("FAILED %s: %s (%d, %d, %d), error %g\n", isa, what, a, b, c, error);
}

typedef struct {
    int rows, inputs, bits, group, asymmetric, by_input, groups, narrow, levels;
    int *code;                                       /* [rows][inputs] */
    int *zero; double *scale;                        /* [rows][groups] */
    int8_t level[16];                                /* [2^bits] */
    uint8_t *bytes, *zero_bytes; void *scale_bytes; uint16_t *row_scale;         /* as in a file */
} tensor;

static uint16_t half_of_either_sign(void) { return (uint16_t)(0x1c00 + up_to(0x800) + (up_to(8) == 0) * 0x8000); }

/* A random quantized tensor and its bytes: int4/int8 as one run, [K, N] or [N, K], or bit streams of rows [N, K]. */
static source make(tensor *t) {
    static const int types[][2] = {[2] = {EW_UINT2}, [3] = {EW_UINT3}, [4] = {EW_UINT4, EW_INT4}, [5] = {EW_UINT5},
                                   [6] = {EW_UINT6}, [8] = {EW_UINT8, EW_INT8}};
    const int run = t->by_input || (t->bits % 4 == 0 && !t->narrow && !t->levels && up_to(2));
    const int flip = run ? 1 << (t->bits - 1) : 0, zero_bits = run ? t->bits : 8;
    size_t n = (size_t)t->rows * t->inputs;
    t->groups = t->group ? t->inputs / t->group : 1;
    size_t s = (size_t)t->rows * t->groups;
    t->code = malloc(n * sizeof(int)), t->zero = malloc(s * sizeof(int)), t->scale = malloc(s * sizeof(double));
    t->scale_bytes = malloc(s * 2), t->row_scale = malloc(t->rows * 2);
    for (int c = 0, low = -127; c < 1 << t->bits && t->levels; c++)
        t->level[c] = (int8_t)(low + up_to(129 - low - (1 << t->bits) + c)), low = t->level[c] + 1;
    for (int r = 0; r < t->rows; r++) t->row_scale[r] = half_of_either_sign() & 0x7fff;
    for (size_t i = 0; i < n; i++) t->code[i] = up_to(1 << t->bits);
    for (size_t i = 0; i < s; i++) {
        t->zero[i] = t->asymmetric ? up_to(1 << t->bits) : 1 << (t->bits - 1);
    }
    size_t row_bits = run ? (size_t)t->inputs * t->bits : ((size_t)t->inputs * t->bits + 7) / 8 * 8;
    t->bytes = calloc((t->rows * row_bits + 7) / 8, 1), t->zero_bytes = calloc((s * zero_bits + 7) / 8, 1);
    for (int r = 0; r < t->rows; r++) {
        for (int k = 0; k < t->inputs; k++) {
            int code = t->code[(size_t)r * t->inputs + k] ^ flip;
            size_t from = t->by_input ? ((size_t)k * t->rows + r) * t->bits : r * row_bits + (size_t)k * t->bits;
            for (int b = 0; b < t->bits; b++) t->bytes[(from + b) / 8] |= (code >> b & 1) << (from + b) % 8;
        }
        for (int g = 0; g < t->groups; g++) {
            size_t i = t->by_input ? (size_t)g * t->rows + r : (size_t)r * t->groups + g;
            const uint16_t half = half_of_either_sign();
            const int byte = (1 + up_to(127)) * (up_to(2) ? 1 : -1);
            if (t->narrow) ((int8_t *)t->scale_bytes)[i] = (int8_t)byte;
            else ((uint16_t *)t->scale_bytes)[i] = half;
            t->scale[(size_t)r * t->groups + g] = t->narrow ? byte * (double)float_at(t->row_scale, KIND_F16, r)
                                                            : float_at(&half, KIND_F16, 0);
            t->zero_bytes[i * zero_bits / 8] |= (t->zero[(size_t)r * t->groups + g] ^ flip) << i * zero_bits % 8;
        }
    }
    const int dtype = types[t->bits][run];
    return (source){t->bytes, t->zero_bytes, t->scale_bytes, t->row_scale, dtype, t->by_input, t->rows, 0, NULL};
}

/* Packs all of m; returns whether all of it is sound. */
static int pack(matrix *m, const source *s) {
    int finite = 1;
    for (int t = 0; t < m->tiles; t++) matrix_pack(m, s, t), finite &= matrix_sound(m, t);
    return finite;
}

/* To bfloat16: to nearest, ties to even or away from zero. */
static double bfloat(float x, int even) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + (even ? 0x7fff + (bits >> 16 & 1) : 0x8000)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

static void check_product(const kernels *k) {
    static const int widths[] = {2, 3, 4, 5, 6, 8}, groups[] = {32, 64, 128, 0};
    tensor t = {.bits = widths[up_to(6)], .group = groups[up_to(4)], .asymmetric = up_to(2), .rows = 1 + up_to(70)};
    t.inputs = t.group ? t.group * (1 + up_to(3)) : 1 + up_to(300);
    t.narrow = up_to(3) == 0, t.levels = t.bits <= 4 && up_to(2);
    if (t.levels) t.asymmetric = 0;
    t.by_input = t.bits % 4 == 0 && !t.narrow && !t.levels && up_to(2);
    int rows = 1 + up_to(up_to(3) ? 19 : 90), fp32 = up_to(2);
    const int bf16 = !fp32 && rows >= EW_MANY && !strcmp(k->name, "avx512-amx");
    source s = make(&t);
    matrix m;
    size_t bytes = matrix_shape(&m, t.rows, t.inputs, t.bits, t.group, t.asymmetric, t.narrow);
    if (t.levels) matrix_levels(&m, t.level);
    m.data = aligned_alloc(64, bytes);
    expect(pack(&m, &s), k->name, "finite weights are taken", t.bits, t.group, t.rows, 0);
    float *bias = up_to(2) ? calloc((size_t)m.tiles * TILE, sizeof(float)) : NULL;
    for (int r = 0; bias && r < t.rows; r++) bias[r] = unit();
    m.bias = bias;
    activations a = {.blocks = m.blocks};
    size_t width = (size_t)m.blocks * BLOCK, n = rows * width;
    a.f = calloc(n, 4), a.q = calloc(ceil_div(rows, TILE) * TILE * width, 2);
    a.scale = calloc(n / BLOCK, 4), a.sum = calloc(n / BLOCK, 4);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < t.inputs; i++) a.f[r * width + i] = unit() * (i % 32 == 5 ? 20 : 1) * (up_to(9) > 0);
    int8_t *q = a.q;
    if (fp32) a.q = NULL;
    else k->quantize(&a, rows, 0, rows);
    float *y = calloc((size_t)rows * t.rows, 4), *again = calloc((size_t)rows * t.rows, 4);
    float *row = malloc(t.inputs * sizeof(float));
    k->multiply(&m, &a, rows, y, t.rows, 0, m.tiles);
    for (int tile = m.tiles - 1; tile >= 0; tile--) k->multiply(&m, &a, rows, again, t.rows, tile, tile + 1);
    expect(!memcmp(y, again, (size_t)rows * t.rows * 4), k->name, "tiles give the same bits in any order", t.bits,
           t.group, rows, 0);
    for (int o = 0; o < t.rows; o++) {
        matrix_read_row(&m, o, row);
        if (!s.by_input) {
            const int first = up_to(t.inputs), n = 1 + up_to(t.inputs - first);
            float part[n];
            source_read(&m, &s, o, first, n, part);
            expect(!memcmp(part, row + first, n * 4), k->name, "a row reads from its source", t.bits, t.group, o, 0);
        }
        for (int r = 0; r < rows; r++) {
            double sum = 0, size = 1e-6;
            for (int i = 0; i < t.inputs; i++) {
                int g = t.group ? i / t.group : 0;
                size_t at = (size_t)o * t.groups + g;
                const int code = t.code[(size_t)o * t.inputs + i];
                double w = (t.levels ? t.level[code] : code - t.zero[at]) * t.scale[at], x = a.f[r * width + i];
                if (r == 0)
                    expect(fabs(row[i] - w) <= 1e-6 * fabs(w), k->name, "a row reads back", t.bits, o, i, row[i] - w);
                if (bf16) w = bfloat((float)w, 0), x = bfloat((float)x, 1);
                else if (!fp32) {                            /* the reference rounds the same values to int8 */
                    double most = 0;
                    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; j++) most = fmax(most, fabs(a.f[r * width + j]));
                    x = most > 0 ? rint(a.f[r * width + i] * (double)(127 / (float)most)) * (most / 127) : 0;
                    const double code = a.f[r * width + i] * 127 / fmax(most, 1e-9);
                    const int tie = fabs(fabs(fmod(code, 1)) - 0.5) < 1e-4;      /* it may round either way */
                    size += fabs(w) * (tie ? most / 127 * 1e5 : 0);
                }
                sum += w * x, size += fabs(w * x);
            }
            if (bias) sum += bias[o], size += fabs(bias[o]);
            double error = fabs(y[(size_t)r * t.rows + o] - sum);
            const char *what = fp32 ? "product in float" : bf16 ? "product in bfloat16" : "product in int8";
            expect(error <= 1e-5 * size, k->name, what, t.bits, t.group, rows, error / size);
        }
    }
    int fewer = bf16 ? EW_MANY : 1;
    if (!fp32 && rows > fewer) {                     /* a row alone, or as few as go by bfloat16, give the same bits */
        activations last = a;
        last.f = a.f + (rows - fewer) * width;
        k->quantize(&last, fewer, 0, fewer);
        k->multiply(&m, &last, fewer, again, t.rows, 0, m.tiles);
        expect(!memcmp(again, y + (size_t)(rows - fewer) * t.rows, fewer * t.rows * 4), k->name,
               "fewer rows have the same bits", t.bits, t.group, rows, 0);
    }
    const float odd[] = {NAN, INFINITY, -INFINITY, -3e38f};  /* what damaged weights lead to stays what it is */
    int at = up_to(t.inputs), which = up_to(4);
    a.f[at] = odd[which];
    if (!fp32) k->quantize(&a, rows, 0, rows);
    k->multiply(&m, &a, rows, y, t.rows, 0, m.tiles);
    for (int o = 0; o < t.rows && which < 3; o++)
        expect(!isfinite(y[o]) || (bf16 || fp32), k->name, "inputs that are no numbers give no numbers", t.bits, at,
               rows, y[o]);
    free(t.code), free(t.zero), free(t.scale), free(t.bytes), free(t.zero_bytes);
    free(t.scale_bytes), free(t.row_scale);
    free(m.data), free(bias);
    free(a.f), free(q), free(a.scale), free(a.sum), free(y), free(again), free(row);
}

static void check_floats(const kernels *k) {
    int rows = 1 + up_to(40), inputs = 1 + up_to(90), count = 1 + up_to(9), kind = KIND_F16 + up_to(2);
    int by_input = up_to(2);
    uint16_t *w = malloc((size_t)rows * inputs * 2);
    for (int i = 0; i < rows * inputs; i++)
        w[i] = (uint16_t)((kind == KIND_F16 ? 0x3000 : 0x3d00) + up_to(0x600) + up_to(2) * 0x8000);
    source s = {(uint8_t *)w, NULL, NULL, NULL, kind == KIND_F16 ? EW_FLOAT16 : EW_BFLOAT16, by_input, rows, 0, NULL};
    matrix m;
    size_t bytes = matrix_shape(&m, rows, inputs, kind, 0, 0, 0), width = (size_t)m.blocks * BLOCK;
    m.data = aligned_alloc(64, bytes);
    expect(pack(&m, &s), k->name, "finite floats are taken", rows, inputs, kind, 0);
    activations a = {.blocks = m.blocks, .f = calloc(count * width, 4)};
    for (int r = 0; r < count; r++) for (int i = 0; i < inputs; i++) a.f[r * width + i] = unit();
    float *y = calloc((size_t)count * rows, 4), *row = malloc(inputs * sizeof(float));
    k->multiply(&m, &a, count, y, rows, 0, m.tiles);
    for (int o = 0; o < rows; o++) {
        matrix_read_row(&m, o, row);
        for (int r = 0; r < count; r++) {
            double sum = 0, size = 1e-9;
            for (int i = 0; i < inputs; i++) {
                const double product = (double)row[i] * a.f[r * width + i];
                sum += product, size += fabs(product);
            }
            const double error = y[(size_t)r * rows + o] - sum;
            expect(fabs(error) <= 2e-6 * size, k->name, "product of floats", rows, inputs, kind, error);
        }
    }
    w[up_to(rows * inputs)] = kind == KIND_F16 ? 0x7c00 : 0x7fc0;
    expect(!pack(&m, &s), k->name, "infinities and NaN are refused", rows, inputs, kind, 0);
    free(w), free(m.data), free(a.f), free(y), free(row);
}

static void check_attention(const kernels *k) {
    static const int kinds[] = {EW_FLOAT32, EW_FLOAT16, EW_INT8}, dims[] = {8, 16, 24, 64, 80, 128};
    int kind = kinds[up_to(3)], dim = dims[up_to(6)], padded = ceil_div(dim, TILE) * TILE, length = 1 + up_to(400);
    int many = up_to(2), queries = 1 + up_to(many ? 70 : 7);
    int capacity = ceil_div(length, 2 * TILE) * 2 * TILE, heads = 1 + up_to(2);
    int window = up_to(2) ? 1 + up_to(200) : 1 << 20;
    size_t slots = (size_t)2 * heads * capacity, element = dtype_bits(kind) / 8, stride = 2 + padded;
    cache_layer c = {calloc(slots * dim, element), calloc(slots * padded, element), calloc(slots, 4), calloc(slots, 4),
                     kind, capacity, heads, dim, padded};
    float *key = malloc((size_t)length * dim * 4), *value = malloc((size_t)length * dim * 4);
    float *q = malloc((size_t)queries * dim * 4);
    for (int i = 0; i < length * dim; i++) key[i] = unit(), value[i] = unit();
    for (int i = 0; i < queries * dim; i++) q[i] = unit();
    for (int s = 0; s < length; s++) {
        k->append(&c, 1, heads - 1, s, key + s * dim, 0);
        k->append(&c, 1, heads - 1, s, value + s * dim, 1);
    }
    const float *query[70];
    int low[70], high[70];
    for (int i = 0; i < queries; i++) {
        query[i] = q + i * dim, high[i] = length - queries + i + 1 < 1 ? 1 : length - queries + i + 1;
        low[i] = high[i] > window ? high[i] - window : 0;
    }
    const float cap = up_to(2) ? 1 + up_to(9) : 0;
    attention_job job = {&c, 1, heads - 1, queries, many, query, low, high, cap, c.k, length};
    const int bf16 = many && dim % BLOCK == 0 && !cap && !strcmp(k->name, "avx512-amx");
    float *into = calloc(queries * stride, 4), *next = calloc(queries * stride, 4);
    int begin = low[0] / CHUNK;
    k->attend(&job, begin * CHUNK, into, stride);
    for (int chunk = begin + 1; chunk * CHUNK < high[queries - 1]; chunk++) {
        k->attend(&job, chunk * CHUNK, next, stride);
        for (int i = 0; i < queries; i++) k->merge(into + i * stride, next + i * stride, padded);
    }
    double *weight = malloc(length * sizeof(double));
    double tolerance = kind == EW_FLOAT32 ? 1e-5 : kind == EW_FLOAT16 ? 2e-3 : 3e-2;
    if (bf16) {                                      /* the reference starts from the same numbers */
        tolerance += kind == EW_FLOAT32 ? 3e-3 : 6e-3;       /* (a half is rounded again) */
        for (int i = 0; i < length * dim; i++) key[i] = bfloat(key[i], 0), value[i] = bfloat(value[i], 0);
        for (int i = 0; i < queries * dim; i++) q[i] = bfloat(q[i], 1);
    }
    for (int i = 0; i < queries; i++) {
        double most = -1e30, sum = 0;
        for (int s = low[i]; s < high[i]; s++) {
            weight[s] = 0;
            for (int d = 0; d < dim; d++) weight[s] += (double)query[i][d] * key[s * dim + d];
            if (cap) weight[s] = cap * tanh(weight[s] / cap);
            most = fmax(most, weight[s]);
        }
        for (int s = low[i]; s < high[i]; s++) sum += weight[s] = exp(weight[s] - most);
        for (int d = 0; d < dim; d++) {
            double expected = 0, got = into[i * stride + 2 + d] / into[i * stride + 1];
            for (int s = low[i]; s < high[i]; s++) expected += weight[s] / sum * value[s * dim + d];
            const char *what = bf16 ? "attention in bfloat16" : "attention";
            expect(fabs(got - expected) <= tolerance, k->name, what, kind, dim, length, got - expected);
        }
    }
    if (begin == (high[queries - 1] - 1) / CHUNK) {          /* one chunk: a query alone gets the same bits */
        job.queries = 1, job.query += queries - 1, job.low += queries - 1, job.high += queries - 1;
        k->attend(&job, begin * CHUNK, next, stride);
        expect(!memcmp(next, into + (queries - 1) * stride, stride * 4), k->name, "a query alone has the same bits",
               kind, dim, length, 0);
    }
    const float odd[] = {NAN, INFINITY, -3e38f};             /* nothing undefined comes of these (UBSan) */
    for (int i = 0; i < 3; i++) {
        key[up_to(dim)] = odd[i];
        k->append(&c, 1, heads - 1, 0, key, i % 2);
        k->attend(&job, 0, next, stride);
    }
    free(c.k), free(c.v), free(c.k_scale), free(c.v_scale), free(key), free(value), free(q), free(into), free(next);
    free(weight);
}

static void check_recurrence(const kernels *k) {
    const int keys = 1 + up_to(70), values = 1 + up_to(70), tokens = 1 + up_to(9), split = up_to(tokens);
    const int blocks = ceil_div(values, BLOCK), stride = keys + values, wide = blocks * keys * BLOCK;
    const int corrected = up_to(2), fresh = up_to(2);
    float *from = malloc(wide * 4), *to = malloc(wide * 4), *again = malloc(wide * 4), *x = malloc(tokens * stride * 4);
    float *q = malloc(tokens * stride * 4), *out = malloc(tokens * values * 4), *other = malloc(tokens * values * 4);
    float number[4][9];
    double *s = calloc(keys * values, sizeof(double)), *answer = malloc(values * sizeof(double));
    for (int i = 0; i < wide; i++) from[i] = unit(), to[i] = again[i] = NAN;
    for (int i = 0; i < tokens * stride; i++) x[i] = unit(), q[i] = unit();
    for (int n = 0; n < 4; n++) for (int i = 0; i < 9; i++) number[n][i] = 0.5f + 0.5f * unit();
    for (int i = 0; i < keys * values && !fresh; i++)
        s[i] = from[(i % values / BLOCK * keys + i / values) * BLOCK + i % values % BLOCK];
    recurrence_job job = {tokens, keys, values, corrected, x, q, x + keys, stride, number[0], number[1], number[2],
                          number[3], fresh ? NULL : from, to, out, values};
    k->recur(&job);
    for (int i = 0; i < tokens; i++) {
        const float *key = x + i * stride, *v = key + keys;
        for (int c = 0; c < values; c++) {
            answer[c] = 0;
            for (int r = 0; r < keys; r++) answer[c] += (s[r * values + c] *= number[0][i]) * key[r] * number[2][i];
            const double d = (v[c] - (corrected ? answer[c] : 0)) * number[1][i];
            double expected = 0;
            for (int r = 0; r < keys; r++)
                expected += (s[r * values + c] += key[r] * number[2][i] * d) * q[i * stride + r] * number[3][i];
            const double error = out[i * values + c] - expected, size = 1 + fabs(expected) * pow(4, i);
            expect(fabs(error) < 2e-5 * size, k->name, "recurrence", keys, values, i, error);
        }
    }
    job.tokens = split, job.to = again, job.out = other;     /* two calls, the second in place, give the same bits */
    if (split) k->recur(&job);
    for (int n = 0; n < 4; n++) memmove(number[n], number[n] + split, (tokens - split) * 4);
    job = (recurrence_job){tokens - split, keys, values, corrected, x + split * stride, q + split * stride,
                           x + keys + split * stride, stride, number[0], number[1], number[2], number[3],
                           split ? again : job.from, again, other + split * values, values};
    k->recur(&job);
    expect(!memcmp(out, other, tokens * values * 4), k->name, "recurrence in two calls", keys, values, tokens, 0);
    for (int i = 0; i < keys * values; i++) {
        const int at = (i % values / BLOCK * keys + i / values) * BLOCK + i % values % BLOCK;
        const int right = to[at] == again[at] && fabs(to[at] - s[i]) < 1e-3 * (1 + fabs(s[i]));
        expect(right, k->name, "state", keys, values, i, to[at] - s[i]);
    }
    free(from), free(to), free(again), free(x), free(q), free(out), free(other), free(s), free(answer);
}

static void check_vectors(const kernels *k) {
    int n = 16 * (1 + up_to(12)), odd = n - up_to(5), layer_norm = up_to(2), kind = up_to(4);
    float *x = malloc(n * 4), *w = malloc(n * 4), *b = malloc(n * 4), *y = malloc(n * 4);
    for (int i = 0; i < n; i++) x[i] = 6 * unit(), w[i] = unit(), b[i] = unit();
    k->normalize(x, w, layer_norm ? b : NULL, 1e-5f, layer_norm, y, odd);
    double mean = 0, square = 0;
    for (int i = 0; i < odd && layer_norm; i++) mean += x[i] / (double)odd;
    for (int i = 0; i < odd; i++) square += (x[i] - mean) * (x[i] - mean) / odd;
    for (int i = 0; i < odd; i++) {
        double expected = (x[i] - mean) / sqrt(square + 1e-5) * w[i] + (layer_norm ? b[i] : 0);
        expect(fabs(y[i] - expected) < 1e-5, k->name, "norm", odd, layer_norm, i, y[i] - expected);
    }
    int gated = up_to(2);
    k->activate(gated ? w : NULL, x, y, n, kind);
    for (int i = 0; i < n; i++) {
        double g = gated ? w[i] : x[i], up = gated ? x[i] : 1;
        double sigmoid = 1 / (1 + exp(-g));
        double act = kind == KERNEL_SIGMOID ? sigmoid : kind == EW_SILU ? g * sigmoid
                   : kind == EW_GELU ? 0.5 * g * (1 + erf(g / sqrt(2)))
                   : 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
        expect(fabs(y[i] - act * up) < 1e-5, k->name, "activation", kind, i, n, y[i] - act * up);
    }
    free(x), free(w), free(b), free(y);
}

int main(int count, char **argument) {
    static const char *names[] = {"avx512-amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod",
                                  "plain"};
    int rounds = count > 1 ? atoi(argument[1]) : 100, checked = 0;
    for (int i = 0; i < 7; i++) {
        const kernels *k = choose_kernels(names[i]);
        if (!k) continue;
        for (int r = 0; r < rounds; r++)
            check_product(k), check_floats(k), check_attention(k), check_recurrence(k), check_vectors(k);
        printf("%s: %d rounds\n", k->name, rounds), checked++;
    }
    printf("%d failures\n", failures);
    return failures > 0 || !checked;
}
