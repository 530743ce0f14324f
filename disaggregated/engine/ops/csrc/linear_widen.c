/* From narrow weights back to float32: see linear_narrow.h. */

#include "linear_narrow.h"

/* The `number`-th lowest nibble of each lane as what it stands for. */
INLINE vec nibble(const int fixed_kind, vec_int codes, int number)
{
    const int offset = fixed_kind == LINEAR_NIBBLES ? 8 : 0;
#if VECTOR_BYTES == 64
    /* One lookup, which looks at the lowest four bits alone. */
    const vec_int first = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec table = __builtin_convertvector(first - offset, vec);
    return (vec)_mm512_permutexvar_ps((__m512i)(codes >> 4 * number), (__m512)table);
#else
    return __builtin_convertvector(((codes >> 4 * number) & 15) - offset, vec);
#endif
}

INLINE void widen_nibbles(const int fixed_kind, const uint8_t *codes, vec scale, vec minimum, float *to)
{
    UNROLL for (int first = 0; first < GROUP; first += CODES_OF_WORD) {
        vec_int word = (vec_int)load((const float *)(const void *)(codes + first * LANES / 2));
        UNROLL for (int i = 0; i < CODES_OF_WORD; i++) {
            vec code = nibble(fixed_kind, word, i);
            store(to + (first + i) * LANES, has_minima(fixed_kind) ? minimum + scale * code : scale * code);
        }
    }
}

/* Everything called `fixed` is a compile-time constant once inlined. */
INLINE void widen_group(const int fixed_kind, const uint8_t *group, float *to)
{
    const uint8_t *codes = group + group_head_bytes(fixed_kind);
    vec scale = has_scales(fixed_kind) ? float16_at(group) : (vec){0};
    if (fixed_kind == LINEAR_FLOAT16)
        UNROLL for (int word = 0; word < GROUP; word++)
            store(to + word * LANES, float16_at(codes + 2 * word * LANES));
    else if (fixed_kind == LINEAR_BFLOAT16)
        UNROLL for (int word = 0; word < GROUP; word++)
            store(to + word * LANES, bfloat16_at(codes + 2 * word * LANES));
    else if (fixed_kind == LINEAR_BYTES)
        UNROLL for (int word = 0; word < GROUP; word++)
            store(to + word * LANES, scale * __builtin_convertvector(bytes_at(codes + word * LANES), vec));
    else
        widen_nibbles(fixed_kind, codes, scale, float16_at(group + group_head_bytes(fixed_kind) - 2 * LANES), to);
}

INLINE void widen_fixed(const int fixed_kind, const uint8_t *from, int64_t strip_bytes, int strips, int64_t num_words,
                        float *to)
{
    for (int64_t word = 0; word < num_words; word += GROUP) {
        for (int s = 0; s < strips; s++)
            widen_group(fixed_kind, from + s * strip_bytes, to + (s * num_words + word) * LANES);
        from += group_bytes(fixed_kind);
    }
}

void widen(int64_t kind, const uint8_t *from, int64_t strip_bytes, int strips, int64_t num_words, float *to)
{
#define CASE(kind) \
    case kind: \
        widen_fixed(kind, from, strip_bytes, strips, num_words, to); \
        return;
    switch (kind) {
        CASE(LINEAR_FLOAT16)
        CASE(LINEAR_BFLOAT16)
        CASE(LINEAR_BYTES)
        CASE(LINEAR_NIBBLES)
        CASE(LINEAR_NIBBLES_AND_MINIMUM)
    }
}
