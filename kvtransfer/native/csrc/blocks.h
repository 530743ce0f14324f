/* Which blocks of which pools. A pool is [layer][block] of `block_bytes` each. */

#pragma once

#include "xxh3.h"

/* Of one pool. */
typedef struct {
    uint8_t *base;      /* of the pool; NULL: of none */
    int64_t num_blocks; /* of a layer of the pool */
} pool;

/* Made by native_order in checksum.py: one array of 64-bit integers. */
typedef struct {
    pool from, to;      /* no pool `to` where nothing is copied */
    int64_t count;      /* blocks */
    int64_t block_bytes;
    int64_t pool_layers, first_layer, num_layers;
    int64_t past_cache; /* not 0: what is copied is more than the caches hold, and goes past them */
    int64_t length;     /* of each checksum's whole input: this order may be of some layers of it */
    int64_t ids[];      /* `count` blocks of the pool `from`, then as many of the pool `to` */
} order;

enum { DONE = 0, STOPPED = 1, UNSOUND = 2, CLOSED = 3, LATE = 4 };

/* 0 when a block or a layer of it is not there. Asked before the first byte is touched. */
int order_is_sound(const order *what);

/* Begin those that no order has begun yet. */
void begin_sums(const order *what, checksum *sums);

/* The next bytes of a block's input, where they lie. */
void take_bytes(checksum *sum, const uint8_t *from, int64_t num_bytes);

/* The same for bytes that lie elsewhere: they are copied to where the input goes on, in a block of the pool `from`.
   Whoever has called it calls let_everyone_see before anyone is told. */
void fill_past_cache(const order *what, checksum *sum, const uint8_t *from, uint8_t *to, int64_t num_bytes);

/* A copy that leaves the caches alone; let_everyone_see comes after it, too. */
void store_past_cache(uint8_t *to, const uint8_t *from, int64_t num_bytes);

/* What went past the cache is there for every thread from here on. */
void let_everyone_see(void);

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where block `i` of the order lies. */
INLINE uint8_t *from_place(const order *what, int64_t layer, int64_t i)
{
    return what->from.base + (layer * what->from.num_blocks + what->ids[i]) * what->block_bytes;
}

/* Where it goes; NULL where nothing is copied. */
INLINE uint8_t *to_place(const order *what, int64_t layer, int64_t i)
{
    if (!what->to.base)
        return NULL;
    return what->to.base + (layer * what->to.num_blocks + what->ids[what->count + i]) * what->block_bytes;
}
