/* Under a mask: runs of what counts go to the kernels as they lie; the rest is gathered to be summed, and merged with
   the padding when it has been written. What does not count is in no sum, whatever it is. */
#include "masked.h"

#include <string.h>

#include "portability.h"

/* Values of a channel that count, on one line or on whole lines, are summed where they lie if they are so many; rows
   of channels_last are as many. The others of their chunk are gathered: every box has moments of its own, which are
   merged, and so this decides bits. */
#define FEWEST_DIRECT_VALUES ((size_t)128)
#define FEWEST_DIRECT_ROWS ((size_t)32)

/* Where a part of a chunk is mixed, at least a quarter of it counts, and its lines are not short, all of it is walked
   where it lies, by kernels that ask of each position, rather than gathered. */
#define SHORTEST_COUNTED_LINE ((size_t)32)
#define FEWEST_COUNTED ((size_t)256)
#define MOST_OF_COUNTED ((size_t)4)

/* Rows of channels_last that are gathered at a time: as many as scratch holds with all of their channels, but at least
   so many. Bits must not depend on slabs. */
#define FEWEST_GATHERED_ROWS ((size_t)16)

static size_t first_of_chunk(const bn_plan *plan, size_t chunk)
{
    const bn_box box = box_of_chunk(plan, chunk, (range){0, 1});
    return box.outer * plan->inner + box.inner;
}

static size_t chunk_at(const bn_plan *plan, const bn_box *box)
{
    return plan->chunks_per_run > 1 ? box->outer * plan->chunks_per_run + box->inner / plan->chunk_inner
                                    : box->outer / plan->chunk_outer;
}

/* the pieces of a chunk, whose lines are its outer */

/* Positions of a chunk: neighbours that count, of a line or whole lines; or a mixed stretch. */
typedef struct {
    size_t first, size, count;
    int direct;
} piece;

typedef struct {
    const bn_stretch *stretch, *end;
    size_t line, at, fewest; /* `at`, so many of the stretch have been seen */
} piece_walk;

static piece_walk pieces_of(const bn_job *job, const bn_masked_chunk *chunk, bn_extent extent)
{
    const bn_stretch *first = job->mask.stretches + chunk->first_stretch;
    return (piece_walk){first, first + chunk->stretches, extent.inner, 0,
                        job->plan->layout == BN_contiguous ? FEWEST_DIRECT_VALUES : FEWEST_DIRECT_ROWS};
}

/* Of so many positions from one on, those of a part of a line, of whole lines, or of a part of a line again. */
static size_t part_of_lines(size_t first, size_t count, size_t line)
{
    const size_t of_line = line - first % line;
    return of_line < line || count < line ? MIN(of_line, count) : count / line * line;
}

static int next_piece(piece_walk *walk, piece *next)
{
    for (; walk->stretch < walk->end; walk->stretch++, walk->at = 0) {
        const bn_stretch stretch = *walk->stretch;
        const size_t size = (size_t)(stretch.end - stretch.first);
        if (stretch.count == 0 || walk->at == size) {
            continue;
        }
        *next = (piece){stretch.first + walk->at, size, stretch.count, 0};
        if (stretch.count == size) {
            next->size = next->count = part_of_lines(next->first, size - walk->at, walk->line);
            next->direct = next->count >= walk->fewest;
        }
        walk->at += next->size;
        return 1;
    }
    return 0;
}

/* gathered inputs */

static const bn_view nothing = {NULL, {0, 0}};

/* A part of a line of one channel; returns how many values these are. There is room for some more. */
static size_t gather_from_line(const bn_job *job, piece some, const unsigned char *counts, const char *from, char *to,
                               size_t room)
{
    const bn_plan *plan = job->plan;
    if (some.count == some.size) {
        memcpy(to, from, some.size * plan->itemsize);
        return some.size;
    }
    return job->kernels->compress[plan->dtype](some.size, counts, from, to, room);
}

/* Channel by channel, after `at` others of each. */
static void gather_values(const bn_job *job, const bn_box *box, piece some, const unsigned char *counts, size_t line,
                          bn_view from, bn_view to, size_t at)
{
    const size_t itemsize = job->plan->itemsize, gathered = box->extent.inner, end = some.first + some.size;
    for (size_t c = 0; c < box->extent.channels; c++) {
        char *values = (char *)to.data + ((ptrdiff_t)c * to.strides.channel + (ptrdiff_t)at) * (ptrdiff_t)itemsize;
        size_t room = gathered - at;
        piece part = some;
        for (size_t first = some.first; first < end && room > 0; first += part.size) {
            const ptrdiff_t outer = (ptrdiff_t)(first / line) * from.strides.outer;
            const ptrdiff_t place = outer + (ptrdiff_t)c * from.strides.channel + (ptrdiff_t)(first % line);
            part.size = MIN(end - first, line - first % line);
            part.count = some.count == some.size ? part.size : 0;
            const size_t count = gather_from_line(job, part, counts + first,
                                                  (const char *)from.data + place * (ptrdiff_t)itemsize, values, room);
            values += count * itemsize;
            room -= count;
        }
    }
}

/* A row, by as many bytes at a time as compilers move without a call. */
static void copy_row(char *to, const char *from, size_t bytes)
{
    const size_t step = 64;
    if (bytes < step) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i + step < bytes; i += step) {
        memcpy(to + i, from + i, step);
    }
    memcpy(to + bytes - step, from + bytes - step, step); /* it may overlap the last */
}

/* Rows of a mixed piece are listed so many at a time. */
#define LISTED ((size_t)256)

/* Those of the piece's rows that the box has, after `before` others. */
static void gather_rows(const bn_job *job, bn_role role, const bn_box *box, bn_box chunk, piece some,
                        const unsigned char *counts, size_t before, bn_view to)
{
    const bn_plan *plan = job->plan;
    const int staged = plan->operand[role].staged;
    const size_t bytes = box->extent.channels * plan->itemsize, first_row = chunk.outer;
    const bn_view from = bn_view_to_write(plan, role, job->operand[role], &chunk, NULL);
    const ptrdiff_t step = from.strides.outer * (ptrdiff_t)plan->itemsize;
    const size_t end = box->first_gathered + box->extent.outer;
    size_t places[LISTED + 1], at = before;
    for (size_t first = some.first; first < some.first + some.size && at < end; first += LISTED) {
        const size_t size = MIN(LISTED, some.first + some.size - first);
        size_t listed = 0;
        for (size_t i = first; i < first + size; i++) {
            places[listed] = i;
            listed += counts[i];
        }
        for (size_t i = 0; i < listed && at < end; i++, at++) {
            char *row = (char *)to.data + (at - box->first_gathered) * bytes;
            if (at < box->first_gathered) {
                continue;
            }
            if (staged) {
                chunk.outer = first_row + places[i];
                chunk.extent.outer = 1;
                bn_view_to_read(job->kernels, plan, role, job->operand[role], &chunk, row);
            } else {
                copy_row(row, (const char *)from.data + (ptrdiff_t)places[i] * step, bytes);
            }
        }
    }
}

/* Lines of staged operands are brought into a scratch that all of these share, and gathered out of it. */
bn_view bn_gathered_view(const bn_job *job, bn_role role, const bn_box *box)
{
    const bn_plan *plan = job->plan;
    const size_t number = chunk_at(plan, box);
    const bn_box chunk = box_of_chunk(plan, number, (range){box->channel, box->extent.channels});
    const int contiguous = plan->layout == BN_contiguous;
    const bn_view from = contiguous ? bn_view_to_read(job->kernels, plan, role, job->operand[role], &chunk,
                                                      buffer_of(job, BN_MASK))
                                    : nothing;
    const bn_view to = bn_dense_view(box, buffer_of(job, role));
    const unsigned char *counts = job->mask.counts + first_of_chunk(plan, number);
    piece_walk walk = pieces_of(job, box->gathered, chunk.extent);
    piece some;
    for (size_t at = 0; next_piece(&walk, &some);) {
        if (some.direct) {
            continue;
        }
        if (contiguous) {
            gather_values(job, box, some, counts, chunk.extent.inner, from, to, at);
        } else {
            gather_rows(job, role, box, chunk, some, counts, at, to);
        }
        at += some.count;
    }
    return to;
}

/* sums */

static void sum_box_as_it_lies(const bn_job *job, bn_box box, int in_scratch, block_sums *block, bn_sum_box *sum_box)
{
    bn_sum_channels(job, box, channels_at_once(job, &box, in_scratch), *block, sum_box);
    block->count += box.extent.outer * box.extent.inner;
}

/* Neighbours of a line, or whole lines. */
static bn_box box_at(bn_box chunk, size_t first, size_t count)
{
    const size_t line = chunk.extent.inner;
    chunk.outer += first / line;
    chunk.inner += first % line;
    chunk.extent.outer = MAX(count / line, (size_t)1);
    chunk.extent.inner = MIN(count, line);
    return chunk;
}

static void sum_gathered(const bn_job *job, bn_box box, size_t gathered, block_sums *block, bn_sum_box *sum_box)
{
    const bn_plan *plan = job->plan;
    /* Of lines that are staged, all of a chunk is: see bn_gathered_view. */
    const int staged_lines = plan->any_staged && plan->layout == BN_contiguous;
    const size_t staged_channels = staged_lines ? channels_at_once(job, &box, 1) : box.extent.channels;
    const size_t rows = MAX(BN_SCRATCH_BYTES / (plan->channels * plan->itemsize), FEWEST_GATHERED_ROWS);
    const size_t most = plan->layout == BN_channels_last && plan->interleave == 1 ? rows : gathered;
    for (size_t count; box.first_gathered < gathered; box.first_gathered += count) {
        count = MIN(gathered - box.first_gathered, most);
        box.extent.outer = plan->layout == BN_contiguous ? 1 : count;
        box.extent.inner = plan->layout == BN_contiguous ? count : 1;
        bn_sum_channels(job, box, MIN(staged_channels, channels_at_once(job, &box, 1)), *block, sum_box);
        block->count += count;
    }
}

static void sum_pieces(const bn_job *job, bn_box box, const bn_masked_chunk *chunk, int in_scratch, block_sums *block,
                       bn_sum_box *sum_box)
{
    piece_walk walk = pieces_of(job, chunk, box.extent);
    piece some;
    size_t gathered = 0;
    while (next_piece(&walk, &some)) {
        if (some.direct) {
            sum_box_as_it_lies(job, box_at(box, some.first, some.size), in_scratch, block, sum_box);
        } else {
            gathered += some.count;
        }
    }
    box.gathered = chunk;
    sum_gathered(job, box, gathered, block, sum_box);
}

static bn_sum_counted_box *counted_sum_of(const bn_job *job, const bn_box *box, const bn_masked_chunk *chunk,
                                          bn_sum_box *sum_box)
{
    const bn_stretch *stretch = job->mask.stretches + chunk->first_stretch, *end = stretch + chunk->stretches;
    size_t mixed = 0;
    for (; stretch < end; stretch++) {
        const size_t size = (size_t)(stretch->end - stretch->first);
        mixed += stretch->count > 0 && stretch->count < size ? size : 0;
    }
    if (job->plan->layout != BN_contiguous || job->scaled || box->extent.inner < SHORTEST_COUNTED_LINE ||
        chunk->count < FEWEST_COUNTED || mixed == 0 ||
        MOST_OF_COUNTED * chunk->count < box->extent.outer * box->extent.inner) {
        return NULL;
    }
    return sum_box == bn_moments_of_box        ? bn_counted_moments_of_box
           : sum_box == bn_gradient_sums_of_box ? bn_counted_gradient_sums_of_box
                                                : NULL;
}

static void sum_some(const bn_job *job, bn_box box, const bn_masked_chunk *chunk, int in_scratch, block_sums *block,
                     bn_sum_box *sum_box)
{
    bn_sum_counted_box *sum_counted = counted_sum_of(job, &box, chunk, sum_box);
    const size_t end = box.channel + box.extent.channels;
    const size_t at_once = MIN(channels_at_once(job, &box, in_scratch), BN_COUNTED_CHANNELS);
    if (!sum_counted) {
        sum_pieces(job, box, chunk, in_scratch, block, sum_box);
        return;
    }
    box.counts = job->mask.counts + box.outer * job->plan->inner + box.inner;
    for (; box.channel < end; box.channel += at_once) {
        box.extent.channels = MIN(at_once, end - box.channel);
        const uint64_t left_out = sum_counted(job, &box, *block, chunk->count);
        for (size_t c = 0; left_out >> c != 0 && c < box.extent.channels; c++) {
            if (left_out >> c & 1) {
                block_sums before = *block;
                bn_box one = box;
                one.channel += c;
                one.extent.channels = 1;
                one.counts = NULL;
                sum_pieces(job, one, chunk, in_scratch, &before, sum_box);
            }
        }
    }
    block->count += chunk->count;
}

void bn_sum_masked_block(const bn_job *job, size_t number, range channels, int in_scratch, bn_sum_box *sum_box)
{
    const range chunks = chunks_of_block(job->plan, number);
    block_sums block = {number, 0, channels.first};
    for (size_t i = chunks.first; i < chunks.first + chunks.count; i++) {
        const bn_box box = box_of_chunk(job->plan, i, channels);
        const bn_masked_chunk *chunk = job->mask.chunks + i;
        if (chunk->count == box.extent.outer * box.extent.inner) {
            sum_box_as_it_lies(job, box, in_scratch, &block, sum_box);
        } else if (chunk->count > 0) {
            sum_some(job, box, chunk, in_scratch, &block, sum_box);
        }
    }
}

/* outputs */

/* What the output has where values do not count: this input, or 0. */
static bn_role input_kept(const bn_job *job) { return job->operand[BN_DY] ? BN_DY : BN_X; }

static bn_view view_of_kept(const bn_job *job, const bn_box *box)
{
    return job->mask.keeps_input ? input_view(job, input_kept(job), box) : nothing;
}

/* Where a run of a box begins: of its inner, or of its channels. */
static void *run_at(const bn_plan *plan, bn_view view, size_t outer, size_t channel)
{
    const ptrdiff_t elements = (ptrdiff_t)outer * view.strides.outer + (ptrdiff_t)channel * view.strides.channel;
    return (char *)view.data + elements * (ptrdiff_t)plan->itemsize;
}

static void pad_run(void *to, const void *kept, size_t bytes)
{
    if (!kept) {
        memset(to, 0, bytes);
    } else if (kept != to) {
        memcpy(to, kept, bytes);
    }
}

static void pad(const bn_job *job, const bn_box *box, bn_role output, bn_view kept)
{
    const bn_plan *plan = job->plan;
    char *scratch = buffer_of(job, output);
    const bn_view to = bn_view_to_write(plan, output, job->operand[output], box, scratch);
    const int contiguous = plan->layout == BN_contiguous;
    size_t outer = box->extent.outer, runs = contiguous ? box->extent.channels : 1;
    size_t run = contiguous ? box->extent.inner : box->extent.channels;
    /* Zeros of runs that follow each other are written at once. */
    if (!kept.data && runs > 1 && to.strides.channel == (ptrdiff_t)run) {
        run *= runs;
        runs = 1;
    }
    if (!kept.data && runs == 1 && to.strides.outer == (ptrdiff_t)run) {
        run *= outer;
        outer = 1;
    }
    for (size_t o = 0; o < outer; o++) {
        for (size_t c = 0; c < runs; c++) {
            pad_run(run_at(plan, to, o, c), kept.data ? run_at(plan, kept, o, c) : NULL, run * plan->itemsize);
        }
    }
    bn_written(job->kernels, plan, output, job->operand[output], box, scratch, job->stores);
}

static void write_padding(const bn_job *job, const bn_box *box)
{
    pad(job, box, job->method.output->writes, view_of_kept(job, box));
    if (job->operand[BN_DRESIDUAL]) {
        pad(job, box, BN_DRESIDUAL, nothing);
    }
}

/* The three may be the same memory. */
#define MERGE(type)                                                                                        \
    static void merge_##type(type *to, const unsigned char *counts, const type *made, const type *kept,    \
                             size_t count)                                                                 \
    {                                                                                                      \
        if (kept) {                                                                                        \
            BN_SIMD                                                                                        \
            for (size_t i = 0; i < count; i++) {                                                           \
                const type value = made[i], padding = kept[i];                                             \
                to[i] = counts[i] ? value : padding;                                                       \
            }                                                                                              \
        } else {                                                                                           \
            BN_SIMD                                                                                        \
            for (size_t i = 0; i < count; i++) {                                                           \
                const type value = made[i];                                                                \
                to[i] = counts[i] ? value : 0;                                                             \
            }                                                                                              \
        }                                                                                                  \
    }
MERGE(float)
MERGE(double)

static void merge_run(const bn_plan *plan, void *to, const unsigned char *counts, const void *made, const void *kept,
                      size_t count)
{
    if (plan->dtype == BN_f32) {
        merge_float(to, counts, made, kept, count);
    } else {
        merge_double(to, counts, made, kept, count);
    }
}

static void merge(const bn_job *job, const bn_box *box, bn_role output, bn_view made, bn_view kept)
{
    const bn_plan *plan = job->plan;
    const bn_view to = bn_view_to_write(plan, output, job->operand[output], box, made.data);
    const bn_extent extent = box->extent;
    for (size_t o = 0; o < extent.outer; o++) {
        const unsigned char *counts = box->counts + o * plan->inner;
        if (plan->layout == BN_channels_last) {
            const void *run = *counts ? run_at(plan, made, o, 0) : kept.data ? run_at(plan, kept, o, 0) : NULL;
            pad_run(run_at(plan, to, o, 0), run, extent.channels * plan->itemsize);
            continue;
        }
        for (size_t c = 0; c < extent.channels; c++) {
            merge_run(plan, run_at(plan, to, o, c), counts, run_at(plan, made, o, c),
                      kept.data ? run_at(plan, kept, o, c) : NULL, extent.inner);
        }
    }
    bn_written(job->kernels, plan, output, job->operand[output], box, made.data, job->stores);
}

void bn_write_merged(const bn_job *job, const bn_box *box, bn_view made)
{
    merge(job, box, job->method.output->writes, made, view_of_kept(job, box));
    if (job->operand[BN_DRESIDUAL]) {
        merge(job, box, BN_DRESIDUAL, input_view(job, BN_DRESIDUAL, box), nothing);
    }
}

bn_view bn_padding_view(const bn_job *job, const bn_box *box)
{
    const bn_plan *plan = job->plan;
    char *numbers = job->mask.numbers + (box->outer * plan->inner + box->inner) * plan->itemsize;
    return (bn_view){numbers, {(ptrdiff_t)plan->inner, 0}};
}

/* Where some values count: as much at a time as scratch holds, unless the kernel asks of each position. */
static void write_some(const bn_job *job, const bn_box *box, size_t max_channels)
{
    const bn_plan *plan = job->plan;
    const int by_kernel = job->method.masked != NULL;
    const size_t most = job->scratch_bytes / plan->itemsize;
    const size_t inner = by_kernel ? box->extent.inner : MIN(box->extent.inner, most);
    const size_t channels = MIN(box->extent.channels, max_channels);
    const size_t at_once = by_kernel ? channels : MIN(channels, most / inner);
    const size_t outer = by_kernel ? box->extent.outer : MIN(box->extent.outer, most / inner / at_once);
    bn_box part = *box;
    for (size_t o = 0; o < box->extent.outer; o += outer) {
        for (size_t i = 0; i < box->extent.inner; i += inner) {
            part.outer = box->outer + o;
            part.inner = box->inner + i;
            part.extent.outer = MIN(outer, box->extent.outer - o);
            part.extent.inner = MIN(inner, box->extent.inner - i);
            part.counts = job->mask.counts + part.outer * plan->inner + part.inner;
            bn_write_parts(job, &part, at_once, bn_write_values);
        }
    }
}

/* What positions are alike in. */
typedef enum { NONE_COUNTS, ALL_COUNT, SOME_COUNT } likeness;

/* Of a stretch for so many channels: one of few bytes is not worth a kernel call of its own. */
#define FEWEST_BYTES_ALIKE ((size_t)8192)

static likeness likeness_of(const bn_plan *plan, bn_stretch stretch, size_t channels)
{
    const size_t size = (size_t)(stretch.end - stretch.first);
    if ((stretch.count > 0 && stretch.count < size) || size * channels * plan->itemsize < FEWEST_BYTES_ALIKE) {
        return SOME_COUNT;
    }
    return stretch.count == 0 ? NONE_COUNTS : ALL_COUNT;
}

static void write_alike(const bn_job *job, const bn_box *box, likeness like, size_t max_channels)
{
    if (like == SOME_COUNT) {
        write_some(job, box, max_channels);
    } else {
        bn_write_parts(job, box, max_channels, like == ALL_COUNT ? bn_write_values : write_padding);
    }
}

/* A part of a line, whole lines, a part of a line. */
static void write_lines(const bn_job *job, bn_box box, range positions, likeness like, size_t max_channels)
{
    const size_t line = job->plan->inner;
    for (size_t left = positions.count, at = positions.first, done; left > 0; left -= done, at += done) {
        done = part_of_lines(at, left, line);
        box.outer = at / line;
        box.inner = at % line;
        box.extent.outer = MAX(done / line, (size_t)1);
        box.extent.inner = MIN(done, line);
        write_alike(job, &box, like, max_channels);
    }
}

/* Neighbouring positions of a box, in the order of the walk: stretches that are alike together. */
static void write_positions(const bn_job *job, bn_box box, range positions, size_t max_channels)
{
    const size_t end = positions.first + positions.count;
    range alike = {positions.first, 0};
    likeness like = NONE_COUNTS;
    for (size_t number = chunk_at(job->plan, &box); alike.first + alike.count < end; number++) {
        const bn_masked_chunk *chunk = job->mask.chunks + number;
        const bn_stretch *stretch = job->mask.stretches + chunk->first_stretch;
        const size_t base = first_of_chunk(job->plan, number);
        for (size_t i = 0; i < chunk->stretches; i++, stretch++) {
            const size_t at = alike.first + alike.count, next = MIN(base + stretch->end, end);
            if (next <= at) {
                continue;
            }
            const likeness next_like = likeness_of(job->plan, *stretch, box.extent.channels);
            if (alike.count > 0 && next_like != like) {
                write_lines(job, box, alike, like, max_channels);
                alike = (range){at, 0};
            }
            like = next_like;
            alike.count = next - alike.first;
        }
    }
    write_lines(job, box, alike, like, max_channels);
}

void bn_write_masked(const bn_job *job, const bn_box *box, size_t max_channels)
{
    const size_t line = job->plan->inner, length = box->extent.inner;
    const size_t lines_at_once = length == line ? box->extent.outer : 1;
    bn_box part = *box;
    for (; part.outer < box->outer + box->extent.outer; part.outer += lines_at_once) {
        const range positions = {part.outer * line + part.inner, lines_at_once * length};
        write_positions(job, part, positions, max_channels);
    }
}
