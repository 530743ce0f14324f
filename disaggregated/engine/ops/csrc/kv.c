/* store_kv: keys and values into their slots of the pool, rounded to its dtype. */

#include "kv.h"
#include "elementwise.h"

/* Symmetric, with the scale that the largest of the numbers asks for. Numbers too small to divide by are all 0; of
   infinity and NaN nothing can be kept, so the scale says NaN. */
static void store_int8(const float *from, int64_t count, int8_t *to, float *scale)
{
    float largest = 0;
    bool is_finite = true;
    for (int64_t i = 0; i < count; i++) {
        float magnitude = fabsf(from[i]);
        is_finite &= magnitude <= 3.4028234663852886e38f;
        largest = magnitude > largest ? magnitude : largest;
    }
    *scale = !is_finite ? NAN : largest < 1e-36f ? 0 : largest / 127.0f;
    float factor = is_finite && largest >= 1e-36f ? 127.0f / largest : 0;
    for (int64_t i = 0; i < count; i++)
        to[i] = factor == 0 ? 0 : (int8_t)rintf(from[i] * factor);
}

static void store_numbers(const kv_pool *pool, const float *from, int64_t block, int64_t place)
{
    char *to = kv_numbers(pool, block, place);
    int64_t count = pool->head_dim;
    uint16_t *halves = (uint16_t *)(void *)to;
    switch (pool->kind) {
    case KV_FLOAT32:
        memcpy(to, from, (size_t)count * sizeof(float));
        break;
    case KV_BFLOAT16:
        for (int64_t i = 0; i < count; i++)
            halves[i] = bfloat16_of(from[i]);
        break;
    case KV_FLOAT16:
        for (int64_t i = 0; i < count; i++)
            halves[i] = float16_of(from[i]);
        break;
    default:
        store_int8(from, count, (int8_t *)to, kv_scale(pool, block, place));
    }
}

void kv_store_token(const kv_pool *pool, const float *key, const float *value, int64_t slot)
{
    int64_t block = slot / pool->block_size, offset = slot % pool->block_size;
    for (int64_t head = 0; head < pool->num_kv_heads; head++) {
        store_numbers(pool, key + head * pool->head_dim, block, kv_place(pool, KEYS, head, offset));
        store_numbers(pool, value + head * pool->head_dim, block, kv_place(pool, VALUES, head, offset));
    }
}

/* Keys and values (tokens, kv heads, head_dim), tokens any stride apart. Returns -1, or the first token whose slot is
   not in the pool; then nothing was written. */
EXPORT int64_t store_kv(const float *key, int64_t key_stride, const float *value, int64_t value_stride,
                        const kv_pool *pool, const int64_t *slots, int64_t num_tokens)
{
    int64_t outside = first_outside(slots, num_tokens, pool->num_blocks * pool->block_size);
    if (outside >= 0)
        return outside;
    for (int64_t token = 0; token < num_tokens; token++)
        kv_store_token(pool, key + token * key_stride, value + token * value_stride, slots[token]);
    return -1;
}
