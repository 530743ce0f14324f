/* Paged attention with grouped queries, for prefill and decode alike.

   A unit of work is one kv head and a few consecutive tokens of one sequence: all query heads of the group times those
   tokens are the rows of a small matrix product. The sequence's keys pass by in tiles of TILE_KEYS, whose borders are
   fixed positions in the sequence (0, 96, 192 ...). A tile goes: keys transposed → scores (a product) → softmax so far,
   with its maximum and sum carried along → values (a product).

   What a query sees is its own sequence's keys up to its own position, tile by tile from position 0, and each
   step of that is fixed by positions alone: decode and prefill, chunks, batch mates and block ids give the same bits.
   Keys beyond a query's position are never multiplied into its result, not even by 0. */

#include "threads.h"
#include "tile.h"

#define TILE_KEYS 96 /* a multiple of PANEL and of PARTIAL_SUMS for every vector width */
#define MAX_HEAD_DIM 256
#define ROWS_OF_UNIT 96 /* queries that share one transposed tile of keys; enough to make the transposing cheap */

/* Block sizes that are multiples of KEYS_AT_ONCE need no copying; every other works too. */
#if LANES == 4
#define KEYS_AT_ONCE 4
#define KEYS_AT_ONCE_LOG2 2
#else
#define KEYS_AT_ONCE 8
#define KEYS_AT_ONCE_LOG2 3
#endif

_Static_assert(TILE_KEYS % PANEL == 0 && TILE_KEYS % PARTIAL_SUMS == 0, "tiles are cut into panels and partial sums");
_Static_assert(PANEL % KEYS_AT_ONCE == 0, "keys that are transposed together go into one panel");

typedef struct {
    const float *q; /* (T, N, D), tokens q_stride floats apart */
    int64_t q_stride;
    const float *pool; /* [block][2][kv head][slot][head_dim] of one layer */
    const int32_t *query_start, *first_position, *block_tables;
    int64_t table_stride, num_rows, num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    float *to; /* (T, N, D), contiguous */
    team *team;
    int64_t tokens_of_unit;
    int64_t *first_slice; /* (num_rows + 1): row r's tokens are the slices [first_slice[r], first_slice[r + 1]) */
} attention_job;

/* One unit and its working memory. Row t * group + h is query head h of the group and token first_token + t. */
typedef struct {
    const attention_job *job;
    const int32_t *block_table;
    int64_t kv_head, group, first_token, num_tokens, first_position, num_rows;
    float *queries; /* scaled, in interleaved tiles of MAX_ROWS rows */
    float *keys;    /* a panel of transposed keys (head_dim, PANEL) */
    float *scores;  /* (num_rows, TILE_KEYS), then probabilities */
    float *result;  /* (num_rows, head_dim), not yet divided by the sums */
    float *maximum, *sum;
} attention_unit;

static int64_t floats_of_unit(int64_t num_rows, int64_t head_dim)
{
    return PANEL * head_dim + num_rows * (2 * head_dim + TILE_KEYS + 2);
}

/* The key (which = 0) or value (1) at a position of the unit's sequence. */
static const float *pool_row(const attention_unit *unit, int which, int64_t position)
{
    const attention_job *job = unit->job;
    int64_t block = unit->block_table[position / job->block_size], slot = position % job->block_size;
    int64_t head = (block * 2 + which) * job->num_kv_heads + unit->kv_head;
    return job->pool + (head * job->block_size + slot) * job->head_dim;
}

/* KEYS_AT_ONCE keys, head_dim floats apart: where they lie when no block ends among them, else copied together. Those
   past `count` are whatever memory holds, and their scores are masked. */
static const float *keys_together(const attention_unit *unit, int64_t first, int64_t count, float *copy)
{
    int64_t head_dim = unit->job->head_dim;
    if (unit->job->block_size % KEYS_AT_ONCE == 0)
        return pool_row(unit, 0, first);
    for (int64_t key = 0; key < smaller(count, KEYS_AT_ONCE); key++)
        memcpy(copy + key * head_dim, pool_row(unit, 0, first + key), (size_t)head_dim * sizeof(float));
    return copy;
}

/* Keys of positions [first, first + count), at most PANEL → a panel (head_dim, PANEL). The values of the same positions
   are fetched on the side, so that DRAM works while the scores are made. */
static void transpose_keys(const attention_unit *unit, int64_t first, int64_t count)
{
    float copy[KEYS_AT_ONCE * MAX_HEAD_DIM];
    int64_t head_dim = unit->job->head_dim;
    int64_t to_value = unit->job->num_kv_heads * unit->job->block_size * head_dim; /* from a key to its value */
    for (int64_t key = 0; key < count; key += KEYS_AT_ONCE) {
        const float *keys = keys_together(unit, first + key, count - key, copy);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            vec rows[KEYS_AT_ONCE];
            UNROLL for (int i = 0; i < KEYS_AT_ONCE; i++) {
                rows[i] = load(keys + i * head_dim + d);
                __builtin_prefetch(keys + i * head_dim + d + to_value);
            }
            zip_rows(KEYS_AT_ONCE, KEYS_AT_ONCE_LOG2, rows);
            UNROLL for (int i = 0; i < LANES; i++)
                memcpy(unit->keys + (d + i) * PANEL + key, (const float *)rows + i * KEYS_AT_ONCE,
                       KEYS_AT_ONCE * sizeof(float));
        }
    }
}

/* Scores of the rows from `first_row` on with the keys of the tile's positions [0, count), a panel at a time. */
static void make_scores(const attention_unit *unit, int64_t first_row, int64_t first, int64_t count)
{
    static const float zeros[PANEL];
    int64_t head_dim = unit->job->head_dim;
    for (int64_t key = 0; key < count; key += PANEL) {
        transpose_keys(unit, first + key, smaller(PANEL, count - key));
        for (int64_t row = first_row / MAX_ROWS * MAX_ROWS; row < unit->num_rows; row += MAX_ROWS) {
            tile t = {.a = unit->queries + row * head_dim, .b = unit->keys, .b_stride = PANEL, .depth = head_dim,
                      .from = zeros, .to = unit->scores + row * TILE_KEYS + key, .to_stride = TILE_KEYS};
            multiply_interleaved((int)smaller(MAX_ROWS, unit->num_rows - row), false, t);
        }
    }
}

/* Scores of one row → probabilities relative to the largest score so far; what was summed before is brought to the
   same measure. From `count` on scores are masked: probability 0, up to where a partial sum ends. */
static void soften(const attention_unit *unit, int64_t row, int64_t count)
{
    float *scores = unit->scores + row * TILE_KEYS, *result = unit->result + row * unit->job->head_dim;
    int64_t end = (count + PARTIAL_SUMS - 1) / PARTIAL_SUMS * PARTIAL_SUMS;
    for (int64_t key = count; key < end; key++)
        scores[key] = -INFINITY;
    vec largest = load(scores);
    for (int64_t key = LANES; key < end; key += LANES)
        largest = larger(load(scores + key), largest);
    float before = unit->maximum[row], maximum = largest_of(largest);
    maximum = maximum > before ? maximum : before;
    vec sums[PARTIAL_SUMS / LANES] = {0};
    for (int64_t key = 0; key < end; key += PARTIAL_SUMS)
        for (int v = 0; v < PARTIAL_SUMS / LANES; v++) {
            vec probability = exponential(load(scores + key + v * LANES) - maximum);
            store(scores + key + v * LANES, probability);
            sums[v] = sums[v] + probability;
        }
    if (maximum > before) {
        float factor = exponential(broadcast(before - maximum))[0];
        unit->maximum[row] = maximum;
        unit->sum[row] = unit->sum[row] * factor;
        for (int64_t d = 0; d < unit->job->head_dim; d += LANES)
            store(result + d, load(result + d) * factor);
    }
    unit->sum[row] += sum_of(sums);
}

/* result += probabilities · values, for rows that all see the keys [key, end) of the tile that begins at `first`. */
static void add_values(const attention_unit *unit, int64_t first_row, int64_t num_rows, int64_t first, int64_t key,
                       int64_t end)
{
    int64_t head_dim = unit->job->head_dim, block_size = unit->job->block_size;
    for (int64_t run; key < end; key += run) {
        run = smaller(end - key, block_size - (first + key) % block_size);
        const float *values = pool_row(unit, 1, first + key);
        for (int64_t d = 0; d < head_dim; d += 2 * LANES)
            for (int64_t row = first_row, rows; row < first_row + num_rows; row += rows) {
                rows = smaller(MAX_ROWS, first_row + num_rows - row);
                float *result = unit->result + row * head_dim + d;
                tile t = {.a = unit->scores + row * TILE_KEYS + key, .b = values + d, .b_stride = head_dim,
                          .depth = run, .from = result, .from_stride = head_dim, .to = result, .to_stride = head_dim};
#define PAIR(rows) TILE_CASE(rows, 2, TILE_KEYS, 1, 0, t)
#define SINGLE(rows) TILE_CASE(rows, 1, TILE_KEYS, 1, 0, t)
                if (head_dim - d >= 2 * LANES)
                    switch (rows) { TILE_CASES(PAIR) }
                else
                    switch (rows) { TILE_CASES(SINGLE) }
#undef PAIR
#undef SINGLE
            }
    }
}

/* The tile in which the tokens [token, end_token) end: each sees some of it. Tokens go together as far as the first of
   them sees, and the rest one by one; every chain is still in the order of the keys. */
static void attend_diagonal(const attention_unit *unit, int64_t token, int64_t end_token, int64_t first)
{
    int64_t group = unit->group, together = smaller(MAX_ROWS / group, end_token - token);
    for (; token < end_token; token += together) {
        together = together < 1 ? 1 : smaller(together, end_token - token);
        int64_t seen = unit->first_position + token + 1 - first;
        for (int64_t i = 0; i < together * group; i++)
            soften(unit, token * group + i, seen + i / group);
        add_values(unit, token * group, together * group, first, 0, seen);
        for (int64_t i = 1; i < together; i++)
            add_values(unit, (token + i) * group, group, first, seen, seen + i);
    }
}

/* All keys from position 0 to the last that one of the unit's tokens may see. */
static void attend(const attention_unit *unit)
{
    int64_t end = unit->first_position + unit->num_tokens;
    for (int64_t first = 0; first < end; first += TILE_KEYS) {
        /* Tokens before `token` have seen all of theirs; those from `beyond` on see the whole tile. */
        int64_t token = first > unit->first_position ? first - unit->first_position : 0;
        int64_t beyond = smaller(first + TILE_KEYS - 1 - unit->first_position, unit->num_tokens);
        beyond = beyond > token ? beyond : token;
        make_scores(unit, token * unit->group, first, smaller(TILE_KEYS, end - first));
        attend_diagonal(unit, token, beyond, first);
        if (beyond == unit->num_tokens)
            continue; /* No token sees the whole tile: its end may lie beyond the block table. */
        for (int64_t row = beyond * unit->group; row < unit->num_rows; row++)
            soften(unit, row, TILE_KEYS);
        add_values(unit, beyond * unit->group, unit->num_rows - beyond * unit->group, first, 0, TILE_KEYS);
    }
}

/* The query of row `row`, or where its result goes: same place in q and in `to`. */
static int64_t place(const attention_unit *unit, int64_t row, int64_t token_stride)
{
    int64_t head = unit->kv_head * unit->group + row % unit->group;
    return (unit->first_token + row / unit->group) * token_stride + head * unit->job->head_dim;
}

static void begin(attention_unit *unit)
{
    const attention_job *job = unit->job;
    int64_t head_dim = job->head_dim;
    for (int64_t row = 0; row < unit->num_rows; row++) {
        int64_t tile = row / MAX_ROWS * MAX_ROWS, rows = smaller(MAX_ROWS, unit->num_rows - tile);
        const float *query = job->q + place(unit, row, job->q_stride);
        for (int64_t d = 0; d < head_dim; d++)
            unit->queries[tile * head_dim + d * rows + row - tile] = query[d] * job->scale;
        unit->maximum[row] = -INFINITY;
        unit->sum[row] = 0;
    }
    memset(unit->result, 0, (size_t)(unit->num_rows * head_dim) * sizeof(float));
}

static void finish(const attention_unit *unit)
{
    const attention_job *job = unit->job;
    for (int64_t row = 0; row < unit->num_rows; row++) {
        float *to = job->to + place(unit, row, job->num_heads * job->head_dim);
        for (int64_t d = 0; d < job->head_dim; d += LANES)
            store(to + d, load(unit->result + row * job->head_dim + d) / unit->sum[row]);
    }
}

/* The row of the batch that the number-th slice of tokens belongs to. */
static int64_t row_of(const attention_job *job, int64_t slice)
{
    int64_t row = 0, end = job->num_rows;
    while (end - row > 1) {
        int64_t middle = (row + end) / 2;
        if (job->first_slice[middle] <= slice)
            row = middle;
        else
            end = middle;
    }
    return row;
}

static void run_unit(void *argument, int64_t number, int member)
{
    const attention_job *job = argument;
    /* The last slices of a prompt see the most keys: begin with them, so that no member is left alone with one. */
    int64_t slice = job->first_slice[job->num_rows] - 1 - number / job->num_kv_heads, row = row_of(job, slice);
    int64_t skipped = (slice - job->first_slice[row]) * job->tokens_of_unit;
    attention_unit unit = {
        .job = job,
        .block_table = job->block_tables + row * job->table_stride,
        .kv_head = number % job->num_kv_heads,
        .group = job->num_heads / job->num_kv_heads,
        .first_token = job->query_start[row] + skipped,
        .num_tokens = smaller(job->tokens_of_unit, job->query_start[row + 1] - job->query_start[row] - skipped),
        .first_position = job->first_position[row] + skipped,
    };
    unit.num_rows = unit.num_tokens * unit.group;
    int64_t most_rows = job->tokens_of_unit * unit.group;
    float *memory = team_scratch(job->team, member, (size_t)floats_of_unit(most_rows, job->head_dim) * sizeof(float));
    unit.keys = memory;
    unit.queries = unit.keys + PANEL * job->head_dim;
    unit.result = unit.queries + most_rows * job->head_dim;
    unit.scores = unit.result + most_rows * job->head_dim;
    unit.maximum = unit.scores + most_rows * TILE_KEYS;
    unit.sum = unit.maximum + most_rows;
    begin(&unit);
    attend(&unit);
    finish(&unit);
}

/* Do the tokens lie within q, and their sequences within the table and the pool? */
static bool row_is_sound(const attention_job *job, int64_t row, int64_t num_tokens, int64_t num_blocks)
{
    int64_t begin = job->query_start[row], end = job->query_start[row + 1], first = job->first_position[row];
    if (begin < 0 || end < begin || end > num_tokens || first < 0)
        return false;
    int64_t blocks_needed = (first + end - begin + job->block_size - 1) / job->block_size;
    if (blocks_needed > job->table_stride)
        return false;
    for (int64_t i = 0; i < blocks_needed; i++) {
        int32_t block = job->block_tables[row * job->table_stride + i];
        if (block < 0 || block >= num_blocks)
            return false;
    }
    return true;
}

/* Returns -1, or the first row that would reach outside the memory it is given; then nothing was read or written. */
EXPORT int64_t paged_attention(team *team, const float *q, int64_t q_stride, const float *pool,
                               const int32_t *query_start, const int32_t *first_position, const int32_t *block_tables,
                               int64_t table_stride, int64_t num_tokens, int64_t num_blocks, int64_t num_rows,
                               int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                               float scale, float *to)
{
    attention_job job = {.team = team, .q = q, .q_stride = q_stride, .pool = pool, .query_start = query_start,
                         .first_position = first_position, .block_tables = block_tables, .table_stride = table_stride,
                         .num_rows = num_rows, .num_heads = num_heads, .num_kv_heads = num_kv_heads,
                         .head_dim = head_dim, .block_size = block_size, .scale = scale, .to = to};
    int64_t group = num_heads / num_kv_heads;
    job.tokens_of_unit = group < ROWS_OF_UNIT ? ROWS_OF_UNIT / group : 1;
    job.first_slice = team_scratch(team, TEAM_SHARED, (size_t)(num_rows + 1) * sizeof(int64_t));
    job.first_slice[0] = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        if (!row_is_sound(&job, row, num_tokens, num_blocks))
            return row;
        int64_t length = query_start[row + 1] - query_start[row];
        job.first_slice[row + 1] = job.first_slice[row] + (length + job.tokens_of_unit - 1) / job.tokens_of_unit;
    }
    team_run(team, run_unit, &job, job.first_slice[num_rows] * num_kv_heads);
    return -1;
}
