/* ARMv8.6's int8 extension: usdot multiplies unsigned codes by signed activations. */
#if defined(__aarch64__)
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+fp16+i8mm")))
#define CODE_BIAS(bits) 0
#include "isa_neon.h"
INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits) {
    return (vi)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, four_times(x));
}
#include "attention.h"
#include "recurrence.h"
KERNELS(kernels_neon_i8mm, "neon-i8mm");
#endif
