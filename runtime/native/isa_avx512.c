/* AVX-512 with VNNI: 16 floats a vector, vpdpbusd for u8 x s8. */
#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define W 16
#define CODE_BIAS(bits) 0
#include "kernels.h"

INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const int8_t (*)[4])x));
    return acc;
}
INLINE vf load_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_half(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, 0)); }
INLINE vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vi load_bytes(const void *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE vi load_signed(const void *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE vi load_table(const uint8_t table[16]) {
    return (vi)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
}
INLINE vi look_up(vi table, vi w) { return (vi)_mm512_shuffle_epi8((__m512i)table, (__m512i)w); }

#include "attention.h"
#include "recurrence.h"
KERNELS(kernels_avx512, "avx512-vnni");

#ifdef HAVE_AMX
#undef TARGET
#define TARGET __attribute__((target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")))
#include "amx.h"
KERNELS_WITH(kernels_amx, "avx512-amx", multiply_many, quantize_many, attend_many);
#endif
#endif
