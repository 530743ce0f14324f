/* A decode step's tokens, each written as an event to the connection of its own stream: what an orchestrator does most
   often, and all of it for the streams that have a lane. Whatever is out of the ordinary (a token whose text is not
   known, the last one that may come, one that is not due, a client that reads too slowly) is left to the caller, and
   changes nothing here.

   Nothing blocks: the descriptors are those of sockets that do not. One thread at a time. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: an interpreter ignores SIGPIPE anyway. */
#endif

/* Tokens of one lane between two `take_tokens`: how old its owner's books may be. */
enum { PENDING_MAX = 128 };
/* Ids beyond are left to the caller; no vocabulary has them. */
enum { TOKENS_MAX = 1 << 22 };
/* Of one token's text, and of one event. */
enum { TEXT_MAX = 1024, EVENT_MAX = 8192 };
/* "ffff\r\n". */
enum { LINE_MAX = 6 };

/* Tokens as JSON spells them; a length of 0 is a token that is not known. */
typedef struct {
    uint32_t *offsets;
    uint16_t *lengths;
    int64_t num_tokens;
    char *bytes;
    int64_t num_bytes, bytes_max;
} spellings;

typedef struct {
    uint64_t stream_key;
    const spellings *texts;
    double last_token_s, longest_gap_s;
    uint32_t position, last_position;
    int descriptor, is_open, is_chunked;
    int num_pending;
    uint32_t pending[PENDING_MAX];
    int num_before, num_after;
    char *before;       /* and what stands after the text, behind it */
    int64_t num_written; /* of the last event, when the kernel did not take it as a whole; else 0 */
    uint32_t last_token;
} lane;

/* Lanes by stream key: open addressing, at most half full, without tombstones. */
typedef struct {
    lane **slots;
    int64_t num_slots, num_lanes;
} fan_out;

static int64_t home_of(const fan_out *all, uint64_t stream_key)
{
    return (int64_t)((stream_key * 0x9E3779B97F4A7C15u) >> 20) & (all->num_slots - 1);
}

static int64_t slot_of(const fan_out *all, uint64_t stream_key)
{
    int64_t at = home_of(all, stream_key);
    while (all->slots[at] && all->slots[at]->stream_key != stream_key)
        at = (at + 1) & (all->num_slots - 1);
    return at;
}

static int make_room(fan_out *all)
{
    if (2 * (all->num_lanes + 1) <= all->num_slots)
        return 1;
    fan_out larger = {calloc((size_t)all->num_slots * 2, sizeof(lane *)), all->num_slots * 2, all->num_lanes};
    if (!larger.slots)
        return 0;
    for (int64_t i = 0; i < all->num_slots; i++)
        if (all->slots[i])
            larger.slots[slot_of(&larger, all->slots[i]->stream_key)] = all->slots[i];
    free(all->slots);
    *all = larger;
    return 1;
}

/* Those behind an emptied slot move up, where it stands between them and their home. */
static void close_gap(fan_out *all, int64_t gap)
{
    int64_t mask = all->num_slots - 1;
    for (int64_t at = (gap + 1) & mask; all->slots[at]; at = (at + 1) & mask) {
        int64_t home = home_of(all, all->slots[at]->stream_key);
        if (((at - home) & mask) < ((at - gap) & mask))
            continue;
        all->slots[gap] = all->slots[at];
        all->slots[at] = NULL;
        gap = at;
    }
}

static void free_lane(lane *one)
{
    free(one->before);
    free(one);
}

EXPORT spellings *make_spellings(void) { return calloc(1, sizeof(spellings)); }

EXPORT void free_spellings(spellings *texts)
{
    free(texts->offsets);
    free(texts->lengths);
    free(texts->bytes);
    free(texts);
}

static int room_for_token(spellings *texts, int64_t token_id)
{
    if (token_id < texts->num_tokens)
        return 1;
    int64_t num_tokens = texts->num_tokens ? texts->num_tokens : 1024;
    while (num_tokens <= token_id)
        num_tokens *= 2;
    uint32_t *offsets = realloc(texts->offsets, (size_t)num_tokens * sizeof *offsets);
    if (offsets)
        texts->offsets = offsets;
    uint16_t *lengths = realloc(texts->lengths, (size_t)num_tokens * sizeof *lengths);
    if (lengths)
        texts->lengths = lengths;
    if (!offsets || !lengths)
        return 0;
    memset(lengths + texts->num_tokens, 0, (size_t)(num_tokens - texts->num_tokens) * sizeof *lengths);
    texts->num_tokens = num_tokens;
    return 1;
}

/* 0: it is not kept, because it is too long or there is no memory. A token keeps its first text. */
EXPORT int64_t learn(spellings *texts, int64_t token_id, const char *text, int64_t num_bytes)
{
    if (token_id < 0 || token_id >= TOKENS_MAX || num_bytes < 1 || num_bytes > TEXT_MAX)
        return 0;
    if (!room_for_token(texts, token_id))
        return 0;
    if (texts->lengths[token_id])
        return 1;
    if (texts->num_bytes + num_bytes > texts->bytes_max) {
        int64_t bytes_max = texts->bytes_max ? 2 * texts->bytes_max : 16384;
        char *bytes = bytes_max > UINT32_MAX ? NULL : realloc(texts->bytes, (size_t)bytes_max);
        if (!bytes)
            return 0;
        texts->bytes = bytes;
        texts->bytes_max = bytes_max;
    }
    memcpy(texts->bytes + texts->num_bytes, text, (size_t)num_bytes);
    texts->offsets[token_id] = (uint32_t)texts->num_bytes;
    texts->lengths[token_id] = (uint16_t)num_bytes;
    texts->num_bytes += num_bytes;
    return 1;
}

/* `texts_of_all` lie one behind the other. Returns how many are kept. */
EXPORT int64_t learn_all(spellings *texts, const uint32_t *token_ids, const uint32_t *lengths, const char *texts_of_all,
                         int64_t count)
{
    int64_t num_kept = 0;
    for (int64_t i = 0; i < count; texts_of_all += lengths[i++])
        num_kept += learn(texts, token_ids[i], texts_of_all, lengths[i]);
    return num_kept;
}

EXPORT fan_out *make_fan_out(void)
{
    fan_out *all = calloc(1, sizeof *all);
    if (all && (all->slots = calloc(64, sizeof(lane *)))) {
        all->num_slots = 64;
        return all;
    }
    free(all);
    return NULL;
}

EXPORT void free_fan_out(fan_out *all)
{
    for (int64_t i = 0; i < all->num_slots; i++)
        if (all->slots[i])
            free_lane(all->slots[i]);
    free(all->slots);
    free(all);
}

/* NULL: the key has a lane, what stands around the text is too long, or there is no memory. `texts` outlives it. */
EXPORT lane *open_lane(fan_out *all, uint64_t stream_key, int64_t descriptor, const spellings *texts,
                       const char *before, int64_t num_before, const char *after, int64_t num_after, int64_t is_chunked)
{
    if (LINE_MAX + num_before + TEXT_MAX + num_after > EVENT_MAX || !make_room(all))
        return NULL;
    int64_t at = slot_of(all, stream_key);
    if (all->slots[at])
        return NULL;
    lane *one = calloc(1, sizeof *one);
    if (!one)
        return NULL;
    if (!(one->before = malloc((size_t)(num_before + num_after) + 1))) {
        free(one);
        return NULL;
    }
    memcpy(one->before, before, (size_t)num_before);
    memcpy(one->before + num_before, after, (size_t)num_after);
    one->stream_key = stream_key;
    one->descriptor = (int)descriptor;
    one->texts = texts;
    one->num_before = (int)num_before;
    one->num_after = (int)num_after;
    one->is_chunked = (int)is_chunked;
    all->slots[at] = one;
    all->num_lanes++;
    return one;
}

EXPORT void close_lane(fan_out *all, lane *one)
{
    int64_t at = slot_of(all, one->stream_key);
    all->slots[at] = NULL;
    all->num_lanes--;
    close_gap(all, at);
    free_lane(one);
}

/* From now on the lane takes the tokens at `position` to before `last_position`. */
EXPORT void go_on(lane *one, int64_t position, int64_t last_position, double last_token_s, double longest_gap_s)
{
    one->position = (uint32_t)position;
    one->last_position = (uint32_t)last_position;
    one->last_token_s = last_token_s;
    one->longest_gap_s = longest_gap_s;
    one->is_open = 1;
}

/* It takes no token until `go_on`. */
EXPORT void shut(lane *one) { one->is_open = 0; }

/* What it has delivered since it was last asked: how many tokens; the ids, and when the last one came and the longest
   gap. */
EXPORT int64_t take_tokens(lane *one, uint32_t *token_ids, double *times)
{
    int64_t num_tokens = one->num_pending;
    memcpy(token_ids, one->pending, (size_t)num_tokens * sizeof *token_ids);
    times[0] = one->last_token_s;
    times[1] = one->longest_gap_s;
    one->num_pending = 0;
    return num_tokens;
}

/* The event in one piece; its length. */
static int64_t make_event(const lane *one, const char *text, int num_text, char *event)
{
    char *at = event;
    if (one->is_chunked) {
        int num_bytes = one->num_before + num_text + one->num_after - 2; /* The CRLF behind it is not counted. */
        int shift = num_bytes > 0xFFF ? 12 : num_bytes > 0xFF ? 8 : num_bytes > 0xF ? 4 : 0;
        for (; shift >= 0; shift -= 4)
            *at++ = "0123456789abcdef"[(num_bytes >> shift) & 0xF];
        *at++ = '\r';
        *at++ = '\n';
    }
    memcpy(at, one->before, (size_t)one->num_before);
    at += one->num_before;
    memcpy(at, text, (size_t)num_text);
    at += num_text;
    memcpy(at, one->before + one->num_before, (size_t)one->num_after);
    return at + one->num_after - event;
}

/* The bytes of its last event that are still to be written, up to EVENT_MAX; how many. */
EXPORT int64_t take_rest(lane *one, char *rest)
{
    const spellings *texts = one->texts;
    if (!one->num_written)
        return 0;
    char event[EVENT_MAX];
    int64_t num_bytes = make_event(one, texts->bytes + texts->offsets[one->last_token], texts->lengths[one->last_token],
                                   event) - one->num_written;
    memcpy(rest, event + one->num_written, (size_t)num_bytes);
    one->num_written = 0;
    return num_bytes;
}

enum outcome { LEFT, TAKEN, TAKEN_IN_PART };

static enum outcome deliver_one(lane *one, uint32_t position, uint32_t token_id, double now_s)
{
    const spellings *texts = one->texts;
    if (!one->is_open || position != one->position || position >= one->last_position || one->num_pending == PENDING_MAX)
        return LEFT;
    if (token_id >= texts->num_tokens || !texts->lengths[token_id])
        return LEFT;
    char event[EVENT_MAX];
    int64_t num_bytes = make_event(one, texts->bytes + texts->offsets[token_id], texts->lengths[token_id], event);
    ssize_t num_written = send(one->descriptor, event, (size_t)num_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (num_written <= 0)
        return LEFT; /* It is full, or broken: whoever writes it next finds out. */
    one->last_token = token_id;
    if (num_written < num_bytes) {
        one->is_open = 0;
        one->num_written = num_written;
    }
    one->position = position + 1;
    one->pending[one->num_pending++] = token_id;
    if (now_s - one->last_token_s > one->longest_gap_s)
        one->longest_gap_s = now_s - one->last_token_s;
    one->last_token_s = now_s;
    return one->num_written ? TAKEN_IN_PART : TAKEN;
}

/* The tokens of one step, by columns. `left`: room for `count`; gets the indices of those that were not taken, and for
   those that were taken in part -1 - index: `take_rest` has the remainder. Returns how many. */
EXPORT int64_t deliver(fan_out *all, const uint64_t *stream_keys, const uint32_t *positions, const uint32_t *token_ids,
                       int64_t count, double now_s, int64_t *left)
{
    int64_t num_left = 0;
    for (int64_t i = 0; i < count; i++) {
        lane *one = all->slots[slot_of(all, stream_keys[i])];
        enum outcome outcome = one ? deliver_one(one, positions[i], token_ids[i], now_s) : LEFT;
        if (outcome != TAKEN)
            left[num_left++] = outcome == LEFT ? i : -1 - i;
    }
    return num_left;
}
