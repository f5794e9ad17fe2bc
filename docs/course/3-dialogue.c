/*
 * 3-dialogue.c - the SMTP dialogue: a table of commands, phases, and the dot.
 *
 *     cc -o 3-dialogue 3-dialogue.c && ./3-dialogue 2525
 *
 * listens on 127.0.0.1 port 2525, and prints the messages that it takes.
 *
 * New since program 2: phases, and all from draft_open() to take_message().  Read it from
 * the end.
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
    LINE_SIZE = 2048,           /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
    CLIENTS = 400               /* at once: each has up to two of FD_SETSIZE descriptors, 1,024 */
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* What is true in each phase. */
enum phase {
    CONNECTED,      /* 220 is sent; no HELO yet */
    READY,          /* HELO is given; no transaction */
    MAILED,         /* the reverse-path is in the draft */
    ADDRESSED,      /* at least one recipient is, too */
    DATA,           /* 354 is sent; lines go to the draft */
    GONE,           /* the last reply is sent: run() closes the session */
    SAME            /* no phase: in commands[], "stays in the same phase" */
};

static struct session {
    int fd;                 /* the connection to the client */
    unsigned port;          /* of the client */
    enum phase phase;
    FILE *draft;            /* the message that is being received, or NULL */
    bool spoiled;           /* it holds a bare CR, a bare LF or a NUL */
    char in[LINE_SIZE];     /* received, not yet consumed */
    size_t size;
} sessions[FD_SETSIZE];     /* by descriptor */
static fd_set watched;      /* all clients; and the listener, while there is room for one more */
static int listener, clients;

/* Sends a reply.  A client that leaves no room for it has stopped reading, and is given up. */
static void reply(struct session *s, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    if (vdprintf(s->fd, format, arguments) < 0)
        s->phase = GONE;
    va_end(arguments);
}

static bool draft_open(struct session *s)
{
    s->draft = tmpfile();
    return s->draft != NULL;
}

static void draft_drop(struct session *s)
{
    if (s->draft != NULL)
        fclose(s->draft);
    s->draft = NULL;
    s->spoiled = false;
}

static bool draft_print(struct session *s)
{
    rewind(s->draft);
    for (int c; (c = getc(s->draft)) != EOF; )
        putchar(c);
    return !ferror(s->draft) && fflush(stdout) == 0;
}

/* The commands: what a line begins with; the first and the last phase in which it may come;
 * the phase that follows; the reply.  A path follows a colon. */
static const struct command {
    const char *verb;
    enum phase first, last, next;
    const char *reply;
} commands[] = {
    { "HELO ",      CONNECTED, ADDRESSED, READY,     "250 %u OK\r\n" },
    { "EHLO ",      CONNECTED, ADDRESSED, READY,     "250 %u OK\r\n" },
    { "MAIL FROM:", READY,     READY,     MAILED,    "250 2.1.0 Ok\r\n" },
    { "RCPT TO:",   MAILED,    ADDRESSED, ADDRESSED, "250 2.1.5 Ok\r\n" },
    { "DATA",       ADDRESSED, ADDRESSED, DATA,      "354 End data with <CR><LF>.<CR><LF>\r\n" },
    { "RSET",       READY,     ADDRESSED, READY,     "250 2.0.0 Ok\r\n" },
    { "NOOP",       CONNECTED, ADDRESSED, SAME,      "250 2.0.0 Ok\r\n" },
    { "QUIT",       CONNECTED, ADDRESSED, GONE,      "221 2.0.0 OK\r\n" },
    { "",           CONNECTED, ADDRESSED, SAME,      "500 5.5.2 Error: command not recognized\r\n" }
};

/* Is `text` <local-part@domain>, or <> where `null` allows it?  A part of RFC 5321 4.1.2: no quotes,
 * no address literals.  sscanf() sets `end` only if all before %n fits. */
static bool is_path(const char *text, bool null)
{
    int end = 0;

    if (strcmp(text, "<>") == 0)
        return null;
    sscanf(text, "<%*[^@<> ]@%*[^@<> ]>%n", &end);
    return end > 0 && text[end] == '\0';
}

static void take_command(struct session *s, const char *line)
{
    const struct command *c = commands;
    const char *path;

    while (strncasecmp(line, c->verb, strlen(c->verb)) != 0)        /* the last row fits every line */
        c++;
    path = line + strlen(c->verb);
    if (s->phase < c->first || s->phase > c->last) {
        reply(s, "503 5.5.1 Error: bad sequence of commands\r\n");
    } else if (strchr(c->verb, ':') != NULL && !is_path(path, c->next == MAILED)) {
        reply(s, "501 5.5.4 Syntax: %s<address>\r\n", c->verb);
    } else if (c->next == MAILED && !draft_open(s)) {
        reply(s, "451 4.3.0 Error: message not stored, try again later\r\n");
    } else {
        if (c->next == READY)
            draft_drop(s);
        if (c->next == MAILED || c->next == ADDRESSED)
            fprintf(s->draft, "%s%s\r\n", c->verb, path);
        if (c->next == DATA)
            fputs("DATA\r\n", s->draft);
        if (c->next != SAME)
            s->phase = c->next;
        reply(s, c->reply, s->port);
    }
}

/* Takes a line of the message.  The draft keeps it as it will be sent again: as it has come,
 * with its first dot doubled (RFC 5321 4.5.2). */
static void take_message(struct session *s, size_t size)
{
    fwrite(s->in, 1, size, s->draft);
    if (strcspn(s->in, "\r\n") != size - 2)
        s->spoiled = true;          /* strcspn() met a CR, LF or NUL before the line's end */
    if (size != 3 || s->in[0] != '.')
        return;
    s->phase = READY;               /* this line is the dot: the message is complete */
    if (s->spoiled)
        reply(s, "550 5.5.2 Error: bare CR, bare LF or NUL in the message\r\n");
    else if (!draft_print(s))
        reply(s, "451 4.3.0 Error: message not stored, try again later\r\n");
    else
        reply(s, "250 2.0.0 Ok: printed\r\n");
    draft_drop(s);
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

    while (s->phase != GONE && (size = next_line(s->in, s->size)) > 0) {
        if (s->phase == DATA) {
            take_message(s, size);
        } else {
            s->in[strcspn(s->in, "\r\n")] = '\0';
            take_command(s, s->in);
        }
        s->size -= size;
        memmove(s->in, s->in + size, s->size);
    }
    if (s->phase != GONE && s->size == LINE_SIZE) {
        reply(s, "500 5.5.2 Error: line too long\r\n");
        s->phase = GONE;
    }
}

/* Reads what has come from a client: it may be any part of a line. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n <= 0)
        s->phase = GONE;    /* the client has closed its side, or is lost */
    else
        s->size += (size_t)n;
    converse(s);
}

/* Accepts a client.  This may fail although the listener was readable: the client may have left,
 * or no descriptor is free.  Then the listener waits until run() has closed a session. */
static void welcome(void)
{
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    int fd = accept(listener, (struct sockaddr *)&peer, &size);

    if (fd < 0) {
        if (errno == EMFILE && clients > 0)
            FD_CLR(listener, &watched);
        return;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    FD_SET(fd, &watched);
    if (++clients == CLIENTS)
        FD_CLR(listener, &watched);     /* the others wait in the kernel's queue */
    sessions[fd] = (struct session){ .fd = fd, .port = ntohs(peer.sin_port) };
    reply(&sessions[fd], "220 localhost ESMTP\r\n");
}

static void run(void)
{
    for (;;) {
        fd_set readable = watched;      /* a copy, because select() changes it */

        if (select(FD_SETSIZE, &readable, NULL, NULL, NULL) < 0)
            continue;       /* a signal has interrupted it: the set says nothing */
        for (int fd = 0; fd < FD_SETSIZE; fd++) {
            if (!FD_ISSET(fd, &readable))
                continue;
            if (fd == listener)
                welcome();
            else
                hear(&sessions[fd]);
            if (sessions[fd].phase == GONE) {
                draft_drop(&sessions[fd]);
                close(fd);
                FD_CLR(fd, &watched);
                FD_SET(listener, &watched);
                clients--;
            }
        }
    }
}

static void listen_on(const char *port)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };
    int on = 1;

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);     /* 127.0.0.1: this machine only */
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);     /* or a restart has to wait */
    if (bind(listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener, SOMAXCONN) != 0)
        die("cannot listen");
    fcntl(listener, F_SETFL, O_NONBLOCK);
    FD_SET(listener, &watched);
    fprintf(stderr, "listening on 127.0.0.1 port %s\n", port);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s port\n", argv[0]);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);       /* write() fails with EPIPE instead */
    listen_on(argv[1]);
    run();
}
