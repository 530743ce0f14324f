/* A weight as linear() reads it, whatever its precision; see linear.c. */

#pragma once

#include "threads.h"

enum { LINEAR_FLOAT32 = 0, LINEAR_INT8 = 1 };

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
