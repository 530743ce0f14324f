/* Blocks of a KV pool, copied and summed up in one pass over them.

   A block's checksum runs through its layers. Whoever calls has checked nothing: each block and layer is checked here,
   before the first byte is touched. */

#include "stripes.h"

/* Between two looks at the stop: a fraction of a millisecond. */
enum { BYTES_BETWEEN_LOOKS = 1 << 20 };

static stripes_function *best_stripes(int64_t isa)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (isa >= 2 && __builtin_cpu_supports("avx512f"))
        return stripes_avx512;
    if (isa >= 1 && __builtin_cpu_supports("avx2"))
        return stripes_avx2;
#endif
    (void)isa;
    return stripes_plain;
}

static stripes_function *stripes = stripes_plain;

/* Choose the inner loop: 0 plain C, 1 AVX2, 2 AVX-512, or what the CPU has below that, which is returned. */
EXPORT int64_t choose_isa(int64_t isa)
{
    stripes = best_stripes(isa);
#ifdef __x86_64__
    return stripes == stripes_avx512 ? 2 : stripes == stripes_avx2 ? 1 : 0;
#else
    return 0;
#endif
}

EXPORT int64_t checksum_bytes(void) { return sizeof(checksum); }

void begin_sums(const order *what, checksum *sums)
{
    for (int64_t i = 0; sums && i < what->count; i++)
        if (sums[i].length == 0)
            checksum_begin(&sums[i], what->length);
}

INLINE void copied(uint8_t *to, const uint8_t *from, int64_t num_bytes)
{
    if (to)
        memcpy(to, from, (size_t)num_bytes);
}

/* The next bytes of an input, which are at most as many as it still has to come. */
static void take(checksum *sum, const uint8_t *from, uint8_t *to, int64_t num_bytes, destination_kind kind)
{
    const int64_t last = (sum->length - 1) / STRIPE_BYTES; /* This stripe waits for checksum_value. */
    while (num_bytes > 0) {
        int64_t stripe = smaller(sum->taken / STRIPE_BYTES, last);
        int64_t pending = sum->taken - stripe * STRIPE_BYTES;
        int64_t whole = pending ? 0 : smaller(num_bytes / STRIPE_BYTES, last - stripe);
        int64_t num = whole ? whole * STRIPE_BYTES : smaller(num_bytes, STRIPE_BYTES - pending);
        if (whole) {
            stripes(sum->sums, from, to, whole, stripe % STRIPES_OF_ROUND, kind);
            memcpy(sum->tail, from + num - STRIPE_BYTES, STRIPE_BYTES);
        } else {
            uint8_t *piece = sum->tail + STRIPE_BYTES;
            memcpy(piece + pending, from, (size_t)num);
            copied(to, from, num);
            if (pending + num == STRIPE_BYTES && stripe < last) {
                stripes(sum->sums, piece, NULL, 1, stripe % STRIPES_OF_ROUND, ONLY_SUM);
                memcpy(sum->tail, piece, STRIPE_BYTES);
            }
        }
        sum->taken += num;
        num_bytes -= num;
        from += num;
        to = to ? to + num : NULL;
    }
    if (sum->taken == sum->length)
        sum->value = checksum_value(sum);
}

void take_bytes(checksum *sum, const uint8_t *from, int64_t num_bytes) { take(sum, from, NULL, num_bytes, ONLY_SUM); }

/* Whether stripes of a pool's blocks are aligned, so that they can be stored past the cache. */
static int has_aligned_stripes(const pool *of, int64_t block_bytes)
{
    return (uintptr_t)of->base % STRIPE_BYTES == 0 && block_bytes % STRIPE_BYTES == 0;
}

void fill_past_cache(const order *what, checksum *sum, const uint8_t *from, uint8_t *to, int64_t num_bytes)
{
    take(sum, from, to, num_bytes, has_aligned_stripes(&what->from, what->block_bytes) ? STREAM : STORE);
}

void store_past_cache(uint8_t *to, const uint8_t *from, int64_t num_bytes)
{
#ifdef __x86_64__
    int64_t head = smaller(-(uintptr_t)to % STRIPE_BYTES, num_bytes);
    memcpy(to, from, (size_t)head);
    to += head;
    from += head;
    num_bytes -= head;
    for (; num_bytes >= STRIPE_BYTES; num_bytes -= STRIPE_BYTES) {
        for (int i = 0; i < STRIPE_BYTES; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        to += STRIPE_BYTES;
        from += STRIPE_BYTES;
    }
#endif
    memcpy(to, from, (size_t)num_bytes);
}

void let_everyone_see(void)
{
#ifdef __x86_64__
    _mm_sfence();
#endif
}

static int is_sound(const pool *of, const int64_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= of->num_blocks)
            return 0;
    return 1;
}

int order_is_sound(const order *what)
{
    return what->block_bytes > 0 && what->first_layer >= 0 && what->num_layers >= 0 &&
           what->first_layer + what->num_layers <= what->pool_layers &&
           is_sound(&what->from, what->ids, what->count) &&
           (!what->to.base || is_sound(&what->to, what->ids + what->count, what->count));
}

/* Adds blocks to `sums`, one a block, and copies them from one pool to another where there is another. Block by block,
   each through its layers, so that one running checksum stays in the registers' reach.

   DONE, STOPPED once `*stop` is not 0, or UNSOUND (nothing was touched) for a block or layer that is not there. */
EXPORT int64_t take_blocks(const order *what, checksum *sums, const volatile int32_t *stop)
{
    if (!order_is_sound(what))
        return UNSOUND;
    int is_aligned = has_aligned_stripes(&what->to, what->block_bytes);
    destination_kind kind = !what->to.base ? ONLY_SUM : what->past_cache && is_aligned ? STREAM : STORE;
    int64_t taken = 0;
    begin_sums(what, sums);
    for (int64_t i = 0; i < what->count; i++) {
        for (int64_t layer = what->first_layer; layer < what->first_layer + what->num_layers; layer++) {
            if (taken >= BYTES_BETWEEN_LOOKS) {
                taken = 0;
                if (*stop)
                    return STOPPED;
            }
            take(&sums[i], from_place(what, layer, i), to_place(what, layer, i), what->block_bytes, kind);
            taken += what->block_bytes;
        }
    }
    let_everyone_see();
    return *stop ? STOPPED : DONE;
}
