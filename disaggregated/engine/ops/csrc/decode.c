/* A step of nothing but decoding, one token a row, from token ids to logits and the likeliest tokens: one call.

   It makes the very calls that a step makes otherwise: the layers of step.c, the final norm, the last linear, argmax. A
   server does little else than decode, and what a host does between two calls is slow there: the weights have just
   driven all of its code and objects out of the caches. So the host only lists what it knows of each row, and the rest
   of the layout is made here. */

#include "elementwise.h"
#include "sample.h"
#include "step.h"

/* What comes after the layers; mirrored by DecodeHead in native_decode.py. */
typedef struct {
    const float *norm; /* (hidden) */
    linear_weight lm_head;
} decode_head;

/* Mirrored by RowsInC in native_decode.py. */
typedef struct {
    int64_t num_rows, table_width;
    const int32_t *token_ids, *positions; /* (num_rows) each */
    const int32_t *block_tables;          /* (num_rows, table_width) */
    int64_t *places;                      /* room for 4 * num_rows + 1 */
    float *hidden;                        /* room for (2, num_rows, hidden) */
    float *logits;                        /* (num_rows, vocabulary) */
    int64_t *likeliest;                   /* (num_rows); NULL: nobody asks */
} decode_rows;

/* Where the token goes; -1, which no pool has, if that is outside of its row's table. */
static int64_t slot_of(const decode_rows *rows, int64_t row, int64_t block_size)
{
    int64_t position = rows->positions[row], column = position / block_size;
    if (position < 0 || column >= rows->table_width)
        return -1;
    return rows->block_tables[row * rows->table_width + column] * block_size + position % block_size;
}

static step laid_out(const decode_rows *rows, const step_model *model, const kv_pool *pools)
{
    int64_t num_rows = rows->num_rows, *token_ids = rows->places, *positions = token_ids + num_rows;
    int64_t *slots = positions + num_rows;
    int32_t *query_start = (int32_t *)(slots + num_rows);
    for (int64_t row = 0; row < num_rows; row++) {
        token_ids[row] = rows->token_ids[row];
        positions[row] = rows->positions[row];
        slots[row] = slot_of(rows, row, pools->block_size);
    }
    for (int64_t row = 0; row <= num_rows; row++)
        query_start[row] = (int32_t)row;
    batch_places places = {.query_start = query_start, .first_position = rows->positions,
                           .block_tables = rows->block_tables, .num_rows = num_rows,
                           .table_stride = rows->table_width, .num_tokens = num_rows};
    return (step){.token_ids = token_ids, .positions = positions, .slots = slots, .places = places, .pools = pools,
                  .to = rows->hidden, .first_layer = 0, .end_layer = model->num_layers};
}

/* As run_step(). */
EXPORT int64_t run_decode(team *team, const step_model *model, const decode_head *head, const kv_pool *pools,
                          const decode_rows *rows, int64_t *where)
{
    step step = laid_out(rows, model, pools);
    int64_t wrong = run_step(team, model, &step, where);
    if (wrong != SOUND)
        return wrong;
    int64_t num_rows = rows->num_rows, width = model->hidden;
    float *normed = rows->hidden + num_rows * width;
    rms_norm(team, rows->hidden, width, num_rows, 1, width, head->norm, model->epsilon, normed);
    linear(team, &head->lm_head, normed, num_rows, rows->logits);
    if (rows->likeliest != NULL)
        argmax(team, rows->logits, num_rows, head->lm_head.num_columns, rows->likeliest);
    return SOUND;
}
