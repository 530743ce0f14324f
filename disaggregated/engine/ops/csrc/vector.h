/* The vector type of the kernels, and the few things C has no operator for.

   The sources are written once with the vector extension of GCC and clang and compiled once for each instruction set
   (VECTOR_BYTES says how wide). Three rules keep results equal between rows, thread counts and vector widths:

     - a multiply-add is written `c + a * b`, and of two products one is rounded(), so that a compiler that contracts
       has one way to do it;
     - what is summed over lanes is summed in 16 partial sums whatever the width, then in one fixed tree;
     - a partial vector is padded with zeros and goes through the very same code.

   So AVX2, AVX-512 and NEON give the same bits, compiled by GCC or by clang. Without fused multiply-add (the x86
   baseline) sums are rounded differently. */

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

#define LANES (VECTOR_BYTES / 4)
#define PARTIAL_SUMS 16
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vec_int __attribute__((vector_size(VECTOR_BYTES)));
typedef float vec_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec load(const float *from) { return *(const vec_anywhere *)from; }
INLINE void store(float *to, vec x) { *(vec_anywhere *)to = x; }
INLINE vec broadcast(float x) { return x - (vec){0}; }

/* x, not to be contracted with what is done to it next: the compiler is told that x may have changed. */
INLINE vec rounded(vec x)
{
#ifdef __aarch64__
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
}

INLINE vec select_lanes(vec_int mask, vec yes, vec no) { return (vec)(((vec_int)yes & mask) | ((vec_int)no & ~mask)); }

/* a > b ? a : b, so b where one is NaN; a < b ? a : b alike; and x, but 0 where a < b. Compilers make several
   instructions of what x86 has one for. */
#if VECTOR_BYTES == 64
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec lesser(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec zero_where_less(vec a, vec b, vec x)
{
    return (vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ), (__m512)x);
}
#else
INLINE vec larger(vec a, vec b) { return select_lanes(a > b, a, b); }
INLINE vec lesser(vec a, vec b) { return select_lanes(a < b, a, b); }
INLINE vec zero_where_less(vec a, vec b, vec x) { return (vec)((vec_int)x & ~(a < b)); }
#endif
INLINE vec_int larger_int(vec_int a, vec_int b)
{
    vec_int mask = a > b;
    return (a & mask) | (b & ~mask);
}

#if VECTOR_BYTES == 64
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LANES_LOG2 4
#elif VECTOR_BYTES == 32
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#define LANES_LOG2 3
#else
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#define LANES_LOG2 2
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif


/* Zips the upper half of the rows with the lower half, `passes` times. With 2^m rows, a pass rotates the bits of
   (row, lane) by one place, so m passes interleave the rows: in the order of memory, the rows' elements 0, then their
   elements 1 … For a square, that is its transpose. */
INLINE void zip_rows(const int num_rows, const int passes, vec rows[])
{
    UNROLL for (int pass = 0; pass < passes; pass++) {
        vec zipped[16];
        UNROLL for (int i = 0; i < num_rows / 2; i++) {
            zipped[2 * i] = SHUFFLE(rows[i], rows[i + num_rows / 2], LOW_HALVES);
            zipped[2 * i + 1] = SHUFFLE(rows[i], rows[i + num_rows / 2], HIGH_HALVES);
        }
        UNROLL for (int i = 0; i < num_rows; i++)
            rows[i] = zipped[i];
    }
}

/* The first `count` floats, the other lanes 0. */
INLINE vec load_some(const float *from, int64_t count)
{
    if (count >= LANES)
        return load(from);
    float padded[LANES] = {0};
    memcpy(padded, from, (size_t)count * sizeof(float));
    return load(padded);
}

INLINE void store_some(float *to, vec x, int64_t count)
{
    if (count >= LANES) {
        store(to, x);
        return;
    }
    float padded[LANES];
    store(padded, x);
    memcpy(to, padded, (size_t)count * sizeof(float));
}

/* The 16 partial sums as one number: the upper half is added to the lower one until one is left. (The zips move both
   halves to the even lanes, so lane 0 always holds what it should; other lanes hold repetitions.) */
INLINE float sum_of(const vec partial[PARTIAL_SUMS / LANES])
{
    vec sums[PARTIAL_SUMS / LANES];
    UNROLL for (int v = 0; v < PARTIAL_SUMS / LANES; v++)
        sums[v] = partial[v];
    UNROLL for (int half = PARTIAL_SUMS / LANES / 2; half > 0; half /= 2)
        UNROLL for (int v = 0; v < half; v++)
            sums[v] = sums[v] + sums[v + half];
    vec sum = sums[0];
    UNROLL for (int pass = 0; pass < LANES_LOG2; pass++)
        sum = SHUFFLE(sum, sum, LOW_HALVES) + SHUFFLE(sum, sum, HIGH_HALVES);
    return sum[0];
}

INLINE float largest_of(vec x)
{
    UNROLL for (int pass = 0; pass < LANES_LOG2; pass++)
        x = larger(SHUFFLE(x, x, LOW_HALVES), SHUFFLE(x, x, HIGH_HALVES));
    return x[0];
}

/* e^x within 2 ulp; 0 below the smallest normal number, clamped at e^88, NaN stays NaN.

   x = n·ln 2 + r with |r| <= ln 2 / 2, then e^r by the polynomial of Cephes. Adding and taking away 1.5·2^23 rounds to
   an integer, which then also stands in the low bits of the sum, where the exponent of 2^n is made from it. */
INLINE vec exponential(vec x)
{
    const vec lowest = broadcast(-87.0f), highest = broadcast(88.0f), rounder = broadcast(12582912.0f);
    vec y = lesser(highest, larger(lowest, x));
    vec shifted = rounder + y * 1.44269504088896341f;
    vec n = shifted - rounder;
    vec r = y + n * -0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = 1.3981999507e-3f + p * r;
    p = 8.3334519073e-3f + p * r;
    p = 4.1665795894e-2f + p * r;
    p = 1.6666665459e-1f + p * r;
    p = 5.0000001201e-1f + p * r;
    p = r + p * (r * r);
    vec power = (vec)(((vec_int)shifted << 23) + 0x3f800000);
    return zero_where_less(x, lowest, (p + 1.0f) * power);
}

#define LOG2_E 1.44269504088896341f

/* 2^x within 2 ulp for x <= 0; 0 from -127 down, NaN stays NaN.

   x = n + r with |r| <= 1/2, n found as in exponential(). The polynomial has the least relative error of its degree on
   [-1/2, 1/2] among those that are exactly 1 at 0. At -127 the factor's exponent is that of 0. */
INLINE vec power_of_two(vec x)
{
    const vec rounder = broadcast(12582912.0f);
    vec y = larger(broadcast(-127.0f), x);
    vec shifted = rounder + y;
    vec r = y - (shifted - rounder);
    vec p = broadcast(1.326472731307149e-3f);
    p = 9.671512991189957e-3f + p * r;
    p = 5.550733581185341e-2f + p * r;
    p = 2.4022242426872253e-1f + p * r;
    p = 6.931470036506653e-1f + p * r;
    p = 1.0f + p * r;
    return p * (vec)(((vec_int)shifted << 23) + 0x3f800000);
}
