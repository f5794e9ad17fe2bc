/*
 * spool.c - the target for the spool reader: the input is a file in queue/.
 *
 * Whatever lies there must not break who reads it.  And where it is a message,
 * what this server appends to it reads back as it was meant, wherever a crash
 * or a full disk cuts it off, and the report on it is a message in its turn.
 */
#include "memory.h"

/* What is true of any file that was taken for a message. */
static void check_message(struct message *m)
{
    const char *end = file.bytes + m->end;

    assert(m->fd == FILE_FD && m->count > 0 && m->age >= 0);
    assert(m->body > 0 && m->body <= m->end && (size_t)m->end + 3 <= file.size);
    assert(memcmp(end - 2, "\r\n.\r\n", 5) == 0);
    assert(find_text(end, file.size - (size_t)m->end, "\r\n.\r\n", 5) == NULL);       /* it is the last one */
    assert(strlen(m->reverse_path) < PATH_LIMIT);
    for (size_t i = 0; i < m->count; i++) {
        const struct recipient *r = &m->recipients[i];

        assert(strlen(r->address) < PATH_LIMIT && strchr(r->address, '@') != NULL);
        assert(find_recipient(m, r->address) == r);     /* nobody is there twice */
        assert(r->outcome == LATER || r->said != NULL);
        assert(!r->unrecorded);
    }
}

/* What survey() counts, counted in another way. */
static void check_survey(struct message *m)
{
    unsigned long long size = 0;
    bool eight_bit = false;

    survey(m);
    for (const char *p = file.bytes + m->body; p < file.bytes + m->end; p++) {
        size += *p != '.' || p[-1] != '\n';
        eight_bit = eight_bit || (unsigned char)*p >= 0x80;
    }
    assert(m->size == size && m->eight_bit == eight_bit);
}

/* The commands that an exchanger would be told. */
static void check_envelope(const struct message *m)
{
    static struct exchange x;
    struct group to = { .count = 0 };
    size_t lines = 0, length;
    char *text;

    x.sized = chance(2) > 0;
    x.eight_bit = chance(2) > 0;
    for (size_t i = 0; i < m->count && i < GROUP_LIMIT; i++)
        add_to_group(&to, &m->recipients[i]);
    text = compose_envelope(&x, m, &to);
    assert(is_crlf_lines(text, strlen(text)));
    for (const char *line = text; *line != '\0'; line += length, lines++) {
        length = strcspn(line, "\n") + 1;
        assert(length <= 512 && is_printable(line, length - 2));      /* RFC 5321 4.5.3.1.4 */
    }
    assert(lines == to.count + 2);
    free(text);
}

/* Reads the file again, as another process would. */
static void read_again(struct message *m)
{
    bool readable = message_read(m, FILE_FD, MESSAGE_ID);

    assert(readable);
    check_message(m);
}

static void forget(struct message *m)
{
    m->fd = -1;         /* the file stays open for the next who reads it */
    message_free(m);
}

/* The report on what failed is a message itself, from nobody to the sender. */
static void check_report(const struct message *m)
{
    static const char id[] = "20260101T120000.000002-0-1f3b";
    char *text = NULL, *original = malloc(file.size);
    size_t size, original_size = file.size, length;
    FILE *out = open_text(&text, &size);
    struct message report;

    assert(original != NULL);
    memcpy(original, file.bytes, file.size);
    write_report(out, m, id);
    fclose(out);
    assert(is_crlf_lines(text, size));
    for (const char *line = text; line < text + size; line += length) {
        length = strcspn(line, "\n") + 1;
        assert(length <= 1000);                                         /* RFC 5321 4.5.3.1.6 */
        for (size_t i = 0; i < length - 2; i++)
            assert(line[i] == '\t' || is_printable(line + i, 1));
        assert(line[0] != '.' || line[1] == '.' || line + length == text + size);
    }
    file_set(text, size);
    if (strchr(m->reverse_path, '@') != NULL) {     /* as all have that the dialogue took */
        read_again(&report);
        assert((size_t)report.end + 3 == size && report.reverse_path[0] == '\0' && report.count == 1);
        assert(strcmp(report.recipients[0].address, m->reverse_path) == 0);
        forget(&report);
    }
    free(text);
    file_set(original, original_size);
    free(original);
}

/* Whether a recipient reads as it was recorded. */
UNGUIDED static bool reads_as(const struct recipient *r, const struct recipient *recorded)
{
    if (r->outcome != recorded->outcome || r->said == NULL || recorded->said == NULL)
        return r->outcome == recorded->outcome && r->said == recorded->said;
    return strcmp(r->said, recorded->said) == 0;
}

/* Settles everybody who is still owed the message, or gives up on who has waited
 * too long, or leaves them waiting: as a try would. */
static void settle_somehow(struct message *m)
{
    static const char *const words[] = { "250 2.0.0 Ok", "550 5.1.1 <nobody@example.net> unknown", "4.4.1 no route",
        "451 later", "554", "5.4.6 a <b> c" };

    for (size_t i = 0; i < m->count; i++) {
        struct recipient *r = &m->recipients[i];
        enum outcome outcome = (enum outcome)chance(3);
        const char *relay = chance(2) > 0 ? "mx.example.net[192.0.2.1]" : "-";
        const char *said = words[chance(sizeof words / sizeof words[0])];

        if (r->outcome != LATER)
            continue;
        if (chance(4) > 0)
            settle(r, outcome, relay, said);
        expire(m, &r, 1);
    }
}

/* Records a try: all of it, or what the disk takes. */
static bool record(struct message *m)
{
    bool ok = write_outcomes(m, SENT) == RECORDED;      /* not one && of three: each of them is tried */

    ok = write_outcomes(m, FAILED) == RECORDED && ok;
    return write_outcomes(m, LATER) == RECORDED && ok;
}

/* What was recorded up to a cut: of each recipient the old outcome or the new. */
static void check_cut(const struct message *old, const struct message *m, size_t from)
{
    size_t size = file.size;
    struct message cut, after;

    file.size = from + chance(size - from + 1);
    if (chance(4) == 0 && size > from)
        file.size = size - 1;           /* between the last CR and its LF */
    read_again(&cut);
    assert(cut.count == m->count && cut.end == m->end);
    for (size_t i = 0; i < cut.count; i++)
        assert(reads_as(&cut.recipients[i], &old->recipients[i])
            || reads_as(&cut.recipients[i], &m->recipients[i]));
    settle_somehow(&cut);               /* and then another try goes on behind the torn line */
    if (record(&cut) && !file.removed) {
        read_again(&after);
        assert(is_tame(&after));
        for (size_t i = 0; i < after.count; i++)
            assert(reads_as(&after.recipients[i], &cut.recipients[i]));
        forget(&after);
    }
    forget(&cut);
}

/* One try of a message: reported, recorded, and read back. */
static void check_try(struct message *m)
{
    struct message old, again;
    size_t from;

    from = file.size;
    read_again(&old);
    settle_somehow(m);
    if (m->reverse_path[0] != '\0')
        check_report(m);
    if (chance(4) == 0)
        file.limit = from + chance(200);
    if (record(m) && !file.removed) {
        read_again(&again);
        assert(is_tame(&again));
        for (size_t i = 0; i < m->count; i++)
            assert(reads_as(&again.recipients[i], &m->recipients[i]));
        forget(&again);
    }
    file.limit = SIZE_MAX;
    if (!file.removed)
        check_cut(&old, m, from);
    forget(&old);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct message m;

    settings.hostname = "relay.example.org";
    settings.retry = 300;
    settings.expire = 5 * 24 * 3600;
    chance_seed(data, size);
    file_set(data, size);
    if (message_read(&m, FILE_FD, MESSAGE_ID)) {
        check_message(&m);
        check_survey(&m);
        assert(lane_of_message(&m) != 0 || m.recipients[0].outcome != LATER);
        if (is_tame(&m)) {
            check_envelope(&m);
            check_try(&m);
        }
    }
    assert(file.open);
    message_free(&m);
    assert(!file.open);
    return 0;
}
