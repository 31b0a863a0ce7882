/* Compiler words, no logic. */
#ifndef BN_PORTABILITY_H
#define BN_PORTABILITY_H

#define BN_JOIN_(a, b) a##b
#define BN_JOIN(a, b) BN_JOIN_(a, b)
#define BN_QUOTE_(a) #a
#define BN_QUOTE(a) BN_QUOTE_(a)

#if !defined(__GNUC__) && !defined(__clang__)
#error "the kernels are written with the vector types of GCC and Clang"
#endif

/* "No dependence between iterations": true for separate and for exactly aliasing arrays. */
#define BN_SIMD _Pragma("omp simd")
/* And an integer that says whether anything was so, for which the order does not matter. */
#define BN_SIMD_ANY(flag) _Pragma(BN_QUOTE(omp simd reduction(| : flag)))
/* Between readings that must not be woven together: memory is then read in the order in which it lies,
   which the hardware can follow. */
#define BN_IN_ORDER() __asm__ volatile("" ::: "memory")
#define BN_INLINE static inline __attribute__((always_inline))
#define BN_NOINLINE static __attribute__((noinline)) /* a hot loop that keeps its name */
/* A loop over the vectors of an array: unrolled, they are registers. */
#if defined(__clang__)
#define BN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BN_UNROLL _Pragma("GCC unroll 16")
#endif
#define BN_PREFETCH(address) __builtin_prefetch(address)
#define BN_PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)

/* An array's elements become 0. `= {0}` has compilers make a string instruction, which takes longer than
   to add up a short run. */
#define BN_CLEAR(array)                                                        \
    do {                                                                       \
        BN_SIMD                                                                \
        for (size_t i_ = 0; i_ < sizeof(array) / sizeof((array)[0]); i_++) {   \
            (array)[i_] = 0;                                                   \
        }                                                                      \
    } while (0)

/* Makes streamed lines visible to whoever waits for this thread. */
#if defined(__SSE2__)
#include <immintrin.h>
#define BN_FENCE_STREAMS() _mm_sfence()
#else
#define BN_FENCE_STREAMS() ((void)0)
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#endif
