/* Repacking a matrix from a weights file into tiles of 16 output rows.
 *
 * A block is 16 rows x 32 inputs of unsigned codes in `bits` lines of 64 bytes. Step j of a block is inputs 4j..4j+3 of
 * every row; byte 4r + i of a step is row r, input 4j + i, the order in which dot-product instructions take them. A
 * width is a sum of planes, lowest bits first: 4 bits (four lines: steps 2u and 2u+1 in the low and high half of a
 * byte of line u), 2 bits (two lines: steps 4u..4u+3), 1 bit (one line: eight steps); 8 bits are eight plain lines.
 * Rows and inputs beyond the matrix have scale 0 and code 0.
 */
#include "core.h"
#include <math.h>

int dtype_bits(int dtype) {
    static const int bits[] = {32, 16, 16, 8, 8, 4, 4, 2, 3, 5, 6};
    return dtype >= 0 && dtype <= EW_UINT6 ? bits[dtype] : 0;
}

float float_at(const void *floats, int kind, size_t index) {
    if (kind == KIND_F32) return ((const float *)floats)[index];
    const uint16_t half = ((const uint16_t *)floats)[index];
    if (kind == KIND_BF16) {
        float value;
        memcpy(&value, &(uint32_t){(uint32_t)half << 16}, 4);
        return value;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return half & 0x8000 ? -value : value;
}

size_t matrix_shape(matrix *m, int rows, int inputs, int kind, int group, int asymmetric, int narrow) {
    memset(m, 0, sizeof *m);
    m->rows = rows, m->inputs = inputs, m->kind = kind, m->asymmetric = asymmetric, m->narrow = narrow;
    m->tiles = ceil_div(rows, TILE), m->blocks = ceil_div(inputs, BLOCK);
    if (kind >= KIND_F16) m->tile_bytes = (size_t)inputs * TILE * (kind == KIND_F32 ? 4 : 2);
    else {
        m->groups = group ? inputs / group : 1;
        m->group_blocks = group ? group / BLOCK : m->blocks;
        m->scales_at = narrow ? TILE * 2 : 0;
        m->zeros_at = align64(m->scales_at + (size_t)m->groups * TILE * (narrow ? 1 : 2));
        m->codes_at = m->zeros_at + (asymmetric ? align64((size_t)m->groups * TILE) : 0);
        m->tile_bytes = m->codes_at + (size_t)m->blocks * 64 * kind;
    }
    m->tile_bytes = align64(m->tile_bytes);
    return m->tile_bytes * m->tiles;
}

void matrix_levels(matrix *m, const int8_t *levels) {
    m->levels = 1;
    for (int c = 0; c < 1 << m->kind; c++) m->level[c] = (uint8_t)(levels[c] + 128);
}

/* Element `index` of a flat nibble or byte tensor; signed types are shifted up by half their range. */
static inline int element(const uint8_t *p, int dtype, size_t index) {
    if (dtype == EW_INT8 || dtype == EW_UINT8) return dtype == EW_INT8 ? p[index] ^ 128 : p[index];
    return (index & 1 ? p[index / 2] >> 4 : p[index / 2] & 15) ^ 8;
}

/* Inputs k0..k0+31 of the rows of tile t, as unsigned codes. */
static void gather(const matrix *m, const source *s, int t, int k0, uint8_t codes[TILE][BLOCK]) {
    const int rows = tile_rows(m, t), n0 = s->row0 + t * TILE, inputs = m->inputs - k0 < BLOCK ? m->inputs - k0 : BLOCK;
    const int bits = m->kind, flip = s->dtype == EW_INT4 ? 8 : s->dtype == EW_INT8 ? 128 : 0;
    if (rows < TILE || inputs < BLOCK) memset(codes, 0, TILE * BLOCK);
    if (s->by_input) {
        for (int k = 0; k < inputs; k++)
            for (int r = 0; r < rows; r++)
                codes[r][k] = element(s->codes, s->dtype, (size_t)(k0 + k) * s->stride + n0 + r);
        return;
    }
    /* Little-endian bit streams: of a row, or (signed codes) of the whole tensor. */
    const size_t row_bits = is_stream(s->dtype) ? ((size_t)m->inputs * bits + 7) / 8 * 8 : (size_t)m->inputs * bits;
    for (int r = 0; r < rows; r++) {
        const size_t from = (n0 + r) * row_bits + (size_t)k0 * bits;
        const uint8_t *bytes = s->codes + from / 8;
        if (bits == 8) {
            for (int k = 0; k < inputs; k++) codes[r][k] = bytes[k] ^ flip;
            continue;
        }
        uint8_t window[BLOCK + 4] = {0};
        const int first = from % 8;
        memcpy(window, bytes, (first + inputs * bits + 7) / 8);
        for (int k = 0, at = first; k < inputs; k++, at += bits)
            codes[r][k] = (((window[at / 8] | window[at / 8 + 1] << 8) >> at % 8) & ((1 << bits) - 1)) ^ flip;
    }
}

/* A block in its lines, plane after plane, to out [bits][64]. */
static void pack_block(const uint8_t codes[TILE][BLOCK], int bits, uint8_t *out) {
    for (int r = 0; r < TILE; r++) {
        uint32_t step[8], *line = (uint32_t *)out + r;       /* four inputs each; the next line is line + 16 */
        memcpy(step, codes[r], BLOCK);
#pragma GCC unroll 4
        for (int p = 3; p >= 0; p--) {
            const int plane = 1 << p, steps = 8 >> p;
            uint32_t words[8] = {0};
            if (!(bits & plane)) continue;
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                words[j / steps] |= (step[j] & ((1u << plane) - 1) * 0x01010101) << plane * (j % steps);
                step[j] >>= plane;
            }
            for (int i = 0; i < plane; i++, line += 16) *line = words[i];
        }
    }
}

/* Byte i of w[j] and byte j of w[i] change places. */
static void transpose(uint64_t w[8]) {
    static const uint64_t mask[] = {0x00000000ffffffff, 0x0000ffff0000ffff, 0x00ff00ff00ff00ff};
    for (int s = 0, apart = 4; apart; s++, apart /= 2)
        for (int i = 0; i < 8; i++) {
            if (i & apart) continue;
            uint64_t change = (w[i] >> 8 * apart ^ w[i + apart]) & mask[s];
            w[i] ^= change << 8 * apart, w[i + apart] ^= change;
        }
}

/* The usual int4, by inputs with two rows a byte, goes straight into its lines: 8 inputs of 16 rows are 8 words. */
static void pack_nibbles(const uint8_t *from, size_t stride, uint8_t *out) {
    const uint64_t low = 0x0f0f0f0f0f0f0f0f, flip = 0x8888888888888888;
    for (int u = 0; u < 4; u++) {
        uint64_t w[8];
        uint32_t *line = (uint32_t *)(out + 64 * u);
        for (int i = 0; i < 8; i++, from += stride) memcpy(w + i, from, 8);
        transpose(w);
        for (int i = 0; i < 8; i++) {
            uint64_t even = (w[i] ^ flip) & low, odd = (w[i] ^ flip) >> 4 & low;
            line[2 * i] = (uint32_t)even | (uint32_t)(even >> 32) << 4;
            line[2 * i + 1] = (uint32_t)odd | (uint32_t)(odd >> 32) << 4;
        }
    }
}

/* Tile t of floats: element [inputs][16]. */
static void pack_floats(matrix *m, const source *s, int t) {
    uint8_t *tile = m->data + t * m->tile_bytes;
    const int rows = tile_rows(m, t);
    memset(tile, 0, m->tile_bytes);
    for (int k = 0; k < m->inputs; k++)
        for (int r = 0; r < rows; r++) {
            const size_t n = s->row0 + t * TILE + r, from = s->by_input ? (size_t)k * s->stride + n : n * m->inputs + k;
            const size_t to = (size_t)k * TILE + r;
            if (m->kind == KIND_F32) ((uint32_t *)tile)[to] = ((const uint32_t *)s->codes)[from];
            else ((uint16_t *)tile)[to] = ((const uint16_t *)s->codes)[from];
        }
}

/* Tile t of codes, with its scales and zeros. */
static void pack_codes(matrix *m, const source *s, int t) {
    uint8_t *tile = m->data + t * m->tile_bytes, *lines = tile + m->codes_at, codes[TILE][BLOCK];
    const int rows = tile_rows(m, t), n0 = s->row0 + t * TILE, zeros_type = is_stream(s->dtype) ? EW_UINT8 : s->dtype;
    memset(tile, 0, m->codes_at);
    for (int g = 0; g < m->groups; g++)
        for (int r = 0; r < rows; r++) {
            const size_t from = s->by_input ? (size_t)g * s->stride + n0 + r : (size_t)(n0 + r) * m->groups + g;
            if (m->narrow) tile[m->scales_at + g * TILE + r] = ((const uint8_t *)s->scales)[from];
            else ((uint16_t *)tile)[g * TILE + r] = ((const uint16_t *)s->scales)[from];
            if (m->asymmetric) tile[m->zeros_at + g * TILE + r] = element(s->zeros, zeros_type, from);
        }
    for (int r = 0; m->narrow && r < rows; r++) ((uint16_t *)tile)[r] = s->row_scales[n0 + r];
    const int nibbles = s->by_input && m->kind == 4 && rows == TILE && s->stride % 2 == 0 && n0 % 2 == 0;
    for (int b = 0; b < m->blocks; b++, lines += 64 * m->kind)
        if (nibbles && (b + 1) * BLOCK <= m->inputs)
            pack_nibbles(s->codes + ((size_t)b * BLOCK * s->stride + n0) / 2, s->stride / 2, lines);
        else {
            gather(m, s, t, b * BLOCK, codes);
            pack_block((const uint8_t (*)[BLOCK])codes, m->kind, lines);
        }
}

/* What a code stands for, before its scale. */
static inline int value_of(const matrix *m, int code, int zero) {
    return m->levels ? m->level[code] - 128 : code - zero;
}

void source_read(const matrix *m, const source *s, int row, int first, int n, float *out) {
    const int bits = m->kind, stream = is_stream(s->dtype), zeros_type = stream ? EW_UINT8 : s->dtype;
    const size_t begin = (size_t)row * (stream ? ((size_t)m->inputs * bits + 7) / 8 : (size_t)m->inputs);
    for (int k = first; k < first + n; k++) {
        if (bits >= KIND_F16) { *out++ = float_at(s->codes, bits, begin + k); continue; }
        const size_t g = (size_t)row * m->groups + k / (m->group_blocks * BLOCK);
        const int zero = m->asymmetric ? element(s->zeros, zeros_type, g) : 1 << (bits - 1);
        int code = 0;
        if (!stream) code = element(s->codes, s->dtype, begin + k);
        else for (int b = 0; b < bits; b++) {
            const size_t at = (size_t)k * bits + b;
            code |= (s->codes[begin + at / 8] >> at % 8 & 1) << b;
        }
        const float scale = m->narrow ? ((const int8_t *)s->scales)[g] * float_at(s->row_scales, KIND_F16, row)
                                      : float_at(s->scales, KIND_F16, g);
        *out++ = value_of(m, code, zero) * scale;
    }
}

void matrix_pack(matrix *m, const source *s, int t) {
    if (m->kind >= KIND_F16) pack_floats(m, s, t);
    else pack_codes(m, s, t);
}

int matrix_sound(const matrix *m, int t) {
    const int n = TILE * (m->kind >= KIND_F16 ? m->inputs : m->narrow ? 1 : m->groups), rows = tile_rows(m, t);
    const uint16_t *half = (const uint16_t *)(m->data + t * m->tile_bytes);
    const uint16_t top = m->kind == KIND_BF16 ? 0x7f80 : 0x7c00;
    const uint32_t *single = (const uint32_t *)half;
    int bad = 0;
    if (m->kind == KIND_F32) for (int i = 0; i < n; i++) bad |= (single[i] & 0x7f800000) == 0x7f800000;
    else for (int i = 0; i < n; i++) bad |= (half[i] & top) == top;
    if (!m->narrow) return !bad;
    const int8_t *scale = (const int8_t *)half + m->scales_at;
    for (int r = 0; r < rows; r++) bad |= half[r] == 0 || half[r] >= 0x8000;
    for (int g = 0; g < m->groups; g++, scale += TILE)
        for (int r = 0; r < rows; r++) bad |= scale[r] == 0 || scale[r] == -128;
    return !bad;
}

/* The code of a row (0..15) and input (0..31) of a block. */
static int code_at(const uint8_t *block, int bits, int row, int input) {
    int code = 0, shift = 0;
    for (int plane = 8; plane; plane /= 2) {
        if (!(bits & plane)) continue;
        const int steps = 8 / plane, byte = block[64 * (input / 4 / steps) + row * 4 + input % 4];
        code |= (byte >> plane * (input / 4 % steps) & ((1 << plane) - 1)) << shift;
        block += 64 * plane, shift += plane;
    }
    return code;
}

void matrix_read_row(const matrix *m, int row, float *out) {
    const uint8_t *tile = m->data + row / TILE * m->tile_bytes;
    int r = row % TILE;
    if (m->kind >= KIND_F16) {
        for (int k = 0; k < m->inputs; k++) out[k] = float_at(tile, m->kind, (size_t)k * TILE + r);
        return;
    }
    for (int b = 0; b < m->blocks; b++) {
        const uint8_t *block = tile + m->codes_at + (size_t)b * 64 * m->kind;
        int g = b / m->group_blocks, zero = m->asymmetric ? tile[m->zeros_at + g * TILE + r] : 1 << (m->kind - 1);
        float scale = float_at(tile, KIND_F16, m->narrow ? r : g * TILE + r);
        if (m->narrow) scale *= ((const int8_t *)tile)[m->scales_at + g * TILE + r];
        for (int k = b * BLOCK; k < m->inputs && k < (b + 1) * BLOCK; k++)
            out[k] = value_of(m, code_at(block, m->kind, r, k % BLOCK), zero) * scale;
    }
}
