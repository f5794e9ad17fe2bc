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
#include <sys/wait.h>
#include <unistd.h>

enum { FILE_FD = 100, EXCHANGER_FD = 101, NOON = 1767268800 };     /* 2026-01-01T12:00:00Z */

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

static ssize_t memory_read(int fd, void *bytes, size_t size)
{
    assert(fd == EXCHANGER_FD);
    return exchanger_says(bytes, size);
}

static ssize_t memory_write(int fd, const void *bytes, size_t size)
{
    assert(fd == EXCHANGER_FD || (fd == FILE_FD && file.open));
    return fd == EXCHANGER_FD ? exchanger_hears(bytes, size) : file_write(bytes, size);
}

static int memory_close(int fd)
{
    assert(fd == EXCHANGER_FD || (fd == FILE_FD && file.open));
    if (fd == EXCHANGER_FD)
        exchanger_is_left();
    else
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
    assert(fd == EXCHANGER_FD && deadline >= 0);
    return true;
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
