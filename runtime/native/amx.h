/* Products of many rows in AMX tile registers (Intel, 2023: eight registers of 16 rows x 64 bytes), compiled by
 * isa_avx512.c after kernels.h.
 *
 * Activations are rounded to bfloat16 once a product, in the order of a register: 16 rows x 32 inputs. Two tiles of a
 * matrix at a time are dequantized, rounded to bfloat16 and kept while all rows pass by: 32 rows x 32 outputs are
 * added up over all inputs in four registers, in float32 and block after block, whatever else the call contains.
 */
enum { LONGEST = 1024 };                             /* blocks of inputs whose two tiles fit a stack */
typedef uint32_t vu __attribute__((vector_size(64)));

static int are_many(int rows, int blocks) { return rows >= EW_MANY && blocks <= LONGEST; }

/* Rows first..last-1 of `rows`: block b of rows 16g..16g+15 is 1 kB at (g * blocks + b) kB of q. */
static void quantize_many(activations *x, int rows, int first, int last) {
    if (!are_many(rows, x->blocks)) { quantize(x, rows, first, last); return; }
    for (int r = first; r < last; r++)
        for (int b = 0; b < x->blocks; b++) {
            const float *f = x->f + ((size_t)r * x->blocks + b) * BLOCK;
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(f + 16), (__m512)load(f));
            memcpy(x->q + (((size_t)(r / TILE) * x->blocks + b) * TILE + r % TILE) * 64, &both, 64);
        }
}

/* A tile as bfloat16: block b is 1 kB at 2b kB of `out`, 16 pairs of inputs x 16 outputs. A code c becomes the float
 * 256 + c by its bits alone; less (256 + zero), times the scale, is one fused operation and exact. */
INLINE void dequantize(const matrix *m, const uint8_t *tile, const int bits, uint8_t *out) {
    const uint8_t *block = tile + m->codes_at;
    const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
    for (int g = 0, b = 0; g < m->groups; g++) {
        vf scale = load_half((const uint16_t *)tile + g * TILE);
        vf zero = m->asymmetric ? to_float(load_bytes(tile + m->zeros_at + g * TILE)) : splat(1 << (bits - 1));
        const vf less = (zero + 256.f) * -scale;
        for (int end = b + m->group_blocks < m->blocks ? b + m->group_blocks : m->blocks; b < end; b++, block += 64 * bits, out += 2048)
            EACH(j, 8) {
                const vu w = (vu)(bits == 4 ? load_int(block + 64 * (j >> 1)) : codes_of(block, bits, j));
                vu half[4];
                EACH(i, 4) {                         /* byte i of w (of 4 bits: its half) goes to bit 15 */
                    const int up = 15 - 8 * i - (bits == 4 ? 4 * (j & 1) : 0);
                    const vu code = (up > 0 ? w << (up & 15) : w >> (-up & 15)) & ((1 << bits) - 1) << 15;
                    half[i] = (vu)((vf)(code | 0x43800000) * scale + less) + 0x8000;
                }
                EACH(i, 2) {
                    __m512i pair = _mm512_mask_shuffle_epi8((__m512i)half[2 * i + 1], 0x3333333333333333, (__m512i)half[2 * i], upper);
                    memcpy(out + 64 * (2 * j + i), &pair, 64);
                }
            }
    }
}
#define DEQUANTIZE(bits) static void dequantize_##bits(const matrix *m, const uint8_t *tile, uint8_t *out) { dequantize(m, tile, bits, out); }
DEQUANTIZE(2) DEQUANTIZE(3) DEQUANTIZE(4) DEQUANTIZE(5) DEQUANTIZE(6) DEQUANTIZE(8)
static void (*const dequantize_by[9])(const matrix *, const uint8_t *, uint8_t *) = {
    [2] = dequantize_2, [3] = dequantize_3, [4] = dequantize_4, [5] = dequantize_5, [6] = dequantize_6, [8] = dequantize_8};

/* 32 rows (or 16) x 32 outputs (or 16). Registers 0..3: sums, 4: activations, 5: weights. Two registers stay unused: a core
 * renames the eight from few physical ones, fewer still while its other hyperthread works, and products then wait for loads. */
INLINE void add_up(const uint8_t *a, size_t next, const uint8_t *w, int blocks, const int more_rows, const int more_outputs, float *y, size_t y_stride) {
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

static void multiply_many(const matrix *m, const activations *x, int rows, float *y, size_t y_stride, int tile0, int tile1) {
    static const struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } whole =
        {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (!x->q || m->kind >= KIND_F16 || !are_many(rows, x->blocks)) { multiply(m, x, rows, y, y_stride, tile0, tile1); return; }
    _Alignas(64) uint8_t weights[m->blocks * 2048];
    const size_t next = (size_t)m->blocks * 1024;    /* from 16 rows to the next 16 */
    _tile_loadconfig(&whole);
    for (int t = tile0; t < tile1; t += 2) {
        const int two = t + 1 < tile1, last = (t + 1 + two) * TILE, columns = (last < m->rows ? last : m->rows) - t * TILE;
        for (int i = 0; i <= two; i++) dequantize_by[m->kind](m, m->data + (t + i) * m->tile_bytes, weights + 1024 * i);
        __asm__ volatile("" ::: "memory");           /* GCC's tile loads do not say that they read memory */
        for (int r = 0; r < rows; r += 2 * TILE) {
            const uint8_t *a = (const uint8_t *)x->q + r / TILE * next;
            const int left = rows - r < 2 * TILE ? rows - r : 2 * TILE, inside = left % TILE == 0 && columns % TILE == 0;
            float edge[2 * TILE][2 * TILE], *out = y + r * y_stride + t * TILE, *to = inside ? out : edge[0];
            const size_t stride = inside ? y_stride : 2 * TILE;
            if (left > TILE && two) add_up(a, next, weights, m->blocks, 1, 1, to, stride);
            else add_up(a, next, weights, m->blocks, left > TILE, two, to, stride);
            if (!inside) for (int i = 0; i < left; i++) memcpy(out + i * y_stride, edge[i], columns * sizeof(float));
            if (m->bias) for (int i = 0; i < left; i++) for (int c = 0; c < columns; c++) out[i * y_stride + c] += m->bias[t * TILE + c];
        }
    }
    _tile_release();
}
