/* XXH3 with 64 bits, of inputs longer than 240 bytes that come in pieces: one running checksum.

   Written from the public specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); the names are the
   specification's. The input is a row of stripes of 64 bytes, sixteen of them a round. Eight sums of 64 bits take in
   one stripe after another and are scrambled after each round; the last 64 bytes of the input, whatever stripe they
   began in, are taken in once more at the end. So the whole length has to be known at the start, and the last stripe
   is kept in reach. */

#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { STRIPE_BYTES = 64, STRIPES_OF_ROUND = 16, SECRET_BYTES = 192, SECRET_STEP = 8, SHORT_BYTES_MAX = 240 };
enum { SCRAMBLE_SECRET = SECRET_BYTES - STRIPE_BYTES, LAST_SECRET = SECRET_BYTES - STRIPE_BYTES - 7, MERGE_SECRET = 11 };

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX1 0x165667919E3779F9ULL

static const uint8_t SECRET[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* Owned by Python, as 64-bit words that are 0 until the first bytes come; it reads `taken` and `value` by their places
   (CHECKSUM_WORDS in library.py). */
typedef struct {
    uint64_t sums[8];
    int64_t length;                 /* of the whole input, above SHORT_BYTES_MAX */
    int64_t taken;                  /* bytes that have come */
    uint64_t value;                 /* once all have */
    int64_t unused[5];
    uint8_t tail[2 * STRIPE_BYTES]; /* the last stripe that was summed up, then the bytes that are not yet */
} checksum;

INLINE uint64_t word_at(const uint8_t *from)
{
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word; /* The specification is little-endian, and so is every machine we know. */
}

INLINE void checksum_begin(checksum *of, int64_t length)
{
    *of = (checksum){
        .sums = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1},
        .length = length,
    };
}

INLINE uint64_t folded_product(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* One stripe into the sums. Its neighbour's input is added to a sum as it is, so that no product of zero loses it. */
INLINE void sum_up(uint64_t sums[8], const uint8_t *stripe, const uint8_t *secret)
{
    for (int lane = 0; lane < 8; lane++) {
        uint64_t word = word_at(stripe + 8 * lane);
        uint64_t key = word ^ word_at(secret + 8 * lane);
        sums[lane ^ 1] += word;
        sums[lane] += (key & 0xFFFFFFFF) * (key >> 32);
    }
}

INLINE void scramble(uint64_t sums[8])
{
    for (int lane = 0; lane < 8; lane++) {
        uint64_t sum = sums[lane] ^ (sums[lane] >> 47) ^ word_at(SECRET + SCRAMBLE_SECRET + 8 * lane);
        sums[lane] = sum * PRIME32_1;
    }
}

/* The checksum of an input that has come whole. */
INLINE uint64_t checksum_value(const checksum *of)
{
    uint64_t sums[8];
    memcpy(sums, of->sums, sizeof sums);
    int64_t beyond = of->length % STRIPE_BYTES;
    sum_up(sums, of->tail + (beyond ? beyond : STRIPE_BYTES), SECRET + LAST_SECRET);
    uint64_t value = (uint64_t)of->length * PRIME64_1;
    for (int pair = 0; pair < 4; pair++) {
        const uint8_t *secret = SECRET + MERGE_SECRET + 16 * pair;
        value += folded_product(sums[2 * pair] ^ word_at(secret), sums[2 * pair + 1] ^ word_at(secret + 8));
    }
    value = (value ^ (value >> 37)) * PRIME_MX1;
    return value ^ (value >> 32);
}
