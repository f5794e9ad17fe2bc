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

/* The grammar of RFC 5321 4.1.3, but for the number of groups beside a :: */
#define SNUM "(25[0-5]|2[0-4][0-9]|[01]?[0-9]?[0-9])"
#define IPV4 SNUM "\\." SNUM "\\." SNUM "\\." SNUM
#define HEX "[0-9A-Fa-f]{1,4}"
#define SIDE "(" HEX "(:" HEX ")*)?"
#define LITERAL4 "^\\[" IPV4 "]$"
#define LITERAL6 "^\\[[Ii][Pp][Vv]6:((" HEX ":){7}" HEX "|(" HEX ":){6}" IPV4 "|" \
    SIDE "::" SIDE "|" SIDE "::(" HEX ":)*" IPV4 ")]$"

static bool matches(const char *text, const char *expression)
{
    regex_t compiled;
    bool found;

    assert(regcomp(&compiled, expression, REG_EXTENDED | REG_NOSUB) == 0);
    found = regexec(&compiled, text, 0, NULL, 0) == 0;
    regfree(&compiled);
    return found;
}

/* The groups of an address with a ::, where an IPv4 address counts for two. */
static size_t count_groups(const char *address)
{
    size_t count = 0;

    while (*address != ']') {
        size_t digits = strspn(address, "0123456789ABCDEFabcdef");

        if (address[digits] == '.')
            return count + 2;
        count += digits > 0;
        address += digits + (address[digits] == ':');
    }
    return count;
}

/* What inet_pton() says an address is, once its decimal numbers have no zeros before them. */
static void check_value(const char *address, bool ipv6, const union address *a)
{
    unsigned char octets[16];
    char text[64];
    size_t used = 0, size;

    while (*address != ']') {
        const char *end = address + strspn(address, "0123456789ABCDEFabcdef");

        if (*end == '.' || address[-1] == '.')
            while (end - address > 1 && *address == '0')
                address++;
        do {
            assert(used < sizeof text - 1);
            text[used++] = *address++;
        } while (address < end);
        if (*address == '.' || *address == ':')
            text[used++] = *address++;
    }
    text[used] = '\0';
    assert(inet_pton(ipv6 ? AF_INET6 : AF_INET, text, octets) == 1);
    assert(memcmp(octets, address_octets(a, &size), ipv6 ? 16 : 4) == 0 && size == (ipv6 ? 16 : 4));
}

static bool literal_fits(const char *literal, size_t size)
{
    char text[PATH_LIMIT * 4];
    union address a;
    bool ipv6, fits;

    if (size >= sizeof text)
        return false;
    memcpy(text, literal, size);
    text[size] = '\0';
    ipv6 = matches(text, LITERAL6);
    fits = ipv6 ? strstr(text, "::") == NULL || count_groups(text + 6) <= 6 : matches(text, LITERAL4);
    if (fits) {
        assert(literal_parse(literal, 25, &a) == literal + size && address_port(&a) == 25);
        check_value(text + (ipv6 ? 6 : 1), ipv6, &a);
    }
    return fits;
}

/* Where the mailbox begins behind a source route; NULL where one of its domains
 * is too long. */
static const char *skip_hops(const char *p)
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

/* The path that `text` begins with: its length, whatever that is, 0 for none.  Leaves
 * where its mailbox begins. */
static size_t find_path(const char *text, const char **mailbox)
{
    static regex_t path;
    static bool compiled;
    regmatch_t match;
    const char *end, *domain;

    if (!compiled)
        compiled = regcomp(&path, PATH, REG_EXTENDED) == 0;
    assert(compiled);
    if (text[0] != '<' || regexec(&path, text, 1, &match, 0) != 0)
        return 0;
    *mailbox = skip_hops(text + 1);
    if (*mailbox == NULL)
        return 0;
    end = text + match.rm_eo - 1;
    for (domain = end; domain[-1] != '@'; domain--)
        ;
    if (!(*domain == '[' ? literal_fits : domain_fits)(domain, (size_t)(end - domain)))
        return 0;
    return (size_t)match.rm_eo;
}

/* A mailbox that was taken goes into the spool, the log and the dialogue with the
 * exchanger, and is read back from there. */
static void check_mailbox(const char *mailbox)
{
    char path[PATH_LIMIT + 3], again[PATH_LIMIT];
    size_t length = strlen(mailbox);
    const char *domain = strrchr(mailbox, '@'), *end, *fault = NULL;
    union address literal;

    assert(length <= PATH_LIMIT - 2 && is_printable(mailbox, length));
    assert(domain != NULL && domain > mailbox && strlen(domain + 1) <= DOMAIN_LIMIT);
    end = domain[1] == '[' ? literal_parse(domain + 1, 0, &literal) : skip_domain(domain + 1);
    assert(end == mailbox + length);
    assert(skip_mailbox(mailbox) == mailbox + length);
    assert(strchr(domain, '>') == NULL && (mailbox[0] == '"' || strpbrk(mailbox, "<> ,") == NULL));
    snprintf(path, sizeof path, "<%s>", mailbox);
    assert(take_path(path, again, &fault) == path + length + 2 && strcmp(again, mailbox) == 0);
}

static void check_path(const char *text)
{
    char taken[PATH_LIMIT];
    const char *mailbox, *fault = NULL, *end = take_path(text, taken, &fault);
    size_t length = find_path(text, &mailbox);

    assert((end != NULL) == (length > 0 && length <= PATH_LIMIT));
    assert((fault != NULL) == (length > PATH_LIMIT));
    if (end == NULL)
        return;
    assert(end == text + length && end[-1] == '>');
    assert(strlen(taken) == (size_t)(end - 1 - mailbox) && memcmp(taken, mailbox, strlen(taken)) == 0);
    check_mailbox(taken);
}

static const char *skip_literal(const char *text)
{
    union address a;

    return literal_parse(text, 0, &a);
}

/* No part of the grammar reads past the end of the text, or takes what is not
 * printable. */
static void check_parts(const char *text)
{
    const char *(*const parts[])(const char *) = { skip_domain, skip_literal, skip_route, skip_local_part, skip_mailbox };

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
