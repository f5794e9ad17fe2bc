/*
 * 2-many-clients.c - many clients at once in one process, with select().
 *
 *     cc -o 2-many-clients 2-many-clients.c && ./2-many-clients 2525
 *
 * listens on 127.0.0.1 port 2525.
 *
 * New since program 1: Sessions, and The loop.  To be read from the end.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    LINE_SIZE = 2048,       /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
    RESERVE = 16            /* descriptors that are no client's */
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* ---- Lines ----------------------------------------------------------------- */

struct line {
    size_t length;  /* octets of text, the line end left out */
    size_t used;    /* octets to consume, line end included; 0: the end is not here yet */
};

/* A line ends at CRLF and nowhere else: RFC 5321 2.3.8. */
static struct line next_line(const char *bytes, size_t size)
{
    for (size_t i = 1; i < size; i++)
        if (bytes[i - 1] == '\r' && bytes[i] == '\n')
            return (struct line){ i - 1, i + 1 };
    return (struct line){ size, 0 };
}

static bool starts(const char *text, const char *with)
{
    return strncasecmp(text, with, strlen(with)) == 0;
}

/* ---- Sessions -------------------------------------------------------------- */

struct session {
    int fd;                 /* the client */
    bool gone;              /* the last reply is given: the loop closes it */
    unsigned port;          /* the client's */
    char in[LINE_SIZE];     /* received, not yet consumed */
    size_t size;
};

static struct session sessions[FD_SETSIZE];
static size_t session_count, session_limit;
static int listener;

/* The one way to tell a client something.  A client whose side has no room for another
 * reply has stopped reading them: it is given up. */
static void reply(struct session *s, const char *format, ...)
{
    char text[512];         /* RFC 5321 4.5.3.1.5 */
    va_list arguments;
    int size;

    va_start(arguments, format);
    size = vsnprintf(text, sizeof text - 2, format, arguments);
    va_end(arguments);
    memcpy(text + size, "\r\n", 2);
    if (write(s->fd, text, (size_t)size + 2) != size + 2)
        s->gone = true;
}

/* ---- Commands -------------------------------------------------------------- */

static void take_command(struct session *s, size_t length)
{
    s->in[length] = '\0';
    if (starts(s->in, "HELO ")) {
        reply(s, "250 %u OK", s->port);
    } else if (starts(s->in, "NOOP")) {
        reply(s, "250 2.0.0 Ok");
    } else if (starts(s->in, "QUIT")) {
        reply(s, "221 2.0.0 OK");
        s->gone = true;
    } else {
        reply(s, "500 5.5.2 Error: command not recognized");
    }
}

/* ---- The loop -------------------------------------------------------------- */

/* Answers all whole lines there are.  What is left waits for the rest of its line. */
static void converse(struct session *s)
{
    struct line line;

    while (!s->gone && (line = next_line(s->in, s->size)).used > 0) {
        take_command(s, line.length);
        s->size -= line.used;
        memmove(s->in, s->in + line.used, s->size);
    }
    if (!s->gone && s->size == LINE_SIZE) {
        reply(s, "500 5.5.2 Error: line too long");
        s->gone = true;
    }
}

/* Reads once from a client. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        s->gone = true;
        return;
    }
    s->size += (size_t)n;
    converse(s);
}

/* That the listening socket is readable promises nothing: the client may have left. */
static void welcome(void)
{
    struct session *s = &sessions[session_count];
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    int fd = accept(listener, (struct sockaddr *)&peer, &size);

    if (fd < 0)
        return;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    *s = (struct session){ .fd = fd, .port = ntohs(peer.sin_port) };
    session_count++;
    reply(s, "220 localhost ESMTP");
}

/* Waits until something happens. */
static void wait_for_events(fd_set *readable)
{
    int top = listener;

    FD_ZERO(readable);          /* select() changes its sets: they are made anew each time */
    if (session_count < session_limit)
        FD_SET(listener, readable);
    for (const struct session *s = sessions; s < sessions + session_count; s++) {
        FD_SET(s->fd, readable);
        top = s->fd > top ? s->fd : top;
    }
    if (select(top + 1, readable, NULL, NULL, NULL) < 0)
        FD_ZERO(readable);
}

static void reap_sessions(void)
{
    for (size_t i = session_count; i-- > 0; ) {
        if (!sessions[i].gone)
            continue;
        close(sessions[i].fd);
        sessions[i] = sessions[--session_count];
    }
}

static void run(void)
{
    for (;;) {
        fd_set readable;

        wait_for_events(&readable);
        for (size_t i = 0; i < session_count; i++)
            if (FD_ISSET(sessions[i].fd, &readable))
                hear(&sessions[i]);
        if (FD_ISSET(listener, &readable))
            welcome();
        reap_sessions();
    }
}

/* ---- Start ----------------------------------------------------------------- */

static void listen_on(const char *port)
{
    const int on = 1;
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);     /* 127.0.0.1: this machine only */
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);     /* at once after the last run */
    if (bind(listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener, SOMAXCONN) != 0)
        die("cannot listen");
    fcntl(listener, F_SETFL, O_NONBLOCK);
    fprintf(stderr, "listening on 127.0.0.1 port %s\n", port);
}

int main(int argc, char **argv)
{
    long limit = sysconf(_SC_OPEN_MAX);

    if (argc != 2) {
        fprintf(stderr, "usage: %s port\n", argv[0]);
        return 2;
    }
    session_limit = (size_t)((limit < 0 || limit > FD_SETSIZE ? FD_SETSIZE : limit) - RESERVE);
    signal(SIGPIPE, SIG_IGN);       /* write() says it: EPIPE */
    listen_on(argv[1]);
    run();
    return 0;
}
