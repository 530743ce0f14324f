/* Finding the narrow form of float32 weights, at load: see linear_narrow.h.

   It is found in the numbers themselves, so it does not matter where a checkpoint came from or what was merged, and
   nothing has to be believed: a number counts as held only if what comes back has its bits.

   Quantisers choose a scale so that the largest number of a group gets the largest code, or the lowest: 127 (Q8_0), -8
   (Q4_0), and with a minimum, which gets the code 0, 15 (Q4_1). Where they searched for a better scale, another code is
   the largest, so that after these all others are tried. */

#include "linear_narrow.h"

typedef struct {
    uint16_t scale, minimum; /* float16 */
    int32_t codes[GROUP];
} coded_group;

typedef struct {
    float smallest, largest; /* NaN where one of the numbers is */
} extent;

static extent extent_of(const float *x)
{
    vec smallest = load(x), largest = smallest, spoiled = smallest - smallest;
    for (int i = LANES; i < GROUP; i += LANES) {
        vec part = load(x + i);
        smallest = lesser(smallest, part);
        largest = larger(largest, part);
        spoiled = spoiled + (part - part); /* 0, but NaN for what is not finite. */
    }
    extent e = {smallest[0], largest[0]};
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
        e.smallest = smallest[lane] < e.smallest ? smallest[lane] : e.smallest;
        e.largest = largest[lane] > e.largest ? largest[lane] : e.largest;
        sum += spoiled[lane];
    }
    return (extent){e.smallest + sum, e.largest + sum};
}

/* Whether all numbers are code · scale + minimum, with codes of lowest … highest; then these are in `group`. */
static bool holds(const float *x, float scale, float minimum, bool adds_minimum, int lowest, int highest,
                  coded_group *group)
{
    const vec rounder = broadcast(12582912.0f), least = broadcast((float)lowest), most = broadcast((float)highest);
    const vec inverse = broadcast(scale == 0 ? 0 : 1.0f / scale);
    vec_int lost = {0};
    for (int i = 0; i < GROUP; i += LANES) {
        vec part = load(x + i);
        vec code = rounded(rounder + rounded((part - minimum) * inverse)) - rounder;
        code = lesser(most, larger(least, code));
        /* A scale that was too small to be a half left zeros of both signs. */
        if (scale == 0)
            code = lowest < 0 ? __builtin_convertvector((vec_int)part >> 31, vec) : (vec){0};
        lost |= (vec_int)(adds_minimum ? minimum + code * scale : code * scale) ^ (vec_int)part;
        vec_int whole = __builtin_convertvector(code, vec_int);
        memcpy(group->codes + i, &whole, sizeof whole);
    }
    group->scale = float16_of(scale);
    group->minimum = float16_of(minimum);
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++)
        any |= lost[lane];
    return any == 0;
}

/* The nearest half, as a float; 0 where it would be infinite. */
static float as_half(float x)
{
    uint16_t half = float16_of(x);
    return (half & 0x7c00) == 0x7c00 ? 0 : float16_value(half);
}

/* Whether all numbers are a scale times codes of lowest … highest, of which the one that is `extreme` has the magnitude
   `code`. A scale may be negative: its zeros are, too. */
static bool code_from(const float *x, float extreme, int code, int lowest, int highest, coded_group *group)
{
    float scale = as_half(fabsf(extreme) / (float)code);
    if (scale * (float)code != fabsf(extreme))
        return false;
    bool may_be_above = code <= highest, is_above = extreme > 0;
    return ((may_be_above || !is_above) && holds(x, scale, 0, false, lowest, highest, group)) ||
           ((may_be_above || is_above) && holds(x, -scale, 0, false, lowest, highest, group));
}

/* Codes lowest … highest times a scale. `hint` is the magnitude of the last group's largest code. */
static bool code_signed(const float *x, int lowest, int highest, coded_group *group, int *hint)
{
    extent e = extent_of(x);
    float extreme = -e.smallest > e.largest ? e.smallest : e.largest;
    if (extreme != extreme)
        return false;
    if (extreme == 0)
        return holds(x, 0, 0, false, lowest, highest, group);
    if (*hint != 0 && code_from(x, extreme, *hint, lowest, highest, group))
        return true;
    for (int code = -lowest; code > 0; code--)
        if (code_from(x, extreme, code, lowest, highest, group)) {
            *hint = code;
            return true;
        }
    return false;
}

/* Codes 0 … 15 times a scale, plus a minimum. */
static bool code_above_minimum(const float *x, coded_group *group)
{
    extent e = extent_of(x);
    if (e.smallest != e.smallest)
        return false;
    for (int steps = 15; steps > 0; steps--) {
        float scale = as_half((e.largest - e.smallest) / (float)steps);
        for (int lowest = 0; lowest + steps <= 15; lowest++)
            if (holds(x, scale, as_half(e.smallest - (float)lowest * scale), true, 0, 15, group))
                return true;
    }
    return false;
}

/* The codes of one output's group into its lane. */
static void place_group(int64_t kind, const coded_group *group, uint8_t *to, int64_t lane)
{
    uint16_t *halves = (uint16_t *)(void *)to;
    uint8_t *codes = to + group_head_bytes(kind);
    halves[lane] = group->scale;
    if (has_minima(kind))
        halves[LANES + lane] = group->minimum;
    if (kind == LINEAR_BYTES) {
        for (int i = 0; i < GROUP; i++)
            codes[i * LANES + lane] = (uint8_t)group->codes[i];
        return;
    }
    int offset = kind == LINEAR_NIBBLES ? 8 : 0;
    for (int first = 0; first < GROUP; first += CODES_OF_WORD) {
        uint32_t word = 0;
        for (int i = 0; i < CODES_OF_WORD; i++)
            word |= (uint32_t)(group->codes[first + i] + offset) << 4 * i;
        memcpy(codes + first * LANES / 2 + lane * 4, &word, sizeof word);
    }
}

static bool place_halves(int64_t kind, const float *x, uint8_t *to, int64_t lane)
{
    uint16_t *halves = (uint16_t *)(void *)to;
    uint32_t lost = 0;
    for (int i = 0; i < GROUP; i++) {
        uint16_t half = kind == LINEAR_FLOAT16 ? float16_of(x[i]) : (uint16_t)(bits_of(x[i]) >> 16);
        bool is_special = kind == LINEAR_FLOAT16 && (half & 0x7c00) == 0x7c00;
        uint32_t back = kind == LINEAR_FLOAT16 ? bits_of(float16_value(half)) : (uint32_t)half << 16;
        lost |= (back ^ bits_of(x[i])) | is_special;
        halves[i * LANES + lane] = half;
    }
    return lost == 0;
}

bool narrow_row(int64_t kind, const float *weights, int64_t depth, uint8_t *groups, int64_t lane, int *hint)
{
    for (int64_t k = 0; k < depth; k += GROUP) {
        uint8_t *to = groups + k / GROUP * group_bytes(kind);
        coded_group group;
        bool fits;
        if (!has_scales(kind))
            fits = place_halves(kind, weights + k, to, lane);
        else if (has_minima(kind))
            fits = code_above_minimum(weights + k, &group);
        else
            fits = code_signed(weights + k, kind == LINEAR_BYTES ? -128 : -8, kind == LINEAR_BYTES ? 127 : 7, &group, hint);
        if (!fits)
            return false;
        if (has_scales(kind))
            place_group(kind, &group, to, lane);
    }
    return true;
}
