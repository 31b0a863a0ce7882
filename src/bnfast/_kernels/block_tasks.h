/* Tasks: a job and a task number in; pointers, and one kernel call after the other, out.

   A task is a group of neighbouring channels by one block, or by all blocks where it is fused. How
   channels are grouped and who runs which task changes no bit: the sums of a channel depend on its
   chunks and blocks alone. */
#ifndef BN_BLOCK_TASKS_H
#define BN_BLOCK_TASKS_H

#include "cache_sizes.h"
#include "geometry.h"
#include "kernels.h"

/* Sums of a block: mean, mean_low and m2, or sum_dy and sum_dy_deviation. */
#define BN_SUMS 3

/* Channel arrays are float64 [channels]; weight and bias may be NULL. */
typedef struct {
    const bn_kernels *kernels;
    const bn_geometry *geometry;
    bn_caches caches;

    char *x, *y;   /* moments, normalize, scale_shift */
    char *dy, *dx; /* gradient, besides x */

    const double *weight, *bias;
    double eps;

    /* moments and normalize write mean (+ mean_low), m2 and invstd; scale_shift reads mean and
       variance and writes invstd; gradient reads mean and invstd. */
    double *mean, *mean_low, *m2, *invstd;
    const double *variance;
    double *sum_dy, *sum_dy_deviation;
    int constant_statistics; /* gradient: mean and invstd did not come from x */

    double *partials; /* [blocks - 1][BN_SUMS][channels]: the sums of every block but the first */
    bn_scale_shift_coefficients scale_shift;
    int prepared; /* scale_shift: these hold already what statistics and parameters make of them */
    bn_gradient_coefficients gradient;

    /* Set by bn_*_phases. */
    size_t group, groups; /* channels in a task, and how many such groups */
    int far;              /* sums read from beyond the second level of cache */
    bn_output output;
    size_t fetched;       /* values of each channel that output.ahead concerns */
    bn_extent pieces;     /* into how many parts each axis of the output is cut */
} bn_job;

typedef void bn_task(const bn_job *job, size_t number);

/* All tasks of a phase must end before the next phase begins. */
typedef struct {
    bn_task *task;
    size_t tasks;
} bn_phase;

#define BN_MAX_PHASES 4

/* How this job is done by so many threads: returns the number of phases.
   Which operand stands where in the geometry is said by its position below. */
size_t bn_moments_phases(bn_job *job, size_t threads, bn_phase *phases);     /* x */
size_t bn_normalize_phases(bn_job *job, size_t threads, bn_phase *phases);   /* x, y */
size_t bn_scale_shift_phases(bn_job *job, size_t threads, bn_phase *phases); /* x, y */
size_t bn_gradient_phases(bn_job *job, size_t threads, bn_phase *phases);    /* x, dy, dx */

/* dweight and dbias, of this dtype, once the phases of the gradient have ended. */
void bn_parameter_gradients(const bn_job *job, bn_dtype dtype, void *dweight, void *dbias);

/* running = (1 - momentum) * running + momentum * divided / divisor */
void bn_update_running(const bn_kernels *kernels, bn_dtype dtype, size_t channels, double momentum,
                       const double *divided, double divisor, void *running);

#endif
