"""The way out: who is chosen, what is said to him, and what his answers mean."""
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lab import HOSTNAME, Exchanger, children, loopback, transcript, wait_for

BODY = "Subject: x\n\nDear Nour\n"

hostile = pytest.mark.usefixtures("unharmed")       # for every test of an exchanger that means harm


def send(server, *recipients, body=BODY, sender=""):
    """A message from nobody, whose failures make no further message, unless said."""
    with server.client() as client:
        return client.deliver(sender, recipients, body)


def put(server, to):
    """The same, where we do not get to the server."""
    path = server.spool / "20261123T110819.123456-54321-1f3a"
    path.write_bytes(f"HELO me.com\r\nMAIL FROM:<>\r\nRCPT TO:<{to}>\r\nDATA\r\n\r\nx\r\n.\r\n".encode())
    owner = (server.spool / "queue").stat()
    os.chown(path, owner.st_uid, owner.st_gid)
    path.rename(server.spool / "queue" / path.name)


def outcome(server, to):
    """The one line that the log has on the recipient."""
    found, = server.outcomes(to)
    return found


def label(exchanger):
    """How log and spool name it."""
    return f"{exchanger.name}[{exchanger.host}]"


def wait_until_empty(server):
    wait_for(lambda: not server.queue(), what="an empty queue")


# ---- Who belongs together -----------------------------------------------------------------


def test_one_transaction_per_domain(dns, exchangers, relay):
    net, org = exchangers(2)
    dns.mail("example.net", (10, net))
    dns.mail("example.org", (10, org))
    server = relay(mx_port=net.port)
    send(server, "a@example.net", "c@example.org", "b@EXAMPLE.net", "d@Example.Org", "a@example.net")
    wait_until_empty(server)
    assert [message.recipients for message in net.messages] == [["<a@example.net>", "<b@EXAMPLE.net>"]]
    assert [message.recipients for message in org.messages] == [["<c@example.org>", "<d@Example.Org>"]]


def test_more_recipients_than_fit_a_transaction(world):
    """RFC 5321 4.5.3.1.8: a server has to take 100, and need not take more."""
    recipients = [f"b{n}@example.net" for n in range(250)]
    send(world.relay, *recipients)
    messages = world.exchanger.wait_for_messages(3)
    assert [len(message.recipients) for message in messages] == [100, 100, 50]
    assert [path for message in messages for path in message.recipients] == [f"<{to}>" for to in recipients]
    assert len(world.exchanger.connections) == 1


@pytest.mark.parametrize("extensions", [("PIPELINING",), ()], ids=["pipelined", "in lockstep"])
@pytest.mark.parametrize("refusal", ["RCPT", "DATA"])
def test_next_transaction_after_one_that_came_to_nothing(world, extensions, refusal):
    """What was begun has to be taken back (RSET), or the next MAIL is out of place."""
    times = 100 if refusal == "RCPT" else 1
    world.exchanger.set(extensions=extensions, replies={refusal: ["550 5.1.1 nobody"] * times})
    send(world.relay, *(f"b{n}@example.net" for n in range(101)))
    assert outcome(world.relay, "b0@example.net").status == "failed"
    assert outcome(world.relay, "b100@example.net").status == "sent"
    message, = world.exchanger.messages
    assert message.recipients == ["<b100@example.net>"]


@pytest.mark.parametrize("domains", [2, 12])
def test_dead_domain_delays_no_other(dns, exchangers, relay, domains):
    dead, live = exchangers(2)
    dead.set(stall_at="CONNECT")
    dns.mail("d0.example.net", (10, dead))
    for n in range(1, domains):
        dns.mail(f"d{n}.example.net", (10, live))
    server = relay("-w", "15", mx_port=live.port)
    send(server, *(f"b@d{n}.example.net" for n in range(domains)))
    live.wait_for_messages(domains - 1, timeout=10)
    assert not server.logged("d0.example.net")


def test_exchanger_that_never_answers_delays_no_other_message(dns, exchangers, relay):
    dead, live = exchangers(2)
    dead.set(stall_at="CONNECT")
    dns.mail("example.org", (10, dead))
    dns.mail("example.net", (10, live))
    server = relay(mx_port=live.port)
    with server.client() as client:
        for n in range(3):
            client.deliver("", ["b@example.org"], BODY)
        client.deliver("", ["b@example.net"], BODY)
    live.wait_for_messages(1)
    wait_for(lambda: len(dead.connections) == 3)
    assert not server.logged("b@example.org")


# ---- Preference -----------------------------------------------------------------------------


def test_preference(dns, exchangers, relay):
    """RFC 5321 5.1: the next preference only when nobody of this one is left."""
    first, second, third = exchangers(3)
    dns.mail("example.net", (30, third), (10, first), (20, second))
    first.set(greeting_delay=0.1)
    server = relay(mx_port=first.port)
    for mx in (first, second, third):
        send(server, "b@example.net")
        mx.wait_for_messages(1)
        mx.stop()
    assert [len(mx.connections) for mx in (first, second, third)] == [1, 1, 1]


def test_all_equals_before_the_next_preference(dns, exchangers, relay):
    one, other, gone, next_one = exchangers(4)
    dns.mail("example.net", (10, one), (10, other), (10, gone), (20, next_one))
    gone.stop()
    one.set(replies={"RCPT": "451 4.7.1 later"})
    other.set(replies={"MAIL": "451 4.7.1 later"})
    server = relay(mx_port=one.port)
    send(server, "b@example.net")
    next_one.wait_for_messages(1)
    for mx in (one, other):
        assert "EHLO " + HOSTNAME in mx.connections[-1].commands
        assert mx.connections[-1].commands[-1] == "QUIT"


def test_who_said_yes_at_one_exchanger_is_not_taken_to_the_next(dns, exchangers, relay):
    first, second = exchangers(2)
    dns.mail("example.net", (10, first), (20, second))
    first.set(replies={("RCPT", "<b@example.net>"): "451 4.7.1 later", ("RCPT", "<c@example.net>"): "550 5.1.1 no"})
    server = relay(mx_port=first.port)
    send(server, *(f"{name}@example.net" for name in "abcd"))
    second.wait_for_messages(1)
    assert first.messages[0].recipients == ["<a@example.net>", "<d@example.net>"]
    assert second.messages[0].recipients == ["<b@example.net>"]
    assert outcome(server, "b@example.net").relay == label(second)
    assert outcome(server, "c@example.net").relay == label(first)


@hostile
def test_at_most_ten_exchangers(dns, exchangers, relay):
    many = exchangers(12)
    dns.mail("example.net", *enumerate(many))
    for mx in many:
        mx.set(replies={"CONNECT": "421 4.3.2 closed"})
    server = relay(mx_port=many[0].port)
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == "later"
    tries = [len(mx.connections) for mx in many]
    assert min(tries[:10]) == max(tries[:10]) > 0 and tries[10:] == [0, 0]


@hostile
def test_at_most_twenty_addresses(world):
    """Nobody listens at them: what the relay tried is in its log."""
    world.dns.mx("example.net", (10, "mx1.example.net"), (10, "mx2.example.net"))
    for name in ("mx1.example.net", "mx2.example.net"):
        world.dns.a(name, *{loopback() for _ in range(15)})
    send(world.relay, "b@example.net")
    assert outcome(world.relay, "b@example.net").status == "later"
    race, = world.relay.logged(" race: (.*)")
    assert race[1].count("Connection refused") == 20


def test_same_address_by_two_names_is_tried_once(dns, exchangers, relay):
    mx, = exchangers(1)
    dns.mx("example.net", (10, "mx1.example.net"), (20, "mx2.example.net"))
    dns.a("mx1.example.net", mx.host)
    dns.a("mx2.example.net", mx.host)
    mx.set(replies={"MAIL": "451 4.7.1 later"})
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == "later"
    assert len(mx.connections) == 1


# ---- The race among equals ----------------------------------------------------------------------


def test_lowest_latency_wins(dns, exchangers, relay):
    far, near, worse = exchangers(3)
    dns.mail("example.net", (10, far), (10, near), (20, worse))
    far.set(greeting_delay=0.05)
    server = relay(mx_port=near.port)
    with server.client() as client:
        for n in range(100):
            client.deliver("", ["b@example.net"], BODY)
            wait_for(lambda: len(near.messages) + len(far.messages) > n)
        assert len(near.messages) >= 95
        near.stop()
        sent = len(far.messages)
        for n in range(3):
            client.deliver("", ["b@example.net"], BODY)
        far.wait_for_messages(sent + 3)
    assert not worse.connections


def test_what_was_measured_is_logged(dns, exchangers, relay):
    near, far, silent, refusing, gone = exchangers(5)
    dns.mail("example.net", *((10, mx) for mx in (far, near, silent, refusing, gone)))
    near.set(greeting_delay=0.2)
    far.set(greeting_delay=60)
    silent.set(stall_at="CONNECT")
    refusing.set(replies={"CONNECT": "554-5.7.1 go\n554 away"})
    gone.stop()
    server = relay(mx_port=near.port)
    send(server, "b@example.net")
    near.wait_for_messages(1)
    id = outcome(server, "b@example.net").id
    line = server.wait_for_log(rf"^{id} race: (.*)$")[1]
    took = re.sub(r"\d+\.\d\d(?=ms)", "#", line)
    assert took == (
        f"{label(far)} handshake=#ms greeting=-; {label(near)} handshake=#ms greeting=#ms; "
        f"{label(silent)} handshake=#ms greeting=-; {label(refusing)} handshake=#ms (554 5.7.1 go away); "
        f"{label(gone)} (4.4.1 Connection refused)")
    handshake, greeting = re.search(r" handshake=([\d.]+)ms greeting=([\d.]+)ms", line).groups()
    assert float(handshake) < 200 <= float(greeting) < 20000


@pytest.mark.parametrize("no", ["421 4.3.2 closed", "554 5.7.1 go away", b"\r\n"])
def test_first_to_answer_wins_only_with_a_greeting(dns, exchangers, relay, no):
    first, second = exchangers(2)
    dns.mail("example.net", (10, first), (10, second))
    first.set(replies={"CONNECT": no})
    second.set(greeting_delay=0.2)
    send(relay(mx_port=first.port), "b@example.net")
    second.wait_for_messages(1)


def test_loser_that_has_not_greeted_is_left_without_a_word(dns, exchangers, relay):
    """To talk before the greeting is a fault (RFC 5321 3.1)."""
    near, far = exchangers(2)
    dns.mail("example.net", (10, far), (10, near))
    far.set(stall_at="CONNECT")
    send(relay(mx_port=near.port), "b@example.net")
    near.wait_for_messages(1)
    connection, = wait_for(lambda: far.connections)
    wait_for(lambda: connection.closed)
    assert connection.chunks == []


def test_loser_that_has_greeted_is_told_quit(dns, exchangers, relay):
    """The relay is stopped while both greet, and so finds both greetings at once."""
    pair = exchangers(2)
    dns.mail("example.net", *((10, mx) for mx in pair))
    now = threading.Event()
    for mx in pair:
        mx.set(replies={"CONNECT": lambda connection: now.wait(20) and None})
    server = relay(mx_port=pair[0].port)
    send(server, "b@example.net")
    wait_for(lambda: pair[0].connections and pair[1].connections)
    os.killpg(server.pid, signal.SIGSTOP)
    now.set()
    wait_for(lambda: all(mx.connections[0].transcript for mx in pair))
    os.killpg(server.pid, signal.SIGCONT)
    winner, = wait_for(lambda: [mx for mx in pair if mx.messages])
    loser, = (mx for mx in pair if mx is not winner)
    wait_for(lambda: loser.connections[0].closed)
    assert loser.connections[0].commands == ["QUIT"]


@pytest.mark.parametrize("slow", [0, 1], ids=["IPv4 slow", "IPv6 slow"])
def test_families_race(dns, exchangers, relay, ipv6, slow):
    both = exchangers(1, "::1")
    dns.mx("example.net", (10, "mx.example.net"))
    dns.a("mx.example.net", both[0].host)
    dns.aaaa("mx.example.net", both[1].host)
    both[slow].set(greeting_delay=60)
    server = relay(mx_port=both[0].port)
    send(server, "b@example.net")
    both[1 - slow].wait_for_messages(1)
    assert outcome(server, "b@example.net").relay == f"mx.example.net[{both[1 - slow].host}]"
    wait_for(lambda: both[slow].connections)


# ---- The dialogue -------------------------------------------------------------------------------


def test_pipelined(world):
    """RFC 2920 3.1: the envelope in one packet; the message is sent only after the 354."""
    send(world.relay, "a@example.net", "b@example.net", sender="nour@example.org")
    message, = world.exchanger.wait_for_messages(1)
    connection = message.connection
    wait_for(lambda: connection.closed)
    size = len(message.data)
    assert connection.transcript == [
        ("S", "220 mx1.example.net ESMTP"),
        ("C", f"EHLO {HOSTNAME}"),
        ("S", "250-mx1.example.net"), ("S", "250-PIPELINING"), ("S", "250-SIZE 10485760"), ("S", "250-8BITMIME"),
        ("S", "250 ENHANCEDSTATUSCODES"),
        ("C", f"MAIL FROM:<nour@example.org> SIZE={size}"), ("S", "250 2.1.0 Ok"),
        ("C", "RCPT TO:<a@example.net>"), ("S", "250 2.1.5 Ok"),
        ("C", "RCPT TO:<b@example.net>"), ("S", "250 2.1.5 Ok"),
        ("C", "DATA"), ("S", "354 End data with <CR><LF>.<CR><LF>"),
        ("C", "."), ("S", "250 2.0.0 Ok"),
        ("C", "QUIT"), ("S", "221 2.0.0 Bye")]
    hello, envelope, content, quit = connection.chunks
    assert hello == f"EHLO {HOSTNAME}\r\n".encode() and quit == b"QUIT\r\n"
    assert envelope == (f"MAIL FROM:<nour@example.org> SIZE={size}\r\nRCPT TO:<a@example.net>\r\n"
                        "RCPT TO:<b@example.net>\r\nDATA\r\n").encode()
    assert content == message.raw + b".\r\n"


def test_in_lockstep(world):
    """Each command waits for the reply to the one before."""
    world.exchanger.set(extensions=("8BITMIME",))
    send(world.relay, "a@example.net", "b@example.net")
    message, = world.exchanger.wait_for_messages(1)
    wait_for(lambda: message.connection.closed)
    assert message.connection.chunks == [
        f"EHLO {HOSTNAME}\r\n".encode(), b"MAIL FROM:<>\r\n", b"RCPT TO:<a@example.net>\r\n",
        b"RCPT TO:<b@example.net>\r\n", b"DATA\r\n", message.raw + b".\r\n", b"QUIT\r\n"]


@pytest.mark.parametrize("code", [500, 502, 504, 550])
def test_helo_where_ehlo_is_refused(world, code):
    """RFC 5321 3.2; what stands in the refusal is no offer."""
    world.exchanger.set(replies={"EHLO": f"{code}-5.5.1 no\n{code} SIZE 1"})
    send(world.relay, "b@example.net")
    message, = world.exchanger.wait_for_messages(1)
    assert message.connection.commands[:3] == [f"EHLO {HOSTNAME}", f"HELO {HOSTNAME}", "MAIL FROM:<>"]


EIGHT_BIT = "Subject: x\n\nGr\u00fc\u00dfe\n"


@pytest.mark.parametrize("extensions, parameters", [
    (("SIZE 10485760", "8BITMIME"), "SIZE=# BODY=8BITMIME"), (("size 10485760", "8BitMime"), "SIZE=# BODY=8BITMIME"),
    (("SIZE", "8BITMIME"), "SIZE=# BODY=8BITMIME"), (("SIZE 0", "8BITMIME"), "SIZE=# BODY=8BITMIME"),
    (("8BITMIME", "XSIZE 1", "SIZEX 1"), "BODY=8BITMIME")])
def test_parameters_where_offered(world, extensions, parameters):
    """RFC 1870 4: SIZE with 0 or without a number is an offer, too."""
    world.exchanger.set(extensions=extensions)
    send(world.relay, "b@example.net", body=EIGHT_BIT)
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path == "<> " + parameters.replace("#", str(len(message.data)))


def test_7_bit_content_is_not_called_8_bit(world):
    send(world.relay, "b@example.net")
    message, = world.exchanger.wait_for_messages(1)
    assert "BODY" not in message.reverse_path


def test_8_bit_content_without_8bitmime(world):
    """RFC 6152 3.  It is not converted here."""
    world.exchanger.set(extensions=("PIPELINING",))
    send(world.relay, "b@example.net", body=EIGHT_BIT)
    found = outcome(world.relay, "b@example.net")
    assert (found.relay, found.status, found.words[:6]) == (label(world.exchanger), "failed", "5.6.3 ")
    wait_for(lambda: world.exchanger.connections[0].commands == [f"EHLO {HOSTNAME}", "QUIT"])


def test_7_bit_content_declared_as_8_bit_needs_no_8bitmime(world):
    world.exchanger.set(extensions=())
    with world.relay.client() as client:
        for line in ("EHLO me.com", "MAIL FROM:<> BODY=8BITMIME", "RCPT TO:<b@example.net>", "DATA",
                     "Subject: x\r\n\r\n."):
            reply = client.say(line)
    assert reply.startswith("250 2.0.0 Ok: queued as ")
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path == "<>"


@pytest.mark.parametrize("missing, status", [(0, "sent"), (1, "failed")])
def test_size_that_the_exchanger_takes(world, missing, status):
    """RFC 1870 3: the dots that were doubled for the way do not count.  The spool says
    how large the message is; the limit of the exchanger is that, or an octet less."""
    def hello(connection):
        path, = world.relay.queue()
        content = path.read_bytes().partition(b"\r\nDATA\r\n")[2].partition(b"\r\n.\r\n")[0] + b"\r\n"
        return f"250-mx1.example.net\n250 SIZE {len(re.sub(rb'(?m)^[.]', b'', content)) - missing}"

    world.exchanger.set(replies={"EHLO": hello})
    send(world.relay, "b@example.net", body="Subject: x\n\n.one\n..two\n.\n")
    found = outcome(world.relay, "b@example.net")
    assert found.status == status
    connection, = world.exchanger.connections
    if status == "failed":
        assert found.words.startswith("5.3.4 ")
        wait_for(lambda: connection.commands == [f"EHLO {HOSTNAME}", "QUIT"])


@pytest.mark.parametrize("data, end", [
    ("354 go ahead", ["DATA", ".", "QUIT"]), ("554 5.5.1 nobody", ["DATA", "QUIT"]),
    ("451 4.3.0 no", ["DATA", "QUIT"])])
def test_all_recipients_are_refused_and_data_is_on_its_way(world, data, end):
    """RFC 2920 3.1: who says 354 all the same is given an empty message."""
    world.exchanger.set(replies={"RCPT": "550 5.1.1 nobody", "DATA": data})
    send(world.relay, "a@example.net", "b@example.net")
    for to in ("a@example.net", "b@example.net"):
        assert outcome(world.relay, to).words == "550 5.1.1 nobody"
    connection, = world.exchanger.connections
    wait_for(lambda: connection.closed)
    assert connection.commands[-len(end):] == end
    assert connection.chunks[2:] == [end_line.encode() + b"\r\n" for end_line in end[1:]]


@hostile
def test_yes_after_no(world):
    """Who refuses MAIL and says 354 all the same is told nothing more: it may take what comes
    for a message of whoever it thinks of."""
    world.exchanger.set(replies={"MAIL": "550 5.1.0 no", "RCPT": "550 5.1.1 no", "DATA": "354 go ahead"})
    send(world.relay, "b@example.net")
    found = outcome(world.relay, "b@example.net")
    assert (found.status, found.words) == ("failed", "550 5.1.0 no")
    connection, = world.exchanger.connections
    wait_for(lambda: connection.closed)
    assert connection.commands[-1] == "DATA" and not world.exchanger.messages


@hostile
def test_refusal_of_who_stops_reading(world, relay, tmp_path):
    """Its words are read though it keeps the connection."""
    def refuse(connection):
        connection.receive()
        connection.sock.sendall(b"552 5.3.4 too much\r\n")
        wait_for(lambda: server.logged("status=") or connection.closed)

    world.exchanger.set(extensions=(), replies={"BODY": refuse})
    server = relay("-w", "1", mx_port=world.exchanger.port, spool=tmp_path / "other")
    send(server, "b@example.net", body=LARGE)
    found = outcome(server, "b@example.net")
    assert (found.status, found.words) == ("failed", "552 5.3.4 too much")


def test_all_recipients_are_refused_in_lockstep(world):
    world.exchanger.set(extensions=(), replies={"RCPT": "550 5.1.1 nobody"})
    send(world.relay, "b@example.net")
    assert outcome(world.relay, "b@example.net").status == "failed"
    wait_for(lambda: world.exchanger.connections[0].commands[-2:] == ["RCPT TO:<b@example.net>", "QUIT"])


@pytest.mark.parametrize("extensions", [Exchanger.EXTENSIONS, ()], ids=["pipelined", "in lockstep"])
def test_every_recipient_has_an_outcome_of_its_own(world, extensions):
    """552 is too many recipients to an old server: RFC 5321 4.5.3.1.10."""
    world.exchanger.set(extensions=extensions, replies={("RCPT", "<a@example.net>"): "550 5.1.1 nobody",
                                                        ("RCPT", "<b@example.net>"): "451 4.7.1 later",
                                                        ("RCPT", "<d@example.net>"): "552 5.2.2 too many",
                                                        ".": "250 2.0.0 Ok: queued"})
    reply = send(world.relay, *(f"{name}@example.net" for name in "abcd"))
    id = reply.removeprefix("250 2.0.0 Ok: queued as ")
    wait_for(lambda: len(world.relay.logged(" to=<")) >= 4)
    assert sorted(re.sub(r"delay=\d+", "delay=#", match.string) for match in world.relay.logged("to=<")) == [
        f"{id} to=<{name}@example.net> relay={label(world.exchanger)} delay=# status={status} ({words})"
        for name, status, words in [
            ("a", "failed", "550 5.1.1 nobody"), ("b", "later", "451 4.7.1 later"),
            ("c", "sent", "250 2.0.0 Ok: queued"), ("d", "later", "552 5.2.2 too many")]]
    message, = world.exchanger.messages
    assert message.recipients == ["<c@example.net>"]


# ---- Where connections come from ------------------------------------------------------------------


@pytest.fixture
def both(dns, exchangers, ipv6):
    """Two exchangers of example.net: the preferred one has IPv6 and the other IPv4."""
    ipv4, ipv6 = exchangers(1, "::1")
    dns.mail("example.net", (10, ipv6), (20, ipv4))
    return ipv4, ipv6


def test_source(world, relay, tmp_path):
    source = loopback()
    server = relay("-b", source, mx_port=world.exchanger.port, spool=tmp_path / "other")
    send(server, "b@example.net")
    message, = world.exchanger.wait_for_messages(1)
    assert message.connection.client_host == source


def test_source_of_each_family(both, relay):
    ipv4, ipv6 = both
    source = loopback()
    server = relay("-b", "::1", "-b", source, mx_port=ipv4.port)
    ipv6.set(replies={"MAIL": "451 4.7.1 later"})
    send(server, "b@example.net")
    message, = ipv4.wait_for_messages(1)
    assert message.connection.client_host == source
    assert [connection.client_host for connection in ipv6.connections] == ["::1"]


@pytest.mark.parametrize("source, family", [("0.0.0.0", 0), ("127.0.0.1", 0), ("::", 1), ("::1", 1)])
def test_source_of_one_family_leaves_the_other_out(dns, both, relay, source, family):
    """As if DNS had not named it: not even as a fallback, and without a say in a refusal."""
    used, left_out = both[family], both[1 - family]
    dns.mail("example.net", (20, used), (10, left_out))
    used.set(replies={"MAIL": ["451 4.7.1 later"]})
    server = relay("-b", source, mx_port=used.port)
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").relay == label(used)
    used.set(replies={"CONNECT": "554 5.7.1 no PTR"})
    server.hangup_until(lambda: not server.queue())
    assert server.outcomes("b@example.net", 2)[-1].status == "failed"
    assert not left_out.connections


def test_trouble_with_the_family_that_is_left_out(dns, both, relay):
    """It does not matter whether DNS could have named more."""
    ipv4, _ = both
    ipv4.set(replies={"CONNECT": "554 5.7.1 no mail here"})
    dns.mail("example.net", (10, ipv4))
    dns.rcode(ipv4.name, 2, type="AAAA")
    server = relay("-b", "0.0.0.0", mx_port=ipv4.port)
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == "failed"


@pytest.mark.parametrize("to", ["b@example.net", "b@[IPv6:::1]", "b@example.org"])
def test_all_addresses_are_left_out(dns, exchangers, relay, ipv6, to):
    """That is the operator's to mend, who is told so: nothing is returned for it at once."""
    mx, = exchangers(0, "::1")
    dns.mail("example.net", (10, mx))
    dns.aaaa("example.org", "::1")
    server = relay("-b", "0.0.0.0", mx_port=mx.port)
    send(server, to)
    found = outcome(server, to)
    assert (found.relay, found.status) == ("-", "later")
    assert found.words == "4.4.4 there are only addresses of a family that -b leaves out"
    assert not mx.connections


@pytest.mark.parametrize("smarthost", ["mx1.example.net", "[::1]"])
def test_smarthost_that_is_left_out(dns, exchangers, relay, ipv6, smarthost):
    mx, = exchangers(0, "::1")
    dns.aaaa("mx1.example.net", "::1")
    server = relay("-b", "0.0.0.0", "-s", f"{smarthost}:{mx.port}")
    send(server, "b@example.org")
    assert outcome(server, "b@example.org").words.startswith("4.4.4 there are only addresses of a family that -b leaves")


def test_left_out_or_not_it_is_itself(dns, own, here, ipv6):
    """RFC 5321 5.1: who is not better than we are would send it back to us."""
    worse = Exchanger(loopback(), here[1], "worse.example.net")
    with contextlib.closing(worse):
        dns.mx("example.net", (10, "relay.example.org"), (20, worse.name))
        dns.aaaa("relay.example.org", "::1")
        dns.a(worse.name, worse.host)
        server = own("-b", "0.0.0.0", addresses=("::1",))
        server.stop()
        put(server, "b@example.net")
        server.start()
        expect_loop(server, "b@example.net")
        assert not worse.connections


def test_source_that_goes_and_comes_back(own_network, dns, exchangers, relay):
    """Until then mail waits, and says for what."""
    own_network("ip", "link", "set", "lo", "up")
    own_network("ip", "address", "add", "192.0.2.9/32", "dev", "lo")
    mx, = exchangers(1)
    dns.mail("example.net", (10, mx))
    server = relay("-b", "192.0.2.9", mx_port=mx.port)
    own_network("ip", "address", "del", "192.0.2.9/32", "dev", "lo")
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert found.status == "later"
    assert re.fullmatch(r"4\.4\.1 cannot connect from 192\.0\.2\.9 \(-b\): "
                        "(Cannot assign requested address|Address not available)", found.words)     # glibc, musl
    own_network("ip", "address", "add", "192.0.2.9/32", "dev", "lo")
    server.hangup_until(lambda: mx.messages)
    assert mx.messages[0].connection.client_host == "192.0.2.9"


# ---- Exchangers that take few recipients in a transaction ---------------------------------------
#
# RFC 5321 4.5.3.1.10: what it took is sent and recorded, and the others are asked for
# in another transaction on the same connection, as long as each gets somewhere.


LOCKSTEP = pytest.mark.parametrize("extensions", [Exchanger.EXTENSIONS, ()], ids=["pipelined", "in lockstep"])


def names(count):
    return [f"b{n}@example.net" for n in range(count)]


def asked_for(connection):
    """The recipients of each transaction, the refused ones included."""
    asked = []
    for command in connection.commands:
        if command.startswith("MAIL"):
            asked.append([])
        if command.startswith("RCPT"):
            asked[-1].append(command[len("RCPT TO:<"):-1])
    return asked


@LOCKSTEP
@pytest.mark.parametrize("limit, count", [(10, 100), (1, 8), (10, 250)])
@pytest.mark.parametrize("refusal", [
    "452 4.5.3 too many", "552 5.5.3 too many", "451-4.3.0 one domain\n451 4.3.0 in a transaction"])
def test_few_recipients_a_transaction(world, extensions, limit, count, refusal):
    world.exchanger.set(extensions=extensions, recipient_limit=limit, too_many=refusal)
    send(world.relay, *names(count))
    wait_until_empty(world.relay)
    connection, = world.exchanger.connections
    assert [len(message.recipients) for message in world.exchanger.messages] == [limit] * (count // limit)
    got = [path for message in world.exchanger.messages for path in message.recipients]
    assert sorted(got) == sorted(f"<{to}>" for to in names(count))
    assert len({message.raw for message in world.exchanger.messages}) == 1
    assert not world.relay.logged("status=(later|failed)")
    if "4.3.0" not in refusal:      # a limit of recipients is learned: nobody is asked for in vain twice
        assert sum(map(len, asked_for(connection))) == count + min(count, 100) - limit


def test_one_domain_a_transaction(dns, exchangers, relay):
    """As Google has it: 451 says nothing of a number."""
    def one_domain(connection):
        asked = [command for command in connection.commands if command[:4] in ("MAIL", "RCPT")]
        first = max(i for i, command in enumerate(asked) if command.startswith("MAIL")) + 1
        domains = {command.partition("@")[2] for command in (asked[first], asked[-1])}
        return None if len(domains) == 1 else "451 4.3.0 Multiple destination domains per transaction is unsupported."

    smarthost, = exchangers(1)
    smarthost.set(replies={"RCPT": one_domain})
    server = relay("-s", f"{smarthost.host}:{smarthost.port}")
    recipients = [f"{name}@{domain}.example.net" for name in "abc" for domain in ("x", "y", "z")]
    send(server, *recipients)
    wait_until_empty(server)
    assert [message.recipients for message in smarthost.messages] == [
        [f"<{name}@{domain}.example.net>" for name in "abc"] for domain in ("x", "y", "z")]
    assert len(smarthost.connections) == 1


@LOCKSTEP
@pytest.mark.parametrize("code, tries", [(451, 2), (452, 2), (552, 2), (450, 1), (550, 1)])
def test_who_is_refused_while_nothing_else_gets_on_waits(world, extensions, code, tries):
    """One refusal may be for want of room; two, the second with nobody else there, are not."""
    world.exchanger.set(extensions=extensions, replies={("RCPT", "<b0@example.net>"): f"{code} 4.2.2 mailbox full"})
    send(world.relay, *names(3))
    found = outcome(world.relay, "b0@example.net")
    assert (found.status, found.words) == ("failed" if code == 550 else "later", f"{code} 4.2.2 mailbox full")
    connection, = world.exchanger.connections
    wait_for(lambda: connection.closed)
    assert asked_for(connection) == [names(3), names(1)][:tries]
    assert [message.recipients for message in world.exchanger.messages] == [["<b1@example.net>", "<b2@example.net>"]]


@LOCKSTEP
def test_who_was_never_asked_for_is_asked_whatever_became_of_the_others(world, extensions):
    """250 recipients: the first hundred are refused, and not asked for again."""
    world.exchanger.set(extensions=extensions, replies={"RCPT": ["452 4.5.3 too many"] * 100})
    send(world.relay, *names(250))
    world.exchanger.wait_for_messages(2)
    connection, = world.exchanger.connections
    wait_for(lambda: connection.closed)
    assert asked_for(connection) == [names(100), names(200)[100:], names(250)[200:]]
    assert all(outcome(world.relay, to).status == "later" for to in names(100))


@LOCKSTEP
@pytest.mark.parametrize("key", ["DATA", "."])
@pytest.mark.parametrize("reply, status, transactions", [("451 4.3.0 no", "later", 1), ("554 5.6.0 no", "failed", 3)])
def test_message_that_is_refused_to_those_who_were_taken(world, extensions, key, reply, status, transactions):
    """After 4xx the transaction got nowhere.  5xx is final: it is heard for all of them in
    one try, so that the sender gets one report and not one after each back-off."""
    world.exchanger.set(extensions=extensions, recipient_limit=1, replies={key: reply})
    send(world.relay, *names(3), sender="nour@example.org")
    found = [outcome(world.relay, to) for to in names(3)]
    assert {each.status for each in found} == {status}
    assert found[0].words == reply
    connection, = world.exchanger.connections
    wait_for(lambda: connection.closed)
    assert len(asked_for(connection)) == transactions
    assert len(world.relay.logged("failures are reported to=")) == (status == "failed")


def test_what_is_sent_is_recorded_before_the_next_transaction(world):
    """However the next one ends, nobody gets the message twice."""
    records = []

    def look(connection):
        path, = world.relay.queue()
        records.append(re.findall(rb"Z (\w+) <(b\d)@", path.read_bytes()))

    world.exchanger.set(recipient_limit=2, replies={"MAIL": look})
    send(world.relay, *names(6))
    wait_until_empty(world.relay)
    assert records == [[], [(b"sent", b"b0"), (b"sent", b"b1")],
                       [(b"sent", b"b%d" % n) for n in range(4)]]


@LOCKSTEP
@pytest.mark.parametrize("end", ["421 4.7.0 enough", lambda connection: connection.hang_up(False)], ids=["421", "lost"])
def test_connection_that_ends_between_transactions(world, extensions, end):
    """What it took stays sent, and the others wait; in the next try they alone are asked for."""
    server = world.relay
    world.exchanger.set(extensions=extensions, recipient_limit=2, replies={"MAIL": [None, end]})
    send(server, *names(4))
    assert [outcome(server, to).status for to in names(4)] == ["sent", "sent", "later", "later"]
    server.hangup_until(lambda: not server.queue())
    assert [message.recipients for message in world.exchanger.messages] == [
        ["<b0@example.net>", "<b1@example.net>"], ["<b2@example.net>", "<b3@example.net>"]]


# ---- What the answers mean ------------------------------------------------------------------------
#
# The exchanger that misbehaves is the first for example.net, where another stands behind
# it, and the only one for example.org.


STAGES = ["CONNECT", "EHLO", "HELO", "MAIL", "RCPT", "DATA", "."]
BOTH = ("b@example.net", "b@example.org")


class Pair:
    def __init__(self, dns, exchangers, relay):
        self.bad, self.good = exchangers(2)
        self.dns = dns
        dns.mail("example.net", (10, self.bad), (20, self.good))
        dns.mail("example.org", (10, self.bad))
        self._relay = relay

    def start(self, *options):
        return self._relay(*options, mx_port=self.bad.port)

    def expect_next(self, *options):
        """The first is of no use now, and the message goes to the second.  Returns what
        became of it where there is none."""
        server = self.start(*options)
        send(server, *BOTH)
        assert self.good.wait_for_messages(1)[0].recipients == ["<b@example.net>"]
        found = outcome(server, "b@example.net")
        assert (found.relay, found.status) == (label(self.good), "sent")
        found = outcome(server, "b@example.org")
        assert (found.relay, found.status) == (label(self.bad), "later")
        return found


@pytest.fixture
def pair(dns, exchangers, relay):
    return Pair(dns, exchangers, relay)


def at(key, **behaviour):
    """The behaviour, and a dialogue that comes to the key."""
    if key == "HELO":
        behaviour["replies"] = {**behaviour.get("replies", {}), "EHLO": "502 5.5.1 no"}
    return behaviour


@pytest.mark.parametrize("stage", STAGES)
def test_4xx(pair, stage):
    pair.bad.set(**at(stage, replies={stage: "451-4.3.0 wait\n451 4.3.0 a while"}))
    assert pair.expect_next("-w", 3).words == "451 4.3.0 wait 4.3.0 a while"


@hostile
@pytest.mark.parametrize("stage", STAGES + ["BODY"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_lost_connection(pair, stage, reset):
    pair.bad.set(**at(stage, drop_at=stage, reset=reset))
    words = pair.expect_next().words
    # Who refuses EHLO and then hangs up has said why.  A reset may come before connect() has been seen to succeed.
    assert words.startswith("502 5.5.1 no" if stage == "HELO" else "4.4.2 connection lost at ") \
        or (stage == "CONNECT" and words.startswith("4.4.1 "))


@pytest.mark.parametrize("stage", ["MAIL", ("RCPT", "<a@example.org>"), ("RCPT", "<b@example.org>"), "DATA"])
@pytest.mark.parametrize("extensions", [("PIPELINING",), ("8BITMIME",)], ids=["pipelined", "in lockstep"])
def test_421_says_why_it_hangs_up(pair, stage, extensions):
    """RFC 5321 3.8: what was sent ahead, or is sent now, has no other answer."""
    pair.bad.set(replies={stage: "421-4.3.2 mx1\n421 4.3.2 is going down"}, drop_after=stage, extensions=extensions)
    server = pair.start()
    send(server, "a@example.org", "b@example.org")
    for to in "a@example.org", "b@example.org":
        found = outcome(server, to)
        assert (found.relay, found.status) == (label(pair.bad), "later")
        assert found.words == "421 4.3.2 mx1 4.3.2 is going down"


@pytest.mark.parametrize("stage", ["HELO", "MAIL", "RCPT", "DATA", "."])
def test_5xx(pair, stage):
    pair.bad.set(**at(stage, replies={stage: "554-5.7.1 no\n554 5.7.1 never"}))
    server = pair.start()
    send(server, *BOTH)
    for to in BOTH:
        found = outcome(server, to)
        assert (found.relay, found.status, found.words) == (label(pair.bad), "failed", "554 5.7.1 no 5.7.1 never")
    assert not pair.good.connections
    wait_until_empty(server)


@hostile
@pytest.mark.parametrize("others, status", [
    ([], "failed"), (["554 5.3.2 no"], "failed"), (["421 4.3.2 busy"], "later"), (["SERVFAIL"], "later"),
    (["gone"], "later"), (["220 mx"], "sent")], ids=["alone", "5xx", "4xx", "no address", "refused", "220"])
@pytest.mark.parametrize("preference", [10, 20], ids=["equal", "next"])
def test_5xx_greeting(dns, exchangers, relay, others, status, preference):
    """Failed when all say so, and not when there is one who did not."""
    first, *rest = exchangers(1 + len(others))
    dns.mail("example.net", (10, first), *((preference, mx) for mx in rest))
    first.set(replies={"CONNECT": "554 5.3.2 no mail here"})
    for mx, says in zip(rest, others):
        mx.set(replies={"CONNECT": says})
        if says == "gone":
            mx.stop()
        elif says == "SERVFAIL":
            dns.rcode(mx.name, 2)
    server = relay(mx_port=first.port)
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == status


# Replies whose lines differ in code: the last line says what is meant.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("before", [250, 354, 554])
def test_4xx_behind_another_code(pair, stage, before):
    pair.bad.set(**at(stage, replies={stage: f"{before}-mx1 welcomes you\n451-4.7.1 not\n451 4.7.1 now"}))
    server = pair.start()
    send(server, "b@example.org")
    assert outcome(server, "b@example.org").words == "451 4.7.1 not 4.7.1 now"
    path, = server.queue()
    assert path.read_bytes().endswith(b" 451 4.7.1 not 4.7.1 now\r\n")
    assert b"mx1 welcomes you" not in path.read_bytes()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "EHLO"])       # there HELO would follow
@pytest.mark.parametrize("before", [250, 354, 451])
def test_5xx_behind_another_code(pair, stage, before):
    """As postscreen has it in its greeting.  The sender reads why."""
    pair.bad.set(**at(stage, replies={stage: f"{before}-mx1.example.net ESMTP\n521 5.7.1 blocked using dnsbl"}))
    pair.dns.mail("example.com", (10, pair.good))
    server = pair.start()
    send(server, "b@example.org", sender="nour@example.com")
    found = outcome(server, "b@example.org")
    assert (found.status, found.words) == ("failed", "521 5.7.1 blocked using dnsbl")
    report, = pair.good.wait_for_messages(1)
    assert b"Diagnostic-Code: smtp; 521 5.7.1 blocked using dnsbl\r\n" in report.data
    assert b"ESMTP" not in report.data.partition(b"Diagnostic-Code")[2].partition(b"\r\n")[0]


def test_greeting_that_turns_into_a_refusal(pair):
    """Its first line alone wins no race: postscreen has the rest come six seconds later."""
    def greet(connection):
        connection.send(b"220-mx1.example.net ESMTP\r\n")
        wait_for(lambda: pair.good.connections)
        return "521 5.7.1 blocked using dnsbl"

    pair.bad.set(replies={"CONNECT": greet})
    pair.dns.mail("example.com", (10, pair.bad), (10, pair.good))
    server = pair.start()
    send(server, "b@example.com")
    assert outcome(server, "b@example.com").relay == label(pair.good)


@pytest.mark.parametrize("stage", STAGES)
def test_2xx_behind_another_code(world, stage):
    code = {"CONNECT": 220, "DATA": 354}.get(stage, 250)
    world.exchanger.set(**at(stage, replies={stage: f"451-4.7.1 wait\n554-5.7.1 no\n{code} 2.0.0 yes, after all"}))
    send(world.relay, "b@example.net")
    found = outcome(world.relay, "b@example.net")
    assert (found.status, found.words) == ("sent", "250 2.0.0 yes, after all" if stage == "." else "250 2.0.0 Ok")


NO_NETWORK = ["192.0.2.1", "198.51.100.1", "2001:db8::1"]      # the second by a route that says so


@pytest.fixture
def loopback_alone(own_network):
    """A network with nothing but loopback.  To be asked for before anything that has sockets."""
    own_network("ip", "link", "set", "lo", "up")
    return own_network


@pytest.fixture
def nowhere(loopback_alone):
    """A machine whose network does not lead to these addresses."""
    loopback_alone("ip", "route", "add", "unreachable", "198.51.100.0/24")
    return NO_NETWORK


@pytest.mark.parametrize("at", range(len(NO_NETWORK)), ids=NO_NETWORK)
@pytest.mark.parametrize("preference", [5, 10, 20], ids=["before", "equal", "behind"])
@pytest.mark.parametrize("says, status", [
    ("554 5.7.1 no mail here", "failed"), ("421 4.3.2 busy", "later"), (None, "later")], ids=["5xx", "4xx", "gone"])
def test_address_without_a_network(nowhere, dns, exchangers, relay, at, preference, says, status):
    """It has no say, and no share in the words: it is as if it had been left out."""
    mx, = exchangers(1)
    mx.set(replies={"CONNECT": says})
    if says is None:
        mx.stop()
    dns.mx("example.net", (10, mx.name), (preference, "far.example.net"))
    dns.a(mx.name, mx.host)
    (dns.aaaa if ":" in nowhere[at] else dns.a)("far.example.net", nowhere[at])
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.relay, found.status, found.words) == (label(mx), status, says or "4.4.1 Connection refused")


def test_address_of_a_family_that_is_switched_off(loopback_alone, dns, exchangers, relay):
    switch = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    if switch.exists():         # else this kernel never had IPv6
        switch.write_text("1")
    mx, = exchangers(1)
    mx.set(replies={"CONNECT": "554 5.7.1 no mail here"})
    dns.mail("example.net", (10, mx))
    dns.aaaa(mx.name, "2001:db8::1")
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.relay, found.status, found.words) == (label(mx), "failed", "554 5.7.1 no mail here")


def test_no_address_has_a_network(nowhere, dns, relay):
    """The machine may get one."""
    dns.mx("example.net", (10, "far.example.net"))
    dns.a("far.example.net", *(address for address in nowhere if "." in address))
    dns.aaaa("far.example.net", *(address for address in nowhere if ":" in address))
    server = relay()
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert found.status == "later"
    said = f"{found.relay} {found.words}".split("; ")       # of each address
    assert len(said) == len(nowhere)
    why = "Network (is )?unreachable|No route to host|Host is unreachable"      # of glibc, of musl
    assert all(re.fullmatch(rf"\S+ 4\.4\.1 ({why})", words) for words in said)


@hostile
@pytest.mark.parametrize("stage, reply", [
    ("CONNECT", "354 go ahead"), ("EHLO", "354 go ahead"), ("MAIL", "354 go ahead"), ("RCPT", "354 go ahead"),
    ("DATA", "250 2.0.0 Ok"), (".", "354 go ahead")])
def test_reply_out_of_place(pair, stage, reply):
    """Neither yes nor no; and without a 354 nothing of the message is sent."""
    pair.bad.set(extensions=(), replies={stage: reply})
    assert pair.expect_next("-w", "1").words == reply
    assert not pair.bad.messages or stage == "."


@hostile
@pytest.mark.parametrize("way", [
    {"drop_after": "."}, {"drop_after": ".", "reset": True}, {"drop_at": "QUIT"}, {"drop_at": "QUIT", "reset": True},
    {"stall_at": "QUIT"}, {"replies": {"QUIT": "500 5.5.1 what"}}, {"replies": {"QUIT": b"\0"}}], ids=str)
def test_delivered_is_delivered(pair, way):
    """At the 250, whatever comes behind it; and it is not sent again."""
    pair.bad.set(**way)
    server = pair.start("-w", "1")
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.relay, found.status, found.words) == (label(pair.bad), "sent", "250 2.0.0 Ok")
    wait_until_empty(server)
    assert len(pair.bad.messages) == 1 and not pair.good.connections


def test_delivered_is_recorded_before_quit(pair):
    pair.bad.set(stall_at="QUIT")
    server = pair.start()
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == "sent"
    assert not pair.bad.connections[0].closed
    assert not server.queue()


@hostile
def test_refused_while_the_message_is_on_its_way(world):
    """Who hangs up may have said why before."""
    def refuse(connection):
        connection.reply("552 5.3.4 too much")
        connection.hang_up(reset=False)

    world.exchanger.set(extensions=("PIPELINING",), replies={"BODY": refuse})
    send(world.relay, "b@example.net", body=LARGE)
    found = outcome(world.relay, "b@example.net")
    assert (found.status, found.words) == ("failed", "552 5.3.4 too much")


# ---- Silence, noise and lies -----------------------------------------------------------------------


@contextlib.contextmanager
def unconnectable(host, port):
    """An address that takes no connection and refuses none: whoever is served there
    does not accept, and the queue before him is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        yield


@pytest.fixture
def side_by_side(dns, exchangers, relay):
    """Many exchangers, each with a domain of its own, and behind each of them the same
    one that is good.  One message goes to all, waits for nobody longer than a second,
    and so comes to the good one once per domain."""
    def side_by_side(behaviours, context=lambda *_: contextlib.nullcontext()):
        good, nobody, *bad = exchangers(2 + len(behaviours))
        nobody.stop()
        for mx, behaviour in zip(bad, behaviours):
            mx.set(**behaviour)
        for mx in (nobody, *bad):
            dns.mail(f"{mx.name}.net", (10, mx), (20, good))
        server = relay("-w", "1", mx_port=good.port)
        with context(nobody.host, nobody.port):
            send(server, *(f"b@{mx.name}.net" for mx in (nobody, *bad)))
            wait_until_empty(server)
        wait_for(lambda: len(server.logged(" status=sent ")) == 1 + len(bad))
        assert len(good.messages) == 1 + len(bad)
    return side_by_side


@hostile
def test_silence(side_by_side):
    side_by_side([at(stage, stall_at=stage) for stage in STAGES], unconnectable)


@hostile
def test_silence_in_the_middle_of_the_message(pair):
    pair.bad.set(stall_at="BODY", extensions=())
    pair.good.set(extensions=())
    server = pair.start("-w", "1")
    send(server, "b@example.net", body=LARGE)
    message, = pair.good.wait_for_messages(1)
    assert message.data.endswith(LARGE)


@hostile
def test_hung_up_on_in_the_middle_of_the_message(pair):
    """By FIN and then RST: to write on is what SIGPIPE is about, which would end the forwarder,
    and nobody would know why."""
    def leave(connection):
        connection.send(b"354 go ahead\r\n")
        connection.sock.shutdown(socket.SHUT_WR)
        connection.hang_up(reset=True)

    pair.bad.set(replies={"DATA": leave}, extensions=())
    pair.good.set(extensions=())        # no SIZE, which LARGE is beyond
    server = pair.start()
    send(server, *BOTH, body=LARGE)
    assert outcome(server, "b@example.net").relay == label(pair.good)
    assert outcome(server, "b@example.org").words == "4.4.2 connection lost at the message"
    assert pair.good.messages[0].data.endswith(LARGE)
    assert not server.logged("died of signal")


@pytest.mark.parametrize("stage, seconds", [
    ("CONNECT", 300), ("MAIL", 300), ("RCPT", 300), ("DATA", 120), ("BODY", 180), (".", 600)])
def test_default_times(world, strace, stage, seconds):
    """Those of RFC 5321 4.5.3.2.  Nobody waits for them to pass: what select() is told is seen."""
    world.exchanger.set(stall_at=stage, extensions=())
    with strace(world.relay.pid, "trace=connect,select,pselect6,write,sendto") as trace:
        send(world.relay, "b@example.net", body=LARGE if stage == "BODY" else b"Subject: x\r\n")
        forwarder = wait_for(lambda: re.search(rf"^(\d+) +connect\(.*htons\({world.exchanger.port}\)", trace(), re.M))[1]
        connection, = wait_for(lambda: world.exchanger.connections)
        if stage == "BODY":         # a part of it has been written
            wait_for(lambda: re.search(rf"^{forwarder} +(write|sendto)\(.* = \d{{5,}}$", trace(), re.M))
        elif stage != "CONNECT":
            wait_for(lambda: connection.commands and connection.commands[-1].startswith(stage))
        wait_for(lambda: Path(f"/proc/{forwarder}/stat").read_text().rpartition(") ")[2].startswith("S"))
    waits = re.findall(rf"^{forwarder} .*select.*tv_sec=(\d+)", trace(), re.M)
    assert seconds - 60 < int(waits[-1]) <= seconds


def trickle(octets):
    """A reply that goes on and on, and never comes to an end."""
    def reply(connection):
        while True:
            connection.send(octets)
            time.sleep(0.02)
    return reply


NOISE = {
    "binary": b"\0\xff\x80\r\n", "nothing": b"\r\n", "two digits": b"25\r\n", "four digits": b"2500 Ok\r\n",
    "no digits": b"Ok\r\n", "too small": b"150 Ok\r\n", "too large": b"650 Ok\r\n", "no blank": b"250_Ok\r\n",
    "signed": b"+25 Ok\r\n", "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "noise inside": b"250-Ok\r\nOk\r\n250 Ok\r\n", "endless line": b"250 " + b"x" * 100000,
    "endless reply": b"250-Ok\r\n" * 5000}


@hostile
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "."])
@pytest.mark.parametrize("noise", NOISE)
def test_noise(pair, noise, stage):
    pair.bad.set(replies={stage: NOISE[noise]})
    assert pair.expect_next().words.startswith("4.4.2 no SMTP reply at ")


@hostile
@pytest.mark.parametrize("stage", STAGES + ["QUIT"])
def test_noise_at_every_stage(dns, exchangers, relay, stage):
    """All kinds side by side.  Behind the 250 none of them makes a difference."""
    many = exchangers(len(NOISE))
    for mx, noise in zip(many, NOISE.values()):
        dns.mail(f"{mx.name}.net", (10, mx))
        mx.set(**at(stage, replies={stage: noise}))
    server = relay(mx_port=many[0].port)
    send(server, *(f"b@{mx.name}.net" for mx in many))
    found = [outcome(server, f"b@{mx.name}.net") for mx in many]
    assert [out.status for out in found] == ["sent" if stage == "QUIT" else "later"] * len(many)
    assert stage == "QUIT" or {out.words.rpartition(" at ")[0] for out in found} == {"4.4.2 no SMTP reply"}


@hostile
def test_endless_trickle(side_by_side):
    """The whole reply has its time, not each octet of it."""
    side_by_side([at(stage, replies={stage: trickle(octets)}) for stage in STAGES for octets in (b"250-Ok\r\n", b"2")])


@hostile
@pytest.mark.parametrize("octets", [b"221-Bye\r\n", b"2"])
def test_endless_trickle_behind_the_message(world, relay, tmp_path, octets):
    """Nobody waits for the end of it: the message has arrived."""
    world.exchanger.set(replies={"QUIT": trickle(octets)})
    server = relay("-w", "1", mx_port=world.exchanger.port, spool=tmp_path / "other")
    send(server, "b@example.net")
    assert outcome(server, "b@example.net").status == "sent"
    wait_for(lambda: world.exchanger.connections[0].closed)


@hostile
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "."])
def test_half_a_reply(pair, stage):
    pair.bad.set(replies={stage: b"250-Ok\r\n250"}, drop_after=stage)
    assert pair.expect_next().words.startswith("4.4.2 connection lost at ")


@hostile
def test_reply_before_the_command(pair):
    """It has changed its mind right behind the greeting."""
    pair.bad.set(replies={"CONNECT": b"220 mx1 ESMTP\r\n421 4.3.2 too busy\r\n"})
    assert pair.expect_next("-w", 3).words == "421 4.3.2 too busy"


EARLY = {"CONNECT": b"220 mx\r\n250 mx\r\n", "EHLO": b"250 mx\r\n250 Ok\r\n", "HELO": b"250 mx\r\n250 Ok\r\n",
         "MAIL": b"250 Ok\r\n250 Ok\r\n", "RCPT": b"250 Ok\r\n354 go ahead\r\n"}


@hostile
@pytest.mark.parametrize("stage", EARLY)
def test_replies_to_what_was_not_said_yet(pair, stage):
    """Who is ahead of the dialogue might say yes to a message that he was not sent."""
    pair.bad.set(**at(stage, extensions=(), replies={stage: EARLY[stage]}))
    assert pair.expect_next().words.startswith("4.4.2 a reply to nothing at ")
    assert not pair.bad.messages


@hostile
def test_receipt_before_the_message(pair):
    """A 250 that was said before the message was sent does not say that it has arrived."""
    pair.bad.set(replies={"DATA": b"354 go ahead\r\n250 2.0.0 Ok\r\n"}, stall_at="BODY")
    pair.expect_next("-w", "1")


@hostile
@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CRLF", "LF"])
def test_terse_replies(world, end):
    codes = {"CONNECT": b"220", "EHLO": b"250-" + end + b"250", "MAIL": b"250", "RCPT": b"251", "DATA": b"354",
             ".": b"250 "}
    world.exchanger.set(replies={key: code + end for key, code in codes.items()})
    send(world.relay, "b@example.net")
    found = outcome(world.relay, "b@example.net")
    assert (found.status, found.words) == ("sent", "250")


@hostile
@pytest.mark.parametrize("command, code, status", [
    ("RCPT", 299, "sent"), ("RCPT", 499, "later"), ("RCPT", 599, "failed"), ("DATA", 358, "sent")])
def test_codes_that_no_rfc_lists(world, command, code, status):
    """The first digit says enough (RFC 5321 4.3.2)."""
    world.exchanger.set(replies={command: f"{code} news"})
    send(world.relay, "b@example.net")
    assert outcome(world.relay, "b@example.net").status == status


@hostile
def test_long_replies(world):
    """Lines as long as RFC 5321 4.5.3.1.5 allows, and many of them; of the words some are kept."""
    line = "x" * (512 - len("250-\r\n"))
    codes = {"CONNECT": 220, "EHLO": 250, "MAIL": 250, "RCPT": 250, ".": 250}
    world.exchanger.set(replies={key: "\n".join([f"{code}-{line}"] * 20 + [f"{code} {line}"])
                                 for key, code in codes.items()})
    send(world.relay, "b@example.net")
    found = outcome(world.relay, "b@example.net")
    assert found.status == "sent" and re.fullmatch("250 [x ]{400,600}", found.words)


@hostile
def test_words_are_made_harmless(world):
    """In the log and in the spool: no escapes, no 8-bit, no line ends."""
    world.exchanger.set(replies={"RCPT": b"451-4.7.1 \x1b[31m\xc3\xa9\0\x07\t!\rx\r\n451 (%s%n\x7f\r\n"})
    send(world.relay, "b@example.net")
    words = "451 4.7.1 ?[31m?????!?x (%s%n?"
    assert outcome(world.relay, "b@example.net").words == words
    path, = world.relay.queue()
    assert path.read_bytes().endswith(f" later <b@example.net> {label(world.exchanger)} {words}\r\n".encode())


ESCAPES = b"\x1b]0;x\x07\x1b[2J\x9b31m\xc2\x9b" + bytes(octet for octet in range(256) if octet not in b"\r\n")


@hostile
@pytest.mark.parametrize("stage, code", [
    *((stage, 451) for stage in STAGES), *((stage, 554) for stage in STAGES if stage != "EHLO"),
    ("EHLO", 250), (".", 250), ("QUIT", 221)])
def test_words_are_harmless_wherever_they_come_from(dns, exchangers, relay, stage, code):
    """In the log of both dialogues, in the spool, and in the report."""
    bad, good = exchangers(2)
    dns.mail("example.net", (10, bad))
    dns.mail("example.org", (10, good))
    bad.set(**at(stage, replies={stage: b"%d-%b\r\n%d %%s%%n%b\r\n" % (code, ESCAPES, code, ESCAPES),
                                 ("RCPT", "<c@example.net>"): "451 4.7.1 later"}))
    server = relay("-v", mx_port=bad.port)
    send(server, "b@example.net", "c@example.net", sender="nour@example.org")
    assert outcome(server, "b@example.net").status == {"2": "sent", "4": "later", "5": "failed"}[str(code)[0]]
    outcome(server, "c@example.net")
    if code == 554:
        report, = good.wait_for_messages(1)
        assert re.fullmatch(rb"[ -~\r\n\t]*", report.raw) and b" 554 " in report.raw
    if code == 221:
        server.wait_for_log(" S: 221 ")
    for path in server.queue():
        assert re.fullmatch(rb"[ -~\r\n\t]*", path.read_bytes())
    assert [line for line in server.log if not re.fullmatch("[ -~]*", line)] == []


@hostile
def test_a_try_has_an_end(dns, exchangers, relay):
    """After twenty times -w it is over, even if the exchanger does something in time again and
    again.  A process that does not keep to that is ended by its alarm."""
    def take_time(connection):
        time.sleep(0.5)

    def alarm_is_pending(pid):
        pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]
        return int(pending, 16) >> (signal.SIGALRM - 1) & 1

    slow, = exchangers(1)
    dns.mail("example.net", (10, slow))
    slow.set(extensions=(), replies={"RCPT": take_time})
    server = relay("-w", "1", mx_port=slow.port)
    processes = [wait_for(lambda: children(server.pid))[0]]     # the queue manager
    for _ in range(2):
        send(server, *(f"b{n}@example.net" for n in range(100)))
        processes += wait_for(lambda: set(children(server.pid)) - set(processes))
    wait_for(lambda: len(slow.connections) == 2)        # the alarms are set
    os.kill(processes[2], signal.SIGSTOP)
    wait_for(lambda: server.logged(" to=<b99@example.net> .* status=later "), timeout=60)
    wait_for(lambda: alarm_is_pending(processes[2]), timeout=90)
    os.kill(processes[2], signal.SIGCONT)
    server.wait_for_log(rf"^process {processes[2]} died of signal {signal.SIGALRM:d}")
    assert not slow.messages
    slow.set(replies={})
    server.hangup_until(lambda: not server.queue())
    assert [len(message.recipients) for message in slow.messages] == [100, 100]


def test_delay_is_never_negative(world):
    """The message has come from the future: the clock was wrong then, or it is now."""
    path = world.relay.spool / "29991231T235959.000000-1-1"
    path.write_bytes(b"HELO me.com\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: x\r\n\r\n.\r\n")
    owner = (world.relay.spool / "queue").stat()
    os.chown(path, owner.st_uid, owner.st_gid)
    path.rename(world.relay.spool / "queue" / path.name)
    world.relay.hangup()
    assert world.relay.wait_for_log(r" delay=(\S+) status=sent ")[1] == "0"


# ---- When, and where to -----------------------------------------------------------------------------


def test_forwarding_begins_at_the_final_dot(world):
    """Not at QUIT: the session is still open, and takes the next message."""
    with world.relay.client() as client:
        for count in (1, 2):
            client.deliver("", ["b@example.net"], BODY)
            world.exchanger.wait_for_messages(count)
        assert client.say("QUIT") == "221 2.0.0 OK"


def test_client_that_goes_away_after_the_final_dot(world):
    with world.relay.client() as client:
        for line in ("HELO me.com", "MAIL FROM:<>", "RCPT TO:<b@example.net>", "DATA"):
            client.say(line)
        client.send(b"Subject: x\r\n\r\n.\r\n")
    world.exchanger.wait_for_messages(1)


def test_address_literal(dns, exchangers, relay):
    mx, = exchangers(1)
    server = relay(mx_port=mx.port)
    send(server, f"b@[{mx.host}]")
    message, = mx.wait_for_messages(1)
    assert message.recipients == [f"<b@[{mx.host}]>"]
    assert outcome(server, f"b@[{mx.host}]").relay == f"[{mx.host}]"
    assert not dns.queries


def test_address_literal_with_leading_zeros(dns, exchangers, relay):
    """RFC 5321 4.1.3: Snum is one to three decimal digits, so 012 is 12."""
    mx, = exchangers(1)
    literal = "[" + ".".join(part.zfill(3) for part in mx.host.split(".")) + "]"
    server = relay(mx_port=mx.port)
    send(server, f"b@{literal}")
    message, = mx.wait_for_messages(1)
    assert message.recipients == [f"<b@{literal}>"]
    assert outcome(server, f"b@{literal}").relay == f"[{mx.host}]"
    assert not dns.queries


@pytest.mark.parametrize("literal", ["[IPv6:::1]", "[ipv6:::1]", "[IPv6:0:0::0:0:1]", "[IPv6:0:0:0:0:0:0:0:0001]",
                                     "[IPv6:0:0:0::0.0.0.001]"])
def test_address_literal_of_ipv6(exchangers, relay, ipv6, literal):
    mx, = exchangers(0, "::1")
    server = relay(mx_port=mx.port)
    send(server, f"b@{literal}")
    mx.wait_for_messages(1)
    assert outcome(server, f"b@{literal}").relay == "[::1]"


@pytest.mark.parametrize("form, port", [
    ("{name}:{port}", 9), ("{name}", None), ("{host}", None), ("{host}:{port}", 9), ("[{host}]:{port}", 9)])
def test_smarthost(dns, exchangers, relay, form, port):
    """All domains, in one transaction; its name is looked up like a host's, not like a domain's."""
    mx, other = exchangers(2)
    dns.a(mx.name, mx.host)
    dns.mx(mx.name, (10, other.name))
    dns.mail("example.net", (10, other))
    server = relay("-s", form.format(name=mx.name, host=mx.host, port=mx.port), mx_port=port or mx.port)
    recipients = ["a@example.net", f"b@[{other.host}]", "c@example.org", "d@Example.Net"]
    send(server, *recipients)
    message, = mx.wait_for_messages(1)
    assert message.recipients == [f"<{to}>" for to in recipients]
    assert {query.name for query in dns.queries} == ({mx.name} if "name" in form else set())
    assert not [query for query in dns.queries if query.type == "MX"] and not other.connections


@pytest.mark.parametrize("zone", [lambda dns: None, lambda dns: dns.rcode("mx.example.net", 0),
                                  lambda dns: dns.a("mx.example.net", "0.0.0.0")], ids=["no name", "no address", "nobody's"])
def test_smarthost_without_an_address(dns, relay, zone):
    """A mistake of the operator, who can mend it: nobody's mail comes back for it."""
    zone(dns)
    server = relay("-s", "mx.example.net")
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.status, found.words) == (
        "later", "4.4.4 the smarthost mx.example.net has no usable address: name another with -s")


def test_smarthost_that_is_nobodys_address(relay):
    server = relay("-s", "0.0.0.0")
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.status, found.words) == (
        "later", "4.4.4 the smarthost 0.0.0.0 has no usable address: name another with -s")


@pytest.mark.parametrize("form", ["[::1]:{port}", "[::1]", "::1"])
def test_smarthost_of_ipv6(exchangers, relay, ipv6, form):
    mx, = exchangers(0, "::1")
    send(relay("-s", form.format(port=mx.port), mx_port=mx.port), "b@example.net")
    mx.wait_for_messages(1)


def test_addresses_of_a_smarthost_race(dns, exchangers, relay):
    near, far = exchangers(2)
    far.set(greeting_delay=60)
    dns.a("mx.example.net", far.host, near.host)
    send(relay("-s", "mx.example.net", mx_port=near.port), "b@example.net")
    near.wait_for_messages(1)


UNUSABLE = ["0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.255", "255.255.255.255"]
UNUSABLE_IPV6 = ["::", "ff02::1", "ff0e::1", "::ffff:0.0.0.0", "::ffff:224.0.0.1"]


def test_never_to_an_address_that_is_nobodys(dns, exchangers, relay):
    mx, = exchangers(1)
    dns.mx("example.net", (10, "mx.example.net"), (10, mx.name))
    dns.a("mx.example.net", *UNUSABLE)
    dns.aaaa("mx.example.net", *UNUSABLE_IPV6)
    dns.a(mx.name, mx.host)
    server = relay(mx_port=mx.port)
    send(server, "b@example.net")
    mx.wait_for_messages(1)
    race = server.wait_for_log(" race: (.*)")[1]
    assert race.startswith(label(mx)) and ";" not in race


@pytest.mark.parametrize("address", UNUSABLE + ["IPv6:" + address for address in UNUSABLE_IPV6])
def test_never_to_a_literal_that_is_nobodys(relay, exchangers, address):
    mx, = exchangers(1)
    server = relay(mx_port=mx.port)
    send(server, f"b@[{address}]")
    found = outcome(server, f"b@[{address}]")
    assert (found.relay, found.status, found.words[:6]) == ("-", "failed", "5.1.2 ")


# The relay's own address.  For its port to be known before it starts, it is one that was
# free at all addresses.

@pytest.fixture
def here():
    with socket.create_server(("", 0)) as listener:
        return loopback(), listener.getsockname()[1]


@pytest.fixture
def own(relay, here):
    """own(...): a relay that takes itself for an exchanger."""
    def own(*options, addresses=(here[0],), **settings):
        return relay("-p", here[1], *options, mx_port=here[1], addresses=addresses, **settings)
    return own


def expect_loop(server, to):
    found = outcome(server, to)
    assert (found.relay, found.status, found.words[:6]) == ("-", "failed", "5.4.6 ")


def test_never_to_itself(dns, own, here):
    dns.a("example.net", here[0])
    dns.mx("example.org", (10, "example.net"))
    server = own()
    recipients = ["b@example.net", "b@example.org", f"b@[{here[0]}]"]
    send(server, *recipients)
    for to in recipients:
        expect_loop(server, to)


def test_never_to_itself_as_smarthost(own, here):
    server = own("-s", "{}:{}".format(*here))
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.status, found.words) == (
        "later", f"4.4.4 the smarthost {here[0]} is this relay itself: name another with -s")


def test_never_to_itself_by_any_address_where_it_listens_at_all(own):
    server = own(addresses=("0.0.0.0",))
    other = loopback()
    send(server, f"b@[{other}]")
    expect_loop(server, f"b@[{other}]")


def test_never_to_itself_by_an_ipv4_address_in_ipv6(own, here, ipv6):
    """RFC 4291 2.5.5.2: ::ffff:127.0.0.1 is 127.0.0.1."""
    server = own()
    send(server, f"b@[IPv6:::ffff:{here[0]}]")
    found = outcome(server, f"b@[IPv6:::ffff:{here[0]}]")
    assert (found.relay, found.status) == ("-", "failed")


def test_what_is_nobodys_is_not_taken_for_its_own_address(dns, own, here, ipv6):
    """Where it listens on all addresses, a socket can be bound to these, too."""
    good = Exchanger("::1", here[1], "good.example.net")
    dns.mx("example.net", (10, "bad.example.net"), (20, good.name))
    dns.a("bad.example.net", "0.0.0.0", "224.0.0.1", "255.255.255.255")
    dns.aaaa(good.name, "::1")
    try:
        server = own(addresses=("0.0.0.0",))
        send(server, "b@example.net")
        assert outcome(server, "b@example.net").relay == f"{good.name}[::1]"
    finally:
        good.stop()


def test_its_own_address_where_a_socket_can_be_bound_to_any(own, wrapped):
    """Machines that take each other's addresses over have this (ip_nonlocal_bind)."""
    prepare = "ip link set lo up && echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-n", "sh", "-c", prepare],
                                                     capture_output=True).returncode != 0:
        pytest.skip("no network of our own here")
    binary = wrapped(command=f"unshare -n sh -c '{prepare} && exec \"$0\" \"$@\"'")
    server = own("-w", "1", binary=binary, addresses=("0.0.0.0",))
    server.stop()
    put(server, "b@[198.51.100.7]")
    server.start()
    found = outcome(server, "b@[198.51.100.7]")
    assert (found.relay, found.status) == ("[198.51.100.7]", "later")


def test_only_to_who_is_better_than_itself(dns, own, here):
    """RFC 5321 5.1: the others would send it back."""
    better, equal, worse = made = [Exchanger(loopback(), here[1], f"{name}.example.net")
                                   for name in ("better", "equal", "worse")]
    dns.mail("example.net", (10, better), (20, equal), (30, worse))
    dns.mx("example.net", (30, worse.name), (20, equal.name), (20, "relay.example.net"), (10, better.name))
    dns.a("relay.example.net", here[0])
    better.set(replies={"MAIL": "451 4.7.1 later"})
    server = own()
    send(server, "b@example.net")
    found = outcome(server, "b@example.net")
    assert (found.relay, found.status) == (label(better), "later")
    assert [len(mx.connections) for mx in made] == [1, 0, 0]
    for mx in made:
        mx.stop()


# ---- The message -----------------------------------------------------------------------------------


LARGE = b"Subject: x\r\n\r\n" + b"".join(b"%070d\r\n" % n for n in range(200000))     # more than sockets hold
CONTENTS = {
    "dots": b"Subject: x\r\n\r\n.\r\n..\r\n.a\r\n...\r\na.\r\n.\r\n",
    "nothing": b"\r\n",
    "no header": b"Dear Nour,\r\n.\r\n",
    "empty lines": b"\r\n\r\nx\r\n\r\n\r\n",
    "all octets": b"Subject: x\r\n\r\n" + bytes(octet for octet in range(1, 256) if octet not in b"\r\n") + b"\r\n",
    "lines that look like commands": b"Subject: x\r\n\r\nQUIT\r\nDATA\r\nRCPT TO:<c@example.net>\r\n250 Ok\r\n",
    "longest lines": b"Subject: x\r\n\r\n" + 100 * (b"." + b"x" * 997 + b"\r\n"),
    "several megabytes": LARGE}


@pytest.mark.parametrize("content", CONTENTS)
def test_octet_for_octet(world, content):
    """RFC 5321 4.4: a line is put before the message, and nothing else is touched."""
    world.exchanger.set(extensions=("PIPELINING", "8BITMIME"))
    send(world.relay, "b@example.net", body=CONTENTS[content])
    message, = world.exchanger.wait_for_messages(1)
    assert message.data.endswith(CONTENTS[content])
    trace = message.data[:-len(CONTENTS[content])]
    assert re.fullmatch(rb"Received: .*\r\n([ \t].*\r\n)*", trace)
    assert message.raw == re.sub(rb"(?m)^\.", b"..", message.data)


def test_slow_exchanger_is_given_its_time(dns, exchangers, relay):
    """As long as it goes on taking something; together it takes longer than -w."""
    def take_slowly(connection):
        for _ in range(5):
            time.sleep(0.3)
            taken = sum(map(len, connection.chunks)) + 1000000
            while sum(map(len, connection.chunks)) < taken:
                connection.receive()

    slow, = exchangers(1)
    dns.mail("example.net", (10, slow))
    slow.set(extensions=(), replies={"BODY": take_slowly})
    send(relay("-w", "1", mx_port=slow.port), "b@example.net", body=LARGE)
    message, = slow.wait_for_messages(1)
    assert message.data.endswith(LARGE)
