/* How a weight becomes strips (see linear_tile.h), once, at load. */

#include "linear_tile.h"

#include <stdlib.h>
#include <sys/mman.h>

/* Large pages: a stream through a gigabyte misses the TLB at every 4 KB. Advice only, so no error matters. */
static void advise_large_pages(void *memory, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    uintptr_t begin = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095;
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (end > begin)
        (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* Bytes that linear_pack() writes. */
EXPORT int64_t linear_packed_bytes(int64_t kind, int64_t num_columns, int64_t depth)
{
    return num_panels(num_columns) * STRIPS_OF_PANEL * strip_bytes(kind, depth);
}

static void pack_float32(const float *weight, int64_t depth, uint8_t *strip, int64_t lane)
{
    float *to = (float *)(strip + head_bytes(LINEAR_FLOAT32)) + lane;
    for (int64_t k = 0; k < depth; k++)
        to[k * LANES] = weight[k];
}

/* The transform of a product's other side makes it as many times larger as a block has numbers. */
static void pack_int8(const float *weight, int64_t depth, uint8_t *strip, int64_t lane, float *rotated)
{
    x_value *values = (x_value *)(rotated + depth);
    float shrink = 1.0f / (float)rotation_block(depth);
    rotate_row(weight, depth, rotated);
    for (int64_t k = 0; k < depth; k++)
        rotated[k] *= shrink;
    uint8_t *to = strip + head_bytes(LINEAR_INT8) + lane * WORD_VALUES;
    ((float *)strip)[lane] = quantize_row(rotated, depth, values).scale;
    for (int64_t word = 0; word < words_of(depth); word++) {
        uint8_t bytes[WORD_VALUES];
        for (int i = 0; i < WORD_VALUES; i++)
            bytes[i] = (uint8_t)(values[word * WORD_VALUES + i] + WEIGHT_OFFSET);
        memcpy(to + word * VECTOR_WEIGHT_BYTES, bytes, sizeof bytes);
    }
}

/* weight (M, K), bias (M) or NULL → panels of a narrow kind; K is a multiple of GROUP. Returns whether it holds every
   number to the last bit; if not, the panels are of no use. */
EXPORT bool linear_pack_narrow(int64_t kind, const float *weight, const float *bias, int64_t num_columns, int64_t depth,
                               uint8_t *panels)
{
    int64_t bytes = strip_bytes(kind, depth), num_strips = num_panels(num_columns) * STRIPS_OF_PANEL;
    int hint = 0;
    advise_large_pages(panels, num_strips * bytes);
    for (int64_t i = 0; i < num_strips; i++) {
        uint8_t *strip = panels + i * bytes;
        memset(strip, 0, (size_t)bytes);
        for (int64_t lane = 0; lane < LANES && i * LANES + lane < num_columns; lane++) {
            int64_t column = i * LANES + lane;
            ((float *)(void *)strip)[lane] = bias != NULL ? bias[column] : 0.0f;
            if (!narrow_row(kind, weight + column * depth, depth, strip + head_bytes(kind), lane, &hint))
                return false;
        }
    }
    return true;
}

/* weight (M, K), bias (M) or NULL → panels, which should be aligned to 64 bytes. Returns true. Out of memory: abort(). */
EXPORT bool linear_pack(int64_t kind, const float *weight, const float *bias, int64_t num_columns, int64_t depth,
                        uint8_t *panels)
{
    float *rotated = malloc((size_t)depth * sizeof(float) + (size_t)(words_of(depth) * WORD_VALUES) * sizeof(x_value));
    if (rotated == NULL)
        abort();
    advise_large_pages(panels, linear_packed_bytes(kind, num_columns, depth));
    memset(panels, 0, (size_t)linear_packed_bytes(kind, num_columns, depth));
    for (int64_t column = 0; column < num_columns; column++) {
        uint8_t *strip = panels + column / LANES * strip_bytes(kind, depth);
        int64_t lane = column % LANES;
        float *biases = (float *)(strip + head_bytes(kind)) - LANES;
        biases[lane] = bias != NULL ? bias[column] : 0.0f;
        if (kind == LINEAR_FLOAT32)
            pack_float32(weight + column * depth, depth, strip, lane);
        else
            pack_int8(weight + column * depth, depth, strip, lane, rotated);
    }
    free(rotated);
    return true;
}
