/*
 * 5-forward.c - a child for each message stores it, and then takes it to an exchanger.
 *
 *     cc -o 5-forward 5-forward.c && ./5-forward 2525 spool 127.0.0.1 25
 *
 * listens on 127.0.0.1 port 2525, keeps messages in the directory spool, and forwards
 * all of them to the exchanger at 127.0.0.1 port 25.
 *
 * New since program 4: The dialogue as a client, Forwarding, and the children in The
 * message and The loop.  To be read from the end.
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
    NAME_SIZE = 256,        /* a domain name or a path, with its NUL: RFC 5321 4.5.3.1 */
    RECIPIENT_LIMIT = 100,  /* recipients of a message: RFC 5321 4.5.3.1.8 */
    RESERVE = 16,           /* descriptors that are no client's */
    FORWARDERS = 50,        /* children at once that forward */
    TRY_SECONDS = 600,      /* that a process may try one message */
    QUEUE_SECONDS = 60,     /* between two looks through the queue */
    REPLY_SECONDS = 300     /* that the exchanger has to reply: RFC 5321 4.5.3.2 */
};

static char hostname[NAME_SIZE];
static struct sockaddr_in exchanger;

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

/* ---- The dialogue, as a client --------------------------------------------- */

enum outcome { LATER, SENT, FAILED };

static const char *const outcome_names[] = { "later", "sent", "failed" };

/* A connection to the exchanger. */
struct exchange {
    int fd;
    char in[LINE_SIZE];         /* received, not yet read */
    size_t size;
};

static char words[LINE_SIZE];   /* the last reply of the exchanger, or what went wrong instead */

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

/* Connects, is greeted, and says what there is to say. */
static enum outcome deliver(const struct message *m, const char *path)
{
    const struct timeval patience = { REPLY_SECONDS, 0 };
    struct exchange x = { .fd = socket(AF_INET, SOCK_STREAM, 0) };
    enum outcome outcome = LATER;

    setsockopt(x.fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(x.fd, (struct sockaddr *)&exchanger, sizeof exchanger) != 0)
        snprintf(words, sizeof words, "%s", strerror(errno));
    else if (read_reply(&x) / 100 == 2)
        outcome = transact(&x, m, path);
    dprintf(x.fd, "QUIT\r\n");     /* whatever it says: what is done is done */
    close(x.fd);
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

    if (argc != 5) {
        fprintf(stderr, "usage: %s port spool exchanger exchanger-port\n", argv[0]);
        return 2;
    }
    exchanger = address_of(argv[3], argv[4]);
    gethostname(hostname, sizeof hostname - 1);
    session_limit = (size_t)((limit < 0 || limit > FD_SETSIZE ? FD_SETSIZE : limit) - RESERVE) / 2;
    enter_spool(argv[2]);
    catch_signals();
    listen_on(argv[1]);
    start_runner();
    run();
    return 0;
}
