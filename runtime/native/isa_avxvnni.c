/* AVX2 with AVX-VNNI (client CPUs without AVX-512): vpdpbusd on 256 bits. */
#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,avxvnni,fma,f16c")))
#define CODE_BIAS(bits) 0
static inline __attribute__((always_inline)) TARGET __m256i dot4_256(__m256i acc, __m256i w, __m256i x, int bits) {
    return _mm256_dpbusd_avx_epi32(acc, w, x);
}
#include "isa_avx2.h"
KERNELS(kernels_avxvnni, "avx-vnni");
#endif
