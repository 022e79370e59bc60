/* The load: one thread, one epoll, many connections to a server on 127.0.0.1.
 *
 *   load MODE PORT [name=value ...]
 *
 * echo      `size` bytes each way, `depth` messages in flight per connection, for `seconds`. With
 *           `reply`, the answer to a message has that many bytes instead
 * fan_out   the server sends every message to all connections; one counts when it is back at its
 *           sender
 * download  asks for `bytes` bytes and reads them, at most `rate` bytes per second if that is given.
 *           `size` bytes count as one message
 * upload    sends `bytes` bytes and waits until the server says that it has them all
 * churn     connect, send one byte, wait for one, close; `connections` at a time, for `seconds`
 * hold      open connections, exchange one message on each, keep them until standard input ends
 *
 * tls=1 does the same over TLS (compiled with -DTLS), resume=1 resumes sessions in churn. The
 * certificate is not verified: what the server does is measured, not what the load does.
 *
 * spin=1 asks for events without ever sleeping. To wake a load that sleeps is work of the kernel in
 * the server's send, which no server has with peers on other machines; and a load that sleeps more
 * often because a server is slower makes that server slower still.
 *
 * gate=1 lets another program look at the server at the right moments: the load prints {"ready": N}
 * when all connections are open and waits for a line, and once it has printed its result it keeps the
 * connections until standard input ends.
 *
 * The result is one line of JSON: messages, seconds, and the latency of a message in microseconds at
 * p50, p99 and p99.9 (null where a message has none).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

/* Latencies are counted in buckets of one microsecond up to this; longer ones share the last. */
#define BUCKETS 1000000
#define EVENTS 256
#define READ_SIZE 262144
/* Longest wait for an event: a deadline is noticed at most this late. */
#define TICK_MS (options.spin ? 0 : 10)
/* No answer for so long means that the server has lost a message. */
#define PATIENCE_NS 10000000000u
/* A fan-out message begins with its sender's number. */
#define TAG 4
#define PREFIX 4
/* Client addresses 127.0.0.1 to 127.0.0.SOURCES. One alone would run out of ports in churn, where
 * each closed connection keeps its port for a while. */
#define SOURCES 16

struct connection {
    int fd;
    unsigned number;
    int wants_out;
    size_t unsent;      /* bytes still to be sent */
    size_t received;    /* bytes of the message that is arriving */
    unsigned char tag[TAG];
    unsigned head;      /* ring of send times, one per message in flight */
    uint64_t *sent_at;
    char *batch;        /* `depth` messages: all alike, so only how many bytes are due matters */
#ifdef TLS
    SSL *ssl;
    int shaken;
#endif
};

static uint64_t histogram[BUCKETS + 1];
static char input[READ_SIZE];
static struct sockaddr_in address = {.sin_family = AF_INET};
static struct connection *connections;
static int epoll;
static uint64_t messages, resumed;

static struct {
    unsigned connections, depth;
    size_t size, reply;
    uint64_t bytes;
    double seconds, rate;
    int tls, resume, gate, spin;
} options = {.connections = 1, .depth = 1, .size = 1, .seconds = 1};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void die(const char *what) {
    fprintf(stderr, "load: %s\n", what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *allocate(size_t count, size_t each) {
    void *memory = calloc(count, each);
    if (memory == NULL)
        fail("calloc");
    return memory;
}

#ifdef TLS
static SSL_CTX *context;
static SSL_SESSION *session;

static void tls_die(const char *what) {
    fprintf(stderr, "load: %s: ", what);
    ERR_print_errors_fp(stderr);
    fputc('\n', stderr);
    exit(1);
}

static int keep_session(SSL *ssl, SSL_SESSION *fresh) {
    (void)ssl;
    SSL_SESSION_free(session);
    session = fresh;
    return 1; /* the reference is ours now */
}

static void tls_begin(struct connection *c) {
    c->ssl = SSL_new(context);
    if (c->ssl == NULL || !SSL_set_fd(c->ssl, c->fd))
        tls_die("SSL_new");
    SSL_set_connect_state(c->ssl);
    c->shaken = 0;
    if (options.resume && session != NULL)
        SSL_set_session(c->ssl, session);
}

/* -1 with errno EAGAIN: not now. 0: the server has closed. */
static ssize_t tls_result(struct connection *c, int n, const char *what) {
    if (n > 0)
        return n;
    int error = SSL_get_error(c->ssl, n);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
        errno = EAGAIN;
        return -1;
    }
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    tls_die(what);
    return 0;
}
#endif

/* These two return what recv(2) and send(2) do, and end the program for any error but EAGAIN. */
static ssize_t get(struct connection *c, void *to, size_t length) {
#ifdef TLS
    if (c->ssl != NULL) {
        ERR_clear_error();
        return tls_result(c, SSL_read(c->ssl, to, (int)length), "SSL_read");
    }
#endif
    ssize_t n = recv(c->fd, to, length, 0);
    if (n < 0 && errno != EAGAIN)
        fail("recv");
    return n;
}

static ssize_t put(struct connection *c, const void *from, size_t length) {
#ifdef TLS
    if (c->ssl != NULL) {
        ERR_clear_error();
        return tls_result(c, SSL_write(c->ssl, from, (int)length), "SSL_write");
    }
#endif
    ssize_t n = send(c->fd, from, length, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN)
        fail("send");
    return n;
}

static void watch(struct connection *c, int operation, int wants_out) {
    struct epoll_event event = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) != 0)
        fail("epoll_ctl");
    c->wants_out = wants_out;
}

static void unblock(struct connection *c) {
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) != 0)
        fail("fcntl");
}

/* On loopback a connect(2) that the backlog has room for is done when it returns. */
static void dial(struct connection *c) {
    static unsigned dialled;
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + dialled++ % SOURCES);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail("socket");
    /* The port is then chosen by connect(2), which knows the other end and can use one again. */
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
    if (bind(c->fd, (struct sockaddr *)&source, sizeof(source)) != 0)
        fail("bind");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof(address)) != 0)
        fail("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
#ifdef TLS
    if (options.tls)
        tls_begin(c);
#endif
}

static void hang_up(struct connection *c) {
#ifdef TLS
    if (c->ssl != NULL) {
        resumed += (uint64_t)SSL_session_reused(c->ssl);
        SSL_shutdown(c->ssl);
        SSL_free(c->ssl);
        c->ssl = NULL;
    }
#endif
    close(c->fd);
}

/* A message begins with how many bytes follow these four, and ends with its only line feed: servers
 * that read lines, or frames, find as many. */
static void fill(char *batch) {
    uint32_t rest = htonl((uint32_t)options.size - PREFIX);
    memset(batch, 'x', options.size * options.depth);
    for (char *at = batch; options.size > PREFIX && at < batch + options.size * options.depth;
         at += options.size) {
        memcpy(at, &rest, PREFIX);
        at[options.size - 1] = '\n';
    }
}

/* Opens all connections. A blocking exchange on each of them, in modes whose server answers one
 * message with one, keeps the server's backlog from overflowing and shows that it works. */
static void open_all(int exchange) {
    connections = allocate(options.connections, sizeof(*connections));
    for (unsigned i = 0; i < options.connections; i++) {
        struct connection *c = &connections[i];
        c->number = i;
        c->sent_at = allocate(options.depth, sizeof(*c->sent_at));
        /* The messages of all connections are the same bytes, except where they carry a tag. */
        if (i == 0 || exchange == 0) {
            c->batch = allocate(options.depth, options.size);
            fill(c->batch);
        } else
            c->batch = connections[0].batch;
        dial(c);
#ifdef TLS
        if (options.tls && SSL_do_handshake(c->ssl) != 1)
            tls_die("handshake");
#endif
        if (exchange) {
            size_t sent = 0, due = options.reply;
            /* Sent by and by: a server may not read on while its answer is not taken. */
            while (sent < options.size) {
                size_t length = options.size - sent;
                ssize_t n = put(c, c->batch, length < 65536 ? length : 65536);
                sent += n > 0 ? (size_t)n : 0;
                if (options.reply != options.size)
                    continue;
                for (size_t share = (size_t)n; n > 0 && share > 0;) {
                    ssize_t got = get(c, input, share < READ_SIZE ? share : READ_SIZE);
                    if (got <= 0)
                        die("the server closed a connection");
                    share -= (size_t)got;
                    due -= (size_t)got;
                }
            }
            while (due > 0) {
                ssize_t got = get(c, input, due < READ_SIZE ? due : READ_SIZE);
                if (got <= 0)
                    die("the server closed a connection");
                due -= (size_t)got;
            }
        }
        unblock(c);
        watch(c, EPOLL_CTL_ADD, 0);
    }
}

static void announce(void) {
    printf("{\"ready\": %u}\n", options.connections);
    fflush(stdout);
}

static void await_end(void) {
    while (options.gate && getchar() != EOF)
        ;
}

static void gate(void) {
    char line[16];
    if (!options.gate)
        return;
    announce();
    if (fgets(line, sizeof(line), stdin) == NULL)
        exit(1);
}

static void print_percentile(const char *name, double share) {
    uint64_t total = 0, seen = 0;
    for (size_t i = 0; i <= BUCKETS; i++)
        total += histogram[i];
    if (total == 0) {
        printf(", \"%s\": null", name);
        return;
    }
    size_t i = 0;
    while (i < BUCKETS && (double)(seen += histogram[i]) < share * (double)total)
        i++;
    printf(", \"%s\": %zu", name, i);
}

static void count(uint64_t from, uint64_t to) {
    uint64_t took = (to - from) / 1000;
    histogram[took < BUCKETS ? took : BUCKETS]++;
    messages++;
}

static void report(uint64_t start) {
    double took = (double)(now() - start) / 1e9;
    printf("{\"messages\": %llu, \"seconds\": %.6f", (unsigned long long)messages, took);
    print_percentile("p50", 0.5);
    print_percentile("p99", 0.99);
    print_percentile("p999", 0.999);
    if (options.resume)
        printf(", \"resumed\": %llu", (unsigned long long)resumed);
    printf("}\n");
    fflush(stdout);
    await_end();
}

static void push(struct connection *c) {
    size_t all = (size_t)options.depth * options.size;
    while (c->unsent > 0) {
        /* From the place in the message that is due, so that a tag stays at its beginning. */
        size_t from = (options.size - c->unsent % options.size) % options.size;
        size_t length = c->unsent < all - from ? c->unsent : all - from;
        ssize_t n = put(c, c->batch + from, length);
        if (n <= 0)
            break;
        c->unsent -= (size_t)n;
    }
    int wants_out = c->unsent > 0;
    if (wants_out != c->wants_out)
        watch(c, EPOLL_CTL_MOD, wants_out);
}

/* The oldest message in flight is back; the next one takes its place. */
static void answered(struct connection *c, uint64_t t) {
    count(c->sent_at[c->head], t);
    c->sent_at[c->head] = t;
    c->head = (c->head + 1) % options.depth;
    c->unsent += options.size;
}

static void arrived_echo(struct connection *c, size_t n, uint64_t t) {
    c->received += n;
    for (; c->received >= options.reply; c->received -= options.reply)
        answered(c, t);
}

static void arrived_fan_out(struct connection *c, size_t n, uint64_t t) {
    const unsigned char *at = (const unsigned char *)input;
    while (n > 0) {
        size_t step;
        if (c->received < TAG) {
            c->tag[c->received] = *at;
            step = 1;
        } else {
            step = options.size - c->received;
            if (step > n)
                step = n;
        }
        at += step;
        n -= step;
        c->received += step;
        if (c->received == options.size) {
            uint32_t sender;
            memcpy(&sender, c->tag, TAG);
            if (sender >= options.connections)
                die("the messages of two senders are mixed up");
            if (sender == c->number)
                answered(c, t);
            c->received = 0;
        }
    }
}

static void run_exchange(void (*arrived)(struct connection *, size_t, uint64_t)) {
    gate();
    uint64_t start = now(), t = start, last = start, stop = start + (uint64_t)(options.seconds * 1e9);
    for (unsigned i = 0; i < options.connections; i++) {
        struct connection *c = &connections[i];
        for (unsigned k = 0; k < options.depth; k++)
            c->sent_at[k] = now();
        c->unsent = options.size * options.depth;
        push(c);
    }
    struct epoll_event events[EVENTS];
    while ((t = now()) < stop) {
        int ready = epoll_wait(epoll, events, EVENTS, TICK_MS);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                ssize_t n;
                do {
                    n = get(c, input, sizeof(input));
                    if (n == 0)
                        die("the server closed a connection");
                    if (n > 0)
                        arrived(c, (size_t)n, last = now());
                } while (n > 0 && options.tls); /* OpenSSL may hold more than epoll knows of */
            }
            push(c);
        }
        if (t > last + PATIENCE_NS)
            die("no answer for ten seconds");
    }
    report(start);
}

static void run_transfer(int upload) {
    struct connection *c = &connections[0];
    struct epoll_event event;
    unsigned char header[8];
    for (int i = 0; i < 8; i++)
        header[i] = (unsigned char)(options.bytes >> (8 * i));
    gate();
    uint64_t start = now(), last = start, left = options.bytes;
    if (put(c, header, sizeof(header)) != sizeof(header))
        die("the request was not taken");
    /* An upload ends with one byte from the server. */
    for (int done = 0; !done;) {
        if (upload && left > 0) {
            ssize_t n = put(c, input, left < READ_SIZE ? left : READ_SIZE);
            if (n > 0) {
                left -= (uint64_t)n;
                last = now();
                continue;
            }
        }
        if (c->wants_out != (upload && left > 0))
            watch(c, EPOLL_CTL_MOD, upload && left > 0);
        epoll_wait(epoll, &event, 1, TICK_MS);
        ssize_t n;
        do {
            size_t most = options.rate > 0 ? options.size : READ_SIZE;
            n = get(c, input, most);
            if (n == 0)
                die("the server closed the connection");
            if (n < 0)
                break;
            last = now();
            if (upload) {
                if (left > 0)
                    die("the server answered too early");
                done = 1;
            } else {
                if ((uint64_t)n > left)
                    die("the server sent too much");
                left -= (uint64_t)n;
                done = left == 0;
            }
            if (options.rate > 0) {
                double due = (double)(options.bytes - left) / options.rate;
                double early = due - (double)(now() - start) / 1e9;
                if (early > 0)
                    usleep((useconds_t)(early * 1e6));
            }
        } while (!done && (options.tls || options.rate > 0));
        if (now() > last + PATIENCE_NS)
            die("nothing moved for ten seconds");
    }
    messages = options.bytes / options.size;
    report(start);
}

static void dial_again(struct connection *c) {
    c->sent_at[0] = now();
    dial(c);
    unblock(c);
    c->unsent = 1;
    watch(c, EPOLL_CTL_ADD, 0);
}

static void run_churn(void) {
    connections = allocate(options.connections, sizeof(*connections));
    gate();
    uint64_t start = now(), t, last = start, stop = start + (uint64_t)(options.seconds * 1e9);
    for (unsigned i = 0; i < options.connections; i++) {
        connections[i].sent_at = allocate(1, sizeof(uint64_t));
        dial_again(&connections[i]);
        if (!options.tls)
            connections[i].unsent -= put(&connections[i], "x", 1) == 1;
#ifdef TLS
        else if (SSL_do_handshake(connections[i].ssl) > 0)
            die("a handshake without the server");
#endif
    }
    struct epoll_event events[EVENTS];
    while ((t = now()) < stop) {
        int ready = epoll_wait(epoll, events, EVENTS, TICK_MS);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
#ifdef TLS
            if (options.tls && !c->shaken) {
                ERR_clear_error();
                if (tls_result(c, SSL_do_handshake(c->ssl), "handshake") < 0)
                    continue;
                c->shaken = 1;
            }
#endif
            if (c->unsent > 0)
                c->unsent -= put(c, "x", 1) == 1;
            ssize_t n = get(c, input, 1);
            if (n == 0)
                die("the server closed a connection");
            if (n < 0)
                continue;
            count(c->sent_at[0], last = now());
            hang_up(c);
            dial_again(c);
            if (!options.tls)
                c->unsent -= put(c, "x", 1) == 1;
#ifdef TLS
            else
                tls_result(c, SSL_do_handshake(c->ssl), "handshake");
#endif
        }
        if (t > last + PATIENCE_NS)
            die("no answer for ten seconds");
    }
    report(start);
}

static int set_option(const char *word) {
    const char *value = strchr(word, '=');
    if (value == NULL)
        return 0;
    size_t length = (size_t)(value++ - word);
    double number = atof(value);
    if (number < 0)
        return 0;
#define OPTION(name, type) \
    if (length == strlen(#name) && strncmp(word, #name, length) == 0) { \
        options.name = (type)number; \
        return 1; \
    }
    OPTION(connections, unsigned)
    OPTION(depth, unsigned)
    OPTION(size, size_t)
    OPTION(reply, size_t)
    OPTION(bytes, uint64_t)
    OPTION(seconds, double)
    OPTION(rate, double)
    OPTION(tls, int)
    OPTION(resume, int)
    OPTION(gate, int)
    OPTION(spin, int)
#undef OPTION
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: load MODE PORT [name=value ...]\n");
        return 2;
    }
    for (int i = 3; i < argc; i++)
        if (!set_option(argv[i])) {
            fprintf(stderr, "load: not an option: %s\n", argv[i]);
            return 2;
        }
    const char *mode = argv[1];
    address.sin_port = htons((uint16_t)atoi(argv[2]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (options.reply == 0)
        options.reply = options.size;
    if (options.connections == 0 || options.size == 0 || options.depth == 0) {
        fprintf(stderr, "load: connections, size and depth must be above 0\n");
        return 2;
    }
    if (options.tls) {
#ifdef TLS
        context = SSL_CTX_new(TLS_client_method());
        if (context == NULL)
            tls_die("SSL_CTX_new");
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        if (options.resume) {
            SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
            SSL_CTX_sess_set_new_cb(context, keep_session);
        }
#else
        die("compiled without TLS");
#endif
    }
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        fail("epoll_create1");
    if (strcmp(mode, "echo") == 0) {
        open_all(1);
        run_exchange(arrived_echo);
    } else if (strcmp(mode, "fan_out") == 0) {
        if (options.size < TAG)
            die("size must have room for the tag");
        open_all(0);
        for (unsigned i = 0; i < options.connections; i++)
            for (unsigned k = 0; k < options.depth; k++)
                memcpy(connections[i].batch + k * options.size, &connections[i].number, TAG);
        run_exchange(arrived_fan_out);
    } else if (strcmp(mode, "download") == 0 || strcmp(mode, "upload") == 0) {
        options.connections = 1;
        open_all(0);
        run_transfer(mode[0] == 'u');
    } else if (strcmp(mode, "churn") == 0) {
        run_churn();
    } else if (strcmp(mode, "hold") == 0) {
        open_all(1);
        options.gate = 1;
        announce();
        await_end();
    } else {
        fprintf(stderr, "load: no such mode: %s\n", mode);
        return 2;
    }
    return 0;
}
