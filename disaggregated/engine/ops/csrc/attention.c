/* Paged attention with grouped queries, for prefill and decode alike.

   A unit of work is one kv head and a few consecutive tokens of one sequence: all query heads of the group times those
   tokens are the rows of a small matrix product. The sequence's keys pass by in tiles of TILE_KEYS, whose borders are
   fixed positions in the sequence (0, 192, 384 ...). A tile goes: scores (a product) → softmax so far, with its maximum
   and sum carried along → values (a product).

   What a query sees is its own sequence's keys up to its own position, tile by tile from the first that is in its
   window, and each step of that is fixed by positions alone: decode and prefill, chunks, batch mates and block ids give
   the same bits. Keys that a query does not see are never multiplied into its result, not even by 0. */

#include "attention_softmax.h"

static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : smaller(x, high); }

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

/* Scores with the keys of the tile's positions [0, count), those of rows that see one of a panel's keys. */
static void make_scores(const attention_unit *unit, int64_t first, int64_t count)
{
    static const float zeros[PANEL];
    int64_t head_dim = unit->job->pool->head_dim;
    if (unit->num_rows <= MAX_ROWS) {
        for (int64_t key = 0; key < count; key += LANES) {
            score_tile t = {.queries = unit->queries, .head_dim = head_dim, .scores = unit->scores + key,
                            .score_stride = TILE_KEYS};
            t.keys = keys_together(unit, first + key, count - key, &t.ahead);
            score_keys((int)unit->num_rows, &t);
        }
        return;
    }
    for (int64_t key = 0; key < count; key += PANEL) {
        int64_t skipped = first + key - unit->first_position;
        int64_t first_row = clamp(skipped, 0, unit->num_tokens) * unit->job->group;
        int64_t end_row = clamp(skipped + PANEL - 1 + unit->job->window, 0, unit->num_tokens) * unit->job->group;
        if (first_row >= end_row)
            continue;
        fill_panel(unit, first + key, smaller(PANEL, count - key));
        for (int64_t row = first_row / MAX_ROWS * MAX_ROWS; row < end_row; row += MAX_ROWS) {
            tile t = {.a = unit->queries + row * head_dim, .b = unit->panel, .b_stride = PANEL, .depth = head_dim,
                      .from = zeros, .to = unit->scores + row * TILE_KEYS + key, .to_stride = TILE_KEYS};
            multiply_interleaved((int)smaller(MAX_ROWS, unit->num_rows - row), &t);
        }
    }
}

/* result += probabilities · values, for rows that all see the keys [key, end) of the tile that begins at `first`. */
static void add_values(const attention_unit *unit, int64_t first_row, int64_t num_rows, int64_t first, int64_t key,
                       int64_t end)
{
    const kv_pool *pool = unit->job->pool;
    for (int64_t run; key < end; key += run) {
        value_tile t = {.probability_stride = TILE_KEYS, .head_dim = pool->head_dim};
        if (!unit->widens_values) {
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
            add_value_rows((int)rows, &t);
        }
    }
}

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
            soften(unit, (token + i) * group, group, seen);
            add_values(unit, (token + i) * group, group, first, seen.begin, begin);
        }
        add_values(unit, token * group, together * group, first, begin, end);
        for (int64_t i = 0; i < together; i++) {
            span seen = seen_by(unit, token + i, first);
            add_values(unit, (token + i) * group, group, first, seen.begin > end ? seen.begin : end, seen.end);
        }
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
    make_scores(unit, first, count);
    if (unit->widens_values)
        widen(unit, VALUES, first, count, unit->wide);
    attend_edge(unit, token, whole, first);
    if (whole < whole_end) {
        soften(unit, whole * group, (whole_end - whole) * group, (span){0, TILE_KEYS});
        add_values(unit, whole * group, (whole_end - whole) * group, first, 0, TILE_KEYS);
    }
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

/* Queries of at most MAX_ROWS rows from `row` on, scaled and interleaved. */
static void pack_queries(const attention_unit *unit, int64_t row, int rows, float scale)
{
    int64_t head_dim = unit->job->pool->head_dim;
    const float *queries[MAX_ROWS];
    float *to = unit->queries + row * head_dim;
    for (int r = 0; r < rows; r++)
        queries[r] = unit->job->q + row_place(unit, row + r, unit->job->q_stride);
    if (rows < MAX_ROWS) {
        for (int64_t d = 0; d < head_dim; d++)
            for (int r = 0; r < rows; r++)
                to[d * rows + r] = queries[r][d] * scale;
        return;
    }
    for (int64_t d = 0; d < head_dim; d += LANES) {
        vec part[MAX_ROWS];
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            part[r] = load(queries[r] + d) * scale;
        zip_rows(MAX_ROWS, MAX_ROWS_LOG2, part);
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            store(to + d * MAX_ROWS + r * LANES, part[r]);
    }
}

static void begin(attention_unit *unit)
{
    const attention_job *job = unit->job;
    float scale = job->numbers->softcap > 0 ? job->numbers->scale : job->numbers->scale * LOG2_E;
    for (int64_t row = 0; row < unit->num_rows; row += MAX_ROWS)
        pack_queries(unit, row, (int)smaller(MAX_ROWS, unit->num_rows - row), scale);
    for (int64_t row = 0; row < unit->num_rows; row++) {
        unit->maximum[row] = -INFINITY;
        unit->sum[row] = 0;
    }
    memset(unit->result, 0, (size_t)(unit->num_rows * job->pool->head_dim) * sizeof(float));
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

static int64_t floats_of_unit(int64_t num_rows, int64_t head_dim)
{
    return (PANEL + TILE_KEYS) * head_dim + num_rows * (2 * head_dim + TILE_KEYS + 2) + 2 * TILE_KEYS;
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
    unit.widens_values = job->pool->kind != KV_FLOAT32 || unit.num_rows > MAX_ROWS;
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

/* As many tokens as fit, but few enough for several units a member. */
static int64_t tokens_of_unit(const attention_job *job)
{
    int64_t rows = BYTES_OF_UNIT / (int64_t)sizeof(float) / (2 * job->pool->head_dim + TILE_KEYS);
    int64_t all_rows = job->places->num_tokens * job->numbers->num_heads, members = team_size(job->team);
    if (members > 1)
        rows = clamp(all_rows / (4 * members), smaller(ROWS_WORTH_SHARING, rows), rows);
    return job->group < rows ? rows / job->group : 1;
}

void attend(team *team, const float *q, int64_t q_stride, const kv_pool *pool, const batch_places *places,
            const attention_numbers *numbers, float *to)
{
    attention_job job = {.team = team, .q = q, .q_stride = q_stride, .pool = pool, .places = places,
                         .numbers = numbers, .to = to, .group = numbers->num_heads / pool->num_kv_heads};
    job.window = numbers->window > 0 ? numbers->window : INT32_MAX;
    job.tokens_of_unit = tokens_of_unit(&job);
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
