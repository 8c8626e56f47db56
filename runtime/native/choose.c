/* The kernels this CPU can run, best first. */
#include "core.h"

#if defined(__x86_64__)
extern const kernels kernels_avx512, kernels_avxvnni, kernels_avx2;
#include <cpuid.h>
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(__aarch64__)
#include <sys/auxv.h>
extern const kernels kernels_neon_dot, kernels_neon_i8mm;
#endif
extern const kernels kernels_plain;

const kernels *choose_kernels(const char *name) {
    const kernels *list[5];
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) list[n++] = &kernels_avx512;
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && has_avxvnni()) list[n++] = &kernels_avxvnni;
    if (avx2) list[n++] = &kernels_avx2;
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & 1 << 20) {                     /* HWCAP_ASIMDDP */
        if (getauxval(AT_HWCAP2) & 1 << 13) list[n++] = &kernels_neon_i8mm;      /* HWCAP2_I8MM */
        list[n++] = &kernels_neon_dot;
    }
#endif
    list[n++] = &kernels_plain;
    for (int i = 0; i < n; i++) if (!name || !*name || !strcmp(name, list[i]->name)) return list[i];
    return NULL;
}
