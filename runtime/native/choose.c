/* The kernels this CPU can run, best first. */
#define _GNU_SOURCE
#include "core.h"

#if defined(__x86_64__)
extern const kernels kernels_avx512, kernels_avxvnni, kernels_avx2;
#include <cpuid.h>
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#ifdef HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
extern const kernels kernels_amx;
/* Linux gives the tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
static int has_amx(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) && __get_cpuid_count(7, 0, &a, &b, &c, &d)
        && (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;     /* bits: AVX512-BF16, AMX-BF16, AMX-TILE */
}
#endif
#elif defined(__aarch64__)
#include <sys/auxv.h>
extern const kernels kernels_neon_dot, kernels_neon_i8mm;
#endif
extern const kernels kernels_plain;

const kernels *choose_kernels(const char *name) {
    const kernels *list[6];
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq");
#ifdef HAVE_AMX
    if (avx512 && (!name || !*name || !strcmp(name, kernels_amx.name)) && has_amx()) list[n++] = &kernels_amx;
#endif
    if (avx512) list[n++] = &kernels_avx512;
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
