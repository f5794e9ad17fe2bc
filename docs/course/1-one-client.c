/*
 * 1-one-client.c - a server for one client at a time.
 *
 *     cc -o 1-one-client 1-one-client.c && ./1-one-client 2525
 *
 * listens on 127.0.0.1 port 2525.  Read it from the end.
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

enum { LINE_SIZE = 2048 };  /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */

static void die(const char *what)
{
    perror(what);
    exit(1);
}

struct session {
    int fd;                 /* the connection to the client */
    unsigned port;          /* of the client */
    bool gone;              /* the last reply is sent: main() closes the connection */
    char in[LINE_SIZE];     /* received, not yet consumed */
    size_t size;
};

/* Sends a reply.  If it cannot be sent, the session is over. */
static void reply(struct session *s, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    if (vdprintf(s->fd, format, arguments) < 0)
        s->gone = true;
    va_end(arguments);
}

static void take_command(struct session *s, const char *line)
{
    if (strncasecmp(line, "HELO ", 5) == 0) {
        reply(s, "250 %u OK\r\n", s->port);
    } else if (strcasecmp(line, "NOOP") == 0) {
        reply(s, "250 2.0.0 Ok\r\n");
    } else if (strcasecmp(line, "QUIT") == 0) {
        reply(s, "221 2.0.0 OK\r\n");
        s->gone = true;
    } else {
        reply(s, "500 5.5.2 Error: command not recognized\r\n");
    }
}

/* Returns the size of the first line, or 0 if its end has not come yet.  A line ends at CR LF
 * and nowhere else: RFC 5321 2.3.8. */
static size_t next_line(const char *bytes, size_t size)
{
    for (size_t i = 1; i < size; i++)
        if (bytes[i - 1] == '\r' && bytes[i] == '\n')
            return i + 1;
    return 0;
}

/* Takes all whole lines.  What is left is the beginning of the next line. */
static void converse(struct session *s)
{
    size_t size;

    while (!s->gone && (size = next_line(s->in, s->size)) > 0) {
        s->in[strcspn(s->in, "\r\n")] = '\0';
        take_command(s, s->in);
        s->size -= size;
        memmove(s->in, s->in + size, s->size);
    }
    if (!s->gone && s->size == LINE_SIZE) {
        reply(s, "500 5.5.2 Error: line too long\r\n");
        s->gone = true;
    }
}

/* Reads what has come from a client: it may be any part of a line. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n <= 0)
        s->gone = true;    /* the client has closed its side, or is lost */
    else
        s->size += (size_t)n;
    converse(s);
}

static int listen_on(const char *port)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);     /* 127.0.0.1: this machine only */
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);     /* or a restart has to wait */
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
    signal(SIGPIPE, SIG_IGN);       /* write() fails with EPIPE instead */
    listener = listen_on(argv[1]);
    for (;;) {
        struct sockaddr_in peer;
        socklen_t size = sizeof peer;
        struct session s = { .fd = accept(listener, (struct sockaddr *)&peer, &size) };

        if (s.fd < 0)
            die("cannot accept");
        s.port = ntohs(peer.sin_port);
        reply(&s, "220 localhost ESMTP\r\n");
        while (!s.gone)
            hear(&s);
        close(s.fd);
    }
}
