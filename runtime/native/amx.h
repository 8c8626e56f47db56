/* Products of many rows in AMX tile registers (Intel, 2023: eight registers of 16 rows x 64 bytes), compiled by
 * isa_avx512.c after kernels.h.
 *
 * Activations are rounded to bfloat16 once a product, in the order of a register: 16 rows x 32 inputs. Two tiles of a
 * matrix at a time are dequantized, rounded to bfloat16 and kept while all rows pass by: 32 rows x 32 outputs are
 * added up over all inputs in four registers, in float32 and block after block, whatever else the call contains. From
 * EW_MANY rows on this is faster than AVX-512 VNNI. Attention of such passes takes keys and values the same way.
 */
enum { LONGEST = 1024 };                             /* blocks of inputs whose two tiles fit a stack */

FUNCTION int are_many(int rows, int blocks) { return rows >= EW_MANY && blocks <= LONGEST; }

/* A row of a register of activations: 32 inputs, rounded to nearest even. */
INLINE void put_inputs(uint8_t *out, vf first, vf second) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    memcpy(out, &both, 64);
}

/* quantize() where `rows` are many: block b of rows 16g..16g+15 is 1 kB at (g * blocks + b) kB of q. */
FUNCTION void quantize_many(activations *x, int rows, int first, int last) {
    if (!are_many(rows, x->blocks)) { quantize(x, rows, first, last); return; }
    for (int r = first; r < last; r++)
        for (int b = 0; b < x->blocks; b++) {
            const float *f = x->f + ((size_t)r * x->blocks + b) * BLOCK;
            const size_t at = ((size_t)(r / TILE) * x->blocks + b) * TILE + r % TILE;
            put_inputs((uint8_t *)x->q + at * 64, load(f), load(f + TILE));
        }
}

/* A row of a register of weights: two inputs of 16 outputs side by side, rounded to nearest (ties away from zero). */
INLINE void put_pair(uint8_t *out, vf even, vf odd) {
    const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
    const __m512i rounded_even = (__m512i)((vu)even + 0x8000), rounded_odd = (__m512i)((vu)odd + 0x8000);
    __m512i pair = _mm512_mask_shuffle_epi8(rounded_odd, 0x3333333333333333, rounded_even, upper);
    memcpy(out, &pair, 64);
}

/* A tile as bfloat16: block b is 1 kB at 2b kB of `out`, 16 pairs of inputs x 16 outputs. A code c becomes the float
 * 256 + c by its bits alone; less (256 + zero), times the scale, is one fused operation and exact. */
INLINE void dequantize(const matrix *m, const uint8_t *tile, const int bits, const int levels, uint8_t *out) {
    const uint8_t *block = tile + m->codes_at, *scales = tile + m->scales_at;
    const int byte_bits = levels ? 8 : bits, halves = bits == 4 && !levels;   /* halves: of stored bytes */
    const vi table = levels ? load_table(m->level) : splat_int(0);
    const vf of_rows = m->narrow ? load_half((const uint16_t *)tile) : splat(1);
    for (int g = 0, b = 0; g < m->groups; g++) {
        const vf scale = m->narrow ? to_float(load_signed(scales + g * TILE)) * of_rows
                                   : load_half((const uint16_t *)scales + g * TILE);
        vf zero = m->asymmetric ? to_float(load_bytes(tile + m->zeros_at + g * TILE)) : splat(1 << (byte_bits - 1));
        const vf less = (zero + 256.f) * -scale;
        const int end = b + m->group_blocks < m->blocks ? b + m->group_blocks : m->blocks;
        for (; b < end; b++, block += 64 * bits, out += 2048)
            EACH(j, 8) {
                const vu w = (vu)(halves ? load_int(block + 64 * (j >> 1)) : bytes_of(block, bits, levels, j, table));
                vf x[4];
                EACH(i, 4) {                         /* byte i of w, or its half, goes to bit 15 */
                    const int up = 15 - 8 * i - (halves ? 4 * (j & 1) : 0);
                    const vu code = (up > 0 ? w << (up & 15) : w >> (-up & 15)) & ((1 << byte_bits) - 1) << 15;
                    x[i] = (vf)(code | 0x43800000) * scale + less;
                }
                put_pair(out + 128 * j, x[0], x[1]);
                put_pair(out + 128 * j + 64, x[2], x[3]);
            }
    }
}
#define DEQUANTIZE(kind) FUNCTION void dequantize_##kind(const matrix *m, const uint8_t *tile, uint8_t *out) { \
    dequantize(m, tile, kind % LEVELS, kind > LEVELS, out); }
DEQUANTIZE(2) DEQUANTIZE(3) DEQUANTIZE(4) DEQUANTIZE(5) DEQUANTIZE(6) DEQUANTIZE(8)
DEQUANTIZE(12) DEQUANTIZE(13) DEQUANTIZE(14)
static void (*const dequantize_by[LEVELS + 5])(const matrix *, const uint8_t *tile, uint8_t *out) = {
    [2] = dequantize_2, [3] = dequantize_3, [4] = dequantize_4, [5] = dequantize_5, [6] = dequantize_6,
    [8] = dequantize_8, [12] = dequantize_12, [13] = dequantize_13, [14] = dequantize_14};

/* y [32 rows (or 16)][32 outputs (or 16)] = activations (16 rows at a [blocks][16][64], 16 more `next` bytes on) times
 * weights (w [blocks][2][16][64]). Registers 0..3: sums, 4: activations, 5: weights. Two stay unused on purpose:
 * measured on a core whose other hyperthread is busy, a product takes 35 ns with eight in use, 22 with six (alone: 10.5
 * and 11). */
INLINE void add_up(const uint8_t *a, size_t next, const uint8_t *w, int blocks, const int more_rows,
                   const int more_outputs, float *y, size_t y_stride) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int b = 0; b < blocks; b++, a += 1024, w += 2048) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, w, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (more_rows && !more_outputs) { _tile_loadd(4, a + next, 64); _tile_dpbf16ps(2, 4, 5); }
        if (!more_outputs) continue;
        _tile_loadd(5, w + 1024, 64);
        _tile_dpbf16ps(1, 4, 5);
        if (!more_rows) continue;
        _tile_loadd(4, a + next, 64);
        _tile_dpbf16ps(3, 4, 5);
        _tile_loadd(5, w, 64);
        _tile_dpbf16ps(2, 4, 5);
    }
    _tile_stored(0, y, 4 * y_stride);
    if (more_outputs) _tile_stored(1, y + TILE, 4 * y_stride);
    if (more_rows) _tile_stored(2, y + TILE * y_stride, 4 * y_stride);
    if (more_rows && more_outputs) _tile_stored(3, y + TILE * y_stride + TILE, 4 * y_stride);
}

static const struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } whole_registers = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#define WRITTEN() __asm__ volatile("" ::: "memory")   /* GCC's tile loads do not say that they read memory */

/* multiply() where `rows` are many. */
FUNCTION void multiply_many(const matrix *m, const activations *x, int rows, float *y, size_t y_stride, int tile0,
                            int tile1) {
    if (!x->q || m->kind >= KIND_F16 || !are_many(rows, x->blocks)) {
        multiply(m, x, rows, y, y_stride, tile0, tile1);
        return;
    }
    _Alignas(64) uint8_t weights[m->blocks * 2048];  /* bfloat16 [blocks][2 tiles][16 pairs of inputs][16 outputs][2] */
    const size_t next = (size_t)m->blocks * 1024;    /* from 16 rows to the next 16 */
    _tile_loadconfig(&whole_registers);
    for (int t = tile0; t < tile1; t += 2) {
        const int two = t + 1 < tile1, last = (t + 1 + two) * TILE;
        const int columns = (last < m->rows ? last : m->rows) - t * TILE;
        for (int i = 0; i <= two; i++)
            dequantize_by[m->kind + (m->levels ? LEVELS : 0)](m, m->data + (t + i) * m->tile_bytes, weights + 1024 * i);
        WRITTEN();
        for (int r = 0; r < rows; r += 2 * TILE) {
            const uint8_t *a = (const uint8_t *)x->q + r / TILE * next;
            const int left = rows - r < 2 * TILE ? rows - r : 2 * TILE;
            const int inside = left % TILE == 0 && columns % TILE == 0;
            float edge[2 * TILE][2 * TILE], *out = y + r * y_stride + t * TILE, *to = inside ? out : edge[0];
            const size_t stride = inside ? y_stride : 2 * TILE;
            if (left > TILE && two) add_up(a, next, weights, m->blocks, 1, 1, to, stride);
            else add_up(a, next, weights, m->blocks, left > TILE, two, to, stride);
            if (!inside) for (int i = 0; i < left; i++) memcpy(out + i * y_stride, edge[i], columns * sizeof(float));
            add_bias(m, t, left, columns, out, y_stride);
        }
    }
    _tile_release();
}

/* attend() for the queries of a pass of EW_MANY tokens and more. The chunk's keys and values become panels like those
 * of weights: pairs of dimensions x slots, and pairs of slots x dimensions. 32 queries at a time meet them. */
INLINE void attend_queries(const attention_job *job, int start, float *state, size_t stride, const int kind) {
    const cache_layer *c = job->cache;
    const int dim = c->dim, across = dim / BLOCK;
    const size_t head = ((size_t)job->row * c->kv_heads + job->head) * c->capacity, element = element_bytes(kind);
    const uint8_t *k = c->k + (head + start) * dim * element;        /* [CHUNK / 16][dim][16] */
    const uint8_t *v = c->v + (head + start) * dim * element;        /* [CHUNK][dim] */
    const float *k_scale = c->k_scale + head + start, *v_scale = c->v_scale + head + start;  /* int8: [CHUNK] */
    _Alignas(64) uint8_t keys[CHUNK * dim * 2];      /* bfloat16 [CHUNK / 32][across][2 x 16 slots][16 pairs][16][2] */
    _Alignas(64) uint8_t values[CHUNK * dim * 2];    /* bfloat16 [across][CHUNK / 32][2 x 16 dims][16 pairs][16][2] */
    _Alignas(64) uint8_t query[2 * TILE * dim * 2], weight[2 * TILE * CHUNK * 2];    /* as quantize_many has them */
    _Alignas(64) float score[2 * TILE][CHUNK], sum[2 * TILE][dim];
    int low = CHUNK, high = 0, done = 0;
    for (int i = 0; i < job->queries; i++) {
        low = job->low[i] - start < low ? job->low[i] - start : low;
        high = job->high[i] - start > high ? job->high[i] - start : high;
    }
    low = low > 0 ? low / BLOCK : 0;                 /* from here in blocks of slots */
    high = high < CHUNK ? ceil_div(high, BLOCK) : CHUNK / BLOCK;
    for (int b = low; b < high; b++)
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < TILE * across; i++) {    /* i-th pair of dimensions; i-th pair of slots, 16 dims */
                const int at_block = i / TILE, pair = i % TILE * 64;
                const size_t at = ((size_t)(2 * b + h) * dim + 2 * i) * TILE;
                const size_t slot = BLOCK * b + 2 * (i % TILE), d = at_block * BLOCK + h * TILE;
                put_pair(keys + ((b * across + at_block) * 2 + h) * 1024 + pair,
                         load_cached(k, at, kind), load_cached(k, at + TILE, kind));
                put_pair(values + ((at_block * (CHUNK / BLOCK) + b) * 2 + h) * 1024 + pair,
                         load_cached(v, slot * dim + d, kind), load_cached(v, (slot + 1) * dim + d, kind));
            }
    _tile_loadconfig(&whole_registers);
    for (int n; done < job->queries; done += n, state += n * stride) {
        n = job->queries - done < 2 * TILE ? job->queries - done : 2 * TILE;
        for (int i = 0; i < n; i++)
            for (int b = 0; b < across; b++) {
                const float *q = job->query[done + i] + b * BLOCK;
                put_inputs(query + ((i / TILE * across + b) * TILE + i % TILE) * 64, load(q), load(q + TILE));
            }
        WRITTEN();
        for (int b = low; b < high; b++)
            add_up(query, across * 1024, keys + b * across * 2048, across, 1, 1, score[0] + b * BLOCK, CHUNK);
        for (int i = 0; i < n; i++) {
            const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            vf most = splat(NO_SCORE), all = splat(0);
            for (int s = low * BLOCK; s < high * BLOCK; s += TILE) {
                vf x = load(score[i] + s);
                vi at = lanes + (start + s);
                if (kind == EW_INT8) x *= load(k_scale + s);
                x = pick((at >= job->low[done + i]) & (at < job->high[done + i]), x, splat(NO_SCORE));
                store(score[i] + s, x);
                most = maximum(most, x);
            }
            const float top = _mm512_reduce_max_ps((__m512)most);
            for (int b = low; b < high; b++) {
                vf e[2];
                EACH(h, 2) {
                    vf x = load(score[i] + b * BLOCK + h * TILE);
                    e[h] = pick(x > splat(NO_SCORE), exponential(x - top), splat(0));
                    all += e[h];
                    if (kind == EW_INT8) e[h] *= load(v_scale + b * BLOCK + h * TILE);
                }
                put_inputs(weight + ((i / TILE * (CHUNK / BLOCK) + b) * TILE + i % TILE) * 64, e[0], e[1]);
            }
            state[i * stride] = top, state[i * stride + 1] = _mm512_reduce_add_ps((__m512)all);
        }
        WRITTEN();
        for (int b = 0; b < across; b++)
            add_up(weight + low * 1024, CHUNK / BLOCK * 1024, values + (b * (CHUNK / BLOCK) + low) * 2048, high - low,
                   1, 1, sum[0] + b * BLOCK, dim);
        for (int i = 0; i < n; i++) memcpy(state + i * stride + 2, sum[i], dim * sizeof(float));
    }
    _tile_release();
}

FUNCTION void attend_many(const attention_job *job, int start, float *state, size_t stride) {
    const int dim = job->cache->dim, kind = job->cache->kind;
    if (!job->many || dim % BLOCK || dim > 256 || job->softcap) attend(job, start, state, stride);
    else if (kind == EW_FLOAT32) attend_queries(job, start, state, stride, EW_FLOAT32);
    else if (kind == EW_FLOAT16) attend_queries(job, start, state, stride, EW_FLOAT16);
    else attend_queries(job, start, state, stride, EW_INT8);
}
