/* Which kernels run: the variants that this build has and this machine can run, best first. */
#ifndef BN_DISPATCH_H
#define BN_DISPATCH_H

#include <stddef.h>

#include "kernels.h"

/* The variants of this build, best first; NULL past the last. */
const bn_kernels *bn_built_kernels(size_t index);
int bn_runs_here(size_t index);

/* Names of all kernels of a variant, from the X-macro list; NULL past the last. */
const char *bn_kernel_name(size_t index);

/* The name of an activation, BN_no_activation < activation < BN_ACTIVATIONS. */
const char *bn_activation_name(bn_activation activation);

/* The name of a storage type that is converted, BN_as_computed < stored < BN_STORED_TYPES. */
const char *bn_stored_name(bn_stored stored);

#endif
