/* AVX2 without VNNI. vpmaddubsw adds pairs of u8 x s8 in 16 bits and saturates: codes of up to 7 bits cannot reach the
 * limit (2 * 127 * 127 = 32258); 8-bit ones are taken as signed, with the sign moved to the activation (2 * 128 * 127 =
 * 32512). */
#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define CODE_BIAS(bits) ((bits) == 8 ? 128 : 0)
static inline __attribute__((always_inline)) TARGET __m256i dot4_256(__m256i acc, __m256i w, __m256i x, int bits) {
    if (bits == 8) {
        w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        x = _mm256_sign_epi8(x, w);
        w = _mm256_abs_epi8(w);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#include "isa_avx2.h"
KERNELS(kernels_avx2, "avx2");
#endif
