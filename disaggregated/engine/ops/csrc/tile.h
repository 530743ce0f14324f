/* The one inner kernel: a tile of `rows` × `vectors` vectors of output, kept in registers over the whole depth.

       to[r][c] = from[r][c] + sum over k, one after the other, of a[r][k] * b[k][c]

   Each output lives in one lane of one register and takes its products in the order of k, whatever the size of the tile
   or the place in it. A sum may be put down in memory and taken up again later, which changes no bit. All
   row invariance of attention stands on this; linear_tile.c is made in the same way. */

#pragma once

#include "vector.h"

/* Three vectors of outputs a row, and as many rows as the registers hold beside three vectors of b and one of a. */
#define MAX_VECTORS 3
#define PANEL (MAX_VECTORS * LANES)
#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define MAX_ROWS 8
#define MAX_ROWS_LOG2 3
#else
#define MAX_ROWS 4
#define MAX_ROWS_LOG2 2
#endif

typedef struct {
    const float *a; /* rows interleaved: a[k * rows + r] */
    const float *b; /* in a cache */
    int64_t b_stride; /* floats from one k to the next */
    int64_t depth;
    const float *from;
    int64_t from_stride; /* floats from one row to the next; 0: the same start for every row, e.g. a bias */
    float *to;
    int64_t to_stride;
} tile;

/* `rows` and `vectors` are compile-time constants once inlined. */
INLINE void multiply_fixed(const int rows, const int vectors, tile t)
{
    vec sums[MAX_ROWS][MAX_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[r][v] = load(t.from + r * t.from_stride + v * LANES);
    for (int64_t k = 0; k < t.depth; k++) {
        vec b[MAX_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            b[v] = load(t.b + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            float a = t.a[r];
            UNROLL for (int v = 0; v < vectors; v++)
                sums[r][v] = sums[r][v] + a * b[v];
        }
        t.a += rows;
        t.b += t.b_stride;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            store(t.to + r * t.to_stride + v * LANES, sums[r][v]);
}

#if MAX_ROWS == 8
#define TILE_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#else
#define TILE_CASES(X) X(1) X(2) X(3) X(4)
#endif

/* Rows of `a` interleaved, `a[k * rows + r]`, times a panel: how attention packs its queries. (By pointer: a structure
   that was just filled field by field would be copied in vectors, and each of those waits for all the fields.) */
static void multiply_interleaved(int rows, const tile *t)
{
#define TILE_CASE(n) \
    case n: \
        multiply_fixed(n, MAX_VECTORS, *t); \
        break;
    switch (rows) { TILE_CASES(TILE_CASE) }
#undef TILE_CASE
}
