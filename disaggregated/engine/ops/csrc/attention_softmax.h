/* The softmax of attention.c, which goes along the tiles with a row's largest score and its sum so far.

   Scores are to the base 2: they come multiplied by log2 e, because 2^x takes a third fewer instructions than e^x. */

#pragma once

#include "attention_unit.h"

typedef struct {
    int64_t begin, end;
} span;

/* Scores of one row, made of whole numbers, times the scales of their keys. */
static void scale_scores(const attention_unit *unit, float *scores, int64_t begin, int64_t end)
{
    for (int64_t key = begin; key < end; key += LANES)
        store(scores + key, load(scores + key) * load(unit->key_scales + key));
}

/* tanh x = 1 - 2 / (e^2x + 1): its error is small against 1, not against x, which is what a score needs. The scores come
   to the base e and leave to the base 2. */
static void cap_scores(float softcap, float *scores, int64_t begin, int64_t end)
{
    float inverse = 1.0f / softcap, most = softcap * LOG2_E;
    for (int64_t key = begin; key < end; key += LANES) {
        vec power = exponential(load(scores + key) * inverse * 2.0f);
        store(scores + key, most * (1.0f - 2.0f / (power + 1.0f)));
    }
}

/* Masks of one row's scores what it does not see, and brings what was summed before to the measure of the largest
   score so far. `padded` goes from where a partial sum begins to
   where one ends. */
static void find_maximum(const attention_unit *unit, int64_t row, span seen, span padded)
{
    const attention_job *job = unit->job;
    float *scores = unit->scores + row * TILE_KEYS, *result = unit->result + row * job->pool->head_dim;
    if (job->pool->kind == KV_INT8)
        scale_scores(unit, scores, padded.begin, padded.end);
    if (job->numbers->softcap > 0)
        cap_scores(job->numbers->softcap, scores, padded.begin, padded.end);
    for (int64_t key = padded.begin; key < seen.begin; key++)
        scores[key] = -INFINITY;
    for (int64_t key = seen.end; key < padded.end; key++)
        scores[key] = -INFINITY;
    vec largest = load(scores + padded.begin);
    for (int64_t key = padded.begin + LANES; key < padded.end; key += LANES)
        largest = larger(load(scores + key), largest);
    float before = unit->maximum[row], maximum = largest_of(largest);
    if (!(maximum > before))
        return;
    float factor = power_of_two(broadcast(before - maximum))[0];
    unit->maximum[row] = maximum;
    unit->sum[row] = unit->sum[row] * factor;
    for (int64_t d = 0; d < job->pool->head_dim; d += LANES)
        store(result + d, load(result + d) * factor);
}

/* Scores of one row → probabilities relative to the largest score so far; masked ones are 0. */
static void make_probabilities(const attention_unit *unit, int64_t row, span padded)
{
    float *scores = unit->scores + row * TILE_KEYS, maximum = unit->maximum[row];
    vec sums[PARTIAL_SUMS / LANES] = {0};
    for (int64_t key = padded.begin; key < padded.end; key += PARTIAL_SUMS)
        for (int v = 0; v < PARTIAL_SUMS / LANES; v++) {
            vec probability = power_of_two(load(scores + key + v * LANES) - maximum);
            store(scores + key + v * LANES, probability);
            sums[v] = sums[v] + probability;
        }
    unit->sum[row] += sum_of(sums);
    if (unit->job->pool->kind == KV_INT8)
        for (int64_t key = padded.begin; key < padded.end; key += LANES)
            store(scores + key, load(scores + key) * load(unit->value_scales + key));
}

/* Softmax so far of rows that all see the same keys of the tile. */
static void soften(const attention_unit *unit, int64_t first_row, int64_t num_rows, span seen)
{
    span padded = {seen.begin / PARTIAL_SUMS * PARTIAL_SUMS,
                   (seen.end + PARTIAL_SUMS - 1) / PARTIAL_SUMS * PARTIAL_SUMS};
    for (int64_t row = first_row; row < first_row + num_rows; row++)
        find_maximum(unit, row, seen, padded);
    for (int64_t row = first_row; row < first_row + num_rows; row++)
        make_probabilities(unit, row, padded);
}
