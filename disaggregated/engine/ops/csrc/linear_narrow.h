/* Weights held in fewer bits than float32 without losing one. Shared by the files linear*.c.

   A checkpoint's float32 is often an expansion of something narrower: of bfloat16, or of the blocks of a GGUF, in which
   GROUP numbers along the depth are small integers times a scale, plus a minimum. Where every number of a weight is
   one, to the last bit, the narrow form is kept, and a block of it becomes float32 in the cache before it is multiplied.
   The products and their order are those of float32, so are the results; what DRAM has to deliver is not.

   A strip of a narrow kind is a head of biases and then its groups: GROUP words of LANES outputs, as below. A product of
   a scale (11 bits) and a code (8 at most) is exact in float32, so one multiply-add rounds once, like the sum of the two
   that a dequantiser makes. */

#pragma once

#include "narrow.h"
#include "linear.h"

#define GROUP 32
#define CODES_OF_WORD 8 /* nibbles in 32 bits: of successive words, the first one lowest */

#define NARROW_KINDS(X) \
    X(LINEAR_FLOAT16) X(LINEAR_BFLOAT16) X(LINEAR_BYTES) X(LINEAR_NIBBLES) X(LINEAR_NIBBLES_AND_MINIMUM)

INLINE bool has_scales(int64_t kind) { return kind >= LINEAR_BYTES; }
INLINE bool has_minima(int64_t kind) { return kind == LINEAR_NIBBLES_AND_MINIMUM; }
INLINE bool has_nibbles(int64_t kind) { return kind >= LINEAR_NIBBLES; }
INLINE bool is_narrow(int64_t kind) { return kind >= LINEAR_FLOAT16; }

/* A group: a scale of each lane, a minimum of each lane, as far as the kind has them, then words of codes, or numbers. */
INLINE int64_t group_head_bytes(int64_t kind) { return (has_scales(kind) + has_minima(kind)) * LANES * 2; }
INLINE int64_t group_bytes(int64_t kind)
{
    int64_t half_bytes = has_nibbles(kind) ? 1 : kind == LINEAR_BYTES ? 2 : 4; /* of a number */
    return group_head_bytes(kind) + GROUP * LANES * half_bytes / 2;
}

/* `strips` strips of weights of a narrow kind → vectors of float32 at `to`, `num_words` (a multiple of GROUP) of one
   strip after those of another. */
void widen(int64_t kind, const uint8_t *from, int64_t strip_bytes, int strips, int64_t num_words, float *to);

/* `depth` weights of one output into its lane of a strip. Returns false, having written a part, where one of them is
   not a number of this kind. `hint` is kept from one output to the next, 0 at first. */
bool narrow_row(int64_t kind, const float *weights, int64_t depth, uint8_t *groups, int64_t lane, int *hint);
