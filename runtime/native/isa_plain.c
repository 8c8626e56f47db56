/* Plain C for any CPU: x86-64 without AVX2, ARM without dot products. */
#define TARGET
#define W 4
#define FEW_REGISTERS
#define CODE_BIAS(bits) 0
#include "kernels.h"

INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits) {
    for (int j = 0; j < 4; j++) acc += ((w >> 8 * j) & 255) * x[j];
    return acc;
}
INLINE vf maximum(vf a, vf b) { return pick(a > b, a, b); }
INLINE vf minimum(vf a, vf b) { return pick(a < b, a, b); }
INLINE vi load_bytes(const void *p) {
    vi v;
    for (int i = 0; i < W; i++) v[i] = ((const uint8_t *)p)[i];
    return v;
}
INLINE vi load_signed(const void *p) {
    vi v;
    for (int i = 0; i < W; i++) v[i] = ((const int8_t *)p)[i];
    return v;
}
INLINE vi load_table(const uint8_t table[16]) { return load_int(table); }
INLINE vi look_up(vi table, vi w) {
    uint8_t from[16], byte[16];
    memcpy(from, &table, 16), memcpy(byte, &w, 16);
    for (int i = 0; i < 16; i++) byte[i] = from[byte[i]];
    return load_int(byte);
}
INLINE vf load_half(const uint16_t *p) {             /* a product moves the exponent; infinities and NaN are mended */
    vi h = {0};
    for (int i = 0; i < W; i++) h[i] = p[i];
    const vf size = (vf)((h & 0x7fff) << 13) * 0x1p112f;
    const vi special = ((h & 0x7c00) == 0x7c00) & 0x7f800000, sign = (vi)((vu)(h & 0x8000) << 16);
    return (vf)((vi)size | special | sign);
}
INLINE void store_half(uint16_t *p, vf x) {          /* nearest even */
    for (int i = 0; i < W; i++) {
        uint32_t b, sign, h;
        float f = x[i], denormal_magic = 0.5f;
        memcpy(&b, &f, 4);
        sign = b >> 16 & 0x8000, b &= 0x7fffffff;
        if (b >= 0x47800000) h = b > 0x7f800000 ? 0x7e00 : 0x7c00;
        else if (b < 0x38800000) {
            memcpy(&f, &b, 4);
            f += denormal_magic;
            memcpy(&h, &f, 4);
            h -= 0x3f000000;
        } else h = (b + 0xc8000fff + (b >> 13 & 1)) >> 13;
        p[i] = (uint16_t)(h | sign);
    }
}

#include "attention.h"
#include "recurrence.h"
KERNELS(kernels_plain, "plain");
