"""The resolver: by itself, built as its head comment says, and within the relay."""
import collections
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab import (RESPONSE, ROOT, TO_QUESTION, TRUNCATED, Exchanger, Nameserver, encode_name, header,
                 loopback, parse_query, query_id, question, record, wait_for)

FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 1, 2, 3, 4, 5

NO_RECORD, NO_NAME = ["no such record"], ["no such name"]
MALFORMED = ["failed: malformed answer from the name server"]
SILENT = ["failed: no answer from the name servers"]

# What answers say here: an address, an exchanger, and what must not be believed.
GOOD, EVIL = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 66])
FOUND = ["192.0.2.1"]


# ---- The resolver by itself -------------------------------------------------------------


def build(into, *arguments):
    """Compiles, with the sanitizers where this machine has them: they see what a
    packet does to memory."""
    compiler = os.environ.get("CC", "cc").split()
    if not shutil.which(compiler[0]):
        pytest.skip("no C compiler here")
    for sanitizers in (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []):
        built = subprocess.run([*compiler, *sanitizers, "-o", into, *arguments], capture_output=True, text=True)
        if built.returncode == 0:
            return into
    raise AssertionError(built.stderr)


@pytest.fixture(scope="module")
def resolver(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dns") / "dns", "-DDNS_MAIN", ROOT / "dns.c")


class LookUp:
    """A run of the resolver, which asks for all types at once."""

    def __init__(self, resolver, name, server):
        self.begun = time.monotonic()
        self._process = subprocess.Popen([resolver, name, server], stdin=subprocess.DEVNULL,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self, type):
        """What it prints of a type: a line per record, or why there is none."""
        lines = [line.split(None, 1) for line in self._finish().splitlines()]
        return [line for of, line in lines if of == type]

    def _finish(self):
        if not hasattr(self, "_output"):
            self._output, errors = self._process.communicate(timeout=150)
            assert (self._process.returncode, errors) == (0, "")
        return self._output

    def stop(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def look_up(resolver, dns):
    """look_up("example.net", "MX"): what the resolver learns from this test's name server."""
    return lambda name, type, server=dns: LookUp(resolver, name, server.address).result(type)


def answer(query, *records, flags=RESPONSE, count=None, asked=None):
    """An answer to the query; `count` and `asked`, the question, only where it lies."""
    asked = question(query) if asked is None else asked
    count = len(records) if count is None else count
    return header(query_id(query), flags, 1, count) + asked + b"".join(records)


def a(address=GOOD, owner=TO_QUESTION, **claims):
    return record(owner, "A", address, **claims)


def of_type(dns, name, type="A"):
    return [query for query in dns.queries if query.name == name and query.type == type]


def transports(dns, name, type="A"):
    return [query.transport for query in of_type(dns, name, type)]


class TestRecords:
    def test_exchangers_by_preference_and_in_order_among_equals(self, dns, look_up):
        dns.mx("example.net", (20, "c.example.net"), (10, "b.example.org"), (65535, "z.example.net"),
               (20, "a.example.net"), (0, "mx.example.com"))
        assert look_up("example.net", "MX") == [
            "0 mx.example.com", "10 b.example.org", "20 c.example.net", "20 a.example.net", "65535 z.example.net"]

    def test_addresses_of_both_families(self, dns, look_up):
        dns.a("mx.example.net", "192.0.2.1", "192.0.2.2")
        dns.aaaa("mx.example.net", "2001:db8::1")
        assert look_up("mx.example.net", "A") == ["192.0.2.1", "192.0.2.2"]
        assert look_up("mx.example.net", "AAAA") == ["2001:db8::1"]
        assert look_up("mx.example.net", "MX") == NO_RECORD

    def test_null_mx_is_a_record_like_others(self, dns, look_up):
        dns.null_mx("example.net")
        assert look_up("example.net", "MX") == ["0 ."]

    @pytest.mark.parametrize("type", ["MX", "A", "AAAA"])
    @pytest.mark.parametrize("code, result", [
        (0, "no such record"), (NXDOMAIN, "no such name"), (SERVFAIL, "failed: the name server answers SERVFAIL"),
        (REFUSED, "failed: the name server answers REFUSED"), (9, "failed: the name server answers with an error")])
    def test_what_a_code_means(self, dns, look_up, code, result, type):
        dns.rcode("example.net", code)
        assert look_up("example.net", type) == [result]

    @pytest.mark.parametrize("flags, result", [
        (0x8500, NO_RECORD), (0x8100, ["failed: the name server only refers to others: it does not recurse"])],
        ids=["authoritative", "referral"])
    def test_no_answer_counts_from_who_would_know(self, dns, look_up, flags, result):
        """RFC 1034 4.3.1: a server that does not recurse may only know whom to ask."""
        dns.raw("example.net", lambda query: answer(query, flags=flags), "A")
        assert look_up("example.net", "A") == result

    def test_case_does_not_matter(self, dns, look_up):
        """RFC 1035 2.3.3."""
        dns.raw("example.net", type="A", answer=lambda query: answer(
            query, a(owner="eXAMPLE.nET"), asked=question(query).upper()))
        assert look_up("Example.Net", "A") == FOUND

    def test_a_thousand_exchangers_leave_the_most_preferred(self, dns, look_up):
        dns.mx("example.net", *((n, f"mx{n}.example.net") for n in range(1000, 0, -1)))
        assert look_up("example.net", "MX") == [f"{n} mx{n}.example.net" for n in range(1, 21)]

    def test_a_thousand_addresses_are_too_many(self, dns, look_up):
        addresses = [f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000)]
        dns.a("mx.example.net", *addresses)
        assert look_up("mx.example.net", "A") == addresses[:20]

    def test_records_of_others_and_of_other_classes_do_not_count(self, dns, look_up):
        of_class_chaos = a(EVIL).replace(b"\0\1\0\1", b"\0\1\0\3", 1)
        dns.raw("example.net", type="A", answer=lambda query: answer(
            query, a(EVIL, "www.example.net"), of_class_chaos, a(EVIL, "net"), a(GOOD), a(EVIL, "")))
        assert look_up("example.net", "A") == FOUND

    @pytest.mark.parametrize("section", ["authority", "additional"])
    def test_only_the_answer_section_counts(self, dns, look_up, section):
        dns.raw("example.net", type="A", answer=lambda query: header(
            query_id(query), **{section: 1}) + question(query) + a(EVIL))
        assert look_up("example.net", "A") == NO_RECORD

    def test_one_malformed_record_spoils_only_itself(self, dns, look_up):
        dns.raw("example.net", type="A", answer=lambda query: answer(query, a(b"\1\2\3"), a(GOOD), a(b"")))
        assert look_up("example.net", "A") == FOUND


class TestQuery:
    def test_to_the_letter(self, dns, look_up):
        """RFC 1035 4.1, and behind it the OPT record that asks for 1232 octets (RFC 6891 6.1.2)."""
        packets = []
        dns.raw("example.net", lambda query: packets.append(query) or answer(query, flags=RESPONSE | NXDOMAIN))
        assert look_up("example.net", "MX") == NO_NAME
        assert sorted(packet[2:] for packet in packets) == [
            b"\1\0\0\1\0\0\0\0\0\1" b"\7example\3net\0" + type + b"\0\1" b"\0\0\x29\4\xd0\0\0\0\0\0\0"
            for type in (b"\0\1", b"\0\x0f", b"\0\x1c")]

    LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])     # 255 octets on the wire: RFC 1035 2.3.4

    @pytest.mark.parametrize("name", [LONGEST, "a." * 126 + "a", "a-b_c.example.net"],
                             ids=["longest", "most labels", "odd"])
    def test_names_there_can_be(self, dns, look_up, name):
        dns.a(name, "192.0.2.1")
        assert look_up(name, "A") == FOUND

    @pytest.mark.parametrize("name", [
        LONGEST + "b", "a." * 300 + "net", "c" * 64 + ".net", "example..net", ".example.net"],
        ids=["too long", "far too long", "long label", "empty label", "empty first label"])
    def test_names_there_cannot_be_are_not_asked_for(self, dns, look_up, name):
        assert look_up(name, "A") == NO_NAME
        assert not dns.queries

    def test_no_name_is_made_longer(self, dns, look_up):
        """There is no search list: who owned a domain in it would be sent what is not his."""
        dns.a("intranet.example.org", "192.0.2.66")
        assert look_up("intranet", "A") == NO_NAME
        assert {query.name for query in dns.queries} == {"intranet"}

    @pytest.mark.parametrize("server", ["localhost", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:5x", "127.0.0.1:",
                                        "[::1", "[::1]5353", "::1:5353:", "", "192.0.2.256"])
    def test_name_servers_there_cannot_be(self, resolver, server):
        run = subprocess.run([resolver, "example.net", server], capture_output=True, text=True, timeout=20)
        assert (run.returncode, run.stdout, run.stderr) == (2, "", f"dns: {server} is not an address[:port]\n")

    def test_over_ipv6(self, ipv6, resolver):
        dns = Nameserver("::1")
        dns.a("mx.example.net", "192.0.2.1")
        assert LookUp(resolver, "mx.example.net", dns.address).result("A") == FOUND
        dns.stop()

    @pytest.mark.parametrize("code", [FORMERR, NOTIMP])
    @pytest.mark.parametrize("header_only", [False, True])
    def test_asks_again_without_edns(self, dns, look_up, code, header_only):
        """RFC 6891 7.  Who could not read the question may leave it out."""
        def old_server(query):
            if parse_query(query, "udp", 0).edns_size is None:
                return answer(query, a())
            if header_only:
                return header(query_id(query), RESPONSE | code, questions=0)
            return answer(query, flags=RESPONSE | code)
        dns.raw("example.net", old_server, type="A")
        assert look_up("example.net", "A") == FOUND
        assert [query.edns_size for query in of_type(dns, "example.net")] == [1232, None]

    def test_gives_up_on_who_cannot_read_it_even_so(self, dns, look_up):
        dns.rcode("example.net", FORMERR)
        assert look_up("example.net", "A") == ["failed: the name server answers with an error"]
        assert [query.edns_size for query in of_type(dns, "example.net")] == [1232, None]

    def test_a_slow_answer_is_awaited(self, dns, look_up):
        dns.a("mx.example.net", "192.0.2.1")
        dns.delay("mx.example.net", 0.5)
        assert look_up("mx.example.net", "A") == FOUND
        assert len(of_type(dns, "mx.example.net")) == 1


class TestChains:
    @pytest.mark.parametrize("alone", [False, True], ids=["in one answer", "across answers"])
    def test_followed(self, dns, look_up, alone):
        for n in range(8):
            dns.cname(f"n{n}.example.net", f"n{n + 1}.example.net", alone)
        dns.a("n8.example.net", "192.0.2.1")
        dns.mx("n8.example.net", (10, "mx.example.net"))
        assert look_up("n0.example.net", "A") == FOUND
        assert look_up("n0.example.net", "MX") == ["10 mx.example.net"]
        assert look_up("n0.example.net", "AAAA") == NO_RECORD

    @pytest.mark.parametrize("alone", [False, True], ids=["in one answer", "across answers"])
    @pytest.mark.parametrize("aliases", [1, 2, 7])
    def test_loop(self, dns, look_up, aliases, alone):
        for n in range(aliases):
            dns.cname(f"n{n}.example.net", f"n{(n + 1) % aliases}.example.net", alone)
        assert look_up("n0.example.net", "A") == ["failed: too many CNAMEs in a row"]
        assert len([query for query in dns.queries if query.type == "A"]) < 20

    def test_too_long(self, dns, look_up):
        for n in range(9):
            dns.cname(f"n{n}.example.net", f"n{n + 1}.example.net")
        dns.a("n9.example.net", "192.0.2.1")
        assert look_up("n0.example.net", "A") == ["failed: too many CNAMEs in a row"]

    @pytest.mark.parametrize("alone", [False, True], ids=["in one answer", "across answers"])
    def test_to_nowhere(self, dns, look_up, alone):
        dns.cname("www.example.net", "gone.example.net", alone)
        assert look_up("www.example.net", "A") == NO_NAME

    def test_in_any_order(self, dns, look_up):
        """RFC 1034 3.6.2 and 5.2.2 do not say that the alias comes first."""
        dns.raw("www.example.net", type="A", answer=lambda query: answer(
            query, a(EVIL, "b.example.net"), a(GOOD, "a.example.net"),
            record(TO_QUESTION, "CNAME", encode_name("a.example.net"))))
        assert look_up("www.example.net", "A") == FOUND

    def test_begins_at_the_question(self, dns, look_up):
        """An answer that tells only of others is no answer to us: the next may be."""
        dns.raw("www.example.net", type="A", answer=lambda query: [
            answer(query, record("else.example.net", "CNAME", encode_name("evil.example.net")),
                   a(EVIL, "evil.example.net")),
            answer(query, a())])
        assert look_up("www.example.net", "A") == FOUND

    def test_malformed(self, dns, look_up):
        dns.raw("www.example.net", type="A", answer=lambda query: answer(
            query, record(TO_QUESTION, "CNAME", b"\xff\xff")))
        assert look_up("www.example.net", "A") == MALFORMED


# ---- Hostile answers --------------------------------------------------------------------

EXCHANGER = encode_name("mx.example.net")
PREFERENCE = b"\0\x0a"
AT = 12 + len(encode_name("example.net")) + 4   # where the first record of an answer begins


def pointer(to):
    return struct.pack("!H", 0xC000 | to)


def a_name(octets):
    """A name that takes so many octets on the wire."""
    labels = [63] * ((octets - 2) // 64)
    labels.append(octets - 2 - sum(length + 1 for length in labels))
    return b"".join(bytes([length]) + b"a" * length for length in labels) + b"\0"


# (type, records); the first begins at AT, its data at AT + 12 behind an owner of two octets.
HOSTILE = {
    "owner that points at itself": ("A", [a(owner=pointer(AT))]),
    "owner that points forward": ("A", [a(owner=pointer(AT + 16)), a()]),
    "owner that points beyond the end": ("A", [a(owner=pointer(0x3FFF))]),
    "owner whose pointer is cut": ("A", [b"\xc0"]),
    "owner whose label goes beyond the end": ("A", [b"\x3fexample"]),
    "owner without an end": ("A", [b"\1a\1b"]),
    "owner with a label of type 01": ("A", [a(owner=b"\x41a\0")]),
    "owner with a label of type 10": ("A", [a(owner=b"\x81a\0")]),
    "owner of 256 octets": ("A", [a(owner=a_name(256))]),
    "owner of 5,000 octets": ("A", [a(owner=a_name(5000))]),
    "owner made too long by a pointer": ("A", [a(owner=b"\x3f" + b"a" * 63 + TO_QUESTION),
                                             a(owner=3 * (b"\x3f" + b"a" * 63) + pointer(AT))]),
    "two pointers to each other": ("A", [a(owner=pointer(AT + 16)), a(owner=pointer(AT))]),
    "no record where one is promised": ("A", [a(owner="else.example.net"), b""]),
    "record cut in its head": ("A", [TO_QUESTION + b"\0\1\0\1"]),
    "length beyond the end": ("A", [a(size=5)]),
    "length of 65535": ("A", [a(size=65535)]),
    "length before the end": ("A", [a(size=3)]),
    "no address": ("A", [a(b"")]),
    "address of 3 octets": ("A", [a(b"\1\2\3")]),
    "address of 5 octets": ("A", [a(b"\1\2\3\4\5")]),
    "IPv6 address of 15 octets": ("AAAA", [record(TO_QUESTION, "AAAA", b"\1" * 15)]),
    "IPv6 address of 4 octets": ("AAAA", [record(TO_QUESTION, "AAAA", GOOD)]),
    "exchanger without anything": ("MX", [record(TO_QUESTION, "MX", b"")]),
    "exchanger with half a preference": ("MX", [record(TO_QUESTION, "MX", b"\0")]),
    "exchanger without a name": ("MX", [record(TO_QUESTION, "MX", PREFERENCE)]),
    "exchanger with a tail": ("MX", [record(TO_QUESTION, "MX", PREFERENCE + EXCHANGER + b"\0")]),
    "exchanger that goes on into the next record": ("MX", [record(TO_QUESTION, "MX", PREFERENCE + EXCHANGER, size=7),
                                                         EXCHANGER]),
    "exchanger that points at itself": ("MX", [record(TO_QUESTION, "MX", PREFERENCE + pointer(AT + 14))]),
    "exchanger that ends in itself": ("MX", [record(TO_QUESTION, "MX", PREFERENCE + b"\1a" + pointer(AT + 14))]),
    "exchanger that points into its tail": (
        "MX", [record(TO_QUESTION, "MX", PREFERENCE + pointer(AT + 16) + b"\1a\0")]),
    "exchanger of 256 octets": ("MX", [record(TO_QUESTION, "MX", PREFERENCE + a_name(256))]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed(dns, look_up, case):
    type, records = HOSTILE[case]
    dns.raw("example.net", lambda query: answer(query, *records), type)
    assert look_up("example.net", type) == MALFORMED


def test_exchanger_of_255_octets(dns, look_up):
    dns.raw("example.net", type="MX", answer=lambda query: answer(
        query, record(TO_QUESTION, "MX", PREFERENCE + a_name(255))))
    assert look_up("example.net", "MX") == ["10 " + ".".join(["a" * 63] * 3 + ["a" * 61])]


def test_more_records_promised_than_there_are(dns, look_up):
    dns.raw("example.net", lambda query: answer(query, a(), count=65535), type="A")
    assert look_up("example.net", "A") == MALFORMED


def test_fewer_records_promised_than_there_are(dns, look_up):
    dns.raw("example.net", lambda query: answer(query, a(), a(EVIL), count=1), type="A")
    assert look_up("example.net", "A") == FOUND


def test_cut_anywhere_behind_the_question(dns, resolver):
    """Each cut is an answer of its own, and none of them is half believed."""
    whole = [record(TO_QUESTION, "CNAME", b"\1a" + TO_QUESTION), a(owner=pointer(AT + 12)),
             a(owner="a.example.net")]
    length = len(b"".join(whole))

    def cut(to):
        return lambda query: answer(query, *whole)[:to - length]

    for to in range(length):
        dns.raw(f"c{to}.example.net", cut(to), type="A")
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda to: LookUp(resolver, f"c{to}.example.net", dns.address).result("A"), range(length))
    assert list(results) == [MALFORMED] * length


def test_nothing_in_a_name_is_more_than_a_character(dns, look_up):
    """Names go into logs and files: no blank, no line end, no escape, no dot within a label."""
    name = b"\7a b\r\n.\x1b\2\xff\0\0"
    dns.raw("example.net", lambda query: answer(query, record(TO_QUESTION, "MX", PREFERENCE + name)), type="MX")
    assert look_up("example.net", "MX") == ["10 a?b????.??"]


# What is not the answer to the query is passed over, and the answer awaited.
NOT_OURS = {
    "nothing": lambda query: b"",
    "an octet": lambda query: query[:1],
    "the id": lambda query: query[:2],
    "half a header": lambda query: answer(query, a(EVIL))[:11],
    "a header": lambda query: header(query_id(query)),
    "half a question": lambda query: header(query_id(query)) + question(query)[:-2],
    "another id": lambda query: header(query_id(query) ^ 1, answers=1) + question(query) + a(EVIL),
    "another id's failure": lambda query: header(query_id(query) ^ 0x8000, RESPONSE | SERVFAIL) + question(query),
    "another name": lambda query: answer(query, a(EVIL), asked=encode_name("evil.example.net") + b"\0\1\0\1"),
    "a longer name": lambda query: answer(query, a(EVIL), asked=encode_name("example.net.evil") + b"\0\1\0\1"),
    "another owner": lambda query: answer(query, a(EVIL, "evil.example.net")),
    "another type": lambda query: answer(query, a(EVIL), asked=question(query)[:-4] + b"\0\x1c\0\1"),
    "another class": lambda query: answer(query, a(EVIL), asked=question(query)[:-2] + b"\0\3"),
    "a malformed question": lambda query: answer(query, a(EVIL), asked=b"\xc0\x0c\0\1\0\1"),
    "the query itself": lambda query: query,
    "a query with an answer": lambda query: answer(query, a(EVIL), flags=RESPONSE & ~0x8000),
    "another opcode": lambda query: answer(query, a(EVIL), flags=RESPONSE | 0x2000),
    "no question": lambda query: header(query_id(query), questions=0, answers=1) + a(EVIL, "example.net"),
    "no question, and a failure": lambda query: header(query_id(query), RESPONSE | SERVFAIL, questions=0),
    "two questions": lambda query: header(query_id(query), questions=2, answers=1) + 2 * question(query) + a(EVIL),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_passed_over(dns, look_up, case):
    """RFC 5452 9.1."""
    dns.raw("example.net", lambda query: [NOT_OURS[case](query), answer(query, a())], type="A")
    assert look_up("example.net", "A") == FOUND
    assert len(of_type(dns, "example.net")) == 1


@pytest.mark.parametrize("other", ["port", "address"])
def test_forger_elsewhere_is_not_heard(dns, look_up, other):
    """Even one who knows the id, the question and the client's port."""
    host, port = dns.address.split(":")
    source = (host, 0) if other == "port" else (loopback(), int(port))

    def forge_first(query):
        to = next(seen.client_port for seen in reversed(dns.queries) if seen.id == query_id(query))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            forger.bind(source)
            forger.sendto(answer(query, a(EVIL)), (host, to))
        return answer(query, a())

    dns.raw("example.net", forge_first, type="A")
    assert look_up("example.net", "A") == FOUND


# ---- Over TCP -----------------------------------------------------------------------------


def truncated(query, *records):
    return answer(query, *records, flags=RESPONSE | TRUNCATED)


def over_tcp(dns, name, answer, *records):
    """Asked for A over UDP, only TC and these records; over TCP what `answer` says."""
    def either(query):
        seen = next(seen for seen in reversed(dns.queries) if seen.id == query_id(query) and seen.type == "A")
        return truncated(query, *records) if seen.transport == "udp" else answer(query)
    dns.raw(name, either, "A")


class TestTCP:
    @pytest.mark.parametrize("type, result", [("A", FOUND), ("MX", ["10 mx.example.net"])])
    def test_truncated_answer_is_asked_for_again(self, dns, look_up, type, result):
        """RFC 7766 5."""
        dns.a("example.net", "192.0.2.1")
        dns.mx("example.net", (10, "mx.example.net"))
        dns.truncate("example.net", type)
        assert look_up("example.net", type) == result
        assert transports(dns, "example.net", type) == ["udp", "tcp"]

    def test_what_stands_in_a_truncated_answer_does_not_count(self, dns, look_up):
        over_tcp(dns, "example.net", lambda query: answer(query, a()), a(EVIL))
        assert look_up("example.net", "A") == FOUND

    def test_without_edns_over_tcp_too(self, dns, look_up):
        def old_server(query):
            if parse_query(query, "", 0).edns_size is not None:
                return answer(query, flags=RESPONSE | FORMERR)
            return answer(query, a())
        over_tcp(dns, "example.net", old_server)
        assert look_up("example.net", "A") == FOUND
        assert transports(dns, "example.net") == ["udp", "tcp", "udp", "tcp"]

    @pytest.mark.parametrize("case, result", [
        ("another id", None), ("another name", None), ("nothing", None), ("half a question", None),
        ("truncated", None), ("malformed", MALFORMED), ("SERVFAIL", ["failed: the name server answers SERVFAIL"])])
    def test_useless_answer(self, dns, look_up, case, result):
        useless = {**NOT_OURS, "truncated": truncated, "malformed": lambda query: answer(query, count=1),
                   "SERVFAIL": lambda query: answer(query, flags=RESPONSE | SERVFAIL)}
        over_tcp(dns, "example.net", useless[case])
        assert look_up("example.net", "A") == (
            result or ["failed: the name server truncates its answer and is not to be had over TCP"])

    @pytest.mark.parametrize("way", ["closes", "resets", "half a length", "half a message"])
    def test_broken_connection(self, look_up, way):
        class Broken(Nameserver):
            def _serve_tcp(self, sock, client):
                sock.recv(512)
                sock.sendall({"half a length": b"\0", "half a message": b"\0\x20" + bytes(31)}.get(way, b""))
                if way == "resets":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        dns = Broken()
        dns.truncate("example.net")
        dns.mx("example.net", (10, "mx.example.net"))
        assert look_up("example.net", "MX", dns) == [
            "failed: the name server truncates its answer and is not to be had over TCP"]
        dns.stop()

    def test_arrives_in_pieces(self, look_up):
        class Slow(Nameserver):
            def _serve_tcp(self, sock, client):
                query = sock.recv(512)[2:]
                message = answer(query, *[a(GOOD)] * 5)
                for octet in struct.pack("!H", len(message)) + message:
                    sock.sendall(bytes([octet]))

        dns = Slow()
        dns.truncate("example.net", "A")
        assert look_up("example.net", "A", dns) == FOUND * 5
        dns.stop()


# ---- Chance -------------------------------------------------------------------------------


def expect_random(numbers):
    """Hardly one of these 400 twice, no usual step from one to the next, no bit that stands
    still.  Of numbers that are random one in a billion such lists fails: of 16 repeated
    the chance is 1e-12, of a step that is taken six times 5e-12, of a bit 3e-11."""
    assert len(numbers) == 400
    assert len(set(numbers)) > 400 - 16
    steps = collections.Counter((after - before) % 65536 for before, after in zip(numbers, numbers[1:]))
    assert steps.most_common(1)[0][1] < 6
    assert all(120 < sum(number >> bit & 1 for number in numbers) < 280 for bit in range(16))


def expect_unpredictable(queries):
    """RFC 5452 9.2."""
    expect_random([query.id for query in queries])
    expect_random([query.client_port for query in queries])


def test_ids_and_ports_cannot_be_guessed(dns, relay):
    """Each domain is another process's, and the processes are forks of few."""
    server = relay()
    with server.client() as client:
        for n in range(8):
            client.deliver("", [f"b@d{n}-{m}.example.net" for m in range(50)], "Subject: x\n\nx\n")
    expect_unpredictable(wait_for(lambda: len(dns.queries) >= 400 and dns.queries[:400], timeout=60))


ASK = r"""
#include "smtp.h"
#include <unistd.h>

int main(int argc, char **argv)
{
    static struct dns_query query = { .name = "example.net", .type = DNS_A };
    struct nameservers servers = { .count = 1 };
    char host[DNS_NAME_SIZE];
    unsigned port;

    if (!endpoint_parse(argv[argc - 1], 53, host, &port) || !address_parse(host, port, &servers.server[0]))
        return 1;
    %s
}
"""

# Asks, so that there are random bits in store, and has 40 children ask.
AND_FORK = """
    dns_ask(&servers, &query, 1, INT64_MAX);
    for (int child = 0; child < 40; child++)
        if (fork() == 0) {
            for (int i = 0; i < 10; i++)
                dns_ask(&servers, &query, 1, INT64_MAX);
            _exit(0);
        }
    return 0;
"""

BRIEFLY = """
    dns_ask(&servers, &query, 1, clock_ms() + 100);
    return query.status != DNS_FAILED;
"""


@pytest.mark.parametrize("urandom", [True, False], ids=["/dev/urandom", "no /dev/urandom"])
def test_no_process_is_given_the_numbers_of_another(dns, tmp_path, urandom):
    """What a parent has in store its children do not use, all the same ones.  Nor do they where
    there is no device for it, as in an empty chroot."""
    source = tmp_path / "fork.c"
    source.write_text(ASK % AND_FORK)
    program = [build(tmp_path / "fork", "-I", ROOT, source, ROOT / "dns.c"), dns.address]
    if not urandom:
        without = ["strace", "-f", "-o", tmp_path / "trace", "-P", "/dev/urandom", "-e", "inject=/^open:error=ENOENT"]
        if not shutil.which("strace") or subprocess.run([*without, "true"]).returncode != 0:
            pytest.skip("strace is not installed, or may not trace")
        program = without + program
    subprocess.run(program, check=True, timeout=60, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert urandom or "(INJECTED)" in (tmp_path / "trace").read_text()
    expect_unpredictable(wait_for(lambda: len(dns.queries) >= 401 and dns.queries[1:401], timeout=60))


def test_a_question_lasts_no_longer_than_its_asker_has_time(tmp_path):
    """As a rule silence takes 14 seconds."""
    source = tmp_path / "briefly.c"
    source.write_text(ASK % BRIEFLY)
    program = build(tmp_path / "briefly", "-I", ROOT, source, ROOT / "dns.c")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        subprocess.run([program, f"127.0.0.1:{silent.getsockname()[1]}"], check=True, timeout=10)


# ---- Within the relay ---------------------------------------------------------------------


def send(server, to):
    with server.client() as client:
        return client.deliver("", [to], "Subject: x\n\nDear Nour\n")


def test_all_addresses_are_asked_for_at_once(dns, relay, exchangers):
    mx, = exchangers(1)
    names = [f"mx{n}.example.net" for n in range(10)]
    dns.mx("example.net", *((n, name) for n, name in enumerate(names)))
    together = threading.Barrier(20)

    def when_all_are_here(query):
        together.wait(1.5)
        return answer(query, *([a(socket.inet_aton(mx.host))] if parse_query(query, "", 0).type == "A" else []))

    for name in names:
        dns.raw(name, when_all_are_here)
    send(relay(mx_port=mx.port), "b@example.net")
    mx.wait_for_messages(1)
    assert sorted((query.name, query.type) for query in dns.queries[1:]) == sorted(
        (name, type) for name in names for type in ("A", "AAAA"))


# What the zone says of example.net, and what becomes of mail for it.  `here` is where an
# exchanger listens; its words begin with the status of RFC 3463.
def zone_mx(dns, here):
    dns.mx("example.net", (10, "mx.example.org"))
    dns.a("mx.example.org", here)


def zone_implicit(dns, here):
    dns.a("example.net", here)


def zone_alias(dns, here):
    dns.cname("example.net", "example.com")
    dns.mx("example.com", (10, "mx.example.org"))
    dns.a("mx.example.org", here)


def zone_implicit_alias(dns, here):
    dns.cname("example.net", "example.com")
    dns.a("example.com", here)


def zone_exchanger_is_an_alias(dns, here):
    """RFC 2181 10.3 forbids it, and many do it."""
    dns.mx("example.net", (10, "mx.example.org"))
    dns.cname("mx.example.org", "host.example.org")
    dns.a("host.example.org", here)


def zone_one_exchanger_fails(dns, here):
    dns.mx("example.net", (10, "sick.example.org"), (20, "mx.example.org"))
    dns.rcode("sick.example.org", SERVFAIL)
    dns.a("mx.example.org", here)


def zone_one_type_fails(dns, here):
    zone_mx(dns, here)
    dns.rcode("mx.example.org", SERVFAIL, "AAAA")


def zone_no_name(dns, here):
    pass


def zone_alias_to_nowhere(dns, here):
    dns.cname("example.net", "gone.example.com")


def zone_servfail(dns, here):
    dns.a("example.net", here)
    dns.rcode("example.net", SERVFAIL, "MX")


def zone_refused(dns, here):
    dns.a("example.net", here)
    dns.rcode("example.net", REFUSED, "MX")


def zone_alias_loop(dns, here):
    dns.cname("example.net", "example.com")
    dns.cname("example.com", "example.net")


def zone_malformed(dns, here):
    dns.a("example.net", here)
    dns.raw("example.net", lambda query: answer(query, record(TO_QUESTION, "MX", b"\0")), "MX")


def zone_null_mx(dns, here):
    """RFC 7505."""
    dns.null_mx("example.net")
    dns.a("example.net", here)


def zone_nothing(dns, here):
    dns.rcode("example.net", 0)


def zone_exchanger_has_no_address(dns, here):
    """RFC 5321 5.1: not a reason to try the domain's own address."""
    dns.mx("example.net", (10, "mx.example.org"))
    dns.rcode("mx.example.org", 0)
    dns.a("example.net", here)


def zone_exchanger_is_nobody(dns, here):
    dns.mx("example.net", (10, "mx.example.org"))
    dns.a("example.net", here)


def zone_exchanger_fails(dns, here):
    dns.mx("example.net", (10, "mx.example.org"), (20, "gone.example.org"))
    dns.rcode("mx.example.org", SERVFAIL)
    dns.a("example.net", here)


def zone_exchanger_is_malformed(dns, here):
    dns.mx("example.net", (10, "mx.example.org"))
    dns.raw("mx.example.org", lambda query: answer(query, a(b"\1\2\3")))


SENT = [zone_mx, zone_implicit, zone_alias, zone_implicit_alias, zone_exchanger_is_an_alias,
        zone_one_exchanger_fails, zone_one_type_fails]
NOT_SENT = [
    (zone_no_name, "failed", "5.1.2 there is no domain example.net"),
    (zone_alias_to_nowhere, "failed", "5.1.2 there is no domain example.net"),
    (zone_servfail, "later", "4.4.3 no exchanger of example.net: the name server answers SERVFAIL"),
    (zone_refused, "later", "4.4.3 no exchanger of example.net: the name server answers REFUSED"),
    (zone_alias_loop, "later", "4.4.3 no exchanger of example.net: too many CNAMEs in a row"),
    (zone_malformed, "later", "4.4.3 no exchanger of example.net: malformed answer from the name server"),
    (zone_null_mx, "failed", "5.1.10 example.net takes no mail (null MX)"),
    (zone_nothing, "failed", "5.4.4 no exchanger of this domain has a usable address"),
    (zone_exchanger_has_no_address, "failed", "5.4.4 no exchanger of this domain has a usable address"),
    (zone_exchanger_is_nobody, "failed", "5.4.4 no exchanger of this domain has a usable address"),
    (zone_exchanger_fails, "later", "4.4.3 no address of an exchanger: the name server answers SERVFAIL"),
    (zone_exchanger_is_malformed, "later", "4.4.3 no address of an exchanger: malformed answer from the name server"),
]


def title(zone):
    return zone.__name__[len("zone_"):]


@pytest.mark.parametrize("zone", SENT, ids=title)
def test_mail_arrives(dns, relay, exchangers, zone):
    mx, = exchangers(1)
    zone(dns, mx.host)
    send(relay(mx_port=mx.port), "b@example.net")
    mx.wait_for_messages(1)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("zone, status, words", NOT_SENT, ids=[title(zone) for zone, _, _ in NOT_SENT])
def test_mail_does_not_arrive(dns, relay, exchangers, zone, status, words):
    mx, = exchangers(1)
    zone(dns, mx.host)
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    outcome, = server.outcomes("b@example.net")
    assert (outcome.relay, outcome.status, outcome.words) == ("-", status, words)
    assert not mx.connections


@pytest.mark.usefixtures("unharmed")
def test_hostile_answers_harm_nobody(dns, relay):
    """All of them at once, each for a domain of its own: mail for it is for later, and other
    mail goes on.  The domains are as long as example.net, which the pointers count with."""
    expected = {}
    for n, (type, records) in enumerate(HOSTILE.values()):
        domain = f"hosti{n:02}.net"
        dns.rcode(domain, 0)
        dns.raw(domain, lambda query, records=records: answer(query, *records), type)
        expected[domain] = "malformed answer from the name server"
    for n, forge in enumerate(NOT_OURS.values()):
        domain = f"forge{n:02}.net"
        dns.raw(domain, lambda query, forge=forge: [forge(query), answer(query, flags=RESPONSE | SERVFAIL)])
        expected[domain] = "the name server answers SERVFAIL"
    server = relay()
    with server.client() as client:
        client.deliver("", [f"b@{domain}" for domain in expected], "Subject: x\n\nDear Nour\n")
    for domain, why in expected.items():
        outcome, = server.outcomes(f"b@{domain}")
        assert (outcome.status, outcome.words[:6], outcome.words.rpartition(": ")[2]) == ("later", "4.4.3 ", why)


# Several name servers.  With a smarthost there is one look-up, that of its addresses.

@pytest.fixture
def others(dns):
    """Two further name servers that know the exchanger's address, as `dns` does."""
    made = [Nameserver(), Nameserver()]
    for nameserver in (dns, *made):
        nameserver.a("mx.example.net", "127.0.0.1")
    yield made
    for nameserver in made:
        nameserver.stop()


@pytest.fixture
def local_exchanger():
    mx = Exchanger("127.0.0.1")
    yield mx
    mx.stop()


def with_servers(relay, mx, *others):
    options = [option for nameserver in others for option in ("-n", nameserver.address)]
    return relay(*options, "-s", f"mx.example.net:{mx.port}")


def fail(dns, way):
    """The name server is of no use from now on, and says so at once."""
    {"is gone": dns.stop,       # its port answers with ICMP
     "SERVFAIL": lambda: dns.rcode("mx.example.net", SERVFAIL),
     "REFUSED": lambda: dns.rcode("mx.example.net", REFUSED),
     "malformed": lambda: dns.raw("mx.example.net", lambda query: answer(query, count=1)),
     "truncated for ever": lambda: dns.raw("mx.example.net", truncated)}[way]()


WAYS = ["is gone", "SERVFAIL", "REFUSED", "malformed", "truncated for ever"]


def test_first_name_server_is_enough(others, local_exchanger, relay):
    send(with_servers(relay, local_exchanger, *others), "b@example.net")
    local_exchanger.wait_for_messages(1)
    assert not others[0].queries and not others[1].queries


@pytest.mark.parametrize("way", WAYS)
def test_next_name_server_takes_over_at_once(dns, others, local_exchanger, relay, way):
    fail(dns, way)
    server = with_servers(relay, local_exchanger, *others)
    begun = time.monotonic()
    send(server, "b@example.net")
    message, = local_exchanger.wait_for_messages(1)
    assert message.received - begun < 2         # what a silent server is given
    assert len(others[0].queries) == 2 and not others[1].queries


def test_third_name_server_takes_over(dns, others, local_exchanger, relay):
    """The first is silent, which takes its time, the second says that it cannot."""
    dns.drop("mx.example.net")
    fail(others[0], "SERVFAIL")
    send(with_servers(relay, local_exchanger, *others), "b@example.net")
    local_exchanger.wait_for_messages(1)
    assert [len(nameserver.queries) for nameserver in (dns, *others)] == [2, 2, 2]


def test_each_name_server_is_asked_before_giving_up(dns, others, local_exchanger, relay):
    for nameserver, way in zip((dns, *others), ["REFUSED", "is gone", "SERVFAIL"]):
        fail(nameserver, way)
    server = with_servers(relay, local_exchanger, *others)
    send(server, "b@example.net")
    outcome, = server.outcomes("b@example.net")
    assert (outcome.status, outcome.words) == (
        "later", "4.4.3 no address of an exchanger: the name server answers SERVFAIL")
    assert len(dns.queries) == len(others[1].queries) == 2


# ---- resolv.conf ----------------------------------------------------------------------------

PRINT_SERVERS = r"""
#include "smtp.h"
#include <stdio.h>

int main(int argc, char **argv)
{
    struct nameservers servers;
    char text[ADDRESS_TEXT];

    dns_servers(argv[argc - 1], &servers);
    for (size_t i = 0; i < servers.count; i++)
        printf("%s %u\n", address_text(&servers.server[i], text), address_port(&servers.server[i]));
    return 0;
}
"""


@pytest.fixture(scope="module")
def print_servers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resolv")
    (directory / "servers.c").write_text(PRINT_SERVERS)
    return build(directory / "servers", "-I", ROOT, directory / "servers.c", ROOT / "dns.c")


@pytest.mark.parametrize("text, servers", [
    ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
    ("# nameserver 192.0.2.66\n;nameserver 192.0.2.66\nsearch example.net\n\nnameserver\t192.0.2.1 # ours\n"
     "options timeout:1\n", ["192.0.2.1"]),
    ("nameserver   192.0.2.1  \r\nnameserver 192.0.2.2", ["192.0.2.1", "192.0.2.2"]),
    ("".join(f"nameserver 192.0.2.{n}\n" for n in range(1, 9)), ["192.0.2.1", "192.0.2.2", "192.0.2.3"]),
    ("nameserver\nnameserver example.net\nnameserver 192.0.2.256\nnameserver " + "1" * 300 + "\n"
     "nameserver 192.0.2.1\n", ["192.0.2.1"]),
    ("nameservers 192.0.2.66\n", ["127.0.0.1"]),
    ("", ["127.0.0.1"]), (None, ["127.0.0.1"]),
], ids=["both families", "other lines", "blanks", "three at most", "no addresses", "other words", "empty", "missing"])
def test_resolv_conf(print_servers, tmp_path, text, servers):
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    run = subprocess.run([print_servers, path], capture_output=True, text=True, timeout=20)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [f"{server} 53" for server in servers]


# ---- Silence ----------------------------------------------------------------------------------
#
# It takes its time: these look-ups begin with the first test of this file, and
# are looked at in the last ones.


class Silences:
    NAMES = ("silent", "once", "tcp", "flooded", "slow0", "slow-tcp0")

    def __init__(self, resolver):
        self.dns = Nameserver()
        self.asked = collections.defaultdict(list)      # (name, type): when
        self._over = threading.Event()
        for name in self.NAMES[:4]:
            self.dns.raw(f"{name}.example.net", self._note_and_answer)
        for n in range(9):
            self.dns.raw(f"slow{n}.example.net", self._answer_late)
            self.dns.raw(f"slow-tcp{n}.example.net", self._answer_late)
        self.look_ups = {name: LookUp(resolver, f"{name}.example.net", self.dns.address) for name in self.NAMES}

    def _note_and_answer(self, query):
        seen = parse_query(query, "", 0)
        times = self.asked[seen.name, seen.type]
        times.append(time.monotonic())
        if seen.name.startswith("silent") or (seen.name.startswith("once") and len(times) == 1):
            return []
        if seen.name.startswith("tcp") and seen.type == "A":    # over TCP: silence
            return truncated(query) if len(times) == 1 else []
        if seen.name.startswith("tcp"):
            time.sleep(0.2)         # the answer comes while the other one waits
            return answer(query)
        if seen.name.startswith("flooded") and seen.type == "A":
            return self._flood(header(query_id(query) ^ 1, answers=1) + question(query) + a(EVIL))
        return answer(query, *([a()] if seen.type == "A" else []))

    def _flood(self, forgery):
        while not self._over.wait(0.01):
            yield forgery

    def _answer_late(self, query):
        """A chain of aliases, each link of which comes at the last moment there is for it."""
        seen = parse_query(query, "", 0)
        times = self.asked[seen.name, seen.type]
        times.append(time.monotonic())
        name, n = seen.name[:seen.name.index(".") - 1], int(seen.name[seen.name.index(".") - 1])
        if seen.type != "A":
            return answer(query)
        if len(times) < 3:
            return []
        if "tcp" in name and len(times) == 3:
            return truncated(query)
        self._over.wait(4.5 if "tcp" in name else 7)
        return answer(query, a() if n == 8 else record(TO_QUESTION, "CNAME", encode_name(f"{name}{n + 1}.example.net")))

    def result(self, name, type):
        return self.look_ups[name].result(type)

    def gaps(self, name, type):
        times = self.asked[f"{name}.example.net", type]
        return [later - sooner for sooner, later in zip(times, times[1:])]

    def ages(self, name, type):
        """How long after its start it asked again.  On a busy machine a query comes late, and the
        gap behind it is short; but none comes too soon."""
        return [at - self.look_ups[name].begun for at in self.asked[f"{name}.example.net", type][1:]]

    def stop(self):
        self._over.set()
        for look_up in self.look_ups.values():
            look_up.stop()
        self.dns.stop()


@pytest.fixture(scope="module", autouse=True)
def silences(resolver):
    silences = Silences(resolver)
    yield silences
    silences.stop()


def test_lost_packet_is_sent_again(silences):
    assert silences.result("once", "A") == FOUND
    age, = silences.ages("once", "A")
    assert 2 <= age


def test_every_try_is_a_new_one(silences):
    """RFC 5452 9.2: another id and another port, or the forger's chances add up."""
    silences.result("once", "A")
    first, second = of_type(silences.dns, "once.example.net")
    assert first.id != second.id and first.client_port != second.client_port


def test_silence_over_tcp(silences):
    assert silences.result("tcp", "A") == [
        "failed: the name server truncates its answer and is not to be had over TCP"]
    gap, = silences.gaps("tcp", "A")
    assert gap < 2


def test_answers_are_not_lost_while_another_is_fetched_over_tcp(silences):
    assert silences.result("tcp", "MX") == NO_RECORD
    assert [len(silences.asked["tcp.example.net", type]) for type in ("MX", "AAAA")] == [1, 1]


@pytest.mark.parametrize("type", ["MX", "A", "AAAA"])
def test_waits_double_and_end(silences, type):
    assert silences.result("silent", type) == SILENT
    second, third = silences.ages("silent", type)
    assert 2 <= second and 2 + 4 <= third
    first, second = silences.gaps("silent", type)
    assert 1.5 * first < second < 3 * first


def test_a_flood_of_forgeries_gains_no_time(silences):
    """There is always something to read, and never an answer: the next try has its time."""
    assert silences.result("flooded", "A") == SILENT
    assert len(silences.asked["flooded.example.net", "A"]) == 3


@pytest.mark.parametrize("name", ["slow0", "slow-tcp0"])
def test_who_is_slow_at_every_link_is_not_followed_to_the_end(silences, name):
    """That would take him twice the minute that there is for all."""
    result, = silences.result(name, "A")
    assert result.startswith("failed: ")
    assert len({asked for asked, _ in silences.asked if re.match(rf"{name[:-1]}\d\.", asked)}) > 2
