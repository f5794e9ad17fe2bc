/*
 * readback.c - what the server has stored, as the forwarder reads it.
 *
 * For the session target, which has smtp.c in it: this has forward.c.
 */
#include "memory.h"
#include "readback.h"

/* The paths of an envelope are what stands between < and the last > of a line,
 * for nobody lets a line end into them. */
void read_back(const char *bytes, size_t size)
{
    const char *line = strchr(bytes, '\n') + 1;     /* behind HELO */
    struct message m;
    bool readable;

    file_set(bytes, size);
    readable = message_read(&m, FILE_FD, MESSAGE_ID);
    assert(readable && is_tame(&m));
    assert((size_t)m.end + 3 == size && !m.tried);
    for (; strncmp(line, "DATA\r", 5) != 0; line = strchr(line, '\n') + 1) {
        char path[PATH_LIMIT + 32];

        snprintf(path, sizeof path, "%.*s", (int)strcspn(line, "\r"), line);
        *strrchr(path, '>') = '\0';
        if (path[0] == 'M')
            assert(strcmp(m.reverse_path, path + strlen("MAIL FROM:<")) == 0);
        else
            assert(path[0] == 'R' && find_recipient(&m, path + strlen("RCPT TO:<")) != NULL);
    }
    assert(bytes + m.body == strchr(line, '\n') + 1);
    for (size_t i = 0; i < m.count; i++)
        assert(m.recipients[i].outcome == LATER && m.recipients[i].said == NULL);
    message_free(&m);
}
