/*
 * memory.h - forward.c over one file in memory, which stands for a message in
 * queue/, and one exchanger, which stands for any.
 *
 * A real file system would be slower by a thousand, and a real fsync() by more.
 * So the calls that touch the file or the exchanger's socket become the functions
 * below, after the system's headers have had their say.  All else is forward.c
 * as it is, reading, writing and marking as done as it always does.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILE_FD = 100, EXCHANGER_FD, PLAIN_FD, NETWORK_FD, ERRORS_FD, LISTENER_FD, THEIRS_FD, OPENSSL_PID = 4711 };
enum { NOON = 1767268800 };     /* 2026-01-01T12:00:00Z */

#define MESSAGE_ID "20260101T110000.000001-54321-1f3a"

static struct {
    char *bytes;
    size_t size;
    size_t limit;       /* the disk is full there */
    bool open, removed;
} file;

static void file_set(const void *bytes, size_t size)
{
    free(file.bytes);
    file.bytes = malloc(size + (size == 0));
    assert(file.bytes != NULL);
    if (size > 0)
        memcpy(file.bytes, bytes, size);
    file.size = size;
    file.limit = SIZE_MAX;
    file.open = true;
    file.removed = false;
}

UNGUIDED static ssize_t memory_pread(int fd, void *bytes, size_t size, off_t at)
{
    assert(fd == FILE_FD && file.open);
    if (at < 0) {       /* the octet before the first of an empty file */
        errno = EINVAL;
        return -1;
    }
    if ((size_t)at >= file.size)
        return 0;
    if (size > file.size - (size_t)at)
        size = file.size - (size_t)at;
    memcpy(bytes, file.bytes + at, size);
    return (ssize_t)size;
}

static int memory_fstat(int fd, struct stat *st)
{
    assert(fd == FILE_FD && file.open);
    memset(st, 0, sizeof *st);
    st->st_mode = S_IFREG | 0600;
    st->st_size = (off_t)file.size;
    return 0;
}

/* Appends, as O_APPEND does: the whole of it, or what still fits. */
UNGUIDED static ssize_t file_write(const void *bytes, size_t size)
{
    size_t room = file.limit > file.size ? file.limit - file.size : 0;

    if (size > room)
        size = room;
    if (size == 0) {
        errno = ENOSPC;
        return -1;
    }
    file.bytes = realloc(file.bytes, file.size + size);
    assert(file.bytes != NULL);
    memcpy(file.bytes + file.size, bytes, size);
    file.size += size;
    return (ssize_t)size;
}

static int memory_unlink(const char *path)
{
    if (strncmp(path, "tmp/", 4) == 0)      /* openssl's socket */
        return 0;
    assert(strcmp(path, "queue/" MESSAGE_ID) == 0);
    if (file.removed) {
        errno = ENOENT;
        return -1;
    }
    file.removed = true;
    return 0;
}

/* What has no effect here: fsync(), futimens(). */
static int memory_nothing(int fd)
{
    assert(fd == FILE_FD && file.open);
    return 0;
}

/* The exchanger is played by a target that has one: what it says, what it is
 * told, and how it is left. */
static ssize_t (*exchanger_says)(void *bytes, size_t size);
static ssize_t (*exchanger_hears)(const void *bytes, size_t size);
static void (*exchanger_is_left)(void);

/*
 * openssl is played, too: it does nothing to what it is given, and has something to say
 * for itself.  While it runs, the exchanger is at its standard input and output, and
 * there is nothing to copy.
 */
static bool encrypted;
static bool copying;        /* what is read of the exchanger next would be for openssl */
static const char *openssl_says = "";

static int memory_pair(int fds[2], int ours)
{
    fds[0] = ours;
    fds[1] = THEIRS_FD;
    return 0;
}

static pid_t memory_fork(void)
{
    encrypted = true;
    return OPENSSL_PID;
}

static int memory_kill(pid_t pid)
{
    assert(pid == OPENSSL_PID && encrypted);
    encrypted = false;
    return 0;
}

static ssize_t memory_read(int fd, void *bytes, size_t size)
{
    if (fd == ERRORS_FD) {
        size_t length = strlen(openssl_says);

        length = length < size ? length : size;
        memcpy(bytes, openssl_says, length);
        return (ssize_t)length;
    }
    if (fd == NETWORK_FD || (fd == EXCHANGER_FD && copying)) {
        copying = fd == NETWORK_FD;
        errno = EAGAIN;
        return -1;
    }
    assert(fd == EXCHANGER_FD || fd == PLAIN_FD);
    return exchanger_says(bytes, size);
}

static ssize_t memory_write(int fd, const void *bytes, size_t size)
{
    assert(fd == EXCHANGER_FD || fd == PLAIN_FD || (fd == FILE_FD && file.open));
    copying = false;
    return fd == FILE_FD ? file_write(bytes, size) : exchanger_hears(bytes, size);
}

static int memory_close(int fd)
{
    assert(fd >= FILE_FD && fd <= THEIRS_FD && (fd != FILE_FD || file.open));
    if (fd == EXCHANGER_FD)
        exchanger_is_left();
    else if (fd == FILE_FD)
        file.open = false;
    return 0;
}

static int memory_signals(int how, const sigset_t *set)
{
    (void)how;
    (void)set;
    return 0;
}

/* Waits for nothing: it is always noon, and everybody is ready. */
static time_t memory_clock(void)
{
    return NOON;
}

static int64_t memory_clock_ms(void)
{
    return 0;
}

static bool memory_wait(int fd, bool writing, int64_t deadline)
{
    (void)writing;
    assert((fd == EXCHANGER_FD || fd == PLAIN_FD) && deadline >= 0);
    return true;
}

static void memory_wait_sets(int64_t deadline)
{
    assert(deadline >= 0);
    copying = true;
}

/* The log goes nowhere, but is composed, so that all that is named in it is read. */
static void memory_log(const char *format, ...)
{
    char line[2048];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
}

#define pread(fd, bytes, size, at) memory_pread(fd, bytes, size, at)
#define fstat(fd, st) memory_fstat(fd, st)
#define unlink(path) memory_unlink(path)
#define fsync(fd) memory_nothing(fd)
#define futimens(fd, times) memory_nothing(((void)(times), fd))
#define read(fd, bytes, size) memory_read(fd, bytes, size)
#define write(fd, bytes, size) memory_write(fd, bytes, size)
#define close(fd) memory_close(fd)
#define sigprocmask(how, set, old) memory_signals(how, set)
#define wall_clock() memory_clock()
#define clock_ms() memory_clock_ms()
#define wait_ready(fd, writing, deadline) memory_wait(fd, writing, deadline)
#define wait_sets(top, readable, writable, deadline) memory_wait_sets(((void)(top), (void)(readable), deadline))
#define socket(family, type, protocol) LISTENER_FD
#define bind(fd, address, size) 0
#define listen(fd, length) 0
#define accept(fd, address, size) NETWORK_FD
#define socketpair(family, type, protocol, fds) memory_pair(fds, PLAIN_FD)
#define pipe(fds) memory_pair(fds, ERRORS_FD)
#define fork() memory_fork()
#define kill(pid, number) memory_kill(pid)
#define waitpid(pid, status, options) ((void)(status), pid)
#define shutdown(fd, how) ((void)(fd))
#define logmsg memory_log

#include "../../forward.c"

/* Whether a file holds only what this server writes, or a crash leaves of it: above its
 * body printable lines, in the body any octets but a bare CR or LF, with dots doubled,
 * and below it printable lines, whole or torn. */
UNGUIDED static bool is_tame(const struct message *m)
{
    const char *body = file.bytes + m->body, *end = file.bytes + m->end;

    if (!is_crlf_lines(file.bytes, (size_t)m->end + 3))
        return false;
    for (const char *p = file.bytes; p < file.bytes + file.size; p++)
        if ((p < body || p >= end) && (*p < ' ' || *p > '~') && *p != '\r' && *p != '\n')
            return false;
    for (const char *p = body; p < end; p++)
        if (p[-1] == '\n' && p[0] == '.' && p[1] != '.')
            return false;
    return true;
}

#endif
