/* linear: (T, M) = x (T, K) · weightᵀ + bias, in float32, or in 8 bits with float32 going in and coming out.

   Weights are packed once, at load, into strips (linear_tile.h), so a decode step reads each matrix front to back,
   exactly once, at the speed of DRAM: three strips side by side, or six where rows are few, because several streams
   keep more of DRAM's latency hidden than one. For many rows the classical blocking of a matrix product is laid over
   the same strips: a block of x stays in the second level cache, and beside it a block of weights while the rows pass
   by. While one block of weights is multiplied the next one is fetched, a little with each word, so that DRAM and
   multipliers work at the same time.

   Weights in float32 whose numbers all come from something narrower are held as that (linear_narrow.h), a block of them
   becomes float32 in the cache when its turn has come, and all else is the same.

   int8: at each call x is rotated and quantised, every row by a scale of its own (rotate.c, quantize.c), and one line
   turns an output's sum of integers to a float. Blocks of rows, of depth and of columns only say when something is added to a sum, never in which
   order, so a row's result depends on nothing but the row. */

#include "linear_tile.h"

#define BYTES_OF_ROW_BLOCK (600 << 10) /* of x: fits a second level cache, beside a panel and its sums */
#define BYTES_OF_DEEP_BLOCK (144 << 10) /* of a panel, for many rows: sums seldom leave the registers */
#define BYTES_OF_SHALLOW_BLOCK (6 << 10) /* for few: what is fetched ahead comes about one latency of DRAM early */
#define BYTES_OF_WIDENED_BLOCK (12 << 10) /* for few rows and narrow weights: two panels of it fit a first level cache */
#define OPS_WORTH_A_UNIT 500000 /* about 10 µs in float32; waking a helper for less costs more than it brings */
#define TILES_WORTH_HELP 7      /* of x to pack */

typedef struct {
    team *team;
    const linear_weight *weight;
    const float *x; /* (T, K) */
    float *to;      /* (T, M) */
    int64_t num_rows, num_words, strip_bytes;
    any_word *packed_x; /* tiles of MAX_ROWS rows (the last may have fewer), each interleaved over all words */
    quantized_row *quantized;
    int64_t rows_of_block, words_of_block, panels_of_group, num_column_groups;
} linear_job;

/* MAX_ROWS rows of x, or what is left, become one interleaved tile. */
static void pack_x(void *argument, int64_t unit, int member)
{
    linear_job *job = argument;
    int64_t first = unit * MAX_ROWS, depth = job->weight->depth;
    int rows = (int)smaller(MAX_ROWS, job->num_rows - first);
    any_word *to = job->packed_x + first * job->num_words;
    const float *x = job->x + first * depth;
    if (job->weight->kind != LINEAR_INT8) {
        interleave(x, rows, depth, to);
        return;
    }
    size_t tile_words = (size_t)(MAX_ROWS * job->num_words);
    any_word *beside = team_scratch(job->team, member, (tile_words + (size_t)depth) * sizeof(any_word));
    float *rotated = (float *)(beside + tile_words);
    for (int r = 0; r < rows; r++) {
        rotate_row(x + r * depth, depth, rotated);
        job->quantized[first + r] = quantize_row(rotated, depth, (x_value *)(beside + r * job->num_words));
    }
    interleave(beside, rows, job->num_words, to);
}

/* One tile of rows, the panels from `panel` on, and the block of depth that begins with `word`. */
static strip_tile tile_at(const linear_job *job, int64_t row, int64_t panel, int64_t panels, int64_t word)
{
    int64_t kind = job->weight->kind, bytes = job->strip_bytes, column = panel * PANEL;
    int rows = (int)smaller(MAX_ROWS, job->num_rows - row);
    int64_t words = smaller(job->words_of_block, job->num_words - word);
    const uint8_t *head = (const uint8_t *)job->weight->panels + panel * STRIPS_OF_PANEL * bytes;
    const uint8_t *weights = head + head_bytes(kind) + weights_bytes(kind, word);
    bool is_last = word + words == job->num_words;
    return (strip_tile){
        .kind = kind,
        .rows = rows,
        .strips = (int)panels * STRIPS_OF_PANEL,
        .is_first = word == 0,
        .is_last = is_last,
        .num_words = words,
        .x = job->packed_x + row * job->num_words + word * rows,
        .quantized = job->quantized + row,
        .head = head,
        .weights = weights,
        .strip_bytes = bytes,
        .weights_stride = bytes,
        .next = is_last ? head + panels * STRIPS_OF_PANEL * bytes + head_bytes(kind) : weights + weights_bytes(kind, words),
        .to = job->to + row * job->weight->num_columns + column,
        .to_stride = job->weight->num_columns,
        .num_columns = job->weight->num_columns - column,
    };
}

/* The rows that one unit has in hand, and its working memory. */
typedef struct {
    const linear_job *job;
    int64_t first_row, num_tiles;
    float *sums, *widened;
} row_block;

/* All tiles of the rows times a block of the depth of one panel, or of two. Weights of a narrow kind are widened once,
   and stay in the cache while the rows pass by. The tiles share the fetching of what is next. */
static void multiply_rows(const row_block *rows, int64_t panel, int64_t panels, int64_t word)
{
    int64_t kind = rows->job->weight->kind;
    int64_t num_vectors = weights_bytes(kind, rows->job->words_of_block) / VECTOR_BYTES; /* of a strip */
    int64_t share = (num_vectors + rows->num_tiles - 1) / rows->num_tiles;
    for (int64_t i = 0; i < rows->num_tiles; i++) {
        strip_tile tile = tile_at(rows->job, rows->first_row + i * MAX_ROWS, panel, panels, word);
        if (is_narrow(kind)) {
            if (i == 0)
                widen(kind, tile.weights, tile.strip_bytes, tile.strips, tile.num_words, rows->widened);
            tile.kind = LINEAR_FLOAT32;
            tile.weights = (const uint8_t *)rows->widened;
            tile.weights_stride = tile.num_words * VECTOR_BYTES;
        }
        tile.sums = rows->sums + i * MAX_ROWS * PANEL;
        tile.next += i * share * VECTOR_BYTES;
        tile.num_vectors_ahead = share;
        tile.has_few_mates = num_vectors / rows->num_tiles * tile.strips > tile.num_words;
        multiply_tile(&tile);
    }
}

static void multiply_row(const linear_job *job, int64_t panel, int64_t panels)
{
    row_of_strips row = {
        .x = job->x,
        .head = (const uint8_t *)job->weight->panels + panel * STRIPS_OF_PANEL * job->strip_bytes,
        .strip_bytes = job->strip_bytes,
        .num_words = job->num_words,
        .to = job->to + panel * PANEL,
        .num_columns = job->weight->num_columns - panel * PANEL,
    };
    multiply_one_row(job->weight->kind, panels, &row);
}

/* One block of rows times one group of panels. */
static void linear_unit(void *argument, int64_t unit, int member)
{
    const linear_job *job = argument;
    int64_t first_row = unit / job->num_column_groups * job->rows_of_block;
    int64_t end_row = smaller(first_row + job->rows_of_block, job->num_rows);
    int64_t panel = unit % job->num_column_groups * job->panels_of_group;
    int64_t end_panel = smaller(panel + job->panels_of_group, num_panels(job->weight->num_columns));
    row_block rows = {.job = job, .first_row = first_row, .num_tiles = (end_row - first_row + MAX_ROWS - 1) / MAX_ROWS};
    int64_t num_sums = rows.num_tiles * MAX_ROWS * PANEL;
    int64_t num_widened = is_narrow(job->weight->kind) ? 2 * PANEL * job->words_of_block : 0;
    rows.sums = team_scratch(job->team, member, (size_t)(num_sums + num_widened) * sizeof(float));
    rows.widened = rows.sums + num_sums;
    while (panel < end_panel) {
        int64_t panels = end_row - first_row <= FEW_ROWS && panel + 2 <= end_panel ? 2 : 1;
        if (is_narrow(job->weight->kind) && job->num_rows == 1)
            multiply_row(job, panel, panels);
        else
            for (int64_t word = 0; word < job->num_words; word += job->words_of_block)
                multiply_rows(&rows, panel, panels, word);
        panel += panels;
    }
}

/* Units enough for the team to share, but each worth the hand-over. */
static void split_columns(linear_job *job)
{
    int size = team_size(job->team);
    int64_t panels = num_panels(job->weight->num_columns), rows = smaller(job->num_rows, job->rows_of_block);
    int64_t worth = 1 + OPS_WORTH_A_UNIT / (2 * rows * job->num_words * PANEL);
    int64_t wanted = size == 1 ? 1 : 4 * size;
    job->panels_of_group = (panels + wanted - 1) / wanted;
    if (job->panels_of_group < worth)
        job->panels_of_group = worth;
    job->num_column_groups = (panels + job->panels_of_group - 1) / job->panels_of_group;
}

static bool has_few_tiles(int64_t num_rows) { return num_rows < STRIPS_OF_PANEL * MAX_ROWS; }

static void split_rows_and_depth(linear_job *job)
{
    int64_t kind = job->weight->kind, granularity = is_narrow(kind) ? GROUP : 1;
    int64_t tiles = 1 + BYTES_OF_ROW_BLOCK / (4 * job->num_words * MAX_ROWS);
    int64_t few_bytes = is_narrow(kind) ? BYTES_OF_WIDENED_BLOCK : BYTES_OF_SHALLOW_BLOCK;
    int64_t block_bytes = has_few_tiles(job->num_rows) ? few_bytes : BYTES_OF_DEEP_BLOCK;
    int64_t words_of_block = block_bytes / (STRIPS_OF_PANEL * word_bytes(kind));
    int64_t num_blocks = (job->num_words + words_of_block - 1) / words_of_block;
    job->rows_of_block = tiles * MAX_ROWS;
    job->words_of_block = (job->num_words + num_blocks - 1) / num_blocks;
    job->words_of_block = (job->words_of_block + granularity - 1) / granularity * granularity;
}

/* x as the kernel reads it, in the team's memory. */
static void pack_all_x(linear_job *job)
{
    int64_t words = job->num_rows * job->num_words, num_tiles = (job->num_rows + MAX_ROWS - 1) / MAX_ROWS;
    if (job->weight->kind != LINEAR_INT8 && job->num_rows == 1) {
        job->packed_x = (any_word *)job->x;
        return;
    }
    size_t bytes = (size_t)words * sizeof(any_word) + (size_t)job->num_rows * sizeof(quantized_row);
    job->packed_x = team_scratch(job->team, TEAM_SHARED, bytes);
    job->quantized = (quantized_row *)(job->packed_x + words);
    if (num_tiles < TILES_WORTH_HELP)
        for (int64_t i = 0; i < num_tiles; i++)
            pack_x(job, i, 0);
    else
        team_run(job->team, pack_x, job, num_tiles);
}

EXPORT void linear(team *team, const linear_weight *weight, const float *x, int64_t num_rows, float *to)
{
    if (num_rows == 0)
        return;
    linear_job job = {.team = team, .weight = weight, .x = x, .to = to, .num_rows = num_rows,
                      .num_words = num_words(weight->kind, weight->depth),
                      .strip_bytes = strip_bytes(weight->kind, weight->depth)};
    pack_all_x(&job);
    split_rows_and_depth(&job);
    split_columns(&job);
    int64_t num_row_blocks = (num_rows + job.rows_of_block - 1) / job.rows_of_block;
    team_run(team, linear_unit, &job, num_row_blocks * job.num_column_groups);
}
