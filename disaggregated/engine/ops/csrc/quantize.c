/* Symmetric quantisation of a row, a token's activations or an output's weights, to integers of -127 … 127:

       scale = largest / 127        value = x · (127 / largest), rounded to the nearest, halves to even

   where `largest` is the row's largest absolute value, so a row depends on itself alone. Each operation is rounded to
   float32, none is contracted: a vector of any width, and torch, give the same bits.

   A row whose largest is 0, or too small for its inverse to be a float, is all zeros with scale 0. A row that contains
   an infinity or a NaN has the scale NaN and values 0, so that all it is used for becomes NaN, as it does in float32. */

#include "quantize.h"

#define SMALLEST_LARGEST 1e-36f /* 127 / SMALLEST_LARGEST is still finite */

/* The largest absolute value, as bits: compared as integers, a NaN is larger than infinity and infinity than all else. */
static int32_t largest_bits(const float *x, int64_t depth)
{
    vec_int largest[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= depth; i += 4 * LANES)
        UNROLL for (int v = 0; v < 4; v++)
            largest[v] = larger_int(largest[v], (vec_int)load(x + i + v * LANES) & 0x7fffffff);
    for (; i < depth; i += LANES)
        largest[0] = larger_int(largest[0], (vec_int)load_some(x + i, depth - i) & 0x7fffffff);
    vec_int all = larger_int(larger_int(largest[0], largest[1]), larger_int(largest[2], largest[3]));
    int32_t result = 0;
    for (int lane = 0; lane < LANES; lane++)
        result = all[lane] > result ? all[lane] : result;
    return result;
}

/* Adding 1.5 · 2^23 leaves no bits for a fraction, and the integer in the low bits of the sum. */
INLINE vec_int nearest(vec x)
{
    vec rounder = broadcast(12582912.0f);
    return (vec_int)(rounded(x) + rounder) - (vec_int)rounder;
}

typedef x_value value_vector __attribute__((vector_size(LANES * sizeof(x_value))));

quantized_row quantize_row(const float *x, int64_t depth, x_value *to)
{
    int32_t bits = largest_bits(x, depth);
    float largest;
    memcpy(&largest, &bits, sizeof(largest));
    if (bits >= 0x7f800000 || largest < SMALLEST_LARGEST) {
        memset(to, 0, (size_t)(words_of(depth) * WORD_VALUES) * sizeof(x_value));
        return (quantized_row){.scale = bits >= 0x7f800000 ? NAN : 0.0f};
    }
    vec_int sums = {0};
    vec inverse = broadcast(127.0f / largest);
    for (int64_t i = 0; i < depth; i += LANES) {
        vec_int values = nearest(load_some(x + i, depth - i) * inverse);
        sums += values;
        value_vector narrow = __builtin_convertvector(values, value_vector);
        int64_t left = words_of(depth) * WORD_VALUES - i;
        if (left >= LANES)
            memcpy(to + i, &narrow, sizeof(narrow));
        else
            memcpy(to + i, &narrow, (size_t)left * sizeof(x_value));
    }
    quantized_row row = {.scale = largest / 127.0f};
    for (int lane = 0; lane < LANES; lane++)
        row.sum += sums[lane];
    return row;
}
