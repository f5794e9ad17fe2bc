"""Clients that mean harm: that try it again and again, take all day, never listen, come
in crowds, or are browsers.  After each test the relay is as it was, and at work."""
import contextlib
import os
import re
import select
import signal
import socket
import struct
import threading

import pytest

from lab import BINARY, HOSTNAME, WATCHED, Client, loopback, wait_for

pytestmark = pytest.mark.usefixtures("unharmed")

OK = "250 2.0.0 Ok"
UNKNOWN = "500 5.5.2 Error: command not recognized"
QUEUED = "250 2.0.0 Ok: queued as "
TOO_MANY_ERRORS = f"421 4.7.0 {HOSTNAME} Error: too many errors"
TOO_MANY_CONNECTIONS = f"421 4.7.0 {HOSTNAME} Error: too many connections from "
NOT_HTTP = f"421 4.7.0 {HOSTNAME} Error: this is SMTP, not HTTP"
TIMEOUT = f"421 4.4.2 {HOSTNAME} Error: timeout exceeded"

ENVELOPE = b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
MESSAGE = ENVELOPE + b"Subject: x\r\n\r\nDear Nour\r\n.\r\n"


def expect_end(client, last):
    """The connection ends with this reply, and nothing behind it."""
    assert client.reply() == last
    assert client.eof()


# ---- Errors ---------------------------------------------------------------------------------


def test_twenty_errors_end_a_session(client):
    """All in one packet: what stands behind the last of them is not answered."""
    client.send(b"FOO\r\n" * 20 + b"HELO me.com\r\n" + MESSAGE)
    assert [client.reply() for _ in range(20)] == [UNKNOWN] * 20
    expect_end(client, TOO_MANY_ERRORS)


@pytest.mark.parametrize("error, code", [
    (b"FOO\r\n", "500"), (b"\xff\r\n", "500"), (b"x" * 1000 + b"\r\n", "500"), (b"HELO\r\n", "501"),
    (b"STARTTLS\r\n", "502"), (b"MAIL FROM:<a@example.org>\r\n", "503"), (b"MAIL FROM:<a\r\n", "503"),
    (b"VRFY <\r\n", "501")], ids=lambda value: str(value)[:20])
def test_every_5xx_is_an_error(client, error, code):
    for _ in range(20):
        client.send(error)
        assert client.reply()[:3] == code
    expect_end(client, TOO_MANY_ERRORS)


def test_refused_messages_are_errors(client):
    client.say("HELO me.com")
    for _ in range(20):
        client.send(ENVELOPE + b"a\nb\r\n.\r\n")
        assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "354", "550"]
    expect_end(client, TOO_MANY_ERRORS)


def test_only_a_message_makes_up_for_errors(world):
    """Neither a greeting does, nor what is begun and not ended."""
    with world.relay.client() as client:
        for _ in range(3):
            client.send(b"FOO\r\n" * 19 + b"HELO me.com\r\n" + MESSAGE)
            codes = [client.reply()[:3] for _ in range(24)]
            assert codes == ["500"] * 19 + ["250", "250", "250", "354", "250"]
        client.send(b"FOO\r\nNOOP\r\nRSET\r\nEHLO me.com\r\nMAIL FROM:<>\r\nRSET\r\n" * 20)
        for _ in range(19):
            assert [client.reply()[:3] for _ in range(6)] == ["500"] + ["250"] * 5
        assert client.reply() == UNKNOWN
        expect_end(client, TOO_MANY_ERRORS)
    world.exchanger.wait_for_messages(3)


def test_4xx_is_no_error_of_the_client(client):
    client.send(b"HELO me.com\r\nMAIL FROM:<a@example.org>\r\n" + b"RCPT TO:<b@example.net>\r\n" * 1050 + b"NOOP\r\n")
    codes = [client.reply()[:3] for _ in range(1053)]
    assert codes == ["250"] * 1002 + ["452"] * 50 + ["250"]


# ---- Browsers -------------------------------------------------------------------------------


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"]
FORGED = b"HELO me.com\r\n" + MESSAGE + b"QUIT\r\n"
HEAD = "Host: mail.example.net\r\nContent-Length: 200\r\n\r\n"


@pytest.fixture(params=[b"", b"HELO me.com\r\n", b"HELO me.com\r\n" + ENVELOPE[:-6]], ids=["first", "later", "mail"])
def before(request):
    """What a request has before it in its session."""
    return request.param


@pytest.mark.parametrize("line", [
    "GET / HTTP/1.1", "POST / HTTP/1.1", "post / HTTP/1.0", "GET", "Host: mail.example.net", "host: x"])
def test_http_ends_the_session_at_its_first_line(server, before, line):
    """A page can have a browser post anything anywhere, commands of SMTP among it: the
    request's head comes first, though, and nothing behind its first line is read."""
    expect_http_refused(server, before, line, known=True)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("GET", "POST")] + ["ANY", "TEAPOT"])
def test_http_of_another_method_ends_the_session_at_its_host(server, before, method):
    """Every request has one (RFC 9112 3.2), ahead of its body."""
    expect_http_refused(server, before, f"{method} / HTTP/1.1", known=False)


def expect_http_refused(server, before, line, known):
    with server.client() as client:
        client.send(before + f"{line}\r\n{HEAD}".encode() + FORGED)
        for _ in range(before.count(b"\r\n")):
            assert client.reply()[0] == "2"
        if not known:
            assert client.reply() == UNKNOWN
        expect_end(client, NOT_HTTP)
    assert server.queue() == server.tmp() == []


def test_http_with_bare_lf(client):
    client.send(b"GET / HTTP/1.1\n\n" + FORGED)
    expect_end(client, NOT_HTTP)


@pytest.mark.parametrize("line", ["GETS /", "GET/ HTTP/1.1", "Hosts: x", "Hostname", "XPOST /", "POSTS"])
def test_what_is_not_http_is_only_unknown(client, line):
    assert client.say(line) == UNKNOWN


def test_http_in_a_message_is_text(world):
    text = "".join(f"{method} / HTTP/1.1\nHost: x\n" for method in METHODS)
    world.relay.send("b@example.net", body="Subject: x\n\n" + text)
    message, = world.exchanger.wait_for_messages(1)
    assert message.data.endswith(text.replace("\n", "\r\n").encode())


# ---- Characters -------------------------------------------------------------------------------


def test_what_is_not_printable_comes_nowhere(relay):
    """Neither into the spool, nor into the log, though it logs the dialogue."""
    server = relay("-v")
    places = ["HELO me{}.com", "EHLO me{}com", "MAIL FROM:<a{}@example.org>", 'MAIL FROM:<"{}"@example.org>',
              'MAIL FROM:<"\\{}"@example.org>', "MAIL FROM:<a@exam{}ple.org>", "MAIL FROM:<@a{}.example:a@example.org>",
              "MAIL FROM:<a@example.org> BODY={}7BIT", "MAIL FROM:<a@example.org>{}SIZE=1", "RCPT TO:<b{}@example.net>",
              "RCPT TO:<b@[127.0.0.1{}]>", "RCPT TO:<b@example.net>{}x", "VRFY {}x", "NOOP {}x"]
    octets = [octet for octet in range(256) if not 32 <= octet < 127]
    for place in places:
        for some in (octets[n:n + 15] for n in range(0, len(octets), 15)):
            with server.client() as client:
                said = ["EHLO me.com", *(["MAIL FROM:<a@example.org>"] if place[0] == "R" else [])]
                for line in said:
                    assert client.say(line).startswith("250")
                for octet in some:
                    client.send(place.format(chr(octet)).encode("latin-1") + b"\r\n")
                    # A TAB may stand behind the colon, and so is text, if of no command.
                    code = "500 5.5.2 " if octet != 9 else "250 " if place.startswith("NOOP") else "501 "
                    assert client.reply().startswith(code), (place, octet)
                assert [path.read_bytes() for path in server.tmp()] == (
                    [b"".join(line.encode() + b"\r\n" for line in said)] if len(said) > 1 else [])
            wait_for(lambda: server.tmp() == [])
    assert [line for line in server.log if not re.fullmatch("[ -~]*", line)] == []


def test_every_reply_is_short_enough(relay, unharmed):
    """RFC 5321 4.5.3.1.5, with the longest names there are."""
    name = ".".join(["x" * 63] * 3 + ["x" * 59, "yy"])
    domain = ".".join(["z" * 61] * 4)       # a path has 256 octets
    server = relay("-h", name, "-M", "postmaster@example.org", "-d", unharmed, "-t", 1, "-c", 1)
    with server.client() as client:
        replies = [client.greeting, client.say("EHLO " + "x" * 255), client.say("MAIL FROM:<a@example.org>"),
                   client.say(f"RCPT TO:<b@{domain}>"), client.say("HELP"), client.say("VRFY x")]
        with server.client(greeting=False) as second:
            replies.append(second.reply())
        replies.append(client.reply())
    assert [reply[:3] for reply in replies] == ["220", "250", "250", "550", "214", "252", "421", "421"]
    assert domain in replies[3] and name in replies[6] and name in replies[7]
    assert max(len(line) for reply in replies for line in reply.split("\n")) <= 510


# ---- Time ---------------------------------------------------------------------------------------


def hear(client):
    """What has come by now, a reply; else None."""
    return client.reply() if select.select([client.sock], [], [], 0)[0] else None


def begin(client):
    """Comes to where a message is awaited."""
    client.send(b"HELO me.com\r\n" + ENVELOPE)
    assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "250", "354"]


def send_octet(client):
    client.send(b"x")
    return hear(client)


def send_line(client):
    client.send(b"x" * 498 + b"\r\n")
    return hear(client)


def say_noop(client):
    return client.say("NOOP")


def begin_and_reset(client):
    client.send(b"HELO me.com\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nRSET\r\n")
    for _ in range(4):
        reply = client.reply()
        if reply[0] != "2":
            break
    return reply


def complete(client):
    client.send(b"HELO me.com\r\n" + MESSAGE)
    return [client.reply() for _ in range(5)][-1]


def test_time_has_to_be_earned(world, relay, tmp_path):
    """Who does not end a line has -t seconds, who completes no transaction has twelve times
    as many and what the octets of his message add, whatever he says meanwhile."""
    server = relay("-t", 2, mx_port=world.exchanger.port, spool=tmp_path / "other")
    strict = relay("-t", 2, "-m", 1000, spool=tmp_path / "strict")
    acts = {"commands": (server, say_noop), "transactions begun": (server, begin_and_reset),
            "a message's octets": (server, send_octet), "a message too big": (strict, send_line),
            "a message": (server, send_line), "messages": (server, complete),
            "a command's octets": (server, send_octet)}
    clients = {name: where.client() for name, (where, _) in acts.items()}
    for name in "a message's octets", "a message too big", "a message":
        begin(clients[name])
    ended = []

    def go_on():
        for name, (_, act) in acts.items():
            if name not in ended and act(clients[name]) == TIMEOUT:
                assert clients[name].eof()
                ended.append(name)
                # He came last: had he all the time that the others have, it would be over first for them.
                assert name != "a command's octets" or (len(ended) == 1 and say_noop(clients["commands"]) == OK)
        return len(ended) == 5

    wait_for(go_on, timeout=120)
    assert set(acts) - set(ended) == {"a message", "messages"}
    clients["a message"].send(b"\r\n.\r\n")
    assert clients["a message"].reply().startswith(QUEUED)


NOOPS = b"NOOP\r\n" * 10000


def send_noops(client, sent=0):
    """Sends NOOPs for as long as they are taken at once.  `sent` octets of them have been
    sent before; returns how many have now."""
    client.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += client.sock.send(NOOPS[sent % 6:])
    return sent


def send_noops_in_vain(client):
    """Until no more are taken, for the server waits to be heard."""
    sent = 0
    while select.select([], [client.sock], [], 0.3)[1]:
        sent = send_noops(client, sent)
    return sent


def test_who_never_listens_is_hung_up_on(relay):
    deaf = relay("-t", 1).client(window=4096)
    with pytest.raises(ConnectionError):
        wait_for(lambda: send_noops(deaf) and False, timeout=60)


@pytest.mark.parametrize("before, octets", [
    (b"", b"x"), (b"", b"NOOP\r\n"), (b"HELO me.com\r\n" + ENVELOPE, b"x" * 998 + b"\r\n")],
    ids=["a command without end", "commands", "a message that is too big"])
def test_a_flood_gains_no_time(relay, before, octets):
    """Though there is always something to read, and to say, when the time is over."""
    client = relay("-t", 1, "-m", 1000).client(timeout=60)

    def listen():
        with contextlib.suppress(OSError):
            while client.sock.recv(1000000):
                pass

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    client.send(before)
    octets *= 1000000 // len(octets)
    with pytest.raises(ConnectionError):
        wait_for(lambda: client.send(octets), timeout=60)
    listener.join()


def test_who_hangs_up_before_his_reply_does_no_harm(world):
    """He has said all he wanted, and is gone when his message is stored.  Writing to him
    is what SIGPIPE is about, which would end the server, and everybody else's session."""
    for _ in range(20):
        with world.relay.client() as client:
            client.send(b"HELO me.com\r\n" + ENVELOPE)
            assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "250", "354"]
            client.send(b"Subject: x\r\n\r\n.\r\n")
            client.sock.shutdown(socket.SHUT_WR)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))    # close() resets
    world.exchanger.wait_for_messages(20)
    assert world.relay.process.poll() is None


# ---- Memory -----------------------------------------------------------------------------------


def test_noops_by_the_hundred_thousand(world):
    """All are answered, as late as that is heard; what waits meanwhile is the client's."""
    with world.relay.client(window=4096) as deaf:
        sent = send_noops_in_vain(deaf)
        world.relay.expect_bounded_memory()
        world.relay.send("b@example.net")
        world.exchanger.wait_for_messages(1)
        deaf.sock.settimeout(20)
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1000000)
        rest = b"NOOP\r\n" * 200000
        rest = rest[sent % 6:]
        sender = threading.Thread(target=deaf.send, args=(rest,), daemon=True)
        sender.start()
        for _ in range((sent + len(rest)) // 6):
            assert deaf.line() == OK.encode()
        sender.join()
        world.relay.expect_bounded_memory()
        assert deaf.say("NOOP") == OK


@pytest.mark.skipif(BINARY.name == "valgrind", reason="ten million commands take valgrind minutes")
def test_what_a_client_costs(world, relay, tmp_path):
    """At its worst: what one read takes, what is said to it, and its transaction."""
    server = relay("-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other")
    crowd = [server.client(window=4096) for _ in range(200)]
    for client in crowd:
        client.send(b"EHLO " + b"x" * 255 + b"\r\nMAIL FROM:<a@example.org>\r\n" + b"HELP\r\n" * 50000)
    with server.client(timeout=120) as client:          # under sanitizers, the others take their time
        assert client.deliver("", ["b@example.net"], "Subject: x\n").startswith(QUEUED)
    world.exchanger.wait_for_messages(1)
    assert len(server.tmp()) == len(crowd)
    server.expect_bounded_memory(len(crowd) * 80000)


@pytest.mark.parametrize("before, replies, end, last", [
    (b"", 0, b"\r\n", "500 5.5.2 Error: line too long"),
    (b"HELO me.com\r\n" + ENVELOPE, 4, b"\r\n.\r\n", "552 5.3.4 ")], ids=["command", "message"])
def test_a_line_without_an_end(relay, before, replies, end, last):
    server = relay("-m", 1000000)
    with server.client() as client:
        client.send(before)
        assert all(client.reply()[0] in "23" for _ in range(replies))
        for _ in range(500):
            client.send(b"x" * 65536)
        server.expect_bounded_memory()
        assert server.tmp() == []
        client.send(end)
        assert client.reply().startswith(last)
        assert client.say("NOOP") == OK


def test_sessions_leave_no_memory(relay):
    """Whatever has been said in them."""
    server = relay()
    ways = [b"", b"x" * 500, b"x" * 100000, (b"HELO " + b"x" * 255 + b"\r\nHELO x\r\n") * 10 + b"QUIT\r\n",
            b"FOO\r\n" * 30, b"GET / HTTP/1.1\r\n\r\n",
            b"HELO me.com\r\n" + b"MAIL FROM:<>\r\nRSET\r\n" * 10 + b"MAIL FROM:<>\r\n",
            b"HELO me.com\r\n" + ENVELOPE + b"x" * 10000, b"HELO me.com\r\n" + (ENVELOPE + b"\n\r\n.\r\n") * 10, NOOPS]

    def come_and_go():
        for way in ways:
            with contextlib.suppress(ConnectionError), server.client() as client:
                client.send(way)
                client.sock.shutdown(socket.SHUT_WR)
                while client.receive():
                    pass
        return server.footprint()

    for _ in range(20):
        before = come_and_go()
    for _ in range(100):
        after = come_and_go()
    if before is not None and not WATCHED:
        assert after.memory <= before.memory + 16 * 1024


# ---- Crowds -----------------------------------------------------------------------------------


def test_a_crowd(world, relay, wrapped, tmp_path):
    """Hundreds from everywhere, each with something else to say: the table divides, and
    the good client is served."""
    server = relay(mx_port=world.exchanger.port, spool=tmp_path / "other", binary=wrapped("ulimit -n 256"))
    crowd = [Client(server.port, source=loopback(), greeting=False) for _ in range(600)]
    for n, client in enumerate(crowd):
        client.send([b"", b"x", b"\0" * 1000, b"HELO me.com\r\nMAIL FROM:<>\r\n", b"FOO\r\n" * 30,
                     b"HELO me.com\r\n" + ENVELOPE + b"x"][n % 6])
        if n % 100 == 50:
            server.send("b@example.net")
    world.exchanger.wait_for_messages(6)
    assert server.logged("table full")
    for client in crowd:
        client.close()


def knock(server, source="127.0.0.1"):
    """A client from there; .greeting is what it is told first, be it a refusal."""
    client = server.client(source=source, greeting=False)
    client.greeting = client.reply()
    return client


def let_in(server, source="127.0.0.1"):
    """A client from there; None where it is refused."""
    client = knock(server, source)
    if client.greeting.startswith("220 "):
        return client
    assert client.greeting.startswith(TOO_MANY_CONNECTIONS + source) and client.eof()
    return client.close()


def is_welcome(server, source="127.0.0.1"):
    client = let_in(server, source)
    return client is not None and client.close() is None


def test_connections_of_one_address_are_limited(relay):
    server = relay("-c", 3)
    clients = [let_in(server) for _ in range(3)]
    assert all(clients)
    assert not any(is_welcome(server) for _ in range(10))
    assert is_welcome(server, loopback())
    clients.pop().close()
    wait_for(lambda: is_welcome(server))
    for client in clients:
        assert client.say("NOOP") == OK


def test_who_comes_and_goes_is_not_counted(relay):
    server = relay("-c", 3)
    for _ in range(50):
        wait_for(lambda: is_welcome(server))


@pytest.mark.parametrize("options, files, limits", [((), 1024, range(115, 125)), ((), 100, [10]), (("-c", 0), 1024, [150])])
def test_the_usual_limit(relay, wrapped, options, files, limits):
    """A quarter of the table, which holds half as many clients as files may be open, less some
    for other purposes; and no fewer than ten."""
    server = relay(*options, binary=wrapped(f"ulimit -n {files}"))
    clients = [let_in(server) for _ in range(150)]
    count = sum(client is not None for client in clients)
    assert count in limits and all(clients[:count])
    assert is_welcome(server, loopback())


def test_each_table_counts_for_itself(relay, wrapped):
    """Clients that a divided process serves on are not counted any more: so the machine, not
    select(), bounds their number.  An address that may not fill a table cannot make it divide."""
    server = relay("-c", 20, binary=wrapped("ulimit -n 100"))
    clients = [let_in(server) for _ in range(20)]
    assert all(clients) and not is_welcome(server) and not server.logged("table full")
    others = [wait_for(lambda: let_in(server, loopback())) for _ in range(20)]
    server.wait_for_log("table full")
    clients += [wait_for(lambda: let_in(server)) for _ in range(4)]
    assert all(other.say("NOOP").startswith("250") for other in clients + others)


def test_a_flood_from_one_address(world, relay, tmp_path):
    """Goes on while the good client, from another one, is served."""
    server = relay("-c", 20, mx_port=world.exchanger.port, spool=tmp_path / "other")
    source, over = loopback(), threading.Event()
    kept, refused = [], []

    def flood():
        while not over.is_set() and len(refused) < 20000:
            client = let_in(server, source)
            (refused if client is None else kept).append(client)

    threads = [threading.Thread(target=flood, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(refused) > 200)
    for _ in range(10):
        server.send("b@example.net")
    world.exchanger.wait_for_messages(10)
    over.set()
    for thread in threads:
        thread.join()
    assert len(kept) == 20


def test_children_that_end_all_at_once(world, relay, tmp_path):
    """One signal stands for many of them: none is left over, and with one forwarder at a
    time all messages find theirs."""
    server = relay("-j", 1, "-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other")
    clients = [server.client() for _ in range(200)]
    for client in clients:
        begin(client)
        client.send(b"Subject: x\r\n")
    os.kill(server.pid, signal.SIGSTOP)
    for client in clients:
        client.send(b".\r\n")
    os.kill(server.pid, signal.SIGCONT)
    for client in clients:
        assert client.reply().startswith(QUEUED)
    world.exchanger.wait_for_messages(len(clients), timeout=120)
