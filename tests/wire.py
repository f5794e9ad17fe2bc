"""Writes two pages of the course from what really goes over the wire.

    python3 tests/wire.py       makes docs/course/dns-packet.md and docs/course/session-packets.md

A name server and an exchanger of the lab are asked by program 6 and by the relay itself;
what they hear is taken apart here and explained.  A test makes the pages anew and compares.
"""
import contextlib
import re
import socket
import tempfile
import threading
from pathlib import Path

import course
import lab
from lab import TYPE_NAMES, encode_name, wait_for

DNS_PAGE = course.COURSE / "dns-packet.md"
SESSION_PAGE = course.COURSE / "session-packets.md"

RCODES = {0: "no error", 3: "no such name"}


# ---- A query and its answer, octet by octet ------------------------------------------------


class Dissection:
    """Rows of an offset, octets, and what they mean."""

    def __init__(self, packet):
        self.packet, self.at, self.rows = packet, 0, []

    def take(self, size, meaning):
        octets = self.packet[self.at:self.at + size]
        self.rows.append((self.at, octets, meaning(int.from_bytes(octets, "big")) if callable(meaning) else meaning))
        self.at += size
        return int.from_bytes(octets, "big")

    def name(self, what):
        """A name, label by label."""
        while True:
            length = self.packet[self.at]
            if length >= 0xC0:
                target = int.from_bytes(self.packet[self.at:self.at + 2], "big") & 0x3FFF
                self.take(2, f"a pointer: the highest two bits are set, the rest is {target}, where "
                             f"`{name_at(self.packet, target)}` stands")
                return
            if length == 0:
                self.take(1, "a label of length 0 ends the name" if what else "the root, an empty name")
                return
            label = self.packet[self.at + 1:self.at + 1 + length].decode()
            self.take(1 + length, f"a label of {length} octets, `{label}`")

    def text(self):
        lines = []
        for at, octets, meaning in self.rows:
            for i in range(0, max(len(octets), 1), 8):
                chunk = octets[i:i + 8].hex(" ")
                lines.append(f"{at + i:4}  {chunk:23}  {meaning if i == 0 else ''}".rstrip())
        return "\n".join("    " + line for line in lines) + "\n"


def name_at(packet, at):
    labels = []
    while packet[at]:
        if packet[at] >= 0xC0:
            at = int.from_bytes(packet[at:at + 2], "big") & 0x3FFF
            continue
        labels.append(packet[at + 1:at + 1 + packet[at]].decode())
        at += 1 + packet[at]
    return ".".join(labels)


def flags(value):
    words = ["an answer" if value & 0x8000 else "a query"]
    words += [word for bit, word in ((0x0400, "authoritative"), (0x0200, "truncated"), (0x0100, "recursion desired"),
                                     (0x0080, "recursion available")) if value & bit]
    return "flags: " + ", ".join(words) + (f"; code {value & 15}, {RCODES[value & 15]}" if value & 0x8000 else "")


def dissect(packet):
    d = Dissection(packet)
    d.take(2, "the id: random; the answer has to repeat it")
    d.take(2, flags)
    questions = d.take(2, "how many questions follow, ...")
    answers = d.take(2, "... and how many records in the answer section, ...")
    authority = d.take(2, "... the authority section ...")
    additional = d.take(2, "... and the additional section")
    for _ in range(questions):
        d.name("question")
        d.take(2, lambda n: f"type {n}, {TYPE_NAMES[n]}")
        d.take(2, "class 1, IN, the Internet")
    for _ in range(answers + authority + additional):
        d.name("")
        kind = TYPE_NAMES[d.take(2, lambda n: f"type {n}, {TYPE_NAMES[n]}")]
        if kind == "OPT":
            d.take(2, lambda n: f"in the place of the class: packets of up to {n} octets are welcome")
            d.take(4, "in the place of the time to live: no further code, version 0, no flags")
            d.take(2, "0 octets of data")
            continue
        d.take(2, "class 1, IN")
        d.take(4, lambda n: f"time to live: {n} seconds")
        size = d.take(2, lambda n: f"{n} octets of data")
        if kind == "MX":
            d.take(2, lambda n: f"preference {n}")
            d.name("exchanger")
        else:
            d.take(size, "the address " + ".".join(map(str, packet[d.at:d.at + size])))
    return d.text()


@contextlib.contextmanager
def recording():
    """A name server that keeps its packets: yields it and [(query, answer)]."""
    dns = lab.Nameserver()
    packets, answers = [], dns._answers

    def answer(packet, transport, client_port):
        found = answers(packet, transport, client_port)
        packets.extend((packet, one) for one in found)
        return found

    dns._answers = answer
    dns.mx("example.net", (10, "near.example.net"), (20, "mail.example.org"))
    dns.a("near.example.net", "192.0.2.1")
    try:
        yield dns, packets
    finally:
        dns.stop()


def of_type(packets, name, type):
    wanted = encode_name(name) + type.to_bytes(2, "big")
    return next(((query, answer) for query, answer in packets if query[12:].startswith(wanted)), None)


def ask_by_program_6():
    with recording() as (dns, packets), tempfile.TemporaryDirectory() as directory:
        program = course.build(course.source(6))
        with course.start(program, Path(directory, "spool"), *dns.address.split(":"), 1) as server, \
                server.client() as client:
            client.deliver("nour@example.org", ["friend@example.net"], "Subject: x\n")
            wait_for(lambda: of_type(packets, "near.example.net", 1))
    return of_type(packets, "example.net", 15), of_type(packets, "near.example.net", 1)


def ask_by_relay():
    with recording() as (dns, packets), tempfile.TemporaryDirectory() as directory:
        relay = lab.Relay("-w", 1, spool=Path(directory, "spool"), dns=dns)
        try:
            relay.send("friend@example.net")
            return wait_for(lambda: of_type(packets, "example.net", 15))
        finally:
            relay.stop()


def dns_page():
    (query, answer), (_, address) = ask_by_program_6()
    real, _ = ask_by_relay()
    return f"""# A DNS query and its answer, octet by octet

This page is made by `python3 tests/wire.py` from packets that went over the wire: program 6 asked a name server of the
lab for the exchangers of example.net. Left is the place in the packet, counted from 0; then the octets, in hexadecimal;
then what they mean (RFC 1035, section 4.1). All numbers have the most significant octet first.

## The query: {len(query)} octets

`put_query()` wrote it.

{dissect(query)}
## The answer: {len(answer)} octets

`dns_ask()` compares the first {len(query)} octets with the query, and `read_answer()` reads the rest.

{dissect(answer)}
Look at the pointers. The owner of each record is the name that was asked for, and that stands at 12, in the question:
two octets in place of {len(encode_name("example.net"))}. The name of the first exchanger is one label and then a
pointer to the same place. The second exchanger's name shares no part with a name before it, so it is written out. A
pointer leads *back*: a program that follows one forward, or to itself, can be made to go round for ever.

## The answer to the next question

The type is 1, A, the name is that of the first exchanger, and the data are the four octets of an IPv4 address. As the
answer has only one name in it, all pointers lead to 12.

{dissect(address)}
## What the real one adds

The query of dns.c has {len(real) - len(query)} octets more, an OPT record (RFC 6891), by which it says that it takes
answers of more than the 512 octets that RFC 1035 allows:

{dissect(real)}"""


# ---- A session, packet by packet --------------------------------------------------------------


class Tap:
    """Stands between a client and an exchanger, and writes down what each of them sends."""

    def __init__(self, exchanger):
        self.exchanger, self.pieces = exchanger, []
        self.listener = socket.create_server((lab.loopback(), 0))
        self.host, self.port = self.listener.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection((self.exchanger.host, self.exchanger.port))
                for who, a, b in ("C", client, server), ("S", server, client):
                    threading.Thread(target=self._copy, args=(who, a, b), daemon=True).start()

    def _copy(self, who, a, b):
        with contextlib.suppress(OSError):
            for piece in iter(lambda: a.recv(65536), b""):
                self.pieces.append((who, piece))
                b.sendall(piece)
            b.shutdown(socket.SHUT_WR)

    def flights(self):
        """What one side said before the other spoke."""
        found = []
        for who, piece in self.pieces:
            if found and found[-1][0] == who:
                found[-1][1] += piece
            else:
                found.append([who, piece])
        return found


def session(*extensions):
    exchanger, = lab.exchangers(1)
    exchanger.set(extensions=extensions)
    tap = Tap(exchanger)
    with tempfile.TemporaryDirectory() as directory:
        relay = lab.Relay(spool=Path(directory, "spool"), mx_port=tap.port)
        try:
            relay.send(f"a@[{tap.host}]", f"b@[{tap.host}]", body="Subject: hello\n\nDear Nour\n")
            wait_for(lambda: tap.pieces and b"221 " in tap.pieces[-1][1])
        finally:
            relay.stop()
            exchanger.stop()
            tap.listener.close()
    return [(who, octets.replace(f"[{tap.host}]".encode(), b"example.net")) for who, octets in tap.flights()]


def show(flights):
    lines = []
    for number, (who, octets) in enumerate(flights, 1):
        for i, line in enumerate(octets.decode().split("\r\n")[:-1]):
            lines.append(f"{number if i == 0 else '':>4}  {who}: {line}".rstrip())
    return "\n".join("    " + line for line in lines) + "\n"


def session_page():
    fast, slow = session("PIPELINING", "8BITMIME"), session("8BITMIME")
    return f"""# A session, packet by packet

This page is made by `python3 tests/wire.py` from what went over the wire between the relay and an exchanger of the lab:
one message for two recipients. A number marks the beginning of a *flight*: all that one side sent before the other
spoke, usually one packet. `C` is the relay, here the client; `S` the exchanger.

Between one flight and the next lies the time that a packet needs from one to the other. Over an ocean that is 50 ms or
more, and all the rest of a session costs nearly nothing beside it. So *count the flights*.

## With pipelining: {len(fast)} flights

The exchanger offers PIPELINING (RFC 2920). Then the commands from MAIL to DATA go in one packet, by one `write()`, and
their replies are read in the same order. `compose_envelope()` in forward.c puts them together, and `say_envelope()`
sends them and reads the replies.

{show(fast)}
Why does the message not go in the same packet as well? RFC 2920 says that DATA is the last of a group: whether there is
anybody to send a message to is known only when the replies to RCPT are there. RFC 3030 has a command without that wait,
BDAT.

## Without: {len(slow)} flights

The same message for an exchanger that does not offer it. Each command waits for the answer to the one before.

{show(slow)}
{len(slow) - len(fast)} flights more for two recipients, and two more for each further one. With 100 recipients and
50 ms it is 10 seconds against half a second.

## What is not shown

Before flight 1 are two packets of TCP's own, SYN and SYN-ACK: the handshake, by which `race()` sees that a connection
stands. The third, the ACK, and that of each flight carry no octets of ours.
"""


# ---- The pages ------------------------------------------------------------------------------


VARIES = re.compile(r"^ *(?:0) +[0-9a-f]{2} [0-9a-f]{2}  +the id|\d{8}T\d{6}\.\d+-\d+-[0-9a-f]+"
                    r"|\w{3}, \d\d \w{3} \d{4} [0-9:]{8} \+0000|\]:\d+\)|SIZE=\d+", re.MULTILINE)


def settled(text):
    """A page without what differs each time."""
    return VARIES.sub("~", text)


PAGES = {DNS_PAGE: dns_page, SESSION_PAGE: session_page}


if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(make())
        print(path)
