/* One layer's KV pool, and how its numbers become float32 and back.

   A block holds [plane][kv head][slot][head_dim] numbers, keys in plane 0 and values in plane 1; behind those of a
   quantised pool lie their scales, [plane][kv head][slot] in float32. What is computed with is always float32. */

#pragma once

#include "narrow.h"

enum { KV_FLOAT32 = 0, KV_BFLOAT16 = 1, KV_FLOAT16 = 2, KV_INT8 = 3 };
enum { KEYS = 0, VALUES = 1 };

/* Mirrored by KVPool in native_kv.py. */
typedef struct {
    int64_t kind;         /* KV_… */
    char *blocks;         /* owned by Python */
    int64_t block_stride; /* bytes from one block to the next */
    int64_t to_scales;    /* bytes from where a block begins to its scales; only of a quantised pool */
    int64_t num_blocks, num_kv_heads, block_size, head_dim;
} kv_pool;

INLINE int64_t kv_number_bytes(int64_t kind) { return kind == KV_FLOAT32 ? 4 : kind == KV_INT8 ? 1 : 2; }

/* Which vector of head_dim numbers a slot's is, counted within its block. */
INLINE int64_t kv_place(const kv_pool *pool, int plane, int64_t kv_head, int64_t slot)
{
    return (plane * pool->num_kv_heads + kv_head) * pool->block_size + slot;
}

INLINE char *kv_numbers(const kv_pool *pool, int64_t block, int64_t place)
{
    return pool->blocks + block * pool->block_stride + place * pool->head_dim * kv_number_bytes(pool->kind);
}

INLINE float *kv_scale(const kv_pool *pool, int64_t block, int64_t place)
{
    return (float *)(void *)(pool->blocks + block * pool->block_stride + pool->to_scales) + place;
}

/* LANES numbers of a kind, which is a compile-time constant once inlined. */
INLINE vec kv_load(const int kind, const char *from)
{
    if (kind == KV_FLOAT32)
        return load((const float *)(const void *)from);
    if (kind == KV_INT8)
        return __builtin_convertvector(bytes_at(from), vec);
    return kind == KV_BFLOAT16 ? bfloat16_at(from) : float16_at(from);
}
