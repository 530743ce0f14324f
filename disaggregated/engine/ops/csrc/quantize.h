/* Numbers as signed bytes and one scale a row. See quantize.c. */

#pragma once

#include "int8.h"

typedef struct {
    float scale;     /* x ≈ scale * value */
    int32_t sum;     /* of the values */
} quantized_row;

/* `depth` numbers of x → values, padded with zeros to whole words. */
quantized_row quantize_row(const float *x, int64_t depth, x_value *to);
