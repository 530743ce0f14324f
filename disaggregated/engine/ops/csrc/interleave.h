/* Rows of 32-bit words, interleaved, so that a product reads what it needs of several rows from one place. */

#pragma once

#include "tile.h"

typedef int32_t any_word __attribute__((may_alias));
typedef float any_float __attribute__((may_alias));

/* `rows` rows, `depth` words each: word k of row r goes to `to[k * rows + r]`. */
INLINE void interleave(const void *from, int rows, int64_t depth, void *to)
{
    const any_word *x = from;
    any_word *packed = to;
    int64_t k = 0;
    for (; rows == MAX_ROWS && k + LANES <= depth; k += LANES) {
        vec part[MAX_ROWS];
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            part[r] = load((const float *)(x + r * depth + k));
        zip_rows(MAX_ROWS, MAX_ROWS_LOG2, part);
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            store((float *)(packed + k * MAX_ROWS + r * LANES), part[r]);
    }
    for (; k < depth; k++)
        for (int r = 0; r < rows; r++)
            packed[k * rows + r] = x[r * depth + k];
}
