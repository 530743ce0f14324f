/* linear: (T, M) = x (T, K) · weightᵀ + bias, in float32, or in 8 bits with float32 going in and coming out.

   Weights are packed once, at load, into strips (linear_tile.h), so a decode step reads each matrix front to back,
   exactly once, at the speed of DRAM: three strips side by side, or six where rows are few, because several streams
   keep more of DRAM's latency hidden than one. For many rows the classical blocking of a matrix product is laid over
   the same strips: a block of x stays in the second level cache, and beside it a block of weights while the rows pass
   by. While one block of weights is multiplied the next one is fetched, a little with each word, so that DRAM and
   multipliers work at the same time.

   int8: at each call x is rotated and quantised, every row by a scale of its own (rotate.c, quantize.c), and one line
   turns an output's sum of integers to a float. Blocks of rows, of depth and of columns only say when something is added to a sum, never in which
   order, so a row's result depends on nothing but the row. */

#include "linear_tile.h"

#define BYTES_OF_ROW_BLOCK (600 << 10) /* of x: fits a second level cache, beside a panel and its sums */
#define BYTES_OF_DEEP_BLOCK (144 << 10) /* of a panel, for many rows: sums seldom leave the registers */
#define BYTES_OF_SHALLOW_BLOCK (6 << 10) /* for few: what is fetched ahead comes about one latency of DRAM early */
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
    if (job->weight->kind == LINEAR_FLOAT32) {
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
    const uint8_t *weights = head + head_bytes(kind) + word * word_bytes(kind);
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
        .next = is_last ? head + panels * STRIPS_OF_PANEL * bytes + head_bytes(kind) : weights + words * word_bytes(kind),
        .to = job->to + row * job->weight->num_columns + column,
        .to_stride = job->weight->num_columns,
        .num_columns = job->weight->num_columns - column,
    };
}

/* One block of rows times one group of panels. */
static void linear_unit(void *argument, int64_t unit, int member)
{
    const linear_job *job = argument;
    int64_t first_row = unit / job->num_column_groups * job->rows_of_block;
    int64_t end_row = smaller(first_row + job->rows_of_block, job->num_rows);
    int64_t num_tiles = (end_row - first_row + MAX_ROWS - 1) / MAX_ROWS;
    int64_t panel = unit % job->num_column_groups * job->panels_of_group;
    int64_t end_panel = smaller(panel + job->panels_of_group, num_panels(job->weight->num_columns));
    float *sums = team_scratch(job->team, member, (size_t)(num_tiles * MAX_ROWS * PANEL) * sizeof(float));
    while (panel < end_panel) {
        int64_t panels = end_row - first_row <= FEW_ROWS && panel + 2 <= end_panel ? 2 : 1;
        for (int64_t word = 0; word < job->num_words; word += job->words_of_block)
            for (int64_t i = 0; i < num_tiles; i++) {
                strip_tile tile = tile_at(job, first_row + i * MAX_ROWS, panel, panels, word);
                int64_t share = (job->words_of_block + num_tiles - 1) / num_tiles;
                tile.sums = sums + i * MAX_ROWS * PANEL;
                tile.has_few_mates = num_tiles < STRIPS_OF_PANEL;
                tile.next += i * share * word_bytes(tile.kind);
                tile.num_words_ahead = share;
                multiply_tile(&tile);
            }
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
    int64_t tiles = 1 + BYTES_OF_ROW_BLOCK / (4 * job->num_words * MAX_ROWS);
    int64_t block_bytes = has_few_tiles(job->num_rows) ? BYTES_OF_SHALLOW_BLOCK : BYTES_OF_DEEP_BLOCK;
    int64_t words_of_block = block_bytes / (STRIPS_OF_PANEL * word_bytes(job->weight->kind));
    int64_t num_blocks = (job->num_words + words_of_block - 1) / words_of_block;
    job->rows_of_block = tiles * MAX_ROWS;
    job->words_of_block = (job->num_words + num_blocks - 1) / num_blocks;
}

/* x as the kernel reads it, in the team's memory. */
static void pack_all_x(linear_job *job)
{
    int64_t words = job->num_rows * job->num_words, num_tiles = (job->num_rows + MAX_ROWS - 1) / MAX_ROWS;
    if (job->weight->kind == LINEAR_FLOAT32 && job->num_rows == 1) {
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
