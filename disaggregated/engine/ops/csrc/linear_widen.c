/* Narrow weights for several rows: a block of them becomes float32 in the cache, and stays there while rows pass by. */

#include "linear_group.h"

INLINE void widen_group(const int fixed_kind, const uint8_t *group, float *to)
{
    group_head head = group_head_at(fixed_kind, group);
    for (int first = 0; first < GROUP; first += CODES_OF_WORD) {
        vec_int nibbles = nibbles_at(fixed_kind, group, first);
        UNROLL for (int i = 0; i < CODES_OF_WORD; i++)
            store(to + (first + i) * LANES, group_weights(fixed_kind, head, nibbles, group, first, i));
    }
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
    switch (kind) { NARROW_KINDS(CASE) }
#undef CASE
}
