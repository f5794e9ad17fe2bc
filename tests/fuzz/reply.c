/*
 * reply.c - the target for the exchanger-reply reader: the input is all that an
 * exchanger says.
 *
 * First it is read reply by reply, whole and in pieces.  Then a whole dialogue
 * is led with it, from EHLO to QUIT, to see what it can talk us into: in plain, or
 * where it offers that by TLS, with a password or without.
 */
#include "memory.h"

static const char message_text[] =
    "EHLO me.com\r\n"
    "MAIL FROM:<nour@example.org>\r\n"
    "RCPT TO:<a@example.net>\r\n"
    "RCPT TO:<b@example.net>\r\n"
    "RCPT TO:<c@example.net>\r\n"
    "DATA\r\n"
    "Received: from me.com ([127.0.0.1]:54321) by relay.example.org\r\n"
    "\r\n"
    "..a dot\r\n"
    ".\r\n";

/* How an exchanger is heard: all at once, octet by octet, in random pieces, or
 * line by line, as it would come from one that waits for what it answers. */
enum manner { WHOLE, OCTETS, PIECES, LINES };

static struct {
    const char *says;
    size_t size, said;
    enum manner manner;
    struct exchange *x;     /* it, as forward.c knows it */
    const struct message *message;      /* what it is to be told, in a dialogue */
    char told[8192];        /* what it was told */
    size_t told_size, body, behind;     /* where in that the last content begins, and what comes after it */
    bool whole;             /* it was told the whole message, once or more */
    bool part;              /* it took only a part of what it was told: the rest comes next */
    bool content;           /* what it was told last is of the message */
    bool gone;              /* it has hung up, and takes nothing more */
    bool closed;
} exchanger;

UNGUIDED static ssize_t exchanger_read(void *bytes, size_t size)
{
    const char *next = exchanger.says + exchanger.said, *lf;

    assert(!exchanger.closed && size > 0);
    if (size > exchanger.size - exchanger.said)
        size = exchanger.size - exchanger.said;
    if (exchanger.manner == OCTETS && size > 1)
        size = 1;
    if (exchanger.manner == PIECES && size > 1)
        size = 1 + chance(size > 4 && chance(2) > 0 ? 4 : size);
    if (exchanger.manner == LINES && size > 0 && (lf = memchr(next, '\n', size)) != NULL)
        size = (size_t)(lf + 1 - next);
    if (size > 0)
        memcpy(bytes, next, size);
    exchanger.said += size;
    return (ssize_t)size;
}

/* The content that it was told last goes out as it stands in the file, or is not sent
 * to its end, or is the empty one for no recipient. */
static void check_content(void)
{
    const struct message *m = exchanger.message;
    size_t body = (size_t)(m->end + 3 - m->body), sent = exchanger.behind - exchanger.body;

    if (memcmp(exchanger.told + exchanger.body, ".\r\n", sent < 3 ? sent : 3) != 0)
        assert(sent <= body && memcmp(exchanger.told + exchanger.body, message_text + m->body, sent) == 0);
    exchanger.whole = exchanger.whole || sent == body;
}

/* No recipient is asked for that has a final outcome: it would get the message twice. */
static void check_command(const char *bytes, size_t size)
{
    for (size_t i = 0; exchanger.message != NULL && i < exchanger.message->count; i++) {
        const struct recipient *r = &exchanger.message->recipients[i];

        assert(r->outcome == LATER || find_text(bytes, size, r->address, strlen(r->address)) == NULL);
    }
}

/* What is said to it is a command, or a part of the message, which it gets only
 * when it has said 354. */
UNGUIDED static ssize_t exchanger_write(const void *bytes, size_t size)
{
    static const char *const verbs[] = { "EHLO ", "HELO ", "MAIL ", "RCPT ", "DATA\r", "RSET\r", "QUIT\r",
        "START", "AUTH ", "dXNlc", "c2Vjc" };     /* the last two are "user" and "secret" */
    bool command = false;

    assert(!exchanger.closed && size > 0);
    exchanger.gone = exchanger.gone || (exchanger.manner == PIECES && chance(32) == 0);
    if (exchanger.gone || (exchanger.manner == PIECES && chance(4) == 0)) {
        errno = exchanger.gone ? EPIPE : chance(2) == 0 ? EINTR : EAGAIN;
        return -1;
    }
    for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; i++)
        command = command || (size >= 5 && memcmp(bytes, verbs[i], 5) == 0);
    if (!exchanger.part)
        exchanger.content = !command;
    if (!exchanger.part && !command) {
        assert(exchanger.x->code / 100 == 3);
        check_content();
        exchanger.body = exchanger.told_size;
    }
    if (!exchanger.content)
        check_command(bytes, size);
    exchanger.part = exchanger.manner == PIECES && size > 1 && chance(4) == 0;
    if (exchanger.part)
        size = 1 + chance(size - 1);
    assert(exchanger.told_size + size <= sizeof exchanger.told);
    memcpy(exchanger.told + exchanger.told_size, bytes, size);
    exchanger.told_size += size;
    if (exchanger.content)
        exchanger.behind = exchanger.told_size;
    return (ssize_t)size;
}

static void exchanger_close(void)
{
    assert(!exchanger.closed);
    exchanger.closed = true;
}

static void exchanger_set(struct exchange *x, const char *says, size_t size, enum manner manner)
{
    static const struct exchange fresh;

    memset(&exchanger, 0, sizeof exchanger);
    exchanger.says = says;
    exchanger.size = size;
    exchanger.manner = manner;
    exchanger.x = x;
    exchanger_says = exchanger_read;
    exchanger_hears = exchanger_write;
    exchanger_is_left = exchanger_close;
    *x = fresh;
    strcpy(x->label, "mx.example.net[192.0.2.1]");
    x->fd = EXCHANGER_FD;
    x->progress = GREETED;
    strcpy(x->id, MESSAGE_ID);
}

/* A reply that was read: one printable line, and its code is what it begins with. */
UNGUIDED static void check_reply(const struct exchange *x, int code)
{
    size_t length = strlen(x->words);

    assert(x->size <= sizeof x->in && length < sizeof x->words && is_printable(x->words, length));
    assert(code == x->code && (code == 0 || (code >= 200 && code < 600)));
    assert(code == 0 || atoi(x->words) == code);
    assert(x->lines == 0 && length >= 3);
}

/* What was made of all replies in turn: a hash of it, and in `count` of how many. */
static uint64_t read_replies(const char *says, size_t size, enum manner manner, size_t *count)
{
    static struct exchange x;
    uint64_t hash = UINT64_C(14695981039346656037);
    int code;

    exchanger_set(&x, says, size, manner);
    *count = 0;
    do {
        char line[REPLY_SIZE + 64];
        int length;

        x.in_ehlo = true;
        code = read_reply(&x, HELLO);
        check_reply(&x, code);
        length = snprintf(line, sizeof line, "%d%d%d %llu %s", x.pipelining, x.eight_bit, x.sized, x.max_size, x.words);
        for (int i = 0; i < length; i++)
            hash = (hash ^ (unsigned char)line[i]) * UINT64_C(1099511628211);
        forget_extensions(&x);
        ++*count;
    } while (code != 0);
    return hash;
}

/* Cut up in any way it reads the same. */
static void check_pieces(const char *says, size_t size)
{
    static const enum manner manners[] = { OCTETS, PIECES, LINES };
    size_t whole_count, count;
    uint64_t whole = read_replies(says, size, WHOLE, &whole_count);

    for (size_t i = 0; i < sizeof manners / sizeof manners[0]; i++) {
        uint64_t hash = read_replies(says, size, manners[i], &count);

        assert(hash == whole && count == whole_count);
    }
}

/* Nobody counts as having a message that was not sent to its end. */
static void check_message_sent(const struct message *m)
{
    bool any_sent = false;

    check_content();
    for (size_t i = 0; i < m->count; i++)
        any_sent = any_sent || m->recipients[i].outcome == SENT;
    assert(!any_sent || exchanger.whole);
}

/* Whatever happened, everybody has an outcome that says why, or is still owed. */
UNGUIDED static void check_outcomes(const struct message *m)
{
    size_t label = strlen(exchanger.x->label);

    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];

        assert(r->outcome == LATER || r->said != NULL);
        if (r->said == NULL)
            continue;
        assert(is_printable(r->said, strlen(r->said)) && strlen(r->said) < 1000);
        assert(strncmp(r->said, exchanger.x->label, label) == 0 && r->said[label] == ' ');
        assert(r->outcome == LATER || r->said[label + 1] == (r->outcome == SENT ? '2' : '5'));
    }
}

/* What was recorded at once is what is settled. */
static void check_record(const struct message *m)
{
    struct message again;
    bool readable;

    assert(m->gone == file.removed);
    if (m->gone)
        return;
    readable = message_read(&again, FILE_FD, MESSAGE_ID);
    assert(readable && is_tame(&again) && again.count == m->count);
    for (size_t i = 0; i < m->count; i++)
        assert((again.recipients[i].outcome == SENT) == (m->recipients[i].outcome == SENT));
    again.fd = -1;
    message_free(&again);
}

static void check_dialogue(const char *says, size_t size, enum manner manner)
{
    static struct exchange x;
    struct message m;
    struct batch alone = { .more = false };
    struct recipient *to[3];
    bool readable;

    file_set(message_text, sizeof message_text - 1);
    readable = message_read(&m, FILE_FD, MESSAGE_ID);
    assert(readable && m.count == 3);
    for (size_t i = 0; i < m.count; i++)
        to[i] = &m.recipients[i];
    survey(&m);
    exchanger_set(&x, says, size, manner);
    exchanger.message = &m;
    talk(&alone, &x, &m, to, m.count);
    assert(exchanger.closed && !encrypted && (x.progress == SPENT || (x.progress == UNTRIED && x.bare)));
    assert(!x.bare || settings.tls == TLS_MAY);
    assert(exchanger.part || is_crlf_lines(exchanger.told, exchanger.told_size));
    check_message_sent(&m);
    check_outcomes(&m);
    check_record(&m);
    message_free(&m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *says = (const char *)data;

    settings.hostname = "relay.example.org";
    try_end = INT64_MAX;
    chance_seed(data, size);
    settings.verbose = chance(4) == 0;
    settings.tls = (enum tls)chance(TLS_VERIFIED + 1);
    strcpy(settings.user, settings.tls == TLS_VERIFIED && chance(2) == 0 ? "user" : "");
    strcpy(settings.password, "secret");
    openssl_says = chance(2) == 0 ? "" : "depth=0 CN = \033[31m\n1F:error:0A000086:SSL routines::failed:x.c:1:\n";
    check_pieces(says, size);
    check_dialogue(says, size, LINES);
    check_dialogue(says, size, PIECES);
    return 0;
}
