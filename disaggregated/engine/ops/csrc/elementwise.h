/* What the ops of elementwise.c and kv.c offer to a whole step in one call; see step.c. */

#pragma once

#include "kv.h"
#include "threads.h"

/* The first of `indices` that is not in [0, end), or -1. */
int64_t first_outside(const int64_t *indices, int64_t count, int64_t end);

void rms_norm(team *team, const float *x, int64_t stride, int64_t num_tokens, int64_t rows_of_token, int64_t width,
              const float *weight, float epsilon, float *to);

/* One row; `to` may be x. */
void rms_norm_row(const float *x, int64_t width, const float *weight, float epsilon, float *to);

void silu_mul(team *team, const float *gate_up, int64_t num_tokens, int64_t width, float *to);
void gelu_mul(team *team, const float *gate_up, int64_t num_tokens, int64_t width, float *to);

/* x (heads, 2 · half) in place; cos and sin are of the token's position. */
void rope_token(float *x, int64_t num_heads, int64_t half, const float *cos, const float *sin);

/* One token's keys and values, (kv heads, head_dim) each, into a slot of the pool. */
void kv_store_token(const kv_pool *pool, const float *key, const float *value, int64_t slot);
