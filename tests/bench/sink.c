/*
 * sink.c - the far end of the benchmark: takes mail for everybody, keeps none,
 * and writes down what came.
 *
 *     sink [-d milliseconds] port address... >arrivals
 *
 * It listens at each of the addresses. With -d it answers each message so much
 * later, one connection's delay beside the others'.
 *
 * For each recipient of each message it writes one line, before the message is
 * answered with 250:
 *
 *     1024r7@example.net 8375920471 4379
 *
 * the recipient, the time by CLOCK_MONOTONIC in microseconds, and the octets of
 * the message as they came. The lines show which messages were lost and which came
 * twice.
 *
 * It is in C, with epoll(), because it must never be what is measured: it takes a
 * message for 0.09 ms of one processor, where an exchanger of the lab, which is in
 * Python, takes 2.5 ms.
 */
#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    INPUT = 262144,     /* octets read at once */
    KEPT = 2048,        /* octets of an unfinished line that wait for the rest */
    OUTPUT = 16384,     /* replies to what came at once */
    RECIPIENTS = 100,
    ADDRESS = 256,
    EVENTS = 256,
    LISTENERS = 64
};

struct client {
    int fd;
    bool listens;               /* no client: the descriptor is a listening socket */
    bool in_data;
    bool quits;
    long long due;              /* when its message is answered, in microseconds; 0: it has none to answer */
    struct client *next;        /* in the list of those that wait for that */
    size_t octets;              /* of this message so far */
    size_t kept_size;
    char kept[KEPT];
    size_t recipient_count;
    char recipients[RECIPIENTS][ADDRESS];
};

static char input[KEPT + INPUT], output[OUTPUT];
static size_t output_size;
static int queue;
static long long delay;         /* of a message's answer, in microseconds */

/* Clients whose message waits to be answered, in the order of their times, which is that of
 * their final dots. epoll knows nothing of them meanwhile. */
static struct client *waiting, **last_waiting = &waiting;

static void die(const char *what)
{
    fprintf(stderr, "sink: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void say(const char *reply)
{
    size_t size = strlen(reply);

    if (output_size + size <= sizeof output) {
        memcpy(output + output_size, reply, size);
        output_size += size;
    }
}

static long long microseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

/* Takes a message: writes it down and says so. */
static void take_message(struct client *c)
{
    long long now = microseconds();

    for (size_t i = 0; i < c->recipient_count; i++)
        printf("%s %lld %zu\n", c->recipients[i], now, c->octets);
    c->recipient_count = 0;
    c->due = 0;
    say("250 2.0.0 Ok\r\n");
}

static void add_recipient(struct client *c, const char *path, size_t size)
{
    const char *end = memchr(path, '>', size);

    if (end == NULL || end - path >= ADDRESS || c->recipient_count == RECIPIENTS) {
        say("550 5.1.1 no\r\n");
        return;
    }
    memcpy(c->recipients[c->recipient_count], path, (size_t)(end - path));
    c->recipients[c->recipient_count++][end - path] = '\0';
    say("250 2.1.5 Ok\r\n");
}

static void answer(struct client *c, const char *line, size_t size)
{
    if (strncasecmp(line, "EHLO", 4) == 0) {
        say("250-sink\r\n250-PIPELINING\r\n250-SIZE 1073741824\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n");
    } else if (strncasecmp(line, "RCPT TO:<", 9) == 0) {
        add_recipient(c, line + 9, size - 9);
    } else if (strncasecmp(line, "DATA", 4) == 0 && c->recipient_count > 0) {
        c->in_data = true;
        c->octets = 0;
        say("354 go on\r\n");
    } else if (strncasecmp(line, "QUIT", 4) == 0) {
        c->quits = true;
        say("221 2.0.0 Bye\r\n");
    } else {                    /* HELO, MAIL, RSET, NOOP */
        c->recipient_count = 0;
        say("250 2.0.0 Ok\r\n");
    }
}

/* Takes a message's lines.  Returns how many octets are done with: all but what
 * may be the beginning of its end. */
static size_t take_data(struct client *c, const char *bytes, size_t size)
{
    const char *end;
    size_t done;

    if (c->octets == 0 && size >= 3 && memcmp(bytes, ".\r\n", 3) == 0) {
        done = 3;               /* nothing but the dot */
    } else if ((end = memmem(bytes, size, "\r\n.\r\n", 5)) != NULL) {
        c->octets += (size_t)(end - bytes) + 2;
        done = (size_t)(end - bytes) + 5;
    } else {
        done = size > 4 ? size - 4 : 0;
        c->octets += done;
        return done;
    }
    c->in_data = false;
    if (delay > 0)
        c->due = microseconds() + delay;
    else
        take_message(c);
    return done;
}

/* Takes a command.  Returns its octets, or 0 where its end has not come. */
static size_t take_command(struct client *c, const char *bytes, size_t size)
{
    const char *end = memmem(bytes, size, "\r\n", 2);

    if (end == NULL)
        return 0;
    answer(c, bytes, (size_t)(end - bytes));
    return (size_t)(end - bytes) + 2;
}

/* Takes the client out of epoll's sight until its message is due. */
static void make_wait(struct client *c)
{
    epoll_ctl(queue, EPOLL_CTL_DEL, c->fd, NULL);
    c->next = NULL;
    *last_waiting = c;
    last_waiting = &c->next;
}

/* Takes what has come, `size` octets of the input, up to a message that has to wait, and answers
 * all of it in one write. False: the client has gone. */
static bool take(struct client *c, size_t size)
{
    size_t used = 0, step = 1;

    while (used < size && step > 0 && !c->quits && c->due == 0) {
        step = (c->in_data ? take_data : take_command)(c, input + used, size - used);
        used += step;
    }
    c->kept_size = size - used;
    if (c->kept_size > KEPT)
        return false;
    memcpy(c->kept, input + used, c->kept_size);
    if (fflush(stdout) != 0)            /* what is answered is written down */
        die("arrivals");
    if (output_size > 0 && write(c->fd, output, output_size) != (ssize_t)output_size)
        return false;
    if (c->due != 0)
        make_wait(c);
    return !c->quits;
}

/* Reads once. False: the client has gone. */
static bool serve(struct client *c)
{
    ssize_t n = read(c->fd, input + c->kept_size, INPUT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (n <= 0)
        return false;
    memcpy(input, c->kept, c->kept_size);
    output_size = 0;
    return take(c, c->kept_size + (size_t)n);
}

static bool watch(struct client *c)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };

    return epoll_ctl(queue, EPOLL_CTL_ADD, c->fd, &event) == 0;
}

static void drop(struct client *c)
{
    close(c->fd);
    free(c);
}

/* Answers the messages whose time has come, and what their clients had said behind them. Returns the
 * milliseconds until the next one, or -1 where none waits. */
static int answer_due(void)
{
    long long now = microseconds();

    while (waiting != NULL && waiting->due <= now) {
        struct client *c = waiting;

        waiting = c->next;
        if (waiting == NULL)
            last_waiting = &waiting;
        output_size = 0;
        take_message(c);
        memcpy(input, c->kept, c->kept_size);
        if (!watch(c) || !take(c, c->kept_size))
            drop(c);
    }
    return waiting == NULL ? -1 : (int)((waiting->due - now) / 1000 + 1);
}

static void welcome(int listener)
{
    static const char greeting[] = "220 sink ESMTP\r\n";
    int fd, on = 1;

    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct client *c = calloc(1, sizeof *c);

        if (c == NULL)
            die("no memory");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (write(fd, greeting, sizeof greeting - 1) < 0 || !watch(c))
            drop(c);
    }
}

static int listen_on(const char *address, const char *port)
{
    struct sockaddr_in where = { .sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port)) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;

    if (inet_pton(AF_INET, address, &where.sin_addr) != 1)
        die(address);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&where, sizeof where) != 0 || listen(fd, SOMAXCONN) != 0)
        die("cannot listen");
    return fd;
}

int main(int argc, char **argv)
{
    static struct client listeners[LISTENERS];

    if (argc > 2 && strcmp(argv[1], "-d") == 0) {
        delay = atol(argv[2]) * 1000LL;
        argv += 2;
        argc -= 2;
    }
    if (argc < 3 || argc > 2 + LISTENERS) {
        fprintf(stderr, "usage: sink [-d milliseconds] port address... >arrivals\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    queue = epoll_create1(0);
    for (int i = 0; i < argc - 2; i++) {
        listeners[i] = (struct client){ .fd = listen_on(argv[2 + i], argv[1]), .listens = true };
        if (!watch(&listeners[i]))
            die("epoll");
    }
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(queue, events, EVENTS, answer_due());

        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;

            if (c->listens)
                welcome(c->fd);
            else if (!serve(c))
                drop(c);
        }
    }
}
