/*
 * session.c - the target for the line reader and the command parser: the input
 * is all that a client sends, from its first command to its hanging up.
 *
 * It is said twice.  First up to each octet that might end a line or a message:
 * so it is known after each line what has been answered, and that is compared with
 * what a message is by other means: where it ends, whether it may be taken, and
 * what of it is stored.  Then all at once, or in random pieces to a server whose
 * answers are taken in random pieces, too: which has to come to the same.
 *
 * The session is real from serve_session() and start_transactions() on.  The client,
 * the draft's file and the reply pipe of the child that stores are memory, and fork()
 * only says that it did.
 */
#include "fuzz.h"
#include "readback.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CLIENT = 100, PIPE, CHILDS_END, DRAFT, DRAFT_LIMIT = 1 << 20, NOON = 1767268800 };  /* 2026-01-01T12:00:00Z */

enum manner { LINES, WHOLE, PIECES };

/* What goes wrong in a run, the same in both. */
static struct {
    unsigned child_fails, store_fails, open_fails;  /* for the message of this number */
    size_t disk;            /* octets that fit into a draft */
    bool proxied;           /* the client comes through a proxy */
    bool verbose;           /* with -v, in one of them */
    bool silent;            /* at its end the client does not hang up, but falls silent */
} plan;

struct text {
    char *bytes;            /* with a NUL behind them */
    size_t size, room;
};

/* One run. */
static struct world {
    const char *stream;
    size_t size, heard;     /* of it, by the server */
    enum manner manner;
    struct text told;       /* to the client */
    struct text stored;     /* all messages that were handed over */
    struct text draft;
    unsigned drafts;        /* that were begun */
    int64_t now;
    bool client_open, pipe_open, draft_open;
} world;

UNGUIDED static void text_add(struct text *text, const void *bytes, size_t size)
{
    if (text->size + size >= text->room) {
        text->room = 2 * (text->size + size) + 256;
        text->bytes = realloc(text->bytes, text->room);
        assert(text->bytes != NULL);
    }
    memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
    text->bytes[text->size] = '\0';
}

static void text_drop(struct text *text)
{
    static const struct text empty;

    free(text->bytes);
    *text = empty;
}

/* ==== The system ========================================================= */

/* What the child says: it has stored the message, it could not, or it has died. */
static ssize_t answer_read(char *bytes, size_t size)
{
    static const char *const replies[] = { "250 2.0.0 Ok: queued as x\n", "452 4.3.1 Error: no\n", "" };
    const char *reply = replies[world.drafts == plan.store_fails ? 1 + world.drafts % 2 : 0];

    assert(world.pipe_open && size > 64);
    if (world.manner == PIECES && chance(4) == 0) {
        errno = EINTR;
        return -1;
    }
    memcpy(bytes, reply, strlen(reply));
    return (ssize_t)strlen(reply);
}

UNGUIDED static ssize_t world_read(int fd, void *bytes, size_t size)
{
    if (fd == PIPE)
        return answer_read(bytes, size);
    assert(fd == CLIENT && world.client_open && size > 0);
    if (world.manner == PIECES && chance(8) == 0) {
        errno = EAGAIN;
        return -1;
    }
    if (size > world.size - world.heard)
        size = world.size - world.heard;
    for (size_t i = 0; i < size && world.manner == LINES; i++)
        if (memchr("\r\n.", world.stream[world.heard + i], 3) != NULL)
            size = i + 1;
    if (world.manner == PIECES && size > 1)
        size = 1 + chance(size > 4 && chance(2) > 0 ? 4 : size);
    if (size > 0)
        memcpy(bytes, world.stream + world.heard, size);
    world.heard += size;
    return (ssize_t)size;
}

/* A line of the log, which nobody outside may forge or colour. */
UNGUIDED static void check_log(const char *line, size_t size)
{
    assert(size > 1 && size <= 2048 && line[size - 1] == '\n' && is_printable(line, size - 1));
}

UNGUIDED static ssize_t world_write(int fd, const void *bytes, size_t size)
{
    if (fd == STDERR_FILENO) {
        check_log(bytes, size);
        return (ssize_t)size;
    }
    assert(fd == CLIENT && world.client_open && size > 0);
    if (world.manner == PIECES && chance(4) == 0) {
        errno = chance(2) > 0 ? EAGAIN : EINTR;
        return -1;
    }
    if (world.manner == PIECES)
        size = 1 + chance(size);
    text_add(&world.told, bytes, size);
    return (ssize_t)size;
}

static int world_close(int fd)
{
    bool *open = fd == CLIENT ? &world.client_open : fd == PIPE ? &world.pipe_open : NULL;

    if (fd == CHILDS_END)
        return 0;
    assert(open != NULL && *open);
    *open = false;
    return 0;
}

static int world_pipe(int ends[2])
{
    assert(!world.pipe_open);
    if (world.drafts == plan.child_fails && world.drafts % 2 == 0) {
        errno = EMFILE;
        return -1;
    }
    world.pipe_open = true;
    ends[0] = PIPE;
    ends[1] = CHILDS_END;
    return 0;
}

/* The parent's side of a fork. */
static pid_t world_fork(void)
{
    assert(world.draft_open);
    if (world.drafts == plan.child_fails) {
        errno = EAGAIN;
        return -1;
    }
    text_add(&world.stored, world.draft.bytes, world.draft.size);
    return 1;
}

static int world_shutdown(int fd, int how)
{
    assert(fd == CLIENT && how == SHUT_WR);
    return 0;
}

static int world_fcntl(int fd, int command, int value)
{
    assert(fd == CLIENT && command == F_SETFL && value == O_NONBLOCK);
    return 0;
}

static int64_t world_clock_ms(void)
{
    return world.now;
}

static time_t world_clock(void)
{
    return NOON;
}

/* A draft in memory, after the promises in smtp.h. */
static bool world_draft_open(struct draft *d, unsigned port)
{
    assert(!world.draft_open);
    (void)port;
    d->fd = -1;
    d->error = 0;
    snprintf(d->id, sizeof d->id, "%u", ++world.drafts);
    if (world.drafts == plan.open_fails) {
        d->error = ENOSPC;
        return false;
    }
    d->fd = DRAFT;
    world.draft_open = true;
    text_drop(&world.draft);
    return true;
}

static void world_draft_add(struct draft *d, const char *bytes, size_t size)
{
    assert(d->fd == DRAFT && world.draft_open);
    if (d->error != 0 || size == 0)
        return;
    if (world.draft.size + size > plan.disk)
        d->error = ENOSPC;
    else
        text_add(&world.draft, bytes, size);
}

static void world_draft_forget(struct draft *d)
{
    if (d->fd >= 0) {
        assert(d->fd == DRAFT && world.draft_open);
        world.draft_open = false;
    }
    d->fd = -1;
}

#define read(fd, bytes, size) world_read(fd, bytes, size)
#define write(fd, bytes, size) world_write(fd, bytes, size)
#define close(fd) world_close(fd)
#define pipe(ends) world_pipe(ends)
#define fork() world_fork()
#define shutdown(fd, how) world_shutdown(fd, how)
#define fcntl(fd, command, value) world_fcntl(fd, command, value)
#define clock_ms() world_clock_ms()
#define wall_clock() world_clock()
#define draft_open(d, port) world_draft_open(d, port)
#define draft_add(d, bytes, size) world_draft_add(d, bytes, size)
#define draft_drop(d) world_draft_forget(d)
#define draft_forget(d) world_draft_forget(d)
#define main smtp_main

#include "../../smtp.c"

static struct network loopback = { .bits = 8 };

/* ==== What a message is ================================================== */

/* Where the message that begins at `text` ends: behind the first line that is a
 * lone dot.  SIZE_MAX: it does not end. */
UNGUIDED static size_t message_end(const char *text, size_t size, bool lf)
{
    size_t at = 0, end;

    for (; at < size; at = end) {
        const char *line = text + at, *last = memchr(line, '\n', size - at);

        if (last == NULL)
            return SIZE_MAX;
        end = (size_t)(last + 1 - text);
        if (end - at == 3 && memcmp(line, ".\r\n", 3) == 0 && (lf || at == 0 || (at > 1 && line[-2] == '\r')))
            return end;
        if (lf && end - at == 2 && memcmp(line, ".\n", 2) == 0)
            return end;
    }
    return SIZE_MAX;
}

/* The message as it has to be stored, its final dot included; nothing where it
 * must be refused. */
UNGUIDED static struct text message_stored(const char *text, size_t size, bool lf)
{
    struct text stored = { NULL, 0, 0 };
    unsigned long long octets = 0;
    unsigned received = 0;
    bool header = true, refused = false;
    size_t length;

    for (const char *line = text; line < text + size; line += length + 1) {
        size_t used, dot = 0;

        length = (size_t)((const char *)memchr(line, '\n', (size_t)(text + size - line)) - line);
        used = length - (length > 0 && line[length - 1] == '\r');
        refused = refused || (!lf && used == length) || memchr(line, '\r', used) != NULL;
        header = header && used > 0;
        if (header && used >= 9 && strncasecmp(line, "Received:", 9) == 0)
            refused = refused || ++received >= 100;
        if (line + length + 1 < text + size) {      /* all but the final dot counts */
            dot = used > 0 && line[0] == '.';
            octets += used - dot + 2;
            if (used > 1 && line[1] == '.')
                dot = 0;                            /* it hides another, and has to go on doing so */
        }
        text_add(&stored, line + dot, used - dot);
        text_add(&stored, "\r\n", 2);
    }
    if (refused || (settings.max_size > 0 && octets > settings.max_size))
        text_drop(&stored);
    return stored;
}

/* ==== What is true of every step ========================================= */

static void check_session(const struct session *s)
{
    assert(s->in.size <= INPUT_SIZE && s->out.size <= OUTPUT_LIMIT + 2048);
    if (s->out.size == 0 && s->phase < COMPLETE)     /* no more than what is not whole waits */
        assert(s->in.size <= (s->phase == PROXIED ? 16 + PROXY_LIMIT : COMMAND_LIMIT));
    if (s->phase < CLOSING && !s->stranger)                         /* whoever a proxy speaks for, no stranger gets in */
        assert(in_network(&s->peer, &loopback));
    assert((s->tx != NULL) == (s->phase >= MAILED && s->phase <= STORING) || s->phase == GONE);
    assert((s->phase == STORING) == world.pipe_open && (s->pipe == PIPE) == world.pipe_open);
    assert(s->helo != NULL || s->phase <= CONNECTED || s->phase >= CLOSING);
    assert(s->helo == NULL || is_printable(s->helo, strlen(s->helo)));
}

static bool skip_text(const char **p, const char *text)
{
    bool there = strncmp(*p, text, strlen(text)) == 0;

    if (there)
        *p += strlen(text);
    return there;
}

/* The draft of a message that is handed over: the envelope, our trace, and the
 * message as the client sent it. */
UNGUIDED static void check_draft(const struct session *s, const struct text *expected)
{
    static const char trace[] = "\r\nDATA\r\nReceived: from ";
    const char *p = world.draft.bytes, *end = p + world.draft.size;
    char port[32];
    size_t word;

    assert(world.draft.size > expected->size);
    assert(memcmp(end - expected->size, expected->bytes, expected->size) == 0);
    p = find_text(p, world.draft.size, trace, sizeof trace - 1);
    assert(p != NULL);
    p += sizeof trace - 1;
    word = strspn(p, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_:[]?");
    assert(word > 0 && word <= 255);
    p += word;
    snprintf(port, sizeof port, "]:%u)\r\n\tby ", s->port);
    assert(skip_text(&p, " (["));
    p += strcspn(p, "]");
    assert(skip_text(&p, port) && skip_text(&p, "relay.example.org with "));
    assert(skip_text(&p, s->extended ? "ESMTP id " : "SMTP id "));
    p += strcspn(p, ";");
    assert(skip_text(&p, ";\r\n\tThu, 01 Jan 2026 12:00:00 +0000\r\n"));
    assert(p == end - expected->size);              /* and nothing between */
    read_back(world.draft.bytes, world.draft.size);
}

/* The message that began at `begin` has ended: it is taken exactly if it may be. */
static void check_end(const struct session *s, size_t begin)
{
    struct text expected = message_stored(world.stream + begin, world.heard - begin, s->lf);

    if (s->phase == COMPLETE) {
        assert(expected.size > 0);
        check_draft(s, &expected);
    } else {
        assert(expected.size == 0 || plan.disk < DRAFT_LIMIT);
    }
    text_drop(&expected);
}

/* Where the header of a proxy ends that the stream begins with; 0 where it is
 * none, SIZE_MAX where its end has not come. */
UNGUIDED static size_t header_end(const char *stream, size_t size)
{
    size_t length;

    if (memcmp(stream, "\r\n\r\n\0\r\nQUIT\n", size < 12 ? size : 12) != 0)
        return 0;
    if (size < 16)
        return SIZE_MAX;
    length = 16 + (size_t)(unsigned char)stream[14] * 256 + (unsigned char)stream[15];
    return length > 16 + 4096 ? 0 : length <= size ? length : SIZE_MAX;
}

/* A proxy is not answered before it has said in whose name it comes. */
static void check_proxied(const struct session *s, bool answered)
{
    size_t end = world.heard > 0 ? header_end(world.stream, world.heard) : SIZE_MAX;

    assert((s->phase == PROXIED) == (end == SIZE_MAX) || world.heard == world.size);
    assert(!answered || (end > 0 && end <= world.heard) || (plan.silent && world.heard == world.size));
}

/* One step of the server: it forks, and does what it has waited for. */
static void step(struct session *s)
{
    struct events e = { .top = -1, .until = INT64_MAX };
    bool storing;

    do                      /* where no child can be had, the loop rests and then goes on with what was sent behind */
        start_transactions();
    while (s->phase == COMPLETE);
    storing = s->phase == STORING;
    FD_ZERO(&e.readable);
    FD_ZERO(&e.writable);
    fill_session(&e, s);
    assert(e.top == (storing ? PIPE : CLIENT) && (e.until > world.now) && storing == (e.until == INT64_MAX));
    if (plan.silent && world.heard == world.size && !storing && FD_ISSET(CLIENT, &e.readable)) {
        world.now = e.until;
        FD_CLR(CLIENT, &e.readable);
    }
    serve_session(s, &e);
    check_session(s);
}

/* ==== Runs =============================================================== */

/* Replies are lines of printable characters behind a code, short enough. */
UNGUIDED static void check_replies(const struct text *told)
{
    size_t length;

    assert(is_crlf_lines(told->bytes, told->size));
    for (const char *line = told->bytes; *line != '\0'; line += length) {
        length = strcspn(line, "\n") + 1;
        assert(length <= 512 && length > 5 && is_printable(line, length - 2));      /* RFC 5321 4.5.3.1.5 */
        assert(strspn(line, "0123456789") == 3 && line[0] >= '2' && line[0] <= '5');
        assert(line[3] == ' ' || line[3] == '-');
    }
}

static struct session *begin_run(const char *stream, size_t size, enum manner manner)
{
    static const struct world fresh;
    union address peer;

    address_parse("::ffff:127.0.0.1", 54321, &peer);
    world = fresh;
    world.stream = stream;
    world.size = size;
    world.manner = manner;
    world.client_open = true;
    text_add(&world.told, "", 0);
    text_add(&world.stored, "", 0);
    child_count = 0;
    rest_until = 0;
    settings.verbose = manner == LINES && plan.verbose;
    welcome(CLIENT, peer);
    assert(session_count == 1);
    return sessions[0];
}

/* All is over: nothing is left open. */
static void end_run(void)
{
    reap_sessions();
    assert(session_count == 0 && !world.client_open && !world.pipe_open && !world.draft_open);
    text_drop(&world.draft);
    check_replies(&world.told);
}

/* Line by line, and a line in pieces.  Outside a message only a line's end is
 * answered, and within one nothing is, up to its real end. */
static void run_lines(struct session *s)
{
    size_t begin = 0, end = 0;

    while (s->phase != GONE) {
        enum phase before = s->phase;
        size_t heard = world.heard, told = world.told.size;
        bool answered;

        step(s);
        answered = world.told.size > told;
        if (before == PROXIED)
            check_proxied(s, answered);
        else if (before < DATA && world.heard > heard && world.stream[world.heard - 1] != '\n')
            assert(!answered && s->phase == before);
        if (before < DATA && s->phase == DATA) {
            assert(memcmp(world.told.bytes + told, "354 ", 4) == 0);
            begin = world.heard;
            end = message_end(world.stream + begin, world.size - begin, s->lf);
        }
        if (before == DATA && world.heard > heard && world.heard - begin < end) {
            assert(!answered && s->phase == DATA);
        } else if (before == DATA && world.heard > heard) {
            assert(world.heard - begin == end && s->phase != DATA && answered == (s->phase != COMPLETE));
            check_end(s, begin);
        }
        if (before == CLOSING)
            assert(!answered && s->phase >= CLOSING);
    }
}

static void run_through(struct session *s)
{
    while (s->phase != GONE)
        step(s);
}

/* What the client was told, with the same word for every reason to refuse a
 * message: a message with two faults may be refused for either. */
UNGUIDED static struct text without_reasons(const struct text *told)
{
    struct text plain = { NULL, 0, 0 };
    bool final = false;
    size_t length;

    text_add(&plain, "", 0);
    for (const char *line = told->bytes; *line != '\0'; line += length) {
        length = strcspn(line, "\n") + 1;
        if (final && line[0] != '2')
            text_add(&plain, "refused\r\n", 9);
        else
            text_add(&plain, line, length);
        final = memcmp(line, "354 ", 4) == 0;
    }
    return plain;
}

UNGUIDED static void compare(const struct world *a, const struct world *b)
{
    struct text x = without_reasons(&a->told), y = without_reasons(&b->told);

    assert(x.size == y.size && memcmp(x.bytes, y.bytes, x.size) == 0);
    assert(a->drafts == b->drafts && a->stored.size == b->stored.size);
    assert(memcmp(a->stored.bytes, b->stored.bytes, a->stored.size) == 0);
    text_drop(&x);
    text_drop(&y);
}

static void make_plan(const uint8_t *data, size_t size)
{
    /* Hardly anything but a proxy's header begins with two empty lines. */
    plan.proxied = size >= 4 && memcmp(data, "\r\n\r\n", 4) == 0 ? chance(8) > 0 : chance(32) == 0;
    plan.child_fails = chance(8) == 0 ? 1 + (unsigned)chance(3) : 0;
    plan.store_fails = chance(8) == 0 ? 1 + (unsigned)chance(3) : 0;
    plan.open_fails = chance(8) == 0 ? 1 + (unsigned)chance(3) : 0;
    plan.disk = chance(8) == 0 ? chance(1000) : DRAFT_LIMIT;
    plan.verbose = chance(4) == 0;
    plan.silent = chance(4) == 0;
}

static void make_settings(void)
{
    static const char *domains[] = { "example.net", "[192.0.2.1]" };

    address_parse("127.0.0.0", 0, &loopback.base);
    settings.allowed.list = settings.proxies.list = &loopback;
    settings.allowed.count = 1;
    settings.proxies.count = plan.proxied;
    settings.per_address = 2;
    settings.hostname = "relay.example.org";
    settings.postmaster = "\"post>master\"@example.org";
    settings.domains = domains;
    settings.domain_count = chance(8) == 0 ? 2 : 0;
    settings.max_size = chance(2) == 0 ? 0 : 100 + chance(1000);
    settings.forwarders = (long)chance(3);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *stream = (const char *)data;
    struct world lines;

    chance_seed(data, size);
    make_plan(data, size);
    make_settings();
    run_lines(begin_run(stream, size, LINES));
    end_run();
    lines = world;
    run_through(begin_run(stream, size, chance(3) == 0 ? WHOLE : PIECES));
    end_run();
    /* On a full disk the kind of a refusal may depend on the cuts, and with it
     * how many errors there are before the session ends. */
    if (plan.disk == DRAFT_LIMIT)
        compare(&lines, &world);
    text_drop(&world.told);
    text_drop(&world.stored);
    text_drop(&lines.told);
    text_drop(&lines.stored);
    return 0;
}
