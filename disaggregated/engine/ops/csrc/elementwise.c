/* The ops that stream: rms_norm, silu_mul, gelu_mul, rope. Each is bound by memory, so each passes over its input once
   (rms_norm twice, the second time from the cache).

   "Rows" of a tensor that is a slice of a wider one (q, k and v of a merged projection) may lie any stride apart. */

#include "elementwise.h"

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

void rms_norm_row(const float *x, int64_t width, const float *weight, float epsilon, float *to)
{
    vec sums[PARTIAL_SUMS / LANES] = {0};
    for (int64_t i = 0; i < width; i += PARTIAL_SUMS)
        for (int v = 0; v < PARTIAL_SUMS / LANES && i + v * LANES < width; v++) {
            vec value = load_some(x + i + v * LANES, width - i - v * LANES);
            sums[v] = sums[v] + value * value;
        }
    float factor = 1.0f / sqrtf(sum_of(sums) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i += LANES) {
        vec value = load_some(x + i, width - i);
        store_some(to + i, value * factor * load_some(weight + i, width - i), width - i);
    }
}

static void norm_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const norm_job *job = argument;
    int64_t end = smaller((unit + 1) * job->tokens_of_unit, job->num_tokens);
    for (int64_t token = unit * job->tokens_of_unit; token < end; token++)
        for (int64_t row = 0; row < job->rows_of_token; row++)
            rms_norm_row(job->x + token * job->stride + row * job->width, job->width, job->weight, job->epsilon,
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

enum { SILU, GELU };

typedef struct {
    const float *gate_up;
    int64_t num_tokens, width, tokens_of_unit;
    float *to;
} gate_job;

/* gelu by tanh, x · ½ (1 + tanh z) with z = √(2/π) (x + 0.044715 x³), is x / (1 + e^-2z): Hendrycks and Gimpel, 2016. */
INLINE vec activated(const int activation, vec x)
{
    vec minus_2z = -1.5957691216057308f * x * (1.0f + rounded(x * x) * 0.044715f);
    return x / (1.0f + exponential(activation == SILU ? -x : minus_2z));
}

INLINE void gate_tokens(const int activation, const gate_job *job, int64_t unit)
{
    int64_t end = smaller((unit + 1) * job->tokens_of_unit, job->num_tokens);
    for (int64_t token = unit * job->tokens_of_unit; token < end; token++) {
        const float *gate = job->gate_up + token * 2 * job->width, *up = gate + job->width;
        float *to = job->to + token * job->width;
        for (int64_t i = 0; i < job->width; i += LANES) {
            vec x = activated(activation, load_some(gate + i, job->width - i));
            store_some(to + i, x * load_some(up + i, job->width - i), job->width - i);
        }
    }
}

static void silu_unit(void *job, int64_t unit, int member)
{
    (void)member;
    gate_tokens(SILU, job, unit);
}

static void gelu_unit(void *job, int64_t unit, int member)
{
    (void)member;
    gate_tokens(GELU, job, unit);
}

static void gate(team *team, unit_function *function, const float *gate_up, int64_t num_tokens, int64_t width,
                 float *to)
{
    gate_job job = {.gate_up = gate_up, .num_tokens = num_tokens, .width = width, .to = to};
    job.tokens_of_unit = rows_of_unit(4 * width);
    team_run(team, function, &job, num_units(num_tokens, job.tokens_of_unit));
}

/* (tokens, 2 · width) → (tokens, width): silu(first half) · second half. */
EXPORT void silu_mul(team *team, const float *gate_up, int64_t num_tokens, int64_t width, float *to)
{
    gate(team, silu_unit, gate_up, num_tokens, width, to);
}

/* The same with gelu. */
EXPORT void gelu_mul(team *team, const float *gate_up, int64_t num_tokens, int64_t width, float *to)
{
    gate(team, gelu_unit, gate_up, num_tokens, width, to);
}

int64_t first_outside(const int64_t *indices, int64_t count, int64_t end)
{
    for (int64_t i = 0; i < count; i++)
        if (indices[i] < 0 || indices[i] >= end)
            return i;
    return -1;
}

void rope_token(float *x, int64_t num_heads, int64_t half, const float *cos, const float *sin)
{
    for (int64_t head = 0; head < num_heads; head++) {
        float *low = x + head * 2 * half, *high = low + half;
        for (int64_t i = 0; i < half; i += LANES) {
            vec c = load_some(cos + i, half - i), s = load_some(sin + i, half - i);
            vec a = load_some(low + i, half - i), b = load_some(high + i, half - i);
            store_some(low + i, a * c - rounded(b * s), half - i);
            store_some(high + i, b * c + rounded(a * s), half - i);
        }
    }
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
        rope_token(x + token * stride, num_heads, half, cos + positions[token] * half, sin + positions[token] * half);
    return -1;
}
