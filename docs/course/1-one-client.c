/*
 * 1-one-client.c - a server for one client at a time.
 *
 *     cc -o 1-one-client 1-one-client.c && ./1-one-client 2525
 *
 * listens on 127.0.0.1 port 2525.  To be read from the end.
 */
#define _POSIX_C_SOURCE 200809L

#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    LINE_SIZE = 2048        /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

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

struct session {
    int fd;                 /* the client */
    bool gone;              /* the last reply is given, or cannot be given */
    unsigned port;          /* the client's */
    char in[LINE_SIZE];     /* received, not yet consumed */
    size_t size;
};

/* The one way to tell a client something.  write() may take a part of it only, and then
 * the rest has to be written again. */
static void reply(struct session *s, const char *format, ...)
{
    char text[512];         /* RFC 5321 4.5.3.1.5 */
    va_list arguments;
    int size;

    va_start(arguments, format);
    size = vsnprintf(text, sizeof text - 2, format, arguments);
    va_end(arguments);
    memcpy(text + size, "\r\n", 2);
    size += 2;
    for (int sent = 0; sent < size && !s->gone; ) {
        ssize_t n = write(s->fd, text + sent, (size_t)(size - sent));

        if (n < 0)
            s->gone = true;
        else
            sent += (int)n;
    }
}

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

/* Reads once from the client: as much as has come, which may be any part of a line. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n <= 0) {
        s->gone = true;     /* the client has closed its side, or is lost */
        return;
    }
    s->size += (size_t)n;
    converse(s);
}

static int listen_on(const char *port)
{
    const int on = 1;
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);     /* 127.0.0.1: this machine only */
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);     /* at once after the last run */
    if (bind(listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener, SOMAXCONN) != 0)
        die("cannot listen");
    fprintf(stderr, "listening on 127.0.0.1 port %s\n", port);
    return listener;
}

int main(int argc, char **argv)
{
    int listener;

    if (argc != 2) {
        fprintf(stderr, "usage: %s port\n", argv[0]);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);       /* write() says it: EPIPE */
    listener = listen_on(argv[1]);
    for (;;) {
        struct sockaddr_in peer;
        socklen_t size = sizeof peer;
        struct session s = { .fd = accept(listener, (struct sockaddr *)&peer, &size) };

        if (s.fd < 0)
            die("cannot accept");
        s.port = ntohs(peer.sin_port);
        reply(&s, "220 localhost ESMTP");
        while (!s.gone)
            hear(&s);
        close(s.fd);
    }
}
