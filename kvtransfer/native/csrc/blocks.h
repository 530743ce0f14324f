/* Which blocks of which pools. A pool is [layer][block] of `block_bytes` each. */

#pragma once

#include "xxh3.h"

/* Mirrored by Blocks in library.py. */
typedef struct {
    uint8_t *base;      /* of the pool */
    int64_t num_blocks; /* of a layer of the pool */
    const int64_t *ids; /* `count` of them */
} blocks;

/* Mirrored by Order in library.py. */
typedef struct {
    blocks from, to;    /* `to.base` is NULL where nothing is copied */
    int64_t count;      /* blocks */
    int64_t block_bytes;
    int64_t pool_layers, first_layer, num_layers;
    int64_t past_cache; /* not 0: what is copied is more than the caches hold, and goes past them */
} order;

enum { DONE = 0, STOPPED = 1, UNSOUND = 2, CLOSED = 3, LATE = 4 };

/* 0 when a block or a layer of it is not there. Asked before the first byte is touched. */
int order_is_sound(const order *what);

/* The next bytes of a block's input, where they lie. */
void take_bytes(checksum *sum, const uint8_t *from, int64_t num_bytes);

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE uint8_t *place(const blocks *of, const order *what, int64_t layer, int64_t i)
{
    return of->base ? of->base + (layer * of->num_blocks + of->ids[i]) * what->block_bytes : NULL;
}
