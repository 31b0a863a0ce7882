/* Detection by CPUID and XGETBV. Each function here answers for the flags that setup.py gives the
   variant of the same name: change both or neither. Compiled without any such flag. */
#include "cpu_features.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>

#define BIT(word, n) (((word) >> (n)) & 1u)

/* XCR0: which register state the operating system saves. AVX needs bits 1, 2; AVX-512 also 5, 6, 7. */
static unsigned enabled_state(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !BIT(ecx, 27 /* OSXSAVE */)) {
        return 0;
    }
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

int bn_cpu_has_avx2(void)
{
    unsigned eax, ebx, ecx, edx;
    if ((enabled_state() & 0x06u) != 0x06u) {
        return 0;
    }
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !BIT(ecx, 28 /* AVX */) || !BIT(ecx, 29 /* F16C */)) {
        return 0;
    }
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && BIT(ebx, 5 /* AVX2 */);
}

int bn_cpu_has_avx512(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!bn_cpu_has_avx2() || (enabled_state() & 0xe6u) != 0xe6u) {
        return 0;
    }
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && BIT(ebx, 16 /* F */) &&
           BIT(ebx, 17 /* DQ */) && BIT(ebx, 30 /* BW */) && BIT(ebx, 31 /* VL */);
}

#else

int bn_cpu_has_avx2(void) { return 0; }
int bn_cpu_has_avx512(void) { return 0; }

#endif
