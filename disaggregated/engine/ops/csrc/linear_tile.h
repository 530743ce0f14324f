/* A tile of a linear: some rows times some strips of outputs, over a block of the depth. Shared by the files linear*.c.

   A strip is the weights of LANES outputs: a head of one vector (float32: biases) or two (int8: scales, biases), then a
   vector of weights for each word of the depth. A word is 32 bits of a row of x: one float, or WORD_VALUES bytes. Strips
   of narrow kinds (linear_narrow.h) become vectors of float32 first. */

#pragma once

#include "interleave.h"
#include "linear_narrow.h"
#include "quantize.h"

#define STRIPS_OF_PANEL MAX_VECTORS
/* Few rows leave registers for twice as many strips. */
#define FEW_ROWS (MAX_ROWS / 2)
#if FEW_ROWS == 4
#define FEW_ROWS_CASES(X) X(1) X(2) X(3) X(4)
#else
#define FEW_ROWS_CASES(X) X(1) X(2)
#endif

typedef struct {
    int64_t kind;
    int rows, strips;       /* at most MAX_ROWS × STRIPS_OF_PANEL, or FEW_ROWS × twice as many */
    bool is_first, is_last; /* block of the depth */
    int64_t num_words;      /* of the block */
    const any_word *x;      /* interleaved rows */
    const quantized_row *quantized; /* int8: one for each row */
    const uint8_t *head;            /* of the first strip */
    const uint8_t *weights;         /* of the first strip, at the block's first word */
    int64_t strip_bytes;            /* from one head to the next */
    int64_t weights_stride;         /* from one strip's weights to the next one's */
    const uint8_t *next;     /* weights that will be needed next, strips strip_bytes apart; this tile fetches */
    int64_t num_vectors_ahead; /* so many of each strip */
    bool has_few_mates;        /* one vector for each word of the block is not enough */
    float *sums;             /* where sums wait between two blocks of the depth: rows × strips × LANES */
    float *to;
    int64_t to_stride, num_columns; /* floats of a row, and how many of them, from `to` on, exist */
} strip_tile;

INLINE int64_t head_bytes(int64_t kind) { return kind == LINEAR_INT8 ? 2 * VECTOR_BYTES : VECTOR_BYTES; }
INLINE int64_t word_bytes(int64_t kind) { return kind == LINEAR_INT8 ? VECTOR_WEIGHT_BYTES : VECTOR_BYTES; }
INLINE int64_t num_words(int64_t kind, int64_t depth) { return kind == LINEAR_INT8 ? words_of(depth) : depth; }
/* Of the weights of so many words; of a narrow kind, whole groups. */
INLINE int64_t weights_bytes(int64_t kind, int64_t words)
{
    return is_narrow(kind) ? words / GROUP * group_bytes(kind) : words * word_bytes(kind);
}
INLINE int64_t strip_bytes(int64_t kind, int64_t depth)
{
    return head_bytes(kind) + weights_bytes(kind, num_words(kind, depth));
}
/* The last panel is filled up with strips of zeros. */
INLINE int64_t num_panels(int64_t num_columns) { return (num_columns + PANEL - 1) / PANEL; }

void multiply_tile(const strip_tile *tile);

/* One row of x times narrow strips, over the whole depth; a tile needs so much less to be told of. */
typedef struct {
    const float *x;
    const uint8_t *head; /* of the first strip */
    int64_t strip_bytes, num_words;
    float *to;
    int64_t num_columns; /* how many from `to` on exist */
} row_of_strips;

void multiply_one_row(int64_t kind, int64_t panels, const row_of_strips *row);
