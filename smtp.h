/*
 * smtp.h - all that the three files know of each other.
 *
 *   smtp.c      the server: options, listening, the select() loop, the dialogue
 *   forward.c   everything after the final dot: the spool and the way out
 *   dns.c       names to addresses
 *
 * Calls run one way, smtp.c to forward.c to dns.c.  Shared back are only the
 * log, die(), the line reader and the settings, which do not change once the
 * loop runs.  Every file includes this header first, so that the feature
 * macros below come before any system header.
 */
#ifndef SMTP_H
#define SMTP_H

#define _XOPEN_SOURCE 700       /* POSIX.1-2008 with its XSI part, to which SIGXFSZ belongs */
#define _FILE_OFFSET_BITS 64    /* where it matters: files over 2 GiB ... */
#define _TIME_BITS 64           /* ... and dates after 2038 on 32 bits */
#define _ATFILE_SOURCE 1        /* illumos shows utimensat() and futimens() only so */

#include <sys/types.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <netinet/in.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define VERSION "0.1"

/* ---- sizes ------------------------------------------------------------- */

enum {
    PATH_LIMIT = 256,       /* octets of a path, its < and > included: RFC 5321 4.5.3.1.3 */
    DOMAIN_LIMIT = 255,     /* octets of a domain: 4.5.3.1.2 */
    LABEL_LIMIT = 63,       /* octets of one of its labels: RFC 1035 2.3.4 */
    RECIPIENT_LIMIT = 1000, /* RCPTs in a transaction: 4.5.3.1.8 asks for 100 */
    IDLES = 12,             /* a client has this many times -t to complete a transaction */
    ID_SIZE = 48,           /* a message's name in the spool, with its NUL */
    REPLY_SIZE = 512,       /* one reply, made a single line, with its NUL */
    DATE_SIZE = 64,         /* a date as text, with its NUL */
    ADDRESS_TEXT = INET6_ADDRSTRLEN
};

/* ---- settings: written by main(), read by all -------------------------- */

/* An address and port of either family, in place of casts. */
union address {
    struct sockaddr sa;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
};

struct network {
    union address base;
    unsigned bits;          /* how many leading bits count */
};

struct networks {
    struct network *list;   /* `count` of them */
    size_t count;
};

enum { NAMESERVERS = 3 };

struct nameservers {
    union address server[NAMESERVERS];
    size_t count;           /* 1 or more whenever they are to be asked */
    char passed_over[256];  /* the servers in resolv.conf that are not asked, and why; or "" */
};

/* Whether mail goes to exchangers by TLS. */
enum tls {
    TLS_NEVER,
    TLS_MAY,        /* if the exchanger offers it and it works; else in plain */
    TLS_MUST,       /* by TLS or not at all */
    TLS_VERIFIED    /* the same, with a certificate that proves the exchanger's name */
};

enum { SECRET_SIZE = 256 };     /* a name or password for a smarthost, with its NUL */

struct settings {
    const char *hostname;           /* -h: what we call ourselves */
    const char *spool;              /* -q: absolute path of the spool */
    const char *postmaster;         /* -M: where <Postmaster> goes */
    struct networks allowed;        /* -a: clients that may relay */
    struct networks proxies;        /* -X: proxies that name the client they speak for */
    const char **domains;           /* -d: the `domain_count` domains that mail is taken for; none: all */
    size_t domain_count;
    long per_address;               /* -c: connections from one client address at once, 0 for any number */
    const union address *listening; /* what we accept connections on */
    size_t listening_count;
    struct nameservers nameservers; /* -n; if there are none, those of resolv.conf are asked */
    const char *smarthost;          /* -s: its name or address, or NULL */
    unsigned smarthost_port;
    enum tls tls;                   /* -T; -A and -S make it TLS_VERIFIED */
    bool tls_first;                 /* -S: TLS begins before SMTP does (RFC 8314) */
    char user[SECRET_SIZE];         /* -A: our name at the smarthost, or "" ... */
    char password[SECRET_SIZE];     /* ... and the password for it */
    unsigned mx_port;               /* -P: where exchangers listen */
    union address sources[2];       /* -b: the addresses that we connect to exchangers from, at most one of a family */
    size_t source_count;            /* 0: any address; 1: only exchangers of its family are used */
    unsigned long long max_size;    /* -m: octets in a message, 0 for any */
    long idle;                      /* -t: seconds of silence from a client */
    long retry, expire;             /* -r, -e: seconds */
    long wait;                      /* -w: longest step with an exchanger, in seconds; 0: RFC 5321's times */
    long forwarders;                /* -j: how many processes forward at once */
    bool verbose;                   /* -v: log both dialogues */
};

extern struct settings settings;

/* ---- smtp.c: the log and the line reader ------------------------------- */

/* Writes one line to stderr, in one write(), and never waits: a line that would have to
 * wait is dropped, and the next line that can be written is preceded by one that counts
 * the dropped ones.  A line is cut at 2,047 octets, or at PIPE_BUF where that is less.
 * Control and 8-bit characters become '?', so that no client can forge a line. */
void logmsg(const char *format, ...);

/* Logs like logmsg(), with errno's text at the end if errno is not 0, and exits with
 * status 1.  Only for a process that cannot go on. */
void die(const char *format, ...);

struct line {
    size_t length;  /* octets of text, the line end left out */
    size_t used;    /* octets to consume, line end included; 0: the line end has not come yet */
    bool bare;      /* the text holds a bare CR or LF */
};

/* Finds the first line in the `size` octets at `bytes`, by the one rule for line ends
 * (RFC 5321 2.3.8): a line ends at CRLF, and a CR or LF by itself is a fault in the
 * text, never an end.  In an `lf` session an LF ends the line, with a CR before it or
 * without.  If the line end has not come yet, all octets are its text, except a CR at
 * the very end, which may be the first half of a CRLF. */
struct line next_line(const char *bytes, size_t size, bool lf);

/* ---- forward.c: dates --------------------------------------------------- */

/* Writes `when` into `text` as a date for a message (RFC 5322 3.3), in UTC and in
 * English, and returns `text`. */
const char *mail_date(char text[DATE_SIZE], time_t when);

/* ---- forward.c: secrets ------------------------------------------------- */

/* Overwrites a secret that is not needed any more. */
void wipe(void *memory, size_t size);

/* ---- forward.c: drafts, the messages that are still being received ----- */

struct draft {
    int fd;             /* its file in tmp/, or -1 */
    int error;          /* errno of the first write that failed: sticky */
    char id[ID_SIZE];   /* its name here, in queue/, in the log and in the 250 */
};

/* Makes the spool if it is missing (root makes it for `owner`), and makes it this
 * process's working directory.  Dies with the reason if that fails. */
void spool_enter(uid_t owner, gid_t group);

/* Checks that no other user may write to the spool, makes tmp/ and queue/, takes the
 * lock that keeps a second server out, and writes this process's pid into the lock file.
 * Returns the file's descriptor, which has to stay open.  Dies with the reason if any of
 * this fails. */
int spool_take(void);

/* Empties the lock file when the server ends: its pid may become another process's. */
void spool_release(int lock_fd);

/* Opens an empty draft, named after the time and the client's `port`.  False: there is
 * no room or no descriptor for it, and d->error is the errno. */
bool draft_open(struct draft *d, unsigned port);

/* Appends to the draft.  After a failure, which is kept in d->error, further calls do
 * nothing. */
void draft_add(struct draft *d, const char *bytes, size_t size);

/* Closes the draft and removes its file. */
void draft_drop(struct draft *d);

/* Closes this process's descriptor of the draft and leaves the file, which belongs to
 * another process now. */
void draft_forget(struct draft *d);

/* The reply for a draft that failed with `error`: 452 or 451, without line end. */
const char *draft_refusal(int error);

/* ---- forward.c: name servers --------------------------------------------- */

/* Reads resolv.conf, unless -n names the servers, and logs which of its nameserver lines
 * are passed over, and why; but not if this process, or its parent before the fork, has
 * logged the same before. */
void check_resolv_conf(void);

/* ---- forward.c: what runs in a child ------------------------------------ */

/* How many of the -j slots are for fresh mail, forwarded at once by the child that has
 * stored it.  The others are for the queue manager's batches. */
long fresh_slots(void);

/* Returns the lane of mail for this domain: a hash of the domain's name, or 0 for all
 * domains if there is a smarthost.  Mail for one destination is one lane, and the number
 * of forwarders in a lane is bounded. */
uint32_t lane_of(const char *domain);

/* Turns a draft into a durable message of the queue (it is locked, synced and renamed,
 * and the directory is synced) and writes the client's reply to `reply_fd`: "250 ..." or
 * "45x ...", with a newline.  Returns whether the message was stored. */
bool draft_store(struct draft *d, int reply_fd);

/* Tries once to forward a message that draft_store() has stored, and exits.  `company`:
 * other children of the server are forwarding in this lane now.  If the exchanger has no
 * room for another connection, the message is handed over to the queue manager. */
void draft_forward(const struct draft *d, uint32_t lane, bool company, int due_fd);

/* Hands a message that draft_store() has stored over to the queue manager, by the due
 * pipe, whose write end is `due_fd`; closes the draft, and so gives up its lock. */
void draft_hand_over(const struct draft *d, uint32_t lane, int due_fd);

/* One line on the due pipe: an id and its lane, in hexadecimal.  Shorter than
 * _POSIX_PIPE_BUF (512 octets), so that lines of several writers never mix. */
#define DUE_FORMAT "%s %08lx\n"
enum { DUE_SIZE = ID_SIZE + 10 };

/* Runs the queue manager, and never returns: while process `server` lives, it forwards
 * the messages whose ids come over `due_fd` and those that are due in queue/, in batches,
 * and removes the drafts that a crash left in tmp/.  SIGHUP makes everything due. */
void manage_queue(int due_fd, pid_t server);

/* smtp -l: prints the messages of the queue; if there are `words` (up to a NULL), only
 * those with one of them in the id, the sender or a recipient.  Returns the exit status. */
int list_queue(char **words);

/* ---- dns.c: sockets and waiting ---------------------------------------- */

/* Milliseconds by a clock that nobody sets: for time-outs. */
int64_t clock_ms(void);

/* Seconds since 1970: for dates.  On Linux, time() may lag by a tick, and so show the
 * second before the one that a file was just stamped with; this does not. */
time_t wall_clock(void);

/* Opens a socket of `type`, for the family of `to`, that never blocks and is small
 * enough for an fd_set.  Returns -1, with errno set, where there is none. */
int socket_open(const union address *to, int type);

/* Adds `fd` to a set, and raises `top`, the highest descriptor of all sets, to it. */
void watch_fd(int fd, fd_set *set, int *top);

/* Waits by select(), but not beyond `deadline` by clock_ms().  The sets then hold the
 * descriptors that are ready: none if the time is over or a signal came. */
void wait_sets(int top, fd_set *readable, fd_set *writable, int64_t deadline);

/* Waits until `fd` can be read, or written where `writing`.  False: clock_ms() has
 * reached `deadline`. */
bool wait_ready(int fd, bool writing, int64_t deadline);

/* ---- dns.c: names to addresses ----------------------------------------- */

enum { DNS_NAME_SIZE = 256, DNS_RECORDS = 20, DNS_QUERIES = 40 };

enum dns_type { DNS_A = 1, DNS_MX = 15, DNS_AAAA = 28 };

enum dns_status {
    DNS_FOUND,      /* records[0..count-1] hold the answer */
    DNS_NODATA,     /* the name exists, but has no record of this type */
    DNS_NXDOMAIN,   /* the name does not exist */
    DNS_FAILED      /* no usable answer now: silence, SERVFAIL, a referral, garbage */
};

struct dns_record {
    unsigned preference;        /* MX: the lowest is tried first */
    char name[DNS_NAME_SIZE];   /* MX: the exchanger; "" is the root */
    union address address;      /* A, AAAA: with port 0 */
};

struct dns_query {
    const char *name;           /* in: without a final dot; belongs to the caller */
    enum dns_type type;         /* in */
    enum dns_status status;     /* out */
    const char *why;            /* out, where DNS_FAILED: a constant text */
    size_t count;               /* out: how many records; MX records are sorted, the most preferred are kept */
    struct dns_record records[DNS_RECORDS];
};

/* Asks all `count` (at most DNS_QUERIES) queries at once and returns when each has
 * its status: as a rule after milliseconds; where no server answers, after 14
 * seconds for each server; after a minute at most, or when clock_ms() reaches
 * `deadline`.
 *
 * RFC 1035 over UDP, with EDNS0 (RFC 6891); over TCP, for 5 seconds at most,
 * where an answer is truncated.  A server that answers a query with an error code
 * is asked once more, at once, without EDNS0; and after a try in vain, without it
 * in the next round.  Each try has a new socket, port and id.  Where the system
 * has no random numbers for them, nothing is asked: DNS_FAILED. */
void dns_ask(const struct nameservers *servers, struct dns_query *queries, size_t count, int64_t deadline);

/* Reads the nameserver lines of a resolv.conf; 127.0.0.1 where there is none.  A
 * file that cannot be read, such as one that is just being replaced, leaves
 * servers that are known already as they are.  The first call needs a zero
 * *servers. */
void dns_servers(const char *path, struct nameservers *servers);

/* Sets `a` from a name server's address[:port] in text; an IPv6 address may have
 * a scope, as in [fe80::1%eth0]:53 (RFC 4007 11).  Returns NULL, or why there can
 * be no such name server: a constant text. */
const char *nameserver_parse(const char *text, union address *a);

/* Sets `a` from an IPv4 or IPv6 address in text.  False: the text is none. */
bool address_parse(const char *text, unsigned port, union address *a);

/* Reads an address literal (RFC 5321 4.1.3), [192.0.2.1] or [IPv6:2001:db8::1],
 * and sets `a` from it.  Returns the place behind its ], or NULL if there is no
 * such literal at `text`. */
const char *literal_parse(const char *text, unsigned port, union address *a);

/* Splits host, host:port or [host]:port.  False: too long, or no such port. */
bool endpoint_parse(const char *text, unsigned default_port, char host[DNS_NAME_SIZE], unsigned *port);

/* Writes the address, without its port, into `text` and returns that. */
const char *address_text(const union address *a, char text[ADDRESS_TEXT]);

/* The octets of the address, 4 or 16 of them, the most significant first. */
const unsigned char *address_octets(const union address *a, size_t *count);

/* Sets `a` from the 4 or 16 octets of an address. */
void address_set(union address *a, const unsigned char *octets, size_t count, unsigned port);

/* Makes an IPv4 address of an IPv6 address that stands for one, ::ffff:192.0.2.1. */
void address_unmap(union address *a);

unsigned address_port(const union address *a);
void address_set_port(union address *a, unsigned port);
socklen_t address_size(const union address *a);

#endif
