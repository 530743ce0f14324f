/* The fast Walsh-Hadamard transform of blocks of a row: sums and differences at distances 1, 2, 4 …

   It spreads a number that is far larger than its neighbours over its block, so that one scale serves them all once they
   are bytes, and both sides of a product may go through it: (H x) · (H w) = n x · w for blocks of n (Ashkboos et al.,
   QuaRot, 2024). Every sum is rounded, in this order, and involves two numbers: a vector of any width, and torch, give
   the same bits. */

#include "quantize.h"

#define ROTATION_BLOCK_MAX 512

int64_t rotation_block(int64_t depth)
{
    return smaller(depth & -depth, ROTATION_BLOCK_MAX);
}

#if LANES == 16
#define EACH_LANE(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h), F(8, h), F(9, h), \
    F(10, h), F(11, h), F(12, h), F(13, h), F(14, h), F(15, h)
#elif LANES == 8
#define EACH_LANE(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h)
#else
#define EACH_LANE(F, h) F(0, h), F(1, h), F(2, h), F(3, h)
#endif
#define PARTNER(lane, h) ((lane) ^ (h))
#define SIGN_OF_SECOND(lane, h) ((lane) & (h) ? INT32_MIN : 0)

/* Lane i and lane i + h, where bit h of i is 0, become their sum and their difference. */
#define BUTTERFLY(x, h) \
    (SHUFFLE(x, x, EACH_LANE(PARTNER, h)) + (vec)((vec_int)(x) ^ (vec_int){EACH_LANE(SIGN_OF_SECOND, h)}))

INLINE vec rotate_lanes(vec x, int64_t block)
{
    if (block > 1)
        x = BUTTERFLY(x, 1);
    if (block > 2)
        x = BUTTERFLY(x, 2);
#if LANES > 4
    if (block > 4)
        x = BUTTERFLY(x, 4);
#endif
#if LANES > 8
    if (block > 8)
        x = BUTTERFLY(x, 8);
#endif
    return x;
}

/* Distances h and 2 h of 4 h numbers. */
INLINE void rotate_quarters(float *x, int64_t h)
{
    for (int64_t i = 0; i < h; i += LANES) {
        vec a = load(x + i), b = load(x + h + i), c = load(x + 2 * h + i), d = load(x + 3 * h + i);
        vec first_sum = a + b, first_difference = a - b, second_sum = c + d, second_difference = c - d;
        store(x + i, first_sum + second_sum);
        store(x + h + i, first_difference + second_difference);
        store(x + 2 * h + i, first_sum - second_sum);
        store(x + 3 * h + i, first_difference - second_difference);
    }
}

/* Distance h of 2 h numbers. */
INLINE void rotate_halves(float *x, int64_t h)
{
    for (int64_t i = 0; i < h; i += LANES) {
        vec a = load(x + i), b = load(x + h + i);
        store(x + i, a + b);
        store(x + h + i, a - b);
    }
}

void rotate_row(const float *x, int64_t depth, float *to)
{
    int64_t block = rotation_block(depth), i = 0;
    if (block >= LANES)
        for (; i < depth; i += LANES)
            store(to + i, rotate_lanes(load(x + i), LANES));
    for (; i < depth; i += LANES)
        store_some(to + i, rotate_lanes(load_some(x + i, depth - i), block), depth - i);
    for (float *begin = to; begin < to + depth; begin += block) {
        int64_t h = LANES;
        for (; 4 * h <= block; h *= 4)
            for (int64_t j = 0; j < block; j += 4 * h)
                rotate_quarters(begin + j, h);
        for (int64_t j = 0; 2 * h <= block && j < block; j += 2 * h)
            rotate_halves(begin + j, h);
    }
}
