/* Blocks through a connected stream socket: straight out of one pool and straight into another. On the wire they lie
   layer by layer, within a layer in the order that was asked for.

   A large read that is summed up comes by way of a buffer that stays in the cache: the kernel fills it faster than
   cold memory, and from there one pass sums up and stores past the cache. That is one copy more, and takes less time
   than the kernel's copy into the pool and a look at it afterwards.

   The sockets are blocking, with the kernel's own timeouts (SO_RCVTIMEO, SO_SNDTIMEO): a call in which no byte moved for
   that long ends with EAGAIN, which goes to the caller as it is. */

#define _GNU_SOURCE

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "blocks.h"

enum { VECTORS_MAX = 64 };
/* Of one system call. What was received is summed up before more is: it is still in the second-level cache then. */
enum { RECEIVE_BYTES = 256 << 10, SEND_BYTES = 1 << 20 };
/* Reads of less than that are not worth a buffer. */
enum { BUFFERED_BYTES = 4 << 20 };

/* Where the next byte of the wire's order lies. */
typedef struct {
    const order *what;
    int64_t layer, i, offset;
} cursor;

INLINE int has_more(const cursor *at) { return at->layer < at->what->first_layer + at->what->num_layers; }

INLINE uint8_t *bytes_at(const cursor *at) { return from_place(at->what, at->layer, at->i) + at->offset; }

/* Skip bytes of one block, at most up to its end. */
INLINE void skip(cursor *at, int64_t num_bytes)
{
    at->offset += num_bytes;
    if (at->offset < at->what->block_bytes)
        return;
    at->offset = 0;
    if (++at->i == at->what->count) {
        at->i = 0;
        at->layer++;
    }
}

/* The next `bytes_max` bytes as vectors, neighbours joined; returns how many vectors. */
static int gather(cursor at, struct iovec *vectors, int64_t bytes_max)
{
    int num = 0;
    while (bytes_max > 0 && has_more(&at)) {
        uint8_t *bytes = bytes_at(&at);
        int64_t size = smaller(at.what->block_bytes - at.offset, bytes_max);
        if (num && (uint8_t *)vectors[num - 1].iov_base + vectors[num - 1].iov_len == bytes)
            vectors[num - 1].iov_len += (size_t)size;
        else if (num == VECTORS_MAX)
            return num;
        else
            vectors[num++] = (struct iovec){bytes, (size_t)size};
        bytes_max -= size;
        skip(&at, size);
    }
    return num;
}

/* Go on by `num_bytes`, summing them up. */
static void advance(cursor *at, int64_t num_bytes, checksum *sums)
{
    while (num_bytes > 0) {
        int64_t size = smaller(at->what->block_bytes - at->offset, num_bytes);
        if (sums)
            take_bytes(&sums[at->i], bytes_at(at), size);
        skip(at, size);
        num_bytes -= size;
    }
}

/* CLOCK_MONOTONIC, which is Python's time.monotonic. */
static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int is_late(double deadline_s) { return now_s() >= deadline_s; }

/* Look again and again whether a socket has something to read (or has ended), for so many seconds at most. Whoever else
   wants the core gets it in between. 1 when it has, else 0. */
EXPORT int64_t look_out(int fd, double seconds)
{
    const double end_s = now_s() + seconds;
    char byte;
    do {
        if (recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 || (errno != EAGAIN && errno != EINTR))
            return 1;
        sched_yield();
    } while (!is_late(end_s));
    return 0;
}

/* Go on by `num_bytes`, which lie at `from`: into their blocks, summing them up where there are checksums. */
static void put(cursor *at, const uint8_t *from, int64_t num_bytes, checksum *sums)
{
    while (num_bytes > 0) {
        int64_t size = smaller(at->what->block_bytes - at->offset, num_bytes);
        if (sums)
            fill_past_cache(at->what, &sums[at->i], from, bytes_at(at), size);
        else
            store_past_cache(bytes_at(at), from, size);
        skip(at, size);
        from += size;
        num_bytes -= size;
    }
}

/* What a system call of a receiver has returned, as an outcome; DONE: go on. */
static int64_t outcome(ssize_t received, double deadline_s)
{
    if (received == 0)
        return CLOSED;
    if (received < 0 && errno != EINTR)
        return -errno;
    return is_late(deadline_s) ? LATE : DONE;
}

static int64_t receive_in_place(int fd, const order *what, checksum *sums, double deadline_s)
{
    struct iovec vectors[VECTORS_MAX];
    cursor at = {.what = what, .layer = what->first_layer};
    int64_t ended = DONE;
    while (ended == DONE && what->count && has_more(&at)) {
        struct msghdr message = {.msg_iov = vectors};
        message.msg_iovlen = (size_t)gather(at, vectors, RECEIVE_BYTES);
        ssize_t received = recvmsg(fd, &message, MSG_WAITALL);
        if (received > 0)
            advance(&at, received, sums);
        ended = outcome(received, deadline_s);
    }
    return ended;
}

static int64_t receive_buffered(
    int fd, const order *what, checksum *sums, double deadline_s, uint8_t *buffer, int64_t num_bytes)
{
    cursor at = {.what = what, .layer = what->first_layer};
    int64_t ended = DONE;
    while (ended == DONE && num_bytes > 0) {
        ssize_t received = recv(fd, buffer, (size_t)smaller(num_bytes, RECEIVE_BYTES), MSG_WAITALL);
        if (received > 0) {
            put(&at, buffer, received, sums);
            num_bytes -= received;
        }
        ended = outcome(received, deadline_s);
    }
    let_everyone_see();
    return ended;
}

/* A message of `num_bytes` at `from`, before which `position` bytes of the wire's order have come: into its blocks, and
   into `sums`, where they are not NULL. DONE, or UNSOUND, and nothing was touched. */
EXPORT int64_t put_blocks(
    const order *what, checksum *sums, int64_t position, const uint8_t *from, int64_t num_bytes)
{
    int64_t layer_bytes = what->count * what->block_bytes;
    if (!order_is_sound(what) || position < 0 || num_bytes < 0 || position + num_bytes > layer_bytes * what->num_layers)
        return UNSOUND;
    if (num_bytes == 0)
        return DONE;
    begin_sums(what, sums);
    cursor at = {.what = what, .layer = what->first_layer + position / layer_bytes};
    at.i = position % layer_bytes / what->block_bytes;
    at.offset = position % what->block_bytes;
    put(&at, from, num_bytes, sums);
    let_everyone_see();
    return DONE;
}

/* Fill blocks (`from` of the order) with what comes, and add it to `sums`, one a block.
   DONE, UNSOUND, CLOSED by the peer, LATE, or -errno. No byte is written after it returns. */
EXPORT int64_t receive_blocks(int fd, const order *what, checksum *sums, double deadline_s)
{
    if (!order_is_sound(what))
        return UNSOUND;
    begin_sums(what, sums);
    int64_t num_bytes = what->count * what->num_layers * what->block_bytes;
    uint8_t *buffer = sums && num_bytes >= BUFFERED_BYTES ? aligned_alloc(STRIPE_BYTES, RECEIVE_BYTES) : NULL;
    int64_t ended = buffer ? receive_buffered(fd, what, sums, deadline_s, buffer, num_bytes)
                           : receive_in_place(fd, what, sums, deadline_s);
    free(buffer);
    return ended;
}

/* Send blocks (`from` of the order). DONE, UNSOUND, LATE, or -errno. */
EXPORT int64_t send_blocks(int fd, const order *what, double deadline_s)
{
    if (!order_is_sound(what))
        return UNSOUND;
    struct iovec vectors[VECTORS_MAX];
    cursor at = {.what = what, .layer = what->first_layer};
    while (what->count && has_more(&at)) {
        struct msghdr message = {.msg_iov = vectors};
        message.msg_iovlen = (size_t)gather(at, vectors, SEND_BYTES);
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return -errno;
        if (sent > 0)
            advance(&at, sent, NULL);
        if (is_late(deadline_s))
            return LATE;
    }
    return DONE;
}
