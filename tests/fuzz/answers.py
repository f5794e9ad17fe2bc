"""Writes the seeds of the answer target, packets that are easier to read here
than in a dump, to corpus/answer/: a good one of each kind, and every lie a name
server might tell.

    python3 tests/fuzz/answers.py
"""
import struct
from pathlib import Path

A, NS, CNAME, SOA, MX, AAAA, OPT = 1, 2, 5, 6, 15, 28, 41
ROOT = b"\0"


def name(text):
    """A name without compression."""
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + ROOT


def pointer(to):
    return struct.pack("!H", 0xC000 | to)


QUESTION = pointer(12)      # to the question's name


def record(kind, data, owner=QUESTION, size=None, kind_class=1):
    return owner + struct.pack("!HHIH", kind, kind_class, 300, len(data) if size is None else size) + data


def mx(preference, exchanger, **more):
    return record(MX, struct.pack("!H", preference) + exchanger, **more)


def answer(kind, *records, asked="example.org", flags=0x8180, questions=1, answers=None, authority=(),
           authorities=None, more=b""):
    """`answers` and `authorities` are how many records to claim, where that is a lie."""
    head = struct.pack("!HHHHHH", 4711, flags, questions, len(records) if answers is None else answers,
                       len(authority) if authorities is None else authorities, 0)
    question = name(asked) + struct.pack("!HH", kind, 1) if questions else b""
    return head + question + b"".join(records) + b"".join(authority) + more


def ladder(steps, records):
    """Pointers to pointers: each record's owner is at the end of all of them."""
    start = 12 + len(name("example.org")) + 4 + 11      # behind the question and the first record's head
    rungs = QUESTION + b"".join(pointer(start + 2 * i) for i in range(steps))
    first = record(99, rungs, owner=ROOT)
    last = pointer(start + 2 * steps)
    return answer(A, first, *[record(A, bytes([192, 0, 2, i % 256]), owner=last) for i in range(records)])


def chain(links):
    """CNAMEs, and an address at the end of them."""
    return answer(A, record(CNAME, name("c0")),
        *[record(CNAME, name(f"c{i + 1}"), owner=name(f"c{i}")) for i in range(links - 1)],
        record(A, b"1234", owner=name(f"c{links - 1}")))


HOST = name("mx1.example.org")
NAMESERVER = record(NS, name("ns.example.org"))
START = record(SOA, name("ns.example.org") + name("hostmaster.example.org") + struct.pack("!5I", 1, 2, 3, 4, 5))
ELSEWHERE = record(A, b"1234", owner=name("example.net"))
LONG = ".".join("a" * 63 for _ in range(3)) + "." + "a" * 61        # 253 characters

SEEDS = {
    "a": answer(A, record(A, bytes([192, 0, 2, 1])), record(A, bytes([192, 0, 2, 2]))),
    "aaaa": answer(AAAA, record(AAAA, bytes.fromhex("20010db8000000000000000000000001"))),
    "mx": answer(MX, mx(20, HOST), mx(10, b"\3mx2" + QUESTION), mx(10, b"\3mx3" + QUESTION)),
    "mx-null": answer(MX, mx(0, ROOT)),
    "mx-thousand": answer(MX, *[mx(1000 - i, b"\1m" + QUESTION) for i in range(1000)]),
    "a-thousand": answer(A, *[record(A, struct.pack("!I", 0xC0000200 + i)) for i in range(1000)]),
    "mx-name-cut-off": answer(MX, mx(10, b"\3mx1")),
    "mx-name-beyond-its-data": answer(MX, mx(10, HOST, size=4), mx(10, HOST)),
    "mx-data-behind-its-name": answer(MX, mx(10, HOST + b"more")),
    "mx-without-a-name": answer(MX, record(MX, b"\0\12")),
    "a-of-five-octets": answer(A, record(A, b"12345")),
    "a-in-an-aaaa": answer(AAAA, record(AAAA, b"1234")),
    "one-bad-one-good": answer(A, record(A, b"123"), record(A, b"1234")),
    "class-chaos": answer(A, record(A, b"1234", kind_class=3)),
    "somebody-elses-record": answer(A, ELSEWHERE),
    "somebody-elses-records-and-mine": answer(A, ELSEWHERE, record(A, b"5678"), ELSEWHERE),
    "somebody-elses-record-and-a-referral": answer(A, ELSEWHERE, authority=[NAMESERVER]),
    "somebody-elses-record-and-no-such-name": answer(A, ELSEWHERE, flags=0x8183),
    "another-type": answer(A, mx(10, HOST)),
    "owner-in-capitals": answer(A, record(A, b"1234", owner=name("EXAMPLE.org"))),
    "cname": answer(A, record(CNAME, name("www.example.org")), record(A, b"1234", owner=name("www.example.org"))),
    "cname-behind-its-target": answer(A, record(A, b"1234", owner=HOST), record(CNAME, HOST)),
    "cname-out-of-the-answer": answer(A, record(CNAME, HOST)),
    "cname-to-the-root": answer(A, record(CNAME, ROOT)),
    "cname-to-itself": answer(A, record(CNAME, QUESTION)),
    "cname-in-a-circle": answer(A, record(CNAME, HOST), record(CNAME, QUESTION, owner=HOST)),
    "cname-cut-off": answer(A, record(CNAME, b"\3www")),
    "cname-to-nowhere": answer(A, record(CNAME, HOST), flags=0x8183),
    "cname-chain-of-eight": chain(8),
    "cname-chain-of-nine": chain(9),
    "pointer-to-itself": answer(A, record(A, b"1234", owner=pointer(29))),
    "pointer-forward": answer(A, record(A, b"1234", owner=pointer(60))),
    "pointer-behind-the-end": answer(A, record(A, b"1234", owner=pointer(0x3FFF))),
    "pointer-into-the-header": answer(A, record(A, b"1234", owner=pointer(4))),
    "pointer-cut-off": answer(A, more=b"\xC0", answers=1),
    "pointers-in-a-circle": answer(MX, mx(10, b"\1a" + pointer(43)), mx(10, b"\1b" + pointer(41))),
    "pointer-ladder": ladder(200, 50),
    "pointer-ladder-allowed": ladder(100, 50),
    "label-of-64": answer(MX, mx(10, b"\x40" + b"a" * 64 + ROOT)),
    "label-of-63": answer(MX, mx(10, name("a" * 63))),
    "label-type-80": answer(MX, mx(10, b"\x80\0")),
    "label-with-a-dot": answer(MX, mx(10, b"\7mx1.org" + ROOT)),
    "label-with-controls": answer(MX, mx(10, b"\5\r\n\0 \xFF" + ROOT)),
    "name-of-253": answer(MX, mx(10, name(LONG)), asked=LONG),
    "name-of-254": answer(MX, mx(10, name(LONG + "a"))),
    "names-that-add-up": answer(MX, mx(10, b"\x3F" + b"a" * 63 + QUESTION), asked=LONG[64:]),
    "name-into-the-rest": answer(MX, mx(10, b"\1m" + pointer(44)), mx(10, b"\x14")) + b"x" * 20 + ROOT,
    "count-too-high": answer(A, record(A, b"1234"), answers=65535),
    "count-too-low": answer(A, record(A, b"1234"), record(A, b"5678"), answers=1),
    "length-too-high": answer(A, record(A, b"1234", size=65535)),
    "nothing-but-a-header": answer(A, questions=0),
    "cut-in-the-header": answer(A)[:11],
    "cut-in-the-question": answer(A)[:20],
    "two-questions": answer(A, questions=2),
    "another-question": answer(A, record(A, b"1234"), asked="example.net"),
    "a-query": answer(A, flags=0x0100),
    "truncated": answer(A, flags=0x8380),
    "nxdomain": answer(A, flags=0x8183),
    "nodata": answer(A, flags=0x8180),
    "nodata-with-soa": answer(A, authority=[START]),
    "nodata-with-ns-and-soa": answer(A, authority=[NAMESERVER, START]),
    "nodata-without-ra": answer(A, flags=0x8100),
    "nodata-without-ra-with-soa": answer(A, flags=0x8100, authority=[START]),
    "nodata-with-authority": answer(A, flags=0x8500, authority=[NAMESERVER]),
    "referral": answer(A, flags=0x8100, authority=[NAMESERVER] * 2),
    "referral-that-recurses": answer(A, authority=[NAMESERVER]),
    "referral-behind-a-cname": answer(A, record(CNAME, HOST), flags=0x8100, authority=[NAMESERVER]),
    "authority-behind-an-answer": answer(A, record(A, b"1234"), authority=[NAMESERVER]),
    "authority-cut-off": answer(A, authority=[NAMESERVER[:-1]]),
    "authority-cut-off-behind-an-answer": answer(A, record(A, b"1234"), authority=[NAMESERVER[:-1]]),
    "authority-count-too-high": answer(A, authority=[NAMESERVER], authorities=65535),
    "authority-count-too-low": answer(A, authority=[NAMESERVER, START], authorities=1),
    "authority-with-a-pointer-to-itself": answer(A, authority=[record(NS, ROOT, owner=pointer(29))]),
    "servfail": answer(A, flags=0x8182),
    "refused": answer(A, flags=0x8185),
    "formerr": answer(A, flags=0x8181),
    "notimp-without-a-question": answer(A, flags=0x8184, questions=0),
    "opt": answer(A, record(A, b"1234"), record(OPT, b"", owner=ROOT)),
}


def main():
    corpus = Path(__file__).resolve().parent / "corpus" / "answer"
    corpus.mkdir(parents=True, exist_ok=True)
    for title, packet in SEEDS.items():
        (corpus / title).write_bytes(packet)


if __name__ == "__main__":
    main()
