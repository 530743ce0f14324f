/* Paged attention with grouped queries, for prefill and decode alike.

   A unit of work is one kv head and a few consecutive tokens of one sequence: all query heads of the group times those
   tokens are the rows of a small matrix product. The sequence's keys pass by in tiles of TILE_KEYS, whose borders are
   fixed positions in the sequence (0, 96, 192 ...). A tile goes: scores (a product) → softmax so far, with its maximum
   and sum carried along → values (a product).

   What a query sees is its own sequence's keys up to its own position, tile by tile from the first that is in its
   window, and each step of that is fixed by positions alone: decode and prefill, chunks, batch mates and block ids give
   the same bits. Keys that a query does not see are never multiplied into its result, not even by 0. */

#include "attention.h"
#include "attention_tile.h"

#define TILE_KEYS 96 /* a multiple of PANEL and of PARTIAL_SUMS for every vector width */
#define ROWS_OF_UNIT 96 /* queries that share one transposed tile of keys; enough to make the transposing cheap */

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
};

static int64_t floats_of_unit(int64_t num_rows, int64_t head_dim)
{
    return (PANEL + TILE_KEYS) * head_dim + num_rows * (2 * head_dim + TILE_KEYS + 2) + 2 * TILE_KEYS;
}

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

/* What DRAM should be asked for while the keys (or values) of a position are read at `from`: those of the next tile, be
   it of the next unit. As a distance in bytes; 0 when there is none. */
static int64_t ahead_of(const attention_unit *unit, int plane, int64_t position, const char *from)
{
    int64_t next = position + TILE_KEYS;
    if (next >= unit->first_position + unit->num_tokens) {
        unit = unit->next;
        if (unit == NULL)
            return 0;
        next = first_tile(unit) + position % TILE_KEYS;
        if (next >= unit->first_position + unit->num_tokens)
            return 0;
    }
    return numbers_at(unit, plane, next) - from;
}

INLINE void widen_fixed(const int kind, const int64_t bytes, const char *from, int64_t count, int64_t ahead, float *to)
{
    for (int64_t i = 0; i < count; i += LANES) {
        store(to + i, kv_load(kind, from + i * bytes));
        fetch(from + i * bytes + ahead);
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

/* Keys of positions [first, first + count), at most PANEL → a panel (head_dim, PANEL). */
static void fill_panel(const attention_unit *unit, int64_t first, int64_t count)
{
    int64_t head_dim = unit->job->pool->head_dim;
    for (int64_t key = 0; key < count; key += LANES) {
        int64_t ahead;
        const float *keys = keys_together(unit, first + key, count - key, &ahead);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            vec part[LANES];
            transpose_keys(keys + d, head_dim, ahead, part);
            UNROLL for (int i = 0; i < LANES; i++)
                store(unit->panel + (d + i) * PANEL + key, part[i]);
        }
    }
}

/* Scores of the rows [first_row, end_row) with the keys of the tile's positions [0, count). */
static void make_scores(const attention_unit *unit, int64_t first_row, int64_t end_row, int64_t first, int64_t count)
{
    static const float zeros[PANEL];
    int64_t head_dim = unit->job->pool->head_dim;
    if (unit->num_rows <= MAX_ROWS) {
        for (int64_t key = 0; key < count; key += LANES) {
            score_tile t = {.queries = unit->queries, .head_dim = head_dim, .scores = unit->scores + key,
                            .score_stride = TILE_KEYS};
            t.keys = keys_together(unit, first + key, count - key, &t.ahead);
            score_keys((int)unit->num_rows, t);
        }
        return;
    }
    for (int64_t key = 0; key < count; key += PANEL) {
        fill_panel(unit, first + key, smaller(PANEL, count - key));
        for (int64_t row = first_row / MAX_ROWS * MAX_ROWS; row < end_row; row += MAX_ROWS) {
            tile t = {.a = unit->queries + row * head_dim, .b = unit->panel, .b_stride = PANEL, .depth = head_dim,
                      .from = zeros, .to = unit->scores + row * TILE_KEYS + key, .to_stride = TILE_KEYS};
            multiply_interleaved((int)smaller(MAX_ROWS, unit->num_rows - row), false, t);
        }
    }
}

/* Scores of one row, made of whole numbers, times the scales of their keys. */
static void scale_scores(const attention_unit *unit, float *scores, int64_t begin, int64_t end)
{
    for (int64_t key = begin; key < end; key += LANES)
        store(scores + key, load(scores + key) * load(unit->key_scales + key));
}

/* tanh x = 1 - 2 / (e^2x + 1): its error is small against 1, not against x, which is what a score needs. */
static void cap_scores(float softcap, float *scores, int64_t begin, int64_t end)
{
    float inverse = 1.0f / softcap;
    for (int64_t key = begin; key < end; key += LANES) {
        vec power = exponential(load(scores + key) * inverse * 2.0f);
        store(scores + key, softcap * (1.0f - 2.0f / (power + 1.0f)));
    }
}

/* Scores of one row, which sees the keys [begin, end) of the tile → probabilities relative to the largest score so far;
   what was summed before is brought to the same measure. Masked scores have probability 0, up to where a partial sum
   begins and ends. */
static void soften(const attention_unit *unit, int64_t row, int64_t begin, int64_t end)
{
    const attention_job *job = unit->job;
    float *scores = unit->scores + row * TILE_KEYS, *result = unit->result + row * job->pool->head_dim;
    int64_t low = begin / PARTIAL_SUMS * PARTIAL_SUMS, high = (end + PARTIAL_SUMS - 1) / PARTIAL_SUMS * PARTIAL_SUMS;
    if (job->pool->kind == KV_INT8)
        scale_scores(unit, scores, low, high);
    if (job->numbers->softcap > 0)
        cap_scores(job->numbers->softcap, scores, low, high);
    for (int64_t key = low; key < begin; key++)
        scores[key] = -INFINITY;
    for (int64_t key = end; key < high; key++)
        scores[key] = -INFINITY;
    vec largest = load(scores + low);
    for (int64_t key = low + LANES; key < high; key += LANES)
        largest = larger(load(scores + key), largest);
    float before = unit->maximum[row], maximum = largest_of(largest);
    maximum = maximum > before ? maximum : before;
    vec sums[PARTIAL_SUMS / LANES] = {0};
    for (int64_t key = low; key < high; key += PARTIAL_SUMS)
        for (int v = 0; v < PARTIAL_SUMS / LANES; v++) {
            vec probability = exponential(load(scores + key + v * LANES) - maximum);
            store(scores + key + v * LANES, probability);
            sums[v] = sums[v] + probability;
        }
    if (maximum > before) {
        float factor = exponential(broadcast(before - maximum))[0];
        unit->maximum[row] = maximum;
        unit->sum[row] = unit->sum[row] * factor;
        for (int64_t d = 0; d < job->pool->head_dim; d += LANES)
            store(result + d, load(result + d) * factor);
    }
    unit->sum[row] += sum_of(sums);
    if (job->pool->kind == KV_INT8)
        for (int64_t key = low; key < high; key += LANES)
            store(scores + key, load(scores + key) * load(unit->value_scales + key));
}

/* result += probabilities · values, for rows that all see the keys [key, end) of the tile that begins at `first`. */
static void add_values(const attention_unit *unit, int64_t first_row, int64_t num_rows, int64_t first, int64_t key,
                       int64_t end)
{
    const kv_pool *pool = unit->job->pool;
    for (int64_t run; key < end; key += run) {
        value_tile t = {.probability_stride = TILE_KEYS, .head_dim = pool->head_dim};
        if (pool->kind == KV_FLOAT32) {
            t.count = run = run_of(unit, first + key, end - key);
            const char *values = numbers_at(unit, VALUES, first + key);
            t.values = (const float *)(const void *)values;
            t.ahead = ahead_of(unit, VALUES, first + key, values);
        } else {
            t.count = run = end - key;
            t.values = unit->wide + key * pool->head_dim;
        }
        for (int64_t row = first_row, rows; row < first_row + num_rows; row += rows) {
            rows = smaller(VALUE_ROWS, first_row + num_rows - row);
            t.probabilities = unit->scores + row * TILE_KEYS + key;
            t.result = unit->result + row * pool->head_dim;
            add_value_rows((int)rows, t);
        }
    }
}

typedef struct {
    int64_t begin, end;
} span;

/* The keys of the tile at `first` that a token of the unit sees. */
static span seen_by(const attention_unit *unit, int64_t token, int64_t first)
{
    int64_t end = unit->first_position + token + 1 - first, begin = end - unit->job->window;
    return (span){begin > 0 ? begin : 0, smaller(end, TILE_KEYS)};
}

/* Tokens of which each sees a part of the tile. They go together as far as all of them see, and what only some see is
   added one by one before and after; every chain is still in the order of the keys. */
static void attend_edge(const attention_unit *unit, int64_t token, int64_t end_token, int64_t first)
{
    int64_t group = unit->job->group, most = smaller(MAX_ROWS / group, end_token - token);
    for (int64_t together; token < end_token; token += together) {
        together = most < 1 ? 1 : smaller(most, end_token - token);
        int64_t begin = seen_by(unit, token + together - 1, first).begin, end = seen_by(unit, token, first).end;
        begin = smaller(begin, end); /* What all of them see: [begin, end), perhaps nothing. */
        for (int64_t i = 0; i < together; i++) {
            span seen = seen_by(unit, token + i, first);
            for (int64_t row = (token + i) * group; row < (token + i + 1) * group; row++)
                soften(unit, row, seen.begin, seen.end);
            add_values(unit, (token + i) * group, group, first, seen.begin, begin);
        }
        add_values(unit, token * group, together * group, first, begin, end);
        for (int64_t i = 0; i < together; i++) {
            span seen = seen_by(unit, token + i, first);
            add_values(unit, (token + i) * group, group, first, seen.begin > end ? seen.begin : end, seen.end);
        }
    }
}

static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : smaller(x, high); }

/* The scales of a tile's keys and values. */
static void read_scales(const attention_unit *unit, int64_t first, int64_t count)
{
    for (int64_t key = 0; key < count; key++) {
        int64_t place, block = block_of(unit, KEYS, first + key, &place);
        unit->key_scales[key] = *kv_scale(unit->job->pool, block, place);
        block = block_of(unit, VALUES, first + key, &place);
        unit->value_scales[key] = *kv_scale(unit->job->pool, block, place);
    }
}

static void attend_tile(const attention_unit *unit, int64_t first)
{
    int64_t group = unit->job->group, window = unit->job->window, skipped = first - unit->first_position;
    /* Tokens [token, last) see some of the tile, of them [whole, whole_end) all of it. */
    int64_t token = clamp(skipped, 0, unit->num_tokens);
    int64_t last = clamp(skipped + TILE_KEYS - 1 + window, 0, unit->num_tokens);
    int64_t whole = clamp(skipped + TILE_KEYS - 1, token, last);
    int64_t whole_end = clamp(skipped + window, whole, last);
    int64_t count = smaller(TILE_KEYS, unit->num_tokens - skipped);
    if (unit->job->pool->kind == KV_INT8)
        read_scales(unit, first, count);
    make_scores(unit, token * group, last * group, first, count);
    if (unit->job->pool->kind != KV_FLOAT32)
        widen(unit, VALUES, first, count, unit->wide);
    attend_edge(unit, token, whole, first);
    for (int64_t row = whole * group; row < whole_end * group; row++)
        soften(unit, row, 0, TILE_KEYS);
    if (whole < whole_end)
        add_values(unit, whole * group, (whole_end - whole) * group, first, 0, TILE_KEYS);
    attend_edge(unit, whole_end, last, first);
}

static void attend_all(const attention_unit *unit)
{
    for (int64_t first = first_tile(unit); first < unit->first_position + unit->num_tokens; first += TILE_KEYS)
        attend_tile(unit, first);
}

/* The query of row `row`, or where its result goes: same place in q and in `to`. */
static int64_t row_place(const attention_unit *unit, int64_t row, int64_t token_stride)
{
    int64_t group = unit->job->group, head = unit->kv_head * group + row % group;
    return (unit->first_token + row / group) * token_stride + head * unit->job->pool->head_dim;
}

static void begin(attention_unit *unit)
{
    const attention_job *job = unit->job;
    int64_t head_dim = job->pool->head_dim;
    for (int64_t row = 0; row < unit->num_rows; row++) {
        int64_t tile = row / MAX_ROWS * MAX_ROWS, rows = smaller(MAX_ROWS, unit->num_rows - tile);
        const float *query = job->q + row_place(unit, row, job->q_stride);
        for (int64_t d = 0; d < head_dim; d++)
            unit->queries[tile * head_dim + d * rows + row - tile] = query[d] * job->numbers->scale;
        unit->maximum[row] = -INFINITY;
        unit->sum[row] = 0;
    }
    memset(unit->result, 0, (size_t)(unit->num_rows * head_dim) * sizeof(float));
}

static void finish(const attention_unit *unit)
{
    const attention_job *job = unit->job;
    int64_t head_dim = job->pool->head_dim;
    for (int64_t row = 0; row < unit->num_rows; row++) {
        float *to = job->to + row_place(unit, row, job->numbers->num_heads * head_dim);
        for (int64_t d = 0; d < head_dim; d += LANES)
            store(to + d, load(unit->result + row * head_dim + d) / unit->sum[row]);
    }
}

/* The row of the batch that the number-th slice of tokens belongs to. */
static int64_t row_of(const attention_job *job, int64_t slice)
{
    int64_t row = 0, end = job->places->num_rows;
    while (end - row > 1) {
        int64_t middle = (row + end) / 2;
        if (job->first_slice[middle] <= slice)
            row = middle;
        else
            end = middle;
    }
    return row;
}

static void lay_out_memory(attention_unit *unit, int member)
{
    const attention_job *job = unit->job;
    int64_t most_rows = job->tokens_of_unit * job->group, head_dim = job->pool->head_dim;
    size_t bytes = (size_t)floats_of_unit(most_rows, head_dim) * sizeof(float);
    unit->panel = team_scratch(job->team, member, bytes);
    unit->wide = unit->panel + PANEL * head_dim;
    unit->queries = unit->wide + TILE_KEYS * head_dim;
    unit->result = unit->queries + most_rows * head_dim;
    unit->scores = unit->result + most_rows * head_dim;
    unit->key_scales = unit->scores + most_rows * TILE_KEYS;
    unit->value_scales = unit->key_scales + TILE_KEYS;
    unit->maximum = unit->value_scales + TILE_KEYS;
    unit->sum = unit->maximum + most_rows;
}

/* Which tokens and kv head are the number-th unit. */
static attention_unit unit_of(const attention_job *job, int64_t number)
{
    const batch_places *places = job->places;
    /* The last slices of a prompt see the most keys: begin with them, so that no member is left alone with one. */
    int64_t num_kv_heads = job->pool->num_kv_heads;
    int64_t slice = job->first_slice[places->num_rows] - 1 - number / num_kv_heads, row = row_of(job, slice);
    int64_t skipped = (slice - job->first_slice[row]) * job->tokens_of_unit;
    int64_t num_tokens = smaller(job->tokens_of_unit, places->query_start[row + 1] - places->query_start[row] - skipped);
    return (attention_unit){
        .job = job,
        .block_table = places->block_tables + row * places->table_stride,
        .kv_head = number % num_kv_heads,
        .first_token = places->query_start[row] + skipped,
        .num_tokens = num_tokens,
        .first_position = places->first_position[row] + skipped,
        .num_rows = num_tokens * job->group,
    };
}

static void run_unit(void *argument, int64_t number, int member)
{
    const attention_job *job = argument;
    attention_unit unit = unit_of(job, number), next;
    int64_t next_number = number + team_size(job->team);
    if (next_number < job->first_slice[job->places->num_rows] * job->pool->num_kv_heads) {
        next = unit_of(job, next_number);
        unit.next = &next;
    }
    lay_out_memory(&unit, member);
    begin(&unit);
    attend_all(&unit);
    finish(&unit);
}

static bool row_is_sound(const batch_places *places, const kv_pool *pool, int64_t row)
{
    int64_t begin = places->query_start[row], end = places->query_start[row + 1], first = places->first_position[row];
    if (begin < 0 || end < begin || end > places->num_tokens || first < 0)
        return false;
    int64_t blocks_needed = (first + end - begin + pool->block_size - 1) / pool->block_size;
    if (blocks_needed > places->table_stride)
        return false;
    for (int64_t i = 0; i < blocks_needed; i++) {
        int32_t block = places->block_tables[row * places->table_stride + i];
        if (block < 0 || block >= pool->num_blocks)
            return false;
    }
    return true;
}

int64_t first_unsound_row(const batch_places *places, const kv_pool *pool)
{
    for (int64_t row = 0; row < places->num_rows; row++)
        if (!row_is_sound(places, pool, row))
            return row;
    return -1;
}

void attend(team *team, const float *q, int64_t q_stride, const kv_pool *pool, const batch_places *places,
            const attention_numbers *numbers, float *to)
{
    attention_job job = {.team = team, .q = q, .q_stride = q_stride, .pool = pool, .places = places,
                         .numbers = numbers, .to = to, .group = numbers->num_heads / pool->num_kv_heads};
    job.window = numbers->window > 0 ? numbers->window : INT32_MAX;
    job.tokens_of_unit = job.group < ROWS_OF_UNIT ? ROWS_OF_UNIT / job.group : 1;
    job.first_slice = team_scratch(team, TEAM_SHARED, (size_t)(places->num_rows + 1) * sizeof(int64_t));
    job.first_slice[0] = 0;
    for (int64_t row = 0; row < places->num_rows; row++) {
        int64_t length = places->query_start[row + 1] - places->query_start[row];
        job.first_slice[row + 1] = job.first_slice[row] + (length + job.tokens_of_unit - 1) / job.tokens_of_unit;
    }
    team_run(team, run_unit, &job, job.first_slice[places->num_rows] * pool->num_kv_heads);
}

/* Returns -1, or the first row that would reach outside the memory it is given; then nothing was read or written. */
EXPORT int64_t paged_attention(team *team, const float *q, int64_t q_stride, const kv_pool *pool,
                               const batch_places *places, const attention_numbers *numbers, float *to)
{
    int64_t unsound = first_unsound_row(places, pool);
    if (unsound < 0)
        attend(team, q, q_stride, pool, places, numbers, to);
    return unsound;
}
