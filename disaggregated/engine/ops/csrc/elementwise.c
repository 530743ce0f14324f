/* The ops that stream: rms_norm, silu_mul, rope, store_kv. Each is bound by memory, so each passes over its input once
   (rms_norm twice, the second time from the cache).

   "Rows" of a tensor that is a slice of a wider one (q, k and v of a merged projection) may lie any stride apart. */

#include "threads.h"
#include "vector.h"

#define FLOATS_WORTH_A_UNIT 16384 /* about 10 µs of streaming; for less a helper is not woken */

/* Rows [unit * rows_of_unit, …) of a job are one unit. */
static int64_t rows_of_unit(int64_t floats_of_row) { return 1 + FLOATS_WORTH_A_UNIT / floats_of_row; }
static int64_t num_units(int64_t num_rows, int64_t of_unit) { return (num_rows + of_unit - 1) / of_unit; }

typedef struct {
    const float *x, *weight;
    int64_t stride, num_tokens, rows_of_token, width, tokens_of_unit;
    float epsilon;
    float *to;
} norm_job;

static void norm_row(const norm_job *job, const float *x, float *to)
{
    vec sums[PARTIAL_SUMS / LANES] = {0};
    for (int64_t i = 0; i < job->width; i += PARTIAL_SUMS)
        for (int v = 0; v < PARTIAL_SUMS / LANES && i + v * LANES < job->width; v++) {
            vec value = load_some(x + i + v * LANES, job->width - i - v * LANES);
            sums[v] = sums[v] + value * value;
        }
    float factor = 1.0f / sqrtf(sum_of(sums) / (float)job->width + job->epsilon);
    for (int64_t i = 0; i < job->width; i += LANES) {
        vec value = load_some(x + i, job->width - i);
        store_some(to + i, value * factor * load_some(job->weight + i, job->width - i), job->width - i);
    }
}

static void norm_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const norm_job *job = argument;
    int64_t end = smaller((unit + 1) * job->tokens_of_unit, job->num_tokens);
    for (int64_t token = unit * job->tokens_of_unit; token < end; token++)
        for (int64_t row = 0; row < job->rows_of_token; row++)
            norm_row(job, job->x + token * job->stride + row * job->width,
                     job->to + (token * job->rows_of_token + row) * job->width);
}

/* x is (tokens, rows of a token, width), tokens `stride` floats apart; `to` the same, contiguous. */
EXPORT void rms_norm(team *team, const float *x, int64_t stride, int64_t num_tokens, int64_t rows_of_token,
                     int64_t width, const float *weight, float epsilon, float *to)
{
    norm_job job = {.x = x, .weight = weight, .stride = stride, .num_tokens = num_tokens,
                    .rows_of_token = rows_of_token, .width = width, .epsilon = epsilon, .to = to};
    job.tokens_of_unit = rows_of_unit(rows_of_token * width);
    team_run(team, norm_unit, &job, num_units(num_tokens, job.tokens_of_unit));
}

typedef struct {
    const float *gate_up;
    int64_t num_tokens, width, tokens_of_unit;
    float *to;
} silu_job;

static void silu_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const silu_job *job = argument;
    int64_t end = smaller((unit + 1) * job->tokens_of_unit, job->num_tokens);
    for (int64_t token = unit * job->tokens_of_unit; token < end; token++) {
        const float *gate = job->gate_up + token * 2 * job->width, *up = gate + job->width;
        float *to = job->to + token * job->width;
        for (int64_t i = 0; i < job->width; i += LANES) {
            vec x = load_some(gate + i, job->width - i);
            vec silu = x / (1.0f + exponential(-x));
            store_some(to + i, silu * load_some(up + i, job->width - i), job->width - i);
        }
    }
}

/* (tokens, 2 · width) → (tokens, width): silu(first half) · second half. */
EXPORT void silu_mul(team *team, const float *gate_up, int64_t num_tokens, int64_t width, float *to)
{
    silu_job job = {.gate_up = gate_up, .num_tokens = num_tokens, .width = width, .to = to};
    job.tokens_of_unit = rows_of_unit(4 * width);
    team_run(team, silu_unit, &job, num_units(num_tokens, job.tokens_of_unit));
}

/* The first of `indices` that is not in [0, end), or -1. */
static int64_t first_outside(const int64_t *indices, int64_t count, int64_t end)
{
    for (int64_t i = 0; i < count; i++)
        if (indices[i] < 0 || indices[i] >= end)
            return i;
    return -1;
}

/* x (tokens, heads, head_dim) in place, halves convention; cos and sin are (positions, head_dim / 2). One thread:
   a step's queries and keys are small beside what else the step reads. Returns -1, or the first token whose position is
   not in the tables; then nothing was changed. */
EXPORT int64_t rope(float *x, int64_t stride, int64_t num_tokens, int64_t num_heads, int64_t head_dim, const float *cos,
                    const float *sin, int64_t num_positions, const int64_t *positions)
{
    int64_t half = head_dim / 2, outside = first_outside(positions, num_tokens, num_positions);
    if (outside >= 0)
        return outside;
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t head = 0; head < num_heads; head++) {
            float *low = x + token * stride + head * head_dim, *high = low + half;
            for (int64_t i = 0; i < half; i += LANES) {
                vec c = load_some(cos + positions[token] * half + i, half - i);
                vec s = load_some(sin + positions[token] * half + i, half - i);
                vec a = load_some(low + i, half - i), b = load_some(high + i, half - i);
                store_some(low + i, a * c - rounded(b * s), half - i);
                store_some(high + i, b * c + rounded(a * s), half - i);
            }
        }
    return -1;
}

/* Keys and values (tokens, kv heads, head_dim) into their slots of a layer's pool [block][2][kv head][slot][head_dim].
   Returns -1, or the first token whose slot is not in the pool; then nothing was written. */
EXPORT int64_t store_kv(const float *key, int64_t key_stride, const float *value, int64_t value_stride, float *pool,
                        const int64_t *slots, int64_t num_tokens, int64_t num_blocks, int64_t num_kv_heads,
                        int64_t head_dim, int64_t block_size)
{
    int64_t head_floats = block_size * head_dim, outside = first_outside(slots, num_tokens, num_blocks * block_size);
    size_t bytes = (size_t)head_dim * sizeof(float);
    if (outside >= 0)
        return outside;
    for (int64_t token = 0; token < num_tokens; token++) {
        int64_t block = slots[token] / block_size, slot = slots[token] % block_size;
        float *to = pool + block * 2 * num_kv_heads * head_floats + slot * head_dim;
        for (int64_t head = 0; head < num_kv_heads; head++) {
            memcpy(to + head * head_floats, key + token * key_stride + head * head_dim, bytes);
            memcpy(to + (num_kv_heads + head) * head_floats, value + token * value_stride + head * head_dim, bytes);
        }
    }
    return -1;
}
