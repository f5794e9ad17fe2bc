/*
 * smtp.c - the server: takes mail from clients it trusts (RFC 5321).
 *
 * One process watches the listening sockets, all clients and the reply pipes of
 * its children with pselect(), and never waits for anything else.  Work that takes
 * time runs in a child: at the final dot of each message the loop forks one, which
 * stores the message and, if the loop gave it a slot, forwards it (forward.c).
 *
 * Handlers never close or free a session.  They set its phase, and the loop reaps
 * sessions that are GONE.
 *
 * Contents.  Each chapter calls only those above it, so read from the end: main(),
 * run(), serve(), hear(), converse(), take_command(), and up from there.
 *   The log            logmsg() and die()
 *   Lines              what a line is
 *   Sessions           what is known of a client
 *   Replies            what a client is told
 *   Children           every fork, and the children that are running
 *   Addresses          the grammar of RFC 5321 4.1.2
 *   Access             which clients may relay, and to which domains
 *   Commands           the dialogue
 *   The message        from 354 to the final dot
 *   The loop           fill, wait, serve, reap
 *   Start              options, listening, privileges, main()
 */
#include "smtp.h"

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
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    /* 512 octets (RFC 5321 4.5.3.1.4), and what SIZE and BODY add (RFC 1870 3, RFC 6152 2) */
    COMMAND_LIMIT = 512 + 26 + 17,
    LOG_LINE = 2048,        /* octets of a line in the log, its end included */
    INPUT_SIZE = 65536,     /* octets that one read takes */
    OUTPUT_LIMIT = 8192,    /* no command is answered while this many octets of replies are unsent */
    LINE_HEAD = 16,         /* the first octets of a line, which tell what it is */
    REFUSAL_SIZE = 512,     /* the reply to a client that is not admitted, with its NUL */
    PROXY_LIMIT = 4096,     /* octets of a proxy's header */
    LOOP_LIMIT = 100,       /* Received: lines (RFC 5321 6.3) */
    ERROR_LIMIT = 20,       /* 5xx replies to a client since its last completed transaction */
    SIGNAL_WAIT = 20,       /* ms that a signal may wait while clients keep us busy */
    LINGER = 2000,          /* ms for a client to take its last reply */
    STORING_AT_ONCE = 16,   /* messages; more would only be more processes that wait for the same disk */
    REST = 1000,            /* ms without accepting clients when processes or descriptors have run out */
    LISTENERS = 16,
    STRANGERS = 16,         /* sessions of clients that may not relay; further ones are disconnected */
    STRANGER_TIME = 5000,   /* ms that such a session lasts at most */
    RESERVE = LISTENERS + STRANGERS + 16,   /* descriptors that are not for clients that may relay */
    ACCEPTS = 64,           /* clients accepted before the others are served again */
    INHERITED = 65536       /* descriptors closed at the start: some may lie beyond the present limit */
};

struct settings settings = {
    .spool = "/var/spool/smtp",
    .mx_port = 25,
    .tls = TLS_MAY,
    .per_address = -1,      /* a quarter of the table */
    .max_size = 50 * 1024 * 1024,
    .idle = 300,            /* RFC 5321 4.5.3.2.7 */
    .retry = 300,
    .expire = 5 * 24 * 3600,    /* RFC 5321 4.5.4.1 */
    .forwarders = 50
};

/* ==== The log ============================================================ */

/* How many lines were dropped since one could last be written. */
static struct {
    pid_t process;          /* the process that counts: after a fork the child begins at 0 */
    unsigned long count;
} dropped;

/* Writes a line to stderr unless that would have to wait.  Returns whether it is written.
 *
 * O_NONBLOCK would belong to the open file description, and so to all processes that
 * share it: the shell's next write to the same terminal could fail.  So select() says
 * whether the line would have to wait.  A pipe that can be written to takes PIPE_BUF
 * octets at once, and no line is longer.  Another process may write between the two
 * calls; on Linux there is room even then, since a pipe that can be written to has a
 * whole page free, which holds two of the longest lines. */
static bool write_line(const char *line, size_t size)
{
    return wait_ready(STDERR_FILENO, true, 0) && write(STDERR_FILENO, line, size) == (ssize_t)size;
}

/* Cuts a line that would have `used` octets to what may be written, makes it printable,
 * and ends it.  Returns its length. */
static size_t end_line(char line[LOG_LINE], size_t used)
{
    long most = fpathconf(STDERR_FILENO, _PC_PIPE_BUF);

    if (most <= 0 || most > LOG_LINE)
        most = LOG_LINE;
    if (used > (size_t)most - 1)
        used = (size_t)most - 1;
    for (size_t i = 0; i < used; i++)
        if (line[i] < ' ' || line[i] > '~')
            line[i] = '?';
    line[used++] = '\n';
    return used;
}

/* Writes the line, after one that says how many were dropped before it; or drops it. */
static void write_or_drop(const char *line, size_t size)
{
    char count[100];

    if (dropped.process != getpid()) {
        dropped.process = getpid();
        dropped.count = 0;
    }
    if (dropped.count > 0) {
        int n = snprintf(count, sizeof count, "%lu lines of process %ld were dropped: nobody has read the log\n",
            dropped.count, (long)dropped.process);

        if (write_line(count, (size_t)n))
            dropped.count = 0;
    }
    if (dropped.count > 0 || !write_line(line, size))
        dropped.count++;
}

static void write_log(const char *prefix, int error, const char *format, va_list arguments)
{
    char line[LOG_LINE];
    size_t used = (size_t)snprintf(line, sizeof line, "%s", prefix);
    int n = vsnprintf(line + used, sizeof line - used, format, arguments);

    used += n < 0 ? 0 : (size_t)n;      /* the length of the whole text, of which some may be cut off */
    if (used < sizeof line && error != 0)
        used += (size_t)snprintf(line + used, sizeof line - used, ": %s", strerror(error));
    write_or_drop(line, end_line(line, used));
}

void logmsg(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    write_log("", 0, format, arguments);
    va_end(arguments);
}

void die(const char *format, ...)
{
    int error = errno;
    va_list arguments;

    va_start(arguments, format);
    write_log("smtp: ", error, format, arguments);
    va_end(arguments);
    _exit(1);       /* not exit(): a child must not flush what fork() copied of stdio's buffers */
}

/* ==== Lines ============================================================== */

struct line next_line(const char *bytes, size_t size, bool lf)
{
    struct line line = { size, 0, false };
    const char *end = size > 0 ? memchr(bytes, '\n', size) : NULL;

    while (end != NULL && !lf && (end == bytes || end[-1] != '\r')) {
        line.bare = true;
        end = memchr(end + 1, '\n', size - (size_t)(end + 1 - bytes));
    }
    if (end != NULL) {
        line.used = (size_t)(end + 1 - bytes);
        line.length = line.used - 1;
    }
    if (line.length > 0 && bytes[line.length - 1] == '\r')
        line.length--;
    if (line.length > 0 && memchr(bytes, '\r', line.length) != NULL)
        line.bare = true;
    return line;
}

/* ==== Sessions =========================================================== */

/* What is true in each phase. */
enum phase {
    PROXIED = -1,   /* a proxy has connected; its header, which names the client, has not come yet */
    CONNECTED,      /* 220 is sent; no HELO yet */
    READY,          /* HELO is given; no transaction */
    MAILED,         /* the reverse-path is in the draft */
    ADDRESSED,      /* at least one forward-path is, too */
    DATA,           /* 354 is sent; lines go to the draft */
    COMPLETE,       /* the final dot has come; the message waits for a child, nothing is read */
    STORING,        /* a child stores the message; its reply comes over `pipe`, nothing is read */
    CLOSING,        /* the last reply is given; further input is thrown away */
    GONE            /* nothing is left to send or to read: the loop reaps the session */
};

/* Memory that is allocated only while it holds something. */
struct buffer {
    char *bytes;
    size_t size;
};

/* What RSET forgets. */
struct transaction {
    struct draft draft;
    uint32_t lane;          /* the first recipient's */
    char from[PATH_LIMIT];  /* the sender's mailbox */
    char to[PATH_LIMIT];    /* the mailbox in the last RCPT, or "" if that had none */
    unsigned recipients;
    unsigned received;      /* Received: lines in the header */
    bool in_header;
    bool in_line;           /* a line has begun in an earlier piece */
    unsigned long long size;    /* octets, as RFC 1870 counts them */
    const char *refusal;    /* the reply that the final dot will get instead of 250; or NULL */
};

struct session {
    int fd;                 /* the client */
    int pipe;               /* the read end of a child's reply pipe in STORING, else -1 */
    enum phase phase;
    unsigned port;          /* the client's */
    bool spoken;            /* the client's first line has come */
    bool lf;                /* that line ended in a bare LF, so every LF ends a line */
    bool skipping;          /* inside a command line that is too long */
    bool extended;          /* the client said EHLO, not HELO */
    bool check;             /* the proxy's own connection, such as a health check: it may send no mail */
    bool stranger;          /* it may not relay: its greeting was 554, and all but QUIT is answered 503 */
    unsigned errors;        /* 5xx replies since the last completed transaction */
    int64_t deadline;       /* by clock_ms(): when the session ends unless the client says something */
    int64_t limit;          /* by clock_ms(): when it ends unless the client completes a transaction */
    union address peer;
    char *helo;             /* NULL before HELO */
    struct transaction *tx; /* NULL outside a transaction */
    struct buffer in;       /* received, not yet consumed */
    struct buffer out;      /* said, not yet sent */
};

static struct session *sessions[FD_SETSIZE];
static size_t session_count, session_limit;
static bool divided;        /* this process serves the sessions of a table that was full, and accepts no others */
static volatile sig_atomic_t got_child, got_hangup, got_term;  /* SIGCHLD; SIGHUP; SIGTERM or SIGINT has come */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Replaces what the buffer holds by `size` octets, which may be a part of it.  False:
 * no memory. */
static bool buffer_set(struct buffer *b, const char *bytes, size_t size)
{
    char *copy = NULL;

    if (size > 0) {
        copy = malloc(size);
        if (copy == NULL)
            return false;
        memcpy(copy, bytes, size);
    }
    free(b->bytes);
    b->bytes = copy;
    b->size = size;
    return true;
}

static bool buffer_add(struct buffer *b, const char *bytes, size_t size)
{
    char *more = realloc(b->bytes, b->size + size);

    if (more == NULL)
        return false;
    memcpy(more + b->size, bytes, size);
    b->bytes = more;
    b->size += size;
    return true;
}

/* Ends the session's transaction, if there is one, and removes its draft. */
static void reset(struct session *s)
{
    if (s->tx != NULL) {
        draft_drop(&s->tx->draft);
        free(s->tx);
        s->tx = NULL;
    }
    if (s->phase != GONE)
        s->phase = s->helo != NULL ? READY : CONNECTED;
}

/* Closes all descriptors of a session.  The draft's file stays. */
static void close_session(struct session *s)
{
    close_fd(&s->fd);
    close_fd(&s->pipe);
    if (s->tx != NULL)
        draft_forget(&s->tx->draft);
}

static void free_session(struct session *s)
{
    close_session(s);
    free(s->tx);
    free(s->helo);
    free(s->in.bytes);
    free(s->out.bytes);
    free(s);
}

/* Gives a client that has made progress -t seconds more, within its limit. */
static void extend_deadline(struct session *s)
{
    s->deadline = clock_ms() + settings.idle * 1000;
    if (s->deadline > s->limit)
        s->deadline = s->limit;
}

/* Resets the error count and the time limit of a client that is new or has completed a
 * transaction. */
static void renew(struct session *s)
{
    s->errors = 0;
    s->limit = clock_ms() + IDLES * settings.idle * 1000;
    extend_deadline(s);
}

/* ==== Replies ============================================================ */

/* Logs one or several lines as RFC 5321's examples write them; `side` is C or S. */
static void log_dialogue(const struct session *s, const char *side, const char *text)
{
    char address[ADDRESS_TEXT];

    address_text(&s->peer, address);
    for (; *text != '\0'; text += strcspn(text, "\r\n"), text += strspn(text, "\r\n"))
        logmsg("%s:%u %s: %.*s", address, s->port, side, (int)strcspn(text, "\r\n"), text);
}

/* Logs a refusal, with what is known of the message. */
static void log_refusal(const struct session *s, const char *text)
{
    const struct transaction *tx = s->tx;
    char address[ADDRESS_TEXT], from[PATH_LIMIT + 8] = "", to[PATH_LIMIT + 8] = "", count[32] = "";

    if (tx != NULL)
        snprintf(from, sizeof from, " from=<%s>", tx->from);
    if (tx != NULL && tx->to[0] != '\0')
        snprintf(to, sizeof to, " to=<%s>", tx->to);
    if (tx != NULL && s->phase >= DATA)     /* the reply is for all recipients, and `to` only the last */
        snprintf(count, sizeof count, " recipients=%u", tx->recipients);
    logmsg("%s:%u refused: %s%s%s%s", address_text(&s->peer, address), s->port, text, from, to, count);
}

/* Sends as much as the client takes now.  A client that hangs up while its message
 * is being stored keeps its place in the table until the child replies: that child
 * uses a descriptor, too. */
static void flush(struct session *s)
{
    ssize_t n;

    if (s->out.size == 0 || s->phase == GONE)
        return;
    n = write(s->fd, s->out.bytes, s->out.size);
    if (n < 0 && (errno == EAGAIN || errno == EINTR || s->phase == COMPLETE || s->phase == STORING))
        return;
    if (n < 0 || !buffer_set(&s->out, s->out.bytes + n, s->out.size - (size_t)n))
        s->phase = GONE;
    else if (s->phase == CLOSING && s->out.size == 0)
        shutdown(s->fd, SHUT_WR);
}

/* Sends a reply to the client; all replies of sessions go through this function.  `format`
 * is the reply to the letter, without its last line end. */
static void reply(struct session *s, const char *format, ...)
{
    char text[1024];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (settings.verbose)
        log_dialogue(s, "S", text);
    else if (text[0] >= '4')
        log_refusal(s, text);
    if (text[0] == '5')
        s->errors++;
    if (!buffer_add(&s->out, text, strlen(text)) || !buffer_add(&s->out, "\r\n", 2))
        s->phase = GONE;
}

/* Closes the session once the client has had a moment to take the last reply.  If the
 * socket were closed at once, with commands of the client still unread, TCP would throw
 * the reply away. */
static void start_closing(struct session *s)
{
    reset(s);
    if (s->phase == GONE)
        return;
    s->phase = CLOSING;
    s->deadline = clock_ms() + LINGER;
    flush(s);
}

/* ==== Children =========================================================== */

/* Why the server forks. */
enum role {
    TRANSACTION,    /* to store one message and, in a slot, to forward it */
    QUEUE_MANAGER,  /* to forward all other mail of the queue */
    DIVIDED         /* to go on serving the sessions of a table that was full */
};

struct child {
    pid_t pid;
    enum role role;
    bool slot;              /* a TRANSACTION that also forwards: one of the slots for fresh mail is taken ... */
    uint32_t lane;          /* ... for this lane */
};

static struct child *children;
static size_t child_count;
/* The due pipe leads to the queue manager; children write the ids of messages that they
 * have stored and do not forward.  The server keeps both ends open, so that the ids in
 * it outlive a queue manager that dies. */
static int due_pipe[2];
static int spool_lock;      /* descriptor of the spool's lock file, whose lock this process holds */
static int listeners[LISTENERS];
static size_t listener_count;
static int64_t rest_until;  /* by clock_ms(): no client is accepted before, see rest() */
static int64_t manager_from;    /* by clock_ms(): no queue manager is started before */

/* Frees all sessions without a word to their clients: another process owns them now. */
static void forget_sessions(void)
{
    while (session_count > 0)
        free_session(sessions[--session_count]);
}

static void close_listeners(void)
{
    while (listener_count > 0)
        close_fd(&listeners[--listener_count]);
}

/* Closes what belongs to the listening server alone.  A child that kept a listening
 * socket would keep its port taken after the server's end.  A child that kept the due
 * pipe's read end would go on filling a pipe that nobody reads after the server's end. */
static void leave_server(void)
{
    close_listeners();
    close_fd(&due_pipe[0]);
    close_fd(&spool_lock);
}

/* Closes all that a child has inherited of sessions, except the draft of `own`
 * (NULL: none).  A child that kept a client's socket would keep that connection open
 * after the server has closed it.  The memory is left alone: each page that is
 * written to would have to be copied first. */
static void close_clients(const struct session *own)
{
    for (size_t i = 0; i < session_count; i++) {
        const struct session *s = sessions[i];

        close(s->fd);
        if (s->pipe >= 0)
            close(s->pipe);
        if (s != own && s->tx != NULL && s->tx->draft.fd >= 0)
            close(s->tx->draft.fd);
    }
}

/* Gives signals their default meaning again, in a child that lives longer than it takes
 * to store a message, and unblocks them: SIGTERM ends it from here on.  SIGHUP and SIGCHLD
 * stay blocked; only the queue manager uses them, and unblocks them where it waits. */
static void default_signals(void)
{
    static const int caught[] = { SIGTERM, SIGINT, SIGHUP, SIGCHLD, SIGALRM };
    sigset_t blocked;

    for (size_t i = 0; i < sizeof caught / sizeof caught[0]; i++)
        signal(caught[i], SIG_DFL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGHUP);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
}

/* The machine has run out of `what`.  For a second the server accepts no clients, so that
 * sessions and children can end. */
static void rest(const char *what)
{
    logmsg("no %s can be made (%s): resting for a second", what, strerror(errno));
    rest_until = clock_ms() + REST;
}

/* Forks, and remembers the child.  Returns its pid; 0 in the child; -1 if no process can
 * be made. */
static pid_t spawn(struct child child)
{
    struct child *more = realloc(children, (child_count + 1) * sizeof *children);

    child.pid = -1;
    if (more != NULL) {
        children = more;
        child.pid = fork();
    }
    if (child.pid < 0)
        rest("process");
    else if (child.pid > 0)
        children[child_count++] = child;
    return child.pid;
}

/* Returns the pid of a child of this role, or -1 if there is none. */
static pid_t find_child(enum role role)
{
    for (size_t i = 0; i < child_count; i++)
        if (children[i].role == role)
            return children[i].pid;
    return -1;
}

/* Counts the slots for fresh mail that are taken: all, or with `lane` only that lane's. */
static long count_slots(const uint32_t *lane)
{
    long count = 0;

    for (size_t i = 0; i < child_count; i++)
        if (children[i].slot && (lane == NULL || children[i].lane == *lane))
            count++;
    return count;
}

static size_t count_sessions(enum phase phase)
{
    size_t count = 0;

    for (size_t i = 0; i < session_count; i++)
        if (sessions[i]->phase == phase)
            count++;
    return count;
}

/* Whether the child that stores a message of this lane may also forward it.  Half of -j
 * is for such mail, and at most a tenth of -j for one lane.  While other messages are
 * being stored the answer is no: then a batch, with one connection for many messages, is
 * cheaper. */
static bool slot_free(uint32_t lane)
{
    long share = settings.forwarders >= 10 ? settings.forwarders / 10 : 1;

    return !divided && !got_term && count_sessions(STORING) == 0
        && count_slots(NULL) < fresh_slots() && count_slots(&lane) < share;
}

/* Removes all children that have ended from the list: one SIGCHLD may stand for many.  A
 * pid that is not in the list is no child of ours, but was adopted by this server because
 * it is process 1 of a container. */
static void reap_children(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        size_t i = 0;

        while (i < child_count && children[i].pid != pid)
            i++;
        if (i == child_count)
            continue;
        if (WIFSIGNALED(status) && !got_term)
            logmsg("process %ld died of signal %d", (long)pid, WTERMSIG(status));
        if (children[i].role == QUEUE_MANAGER)
            manager_from = clock_ms() + REST;   /* if it dies at once, do not fork in a busy loop */
        children[i] = children[--child_count];
    }
}

static void start_queue_manager(void)
{
    pid_t server = getpid();

    manager_from = clock_ms() + REST;
    if (spawn((struct child){ .role = QUEUE_MANAGER }) == 0) {
        close_clients(NULL);
        close_listeners();
        close(spool_lock);
        close(due_pipe[1]);     /* or it would never read the pipe's end after the server's */
        default_signals();
        manage_queue(due_pipe[0], server);
    }
}

/* Starts the queue manager if there is none, and passes SIGHUP on to it. */
static void keep_queue_manager(void)
{
    if (find_child(QUEUE_MANAGER) < 0 && clock_ms() >= manager_from)
        start_queue_manager();
    if (got_hangup && find_child(QUEUE_MANAGER) > 0) {
        got_hangup = 0;
        kill(find_child(QUEUE_MANAGER), SIGHUP);
    }
}

/* ==== Addresses ========================================================== */

/*
 * The grammar of RFC 5321 4.1.2.  Each skip function takes a pointer to where its
 * part of the grammar should begin, and returns a pointer behind that part, or
 * NULL if the text there does not fit.  Characters are classified as ASCII,
 * whatever the locale.
 */

static bool is_let_dig(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

static bool is_atext(char c)        /* RFC 5322 3.2.3 */
{
    return is_let_dig(c) || (c != '\0' && strchr("!#$%&'*+-/=?^_`{|}~", c) != NULL);
}

static const char *skip_label(const char *p)
{
    const char *start = p;

    while (is_let_dig(*p) || *p == '-')
        p++;
    if (p == start || *start == '-' || p[-1] == '-' || p - start > LABEL_LIMIT)
        return NULL;
    return p;
}

static const char *skip_domain(const char *p)
{
    const char *start = p;

    p = skip_label(p);
    while (p != NULL && *p == '.')
        p = skip_label(p + 1);
    return p != NULL && p - start <= DOMAIN_LIMIT ? p : NULL;
}

/* Whether all of `text` is a domain. */
static bool is_domain(const char *text)
{
    const char *end = skip_domain(text);

    return end != NULL && *end == '\0';
}

static const char *skip_atom(const char *p)
{
    const char *start = p;

    while (is_atext(*p))
        p++;
    return p > start ? p : NULL;
}

static const char *skip_dot_string(const char *p)
{
    p = skip_atom(p);
    while (p != NULL && *p == '.')
        p = skip_atom(p + 1);
    return p;
}

static const char *skip_quoted_string(const char *p)
{
    for (p++; *p != '"'; p++) {
        if (*p == '\\')
            p++;                    /* the next character stands for itself */
        if (*p < ' ' || *p > '~')
            return NULL;
    }
    return p + 1;
}

static const char *skip_local_part(const char *p)
{
    return *p == '"' ? skip_quoted_string(p) : skip_dot_string(p);
}

static const char *skip_mailbox(const char *p)
{
    union address literal;

    p = skip_local_part(p);
    if (p == NULL || *p != '@')
        return NULL;
    p++;
    return *p == '[' ? literal_parse(p, 0, &literal) : skip_domain(p);
}

/* A source route, which RFC 5321 appendix C has servers accept and ignore. */
static const char *skip_route(const char *p)
{
    do {
        if (*p != '@')
            return NULL;
        p = skip_domain(p + 1);
        if (p == NULL || (*p != ',' && *p != ':'))
            return NULL;
        p++;
    } while (p[-1] == ',');
    return p;
}

/* Reads a path from its < to its >, copies its mailbox without the source route,
 * and returns a pointer behind the path.  Returns NULL if there is no path; if that
 * is not for its syntax, sets `fault` to the reply.  The local part has no limit of
 * its own (RFC 5321 4.5.3.1: none where none is needed). */
static const char *take_path(const char *p, char mailbox[PATH_LIMIT], const char **fault)
{
    const char *start = p, *begin;

    if (*p != '<')
        return NULL;
    begin = p[1] == '@' ? skip_route(p + 1) : p + 1;
    p = begin != NULL ? skip_mailbox(begin) : NULL;
    if (p == NULL || *p != '>')
        return NULL;
    if (p + 1 - start > PATH_LIMIT) {
        *fault = "501 5.5.4 Error: path too long, 256 octets with < and > are the most";
        return NULL;
    }
    memcpy(mailbox, begin, (size_t)(p - begin));
    mailbox[p - begin] = '\0';
    return p + 1;
}

/* ==== Access ============================================================= */

/* Whether the first n->bits bits of both addresses are the same. */
static bool in_network(const union address *a, const struct network *n)
{
    size_t count;
    const unsigned char *x = address_octets(a, &count), *y = address_octets(&n->base, &count);
    unsigned whole = n->bits / 8, rest = n->bits % 8;

    return a->sa.sa_family == n->base.sa.sa_family && memcmp(x, y, whole) == 0
        && (rest == 0 || (x[whole] ^ y[whole]) >> (8 - rest) == 0);
}

static bool in_networks(const union address *a, const struct networks *networks)
{
    for (size_t i = 0; i < networks->count; i++)
        if (in_network(a, &networks->list[i]))
            return true;
    return false;
}

/* Counts the clients from this address.  A session that still waits for its proxy's
 * header is not counted: its client's address is not known yet. */
static size_t count_connections(const union address *peer)
{
    const struct network wanted = { *peer, peer->sa.sa_family == AF_INET6 ? 128 : 32 };
    size_t count = 0;

    for (size_t i = 0; i < session_count; i++)
        if (sessions[i]->phase != PROXIED && in_network(&sessions[i]->peer, &wanted))
            count++;
    return count;
}

static size_t count_strangers(void)
{
    size_t count = 0;

    for (size_t i = 0; i < session_count; i++)
        if (sessions[i]->stranger)
            count++;
    return count;
}

/* Whether the table has no room for another client.  Strangers do not count: their
 * descriptors are in RESERVE. */
static bool is_full(void)
{
    return session_count - count_strangers() >= session_limit;
}

enum entry {
    ADMITTED,       /* the client may relay */
    STRANGER,       /* it may not, and has a session until it says QUIT or for STRANGER_TIME (RFC 5321 3.1) */
    TURNED_AWAY     /* it is refused and disconnected at once (RFC 5321 7.8) */
};

/* Decides whether a client at `peer` is admitted.  If not, writes the reply to it into
 * `refusal`. */
static enum entry admit(const union address *peer, char refusal[REFUSAL_SIZE])
{
    char text[ADDRESS_TEXT];

    address_text(peer, text);
    if (!in_networks(peer, &settings.allowed)) {
        snprintf(refusal, REFUSAL_SIZE, "554 5.7.1 %s may not relay here: start smtp with -a %s to allow it",
            text, text);
        return count_strangers() < STRANGERS ? STRANGER : TURNED_AWAY;
    }
    if (settings.per_address > 0 && count_connections(peer) >= (size_t)settings.per_address) {
        snprintf(refusal, REFUSAL_SIZE, "421 4.7.0 %s Error: too many connections from %s, %ld are allowed at once"
            " (smtp -c)", settings.hostname, text, settings.per_address);
        return TURNED_AWAY;
    }
    return ADMITTED;
}

/* Begins the dialogue, with the first reply, once the client's address is known. */
static void begin(struct session *s, const union address *peer, enum entry entry, const char *refusal)
{
    s->peer = *peer;
    s->port = address_port(peer);
    s->phase = CONNECTED;
    s->stranger = entry == STRANGER;
    if (entry == ADMITTED) {
        reply(s, "220 %s ESMTP smtp " VERSION, settings.hostname);
        return;
    }
    reply(s, "%s", refusal);
    if (entry == STRANGER) {
        s->limit = clock_ms() + STRANGER_TIME;
        extend_deadline(s);
    } else {
        start_closing(s);
    }
}

/* Reads a header of version 2 of HAProxy's PROXY protocol.  Sets `peer` from it, or
 * `local` if the connection is the proxy's own, as for a health check.  Returns the
 * header's size, 0 if not all of it has come yet, or -1 if this is no such header. */
static ssize_t read_proxy_header(const unsigned char *head, size_t size, union address *peer, bool *local)
{
    static const char signature[] = "\r\n\r\n\0\r\nQUIT\n";
    enum { SIGNATURE = sizeof signature - 1, HEAD = SIGNATURE + 4 };
    enum { LOCAL = 0x20, PROXY = 0x21, TCP4 = 0x11, TCP6 = 0x21 };
    const unsigned char *body = head + HEAD;    /* source, destination, and the ports of both */
    size_t length;

    if (memcmp(head, signature, size < SIGNATURE ? size : SIGNATURE) != 0)
        return -1;
    if (size < HEAD)
        return 0;
    length = (size_t)head[HEAD - 2] << 8 | head[HEAD - 1];
    if (length > PROXY_LIMIT)
        return -1;
    if (size < HEAD + length)
        return 0;
    if (head[SIGNATURE] == PROXY && head[SIGNATURE + 1] == TCP4 && length >= 12)
        address_set(peer, body, 4, (unsigned)body[8] << 8 | body[9]);
    else if (head[SIGNATURE] == PROXY && head[SIGNATURE + 1] == TCP6 && length >= 36)
        address_set(peer, body, 16, (unsigned)body[32] << 8 | body[33]);
    else if (head[SIGNATURE] != LOCAL)
        return -1;
    *local = head[SIGNATURE] == LOCAL;
    address_unmap(peer);
    return HEAD + (ssize_t)length;
}

/* Consumes the header that a proxy sends before its client's first command, and begins
 * the dialogue.  For a health check a proxy gets a session even if it may not relay; it
 * may send no mail then. */
static size_t take_proxy_header(struct session *s, const char *bytes, size_t size)
{
    union address peer = s->peer;
    char text[ADDRESS_TEXT], refusal[REFUSAL_SIZE];
    bool local = false;
    ssize_t n = read_proxy_header((const unsigned char *)bytes, size, &peer, &local);

    if (n < 0) {
        logmsg("%s:%u closed: a proxy has to begin with a TCP header of PROXY protocol version 2",
            address_text(&s->peer, text), address_port(&s->peer));
        s->phase = GONE;
    } else if (n > 0) {
        s->check = local && !in_networks(&peer, &settings.allowed);
        begin(s, &peer, s->check ? ADMITTED : admit(&peer, refusal), refusal);
    }
    return n < 0 ? size : (size_t)n;
}

/* Whether mail to this domain is taken (-d). */
static bool is_relayed(const char *domain)
{
    for (size_t i = 0; i < settings.domain_count; i++)
        if (strcasecmp(domain, settings.domains[i]) == 0)
            return true;
    return settings.domain_count == 0;
}

/* ==== Commands =========================================================== */

/* Whether the `length` characters at `p` are `word`, in any case. */
static bool is_same(const char *p, size_t length, const char *word)
{
    return length == strlen(word) && strncasecmp(p, word, length) == 0;
}

/* Whether a HELO name is one word; take_command() has checked that a command is
 * printable but for TABs. */
static bool is_word(const char *text)
{
    return *text != '\0' && strlen(text) <= DOMAIN_LIMIT && strpbrk(text, " \t") == NULL;
}

/* Whether a word has only letters, digits and hyphens (RFC 5321 4.1.2) with dots
 * between, or is something in brackets.  EHLO asks no more: names are not looked up. */
static bool is_name(const char *word)
{
    if (*word == '[')
        return word[strlen(word) - 1] == ']';
    while (is_let_dig(*word) || *word == '-' || *word == '.')
        word++;
    return *word == '\0';
}

/* Takes the name from HELO or EHLO, both of which end a transaction (RFC 5321 4.1.4).
 * If it cannot, replies why and returns false. */
static bool greet(struct session *s, const char *verb, const char *name)
{
    char *copy;

    if (!is_word(name)) {
        reply(s, "501 Syntax: %s hostname", verb);
        return false;
    }
    copy = malloc(strlen(name) + 1);
    if (copy == NULL) {
        reply(s, "451 4.3.0 Error: out of memory, try again later");
        return false;
    }
    free(s->helo);
    s->helo = strcpy(copy, name);
    s->extended = verb[0] == 'E';
    reset(s);
    return true;
}

static void do_helo(struct session *s, const char *argument)
{
    if (greet(s, "HELO", argument))
        reply(s, "250 %u OK", s->port);
}

/* EHLO is stricter than HELO, so a client on a machine called my_pc is refused here
 * and falls back to HELO. */
static void do_ehlo(struct session *s, const char *argument)
{
    if (is_word(argument) && !is_name(argument))
        reply(s, "501 Syntax: EHLO hostname, with letters, digits, hyphens and dots only; HELO takes any name");
    else if (greet(s, "EHLO", argument))
        reply(s, "250-%s greets %u\r\n250-PIPELINING\r\n250-SIZE %llu\r\n250-8BITMIME\r\n"
            "250-ENHANCEDSTATUSCODES\r\n250 HELP", settings.hostname, s->port, settings.max_size);
}

/* Appends a line to the draft.  If that fails, tells the client, ends the transaction and
 * returns false. */
static bool note(struct session *s, const char *format, ...)
{
    char line[1024];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    draft_add(&s->tx->draft, line, strlen(line));
    if (s->tx->draft.error == 0)
        return true;
    reply(s, "%s", draft_refusal(s->tx->draft.error));
    reset(s);
    return false;
}

#define TOO_BIG "552 5.3.4 Error: message too big, EHLO tells the limit"
#define BAD_MAIL "501 5.5.4 Syntax: MAIL FROM:<address>"
#define BAD_RCPT "501 5.5.4 Syntax: RCPT TO:<address>"
#define BAD_VRFY "501 5.5.4 Syntax: VRFY address"

/* Returns a pointer behind the "FROM:" or "TO:" of an argument, or NULL if it begins
 * otherwise.  Blanks behind the colon are skipped: RFC 5321 3.3 forbids clients to send
 * them, but printers and cameras do. */
static const char *skip_keyword(const char *argument, const char *keyword)
{
    size_t length = strlen(keyword);

    if (strncasecmp(argument, keyword, length) != 0)
        return NULL;
    return argument + length + strspn(argument + length, " \t");
}

/* Reads MAIL's parameters, SIZE (RFC 1870) and BODY (RFC 6152), each of which may
 * be given once.  Returns NULL, or the reply that refuses them. */
static const char *read_mail_parameters(const char *p, bool *eight_bit)
{
    bool sized = false, bodied = false;

    *eight_bit = false;
    while (*p != '\0') {
        size_t length, keyword;

        if (*p != ' ')
            return BAD_MAIL;
        p += strspn(p, " ");
        length = strcspn(p, " ");
        keyword = strcspn(p, " =");
        if (is_same(p, keyword, "SIZE")) {
            size_t digits = length > 5 ? strspn(p + 5, "0123456789") : 0;

            if (sized || digits < 1 || digits > 20 || 5 + digits != length)
                return BAD_MAIL;
            if (settings.max_size > 0 && strtoull(p + 5, NULL, 10) > settings.max_size)
                return TOO_BIG;
            sized = true;
        } else if (is_same(p, keyword, "BODY")) {
            *eight_bit = is_same(p, length, "BODY=8BITMIME");
            if (bodied || (!*eight_bit && !is_same(p, length, "BODY=7BIT")))
                return BAD_MAIL;
            bodied = true;
        } else {
            return is_let_dig(*p) ? "555 5.5.4 Error: MAIL takes no parameter but SIZE and BODY" : BAD_MAIL;
        }
        p += length;
    }
    return NULL;
}

/* Begins a transaction, which has no draft yet.  Returns NULL, or the reply if there is
 * no memory. */
static const char *open_transaction(struct session *s, const char *from)
{
    s->tx = calloc(1, sizeof *s->tx);
    if (s->tx == NULL)
        return draft_refusal(ENOMEM);
    s->tx->draft.fd = -1;
    strcpy(s->tx->from, from);
    return NULL;
}

static void do_mail(struct session *s, const char *argument)
{
    char mailbox[PATH_LIMIT] = "";
    const char *path = skip_keyword(argument, "FROM:"), *rest = NULL, *fault = BAD_MAIL;
    bool eight_bit = false;

    if (s->check) {
        reply(s, "550 5.7.1 Error: this is a proxy's own connection, which may not relay (smtp -a)");
        return;
    }
    if (path != NULL)
        rest = strncmp(path, "<>", 2) == 0 ? path + 2 : take_path(path, mailbox, &fault);
    if (rest != NULL) {
        fault = open_transaction(s, mailbox);
        if (fault == NULL)
            fault = read_mail_parameters(rest, &eight_bit);
        if (fault == NULL && !draft_open(&s->tx->draft, s->port))
            fault = draft_refusal(s->tx->draft.error);
    }
    if (fault != NULL) {
        reply(s, "%s", fault);
        reset(s);
        return;
    }
    if (note(s, "%s %s\r\nMAIL FROM:<%s>%s\r\n", s->extended ? "EHLO" : "HELO", s->helo, mailbox,
            eight_bit ? " BODY=8BITMIME" : "")) {
        s->phase = MAILED;
        reply(s, "250 2.1.0 Ok");
    }
}

static void do_rcpt(struct session *s, const char *argument)
{
    static const char everyones[] = "<Postmaster>";     /* RFC 5321 4.5.1 */
    char mailbox[PATH_LIMIT];
    const char *path = skip_keyword(argument, "TO:"), *rest = NULL, *domain = NULL, *fault = BAD_RCPT;
    bool postmaster = path != NULL && strncasecmp(path, everyones, strlen(everyones)) == 0;

    if (postmaster) {
        rest = path + strlen(everyones);
        snprintf(mailbox, sizeof mailbox, "%s", settings.postmaster);
    } else if (path != NULL) {
        rest = take_path(path, mailbox, &fault);
    }
    s->tx->to[0] = '\0';
    if (rest != NULL) {
        strcpy(s->tx->to, mailbox);
        domain = strrchr(mailbox, '@') + 1;
    }
    if (rest == NULL || (*rest != '\0' && *rest != ' ')) {
        reply(s, "%s", fault);
    } else if (*rest != '\0') {
        reply(s, "555 5.5.4 Error: RCPT takes no parameters");
    } else if (!postmaster && !is_relayed(domain)) {
        reply(s, "550 5.7.1 Error: %s is none of the domains that mail is taken for here (smtp -d)", domain);
    } else if (s->tx->recipients >= RECIPIENT_LIMIT) {
        reply(s, "452 4.5.3 Error: %d recipients are enough, send to the rest in another transaction",
            RECIPIENT_LIMIT);
    } else if (note(s, "RCPT TO:<%s>\r\n", mailbox)) {
        if (s->tx->recipients++ == 0)
            s->tx->lane = lane_of(domain);
        s->phase = ADDRESSED;
        reply(s, "250 2.1.5 Ok");
    }
}

/* Begins the message with its trace (RFC 5321 4.4).  A HELO name may be any word, so
 * characters of it that could end its clause or begin a comment become '?'. */
static void do_data(struct session *s, const char *argument)
{
    char name[DOMAIN_LIMIT + 1], date[DATE_SIZE], address[ADDRESS_TEXT];
    size_t i;

    (void)argument;
    for (i = 0; s->helo[i] != '\0'; i++)
        name[i] = is_let_dig(s->helo[i]) || strchr(".-_:[]", s->helo[i]) != NULL ? s->helo[i] : '?';
    name[i] = '\0';
    if (!note(s, "DATA\r\nReceived: from %s ([%s%s]:%u)\r\n\tby %s with %s id %s;\r\n\t%s\r\n", name,
            s->peer.sa.sa_family == AF_INET6 ? "IPv6:" : "", address_text(&s->peer, address), s->port,
            settings.hostname, s->extended ? "ESMTP" : "SMTP", s->tx->draft.id, mail_date(date, wall_clock())))
        return;
    s->tx->in_header = true;
    s->phase = DATA;
    reply(s, "354 End data with <CR><LF>.<CR><LF>");
}

static void do_rset(struct session *s, const char *argument)
{
    (void)argument;
    reset(s);
    reply(s, "250 2.0.0 Ok");
}

/* Takes a user's name, a mailbox or a path, and never tells whether it exists (RFC
 * 5321 7.3). */
static void do_vrfy(struct session *s, const char *argument)
{
    char mailbox[PATH_LIMIT];
    const char *fault = BAD_VRFY;
    const char *end = *argument == '<' ? take_path(argument, mailbox, &fault) : skip_mailbox(argument);

    if (end == NULL && *argument != '<')
        end = skip_local_part(argument);
    if (end == NULL || *end != '\0')
        reply(s, "%s", fault);
    else
        reply(s, "252 2.0.0 Cannot verify an address here, but will take mail for it and try to deliver");
}

static void do_quit(struct session *s, const char *argument)
{
    (void)argument;
    reply(s, "221 2.0.0 OK");
    start_closing(s);
}

/* A web page can make its reader's browser send a request here whose body holds
 * SMTP commands.  The session ends at the head of such a request. */
static void do_http(struct session *s, const char *argument)
{
    (void)argument;
    reply(s, "421 4.7.0 %s Error: this is SMTP, not HTTP", settings.hostname);
    start_closing(s);
}

#define HELO_FIRST  "503 5.5.1 Error: send HELO/EHLO first"
#define NEED_MAIL   "503 5.5.1 Error: need MAIL command"
#define NEED_RCPT   "503 5.5.1 Error: need RCPT command"
#define NESTED_MAIL "503 5.5.1 Error: nested MAIL command"

#define NOT_IMPLEMENTED "502 5.5.1 Error: command not implemented"

static const struct command {
    const char *verb;
    void (*handle)(struct session *, const char *argument);     /* NULL: `says` is all that the command does */
    const char *says;       /* with `handle`: the reply if there is an argument; NULL: it takes one */
    const char *out_of_order[ADDRESSED + 1];    /* the reply in CONNECTED, READY, MAILED, ADDRESSED; NULL: allowed */
} commands[] = {
    { "HELO", do_helo, NULL, { NULL } },
    { "EHLO", do_ehlo, NULL, { NULL } },
    { "MAIL", do_mail, NULL, { HELO_FIRST, NULL, NESTED_MAIL, NESTED_MAIL } },
    { "RCPT", do_rcpt, NULL, { HELO_FIRST, NEED_MAIL, NULL, NULL } },
    { "DATA", do_data, "501 5.5.4 Syntax: DATA", { HELO_FIRST, NEED_MAIL, NEED_RCPT, NULL } },
    { "RSET", do_rset, "501 5.5.4 Syntax: RSET", { NULL } },
    { "QUIT", do_quit, "501 5.5.4 Syntax: QUIT", { NULL } },
    { "VRFY", do_vrfy, NULL, { NULL } },
    { "NOOP", NULL, "250 2.0.0 Ok", { NULL } },     /* RFC 5321 4.1.1.9: an argument is ignored */
    { "HELP", NULL, "214 2.0.0 HELO EHLO MAIL RCPT DATA RSET NOOP VRFY QUIT: see RFC 5321", { NULL } },
    { "EXPN", NULL, NOT_IMPLEMENTED, { NULL } },
    { "TURN", NULL, NOT_IMPLEMENTED, { NULL } },
    { "SEND", NULL, NOT_IMPLEMENTED, { NULL } },
    { "SOML", NULL, NOT_IMPLEMENTED, { NULL } },
    { "SAML", NULL, NOT_IMPLEMENTED, { NULL } },
    { "ETRN", NULL, NOT_IMPLEMENTED, { NULL } },
    { "AUTH", NULL, NOT_IMPLEMENTED, { NULL } },
    { "STARTTLS", NULL, NOT_IMPLEMENTED, { NULL } },
    { "BDAT", NULL, NOT_IMPLEMENTED, { NULL } },
    { "GET", do_http, NULL, { NULL } },
    { "POST", do_http, NULL, { NULL } },
    { "HOST:", do_http, NULL, { NULL } },           /* follows every other method (RFC 9112 3.2) */
    { "", NULL, "500 5.5.2 Error: command not recognized", { NULL } }   /* the last row: all other verbs */
};

/* Looks up a command in the table and replies to it, or calls its function. */
static void dispatch(struct session *s, char *line)
{
    const struct command *c = commands;
    size_t verb = strcspn(line, " ");
    const char *argument = line + verb + strspn(line + verb, " ");

    while (c->verb[0] != '\0' && !is_same(line, verb, c->verb))
        c++;
    if (s->stranger && c->handle != do_quit)
        reply(s, "503 5.5.1 Error: you may not relay here, send QUIT");     /* RFC 5321 3.1 */
    else if (c->out_of_order[s->phase] != NULL)
        reply(s, "%s", c->out_of_order[s->phase]);
    else if (c->handle == NULL || (c->says != NULL && *argument != '\0'))
        reply(s, "%s", c->says);
    else
        c->handle(s, argument);
}

/* Consumes one command line and replies to it; returns the octets consumed, or 0 if
 * the end of the line has not come yet. */
static size_t take_command(struct session *s, const char *bytes, size_t size)
{
    char text[COMMAND_LIMIT + 1];
    const char *lf = memchr(bytes, '\n', size);
    struct line line;

    if (!s->spoken && lf != NULL) {     /* people at nc send bare LFs, from the first line on */
        s->spoken = true;
        s->lf = lf == bytes || lf[-1] != '\r';
    }
    line = next_line(bytes, size, s->lf);
    if (line.used == 0) {
        s->skipping = s->skipping || line.length >= COMMAND_LIMIT;
        return s->skipping ? line.length : 0;
    }
    extend_deadline(s);     /* only for whole lines: a client that sends octet by octet gains no time */
    if (s->skipping || line.used > COMMAND_LIMIT) {
        s->skipping = false;
        reply(s, "500 5.5.2 Error: line too long");
        return line.used;
    }
    memcpy(text, bytes, line.length);
    while (line.length > 0 && (text[line.length - 1] == ' ' || text[line.length - 1] == '\t'))
        line.length--;                  /* RFC 5321 4.1.1: servers tolerate them */
    text[line.length] = '\0';
    if (settings.verbose)
        log_dialogue(s, "C", text);
    for (size_t i = 0; i < line.length; i++)
        if ((text[i] < ' ' && text[i] != '\t') || text[i] > '~') {
            reply(s, "500 5.5.2 Error: a command is printable ASCII and ends with CRLF");
            return line.used;
        }
    dispatch(s, text);
    return line.used;
}

/* ==== The message ======================================================== */

/* Marks the message as refused and removes its draft.  The reply is sent at the message's
 * real end, since nothing before that may be taken for a command. */
static void refuse(struct transaction *tx, const char *why)
{
    if (tx->refusal == NULL) {
        tx->refusal = why;
        draft_drop(&tx->draft);
    }
}

/* Appends to the draft, unless the message is refused; refuses it if this fails. */
static void append(struct transaction *tx, const char *bytes, size_t size)
{
    if (tx->refusal != NULL || size == 0)
        return;
    draft_add(&tx->draft, bytes, size);
    if (tx->draft.error != 0)
        refuse(tx, draft_refusal(tx->draft.error));
}

/* Counts and checks a line of the message, or a piece of a long line. */
static void inspect(struct transaction *tx, const char *text, const struct line *line)
{
    bool first = !tx->in_line;

    tx->size += line->length;
    if (line->used > 0)
        tx->size += 2;
    if (first && line->length > 0 && text[0] == '.')
        tx->size--;             /* RFC 1870 5: the dot was added for the transfer */
    if (settings.max_size > 0 && tx->size > settings.max_size)
        refuse(tx, TOO_BIG);
    if (line->bare)
        refuse(tx, "550 5.5.2 Error: bare CR or LF in the message, lines end with CRLF (RFC 5321 2.3.8)");
    if (tx->in_header && first) {
        if (line->length == 0)
            tx->in_header = false;
        else if (line->length >= 9 && strncasecmp(text, "Received:", 9) == 0 && ++tx->received >= LOOP_LIMIT)
            refuse(tx, "554 5.4.6 Error: mail loop: too many Received lines");
    }
    tx->in_line = line->used == 0;
}

/* Logs that a message was accepted.  The child that has stored the message does so before
 * it forwards it or hands it over, so that this line comes before those of the outcomes. */
static void log_accepted(const struct session *s)
{
    const struct transaction *tx = s->tx;
    char address[ADDRESS_TEXT];

    logmsg("%s client=%s:%u helo=%s from=<%s> size=%llu recipients=%u", tx->draft.id,
        address_text(&s->peer, address), s->port, s->helo, tx->from, tx->size, tx->recipients);
}

/* Runs a transaction's child, and never returns: makes the message durable and writes the
 * client's reply to `reply_fd`.  With a slot it then forwards the message; without one it
 * hands the message over to the queue manager.  Signals stay blocked until the reply is
 * written, so that SIGTERM does not leave the client in doubt. */
static void run_transaction(struct session *s, int reply_fd, bool slot)
{
    struct draft *d = &s->tx->draft;
    bool company = count_slots(&s->tx->lane) > 0;
    bool stored;

    leave_server();
    stored = draft_store(d, reply_fd);
    close(reply_fd);
    if (stored)
        log_accepted(s);
    if (stored && slot) {
        close_clients(s);
        default_signals();
        draft_forward(d, s->tx->lane, company, due_pipe[1]);
    } else if (stored) {
        draft_hand_over(d, s->tx->lane, due_pipe[1]);
    }
    _exit(0);
}

/* Forks the child for a complete message.  Returns the read end of its reply pipe, or
 * -1 if no pipe or no process can be made. */
static int start_transaction(struct session *s)
{
    struct child child = { .role = TRANSACTION, .slot = slot_free(s->tx->lane), .lane = s->tx->lane };
    int ends[2];
    pid_t pid;

    if (pipe(ends) != 0) {
        rest("pipe");
        return -1;
    }
    pid = ends[0] < FD_SETSIZE ? spawn(child) : -1;
    if (pid == 0) {
        close(ends[0]);
        run_transaction(s, ends[1], child.slot);
    }
    close(ends[1]);
    if (pid < 0)
        close_fd(&ends[0]);
    return ends[0];
}

/* Ends the message at its final dot.  start_transactions() gives it to a child, at once
 * unless too many are being stored. */
static void end_message(struct session *s)
{
    struct transaction *tx = s->tx;

    append(tx, ".\r\n", 3);
    if (tx->refusal != NULL) {
        reply(s, "%s", tx->refusal);
        reset(s);
        return;
    }
    s->phase = COMPLETE;
}

/* Consumes as much of the message as can be judged, and returns how much.  The draft
 * keeps the message as it is to be sent: CRLF at every line's end, and a dot before
 * every line that begins with one (RFC 5321 4.5.2).  Clients normally send exactly
 * that, and then the octets go from the socket to the file as they are, many lines at
 * a time. */
static size_t take_message(struct session *s, const char *bytes, size_t size)
{
    struct transaction *tx = s->tx;
    size_t used = 0, kept = 0;

    extend_deadline(s);
    while (used < size) {
        const char *text = bytes + used;
        struct line line = next_line(text, size - used, s->lf);
        bool first = !tx->in_line;

        if (line.used == 0 && line.length < (first ? LINE_HEAD : 1))
            break;                      /* too little to tell what the line will be */
        if (first && line.used > 0 && line.length == 1 && text[0] == '.') {
            append(tx, bytes + kept, used - kept);
            end_message(s);
            return used + line.used;
        }
        inspect(tx, text, &line);
        if (first && text[0] == '.' && line.length > 1 && text[1] != '.') {
            append(tx, bytes + kept, used - kept);    /* a leading dot that was added for nothing is left out */
            kept = used + 1;
        }
        if (s->lf && line.used > 0) {
            append(tx, bytes + kept, used + line.length - kept);
            append(tx, "\r\n", 2);
            kept = used + line.used;
        }
        used += line.used > 0 ? line.used : line.length;
    }
    append(tx, bytes + kept, used - kept);
    if (tx->refusal == NULL)
        s->limit += (int64_t)used;      /* a millisecond for each octet: even slow lines get through */
    return used;
}

/* ==== The loop =========================================================== */

static void on_signal(int number)
{
    if (number == SIGCHLD)
        got_child = 1;
    else if (number == SIGHUP)
        got_hangup = 1;
    else
        got_term = 1;
}

/* What the loop waits for.  pselect() changes the sets, so they are filled anew each time. */
struct events {
    fd_set readable, writable;
    int top;                /* the highest descriptor in the sets, -1 if there is none */
    int64_t until;          /* by clock_ms(): the loop goes on then even if nothing happens */
};

static void wake_at(struct events *e, int64_t when)
{
    if (when < e->until)
        e->until = when;
}

/* Adds what a session waits for: a descriptor, and its deadline.  A client that does not
 * take its replies is not read from; nor is one whose message is being stored. */
static void fill_session(struct events *e, const struct session *s)
{
    if (s->phase == STORING) {
        watch_fd(s->pipe, &e->readable, &e->top);
    } else if (s->phase != COMPLETE) {
        watch_fd(s->fd, s->out.size > 0 ? &e->writable : &e->readable, &e->top);
        wake_at(e, s->deadline);
    }
}

/* Sets the events that the loop waits for next. */
static void fill(struct events *e)
{
    FD_ZERO(&e->readable);
    FD_ZERO(&e->writable);
    e->top = -1;
    e->until = INT64_MAX;
    for (size_t i = 0; i < session_count; i++)
        fill_session(e, sessions[i]);
    if (!divided && !got_term && find_child(QUEUE_MANAGER) < 0)
        wake_at(e, manager_from);
    if (clock_ms() < rest_until)
        wake_at(e, rest_until);
    else
        for (size_t i = 0; i < listener_count; i++)
            watch_fd(listeners[i], &e->readable, &e->top);
}

/* Waits for the first event.  Signals are blocked except in here.  A signal that came
 * between the test of its flag and a plain select() would be noticed only at the next
 * event (a lost wake-up); pselect() unblocks signals and waits in one step. */
static void wait_for_events(struct events *e, const sigset_t *wait_mask)
{
    static int64_t next_look;
    struct timespec timeout = { 0, 0 };
    int64_t now = clock_ms(), left = e->until - now;

    if (left > 0) {
        timeout.tv_sec = (time_t)(left / 1000);
        timeout.tv_nsec = (long)(left % 1000) * 1000000;
    }
    if (pselect(e->top + 1, &e->readable, &e->writable, NULL, e->until == INT64_MAX ? NULL : &timeout, wait_mask) < 0) {
        FD_ZERO(&e->readable);          /* a signal: the sets mean nothing now */
        FD_ZERO(&e->writable);
    } else if (now >= next_look) {      /* Linux's pselect() delivers no signal if a descriptor is ready at once */
        sigset_t blocked;

        next_look = now + SIGNAL_WAIT;
        sigprocmask(SIG_SETMASK, wait_mask, &blocked);
        sigprocmask(SIG_SETMASK, &blocked, NULL);
    }
}

/* Consumes a command, a piece of the message or a proxy's header, as the phase asks.
 * Returns how many octets that was: 0 if more has to come first. */
static size_t consume(struct session *s, const char *bytes, size_t size)
{
    if (s->phase == DATA)
        return take_message(s, bytes, size);
    if (s->phase == PROXIED)
        return take_proxy_header(s, bytes, size);
    return take_command(s, bytes, size);
}

/* Takes whole lines from the front of the input and answers them, as long as there are
 * any and the client takes the replies.  Keeps the rest of the input in s->in. */
static void converse(struct session *s, const char *bytes, size_t size)
{
    size_t used = 0, n = 1;
    bool full = false;

    if (size == 0) {
        flush(s);
        return;
    }
    while (s->phase < COMPLETE && used < size && n > 0 && !full) {
        n = consume(s, bytes + used, size - used);
        used += n;
        if (s->errors >= ERROR_LIMIT && s->phase < DATA) {
            reply(s, "421 4.7.0 %s Error: too many errors", settings.hostname);
            start_closing(s);
        }
        if (s->out.size >= OUTPUT_LIMIT) {
            flush(s);
            full = s->out.size > 0;     /* serve_session() goes on when the client has taken them */
        }
    }
    if (!full)
        flush(s);
    if (s->phase >= CLOSING)
        used = size;
    if (!buffer_set(&s->in, bytes + used, size - used))
        s->phase = GONE;
}

/* Reads once from a client, and answers what it says.  Input that is left from before
 * goes in front. */
static void hear(struct session *s)
{
    static char input[INPUT_SIZE];
    ssize_t n;

    if (s->in.size > 0)
        memcpy(input, s->in.bytes, s->in.size);
    n = read(s->fd, input + s->in.size, sizeof input - s->in.size);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        s->phase = GONE;            /* end of file or a reset; all whole commands have been answered */
    } else if (s->phase != CLOSING) {
        converse(s, input, s->in.size + (size_t)n);
    }
}

/* Sends the client the reply to its message, and goes on with the commands that it has
 * sent behind the final dot. */
static void finish_message(struct session *s, const char *line)
{
    reply(s, "%s", line);
    reset(s);
    if (line[0] == '2')
        renew(s);
    else
        extend_deadline(s);
    converse(s, s->in.bytes, got_term ? 0 : s->in.size);
}

/* Takes the reply from the child that stores this client's message.  End of file without
 * a line means that the child has died: 451. */
static void take_result(struct session *s)
{
    char line[REPLY_SIZE];
    ssize_t n = read(s->pipe, line, sizeof line - 1);

    if (n < 0 && errno == EINTR)
        return;
    line[n > 0 ? n : 0] = '\0';
    line[strcspn(line, "\n")] = '\0';
    close_fd(&s->pipe);
    finish_message(s, line[0] != '\0' ? line : draft_refusal(EIO));
}

/* Gives complete messages to children, STORING_AT_ONCE at most at a time.  Each call
 * begins behind the session at which the last one ended, so that every session has its
 * turn. */
static void start_transactions(void)
{
    static size_t turn;
    size_t storing = count_sessions(STORING);

    for (size_t i = 0; i < session_count && storing < STORING_AT_ONCE; i++) {
        struct session *s = sessions[turn++ % session_count];

        if (s->phase != COMPLETE)
            continue;
        s->pipe = start_transaction(s);
        if (s->pipe >= 0) {
            draft_forget(&s->tx->draft);
            s->phase = STORING;
            storing++;
        } else {
            finish_message(s, draft_refusal(EAGAIN));
        }
    }
}

/* Serves a session for which something has happened. */
static void serve_session(struct session *s, const struct events *e)
{
    bool can_read = FD_ISSET(s->fd, &e->readable), can_write = FD_ISSET(s->fd, &e->writable);
    int64_t now = clock_ms();

    if (s->phase == STORING && FD_ISSET(s->pipe, &e->readable)) {
        take_result(s);
    } else if (s->phase == CLOSING && now >= s->deadline) {
        s->phase = GONE;
    } else if (s->phase < COMPLETE && now >= (can_read || can_write ? s->limit : s->deadline)) {
        reply(s, "421 4.4.2 %s Error: timeout exceeded", settings.hostname);
        start_closing(s);
    } else if (can_write) {
        size_t before = s->out.size;

        flush(s);
        if (s->out.size < before && s->phase < COMPLETE)
            extend_deadline(s);
        if (s->out.size == 0 && s->phase < COMPLETE)
            converse(s, s->in.bytes, s->in.size);
    } else if (can_read) {
        hear(s);
    }
}

/* Refuses a client that gets no session: sends it the reason, as far as that can be
 * sent at once, and closes the connection. */
static void turn_away(int fd, const union address *peer, const char *refusal)
{
    char line[REFUSAL_SIZE + 2], text[ADDRESS_TEXT];
    int size = snprintf(line, sizeof line, "%s\r\n", refusal);

    logmsg("%s:%u refused: %s", address_text(peer, text), address_port(peer), refusal);
    if (write(fd, line, (size_t)size) < 0)
        logmsg("%s:%u did not wait for it", text, address_port(peer));
    close(fd);
}

/* Gives a new client its session, or turns it away. */
static void welcome(int fd, union address peer)
{
    static const struct session fresh = { .phase = PROXIED };
    char refusal[REFUSAL_SIZE];
    struct session *s;
    enum entry entry = ADMITTED;
    bool proxy;

    fcntl(fd, F_SETFL, O_NONBLOCK);
    address_unmap(&peer);       /* an IPv4 client of an IPv6 socket is an IPv4 client */
    proxy = in_networks(&peer, &settings.proxies);
    if (!proxy)
        entry = admit(&peer, refusal);
    if (entry == TURNED_AWAY) {
        turn_away(fd, &peer, refusal);
        return;
    }
    s = malloc(sizeof *s);
    if (s == NULL) {
        turn_away(fd, &peer, "421 4.3.0 Error: out of memory, try again later");
        return;
    }
    *s = fresh;
    s->fd = fd;
    s->pipe = -1;
    s->peer = peer;
    renew(s);
    sessions[session_count++] = s;
    if (!proxy)
        begin(s, &peer, entry, refusal);
    flush(s);
}

/* Divides the server, because the table is full.  A child takes over all sessions with
 * their reply pipes; this process keeps its pid and the listening sockets, and goes on
 * with an empty table.  It also reaps the children that are storing messages. */
static void divide(void)
{
    pid_t pid = spawn((struct child){ .role = DIVIDED });

    if (pid > 0) {
        logmsg("table full: process %ld serves %lu clients on", (long)pid, (unsigned long)session_count);
        forget_sessions();
    } else if (pid == 0) {
        divided = true;
        wipe(settings.password, sizeof settings.password);      /* this process forwards nothing */
        child_count = 0;
        leave_server();
    }
}

/* Accepts the clients that wait.  accept() may fail although the listening socket was
 * readable: the client may be gone, or there is no descriptor for it. */
static void accept_clients(int listener)
{
    for (int i = 0; i < ACCEPTS; i++) {
        union address peer;
        socklen_t size = sizeof peer;
        int fd;

        if (is_full())
            divide();
        if (divided || is_full())
            return;
        fd = accept(listener, &peer.sa, &size);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
            logmsg("accept failed (%s): resting for a second", strerror(errno));
            rest_until = clock_ms() + REST;
        }
        if (fd >= FD_SETSIZE) {     /* the table's limit rules it out; in an fd_set it would corrupt memory */
            close(fd);
            fd = -1;
        }
        if (fd < 0)
            return;
        if (size == 0) {            /* macOS: the client is gone again, and its address unknown */
            close(fd);
            continue;
        }
        welcome(fd, peer);
    }
}

/* Serves the sessions and listening sockets that are ready or whose time is over. */
static void serve(const struct events *e)
{
    size_t known = session_count;   /* sessions that begin below are not in the sets */

    for (size_t i = 0; i < known; i++)
        serve_session(sessions[i], e);
    for (size_t i = 0; i < listener_count; i++)
        if (FD_ISSET(listeners[i], &e->readable))
            accept_clients(listeners[i]);
}

/* Removes the sessions that are gone. */
static void reap_sessions(void)
{
    size_t left = 0;

    for (size_t i = 0; i < session_count; i++) {
        struct session *s = sessions[i];

        if (s->phase != GONE) {
            sessions[left++] = s;
            continue;
        }
        reset(s);
        free_session(s);
    }
    session_count = left;
}

/* After SIGTERM: closes the listening sockets, sends 421 to each client (RFC 5321 3.8)
 * unless its message is being stored, and ends the queue manager and divided servers.
 * Called before each wait, so a client whose message has been stored gets its 421, too.
 * Children that forward a message finish their try. */
static void stop(void)
{
    close_listeners();
    for (size_t i = 0; i < session_count; i++) {
        struct session *s = sessions[i];

        if (s->phase < COMPLETE) {
            reply(s, "421 4.3.2 %s shutting down, try again later", settings.hostname);
            start_closing(s);
        }
    }
    for (size_t i = 0; i < child_count; i++)
        if (children[i].role != TRANSACTION)
            kill(children[i].pid, SIGTERM);
}

/* Acts on the signals that have come, except SIGHUP: see keep_queue_manager(). */
static void heed_signals(void)
{
    if (got_child) {
        got_child = 0;
        reap_children();
    }
    if (got_term)
        stop();
}

/* Makes signals set a flag, and blocks them.  Returns the mask under which
 * wait_for_events() lets them through. */
static sigset_t catch_signals(void)
{
    static const int caught[] = { SIGTERM, SIGINT, SIGHUP, SIGCHLD };
    struct sigaction action;
    sigset_t blocked, wait_mask;

    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigemptyset(&blocked);
    sigprocmask(SIG_SETMASK, NULL, &wait_mask);
    for (size_t i = 0; i < sizeof caught / sizeof caught[0]; i++) {
        sigaddset(&blocked, caught[i]);
        sigdelset(&wait_mask, caught[i]);
    }
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    for (size_t i = 0; i < sizeof caught / sizeof caught[0]; i++)
        sigaction(caught[i], &action, NULL);
    signal(SIGPIPE, SIG_IGN);       /* write() fails instead when a client has hung up ... */
    signal(SIGXFSZ, SIG_IGN);       /* ... and when a file may not grow */
    return wait_mask;
}

/* The loop.  Returns when there is nothing left to do: after SIGTERM, or in a divided
 * process when its last client is gone.  Signals are delivered under `wait_mask`. */
static void run(const sigset_t *wait_mask)
{
    struct events events;

    for (;;) {
        heed_signals();
        start_transactions();
        reap_sessions();
        if (session_count == 0 && (divided || (got_term && find_child(DIVIDED) < 0))) {
            if (!divided)
                spool_release(spool_lock);
            return;
        }
        if (!divided && !got_term)
            keep_queue_manager();
        fill(&events);
        wait_for_events(&events, wait_mask);
        serve(&events);
    }
}

/* ==== Start ============================================================== */

/* POSIX does not have setgroups(), though every Unix does: the feature macros
 * keep it out of the headers, so it is declared here.  The number is an int on
 * some systems; a zero is the same to both. */
int setgroups(size_t count, const gid_t *groups);

/* Arranged by subject; with the prompt it fits a screen of 24 lines of 80 columns. */
static const char usage_text[] =
    "usage: smtp [options] address...    serve on these addresses\n"
    "       smtp -l [-q spool] [word]... list the queue, or what has such a word\n"
    "serving     -p port         listen on this port, 0 for any that is free (25)\n"
    "            -h hostname     our name (the system's)\n"
    "            -q spool        where messages are kept (/var/spool/smtp)\n"
    "            -u user         as root, become this user (smtp, or nobody)\n"
    "            -v              log both dialogues (-V: print the version)\n"
    "clients     -a network      these may relay, too: 192.0.2.0/24, 2001:db8::/32\n"
    "            -X network      proxies that name their clients (PROXY protocol 2)\n"
    "            -c number       connections per address, 0: any (1/4 of the table)\n"
    "            -d domain       take mail for this domain only, may be repeated\n"
    "            -M address      where mail to <Postmaster> goes (the hostname's)\n"
    "            -m size         largest message in octets or K, M, G, 0: any (50M)\n"
    "            -t time         drop a client after this silence, in s, m, h, d (5m)\n"
    "exchangers  -n host[:port]  ask this name server (those of /etc/resolv.conf)\n"
    "            -P port         where exchangers listen (25)\n"
    "            -b address      connect from it; one of IPv4, IPv6, or each (any)\n"
    "            -T tls          deliver by TLS: never, may (if offered), must (may)\n"
    "            -s, -S host[:port]  the smarthost for all mail (-S: TLS at once)\n"
    "            -A file         our name and password there, a line each (port 587)\n"
    "            -w time         longest wait for an exchanger (RFC 5321's times)\n"
    "queue       -j number       forwarders at once (50)\n"
    "            -r, -e time     first retry after (5m), give up after (5d)\n";

static const char version_text[] = "smtp " VERSION "\n";

/* Logs what is wrong on the command line, and exits with status 2. */
static void misused(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    write_log("smtp: ", 0, format, arguments);
    va_end(arguments);
    exit(2);
}

static void usage(void)
{
    fputs(usage_text, stderr);
    exit(2);
}

/* Prints a text that the command line asks for, and exits. */
static void inform(const char *text)
{
    fputs(text, stdout);
    exit(fflush(stdout) == 0 ? 0 : 1);
}

/* The units that may stand behind a number: a letter each, and its factor. */
static const struct units {
    const char *letters;
    unsigned long factors[4];
    const char *explained;
} no_units = { "", { 0 }, "" },
    size_units = { "KMG", { 1024, 1024 * 1024, 1024 * 1024 * 1024 }, ", or one with K, M or G behind it such as 50M" },
    time_units = { "smhd", { 1, 60, 3600, 86400 }, " seconds, or one with s, m, h or d behind it such as 5m" };

/* Reads an option's value: decimal digits, and perhaps a letter of `units`.  Exits if the
 * value is not between `least` and `most`. */
static unsigned long long quantity(int option, const char *text, const struct units *units,
    unsigned long long least, unsigned long long most)
{
    const char *unit;
    char *end;
    unsigned long long value, factor = 1;

    errno = 0;
    value = strtoull(text, &end, 10);
    unit = *end != '\0' ? strchr(units->letters, *end) : NULL;
    if (unit != NULL) {
        factor = units->factors[unit - units->letters];
        end++;
    }
    if (*text < '0' || *text > '9' || *end != '\0' || errno == ERANGE || value > most / factor
        || value * factor < least)
        misused("-%c takes a number from %llu to %llu%s, not '%s'", option, least, most, units->explained, text);
    return value * factor;
}

static unsigned long long number(int option, const char *text, unsigned long long least, unsigned long long most)
{
    return quantity(option, text, &no_units, least, most);
}

static struct network network_parse(int option, const char *text)
{
    struct network n;
    char host[ADDRESS_TEXT];
    const char *slash = strchr(text, '/');
    size_t length = slash != NULL ? (size_t)(slash - text) : strlen(text);
    unsigned most;

    snprintf(host, sizeof host, "%.*s", (int)length, text);
    if (length >= sizeof host || !address_parse(host, 0, &n.base))
        misused("-%c %s: not a network such as 192.0.2.0/24 or 2001:db8::/32", option, text);
    address_unmap(&n.base);
    most = n.base.sa.sa_family == AF_INET6 ? 128 : 32;
    n.bits = slash != NULL ? (unsigned)number(option, slash + 1, 0, most) : most;
    for (unsigned i = n.bits; i < most; i++) {      /* 10.1.2.3/8 may stand for 10.0.0.0/8 or be a slip */
        if (address_octets(&n.base, &length)[i / 8] >> (7 - i % 8) & 1)
            misused("-%c %s: the address has bits behind the first %u", option, text, n.bits);
    }
    return n;
}

static void add_network(struct networks *networks, int option, const char *text)
{
    struct network *more = realloc(networks->list, (networks->count + 1) * sizeof *more);

    if (more == NULL)
        die("no memory");
    networks->list = more;
    networks->list[networks->count++] = network_parse(option, text);
}

static void add_relayed_domain(const char *text)
{
    const char **more = realloc(settings.domains, (settings.domain_count + 1) * sizeof *more);
    union address literal;
    const char *end = literal_parse(text, 0, &literal);

    if (more == NULL)
        die("no memory");
    if (!is_domain(text) && (end == NULL || *end != '\0'))
        misused("-d %s: not a domain such as example.org", text);
    settings.domains = more;
    settings.domains[settings.domain_count++] = text;
}

static void add_nameserver(const char *text)
{
    struct nameservers *n = &settings.nameservers;
    const char *why;

    if (n->count == NAMESERVERS)
        misused("-n %s: %d name servers are enough", text, NAMESERVERS);
    why = nameserver_parse(text, &n->server[n->count]);
    if (why != NULL)
        misused("-n %s: %s (name a server as 192.0.2.53 or [2001:db8::53]:5353)", text, why);
    n->count++;
}

static void add_source(const char *text)
{
    union address a;
    size_t size;

    if (!address_parse(text, 0, &a))
        misused("-b %s: not an address such as 192.0.2.1 or 2001:db8::1", text);
    address_unmap(&a);
    for (size_t i = 0; i < settings.source_count; i++)
        if (settings.sources[i].sa.sa_family == a.sa.sa_family)
            misused("-b %s: one IPv4 address and one IPv6 address at most", text);
    if (*address_octets(&a, &size) >= (a.sa.sa_family == AF_INET6 ? 255 : 224))     /* bind() may take it */
        misused("-b %s: multicast and broadcast addresses are nobody's to connect from", text);
    settings.sources[settings.source_count++] = a;
}

static void set_smarthost(const char *text)
{
    static char host[DNS_NAME_SIZE];
    unsigned usual = settings.tls_first ? 465 : settings.user[0] != '\0' ? 587 : settings.mx_port;
    union address a;

    if (!endpoint_parse(text, usual, host, &settings.smarthost_port)
        || (!address_parse(host, 0, &a) && !is_domain(host)))
        misused("-%c %s: not a host such as mail.example.net or [2001:db8::25]:2525", settings.tls_first ? 'S' : 's',
            text);
    settings.smarthost = host;
}

static void set_tls(const char *text)
{
    static const char *const names[] = { "never", "may", "must" };

    for (int i = TLS_NEVER; i <= TLS_MUST; i++)
        if (strcmp(text, names[i]) == 0) {
            settings.tls = (enum tls)i;
            return;
        }
    misused("-T %s: not never, may or must", text);
}

/* Takes a line of -A's file.  False: it is empty, or too long. */
static bool take_secret(const char **text, char secret[SECRET_SIZE])
{
    size_t length = strcspn(*text, "\r\n");

    if (length == 0 || length >= SECRET_SIZE)
        return false;
    memcpy(secret, *text, length);
    secret[length] = '\0';
    *text += length;
    *text += strspn(*text, "\r\n");
    return true;
}

/* Reads our name and password at the smarthost, from a file that nobody else can
 * read or write. */
static void read_password(const char *path)
{
    char text[2 * SECRET_SIZE + 4];
    const char *at = text;
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);     /* a FIFO is refused below, not waited for */
    ssize_t size;

    if (fd < 0 || fstat(fd, &st) != 0)
        die("cannot read the password file -A %s", path);
    errno = 0;
    if (!S_ISREG(st.st_mode) || (st.st_mode & 0177) != 0)
        die("-A %s holds a password, so it must be a file of mode 600: chmod 600 it", path);
    if (st.st_uid != 0 && st.st_uid != getuid())
        die("-A %s belongs to uid %ld, who could change it: chown it to uid %ld, or to root", path, (long)st.st_uid,
            (long)getuid());
    size = read(fd, text, sizeof text - 1);
    close(fd);
    text[size > 0 ? size : 0] = '\0';
    if (!take_secret(&at, settings.user) || !take_secret(&at, settings.password) || at != text + size)
        die("-A %s must hold two lines, a name and a password, each of at most %d octets", path, SECRET_SIZE - 1);
    wipe(text, sizeof text);
}

/* Settles the smarthost and TLS once -s, -S, -A and -T are all known. */
static void settle_smarthost(const char *smarthost, const char *password_file)
{
    if (password_file != NULL && smarthost == NULL)
        misused("-A is for a smarthost: name it with -s or -S");
    if (password_file != NULL)
        read_password(password_file);
    if (smarthost != NULL)
        set_smarthost(smarthost);
    if (password_file == NULL && !settings.tls_first)
        return;
    if (settings.tls == TLS_NEVER)
        misused("-T never: -A and -S send nothing without TLS");
    settings.tls = TLS_VERIFIED;
}

/* Listens on one address.  False: this machine does not have it. */
static bool listen_at(union address *a)
{
    const int on = 1;
    char text[ADDRESS_TEXT];
    socklen_t size = sizeof *a;
    int fd = socket_open(a, SOCK_STREAM);

    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);   /* restart while old connections fade */
        if (a->sa.sa_family == AF_INET6)
            setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    }
    if (fd < 0 || bind(fd, &a->sa, address_size(a)) != 0 || listen(fd, SOMAXCONN) != 0) {
        if (errno == EACCES)
            die("cannot listen on %s port %u (start as root, or name a port above 1023 with -p)",
                address_text(a, text), address_port(a));
        if (errno != EADDRNOTAVAIL && errno != EAFNOSUPPORT)
            die("cannot listen on %s port %u (-p names another)", address_text(a, text), address_port(a));
        if (fd >= 0)
            close(fd);
        return false;
    }
    getsockname(fd, &a->sa, &size);     /* -p 0: which port it is */
    listeners[listener_count++] = fd;
    return true;
}

/* Whether we listen there already: the command line or /etc/hosts may name it twice. */
static bool is_bound(const union address *a, const union address *bound)
{
    struct network whole = { *a, a->sa.sa_family == AF_INET6 ? 128 : 32 };

    for (size_t i = 0; i < listener_count; i++)
        if (in_network(&bound[i], &whole))
            return true;
    return false;
}

/* Listens on every address that the name stands for, and dies if there is none.  On many
 * machines localhost stands for two addresses, of which they have only one. */
static void listen_on(const char *name, unsigned port)
{
    static union address bound[LISTENERS];
    struct addrinfo hints, *all, *a;
    bool listening = false;
    int error;

    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    error = getaddrinfo(name, NULL, &hints, &all);
    errno = 0;
    if (error != 0)
        die("%s is no address of this machine, such as 127.0.0.1: %s", name, gai_strerror(error));
    for (a = all; a != NULL; a = a->ai_next) {
        union address *here = &bound[listener_count];

        if (listener_count == LISTENERS)
            die("%d addresses to listen on are enough", LISTENERS);
        memcpy(here, a->ai_addr, a->ai_addrlen);
        address_set_port(here, port);
        if (is_bound(here, bound) || listen_at(here))
            listening = true;
        else
            error = errno;
    }
    freeaddrinfo(all);
    errno = error;
    if (!listening)
        die("cannot listen on %s port %u (0.0.0.0 and :: are all addresses there are)", name, port);
    settings.listening = bound;
    settings.listening_count = listener_count;
}

/* Dies if this machine does not have an address given with -b: no mail would get out.
 * So a server with -b that starts before its network is up has to be started again, as
 * one that listens on the network's address has. */
static void check_sources(void)
{
    for (size_t i = 0; i < settings.source_count; i++) {
        const union address *a = &settings.sources[i];
        char text[ADDRESS_TEXT];
        int fd = socket_open(a, SOCK_STREAM);

        if (fd < 0 || bind(fd, &a->sa, address_size(a)) != 0)
            die("cannot connect from %s (-b takes an address that this machine has)", address_text(a, text));
        close(fd);
    }
}

/* The user that root becomes. */
struct account {
    uid_t uid;
    gid_t gid;
};

/* Looks a user up, and returns whether there is one of this name.  A child does it, because
 * getpwnam() may load libraries that stay in memory: every later fork would copy their
 * mappings, which can cost a fifth of the processor time of a message. */
static bool look_up(const char *name, struct account *account)
{
    int ends[2];
    ssize_t size;
    pid_t pid = pipe(ends) == 0 ? fork() : -1;

    if (pid < 0)
        die("cannot look up user %s", name);
    if (pid == 0) {
        const struct passwd *user = getpwnam(name);

        if (user != NULL) {
            *account = (struct account){ user->pw_uid, user->pw_gid };
            if (write(ends[1], account, sizeof *account) < 0)
                _exit(1);
        }
        _exit(0);
    }
    close(ends[1]);
    size = read(ends[0], account, sizeof *account);
    close(ends[0]);
    waitpid(pid, NULL, 0);
    return size == (ssize_t)sizeof *account;
}

/* Returns the account of `name`, which is a user's name, or a number that is both user and
 * group, for systems without names, such as an empty chroot.  NULL: the default user's. */
static struct account find_account(const char *name)
{
    struct account account;
    bool found = name != NULL ? look_up(name, &account) : look_up("smtp", &account) || look_up("nobody", &account);

    if (!found && name != NULL && *name >= '0' && *name <= '9') {
        account.uid = (uid_t)number('u', name, 1, INT_MAX);
        account.gid = (gid_t)account.uid;
        return account;
    }
    errno = 0;
    if (!found)
        die("no user %s to become: make one, or name one, or a number, with -u",
            name != NULL ? name : "smtp or nobody");
    if (account.uid == 0)
        die("user %s is root itself: name another user with -u", name != NULL ? name : "smtp or nobody");
    return account;
}

/* Becomes the user for good, and checks that root cannot be had back. */
static void drop_root(struct account account)
{
    if (setgroups(0, NULL) != 0 || setgid(account.gid) != 0 || setuid(account.uid) != 0)
        die("cannot become uid %ld (start as that user, and not as root)", (long)account.uid);
    errno = 0;
    if (setuid(0) == 0 || getuid() == 0 || geteuid() == 0 || setgid(0) == 0)
        die("cannot give up being root");
}

/* Sizes the table so that no descriptor is too large for an fd_set.  Each client may need
 * two: its socket, and its draft or its child's reply pipe. */
static void size_table(void)
{
    long limit = sysconf(_SC_OPEN_MAX);

    if (limit < 0 || limit > FD_SETSIZE)
        limit = FD_SETSIZE;
    errno = 0;
    if (limit < RESERVE + 4)
        die("%ld open files are too few: raise the limit (ulimit -n) to %d or more", limit, RESERVE + 4);
    session_limit = (size_t)(limit - RESERVE) / 2;
    if (settings.per_address < 0)
        settings.per_address = session_limit > 40 ? (long)session_limit / 4 : 10;
}

static void default_names(void)
{
    static char hostname[DOMAIN_LIMIT + 1], postmaster[PATH_LIMIT];
    const char *end;

    if (settings.hostname == NULL) {
        if (gethostname(hostname, sizeof hostname - 1) != 0)
            die("this machine has no name: give one with -h");
        settings.hostname = hostname;
    }
    if (!is_domain(settings.hostname))
        misused("'%s' is no host name: give one such as relay.example.org with -h", settings.hostname);
    if (settings.postmaster == NULL) {
        if ((size_t)snprintf(postmaster, sizeof postmaster, "postmaster@%s", settings.hostname) > PATH_LIMIT - 2)
            misused("the host name is too long for an address in it: name a postmaster with -M");
        settings.postmaster = postmaster;
    }
    end = skip_mailbox(settings.postmaster);
    if (end == NULL || *end != '\0' || end - settings.postmaster > PATH_LIMIT - 2)
        misused("-M %s: not an address such as postmaster@example.org", settings.postmaster);
}

/* What the command line asks for. */
enum task { SERVE, LIST, PRINT_VERSION };

/* Refuses a word behind -V, and a word behind -l if there are options for a server: it
 * may have been meant as an address to listen on. */
static void check_words(enum task task, bool serves, int words, const char *first)
{
    if (task == PRINT_VERSION && words > 0)
        misused("-V prints the version: '%s' has no meaning behind it", first);
    if (task == LIST && words > 0 && serves)
        misused("-l lists what has the word '%s', and takes no option but -q then", first);
}

static enum task read_options(int argc, char **argv, unsigned *port, const char **user)
{
    const char *smarthost = NULL, *password_file = NULL;
    enum task task = SERVE;
    bool serves = false;        /* an option was given that only a server has */
    int option;

    if (argc == 2 && strcmp(argv[1], "--help") == 0)        /* of which POSIX's getopt() knows nothing */
        inform(usage_text);
    if (argc == 2 && strcmp(argv[1], "--version") == 0)
        inform(version_text);
    opterr = 0;
    while ((option = getopt(argc, argv, ":A:a:b:c:d:e:h:j:lM:m:n:P:p:q:r:S:s:T:t:u:Vvw:X:")) != -1) {
        serves = serves || strchr("lqV", option) == NULL;
        switch (option) {
        case 'A': password_file = optarg; break;
        case 'a': add_network(&settings.allowed, option, optarg); break;
        case 'b': add_source(optarg); break;
        case 'c': settings.per_address = (long)number(option, optarg, 0, LONG_MAX); break;
        case 'd': add_relayed_domain(optarg); break;
        case 'e': settings.expire = (long)quantity(option, optarg, &time_units, 1, LONG_MAX / 1000); break;
        case 'h': settings.hostname = optarg; break;
        case 'j': settings.forwarders = (long)number(option, optarg, 1, 10000); break;
        case 'l': task = LIST; break;
        case 'M': settings.postmaster = optarg; break;
        case 'm': settings.max_size = quantity(option, optarg, &size_units, 0, ULLONG_MAX); break;
        case 'n': add_nameserver(optarg); break;
        case 'P': settings.mx_port = (unsigned)number(option, optarg, 1, 65535); break;
        case 'p': *port = (unsigned)number(option, optarg, 0, 65535); break;
        case 'q': settings.spool = optarg; break;
        case 'r': settings.retry = (long)quantity(option, optarg, &time_units, 1, 86400); break;
        case 'S':
        case 's':
            settings.tls_first = option == 'S';
            smarthost = optarg;
            break;
        case 'T': set_tls(optarg); break;
        case 't': settings.idle = (long)quantity(option, optarg, &time_units, 1, 86400); break;
        case 'u': *user = optarg; break;
        case 'V': task = PRINT_VERSION; break;
        case 'v': settings.verbose = true; break;
        case 'w': settings.wait = (long)quantity(option, optarg, &time_units, 1, 86400); break;
        case 'X': add_network(&settings.proxies, option, optarg); break;
        case ':':
            if (optopt == 'h')      /* smtp -h alone asks for help */
                usage();
            misused("-%c needs a value (smtp -h explains the options)", optopt);
            break;
        default:
            misused("there is no option -%c (smtp -h explains the options)", optopt);
        }
    }
    check_words(task, serves, argc - optind, argv[optind]);
    settle_smarthost(smarthost, password_file);
    return task;
}

/* Makes sure that descriptors 0 to 2 exist, or a client's socket might become our
 * stderr.  Closes all others: the program that started us may be waiting for the end of
 * a pipe that we would hold open. */
static void settle_descriptors(void)
{
    int fd;

    do {
        fd = open("/dev/null", O_RDWR);
        if (fd < 0)     /* in an empty chroot, any descriptor does that cannot be written to */
            fd = open("/", O_RDONLY);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    for (fd = STDERR_FILENO + 1; fd < INHERITED; fd++)
        close(fd);
}

/* Makes a pipe neither end of which ever blocks. */
static void open_pipe(int ends[2])
{
    if (pipe(ends) != 0)
        die("cannot make a pipe");
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
}

static void log_listening(void)
{
    for (size_t i = 0; i < settings.listening_count; i++) {
        char text[ADDRESS_TEXT];
        const union address *a = &settings.listening[i];

        logmsg(a->sa.sa_family == AF_INET6 ? "listening on [%s]:%u" : "listening on %s:%u",
            address_text(a, text), address_port(a));
    }
}

/* Warns if -a or -X names all addresses, which is nearly always a mistake. */
static void warn_if_open(void)
{
    char text[ADDRESS_TEXT];

    for (size_t i = 0; i < settings.allowed.count; i++)
        if (settings.allowed.list[i].bits == 0)
            logmsg("warning: -a %s/0 lets everybody relay: unless a firewall keeps them away, spammers will",
                address_text(&settings.allowed.list[i].base, text));
    for (size_t i = 0; i < settings.proxies.count; i++)
        if (settings.proxies.list[i].bits == 0)
            logmsg("warning: -X %s/0 lets everybody say that it is somebody else: name the proxy's own address",
                address_text(&settings.proxies.list[i].base, text));
}

int main(int argc, char **argv)
{
    const char *user_name = NULL;
    unsigned port = 25;
    bool root = geteuid() == 0 || getuid() == 0;
    struct account account = { geteuid(), getegid() };
    enum task task;
    sigset_t wait_mask;

    settle_descriptors();
    umask(077);
    setenv("TZ", "UTC0", 1);        /* all dates are in UTC: strftime() need not look for a time zone's file */
    add_network(&settings.allowed, 'a', "127.0.0.0/8");
    add_network(&settings.allowed, 'a', "::1");
    task = read_options(argc, argv, &port, &user_name);
    if (task == PRINT_VERSION)
        inform(version_text);
    if (task == LIST)
        return list_queue(argv + optind);
    if (argc == 1)
        usage();
    if (optind == argc)
        misused("name an address to listen on, such as localhost (smtp -h explains the options)");
    default_names();
    check_resolv_conf();      /* while this is still root, in case only root may read it */
    for (; optind < argc; optind++)
        listen_on(argv[optind], port);
    check_sources();
    if (root)
        account = find_account(user_name);
    else if (user_name != NULL)
        misused("-u %s: only root can become somebody else", user_name);
    spool_enter(account.uid, account.gid);
    if (root)
        drop_root(account);
    wait_mask = catch_signals();
    spool_lock = spool_take();
    size_table();
    open_pipe(due_pipe);
    warn_if_open();
    log_listening();
    run(&wait_mask);
    return 0;
}
