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
INLINE vi load_bytes(const void *p) {
    vi v;
    for (int i = 0; i < W; i++) v[i] = ((const uint8_t *)p)[i];
    return v;
}
INLINE vf load_half(const uint16_t *p) {             /* Giesen's: shift the exponent, mend subnormals and infinities */
    vi h = {0}, magic = splat_int(113 << 23);
    for (int i = 0; i < W; i++) h[i] = p[i];
    vi bits = (h & 0x7fff) << 13, exponent = bits & (0x7c00 << 13);
    bits += (127 - 15) << 23;
    bits += (exponent == (0x7c00 << 13)) & ((128 - 16) << 23);
    vi subnormal = (vi)((vf)((vu)bits + (1 << 23)) - (vf)magic);
    return (vf)(((exponent == 0) & subnormal) | (~(exponent == 0) & bits) | (vi)((vu)(h & 0x8000) << 16));
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
KERNELS(kernels_plain, "plain");
