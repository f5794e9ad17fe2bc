/*
 * source.c - the near end of the benchmark: clients that send as fast as they are served.
 *
 *     source [-k] sessions count size run host port domain...
 *
 * Sends `count` messages with bodies of `size` octets, in as many sessions at
 * once. Message n goes to <nRUN@domain>, each to the next of the domains in turn.
 * Each message has a connection of its own; with -k, a session keeps its
 * connection for all of its messages. A client sends one command and waits for
 * the reply, as most real ones do.
 *
 * When the last message has been accepted and the last session has ended, it
 * prints the seconds from the first connect() to the last 250. The first reply
 * that is not the expected one ends it with exit status 1, and is printed on
 * standard error.
 *
 * It is in C, with epoll(), because it shares the processors with the server that
 * is measured. Postfix's smtp-source is like it, but knows one domain only.
 */
#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    LINE = 1024,        /* octets of a reply's line, and of what is sent before a body */
    BODY_LINE = 64,     /* octets of a body's line, CRLF included */
    EVENTS = 256
};

/* What a session waits for the reply to. */
enum step { CONNECT, HELO, MAIL, RCPT, DATA, MESSAGE, QUIT };

static const char *const expected[] = { "220", "250", "250", "250", "354", "250", "221" };

struct session {
    int fd;
    enum step step;
    unsigned number;                /* of the message under way */
    size_t line_size;
    char line[LINE];                /* what has come of a reply's line */
    size_t head_size, sent, total;  /* `sent` octets of `total`: the head, and behind it the body if any */
    char head[LINE];
    bool waits_to_send;             /* epoll reports when there is room to send */
};

static struct {
    bool keep;
    unsigned count;
    const char *run;
    struct sockaddr_in server;
    char **domains;
    unsigned domain_count;
    char *body;                     /* ends with the final dot */
    size_t body_size;
} settings;

static int queue;
static unsigned begun, accepted, open_sessions;
static double last_accepted;

static void fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void watch(struct session *s, int operation, uint32_t events)
{
    struct epoll_event event = { .events = events, .data.ptr = s };

    if (epoll_ctl(queue, operation, s->fd, &event) != 0)
        fail("epoll: %s", strerror(errno));
}

/* Sends as much of the head and the body as there is room for. */
static void send_some(struct session *s)
{
    while (s->sent < s->total) {
        size_t of_head = s->sent < s->head_size ? s->sent : s->head_size, of_body = s->sent - of_head;
        struct iovec parts[2] = {
            { s->head + of_head, s->head_size - of_head },
            { settings.body + of_body, s->total - s->head_size - of_body }
        };
        ssize_t n = writev(s->fd, parts, 2);

        if (n < 0 && errno != EAGAIN)
            fail("message %u: the connection broke: %s", s->number, strerror(errno));
        if (n < 0)
            break;
        s->sent += (size_t)n;
    }
    if (s->waits_to_send != (s->sent < s->total)) {
        s->waits_to_send = !s->waits_to_send;
        watch(s, EPOLL_CTL_MOD, s->waits_to_send ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
}

/* Takes a step: sends a head, and behind it `body_size` octets of the body. */
static void say(struct session *s, enum step step, size_t body_size, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    s->head_size = (size_t)vsnprintf(s->head, sizeof s->head, format, arguments);
    va_end(arguments);
    if (s->head_size >= sizeof s->head)
        fail("a line of %zu octets", s->head_size);
    s->step = step;
    s->sent = 0;
    s->total = s->head_size + body_size;
    send_some(s);
}

/* A server whose queue of connections to accept is full may never learn of one that the
 * client takes for established (Linux, SYN cookies). Keepalive probes find those. */
static void open_connection(struct session *s)
{
    int on = 1, second = 1;

    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (s->fd < 0)
        fail("socket: %s", strerror(errno));
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(s->fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(s->fd, IPPROTO_TCP, TCP_KEEPIDLE, &second, sizeof second);
    setsockopt(s->fd, IPPROTO_TCP, TCP_KEEPINTVL, &second, sizeof second);
    if (connect(s->fd, (struct sockaddr *)&settings.server, sizeof settings.server) != 0 && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    s->step = CONNECT;
    s->line_size = 0;
    watch(s, EPOLL_CTL_ADD, EPOLLIN);
}

static void begin(struct session *s)
{
    s->number = ++begun;
    open_connection(s);
}

static void say_mail(struct session *s)
{
    say(s, MAIL, 0, "MAIL FROM:<bench@example.org>\r\n");
}

static void say_message(struct session *s, const char *domain)
{
    say(s, MESSAGE, settings.body_size,
        "From: <bench@example.org>\r\nTo: <%u%s@%s>\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\n"
        "Message-Id: <%u.%s@client.example.org>\r\nSubject: a benchmark\r\n\r\n",
        s->number, settings.run, domain, s->number, settings.run);
}

/* A session's connection is over: the session goes on over another while there are
 * messages to send. */
static void end(struct session *s)
{
    close(s->fd);
    if (begun < settings.count) {
        begin(s);
    } else {
        free(s);
        open_sessions--;
    }
}

/* Answers the reply to the step before. */
static void go_on(struct session *s)
{
    const char *domain = settings.domains[(s->number - 1) % settings.domain_count];

    switch (s->step) {
    case CONNECT:
        say(s, HELO, 0, "HELO client.example.org\r\n");
        break;
    case HELO:
        say_mail(s);
        break;
    case MAIL:
        say(s, RCPT, 0, "RCPT TO:<%u%s@%s>\r\n", s->number, settings.run, domain);
        break;
    case RCPT:
        say(s, DATA, 0, "DATA\r\n");
        break;
    case DATA:
        say_message(s, domain);
        break;
    case MESSAGE:
        accepted++;
        last_accepted = now();
        if (settings.keep && begun < settings.count) {
            s->number = ++begun;
            say_mail(s);
        } else {
            say(s, QUIT, 0, "QUIT\r\n");
        }
        break;
    case QUIT:
        end(s);
        break;
    }
}

/* Reads what has come.  A reply ends with the line that has no hyphen behind its
 * code (RFC 5321 4.2.1); nothing follows it until the next command. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->line + s->line_size, sizeof s->line - 1 - s->line_size);
    char *line = s->line, *line_end;

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n < 0 && errno == ECONNRESET && s->step == CONNECT) {   /* the server never had this connection */
        close(s->fd);
        open_connection(s);
        return;
    }
    if (n <= 0)
        fail("message %u: no reply: %s", s->number, n == 0 ? "the server closed the connection" : strerror(errno));
    s->line_size += (size_t)n;
    s->line[s->line_size] = '\0';
    while ((line_end = strstr(line, "\r\n")) != NULL) {
        *line_end = '\0';
        if (strncmp(line, expected[s->step], 3) != 0)
            fail("message %u: %s", s->number, line);
        if (line[3] != '-') {
            s->line_size = 0;
            go_on(s);
            return;
        }
        line = line_end + 2;
    }
    s->line_size -= (size_t)(line - s->line);
    memmove(s->line, line, s->line_size);
    if (s->line_size == sizeof s->line - 1)
        fail("message %u: a reply's line is too long", s->number);
}

static void make_body(size_t size)
{
    static const char dot[] = ".\r\n";
    size_t i, lines = (size + BODY_LINE - 1) / BODY_LINE;

    settings.body_size = lines * BODY_LINE + sizeof dot - 1;
    settings.body = malloc(settings.body_size);
    if (settings.body == NULL)
        fail("no memory");
    memset(settings.body, 'x', settings.body_size);
    for (i = 1; i <= lines; i++)
        memcpy(settings.body + i * BODY_LINE - 2, "\r\n", 2);
    memcpy(settings.body + lines * BODY_LINE, dot, sizeof dot - 1);
}

static void serve_all(void)
{
    struct epoll_event events[EVENTS];

    while (open_sessions > 0) {
        int i, count = epoll_wait(queue, events, EVENTS, -1);

        for (i = 0; i < count; i++) {
            struct session *s = events[i].data.ptr;

            if (events[i].events & EPOLLOUT)
                send_some(s);
            if (events[i].events & ~(uint32_t)EPOLLOUT)
                hear(s);
        }
    }
}

int main(int argc, char **argv)
{
    unsigned sessions;
    double start;

    settings.keep = argc > 1 && strcmp(argv[1], "-k") == 0;
    argv += settings.keep;
    argc -= settings.keep;
    if (argc < 8) {
        fprintf(stderr, "usage: source [-k] sessions count size run host port domain...\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    sessions = (unsigned)atoi(argv[1]);
    settings.count = (unsigned)atoi(argv[2]);
    make_body((size_t)atol(argv[3]));
    settings.run = argv[4];
    settings.server.sin_family = AF_INET;
    settings.server.sin_port = htons((unsigned short)atoi(argv[6]));
    if (inet_pton(AF_INET, argv[5], &settings.server.sin_addr) != 1)
        fail("%s is no address", argv[5]);
    settings.domains = argv + 7;
    settings.domain_count = (unsigned)(argc - 7);
    queue = epoll_create1(0);
    start = now();
    for (; open_sessions < sessions && begun < settings.count; open_sessions++) {
        struct session *s = calloc(1, sizeof *s);

        if (s == NULL)
            fail("no memory");
        begin(s);
    }
    serve_all();
    printf("%.6f %u\n", last_accepted - start, accepted);
    return 0;
}
