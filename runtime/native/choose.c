/* The kernels this CPU can run, best first. */
#define _GNU_SOURCE
#include "core.h"

extern const kernels kernels_amx, kernels_avx512, kernels_avxvnni, kernels_avx2, kernels_neon_i8mm, kernels_neon_dot;
extern const kernels kernels_plain;

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

static int supported(const kernels **list, const char *name) {
    unsigned a = 0, b, c, d = 0, a1 = 0, n = 0;
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")
                    && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && __get_cpuid_count(7, 1, &a1, &b, &c, &d)) __get_cpuid_count(7, 0, &a, &b, &c, &d);
#ifdef HAVE_AMX
    const int amx = avx512 && a1 >> 5 & 1 && d >> 22 & 1 && d >> 24 & 1;         /* AVX512-BF16, AMX-BF16, AMX-TILE */
    /* Linux gives the tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    if (amx && (!name || !strcmp(name, kernels_amx.name)) && !syscall(SYS_arch_prctl, 0x1023, 18))
        list[n++] = &kernels_amx;
#endif
    if (avx512) list[n++] = &kernels_avx512;
    if (avx2 && a1 >> 4 & 1) list[n++] = &kernels_avxvnni;
    if (avx2) list[n++] = &kernels_avx2;
    return n;
}
#elif defined(__aarch64__)
#ifdef __APPLE__
#include <sys/sysctl.h>
static int has(const char *feature) {
    int yes = 0;
    size_t size = sizeof yes;
    return !sysctlbyname(feature, &yes, &size, NULL, 0) && yes;
}
static int has_dot(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has("hw.optional.arm.FEAT_I8MM"); }
#else
#include <sys/auxv.h>
static int has_dot(void) { return getauxval(AT_HWCAP) >> 20 & 1; }       /* HWCAP_ASIMDDP */
static int has_i8mm(void) { return getauxval(AT_HWCAP2) >> 13 & 1; }     /* HWCAP2_I8MM */
#endif

static int supported(const kernels **list, const char *name) {
    int n = 0;
    if (has_dot() && has_i8mm()) list[n++] = &kernels_neon_i8mm;
    if (has_dot()) list[n++] = &kernels_neon_dot;
    return n;
}
#else
static int supported(const kernels **list, const char *name) { return 0; }
#endif

const kernels *choose_kernels(const char *name) {
    const kernels *list[5];
    if (name && !*name) name = NULL;
    int n = supported(list, name);
    list[n++] = &kernels_plain;
    for (int i = 0; i < n; i++) if (!name || !strcmp(name, list[i]->name)) return list[i];
    return NULL;
}
