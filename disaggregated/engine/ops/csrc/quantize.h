/* Numbers as signed bytes and one scale a row. See rotate.c and quantize.c. */

#pragma once

#include "int8.h"

typedef struct {
    float scale;     /* x ≈ scale * value */
    int32_t sum;     /* of the values */
} quantized_row;

/* `depth` numbers of x → values, padded with zeros to whole words. */
quantized_row quantize_row(const float *x, int64_t depth, x_value *to);

/* Numbers that are rotated together: the largest power of two that divides the depth, up to a maximum. */
int64_t rotation_block(int64_t depth);

/* `depth` numbers of x → as many of their Walsh-Hadamard transform, not normalised. */
void rotate_row(const float *x, int64_t depth, float *to);
