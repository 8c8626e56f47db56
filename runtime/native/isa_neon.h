/* NEON: 4 floats a vector. The including file defines CODE_BIAS and dot4. */
#include <arm_neon.h>
#define W 4
#include "kernels.h"

INLINE vf load_half(const uint16_t *p) { return (vf)vcvt_f32_f16(vld1_f16((const __fp16 *)p)); }
INLINE void store_half(uint16_t *p, vf x) { vst1_f16((__fp16 *)p, vcvt_f16_f32((float32x4_t)x)); }
INLINE vf maximum(vf a, vf b) { return pick(a > b, a, b); }
INLINE vf minimum(vf a, vf b) { return pick(a < b, a, b); }
INLINE vi load_bytes(const void *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
INLINE vi load_signed(const void *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}
INLINE vi load_table(const uint8_t table[16]) { return (vi)vld1q_u8(table); }
INLINE vi look_up(vi table, vi w) { return (vi)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)w); }
INLINE int8x16_t four_times(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
