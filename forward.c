/*
 * forward.c - everything after the final dot: the spool and the way out.
 *
 * A message is one text file: the dialogue in which it was received, ready to be
 * repeated to an exchanger, and below its final dot what became of it.
 *
 *     EHLO me.com
 *     MAIL FROM:<nour@example.org> BODY=8BITMIME
 *     RCPT TO:<a@example.net>
 *     RCPT TO:<b@example.net>
 *     DATA
 *     Received: from me.com ([127.0.0.1]:54321) by ...
 *     Subject: testing my smtp server
 *
 *     Dear Nour, This is me testing my server
 *     .
 *     2026-11-23T11:08:19Z sent <b@example.net> mx1.example.net[192.0.2.1] 250 2.0.0 Ok
 *     2026-11-23T11:08:20Z later <a@example.net> mx1.example.net[192.0.2.1] 451 4.7.1 greylisted
 *
 * All lines end with CRLF.  The body is stored as it goes over the wire, with its
 * leading dots doubled, so forwarding copies octets, and CRLF.CRLF, which is only at
 * the body's end, proves the file complete.  Nothing is ever rewritten.  A line that
 * a crash or a full disk has torn does not count: the next record ends it with
 * CR CR LF, and a line with a bare CR in it is never read as a record.  The file's
 * modification time is when the next try is due.
 *
 * The life of a message:
 *
 *   where       state                moved on by             what a crash leaves
 *   tmp/        being received       server: final dot       a stale file, for which no 250 was
 *                                    or draft_drop()         given; clear_drafts() removes it
 *   tmp/        being made durable   child: fsync, rename,   the same, or the next state,
 *                                    fsync of queue/         without a 250
 *   queue/,     owed, being tried    its forwarder, which    the lock is gone; the next try is
 *    locked                          has put the next try    due as if this one had failed
 *                                    ahead before it began
 *   queue/      owed, waiting        a batch, when due       itself
 *   none        delivered, reported  -                       -
 *               or dropped
 *
 * The forwarder's lock is an fcntl() lock on the whole file, taken before the
 * rename, so that no other process tries the message at the same time.  (If a
 * message has several domains, each is tried by a child, which locks one octet.)
 * Such locks are not inherited by fork(), and vanish when the process ends or closes
 * *any* descriptor of the file; so no process opens a message twice.
 *
 * Contents.  Each chapter calls only those above it.  To follow a message, begin with
 * draft_store(), in "The spool"; then read draft_forward(), in "Forwarders", and go
 * up from there; then manage_queue(), in "The queue manager".
 *
 *   Names and times    ids, dates, back-off, and memory
 *   The spool          drafts, and how they become durable
 *   Messages           reading a file of the queue back
 *   Outcomes           what is written below the dot
 *   Exchangers         the route: where mail for a domain goes
 *   TLS                openssl(1) between us and an exchanger
 *   The dialogue       the client's side of SMTP
 *   The race           which exchanger answers first
 *   Delivery           one message to one domain
 *   Reports            RFC 3464
 *   Forwarders         one message to all its domains
 *   The queue manager  batches of messages that are due
 *   The list           smtp -l
 */
#include "smtp.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    BLOCK = 65536,              /* octets of a message read or sent at once */
    SPOOL_LINE = 8192,          /* octets of the longest line above or below a body */
    SAID_LIMIT = 4096,          /* octets of exchangers' words on one recipient that one record holds */
    STALE = 3600,               /* seconds, beyond IDLES times -t, without growth after which a draft is removed */
    RETRY_LIMIT = 3600,         /* seconds between two tries at most */
    TRY_LIMIT = 3 * 3600,       /* seconds that a try may take ... */
    TRY_STEPS = 20,             /* ... or this many times -w: enough to connect to ten exchangers and be greeted */
    NAP_LIMIT = 60,             /* seconds between two searches of the queue at most */
    EXCHANGER_LIMIT = 10,       /* exchangers tried for a domain ... */
    ADDRESS_LIMIT = 20,         /* ... and addresses of all these */
    LABEL_SIZE = DNS_NAME_SIZE + ADDRESS_TEXT + 6,  /* name[address]/tls, with its NUL */
    GROUP_LIMIT = 100,          /* recipients in one transaction: RFC 5321 4.5.3.1.8 */
    DOMAINS_AT_ONCE = 10,       /* children that try the domains of one message */
    REPLY_LINES = 100,          /* lines in one reply of an exchanger */
    KEPT = 200,                 /* ms that a connection is kept open for the next message */
    BATCH_LIMIT = 100,          /* messages that a batch takes at most */
    BATCH_TIME = 1000,          /* ms after which a batch begins no further message */
    BATCH_GAP = 250,            /* ms between the starts of two batches of a lane that needs one at a time ... */
    BATCH_WORTH = 25,           /* ... unless this many messages wait */
    PATIENCE = 2,               /* this many batches in a row may find no room before their mail backs off */
    PIPE_MAY_BE_FULL = 4096 - DUE_SIZE,     /* if a read takes this many octets, the due pipe may have been full */
    LISTED_LIMIT = 4096,        /* due messages that the queue manager knows at once */
    HEADER_LIMIT = 32768        /* octets of the original's header in a report */
};

/* ==== Names and times ==================================================== */

/* Formats for strftime() of the dates in ids and in records, in UTC. */
#define ID_DATE "%Y%m%dT%H%M%S"
#define ISO_DATE "%Y-%m-%dT%H:%M:%SZ"
enum { ISO_DATE_LENGTH = 20 };

static const char *date_text(char text[DATE_SIZE], const char *format, time_t when)
{
    struct tm date;

    if (gmtime_r(&when, &date) == NULL || strftime(text, DATE_SIZE, format, &date) == 0)
        text[0] = '\0';         /* the year does not fit into an int */
    return text;
}

const char *mail_date(char text[DATE_SIZE], time_t when)
{
    return date_text(text, "%a, %d %b %Y %H:%M:%S +0000", when);    /* in English: no locale is ever set */
}

/* The seconds since 1970 of a date in UTC (POSIX, "Seconds Since the Epoch"). */
static time_t epoch_seconds(int year, int month, int day, int hour, int minute, int second)
{
    static const int days_before[] = { 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334 };
    bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    int64_t days = days_before[month - 1] + (leap && month > 2) + day - 1;

    days += (int64_t)(year - 1970) * 365 + (year - 1969) / 4 - (year - 1901) / 100 + (year - 1601) / 400;
    return (time_t)(((days * 24 + hour) * 60 + minute) * 60 + second);
}

/* Returns the time of the date that `text` begins with, or 0 if `text` does not begin with
 * a date in this format. */
static time_t date_seconds(const char *text, const char *format)
{
    static const char letters[] = "YmdHMS";
    int number[sizeof letters - 1] = { 0 };

    for (; *format != '\0'; format++) {
        int *n;

        if (*format != '%') {
            if (*text++ != *format)
                return 0;
            continue;
        }
        format++;
        n = &number[strchr(letters, *format) - letters];
        for (int digits = *format == 'Y' ? 4 : 2; digits > 0; digits--, text++) {
            if (*text < '0' || *text > '9')
                return 0;
            *n = *n * 10 + *text - '0';
        }
    }
    if (number[1] < 1 || number[1] > 12)
        return 0;
    return epoch_seconds(number[0], number[1], number[2], number[3], number[4], number[5]);
}

/* An id: 20261123T110819.123456-54321-1f3a, the time to the microsecond, the
 * client's port and our pid.  Within a process no two have the same time. */
static void make_id(char id[ID_SIZE], unsigned port)
{
    static int64_t last;
    struct timespec now;
    int64_t micros;
    char date[DATE_SIZE];

    clock_gettime(CLOCK_REALTIME, &now);
    micros = (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
    last = micros > last ? micros : last + 1;
    snprintf(id, ID_SIZE, "%s.%06ld-%u-%lx", date_text(date, ID_DATE, (time_t)(last / 1000000)),
        (long)(last % 1000000), port, (unsigned long)getpid());
}

/* Returns when the message with this id arrived, or 0 if this is not one of our ids. */
static time_t id_time(const char *id)
{
    if (strlen(id) >= ID_SIZE || strspn(id, "0123456789abcdefT.-") != strlen(id))
        return 0;
    return date_seconds(id, ID_DATE ".");
}

static void die_of_memory(void)
{
    die("no memory: this process ends here, its message stays in the queue");
}

static void *allocate(void *old, size_t size)
{
    void *memory = realloc(old, size);

    if (memory == NULL)
        die_of_memory();
    return memory;
}

/* Allocates an array of zeros. */
static void *allocate_array(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (memory == NULL)
        die_of_memory();
    return memory;
}

static char *copy_text(const char *text)
{
    return strcpy(allocate(NULL, strlen(text) + 1), text);
}

void wipe(void *memory, size_t size)
{
    volatile unsigned char *octets = memory;    /* volatile, or the compiler may leave these writes out */

    while (size-- > 0)
        *octets++ = 0;
}

/* Opens a stream that writes to memory.  When it is closed, *text belongs to the caller. */
static FILE *open_text(char **text, size_t *size)
{
    FILE *stream = open_memstream(text, size);

    if (stream == NULL)
        die_of_memory();
    return stream;
}

/* Calls fprintf(), which may run out of memory here, and dies if it fails: half an
 * envelope, record or report would be worse than none. */
static void put(FILE *stream, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    if (vfprintf(stream, format, arguments) < 0)
        die_of_memory();
    va_end(arguments);
}

static void close_text(FILE *stream)
{
    if (fclose(stream) != 0)
        die_of_memory();
}

/* Returns the seconds until the next try of a message of this age: the waits double. */
static int64_t back_off(int64_t age)
{
    int64_t most = settings.retry > RETRY_LIMIT ? settings.retry : RETRY_LIMIT;

    return age + settings.retry < most ? age + settings.retry : most;
}

/* Returns a message's age at its next record.  The age is the sum of the gaps between its
 * records, and each gap counts for no more than the back-off and a fifth of -e, so that a
 * clock that jumps by years does not expire the queue. */
static int64_t grow(int64_t age, time_t from, time_t to)
{
    int64_t gap = to > from ? (int64_t)to - from : 0, most = back_off(age) + settings.expire / 5;

    return age + (gap < most ? gap : most);
}

/* ==== The spool ========================================================== */

static const char *spool_path(const char *directory, const char *id)
{
    static char path[16 + ID_SIZE];

    snprintf(path, sizeof path, "%s/%.*s", directory, ID_SIZE - 1, id);
    return path;
}

/* Makes the names in a directory durable. */
static bool sync_directory(const char *name)
{
    int fd = open(name, O_RDONLY);
    bool ok = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);   /* EINVAL: this file system cannot sync directories */

    if (fd >= 0)
        close(fd);
    return ok;
}

/* Makes a directory, whose name is durable when this returns true. */
static bool make_directory(const char *name)
{
    struct stat st;

    if (mkdir(name, 0700) != 0 && errno != EEXIST)
        return false;
    if (lstat(name, &st) != 0 || !sync_directory("."))
        return false;
    errno = ENOTDIR;
    return S_ISDIR(st.st_mode);
}

void spool_enter(uid_t owner, gid_t group)
{
    static char path[4096];
    size_t length = strlen(settings.spool);
    struct stat st;
    bool made;
    int fd;

    errno = 0;
    while (length > 1 && settings.spool[length - 1] == '/')
        length--;               /* with a slash at the end, even O_NOFOLLOW follows a link */
    if ((size_t)snprintf(path, sizeof path, "%.*s", (int)length, settings.spool) >= sizeof path)
        die("the name of the spool is too long (-q names another)");
    settings.spool = path;
    made = mkdir(path, 0700) == 0;
    if (!made && errno != EEXIST)
        die("cannot make the spool %s (-q names another)", settings.spool);
    errno = 0;
    if (lstat(settings.spool, &st) == 0 && S_ISLNK(st.st_mode))
        die("the spool %s is a link: name what it leads to with -q", settings.spool);
    /* All that follows uses this descriptor, so that root gives away what was checked here. */
    fd = open(settings.spool, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (fd < 0 || fchdir(fd) != 0)
        die("cannot enter the spool %s (-q names another)", settings.spool);
    if (made && geteuid() == 0 && fchown(fd, owner, group) != 0)
        die("cannot give the spool %s to uid %ld (-q names another)", settings.spool, (long)owner);
    close(fd);
    if (made && !sync_directory("..") && errno != EACCES)   /* EACCES: we may not read the parent */
        die("cannot make the spool %s durable (-q names another)", settings.spool);
    if (getcwd(path, sizeof path) == NULL)
        die("cannot tell the spool's path");
    settings.spool = path;
}

/* Removes drafts, and sockets of openssl, that no process can be using any more. */
static void clear_drafts(void)
{
    DIR *tmp = opendir("tmp");
    struct dirent *entry;
    time_t now = wall_clock();

    while (tmp != NULL && (entry = readdir(tmp)) != NULL) {
        const char *path = spool_path("tmp", entry->d_name);
        struct stat st;

        if (id_time(entry->d_name) == 0 || lstat(path, &st) != 0 || !(S_ISREG(st.st_mode) || S_ISSOCK(st.st_mode)))
            continue;
        if (st.st_mtime < now - STALE - IDLES * settings.idle && unlink(path) == 0)
            logmsg("%s stale draft removed", entry->d_name);
    }
    if (tmp != NULL)
        closedir(tmp);
}

/* Dies if other users may write to the spool or to one of its directories (`name` is ""
 * or "/tmp"): they could put mail there, or replace mail by links. */
static void check_directory(const char *name)
{
    struct stat st;

    if (lstat(name[0] != '\0' ? name + 1 : ".", &st) != 0)
        die("cannot look at the spool %s%s", settings.spool, name);
    errno = 0;
    if (st.st_uid != geteuid())
        die("the spool %s%s belongs to uid %ld, not to uid %ld: chown it, or name another with -q",
            settings.spool, name, (long)st.st_uid, (long)geteuid());
    if ((st.st_mode & (S_IWGRP | S_IWOTH)) != 0)
        die("others may write to the spool %s%s: chmod 700 it", settings.spool, name);
}

/* Writes this process's pid into the lock file, for operators and supervisors.  If the
 * disk is full the server starts all the same, to forward what is in the queue. */
static void write_pid(int lock_fd)
{
    char text[32];
    int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());

    if (ftruncate(lock_fd, 0) != 0 || write(lock_fd, text, (size_t)n) != n)
        logmsg("cannot write the pid into %s/lock (%s)", settings.spool, strerror(errno));
}

int spool_take(void)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    int fd;

    check_directory("");
    if (!make_directory("tmp") || !make_directory("queue"))
        die("cannot make %s/tmp and %s/queue (-q names another spool)", settings.spool, settings.spool);
    check_directory("/tmp");
    check_directory("/queue");
    fd = open("lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (fd < 0)
        die("cannot open %s/lock (-q names another spool)", settings.spool);
    if (fcntl(fd, F_SETLK, &lock) != 0) {
        if (errno != EACCES && errno != EAGAIN)
            die("cannot lock %s/lock (-q names another spool)", settings.spool);
        errno = 0;
        die("another server holds the spool %s: stop it, or name another spool with -q", settings.spool);
    }
    write_pid(fd);
    return fd;
}

void spool_release(int lock_fd)
{
    if (ftruncate(lock_fd, 0) != 0)
        logmsg("cannot empty %s/lock (%s)", settings.spool, strerror(errno));
}

/* Opens a regular file of the spool, or returns -1.  It does not follow a link, nor wait
 * for a FIFO. */
static int open_message(const char *directory, const char *id, int how)
{
    int fd = open(spool_path(directory, id), how | O_NOFOLLOW | O_NONBLOCK);
    struct stat st;

    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int create_draft(const char *id)
{
    return open(spool_path("tmp", id), O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_NOFOLLOW, 0600);
}

bool draft_open(struct draft *d, unsigned port)
{
    make_id(d->id, port);
    d->error = 0;
    d->fd = create_draft(d->id);
    if (d->fd < 0 && errno == ENOENT && chdir(settings.spool) == 0)     /* the spool may have been replaced */
        d->fd = create_draft(d->id);
    if (d->fd >= 0)
        return true;
    d->error = errno;
    logmsg("cannot make a draft in %s/tmp (%s)", settings.spool, strerror(d->error));
    return false;
}

void draft_add(struct draft *d, const char *bytes, size_t size)
{
    while (size > 0 && d->error == 0) {
        ssize_t n = write(d->fd, bytes, size);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            d->error = errno;
            logmsg("%s cannot be written (%s)", d->id, strerror(errno));
            return;
        }
        bytes += n;
        size -= (size_t)n;
    }
}

void draft_forget(struct draft *d)
{
    if (d->fd >= 0)
        close(d->fd);
    d->fd = -1;
}

void draft_drop(struct draft *d)
{
    if (d->fd >= 0 || d->error != 0)
        unlink(spool_path("tmp", d->id));
    draft_forget(d);
}

const char *draft_refusal(int error)
{
    if (error == ENOSPC || error == EDQUOT || error == EFBIG)
        return "452 4.3.1 Error: insufficient system storage, try again later";
    return "451 4.3.0 Error: message not stored, try again later";
}

/* Locks or unlocks `length` octets of a file from `start` on; 0 means all of them. */
static bool lock_octets(int fd, short type, off_t start, off_t length)
{
    struct flock lock = { .l_whence = SEEK_SET };

    lock.l_type = type;
    lock.l_start = start;
    lock.l_len = length;
    return fcntl(fd, F_SETLK, &lock) == 0;
}

static bool move_to_queue(const char *id)
{
    char path[16 + ID_SIZE];

    strcpy(path, spool_path("tmp", id));
    return rename(path, spool_path("queue", id)) == 0;
}

/* Turns a draft into a message of the queue, durable and locked.  From the moment that
 * this returns true, and not before, we are responsible for the mail (RFC 5321 4.2.5).
 * False: d->error says why, and the draft is gone. */
static bool store(struct draft *d)
{
    errno = d->error;
    if (errno == 0 && lock_octets(d->fd, F_WRLCK, 0, 0) && fsync(d->fd) == 0 && move_to_queue(d->id)) {
        if (sync_directory("queue"))
            return true;
        d->error = errno;
        unlink(spool_path("queue", d->id));
    } else {
        d->error = errno;
    }
    logmsg("%s cannot be stored (%s)", d->id, strerror(d->error));
    draft_drop(d);
    return false;
}

bool draft_store(struct draft *d, int reply_fd)
{
    char reply[REPLY_SIZE];
    bool stored = store(d);
    int n = snprintf(reply, sizeof reply, stored ? "250 2.0.0 Ok: queued as %s\n" : "%s\n",
        stored ? d->id : draft_refusal(d->error));

    /* This fails if the server has been killed.  Then the client hears nothing, and a
     * message that was stored is forwarded all the same. */
    if (write(reply_fd, reply, (size_t)n) < 0)
        logmsg("%s: the client has gone before it was told: %.*s", d->id, n - 1, reply);
    return stored;
}

/* ==== Messages =========================================================== */

enum outcome { LATER, SENT, FAILED };

static const char *const outcome_names[] = { "later", "sent", "failed" };

struct recipient {
    char *address;
    enum outcome outcome;   /* LATER: the message is owed to this recipient; another exchanger or try may change that */
    char *said;             /* the exchanger's label, a space and its words; or NULL.  If several exchangers
                             * said `later` in one try, all of them, with "; " between */
    size_t last;            /* where in `said` the last exchanger's label begins */
    unsigned tries;         /* how many records say `later` */
    bool unrecorded;        /* `outcome` and `said` are from this try and not in the file yet */
};

struct message {
    char id[ID_SIZE];
    int fd;
    char reverse_path[PATH_LIMIT];
    bool declared;          /* the client said BODY=8BITMIME */
    bool eight_bit;         /* the message has octets beyond ASCII; set by survey() */
    unsigned long long size;    /* in octets, as SIZE counts them; set by survey() */
    off_t body;             /* offset of the message's header, behind the envelope */
    off_t end;              /* offset of the lone dot */
    bool tried;             /* there are records below the dot */
    int64_t age;            /* in seconds: see grow() */
    time_t due;             /* when the next try is due, for set_due() */
    struct recipient *recipients;
    size_t count;
    bool part;              /* this process tries only some of the recipients */
    bool gone;              /* the file has been removed from the queue */
    int error;              /* errno of a read that failed, or 0 */
};

/* Reads a file line by line, from offset `at` on, by pread(). */
struct reader {
    int fd;
    off_t at;
    size_t size, used, length;
    bool inside;            /* inside a line that does not fit into `bytes` */
    int error;              /* errno of a read that failed, or 0 */
    char bytes[SPOOL_LINE];
};

/* Returns the next line, with its length in r->length and a NUL at its end.  Returns NULL
 * at the end of the file, before a torn line, and after an error, which is then in
 * r->error.  A line that this program cannot have written, because it holds a bare CR or
 * LF or is too long, is returned as one or several empty lines. */
static char *read_line(struct reader *r)
{
    for (;;) {
        struct line line = next_line(r->bytes + r->used, r->size - r->used, false);
        char *text = r->bytes + r->used;
        bool full = r->size - r->used == sizeof r->bytes;
        ssize_t n;

        if (line.used > 0 || full) {
            r->length = line.used == 0 || r->inside || line.bare ? 0 : line.length;
            r->inside = line.used == 0;
            r->used += line.used > 0 ? line.used : line.length;
            text[r->length] = '\0';
            return text;
        }
        r->size -= r->used;
        memmove(r->bytes, text, r->size);
        r->used = 0;
        n = pread(r->fd, r->bytes + r->size, sizeof r->bytes - r->size, r->at);
        if (n < 0)
            r->error = errno;
        if (n <= 0)
            return NULL;
        r->at += n;
        r->size += (size_t)n;
    }
}

/* Returns the offset of the line that read_line() returns next. */
static off_t reader_offset(const struct reader *r)
{
    return r->at - (off_t)(r->size - r->used);
}

/* Finds the lone dot, searching from the file's end, because a body may be long and the
 * records below it are short.  Returns its offset; or -1 if the file is not complete, or
 * if it cannot be read, and then m->error is the errno. */
static off_t find_end(struct message *m, off_t size)
{
    static const char mark[] = "\r\n.\r\n";
    enum { MARK = sizeof mark - 1 };
    char block[4096 + MARK];
    off_t high = size;

    while (high > m->body) {
        off_t low = high - 4096 > m->body ? high - 4096 : m->body;
        ssize_t n = pread(m->fd, block, (size_t)(high - low) + MARK - 1, low);

        if (n < 0) {
            m->error = errno;
            return -1;
        }
        for (ssize_t i = n - MARK; i >= 0; i--)
            if (memcmp(block + i, mark, MARK) == 0)
                return low + i + 2;
        high = low;
    }
    return -1;
}

/* Returns the > that ends a path, or NULL.  A > inside quotes is a character of the local
 * part. */
static char *path_end(char *p)
{
    bool quoted = false;

    for (; *p != '\0' && (quoted || *p != '>'); p++) {
        if (*p == '"')
            quoted = !quoted;
        else if (*p == '\\' && quoted && p[1] != '\0')
            p++;
    }
    return *p == '>' ? p : NULL;
}

static struct recipient *find_recipient(struct message *m, const char *address)
{
    for (size_t i = 0; i < m->count; i++)
        if (strcmp(m->recipients[i].address, address) == 0)
            return &m->recipients[i];
    return NULL;
}

/* Adds a recipient, unless the address is there already: it gets the message once. */
static void add_recipient(struct message *m, const char *address)
{
    static const struct recipient fresh;

    if (find_recipient(m, address) != NULL)
        return;
    m->recipients = allocate(m->recipients, (m->count + 1) * sizeof *m->recipients);
    m->recipients[m->count] = fresh;
    m->recipients[m->count++].address = copy_text(address);
}

/* Reads the lines above the message.  False: they are not as this program writes them. */
static bool read_envelope(struct message *m)
{
    struct reader r = { .fd = m->fd };
    char *line = read_line(&r), *end;

    if (line == NULL || (strncmp(line, "HELO ", 5) != 0 && strncmp(line, "EHLO ", 5) != 0))
        return false;
    line = read_line(&r);
    if (line == NULL || strncmp(line, "MAIL FROM:<", 11) != 0 || (end = path_end(line + 11)) == NULL
        || end - line - 11 >= PATH_LIMIT)
        return false;
    *end = '\0';
    strcpy(m->reverse_path, line + 11);
    m->declared = strcmp(end + 1, " BODY=8BITMIME") == 0;
    while ((line = read_line(&r)) != NULL && strncmp(line, "RCPT TO:<", 9) == 0) {
        end = path_end(line + 9);
        if (end == NULL || end - line - 9 >= PATH_LIMIT)
            return false;
        *end = '\0';
        if (strrchr(line + 9, '@') == NULL)
            return false;
        add_recipient(m, line + 9);
    }
    m->body = reader_offset(&r);
    m->error = r.error;
    return line != NULL && strcmp(line, "DATA") == 0 && m->count > 0;
}

/* Applies a record from below the dot, and returns its time; 0 if the line is no record. */
static time_t apply_outcome(struct message *m, char *line)
{
    time_t when = date_seconds(line, ISO_DATE " ");
    char *outcome, *path, *end;
    struct recipient *r;

    if (when == 0)
        return 0;
    outcome = line + ISO_DATE_LENGTH + 1;
    path = outcome + strcspn(outcome, " ");
    if (strncmp(path, " <", 2) != 0 || (end = path_end(path + 2)) == NULL)
        return 0;
    *path = *end = '\0';
    r = find_recipient(m, path + 2);
    for (int i = LATER; i <= FAILED; i++)
        if (r != NULL && end[1] == ' ' && strcmp(outcome, outcome_names[i]) == 0) {
            free(r->said);
            r->said = copy_text(end + 2);
            r->outcome = (enum outcome)i;
            r->tries += i == LATER ? 1 : 0;
        }
    return when;
}

/* Reads the records below the dot, and sets each recipient's outcome so far, and the
 * message's age. */
static void read_outcomes(struct message *m)
{
    struct reader r = { .fd = m->fd, .at = m->end + 3 };
    time_t last = id_time(m->id), when;
    char *line;

    m->age = 0;
    while ((line = read_line(&r)) != NULL) {
        when = apply_outcome(m, line);
        if (when != 0) {
            m->tried = true;
            m->age = grow(m->age, last, when);
            last = when;
        }
    }
    m->error = r.error;
    m->age = grow(m->age, last, wall_clock());
}

static void message_free(struct message *m)
{
    for (size_t i = 0; i < m->count; i++) {
        free(m->recipients[i].address);
        free(m->recipients[i].said);
    }
    free(m->recipients);
    if (m->fd >= 0)
        close(m->fd);
}

/* Reads the message behind `fd`; ownership of `fd` passes to `m`, and message_free()
 * closes it even if this fails.  Returns false if the file is no message of ours, or if
 * any of it cannot be read: if a record were missed, the message would be sent twice. */
static bool message_read(struct message *m, int fd, const char *id)
{
    static const struct message fresh;
    struct stat st;

    *m = fresh;
    m->fd = fd;
    snprintf(m->id, sizeof m->id, "%s", id);
    if (fstat(fd, &st) != 0 || !read_envelope(m))
        return false;
    m->end = find_end(m, st.st_size);
    if (m->end < 0)
        return false;
    read_outcomes(m);
    return m->error == 0;
}

/* Logs why message_read() returned false. */
static void log_unread(const struct message *m)
{
    if (m->error != 0)
        logmsg("queue/%s cannot be read (%s): left as it is", m->id, strerror(m->error));
    else
        logmsg("queue/%s is no whole message: left alone", m->id);
}

static const char *domain_of(const char *address)
{
    return strrchr(address, '@') + 1;
}

uint32_t lane_of(const char *domain)
{
    uint32_t hash = 2166136261u;    /* FNV-1a */

    if (settings.smarthost != NULL)
        return 0;
    for (; *domain != '\0'; domain++)
        hash = (hash ^ (unsigned char)(*domain >= 'A' && *domain <= 'Z' ? *domain + 32 : *domain)) * 16777619u;
    return hash != 0 ? hash : 1;
}

/* Returns the lane of the first recipient that the message is still owed to. */
static uint32_t lane_of_message(const struct message *m)
{
    for (size_t i = 0; i < m->count; i++)
        if (m->recipients[i].outcome == LATER)
            return lane_of(domain_of(m->recipients[i].address));
    return 0;
}

/* Returns how many recipients the message is still owed to. */
static size_t count_owed(const struct message *m)
{
    size_t owed = 0;

    for (size_t i = 0; i < m->count; i++)
        owed += m->recipients[i].outcome == LATER ? 1 : 0;
    return owed;
}

/* ==== Outcomes =========================================================== */

/* Sets the file's modification time to m->due.  Every write to the file undoes this. */
static void set_due(const struct message *m)
{
    struct timespec times[2];

    times[0].tv_sec = times[1].tv_sec = m->due;
    times[0].tv_nsec = times[1].tv_nsec = 0;
    futimens(m->fd, times);
}

/* Whether the recipient got this outcome in this try and it is not in the file yet. */
static bool is_new(const struct recipient *r, enum outcome outcome)
{
    return r->unrecorded && r->outcome == outcome;
}

/* Returns where in r->said an exchanger's words are to be written: in place of its own
 * earlier words if it is asked again, else behind the words of the other exchangers. */
static size_t place_words(const struct recipient *r, const char *relay)
{
    size_t length = strlen(relay);

    if (strncmp(r->said + r->last, relay, length) == 0 && r->said[r->last + length] == ' ')
        return r->last;
    return strlen(r->said) + 2;
}

/* Sets a recipient's outcome in this try.  After LATER the next exchanger may set another;
 * if that is LATER, too, the words of both are kept, up to a limit. */
static void settle(struct recipient *r, enum outcome outcome, const char *relay, const char *words)
{
    size_t at = outcome == LATER && is_new(r, LATER) ? place_words(r, relay) : 0;
    size_t size = at + strlen(relay) + strlen(words) + 2;

    if (at > 0 && size > SAID_LIMIT)
        return;
    r->said = allocate(r->said, size);
    if (at > 0)
        memcpy(r->said + at - 2, "; ", 2);
    snprintf(r->said + at, size - at, "%s %s", relay, words);
    r->last = at;
    r->outcome = outcome;
    r->unrecorded = true;
}

/* Settles those of the recipients that have no final outcome yet. */
static void settle_all(struct recipient **to, size_t count, enum outcome outcome, const char *relay, const char *words)
{
    for (size_t i = 0; i < count; i++)
        if (to[i]->outcome == LATER)
            settle(to[i], outcome, relay, words);
}

static bool any_new(const struct message *m, enum outcome outcome)
{
    for (size_t i = 0; i < m->count; i++)
        if (is_new(&m->recipients[i], outcome))
            return true;
    return false;
}

/* Returns the records of all new outcomes of this kind, with `before` in front, in memory
 * that becomes the caller's. */
static char *outcome_lines(const struct message *m, enum outcome outcome, const char *before, size_t *size)
{
    char *text = NULL, now[DATE_SIZE];
    FILE *lines = open_text(&text, size);

    date_text(now, ISO_DATE, wall_clock());
    put(lines, "%s", before);
    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];

        if (is_new(r, outcome))
            put(lines, "%s %s <%s> %s\r\n", now, outcome_names[outcome], r->address, r->said);
    }
    close_text(lines);
    return text;
}

/* Logs each new outcome of this kind.  All are recorded by now, so none is new any more. */
static void log_outcomes(struct message *m, enum outcome outcome)
{
    time_t now = wall_clock(), came = id_time(m->id);

    for (size_t i = 0; i < m->count; i++) {
        struct recipient *r = &m->recipients[i];
        size_t relay = r->said != NULL ? strcspn(r->said, " ") : 0;

        if (!is_new(r, outcome))
            continue;
        logmsg("%s to=<%s> relay=%.*s delay=%lld status=%s (%s)", m->id, r->address, (int)relay, r->said,
            (long long)(came < now ? now - came : 0), outcome_names[outcome], r->said + relay + 1);
        r->unrecorded = false;
    }
}

/* Whether the message is owed to nobody once the new outcomes of this kind are recorded. */
static bool is_last_record(const struct message *m, enum outcome outcome)
{
    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];

        if (r->outcome == LATER || (r->unrecorded && r->outcome != outcome))
            return false;
    }
    return !m->part;
}

/* Removes the message's file.  False: it cannot be removed, or is not there: an operator
 * may have moved it out of the queue, and may move it back. */
static bool remove_message(struct message *m)
{
    m->gone = unlink(spool_path("queue", m->id)) == 0;
    if (!m->gone && errno != ENOENT)
        logmsg("%s is done and cannot be removed (%s)", m->id, strerror(errno));
    return m->gone;
}

/* Whether the file's last line is torn, by a crash or a full disk. */
static bool is_torn(int fd)
{
    struct stat st;
    char last[2];

    return fstat(fd, &st) == 0 && pread(fd, last, 2, st.st_size - 2) == 2 && memcmp(last, "\r\n", 2) != 0;
}

/* How far a record got. */
enum record {
    RECORDED,       /* all its lines are in the file, and durable if they need to be */
    UNCERTAIN,      /* some of its lines are in the file; or all are, but may not be durable */
    UNRECORDED      /* no line of it is in the file; errno says why */
};

/* Appends the new outcomes of this kind to the file, in one write().  If the message is
 * then owed to nobody, removes the file instead.  A torn line is ended in the same
 * write(), with a bare CR, so that it is never read as a record.
 *
 * `later` is not synced: if a crash loses the line, the message is tried again, which is
 * all that the line asks for.  The due time is not synced either. */
static enum record write_outcomes(struct message *m, enum outcome outcome)
{
    const char *end = is_torn(m->fd) ? "\r\r\n" : "";
    enum record record = RECORDED;
    size_t size;
    char *text;
    ssize_t n;
    int error;

    if (!any_new(m, outcome))
        return RECORDED;
    if (is_last_record(m, outcome) && remove_message(m)) {
        log_outcomes(m, outcome);
        return RECORDED;
    }
    text = outcome_lines(m, outcome, end, &size);
    n = write(m->fd, text, size);
    error = n < 0 ? errno : ENOSPC;     /* a short write: the disk is full */
    if (n <= (ssize_t)strlen(end) || memchr(text + strlen(end), '\n', (size_t)n - strlen(end)) == NULL) {
        record = UNRECORDED;
    } else if (n < (ssize_t)size) {
        record = UNCERTAIN;
    } else if (outcome != LATER && fsync(m->fd) != 0) {
        error = errno;
        record = UNCERTAIN;
    }
    free(text);
    set_due(m);
    if (record == RECORDED)
        log_outcomes(m, outcome);
    errno = error;
    return record;
}

static void log_unrecorded(const struct message *m)
{
    logmsg("%s outcomes cannot be recorded (%s)", m->id, strerror(errno));
}

/* Records that the exchanger has said 250.  If this process is killed before that is done,
 * the message is sent again: this is the only window for a duplicate.  While the disk is
 * full, this tries once a second until the alarm ends the process. */
static void write_sent(struct message *m)
{
    struct timespec second = { 1, 0 };

    while (write_outcomes(m, SENT) != RECORDED) {
        logmsg("%s was sent, and that cannot be recorded (%s): free some space", m->id, strerror(errno));
        nanosleep(&second, NULL);
    }
}

/* ==== Exchangers ========================================================= */

/* How far we have come in this try with one address of an exchanger. */
enum progress {
    UNTRIED,        /* there is no connection: fd is -1 */
    CONNECTING,     /* connect() is under way on fd */
    AWAITING,       /* connected; the greeting has not come */
    GREETED,        /* the 220 has come (with -S: connected); we have said nothing yet */
    INTRODUCED,     /* EHLO is answered, and TLS and AUTH are done if needed: MAIL may come next */
    SPENT           /* the connection has ended, and none is to be made again in this try: fd is -1 */
};

/* Why an address is SPENT, where that matters for other addresses or messages. */
enum refusal {
    NO_REFUSAL,     /* it was used, or has another reason, in x->words */
    NO_NETWORK,     /* connect() failed at once: this machine has no network for the address */
    NO_LISTENER,    /* the host refused the connection */
    BUSY,           /* it accepts no further connection just now: 421, or a 4xx greeting */
    NO_MAIL         /* it greeted with a 5xx: it accepts no mail (RFC 5321 3.1) */
};

/* One address of an exchanger, and the connection to it. */
struct exchange {
    char name[DNS_NAME_SIZE];
    unsigned preference;                /* of its MX record */
    union address address;
    char label[LABEL_SIZE];             /* name[address], or name[address]/tls, for log and record */

    enum progress progress;
    enum refusal refusal;
    int fd;
    struct tunnel *tunnel;              /* with TLS: `fd` leads to openssl, which talks to the exchanger; else NULL */
    bool bare;                          /* TLS with this exchanger failed in this try, so it gets mail in plain */
    int64_t deadline;                   /* by clock_ms(): when this step of the race, or the keeping, ends */
    int64_t begun, connected, greeted;  /* by clock_us(): when connect() began and ended, and 220 came; 0: not yet */

    bool pipelining, eight_bit, sized;  /* what EHLO offers */
    bool starttls, auth_plain, auth_login;
    unsigned long long max_size;        /* SIZE's number, 0 for any */

    unsigned messages;                  /* how many messages this connection has had */
    bool accepting;                     /* a recipient of the last message was accepted */
    bool unfinished;                    /* the last transaction did not come to its final dot: RSET has to end it */
    char id[ID_SIZE];                   /* of the message that it has or had last, for the log */

    int code;                           /* of the last reply; 0: none came, the connection is of no more use */
    char words[REPLY_SIZE];             /* the last reply as one line, or what went wrong instead */
    bool closing;                       /* the last reply was 421: the exchanger hangs up (RFC 5321 3.8) */
    unsigned lines;                     /* how many lines of the present reply have been read; 0 between replies */
    bool in_ehlo;                       /* the present reply lists extensions */
    char in[2048];                      /* `size` octets that were received and not read yet */
    size_t size;
};

/* Where mail for a domain goes. */
struct route {
    char domain[PATH_LIMIT];
    struct exchange x[ADDRESS_LIMIT];   /* `count` of them, the most preferred first */
    size_t count;                       /* 0: there is no way; then `outcome` and `words` say why */
    struct exchange *open;              /* the one whose connection is kept open for the next message; or NULL */
    bool whole;                         /* every query for an address that we could use was answered */
    bool left_out;                      /* there are addresses of a family that -b leaves out */
    enum outcome outcome;               /* if there is no way: LATER or FAILED */
    char words[REPLY_SIZE];
};

/* Notes why there is no way to the domain. */
static void no_route(struct route *route, enum outcome outcome, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(route->words, sizeof route->words, format, arguments);
    va_end(arguments);
    route->outcome = outcome;
}

/* By clock_ms(): when this process's try ends.  No step lasts longer, and recipients that
 * are still owed the message then are LATER.  Children that try a domain inherit it. */
static int64_t try_end;

/* Whether an exchanger can have this address: not an unspecified, multicast or broadcast
 * one. */
static bool is_usable(const union address *a)
{
    if (a->sa.sa_family == AF_INET6)
        return !IN6_IS_ADDR_UNSPECIFIED(&a->in6.sin6_addr) && !IN6_IS_ADDR_MULTICAST(&a->in6.sin6_addr);
    return ntohl(a->in.sin_addr.s_addr) >> 24 != 0 && ntohl(a->in.sin_addr.s_addr) >> 28 < 14;
}

static bool is_loopback(const union address *a)
{
    if (a->sa.sa_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&a->in6.sin6_addr);
    return ntohl(a->in.sin_addr.s_addr) >> 24 == 127;
}

/* Whether this machine has the address.  A datagram to one of our own addresses has that
 * same address as its source; connect() on a UDP socket sends nothing and chooses the
 * source. */
static bool is_local(const union address *a)
{
    union address source;
    socklen_t size = sizeof source;
    size_t count;
    int fd;
    bool same;

    if (is_loopback(a))
        return true;
    fd = socket_open(a, SOCK_DGRAM);
    same = fd >= 0 && connect(fd, &a->sa, address_size(a)) == 0 && getsockname(fd, &source.sa, &size) == 0
        && memcmp(address_octets(a, &count), address_octets(&source, &count), count) == 0;
    if (fd >= 0)
        close(fd);
    return same;
}

/* Whether this server listens on the address and port.  If it listens on all addresses,
 * any address of this machine is its own. */
static bool is_self(const union address *a, unsigned port)
{
    static const unsigned char any[16];
    size_t size;
    const unsigned char *octets = address_octets(a, &size);

    for (size_t i = 0; i < settings.listening_count; i++) {
        const union address *l = &settings.listening[i];
        const unsigned char *ours = address_octets(l, &size);

        if (l->sa.sa_family != a->sa.sa_family || address_port(l) != port)
            continue;
        if (memcmp(ours, octets, size) == 0 || (memcmp(ours, any, size) == 0 && is_local(a)))
            return true;
    }
    return false;
}

/* Returns the address of this family that connections are to come from (-b), or NULL. */
static const union address *source_of(int family)
{
    for (size_t i = 0; i < settings.source_count; i++)
        if (settings.sources[i].sa.sa_family == family)
            return &settings.sources[i];
    return NULL;
}

/* Whether -b leaves this family out, by naming only an address of the other family. */
static bool is_left_out(int family)
{
    return settings.source_count > 0 && source_of(family) == NULL;
}

/* Adds an address to the route, unless it cannot be used.  False: it is our own, and so
 * the list ends here. */
static bool add_address(struct route *route, const char *name, unsigned preference, union address a, unsigned port)
{
    char text[ADDRESS_TEXT];
    struct exchange *x = &route->x[route->count];

    address_unmap(&a);      /* ::ffff:192.0.2.1 may be our own address, too */
    if (!is_usable(&a))
        return true;
    if (is_self(&a, port))
        return false;
    if (is_left_out(a.sa.sa_family)) {
        route->left_out = true;
        return true;
    }
    if (route->count == ADDRESS_LIMIT)
        return true;
    address_set_port(&a, port);
    for (size_t i = 0; i < route->count; i++)
        if (memcmp(&route->x[i].address, &a, address_size(&a)) == 0)
            return true;
    *x = (struct exchange){ .preference = preference, .address = a, .fd = -1 };
    snprintf(x->name, sizeof x->name, "%s", name);
    address_text(&a, text);
    snprintf(x->label, sizeof x->label, "%s[%s]", strcmp(name, text) == 0 ? "" : name, text);
    route->count++;
    return true;
}

/* There is no address that could be used.  `trouble` is why a query failed, or NULL; `self`:
 * this relay is one of the exchangers.  What our operator may have mistaken is LATER: it
 * is not the sender's fault. */
static void no_address(struct route *route, const char *trouble, bool self)
{
    if (trouble != NULL)
        no_route(route, LATER, "4.4.3 no address of an exchanger: %s", trouble);
    else if (route->left_out)
        no_route(route, LATER, "4.4.4 there are only addresses of a family that -b leaves out");
    else if (settings.smarthost != NULL)
        no_route(route, LATER, "4.4.4 the smarthost %s %s: name another with -s", settings.smarthost,
            self ? "is this relay itself" : "has no usable address");
    else if (self)
        no_route(route, FAILED, "5.4.6 mail for this %s would loop back to this relay",
            route->domain[0] == '[' ? "address" : "domain");
    else
        no_route(route, FAILED, "5.4.4 no exchanger of this domain has a usable address");
}

static const char resolv_conf[] = "/etc/resolv.conf";
static struct nameservers found;        /* in it, when this process or its parent looked last */

/* Returns the name servers to ask: those of -n, or those that resolv.conf names now, since
 * networks come up late and machines move.  A forwarder reads resolv.conf before its first
 * query, and then once a second at most. */
static const struct nameservers *name_servers(void)
{
    static int64_t next_look;

    if (settings.nameservers.count > 0)
        return &settings.nameservers;
    if (clock_ms() >= next_look) {
        dns_servers(resolv_conf, &found);
        next_look = clock_ms() + 1000;
    }
    return &found;
}

void check_resolv_conf(void)
{
    static char logged[sizeof found.passed_over];

    if (settings.nameservers.count > 0)
        return;
    dns_servers(resolv_conf, &found);
    if (strcmp(found.passed_over, logged) == 0)
        return;
    strcpy(logged, found.passed_over);
    if (logged[0] != '\0')
        logmsg("passed over in %s: %s", resolv_conf, logged);
}

/* Looks up the addresses of these exchangers, which are sorted by preference, and adds
 * them to the route. */
static void add_exchangers(struct route *route, const struct dns_record *mx, size_t count, unsigned port)
{
    struct dns_query *queries;
    const char *trouble = NULL;
    bool self = false;

    if (count > EXCHANGER_LIMIT)
        count = EXCHANGER_LIMIT;
    queries = allocate(NULL, 2 * count * sizeof *queries);
    for (size_t i = 0; i < 2 * count; i++) {
        queries[i].name = mx[i / 2].name;
        queries[i].type = i % 2 == 0 ? DNS_AAAA : DNS_A;
    }
    dns_ask(name_servers(), queries, 2 * count, try_end);
    for (size_t i = 0; i < 2 * count && !self; i++) {
        const struct dns_query *q = &queries[i];

        if (q->status == DNS_FAILED) {
            trouble = q->why;
            route->whole = route->whole && is_left_out(q->type == DNS_A ? AF_INET : AF_INET6);
        }
        for (size_t k = 0; k < q->count && !self; k++)
            self = !add_address(route, q->name, mx[i / 2].preference, q->records[k].address, port);
        /* An exchanger that is not preferred to us would send the mail back: RFC 5321 5.1. */
        while (self && route->count > 0 && route->x[route->count - 1].preference >= mx[i / 2].preference)
            route->count--;
    }
    if (route->count == 0)
        no_address(route, trouble, self);
    free(queries);
}

/* Looks up the domain's exchangers (RFC 5321 5.1) and adds them to the route. */
static void add_exchangers_of(struct route *route, const char *domain)
{
    struct dns_query *query = allocate(NULL, sizeof *query);
    struct dns_record implicit = { .preference = 0 };
    size_t usable = 0;

    query->name = domain;
    query->type = DNS_MX;
    dns_ask(name_servers(), query, 1, try_end);
    for (size_t i = 0; i < query->count; i++)       /* "" is the root, which is no host */
        if (query->records[i].name[0] != '\0')
            query->records[usable++] = query->records[i];
    if (query->status == DNS_NXDOMAIN) {
        no_route(route, FAILED, "5.1.2 there is no domain %s", domain);
    } else if (query->status == DNS_FAILED) {
        no_route(route, LATER, "4.4.3 no exchanger of %s: %s", domain, query->why);
    } else if (query->status == DNS_NODATA) {
        strcpy(implicit.name, domain);
        add_exchangers(route, &implicit, 1, settings.mx_port);
    } else if (usable == 0) {
        no_route(route, FAILED, "5.1.10 %s takes no mail (null MX)", domain);      /* RFC 7505 */
    } else {
        add_exchangers(route, query->records, usable, settings.mx_port);
    }
    free(query);
}

/* Finds out where mail for a domain, or an address literal, has to go. */
static void find_route(struct route *route, const char *domain)
{
    unsigned port = settings.smarthost != NULL ? settings.smarthost_port : settings.mx_port;
    struct dns_record host = { .preference = 0 };
    char text[ADDRESS_TEXT];
    union address a;
    bool known;             /* it is an address, so there is nothing to look up */

    snprintf(route->domain, sizeof route->domain, "%s", domain);
    route->open = NULL;
    route->count = 0;
    route->whole = true;
    route->left_out = false;
    if (settings.smarthost != NULL)
        known = address_parse(settings.smarthost, port, &a);
    else
        known = literal_parse(domain, port, &a) != NULL;
    if (known) {
        bool self = !add_address(route, address_text(&a, text), 0, a, port);

        if (route->count == 0 && !self && !route->left_out && settings.smarthost == NULL)
            no_route(route, FAILED, "5.1.2 nobody has the address %s", text);
        else if (route->count == 0)
            no_address(route, NULL, self);
    } else if (settings.smarthost != NULL) {
        strcpy(host.name, settings.smarthost);
        add_exchangers(route, &host, 1, port);
    } else {
        add_exchangers_of(route, domain);
    }
}

/* ==== TLS ================================================================ */

/*
 * TLS is the work of openssl(1), which runs as a child of the forwarder, between the
 * forwarder and the exchanger.  openssl has two connections, both to the forwarder:
 *
 *     its standard input and output   carry SMTP in plain: tunnel->plain, which is x->fd
 *     a Unix socket                   carries the same by TLS: tunnel->out and ->in
 *
 * Wherever the forwarder waits for the exchanger, it copies from the Unix socket to the
 * exchanger's socket, and back.  So no third process is needed; and when the forwarder
 * ends, for whatever reason, openssl loses its connections and ends, too.
 */
enum {
    OPENSSL_START = 30,         /* seconds within which openssl has to connect to us */
    FLOW = 16384                /* octets copied at once */
};

/* One direction of the copying. */
struct flow {
    int from, to;
    size_t size, used;          /* octets that were read, and how many of them were written */
    bool ended;                 /* `from` has been read to its end */
    char bytes[FLOW];
};

struct tunnel {
    pid_t pid;                  /* openssl */
    int plain;                  /* our end of its standard input and output */
    int errors;                 /* the pipe from its standard error */
    struct flow out, in;        /* from openssl to the exchanger, and from the exchanger to openssl */
};

/* Copies what can be read and written at once; neither descriptor blocks. */
static void copy_flow(struct flow *f)
{
    ssize_t n;

    if (f->used == f->size && !f->ended) {
        n = read(f->from, f->bytes, sizeof f->bytes);
        f->used = 0;
        f->size = n > 0 ? (size_t)n : 0;
        f->ended = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
        if (f->ended)
            shutdown(f->to, SHUT_WR);
    }
    if (f->used == f->size)
        return;
    n = write(f->to, f->bytes + f->used, f->size - f->used);
    if (n > 0)
        f->used += (size_t)n;
    else if (errno != EAGAIN && errno != EINTR)
        f->used = f->size;      /* the reader is gone: go on without it, so that its last words are read */
}

/* Adds the descriptor that copy_flow() waits for to the sets. */
static void watch_flow(const struct flow *f, fd_set *readable, fd_set *writable, int *top)
{
    if (f->used < f->size)
        watch_fd(f->to, writable, top);
    else if (!f->ended)
        watch_fd(f->from, readable, top);
}

/* Waits for the exchanger as wait_ready() does, and copies meanwhile if there is a
 * tunnel to it. */
static bool wait_exchange(struct exchange *x, bool writing, int64_t deadline)
{
    struct tunnel *t = x->tunnel;

    if (t == NULL)
        return wait_ready(x->fd, writing, deadline);
    do {
        fd_set readable, writable;
        int top = -1;

        FD_ZERO(&readable);
        FD_ZERO(&writable);
        watch_fd(x->fd, writing ? &writable : &readable, &top);
        watch_flow(&t->out, &readable, &writable, &top);
        watch_flow(&t->in, &readable, &writable, &top);
        wait_sets(top, &readable, &writable, deadline);
        copy_flow(&t->out);
        copy_flow(&t->in);
        if (FD_ISSET(x->fd, writing ? &writable : &readable))
            return true;
    } while (clock_ms() < deadline);
    return false;
}

/* In the child: becomes openssl, which connects to the Unix socket `path`.  All signals
 * are blocked: one sent to the process group must not end openssl while the forwarder
 * still has to learn, and record, what became of the message. */
static void become_openssl(const char *name, const char *path, int plain, int errors)
{
    const char *arguments[16] = { "openssl", "s_client", "-quiet", "-unix", path };
    size_t n = 5;
    union address literal;
    bool named = !address_parse(name, 0, &literal);
    sigset_t all;

    if (named)
        arguments[n++] = "-servername";
    arguments[n++] = named ? name : "-noservername";    /* RFC 6066 3: an address is not for SNI */
    if (settings.tls == TLS_VERIFIED) {
        arguments[n++] = "-verify_return_error";
        arguments[n++] = "-verify";
        arguments[n++] = "9";                           /* certificates in a chain at most */
        arguments[n++] = named ? "-verify_hostname" : "-verify_ip";
        arguments[n++] = name;
    } else {        /* nothing is verified, and reading the system's authorities would take longest of all */
        setenv("SSL_CERT_FILE", "/dev/null", 1);
        setenv("SSL_CERT_DIR", "/dev/null", 1);
    }
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    dup2(plain, STDIN_FILENO);
    dup2(plain, STDOUT_FILENO);
    dup2(errors, STDERR_FILENO);
    for (int fd = STDERR_FILENO + 1; fd < FD_SETSIZE; fd++)
        close(fd);
    execvp(arguments[0], (char **)arguments);
    dprintf(STDERR_FILENO, "openssl: %s\n", strerror(errno));
    _exit(127);
}

/* Puts into x->words what openssl says of its failure, made harmless; if it says
 * nothing, they stay. */
static void quote_openssl(struct exchange *x, const struct tunnel *t)
{
    static const char *const signs[] = { "verify error:", "error:" };   /* the first says more */
    char text[4096];
    const char *said = NULL;
    ssize_t n = read(t->errors, text, sizeof text - 1);

    if (n <= 0)
        return;
    for (ssize_t i = 0; i < n; i++)
        if (text[i] != '\n' && (text[i] < ' ' || text[i] > '~'))
            text[i] = '?';
    text[n] = '\0';
    for (size_t i = 0; said == NULL && i < sizeof signs / sizeof signs[0]; i++)
        said = strstr(text, signs[i]);
    if (said == NULL)
        said = text;
    snprintf(x->words, sizeof x->words, "4.7.5 no TLS: %.*s", (int)strcspn(said, "\n"), said);
}

/* Ends openssl and closes all but the exchanger's socket, which is returned. */
static int close_tunnel(struct tunnel *t)
{
    const int ours[] = { t->plain, t->errors, t->out.from };
    int exchanger = t->out.to;

    for (size_t i = 0; i < sizeof ours / sizeof ours[0]; i++)
        if (ours[i] >= 0)
            close(ours[i]);
    if (t->pid > 0) {
        kill(t->pid, SIGKILL);      /* it ends by itself, but perhaps not now */
        while (waitpid(t->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    free(t);
    return exchanger;
}

/* Listens on a Unix socket in the spool, where no other user's process can connect to
 * it.  It is named like a draft, and what a crash leaves is cleared like one.  Returns
 * -1 with errno if there can be none. */
static int listen_in_spool(struct sockaddr_un *here)
{
    char id[ID_SIZE];
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    make_id(id, 0);
    memset(here, 0, sizeof *here);
    here->sun_family = AF_UNIX;
    snprintf(here->sun_path, sizeof here->sun_path, "%s", spool_path("tmp", id));
    if (fd >= 0 && (bind(fd, (struct sockaddr *)here, sizeof *here) != 0 || listen(fd, 1) != 0)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* Forks openssl for an exchanger of this name.  False with errno: there is no
 * descriptor or no process for it. */
static bool start_openssl(struct tunnel *t, const char *name, const char *path)
{
    int plain[2], errors[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, plain) != 0)
        return false;
    t->plain = plain[0];
    if (pipe(errors) == 0) {
        t->errors = errors[0];
        if (errors[1] < FD_SETSIZE)     /* it is the highest of them */
            t->pid = fork();
        if (t->pid == 0)
            become_openssl(name, path, plain[1], errors[1]);
        close(errors[1]);
        fcntl(t->errors, F_SETFL, O_NONBLOCK);
    }
    close(plain[1]);
    fcntl(t->plain, F_SETFL, O_NONBLOCK);
    return t->pid > 0;
}

/* Waits until openssl connects to us, which is the first thing it does.  False: it
 * ends before, or takes too long. */
static bool await_openssl(struct tunnel *t, int listener)
{
    int64_t deadline = clock_ms() + OPENSSL_START * 1000;
    fd_set readable, none;
    int fd = -1;

    do {
        int top = -1;

        FD_ZERO(&readable);
        FD_ZERO(&none);
        watch_fd(listener, &readable, &top);
        watch_fd(t->plain, &readable, &top);    /* nothing was said yet: this is its end */
        wait_sets(top, &readable, &none, deadline);
        if (FD_ISSET(listener, &readable))
            fd = accept(listener, NULL, NULL);
    } while (fd < 0 && !FD_ISSET(t->plain, &readable) && clock_ms() < deadline);
    if (fd >= 0)
        fcntl(fd, F_SETFL, O_NONBLOCK);
    t->out.from = t->in.to = fd;
    return fd >= 0;
}

/* Starts openssl between us and the exchanger, to which nothing is said yet.  Returns
 * NULL with the reason in x->words.  An openssl that ends before it has connected
 * cannot run here: this process does not start it again. */
static struct tunnel *open_tunnel(struct exchange *x)
{
    static char missing[REPLY_SIZE];    /* why openssl cannot run here, once that is known */
    struct sockaddr_un here;
    struct tunnel *t;
    int listener;

    if (missing[0] != '\0') {
        strcpy(x->words, missing);
        return NULL;
    }
    t = allocate(NULL, sizeof *t);
    memset(t, 0, sizeof *t);
    t->pid = t->plain = t->errors = t->out.from = -1;
    t->in.from = t->out.to = x->fd;
    listener = listen_in_spool(&here);
    if (listener < 0 || !start_openssl(t, x->name, here.sun_path)) {
        snprintf(x->words, sizeof x->words, "4.7.5 no TLS: %s", strerror(errno));
    } else if (!await_openssl(t, listener)) {
        strcpy(x->words, "4.7.5 no TLS: openssl does not start");
        quote_openssl(x, t);
        if (wait_ready(t->plain, false, 0))
            strcpy(missing, x->words);
    }
    if (listener >= 0) {
        close(listener);
        unlink(here.sun_path);
    }
    if (t->out.from >= 0)
        return t;
    close_tunnel(t);
    return NULL;
}

/* ==== The dialogue ======================================================= */

/* The steps of a dialogue, and how many seconds the exchanger has for each: RFC 5321
 * 4.5.3.2.  ROOM: if it accepts no further connection just now, and there is no batch for
 * the message to go to. */
enum step { ROOM, CONNECT, GREETING, HELLO, STARTTLS, AUTH, ENVELOPE, DATA_COMMAND, MESSAGE, FINAL_DOT, QUIT };

static const struct {
    const char *name;
    long seconds;
} steps[] = {
    { "having room", 10 }, { "connecting", 30 }, { "the greeting", 300 }, { "EHLO", 300 }, { "STARTTLS", 300 },
    { "AUTH", 300 },
    { "MAIL and RCPT", 300 }, { "DATA", 120 }, { "the message", 180 }, { "the final dot", 600 }, { "QUIT", 10 }
};

/* Returns when, by clock_ms(), a step that begins now times out. */
static int64_t step_deadline(enum step step)
{
    long seconds = steps[step].seconds;
    int64_t end;

    if (settings.wait > 0 && settings.wait < seconds)
        seconds = settings.wait;
    end = clock_ms() + seconds * 1000;
    return end < try_end ? end : try_end;
}

/* With -v, logs a line of the dialogue; `side` is C, which is us, or S. */
static void log_exchange(const struct exchange *x, const char *side, const char *text, size_t size)
{
    if (settings.verbose)
        logmsg("%s %s %s: %.*s", x->id, x->label, side, (int)size, text);
}

/* Notes that the connection is of no more use, because `what` happened.  If a 421 has
 * announced that the exchanger hangs up, its words stay. */
static void lose(struct exchange *x, const char *what, enum step step)
{
    if (!x->closing)
        snprintf(x->words, sizeof x->words, "4.4.2 %s at %s", what, steps[step].name);
    x->code = 0;
}

/* Notes the mechanisms that AUTH offers; each name has a space before it (RFC 4954 3). */
static void note_mechanisms(struct exchange *x, const char *names)
{
    while (*names == ' ') {
        size_t length = strcspn(++names, " ");

        x->auth_plain = x->auth_plain || (length == 5 && strncasecmp(names, "PLAIN", length) == 0);
        x->auth_login = x->auth_login || (length == 5 && strncasecmp(names, "LOGIN", length) == 0);
        names += length;
    }
}

/* Notes an extension that EHLO offers. */
static void note_extension(struct exchange *x, const char *text)
{
    size_t length = strcspn(text, " ");

    if (length == 10 && strncasecmp(text, "PIPELINING", length) == 0)
        x->pipelining = true;
    else if (length == 8 && strncasecmp(text, "8BITMIME", length) == 0)
        x->eight_bit = true;
    else if (length == 8 && strncasecmp(text, "STARTTLS", length) == 0)
        x->starttls = true;
    else if (length == 4 && strncasecmp(text, "AUTH", length) == 0)
        note_mechanisms(x, text + length);
    else if (length == 4 && strncasecmp(text, "SIZE", length) == 0) {
        x->sized = true;
        x->max_size = strtoull(text + length, NULL, 10);
    }
}

enum reading { MALFORMED, PARTIAL, ENTIRE };

/* Reads one line of a reply: 250-words, 250 words or 250 (RFC 5321 4.2).  All lines of a
 * reply should have one code (4.2.1).  If they differ, the last line's code counts, as it
 * does for other clients: a greeting may begin with 220- and end with 521.  So x->words
 * are those of the last lines that have the same code. */
static enum reading take_reply_line(struct exchange *x, const char *text, size_t length)
{
    char line[sizeof x->in];
    size_t used;
    int code;

    for (size_t i = 0; i < length; i++)         /* the words go into the log, the queue and reports */
        line[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    line[length] = '\0';
    log_exchange(x, "S", line, length);
    if (strspn(line, "0123456789") != 3 || line[0] < '2' || line[0] > '5'
        || (length > 3 && line[3] != ' ' && line[3] != '-'))
        return MALFORMED;
    code = atoi(line);
    if (x->lines == 0 || code != x->code)
        snprintf(x->words, sizeof x->words, "%d", code);
    if (x->in_ehlo && x->lines > 0 && length > 4)
        note_extension(x, line + 4);
    x->code = code;
    x->closing = code == 421;
    used = strlen(x->words);
    if (length > 4)             /* if they do not fit, they are cut off */
        snprintf(x->words + used, sizeof x->words - used, " %.*s", (int)sizeof x->words, line + 4);
    x->lines++;
    if (length > 3 && line[3] == '-')
        return x->lines < REPLY_LINES ? PARTIAL : MALFORMED;
    x->lines = 0;
    return ENTIRE;
}

/* Reads a reply from the octets received.  PARTIAL: its end has not come yet.  Here a line
 * may end in a bare LF, since replies are not relayed. */
static enum reading take_reply(struct exchange *x)
{
    enum reading reading = PARTIAL;

    while (reading == PARTIAL) {
        struct line line = next_line(x->in, x->size, true);

        if (line.used == 0)
            return x->size < sizeof x->in ? PARTIAL : MALFORMED;
        reading = take_reply_line(x, x->in, line.length);
        x->size -= line.used;
        memmove(x->in, x->in + line.used, x->size);
    }
    return reading;
}

/* Reads once from the exchanger.  False: the connection has ended or is broken. */
static bool fill_input(struct exchange *x)
{
    ssize_t n = read(x->fd, x->in + x->size, sizeof x->in - x->size);

    if (n > 0)
        x->size += (size_t)n;
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

/* Waits for a whole reply.  Returns its code, or 0 after lose(). */
static int read_reply(struct exchange *x, enum step step)
{
    int64_t deadline = step_deadline(step);

    for (;;) {
        enum reading reading = take_reply(x);

        if (reading == ENTIRE)
            return x->code;
        if (reading == MALFORMED)
            lose(x, "no SMTP reply", step);
        else if (!wait_exchange(x, false, deadline))
            lose(x, "no reply in time", step);
        else if (!fill_input(x))
            lose(x, "connection lost", step);
        else
            continue;
        x->lines = 0;
        return 0;
    }
}

/* Sends `size` octets; the exchanger has the step's time for each part that it takes.
 * False: the exchanger has refused (x->code is 400 or more), or the connection is of no
 * more use.  A 2xx that was there before we sent anything cannot be the reply to it, and
 * must not be taken for one: the exchanger does not have the message. */
static bool send_bytes(struct exchange *x, const char *bytes, size_t size, enum step step)
{
    if (x->size > 0) {
        if (take_reply(x) != ENTIRE || x->code < 400)
            lose(x, "a reply to nothing", step);
        return false;
    }
    while (size > 0) {
        ssize_t n = write(x->fd, bytes, size);
        bool full = n < 0 && errno == EAGAIN;

        if (n > 0) {
            bytes += n;
            size -= (size_t)n;
        } else if (errno != EINTR && !(full && wait_exchange(x, true, step_deadline(step)))) {
            /* The exchanger takes no more, but may have said why. */
            if (read_reply(x, QUIT) < 400)
                lose(x, full ? "nothing taken in time" : "connection lost", step);
            return false;
        }
    }
    return true;
}

/* Says one command and returns the code of its reply, or 0. */
static int say(struct exchange *x, enum step step, const char *format, ...)
{
    char line[1024];
    va_list arguments;
    int n;

    va_start(arguments, format);
    n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    log_exchange(x, "C", line, (size_t)n - 2);
    return send_bytes(x, line, (size_t)n, step) ? read_reply(x, step) : 0;
}

/* Whether a 5xx with this code may be not about the message.  After TLS failed, it may be
 * about the lack of TLS; and AUTH's replies from a smarthost (RFC 4954 6: 530, 534, 535,
 * 538) are about our operator's settings. */
static bool is_curable(const struct exchange *x, int code)
{
    return x->bare || (settings.smarthost != NULL && (code == 530 || code == 534 || code == 535 || code == 538));
}

/* What a reply says of a command: the kinds of completion of RFC 5321 4.2.1. */
enum completion {
    POSITIVE,       /* 2xx */
    TRANSIENT,      /* 4xx, another code that this command should not get, or no reply: it may succeed later */
    PERMANENT       /* 5xx, unless it is curable */
};

static enum completion judge(const struct exchange *x, int code)
{
    if (code / 100 == 2)
        return POSITIVE;
    return code / 100 == 5 && !is_curable(x, code) ? PERMANENT : TRANSIENT;
}

/* Returns the outcome for recipients whose mail depends on the command. */
static enum outcome outcome_of(enum completion completion)
{
    static const enum outcome outcomes[] = { SENT, LATER, FAILED };

    return outcomes[completion];
}

static void forget_extensions(struct exchange *x)
{
    x->pipelining = x->eight_bit = x->sized = x->starttls = x->auth_plain = x->auth_login = false;
    x->max_size = 0;
}

/* Says EHLO, and HELO if that is refused (RFC 5321 3.2). */
static enum completion say_hello(struct exchange *x)
{
    char refusal[REPLY_SIZE];
    int code;

    forget_extensions(x);
    x->in_ehlo = true;
    code = say(x, HELLO, "EHLO %s\r\n", settings.hostname);
    x->in_ehlo = false;
    if (judge(x, code) == PERMANENT) {
        forget_extensions(x);
        strcpy(refusal, x->words);
        code = say(x, HELLO, "HELO %s\r\n", settings.hostname);
        if (code == 0 && strstr(x->words, "connection lost") != NULL)
            strcpy(x->words, refusal);      /* the reply to EHLO says more */
    }
    return judge(x, code);
}

/* Puts openssl between us and the exchanger, by STARTTLS (RFC 3207), or without a
 * word where TLS comes first (RFC 8314).  False: there is no TLS, for the reason in
 * x->words, and where x->code is 0 the connection is of no more use. */
static bool begin_tls(struct exchange *x)
{
    struct tunnel *t = open_tunnel(x);

    if (t == NULL)
        return false;
    if (!settings.tls_first && say(x, STARTTLS, "STARTTLS\r\n") != 220) {
        close_tunnel(t);
        return false;
    }
    x->tunnel = t;
    x->fd = t->plain;
    if (x->size == 0)
        return true;
    /* This came in plain behind the 220.  It may be injected, and would pass for a reply by TLS. */
    lose(x, "more than a reply", STARTTLS);
    return false;
}

/* Begins TLS, and says EHLO again, since nothing that was said before counts (RFC 3207
 * 4.2).  The first reply proves that the handshake has succeeded.  If it has failed, the
 * exchanger may be tried once more, in plain. */
static enum completion start_tls(struct exchange *x)
{
    enum completion hello = POSITIVE;

    if (begin_tls(x)) {
        if (settings.tls_first)
            hello = judge(x, read_reply(x, GREETING));
        if (hello == PERMANENT)
            x->refusal = NO_MAIL;
        if (hello == POSITIVE)
            hello = say_hello(x);
        if (x->code != 0)
            strcat(x->label, "/tls");
        else
            quote_openssl(x, x->tunnel);
    }
    if (x->code != 0)
        return hello;
    x->bare = settings.tls == TLS_MAY;
    if (x->bare)
        logmsg("%s %s %s: once more in plain", x->id, x->label, x->words);
    return TRANSIENT;
}

/* Writes octets as text, each three of them as four letters (RFC 4648 4). */
static void base64(char *text, const char *bytes, size_t size)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    for (size_t i = 0; i < size; i += 3) {
        uint32_t bits = 0;

        for (size_t k = i; k < i + 3; k++)
            bits = bits << 8 | (k < size ? (unsigned char)bytes[k] : 0);
        for (size_t k = 0; k < 4; k++)          /* of one octet there are two letters, of two three */
            *text++ = k <= size - i ? letters[bits >> (18 - 6 * k) & 63] : '=';
    }
    *text = '\0';
}

/* Says a command with a secret behind it, which neither the log shows nor this
 * process's memory keeps.  Returns the code of the reply, or 0. */
static int say_secret(struct exchange *x, const char *command, const char *secret, size_t size)
{
    char line[16 + 4 * SECRET_SIZE];
    bool sent;

    strcpy(line, command);
    base64(line + strlen(line), secret, size);
    strcat(line, "\r\n");
    if (settings.verbose)
        logmsg("%s %s C: %s(not shown)", x->id, x->label, command);
    sent = send_bytes(x, line, strlen(line), AUTH);
    wipe(line, sizeof line);
    return sent ? read_reply(x, AUTH) : 0;
}

/* Says AUTH (RFC 4954): PLAIN (RFC 4616), or LOGIN if PLAIN is not offered.  If the
 * smarthost refuses us, that is our operator's to mend, not the sender's fault: TRANSIENT. */
static enum completion authenticate(struct exchange *x)
{
    char both[1 + 2 * SECRET_SIZE];     /* NUL, name, NUL, password; and the NUL of strcpy() */
    size_t user = strlen(settings.user), password = strlen(settings.password);
    int code = 0;

    if (x->auth_plain) {
        both[0] = '\0';
        strcpy(both + 1, settings.user);
        strcpy(both + 2 + user, settings.password);
        code = say_secret(x, "AUTH PLAIN ", both, 2 + user + password);
        wipe(both, sizeof both);
    } else if (x->auth_login) {
        code = say(x, AUTH, "AUTH LOGIN\r\n");
        if (code == 334)
            code = say_secret(x, "", settings.user, user);
        if (code == 334)
            code = say_secret(x, "", settings.password, password);
    } else {
        snprintf(x->words, sizeof x->words, "4.7.0 neither AUTH PLAIN nor AUTH LOGIN is offered");
    }
    return code == 235 ? POSITIVE : TRANSIENT;
}

/* Says all that comes before the first message: EHLO, STARTTLS, AUTH. */
static enum completion introduce(struct exchange *x)
{
    enum completion hello = POSITIVE;
    bool offered = settings.tls_first;

    x->code = 0;
    if (!settings.tls_first) {
        hello = say_hello(x);
        offered = x->starttls;
    }
    if (hello == POSITIVE && offered && settings.tls != TLS_NEVER && !x->bare)
        hello = start_tls(x);
    if (hello == POSITIVE && settings.tls >= TLS_MUST && x->tunnel == NULL) {
        if (!offered)
            snprintf(x->words, sizeof x->words, "4.7.4 no STARTTLS is offered, and mail must not go in plain");
        hello = TRANSIENT;
    }
    return hello == POSITIVE && settings.user[0] != '\0' ? authenticate(x) : hello;
}

/* A part of a message, read to be surveyed or sent; the first octet is for survey(). */
static char block[1 + BLOCK];

/* Reads the message once, for MAIL's parameters: whether it has octets beyond ASCII (the
 * client may have declared none), and its size as RFC 1870 counts it, without the dots
 * that were added. */
static void survey(struct message *m)
{
    char bits = 0;
    ssize_t n;

    m->size = (unsigned long long)(m->end - m->body);
    block[0] = '\n';
    for (off_t at = m->body; at < m->end; at += n) {
        const char *dot = block;

        n = pread(m->fd, block + 1, m->end - at < BLOCK ? (size_t)(m->end - at) : BLOCK, at);
        if (n <= 0)
            return;         /* send_message() reports the error */
        for (ssize_t i = 1; i <= n; i++)
            bits |= block[i];
        while ((dot = memchr(dot + 1, '.', (size_t)(block + n - dot))) != NULL)
            if (dot[-1] == '\n')
                m->size--;
        block[0] = block[n];
    }
    m->eight_bit = (bits & 0x80) != 0;
}

/* Sends the message and its final dot, as they are in the file.  False: x->words say why
 * that failed. */
static bool send_message(struct exchange *x, const struct message *m)
{
    off_t at = m->body, behind = m->end + 3;

    if (settings.verbose)
        logmsg("%s %s C: (%lld octets of message)", x->id, x->label, (long long)(m->end - m->body));
    log_exchange(x, "C", ".", 1);
    while (at < behind) {
        size_t size = behind - at < BLOCK ? (size_t)(behind - at) : BLOCK;
        ssize_t n = pread(m->fd, block, size, at);

        if (n <= 0) {       /* without the final dot, the exchanger drops what it has received */
            snprintf(x->words, sizeof x->words, "4.3.0 the spool cannot be read: %s", strerror(errno));
            return false;
        }
        if (!send_bytes(x, block, (size_t)n, MESSAGE))
            return false;
        at += n;
    }
    return true;
}

/* Blocks or unblocks SIGTERM and SIGINT.  They have to wait from the moment at which the
 * exchanger may have the message, or a report is stored, until that is recorded. */
static void hold_signals(bool hold)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(hold ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}

/* Some recipients of a message, at most as many as a transaction may have. */
struct group {
    struct recipient *list[GROUP_LIMIT];
    size_t count;
};

/* The recipients of one mail transaction with an exchanger (RFC 5321 3.3), and what came of it. */
struct envelope {
    struct group to;
    struct group accepted;      /* RCPT was answered with 2xx */
    struct group surplus;       /* RCPT was answered with 451, 452 or 552: another transaction may have room */
    bool full;                  /* one was answered with 452 or 552: the exchanger limits recipients */
    bool content_awaited;       /* DATA was answered with 354, or another 3yz */
};

static void add_to_group(struct group *g, struct recipient *r)
{
    g->list[g->count++] = r;
}

/* Settles those of the group that have no final outcome yet, with the words of the last
 * reply. */
static void settle_group(const struct exchange *x, struct group *g, enum outcome outcome)
{
    settle_all(g->list, g->count, outcome, x->label, x->words);
}

/* Sends the message, and settles all accepted recipients by the exchanger's reply.  False:
 * the connection is of no more use. */
static bool transfer_message(struct exchange *x, struct message *m, struct envelope *e)
{
    bool sent;
    int code = 0;

    hold_signals(true);
    sent = send_message(x, m);
    if (sent)
        code = read_reply(x, FINAL_DOT);
    settle_group(x, &e->accepted, outcome_of(judge(x, sent ? code : x->code)));
    if (judge(x, code) == POSITIVE)
        write_sent(m);
    hold_signals(false);
    return code != 0;
}

/* Returns the commands of a transaction up to DATA, in memory that is the caller's. */
static char *compose_envelope(const struct exchange *x, const struct message *m, const struct group *to)
{
    char *text = NULL;
    size_t size;
    FILE *lines = open_text(&text, &size);

    put(lines, "MAIL FROM:<%s>", m->reverse_path);
    if (x->sized)
        put(lines, " SIZE=%llu", m->size);
    put(lines, "%s\r\n", x->eight_bit && (m->eight_bit || m->declared) ? " BODY=8BITMIME" : "");
    for (size_t i = 0; i < to->count; i++)
        put(lines, "RCPT TO:<%s>\r\n", to->list[i]->address);
    put(lines, "DATA\r\n");
    close_text(lines);
    return text;
}

/* Reads the reply to the first of these commands, which without PIPELINING is only sent
 * now, and moves *commands on to the next.  Returns the reply's code, or 0. */
static int next_reply(struct exchange *x, const char **commands, enum step step)
{
    const char *command = *commands;
    size_t length = strcspn(command, "\n") + 1;

    *commands += length;
    log_exchange(x, "C", command, length - 2);
    if (!x->pipelining && !send_bytes(x, command, length, step))
        return 0;
    return read_reply(x, step);
}

/* Handles the reply to a recipient's RCPT, which is the last reply read. */
static void take_recipient_reply(struct exchange *x, struct envelope *e, struct recipient *r)
{
    bool full = x->code == 452 || x->code == 552;

    if (judge(x, x->code) == POSITIVE) {
        x->accepting = true;
        add_to_group(&e->accepted, r);
        return;
    }
    /* A server of RFC 821's time says 552 where it means 452: RFC 5321 4.5.3.1.10. */
    settle(r, full ? LATER : outcome_of(judge(x, x->code)), x->label, x->words);
    e->full = e->full || full;
    if (full || x->code == 451)
        add_to_group(&e->surplus, r);
}

/* Says MAIL, the RCPTs and DATA.  With PIPELINING (RFC 2920) all are sent at once, and each
 * gets its reply; without it each is sent after the reply to the one before, and only if
 * that reply allows it.  False: the connection is of no more use. */
static bool say_envelope(struct exchange *x, const char *commands, struct envelope *e)
{
    bool ahead = x->pipelining, mail_ok;

    if ((ahead && !send_bytes(x, commands, strlen(commands), ENVELOPE)) || next_reply(x, &commands, ENVELOPE) == 0)
        return false;
    mail_ok = judge(x, x->code) == POSITIVE;
    if (!mail_ok)
        settle_group(x, &e->to, outcome_of(judge(x, x->code)));
    for (size_t i = 0; i < e->to.count && (mail_ok || ahead); i++) {
        if (next_reply(x, &commands, ENVELOPE) == 0)
            return false;
        if (mail_ok)
            take_recipient_reply(x, e, e->to.list[i]);
    }
    if (e->accepted.count == 0 && !ahead)
        return true;
    if (next_reply(x, &commands, DATA_COMMAND) == 0)
        return false;
    e->content_awaited = x->code / 100 == 3;    /* 354; the first digit says what to do: RFC 5321 4.2.1 */
    if (e->content_awaited && !mail_ok) {       /* then no reply of this exchanger can be trusted */
        lose(x, "a yes after a no", DATA_COMMAND);
        return false;
    }
    if (!e->content_awaited)
        settle_group(x, &e->accepted, judge(x, x->code) == PERMANENT ? FAILED : LATER);
    return true;
}

/* Carries out one transaction.  If the exchanger accepts the message, that is recorded when
 * this returns.  False: the connection is of no more use. */
static bool transact(struct exchange *x, struct message *m, struct envelope *e)
{
    char *commands = compose_envelope(x, m, &e->to);
    bool alive = say_envelope(x, commands, e);

    free(commands);
    if (!alive) {
        settle_group(x, &e->to, LATER);     /* accepted recipients do not have the message; a final no stands */
        return false;
    }
    if (!e->content_awaited)
        return true;
    if (e->accepted.count > 0)
        return transfer_message(x, m, e);
    return say(x, FINAL_DOT, ".\r\n") != 0;     /* no recipients: an empty message ends it (RFC 2920 3.1) */
}

/* Whether the transaction has got somewhere: the exchanger accepted recipients, and its
 * reply to DATA or to the message was final, 2xx or 5xx.  That reply is the same for all
 * accepted recipients. */
static bool got_somewhere(const struct envelope *e)
{
    return e->accepted.count > 0 && e->accepted.list[0]->outcome != LATER;
}

/* The recipients that still need a transaction on this connection, in order. */
struct remaining {
    struct recipient **list;
    size_t count;
    size_t fresh;               /* the first `fresh` were in no transaction yet; the others were surplus in one */
    size_t limit;               /* how many one transaction gets; once it was too many, what the exchanger accepted */
};

/* Moves recipients from the front of the list into the envelope of the next transaction. */
static void begin_transaction(struct remaining *left, struct envelope *e)
{
    e->to.count = left->count < left->limit ? left->count : left->limit;
    memcpy(e->to.list, left->list, e->to.count * sizeof *left->list);
    left->count -= e->to.count;
    left->fresh -= left->fresh < e->to.count ? left->fresh : e->to.count;
    memmove(left->list, left->list + e->to.count, left->count * sizeof *left->list);
}

/* After a transaction that got somewhere, appends its surplus to the list.  After one that
 * did not, drops all surplus from the list: it waits for the next try. */
static void end_transaction(struct remaining *left, const struct envelope *e)
{
    if (!got_somewhere(e)) {
        left->count = left->fresh;
        return;
    }
    memcpy(left->list + left->count, e->surplus.list, e->surplus.count * sizeof *left->list);
    left->count += e->surplus.count;
    if (e->full)
        left->limit = e->accepted.count;
}

/* Carries out as many transactions as these recipients need: the exchanger may accept fewer
 * in one than we ask for (RFC 5321 4.5.3.1.10).  What one transaction has sent is recorded
 * before the next begins, and no recipient that has the message is asked for again.  False:
 * the connection is of no more use. */
static bool transact_all(struct exchange *x, struct message *m, struct recipient **to, size_t count)
{
    struct remaining left = { .list = allocate(NULL, count * sizeof *to), .limit = GROUP_LIMIT };
    bool alive = true;

    for (size_t i = 0; i < count; i++)
        if (to[i]->outcome == LATER)
            left.list[left.count++] = to[i];
    left.fresh = left.count;
    while (alive && left.count > 0) {
        struct envelope e = { .full = false };

        begin_transaction(&left, &e);
        alive = (!x->unfinished || say(x, ENVELOPE, "RSET\r\n") != 0) && transact(x, m, &e);
        x->unfinished = !e.content_awaited;
        end_transaction(&left, &e);
    }
    free(left.list);
    return alive;
}

/* ==== The race =========================================================== */

static int64_t clock_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Closes the connection, for the reason in x->words.  The address is not used again in
 * this try. */
static void spend(struct exchange *x)
{
    if (x->tunnel != NULL)
        x->fd = close_tunnel(x->tunnel);
    x->tunnel = NULL;
    if (x->fd >= 0)
        close(x->fd);
    x->fd = -1;
    x->progress = SPENT;
}

/* Returns what an error of connect() says.  `at_once`: connect() itself returned it, so it
 * comes from this machine, and not from a router or a host that does not answer. */
static enum refusal connect_refusal(int error, bool at_once)
{
    if (error == ECONNREFUSED)
        return NO_LISTENER;
    if (at_once && (error == ENETUNREACH || error == EHOSTUNREACH || error == EAFNOSUPPORT || error == EADDRNOTAVAIL))
        return NO_NETWORK;
    return NO_REFUSAL;
}

/* Calls connect() on a new non-blocking socket.  Returns 0, or the error if it fails at
 * once, which x->words describe. */
static int begin_connecting(struct exchange *x)
{
    const union address *source = source_of(x->address.sa.sa_family);
    char text[ADDRESS_TEXT];
    int error;

    x->fd = socket_open(&x->address, SOCK_STREAM);
    if (x->fd >= 0 && source != NULL && is_usable(source) && bind(x->fd, &source->sa, address_size(source)) != 0) {
        error = errno;
        snprintf(x->words, sizeof x->words, "4.4.1 cannot connect from %s (-b): %s", address_text(source, text),
            strerror(error));
        return error;
    }
    if (x->fd >= 0 && (connect(x->fd, &x->address.sa, address_size(&x->address)) == 0 || errno == EINPROGRESS))
        return 0;
    error = errno;
    snprintf(x->words, sizeof x->words, "4.4.1 %s", strerror(error));
    return error;
}

/* Starts a new connection: CONNECTING, or SPENT if that fails at once. */
static void start_connecting(struct exchange *x)
{
    int error;

    x->connected = x->greeted = 0;
    x->refusal = NO_REFUSAL;
    x->messages = 0;
    x->unfinished = false;
    x->size = x->lines = 0;
    x->closing = false;
    strrchr(x->label, ']')[1] = '\0';       /* no /tls yet */
    x->begun = clock_us();
    x->deadline = step_deadline(CONNECT);
    x->progress = CONNECTING;
    error = begin_connecting(x);
    if (error != 0) {
        x->refusal = connect_refusal(error, true);
        spend(x);
    }
}

/* Finishes a non-blocking connect(): the socket has become writable, so connect() is done,
 * and SO_ERROR tells whether it has failed. */
static void finish_connecting(struct exchange *x)
{
    int error = 0;
    socklen_t size = sizeof error;

    getsockopt(x->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
        x->refusal = connect_refusal(error, false);
        snprintf(x->words, sizeof x->words, "4.4.1 %s", strerror(error));
        spend(x);
        return;
    }
    x->connected = clock_us();
    x->deadline = step_deadline(GREETING);
    x->progress = AWAITING;
    if (settings.tls_first) {       /* the greeting comes by TLS, which begins with the winner alone */
        x->greeted = x->connected;
        x->progress = GREETED;
    }
}

/* Reads what has come of the greeting.  The address is GREETED after a whole 220, SPENT
 * after anything else, and stays AWAITING until the greeting is whole. */
static void take_greeting(struct exchange *x)
{
    bool open = fill_input(x);
    enum reading reading = take_reply(x);

    if (reading == ENTIRE && judge(x, x->code) == POSITIVE) {
        x->greeted = clock_us();
        x->progress = GREETED;
        return;
    }
    if (reading == PARTIAL && open)
        return;
    if (reading != ENTIRE)
        lose(x, open ? "no SMTP reply" : "connection lost", GREETING);
    else if (x->code < 500)
        x->refusal = BUSY;
    else if (judge(x, x->code) == PERMANENT)
        x->refusal = NO_MAIL;
    spend(x);
}

/* Waits until an address that is CONNECTING or AWAITING gets further or runs out of time.
 * False: there is no such address. */
static bool watch(struct route *route)
{
    int64_t first = INT64_MAX;
    fd_set readable, writable;
    int top = -1;

    FD_ZERO(&readable);
    FD_ZERO(&writable);
    for (struct exchange *x = route->x; x < route->x + route->count; x++) {
        if (x->progress != CONNECTING && x->progress != AWAITING)
            continue;
        watch_fd(x->fd, x->progress == CONNECTING ? &writable : &readable, &top);
        first = x->deadline < first ? x->deadline : first;
    }
    if (top < 0)
        return false;
    wait_sets(top, &readable, &writable, first);
    for (struct exchange *x = route->x; x < route->x + route->count; x++) {
        if (x->progress == CONNECTING && FD_ISSET(x->fd, &writable)) {
            finish_connecting(x);
        } else if (x->progress == AWAITING && FD_ISSET(x->fd, &readable)) {
            take_greeting(x);
        } else if ((x->progress == CONNECTING || x->progress == AWAITING) && clock_ms() >= x->deadline) {
            lose(x, "no answer in time", x->progress == CONNECTING ? CONNECT : GREETING);
            spend(x);
        }
    }
    return true;
}

/* Appends a time of `us` microseconds in milliseconds.  "%.2f" is not used because
 * libc's code for floating point costs each child several page faults. */
static void put_ms(FILE *line, const char *name, int64_t us)
{
    put(line, " %s=%ld.%02ldms", name, (long)(us / 1000), (long)(us % 1000 / 10));
}

/* Logs what the race that began at `start` has measured: milliseconds from connect() to
 * the handshake and to the greeting, or "-" if another address won before the greeting. */
static void log_race(const struct route *route, int64_t start)
{
    char *text = NULL;
    size_t size;
    FILE *line = open_text(&text, &size);

    for (const struct exchange *x = route->x; x < route->x + route->count; x++) {
        if (x->begun < start)
            continue;           /* it was not in this race */
        put(line, " %s", x->label);
        if (x->connected != 0)
            put_ms(line, "handshake", x->connected - x->begun);
        if (x->greeted > x->connected)
            put_ms(line, "greeting", x->greeted - x->begun);
        else if (x->progress == SPENT)
            put(line, " (%s)", x->words);
        else
            put(line, " greeting=-");
        put(line, ";");
    }
    close_text(line);
    if (size > 0)
        logmsg("%s race:%.*s", route->x[0].id, (int)size - 1, text);
    free(text);
}

/* Ends a connection that lost the race or is not kept any longer.  An exchanger that has
 * greeted is told QUIT; before the greeting a client must say nothing (RFC 5321 4.3.1).
 * The address may still be used in this try. */
static void let_go(struct exchange *x)
{
    static const char quit[] = "QUIT\r\n";
    bool greeted;

    if (x->progress == AWAITING)
        take_greeting(x);
    greeted = x->progress == INTRODUCED || (x->progress == GREETED && !settings.tls_first);
    if (x->tunnel != NULL)      /* openssl needs time to send it, so wait for the reply */
        say(x, QUIT, quit);
    else if (greeted && write(x->fd, quit, sizeof quit - 1) < 0)
        lose(x, "connection lost", QUIT);
    if (x->progress != SPENT) {
        spend(x);
        x->progress = UNTRIED;
    }
}

/* Of the addresses that have greeted, returns the one that took the shortest time from
 * connect() to its greeting.  NULL: there is none. */
static struct exchange *fastest(struct route *route)
{
    struct exchange *best = NULL;

    for (struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->progress == GREETED && (best == NULL || x->greeted - x->begun < best->greeted - best->begun))
            best = x;
    return best;
}

/* Connects to all untried addresses of one preference at once.  Returns the one that took
 * the shortest time to greet, and ends the other connections.  NULL: none has greeted. */
static struct exchange *race(struct route *route, unsigned preference)
{
    struct exchange *winner = NULL, *end = route->x + route->count;
    int64_t start = clock_us();

    for (struct exchange *x = route->x; x < end; x++)
        if (x->progress == UNTRIED && x->preference == preference)
            start_connecting(x);
    while (winner == NULL && watch(route))
        winner = fastest(route);
    log_race(route, start);
    for (struct exchange *x = route->x; x < end; x++)
        if (x != winner && x->fd >= 0)
            let_go(x);
    return winner;
}

/* ==== Delivery =========================================================== */

/* Whether the message is still owed to one of these recipients. */
static bool any_owed(struct recipient **to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (to[i]->outcome == LATER)
            return true;
    return false;
}

/* What each message needs to know of its batch, and what it leaves to the next message.
 * If the child that stored a message forwards it, that is a batch of one. */
struct batch {
    bool more;              /* another message follows: an open connection is worth keeping */
    bool patient;           /* if an exchanger has no room, the message waits for it; else that counts like silence */
    bool company;           /* other processes have connections in this lane: a refused connect() means no room, too */
    struct route *route;    /* the last message's route, if its connection is kept open; else NULL */
    char dead[PATH_LIMIT];  /* the domain whose exchangers were not reached; "*": the smarthost; "": none ... */
    char relay[LABEL_SIZE], words[REPLY_SIZE];    /* ... and what the records say of that */
};

/* What came of trying a domain. */
enum reach {
    REACHED,        /* an exchanger has greeted us, or no recipient is owed the message any more */
    NO_ROOM,        /* an exchanger accepts no further connection just now, and no recipient has a final outcome */
    UNREACHED       /* no exchanger has greeted us, or there is no route to one just now */
};

/* The exit status of a batch, or of the child that tried one domain of several.  die() exits 1. */
enum { SERVED = 0, NOT_SERVED = 2 };

/* Ends the kept connection, if there is one, and frees its route. */
static void drop_kept(struct batch *b)
{
    if (b->route != NULL && b->route->open != NULL)
        let_go(b->route->open);
    free(b->route);
    b->route = NULL;
}

/* Keeps a message's route for the next message, if its connection is open and no better
 * exchanger has greeted us: a better one may have refused only this message, and should
 * get the next.  Frees the route otherwise. */
static void keep_route(struct batch *b, struct route *route)
{
    bool best = route->open != NULL;

    for (struct exchange *x = route->x; best && x < route->x + route->count; x++)
        best = x->preference >= route->open->preference || x->greeted == 0;
    b->route = route;
    if (!best)
        drop_kept(b);
}

/* Returns the kept route if it leads to this domain and its connection still works; the
 * route is the caller's then.  Else drops it and returns NULL.  The route's other addresses
 * may all be tried for this message. */
static struct route *take_kept(struct batch *b, const char *domain, const char *id)
{
    struct route *route = b->route;

    /* If the exchanger has sent something now, it hangs up or is out of step. */
    if (route == NULL || clock_ms() > route->open->deadline || wait_exchange(route->open, false, 0)
        || (settings.smarthost == NULL && strcasecmp(route->domain, domain) != 0)) {
        drop_kept(b);
        return NULL;
    }
    for (struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x != route->open)
            x->progress = UNTRIED;
    logmsg("%s goes to %s, like the message before", id, route->open->label);
    b->route = NULL;
    return route;
}

/* Remembers that no exchanger of this domain was reached: the rest of the batch is settled
 * with the same words, without a try. */
static void note_dead(struct batch *b, const char *domain, const char *said)
{
    size_t relay = strcspn(said, " ");

    snprintf(b->dead, sizeof b->dead, "%s", settings.smarthost != NULL ? "*" : domain);
    snprintf(b->relay, sizeof b->relay, "%.*s", (int)relay, said);
    snprintf(b->words, sizeof b->words, "%s", said + relay + 1);
}

static bool is_dead(const struct batch *b, const char *domain)
{
    return b->dead[0] != '\0' && (settings.smarthost != NULL || strcasecmp(b->dead, domain) == 0);
}

/* Whether the exchanger can take this message at all.  If not, settles the recipients. */
static bool can_take(const struct exchange *x, const struct message *m, struct recipient **to, size_t count)
{
    const char *why = NULL;

    if (x->max_size > 0 && m->size > x->max_size)
        why = "5.3.4 the message is larger than this exchanger takes";
    else if (m->eight_bit && !x->eight_bit)     /* RFC 6152 3: we do not convert */
        why = "5.6.3 8-bit content, and this exchanger offers no 8BITMIME";
    if (why != NULL)
        settle_all(to, count, x->bare ? LATER : FAILED, x->label, why);     /* by TLS it may offer more */
    return why == NULL;
}

/* Carries out the whole dialogue with an exchanger that has greeted us.  The connection
 * stays open if another message follows.  If the exchanger closes a reused connection
 * before accepting any recipient, it is tried once more on a new one: it may only limit
 * the messages of a connection.  If it closes a new connection with 421, it has no room
 * for us (RFC 5321 3.8).  If TLS fails, it may be tried once more in plain. */
static void talk(struct batch *b, struct exchange *x, struct message *m, struct recipient **to, size_t count)
{
    bool was_bare = x->bare, used = x->messages > 0;
    enum completion hello = x->progress == INTRODUCED ? POSITIVE : introduce(x);
    bool alive = x->code != 0, ended;

    if (x->refusal == NO_MAIL) {        /* a 5xx greeting that came by TLS: left to blame(), like one in plain */
        spend(x);
        return;
    }
    x->accepting = false;
    if (hello == POSITIVE)
        x->progress = INTRODUCED;
    else
        settle_all(to, count, outcome_of(hello), x->label, x->words);
    if (hello == POSITIVE && can_take(x, m, to, count))
        alive = transact_all(x, m, to, count);
    x->messages++;
    if (alive && x->progress == INTRODUCED && b->more && !m->part && !any_owed(to, count)) {
        x->deadline = clock_ms() + KEPT;
        return;
    }
    ended = (!alive || x->closing) && !x->accepting;
    if (x->closing && ended && !used)
        x->refusal = BUSY;
    if (alive)
        say(x, QUIT, "QUIT\r\n");
    spend(x);
    if ((used && ended) || (x->bare && !was_bare))
        x->progress = UNTRIED;
}

/* Settles recipients that are still owed the message with the reasons why exchangers could
 * not be reached, the most preferred first, behind what other exchangers said of them.
 * Addresses that this machine has no network for are named only if there are no others. */
static void blame(const struct route *route, enum outcome outcome, struct recipient **to, size_t count)
{
    bool network = false;

    for (const struct exchange *x = route->x; x < route->x + route->count; x++)
        network = network || (x->progress == SPENT && x->refusal != NO_NETWORK);
    for (const struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->progress == SPENT && x->messages == 0 && (x->refusal != NO_NETWORK || !network))
            settle_all(to, count, outcome, x->label, x->words);
}

/* Whether all exchangers greeted with a 5xx: then the domain accepts no mail (RFC 5321 3.1).
 * Addresses that this machine has no network for do not count.  An exchanger whose address
 * could not be looked up might accept mail. */
static bool all_refuse(const struct route *route)
{
    bool any = false;

    for (const struct exchange *x = route->x; x < route->x + route->count; x++) {
        if (x->refusal != NO_MAIL && x->refusal != NO_NETWORK)
            return false;
        any = any || x->refusal == NO_MAIL;
    }
    return any && route->whole;
}

/* What a try came to.  If an exchanger answered and others have no room, the answer
 * counts.  In a batch that is not patient, want of room is no better than silence. */
static enum reach judge_try(const struct batch *b, const struct route *route, struct recipient **to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (to[i]->outcome != LATER)
            return REACHED;
    for (const struct exchange *x = route->x; x < route->x + route->count; x++)
        if (x->greeted != 0 && x->refusal != BUSY)
            return REACHED;
    for (const struct exchange *x = route->x; x < route->x + route->count; x++)
        if (b->patient && (x->refusal == BUSY || (x->refusal == NO_LISTENER && b->company)))
            return NO_ROOM;
    return UNREACHED;
}

/* Tries the exchangers of a route, the most preferred first, until no recipient is owed the
 * message any more (RFC 5321 5.1). */
static enum reach try_exchangers(struct batch *b, struct route *route, struct message *m, struct recipient **to,
    size_t count)
{
    size_t i = 0;

    while (i < route->count && any_owed(to, count)) {
        unsigned preference = route->x[i].preference;
        struct exchange *x = route->open != NULL ? route->open : race(route, preference);

        if (x != NULL) {
            talk(b, x, m, to, count);
            route->open = x->fd >= 0 ? x : NULL;
            continue;
        }
        while (i < route->count && route->x[i].preference == preference)
            i++;
    }
    blame(route, all_refuse(route) ? FAILED : LATER, to, count);
    return judge_try(b, route, to, count);
}

/* Tries to deliver the message to these recipients, which share a domain. */
static enum reach deliver(struct batch *b, struct message *m, struct recipient **to, size_t count)
{
    const char *domain = domain_of(to[0]->address);
    struct route *route;
    enum reach reach;

    if (is_dead(b, domain)) {
        settle_all(to, count, LATER, b->relay, b->words);
        return UNREACHED;
    }
    route = take_kept(b, domain, m->id);
    if (route == NULL) {
        route = allocate(NULL, sizeof *route);
        find_route(route, domain);
    }
    for (size_t k = 0; k < route->count; k++)
        strcpy(route->x[k].id, m->id);
    if (route->count > 0) {
        survey(m);
        reach = try_exchangers(b, route, m, to, count);
    } else {
        settle_all(to, count, route->outcome, "-", route->words);
        reach = route->outcome == FAILED ? REACHED : UNREACHED;
    }
    if (reach == UNREACHED)
        note_dead(b, domain, to[0]->said);
    keep_route(b, route);
    return reach;
}

/* If the message is as old as -e, fails the recipients that it is still owed to. */
static void expire(const struct message *m, struct recipient **to, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        char words[REPLY_SIZE], *said = to[i]->said;

        if (to[i]->outcome != LATER || m->age < settings.expire)
            continue;
        snprintf(words, sizeof words, "4.4.7 given up after %lld seconds; last: %s", (long long)m->age,
            said != NULL ? said : "-");
        settle(to[i], FAILED, "-", words);
    }
}

/* ==== Reports ============================================================ */

/* Copies the status code (RFC 3463 2) from an exchanger's words: class, subject and detail,
 * of which the last two have up to three digits.  If there is none, the status is 5.0.0. */
static void find_status(const char *words, char status[16])
{
    static const char digits[] = "0123456789";
    size_t subject, detail;

    strcpy(status, "5.0.0");
    if (strspn(words, digits) == 3)
        words += words[3] == ' ' ? 4 : 3;
    if ((words[0] != '4' && words[0] != '5') || words[1] != '.')
        return;
    subject = strspn(words + 2, digits);
    if (subject < 1 || subject > 3 || words[2 + subject] != '.')
        return;
    detail = strspn(words + 3 + subject, digits);
    if (detail >= 1 && detail <= 3 && strchr(" ", words[3 + subject + detail]) != NULL)     /* a space, or the end */
        snprintf(status, 16, "%.*s", (int)(3 + subject + detail), words);
}

/* Writes the part of a report that programs read (RFC 3464 2). */
static void write_delivery_status(FILE *out, const struct message *m)
{
    char date[DATE_SIZE], status[16];

    mail_date(date, id_time(m->id));
    put(out, "Reporting-MTA: dns; %s\r\nArrival-Date: %s\r\n", settings.hostname, date);
    mail_date(date, wall_clock());
    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];
        size_t name, relay, address;
        const char *words;

        if (!is_new(r, FAILED))
            continue;
        name = strcspn(r->said, "[ ");
        relay = strcspn(r->said, " ");
        address = strcspn(r->said, "/ ");       /* no /tls */
        words = r->said + relay + 1;
        find_status(words, status);
        put(out, "\r\nFinal-Recipient: rfc822; %s\r\nAction: failed\r\nStatus: %s\r\n", r->address, status);
        if (r->said[0] != '-')
            put(out, "Remote-MTA: dns; %.*s\r\n", (int)(name > 0 ? name : address), r->said);
        put(out, "Diagnostic-Code: %s; %s\r\nLast-Attempt-Date: %s\r\n",
            strspn(words, "0123456789") == 3 ? "smtp" : "x-relay", words, date);
    }
}

/* Writes the header of the message that failed: about HEADER_LIMIT octets at most, in lines
 * of printable ASCII that are not too long (RFC 5321 4.5.3.1.6). */
static void write_header(FILE *out, const struct message *m)
{
    struct reader r = { .fd = m->fd, .at = m->body };
    size_t written = 0;
    char *line;

    while ((line = read_line(&r)) != NULL && r.length > 0 && reader_offset(&r) <= m->end && written < HEADER_LIMIT) {
        size_t length = r.length < 990 ? r.length : 990;

        for (size_t i = 0; i < length; i++)
            if ((line[i] < ' ' && line[i] != '\t') || line[i] > '~')
                line[i] = '?';
        put(out, "%.*s\r\n", (int)length, line);
        written += length + 2;
    }
}

/* Writes the report on all new failures (RFC 3464, RFC 6522) as a file of the queue.
 * Its reverse-path is null, so that no report can be made on it (RFC 5321 4.5.5). */
static void write_report(FILE *out, const struct message *m, const char *id)
{
    char date[DATE_SIZE];

    mail_date(date, wall_clock());
    put(out, "HELO %s\r\nMAIL FROM:<>\r\nRCPT TO:<%s>\r\nDATA\r\n", settings.hostname, m->reverse_path);
    put(out, "Date: %s\r\nFrom: Mail relay <MAILER-DAEMON@%s>\r\nTo: <%s>\r\n", date, settings.hostname,
        m->reverse_path);
    put(out, "Subject: Undelivered mail\r\nMessage-ID: <%s@%s>\r\nAuto-Submitted: auto-replied\r\n", id,
        settings.hostname);       /* RFC 3834 5 */
    put(out, "MIME-Version: 1.0\r\nContent-Type: multipart/report; report-type=delivery-status;\r\n"
        "\tboundary=\"=_%s\"\r\n\r\n", id);
    put(out, "--=_%s\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n"
        "This is the mail relay at %s.\r\n\r\n"
        "Your message, whose header is below, did not reach these recipients, and\r\n"
        "is not tried any more for them:\r\n", id, settings.hostname);
    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];

        if (is_new(r, FAILED))
            put(out, "\r\n  <%s>\r\n    %s\r\n", r->address, r->said);
    }
    put(out, "\r\n--=_%s\r\nContent-Type: message/delivery-status\r\n\r\n", id);
    write_delivery_status(out, m);
    put(out, "\r\n--=_%s\r\nContent-Type: text/rfc822-headers\r\n\r\n", id);
    write_header(out, m);
    put(out, "\r\n--=_%s--\r\n.\r\n", id);
}

/* Stores a report on the new failures.  Returns false if that did not work; then no failure
 * may be recorded.  Mail with a null reverse-path gets no report (RFC 5321 6.1), and
 * report->fd stays -1. */
static bool report_failures(const struct message *m, struct draft *report)
{
    char *text = NULL;
    size_t size;
    FILE *out;

    if (m->reverse_path[0] == '\0') {
        logmsg("%s came from <>: its failures are reported to nobody", m->id);
        return true;
    }
    if (!draft_open(report, 0))
        return false;
    out = open_text(&text, &size);
    write_report(out, m, report->id);
    close_text(out);
    draft_add(report, text, size);
    free(text);
    if (!store(report))
        return false;
    logmsg("%s failures are reported to=<%s> by %s", m->id, m->reverse_path, report->id);
    return true;
}

/* ==== Forwarders ========================================================= */

/* The recipients of one domain. */
struct party {
    struct recipient **to;
    size_t count;
    pid_t child;            /* that tries this domain, if there are several ... */
    bool dead;              /* ... and whether it reached no exchanger, or none with room */
};

/* Whether both recipients' mail goes to the same exchangers.  With a smarthost all does. */
static bool share_party(const struct recipient *a, const struct recipient *b)
{
    return settings.smarthost != NULL || strcasecmp(domain_of(a->address), domain_of(b->address)) == 0;
}

static bool has_party(const struct recipient *r, const struct party *parties, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (share_party(r, parties[i].to[0]))
            return true;
    return false;
}

/* Puts the recipients that the message is owed to into `order`, those of a domain
 * side by side, and divides them into parties.  Returns how many parties there are. */
static size_t make_parties(struct message *m, struct recipient **order, struct party *parties)
{
    size_t count = 0;

    for (size_t i = 0; i < m->count; i++) {
        struct party *p = &parties[count];

        if (m->recipients[i].outcome != LATER || has_party(&m->recipients[i], parties, count))
            continue;
        *p = (struct party){ .to = order };
        p->to[p->count++] = &m->recipients[i];
        for (size_t k = i + 1; k < m->count; k++)
            if (m->recipients[k].outcome == LATER && share_party(&m->recipients[i], &m->recipients[k]))
                p->to[p->count++] = &m->recipients[k];
        order += p->count;
        count++;
    }
    return count;
}

/* Returns how many seconds a try may take.  After that each step times out at once. */
static long try_limit(void)
{
    return settings.wait > 0 && settings.wait < TRY_LIMIT / TRY_STEPS ? TRY_STEPS * settings.wait : TRY_LIMIT;
}

static void log_no_room(const struct message *m, const char *said)
{
    logmsg("%s finds no room for another connection (%s): tried again soon", m->id, said);
}

/* Tries a domain; as long as there is no room for another connection, once a second until
 * the time for that is over. */
static enum reach deliver_when_room(struct batch *b, struct message *m, const struct party *p)
{
    struct timespec second = { 1, 0 };
    int64_t end = step_deadline(ROOM);
    enum reach reach = deliver(b, m, p->to, p->count);

    if (reach == NO_ROOM)
        log_no_room(m, p->to[0]->said);
    while (reach == NO_ROOM && clock_ms() < end) {
        nanosleep(&second, NULL);
        for (size_t i = 0; i < p->count; i++)
            p->to[i]->unrecorded = false;       /* only the last try is recorded */
        reach = deliver(b, m, p->to, p->count);
    }
    return reach;
}

/* Runs the child for one domain, and never returns.  The child locks the octet of its
 * number, and its parent keeps octet 0: if the parent is killed, no process tries the
 * message again before this child has ended, too.  The child records what was sent or is
 * for later.  It passes failures on by `failures`, and the parent reports them before it
 * records them. */
static void try_party(struct batch *b, struct message *m, const struct party *p, off_t number, pid_t parent,
    struct draft *failures)
{
    enum reach reach;
    size_t size;
    char *text;

    alarm((unsigned)(2 * try_limit()));     /* fork() has cleared the parent's */
    if (!lock_octets(m->fd, F_WRLCK, number, 1) || getppid() != parent)
        _exit(SERVED);
    m->part = true;
    b->company = b->company && number == 1;     /* the first domain is the one of the batch's lane */
    reach = deliver_when_room(b, m, p);
    expire(m, p->to, p->count);
    if (write_outcomes(m, LATER) != RECORDED)
        log_unrecorded(m);
    text = outcome_lines(m, FAILED, "", &size);
    draft_add(failures, text, size);
    free(text);
    _exit(reach == REACHED ? SERVED : NOT_SERVED);
}

/* Forks the child for one domain.  False: no process can be made. */
static bool start_party(struct batch *b, struct message *m, struct party *p, off_t number, struct draft *failures)
{
    pid_t parent = getpid();

    p->child = fork();
    if (p->child == 0)
        try_party(b, m, p, number, parent, failures);
    return p->child > 0;
}

/* Notes that a child for one of these domains has ended. */
static void end_party(struct party *parties, size_t count, pid_t child, int status)
{
    if (WIFSIGNALED(status))
        logmsg("process %ld died of signal %d", (long)child, WTERMSIG(status));
    for (size_t i = 0; i < count; i++)
        if (parties[i].child == child)
            parties[i].dead = WIFEXITED(status) && WEXITSTATUS(status) == NOT_SERVED;
}

/* Reads what the children have recorded, and the failures that they have passed on: only
 * these are new to the file. */
static void read_results(struct message *m, const struct draft *failures)
{
    struct reader r = { .fd = failures->fd };
    char *line;

    read_outcomes(m);
    for (size_t i = 0; i < m->count; i++)
        m->recipients[i].unrecorded = m->recipients[i].outcome == LATER;
    while ((line = read_line(&r)) != NULL)
        apply_outcome(m, line);
    for (size_t i = 0; i < m->count; i++)
        m->recipients[i].unrecorded = m->recipients[i].unrecorded && m->recipients[i].outcome == FAILED;
}

/* Notes the domains of which no exchanger was reached, so that the next message of the
 * batch does not wait for them. */
static void note_dead_parties(struct batch *b, const struct party *parties, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct recipient *first = parties[i].to[0];

        if (parties[i].dead && first->outcome == LATER && first->said != NULL)
            note_dead(b, domain_of(first->address), first->said);
    }
}

/* Tries several domains, up to DOMAINS_AT_ONCE side by side, so that a dead one delays no
 * other. */
static void deliver_parties(struct batch *b, struct message *m, struct party *parties, size_t count)
{
    struct draft failures;
    size_t begun = 0, running = 0;
    int status;
    pid_t pid;

    drop_kept(b);           /* two processes must not use one connection */
    if (!draft_open(&failures, 0))
        return;
    unlink(spool_path("tmp", failures.id));     /* the children need no name, and a signal leaves no file behind */
    lock_octets(m->fd, F_UNLCK, 1, 0);      /* all but octet 0, so that each child can lock its own */
    while (begun < count || running > 0) {
        if (begun < count && running < DOMAINS_AT_ONCE
            && start_party(b, m, &parties[begun], (off_t)begun + 1, &failures)) {
            begun++;
            running++;
        } else if (running == 0) {
            logmsg("%s has no process for %lu of its domains (%s): they wait", m->id, (unsigned long)(count - begun),
                strerror(errno));
            break;
        } else if ((pid = wait(&status)) > 0) {
            end_party(parties, begun, pid, status);
            running--;
        }
    }
    read_results(m, &failures);
    draft_forget(&failures);
    note_dead_parties(b, parties, begun);
}

/* Removes a report again.  This process still has it locked, so no other can have sent it. */
static void withdraw_report(const struct message *m, struct draft *report)
{
    if (report->fd < 0 || unlink(spool_path("queue", report->id)) != 0)
        return;
    logmsg("%s report %s is withdrawn: its failures will be found again", m->id, report->id);
    draft_forget(report);
}

/* Reports the new failures, and then records them.  After a crash in between, the next try
 * finds the failures, and reports them, again.  If nothing of the record can be written,
 * the report is withdrawn, or while the disk is full the sender would get one for each
 * try.  Returns false unless all is recorded. */
static bool conclude_failures(struct message *m, struct draft *report)
{
    enum record record;

    if (!report_failures(m, report)) {
        logmsg("%s failures cannot be reported now: they will be found again", m->id);
        return false;
    }
    record = write_outcomes(m, FAILED);
    if (record != RECORDED)
        log_unrecorded(m);
    if (record == UNRECORDED)
        withdraw_report(m, report);
    return record == RECORDED;
}

/* Ends a try: reports and records its outcomes, and removes or reschedules the message. */
static void conclude(struct message *m, struct draft *report)
{
    bool owed = count_owed(m) > 0, recorded;

    hold_signals(true);         /* a process that ends between report and record causes a second report */
    recorded = !any_new(m, FAILED) || conclude_failures(m, report);
    if (recorded && write_outcomes(m, LATER) != RECORDED)
        log_unrecorded(m);
    hold_signals(false);
    if (!recorded)
        return;                 /* the next try was set ahead when this one began */
    m->due = wall_clock() + (time_t)back_off(m->age);
    if (owed)
        set_due(m);
    else if (!m->gone)
        remove_message(m);
}

/* Leaves the message in the queue, due now, because of what the exchanger `said`. */
static void give_back(struct message *m, const char *said)
{
    log_no_room(m, said);
    m->due = wall_clock();
    set_due(m);
}

/* Tries a message, which is locked, once.  NO_ROOM: it is due again, and nothing is recorded. */
static enum reach try_message(struct batch *b, struct message *m, struct draft *report)
{
    struct recipient **order = allocate_array(m->count, sizeof *order);
    struct party *parties = allocate_array(m->count, sizeof *parties);
    enum reach reach = REACHED;
    size_t count;

    /* If this process is killed, the message is not tried again at once. */
    m->due = wall_clock() + (time_t)back_off(m->age);
    set_due(m);
    count = make_parties(m, order, parties);
    if (count > 1)
        deliver_parties(b, m, parties, count);
    else if (count == 1)
        reach = deliver(b, m, order, parties[0].count);
    if (reach == NO_ROOM) {
        give_back(m, order[0]->said);
    } else {
        if (count == 1)
            expire(m, order, parties[0].count);
        if (!m->gone)
            conclude(m, report);
    }
    free(order);
    free(parties);
    return reach;
}

/* Reads and tries the message behind `fd`, which is locked, and then the report on it if
 * there is one; closes `fd`.  An alarm kills this process if that takes twice the time of
 * a try, even if the server is gone. */
static enum reach forward(struct batch *b, int fd, const char *id)
{
    struct draft report = { .fd = -1 };
    struct batch alone = { .patient = true };       /* the report may go elsewhere, so it is no part of the batch */
    enum reach reach = REACHED;
    struct message m;

    try_end = clock_ms() + (int64_t)try_limit() * 1000;
    alarm((unsigned)(2 * try_limit()));
    if (message_read(&m, fd, id))
        reach = try_message(b, &m, &report);
    else
        log_unread(&m);
    message_free(&m);
    if (report.fd >= 0) {
        if (message_read(&m, report.fd, report.id))
            try_message(&alone, &m, &report);
        message_free(&m);
        drop_kept(&alone);
    }
    alarm(0);
    return reach;
}

/* Writes a line on the due pipe.  If the pipe is full, nothing is lost: the queue manager
 * notices that, and finds the message in the queue. */
static void announce_due(const char *id, uint32_t lane, int due_fd)
{
    char line[DUE_SIZE + 1];
    int n = snprintf(line, sizeof line, DUE_FORMAT, id, (unsigned long)lane);

    if (write(due_fd, line, (size_t)n) != n)
        return;
}

void draft_hand_over(const struct draft *d, uint32_t lane, int due_fd)
{
    close(d->fd);           /* and with it the lock, which the batch needs */
    announce_due(d->id, lane, due_fd);
}

void draft_forward(const struct draft *d, uint32_t lane, bool company, int due_fd)
{
    struct batch alone = { .patient = true, .company = company };
    enum reach reach = forward(&alone, d->fd, d->id);

    drop_kept(&alone);
    if (reach == NO_ROOM)
        announce_due(d->id, lane, due_fd);      /* forward() has closed the draft */
    _exit(0);
}

/* ==== The queue manager ================================================== */

/*
 * One process forwards all mail that no transaction's child forwards.  It lists some
 * thousands of due messages by id, and gives those of one lane to batches: children
 * that try them one after the other.  How many batches a lane may have is learned:
 * one at first; one more each time a batch ends well and leaves mail of its lane
 * waiting; one again when an exchanger has no room or is not reached.
 */

/* A message that is due.  It stays listed while a batch has it, so that a search of
 * the queue does not list it again. */
struct due {
    char id[ID_SIZE];
    uint32_t lane;
    pid_t batch;            /* the batch that has it; 0: it waits */
    bool fresh;             /* it was never tried */
};

static struct due listed[LISTED_LIMIT];     /* sorted by id, and so by age */
static size_t listed_count;
static bool search_again;   /* the queue holds due messages that are not listed and should be */

/* A lane that has messages in the list, or had some a moment ago. */
struct lane {
    uint32_t lane;
    size_t waiting, fresh;  /* messages that wait, and how many of these were never tried */
    unsigned batches;       /* batches that are running */
    unsigned allowed;       /* how many may be running */
    unsigned refusals;      /* batches in a row that were not served, with no other batch running */
    int64_t not_before;     /* by clock_ms(): no batch starts before */
};

static struct lane lanes[LISTED_LIMIT];
static size_t lane_count;

/* A batch that is running. */
struct batch_process {
    pid_t pid;
    uint32_t lane;
    size_t count;           /* of its messages */
};

static struct batch_process *batches;
static unsigned batch_count, batch_limit;

static int due_end;        /* the read end of the due pipe */
static volatile sig_atomic_t all_due;   /* SIGHUP has come */

static void on_wake(int number)
{
    if (number == SIGHUP)
        all_due = 1;        /* SIGCHLD only has to interrupt pselect() */
}

/* Returns the lane with this hash, a new one if it is not known yet; NULL: the table is full. */
static struct lane *find_lane(uint32_t lane)
{
    size_t i = 0;

    while (i < lane_count && lanes[i].lane != lane)
        i++;
    if (i == LISTED_LIMIT)
        return NULL;
    if (i == lane_count)
        lanes[lane_count++] = (struct lane){ .lane = lane, .allowed = 1 };
    return &lanes[i];
}

/* Forgets the lanes that have neither messages nor batches.  A lane that was not served
 * is remembered until the search after next, or it would get a large share of the list
 * again each time. */
static void forget_idle_lanes(int64_t now)
{
    size_t left = 0;

    for (size_t i = 0; i < lane_count; i++) {
        const struct lane *l = &lanes[i];
        int64_t until = l->not_before + (l->refusals > 0 ? 2 * NAP_LIMIT * 1000 : 0);

        if (l->waiting > 0 || l->batches > 0 || now < until)
            lanes[left++] = lanes[i];
    }
    lane_count = left;
}

/* Returns how many messages of this lane may wait in the list: half of the list, so that
 * messages of other lanes have room, too; but only one batch's worth if the lane's last
 * batch was not served, since it may be long until the next one starts. */
static size_t list_share(const struct lane *l)
{
    return l->refusals > 0 ? BATCH_LIMIT : LISTED_LIMIT / 2;
}

/* Counts a listed message in with those of its lane that wait, or out again. */
static void count_in(struct lane *l, const struct due *d)
{
    l->waiting++;
    l->fresh += d->fresh ? 1 : 0;
}

static void count_out(struct lane *l, const struct due *d)
{
    l->waiting--;
    l->fresh -= d->fresh ? 1 : 0;
}

/* Returns where in the list this id is, or would be. */
static size_t find_listed(const char *id)
{
    size_t low = 0, high = listed_count;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (strcmp(listed[middle].id, id) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool is_listed(const char *id)
{
    size_t i = find_listed(id);

    return i < listed_count && strcmp(listed[i].id, id) == 0;
}

/* Lists a message that is due, unless it is listed or its lane has its share of the list.
 * In that case a later search finds the message: soon, unless the lane is not being served. */
static void list_due(const char *id, uint32_t lane, bool fresh)
{
    size_t i = find_listed(id);
    struct lane *l;

    if (is_listed(id))
        return;
    l = listed_count < LISTED_LIMIT ? find_lane(lane) : NULL;
    if (l == NULL || l->waiting >= list_share(l)) {
        search_again = search_again || l == NULL || l->refusals == 0;
        return;
    }
    memmove(&listed[i + 1], &listed[i], (listed_count++ - i) * sizeof listed[0]);
    strcpy(listed[i].id, id);
    listed[i].lane = lane;
    listed[i].batch = 0;
    listed[i].fresh = fresh;
    count_in(l, &listed[i]);
}

/* ---- Batches ---- */

/* Whether a file of the queue can be a message of ours. */
static bool is_ours(const char *id, const struct stat *st)
{
    return id_time(id) != 0 && S_ISREG(st->st_mode) && st->st_uid == geteuid();
}

/* Returns when a file of the queue is due.  If that is later than any back-off, the clock
 * was wrong, then or now: it is due now. */
static time_t due_time(const struct stat *st)
{
    int64_t most = settings.retry > RETRY_LIMIT ? settings.retry : RETRY_LIMIT;

    return st->st_mtime > wall_clock() + most ? wall_clock() : st->st_mtime;
}

static bool is_due(const char *id)
{
    struct stat st;

    return lstat(spool_path("queue", id), &st) == 0 && is_ours(id, &st) && due_time(&st) <= wall_clock();
}

/* Opens a message of the queue that is due, and locks it.  -1: another process is trying
 * it, or has just tried or removed it. */
static int take_due(const char *id)
{
    struct stat st;
    int fd = id_time(id) != 0 ? open_message("queue", id, O_RDWR | O_APPEND) : -1;

    if (fd >= 0 && lock_octets(fd, F_WRLCK, 0, 0) && fstat(fd, &st) == 0 && st.st_nlink > 0 && is_due(id))
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* Runs a batch, and never returns: tries its messages one after the other, over one
 * connection where that is possible.  Messages that it did not begin are still due.  Once a
 * domain was not reached, its time begins anew: the wait for that domain is over, and the
 * rest of its mail is settled without one. */
static void run_batch(struct batch b, char ids[][ID_SIZE], size_t count, pid_t manager)
{
    int64_t end = clock_ms() + BATCH_TIME;
    enum reach reach = REACHED;

    close(due_end);
    for (size_t i = 0; i < count && reach != NO_ROOM && getppid() == manager; i++) {
        int fd = clock_ms() < end ? take_due(ids[i]) : -1;
        bool dead = b.dead[0] != '\0';

        b.more = i + 1 < count;
        if (fd >= 0)
            reach = forward(&b, fd, ids[i]);
        if (!dead && b.dead[0] != '\0')
            end = clock_ms() + BATCH_TIME;
    }
    drop_kept(&b);
    _exit(reach == REACHED ? SERVED : NOT_SERVED);
}

/* Returns how many messages the lane's next batch takes: an equal share for each batch that
 * the lane may still start. */
static size_t batch_size(const struct lane *l)
{
    size_t starts = l->allowed - l->batches, share = (l->waiting + starts - 1) / starts;

    return share < BATCH_LIMIT ? share : BATCH_LIMIT;
}

/* Forks a batch for this lane.  False: no process can be made. */
static bool start_batch(struct lane *l)
{
    char ids[BATCH_LIMIT][ID_SIZE];
    size_t chosen[BATCH_LIMIT], count = 0, size = batch_size(l);
    pid_t manager = getpid(), pid;
    struct batch b = { .patient = l->batches > 0 || l->refusals < PATIENCE, .company = l->batches > 0 };

    for (size_t i = 0; i < listed_count && count < size; i++)
        if (listed[i].batch == 0 && listed[i].lane == l->lane) {
            strcpy(ids[count], listed[i].id);
            chosen[count++] = i;
        }
    pid = fork();
    if (pid == 0)
        run_batch(b, ids, count, manager);
    if (pid < 0) {
        logmsg("no process for a batch can be made (%s): resting for a second", strerror(errno));
        return false;
    }
    for (size_t k = 0; k < count; k++) {
        listed[chosen[k]].batch = pid;
        count_out(l, &listed[chosen[k]]);
    }
    l->batches++;
    l->not_before = l->allowed == 1 ? clock_ms() + BATCH_GAP : 0;
    batches[batch_count++] = (struct batch_process){ pid, l->lane, count };
    return true;
}

/* Takes the messages of a batch that has ended off the list, except those that are still
 * due, which wait again.  Returns how many these are. */
static size_t unlist(pid_t batch, struct lane *l)
{
    size_t left = 0, back = 0;

    for (size_t i = 0; i < listed_count; i++) {
        struct due *d = &listed[i];

        if (d->batch == batch) {
            if (!is_due(d->id))
                continue;
            d->batch = 0;
            count_in(l, d);
            back++;
        }
        listed[left++] = *d;
    }
    listed_count = left;
    return back;
}

/* Takes the newest of a lane's waiting messages off the list, down to the lane's share. */
static void shorten_list(struct lane *l)
{
    size_t left = 0, waiting = 0;

    for (size_t i = 0; i < listed_count; i++) {
        const struct due *d = &listed[i];

        if (d->batch == 0 && d->lane == l->lane && ++waiting > list_share(l))
            count_out(l, d);
        else
            listed[left++] = *d;
    }
    listed_count = left;
}

/* Takes note of a batch that has ended, and learns from it how many batches its lane may
 * have (see above).  A lane whose only batch was not served pauses: for a second, then
 * twice as long each time. */
static void end_batch(const struct batch_process *p, bool served)
{
    struct lane *l = find_lane(p->lane);
    size_t back = unlist(p->pid, l);
    unsigned most = batch_limit > 1 ? batch_limit / 2 : 1;
    int64_t pause = 1000;

    l->batches--;
    if (served && back < p->count) {
        search_again = search_again || l->refusals > 0;     /* the lane's share of the list grows again */
        l->refusals = 0;
        if (l->waiting > 0 && (back > 0 || p->count == BATCH_LIMIT) && l->allowed < most)
            l->allowed++;
        return;
    }
    l->allowed = 1;
    if (l->batches > 0)
        return;             /* no batch starts before these have ended: that is pause enough */
    for (unsigned i = 0; i < l->refusals && pause < NAP_LIMIT * 1000; i++)
        pause *= 2;
    l->refusals++;
    l->not_before = clock_ms() + pause;
    shorten_list(l);
}

/* Takes note of all batches that have ended: one SIGCHLD may stand for many. */
static void reap_batches(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        unsigned i = 0;

        while (i < batch_count && batches[i].pid != pid)
            i++;
        if (i == batch_count)
            continue;
        if (WIFSIGNALED(status))
            logmsg("process %ld died of signal %d", (long)pid, WTERMSIG(status));
        end_batch(&batches[i], WIFEXITED(status) && WEXITSTATUS(status) == SERVED);
        batches[i] = batches[--batch_count];
    }
}

/* Returns when, by clock_ms(), this lane may start its next batch.  A batch costs a process
 * and a connection: if one at a time is enough, it waits a moment for more messages, but
 * not if many wait already.  A pause because the last batch was not served is kept. */
static int64_t start_time(const struct lane *l)
{
    return l->refusals == 0 && l->waiting >= BATCH_WORTH ? 0 : l->not_before;
}

/* Whether this lane may start a batch now.  A quarter of the slots is left to lanes that
 * have mail which was never tried, and no batch yet. */
static bool may_start(const struct lane *l, int64_t now)
{
    bool first = l->fresh > 0 && l->batches == 0;

    return l->waiting > 0 && l->batches < l->allowed && now >= start_time(l)
        && batch_count < (first ? batch_limit : batch_limit - batch_limit / 4);
}

/* Returns the lane that starts the next batch: first the lanes without a batch, among
 * these first the lanes with mail that was never tried; equals take turns.  NULL: no lane
 * may start one. */
static struct lane *choose_lane(int64_t now)
{
    static size_t turn;
    struct lane *chosen = NULL;
    int best = -1;

    for (size_t k = 0; k < lane_count; k++) {
        struct lane *l = &lanes[(turn + k) % lane_count];
        int rank = (l->batches == 0 ? 2 : 0) + (l->fresh > 0 ? 1 : 0);

        if (rank > best && may_start(l, now)) {
            best = rank;
            chosen = l;
        }
    }
    if (chosen != NULL)
        turn = (size_t)(chosen - lanes) + 1;
    return chosen;
}

/* Starts batches while there are slots and lanes that may use them.  Returns when, by
 * clock_ms(), this is to be called again at the latest. */
static int64_t start_batches(void)
{
    int64_t now = clock_ms(), again = INT64_MAX;
    struct lane *l;

    forget_idle_lanes(now);
    while ((l = choose_lane(now)) != NULL)
        if (!start_batch(l))
            return now + 1000;
    for (size_t i = 0; i < lane_count; i++)
        if (lanes[i].waiting > 0 && start_time(&lanes[i]) > now && start_time(&lanes[i]) < again)
            again = start_time(&lanes[i]);
    return again;
}

/* ---- The search ---- */

/* Whether another process has a lock on the file.  This takes no lock itself. */
static bool is_locked(int fd)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

    return fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

static bool searched;       /* a search has been made, and has logged which files are no messages of ours */

/* Lists a file of the queue that is due, if it is a message that no process is trying. */
static void list_if_free(const char *id)
{
    struct message m;
    int fd = open_message("queue", id, O_RDWR);

    if (fd < 0)
        return;
    if (is_locked(fd)) {
        close(fd);
        return;
    }
    if (message_read(&m, fd, id))
        list_due(id, lane_of_message(&m), !m.tried);
    else if (!searched || m.error != 0)
        log_unread(&m);
    message_free(&m);
}

/* Looks at one file of the queue, makes it due now if `hurry`, and lists it if it is due
 * and the list has room.  If it is due later, and before *next, sets *next to that time. */
static void examine(const char *id, bool hurry, time_t *next)
{
    time_t now = wall_clock(), due;
    struct stat st;

    if (id[0] == '.' || lstat(spool_path("queue", id), &st) != 0)
        return;
    if (!is_ours(id, &st)) {
        if (!searched)
            logmsg("queue/%s is no message of ours: left alone", id);
        return;
    }
    if (hurry && st.st_mtime > now) {
        utimensat(AT_FDCWD, spool_path("queue", id), NULL, AT_SYMLINK_NOFOLLOW);
        st.st_mtime = now;
    }
    due = due_time(&st);
    if (due > now)
        *next = due < *next ? due : *next;
    else if (listed_count >= LISTED_LIMIT / 4 * 3)      /* the rest is for fresh mail, from the due pipe */
        search_again = search_again || !is_listed(id);
    else if (!is_listed(id))
        list_if_free(id);
}

/* Goes once through the queue; makes all of it due now if `hurry`.  Returns when the next
 * file will be due. */
static time_t search_queue(bool hurry)
{
    time_t next = wall_clock() + NAP_LIMIT;
    DIR *queue = opendir("queue");
    struct dirent *entry;
    size_t seen = 0;

    clear_drafts();
    search_again = false;
    if (queue == NULL && chdir(settings.spool) != 0)    /* the spool was moved away, and may be back by now */
        return next;
    while (queue != NULL && (entry = readdir(queue)) != NULL) {
        examine(entry->d_name, hurry, &next);
        if (++seen % BATCH_LIMIT == 0)      /* a long search keeps no batch waiting */
            start_batches();
    }
    if (queue != NULL)
        closedir(queue);
    searched = true;
    return next;
}

static int64_t search_at, search_not_before;    /* by clock_ms() */

/* Returns when the queue is searched next: when the next file is due, and sooner if some
 * due messages are not listed and the list has room.  A long search is followed by a long
 * pause, so that a large queue does not keep a processor busy. */
static int64_t next_search(void)
{
    if (search_again && listed_count < LISTED_LIMIT / 4 && search_not_before < search_at)
        return search_not_before;
    return search_at;
}

static void search_if_due(void)
{
    int64_t begun = clock_ms(), now, nap;
    bool hurry = all_due;
    time_t next;

    if (!hurry && begun < next_search())
        return;
    all_due = 0;
    check_resolv_conf();
    for (size_t i = 0; hurry && i < lane_count; i++) {   /* an exchanger that was down may be up again */
        lanes[i].not_before = 0;
        lanes[i].refusals = 0;
    }
    next = search_queue(hurry);
    now = clock_ms();
    nap = ((int64_t)next - (int64_t)wall_clock()) * 1000;
    if (nap > settings.retry * 1000)
        nap = settings.retry * 1000;
    if (nap < 1000)
        nap = 1000;
    search_not_before = now + 10 * (now - begun) + 20;
    search_at = now + nap > search_not_before ? now + nap : search_not_before;
}

/* ---- The loop ---- */

/* Lists the messages whose ids have come over the due pipe.  False: the pipe has ended,
 * because the server has. */
static bool read_due(void)
{
    static char lines[65536];
    static size_t size;
    char *at = lines, *end, *space;
    ssize_t n = read(due_end, lines + size, sizeof lines - size);

    if (n <= 0)
        return n < 0;
    size += (size_t)n;
    if (n >= PIPE_MAY_BE_FULL)
        search_again = true;    /* a writer may have found no room for its line */
    for (; (end = memchr(at, '\n', size - (size_t)(at - lines))) != NULL; at = end + 1) {
        *end = '\0';
        space = strchr(at, ' ');
        if (space != NULL && space - at < ID_SIZE) {
            *space = '\0';
            list_due(at, (uint32_t)strtoul(space + 1, NULL, 16), true);
        }
    }
    size -= (size_t)(at - lines);
    memmove(lines, at, size);
    return true;
}

/* Waits until an id comes over the due pipe (if the list has room for it), until a signal
 * comes, or until clock_ms() reaches `until`.  Signals are delivered only here.  Returns
 * whether the pipe can be read. */
static bool wait_for_due(int64_t until, const sigset_t *wait_mask)
{
    int64_t left = until - clock_ms();
    struct timespec timeout = { 0, 0 };
    fd_set readable;
    int top = -1;

    if (left > 0) {
        timeout.tv_sec = (time_t)(left / 1000);
        timeout.tv_nsec = (long)(left % 1000) * 1000000;
    }
    FD_ZERO(&readable);
    if (listed_count < LISTED_LIMIT)
        watch_fd(due_end, &readable, &top);
    return pselect(top + 1, &readable, NULL, NULL, &timeout, wait_mask) > 0;
}

long fresh_slots(void)
{
    /* With fewer than four slots, one silent exchanger could hold all that the queue has. */
    return settings.forwarders < 4 ? 0 : settings.forwarders / 2;
}

void manage_queue(int due_fd, pid_t server)
{
    struct sigaction action = { .sa_handler = on_wake };
    sigset_t wait_mask;

    due_end = due_fd;
    batch_limit = (unsigned)(settings.forwarders - fresh_slots());
    batches = allocate_array(batch_limit, sizeof *batches);
    sigemptyset(&action.sa_mask);
    sigaction(SIGHUP, &action, NULL);
    sigaction(SIGCHLD, &action, NULL);
    sigprocmask(SIG_SETMASK, NULL, &wait_mask);
    sigdelset(&wait_mask, SIGHUP);
    sigdelset(&wait_mask, SIGCHLD);
    while (getppid() == server) {
        int64_t until;

        reap_batches();
        search_if_due();
        until = start_batches();
        if (next_search() < until)
            until = next_search();
        if (wait_for_due(until, &wait_mask) && !read_due())
            break;
    }
    _exit(0);
}

/* ==== The list =========================================================== */

static int compare_ids(const void *a, const void *b)
{
    return strcmp(a, b);
}

/* Writes a duration as text: 90061 seconds are 1d01h01m. */
static const char *duration(char text[32], int64_t seconds)
{
    if (seconds < 0)
        seconds = 0;
    if (seconds < 3600)
        snprintf(text, 32, "%lldm%02llds", (long long)(seconds / 60), (long long)(seconds % 60));
    else
        snprintf(text, 32, "%lldd%02lldh%02lldm", (long long)(seconds / 86400), (long long)(seconds / 3600 % 24),
            (long long)(seconds / 60 % 60));
    return text;
}

/* Whether the text has the word in it, in any case. */
static bool has_word(const char *text, const char *word)
{
    size_t length = strlen(word);

    for (; strlen(text) >= length; text++)
        if (strncasecmp(text, word, length) == 0)
            return true;
    return false;
}

/* Whether the list shows this message.  Words are looked for only in what the list shows,
 * and so not in recipients that the message is not owed to any more. */
static bool is_wanted(const struct message *m, char **words)
{
    bool wanted = *words == NULL;

    for (; *words != NULL && !wanted; words++) {
        wanted = has_word(m->id, *words) || has_word(m->reverse_path, *words);
        for (size_t i = 0; i < m->count; i++)
            wanted = wanted || (m->recipients[i].outcome == LATER && has_word(m->recipients[i].address, *words));
    }
    return wanted;
}

/* Prints one message, and below it each recipient that it is owed to. */
static void print_message(const struct message *m, const struct stat *st)
{
    char age[32], next[32];
    time_t now = wall_clock();
    unsigned tries = 0;

    for (size_t i = 0; i < m->count; i++)
        if (m->recipients[i].tries > tries)
            tries = m->recipients[i].tries;
    printf("%s  %lld octets  age %s  from <%s>  %u %s  ", m->id, (long long)(m->end - m->body),
        duration(age, (int64_t)now - id_time(m->id)), m->reverse_path, tries, tries == 1 ? "try" : "tries");
    if (is_locked(m->fd))
        printf("being tried now\n");
    else
        printf("next try in %s\n", duration(next, (int64_t)st->st_mtime - now));
    for (size_t i = 0; i < m->count; i++)
        if (m->recipients[i].outcome == LATER)
            printf("    <%s>  %s\n", m->recipients[i].address,
                m->recipients[i].said != NULL ? m->recipients[i].said : "not tried yet");
}

/* The sums of what the list has shown. */
struct sums {
    unsigned long messages, recipients;
    long long octets;
};

/* Lists one file of the queue, if it is a message that is wanted. */
static void list_message(const char *id, char **words, struct sums *sums)
{
    struct message m;
    struct stat st;
    int fd = open_message("queue", id, O_RDONLY);
    size_t owed = 0;

    if (fd < 0)
        return;
    if (!message_read(&m, fd, id)) {
        if (m.error != 0)
            log_unread(&m);
    } else if (is_wanted(&m, words) && fstat(fd, &st) == 0) {
        print_message(&m, &st);
        owed = count_owed(&m);
    }
    if (owed > 0) {
        sums->messages++;
        sums->recipients += owed;
        sums->octets += (long long)(m.end - m.body);
    }
    message_free(&m);
}

int list_queue(char **words)
{
    char (*ids)[ID_SIZE] = NULL;
    size_t count = 0, room = 0;
    struct sums sums = { 0, 0, 0 };
    struct dirent *entry;
    DIR *queue = chdir(settings.spool) == 0 ? opendir("queue") : NULL;

    if (queue == NULL)
        die("cannot read the queue in %s (-q names another spool; its owner and root may)", settings.spool);
    while ((entry = readdir(queue)) != NULL) {
        if (id_time(entry->d_name) == 0)
            continue;
        if (count == room) {
            room = room * 2 + 64;
            ids = allocate(ids, room * sizeof *ids);
        }
        strcpy(ids[count++], entry->d_name);
    }
    closedir(queue);
    if (count > 0)
        qsort(ids, count, sizeof *ids, compare_ids);    /* the oldest first */
    for (size_t i = 0; i < count; i++)
        list_message(ids[i], words, &sums);
    printf("%lu message%s for %lu recipient%s, %lld octets\n", sums.messages, sums.messages == 1 ? "" : "s",
        sums.recipients, sums.recipients == 1 ? "" : "s", sums.octets);
    free(ids);
    return fflush(stdout) == 0 ? 0 : 1;
}
