/* What stands at both ends of a step: rows of the embedding, and the largest of a row of logits.

   "Largest" is torch's: NaN is larger than all else, 0 and -0 are equal, and of equals the first one wins. A row is the
   work of one member, and all is comparing and copying, so results are the same everywhere. */

#include "sample.h"
#include "vector.h"

#include <stdlib.h>

#define BYTES_WORTH_A_UNIT 65536
#define CHUNK 512 /* numbers whose maximum is found before looking where it is */
#define PART 64   /* numbers passed over at once if none of them is large enough */

typedef struct {
    const float *table;
    int64_t num_table_rows, width, num_tokens, tokens_of_unit;
    const int64_t *token_ids;
    float *to;
} embedding_job;

static void embedding_unit(void *argument, int64_t unit, int member)
{
    (void)member;
    const embedding_job *job = argument;
    int64_t end = smaller((unit + 1) * job->tokens_of_unit, job->num_tokens);
    for (int64_t token = unit * job->tokens_of_unit; token < end; token++)
        memcpy(job->to + token * job->width, job->table + job->token_ids[token] * job->width,
               (size_t)job->width * sizeof(float));
}

/* Row token_ids[t] of the table (rows, width) → row t of `to`. The first token that the table does not have, or -1; then
   nothing was written. */
EXPORT int64_t embedding(team *team, const float *table, int64_t num_table_rows, int64_t width,
                         const int64_t *token_ids, int64_t num_tokens, float *to)
{
    for (int64_t token = 0; token < num_tokens; token++)
        if (token_ids[token] < 0 || token_ids[token] >= num_table_rows)
            return token;
    embedding_job job = {.table = table, .num_table_rows = num_table_rows, .width = width, .num_tokens = num_tokens,
                         .tokens_of_unit = 1 + BYTES_WORTH_A_UNIT / (4 * width), .token_ids = token_ids, .to = to};
    team_run(team, embedding_unit, &job, (num_tokens + job.tokens_of_unit - 1) / job.tokens_of_unit);
    return -1;
}

/* As integers in the order of the numbers. */
INLINE vec_int order_of(vec x)
{
    vec_int bits = (vec_int)(x + 0.0f); /* -0 + 0 is 0 */
    vec_int order = bits ^ ((bits >> 31) & 0x7fffffff);
    vec_int is_nan = x != x;
    return (order & ~is_nan) | (is_nan & 0x7fffffff);
}

INLINE vec_int order_of_some(const float *x, int64_t count)
{
    vec_int order = order_of(load_some(x, count));
    for (int64_t lane = count; lane < LANES; lane++)
        order[lane] = INT32_MIN; /* below -infinity */
    return order;
}

INLINE int32_t largest_order(const float *x, int64_t count)
{
    vec_int largest[4];
    UNROLL for (int v = 0; v < 4; v++)
        largest[v] = (vec_int){0} + INT32_MIN;
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        UNROLL for (int v = 0; v < 4; v++)
            largest[v] = larger_int(largest[v], order_of(load(x + i + v * LANES)));
    for (; i < count; i += LANES)
        largest[0] = larger_int(largest[0], order_of_some(x + i, count - i));
    vec_int all = larger_int(larger_int(largest[0], largest[1]), larger_int(largest[2], largest[3]));
    int32_t result = all[0];
    for (int lane = 1; lane < LANES; lane++)
        result = all[lane] > result ? all[lane] : result;
    return result;
}

INLINE int32_t order_at(const float *x)
{
    if (*x != *x)
        return INT32_MAX;
    float number = *x + 0.0f;
    int32_t bits;
    memcpy(&bits, &number, sizeof(bits));
    return bits ^ ((bits >> 31) & INT32_MAX);
}

typedef struct {
    const float *x;
    int64_t width, k;
    float *values;
    int64_t *ids;
    team *team;
} largest_job;

static void argmax_row(void *argument, int64_t row, int member)
{
    (void)member;
    const largest_job *job = argument;
    const float *x = job->x + row * job->width;
    int32_t largest = INT32_MIN;
    int64_t chunk = 0;
    for (int64_t i = 0; i < job->width; i += CHUNK) {
        int32_t order = largest_order(x + i, smaller(CHUNK, job->width - i));
        chunk = order > largest ? i : chunk;
        largest = order > largest ? order : largest;
    }
    while (order_at(x + chunk) != largest)
        chunk++;
    job->ids[row] = chunk;
}

/* x (rows, width), width at least 1 → the place of each row's largest number. */
EXPORT void argmax(team *team, const float *x, int64_t num_rows, int64_t width, int64_t *ids)
{
    largest_job job = {.x = x, .width = width, .ids = ids, .team = team};
    team_run(team, argmax_row, &job, num_rows);
}

/* A number and its place as one integer: larger means larger, or equal and earlier. */
INLINE int64_t ranked(int32_t order, int64_t id) { return (int64_t)order * ((int64_t)1 << 32) + (UINT32_MAX - id); }

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* The k-th largest of n, k from 1; the array is reordered. Hoare's selection. */
static int64_t select_largest(int64_t *x, int64_t n, int64_t k)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        int64_t pivot = x[low + (high - low) / 2], i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                int64_t swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            break;
    }
    return x[k - 1];
}

/* At least k numbers are not below this: the k-th largest of the maxima of more than k parts of the row. */
static int32_t lower_bound(const largest_job *job, const float *x, int64_t *maxima)
{
    int64_t part = job->width / (4 * job->k) / LANES * LANES;
    if (part == 0)
        return INT32_MIN;
    int64_t num_parts = (job->width + part - 1) / part;
    for (int64_t i = 0; i < num_parts; i++)
        maxima[i] = largest_order(x + i * part, smaller(part, job->width - i * part));
    return (int32_t)select_largest(maxima, num_parts, job->k);
}

static void top_k_row(void *argument, int64_t row, int member)
{
    const largest_job *job = argument;
    const float *x = job->x + row * job->width;
    int64_t *candidates = team_scratch(job->team, member, (size_t)(job->width + 1) * sizeof(int64_t));
    int32_t bound = lower_bound(job, x, candidates);
    int64_t count = 0;
    for (int64_t i = 0; i < job->width; i += PART) {
        int64_t part = smaller(PART, job->width - i);
        if (largest_order(x + i, part) < bound)
            continue;
        for (int64_t j = i; j < i + part; j++) {
            candidates[count] = ranked(order_at(x + j), j);
            count += candidates[count] >= ranked(bound, UINT32_MAX);
        }
    }
    if (count > job->k)
        (void)select_largest(candidates, count, job->k);
    qsort(candidates, (size_t)job->k, sizeof(int64_t), descending);
    for (int64_t i = 0; i < job->k; i++) {
        int64_t id = UINT32_MAX - (candidates[i] & UINT32_MAX);
        job->ids[row * job->k + i] = id;
        job->values[row * job->k + i] = x[id];
    }
}

/* x (rows, width) → each row's k largest numbers and their places, (rows, k), largest first; 1 <= k <= width < 2^31. */
EXPORT void top_k(team *team, const float *x, int64_t num_rows, int64_t width, int64_t k, float *values, int64_t *ids)
{
    largest_job job = {.x = x, .width = width, .k = k, .values = values, .ids = ids, .team = team};
    team_run(team, top_k_row, &job, num_rows);
}
