/* A weight as linear() reads it, whatever its precision; see linear.c, and linear_narrow.h for the narrow kinds. */

#pragma once

#include "threads.h"

enum {
    LINEAR_FLOAT32 = 0,
    LINEAR_INT8 = 1, /* multiplied in integers; the rest is in float32 */
    LINEAR_FLOAT16 = 2,
    LINEAR_BFLOAT16 = 3,
    LINEAR_BYTES = 4,               /* -128 … 127, times a scale of float16 */
    LINEAR_NIBBLES = 5,             /* -8 … 7, times a scale */
    LINEAR_NIBBLES_AND_MINIMUM = 6, /* 0 … 15, times a scale, plus a minimum of float16 */
};

/* The packed weight of a product (M, K); mirrored by LinearWeight in native_linear.py. */
typedef struct {
    int64_t kind;        /* LINEAR_… */
    int64_t num_columns; /* M, features out */
    int64_t depth;       /* K, features in */
    const void *panels;  /* what linear_pack() made, bias included; owned by Python */
} linear_weight;

/* (T, M) = x (T, K) · weightᵀ + bias. Uses the team's threads and all its scratch memory: the caller keeps nothing
   there. */
void linear(team *team, const linear_weight *weight, const float *x, int64_t num_rows, float *to);
