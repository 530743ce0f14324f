/* The two products of attention, scores = queries · keys and result += probabilities · values.

   In both, an output takes its products one after the other: a score in the order of head_dim, a result in the order of
   keys. A few queries multiply keys that are transposed in registers; many share keys that are transposed into a panel
   once. Both are the same chains of multiply-adds. */

#pragma once

#include "tile.h"

#define VALUE_VECTORS 4
#if MAX_ROWS == 8
#define VALUE_ROWS 6
#define VALUE_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define VALUE_ROWS 2
#define VALUE_CASES(X) X(1) X(2)
#endif

/* LANES keys, `stride` floats apart → their numbers [d, d + LANES), transposed: lane i of part[j] is number d + j of
   key i. The same place in what is read `ahead` bytes further on is fetched. (Four addresses and three distances are as
   much as an addressing mode can make of registers; left to itself, GCC keeps all LANES addresses, most on the stack.) */
INLINE void transpose_keys(const float *keys, int64_t stride, int64_t ahead, vec part[LANES])
{
    UNROLL for (int i = 0; i < LANES; i += 4) {
        const float *four = keys + i * stride, *far = (const float *)(const void *)((const char *)four + ahead);
        UNROLL for (int j = 0; j < 4; j++) {
            part[i + j] = load(four + j * stride);
            __builtin_prefetch(far + j * stride);
        }
    }
    zip_rows(LANES, LANES_LOG2, part);
}

typedef struct {
    const float *queries; /* interleaved, [d][row] */
    const float *keys;    /* LANES of them, head_dim floats apart */
    int64_t head_dim, ahead;
    float *scores; /* rows score_stride floats apart */
    int64_t score_stride;
} score_tile;

INLINE void score_fixed(const int rows, score_tile t)
{
    vec sums[MAX_ROWS];
    UNROLL for (int r = 0; r < rows; r++)
        sums[r] = (vec){0};
    for (int64_t d = 0; d < t.head_dim; d += LANES) {
        vec part[LANES];
        transpose_keys(t.keys + d, t.head_dim, t.ahead, part);
        UNROLL for (int i = 0; i < LANES; i++)
            UNROLL for (int r = 0; r < rows; r++)
                sums[r] = sums[r] + t.queries[(d + i) * rows + r] * part[i];
    }
    UNROLL for (int r = 0; r < rows; r++)
        store(t.scores + r * t.score_stride, sums[r]);
}

/* Scores of up to MAX_ROWS queries with LANES keys. */
static void score_keys(int rows, const score_tile *t)
{
#define SCORE_CASE(n) \
    case n: \
        score_fixed(n, *t); \
        break;
    switch (rows) { TILE_CASES(SCORE_CASE) }
#undef SCORE_CASE
}

typedef struct {
    const float *probabilities; /* rows probability_stride floats apart */
    int64_t probability_stride;
    const float *values; /* `count` of them, head_dim floats apart */
    int64_t head_dim, count;
    int64_t ahead; /* bytes from a value to what should be fetched beside it; 0: nothing */
    float *result; /* (rows, head_dim) */
} value_tile;

INLINE void add_values_fixed(const int rows, const int vectors, const bool fetches, value_tile t)
{
    vec sums[VALUE_ROWS][VALUE_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[r][v] = load(t.result + r * t.head_dim + v * LANES);
    for (int64_t key = 0; key < t.count; key++) {
        vec value[VALUE_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) {
            value[v] = load(t.values + v * LANES);
            if (fetches)
                __builtin_prefetch((const char *)(t.values + v * LANES) + t.ahead);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            float probability = t.probabilities[r * t.probability_stride + key];
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = sums[r][v] + probability * value[v];
        }
        t.values += t.head_dim;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            store(t.result + r * t.head_dim + v * LANES, sums[r][v]);
}

/* What prefill spends most of its attention in. In a function of its own, because beside the others GCC does not leave
   the sums in their registers. */
static __attribute__((noinline)) void add_most_values(const value_tile *t)
{
    add_values_fixed(VALUE_ROWS, VALUE_VECTORS, false, *t);
}

/* result += probabilities · values of up to VALUE_ROWS rows. */
static void add_value_rows(int rows, const value_tile *whole)
{
    value_tile t = *whole;
#define WIDE_CASE(n) \
    case n: \
        add_values_fixed(n, VALUE_VECTORS, true, t); \
        break;
#define NARROW_CASE(n) \
    case n: \
        add_values_fixed(n, 1, true, t); \
        break;
    for (int64_t vectors, left = t.head_dim / LANES; left > 0; left -= vectors) {
        vectors = left >= VALUE_VECTORS ? VALUE_VECTORS : 1;
        if (vectors == VALUE_VECTORS && rows == VALUE_ROWS && t.ahead == 0)
            add_most_values(&t);
        else if (vectors == VALUE_VECTORS)
            switch (rows) { VALUE_CASES(WIDE_CASE) }
        else
            switch (rows) { VALUE_CASES(NARROW_CASE) }
        t.values += vectors * LANES;
        t.result += vectors * LANES;
    }
#undef WIDE_CASE
#undef NARROW_CASE
}
