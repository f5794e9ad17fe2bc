/*
 * 6-relay.c - a whole relay: it finds the exchangers by itself and takes the nearest.
 *
 *     cc -o 6-relay 6-relay.c && ./6-relay 2525 spool 127.0.0.1 53 25
 *
 * listens on 127.0.0.1 port 2525, keeps messages in the directory spool, asks the name
 * server at 127.0.0.1 port 53, and expects exchangers on port 25.
 *
 * New since program 5: DNS, and from start_connecting() to deliver().  Read it from the end.
 */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <dirent.h>
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    LINE_SIZE = 2048,           /* no line is longer: RFC 5321 4.5.3.1.6 allows 1,000 octets */
    NAME_SIZE = 256,            /* a domain name with its NUL: RFC 1035 2.3.4 */
    CLIENTS = 400,              /* at once: each has up to two of FD_SETSIZE descriptors, 1,024 */
    FORWARDERS = 50,            /* children at once */
    RECORDS = 20,               /* taken of an answer of the DNS */
    RACE_SECONDS = 30,          /* that an exchanger has to greet */
    REPLY_SECONDS = 300,        /* that it has to reply: RFC 5321 4.5.3.2 */
    TRY_SECONDS = 3600,         /* that a forwarder has */
    QUEUE_SECONDS = 60          /* between two looks through the queue */
};

static char hostname[NAME_SIZE];
static struct sockaddr_in nameserver, exchanger;

static void die(const char *what)
{
    perror(what);
    _exit(1);               /* exit() in a child would write out buffers that it has from its parent */
}

/* ---- DNS ------------------------------------------------------------------- */

enum { DNS_A = 1, DNS_MX = 15, NO_DOMAIN = -1, NO_ANSWER = -2 };

struct dns_record {
    struct in_addr address;     /* of an A record */
    int preference;             /* of an MX record: the lowest comes first */
    char name[NAME_SIZE];       /* of an MX record: the exchanger */
};

static unsigned get(const unsigned char *octets)
{
    return octets[0] * 256u + octets[1];
}

/* Reads the name at `at` (RFC 1035 4.1.4), and returns the place behind it.  A name is a label and a
 * name, or a pointer to a name, or the label of length 0.  A pointer has to lead back, so that there
 * is an end. */
static size_t get_name(const unsigned char *answer, size_t at, char *name, size_t room)
{
    size_t length = answer[at], target = get(answer + at) & 0x3FFF;

    *name = '\0';
    if (length >= 0xC0 && target < at)
        get_name(answer, target, name, room);
    if (length >= 0xC0)
        return at + 2;
    if (length == 0 || length > 63 || length + 2 > room)
        return at + 1;
    memcpy(name, answer + at + 1, length);
    name[length] = '.';
    return get_name(answer, at + length + 1, name + length + 1, room - length - 1);
}

/* Writes a query (RFC 1035 4.1), but for its id.  Returns its size; 0: `name` is no name. */
static size_t put_query(unsigned char *query, const char *name, unsigned char type)
{
    size_t size = 12, length;

    memcpy(query, "\0\0\1\0\0\1\0\0\0\0\0", size);      /* recursion desired; one question */
    for (; *name != '\0'; name += length + (name[length] == '.')) {
        length = strcspn(name, ".");
        if (length == 0 || length > 63 || size + length > NAME_SIZE)
            return 0;
        query[size++] = (unsigned char)length;
        memcpy(query + size, name, length);
        size += length;
    }
    memcpy(query + size, (unsigned char[]){ 0, 0, type, 0, 1 }, 5);     /* class IN */
    return size + 5;
}

/* Reads the records of this type from `at` on, and returns how many there are.  A record is a name,
 * 10 octets (type, class, time to live, length of the data) and the data.  Behind the `size` octets
 * of the answer are zeros, so that a record that is cut off ends there. */
static int read_answer(const unsigned char *answer, size_t size, size_t at, unsigned type,
    struct dns_record *r)
{
    unsigned code = answer[3] & 0x0F, truncated = answer[2] & 0x02;
    int count = 0;

    if (code != 0 || truncated != 0)
        return code == 3 ? NO_DOMAIN : NO_ANSWER;
    for (unsigned left = get(answer + 6); left > 0 && at < size && count < RECORDS; left--) {
        size_t data = get_name(answer, at, r[count].name, NAME_SIZE) + 10;

        memcpy(&r[count].address, answer + data, 4);
        r[count].preference = (int)get(answer + data);
        if (type == DNS_MX)
            get_name(answer, data + 2, r[count].name, NAME_SIZE);
        at = data + get(answer + data - 2);
        if (get(answer + data - 10) == type)
            count++;
    }
    return count;
}

/* Asks over UDP, where anybody may answer.  A forger has to guess our id, which is random, and
 * our port; the question has to be ours; a connected socket hears the name server only. */
static int dns_ask(const char *name, unsigned char type, struct dns_record *records)
{
    const struct timeval patience = { 3, 0 };
    unsigned char query[12 + NAME_SIZE + 4], answer[1024];
    size_t size = put_query(query, name, type);
    ssize_t n;

    for (int i = 0; i < 2 && size > 0; i++) {
        int fd = socket(AF_INET, SOCK_DGRAM, 0), random = open("/dev/urandom", O_RDONLY);

        if (read(random, query, 2) != 2)
            die("/dev/urandom");
        close(random);
        connect(fd, (struct sockaddr *)&nameserver, sizeof nameserver);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        send(fd, query, size, 0);
        while ((n = recv(fd, answer, 512, 0)) >= 0) {
            memset(answer + n, 0, sizeof answer - (size_t)n);
            if ((size_t)n >= size && memcmp(answer, query, 2) == 0 && (answer[2] & 0x80) != 0
                && memcmp(answer + 12, query + 12, size - 12) == 0) {
                close(fd);
                return read_answer(answer, (size_t)n, size, type, records);
            }
        }
        close(fd);
    }
    return size > 0 ? NO_ANSWER : NO_DOMAIN;
}

/* ---- Forwarding ------------------------------------------------------------ */

enum outcome { LATER, SENT, FAILED };

static char words[LINE_SIZE];   /* the last reply of an exchanger, or what went wrong instead */
static char *message, *body;    /* what this process forwards: MAIL, RCPT and DATA; all behind them */

/* Returns the size of the first line, or 0 if its end has not come yet.  A line ends at CR LF
 * and nowhere else: RFC 5321 2.3.8. */
static size_t next_line(const char *bytes, size_t size)
{
    for (size_t i = 1; i < size; i++)
        if (bytes[i - 1] == '\r' && bytes[i] == '\n')
            return i + 1;
    return 0;
}

/* Sends `size` octets of `text`, reads the reply, and judges it by its first digit: RFC 5321 4.2.1.
 * All lines of a reply but the last are `250-words`.  A line that is cut off or too long is no reply. */
static enum outcome say(FILE *x, char wanted, const char *text, size_t size)
{
    strcpy(words, "connection lost");
    for (ssize_t n; size > 0; text += n, size -= (size_t)n)
        if ((n = write(fileno(x), text, size)) <= 0)
            return LATER;       /* after REPLY_SECONDS without progress, too */
    do {
        if (fgets(words, sizeof words, x) == NULL || strchr(words, '\n') == NULL)
            return LATER;
    } while (words[3] == '-');
    words[strcspn(words, "\r\n")] = '\0';
    return words[0] == wanted ? SENT : words[0] == '5' ? FAILED : LATER;
}

/* One transaction, for one recipient: `rcpt` is its line of the message. */
static enum outcome transact(FILE *x, const char *rcpt)
{
    char helo[NAME_SIZE + 8];
    const char *lines[] = { helo, message, rcpt, "DATA\r\n" };
    enum outcome outcome = SENT;

    snprintf(helo, sizeof helo, "HELO %s\r\n", hostname);
    for (int i = 0; i < 4 && outcome == SENT; i++)
        outcome = say(x, i < 3 ? '2' : '3', lines[i], next_line(lines[i], LINE_SIZE));
    if (outcome == SENT)
        outcome = say(x, '2', body, strlen(body));
    dprintf(fileno(x), "QUIT\r\n");     /* its reply changes nothing any more */
    return outcome;
}

/* Begins to connect to an exchanger; does not wait. */
static int start_connecting(struct in_addr address)
{
    const struct timeval patience = { REPLY_SECONDS, 0 };
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    exchanger.sin_addr = address;
    connect(fd, (struct sockaddr *)&exchanger, sizeof exchanger);
    return fd;
}

/* Connects to all exchangers of one preference at once.  Returns the connection to the first that
 * greets, or NULL. */
static FILE *race(const struct dns_record *mx, int count, int preference)
{
    static struct dns_record found[2 * RECORDS];
    FILE *winner = NULL;
    fd_set racing;
    int racers = 0;

    FD_ZERO(&racing);
    for (int i = 0; i < count && racers < RECORDS; i++)
        if (mx[i].preference == preference) {
            int more = dns_ask(mx[i].name, DNS_A, found + racers);

            racers += more > 0 ? more : 0;
        }
    for (int i = 0; i < racers; i++) {
        int fd = start_connecting(found[i].address);

        FD_SET(fd, &racing);                    /* a macro, which may evaluate its arguments twice */
    }
    while (winner == NULL && racers > 0) {
        struct timeval patience = { RACE_SECONDS, 0 };
        fd_set readable = racing;

        if (select(FD_SETSIZE, &readable, NULL, NULL, &patience) <= 0)
            break;
        for (int fd = 0; fd < FD_SETSIZE && winner == NULL; fd++)
            if (FD_ISSET(fd, &readable)) {      /* the exchanger has greeted, or cannot be reached */
                FD_CLR(fd, &racing);
                racers--;
                fcntl(fd, F_SETFL, 0);          /* from here on, calls may wait */
                winner = fdopen(fd, "r");
                if (winner != NULL && say(winner, '2', "", 0) != SENT) {
                    fclose(winner);
                    winner = NULL;
                }
            }
    }
    for (int fd = 0; fd < FD_SETSIZE; fd++)
        if (FD_ISSET(fd, &racing))
            close(fd);
    return winner;
}

/* Returns the lowest preference that is at least `least`; -1: there is none. */
static int next_preference(const struct dns_record *mx, int count, int least)
{
    int lowest = -1;

    for (int i = 0; i < count; i++)
        if (mx[i].preference >= least && (lowest < 0 || mx[i].preference < lowest))
            lowest = mx[i].preference;
    return lowest;
}

/* Tries the exchangers of a recipient's domain, those of the lowest preference first. */
static enum outcome deliver(const char *rcpt)
{
    static struct dns_record mx[RECORDS];
    enum outcome outcome = LATER;
    char domain[NAME_SIZE] = "";
    int count, preference;
    FILE *x;

    sscanf(rcpt, "%*[^@]@%255[^>]", domain);
    count = dns_ask(domain, DNS_MX, mx);
    if (count == 0) {           /* without MX records the domain is a host itself: RFC 5321 5.1 */
        strcpy(mx[0].name, domain);
        mx[0].preference = 0;
        count = 1;
    }
    strcpy(words, count == NO_DOMAIN ? "there is no such domain" : "no exchanger can be found");
    preference = next_preference(mx, count, 0);
    while (preference >= 0 && outcome == LATER) {
        if ((x = race(mx, count, preference)) != NULL) {
            outcome = transact(x, rcpt);
            fclose(x);
        }
        preference = next_preference(mx, count, preference + 1);
    }
    return count == NO_DOMAIN ? FAILED : outcome;
}

/* Tries a message of the queue, and notes in its file what became of each recipient.  The lock
 * keeps other processes from trying it, too; it ends when this process does. */
static void forward(const char *id)
{
    static const char *const notes[] = { "RCPT", "SENT", "FAIL" };
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    int fd = open(id, O_RDWR);
    bool owed = false, refused = false;     /* is any recipient waiting; was any refused */
    enum outcome outcome;
    struct stat st;
    char failed[80];

    if (fd < 0 || fcntl(fd, F_SETLK, &lock) != 0 || fstat(fd, &st) != 0)
        return;
    message = calloc(1, (size_t)st.st_size + 1);
    if (message == NULL || read(fd, message, (size_t)st.st_size) != st.st_size
        || (body = strstr(message, "\r\nDATA\r\n")) == NULL) {
        fprintf(stderr, "%s: cannot be read into memory; it stays in the queue\n", id);
        return;
    }
    body += strlen("\r\nDATA\r\n");
    alarm(TRY_SECONDS);
    for (char *line = message; line < body; line += next_line(line, LINE_SIZE)) {
        if (line[0] == 'R') {
            outcome = deliver(line);
            memcpy(line, notes[outcome], 4);
            if (pwrite(fd, line, 4, line - message) != 4 || fsync(fd) != 0)
                die(id);
            fprintf(stderr, "%s %.*s (%s)\n", id, (int)strcspn(line, "\r"), line, words);
        }
        owed = owed || line[0] == 'R';
        refused = refused || line[0] == 'F';
    }
    snprintf(failed, sizeof failed, "../failed/%s", id);
    if (!owed && refused)
        rename(id, failed);     /* a person has to look at it */
    else if (!owed)
        unlink(id);
}

/* ---- Sessions -------------------------------------------------------------- */

/* What is true in each phase. */
enum phase {
    CONNECTED,      /* 220 is sent; no HELO yet */
    READY,          /* HELO is given; no transaction */
    MAILED,         /* the reverse-path is in the draft */
    ADDRESSED,      /* at least one recipient is, too */
    DATA,           /* 354 is sent; lines go to the draft */
    GONE,           /* the last reply is sent: run() closes the session */
    SAME            /* no phase: in commands[], "stays in the same phase" */
};

static struct session {
    int fd;                 /* the connection to the client */
    unsigned port;          /* of the client */
    enum phase phase;
    FILE *draft;            /* the message that is being received, or NULL */
    char path[64], *id;     /* the draft's file: tmp/ and its id, which is its name in queue/, too */
    bool spoiled;           /* it holds a bare CR, a bare LF or a NUL */
    char in[LINE_SIZE];     /* received, not yet consumed */
    size_t size;
} sessions[FD_SETSIZE];     /* by descriptor */
static fd_set watched;      /* all clients; and the listener, while there is room for one more */
static int listener, clients, queue_dir, children;
static volatile sig_atomic_t got_alarm = 1;     /* it is time for run_queue(), as it is at the start */
static sigset_t open_mask;  /* the signals that are blocked inside pselect(): none of ours */

/* Sends a reply.  A client that leaves no room for it has stopped reading, and is given up. */
static void reply(struct session *s, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    if (vdprintf(s->fd, format, arguments) < 0)
        s->phase = GONE;
    va_end(arguments);
}

/* Forwards a message in a child, unless there are too many: run_queue() will find it. */
static void start_forwarder(const char *id)
{
    pid_t pid = children < FORWARDERS ? fork() : -1;

    if (pid == 0) {
        for (int fd = 3; fd < FD_SETSIZE; fd++)
            close(fd);      /* a connection ends for the client when its last copy is closed */
        signal(SIGALRM, SIG_DFL);
        sigprocmask(SIG_SETMASK, &open_mask, NULL);
        if (chdir("queue") == 0)
            forward(id);
        _exit(0);
    }
    if (pid > 0)
        children++;
}

/* Tries what is in the queue, once a minute, from where the last run had to stop. */
static void run_queue(void)
{
    static DIR *queue;
    struct dirent *entry;

    got_alarm = 0;
    alarm(QUEUE_SECONDS);
    if (queue == NULL)
        queue = opendir("queue");
    while (children < FORWARDERS && (entry = readdir(queue)) != NULL)
        if (entry->d_name[0] != '.')
            start_forwarder(entry->d_name);
    if (children < FORWARDERS)
        rewinddir(queue);
}

/* Begins a draft, with a name that no other message has had. */
static bool draft_open(struct session *s)
{
    static unsigned count;

    snprintf(s->path, sizeof s->path, "tmp/%ld-%ld-%u", (long)time(NULL), (long)getpid(), ++count);
    s->id = s->path + strlen("tmp/");
    s->draft = fopen(s->path, "w");
    return s->draft != NULL;
}

static void draft_drop(struct session *s)
{
    if (s->draft != NULL) {
        fclose(s->draft);
        unlink(s->path);        /* fails if the draft was stored: the file has its new name */
    }
    s->draft = NULL;
    s->spoiled = false;
}

/* Moves a draft into the queue.  Once this has returned true, the message survives a crash, and the
 * server may take responsibility for it. */
static bool draft_store(struct session *s)
{
    return !ferror(s->draft) && fflush(s->draft) == 0 && fsync(fileno(s->draft)) == 0
        && renameat(AT_FDCWD, s->path, queue_dir, s->id) == 0
        && fsync(queue_dir) == 0;
}

/* The commands: what a line begins with; the first and the last phase in which it may come;
 * the phase that follows; the reply.  A path follows a colon. */
static const struct command {
    const char *verb;
    enum phase first, last, next;
    const char *reply;
} commands[] = {
    { "HELO ",      CONNECTED, ADDRESSED, READY,     "250 %u OK\r\n" },
    { "EHLO ",      CONNECTED, ADDRESSED, READY,     "250 %u OK\r\n" },
    { "MAIL FROM:", READY,     READY,     MAILED,    "250 2.1.0 Ok\r\n" },
    { "RCPT TO:",   MAILED,    ADDRESSED, ADDRESSED, "250 2.1.5 Ok\r\n" },
    { "DATA",       ADDRESSED, ADDRESSED, DATA,      "354 End data with <CR><LF>.<CR><LF>\r\n" },
    { "RSET",       READY,     ADDRESSED, READY,     "250 2.0.0 Ok\r\n" },
    { "NOOP",       CONNECTED, ADDRESSED, SAME,      "250 2.0.0 Ok\r\n" },
    { "QUIT",       CONNECTED, ADDRESSED, GONE,      "221 2.0.0 OK\r\n" },
    { "",           CONNECTED, ADDRESSED, SAME,      "500 5.5.2 Error: command not recognized\r\n" }
};

/* Is `text` <local-part@domain>, or <> where `null` allows it?  A part of RFC 5321 4.1.2: no quotes,
 * no address literals.  sscanf() sets `end` only if all before %n fits. */
static bool is_path(const char *text, bool null)
{
    int end = 0;

    if (strcmp(text, "<>") == 0)
        return null;
    sscanf(text, "<%*[^@<> ]@%*[^@<> ]>%n", &end);
    return end > 0 && text[end] == '\0';
}

/* Ends the envelope, and begins the message with the line that every relay has to put there: RFC 5321 4.4. */
static void begin_message(struct session *s)
{
    time_t now = time(NULL);
    char date[64];

    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S +0000", gmtime(&now));
    fprintf(s->draft, "DATA\r\nReceived: from [127.0.0.1] (port %u)\r\n\tby %s with SMTP id %s;\r\n\t%s\r\n",
        s->port, hostname, s->id, date);
}

static void take_command(struct session *s, const char *line)
{
    const struct command *c = commands;
    const char *path;

    while (strncasecmp(line, c->verb, strlen(c->verb)) != 0)        /* the last row fits every line */
        c++;
    path = line + strlen(c->verb);
    if (s->phase < c->first || s->phase > c->last) {
        reply(s, "503 5.5.1 Error: bad sequence of commands\r\n");
    } else if (strchr(c->verb, ':') != NULL && !is_path(path, c->next == MAILED)) {
        reply(s, "501 5.5.4 Syntax: %s<address>\r\n", c->verb);
    } else if (c->next == MAILED && !draft_open(s)) {
        reply(s, "451 4.3.0 Error: message not stored, try again later\r\n");
    } else {
        if (c->next == READY)
            draft_drop(s);
        if (c->next == MAILED || c->next == ADDRESSED)
            fprintf(s->draft, "%s%s\r\n", c->verb, path);
        if (c->next == DATA)
            begin_message(s);
        if (c->next != SAME)
            s->phase = c->next;
        reply(s, c->reply, s->port);
    }
}

/* Takes a line of the message.  The draft keeps it as it will be sent again: as it has come,
 * with its first dot doubled (RFC 5321 4.5.2). */
static void take_message(struct session *s, size_t size)
{
    fwrite(s->in, 1, size, s->draft);
    if (strcspn(s->in, "\r\n") != size - 2)
        s->spoiled = true;          /* strcspn() met a CR, LF or NUL before the line's end */
    if (size != 3 || s->in[0] != '.')
        return;
    s->phase = READY;               /* this line is the dot: the message is complete */
    if (s->spoiled) {
        reply(s, "550 5.5.2 Error: bare CR, bare LF or NUL in the message\r\n");
    } else if (!draft_store(s)) {
        reply(s, "451 4.3.0 Error: message not stored, try again later\r\n");
    } else {
        reply(s, "250 2.0.0 Ok: queued as %s\r\n", s->id);
        start_forwarder(s->id);
    }
    draft_drop(s);
}

/* Takes all whole lines.  What is left is the beginning of the next line. */
static void converse(struct session *s)
{
    size_t size;

    while (s->phase != GONE && (size = next_line(s->in, s->size)) > 0) {
        if (s->phase == DATA) {
            take_message(s, size);
        } else {
            s->in[strcspn(s->in, "\r\n")] = '\0';
            take_command(s, s->in);
        }
        s->size -= size;
        memmove(s->in, s->in + size, s->size);
    }
    if (s->phase != GONE && s->size == LINE_SIZE) {
        reply(s, "500 5.5.2 Error: line too long\r\n");
        s->phase = GONE;
    }
}

/* Reads what has come from a client: it may be any part of a line. */
static void hear(struct session *s)
{
    ssize_t n = read(s->fd, s->in + s->size, LINE_SIZE - s->size);

    if (n <= 0)
        s->phase = GONE;    /* the client has closed its side, or is lost */
    else
        s->size += (size_t)n;
    converse(s);
}

/* Accepts a client.  This may fail although the listener was readable: the client may have left,
 * or no descriptor is free.  Then the listener waits until run() has closed a session. */
static void welcome(void)
{
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    int fd = accept(listener, (struct sockaddr *)&peer, &size);

    if (fd < 0) {
        if (errno == EMFILE && clients > 0)
            FD_CLR(listener, &watched);
        return;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    FD_SET(fd, &watched);
    if (++clients == CLIENTS)
        FD_CLR(listener, &watched);     /* the others wait in the kernel's queue */
    sessions[fd] = (struct session){ .fd = fd, .port = ntohs(peer.sin_port) };
    reply(&sessions[fd], "220 %s ESMTP\r\n", hostname);
}

static void run(void)
{
    for (;;) {
        fd_set readable = watched;      /* a copy, because pselect() changes it */

        while (waitpid(-1, NULL, WNOHANG) > 0)
            children--;
        if (got_alarm)
            run_queue();
        if (pselect(FD_SETSIZE, &readable, NULL, NULL, NULL, &open_mask) < 0)
            continue;                   /* a signal has come, as it can only inside pselect() */
        for (int fd = 0; fd < FD_SETSIZE; fd++) {
            if (!FD_ISSET(fd, &readable))
                continue;
            if (fd == listener)
                welcome();
            else
                hear(&sessions[fd]);
            if (sessions[fd].phase == GONE) {
                draft_drop(&sessions[fd]);
                close(fd);
                FD_CLR(fd, &watched);
                FD_SET(listener, &watched);
                clients--;
            }
        }
    }
}

static void on_signal(int number)
{
    got_alarm = got_alarm || number == SIGALRM;     /* SIGCHLD only has to end the wait */
}

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
    struct sockaddr_in a = address_of("127.0.0.1", port);       /* this machine only */
    int on = 1;

    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);     /* or a restart has to wait */
    if (bind(listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener, SOMAXCONN) != 0)
        die("cannot listen");
    fcntl(listener, F_SETFL, O_NONBLOCK);
    FD_SET(listener, &watched);
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
    queue_dir = open("queue", O_RDONLY);
    if (queue_dir < 0)
        die("queue");
}

/* Blocks SIGCHLD and SIGALRM everywhere but in pselect(): see "The lost wake-up" in chapter 5. */
static void catch_signals(void)
{
    struct sigaction action = { .sa_handler = on_signal };

    sigprocmask(SIG_BLOCK, NULL, &open_mask);
    sigaddset(&action.sa_mask, SIGCHLD);
    sigaddset(&action.sa_mask, SIGALRM);
    sigprocmask(SIG_BLOCK, &action.sa_mask, NULL);
    sigaction(SIGCHLD, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);       /* write() fails with EPIPE instead */
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: %s port spool nameserver nameserver-port exchanger-port\n", argv[0]);
        return 2;
    }
    gethostname(hostname, sizeof hostname - 1);
    nameserver = address_of(argv[3], argv[4]);
    exchanger = address_of("0.0.0.0", argv[5]);
    enter_spool(argv[2]);
    catch_signals();
    listen_on(argv[1]);
    run();
}
