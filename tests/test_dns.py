"""The resolver: by itself, built as its head comment says, and within the relay."""
import collections
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lab import (AUTHORITATIVE, RECURSION_AVAILABLE, RESPONSE, ROOT, TO_QUESTION, TRUNCATED, Exchanger, Nameserver,
                 encode_name, header, loopback, parse_query, query_id, question, record, wait_for)

FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 1, 2, 3, 4, 5

NO_RECORD, NO_NAME = ["no such record"], ["no such name"]
MALFORMED = ["failed: malformed answer from the name server"]
SILENT = ["failed: no answer from the name servers"]
REFERRED = ["failed: the name server only refers to others: it does not recurse"]

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

    @pytest.mark.parametrize("code", [FORMERR, SERVFAIL, NOTIMP, REFUSED, 9])
    def test_a_code_says_more_than_the_records_beside_it(self, dns, look_up, code):
        dns.raw("example.net", lambda query: answer(query, a(EVIL), flags=RESPONSE | code), "A")
        assert look_up("example.net", "A")[0].startswith("failed: the name server answers ")

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

    def test_one_malformed_record_spoils_only_itself(self, dns, look_up):
        dns.raw("example.net", type="A", answer=lambda query: answer(query, a(b"\1\2\3"), a(GOOD), a(b"")))
        assert look_up("example.net", "A") == FOUND


NS = ("example.net", "NS", "ns.example.net")
SOA = ("example.net", "SOA", "ns.example.net")
SOMEBODY_ELSES = a(EVIL, "evil.example.net")


class TestNoRelevantAnswer:
    """RFC 2308 2.2: what is not there, and what another server would have to say."""

    FLAGS = {"recursive": RESPONSE, "not recursive": RESPONSE & ~RECURSION_AVAILABLE,
             "authoritative": RESPONSE & ~RECURSION_AVAILABLE | AUTHORITATIVE}

    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("authority", [(), (SOA,), (NS, SOA), (SOA, NS)],
                             ids=["nothing", "SOA", "NS and SOA", "SOA and NS"])
    def test_no_such_record(self, dns, look_up, authority, flags):
        dns.flags = self.FLAGS[flags]
        dns.rcode("example.net", 0)
        dns.authority("example.net", *authority)
        assert look_up("example.net", "A") == NO_RECORD
        assert len(of_type(dns, "example.net")) == 1

    @pytest.mark.parametrize("flags, result", [
        ("recursive", REFERRED), ("not recursive", REFERRED), ("authoritative", NO_RECORD)])
    @pytest.mark.parametrize("authority", [(NS,), (NS, ("example.net", "NS", "ns2.example.net"))], ids=["one", "two"])
    def test_referral(self, dns, look_up, authority, flags, result):
        """NS records and no SOA: a server that does not recurse only says whom to ask (RFC 1034 4.3.1)."""
        dns.flags = self.FLAGS[flags]
        dns.rcode("example.net", 0)
        dns.authority("example.net", *authority)
        assert look_up("example.net", "A") == result

    @pytest.mark.parametrize("authority", [(NS,), (SOA,)], ids=["NS", "SOA"])
    def test_an_answer_counts_more_than_authority(self, dns, look_up, authority):
        dns.flags = self.FLAGS["not recursive"]
        dns.a("example.net", "192.0.2.1")
        dns.authority("example.net", *authority)
        assert look_up("example.net", "A") == FOUND

    @pytest.mark.parametrize("code, result", [(NXDOMAIN, NO_NAME), (SERVFAIL, "SERVFAIL"), (REFUSED, "REFUSED")])
    def test_a_code_counts_more_than_authority(self, dns, look_up, code, result):
        dns.rcode("example.net", code)
        dns.authority("example.net", NS)
        assert look_up("example.net", "A") in (result, [f"failed: the name server answers {result}"])

    @pytest.mark.parametrize("records", [
        [SOMEBODY_ELSES], [SOMEBODY_ELSES] * 5, [record(TO_QUESTION, "MX", b"\0\0\0")],
        [record("else.example.net", "CNAME", encode_name("evil.example.net")), SOMEBODY_ELSES],
        [a(EVIL).replace(b"\0\1\0\1", b"\0\1\0\3", 1)]],
        ids=["another owner", "other owners", "another type", "another's alias", "another class"])
    @pytest.mark.parametrize("code, result", [(0, NO_RECORD), (NXDOMAIN, NO_NAME)], ids=["NOERROR", "NXDOMAIN"])
    def test_records_that_nobody_asked_for(self, dns, look_up, records, code, result):
        """From the right server, with the right id and question: nothing better is to come."""
        dns.raw("example.net", lambda query: answer(query, *records, flags=RESPONSE | code), type="A")
        assert look_up("example.net", "A") == result
        assert len(of_type(dns, "example.net")) == 1

    def test_records_that_nobody_asked_for_beside_a_referral(self, dns, look_up):
        dns.raw("example.net", type="A", answer=lambda query: header(
            query_id(query), answers=1, authority=1) + question(query) + SOMEBODY_ELSES
            + record("example.net", "NS", encode_name("ns.example.net")))
        assert look_up("example.net", "A") == REFERRED

    @pytest.mark.parametrize("section", ["authority", "additional"])
    def test_only_the_answer_section_counts(self, dns, look_up, section):
        dns.raw("example.net", type="A", answer=lambda query: header(
            query_id(query), **{section: 1}) + question(query) + a(EVIL))
        assert look_up("example.net", "A") == NO_RECORD

    @pytest.mark.parametrize("authority", [NS, SOA], ids=["NS", "SOA"])
    def test_an_alias_is_followed_whatever_stands_behind_it(self, dns, look_up, authority):
        """The answer ends with the alias, and the authority section speaks of its target."""
        dns.flags = self.FLAGS["not recursive"]
        dns.cname("www.example.net", "host.example.net", alone=True)
        dns.authority("www.example.net", authority)
        dns.a("host.example.net", "192.0.2.1")
        assert look_up("www.example.net", "A") == FOUND

    @pytest.mark.parametrize("section", [
        b"", b"\xc0", record(TO_QUESTION, "NS", b"\1a\0")[:-1], record(TO_QUESTION, "NS", b"\1a\0", size=4)],
        ids=["missing", "cut in its owner", "cut in its data", "length beyond the end"])
    def test_malformed_authority(self, dns, look_up, section):
        dns.raw("example.net", lambda query: header(query_id(query), authority=1) + question(query) + section, "A")
        assert look_up("example.net", "A") == MALFORMED
        dns.raw("example.org", lambda query: header(query_id(query), answers=1, authority=1) + question(query) + a()
                + section, "A")
        assert look_up("example.org", "A") == FOUND


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
        assert (run.returncode, run.stdout, run.stderr) == (2, "", f"dns: {server}: not an address\n")

    def test_over_ipv6(self, ipv6, resolver):
        dns = Nameserver("::1")
        dns.a("mx.example.net", "192.0.2.1")
        assert LookUp(resolver, "mx.example.net", dns.address).result("A") == FOUND
        dns.stop()

    @pytest.mark.parametrize("code", [FORMERR, SERVFAIL, NOTIMP, REFUSED, 9])
    def test_asks_again_without_edns(self, dns, look_up, code):
        """RFC 6891 7 has FORMERR; there are others in the field."""
        dns.a("example.net", "192.0.2.1")
        dns.dislike_opt("example.net", code)
        assert look_up("example.net", "A") == FOUND
        assert [query.edns_size for query in of_type(dns, "example.net")] == [1232, None]

    @pytest.mark.parametrize("code", [FORMERR, NOTIMP])
    def test_who_could_not_read_the_question_may_leave_it_out(self, dns, look_up, code):
        def old_server(query):
            if parse_query(query, "udp", 0).edns_size is None:
                return answer(query, a())
            return header(query_id(query), RESPONSE | code, questions=0)
        dns.raw("example.net", old_server, type="A")
        assert look_up("example.net", "A") == FOUND
        assert [query.edns_size for query in of_type(dns, "example.net")] == [1232, None]

    @pytest.mark.parametrize("code", [FORMERR, SERVFAIL, NOTIMP, REFUSED, 9])
    def test_gives_up_on_who_fails_even_so(self, dns, look_up, code):
        dns.rcode("example.net", code)
        result, = look_up("example.net", "A")
        assert result.startswith("failed: the name server answers ")
        first, second = of_type(dns, "example.net")
        assert (first.edns_size, second.edns_size) == (1232, None)
        assert first.id != second.id and first.client_port != second.client_port     # RFC 5452 9.2

    def test_asks_without_edns_down_a_chain(self, dns, look_up):
        """What was learned at the first link need not be learned again at the next."""
        for n in range(3):
            dns.cname(f"n{n}.example.net", f"n{n + 1}.example.net", alone=True)
            dns.dislike_opt(f"n{n}.example.net", SERVFAIL)
        dns.a("n3.example.net", "192.0.2.1")
        assert look_up("n0.example.net", "A") == FOUND
        assert [query.edns_size for query in dns.queries if query.type == "A"] == [1232, None, None, None, None]

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

# Asks, and has 40 children ask.
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


def test_no_process_is_given_the_numbers_of_another(dns, tmp_path):
    """Of a parent that has asked before, many children ask at once."""
    source = tmp_path / "fork.c"
    source.write_text(ASK % AND_FORK)
    program = build(tmp_path / "fork", "-I", ROOT, source, ROOT / "dns.c")
    subprocess.run([program, dns.address], check=True, timeout=60)
    expect_unpredictable(wait_for(lambda: len(dns.queries) >= 401 and dns.queries[1:401], timeout=60))


@pytest.mark.parametrize("call, error", [("open", "ENOENT"), ("read", "EIO")])
def test_nothing_is_asked_where_numbers_could_be_guessed(dns, relay, strace, call, error):
    """As in a chroot without /dev/urandom: mail waits until it is there, and says so."""
    server = relay()
    with strace(server.pid, f"inject=/^{call}(at|64)?$:error={error}", path="/dev/urandom") as trace:
        send(server, "b@example.net")
        outcome, = server.outcomes("b@example.net")
        wait_for(lambda: "(INJECTED)" in trace())
    assert (outcome.status, outcome.words) == ("later", "4.4.3 no exchanger of example.net: "
                                               "cannot read /dev/urandom, without which answers could be forged")
    assert not dns.queries


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


def zone_without_ra_implicit(dns, here):
    """As the resolvers of some containers and virtual machines answer."""
    dns.flags = RESPONSE & ~RECURSION_AVAILABLE
    dns.a("example.net", here)


def zone_without_ra(dns, here):
    dns.flags = RESPONSE & ~RECURSION_AVAILABLE
    zone_mx(dns, here)


def zone_opt_disliked(dns, here):
    zone_mx(dns, here)
    dns.dislike_opt("example.net", SERVFAIL)
    dns.dislike_opt("mx.example.org", REFUSED)


def zone_answers_beside_the_question(dns, here):
    """Of MX and AAAA there is nothing, and what is said instead does not count."""
    dns.a("example.net", here)
    for type in "MX", "AAAA":
        dns.raw("example.net", lambda query: answer(query, SOMEBODY_ELSES), type)


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


def zone_referral(dns, here):
    dns.a("example.net", here)
    dns.authority("example.net", NS, type="MX")


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
        zone_without_ra_implicit, zone_without_ra, zone_opt_disliked, zone_answers_beside_the_question,
        zone_one_exchanger_fails, zone_one_type_fails]
NOT_SENT = [
    (zone_no_name, "failed", "5.1.2 there is no domain example.net"),
    (zone_alias_to_nowhere, "failed", "5.1.2 there is no domain example.net"),
    (zone_servfail, "later", "4.4.3 no exchanger of example.net: the name server answers SERVFAIL"),
    (zone_refused, "later", "4.4.3 no exchanger of example.net: the name server answers REFUSED"),
    (zone_referral, "later",
     "4.4.3 no exchanger of example.net: the name server only refers to others: it does not recurse"),
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


def test_without_ra_an_exchanger_of_one_family_is_no_trouble(dns, relay, exchangers):
    """That it has no AAAA record is known: so its refusal counts, and is final."""
    mx, = exchangers(1)
    zone_without_ra(dns, mx.host)
    mx.set(replies={"CONNECT": "554 5.7.1 no"})
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    outcome, = server.outcomes("b@example.net")
    assert outcome.status == "failed"


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
    assert [len(nameserver.queries) for nameserver in (dns, *others)] == [2, 4, 2]     # the second also without OPT


def test_each_name_server_is_asked_before_giving_up(dns, others, local_exchanger, relay):
    for nameserver, way in zip((dns, *others), ["REFUSED", "is gone", "SERVFAIL"]):
        fail(nameserver, way)
    server = with_servers(relay, local_exchanger, *others)
    send(server, "b@example.net")
    outcome, = server.outcomes("b@example.net")
    assert (outcome.status, outcome.words) == (
        "later", "4.4.3 no address of an exchanger: the name server answers SERVFAIL")
    for nameserver in dns, others[1]:       # each for A and AAAA, first with OPT
        assert sorted((query.type, query.edns_size is None) for query in nameserver.queries) == [
            ("A", False), ("A", True), ("AAAA", False), ("AAAA", True)]


def test_what_one_name_server_dislikes_another_is_asked_with(dns, others, local_exchanger, relay):
    fail(dns, "REFUSED")
    send(with_servers(relay, local_exchanger, *others), "b@example.net")
    local_exchanger.wait_for_messages(1)
    assert [query.edns_size for query in others[0].queries] == [1232, 1232]


# ---- resolv.conf ----------------------------------------------------------------------------

PRINT_SERVERS = r"""
#include "smtp.h"
#include <stdio.h>

int main(int argc, char **argv)
{
    static struct nameservers servers;
    char text[ADDRESS_TEXT];

    for (int file = 1; file < argc; file++)
        dns_servers(argv[file], &servers);
    for (size_t i = 0; i < servers.count; i++)
        printf("%s %u\n", address_text(&servers.server[i], text), address_port(&servers.server[i]));
    if (servers.passed_over[0] != '\0')
        printf("not %s\n", servers.passed_over);
    return 0;
}
"""


@pytest.fixture(scope="module")
def print_servers(tmp_path_factory):
    """print_servers(path, ...): what these files, read one after the other, leave."""
    directory = tmp_path_factory.mktemp("resolv")
    (directory / "servers.c").write_text(PRINT_SERVERS)
    program = build(directory / "servers", "-I", ROOT, directory / "servers.c", ROOT / "dns.c")

    def print_them(*paths):
        run = subprocess.run([program, *paths], capture_output=True, text=True, timeout=20)
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout.splitlines()
    return print_them


HERE = ["127.0.0.1 53"]
LOOPBACK = socket.if_indextoname(1)


@pytest.mark.parametrize("text, servers", [
    ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1 53", "2001:db8::1 53"]),
    ("# nameserver 192.0.2.66\n;nameserver 192.0.2.66\nsearch example.net\n\nnameserver\t192.0.2.1 # ours\n"
     "options timeout:1\n", ["192.0.2.1 53"]),
    ("nameserver   192.0.2.1  \r\nnameserver 192.0.2.2", ["192.0.2.1 53", "192.0.2.2 53"]),
    ("search " + "example.net " * 1000 + "nameserver 192.0.2.66\nnameserver 192.0.2.1\n", ["192.0.2.1 53"]),
    ("nameserver [2001:db8::1]:5353\n", ["2001:db8::1 5353"]),
    (f"nameserver ::1%{LOOPBACK}\nnameserver fe80::1%{LOOPBACK}\nnameserver fe80::1%1\n",
     ["::1 53", "fe80::1 53", "fe80::1 53"]),
    ("nameservers 192.0.2.66\n", HERE), ("", HERE), (None, HERE),
], ids=["both families", "other lines", "blanks", "long line", "port", "scopes", "other words", "empty", "missing"])
def test_resolv_conf(print_servers, tmp_path, text, servers):
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    assert print_servers(path) == servers


NO_ADDRESS, NO_INTERFACE, ENOUGH = "not an address", "there is no such interface", "three are enough"


@pytest.mark.parametrize("line, passed_over", [
    ("nameserver", f"nothing ({NO_ADDRESS})"), ("nameserver example.net", f"example.net ({NO_ADDRESS})"),
    ("nameserver 192.0.2.256", f"192.0.2.256 ({NO_ADDRESS})"), ("nameserver 192.0.2.1%lo", f"192.0.2.1%lo ({NO_ADDRESS})"),
    ("nameserver " + "1" * 300, "1" * 80 + f" ({NO_ADDRESS})"),
    ("nameserver fe80::1%nowhere", f"fe80::1%nowhere ({NO_INTERFACE})"),
    ("nameserver fe80::1%4000000000", f"fe80::1%4000000000 ({NO_INTERFACE})"),
    ("nameserver fe80::1%", f"fe80::1% ({NO_INTERFACE})"),
    ("nameserver fe80::1", "fe80::1 (a link-local address needs its interface, as in fe80::1%eth0)"),
], ids=["nothing", "a name", "no IPv4 address", "IPv4 with a scope", "far too long", "no interface", "no number",
        "empty scope", "link-local without a scope"])
def test_passed_over_in_resolv_conf(print_servers, tmp_path, line, passed_over):
    path = tmp_path / "resolv.conf"
    path.write_text(f"{line}\nnameserver 192.0.2.1\n")
    assert print_servers(path) == ["192.0.2.1 53", f"not {passed_over}"]


def test_many_passed_over_in_resolv_conf(print_servers, tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("".join(f"nameserver 192.0.2.{n}\n" for n in range(1, 6)))
    three = [f"192.0.2.{n} 53" for n in range(1, 4)]
    assert print_servers(path) == [*three, f"not 192.0.2.4 ({ENOUGH}), 192.0.2.5 ({ENOUGH})"]
    path.write_text("".join(f"nameserver 192.0.2.{n}\n" for n in range(1, 256)))
    *servers, passed_over = print_servers(path)
    assert servers == three and len(passed_over) == len("not ") + 255      # there is no more room


def test_resolv_conf_that_is_gone_changes_nothing(print_servers, tmp_path):
    """It may be about to be replaced; one that is empty is there, and names nobody."""
    before, after, gone = tmp_path / "before", tmp_path / "after", tmp_path / "gone"
    before.write_text("nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver x\n")
    after.write_text("nameserver 192.0.2.3\n")
    assert print_servers(before, gone) == ["192.0.2.1 53", "192.0.2.2 53", f"not x ({NO_ADDRESS})"]
    assert print_servers(before, after) == print_servers(before, gone, after) == ["192.0.2.3 53"]
    after.write_text("")
    assert print_servers(before, after) == HERE


@pytest.fixture
def resolv_conf(tmp_path, wrapped):
    """A file that is the relay's /etc/resolv.conf, in a mount namespace of its own: the relay is
    resolv_conf.binary."""
    path = tmp_path / "resolv.conf"
    path.write_text("")
    mount = f"mount --bind {shlex.quote(str(path))} /etc/resolv.conf"
    if os.geteuid() != 0 or not shutil.which("unshare") or subprocess.run(
            ["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("no mount namespace of our own")
    tmp_path.chmod(0o755)
    path.chmod(0o644)
    inner = shlex.quote(f'{mount} && exec "$0" "$@"')
    return SimpleNamespace(write=path.write_text, binary=wrapped(command=f"unshare -m sh -c {inner}"))


@pytest.fixture
def at_port_53():
    """A name server as resolv.conf can name it to every program; .host is its address."""
    host = loopback()
    try:
        dns = Nameserver(host, 53)
    except OSError as error:
        pytest.skip(f"no port 53: {error}")
    dns.host = host
    yield dns
    dns.stop()


class TestResolvConfOfARelay:
    def test_is_read_again(self, resolv_conf, at_port_53, exchangers, relay):
        """As where the relay starts before the network does, and where the machine moves."""
        mx, = exchangers(1)
        server = relay(dns=None, binary=resolv_conf.binary, mx_port=mx.port)
        at_port_53.mail("example.net", (10, mx))
        at_port_53.mail("example.org", (10, mx))
        resolv_conf.write("nameserver 192.0.2.256\n")
        send(server, "b@example.net")
        assert server.outcomes("b@example.net")[0].status == "later"
        resolv_conf.write(f"nameserver {at_port_53.host}\n")
        send(server, "b@example.org")       # a child of the server
        mx.wait_for_messages(1)
        server.hangup_until(lambda: len(mx.messages) > 1)       # one of the queue manager
        resolv_conf.write("nameserver 127.0.0.1:1\n")
        send(server, "c@example.org")
        assert server.outcomes("c@example.org")[0].status == "later"

    def test_is_not_read_where_the_command_line_names_servers(self, resolv_conf, dns, at_port_53, exchangers, relay):
        mx, = exchangers(1)
        dns.mail("example.net", (10, mx))
        server = relay(binary=resolv_conf.binary, mx_port=mx.port)
        resolv_conf.write(f"nameserver {at_port_53.host}\nnameserver x\n")
        send(server, "b@example.net")
        mx.wait_for_messages(1)
        assert not at_port_53.queries and not server.logged("resolv.conf")

    def test_what_is_passed_over_is_logged_once(self, resolv_conf, relay):
        """At the start, and when it has changed."""
        resolv_conf.write("nameserver fe80::1%nowhere\nnameserver 127.0.0.1:1\n")
        server = relay(dns=None, binary=resolv_conf.binary)
        for n in range(3):
            send(server, f"{n}@example.net")
            assert server.outcomes(f"{n}@example.net")[0].words.startswith("4.4.3 ")
        server.hangup()
        server.outcomes("0@example.net", 2)
        assert [line for line in server.log if "resolv.conf" in line] == [
            f"passed over in /etc/resolv.conf: fe80::1%nowhere ({NO_INTERFACE})"]
        resolv_conf.write("nameserver example.net\nnameserver 127.0.0.1:1\n")
        server.hangup_until(lambda: server.logged(r"^passed over in /etc/resolv\.conf: example\.net "))
        server.hangup_until(lambda: len(server.outcomes("0@example.net")) > 2)
        resolv_conf.write("nameserver 127.0.0.1:1\n")
        server.hangup_until(lambda: len(server.outcomes("0@example.net")) > 4)
        assert len(server.logged("resolv.conf")) == 2


# ---- Scoped name servers (RFC 4007 11) ----------------------------------------------------------

LINK_LOCAL = "fe80::53"


@pytest.fixture
def link(own_network):
    """A network in which a link-local address is that of the loopback interface."""
    own_network("ip", "link", "set", "lo", "up")
    own_network("ip", "address", "add", f"{LINK_LOCAL}/64", "dev", "lo", "nodad")


@pytest.mark.parametrize("zone", [LOOPBACK, "1"])
def test_scoped_name_server(link, resolver, zone):
    dns = Nameserver("::")
    dns.a("mx.example.net", "192.0.2.1")
    dns.truncate("mx.example.net")      # so it is asked over both UDP and TCP
    try:
        port = dns.address.rpartition(":")[2]
        look_up = subprocess.run([resolver, "mx.example.net", f"[{LINK_LOCAL}%{zone}]:{port}"],
                                 capture_output=True, text=True, timeout=60)
        assert (look_up.returncode, look_up.stderr) == (0, "")
        assert "A    192.0.2.1\n" in look_up.stdout
        assert transports(dns, "mx.example.net") == ["udp", "tcp"]
    finally:
        dns.stop()


def test_scoped_name_server_of_a_relay(ipv6, exchangers, relay):
    mx, = exchangers(1)
    dns = Nameserver("::1")
    dns.mail("example.net", (10, mx))
    port = dns.address.rpartition(":")[2]
    try:
        send(relay("-n", f"[::1%{LOOPBACK}]:{port}", dns=None, mx_port=mx.port), "b@example.net")
        mx.wait_for_messages(1)
    finally:
        dns.stop()


# ---- Silence ----------------------------------------------------------------------------------
#
# It takes its time: these look-ups begin with the first test of this file, and
# are looked at in the last ones.


class Silences:
    NAMES = ("silent", "once", "tcp", "flooded", "no-opt", "slow0", "slow-tcp0")

    def __init__(self, resolver):
        self.dns = Nameserver()
        self.asked = collections.defaultdict(list)      # (name, type): when
        self._over = threading.Event()
        for name in self.NAMES[:4]:
            self.dns.raw(f"{name}.example.net", self._note_and_answer)
        self.dns.a("no-opt.example.net", "192.0.2.1")
        self.dns.dislike_opt("no-opt.example.net")
        for n in range(9):
            self.dns.raw(f"slow{n}.example.net", self._answer_late)
            self.dns.raw(f"slow-tcp{n}.example.net", self._answer_late)
        self._resolver = resolver
        self.look_ups = {}
        for name in self.NAMES:
            self.look_up(name)

    def look_up(self, name):
        """Begins to look the name up, as if for the first time."""
        for asked in [key for key in self.asked if key[0] == f"{name}.example.net"]:
            del self.asked[asked]
        self.look_ups[name] = LookUp(self._resolver, f"{name}.example.net", self.dns.address)

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


def test_silence_to_a_query_with_opt_is_not_the_end(silences):
    """A firewall may drop such queries: the next one goes without."""
    assert silences.result("no-opt", "A") == FOUND
    assert silences.result("no-opt", "AAAA") == silences.result("no-opt", "MX") == NO_RECORD
    for type in "A", "AAAA", "MX":
        assert [query.edns_size for query in of_type(silences.dns, "no-opt.example.net", type)] == [1232, None]


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
    """There is always something to read, and never an answer: the next try has its time.  Beside
    other work this machine may lose a query even on its way over loopback.  Then no flood answers
    that try, so all of them are made again."""
    asked = silences.asked
    for _ in range(3):
        assert silences.result("flooded", "A") == SILENT
        if len(asked["flooded.example.net", "A"]) >= 3:
            break
        silences.look_up("flooded")
    tries = asked["flooded.example.net", "A"]
    tries = [when for when in tries if when < tries[0] + 20]    # what the flood reaches later was another's port
    assert len(tries) == 3


@pytest.mark.parametrize("name", ["slow0", "slow-tcp0"])
def test_who_is_slow_at_every_link_is_not_followed_to_the_end(silences, name):
    """That would take him twice the minute that there is for all."""
    result, = silences.result(name, "A")
    assert result.startswith("failed: ")
    assert len({asked for asked, _ in silences.asked if re.match(rf"{name[:-1]}\d\.", asked)}) > 2
