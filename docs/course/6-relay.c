/*
 * 6-relay.c - a whole relay: it finds the exchangers by itself and takes the nearest.
 *
 *     cc -o 6-relay 6-relay.c && ./6-relay 2525 spool 127.0.0.1 53 25
 *
 * listens on 127.0.0.1 port 2525, keeps messages in the directory spool, asks the name
 * server at 127.0.0.1 port 53, and expects exchangers on port 25.
 *
 * New since program 5: DNS, and The race.  To be read from the end.
 */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
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
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    LINE_SIZE = 2048,       /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
    NAME_SIZE = 256,        /* a domain name with its NUL: RFC 1035 2.3.4 */
    RECIPIENT_LIMIT = 100,  /* recipients of a message: RFC 5321 4.5.3.1.8 */
    RESERVE = 16,           /* descriptors that are no client's */
    FORWARDERS = 50,        /* children at once that forward */
    TRY_SECONDS = 600,      /* that a process may try one message */
    QUEUE_SECONDS = 60,     /* between two looks through the queue */
    RACE_SECONDS = 30,      /* that an exchanger has to connect, and again to greet */
    REPLY_SECONDS = 300,    /* that it has to reply: RFC 5321 4.5.3.2 */
    DNS_TRIES = 3,
    DNS_SECONDS = 2,        /* for each of them */
    RECORDS = 20            /* taken of an answer; as many addresses are tried for a domain */
};

static char hostname[NAME_SIZE];
static struct sockaddr_in nameserver;
static in_port_t mx_port;
static int random_fd;       /* /dev/urandom: octets that cannot be guessed */

static void die(const char *what)
{
    perror(what);
    _exit(1);               /* not exit(): a child must not flush what its parent has buffered */
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
    static char path[NAME_SIZE + 16];

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

/* Keeps other processes from trying the same message.  A child does not inherit the
 * lock; it goes when the process ends, or closes any descriptor of the file. */
static bool lock_file(int fd)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

    return fcntl(fd, F_SETLK, &lock) == 0;
}

static bool sync_directory(const char *name)
{
    int fd = open(name, O_RDONLY);
    bool ok = fd >= 0 && fsync(fd) == 0;

    if (fd >= 0)
        close(fd);
    return ok;
}

static bool move(const char *id, const char *from, const char *to)
{
    char path[NAME_SIZE + 16];

    strcpy(path, spool_path(from, id));
    return rename(path, spool_path(to, id)) == 0;
}

/* Makes a draft a message: once this has returned true, the mail is ours to lose. */
static bool draft_store(struct draft *d)
{
    return !d->failed && lock_file(d->fd) && fsync(d->fd) == 0 && move(d->id, "tmp", "queue")
        && sync_directory("queue");
}

/* ---- DNS ------------------------------------------------------------------- */

enum dns_type { DNS_A = 1, DNS_MX = 15 };

enum dns_status { DNS_FOUND, DNS_NODATA, DNS_NXDOMAIN, DNS_FAILED, NOT_OURS };

struct dns_record {
    unsigned preference;        /* of an MX record: the lower, the better; ... */
    char name[NAME_SIZE];       /* ... and the exchanger's name */
    struct in_addr address;     /* of an A record */
};

struct dns_query {
    enum dns_type type;
    unsigned char bytes[12 + NAME_SIZE + 4];    /* header, name, type and class, as sent */
    size_t size;
    struct dns_record records[RECORDS];         /* the answer: `count` of them */
    size_t count;
};

/* A place in an answer.  Only get() and get_name() read octets there.  They never pass
 * the end of what was received, and set `bad` where they would have had to. */
struct cursor {
    const unsigned char *bytes;
    size_t size, at;
    bool bad;
};

/* A number of `octets` octets, the most significant first. */
static unsigned get(struct cursor *c, size_t octets)
{
    unsigned value = 0;

    c->bad = c->bad || c->at + octets > c->size;
    for (; octets > 0 && !c->bad; octets--)
        value = value << 8 | c->bytes[c->at++];
    return value;
}

/* A name, its compression undone (RFC 1035 4.1.4).  A pointer has to lead to before the
 * piece of the name that it ends, so that there is an end. */
static void get_name(struct cursor *c, char name[NAME_SIZE])
{
    size_t used = 0, start = c->at, behind = 0, length;

    while ((length = get(c, 1)) > 0) {
        if (length >= 0xC0) {
            size_t target = (length & 0x3F) << 8 | get(c, 1);

            behind = behind > 0 ? behind : c->at;
            c->bad = c->bad || target >= start;
            c->at = start = target;
        } else if (length > 63 || used + length + 2 > NAME_SIZE) {
            c->bad = true;
        } else {
            if (used > 0)
                name[used++] = '.';
            for (; length > 0; length--)
                name[used++] = (char)get(c, 1);
        }
    }
    name[used] = '\0';
    c->at = behind > 0 ? behind : c->at;
}

/* Writes a query (RFC 1035 4.1), but for its id.  False: `name` cannot be a name. */
static bool put_query(struct dns_query *q, const char *name)
{
    static const unsigned char header[12] = { 0, 0, 1, 0, 0, 1 };   /* recursion desired; one question */

    memcpy(q->bytes, header, sizeof header);
    q->size = sizeof header;
    while (*name != '\0') {
        size_t length = strcspn(name, ".");

        if (length == 0 || length > 63 || q->size + length > NAME_SIZE)
            return false;
        q->bytes[q->size++] = (unsigned char)length;
        memcpy(q->bytes + q->size, name, length);
        q->size += length;
        name += length + (name[length] == '.');
    }
    memcpy(q->bytes + q->size, (unsigned char[]){ 0, 0, (unsigned char)q->type, 0, 1 }, 5);     /* class IN */
    q->size += 5;
    return true;
}

static void take_record(struct dns_query *q, struct cursor *c)
{
    struct dns_record *r = &q->records[q->count];
    unsigned type, size;

    get_name(c, r->name);       /* behind a CNAME this is not the name that was asked for */
    type = get(c, 2);
    get(c, 6);                  /* class and time to live */
    size = get(c, 2);
    if (type != q->type) {
        c->at += size;
        return;
    }
    r->preference = type == DNS_MX ? get(c, 2) : 0;
    if (type == DNS_MX)
        get_name(c, r->name);
    else
        r->address.s_addr = htonl(get(c, 4));
    q->count++;
}

/* Anybody can send us a packet.  The answer repeats our id and our question. */
static enum dns_status read_answer(struct dns_query *q, const unsigned char *bytes, size_t size)
{
    enum { RESPONSE = 0x8000, TRUNCATED = 0x0200, RCODE = 0x000F, NXDOMAIN = 3 };
    struct cursor c = { bytes, size, 2, false };
    unsigned flags = get(&c, 2), questions = get(&c, 2), answers = get(&c, 2);

    if (size < q->size || memcmp(bytes, q->bytes, 2) != 0 || (flags & RESPONSE) == 0 || questions != 1
        || memcmp(bytes + 12, q->bytes + 12, q->size - 12) != 0)
        return NOT_OURS;
    if ((flags & (RCODE | TRUNCATED)) != 0)
        return (flags & RCODE) == NXDOMAIN ? DNS_NXDOMAIN : DNS_FAILED;
    c.at = q->size;
    for (q->count = 0; answers > 0 && q->count < RECORDS && !c.bad; answers--)
        take_record(q, &c);
    return c.bad ? DNS_FAILED : q->count > 0 ? DNS_FOUND : DNS_NODATA;
}

/* Asks over UDP.  Each try has a new id and a new port, which a forger would have to
 * guess; and a connected socket receives packets of the name server only. */
static enum dns_status dns_ask(struct dns_query *q, const char *name, enum dns_type type)
{
    enum dns_status status = NOT_OURS;
    unsigned char answer[512];
    struct timeval patience = { DNS_SECONDS, 0 };

    q->type = type;
    if (!put_query(q, name))
        return DNS_NXDOMAIN;
    for (int i = 0; i < DNS_TRIES && status == NOT_OURS; i++) {
        int fd = socket(AF_INET, SOCK_DGRAM, 0);
        ssize_t n = read(random_fd, q->bytes, 2);

        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (connect(fd, (struct sockaddr *)&nameserver, sizeof nameserver) == 0)
            send(fd, q->bytes, q->size, 0);
        while (status == NOT_OURS && (n = recv(fd, answer, sizeof answer, 0)) >= 0)
            status = read_answer(q, answer, (size_t)n);
        close(fd);
    }
    return status == NOT_OURS ? DNS_FAILED : status;
}

/* ---- Exchangers ------------------------------------------------------------ */

enum outcome { LATER, SENT, FAILED };

static const char *const outcome_names[] = { "later", "sent", "failed" };

enum progress { UNTRIED, CONNECTING, AWAITING, GREETED, SPENT };

/* An address of an exchanger, and the connection to it. */
struct exchange {
    long preference;
    struct sockaddr_in address;
    enum progress progress;     /* AWAITING: connected, and its greeting is awaited */
    int fd;
    char in[LINE_SIZE];         /* received, not yet read */
    size_t size;
};

struct route {
    struct exchange x[RECORDS];
    size_t count;
};

static char words[LINE_SIZE];   /* the last reply of an exchanger, or what went wrong instead */

static void add_exchanger(struct route *route, const char *name, long preference)
{
    struct dns_query q = { .count = 0 };

    dns_ask(&q, name, DNS_A);
    for (size_t i = 0; i < q.count && route->count < RECORDS; i++) {
        struct exchange *x = &route->x[route->count++];

        *x = (struct exchange){ .preference = preference, .fd = -1 };
        x->address.sin_family = AF_INET;
        x->address.sin_port = mx_port;
        x->address.sin_addr = q.records[i].address;
    }
}

/* Finds out where mail for a domain goes (RFC 5321 5.1).  SENT: there is a way. */
static enum outcome find_route(struct route *route, const char *domain)
{
    struct dns_query q = { .count = 0 };
    enum dns_status status = dns_ask(&q, domain, DNS_MX);

    route->count = 0;
    if (status == DNS_NODATA)       /* without MX records the domain is a host itself */
        add_exchanger(route, domain, 0);
    for (size_t i = 0; i < q.count; i++)
        add_exchanger(route, q.records[i].name, q.records[i].preference);
    strcpy(words, status == DNS_NXDOMAIN ? "there is no such domain" : "no exchanger has an address");
    return route->count > 0 ? SENT : status == DNS_NXDOMAIN ? FAILED : LATER;
}

/* ---- The dialogue, as a client --------------------------------------------- */

/* Reads a reply (RFC 5321 4.2.1): lines `250-words`, and the last one `250 words`, which
 * is left in `words`.  Returns its code, or 0 where the connection is lost. */
static int read_reply(struct exchange *x)
{
    for (;;) {
        struct line line = next_line(x->in, x->size);
        ssize_t n;

        if (line.used > 0) {
            snprintf(words, sizeof words, "%.*s", (int)line.length, x->in);
            x->size -= line.used;
            memmove(x->in, x->in + line.used, x->size);
            if (line.length < 4 || words[3] != '-')
                return atoi(words);
            continue;
        }
        n = read(x->fd, x->in + x->size, sizeof x->in - x->size);
        if (n <= 0) {
            strcpy(words, "connection lost");
            return 0;
        }
        x->size += (size_t)n;
    }
}

/* Says a command and judges the reply: one that begins with the digit `wanted` is what
 * we hope for (RFC 5321 4.2.1). */
static enum outcome say(struct exchange *x, int wanted, const char *format, ...)
{
    va_list arguments;
    int code;

    va_start(arguments, format);
    vdprintf(x->fd, format, arguments);
    va_end(arguments);
    code = read_reply(x);
    return code / 100 == wanted ? SENT : code / 100 == 5 ? FAILED : LATER;
}

/* ---- The race -------------------------------------------------------------- */

static void hang_up(struct exchange *x, enum progress progress)
{
    close(x->fd);
    x->fd = -1;
    x->progress = progress;
}

static void start_connecting(struct exchange *x)
{
    x->progress = CONNECTING;
    x->fd = socket(AF_INET, SOCK_STREAM, 0);
    fcntl(x->fd, F_SETFL, O_NONBLOCK);
    if (connect(x->fd, (struct sockaddr *)&x->address, sizeof x->address) != 0 && errno != EINPROGRESS)
        hang_up(x, SPENT);
}

/* The socket can be written: connect() is finished, and SO_ERROR says how. */
static void finish_connecting(struct exchange *x)
{
    const struct timeval patience = { REPLY_SECONDS, 0 };
    int error = 0;
    socklen_t size = sizeof error;

    getsockopt(x->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    fcntl(x->fd, F_SETFL, 0);           /* from here on calls may wait, ... */
    setsockopt(x->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);     /* ... but not for ever */
    x->progress = AWAITING;
    if (error != 0) {
        snprintf(words, sizeof words, "%s", strerror(error));
        hang_up(x, SPENT);
    }
}

/* Waits until something happens to one of those on the way.  False: nothing does. */
static bool watch(struct route *route)
{
    struct timeval patience = { RACE_SECONDS, 0 };
    fd_set readable, writable;
    int top = -1;

    FD_ZERO(&readable);
    FD_ZERO(&writable);
    for (struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->progress == CONNECTING || x->progress == AWAITING) {
            FD_SET(x->fd, x->progress == CONNECTING ? &writable : &readable);
            top = x->fd > top ? x->fd : top;
        }
    if (top < 0 || select(top + 1, &readable, &writable, NULL, &patience) <= 0)
        return false;
    for (struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->progress == CONNECTING && FD_ISSET(x->fd, &writable)) {
            finish_connecting(x);
        } else if (x->progress == AWAITING && FD_ISSET(x->fd, &readable)) {
            x->progress = GREETED;
            if (read_reply(x) / 100 != 2)
                hang_up(x, SPENT);
        }
    return true;
}

/* The best preference of those that are untried, or -1. */
static long best_untried(const struct route *route)
{
    long best = -1;

    for (const struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->progress == UNTRIED && (best < 0 || x->preference < best))
            best = x->preference;
    return best;
}

/* Connects to all untried addresses of one preference at once.  The first to greet is the
 * nearest: it is returned.  NULL: there is none. */
static struct exchange *race(struct route *route, long preference)
{
    struct exchange *winner = NULL, *end = route->x + route->count;

    for (struct exchange *x = route->x; x < end; x++)
        if (x->progress == UNTRIED && x->preference == preference)
            start_connecting(x);
    do
        for (struct exchange *x = route->x; x < end; x++)
            if (x->progress == GREETED)
                winner = x;
    while (winner == NULL && watch(route));
    for (struct exchange *x = route->x; x < end; x++)
        if (x != winner && x->fd >= 0)
            hang_up(x, winner != NULL ? UNTRIED : SPENT);   /* the others may still be needed */
    return winner;
}

/* ---- Forwarding ------------------------------------------------------------ */

/* A file of the queue: MAIL FROM, RCPT TO and DATA, as the client said them; the message
 * up to its dot; and below that a line for each outcome. */
struct message {
    FILE *file;                     /* the one descriptor of it: see lock_file() */
    char reverse_path[NAME_SIZE];   /* such as <nour@example.org> */
    struct {
        char path[NAME_SIZE];
        enum outcome outcome;       /* LATER until there is another */
    } recipients[RECIPIENT_LIMIT];
    size_t count;
    long body;                      /* where the message begins */
};

static void apply_outcome(struct message *m, const char *line)
{
    const char *path = line + strcspn(line, "<");

    for (size_t i = 0; i < m->count; i++)
        if (starts(path, m->recipients[i].path))
            m->recipients[i].outcome = starts(line, "sent") ? SENT : starts(line, "failed") ? FAILED : LATER;
}

/* Reads a file of the queue.  False: it is none of ours. */
static bool message_read(struct message *m, int fd)
{
    char line[LINE_SIZE];
    bool below = false;

    *m = (struct message){ .file = fdopen(fd, "r+") };
    if (m->file == NULL)
        return false;
    rewind(m->file);
    while (fgets(line, sizeof line, m->file) != NULL) {
        char *path = strchr(line, ':');

        if (below)
            apply_outcome(m, line);
        else if (m->body > 0)
            below = strcmp(line, ".\r\n") == 0;
        else if (starts(line, "DATA"))
            m->body = ftell(m->file);
        else if (path != NULL && starts(line, "MAIL FROM:"))
            sscanf(path, ":%255s", m->reverse_path);
        else if (path != NULL && starts(line, "RCPT TO:") && m->count < RECIPIENT_LIMIT)
            sscanf(path, ":%255s", m->recipients[m->count++].path);
    }
    return below;
}

/* Sends the message itself, its dot included. */
static void send_message(struct exchange *x, const struct message *m)
{
    char line[LINE_SIZE];
    size_t length;

    fseek(m->file, m->body, SEEK_SET);
    do {
        if (fgets(line, sizeof line, m->file) == NULL)
            return;
        length = strlen(line);
    } while (write(x->fd, line, length) == (ssize_t)length && strcmp(line, ".\r\n") != 0);
}

/* One transaction, for one recipient. */
static enum outcome transact(struct exchange *x, const struct message *m, const char *path)
{
    enum outcome outcome = say(x, 2, "HELO %s\r\n", hostname);

    if (outcome == SENT)
        outcome = say(x, 2, "MAIL FROM:%s\r\n", m->reverse_path);
    if (outcome == SENT)
        outcome = say(x, 2, "RCPT TO:%s\r\n", path);
    if (outcome == SENT)
        outcome = say(x, 3, "DATA\r\n");
    if (outcome == SENT) {
        send_message(x, m);
        outcome = say(x, 2, "");
    }
    return outcome;
}

/* Tries one exchanger after the other, until one says yes, or no for good. */
static enum outcome deliver(const struct message *m, const char *path)
{
    struct route route;
    struct exchange *x;
    char domain[NAME_SIZE] = "";
    enum outcome outcome;
    long preference;

    sscanf(strrchr(path, '@'), "@%255[^>]", domain);
    outcome = find_route(&route, domain);
    if (outcome != SENT)
        return outcome;
    outcome = LATER;
    while (outcome == LATER && (preference = best_untried(&route)) >= 0) {
        x = race(&route, preference);
        if (x == NULL)
            continue;
        outcome = transact(x, m, path);
        dprintf(x->fd, "QUIT\r\n");            /* whatever it says: what is done is done */
        hang_up(x, SPENT);
    }
    return outcome;
}

/* Tries a message, whose file this process has locked, and records what becomes of it. */
static void forward(int fd, const char *id)
{
    static struct message m;
    size_t owed = 0, failed = 0;

    alarm(TRY_SECONDS);
    if (!message_read(&m, fd))
        return;
    for (size_t i = 0; i < m.count; i++) {
        const char *path = m.recipients[i].path;
        enum outcome outcome = m.recipients[i].outcome;

        if (outcome == LATER) {
            outcome = deliver(&m, path);
            dprintf(fd, "%s %s %s\r\n", outcome_names[outcome], path, words);
            fsync(fd);
            fprintf(stderr, "%s %s %s (%s)\n", id, outcome_names[outcome], path, words);
        }
        owed += outcome == LATER;
        failed += outcome == FAILED;
    }
    if (owed == 0 && failed > 0)
        move(id, "queue", "failed");            /* for somebody to look at */
    else if (owed == 0)
        unlink(spool_path("queue", id));
}

/* Tries what is in the queue, each message in a process of its own. */
static void run_queue(void)
{
    DIR *queue = opendir("queue");
    struct dirent *entry;

    while (queue != NULL && (entry = readdir(queue)) != NULL) {
        pid_t pid = entry->d_name[0] == '.' ? -1 : fork();

        if (pid == 0) {
            int fd = open(spool_path("queue", entry->d_name), O_RDWR | O_APPEND);
            struct stat st;

            /* No link is left of a message that was sent between our open() and our lock. */
            if (fd >= 0 && lock_file(fd) && fstat(fd, &st) == 0 && st.st_nlink > 0)
                forward(fd, entry->d_name);
            _exit(0);
        }
        if (pid > 0)
            waitpid(pid, NULL, 0);
    }
    _exit(0);
}

/* ---- Sessions -------------------------------------------------------------- */

/* What is true in each phase. */
enum phase {
    CONNECTED,      /* 220 is sent; no HELO yet */
    READY,          /* HELO is given; no transaction */
    MAILED,         /* the reverse-path is in the draft */
    ADDRESSED,      /* at least one recipient is, too */
    DATA,           /* 354 is sent; lines go to the draft */
    STORING,        /* the dot has come; a child's reply is awaited, nothing is read */
    GONE            /* the last reply is given: the loop closes it */
};

struct session {
    int fd;                 /* the client */
    int pipe;               /* in STORING: from the child that stores the message */
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
static int children;        /* that run now */
static pid_t runner;        /* the one of them that goes through the queue, or 0 */
static volatile sig_atomic_t got_child, got_alarm;
static sigset_t open_mask;  /* blocks no signal */

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

/* Closes what a child has inherited and does not need: a client would wait for the end
 * of a connection that a child still holds, and the port would stay taken. */
static void forget_server(const struct session *but)
{
    signal(SIGCHLD, SIG_DFL);
    signal(SIGALRM, SIG_DFL);
    sigprocmask(SIG_SETMASK, &open_mask, NULL);
    close(listener);
    for (const struct session *s = sessions; s < sessions + session_count; s++) {
        close(s->fd);
        if (s->phase == STORING)
            close(s->pipe);
        if (s != but && s->draft.fd >= 0)
            close(s->draft.fd);
    }
}

/* What the child for a whole message does: it stores it, says so, and forwards it. */
static void take_over(struct session *s, int answer)
{
    bool stored = draft_store(&s->draft);

    if (stored)
        dprintf(answer, "250 2.0.0 Ok: queued as %s", s->draft.id);
    close(answer);                  /* without a word, if it is not stored */
    if (stored && children < FORWARDERS) {
        forget_server(s);
        forward(s->draft.fd, s->draft.id);
    }
    _exit(0);
}

/* The dot has come: forks the child for the message. */
static void end_message(struct session *s)
{
    int ends[2] = { -1, -1 };
    pid_t pid = -1;

    draft_add(&s->draft, ".\r\n", 3);
    if (!s->spoiled && pipe(ends) == 0)
        pid = fork();
    if (pid == 0) {
        close(ends[0]);
        take_over(s, ends[1]);
    }
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        reply(s, s->spoiled ? "550 5.5.2 Error: bare CR, bare LF or NUL in the message" : NOT_STORED);
        reset(s);
        return;
    }
    children++;
    close(s->draft.fd);             /* the file is the child's now */
    s->draft.fd = -1;
    s->pipe = ends[0];
    s->phase = STORING;
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

/* The child that stores this client's message has answered, or died without a word. */
static void hear_child(struct session *s)
{
    char line[256];
    ssize_t n = read(s->pipe, line, sizeof line - 1);

    close(s->pipe);
    line[n > 0 ? n : 0] = '\0';
    reset(s);
    reply(s, "%s", n > 0 ? line : NOT_STORED);
}

/* ---- The loop -------------------------------------------------------------- */

/* Answers all whole lines there are.  What is left waits for the rest of its line. */
static void converse(struct session *s)
{
    struct line line;

    while (s->phase < STORING && (line = next_line(s->in, s->size)).used > 0) {
        if (s->phase == DATA)
            take_message(s, line);
        else
            take_command(s, line.length);
        s->size -= line.used;
        memmove(s->in, s->in + line.used, s->size);
    }
    if (s->phase < STORING && s->size == LINE_SIZE) {
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

static void on_signal(int number)
{
    if (number == SIGCHLD)
        got_child = 1;
    else
        got_alarm = 1;
}

/* One SIGCHLD may stand for several children. */
static void reap_children(void)
{
    pid_t pid;

    got_child = 0;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) {
        children--;
        if (pid == runner)
            runner = 0;
    }
}

/* At the start, once in a while, and on kill -ALRM. */
static void start_runner(void)
{
    got_alarm = 0;
    alarm(QUEUE_SECONDS);
    if (runner > 0)
        return;
    runner = fork();
    if (runner == 0) {
        forget_server(NULL);
        run_queue();
    }
    children += runner > 0;
}

/* Waits until something happens.  Signals are let in only here, so that none can come
 * between the look at its flag and the wait. */
static void wait_for_events(fd_set *readable)
{
    int top = listener;

    FD_ZERO(readable);          /* select() changes its sets: they are made anew each time */
    if (session_count < session_limit)
        FD_SET(listener, readable);
    for (const struct session *s = sessions; s < sessions + session_count; s++) {
        int fd = s->phase == STORING ? s->pipe : s->fd;

        FD_SET(fd, readable);
        top = fd > top ? fd : top;
    }
    if (pselect(top + 1, readable, NULL, NULL, NULL, &open_mask) < 0)
        FD_ZERO(readable);      /* a signal: the set means nothing now */
}

static void serve(struct session *s, const fd_set *readable)
{
    if (s->phase != STORING && FD_ISSET(s->fd, readable)) {
        hear(s);
    } else if (s->phase == STORING && FD_ISSET(s->pipe, readable)) {
        hear_child(s);
        converse(s);            /* what came behind the dot has waited */
    }
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

        if (got_child)
            reap_children();
        if (got_alarm)
            start_runner();
        wait_for_events(&readable);
        for (size_t i = 0; i < session_count; i++)
            serve(&sessions[i], &readable);
        if (FD_ISSET(listener, &readable))
            welcome();
        reap_sessions();
    }
}

/* ---- Start ----------------------------------------------------------------- */

static struct sockaddr_in address_of(const char *text, const char *port)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };

    errno = EINVAL;
    if (inet_pton(AF_INET, text, &a.sin_addr) != 1)
        die(text);
    return a;
}

static void listen_on(const char *port)
{
    const int on = 1;
    struct sockaddr_in a = address_of("127.0.0.1", port);

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
    mkdir("failed", 0700);
}

static void catch_signals(void)
{
    struct sigaction action = { .sa_handler = on_signal };
    sigset_t blocked;

    sigemptyset(&open_mask);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigaddset(&blocked, SIGALRM);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    sigaction(SIGCHLD, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);       /* write() says it: EPIPE */
}

int main(int argc, char **argv)
{
    long limit = sysconf(_SC_OPEN_MAX);

    if (argc != 6) {
        fprintf(stderr, "usage: %s port spool nameserver nameserver-port exchanger-port\n", argv[0]);
        return 2;
    }
    nameserver = address_of(argv[3], argv[4]);
    mx_port = htons((in_port_t)atoi(argv[5]));
    gethostname(hostname, sizeof hostname - 1);
    random_fd = open("/dev/urandom", O_RDONLY);
    if (random_fd < 0)
        die("/dev/urandom");
    session_limit = (size_t)((limit < 0 || limit > FD_SETSIZE ? FD_SETSIZE : limit) - RESERVE) / 2;
    enter_spool(argv[2]);
    catch_signals();
    listen_on(argv[1]);
    start_runner();
    run();
    return 0;
}
