/*
 * answer.c - the target for the DNS answer parser: the input is a packet.
 *
 * It is read as the answer to the question that it says it answers, so that a
 * change to the question does not make all that follows somebody else's.
 */
#include "fuzz.h"

#include "../../dns.c"

/* A name as text: labels of 1 to 63 printable characters, without spaces,
 * 253 octets in all.  The root is the empty text. */
static bool is_name(const char *name)
{
    size_t length = strlen(name);

    if (length > 253 || !is_printable(name, length) || strchr(name, ' ') != NULL)
        return false;
    while (*name != '\0') {
        length = strcspn(name, ".");
        if (length < 1 || length > 63 || strcmp(name + length, ".") == 0)
            return false;
        name += length + (name[length] == '.');
    }
    return true;
}

/* The question of a packet, read by other means than get_name(): plain labels
 * only.  False: the question is none that we would ask. */
static bool find_question(const uint8_t *data, size_t size, char name[DNS_NAME_SIZE], enum dns_type *type)
{
    size_t at = 12, used = 0;

    while (at < size && data[at] != 0) {
        size_t length = data[at++];

        if (length > 63 || at + length > size || used + length + 1 > 254)
            return false;
        for (; length > 0; length--, at++) {
            if (data[at] <= ' ' || data[at] > '~' || data[at] == '.')
                return false;
            name[used++] = (char)data[at];
        }
        name[used++] = '.';
    }
    if (at + 3 > size || used == 0)
        return false;
    name[used - 1] = '\0';
    *type = data[at + 2] == DNS_A || data[at + 2] == DNS_AAAA ? (enum dns_type)data[at + 2] : DNS_MX;
    return true;
}

/* What we ask reads as what we wanted to ask, and fits. */
static void check_query(const char *name, enum dns_type type)
{
    unsigned char bytes[QUERY_SIZE];
    char again[DNS_NAME_SIZE];
    size_t size = put_query(bytes, 4711, name, type, true);
    struct cursor c = { bytes, size, 12, false };

    assert(size > 12 && size <= sizeof bytes);
    get_name(&c, again);
    assert(!c.bad && strcmp(name, again) == 0);
    assert(get(&c, 2) == (unsigned long)type && get(&c, 2) == 1 && c.at + 11 == size);
}

static void check_records(const struct dns_query *q, const uint8_t *data, size_t size)
{
    size_t chosen = chance(DNS_RECORDS);    /* to look for all of them in the packet takes too long */

    assert(q->count <= DNS_RECORDS);
    for (size_t i = 0; i < q->count; i++) {
        const struct dns_record *r = &q->records[i];
        char text[ADDRESS_TEXT];
        size_t octets;
        const unsigned char *address = address_octets(&r->address, &octets);

        assert(is_name(r->name));
        if (q->type == DNS_MX) {
            assert(r->preference <= 65535 && (i == 0 || q->records[i - 1].preference <= r->preference));
            continue;
        }
        assert(r->name[0] == '\0' && address_port(&r->address) == 0);
        assert(r->address.sa.sa_family == (q->type == DNS_A ? AF_INET : AF_INET6));
        assert(i != chosen || find_text((const char *)data, size, (const char *)address, octets) != NULL);
        assert(strcmp(address_text(&r->address, text), "?") != 0);
    }
}

/* What must be true of a flight that was under way when the answer came. */
static void check_answer(const struct flight *f, enum verdict verdict, const uint8_t *data, size_t size)
{
    const struct dns_query *q = f->query;
    unsigned rcode = size < 4 ? 0 : data[3] & 0x0F;

    assert(is_name(f->name) && f->links <= CHAIN_LIMIT + 1);
    switch (verdict) {
    case FINISHED:
        assert((q->status == DNS_FOUND) == (q->count > 0));
        assert(q->status <= DNS_FAILED && (q->status != DNS_FAILED || q->why != NULL));
        assert(rcode == NOERROR || rcode == NXDOMAIN);
        assert(q->status != DNS_NODATA || rcode == NOERROR);
        assert(q->status != DNS_NXDOMAIN || rcode == NXDOMAIN);
        check_records(q, data, size);
        break;
    case RENAMED:
        assert(q->count == 0 && f->links > 0 && f->links <= CHAIN_LIMIT && rcode == NOERROR);
        check_query(f->name, q->type);
        break;
    case BROKEN:
        assert(q->count == 0 && q->why != NULL);
        break;
    case NO_EDNS:
        assert(f->edns && rcode != NOERROR && rcode != NXDOMAIN);
        /* fall through */
    default:
        assert(q->count == 0 && q->why == NULL && f->links == 0);
    }
}

static bool same_result(const struct flight *a, const struct flight *b)
{
    const struct dns_query *x = a->query, *y = b->query;

    return strcmp(a->name, b->name) == 0 && a->links == b->links && x->status == y->status && x->why == y->why
        && x->count == y->count && memcmp(x->records, y->records, x->count * sizeof x->records[0]) == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct dns_query query, shorter, blank;      /* large, and only their heads need to be made anew */
    struct flight start, f, g;
    enum verdict verdict, cut;
    unsigned char *head;
    size_t length;

    memset(&start, 0, sizeof start);
    query.status = shorter.status = DNS_NODATA;
    query.why = shorter.why = NULL;
    query.count = shorter.count = 0;
    if (!find_question(data, size, start.name, &query.type)) {
        strcpy(start.name, "example.org");
        query.type = DNS_MX;
    }
    shorter.type = query.type;
    chance_seed(data, size);
    start.edns = chance(4) > 0;
    start.id = size < 2 ? 0 : (unsigned)data[0] << 8 | data[1];
    check_query(start.name, query.type);

    f = start;
    f.query = &query;
    verdict = read_answer(&f, data, size);
    check_answer(&f, verdict, data, size);

    /* Cut off anywhere it says the same, or nothing: never something else, unless
     * a name of its, which a pointer may send through all of it, was cut as well. */
    g = start;
    g.query = &shorter;
    length = chance(size + 1);
    head = malloc(length + (length == 0));
    assert(head != NULL);
    memcpy(head, data, length);
    cut = read_answer(&g, head, length);
    free(head);
    check_answer(&g, cut, data, length);
    assert(cut == NOT_OURS || cut == BROKEN || g.spoiled || (cut == verdict && same_result(&f, &g)));

    /* With another id it is not read at all. */
    g = start;
    g.query = &blank;
    g.id ^= 1u << chance(16);
    assert(read_answer(&g, data, size) == NOT_OURS);
    return 0;
}
