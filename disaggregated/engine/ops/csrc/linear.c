/* linear: (T, M) = x (T, K) · weightᵀ + bias, in float32.

   Weights are packed once, at load, into panels of PANEL output features: first their biases, then for each k the PANEL
   weights side by side, so a decode step reads the whole matrix front to back, exactly once, at the speed of DRAM. For
   many rows the classical blocking of a matrix product is laid over the same panels: a block of x stays in the second
   level cache while the panels pass by.

   An output is a chain of K multiply-adds in the order of k, beginning with the bias. Blocks of rows, of k and of
   columns only say when a link of the chain is made, never in which order, so a row's result depends on nothing but
   the row. */

#include "linear.h"
#include "tile.h"

#include <sys/mman.h>

#define ROWS_OF_BLOCK 512 /* a multiple of MAX_ROWS */
#define MAX_DEPTH_OF_BLOCK 640
#define ROWS_OF_DECODE 48 /* up to here a whole panel is taken in one go: each weight is fetched from DRAM once */
#define FLOPS_WORTH_A_UNIT 500000 /* about 10 µs; waking a helper for less costs more than it brings */

typedef struct {
    const float *x;      /* (T, K) */
    float *packed_x;     /* tiles of MAX_ROWS rows (the last may have fewer), each interleaved over all K */
    const float *panels; /* see linear_pack() */
    float *to;           /* (T, M) */
    int64_t num_rows, depth, num_columns;
    int64_t num_column_groups, panels_of_group;
} linear_job;

static int64_t num_panels(int64_t num_columns) { return (num_columns + PANEL - 1) / PANEL; }

/* Floats that linear_pack() writes. */
EXPORT int64_t linear_packed_floats(int64_t num_columns, int64_t depth)
{
    return num_panels(num_columns) * (depth + 1) * PANEL;
}

/* weight (M, K), bias (M) or NULL → panels. `panels` should be aligned to 64 bytes. */
EXPORT void linear_pack(const float *weight, const float *bias, int64_t num_columns, int64_t depth, float *panels)
{
    /* Large pages: a stream through a gigabyte misses the TLB at every 4 KB. Advice only, so no error matters. */
    uintptr_t begin = ((uintptr_t)panels + 4095) & ~(uintptr_t)4095;
    uintptr_t end = (uintptr_t)(panels + linear_packed_floats(num_columns, depth)) & ~(uintptr_t)4095;
#ifdef MADV_HUGEPAGE
    if (end > begin)
        (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)begin, (void)end;
#endif
    for (int64_t first = 0; first < num_columns; first += PANEL) {
        int64_t used = smaller(PANEL, num_columns - first);
        for (int64_t c = 0; c < PANEL; c++)
            panels[c] = bias != NULL && c < used ? bias[first + c] : 0.0f;
        panels += PANEL;
        for (int64_t k = 0; k < depth; k++, panels += PANEL)
            for (int64_t c = 0; c < PANEL; c++)
                panels[c] = c < used ? weight[(first + c) * depth + k] : 0.0f;
    }
}

/* `rows` rows of x, `depth` long each, interleaved: element k of row r goes to `to[k * rows + r]`. */
static void interleave(const float *x, int rows, int64_t depth, float *to)
{
    int64_t k = 0;
    for (; rows == MAX_ROWS && k + LANES <= depth; k += LANES) {
        vec part[MAX_ROWS];
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            part[r] = load(x + r * depth + k);
        zip_rows(MAX_ROWS, MAX_ROWS_LOG2, part);
        UNROLL for (int r = 0; r < MAX_ROWS; r++)
            store(to + k * MAX_ROWS + r * LANES, part[r]);
    }
    for (; k < depth; k++)
        for (int r = 0; r < rows; r++)
            to[k * rows + r] = x[r * depth + k];
}

static void pack_x(void *argument, int64_t unit, int member)
{
    (void)member;
    linear_job *job = argument;
    int64_t row = unit * MAX_ROWS;
    interleave(job->x + row * job->depth, (int)smaller(MAX_ROWS, job->num_rows - row), job->depth,
               job->packed_x + row * job->depth);
}

/* One tile of output: the part [k, k + depth) of its chains. The last panel may stick out over the matrix, then its
   tile is made beside it. */
static void linear_tile(const linear_job *job, int64_t row, int64_t panel, int64_t k, int64_t depth, bool in_dram)
{
    int rows = (int)smaller(MAX_ROWS, job->num_rows - row);
    int64_t column = panel * PANEL, used = smaller(PANEL, job->num_columns - column);
    const float *start = job->panels + panel * (job->depth + 1) * PANEL;
    float beside[MAX_ROWS * PANEL], *to = job->to + row * job->num_columns + column;
    tile t = {
        .a = job->packed_x + row * job->depth + k * rows,
        .b = start + (k + 1) * PANEL,
        .b_stride = PANEL,
        .depth = depth,
        .from = k == 0 ? start : to,
        .from_stride = k == 0 ? 0 : job->num_columns,
        .to = to,
        .to_stride = job->num_columns,
    };
    if (used == PANEL) {
        multiply_interleaved(rows, in_dram, t);
        return;
    }
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < PANEL; c++)
            beside[r * PANEL + c] = k == 0 ? start[c] : c < used ? to[r * job->num_columns + c] : 0.0f;
    t.from = t.to = beside;
    t.from_stride = t.to_stride = PANEL;
    multiply_interleaved(rows, in_dram, t);
    for (int r = 0; r < rows; r++)
        memcpy(to + r * job->num_columns, beside + r * PANEL, (size_t)used * sizeof(float));
}

/* One block of rows times one group of panels. */
static void linear_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const linear_job *job = argument;
    int64_t first_row = unit / job->num_column_groups * ROWS_OF_BLOCK;
    int64_t end_row = smaller(first_row + ROWS_OF_BLOCK, job->num_rows);
    int64_t first_panel = unit % job->num_column_groups * job->panels_of_group;
    int64_t end_panel = smaller(first_panel + job->panels_of_group, num_panels(job->num_columns));
    int64_t max_depth = job->num_rows <= ROWS_OF_DECODE ? job->depth : MAX_DEPTH_OF_BLOCK;
    int64_t num_blocks = (job->depth + max_depth - 1) / max_depth;
    int64_t depth_of_block = (job->depth + num_blocks - 1) / num_blocks;
    for (int64_t k = 0; k < job->depth; k += depth_of_block)
        for (int64_t panel = first_panel; panel < end_panel; panel++)
            for (int64_t row = first_row; row < end_row; row += MAX_ROWS)
                linear_tile(job, row, panel, k, smaller(depth_of_block, job->depth - k), row == first_row);
}

/* Units enough for the team to share, but each worth the hand-over. */
static void split_columns(linear_job *job, int team_size)
{
    int64_t panels = num_panels(job->num_columns), rows = smaller(job->num_rows, ROWS_OF_BLOCK);
    int64_t worth = 1 + FLOPS_WORTH_A_UNIT / (2 * rows * job->depth * PANEL);
    int64_t wanted = team_size == 1 ? 1 : 4 * team_size;
    job->panels_of_group = (panels + wanted - 1) / wanted;
    if (job->panels_of_group < worth)
        job->panels_of_group = worth;
    job->num_column_groups = (panels + job->panels_of_group - 1) / job->panels_of_group;
}

EXPORT void linear(team *team, const linear_weight *weight, const float *x, int64_t num_rows, float *to)
{
    if (num_rows == 0)
        return;
    linear_job job = {.x = x, .panels = weight->panels, .to = to, .num_rows = num_rows, .depth = weight->depth,
                      .num_columns = weight->num_columns, .packed_x = (float *)x};
    if (num_rows > 1) {
        job.packed_x = team_scratch(team, TEAM_SHARED, (size_t)(num_rows * job.depth) * sizeof(float));
        int64_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
        if (num_rows <= ROWS_OF_DECODE)
            for (int64_t i = 0; i < num_tiles; i++)
                pack_x(&job, i, 0);
        else
            team_run(team, pack_x, &job, num_tiles);
    }
    split_columns(&job, team_size(team));
    int64_t num_row_blocks = (num_rows + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK;
    team_run(team, linear_unit, &job, num_row_blocks * job.num_column_groups);
}
