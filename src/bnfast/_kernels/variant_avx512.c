/* The kernels for AVX-512. setup.py gives this file, and only this file, those flags. */
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile through setup.py: this file needs -mavx512f -mavx512dq -mavx512bw -mavx512vl"
#endif
#define BN_ISA avx512
#define BN_VECTOR_BYTES 64
#define BN_REGISTERS 32
#define BN_TILE_BYTES 512
#define BN_COLUMNS_BYTES 256
#include "kernel_bodies/all_kernels.inc"
