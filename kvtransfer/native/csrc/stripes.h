/* The inner loop: whole stripes are summed up and, where they are to be copied, stored from the register that was
   summed. One version for each instruction set; which one runs is decided by the CPU, not by the compiler's flags. */

#pragma once

#include "blocks.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

/* Where stripes go: nowhere; through the cache; past it (`to` is aligned to STRIPE_BYTES). */
typedef enum { ONLY_SUM, STORE, STREAM } destination_kind;

/* Sums up `count` stripes, the first of which is number `at` of its round, and stores them as `kind` says. */
typedef void stripes_function(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, destination_kind kind);

/* Bytes ahead of the one that is read. Hardware prefetchers stop at the end of a page. */
enum { PREFETCH_BYTES = 1024 };

static void stripes_plain(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, destination_kind kind)
{
    for (int64_t stripe = 0; stripe < count; stripe++) {
        sum_up(sums, from, SECRET + SECRET_STEP * at);
        if (kind != ONLY_SUM) {
            memcpy(to, from, STRIPE_BYTES);
            to += STRIPE_BYTES;
        }
        from += STRIPE_BYTES;
        if (++at == STRIPES_OF_ROUND) {
            scramble(sums);
            at = 0;
        }
    }
}

#ifdef __x86_64__

#define AVX512 __attribute__((target("avx512f")))
#define AVX2 __attribute__((target("avx2")))

INLINE AVX512 __m512i summed_512(__m512i sums, __m512i stripe, const uint8_t *secret)
{
    __m512i key = _mm512_xor_si512(stripe, _mm512_loadu_si512(secret));
    __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    __m512i neighbours = _mm512_shuffle_epi32(stripe, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
    return _mm512_add_epi64(sums, _mm512_add_epi64(product, neighbours));
}

INLINE AVX512 __m512i scrambled_512(__m512i sums)
{
    const __m512i prime = _mm512_set1_epi32((int)PRIME32_1);
    __m512i key = _mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47));
    key = _mm512_xor_si512(key, _mm512_loadu_si512(SECRET + SCRAMBLE_SECRET));
    __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(key, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(key, prime), _mm512_slli_epi64(high, 32));
}

INLINE AVX512 void stripes_512(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, const destination_kind kind)
{
    __m512i total = _mm512_loadu_si512(sums);
    while (count > 0) {
        int64_t num = smaller(count, STRIPES_OF_ROUND - at);
        for (int64_t i = 0; i < num; i++) {
            __m512i stripe = _mm512_loadu_si512(from);
            _mm_prefetch(from + PREFETCH_BYTES, _MM_HINT_T0);
            if (kind == STREAM)
                _mm512_stream_si512((void *)to, stripe);
            if (kind == STORE)
                _mm512_storeu_si512(to, stripe);
            total = summed_512(total, stripe, SECRET + SECRET_STEP * (at + i));
            from += STRIPE_BYTES;
            if (kind != ONLY_SUM)
                to += STRIPE_BYTES;
        }
        count -= num;
        at += num;
        if (at == STRIPES_OF_ROUND) {
            total = scrambled_512(total);
            at = 0;
        }
    }
    _mm512_storeu_si512(sums, total);
}

static AVX512 void stripes_avx512(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, destination_kind kind)
{
    if (kind == STREAM)
        stripes_512(sums, from, to, count, at, STREAM);
    else if (kind == STORE)
        stripes_512(sums, from, to, count, at, STORE);
    else
        stripes_512(sums, from, to, count, at, ONLY_SUM);
}

INLINE AVX2 __m256i summed_256(__m256i sums, __m256i half, const uint8_t *secret)
{
    __m256i key = _mm256_xor_si256(half, _mm256_loadu_si256((const __m256i_u *)secret));
    __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    __m256i neighbours = _mm256_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(sums, _mm256_add_epi64(product, neighbours));
}

INLINE AVX2 __m256i scrambled_256(__m256i sums, const uint8_t *secret)
{
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    __m256i key = _mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47));
    key = _mm256_xor_si256(key, _mm256_loadu_si256((const __m256i_u *)secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(key, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(key, prime), _mm256_slli_epi64(high, 32));
}

INLINE AVX2 void put_256(uint8_t *to, __m256i half, const destination_kind kind)
{
    if (kind == STREAM)
        _mm256_stream_si256((__m256i *)to, half);
    if (kind == STORE)
        _mm256_storeu_si256((__m256i_u *)to, half);
}

INLINE AVX2 void stripes_256(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, const destination_kind kind)
{
    __m256i low = _mm256_loadu_si256((const __m256i_u *)sums), high = _mm256_loadu_si256((const __m256i_u *)(sums + 4));
    while (count > 0) {
        int64_t num = smaller(count, STRIPES_OF_ROUND - at);
        for (int64_t i = 0; i < num; i++) {
            const uint8_t *secret = SECRET + SECRET_STEP * (at + i);
            __m256i first = _mm256_loadu_si256((const __m256i_u *)from);
            __m256i second = _mm256_loadu_si256((const __m256i_u *)(from + 32));
            _mm_prefetch(from + PREFETCH_BYTES, _MM_HINT_T0);
            low = summed_256(low, first, secret);
            high = summed_256(high, second, secret + 32);
            from += STRIPE_BYTES;
            if (kind != ONLY_SUM) {
                put_256(to, first, kind);
                put_256(to + 32, second, kind);
                to += STRIPE_BYTES;
            }
        }
        count -= num;
        at += num;
        if (at == STRIPES_OF_ROUND) {
            low = scrambled_256(low, SECRET + SCRAMBLE_SECRET);
            high = scrambled_256(high, SECRET + SCRAMBLE_SECRET + 32);
            at = 0;
        }
    }
    _mm256_storeu_si256((__m256i_u *)sums, low);
    _mm256_storeu_si256((__m256i_u *)(sums + 4), high);
}

static AVX2 void stripes_avx2(
    uint64_t sums[8], const uint8_t *from, uint8_t *to, int64_t count, int64_t at, destination_kind kind)
{
    if (kind == STREAM)
        stripes_256(sums, from, to, count, at, STREAM);
    else if (kind == STORE)
        stripes_256(sums, from, to, count, at, STORE);
    else
        stripes_256(sums, from, to, count, at, ONLY_SUM);
}

#endif
