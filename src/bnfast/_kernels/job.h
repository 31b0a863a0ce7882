/* What a job is: operands, statistics, coefficients, how it is done, and its stages of tasks.

   A task is a slab, neighbouring channels of one repeat, by one block or, where it is fused, by all
   blocks. How channels are cut into slabs and who runs which task changes no bit: the sums of a channel
   depend on its chunks and blocks alone. */
#ifndef BN_JOB_H
#define BN_JOB_H

#include "cache_sizes.h"
#include "plan.h"
#include "kernels.h"
#include "mask.h"
#include "operands.h"

typedef struct bn_job bn_job;

/* Some neighbours. */
typedef struct {
    size_t first, count;
} range;

/* A block of sums, and how many values of each channel have been summed before: in this block, or, where blocks are
   merged, in all blocks before it. `first` is the first channel that is summed. */
typedef struct {
    size_t number, count, first;
} block_sums;

typedef void bn_sum_box(const bn_job *job, const bn_box *box, block_sums block);
typedef void bn_do_channels(const bn_job *job, range channels);

/* Merges the sums of a block into those of all blocks before it. */
typedef void bn_merge_block(const bn_job *job, block_sums block, range channels);

/* What a kernel reads, in its order, and what it writes. */
typedef struct {
    size_t kernel; /* where its pointers are in bn_kernels */
    size_t inputs;
    bn_role reads[BN_MAX_INPUTS], writes;
} bn_output;

/* Where the pointers of a curve's kernels are in bn_kernels. */
typedef struct {
    size_t value, gradient;
} bn_curve;

/* How a job is done: see method.c. */
typedef struct {
    bn_sum_box *moments;       /* of a box of x */
    bn_merge_block *merge;     /* of these */
    bn_sum_box *gradient_sums; /* of a box of dy and x */
    int has_upstream;          /* what goes through an activation is made, which these sums read in the place of dy */
    bn_role gate;              /* of a piecewise linear one: the operand whose bounds are known; BN_NONE: of z */
    const bn_output *again;    /* makes z again, which the activation was given; NULL where that is not needed */
    const bn_output *second;   /* after that, or after output where that writes y: a kernel of neighbours in scratch,
                                  which adds the residual and bends; NULL where the first one does all that there is */
    int sums_have_gates;       /* these sums make it themselves, of x and its bounds */
    bn_role kept;              /* the operand where these sums leave it; BN_NONE: it is made once more in scratch */
    int output_reads_upstream; /* as these sums do */
    int keeps_with_output;     /* the gradient of the residual is written then, rather than with the sums */
    const bn_curve *curve;     /* of the output or, of a gradient, that dy goes through; NULL for none */
    int output_in_scratch;     /* boxes of it are as small as scratch */
    bn_do_channels *prepare;   /* before these sums */
    bn_do_channels *finish;    /* from them to the coefficients of dx */
    int has_columns;           /* gradient_sums makes the sums of the columns in the same pass */
    unsigned coefficients;     /* the set of coefficients that the job needs */
    const bn_output *output;
    const bn_output *masked; /* the same where some values do not count; NULL: made of output, and merged */
} bn_method;

/* Sums of a block: mean, mean_low and m2, or sum_dy and sum_dy_xhat; and of a summary, all that it has. */
#define BN_SUMS 3
#define BN_SUMS_OF_SUMMARY 7

/* Scratch of a thread: for each operand. */
#define BN_BUFFERS ((size_t)BN_ROLES)

/* What is known of a channel. moments and normalize write BN_MEAN to BN_M2, and normalize BN_INVSTD; scale_shift is
   told BN_MEAN and BN_VARIANCE (0 without the one, invstd 1 without the other), and BN_MEAN_LOW where it is known,
   and writes BN_INVSTD; a gradient is told BN_MEAN and BN_INVSTD, and writes the sums. */
typedef enum {
    BN_MEAN,     /* rounded to one float64 */
    BN_MEAN_LOW, /* what rounding left of the mean; a gradient finds it again where it is missed */
    BN_M2,
    BN_INVSTD,
    BN_VARIANCE,
    BN_SUM_DY,
    BN_SUM_DY_XHAT, /* sum(dy * (x - mean)) until all is summed */
    /* Of a summary, which has BN_MEAN to BN_M2 besides. */
    BN_COUNT,     /* of the values that count, where this differs from channel to channel */
    BN_MINIMUM,   /* of values that are not NaN; infinite where there is none */
    BN_MAXIMUM,
    BN_NONFINITE, /* how many values are NaN or infinite */
    BN_SUM_ACTIVATION, /* of dy where the activation wrote its floor */
    BN_STATISTICS
} bn_statistic;

/* Weight and bias are float64 [channels], or [repeats][channels], and may be NULL; arrays of statistics are float64
   [repeats][channels], and those of coefficients as long for each repeat as
   bn_coefficients_length says. */
struct bn_job {
    const bn_kernels *kernels;
    const bn_plan *plan;
    bn_caches caches;

    /* NULL for those that the call has not. Where elements rather than channels have parameters, these are
       operands that do not step from row to row: a row is a channel of a repeat. */
    char *operand[BN_ROLES];

    int has_no_weight; /* the call has none: the weight of elements is ones, which z with a bias is made again with */

    const double *weight, *bias;
    size_t parameters_of_repeat; /* stride of weight and bias from repeat to repeat, in elements; 0 where all repeats
                                    have the same weight and bias */
    bn_activated activation;
    const double *floors; /* of the activation, float64 [channels]; NULL for one of all channels */
    int x_is_output;      /* of the forward pass, which wrote y over x: the gradient makes of it what the activation was
                             given, around whose mean and invstd statistics are */
    double eps;
    const double *channel_eps; /* float64 [channels]: of each channel, besides; NULL for none */

    double *statistic[BN_STATISTICS]; /* NULL for those that the job has not */
    int constant_statistics; /* gradient: mean and invstd did not come from x */

    /* Of a gradient in two halves, for batches in parts: one without BN_DX makes the sums alone, and one that is
       given the sums, of as many values per channel as `count`, makes dx from these. */
    const double *given_sum_dy, *given_sum_dy_xhat; /* NULL where the job makes them */
    double count;
    int mean_low_given; /* BN_MEAN_LOW is not to be found */
    int invstd_given;   /* scale_shift: BN_INVSTD is not to be made of BN_VARIANCE */

    size_t per_group; /* how many neighbouring channels have their statistics in common */
    int centred;      /* statistics are around the mean; else they are around 0, and the mean is 0 */

    /* Summaries: x holds integers, whose sums are exact, rather than moments; values that are not finite do not
       count. */
    int integers, finite_only;

    bn_mask mask; /* which values count; it has no `counts` where all do */

    /* Set for the second sums of float64 channels whose first ones left the range: of values times a
       power of two. */
    int scaled;
    double factor; /* moments: that power; gradient has one for each channel */

    /* The gradients of the parameters of elements are sums over rows of dy * xhat and dy,
       [blocks of rows][2][outer * inner] float64, of which the first become those of all. */
    double *column_sums; /* NULL where they are not wanted */

    double *partials;     /* [repeats][blocks - 1][partial_sums][channels]: of every block but the first */
    size_t partial_sums;  /* BN_SUMS or BN_SUMS_OF_SUMMARY */
    bn_coefficients coefficients;

    /* Scratch memory: for each thread BN_BUFFERS buffers of scratch_bytes bytes. NULL where the call packs no
       operand and makes no input. */
    char *scratch;
    size_t scratch_bytes;

    int prepared; /* scale_shift: these hold already what statistics and parameters make of them */

    /* Set by bn_*_stages. */
    bn_method method;
    size_t slab, slabs; /* channels in a task, and how many such slabs */
    bn_place place;     /* where sums read from */
    bn_stores stores;
    ptrdiff_t prefetch_distance; /* from an element of one slab to that of the next; 0: no prefetch */
    size_t prefetch_count;       /* of each channel, so many values */
    int prefetch_in_sums;        /* while values are added up, rather than while their output is written */
    bn_extent pieces;            /* into how many parts each axis of the output is cut */
};

typedef void bn_task(const bn_job *job, size_t number);

/* All tasks of a stage must end before the next stage begins. */
typedef struct {
    bn_task *task;
    size_t tasks; /* of each repeat, unless they are of all of them */
    int once;     /* for all repeats */
    int serial;   /* not worth waking a team */
} bn_stage;

/* Does the tasks first to end - 1 of a stage, numbered repeat by repeat, with the scratch memory of `thread`. */
void bn_do_tasks(const bn_job *job, const bn_stage *stage, size_t thread, size_t first, size_t end);

#define BN_MAX_STAGES 5

/* Once a job says all that it is to do, before its coefficients have memory. */
void bn_choose_method(bn_job *job);

/* How this job is done by so many threads: returns the number of stages. */
size_t bn_moments_stages(bn_job *job, size_t threads, bn_stage *stages);      /* of x */
size_t bn_normalize_stages(bn_job *job, size_t threads, bn_stage *stages);    /* x to y */
size_t bn_scale_shift_stages(bn_job *job, size_t threads, bn_stage *stages);  /* x to y */
size_t bn_gradient_stages(bn_job *job, size_t threads, bn_stage *stages);     /* x and dy to dx, or a half of it */
size_t bn_row_gradient_stages(bn_job *job, size_t threads, bn_stage *stages); /* with parameters of elements */

#endif
