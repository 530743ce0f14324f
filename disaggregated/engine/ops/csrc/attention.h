/* Paged attention as attention.c offers it to ops and to whole steps. */

#pragma once

#include "kv.h"
#include "threads.h"

/* Where the tokens of a step lie; mirrored by BatchPlaces in native_kv.py. */
typedef struct {
    const int32_t *query_start;    /* (num_rows + 1): row r's tokens are [query_start[r], query_start[r + 1]) */
    const int32_t *first_position; /* (num_rows) */
    const int32_t *block_tables;   /* (num_rows, table_stride) */
    int64_t num_rows, table_stride, num_tokens;
} batch_places;

/* Mirrored by AttentionNumbers in native_kv.py. */
typedef struct {
    int64_t num_heads;
    int64_t window; /* a token sees so many last tokens, itself among them; 0: all */
    float scale;
    float softcap; /* scores become softcap · tanh(score / softcap); 0: they don't */
} attention_numbers;

/* -1, or the first row whose tokens do not lie within the step, or its sequence within the table and the pool. */
int64_t first_unsound_row(const batch_places *places, const kv_pool *pool);

/* q (T, N, D), tokens q_stride floats apart → `to` (T, N, D), contiguous. Every row must be sound. */
void attend(team *team, const float *q, int64_t q_stride, const kv_pool *pool, const batch_places *places,
            const attention_numbers *numbers, float *to);
