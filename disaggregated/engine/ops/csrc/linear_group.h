/* A group of narrow weights (linear_narrow.h) as float32: LANES outputs at a time, one word of the depth after another.

   What is called `fixed` is a compile-time constant once inlined. */

#pragma once

#include "linear_narrow.h"

/* What a group's weights have in common, of kinds that have it. */
typedef struct {
    vec scale, minimum;
} group_head;

INLINE group_head group_head_at(const int fixed_kind, const uint8_t *group)
{
    group_head head = {{0}, {0}};
    if (has_scales(fixed_kind))
        head.scale = float16_at(group);
    if (has_minima(fixed_kind))
        head.minimum = float16_at(group + 2 * LANES);
    return head;
}

/* The nibbles of CODES_OF_WORD words, from the `first`-th of the group on; nothing of other kinds. */
INLINE vec_int nibbles_at(const int fixed_kind, const uint8_t *group, int first)
{
    if (!has_nibbles(fixed_kind))
        return (vec_int){0};
    return (vec_int)load((const float *)(const void *)(group + group_head_bytes(fixed_kind) + first * LANES / 2));
}

/* The `number`-th lowest nibble of each lane as what it stands for. */
INLINE vec nibble(const int fixed_kind, vec_int nibbles, int number)
{
    const int offset = fixed_kind == LINEAR_NIBBLES ? 8 : 0;
#if VECTOR_BYTES == 64
    /* One lookup, which looks at the lowest four bits alone. */
    const vec_int first = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec table = __builtin_convertvector(first - offset, vec);
    return (vec)_mm512_permutexvar_ps((__m512i)(nibbles >> 4 * number), (__m512)table);
#else
    return __builtin_convertvector(((nibbles >> 4 * number) & 15) - offset, vec);
#endif
}

/* The weights of word `first + i` of the group; `nibbles` begin with word `first`. */
INLINE vec group_weights(const int fixed_kind, group_head head, vec_int nibbles, const uint8_t *group, int first, int i)
{
    const uint8_t *numbers = group + group_head_bytes(fixed_kind);
    if (fixed_kind == LINEAR_FLOAT16)
        return float16_at(numbers + 2 * (first + i) * LANES);
    if (fixed_kind == LINEAR_BFLOAT16)
        return bfloat16_at(numbers + 2 * (first + i) * LANES);
    if (fixed_kind == LINEAR_BYTES)
        return head.scale * __builtin_convertvector(bytes_at(numbers + (first + i) * LANES), vec);
    vec code = nibble(fixed_kind, nibbles, i);
    return has_minima(fixed_kind) ? head.minimum + head.scale * code : head.scale * code;
}
