/* How large this machine's caches are: for schedules and stores, never for what is summed. */
#ifndef BN_CACHE_SIZES_H
#define BN_CACHE_SIZES_H

#include <stddef.h>

typedef struct {
    size_t level2;     /* bytes, of one core */
    size_t last_level; /* bytes, shared by the cores that a call may run on */
} bn_caches;

/* Read from the system; what it does not tell is taken from a common small machine. */
bn_caches bn_cache_sizes(void);

#endif
