/* Rows of numbers of one dtype as rows of another: conversion/values.py, which says the rules, bit for bit.

   A row is a token's key or value of one head. It goes through float32, which holds every number of the other dtypes. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "xxh3.h"

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FLOAT8 = 3 };
enum { ROW_MAX = 4096 };

/* The loops are plain; the compiler makes one of each function for each width of vectors, and the CPU picks. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_WIDTH __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Of float8_e4m3fn: 4 bits of exponent, biased by 7, and 3 of mantissa; no infinity, and one NaN. */
INLINE float from_float8(uint8_t q)
{
    const uint32_t magnitude = q & 0x7f, sign = (uint32_t)(q & 0x80) << 24;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t small = bits_of((float)(int32_t)magnitude * 0x1p-9f);
    const uint32_t finite = magnitude < 8 ? small : normal;
    return float_of(sign | (magnitude == 0x7f ? 0x7fc00000u : finite));
}

/* Nearest, ties to even; |x| is at most 448. */
INLINE uint8_t to_float8(float x)
{
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20) - (120u << 3);
    /* Below 2^-6, steps of 2^-9: the sum has no place for a fraction of one. */
    const uint32_t small = bits_of(float_of(magnitude) * 0x1p9f + 0x1p23f) & 0xff;
    return (uint8_t)((bits >> 24 & 0x80) | (magnitude < 0x3c800000u ? small : normal));
}

INLINE uint16_t to_bfloat16(float x)
{
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 & 0x8000u) | 0x7fc0u : rounded);
}

INLINE void load_row(int64_t dtype, const void *from, float scale, float *x, int64_t count)
{
    if (dtype == FLOAT32)
        memcpy(x, from, 4 * count);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            x[i] = float_of((uint32_t)((const uint16_t *)from)[i] << 16);
    else if (dtype == INT8)
        for (int64_t i = 0; i < count; i++)
            x[i] = (float)((const int8_t *)from)[i] * scale;
    else
        for (int64_t i = 0; i < count; i++)
            x[i] = from_float8(((const uint8_t *)from)[i]) * scale;
}

/* Returns the row's scale. Bits of magnitudes are ordered as they are, with infinities and NaN at the end. */
INLINE float quantise_row(int64_t dtype, const float *x, uint8_t *to, int64_t count)
{
    const float limit = dtype == INT8 ? 127.0f : 448.0f, smallest = dtype == INT8 ? 1e-36f : 1e-35f;
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
    }
    const float largest = float_of(most);
    if (most >= 0x7f800000u || largest < smallest) {
        memset(to, 0, count);
        return most >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f;
    }
    const float factor = limit / largest;
    if (dtype == INT8) /* The sum has no place for a fraction: it is rounded to the nearest, ties to even. */
        for (int64_t i = 0; i < count; i++)
            to[i] = (uint8_t)bits_of(x[i] * factor + 0x1.8p23f);
    else
        for (int64_t i = 0; i < count; i++) {
            const float scaled = x[i] * factor;
            to[i] = to_float8(scaled > limit ? limit : scaled < -limit ? -limit : scaled);
        }
    return largest / limit;
}

/* `num_rows` rows of `count` numbers, contiguous on both sides, and their scales where a dtype has them (else NULL). */
EVERY_WIDTH
static void rows(int64_t from_dtype, int64_t to_dtype, const uint8_t *from, const float *from_scales, uint8_t *to,
                 float *to_scales, int64_t num_rows, int64_t count)
{
    static const int64_t sizes[] = {4, 2, 1, 1};
    float x[ROW_MAX];
    for (int64_t row = 0; row < num_rows; row++) {
        load_row(from_dtype, from, from_scales ? from_scales[row] : 1.0f, x, count);
        if (to_dtype == FLOAT32)
            memcpy(to, x, 4 * count);
        else if (to_dtype == BFLOAT16)
            for (int64_t i = 0; i < count; i++)
                ((uint16_t *)to)[i] = to_bfloat16(x[i]);
        else
            to_scales[row] = quantise_row(to_dtype, x, to, count);
        from += sizes[from_dtype] * count;
        to += sizes[to_dtype] * count;
    }
}

EXPORT int64_t convert_rows(int64_t from_dtype, int64_t to_dtype, const void *from, const void *from_scales, void *to,
                     void *to_scales, int64_t num_rows, int64_t count)
{
    if (count > ROW_MAX || from_dtype < FLOAT32 || from_dtype > FLOAT8 || to_dtype < FLOAT32 || to_dtype > FLOAT8)
        return 2;
    rows(from_dtype, to_dtype, from, from_scales, to, to_scales, num_rows, count);
    return 0;
}
