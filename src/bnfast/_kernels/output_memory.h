/* The memory of outputs: it begins at a cache line, and that of large ones is kept for the next ones. */
#ifndef BN_OUTPUT_MEMORY_H
#define BN_OUTPUT_MEMORY_H

#include <stddef.h>

/* Memory for so many bytes, NULL if there is none; and its return. */
void *bn_take_output(size_t bytes);
void bn_return_output(void *memory);

/* The same in the terms of an allocator, as NumPy's arrays want it (NEP 49). */
void *bn_output_malloc(void *context, size_t bytes);
void *bn_output_calloc(void *context, size_t count, size_t size);
void *bn_output_realloc(void *context, void *memory, size_t bytes);
void bn_output_free(void *context, void *memory, size_t bytes);

/* And for outputs of any size, whose memory is not kept. */
void *bn_line_malloc(void *context, size_t bytes);
void *bn_line_calloc(void *context, size_t count, size_t size);
void *bn_line_realloc(void *context, void *memory, size_t bytes);
void bn_line_free(void *context, void *memory, size_t bytes);

/* At most so many bytes are kept from now on; what is beyond that goes back to the system. */
void bn_limit_output_pool(size_t bytes);
size_t bn_output_pool_bytes(void); /* kept now */

#endif
