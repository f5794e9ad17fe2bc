"""The message, from 354 to the final dot: what ends it, what is refused, what arrives."""
import datetime
import email
import email.policy
import email.utils
import random
import re
import socket

import pytest

from lab import HOSTNAME

pytestmark = pytest.mark.usefixtures("unharmed")

BARE = "550 5.5.2 "
TOO_BIG = "552 5.3.4 "
LOOP = "554 5.4.6 "
QUEUED = "250 2.0.0 Ok: queued as "
END = b"\r\n.\r\n"

# What nobody may take for commands: the rest of a message that has been smuggled in.
SMUGGLED = (b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<victim@example.net>\r\nDATA\r\n"
            b"Subject: smuggled\r\n\r\nNOOP\r\nQUIT")


def begin(client, end="\r\n", greeting="HELO me.com"):
    """Says all that comes before the message."""
    for line in (greeting, "MAIL FROM:<a@example.org> BODY=8BITMIME", "RCPT TO:<b@example.net>", "DATA"):
        client.send((line + end).encode())
        assert client.reply()[0] in "23"
    return client


def whole(stream):
    return [stream]


def octets(stream):
    return [stream[i:i + 1] for i in range(len(stream))]


def cut_at(*places):
    """A way to cut a stream, as whole() and octets() are."""
    return lambda stream: [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)])]


def send_pieces(client, pacer, pieces):
    """Each piece has been read before the next is sent: the server serves both
    clients in turn, and has answered the second."""
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        client.send(piece)
        pacer.say("NOOP")


def stuffed(content):
    """RFC 5321 4.5.2."""
    return re.sub(rb"(\A|\r\n)\.", rb"\1..", content)


def arrived(exchanger, count=1):
    """The contents that arrived, without the trace that the relay put before them."""
    return [re.sub(rb"\AReceived: .*(\r\n\t.*)*\r\n", b"", m.raw) for m in exchanger.wait_for_messages(count)]


# ---- Bare CR and LF (RFC 5321 2.3.8, 4.1.1.4) -----------------------------------------------


@pytest.mark.parametrize("pieces", [whole, octets])
@pytest.mark.parametrize("false_end", [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r.\n", b"\n\r.\n\r", b"\n\r.\r\n",
    b"\r\r\n.\r\r\n", b"\r\n.\r\r\n", b"\r\n.\n\r\n", b"\r\n\r.\r\n", b"\r\n\n.\r\n", b"\r\n.\r\0\n", b"\r\0\n.\r\n",
    b"\n\0.\r\n", b"\0\n.\n\0", b"\r\n.\0\n", b"\r\n\0.\n", b"\n.\n.\n.\n", b"\n..\n", b"\r\r.\r\r",
    b"\n\n.\n\n", b"\r\0\n.\r\0\n", b"\r\n.\r\r\r\n"])
def test_nothing_is_smuggled(server, pieces, false_end):
    """Refused once, at the real end, and nothing before it is taken for a command."""
    with server.client() as client, server.client() as pacer:
        begin(client)
        send_pieces(client, pacer, pieces(b"Subject: x\r\n\r\ntext" + false_end + SMUGGLED + END + b"VRFY nour\r\n"))
        assert client.reply().startswith(BARE)
        assert client.reply().startswith("252")
        assert client.say("DATA") == "503 5.5.1 Error: need MAIL command"
    assert server.tmp() == server.queue() == []


@pytest.mark.parametrize("pieces", [whole, octets])
@pytest.mark.parametrize("no_end", [
    b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\0\r\n\0.\0\r\n\0", b"\r\n. \r\n", b"\r\n .\r\n", b"\r\n.\t\r\n", b"\r\n..\r\n",
    b"\r\n.\x1a\r\n", b"\v.\v", b"\f.\f", b"\r\n\xae\r\n", b"\x8d\x8a.\x8d\x8a", "\x85.\x85".encode(),
    "\u2028.\u2028".encode()])
def test_what_only_looks_like_an_end(world, pieces, no_end):
    """It has no bare CR or LF: it is text like other text, and one message arrives."""
    content = b"Subject: x\r\n\r\ntext" + no_end + SMUGGLED + b"\r\n"
    with world.relay.client() as client, world.relay.client() as pacer:
        begin(client)
        send_pieces(client, pacer, pieces(content + b".\r\n"))
        assert client.reply().startswith(QUEUED)
        assert client.say("DATA") == "503 5.5.1 Error: need MAIL command"
    assert arrived(world.exchanger) == [stuffed(re.sub(rb"(\A|\r\n)\.", rb"\1", content))]


@pytest.mark.parametrize("content", [
    b"\n", b"\r", b"\nSubject: x", b"\rSubject: x", b"Sub\nject: x", b"Subject: x\n", b"Subject: x\r", b"a\r\r", b"\r\n\n",
    b"\r\n\r", b"x\r\n" * 50000 + b"\n", b"x" * 70000 + b"\ry", b"x" * 70000 + b"\r\r\nx", b"x" * 65535 + b"\n",
    b"\n" + b"x\r\n" * 50000, b".\nx", b".\rx", b"..\n", b"..\r"])
def test_a_bare_cr_or_lf_anywhere(client, content):
    begin(client).send(content + END)
    assert client.reply().startswith(BARE)
    assert client.say("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("octet", [b"\r", b"\n"])
def test_a_bare_cr_or_lf_at_the_end_of_a_read(server, octet, at):
    content = b"abc\r\n.d\r\n"
    stream = content[:at] + octet + content[at:] + END
    with server.client() as client, server.client() as pacer:
        for place in range(len(stream)):
            begin(client)
            send_pieces(client, pacer, cut_at(place)(stream))
            assert client.reply().startswith(BARE)


def is_bare(content):
    return re.search(rb"(?<!\r)\n|\r(?!\n)", content) is not None


def test_random_messages_in_random_pieces(world):
    """Against the rule in one line: the end is the first CRLF.CRLF, behind the CRLF of DATA."""
    chance = random.Random(5321)
    kept = []
    with world.relay.client() as client, world.relay.client() as pacer:
        for _ in range(300):
            few = chance.choice([[b"\r\n", b".", b"a"], [b"\r\n", b".", b"\r", b"\n", b"a", b"\0"]])
            stream = b"".join(chance.choices(few, k=chance.randrange(30)))
            end = (b"\r\n" + stream + END).find(END) + len(END) - 2
            stream = (stream + END)[:end]
            content = stream[:-3]
            begin(client)
            send_pieces(client, pacer, cut_at(*sorted(chance.choices(range(len(stream)), k=3)))(stream))
            reply = client.reply()
            assert reply.startswith(BARE if is_bare(content) else QUEUED), (stream, reply)
            if not is_bare(content):
                kept.append(re.sub(rb"(\A|\r\n)\.", rb"\1", content))
    assert len(kept) > 30
    world.exchanger.wait_for_messages(len(kept))
    assert sorted(map(stuffed, kept)) == sorted(arrived(world.exchanger, len(kept)))


@pytest.mark.parametrize("limit, content, reply", [
    (100, b"x" * 200 + b"\r\n" + SMUGGLED, TOO_BIG),
    (0, b"Received: x\r\n" * 100 + b"\r\n" + SMUGGLED, LOOP)])
def test_nothing_inside_any_refused_message_is_answered(relay, limit, content, reply):
    server = relay("-m", limit)
    with server.client() as client:
        begin(client).send(content + b"\r\n..\r\n.\r\x20\n.\n" + SMUGGLED + END + b"VRFY nour\r\n")
        assert client.reply().startswith(reply)
        assert client.reply().startswith("252")
    assert server.tmp() == server.queue() == []


# ---- LF sessions ------------------------------------------------------------------------------


LF_SESSION = ("HELO me.com\nMAIL FROM:<a@example.org>\nRCPT TO:<b@example.net>\nDATA\n"
              "Subject: x\n\n.a\n..b\nc\n.\nQUIT\n").encode()
LF_CODES = ["250", "250", "250", "354", "250", "221"]


@pytest.mark.parametrize("stream", [LF_SESSION, LF_SESSION.replace(b"\n", b"\r\n").replace(b"\r\n", b"\n", 1),
                                    LF_SESSION.replace(b"b\nc", b"b\r\nc")])
@pytest.mark.parametrize("pieces", [whole, octets])
def test_a_session_whose_first_line_ends_in_lf(world, pieces, stream):
    """LF ends every line then, with a CR before it or without; what leaves has CRLFs."""
    with world.relay.client() as client, world.relay.client() as pacer:
        send_pieces(client, pacer, pieces(stream))
        assert [client.reply()[:3] for _ in LF_CODES] == LF_CODES
        assert client.eof()
    assert arrived(world.exchanger) == [b"Subject: x\r\n\r\na\r\n..b\r\nc\r\n"]


@pytest.mark.parametrize("content", [b"a\rb", b"a\r\r", b"\ra", b"a\n.\rb"])
def test_a_bare_cr_in_an_lf_session(client, content):
    begin(client, end="\n").send(content + b"\n.\n")
    assert client.reply().startswith(BARE)


@pytest.mark.parametrize("first", [b"NOOP\r\n", b"\r\n", b"x" * 5000 + b"\r\n"])
def test_only_the_first_line_makes_an_lf_session(client, first):
    """Later an LF is not even the end of a command."""
    client.send(first)
    assert client.reply()[:3] in ("250", "500")
    client.send(b"NOOP\nNOOP\nNOOP\r\n")
    assert client.reply().startswith("500 5.5.2 ")
    begin(client).send(b"text\n.\nQUIT\n" + END)
    assert client.reply().startswith(BARE)


# ---- What arrives ---------------------------------------------------------------------------


CONTENTS = [
    b"",
    b"\r\n",
    b"Dear Nour\r\n",                           # a body, and no header
    b"Subject: x\r\n",                          # a header, and no body
    b"Subject: x \r\n\t\r\n  \r\n \t \r\n",     # spaces
    b".\r\n..\r\n...\r\n. \r\n .\r\n.a\r\na.\r\n.\r\n\r\n.\r\n",
    b"\r\n" + bytes(octet for octet in range(256) if octet not in b"\r\n") + b"\r\n",
    b"\0Subject: x\0\r\n\r\n\0\0\r\n.\0\r\n\0.\r\n",
    "Subject: x\r\n\r\nGrüße, 你好, नूर\r\n".encode(),
    b"\r\n" * 5000,
    (b"x" * 998 + b"\r\n") * 300,              # as long as a line may be (RFC 5321 4.5.3.1.6)
    b"x" * 300000 + b"\r\n",                   # longer
    b"." * 300000 + b"\r\n" + b"." * 300000 + b"\r\n",
    b"\r\nMAIL FROM:<c@example.org>\r\nRCPT TO:<c@example.net>\r\nDATA\r\n.\r\n"     # what the spool is made of
    b"2026-11-23T11:08:19Z sent <b@example.net> mx1.example.net[192.0.2.1] 250 2.0.0 Ok\r\n",
    # Lines that end where one read of the server's may.
    *(b"x" * size + b"\r\n.a\r\n..\r\n" for size in range(65528, 65540)),
]


def test_what_arrives_is_what_was_sent(world):
    with world.relay.client() as client:
        for content in CONTENTS:
            begin(client).send(stuffed(content) + b".\r\n")
            assert client.reply().startswith(QUEUED), content[:80]
    assert sorted(arrived(world.exchanger, len(CONTENTS))) == sorted(map(stuffed, CONTENTS))


DOTS = (b"a\r\n..\r\n...b\r\n.c\r\n.0123456789abcdefg\r\n..0123456789abcdefg\r\n"
        b"0123456789abcdefg.\r\n0123456789abcdefg..x\r\n\r\n..\r\n.\r\n")


def test_dots_at_the_end_of_every_read(world):
    """A dot that hides nothing is taken off all the same (RFC 5321 4.5.2); one within a
    line is no dot at its beginning, though a read begins with it."""
    with world.relay.client() as client, world.relay.client() as pacer:
        for place in range(len(DOTS)):
            begin(client)
            send_pieces(client, pacer, cut_at(place)(DOTS))
            assert client.reply().startswith(QUEUED), place
        begin(client)
        send_pieces(client, pacer, octets(DOTS))
        assert client.reply().startswith(QUEUED)
    expected = (b"a\r\n..\r\n...b\r\nc\r\n0123456789abcdefg\r\n..0123456789abcdefg\r\n"
                b"0123456789abcdefg.\r\n0123456789abcdefg..x\r\n\r\n..\r\n")
    assert set(arrived(world.exchanger, len(DOTS) + 1)) == {expected}


@pytest.mark.parametrize("said, sent", [
    *((line, line) for line in (b"..\r\n", b"...\r\n", b"..x\r\n", b"\r\n..\r\n", b"x\r\n..\r\n", b"x.\r\n",
                              b"x" * 20 + b".\r\n", b"x" * 20 + b"..\r\n")),
    (b".x\r\n", b"x\r\n"), (b".x\r\n..\r\n", b"x\r\n..\r\n")])
def test_dots_wherever_a_block_ends(world, said, sent):
    """65,536 octets are read, and sent, at once.  There are so many of the same few lines,
    and shifted by so much, that each octet of theirs comes to stand at the end."""
    count = 200000 // len(said)
    with world.relay.client() as client:
        for shift in range(len(said)):
            begin(client).send(b"x" * shift + b"\r\n" + said * count + b".\r\n")
            assert client.reply().startswith(QUEUED)
    assert sorted(arrived(world.exchanger, len(said))) == sorted(
        b"x" * shift + b"\r\n" + sent * count for shift in range(len(said)))
    assert [message.reverse_path for message in world.exchanger.messages] == [
        f"<a@example.org> SIZE={len(message.data)} BODY=8BITMIME" for message in world.exchanger.messages]


def test_several_megabytes(world):
    line = bytes(octet for octet in range(256) if octet not in b"\r\n.") * 3
    content = b"Subject: large\r\n\r\n" + b"".join(b"%d " % n + line + b"\r\n.\r\n" for n in range(10000))
    with world.relay.client() as client:
        begin(client).send(stuffed(content) + b".\r\n")
        assert client.reply().startswith(QUEUED)
    raw, = arrived(world.exchanger)
    assert len(raw) > 7000000 and raw == stuffed(content)


# ---- Size (RFC 1870 5) --------------------------------------------------------------------------


def sized(size):
    """Messages of `size` octets, as RFC 1870 counts: CRLFs count, and of doubled dots one."""
    yield b"x" * (size - 2) + b"\r\n"
    yield b"\r\n" * (size // 2 - 1) + b"x" * (size % 2) + b"\r\n"
    yield b"x" * (size - 4) + b"\r\n\r\n"
    yield stuffed(b"." * (size - 2) + b"\r\n")
    yield stuffed(b".\r\n" * ((size - 10) // 3) + b"." * ((size - 10) % 3 + 8) + b"\r\n")
    yield b".x" + b"y" * (size - 3) + b"\r\n"


@pytest.mark.parametrize("limit", [1000, 70001])
@pytest.mark.parametrize("excess, reply", [(0, QUEUED), (1, TOO_BIG), (2, TOO_BIG), (100000, TOO_BIG)])
def test_size_limit_is_exact(relay, limit, excess, reply):
    server = relay("-m", limit)
    for content in sized(limit + excess):
        with server.client() as client, server.client() as pacer:
            for cut in (0, 1, limit - 1, len(content) - 1, len(content), len(content) + 1):
                begin(client)
                send_pieces(client, pacer, cut_at(cut)(content + b".\r\n"))
                assert client.reply().startswith(reply)
                assert client.say("NOOP") == "250 2.0.0 Ok"


def test_a_message_that_is_too_big_leaves_the_disk_at_once(relay):
    server = relay("-m", 1000)
    with server.client() as client, server.client() as pacer:
        begin(client)
        assert len(server.tmp()) == 1
        send_pieces(client, pacer, [b"x" * 1001])
        assert server.tmp() == []
        client.send(END)
        assert client.reply().startswith(TOO_BIG)


def test_no_size_limit(world, relay, tmp_path):
    server = relay("-m", 0, mx_port=world.exchanger.port, spool=tmp_path / "other")
    content = (b"x" * 998 + b"\r\n") * 4000
    with server.client() as client:
        begin(client).send(content + b".\r\n")
        assert client.reply().startswith(QUEUED)
    assert arrived(world.exchanger) == [content]


# ---- Loops (RFC 5321 6.3) --------------------------------------------------------------------------


@pytest.mark.parametrize("content, reply", [
    (b"Received: x\r\n" * 99, QUEUED),
    (b"Received: x\r\n" * 100, LOOP),
    (b"rEcEiVeD:x\r\n" * 100, LOOP),
    (b"Received: from a\r\n\tby b;\r\n\tMon, 23 Nov 2026 11:08:19 +0000\r\n" * 99, QUEUED),
    (b"Received: x\r\n" * 99 + b"X-Received: x\r\nReceived-SPF: pass\r\n Received: x\r\n", QUEUED),
    (b"Received: x\r\n" * 99 + b"\r\n" + b"Received: x\r\n" * 99, QUEUED),
    (b"Received: x\r\n" * 50 + b"Subject: x\r\n" + b"Received: x\r\n" * 50, LOOP)])
def test_a_hundred_received_lines_are_a_loop(relay, content, reply):
    with relay().client() as client:
        begin(client).send(content + b"\r\ntext" + END)
        assert client.reply().startswith(reply)
        assert client.say("NOOP") == "250 2.0.0 Ok"


# ---- The trace (RFC 5321 4.4) ----------------------------------------------------------------------


def received(message):
    """The Received field as Python's parser reads it, with one space for all folding."""
    parsed = email.message_from_bytes(message.data, policy=email.policy.SMTP)
    assert not parsed.defects
    field, = parsed.get_all("Received")
    assert not field.defects
    return re.sub(r"\s+", " ", field)


@pytest.mark.parametrize("greeting, name, protocol", [
    ("HELO me.com", "me.com", "SMTP"), ("EHLO me.com", "me.com", "ESMTP"), ("EHLO [127.0.0.1]", "[127.0.0.1]", "ESMTP"),
    ("EHLO " + "x" * 255, "x" * 255, "ESMTP"),
    # Nothing that would end a clause, begin a comment or quote what follows.
    ('HELO a(b)c;d"e\\f<g>,h', "a?b?c?d?e?f?g??h", "SMTP")])
def test_received_field(world, greeting, name, protocol):
    with world.relay.client() as client:
        begin(client, greeting=greeting).send(b"Subject: x\r\n\r\ntext" + END)
        id = client.reply().removeprefix(QUEUED)
        port = client.local_port
    message, = world.exchanger.wait_for_messages(1)
    words, semicolon, date = received(message).rpartition("; ")
    assert words == f"from {name} ([127.0.0.1]:{port}) by {HOSTNAME} with {protocol} id {id}"
    age = datetime.datetime.now(datetime.timezone.utc) - email.utils.parsedate_to_datetime(date)
    assert -2 < age.total_seconds() < 60
    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}", date)     # RFC 5322 3.3
    assert max(map(len, message.raw.split(b"\r\n"))) <= 998


def test_received_field_names_an_ipv6_client(world, relay, tmp_path, ipv6):
    server = relay(mx_port=world.exchanger.port, spool=tmp_path / "other", addresses=["::1"])
    with server.client() as client:
        begin(client).send(b"Subject: x\r\n\r\ntext" + END)
        assert client.reply().startswith(QUEUED)
        port = client.local_port
    message, = world.exchanger.wait_for_messages(1)
    assert received(message).startswith(f"from me.com ([IPv6:::1]:{port}) by {HOSTNAME} with SMTP id ")


def test_the_trace_is_put_before_all_others(world):
    content = b"Received: from elsewhere by here; Mon, 23 Nov 2026 11:08:19 +0000\r\nSubject: x\r\n\r\ntext\r\n"
    with world.relay.client() as client:
        begin(client).send(content + b".\r\n")
        assert client.reply().startswith(QUEUED)
    message, = world.exchanger.wait_for_messages(1)
    assert message.raw.startswith(b"Received: from me.com (")
    assert arrived(world.exchanger) == [content]
