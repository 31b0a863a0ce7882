/* From where on a call is done in another way: by several threads, around the caches, slab by slab.

   Measured, and told by the sizes of the caches where it is they that matter. Each chooses stores,
   prefetching, traversal or threads, and changes no bit. (How a kernel walks a box is its own
   matter: see kernel_bodies.) */
#ifndef BN_THRESHOLDS_H
#define BN_THRESHOLDS_H

#include <stddef.h>

#include "cache_sizes.h"

/* threads */

/* Less work than this many bytes, read and written, is done before a team of threads has woken up and
   got its share from another core's cache: no OpenMP region. On two cores the second one made
   inference slower up to an x of 500 KiB (0.65 to 0.76 of one thread's speed) and training up to
   120 KiB; both gained from 1 MiB on (1.5 and 1.7). */
#define BN_SERIAL_BYTES ((size_t)1 << 20)

/* Nor for less than this for each thread of the team. The team is always whole: where the next region has
   fewer threads, GCC's runtime ends the others, and starts them again for the one after (teams of 16 and 2
   in turn took 13 times as long as of 16 alone; group norm of two images, whose stages were such, was
   slower with 16 threads than with 4). */
#define BN_BYTES_PER_THREAD ((size_t)1 << 15)

/* An x of fewer bytes takes a few microseconds: other Python threads need not be let in. */
#define BN_KEEP_GIL_BYTES ((size_t)1 << 15)

/* Arithmetic on channels alone, each counted once for every block that it has sums of: few of them are no
   parallel work. */
#define BN_CHANNELS_PER_TASK ((size_t)4096)

/* caches */

/* No more of the last level counts. Where one of 300 MiB is shared by the cores of a server, a core reaches it
   hardly faster than memory. With all of it counted, calls on an Intel Xeon took, in NHWC, 1.95 of the time (training
   of 24x192x35x35, one thread; backward 1.45) and 1.6 to 1.9 (training of 32x64x112x112, 2 to 16 threads); with
   64 MiB one thread still took 1.2 (8x32x112x112 in NCHW). */
#define BN_MOST_LAST_LEVEL ((size_t)32 << 20)

static inline size_t bn_near_bytes(bn_caches caches)
{
    return caches.last_level < BN_MOST_LAST_LEVEL ? caches.last_level : BN_MOST_LAST_LEVEL;
}

/* stores */

/* From so many bytes on, of all tensors of a call, the output goes around the last level: what is read
   next would not find it there, and a line that is written without having been read saves its reading.
   A single thread gains by it early, because it waits for every line, and earlier with a gradient, whose two
   inputs want the last level for themselves (12 to 15 MB of 32: 1.03 times as fast, 1.14 at most); several
   threads write to the last level faster than to memory. Nor around their second levels, where these hold all
   (8x32x112x112, inference with 16 threads: 46 us, around the caches 90). */
static inline size_t bn_streamed_from(bn_caches caches, size_t threads, size_t tensors)
{
    const size_t near = bn_near_bytes(caches) / 8 * (threads > 1 ? 6 : tensors > 2 ? 3 : 4);
    const size_t level2 = threads * caches.level2;
    return near > level2 ? near : level2;
}

/* sums */

/* Inputs of more bytes come from beyond the second level. */
static inline size_t bn_level2_bytes(bn_caches caches, size_t threads)
{
    return threads * caches.level2;
}

/* Inputs of more bytes come from memory: the last level has also what is written, and other work. (With 32 MiB
   of it, prefetching rows lost a tenth of the time of 8 MB and won a quarter of that of 16 MB.) For
   the moments of narrow rows, the walk for the last level stays the faster one up to larger inputs (13 MB of 64
   columns: 0.77 of the time of the walk for memory; at 18 MB both take as long). */
static inline size_t bn_last_level_bytes(bn_caches caches, int narrow_moments)
{
    return bn_near_bytes(caches) / 8 * (narrow_moments ? 4 : 3);
}

/* slabs */

/* Below so many bytes, of all tensors of a call, what the sums have read is still in the last level of cache when the
   output is made: images are then walked as they lie, and not slab by slab. */
static inline size_t bn_whole_bytes(bn_caches caches) { return bn_near_bytes(caches) / 4 * 3; }

/* Otherwise a slab may take so much of the second level, and so much of the next one is prefetched while
   its output is written. */
static inline size_t bn_slab_bytes(bn_caches caches) { return caches.level2 / 4 * 3; }

/* A slab of more than this does not stay in the second level anyway: all of the next one is prefetched, and waits
   in the last level (16x64x147x147, training and backward 1.2 times as fast). Slabs of 0.8 of the second level
   were slower that way (0.9 to 0.96). */
static inline size_t bn_lost_slab_bytes(bn_caches caches) { return caches.level2 / 4 * 5; }

/* The channels of a contiguous slab have at most so many neighbouring bytes in each image: short planes
   are summed together, share their cache lines within a task and are written in memory order. */
#define BN_NEIGHBOURING_BYTES ((size_t)4096)

/* Rows, or the planes of a single image, follow each other without gaps: so many bytes of them are still
   in the first level of cache when their output is written. (5120 rows of 1024: 380 ns each when taken
   one by one, 260 with 32 KiB, 285 with 16 KiB; from 128 KiB on 32768 rows of 768 were slower.) */
#define BN_ROWS_BYTES ((size_t)32768)

/* Where all is still in the last level of cache, more: rows then come one after the other anyway, and a slab only
   keeps its output from reading there once more. Nothing is prefetched. (On a Xeon whose last level is slow, layer
   norm of 3 and 6 MB 1.15 to 1.39 times as fast as all rows at once, batch norm of one image 1.15 to 1.46; with 32 KiB
   0.85 to 1.2.) */
static inline size_t bn_near_rows_bytes(bn_caches caches)
{
    return caches.level2 / 8 > BN_ROWS_BYTES ? caches.level2 / 8 : BN_ROWS_BYTES;
}

/* Unless that is more than the slab may take, but never fewer than this. */
#define BN_FEWEST_BYTES ((size_t)1024)

/* Longer rows of channels_last, the pixels of an image that is normalized over its channels, are cut into
   pieces of BN_NEIGHBOURING_BYTES or more, so that a slab of them stays in the second level. (Over 64 channels
   of 224x224 the output took 0.74 of the time, over 256 of 128x128 0.67, over 96 of 56x56 0.9; shorter rows
   gained nothing, and pieces of 1 KiB lost.) */
#define BN_LONG_ROW_BYTES ((size_t)8192)

/* channels_last slabs are cut at multiples of so many channels: whole cache lines, whole tiles. */
#define BN_CHANNEL_UNIT ((size_t)64)

/* Where a channel is one run, the next slab's are prefetched while this one's are added up, if that takes
   longer than memory does, and its output is then left alone with memory: for moments (past the caches
   instance norm of 14x14 planes 1.46, of 35x35 1.2 to 1.3, layer norm of 5120x1024 1.0 to 1.28), not for
   sums of squares (0.92 to 0.99), and for those of gradients where runs are so short (14x14 1.19, 28x28
   0.96, 96x96 0.87). Slabs of many images were slower that way (0.86 to 0.99). */
#define BN_SLOW_RUN_BYTES ((size_t)2048)

/* outputs */

/* They are walked from their end in steps of this size: what the sums read last may still be in a
   cache. */
#define BN_STEP_BYTES ((size_t)1 << 20)

/* But of no fewer rows, for which a kernel prepares its coefficients once. */
#define BN_FEWEST_ROWS ((size_t)8)

#endif
