/*
 * dns.c - names to addresses: a stub resolver after RFC 1035.
 *
 * The resolver knows nothing of mail: names go in, records come out.  All
 * queries of a call are under way at once.  Each has a socket of its own with a
 * random port, and a random id, because an attacker who guesses both can forge
 * the answer (RFC 5452).
 *
 * To run it alone:
 *
 *     cc -DDNS_MAIN -o dns dns.c && ./dns example.org
 *
 * Contents, to be read from the end:
 *   Addresses          text to address and back
 *   Waiting            sockets that do not block, and the clocks
 *   Random numbers     for ids and ports
 *   Packets            the only functions that touch the octets of an answer
 *   Answers            what an answer says, and whether it answers the query
 *   Asking             UDP first, TCP where the answer is truncated
 *   Name servers       reading resolv.conf
 */
#include "smtp.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

enum {
    DNS_PORT = 53,
    NAME_LIMIT = 253,       /* octets of a name as text: 255 in a packet (RFC 1035 2.3.4) */
    QUERY_SIZE = 12 + 255 + 4 + 11,     /* header, name, type and class, OPT */
    ANSWER_SIZE = 65535,    /* the most that the two octets of length before a message over TCP can say */
    UDP_SIZE = 1232,        /* the size that OPT asks for: it is not fragmented on the way (RFC 6891 6.2.5) */
    ROUNDS = 3,             /* how often each server is asked */
    FIRST_WAIT = 2000,      /* ms that a server has in the first round; twice as long in each further one */
    TCP_WAIT = 5000,        /* ms for a query over TCP */
    CALL_LIMIT = 60000,     /* ms for all queries of a call, whatever the servers say */
    CHAIN_LIMIT = 8,        /* CNAMEs in a row; RFC 1034 3.6.2 wants none */
    POINTER_LIMIT = 127     /* compression pointers in a name, which has no more labels than that */
};

enum { CLASS_IN = 1 };
enum { TYPE_NS = 2, TYPE_CNAME = 5, TYPE_SOA = 6 };     /* read in answers, never asked for: see enum dns_type */

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
    if (fd >= FD_SETSIZE) {     /* FD_SET() would write beyond the end of the set */
        close(fd);
        errno = EMFILE;
        return -1;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (type == SOCK_STREAM)    /* each side waits for the other: send at once, do not wait for more to send */
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
    struct timeval timeout;     /* set before each call: Linux's select() counts it down */

    timeout.tv_sec = (time_t)(left / 1000);
    timeout.tv_usec = (suseconds_t)(left % 1000 * 1000);
    if (select(top + 1, readable, writable, NULL, &timeout) <= 0) {
        FD_ZERO(readable);      /* a signal or the time-out: the sets mean nothing */
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

/* ==== Random numbers ===================================================== */

/* Fills `octets` with numbers that nobody can guess.  False: this system has
 * none to give.  Nothing is kept for later, so a child of fork() never repeats
 * what its parent used. */
static bool get_random(unsigned char *octets, size_t size)
{
    int fd = open("/dev/urandom", O_RDONLY);
    ssize_t got;

    if (fd < 0)
        return false;
    got = read(fd, octets, size);
    close(fd);
    return got == (ssize_t)size;
}

/* ==== Packets ============================================================ */

/* A place in an answer.  All of an answer is read through get(), get_name() and
 * get_record(), which never pass the end of what was received.  Once one of them
 * would have to, `bad` stays set. */
struct cursor {
    const unsigned char *bytes;
    size_t size, at;
    bool bad;
};

/* Reads a number of `octets` octets, the most significant first. */
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

/* Appends a label of `length` octets, which the cursor stands at, to a name.
 * Names reach logs and files, so an octet that is not printable, or that would
 * pass for the dot between two labels, becomes '?': no host has such a name. */
static void get_label(struct cursor *c, size_t length, char name[DNS_NAME_SIZE])
{
    size_t used = strlen(name), dot = used > 0 ? 1 : 0;

    if (length > LABEL_LIMIT || length > c->size - c->at || used + dot + length > NAME_LIMIT) {
        c->bad = true;
        return;
    }
    if (used > 0)
        name[used++] = '.';
    for (; length > 0; length--) {
        unsigned char octet = c->bytes[c->at++];

        name[used++] = octet > ' ' && octet < 0x7F && octet != '.' ? (char)octet : '?';
    }
    name[used] = '\0';
}

/* Reads a name and undoes its compression (RFC 1035 4.1.4).  A pointer must lead
 * to before the start of the piece of the name that it ends, so there is no loop;
 * and a name may have few of them, so that a long ladder of pointers, walked for
 * each of many records, costs little time. */
static void get_name(struct cursor *c, char name[DNS_NAME_SIZE])
{
    size_t piece = c->at, behind = 0, pointers = 0, length;

    name[0] = '\0';
    while (!c->bad && (length = get(c, 1)) > 0) {
        if (length >= 0xC0) {
            size_t target = (length & 0x3F) << 8 | get(c, 1);

            if (behind == 0)
                behind = c->at;         /* what follows the name follows its first pointer */
            if (target >= piece || ++pointers > POINTER_LIMIT)
                c->bad = true;
            else
                piece = c->at = target;
        } else {
            get_label(c, length, name);
        }
    }
    if (c->bad)
        name[0] = '\0';
    else if (behind != 0)
        c->at = behind;
}

/* A resource record (RFC 1035 4.1.3).  Its time to live is left out: nothing is
 * cached. */
struct resource {
    char owner[DNS_NAME_SIZE];
    unsigned long type, class;
    struct cursor data;     /* stands at the data, and ends with the packet: a name there may point back */
    size_t size;            /* octets of data */
};

/* Reads a record and moves behind it.  False: there is no whole record here. */
static bool get_record(struct cursor *c, struct resource *r)
{
    get_name(c, r->owner);
    r->type = get(c, 2);
    r->class = get(c, 2);
    get(c, 4);
    r->size = get(c, 2);
    if (c->bad || r->size > c->size - c->at) {
        c->bad = true;
        return false;
    }
    r->data = *c;
    c->at += r->size;
    return true;
}

static size_t put16(unsigned char *out, unsigned value)
{
    out[0] = (unsigned char)(value >> 8);
    out[1] = (unsigned char)value;
    return 2;
}

/* Writes a name without compression.  Returns its size; 0: no name can be so. */
static size_t put_name(unsigned char *out, const char *name)
{
    size_t n = 0;

    if (strlen(name) > NAME_LIMIT)
        return 0;
    while (*name != '\0') {
        size_t length = strcspn(name, ".");

        if (length == 0 || length > LABEL_LIMIT)
            return 0;
        out[n++] = (unsigned char)length;
        memcpy(out + n, name, length);
        n += length;
        name += length;
        if (*name == '.')
            name++;
    }
    out[n++] = 0;
    return n;
}

/* Writes a query (RFC 1035 4.1).  Returns its size; 0: no name can be so. */
static size_t put_query(unsigned char out[QUERY_SIZE], unsigned id, const char *name, enum dns_type type, bool edns)
{
    size_t n = 0, name_size;

    n += put16(out + n, id);
    n += put16(out + n, 0x0100);        /* a query; recursion desired */
    n += put16(out + n, 1);             /* one question, */
    n += put16(out + n, 0);
    n += put16(out + n, 0);
    n += put16(out + n, edns ? 1 : 0);  /* and the OPT record in the additional section */
    name_size = put_name(out + n, name);
    if (name_size == 0)
        return 0;
    n += name_size;
    n += put16(out + n, type);
    n += put16(out + n, CLASS_IN);
    if (edns) {                         /* RFC 6891 6.1.2: root, OPT, the size, no flags, no data */
        static const unsigned char opt[] = { 0, 0, 41, UDP_SIZE >> 8, UDP_SIZE & 255, 0, 0, 0, 0, 0, 0 };

        memcpy(out + n, opt, sizeof opt);
        n += sizeof opt;
    }
    return n;
}

/* ==== Answers ============================================================ */

/* A query under way.  In `failed` and `plain`, bit i stands for server i. */
struct flight {
    struct dns_query *query;
    char name[DNS_NAME_SIZE];   /* the name to ask for now: that of the query, or a CNAME's target */
    int fd;                     /* the socket of the try under way, or -1 */
    unsigned id;                /* the id of the try under way */
    bool edns;                  /* the try under way carries an OPT record */
    size_t server;              /* the server that is asked in the try under way: its index */
    unsigned tries;             /* tries for this name that got no usable answer */
    unsigned failed;            /* servers that have no usable answer for this name */
    unsigned plain;             /* servers to ask without OPT */
    unsigned links;             /* CNAMEs followed */
    bool spoiled;               /* a record of the answer was malformed */
    bool done;                  /* the query has its status */
    int64_t deadline;           /* when the try under way ends */
    int64_t end;                /* when the whole call ends */
};

/* What an answer means for its flight. */
enum verdict {
    NOT_OURS,       /* it answers another question, or a forger sent it: wait on */
    FINISHED,       /* the query has its status */
    RENAMED,        /* it ends with a CNAME: ask for f->name, its target */
    NO_EDNS,        /* the server may dislike the OPT record: ask it without */
    TRUNCATED,      /* ask over TCP */
    BROKEN          /* the server has no usable answer: ask another */
};

/* The flags and codes of a header: RFC 1035 4.1.1. */
enum { RESPONSE = 0x8000, OPCODE = 0x7800, AA = 0x0400, TC = 0x0200, RCODE = 0x000F };
enum { NOERROR = 0, FORMERR = 1, SERVFAIL = 2, NXDOMAIN = 3, NOTIMP = 4, REFUSED = 5 };

struct head {
    unsigned long id, flags, rcode;
    unsigned long questions, answers, authorities;      /* how many records each section has */
};

static enum verdict broken(struct flight *f, const char *why)
{
    f->query->count = 0;
    f->query->why = why;
    return BROKEN;
}

static enum verdict finished(struct flight *f, enum dns_status status)
{
    f->query->status = status;
    return FINISHED;
}

/* Reads the data of a record of the type asked for.  False: it is malformed. */
static bool read_data(enum dns_type type, const struct resource *r, struct dns_record *record)
{
    struct cursor data = r->data;

    memset(record, 0, sizeof *record);
    if (type == DNS_MX) {
        record->preference = (unsigned)get(&data, 2);
        get_name(&data, record->name);
        return !data.bad && data.at == r->data.at + r->size;
    }
    if (r->size != (type == DNS_A ? 4 : 16))
        return false;
    address_set(&record->address, data.bytes + data.at, r->size, 0);
    return true;
}

/* Adds a record to the query's answer, which is sorted by preference, and in
 * which the first come first among equals. */
static void add_record(struct dns_query *q, const struct dns_record *record)
{
    size_t at = q->count;

    while (at > 0 && q->records[at - 1].preference > record->preference)
        at--;
    if (at >= DNS_RECORDS)
        return;
    if (q->count == DNS_RECORDS)
        q->count--;             /* the least preferred makes room */
    memmove(&q->records[at + 1], &q->records[at], (q->count - at) * sizeof *record);
    q->records[at] = *record;
    q->count++;
}

/* Reads the `count` records of the answer section at `c` once: takes those that
 * f->name has of the type asked for.  Leaves in `target` what a CNAME of f->name
 * says; "" where there is none. */
static void scan_answers(struct flight *f, struct cursor *c, unsigned long count, char target[DNS_NAME_SIZE])
{
    struct dns_record record;
    struct resource r;

    f->query->count = 0;
    f->spoiled = false;
    target[0] = '\0';
    while (count-- > 0 && get_record(c, &r)) {
        if (r.class != CLASS_IN || strcasecmp(r.owner, f->name) != 0)
            continue;
        if (r.type == TYPE_CNAME) {
            get_name(&r.data, target);
            f->spoiled = f->spoiled || r.data.bad;
        } else if (r.type == (unsigned long)f->query->type) {
            if (read_data(f->query->type, &r, &record))
                add_record(f->query, &record);
            else
                f->spoiled = true;
        }
    }
}

/* Reads the authority section at `c`.  True: it names other servers to ask, and
 * says nothing about the name: NS records, and no SOA record (RFC 2308 2.2). */
static bool is_referral(struct cursor *c, unsigned long count)
{
    struct resource r;
    bool ns = false, soa = false;

    while (count-- > 0 && get_record(c, &r)) {
        ns = ns || r.type == TYPE_NS;
        soa = soa || r.type == TYPE_SOA;
    }
    return ns && !soa;
}

/* Reads the answer section, which begins at `answers`, along the CNAMEs in it,
 * and the authority section where no record answers the question. */
static enum verdict read_records(struct flight *f, const struct head *head, const struct cursor *answers)
{
    char target[DNS_NAME_SIZE];
    bool moved = false, referral;
    struct cursor c;

    for (;;) {
        c = *answers;
        scan_answers(f, &c, head->answers, target);
        /* A malformed record spoils only itself, unless there is no good one. */
        if (c.bad || (f->spoiled && f->query->count == 0))
            return broken(f, "malformed answer from the name server");
        if (f->query->count > 0)
            return finished(f, DNS_FOUND);
        if (target[0] == '\0')
            break;
        if (++f->links > CHAIN_LIMIT) {
            f->query->why = "too many CNAMEs in a row";
            return finished(f, DNS_FAILED);
        }
        strcpy(f->name, target);
        moved = true;
    }
    if (head->rcode == NXDOMAIN)
        return finished(f, DNS_NXDOMAIN);
    if (moved)
        return RENAMED;
    /* RFC 2308 2.2: no relevant answer means that the name has no such record,
     * whatever AA and RA say, except where the server refers to others. */
    referral = is_referral(&c, head->authorities);
    if (c.bad)
        return broken(f, "malformed answer from the name server");
    if (referral && (head->flags & AA) == 0)
        return broken(f, "the name server only refers to others: it does not recurse");
    return finished(f, DNS_NODATA);
}

/* Whether the question at `c` is the one that the flight asks. */
static bool is_same_question(const struct flight *f, struct cursor *c)
{
    char name[DNS_NAME_SIZE];
    unsigned long type, class;

    get_name(c, name);
    type = get(c, 2);
    class = get(c, 2);
    return !c->bad && type == (unsigned long)f->query->type && class == CLASS_IN && strcasecmp(name, f->name) == 0;
}

static const char *rcode_text(unsigned long rcode)
{
    if (rcode == SERVFAIL)
        return "the name server answers SERVFAIL";
    if (rcode == REFUSED)
        return "the name server answers REFUSED";
    return "the name server answers with an error";
}

static enum verdict read_answer(struct flight *f, const unsigned char *bytes, size_t size)
{
    struct cursor c = { bytes, size, 0, false };
    struct head head;

    head.id = get(&c, 2);
    head.flags = get(&c, 2);
    head.rcode = head.flags & RCODE;
    head.questions = get(&c, 2);
    head.answers = get(&c, 2);
    head.authorities = get(&c, 2);
    get(&c, 2);             /* the additional section: other names' records, which are not believed */
    if (c.bad || head.id != f->id || (head.flags & (RESPONSE | OPCODE)) != RESPONSE)
        return NOT_OURS;
    if (head.questions == 1) {
        if (!is_same_question(f, &c))
            return NOT_OURS;
    } else if (head.questions != 0 || (head.rcode != FORMERR && head.rcode != NOTIMP)) {
        return NOT_OURS;    /* only a server that cannot read the question may leave it out */
    }
    if (head.flags & TC)
        return TRUNCATED;
    if (head.rcode == NOERROR || head.rcode == NXDOMAIN)
        return read_records(f, &head, &c);
    /* A server that does not know OPT says FORMERR or NOTIMP (RFC 6891 7), and
     * some say SERVFAIL or REFUSED.  Without OPT they may well answer. */
    if (f->edns)
        return NO_EDNS;
    return broken(f, rcode_text(head.rcode));
}

/* ==== Asking ============================================================= */

/* Gives the socket the port that `secret`, 0 to 65535, leads to, or the next free
 * one.  The kernel would choose a port too, but not every kernel chooses at
 * random. */
static void bind_random_port(int fd, const union address *to, unsigned secret)
{
    union address from;

    memset(&from, 0, sizeof from);
    from.sa.sa_family = to->sa.sa_family;
    for (unsigned i = 0; i < 10; i++) {
        address_set_port(&from, 1024 + (secret + i) % (65536 - 1024));
        if (bind(fd, &from.sa, address_size(&from)) == 0)
            return;
    }
}

static void end_flight(struct flight *f, enum dns_status status)
{
    f->query->status = status;
    f->done = true;
}

/* Opens a socket for the query and sends it.  The socket is connected, so that
 * the kernel keeps away what comes from any other address or port.  Returns the
 * socket, or -1: this server cannot even be asked. */
static int send_packet(const union address *server, unsigned secret, const unsigned char *query, size_t size)
{
    int fd = socket_open(server, SOCK_DGRAM);

    if (fd < 0)
        return -1;
    bind_random_port(fd, server, secret);
    if (connect(fd, &server->sa, address_size(server)) == 0 && send(fd, query, size, 0) == (ssize_t)size)
        return fd;
    close(fd);
    return -1;
}

/* Begins a try: sends the query to the server whose turn it is, from a new port
 * and with a new id. */
static void send_query(struct flight *f, const struct nameservers *servers)
{
    unsigned char query[QUERY_SIZE], secret[4];
    size_t size;

    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
    if (!get_random(secret, sizeof secret)) {   /* to guess the id and the port is to forge the answer */
        f->query->why = "cannot read /dev/urandom, without which answers could be forged";
        end_flight(f, DNS_FAILED);
        return;
    }
    f->id = (unsigned)secret[0] << 8 | secret[1];
    f->server = f->tries % servers->count;
    f->edns = (f->plain & 1u << f->server) == 0;
    size = put_query(query, f->id, f->name, f->query->type, f->edns);
    if (size == 0) {
        end_flight(f, DNS_NXDOMAIN);
        return;
    }
    f->fd = send_packet(&servers->server[f->server], (unsigned)secret[2] << 8 | secret[3], query, size);
    f->deadline = clock_ms() + ((int64_t)FIRST_WAIT << f->tries / servers->count);
    if (f->fd < 0)
        f->deadline = 0;        /* try the next server at once */
    else if (f->deadline > f->end)
        f->deadline = f->end;
}

/* Ends a try without a usable answer, and begins the next one.  The server is
 * asked without OPT from now on: it, or a firewall before it, may drop queries
 * that have one. */
static void try_next(struct flight *f, const struct nameservers *servers)
{
    f->plain |= 1u << f->server;
    f->tries++;
    if (f->tries >= servers->count * ROUNDS || f->failed == (1u << servers->count) - 1 || clock_ms() >= f->end)
        end_flight(f, DNS_FAILED);
    else
        send_query(f, servers);
}

/* Reads or writes exactly `size` octets.  False: the connection broke, or
 * clock_ms() has reached the deadline. */
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

/* Sends a query over the TCP socket and reads the answer: each message has two
 * octets of length before it (RFC 1035 4.2.2).  Returns the answer's size; 0:
 * there is none. */
static size_t ask_stream(int fd, unsigned char *query, size_t size, unsigned char answer[ANSWER_SIZE], int64_t deadline)
{
    unsigned char length[2];

    if (!transfer(fd, true, query, size, deadline) || !transfer(fd, false, length, sizeof length, deadline))
        return 0;
    size = (size_t)length[0] << 8 | length[1];
    return transfer(fd, false, answer, size, deadline) ? size : 0;
}

/* Asks the same question over TCP.  The other flights wait meanwhile, because
 * truncation is rare.  Returns the answer's size; 0: there is none. */
static size_t ask_over_tcp(const struct flight *f, const union address *server, unsigned char answer[ANSWER_SIZE])
{
    unsigned char query[2 + QUERY_SIZE];
    int64_t deadline = clock_ms() + TCP_WAIT < f->end ? clock_ms() + TCP_WAIT : f->end;
    size_t size = put_query(query + 2, f->id, f->name, f->query->type, f->edns);
    int fd = socket_open(server, SOCK_STREAM);

    if (fd < 0)
        return 0;
    put16(query, (unsigned)size);
    if (connect(fd, &server->sa, address_size(server)) == 0 || errno == EINPROGRESS)
        size = ask_stream(fd, query, 2 + size, answer, deadline);
    else
        size = 0;
    close(fd);
    return size;
}

/* Reads one packet from the flight's socket, which is readable, and does what
 * the packet asks for. */
static void receive(struct flight *f, const struct nameservers *servers)
{
    static unsigned char answer[ANSWER_SIZE];
    ssize_t got = recv(f->fd, answer, sizeof answer, 0);
    enum verdict verdict;

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got < 0)            /* an ICMP message: nobody listens at that port */
        verdict = broken(f, "the name server does not answer");
    else
        verdict = read_answer(f, answer, (size_t)got);
    if (verdict == TRUNCATED) {
        size_t size = ask_over_tcp(f, &servers->server[f->server], answer);

        verdict = read_answer(f, answer, size);
        if (verdict == TRUNCATED || verdict == NOT_OURS)
            verdict = broken(f, "the name server truncates its answer and is not to be had over TCP");
    }
    switch (verdict) {
    case FINISHED:
        f->done = true;
        break;
    case RENAMED:
        f->tries = f->failed = 0;
        send_query(f, servers);
        break;
    case NO_EDNS:
        f->plain |= 1u << f->server;
        send_query(f, servers);
        break;
    case BROKEN:
        f->failed |= 1u << f->server;
        try_next(f, servers);
        break;
    default:                /* another packet may be the answer */
        break;
    }
}

/* Waits once for all flights, and serves those that can go on.  False: all are
 * done. */
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
            watch_fd(f->fd, &set, &top);
    }
    if (!flying)
        return false;
    wait_sets(top, &set, &none, first);
    now = clock_ms();       /* one time for all: what a flight spends on TCP is not taken from the others */
    for (struct flight *f = flights; f < flights + count; f++) {
        if (f->done)
            continue;
        if (f->fd >= 0 && FD_ISSET(f->fd, &set))
            receive(f, servers);
        if (!f->done && now >= f->deadline)     /* even after a packet: a flood of forgeries gains no time */
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
        f->end = end;
        if (strlen(f->query->name) > NAME_LIMIT) {
            end_flight(f, DNS_NXDOMAIN);    /* no name is so long */
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

/* ==== Name servers ======================================================= */

/* The index of an interface that is given by its name or by its number (RFC
 * 4007 11.2).  0: there is no such interface. */
static unsigned interface_index(const char *zone)
{
    char name[IF_NAMESIZE], *end;
    unsigned long number = strtoul(zone, &end, 10);
    unsigned index = if_nametoindex(zone);

    if (index == 0 && *zone >= '0' && *zone <= '9' && *end == '\0' && number <= UINT_MAX
        && if_indextoname((unsigned)number, name) != NULL)
        index = (unsigned)number;
    return index;
}

const char *nameserver_parse(const char *text, union address *a)
{
    char host[DNS_NAME_SIZE], *zone;
    unsigned port;

    if (!endpoint_parse(text, DNS_PORT, host, &port))
        return "not an address";
    zone = strchr(host, '%');
    if (zone != NULL)
        *zone++ = '\0';
    if (!address_parse(host, port, a) || (zone != NULL && a->sa.sa_family != AF_INET6))
        return "not an address";
    if (zone != NULL) {
        a->in6.sin6_scope_id = interface_index(zone);
        if (a->in6.sin6_scope_id == 0)
            return "there is no such interface";
    } else if (a->sa.sa_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&a->in6.sin6_addr)) {
        return "a link-local address needs its interface, as in fe80::1%eth0";
    }
    return NULL;
}

/* Adds what a nameserver line names to the servers, or says why not. */
static void add_server(struct nameservers *servers, const char *text)
{
    size_t used = strlen(servers->passed_over);
    union address a;
    const char *why = nameserver_parse(text, &a);

    if (why == NULL && servers->count == NAMESERVERS)
        why = "three are enough";
    if (why == NULL)
        servers->server[servers->count++] = a;
    else
        snprintf(servers->passed_over + used, sizeof servers->passed_over - used, "%s%.80s (%s)",
            used > 0 ? ", " : "", text, why);
}

void dns_servers(const char *path, struct nameservers *servers)
{
    static const char blanks[] = " \t\r\n";
    FILE *file = fopen(path, "r");
    char piece[256];            /* of a line, which may be longer */
    bool begins_line = true;

    if (file == NULL && servers->count > 0)
        return;
    memset(servers, 0, sizeof *servers);
    while (file != NULL && fgets(piece, sizeof piece, file) != NULL) {
        bool ends_line = strchr(piece, '\n') != NULL;
        const char *word = begins_line ? strtok(piece, blanks) : NULL;

        begins_line = ends_line;
        if (word == NULL || strcmp(word, "nameserver") != 0)
            continue;
        word = strtok(NULL, blanks);
        add_server(servers, word != NULL ? word : "nothing");
    }
    if (file != NULL)
        fclose(file);
    if (servers->count == 0) {      /* as libc does: the resolver on this host */
        address_parse("127.0.0.1", DNS_PORT, &servers->server[0]);
        servers->count = 1;
    }
}

#ifdef DNS_MAIN
/* Prints what came of a query: a line for each record, or why there is none. */
static void print_query(const struct dns_query *q, const char *type)
{
    static const char *const words[] = { "found", "no such record", "no such name", "failed" };
    char text[ADDRESS_TEXT];

    if (q->status == DNS_FAILED)
        printf("%-4s failed: %s\n", type, q->why);
    else if (q->status != DNS_FOUND)
        printf("%-4s %s\n", type, words[q->status]);
    for (size_t i = 0; i < q->count; i++)
        if (q->type == DNS_MX)
            printf("%-4s %u %s\n", type, q->records[i].preference, q->records[i].name[0] ? q->records[i].name : ".");
        else
            printf("%-4s %s\n", type, address_text(&q->records[i].address, text));
}

/* The resolver by itself: prints a name's exchangers and addresses. */
int main(int argc, char **argv)
{
    static const enum dns_type types[] = { DNS_MX, DNS_A, DNS_AAAA };
    static const char *const type_names[] = { "MX", "A", "AAAA" };
    static struct dns_query queries[3];
    static struct nameservers servers;

    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: dns name [nameserver[:port]]\n");
        return 2;
    }
    if (argc == 3) {
        const char *why = nameserver_parse(argv[2], &servers.server[0]);

        if (why != NULL) {
            fprintf(stderr, "dns: %s: %s\n", argv[2], why);
            return 2;
        }
        servers.count = 1;
    } else {
        dns_servers("/etc/resolv.conf", &servers);
        if (servers.passed_over[0] != '\0')
            fprintf(stderr, "dns: passed over in /etc/resolv.conf: %s\n", servers.passed_over);
    }
    for (int i = 0; i < 3; i++) {
        queries[i].name = argv[1];
        queries[i].type = types[i];
    }
    dns_ask(&servers, queries, 3, INT64_MAX);
    for (int i = 0; i < 3; i++)
        print_query(&queries[i], type_names[i]);
    return 0;
}
#endif
