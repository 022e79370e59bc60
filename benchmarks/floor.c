/* The floor: what the same work costs with nothing between it and the kernel. Bare epoll, one thread.
 *
 *   floor BEHAVIOUR
 *
 * Listens on a free port of 127.0.0.1, prints it, and serves until standard input ends.
 *
 * echo          sends back what arrives
 * small_writes  answers each event with five bytes, in one send
 * fan_out       sends what arrives to all connections: one send per connection and iteration
 * send          a request is the number of bytes wanted (8 bytes, little endian), and gets as many
 * receive       a request is the number of bytes that follow; answered with one byte at their end
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS 256
#define READ_SIZE 262144
#define CHUNK 65536

struct connection {
    int fd, wants_out;
    unsigned place;            /* index in `all` */
    char *pending;             /* what the kernel did not take, or (fan_out) not given to it yet */
    size_t from, to, room;
    uint64_t left;             /* bytes to be sent or received */
    struct connection *next;   /* of those with bytes of this iteration (fan_out) */
    struct connection *gone;   /* of those to be freed when nothing refers to them any more */
};

static int epoll;
static char input[READ_SIZE];
static struct connection **all, *dirty, *gone;
static unsigned count, room;
static void (*arrived)(struct connection *, size_t);

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void watch(struct connection *c, int operation, int wants_out) {
    /* Nothing is read while the peer does not take what it has been sent. */
    struct epoll_event event = {.events = wants_out ? EPOLLOUT : EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) != 0)
        fail("epoll_ctl");
    c->wants_out = wants_out;
}

static void drop(struct connection *c) {
    close(c->fd);
    c->fd = -1;
    all[c->place] = all[--count];
    all[c->place]->place = c->place;
    c->gone = gone;
    gone = c;
}

static void keep(struct connection *c, const char *bytes, size_t length) {
    if (c->room - c->to < length) {
        c->room = 2 * (c->to + length);
        c->pending = realloc(c->pending, c->room);
        if (c->pending == NULL)
            fail("realloc");
    }
    memcpy(c->pending + c->to, bytes, length);
    c->to += length;
}

/* How many bytes the kernel took. A connection that is gone takes all, and ends with its next read. */
static size_t give(struct connection *c, const char *bytes, size_t length) {
    ssize_t n = send(c->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN ? 0 : length;
    return (size_t)n;
}

static void flush(struct connection *c) {
    c->from += give(c, c->pending + c->from, c->to - c->from);
    if (c->from == c->to)
        c->from = c->to = 0;
    if ((c->to > 0) != c->wants_out)
        watch(c, EPOLL_CTL_MOD, c->to > 0);
}

static void answer(struct connection *c, const char *bytes, size_t length) {
    size_t n = give(c, bytes, length);
    if (n < length) {
        keep(c, bytes + n, length - n);
        watch(c, EPOLL_CTL_MOD, 1);
    }
}

static void echo(struct connection *c, size_t n) {
    answer(c, input, n);
}

static void small_writes(struct connection *c, size_t n) {
    (void)n;
    answer(c, "abcde", 5);
}

static void fan_out(struct connection *c, size_t n) {
    (void)c;
    for (unsigned i = 0; i < count; i++) {
        struct connection *each = all[i];
        if (each->to == 0) {
            each->next = dirty;
            dirty = each;
        }
        keep(each, input, n);
    }
}

static void flush_all(void) {
    while (dirty != NULL) {
        struct connection *c = dirty;
        dirty = c->next;
        if (c->fd >= 0)
            flush(c);
    }
}

static void free_gone(void) {
    while (gone != NULL) {
        struct connection *c = gone;
        gone = c->gone;
        free(c->pending);
        free(c);
    }
}

static uint64_t number(void) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--)
        n = n << 8 | (unsigned char)input[i];
    return n;
}

static void pour(struct connection *c) {
    static const char zeros[CHUNK];
    while (c->left > 0) {
        size_t n = give(c, zeros, c->left < CHUNK ? c->left : CHUNK);
        if (n == 0)
            break;
        c->left -= n;
    }
    if ((c->left > 0) != c->wants_out)
        watch(c, EPOLL_CTL_MOD, c->left > 0);
}

static void request_to_send(struct connection *c, size_t n) {
    if (n < 8)
        exit(1);
    c->left = number();
    pour(c);
}

static void receive(struct connection *c, size_t n) {
    if (c->left == 0) {
        if (n < 8)
            exit(1);
        c->left = number();
        n -= 8;
    }
    c->left -= n;
    if (c->left == 0)
        answer(c, ".", 1);
}

static void welcome(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        struct connection *c = calloc(1, sizeof(*c));
        if (count == room) {
            room = room ? 2 * room : 64;
            all = realloc(all, room * sizeof(struct connection *));
        }
        if (c == NULL || all == NULL)
            fail("alloc");
        c->fd = fd;
        c->place = count;
        all[count++] = c;
        watch(c, EPOLL_CTL_ADD, 0);
    }
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*arrived)(struct connection *, size_t);
    } behaviours[] = {{"echo", echo}, {"small_writes", small_writes}, {"fan_out", fan_out},
                      {"send", request_to_send}, {"receive", receive}};
    for (size_t i = 0; argc == 2 && i < sizeof(behaviours) / sizeof(*behaviours); i++)
        if (strcmp(argv[1], behaviours[i].name) == 0)
            arrived = behaviours[i].arrived;
    if (arrived == NULL) {
        fprintf(stderr, "usage: floor echo|small_writes|fan_out|send|receive\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof(address);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0 ||
        listen(listener, 1024) != 0 || getsockname(listener, (struct sockaddr *)&address, &length) != 0)
        fail("listen");
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[EVENTS], event = {.events = EPOLLIN, .data.ptr = &listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    event.data.ptr = NULL;
    /* Refused for a file, which never ends while it is served from. */
    epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &event);
    printf("%u\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == NULL) {
                /* Each line asks for a collection of garbage, of which there is none. */
                ssize_t n = read(STDIN_FILENO, input, sizeof(input));
                if (n <= 0)
                    return 0;
                printf("{}\n");
                fflush(stdout);
            } else if ((void *)c == (void *)&listener) {
                welcome(listener);
            } else if (c->wants_out) {
                if (arrived == request_to_send)
                    pour(c);
                else
                    flush(c);
            } else {
                ssize_t n = recv(c->fd, input, sizeof(input), 0);
                if (n > 0)
                    arrived(c, (size_t)n);
                else if (n == 0 || errno != EAGAIN)
                    drop(c);
            }
        }
        flush_all();
        free_gone();
    }
}
