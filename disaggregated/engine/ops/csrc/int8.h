/* The inner step of products of bytes: four things that CPUs have, and plain C.

   WORD_VALUES values of a row of x, one after the other, are one 32-bit word; a vector of weights has the values at the
   same places of LANES outputs. multiply_word() adds each output's products to its sum. Sums of integers are exact, so
   all ways give the same bits, whatever the order.

   VNNI multiplies unsigned by signed bytes: weights are stored plus WEIGHT_OFFSET, and a sum begins with minus that many
   times the sum of its row of x. */

#pragma once

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if VECTOR_BYTES == 64 && defined(__AVX512VNNI__)

#define WORD_VALUES 4
#define WEIGHT_OFFSET 128
typedef int8_t x_value;
INLINE vec_int load_weights(const uint8_t *from) { return (vec_int)_mm512_loadu_si512(from); }
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return (vec_int)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(word));
}

#elif VECTOR_BYTES == 32 && defined(__AVXVNNI__)

#define WORD_VALUES 4
#define WEIGHT_OFFSET 128
typedef int8_t x_value;
INLINE vec_int load_weights(const uint8_t *from) { return (vec_int)_mm256_loadu_si256((const __m256i *)from); }
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return (vec_int)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32(word));
}

#elif VECTOR_BYTES == 16 && defined(__ARM_FEATURE_DOTPROD)

#define WORD_VALUES 4
#define WEIGHT_OFFSET 0
typedef int8_t x_value;
INLINE vec_int load_weights(const uint8_t *from) { return (vec_int)vld1q_u8(from); }
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return (vec_int)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(word)));
}

#elif defined(__x86_64__)

/* Pairs of 16-bit numbers: a product of bytes could saturate in `maddubs`, never here. */
#define WORD_VALUES 2
#define WEIGHT_OFFSET 0
typedef int16_t x_value;
#if VECTOR_BYTES == 64
INLINE vec_int load_weights(const uint8_t *from)
{
    return (vec_int)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
}
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return sums + (vec_int)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(word));
}
#elif VECTOR_BYTES == 32
INLINE vec_int load_weights(const uint8_t *from)
{
    return (vec_int)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return sums + (vec_int)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(word));
}
#else
INLINE vec_int load_weights(const uint8_t *from)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
    return (vec_int)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word)
{
    return sums + (vec_int)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(word));
}
#endif

#else

#define WORD_VALUES 1
#define WEIGHT_OFFSET 0
typedef int32_t x_value;
INLINE vec_int load_weights(const uint8_t *from)
{
    vec_int weights = {0};
    UNROLL for (int lane = 0; lane < LANES; lane++)
        weights[lane] = (int8_t)from[lane];
    return weights;
}
INLINE vec_int multiply_word(vec_int sums, vec_int weights, int32_t word) { return sums + weights * word; }

#endif

#define VECTOR_WEIGHT_BYTES (LANES * WORD_VALUES)

INLINE int64_t words_of(int64_t depth) { return (depth + WORD_VALUES - 1) / WORD_VALUES; }
