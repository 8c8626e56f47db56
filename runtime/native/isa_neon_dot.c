/* ARMv8.2 with dot products: sdot is signed, so 8-bit codes are taken less 128. */
#if defined(__aarch64__)
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+fp16")))
#define CODE_BIAS(bits) ((bits) == 8 ? 128 : 0)
#include "isa_neon.h"
INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits) {
    if (bits == 8) w ^= splat_int((int32_t)0x80808080);
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, four_times(x));
}
#include "attention.h"
#include "recurrence.h"
KERNELS(kernels_neon_dot, "neon-dotprod");
#endif
