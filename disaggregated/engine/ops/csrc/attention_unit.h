/* A unit of attention.c, its memory, and where it reads its sequence's keys and values. */

#pragma once

#include "attention.h"
#include "attention_tile.h"

#define TILE_KEYS 192 /* a multiple of PANEL and of PARTIAL_SUMS for every vector width */
#define KEYS_AHEAD 32 /* 16 KB of float32 for a common head: more than DRAM's latency, less than the first level cache */
#define BYTES_OF_UNIT (512 << 10) /* of queries, scores and results that share a transposed tile of keys: they fit a second
                                     level cache, and are enough to make the transposing cheap */
#define ROWS_WORTH_SHARING 96     /* of a unit made smaller so that every member of a team has some */

_Static_assert(TILE_KEYS % PANEL == 0 && TILE_KEYS % PARTIAL_SUMS == 0, "tiles are cut into panels and partial sums");

typedef struct {
    const float *q; /* (T, N, D), tokens q_stride floats apart */
    int64_t q_stride;
    const kv_pool *pool;
    const batch_places *places;
    const attention_numbers *numbers;
    float *to; /* (T, N, D), contiguous */
    team *team;
    int64_t group, tokens_of_unit, window;
    int64_t *first_slice; /* (num_rows + 1): row r's tokens are the slices [first_slice[r], first_slice[r + 1]) */
} attention_job;

/* One unit and its working memory. Row t * group + h is query head h of the group and token first_token + t. */
typedef struct attention_unit attention_unit;
struct attention_unit {
    const attention_job *job;
    const attention_unit *next; /* what this member probably does then; NULL: nothing */
    const int32_t *block_table;
    int64_t kv_head, first_token, num_tokens, first_position, num_rows;
    float *queries; /* scaled, in interleaved tiles of MAX_ROWS rows */
    float *panel;   /* transposed keys (head_dim, PANEL) */
    float *wide;    /* (TILE_KEYS, head_dim): keys, then values, that cannot be read where they lie */
    float *scores;  /* (num_rows, TILE_KEYS), then probabilities */
    float *result;  /* (num_rows, head_dim), not yet divided by the sums */
    float *maximum, *sum;
    float *key_scales, *value_scales; /* (TILE_KEYS), of a quantised pool */
    bool widens_values; /* they are not float32, or read by so many rows that it pays to lay them side by side */
};

/* The block of a position of the unit's sequence, and in `place` where its key (or value) lies there. */
static int64_t block_of(const attention_unit *unit, int plane, int64_t position, int64_t *place)
{
    const kv_pool *pool = unit->job->pool;
    *place = kv_place(pool, plane, unit->kv_head, position % pool->block_size);
    return unit->block_table[position / pool->block_size];
}

static const char *numbers_at(const attention_unit *unit, int plane, int64_t position)
{
    int64_t place, block = block_of(unit, plane, position, &place);
    return kv_numbers(unit->job->pool, block, place);
}

/* Positions from `position` on that lie side by side, at most `count`. */
static int64_t run_of(const attention_unit *unit, int64_t position, int64_t count)
{
    int64_t block_size = unit->job->pool->block_size;
    return smaller(count, block_size - position % block_size);
}

/* Where the first tile begins that a token of the unit sees anything of. */
static int64_t first_tile(const attention_unit *unit)
{
    int64_t begin = unit->first_position + 1 - unit->job->window;
    return begin > 0 ? begin / TILE_KEYS * TILE_KEYS : 0;
}

/* What DRAM should be asked for while the keys (or values) of a position are read at `from`, as a distance in bytes: what
   is read KEYS_AHEAD keys later. After a tile's keys come its values, then the next tile's keys, be it of the next
   unit. 0 when there is nothing. */
static int64_t ahead_of(const attention_unit *unit, int plane, int64_t position, const char *from)
{
    int64_t end = unit->first_position + unit->num_tokens, tile = position / TILE_KEYS * TILE_KEYS;
    int64_t tile_end = smaller(tile + TILE_KEYS, end), next = position + KEYS_AHEAD;
    if (next >= tile_end) {
        int64_t beyond = next - tile_end;
        if (plane == VALUES && tile_end == end) {
            unit = unit->next;
            if (unit == NULL)
                return 0;
            end = unit->first_position + unit->num_tokens;
            tile_end = first_tile(unit);
        }
        next = plane == KEYS ? tile + beyond : tile_end + beyond;
        plane = plane == KEYS ? VALUES : KEYS;
        if (next >= end)
            return 0;
    }
    return numbers_at(unit, plane, next) - from;
}

INLINE void widen_fixed(const int kind, const int64_t bytes, const char *from, int64_t count, int64_t ahead, float *to)
{
    for (int64_t i = 0; i < count; i += LANES) {
        store(to + i, kv_load(kind, from + i * bytes));
        __builtin_prefetch(from + i * bytes + ahead);
    }
}

/* Keys or values of `count` positions as float32, side by side. */
static void widen(const attention_unit *unit, int plane, int64_t position, int64_t count, float *to)
{
    const kv_pool *pool = unit->job->pool;
    for (int64_t run; count > 0; count -= run, position += run) {
        run = run_of(unit, position, count);
        const char *from = numbers_at(unit, plane, position);
        int64_t floats = run * pool->head_dim, ahead = ahead_of(unit, plane, position, from);
        if (pool->kind == KV_FLOAT32)
            widen_fixed(KV_FLOAT32, 4, from, floats, ahead, to);
        else if (pool->kind == KV_BFLOAT16)
            widen_fixed(KV_BFLOAT16, 2, from, floats, ahead, to);
        else if (pool->kind == KV_FLOAT16)
            widen_fixed(KV_FLOAT16, 2, from, floats, ahead, to);
        else
            widen_fixed(KV_INT8, 1, from, floats, ahead, to);
        to += floats;
    }
}

/* LANES keys, head_dim floats apart: where they lie when they are float32 and no block ends among them, else widened.
   Those past `count` are whatever memory holds, and their scores are masked. `ahead`: what to fetch beside them. */
static const float *keys_together(const attention_unit *unit, int64_t first, int64_t count, int64_t *ahead)
{
    const kv_pool *pool = unit->job->pool;
    *ahead = 0;
    if (pool->kind == KV_FLOAT32 && pool->block_size % LANES == 0) {
        const char *from = numbers_at(unit, KEYS, first);
        *ahead = ahead_of(unit, KEYS, first, from);
        return (const float *)(const void *)from;
    }
    widen(unit, KEYS, first, smaller(count, LANES), unit->wide);
    return unit->wide;
}

/* The scales of a tile's keys and values. */
static void read_scales(const attention_unit *unit, int64_t first, int64_t count)
{
    for (int64_t key = 0, run; key < count; key += run) {
        run = run_of(unit, first + key, count - key);
        int64_t place, block = block_of(unit, KEYS, first + key, &place);
        memcpy(unit->key_scales + key, kv_scale(unit->job->pool, block, place), (size_t)run * sizeof(float));
        block = block_of(unit, VALUES, first + key, &place);
        memcpy(unit->value_scales + key, kv_scale(unit->job->pool, block, place), (size_t)run * sizeof(float));
    }
}
