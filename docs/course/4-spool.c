/*
 * 4-spool.c - what was answered with 250 survives kill -9, and a power cut.
 *
 *     cc -o 4-spool 4-spool.c && ./4-spool 2525 spool
 *
 * listens on 127.0.0.1 port 2525 and keeps messages in the directory spool.
 *
 * New since program 3: The spool, which takes the place of the draft in memory.  To be
 * read from the end.
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    LINE_SIZE = 2048,       /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
    NAME_SIZE = 256,        /* a domain name or a path, with its NUL: RFC 5321 4.5.3.1 */
    RECIPIENT_LIMIT = 100,  /* recipients of a message: RFC 5321 4.5.3.1.8 */
    RESERVE = 16            /* descriptors that are no client's */
};

static char hostname[NAME_SIZE];

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

/* ---- The spool ------------------------------------------------------------- */

struct draft {
    int fd;         /* its file in tmp/, or -1 */
    bool failed;    /* a write has failed */
    char id[48];    /* its name in tmp/, then in queue/ */
};

static const char *spool_path(const char *directory, const char *id)
{
    static char path[64];

    snprintf(path, sizeof path, "%s/%s", directory, id);
    return path;
}

static bool draft_open(struct draft *d, unsigned port)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(d->id, sizeof d->id, "%lld.%06ld-%u", (long long)now.tv_sec, now.tv_nsec / 1000, port);
    d->failed = false;
    d->fd = open(spool_path("tmp", d->id), O_RDWR | O_CREAT | O_EXCL | O_APPEND, 0600);
    return d->fd >= 0;
}

static void draft_add(struct draft *d, const char *bytes, size_t size)
{
    if (!d->failed && write(d->fd, bytes, size) != (ssize_t)size)
        d->failed = true;           /* a write to a file is short only where the disk is full */
}

static void draft_drop(struct draft *d)
{
    if (d->fd >= 0) {
        unlink(spool_path("tmp", d->id));
        close(d->fd);
    }
    d->fd = -1;
}

static bool sync_directory(const char *name)
{
    int fd = open(name, O_RDONLY);
    bool ok = fd >= 0 && fsync(fd) == 0;

    if (fd >= 0)
        close(fd);
    return ok;
}

/* Makes a draft a message: once this has returned true, the mail is ours to lose. */
static bool draft_store(struct draft *d)
{
    char path[64];

    strcpy(path, spool_path("tmp", d->id));
    return !d->failed && fsync(d->fd) == 0 && rename(path, spool_path("queue", d->id)) == 0
        && sync_directory("queue");
}

/* ---- Sessions -------------------------------------------------------------- */

/* What is true in each phase. */
enum phase {
    CONNECTED,      /* 220 is sent; no HELO yet */
    READY,          /* HELO is given; no transaction */
    MAILED,         /* the reverse-path is in the draft */
    ADDRESSED,      /* at least one recipient is, too */
    DATA,           /* 354 is sent; lines go to the draft */
    GONE            /* the last reply is given: the loop closes it */
};

struct session {
    int fd;                 /* the client */
    enum phase phase;
    unsigned port;          /* the client's */
    char helo[NAME_SIZE];
    struct draft draft;
    unsigned recipients;
    bool spoiled;           /* the message holds a bare CR, a bare LF or a NUL */
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
        s->phase = GONE;
}

/* Back to where a transaction may begin; what was begun is removed. */
static void reset(struct session *s)
{
    draft_drop(&s->draft);
    s->recipients = 0;
    s->spoiled = false;
    if (s->phase != GONE)
        s->phase = s->helo[0] != '\0' ? READY : CONNECTED;
}

/* ---- Commands -------------------------------------------------------------- */

#define NOT_STORED "451 4.3.0 Error: message not stored, try again later"

/* Appends a line to the draft. */
static void note(struct session *s, const char *format, ...)
{
    char line[3 * NAME_SIZE];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    draft_add(&s->draft, line, strlen(line));
}

/* Is it <local-part@domain>?  A part of RFC 5321 4.1.2: no quotes, no address literals. */
static bool is_path(const char *text)
{
    static const char in_domain[] = "-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    size_t local = strcspn(text, "@ \">"), domain;

    if (text[0] != '<' || local < 2 || text[local] != '@' || strlen(text) >= NAME_SIZE)
        return false;
    domain = strspn(text + local + 1, in_domain);
    return domain > 0 && strcmp(text + local + 1 + domain, ">") == 0;
}

static void do_helo(struct session *s, const char *argument)
{
    if (argument[0] == '\0' || strlen(argument) >= NAME_SIZE || strchr(argument, ' ') != NULL) {
        reply(s, "501 Syntax: HELO hostname");
        return;
    }
    strcpy(s->helo, argument);
    reset(s);
    reply(s, "250 %u OK", s->port);
}

static void do_mail(struct session *s, const char *argument)
{
    const char *path = argument + 5;

    if (!starts(argument, "FROM:") || (strcmp(path, "<>") != 0 && !is_path(path))) {
        reply(s, "501 5.5.4 Syntax: MAIL FROM:<address>");
    } else if (!draft_open(&s->draft, s->port)) {
        reply(s, NOT_STORED);
    } else {
        note(s, "MAIL FROM:%s\r\n", path);
        s->phase = MAILED;
        reply(s, "250 2.1.0 Ok");
    }
}

static void do_rcpt(struct session *s, const char *argument)
{
    const char *path = argument + 3;

    if (!starts(argument, "TO:") || !is_path(path)) {
        reply(s, "501 5.5.4 Syntax: RCPT TO:<address>");
    } else if (s->recipients == RECIPIENT_LIMIT) {
        reply(s, "452 4.5.3 Error: send to the rest in another transaction");
    } else {
        note(s, "RCPT TO:%s\r\n", path);
        s->recipients++;
        s->phase = ADDRESSED;
        reply(s, "250 2.1.5 Ok");
    }
}

/* Begins the message with the line that every relay has to put there: RFC 5321 4.4. */
static void do_data(struct session *s, const char *argument)
{
    char date[64];
    time_t now = time(NULL);

    (void)argument;
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S +0000", gmtime(&now));
    note(s, "DATA\r\nReceived: from %s ([127.0.0.1]:%u)\r\n\tby %s with SMTP id %s;\r\n\t%s\r\n",
        s->helo, s->port, hostname, s->draft.id, date);
    s->phase = DATA;
    reply(s, "354 End data with <CR><LF>.<CR><LF>");
}

static void do_rset(struct session *s, const char *argument)
{
    (void)argument;
    reset(s);
    reply(s, "250 2.0.0 Ok");
}

static void do_quit(struct session *s, const char *argument)
{
    (void)argument;
    reset(s);
    reply(s, "221 2.0.0 OK");
    s->phase = GONE;
}

#define HELO_FIRST  "503 5.5.1 Error: send HELO/EHLO first"
#define NEED_MAIL   "503 5.5.1 Error: need MAIL command"
#define NEED_RCPT   "503 5.5.1 Error: need RCPT command"
#define NESTED_MAIL "503 5.5.1 Error: nested MAIL command"

/* The commands.  `says` is the whole answer of one that does nothing; `out_of_order` is
 * the answer in the phases in which one may not come. */
static const struct command {
    const char *verb;
    void (*handle)(struct session *, const char *argument);
    const char *says;
    const char *out_of_order[ADDRESSED + 1];    /* CONNECTED, READY, MAILED, ADDRESSED */
} commands[] = {
    { "HELO", do_helo, NULL, { NULL } },
    { "EHLO", do_helo, NULL, { NULL } },
    { "MAIL", do_mail, NULL, { HELO_FIRST, NULL, NESTED_MAIL, NESTED_MAIL } },
    { "RCPT", do_rcpt, NULL, { HELO_FIRST, NEED_MAIL, NULL, NULL } },
    { "DATA", do_data, NULL, { HELO_FIRST, NEED_MAIL, NEED_RCPT, NULL } },
    { "RSET", do_rset, NULL, { NULL } },
    { "QUIT", do_quit, NULL, { NULL } },
    { "NOOP", NULL, "250 2.0.0 Ok", { NULL } },
    { "", NULL, "500 5.5.2 Error: command not recognized", { NULL } }   /* fits all else */
};

static void dispatch(struct session *s, const char *line)
{
    const struct command *c = commands;
    size_t verb = strcspn(line, " ");
    const char *argument = line + verb + strspn(line + verb, " ");

    while (c->verb[0] != '\0' && (strlen(c->verb) != verb || strncasecmp(c->verb, line, verb) != 0))
        c++;
    if (c->out_of_order[s->phase] != NULL)
        reply(s, "%s", c->out_of_order[s->phase]);
    else if (c->handle == NULL)
        reply(s, "%s", c->says);
    else
        c->handle(s, argument);
}

static void take_command(struct session *s, size_t length)
{
    bool printable = true;

    for (size_t i = 0; i < length; i++)
        printable = printable && s->in[i] >= ' ' && s->in[i] <= '~';
    s->in[printable ? length : 0] = '\0';       /* the empty line is no command either */
    dispatch(s, s->in);
}

/* ---- The message ----------------------------------------------------------- */

/* The dot has come.  The message is stored first, and then the client is told. */
static void end_message(struct session *s)
{
    draft_add(&s->draft, ".\r\n", 3);
    if (s->spoiled) {
        reply(s, "550 5.5.2 Error: bare CR, bare LF or NUL in the message");
    } else if (!draft_store(&s->draft)) {
        reply(s, NOT_STORED);
    } else {
        reply(s, "250 2.0.0 Ok: queued as %s", s->draft.id);
        close(s->draft.fd);
        s->draft.fd = -1;
    }
    reset(s);
}

/* Takes a line of the message.  The draft keeps it as it will be sent again: with its
 * first dot doubled (RFC 5321 4.5.2), as it has come. */
static void take_message(struct session *s, struct line line)
{
    if (line.length == 1 && s->in[0] == '.') {
        end_message(s);
        return;
    }
    for (size_t i = 0; i < line.length; i++)
        if (s->in[i] == '\r' || s->in[i] == '\n' || s->in[i] == '\0')
            s->spoiled = true;      /* another server may take it for the end of a line */
    draft_add(&s->draft, s->in, line.used);
}

/* ---- The loop -------------------------------------------------------------- */

/* Answers all whole lines there are.  What is left waits for the rest of its line. */
static void converse(struct session *s)
{
    struct line line;

    while (s->phase != GONE && (line = next_line(s->in, s->size)).used > 0) {
        if (s->phase == DATA)
            take_message(s, line);
        else
            take_command(s, line.length);
        s->size -= line.used;
        memmove(s->in, s->in + line.used, s->size);
    }
    if (s->phase != GONE && s->size == LINE_SIZE) {
        reply(s, "500 5.5.2 Error: line too long");
        s->phase = GONE;
    }
}

/* Reads once from a client. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        s->phase = GONE;
        return;
    }
    s->size += (size_t)n;
    converse(s);
}

/* That the listening socket is readable promises nothing: the client may have left. */
static void welcome(void)
{
    static const struct session fresh = { .phase = CONNECTED, .draft = { .fd = -1 } };
    struct session *s = &sessions[session_count];
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    int fd = accept(listener, (struct sockaddr *)&peer, &size);

    if (fd < 0)
        return;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    *s = fresh;
    s->fd = fd;
    s->port = ntohs(peer.sin_port);
    session_count++;
    reply(s, "220 %s ESMTP", hostname);
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
        if (sessions[i].phase != GONE)
            continue;
        draft_drop(&sessions[i].draft);
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

static void enter_spool(const char *path)
{
    umask(077);
    mkdir(path, 0700);
    if (chdir(path) != 0)
        die(path);
    mkdir("tmp", 0700);
    mkdir("queue", 0700);
}

int main(int argc, char **argv)
{
    long limit = sysconf(_SC_OPEN_MAX);

    if (argc != 3) {
        fprintf(stderr, "usage: %s port spool\n", argv[0]);
        return 2;
    }
    gethostname(hostname, sizeof hostname - 1);
    session_limit = (size_t)((limit < 0 || limit > FD_SETSIZE ? FD_SETSIZE : limit) - RESERVE) / 2;
    enter_spool(argv[2]);
    signal(SIGPIPE, SIG_IGN);       /* write() says it: EPIPE */
    listen_on(argv[1]);
    run();
    return 0;
}
