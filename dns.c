/*
 * dns.c - names to addresses: a stub resolver after RFC 1035.
 *
 * It knows nothing of mail: names go in, records come out.  All queries of a
 * call are in flight at once, each on a socket of its own with a random port
 * and a random id, because whoever guesses both can forge an answer (RFC 5452).
 *
 * To run it alone:
 *
 *     cc -DDNS_MAIN -o dns dns.c && ./dns example.org
 *
 * Contents, to be read from the end:
 *   Addresses          text to address and back
 *   Waiting            sockets that do not block, and the clock
 *   Chance             ids and ports nobody can guess
 *   Packets            the only functions that touch an answer's bytes
 *   Answers            what an answer says, and whether it answers us
 *   Asking             UDP, then TCP where it has to be
 */
#include "smtp.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

enum {
    DNS_PORT = 53,
    NAME_LIMIT = 253,       /* a name as text: 255 octets on the wire (RFC 1035 2.3.4) */
    QUERY_SIZE = 12 + 255 + 4 + 11,     /* header, name, type and class, OPT */
    ANSWER_SIZE = 65535,    /* the most that TCP's two octets of length can say */
    UDP_SIZE = 1232,        /* what we say we take (RFC 6891 6.2.5): no fragments */
    ROUNDS = 3,             /* how often each server is asked ... */
    FIRST_WAIT = 2000,      /* ... and how many ms it has, doubled every round */
    TCP_WAIT = 5000,
    CALL_LIMIT = 60000,     /* ms for all queries of a call, whatever the servers say */
    CHAIN_LIMIT = 8,        /* CNAMEs in a row; RFC 1034 3.6.2 wants none */
    POINTER_LIMIT = 127     /* compression pointers in a name: it has no more labels */
};

/* ==== Addresses ========================================================== */

bool address_parse(const char *text, unsigned port, union address *a)
{
    memset(a, 0, sizeof *a);
    if (inet_pton(AF_INET, text, &a->in.sin_addr) == 1)
        a->in.sin_family = AF_INET;
    else if (inet_pton(AF_INET6, text, &a->in6.sin6_addr) == 1)
        a->in6.sin6_family = AF_INET6;
    else
        return false;
    address_set_port(a, port);
    return true;
}

/*
 * Address literals.  RFC 5321 4.1.3 decides what is one, not inet_pton(): the
 * libraries differ about leading zeros, which Snum allows, and about a :: that
 * stands for a single group, which IPv6-comp forbids.
 */

static const char *skip_ipv4(const char *p, unsigned char octets[4])
{
    for (size_t i = 0; i < 4; i++) {
        size_t digits;
        unsigned long value;

        if (i > 0 && *p++ != '.')
            return NULL;
        digits = strspn(p, "0123456789");
        if (digits < 1 || digits > 3)
            return NULL;
        value = strtoul(p, NULL, 10);
        if (value > 255)
            return NULL;
        octets[i] = (unsigned char)value;
        p += digits;
    }
    return p;
}

/* Reads up to the ] behind the address. */
static const char *skip_ipv6(const char *p, unsigned char octets[16])
{
    enum { SIZE = 16, NONE = SIZE + 1 };
    size_t count = 0, gap = NONE;       /* octets read, and how many of them stand before the :: */

    while (*p != ']') {
        size_t digits;

        if (gap == NONE && strncmp(p, "::", 2) == 0) {
            gap = count;
            p += 2;
            if (*p == ']')
                break;
        } else if (count > 0 && *p++ != ':') {
            return NULL;
        }
        digits = strspn(p, "0123456789ABCDEFabcdef");
        if (p[digits] == '.') {         /* the last four octets as an IPv4 address */
            p = count + 4 <= SIZE ? skip_ipv4(p, octets + count) : NULL;
            if (p == NULL || *p != ']')
                return NULL;
            count += 4;
        } else {
            unsigned long group = strtoul(p, NULL, 16);

            if (digits < 1 || digits > 4 || count == SIZE)
                return NULL;
            octets[count++] = (unsigned char)(group >> 8);
            octets[count++] = (unsigned char)(group & 0xff);
            p += digits;
        }
    }
    if (gap == NONE)
        return count == SIZE ? p : NULL;
    if (count > SIZE - 4)               /* :: stands for at least two groups */
        return NULL;
    memmove(octets + SIZE - (count - gap), octets + gap, count - gap);
    memset(octets + gap, 0, SIZE - count);
    return p;
}

const char *literal_parse(const char *text, unsigned port, union address *a)
{
    static const char tag[] = "[IPv6:";
    unsigned char octets[16];
    bool ipv6 = strncasecmp(text, tag, sizeof tag - 1) == 0;
    const char *end = NULL;

    if (ipv6)
        end = skip_ipv6(text + sizeof tag - 1, octets);
    else if (*text == '[')
        end = skip_ipv4(text + 1, octets);
    if (end == NULL || *end != ']')
        return NULL;
    address_set(a, octets, ipv6 ? 16 : 4, port);
    return end + 1;
}

bool endpoint_parse(const char *text, unsigned default_port, char host[DNS_NAME_SIZE], unsigned *port)
{
    const char *colon = strchr(text, ':');
    size_t length = strlen(text);

    *port = default_port;
    if (text[0] == '[') {               /* [::1]:25, or [::1] */
        const char *close = strchr(++text, ']');
        if (close == NULL || (close[1] != '\0' && close[1] != ':'))
            return false;
        length = (size_t)(close - text);
        colon = close[1] == ':' ? close + 1 : NULL;
    } else if (colon != NULL && strchr(colon + 1, ':') != NULL) {
        colon = NULL;                   /* ::1: an IPv6 address by itself */
    } else if (colon != NULL) {
        length = (size_t)(colon - text);
    }
    if (colon != NULL) {
        char *end;
        unsigned long value = strtoul(colon + 1, &end, 10);
        if (colon[1] < '0' || colon[1] > '9' || *end != '\0' || value < 1 || value > 65535)
            return false;
        *port = (unsigned)value;
    }
    if (length == 0 || length >= DNS_NAME_SIZE)
        return false;
    memcpy(host, text, length);
    host[length] = '\0';
    return true;
}

const unsigned char *address_octets(const union address *a, size_t *count)
{
    bool ipv6 = a->sa.sa_family == AF_INET6;

    *count = ipv6 ? 16 : 4;
    return ipv6 ? a->in6.sin6_addr.s6_addr : (const unsigned char *)&a->in.sin_addr;
}

const char *address_text(const union address *a, char text[ADDRESS_TEXT])
{
    size_t count;

    if (inet_ntop(a->sa.sa_family, address_octets(a, &count), text, ADDRESS_TEXT) == NULL)
        strcpy(text, "?");
    return text;
}

void address_set(union address *a, const unsigned char *octets, size_t count, unsigned port)
{
    union address plain;

    memset(&plain, 0, sizeof plain);
    plain.sa.sa_family = count == 4 ? AF_INET : AF_INET6;
    if (count == 4)
        memcpy(&plain.in.sin_addr, octets, count);
    else
        memcpy(plain.in6.sin6_addr.s6_addr, octets, count);
    address_set_port(&plain, port);
    *a = plain;
}

void address_unmap(union address *a)
{
    if (a->sa.sa_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&a->in6.sin6_addr))
        address_set(a, a->in6.sin6_addr.s6_addr + 12, 4, address_port(a));
}

unsigned address_port(const union address *a)
{
    return ntohs(a->sa.sa_family == AF_INET6 ? a->in6.sin6_port : a->in.sin_port);
}

void address_set_port(union address *a, unsigned port)
{
    if (a->sa.sa_family == AF_INET6)
        a->in6.sin6_port = htons((uint16_t)port);
    else
        a->in.sin_port = htons((uint16_t)port);
}

socklen_t address_size(const union address *a)
{
    return a->sa.sa_family == AF_INET6 ? sizeof a->in6 : sizeof a->in;
}

/* ==== Waiting ============================================================ */

int64_t clock_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

time_t wall_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec;
}

int socket_open(const union address *to, int type)
{
    const int on = 1;
    int fd = socket(to->sa.sa_family, type, 0);

    if (fd < 0)
        return -1;
    if (fd >= FD_SETSIZE) {     /* in an fd_set it would overwrite what stands behind the set */
        close(fd);
        errno = EMFILE;
        return -1;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (type == SOCK_STREAM)    /* a dialogue: what is written is wanted now, not when more has come */
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

void watch_fd(int fd, fd_set *set, int *top)
{
    FD_SET(fd, set);
    if (fd > *top)
        *top = fd;
}

void wait_sets(int top, fd_set *readable, fd_set *writable, int64_t deadline)
{
    int64_t left = deadline > clock_ms() ? deadline - clock_ms() : 0;
    struct timeval timeout;     /* made anew each time: Linux's select() counts it down */

    timeout.tv_sec = (time_t)(left / 1000);
    timeout.tv_usec = (suseconds_t)(left % 1000 * 1000);
    if (select(top + 1, readable, writable, NULL, &timeout) <= 0) {
        FD_ZERO(readable);      /* a signal, or the end of time: the sets mean nothing */
        FD_ZERO(writable);
    }
}

bool wait_ready(int fd, bool writing, int64_t deadline)
{
    fd_set readable, writable;

    do {
        FD_ZERO(&readable);
        FD_ZERO(&writable);
        FD_SET(fd, writing ? &writable : &readable);
        wait_sets(fd, &readable, &writable, deadline);
        if (FD_ISSET(fd, writing ? &writable : &readable))
            return true;
    } while (clock_ms() < deadline);
    return false;
}

/* ==== Chance ============================================================= */

/* 16 bits that nobody can guess.  The pool is filled per process, so that a
 * child never hands out what its parent or its siblings did. */
static unsigned random16(void)
{
    static unsigned char pool[64];
    static size_t left;
    static pid_t owner;

    if (left == 0 || owner != getpid()) {
        int fd = open("/dev/urandom", O_RDONLY);
        ssize_t got = fd < 0 ? -1 : read(fd, pool, sizeof pool);

        if (fd >= 0)
            close(fd);
        if (got != (ssize_t)sizeof pool) {
            /* An empty chroot.  The clock's nanoseconds, the pid and where the
             * loader put us, stirred by splitmix64, are harder to guess than a
             * counter, but not secret: the random ports have to carry more. */
            static uint64_t state;
            struct timespec now;

            clock_gettime(CLOCK_REALTIME, &now);
            state ^= (uint64_t)now.tv_nsec << 32 ^ (uint64_t)now.tv_sec << 16 ^ (uint64_t)getpid() ^ (uintptr_t)&now;
            for (size_t i = 0; i < sizeof pool; i++) {
                uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
                z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
                z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
                pool[i] = (unsigned char)(z >> 56);
            }
        }
        left = sizeof pool;
        owner = getpid();
    }
    left -= 2;
    return (unsigned)pool[left] << 8 | pool[left + 1];
}

/* ==== Packets ============================================================ */

/* A place in an answer.  Everything is read through get() and get_name(), which
 * never pass the end of what was received and make `bad` stick. */
struct cursor {
    const unsigned char *bytes;
    size_t size, at;
    bool bad;
};

/* A number of `octets` octets, the most significant first. */
static unsigned long get(struct cursor *c, size_t octets)
{
    unsigned long value = 0;

    if (octets > c->size - c->at) {
        c->bad = true;
        c->at = c->size;
        return 0;
    }
    while (octets-- > 0)
        value = value << 8 | c->bytes[c->at++];
    return value;
}

/* A name, with its compression (RFC 1035 4.1.4) undone.  A pointer has to lead
 * to before the place where the piece it stands in began, so there is an end;
 * and there are not many of them, so that it comes soon. */
static void get_name(struct cursor *c, char name[DNS_NAME_SIZE])
{
    size_t used = 0, start = c->at, behind = 0, pointers = 0;

    name[0] = '\0';
    for (;;) {
        size_t length = get(c, 1);

        if (length >= 0xC0) {
            size_t target = (length & 0x3F) << 8 | get(c, 1);
            if (behind == 0)
                behind = c->at;
            if (target >= start || ++pointers > POINTER_LIMIT)
                c->bad = true;
            else
                start = c->at = target;
        } else if (length > LABEL_LIMIT || length > c->size - c->at
            || (length > 0 && used + (used > 0) + length > NAME_LIMIT)) {
            c->bad = true;
        } else if (length > 0) {
            if (used > 0)
                name[used++] = '.';
            for (; length > 0; length--, used++) {
                unsigned char octet = c->bytes[c->at++];
                /* Names go into logs and files: what is not printable, or
                 * would pass for a dot between labels, is no host of ours. */
                name[used] = octet > ' ' && octet < 0x7F && octet != '.' ? (char)octet : '?';
            }
            name[used] = '\0';
        } else {
            break;
        }
        if (c->bad) {
            name[0] = '\0';
            return;
        }
    }
    if (behind != 0)
        c->at = behind;
}

static size_t put16(unsigned char *out, unsigned value)
{
    out[0] = (unsigned char)(value >> 8);
    out[1] = (unsigned char)value;
    return 2;
}

/* Writes a query (RFC 1035 4.1).  Returns its size, 0 if `name` can be no name. */
static size_t put_query(unsigned char out[QUERY_SIZE], unsigned id, const char *name, enum dns_type type, bool edns)
{
    size_t n = 0;

    if (strlen(name) > NAME_LIMIT)
        return 0;
    n += put16(out + n, id);
    n += put16(out + n, 0x0100);        /* a query; recursion desired */
    n += put16(out + n, 1);             /* one question, */
    n += put16(out + n, 0);
    n += put16(out + n, 0);
    n += put16(out + n, edns ? 1 : 0);  /* and our OPT */
    while (*name != '\0') {
        size_t length = strcspn(name, ".");

        if (length == 0 || length > LABEL_LIMIT)
            return 0;
        out[n++] = (unsigned char)length;
        memcpy(out + n, name, length);
        n += length;
        name += length + (name[length] == '.');
    }
    out[n++] = 0;
    n += put16(out + n, type);
    n += put16(out + n, 1);             /* class IN */
    if (edns) {                         /* RFC 6891 6.1.2: root, OPT, our size, no flags, no data */
        static const unsigned char opt[] = { 0, 0, 41, UDP_SIZE >> 8, UDP_SIZE & 255, 0, 0, 0, 0, 0, 0 };
        memcpy(out + n, opt, sizeof opt);
        n += sizeof opt;
    }
    return n;
}

/* ==== Answers ============================================================ */

/* A query on its way. */
struct flight {
    struct dns_query *query;
    char name[DNS_NAME_SIZE];   /* asked for now: down a chain of CNAMEs, the last target */
    int fd;                     /* its socket, or -1 */
    unsigned id;
    unsigned tries;             /* servers asked in vain */
    unsigned broken;            /* servers that said they cannot, a bit for each */
    unsigned links;             /* CNAMEs followed */
    bool edns;                  /* asked with an OPT record */
    bool heard;                 /* its answer has a record of the name asked for */
    bool spoiled;               /* a record of its answer was malformed */
    bool done;
    int64_t deadline;           /* of the server that is asked */
    int64_t end;                /* of the call */
};

enum verdict {
    NOT_OURS,       /* not the answer to this query: wait on */
    FINISHED,       /* the query has its status */
    RENAMED,        /* a chain of CNAMEs leads out of this answer: ask again */
    NO_EDNS,        /* the server does not know EDNS0: ask without */
    TRUNCATED,      /* ask over TCP */
    BROKEN          /* this server has no answer for us: ask another */
};

/* Adds the record that begins at `c` and is `size` octets long to the query's
 * answer.  False: it is malformed. */
static bool take_record(struct dns_query *q, struct cursor *c, size_t size)
{
    struct dns_record record;
    size_t at = q->count, end = c->at + size;

    memset(&record, 0, sizeof record);
    if (q->type == DNS_MX) {
        record.preference = (unsigned)get(c, 2);
        get_name(c, record.name);
        if (c->bad || c->at != end)
            return false;
        while (at > 0 && q->records[at - 1].preference > record.preference)
            at--;               /* kept sorted, the first come first among equals */
    } else if (q->type == DNS_A && size == 4) {
        record.address.in.sin_family = AF_INET;
        memcpy(&record.address.in.sin_addr, c->bytes + c->at, size);
    } else if (q->type == DNS_AAAA && size == 16) {
        record.address.in6.sin6_family = AF_INET6;
        memcpy(&record.address.in6.sin6_addr, c->bytes + c->at, size);
    } else {
        return false;
    }
    if (at >= DNS_RECORDS)
        return true;
    if (q->count == DNS_RECORDS)
        q->count--;             /* the least preferred makes room */
    memmove(&q->records[at + 1], &q->records[at], (q->count - at) * sizeof record);
    q->records[at] = record;
    q->count++;
    return true;
}

/* Goes once through `answers` records: takes those that belong to f->name, and
 * leaves in `target` where a CNAME says the name lives in truth. */
static void scan_answers(struct flight *f, struct cursor *c, unsigned long answers, char target[DNS_NAME_SIZE])
{
    char owner[DNS_NAME_SIZE];

    target[0] = '\0';
    while (answers-- > 0 && !c->bad) {
        unsigned long type, class;
        size_t size, end;

        get_name(c, owner);
        type = get(c, 2);
        class = get(c, 2);
        get(c, 4);              /* time to live: we keep nothing */
        size = get(c, 2);
        if (c->bad || size > c->size - c->at) {
            c->bad = true;
            return;
        }
        end = c->at + size;
        if (class == 1 && strcasecmp(owner, f->name) == 0) {
            struct cursor data = *c;

            f->heard = true;
            if (type == (unsigned long)f->query->type && !take_record(f->query, &data, size))
                f->spoiled = true;
            else if (type == DNS_CNAME)
                get_name(&data, target);
            f->spoiled = f->spoiled || data.bad;
        }
        c->at = end;
    }
}

/* Reads the answer section that begins at `c`, along the CNAMEs in it. */
static enum verdict read_records(struct flight *f, const struct cursor *c, unsigned long answers, bool nxdomain)
{
    bool moved = false;

    for (;;) {
        char target[DNS_NAME_SIZE];
        struct cursor pass = *c;

        f->query->count = 0;
        f->heard = f->spoiled = false;
        scan_answers(f, &pass, answers, target);
        /* One bad record spoils only itself, unless it is all there is. */
        if (pass.bad || (f->spoiled && f->query->count == 0)) {
            f->query->count = 0;
            f->query->why = "malformed answer from the name server";
            return BROKEN;
        }
        if (f->query->count > 0) {
            f->query->status = DNS_FOUND;
            return FINISHED;
        }
        if (target[0] == '\0')
            break;
        if (++f->links > CHAIN_LIMIT) {
            f->query->why = "too many CNAMEs in a row";
            f->query->status = DNS_FAILED;
            return FINISHED;
        }
        strcpy(f->name, target);
        moved = true;
    }
    if (moved && !nxdomain)
        return RENAMED;
    if (!moved && answers > 0 && !f->heard)
        return NOT_OURS;        /* records, and none of them is about what we asked */
    f->query->status = nxdomain ? DNS_NXDOMAIN : DNS_NODATA;
    return FINISHED;
}

static enum verdict read_answer(struct flight *f, const unsigned char *bytes, size_t size)
{
    enum { RESPONSE = 0x8000, OPCODE = 0x7800, AA = 0x0400, TC = 0x0200, RA = 0x0080, RCODE = 0x000F };
    enum { NOERROR = 0, FORMERR = 1, SERVFAIL = 2, NXDOMAIN = 3, NOTIMP = 4, REFUSED = 5 };
    struct cursor c = { bytes, size, 0, false };
    char name[DNS_NAME_SIZE];
    unsigned long id = get(&c, 2), flags = get(&c, 2), rcode = flags & RCODE;
    unsigned long questions = get(&c, 2), answers = get(&c, 2);

    get(&c, 4);     /* the authority and additional sections: nobody's word but the answer's is taken */
    if (c.bad || id != f->id || (flags & (RESPONSE | OPCODE)) != RESPONSE)
        return NOT_OURS;
    if (questions == 1) {
        unsigned long type, class;

        get_name(&c, name);
        type = get(&c, 2);
        class = get(&c, 2);
        if (c.bad || type != (unsigned long)f->query->type || class != 1 || strcasecmp(name, f->name) != 0)
            return NOT_OURS;
    } else if (questions != 0 || (rcode != FORMERR && rcode != NOTIMP)) {
        return NOT_OURS;        /* only who could not read the question may leave it out */
    }
    if (flags & TC)
        return TRUNCATED;
    if (f->edns && (rcode == FORMERR || rcode == NOTIMP))
        return NO_EDNS;
    if (rcode != NOERROR && rcode != NXDOMAIN) {
        f->query->why = rcode == SERVFAIL ? "the name server answers SERVFAIL" : rcode == REFUSED ?
            "the name server answers REFUSED" : "the name server answers with an error";
        return BROKEN;
    }
    if (rcode == NOERROR && answers == 0 && (flags & (AA | RA)) == 0) {
        f->query->why = "the name server only refers to others: it does not recurse";
        return BROKEN;
    }
    return read_records(f, &c, answers, rcode == NXDOMAIN);
}

/* ==== Asking ============================================================= */

/* Gives the socket a random port.  The kernel would choose one too, but not
 * every kernel chooses at random. */
static void bind_random_port(int fd, const union address *to)
{
    union address from;

    memset(&from, 0, sizeof from);
    from.sa.sa_family = to->sa.sa_family;
    for (int i = 0; i < 10; i++) {
        address_set_port(&from, 1024 + random16() % (65536 - 1024));
        if (bind(fd, &from.sa, address_size(&from)) == 0)
            return;
    }
}

static void finish(struct flight *f, enum dns_status status)
{
    f->query->status = status;
    f->done = true;
}

/* Sends the query to the server whose turn it is.  The socket is connected, so
 * that the kernel keeps away what comes from any other address or port. */
static void send_query(struct flight *f, const struct nameservers *servers)
{
    const union address *server = &servers->server[f->tries % servers->count];
    unsigned char query[QUERY_SIZE];
    size_t size;

    if (f->fd >= 0)
        close(f->fd);
    f->id = random16();
    size = put_query(query, f->id, f->name, f->query->type, f->edns);
    if (size == 0) {
        f->fd = -1;
        finish(f, DNS_NXDOMAIN);
        return;
    }
    f->deadline = clock_ms() + ((int64_t)FIRST_WAIT << f->tries / servers->count);
    if (f->deadline > f->end)
        f->deadline = f->end;
    f->fd = socket_open(server, SOCK_DGRAM);
    if (f->fd >= 0) {
        bind_random_port(f->fd, server);
        if (connect(f->fd, &server->sa, address_size(server)) == 0 && send(f->fd, query, size, 0) == (ssize_t)size)
            return;
        close(f->fd);
        f->fd = -1;
    }
    f->deadline = 0;        /* this server cannot even be asked: the next, now */
}

/* The next server, the next round, or the end. */
static void try_next(struct flight *f, const struct nameservers *servers)
{
    f->tries++;
    if (f->tries >= servers->count * ROUNDS || f->broken == (1u << servers->count) - 1 || clock_ms() >= f->end)
        finish(f, DNS_FAILED);
    else
        send_query(f, servers);
}

/* Reads or writes exactly `size` octets before the deadline. */
static bool transfer(int fd, bool writing, unsigned char *bytes, size_t size, int64_t deadline)
{
    while (size > 0) {
        ssize_t n;

        if (!wait_ready(fd, writing, deadline))
            return false;
        n = writing ? write(fd, bytes, size) : read(fd, bytes, size);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        if (n > 0) {
            bytes += n;
            size -= (size_t)n;
        }
    }
    return true;
}

/* The same question over TCP, each message behind two octets of length (RFC
 * 1035 4.2.2).  In plain sequence, for truncation is rare: the other flights
 * wait.  Returns the answer's size, 0 for none. */
static size_t ask_over_tcp(const struct flight *f, const union address *server, unsigned char answer[ANSWER_SIZE])
{
    unsigned char query[2 + QUERY_SIZE], length[2];
    int64_t deadline = clock_ms() + TCP_WAIT < f->end ? clock_ms() + TCP_WAIT : f->end;
    size_t size = put_query(query + 2, f->id, f->name, f->query->type, f->edns);
    int fd = socket_open(server, SOCK_STREAM);
    bool ok;

    if (fd < 0)
        return 0;
    put16(query, (unsigned)size);
    ok = (connect(fd, &server->sa, address_size(server)) == 0 || errno == EINPROGRESS)
        && transfer(fd, true, query, 2 + size, deadline)
        && transfer(fd, false, length, sizeof length, deadline);
    size = ok ? (size_t)length[0] << 8 | length[1] : 0;
    ok = ok && transfer(fd, false, answer, size, deadline);
    close(fd);
    return ok ? size : 0;
}

/* Takes what has come for a flight. */
static void receive(struct flight *f, const struct nameservers *servers)
{
    static unsigned char answer[ANSWER_SIZE];
    ssize_t got = recv(f->fd, answer, sizeof answer, 0);
    enum verdict verdict;

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    /* An error here is an ICMP message: nobody listens at that port. */
    verdict = got < 0 ? BROKEN : read_answer(f, answer, (size_t)got);
    if (got < 0)
        f->query->why = "the name server does not answer";
    if (verdict == TRUNCATED) {
        size_t size = ask_over_tcp(f, &servers->server[f->tries % servers->count], answer);

        f->query->why = "the name server truncates its answer and is not to be had over TCP";
        verdict = read_answer(f, answer, size);
        if (verdict == TRUNCATED || verdict == NOT_OURS)
            verdict = BROKEN;
    }
    switch (verdict) {
    case NOT_OURS:
        break;
    case FINISHED:
        f->done = true;
        break;
    case NO_EDNS:
        f->edns = false;
        send_query(f, servers);
        break;
    case RENAMED:
        f->tries = f->broken = 0;
        send_query(f, servers);
        break;
    default:
        f->broken |= 1u << f->tries % servers->count;
        try_next(f, servers);
    }
}

/* One turn of waiting for all flights.  False: all are done. */
static bool serve_flights(struct flight *flights, size_t count, const struct nameservers *servers)
{
    int64_t first = INT64_MAX, now;
    fd_set set, none;
    int top = -1;
    bool flying = false;

    FD_ZERO(&set);
    FD_ZERO(&none);
    for (struct flight *f = flights; f < flights + count; f++) {
        if (f->done)
            continue;
        flying = true;
        if (f->deadline < first)
            first = f->deadline;
        if (f->fd >= 0)
            FD_SET(f->fd, &set);
        if (f->fd > top)
            top = f->fd;
    }
    if (!flying)
        return false;
    wait_sets(top, &set, &none, first);
    now = clock_ms();       /* of this turn: the time that one spends on TCP is not the others' */
    for (struct flight *f = flights; f < flights + count; f++) {
        if (f->done)
            continue;
        if (f->fd >= 0 && FD_ISSET(f->fd, &set))
            receive(f, servers);
        if (!f->done && now >= f->deadline)     /* whoever floods us with forgeries gains no time by it */
            try_next(f, servers);
    }
    return true;
}

void dns_ask(const struct nameservers *servers, struct dns_query *queries, size_t count, int64_t deadline)
{
    struct flight flights[DNS_QUERIES];
    int64_t end = clock_ms() + CALL_LIMIT < deadline ? clock_ms() + CALL_LIMIT : deadline;

    if (count > DNS_QUERIES)
        count = DNS_QUERIES;
    memset(flights, 0, count * sizeof flights[0]);
    for (size_t i = 0; i < count; i++) {
        struct flight *f = &flights[i];

        f->query = &queries[i];
        f->query->count = 0;
        f->query->why = "no answer from the name servers";
        f->fd = -1;
        f->edns = true;
        f->end = end;
        if (strlen(f->query->name) > NAME_LIMIT) {
            finish(f, DNS_NXDOMAIN);    /* longer than any name there is */
        } else {
            strcpy(f->name, f->query->name);
            send_query(f, servers);
        }
    }
    while (serve_flights(flights, count, servers))
        ;
    for (size_t i = 0; i < count; i++)
        if (flights[i].fd >= 0)
            close(flights[i].fd);
}

void dns_servers(const char *path, struct nameservers *servers)
{
    static const char blanks[] = " \t\r\n";
    FILE *file = fopen(path, "r");
    char line[256];

    servers->count = 0;
    while (file != NULL && servers->count < NAMESERVERS && fgets(line, sizeof line, file) != NULL) {
        const char *word = strtok(line, blanks);

        if (word != NULL && strcmp(word, "nameserver") == 0 && (word = strtok(NULL, blanks)) != NULL
            && address_parse(word, DNS_PORT, &servers->server[servers->count]))
            servers->count++;
    }
    if (file != NULL)
        fclose(file);
    if (servers->count == 0) {      /* as libc does: the resolver on this host */
        address_parse("127.0.0.1", DNS_PORT, &servers->server[0]);
        servers->count = 1;
    }
}

#ifdef DNS_MAIN
/* The resolver by itself: prints a name's exchangers and addresses. */
int main(int argc, char **argv)
{
    static const char *const words[] = { "found", "no such record", "no such name", "failed" };
    static struct dns_query queries[3];
    struct nameservers servers;
    char host[DNS_NAME_SIZE], text[ADDRESS_TEXT];
    unsigned port;

    dns_servers("/etc/resolv.conf", &servers);
    if (argc == 3) {
        if (!endpoint_parse(argv[2], DNS_PORT, host, &port) || !address_parse(host, port, &servers.server[0])) {
            fprintf(stderr, "dns: %s is not an address[:port]\n", argv[2]);
            return 2;
        }
        servers.count = 1;
    } else if (argc != 2) {
        fprintf(stderr, "usage: dns name [nameserver[:port]]\n");
        return 2;
    }
    queries[0].type = DNS_MX;
    queries[1].type = DNS_A;
    queries[2].type = DNS_AAAA;
    for (int i = 0; i < 3; i++)
        queries[i].name = argv[1];
    dns_ask(&servers, queries, 3, INT64_MAX);
    for (int i = 0; i < 3; i++) {
        const struct dns_query *q = &queries[i];

        if (q->status != DNS_FOUND)
            printf("%-4s %s%s%s\n", i == 0 ? "MX" : i == 1 ? "A" : "AAAA", words[q->status],
                q->status == DNS_FAILED ? ": " : "", q->status == DNS_FAILED ? q->why : "");
        for (size_t k = 0; k < q->count; k++)
            if (q->type == DNS_MX)
                printf("MX   %u %s\n", q->records[k].preference, q->records[k].name[0] ? q->records[k].name : ".");
            else
                printf("%-4s %s\n", q->type == DNS_A ? "A" : "AAAA", address_text(&q->records[k].address, text));
    }
    return 0;
}
#endif
