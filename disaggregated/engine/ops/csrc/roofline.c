/* What this machine can do at most, measured: the bars that benchmarks hold the kernels against. No op calls this. */

#include "linear_tile.h"

#define READ_UNIT (1 << 20)
#define STREAMS 8
#define STREAM_BYTES 4096
#define NUM_SUMS (MAX_ROWS == 8 ? 16 : 12) /* enough to hide the latency of an addition */

typedef struct {
    const uint8_t *memory;
    int64_t kind, num_rounds;
    float *sink; /* something that depends on all the work, so that no compiler leaves it out */
} roofline_job;

/* Eight pages side by side: one stream alone does not keep enough reads under way. */
static void read_unit(void *argument, int64_t unit, int member)
{
    const roofline_job *job = argument;
    const uint8_t *begin = job->memory + unit * READ_UNIT;
    vec_int sums[STREAMS] = {{0}};
    for (const uint8_t *pages = begin; pages < begin + READ_UNIT; pages += STREAMS * STREAM_BYTES)
        for (int64_t i = 0; i < STREAM_BYTES; i += 64)
            UNROLL for (int s = 0; s < STREAMS; s++)
                UNROLL for (int v = 0; v < 64 / VECTOR_BYTES; v++)
                    sums[s] ^= (vec_int)load((const float *)(pages + s * STREAM_BYTES + i + v * VECTOR_BYTES));
    for (int s = 1; s < STREAMS; s++)
        sums[0] ^= sums[s];
    job->sink[member] += (float)sums[0][0];
}

/* Reads `num_bytes`, a multiple of 1 MiB. `sink` has room for one float a member. */
EXPORT void roofline_read(team *team, const uint8_t *memory, int64_t num_bytes, float *sink)
{
    roofline_job job = {.memory = memory, .sink = sink};
    team_run(team, read_unit, &job, num_bytes / READ_UNIT);
}

INLINE void multiply_rounds(const int fixed_kind, const roofline_job *job, int member)
{
    vec sums[NUM_SUMS], factor = broadcast(job->sink[member]);
    UNROLL for (int i = 0; i < NUM_SUMS; i++)
        sums[i] = rounded(factor); /* Equal, but no compiler knows. */
    for (int64_t round = 0; round < job->num_rounds; round++) {
        factor = rounded(factor); /* It may have changed, too. */
        UNROLL for (int i = 0; i < NUM_SUMS; i++)
            if (fixed_kind == LINEAR_FLOAT32)
                sums[i] = sums[i] + factor * factor;
            else
                sums[i] = (vec)multiply_word((vec_int)sums[i], (vec_int)factor, 0x01020304);
    }
    vec total = {0};
    UNROLL for (int i = 0; i < NUM_SUMS; i++)
        total += sums[i];
    job->sink[member] += total[0];
}

static void multiply_unit(void *argument, int64_t unit, int member)
{
    (void)unit;
    const roofline_job *job = argument;
    if (job->kind == LINEAR_FLOAT32)
        multiply_rounds(LINEAR_FLOAT32, job, member);
    else
        multiply_rounds(LINEAR_INT8, job, member);
}

/* Multiplies and adds from registers to registers, `num_units` times, of a kind in linear.h. Returns the number of
   multiplications. */
EXPORT int64_t roofline_multiply(team *team, int64_t kind, int64_t num_units, float *sink)
{
    roofline_job job = {.kind = kind, .num_rounds = 100000, .sink = sink};
    team_run(team, multiply_unit, &job, num_units);
    int64_t values_of_word = kind == LINEAR_INT8 ? WORD_VALUES : 1;
    return num_units * job.num_rounds * NUM_SUMS * LANES * values_of_word;
}
