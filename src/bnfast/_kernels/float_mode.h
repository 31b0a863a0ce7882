/* The float mode of a thread: whether denormals are kept, how results are rounded, which exceptions
   trap. Libraries built with -ffast-math change it for a process, and threads inherit it. All
   arithmetic of bnfast runs in the default mode of IEEE 754 (denormals kept, to nearest, no traps),
   because its bits do not depend on the caller; and what it found, it leaves. */
#ifndef BN_FLOAT_MODE_H
#define BN_FLOAT_MODE_H

#include <stdint.h>

typedef uint64_t bn_float_mode;

#if defined(__x86_64__) || defined(_M_X64)

#include <xmmintrin.h>

/* All of MXCSR but the flags of the exceptions that there have been. */
#define BN_MODE_BITS UINT64_C(0xffc0)
#define BN_DEFAULT_MODE UINT64_C(0x1f80)

static inline bn_float_mode bn_read_float_mode(void) { return _mm_getcsr(); }
static inline void bn_write_float_mode(bn_float_mode mode) { _mm_setcsr((unsigned)mode); }

#elif defined(__aarch64__)

/* All of FPCR; the flags are in another register. */
#define BN_MODE_BITS UINT64_MAX
#define BN_DEFAULT_MODE UINT64_C(0)

static inline bn_float_mode bn_read_float_mode(void)
{
    bn_float_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

static inline void bn_write_float_mode(bn_float_mode mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}

#else

#define BN_MODE_BITS UINT64_C(0)
#define BN_DEFAULT_MODE UINT64_C(0)

static inline bn_float_mode bn_read_float_mode(void) { return 0; }
static inline void bn_write_float_mode(bn_float_mode mode) { (void)mode; }

#endif

/* Compilers know nothing of the mode, and may move arithmetic across these: what they enclose is a
   call of a function that they do not see through. To write the mode takes longer than to read it (5 ns),
   so it is written only where it is not the default already. */
static inline bn_float_mode bn_enter_default_float_mode(void)
{
    const bn_float_mode before = bn_read_float_mode();
    if ((before & BN_MODE_BITS) != BN_DEFAULT_MODE) {
        bn_write_float_mode((before & ~BN_MODE_BITS) | BN_DEFAULT_MODE);
    }
    return before;
}

static inline void bn_leave_default_float_mode(bn_float_mode before)
{
    if ((before & BN_MODE_BITS) != BN_DEFAULT_MODE) {
        bn_write_float_mode(before);
    }
}

#endif
