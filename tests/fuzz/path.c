/*
 * path.c - the target for the path parser: the input is what stands behind
 * "MAIL FROM:" or "RCPT TO:".
 *
 * What it takes for a path is compared with the grammar of RFC 5321 4.1.2, written
 * down once more as a regular expression, and with the limits of 4.5.3.1.
 */
#include "fuzz.h"

#include <regex.h>

#define main smtp_main
#include "../../smtp.c"

#define ATOM "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
#define QUOTED "\"([] !#-[^-~]|\\\\[ -~])*\""
#define LOCAL "(" ATOM "(\\." ATOM ")*|" QUOTED ")"
#define LABEL "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
#define DOMAIN LABEL "(\\." LABEL ")*"
#define LITERAL "\\[[A-Za-z0-9.:]+\\]"
#define PATH "^<(@" DOMAIN "(,@" DOMAIN ")*:)?" LOCAL "@(" DOMAIN "|" LITERAL ")>"

/* Is it a domain within the limits?  Its characters are known to be right. */
static bool domain_fits(const char *domain, size_t size)
{
    size_t label = 0;

    for (size_t i = 0; i < size; i++) {
        label = domain[i] == '.' ? 0 : label + 1;
        if (label > 63)
            return false;
    }
    return size <= 255;
}

static bool literal_fits(const char *literal, size_t size)
{
    bool ipv6 = size > 7 && strncasecmp(literal, "[IPv6:", 6) == 0;
    size_t start = ipv6 ? 6 : 1;
    char text[64];
    unsigned char address[16];

    if (size - start - 1 >= sizeof text)
        return false;
    memcpy(text, literal + start, size - start - 1);
    text[size - start - 1] = '\0';
    return inet_pton(ipv6 ? AF_INET6 : AF_INET, text, address) == 1;
}

/* Where the mailbox begins behind a source route; NULL where one of its domains
 * is too long. */
static const char *skip_route(const char *p)
{
    bool more = *p == '@';

    while (more) {
        size_t size = strcspn(++p, ",:");

        if (!domain_fits(p, size))
            return NULL;
        p += size;
        more = *p++ == ',';
    }
    return p;
}

/* The path that `text` begins with: its length, 0 for none.  Leaves where its
 * mailbox begins. */
static size_t find_path(const char *text, const char **mailbox)
{
    static regex_t path;
    static bool compiled;
    regmatch_t match;
    const char *end, *domain;

    if (!compiled)
        compiled = regcomp(&path, PATH, REG_EXTENDED) == 0;
    assert(compiled);
    if (text[0] != '<' || regexec(&path, text, 1, &match, 0) != 0 || match.rm_eo > 256)
        return 0;
    *mailbox = skip_route(text + 1);
    if (*mailbox == NULL)
        return 0;
    end = text + match.rm_eo - 1;
    for (domain = end; domain[-1] != '@'; domain--)
        ;
    if (domain - 1 - *mailbox > 64 || !(*domain == '[' ? literal_fits : domain_fits)(domain, (size_t)(end - domain)))
        return 0;
    return (size_t)match.rm_eo;
}

/* A mailbox that was taken goes into the spool, the log and the dialogue with the
 * exchanger, and is read back from there. */
static void check_mailbox(const char *mailbox)
{
    char path[PATH_LIMIT + 3], again[PATH_LIMIT];
    size_t length = strlen(mailbox);
    const char *domain = strrchr(mailbox, '@'), *end;

    assert(length <= PATH_LIMIT - 2 && is_printable(mailbox, length));
    assert(domain != NULL && domain > mailbox && domain - mailbox <= LOCAL_LIMIT && strlen(domain + 1) <= DOMAIN_LIMIT);
    end = domain[1] == '[' ? skip_literal(domain + 1) : skip_domain(domain + 1);
    assert(end == mailbox + length);
    assert(skip_mailbox(mailbox) == mailbox + length);
    assert(strchr(domain, '>') == NULL && (mailbox[0] == '"' || strpbrk(mailbox, "<> ,") == NULL));
    snprintf(path, sizeof path, "<%s>", mailbox);
    assert(take_path(path, again) == path + length + 2 && strcmp(again, mailbox) == 0);
}

static void check_path(const char *text)
{
    char taken[PATH_LIMIT];
    const char *mailbox, *end = take_path(text, taken);
    size_t length = find_path(text, &mailbox);

    assert((end != NULL) == (length > 0));
    if (end == NULL)
        return;
    assert(end == text + length && end[-1] == '>');
    assert(strlen(taken) == (size_t)(end - 1 - mailbox) && memcmp(taken, mailbox, strlen(taken)) == 0);
    check_mailbox(taken);
}

/* No part of the grammar reads past the end of the text, or takes what is not
 * printable. */
static void check_parts(const char *text)
{
    const char *(*const parts[])(const char *) = { skip_domain, skip_literal, skip_local_part, skip_mailbox };

    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        const char *end = parts[i](text);

        assert(end == NULL || (end > text && end <= text + strlen(text) && is_printable(text, (size_t)(end - text))));
    }
}

/* Parameters that are taken are spaces, SIZE and BODY, and what BODY says counts. */
static void check_parameters(const char *text)
{
    bool eight_bit;
    const char *fault = read_mail_parameters(text, &eight_bit);

    if (fault != NULL) {
        assert(fault[0] == '5' && strlen(fault) > 10);
        return;
    }
    assert(is_printable(text, strlen(text)) && strlen(text) == strspn(text, " =0123456789SIZEBODYMTsizebodymt"));
    assert(!eight_bit || strpbrk(text, "Bb") != NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);      /* of its exact size, so that reading on is noticed */

    assert(text != NULL);
    if (size > 0)
        memcpy(text, data, size);
    text[size] = '\0';
    check_path(text);
    check_parts(text);
    check_parameters(text);
    free(text);
    return 0;
}
