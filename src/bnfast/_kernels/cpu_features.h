/* What this CPU and this operating system allow. */
#ifndef BN_CPU_FEATURES_H
#define BN_CPU_FEATURES_H

int bn_cpu_has_avx2(void);
int bn_cpu_has_avx512(void);

#endif
