/* The kernels for every machine of the architecture: SSE2 on x86-64, NEON on aarch64. */
#if defined(__AVX__)
#error "compile through setup.py: this file must not be given AVX flags"
#endif
#define BN_ISA baseline
#define BN_VECTOR_BYTES 16
#define BN_COLUMNS_BYTES 4096
#if defined(__aarch64__) /* 32 registers, x86-64 has 16 */
#define BN_REGISTERS 32
#define BN_TILE_BYTES 64
#else
#define BN_REGISTERS 16
#define BN_TILE_BYTES 64
#endif
#include "kernel_bodies/all_kernels.inc"
