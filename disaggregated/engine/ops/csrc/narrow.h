/* Numbers narrower than float32: LANES of them as a vector of what is computed with, and one float32 as one of them. */

#pragma once

#include "vector.h"

/* LANES integers from memory as 32-bit ones. (GCC takes __builtin_convertvector apart, byte by byte.) */
#if VECTOR_BYTES == 64
INLINE vec_int bytes_at(const void *from) { return (vec_int)_mm512_cvtepi8_epi32(_mm_loadu_si128(from)); }
INLINE vec_int halves_at(const void *from) { return (vec_int)_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)); }
#elif VECTOR_BYTES == 32
INLINE vec_int bytes_at(const void *from) { return (vec_int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(from)); }
INLINE vec_int halves_at(const void *from) { return (vec_int)_mm256_cvtepu16_epi32(_mm_loadu_si128(from)); }
#else
INLINE vec_int bytes_at(const void *from)
{
    int8_t x[LANES];
    memcpy(x, from, sizeof x);
    return (vec_int){x[0], x[1], x[2], x[3]};
}
INLINE vec_int halves_at(const void *from)
{
    uint16_t x[LANES];
    memcpy(x, from, sizeof x);
    return (vec_int){x[0], x[1], x[2], x[3]};
}
#endif

INLINE vec bfloat16_at(const void *from) { return (vec)(halves_at(from) << 16); }

INLINE vec float16_at(const void *from)
{
#if VECTOR_BYTES == 64
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(from));
#elif VECTOR_BYTES == 32
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(from));
#else
    /* The exponent is put where float32 has it and brought to its bias by a product, which is exact and takes care of
       subnormal numbers; infinities and NaN get the exponent that they have in float32. */
    vec_int half = halves_at(from);
    vec number = (vec)((half & 0x7fff) << 13) * 0x1p112f;
    vec_int special = ((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((vec_int)number | special | ((half & 0x8000) << 16));
#endif
}

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Rounds half to even, as every float32 → half precision conversion here does. NaN stays NaN. */
INLINE uint16_t bfloat16_of(float x)
{
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Beyond 65504, infinity. A number too small for a normal half is brought to where float32's own rounding cuts it off:
   adding 0.5 leaves the half's bits as the last ones of the sum. */
INLINE uint16_t float16_of(float x)
{
    uint32_t bits = bits_of(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return sign | 0x7e00;
    if (bits >= 0x477ff000) /* 65520: half way from 65504 to what would come next */
        return sign | 0x7c00;
    if (bits < 0x38800000) /* 2^-14, the smallest normal half */
        return sign | (uint16_t)(bits_of(fabsf(x) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

/* The float32 of a half that is neither infinite nor NaN. */
INLINE float float16_value(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float magnitude;
    memcpy(&magnitude, &bits, sizeof bits);
    magnitude *= 0x1p112f;
    return half & 0x8000 ? -magnitude : magnitude;
}
