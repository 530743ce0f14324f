/* Narrow weights for one row, which is what a lone sequence's decode step is made of: each vector becomes float32 in a
   register and is multiplied at once. The products and their order are those of linear_tile.c.

   Every strip is read front to back, some groups ahead of what is multiplied; behind its end, those that come next. */

#include "linear_tile.h"
#include "linear_group.h"

#define GROUPS_AHEAD 2

INLINE void fetch_group(const int fixed_kind, const int fixed_strips, const uint8_t *group, int64_t strip_bytes)
{
    UNROLL for (int s = 0; s < fixed_strips; s++)
        UNROLL for (int64_t i = 0; i < group_bytes(fixed_kind); i += 64)
            __builtin_prefetch(group + s * strip_bytes + i);
}

INLINE void multiply_one_row_fixed(const int fixed_kind, const int fixed_strips, const row_of_strips *r)
{
    const int64_t bytes = group_bytes(fixed_kind), strip_bytes = r->strip_bytes;
    vec sums[2 * STRIPS_OF_PANEL];
    UNROLL for (int s = 0; s < fixed_strips; s++)
        sums[s] = load((const float *)(const void *)(r->head + s * strip_bytes));
    const uint8_t *group = r->head + head_bytes(fixed_kind);
    const uint8_t *ahead = group + GROUPS_AHEAD * bytes, *next = group + fixed_strips * strip_bytes;
    for (int64_t word = 0; word < r->num_words; word += GROUP) {
        group_head heads[2 * STRIPS_OF_PANEL];
        UNROLL for (int s = 0; s < fixed_strips; s++)
            heads[s] = group_head_at(fixed_kind, group + s * strip_bytes);
        fetch_group(fixed_kind, fixed_strips, ahead, strip_bytes);
        for (int first = 0; first < GROUP; first += CODES_OF_WORD) {
            vec_int nibbles[2 * STRIPS_OF_PANEL];
            UNROLL for (int s = 0; s < fixed_strips; s++)
                nibbles[s] = nibbles_at(fixed_kind, group + s * strip_bytes, first);
            UNROLL for (int i = 0; i < CODES_OF_WORD; i++)
                UNROLL for (int s = 0; s < fixed_strips; s++)
                    sums[s] = sums[s] + r->x[word + first + i] * group_weights(fixed_kind, heads[s], nibbles[s],
                                                                               group + s * strip_bytes, first, i);
        }
        group += bytes;
        ahead = word + (GROUPS_AHEAD + 1) * GROUP == r->num_words ? next : ahead + bytes;
    }
    UNROLL for (int s = 0; s < fixed_strips; s++)
        if (r->num_columns > s * LANES)
            store_some(r->to + s * LANES, sums[s], r->num_columns - s * LANES);
}

void multiply_one_row(int64_t kind, int64_t panels, const row_of_strips *row)
{
#define CASE(kind) \
    case kind: \
        if (panels == 2) \
            multiply_one_row_fixed(kind, 2 * STRIPS_OF_PANEL, row); \
        else \
            multiply_one_row_fixed(kind, STRIPS_OF_PANEL, row); \
        return;
    switch (kind) { NARROW_KINDS(CASE) }
#undef CASE
}
