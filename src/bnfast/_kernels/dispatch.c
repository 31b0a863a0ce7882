/* The list of variants. The choice is made once, at import, by whoever reads it. */
#include "dispatch.h"

#include "cpu_features.h"

static int always(void) { return 1; }

#ifdef BN_HAVE_AVX512
extern const bn_kernels bn_kernels_avx512;
#endif
#ifdef BN_HAVE_AVX2
extern const bn_kernels bn_kernels_avx2;
#endif
extern const bn_kernels bn_kernels_baseline;

static const struct {
    const bn_kernels *kernels;
    int (*runs_here)(void);
} variants[] = {
#ifdef BN_HAVE_AVX512
    {&bn_kernels_avx512, bn_cpu_has_avx512},
#endif
#ifdef BN_HAVE_AVX2
    {&bn_kernels_avx2, bn_cpu_has_avx2},
#endif
    {&bn_kernels_baseline, always},
};

const bn_kernels *bn_built_kernels(size_t index)
{
    return index < sizeof variants / sizeof *variants ? variants[index].kernels : NULL;
}

int bn_runs_here(size_t index) { return variants[index].runs_here(); }

static const char *const names[] = {
#define NAMES(operation, ...)                                               \
    #operation "_contiguous_f32", #operation "_contiguous_f64",             \
    #operation "_channels_last_f32", #operation "_channels_last_f64",
    BN_FOR_EACH_ELEMENT_OPERATION(NAMES)
#undef NAMES
#define NAMES(operation)                                                    \
    #operation "_contiguous_f16", #operation "_contiguous_bf16",            \
    #operation "_channels_last_f16", #operation "_channels_last_bf16",
    BN_FOR_EACH_HALF_OPERATION(NAMES)
#undef NAMES
#define NAMES(operation) #operation "_f32", #operation "_f64",
    BN_FOR_EACH_COEFFICIENT_OPERATION(NAMES)
    BN_FOR_EACH_CURVE(BN_KERNELS_OF_CURVE, NAMES)
#undef NAMES
#define NAMES(operation) #operation,
    BN_FOR_EACH_CHANNEL_OPERATION(NAMES)
#undef NAMES
#define NAMES(stored, arithmetic) "widen_" #stored,
    BN_FOR_EACH_STORED_TYPE(NAMES)
#undef NAMES
#define NAMES(stored, arithmetic) "narrow_" #stored,
    BN_FOR_EACH_WRITTEN_TYPE(NAMES)
#undef NAMES
#define NAMES(kind) "probe_" #kind,
    BN_FOR_EACH_MEMORY_PROBE(NAMES)
#undef NAMES
};

const char *bn_kernel_name(size_t index)
{
    return index < sizeof names / sizeof *names ? names[index] : NULL;
}

const char *bn_activation_name(bn_activation activation)
{
#define NAMES(unused, name) [BN_activation_##name] = #name,
    static const char *const activation_names[] = {NAMES(, piecewise) BN_FOR_EACH_CURVE(NAMES, )};
#undef NAMES
    return activation_names[activation];
}

const char *bn_stored_name(bn_stored stored)
{
#define NAMES(name, arithmetic) [BN_stored_##name] = #name,
    static const char *const stored_names[] = {BN_FOR_EACH_STORED_TYPE(NAMES)};
#undef NAMES
    return stored_names[stored];
}
