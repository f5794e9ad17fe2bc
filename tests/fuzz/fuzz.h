/*
 * fuzz.h - what the five targets share.
 *
 * Each target includes the .c file it is about, whose functions are static, and
 * calls them with whatever a fuzzer thinks of.  That nothing crashes the
 * sanitizers see to; the targets assert() what has to be true of the results.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "../../smtp.h"

#undef NDEBUG
#include <assert.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* For what a target does itself, octet by octet.  It has nothing to tell the fuzzer,
 * and telling it at every comparison would take most of the time.  Not for what
 * calls the code that is looked at, which may become a part of its caller. */
#ifdef __clang__
#define UNGUIDED __attribute__((no_sanitize("coverage"), noinline))
#else
#define UNGUIDED
#endif

/* What is left to chance (where a stream is cut, which write fails) follows from
 * the input alone: so an input does the same each time, and inputs stay plain
 * dialogues, packets and files, for anybody to read and write. */
static uint64_t chance_state;

UNGUIDED static inline void chance_seed(const uint8_t *data, size_t size)
{
    chance_state = UINT64_C(14695981039346656037);      /* FNV-1a */
    for (size_t i = 0; i < size; i++)
        chance_state = (chance_state ^ data[i]) * UINT64_C(1099511628211);
}

/* A number below `limit`: splitmix64. */
static inline size_t chance(size_t limit)
{
    uint64_t z = chance_state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (size_t)((z ^ z >> 31) % limit);
}

UNGUIDED static inline bool is_printable(const char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (bytes[i] < ' ' || bytes[i] > '~')
            return false;
    return true;
}

/* Is it lines, each ended by CRLF, without a CR or LF anywhere else? */
UNGUIDED static inline bool is_crlf_lines(const char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if ((bytes[i] == '\r' && (i + 1 == size || bytes[i + 1] != '\n'))
            || (bytes[i] == '\n' && (i == 0 || bytes[i - 1] != '\r')))
            return false;
    return size == 0 || bytes[size - 1] == '\n';
}

/* Where the octets of `text` first stand in `bytes`, or NULL. */
UNGUIDED static inline const char *find_text(const char *bytes, size_t size, const char *text, size_t length)
{
    const char *at = bytes;

    while (length <= size - (size_t)(at - bytes)
        && (at = memchr(at, text[0], size - (size_t)(at - bytes) - length + 1)) != NULL) {
        if (memcmp(at, text, length) == 0)
            return at;
        at++;
    }
    return NULL;
}

#endif
