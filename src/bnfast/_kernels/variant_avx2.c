/* The kernels for AVX2. setup.py gives this file, and only this file, those flags. */
#if !defined(__AVX2__) || !defined(__F16C__) || defined(__AVX512F__)
#error "compile through setup.py: this file needs -mavx2 -mf16c and nothing above it"
#endif
#define BN_ISA avx2
#define BN_VECTOR_BYTES 32
#define BN_REGISTERS 16
#define BN_TILE_BYTES 256
#define BN_COLUMNS_BYTES 4096
#include "kernel_bodies/all_kernels.inc"
