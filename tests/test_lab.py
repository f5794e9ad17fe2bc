"""The lab itself.  Where one of these fails, no other result means anything."""
import smtplib
import socket
import struct
from pathlib import Path

import pytest

from lab import (RECURSION_AVAILABLE, RESPONSE, TO_QUESTION, TYPES, WATCHED, Client, Nameserver, encode_name, header,
                 loopback, query_id, question, record, transcript, wait_for)

# ---- DNS: whole packets asked and compared --------------------------------------------

OPT = struct.pack("!BHHIH", 0, 41, 1232, 0, 0)


@pytest.fixture
def ask(dns):
    """ask("example.net", "MX"): the answer's bytes, or None where none comes."""
    def ask(name, type, tcp=False, opt=b"", timeout=5):
        packet = query(name, type, opt)
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        host, port = dns.address.split(":")
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(timeout)
            sock.connect((host, int(port)))
            sock.send(struct.pack("!H", len(packet)) + packet if tcp else packet)
            try:
                if not tcp:
                    return sock.recv(65535)
                with sock.makefile("rb") as stream:
                    return stream.read(int.from_bytes(stream.read(2), "big"))
            except socket.timeout:
                return None
    return ask


def query(name, type, opt=b""):
    return header(0xABCD, 0x0100, additional=1 if opt else 0) + asked(name, type) + opt


def asked(name, type):
    return encode_name(name) + struct.pack("!HH", TYPES[type], 1)


def test_mx_is_compressed(dns, ask):
    dns.mx("example.net", (10, "mx1.example.net"), (20, "mx2.example.net"))
    assert ask("Example.NET", "MX") == (
        b"\xab\xcd\x81\x80\0\1\0\2\0\0\0\0"
        b"\7Example\3NET\0\0\x0f\0\1"
        b"\xc0\x0c\0\x0f\0\1\0\0\0\x3c\0\x08\0\x0a\3mx1\xc0\x0c"
        b"\xc0\x0c\0\x0f\0\1\0\0\0\x3c\0\x08\0\x14\3mx2\xc0\x0c")


def test_addresses_null_mx_and_chain(dns, ask):
    dns.a("mx.example.net", "192.0.2.1")
    dns.aaaa("mx.example.net", "2001:db8::1")
    dns.null_mx("example.org")
    dns.cname("www.example.net", "mx.example.net")
    address = record(TO_QUESTION, "A", bytes([192, 0, 2, 1]))
    assert ask("mx.example.net", "A").endswith(address)
    assert ask("mx.example.net", "AAAA").endswith(bytes.fromhex("20010db8000000000000000000000001"))
    assert ask("example.org", "MX").endswith(record(TO_QUESTION, "MX", b"\0\0\0"))
    chain = ask("www.example.net", "A")
    assert chain == (header(0xABCD, answers=2) + asked("www.example.net", "A")
                     + record(TO_QUESTION, "CNAME", b"\2mx\xc0\x10")
                     + record(b"\xc0\x2d", "A", bytes([192, 0, 2, 1])))      # the CNAME's target
    dns.cname("www.example.net", "mx.example.net", alone=True)
    assert ask("www.example.net", "A") == (header(0xABCD, answers=1) + chain[12:-len(address)])


def test_codes_and_edns(dns, ask):
    dns.a("mx.example.net", "192.0.2.1")
    dns.rcode("sick.example.net", 2)
    dns.rcode("empty.example.net", 0)
    for name, code in [("nobody.example.net", 3), ("mx.example.net", 0), ("empty.example.net", 0),
                       ("sick.example.net", 2)]:
        assert ask(name, "MX") == header(0xABCD, RESPONSE | code) + asked(name, "MX")
    assert ask("nobody.example.net", "MX", opt=OPT).endswith(OPT)
    assert [(q.name, q.type, q.transport, q.id, q.edns_size) for q in dns.queries[-2:]] == [
        ("sick.example.net", "MX", "udp", 0xABCD, None), ("nobody.example.net", "MX", "udp", 0xABCD, 1232)]


def test_authority_and_flags(dns, ask):
    dns.flags = RESPONSE & ~RECURSION_AVAILABLE
    dns.rcode("empty.example.net", 0)
    dns.authority("empty.example.net", ("example.net", "NS", "ns.example.net"), ("example.net", "SOA", "ns.example.net"),
                  type="MX")
    nameserver = b"\2ns\xc0\x12"                # behind "empty" in the question
    assert ask("empty.example.net", "MX") == (
        header(0xABCD, 0x8100, authority=2) + asked("empty.example.net", "MX")
        + record(b"\xc0\x12", "NS", nameserver)
        + record(b"\xc0\x12", "SOA", b"\xc0\x2f" b"\x0ahostmaster\xc0\x2f" + struct.pack("!5I", 1, 2, 3, 4, 5)))
    assert ask("empty.example.net", "A") == header(0xABCD, 0x8100) + asked("empty.example.net", "A")


def test_queries_with_opt_disliked(dns, ask):
    for name in "silent.example.net", "refuses.example.net":
        dns.a(name, "192.0.2.1")
    dns.dislike_opt("silent.example.net")
    dns.dislike_opt("refuses.example.net", 5)
    assert ask("silent.example.net", "A", opt=OPT, timeout=0.1) is None
    assert ask("refuses.example.net", "A", opt=OPT) == header(0xABCD, RESPONSE | 5) + asked("refuses.example.net", "A")
    for name in "silent.example.net", "refuses.example.net":
        assert ask(name, "A").endswith(bytes([192, 0, 2, 1]))


def test_truncated_over_udp_whole_over_tcp(dns, ask):
    many = [f"192.0.2.{n}" for n in range(100)]
    dns.a("many.example.net", *many)
    dns.a("told.example.net", "192.0.2.1")
    dns.truncate("told.example.net")
    for name, count in [("many.example.net", 100), ("told.example.net", 1)]:
        assert ask(name, "A") == header(0xABCD, RESPONSE | 0x0200) + asked(name, "A")
        assert ask(name, "A", tcp=True)[:12] == header(0xABCD, answers=count)
        assert dns.queries[-1].transport == "tcp"


def test_silence_delay_and_hostility(dns, ask):
    dns.a("mx.example.net", "192.0.2.1")
    dns.drop("mx.example.net", times=1)
    assert ask("mx.example.net", "A", timeout=0.1) is None
    assert ask("mx.example.net", "A") is not None
    dns.delay("mx.example.net", 0.2, type="AAAA")
    assert ask("mx.example.net", "AAAA", timeout=0.1) is None
    dns.raw("mx.example.net", lambda packet: header(query_id(packet) ^ 1) + question(packet))
    assert ask("mx.example.net", "A") == header(0xABCC) + asked("mx.example.net", "A")


def test_ipv6(ipv6):
    dns = Nameserver("::1")
    assert dns.address.startswith("[::1]:")
    dns.stop()


# ---- SMTP: the exchanger by way of a client that nobody here wrote -------------------------


def test_exchanger_takes_mail(exchangers):
    near, far = exchangers(2)
    assert near.port == far.port and near.host != far.host
    with smtplib.SMTP(near.host, near.port, "me.com") as client:
        client.sendmail("nour@example.org", ["a@example.net", "b@example.net"],
                        b"Subject: x\r\n\r\n.a\r\n..\r\n", ["BODY=8BITMIME"])
    message, = near.wait_for_messages(1)
    assert message.helo == "me.com"
    assert message.reverse_path.split() == ["<nour@example.org>", "size=22", "BODY=8BITMIME"]
    assert message.recipients == ["<a@example.net>", "<b@example.net>"]
    assert message.data == b"Subject: x\r\n\r\n.a\r\n..\r\n"
    assert message.raw == b"Subject: x\r\n\r\n..a\r\n...\r\n"
    assert message.connection.commands[0] == "ehlo me.com"
    assert message.connection.transcript[-1] == ("S", "221 2.0.0 Bye")
    assert not far.connections


def test_exchanger_plays_its_part(exchangers):
    mx, = exchangers(1)
    mx.set(replies={"EHLO": "502 5.5.1 no", "RCPT": ["451 4.7.1 later"], "DATA": b"354 bytes\r\n",
                    ("RCPT", "<b@example.net>"): lambda connection: "550 5.1.1 nobody"},
           drop_after=".", reset=True)
    transcript(Client(mx.port, mx.host, greeting=False), """
        S: 220 mx1.example.net ESMTP
        C: EHLO me.com
        S: 502 5.5.1 no
        C: HELO me.com
        S: 250 mx1.example.net
        C: MAIL FROM:<>
        C: RCPT TO:<a@example.net>
        C: RCPT TO:<b@example.net>
        C: RCPT TO:<a@example.net>
        C: DATA
        S: 250 ...
        S: 451 4.7.1 later
        S: 550 5.1.1 ...
        S: 250 ... Ok
        S: 354 bytes
        C: Subject: x
        C:
        C: .
        S: 250 2.0.0 Ok
        S: <close>
    """)
    assert [(m.recipients, m.raw) for m in mx.messages] == [(["<a@example.net>"], b"Subject: x\r\n\r\n")]
    commands, content = mx.connections[0].chunks[2:4]
    assert commands.startswith(b"MAIL") and commands.endswith(b"DATA\r\n")
    assert content.endswith(b"\r\n.\r\n")


def test_exchanger_knows_commands_in_any_case(exchangers):
    """RFC 5321 2.4; and with the blanks that 3.3 forbids."""
    mx, = exchangers(1)
    transcript(Client(mx.port, mx.host, greeting=False), """
        S: 220 mx1.example.net ESMTP
        C: helo me.com
        S: 250 mx1.example.net
        C: mail From: <Nour@example.org> BODY=8BITMIME
        C: Rcpt tO:	<B@example.net>
        C: RCPT TO<c@example.net>
        C: data
        S: 250 2.1.0 Ok
        S: 250 2.1.5 Ok
        S: 503 ...
        S: 354 ...
        C: .
        S: 250 2.0.0 Ok
    """)
    message, = mx.messages
    assert message.reverse_path == "<Nour@example.org> BODY=8BITMIME"
    assert message.recipients == ["<B@example.net>"]


def test_exchanger_counts_connections(exchangers):
    mx, = exchangers(1)
    mx.set(connection_limit=2)
    clients = [Client(mx.port, mx.host) for _ in range(3)]
    assert [client.greeting[:3] for client in clients] == ["220", "220", "421"]
    assert clients[2].eof()
    assert (len(mx.connections), len(mx.refused), mx.most) == (2, 1, 2)
    assert clients[0].say("QUIT").startswith("221 ")
    assert clients[0].eof()
    wait_for(lambda: Client(mx.port, mx.host).greeting.startswith("220 "))
    assert mx.most == 2


def test_exchanger_counts_recipients_of_a_transaction(exchangers):
    mx, = exchangers(1)
    mx.set(recipient_limit=2)
    with Client(mx.port, mx.host) as client:
        client.say("HELO me.com")
        for _ in range(2):
            client.say("MAIL FROM:<>")
            replies = [client.say(f"RCPT TO:<{name}@example.net>") for name in "abc"]
            assert [reply[:9] for reply in replies] == ["250 2.1.5", "250 2.1.5", "452 4.5.3"]
            client.say("RSET")


def test_exchanger_means_what_its_last_line_says(exchangers):
    mx, = exchangers(1)
    mx.set(replies={("RCPT", "<a@example.net>"): "250-2.1.5 Ok\n550 5.1.1 nobody",
                    ("RCPT", "<b@example.net>"): b"550-5.1.1 nobody\r\n250 2.1.5 Ok\r\n"})
    with Client(mx.port, mx.host) as client:
        client.say("HELO me.com")
        client.say("MAIL FROM:<>")
        assert client.say("RCPT TO:<a@example.net>") == "250-2.1.5 Ok\n550 5.1.1 nobody"
        client.say("RCPT TO:<b@example.net>")
        assert client.say("DATA").startswith("354 ")
        client.send(b".\r\n")
        client.reply()
    assert mx.messages[0].recipients == ["<b@example.net>"]


def test_exchanger_goes_and_comes_back(exchangers):
    mx, = exchangers(1)
    mx.set(stall_at="MAIL")
    client = Client(mx.port, mx.host)
    client.say("HELO me.com")
    client.send(b"MAIL FROM:<>\r\n")
    assert not client.eof(timeout=0.1)
    mx.stop()
    assert client.eof()
    wait_for(lambda: mx.connections[0].closed)
    with pytest.raises(ConnectionRefusedError):
        Client(mx.port, mx.host)
    mx.set(stall_at=None)
    mx.start()
    with Client(mx.port, mx.host) as client:
        assert client.deliver("a@example.org", ["b@example.net"], "Subject: x\n\n.\n") == "250 2.0.0 Ok"
    assert mx.messages[0].data == b"Subject: x\r\n\r\n.\r\n"


def test_transcript_shows_where_it_differs(exchangers):
    mx, = exchangers(1)
    with Client(mx.port, mx.host) as client, pytest.raises(AssertionError) as failure:
        transcript(client, """
            C: HELO me.com
            S: 250 <hostname>
        """)
    assert str(failure.value).endswith("\n  C: HELO me.com\n  S: 250 <hostname>  S: 250 mx1.example.net")


# ---- The relay ------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_what_an_attack_leaves_is_noticed(world):
    """Each thing that expect_unharmed() looks for, left behind on purpose."""
    server = world.relay

    def expect_harm(what):
        with pytest.raises(AssertionError, match=what):
            server.expect_unharmed(loopback(), timeout=0.5)

    server.expect_unharmed(loopback())
    with socket.create_connection(("127.0.0.1", server.port)):
        expect_harm(rf"has now Footprint\(descriptors={server.fresh.descriptors + 1}, ")
    for directory in "tmp", "queue":
        path = server.spool / directory / "x"
        path.touch()
        expect_harm(rf"in {directory}/ \[.*x")
        path.unlink()
    world.exchanger.set(stall_at="MAIL")
    server.send("b@example.net", sender="")
    expect_harm("has now .* children=2,")
    world.exchanger.stop()
    server.expect_unharmed(loopback())          # what is later is still owed
    assert len(server.queue()) == 1
    if not WATCHED:
        server.fresh = server.fresh._replace(memory=-server.MARGIN)
        expect_harm("its memory has grown")
    server.stop()
    expect_harm("it has ended with 0")
