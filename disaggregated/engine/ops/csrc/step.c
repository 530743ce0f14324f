/* A whole forward pass in one call, or in one for each of several ranges of layers: from token ids to the hidden states
   before the final norm.

   It makes the very calls that the op table makes one by one from Python, on the same numbers in the same order, so both
   give the same bits. What it saves is the way between two ops, some 400 times a step of a small model, and with it the
   threads' sleep. Only the elementwise work on q, k and v is taken together: norms, rope and the pool's slots, token by
   token while they are in the cache. */

#include "step.h"

#include "elementwise.h"

typedef struct {
    team *team;
    const step_model *model;
    const step *step;
    int64_t num_tokens;
    float *normed, *qkv, *attended, *gate_up, *gated, *added;
} pass;

/* Working memory, laid out for the widest layer. */
static void lay_out_pass(pass *pass)
{
    int64_t qkv = 0, attended = 0, gate_up = 0, hidden = pass->model->hidden;
    for (int64_t i = 0; i < pass->model->num_layers; i++) {
        const step_layer *layer = &pass->model->layers[i];
        qkv = layer->qkv.num_columns > qkv ? layer->qkv.num_columns : qkv;
        attended = layer->out.depth > attended ? layer->out.depth : attended;
        gate_up = layer->gate_up.num_columns > gate_up ? layer->gate_up.num_columns : gate_up;
    }
    size_t floats_of_token = (size_t)(2 * hidden + qkv + attended + gate_up + gate_up / 2);
    pass->normed = team_scratch(pass->team, TEAM_STEP, (size_t)pass->num_tokens * floats_of_token * sizeof(float));
    pass->added = pass->normed + pass->num_tokens * hidden;
    pass->qkv = pass->added + pass->num_tokens * hidden;
    pass->attended = pass->qkv + pass->num_tokens * qkv;
    pass->gate_up = pass->attended + pass->num_tokens * attended;
    pass->gated = pass->gate_up + pass->num_tokens * gate_up;
}

static void embed(const pass *pass)
{
    const step_model *model = pass->model;
    for (int64_t token = 0; token < pass->num_tokens; token++) {
        const float *row = model->embedding + pass->step->token_ids[token] * model->hidden;
        float *to = pass->step->to + token * model->hidden;
        for (int64_t i = 0; i < model->hidden; i++)
            to[i] = row[i] * model->embedding_scale;
    }
}

static void norm(const pass *pass, const float *x, const float *weight, float *to)
{
    int64_t hidden = pass->model->hidden;
    rms_norm(pass->team, x, hidden, pass->num_tokens, 1, hidden, weight, pass->model->epsilon, to);
}

/* hidden += added, which is normed before where the family has a norm there. */
static void add(const pass *pass, const float *post_norm)
{
    if (post_norm != NULL)
        norm(pass, pass->added, post_norm, pass->added);
    for (int64_t i = 0; i < pass->num_tokens * pass->model->hidden; i++)
        pass->step->to[i] = pass->step->to[i] + pass->added[i];
}

typedef struct {
    const pass *pass;
    const step_layer *layer;
    const kv_pool *pool;
} qkv_job;

#define TOKENS_OF_QKV_UNIT 16

/* Norms and rope of a token's queries and keys, in place, and its keys and values into the pool. */
static void place_token(const qkv_job *job, int64_t token)
{
    const step_layer *layer = job->layer;
    int64_t head_dim = job->pool->head_dim, num_heads = layer->attention.num_heads, half = head_dim / 2;
    int64_t num_kv_heads = job->pool->num_kv_heads, position = job->pass->step->positions[token];
    float *q = job->pass->qkv + token * layer->qkv.num_columns, *k = q + num_heads * head_dim;
    if (layer->q_norm != NULL)
        for (int64_t head = 0; head < num_heads + num_kv_heads; head++)
            rms_norm_row(q + head * head_dim, head_dim, head < num_heads ? layer->q_norm : layer->k_norm,
                         job->pass->model->epsilon, q + head * head_dim);
    rope_token(q, num_heads + num_kv_heads, half, layer->cos + position * half, layer->sin + position * half);
    kv_store_token(job->pool, k, k + num_kv_heads * head_dim, job->pass->step->slots[token]);
}

static void place_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const qkv_job *job = argument;
    int64_t end = smaller((unit + 1) * TOKENS_OF_QKV_UNIT, job->pass->num_tokens);
    for (int64_t token = unit * TOKENS_OF_QKV_UNIT; token < end; token++)
        place_token(job, token);
}

static void attention_part(const pass *pass, const step_layer *layer, const kv_pool *pool)
{
    norm(pass, pass->step->to, layer->input_norm, pass->normed);
    linear(pass->team, &layer->qkv, pass->normed, pass->num_tokens, pass->qkv);
    qkv_job job = {.pass = pass, .layer = layer, .pool = pool};
    team_run(pass->team, place_unit, &job, (pass->num_tokens + TOKENS_OF_QKV_UNIT - 1) / TOKENS_OF_QKV_UNIT);
    attend(pass->team, pass->qkv, layer->qkv.num_columns, pool, &pass->step->places, &layer->attention,
           pass->attended);
    linear(pass->team, &layer->out, pass->attended, pass->num_tokens, pass->added);
    add(pass, layer->attention_post_norm);
}

static void feed_forward_part(const pass *pass, const step_layer *layer)
{
    norm(pass, pass->step->to, layer->mlp_norm, pass->normed);
    linear(pass->team, &layer->gate_up, pass->normed, pass->num_tokens, pass->gate_up);
    int64_t width = layer->down.depth;
    if (layer->activation == ACTIVATION_SILU)
        silu_mul(pass->team, pass->gate_up, pass->num_tokens, width, pass->gated);
    else
        gelu_mul(pass->team, pass->gate_up, pass->num_tokens, width, pass->gated);
    linear(pass->team, &layer->down, pass->gated, pass->num_tokens, pass->added);
    add(pass, layer->mlp_post_norm);
}

/* What of the step would reach outside the memory of its tables; `where`: the first token or row of that kind. All pools
   have the same shape. */
static int64_t first_wrong(const step_model *model, const step *step, int64_t *where)
{
    int64_t num_tokens = step->places.num_tokens;
    if ((*where = first_outside(step->token_ids, num_tokens, model->vocabulary)) >= 0)
        return WRONG_TOKEN_ID;
    for (int64_t i = 0; i < model->num_layers; i++)
        if (i == 0 || model->layers[i].num_positions < model->layers[i - 1].num_positions)
            if ((*where = first_outside(step->positions, num_tokens, model->layers[i].num_positions)) >= 0)
                return WRONG_POSITION;
    if ((*where = first_outside(step->slots, num_tokens, step->pools->num_blocks * step->pools->block_size)) >= 0)
        return WRONG_SLOT;
    if ((*where = first_unsound_row(&step->places, step->pools)) >= 0)
        return WRONG_ROW;
    return SOUND;
}

EXPORT int64_t run_step(team *team, const step_model *model, const step *step, int64_t *where)
{
    int64_t wrong = first_wrong(model, step, where);
    if (wrong != SOUND || step->places.num_tokens == 0)
        return wrong;
    pass pass = {.team = team, .model = model, .step = step, .num_tokens = step->places.num_tokens};
    lay_out_pass(&pass);
    if (step->first_layer == 0)
        embed(&pass);
    for (int64_t i = step->first_layer; i < step->end_layer; i++) {
        attention_part(&pass, &model->layers[i], &step->pools[i]);
        feed_forward_part(&pass, &model->layers[i]);
    }
    return SOUND;
}
