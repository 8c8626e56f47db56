/* AVX2: 8 floats a vector. The including file defines dot4_256 (VNNI or pairs). */
#include <immintrin.h>
#define W 8
#include "kernels.h"

INLINE vi dot4(vi acc, vi w, const int8_t *x, int bits) {
    int32_t four;
    memcpy(&four, x, 4);
    return (vi)dot4_256((__m256i)acc, (__m256i)w, _mm256_set1_epi32(four), bits);
}
INLINE vf load_half(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_half(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, 0)); }
INLINE vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vi load_bytes(const void *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE vi load_signed(const void *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
INLINE vi load_table(const uint8_t table[16]) {
    return (vi)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}
INLINE vi look_up(vi table, vi w) { return (vi)_mm256_shuffle_epi8((__m256i)table, (__m256i)w); }

#include "attention.h"
#include "recurrence.h"
