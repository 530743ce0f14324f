/* The inner kernel of linear: a tile of outputs, kept in registers over a block of the depth.

   Each output lives in one lane of one register and takes its products in the order of k, whatever the size of the tile
   or its place in it. A sum may be put down in memory and taken up again later, which changes no bit. So a row's result
   depends on the row alone. (In int8 the sums are integers, and the order could not matter.) */

#include "linear_tile.h"

typedef struct {
    vec sums[MAX_ROWS * STRIPS_OF_PANEL]; /* int8: the same bits are integers */
} registers;

/* Everything called `fixed` is a compile-time constant once inlined. */
INLINE vec start_of(const int fixed_kind, const strip_tile *t, int row, int strip)
{
    if (fixed_kind == LINEAR_FLOAT32)
        return load((const float *)(t->head + strip * t->strip_bytes));
    return (vec)((vec_int){0} - WEIGHT_OFFSET * t->quantized[row].sum);
}

INLINE vec weights_at(const int fixed_kind, const uint8_t *from)
{
    return fixed_kind == LINEAR_FLOAT32 ? load((const float *)from) : (vec)load_weights(from);
}

INLINE vec multiply_add(const int fixed_kind, vec sum, vec weights, const any_word *x)
{
    if (fixed_kind == LINEAR_FLOAT32)
        return sum + *(const any_float *)x * weights;
    return (vec)multiply_word((vec_int)sum, (vec_int)weights, *x);
}

/* Sums of bytes as what they stand for. Both products are rounded, so that no compiler contracts the sum. */
INLINE vec result_of(const int fixed_kind, const strip_tile *t, int row, int strip, vec sums)
{
    if (fixed_kind == LINEAR_FLOAT32)
        return sums;
    const float *scales = (const float *)(t->head + strip * t->strip_bytes);
    vec scale = rounded(t->quantized[row].scale * load(scales));
    return rounded(__builtin_convertvector((vec_int)sums, vec) * scale) + load(scales + LANES);
}

enum { AHEAD_NONE, AHEAD_ONE_STRIP, AHEAD_ALL_STRIPS };

/* Words [begin, end) of the block. With each, the next weights of one strip (they take turns), or of all, are fetched. */
INLINE registers multiply_words(const int fixed_kind, const int fixed_rows, const int fixed_strips,
                                const int fixed_ahead, const strip_tile *t, int64_t begin, int64_t end, registers r)
{
    const int64_t bytes = word_bytes(fixed_kind);
    const int64_t stride = t->weights_stride, next_stride = t->strip_bytes;
    const uint8_t *weights = t->weights + begin * bytes, *next = t->next;
    const any_word *x = t->x + begin * fixed_rows;
    int64_t turn = 0;
    for (int64_t word = begin; word < end; word++) {
        vec w[2 * STRIPS_OF_PANEL];
        UNROLL for (int s = 0; s < fixed_strips; s++) {
            w[s] = weights_at(fixed_kind, weights + s * stride);
            if (fixed_ahead == AHEAD_ALL_STRIPS)
                __builtin_prefetch(next + s * next_stride);
        }
        if (fixed_ahead == AHEAD_ONE_STRIP) {
            __builtin_prefetch(next + turn);
            turn += next_stride;
            bool is_last = turn == fixed_strips * next_stride;
            turn = is_last ? 0 : turn;
            next += is_last ? VECTOR_BYTES : 0;
        }
        if (fixed_ahead == AHEAD_ALL_STRIPS)
            next += VECTOR_BYTES;
        UNROLL for (int row = 0; row < fixed_rows; row++)
            UNROLL for (int s = 0; s < fixed_strips; s++)
                r.sums[row * fixed_strips + s] =
                    multiply_add(fixed_kind, r.sums[row * fixed_strips + s], w[s], x + row);
        weights += bytes;
        x += fixed_rows;
    }
    return r;
}

/* The whole block. A tile with few mates fetches for all strips at a time, to be done with its share in time. */
INLINE registers multiply_block(const int fixed_kind, const int fixed_rows, const int fixed_strips,
                                const strip_tile *t, registers r)
{
    int64_t fetching = smaller(t->num_words, t->num_vectors_ahead * (t->has_few_mates ? 1 : fixed_strips));
    if (t->has_few_mates)
        r = multiply_words(fixed_kind, fixed_rows, fixed_strips, AHEAD_ALL_STRIPS, t, 0, fetching, r);
    else
        r = multiply_words(fixed_kind, fixed_rows, fixed_strips, AHEAD_ONE_STRIP, t, 0, fetching, r);
    return multiply_words(fixed_kind, fixed_rows, fixed_strips, AHEAD_NONE, t, fetching, t->num_words, r);
}

INLINE void multiply_fixed_tile(const int fixed_kind, const int fixed_rows, const int fixed_strips, const strip_tile *t)
{
    registers r;
    UNROLL for (int row = 0; row < fixed_rows; row++)
        UNROLL for (int s = 0; s < fixed_strips; s++) {
            int i = row * fixed_strips + s;
            r.sums[i] = t->is_first ? start_of(fixed_kind, t, row, s) : load(t->sums + i * LANES);
            if (t->is_last) /* By the time it is written, the output is in the cache. */
                __builtin_prefetch(t->to + row * t->to_stride + s * LANES, 1);
        }
    r = multiply_block(fixed_kind, fixed_rows, fixed_strips, t, r);
    UNROLL for (int row = 0; row < fixed_rows; row++)
        UNROLL for (int s = 0; s < fixed_strips; s++) {
            int i = row * fixed_strips + s;
            if (!t->is_last)
                store(t->sums + i * LANES, r.sums[i]);
            else if (t->num_columns > s * LANES)
                store_some(t->to + row * t->to_stride + s * LANES, result_of(fixed_kind, t, row, s, r.sums[i]),
                           t->num_columns - s * LANES);
        }
}

#define CASE(kind, rows, strips) \
    case rows: \
        multiply_fixed_tile(kind, rows, strips, tile); \
        return;

void multiply_tile(const strip_tile *tile)
{
#define FLOATS(rows) CASE(LINEAR_FLOAT32, rows, STRIPS_OF_PANEL)
#define FLOATS_WIDE(rows) CASE(LINEAR_FLOAT32, rows, 2 * STRIPS_OF_PANEL)
#define BYTES(rows) CASE(LINEAR_INT8, rows, STRIPS_OF_PANEL)
#define BYTES_WIDE(rows) CASE(LINEAR_INT8, rows, 2 * STRIPS_OF_PANEL)
    bool is_wide = tile->strips > STRIPS_OF_PANEL;
    if (tile->kind == LINEAR_FLOAT32 && is_wide)
        switch (tile->rows) { FEW_ROWS_CASES(FLOATS_WIDE) }
    else if (tile->kind == LINEAR_FLOAT32)
        switch (tile->rows) { TILE_CASES(FLOATS) }
    else if (is_wide)
        switch (tile->rows) { FEW_ROWS_CASES(BYTES_WIDE) }
    else
        switch (tile->rows) { TILE_CASES(BYTES) }
}
