"""The course: its six programs in real sessions, and what its chapters show."""
import concurrent.futures
import contextlib
import os
import re
import resource
import shutil
import signal
import smtplib
import socket
import subprocess
import sys

import pytest

import course
import lab
import programs
import wire
from lab import exchangers, wait_for

sys.path.insert(0, str(lab.ROOT / "tests" / "exercises"))

import grade                                                # noqa: E402

NAMES = [path.name for path in course.SOURCES]
LETTER = "Subject: testing\n\nDear Nour, This is me testing my server\n.and a dot\n"
IN_QUEUE = re.compile(rb"\AMAIL FROM:<[^>]*>\r\n(?:RCPT TO:<[^>]+>\r\n)+DATA\r\n.*\r\n\.\r\n", re.DOTALL)


@pytest.fixture
def start(tmp_path):
    """start("5", exchanger.host, exchanger.port): program 5, with a spool where it needs one."""
    with contextlib.ExitStack() as stack:
        def make(number, *arguments, **options):
            spool = () if number < "4" else (tmp_path / "spool",)
            program = course.build(course.source(number))
            server = stack.enter_context(course.start(program, *spool, *arguments, **options))
            stack.callback(lambda: print(*server.lines, sep="\n"))
            return server
        yield make


@pytest.fixture
def near():
    exchanger, = exchangers(1)
    yield exchanger
    exchanger.stop()


@pytest.fixture(scope="module", autouse=True)
def background(request):
    """The chapters and the exercises, where they are asked for, go on beside all else: they wait most of the time."""
    wanted = {name for item in request.session.items if item.module is request.module for name in item.fixturenames}
    for name in {"played", "graded"} & wanted:
        request.getfixturevalue(name)


def arguments(number, dns, mx_port=1):
    """What a program has to be told beside its port and its spool."""
    if number == "5":
        return ("127.0.0.1", mx_port)
    return (*dns.address.split(":"), mx_port) if number == "6" else ()


def files(directory):
    return sorted(directory.iterdir())


# ---- Building -------------------------------------------------------------------------


def test_there_are_six():
    assert [name[0] for name in NAMES] == list("123456")


@pytest.mark.parametrize("compiler", course.COMPILERS)
@pytest.mark.parametrize("name", NAMES)
def test_it_builds_without_a_warning(name, compiler, tmp_path):
    flags = [] if compiler == "tcc" else course.STRICT
    course.compile(course.COURSE / name, tmp_path / "program", compiler, flags)


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_alone(name):
    """No header of the project, and none that POSIX does not have; no line too long."""
    text = (course.COURSE / name).read_text()
    assert '#include "' not in text and "#ifdef" not in text
    assert max(map(len, text.splitlines())) <= 110


# ---- The dialogue, with all of them -----------------------------------------------------


@pytest.mark.parametrize("number", "123456")
def test_telnet(number, start, dns):
    if shutil.which("telnet") is None:
        pytest.skip("telnet is not installed")
    server = start(number, *arguments(number, dns))
    shown = course.telnet(server.port, [
        ("", r"220 \S+ ESMTP\r"), ("HELO me.com\r", r"250 \d+ OK\r"), ("noop\r", r"250 2\.0\.0 Ok\r"),
        ("MAKE love\r", r"500 5\.5\.2 Error: command not recognized\r"), ("QUIT\r", r"221 2\.0\.0 OK\r[^$]*closed")])
    assert "Connected to" in shown


@pytest.mark.parametrize("number", "123456")
def test_a_line_in_pieces_and_lines_in_one_piece(number, start, dns):
    server = start(number, *arguments(number, dns))
    with server.client() as client:
        for octet in b"HELO me.co":
            client.send(bytes([octet]))
        client.send(b"m\r\nNOOP\r\nNO")
        assert client.reply() == f"250 {client.local_port} OK"
        assert client.reply() == "250 2.0.0 Ok"
        client.send(b"OP\r\nQUIT\r\nNOOP\r\n")
        assert client.reply() == "250 2.0.0 Ok"
        assert client.reply() == "221 2.0.0 OK"
        with contextlib.suppress(ConnectionResetError):
            assert client.line() is None


@pytest.mark.parametrize("number", "123456")
def test_a_line_without_end(number, start, dns):
    server = start(number, *arguments(number, dns))
    with server.client() as client:
        client.send(b"x" * 2048)
        assert client.reply() == "500 5.5.2 Error: line too long"
        assert client.eof()
    with server.client() as client:
        assert client.say("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("number", "123456")
def test_a_client_that_leaves_early_does_no_harm(number, start, dns):
    """Its replies meet a closed connection: SIGPIPE."""
    server = start(number, *arguments(number, dns))
    for _ in range(3):
        with server.client() as client:
            client.send(b"NOOP\r\n" * 5000)
    with server.client() as client:
        assert client.say("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("number", "123456")
def test_usage(number):
    said = subprocess.run([course.build(course.source(number))], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith("usage: ")


@pytest.mark.parametrize("number", "123456")
def test_a_port_that_is_taken(number, start, dns, tmp_path):
    server = start(number, *arguments(number, dns))
    spool = () if number < "4" else (tmp_path / "other",)
    command = [course.build(course.source(number)), str(server.port), *spool, *arguments(number, dns)]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (said.returncode, said.stderr.partition(":")[0]) == (1, "cannot listen")


# ---- Many clients -----------------------------------------------------------------------


def test_the_first_serves_one_at_a_time(start):
    server = start("1")
    with server.client() as first, server.client(greeting=False) as second:
        assert first.say("NOOP") == "250 2.0.0 Ok"
        second.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.sock.recv(1)
        assert first.say("QUIT") == "221 2.0.0 OK"
        assert second.reply() == "220 localhost ESMTP"


@pytest.mark.parametrize("number", "23456")
def test_many_clients_at_once(number, start, dns):
    server = start(number, *arguments(number, dns))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(100)]
        for client in reversed(clients):
            assert client.say("HELO me.com") == f"250 {client.local_port} OK"
        for client in clients:
            assert client.say("QUIT") == "221 2.0.0 OK"


@pytest.mark.parametrize("number", "23456")
def test_who_never_reads_disturbs_nobody_else(number, start, dns):
    server = start(number, *arguments(number, dns))
    with server.client() as deaf:
        with contextlib.suppress(socket.timeout, ConnectionError):
            deaf.sock.settimeout(0.2)
            while True:
                deaf.sock.send(b"NOOP\r\n" * 10000)
        with server.client() as client:
            assert client.say("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("number", "23456")
def test_more_clients_than_there_is_room_for(number, start, dns):
    """The rest wait in the kernel's queue, at no cost, and are served when there is room."""
    server = start(number, *arguments(number, dns))
    room = int(re.search(r"CLIENTS = (\d+)", course.source(number).read_text())[1])
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(room)]
        late = stack.enter_context(server.client(greeting=False))
        assert clients[-1].say("NOOP") == "250 2.0.0 Ok"
        assert not course.readable(late.sock, 0)
        clients[3].say("QUIT")
        assert late.reply().startswith("220 ")


@pytest.mark.parametrize("number", "23456")
def test_no_descriptor_is_left_for_a_client(number, start, dns, strace):
    """It waits in the kernel's queue, and the loop does not ask for it again and again."""
    server = start(number, *arguments(number, dns), limit="-n 30")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.client())
        with strace(server.process.pid, "trace=?accept,?accept4") as trace:
            others = [stack.enter_context(server.client(greeting=False)) for _ in range(40)]
            wait_for(lambda: "EMFILE" in trace(), what="an accept() that fails")
            for _ in range(50):
                assert first.say("NOOP") == "250 2.0.0 Ok"
            assert trace().count("EMFILE") == 1
        served = [client for client in others if course.readable(client.sock, 0)]
        late = others[len(served)]
        first.say("QUIT")
        assert late.reply().startswith("220 ")


# ---- The dialogue -----------------------------------------------------------------------


@pytest.mark.parametrize("number", "3456")
def test_the_order_of_commands(number, start, dns):
    server = start(number, *arguments(number, dns))
    with server.client() as client:
        lab.transcript(client, """
            C: MAIL FROM:<a@example.org>
            S: 503 5.5.1 Error: bad sequence of commands
            C: HELO
            S: 500 5.5.2 Error: command not recognized
            C: EHLO me.com
            S: 250 <port> OK
            C: RCPT TO:<b@example.net>
            S: 503 5.5.1 Error: bad sequence of commands
            C: DATA
            S: 503 5.5.1 Error: bad sequence of commands
            C: MAIL FROM:a@example.org
            S: 501 5.5.4 Syntax: MAIL FROM:<address>
            C: mail from:<>
            S: 250 2.1.0 Ok
            C: MAIL FROM:<a@example.org>
            S: 503 5.5.1 Error: bad sequence of commands
            C: DATA
            S: 503 5.5.1 Error: bad sequence of commands
            C: RCPT TO:<b@>
            S: 501 5.5.4 Syntax: RCPT TO:<address>
            C: RCPT TO:<>
            S: 501 5.5.4 Syntax: RCPT TO:<address>
            C: RCPT TO:<b@example.net>
            S: 250 2.1.5 Ok
            C: RSET
            S: 250 2.0.0 Ok
            C: DATA
            S: 503 5.5.1 Error: bad sequence of commands
            C: QUIT
            S: 221 2.0.0 OK
            S: <close>
            """)


@pytest.mark.parametrize("number", "3456")
@pytest.mark.parametrize("octets", [b"a\nb", b"a\rb", b"a\0b", b"\n.\nMAIL FROM:<boss@example.net>", b"x\r\r"],
                         ids=["LF", "CR", "NUL", "smuggling", "CRCRLF"])
def test_what_no_line_may_hold(number, octets, start, dns):
    """One reply, at the real end; nothing inside is taken for a command."""
    server = start(number, *arguments(number, dns))
    with server.client() as client:
        assert client.deliver("a@example.org", ["b@example.net"], b"Subject: x\r\n\r\n" + octets + b"\r\n").startswith(
            "550 5.5.2 ")
        assert client.say("NOOP") == "250 2.0.0 Ok"
        assert client.say("QUIT") == "221 2.0.0 OK"
        assert client.eof()


def test_the_third_prints_messages(start):
    server = start("3")
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail("nour@example.org", ["a@example.net", "b@example.net"], LETTER)
        client.sendmail("", ["c@example.net"], "x\n")
    expected = (
        b"MAIL FROM:<nour@example.org>\r\nRCPT TO:<a@example.net>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
        b"Subject: testing\r\n\r\nDear Nour, This is me testing my server\r\n..and a dot\r\n.\r\n"
        b"MAIL FROM:<>\r\nRCPT TO:<c@example.net>\r\nDATA\r\nx\r\n.\r\n")
    wait_for(lambda: len(server.printed) >= len(expected))
    assert bytes(server.printed) == expected


@pytest.mark.parametrize("number", "3456")
def test_swaks(number, start, dns, near, tmp_path):
    dns.mail("example.net", (10, near))
    letter = tmp_path / "letter"
    letter.write_text(LETTER)
    server = start(number, *(near.host, near.port) if number == "5" else arguments(number, dns, near.port))
    said = programs.finish(programs.program("swaks"), "--server", f"127.0.0.1:{server.port}", "--helo", "me.com",
                           "--from", "nour@example.org", "--to", "friend@example.net", "--data", f"@{letter}")
    assert re.search(r"^<-  250 2\.0\.0 Ok", said, re.M)
    if number >= "5":
        message, = near.wait_for_messages(1)
        assert b"Subject: testing" in message.data and b"\r\n.and a dot\r\n" in message.data


# ---- The spool --------------------------------------------------------------------------


def send_until_killed(server, name):
    """Sends message after message; returns the ids that were acknowledged."""
    taken = []
    with contextlib.suppress(OSError, AssertionError), server.client() as client:
        for i in range(100000):
            client.say("HELO me.com") if i == 0 else None
            client.send(f"MAIL FROM:<{name}@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n".encode())
            for _ in range(3):
                assert client.reply()[0] in "23"
            client.send(b"Subject: x\r\n\r\n" + b"x" * 70 + b"\r\n.\r\n")
            taken.append(client.reply().partition("queued as ")[2])
    return taken


@pytest.mark.parametrize("number", "456")
def test_what_was_acknowledged_survives_kill_9(number, start, dns, tmp_path):
    dns.drop("example.net")
    spool = tmp_path / "spool"
    taken = []
    for round in range(5):
        server = start(number, *arguments(number, dns))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(send_until_killed, server, f"{round}-{i}") for i in range(8)]
            more = len(files(spool / "queue")) + 20 + 7 * round
            wait_for(lambda: len(files(spool / "queue")) >= more, what="some messages")
            server.kill()
            for client in clients:
                taken += client.result()
    queue = {path.name: path.read_bytes() for path in files(spool / "queue")}
    assert len(taken) > 50
    assert [id for id in taken if id not in queue] == []
    assert [id for id, text in queue.items() if not IN_QUEUE.match(text)] == []


def test_the_fourth_answers_after_the_last_sync(start, strace, tmp_path):
    """The order of its calls is the whole point."""
    server = start("4")
    with server.client() as client, strace(server.process.pid, "trace=fsync,/^rename,write") as trace:
        reply = client.deliver("a@example.org", ["b@example.net"], "x\n")
        text = wait_for(lambda: trace() if "queued as" in trace() else None)
    assert reply.startswith("250 2.0.0 Ok: queued as ")
    calls = re.findall(r"^\d+ +(fsync\(\d+<[^>]*/(?:tmp|queue)\b|rename\w*|write\(\d+<[^>]*>, \"250 2\.0\.0 Ok: q)",
                       text, re.MULTILINE)
    assert len(calls) == 4, text
    assert "tmp" in calls[0] and calls[1].startswith("rename") and "queue" in calls[2] and calls[3].startswith("write")


@pytest.mark.parametrize("number", "456")
def test_no_room(number, start, dns, tmp_path):
    """A write that fails is answered 451 at the dot, and leaves nothing."""
    if os.geteuid() == 0 and not os.path.exists("/dev/full"):
        pytest.skip("nothing is full here")
    binary = course.build(course.source(number))
    wrapper = tmp_path / "wrapped"
    wrapper.write_text(f'#!/bin/sh\ntrap "" XFSZ\nulimit -f 4\nexec {binary} "$@" 2>&1 >/dev/null | cat >&2\n')
    wrapper.chmod(0o700)
    with course.start(wrapper, tmp_path / "spool", *arguments(number, dns)) as server, server.client() as client:
        reply = client.deliver("a@example.org", ["b@example.net"], "x" * 70 + "\n" + ("y" * 70 + "\n") * 400)
        assert reply == "451 4.3.0 Error: message not stored, try again later"
        assert client.say("NOOP") == "250 2.0.0 Ok"
        wait_for(lambda: files(tmp_path / "spool/queue") == [])


# ---- Forwarding -------------------------------------------------------------------------


def deliver(server, *recipients, letter=LETTER):
    with server.client() as client:
        reply = client.deliver("nour@example.org", recipients, letter)
    assert reply.startswith("250 2.0.0 Ok: queued as "), reply
    return reply.rpartition(" ")[2]


def wait_until_empty(tmp_path):
    wait_for(lambda: files(tmp_path / "spool/queue") == [], what="an empty queue")


@pytest.fixture(params="56")
def forwarder(request, start, dns, near):
    """Programs 5 and 6 with one exchanger, `near`."""
    dns.mail("example.net", (10, near))
    first = (near.host, near.port) if request.param == "5" else arguments("6", dns, near.port)
    return lambda **options: start(request.param, *first, **options)


def test_forwarding(forwarder, near, tmp_path):
    deliver(forwarder(), "a@example.net", "b@example.net")
    messages = near.wait_for_messages(2)
    wait_until_empty(tmp_path)
    assert sorted(message.recipients for message in messages) == [["<a@example.net>"], ["<b@example.net>"]]
    for message in messages:
        assert message.reverse_path == "<nour@example.org>"
        assert re.fullmatch(rb"Received: from \[127\.0\.0\.1\] \(port \d+\)\r\n\tby \S+ with SMTP id \S+;\r\n"
                            rb"\t\w{3}, \d\d \w{3} \d{4} [0-9:]{8} \+0000\r\n"
                            + LETTER.replace("\n", "\r\n").encode(), message.data)


def test_each_recipient_has_its_own_outcome(forwarder, near, tmp_path):
    near.set(replies={("RCPT", "<later@example.net>"): ["451 4.7.1 greylisted"],
                      ("RCPT", "<never@example.net>"): "550 5.1.1 no such user"})
    server = forwarder()
    id = deliver(server, "later@example.net", "never@example.net", "now@example.net")
    wait_for(lambda: len(server.logged(re.escape(id))) == 3)
    text = (tmp_path / "spool/queue" / id).read_bytes()
    assert text.startswith(b"MAIL FROM:<nour@example.org>\r\nRCPT TO:<later@example.net>\r\n"
                           b"FAIL TO:<never@example.net>\r\nSENT TO:<now@example.net>\r\nDATA\r\n")
    assert server.logged(r"RCPT TO:<later@example\.net> \(451 4\.7\.1 greylisted\)$")
    assert server.logged(r"FAIL TO:<never@example\.net> \(550 5\.1\.1 no such user\)$")
    wait_for(lambda: near.connections and all(connection.closed for connection in near.connections))
    wait_for(lambda: os.kill(server.process.pid, signal.SIGALRM) or len(near.messages) == 2)
    wait_until_empty(tmp_path)
    assert [message.recipients for message in near.messages] == [["<now@example.net>"], ["<later@example.net>"]]
    assert [path.name for path in files(tmp_path / "spool/failed")] == [id]


def test_what_waits_is_tried_at_the_next_start(forwarder, near, tmp_path):
    near.set(drop_at="CONNECT")
    server = forwarder()
    deliver(server, "a@example.net")
    wait_for(lambda: server.logged("RCPT TO:<a@example.net> "))
    server.kill()
    near.set(drop_at=None)
    forwarder()
    near.wait_for_messages(1)
    wait_until_empty(tmp_path)


def test_a_message_is_tried_by_one_process_at_a_time(forwarder, near, tmp_path):
    near.set(stall_at=".")
    server = forwarder()
    deliver(server, "a@example.net")
    wait_for(lambda: near.connections and "." in near.connections[0].commands)
    for _ in range(20):
        os.kill(server.process.pid, signal.SIGALRM)
        with server.client() as client:
            client.say("NOOP")
    assert len(near.connections) == 1


def test_a_child_keeps_no_client_waiting_for_the_end(forwarder, near):
    near.set(stall_at="CONNECT")
    server = forwarder()
    with server.client() as bystander, server.client() as client:
        assert client.deliver("a@example.org", ["b@example.net"], "x\n").startswith("250 ")
        wait_for(lambda: near.connections)
        for one in client, bystander:
            assert one.say("QUIT") == "221 2.0.0 OK"
            assert one.eof()


@pytest.mark.parametrize("reply", [b"2", b"250 2.0.0 O", b"250-2.0.0 Ok\r\n250", b"250 " + b"x" * 5000 + b"\r\n"],
                         ids=["one octet", "a line", "the last line", "too long"])
def test_half_a_reply_is_none(reply, forwarder, near):
    """The message is owed to the recipient as before, and the server goes on."""
    near.set(replies={".": reply}, drop_after=".")
    server = forwarder()
    deliver(server, "a@example.net")
    wait_for(lambda: server.logged("RCPT TO:<a@example.net> "))
    near.set(replies={}, drop_after=None)
    os.kill(server.process.pid, signal.SIGALRM)
    wait_for(lambda: server.logged("SENT TO:<a@example.net> "))


def test_the_shortest_replies(forwarder, near, tmp_path):
    near.set(replies={"CONNECT": b"2\r\n", "HELO": b"250-\r\n250\r\n", "MAIL": b"2\n", "RCPT": b"2\r\n", "DATA": b"3\r\n"})
    deliver(forwarder(), "a@example.net")
    near.wait_for_messages(1)
    wait_until_empty(tmp_path)


def test_a_message_that_does_not_fit_in_memory(forwarder, near, tmp_path):
    """It stays in the queue, and the next one is delivered."""
    if lab.EMULATED or sys.platform == "darwin":
        pytest.skip("ulimit -v does not bound the program alone here")
    server = forwarder(limit="-v 500000")
    large = tmp_path / "spool/queue/1-1-1"
    with large.open("wb") as file:
        file.write(b"MAIL FROM:<>\r\nRCPT TO:<a@example.net>\r\nDATA\r\n")
        file.truncate(1 << 30)
    os.kill(server.process.pid, signal.SIGALRM)
    wait_for(lambda: server.logged("^1-1-1: cannot be read into memory"))
    deliver(server, "b@example.net")
    near.wait_for_messages(1)
    assert large.exists()


def test_the_client_may_leave_after_the_dot(forwarder, near, tmp_path):
    server = forwarder()
    with server.client() as client:
        client.say("HELO me.com")
        client.send(b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n")
        for _ in range(3):
            client.reply()
        client.send(b"x\r\n.\r\n")
    near.wait_for_messages(1)
    wait_until_empty(tmp_path)


def test_where_the_message_begins(forwarder, near):
    """Not where an argument of DATA, or a line of the message, would have it."""
    server = forwarder()
    with server.client() as client:
        for command in "HELO me.com", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>":
            client.say(command)
        assert client.say("DATA please") == "354 End data with <CR><LF>.<CR><LF>"
        client.send(b"Subject: x\r\n\r\nDATA\r\nmore\r\n.\r\n")
        assert client.reply().startswith("250 2.0.0 Ok: queued as ")
    message, = near.wait_for_messages(1)
    assert message.data.startswith(b"Received: ") and message.data.endswith(b"Subject: x\r\n\r\nDATA\r\nmore\r\n")


def test_pipelining(forwarder, near):
    server = forwarder()
    with server.client() as client:
        transaction = b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nx\r\n.\r\n"
        client.send(b"HELO me.com\r\n" + 3 * transaction + b"QUIT\r\n")
        replies = [client.reply()[:3] for _ in range(14)]
    assert replies == ["250"] + ["250", "250", "354", "250"] * 3 + ["221"]
    near.wait_for_messages(3)


def test_no_zombie_is_left(forwarder, near, tmp_path):
    server = forwarder()
    for _ in range(10):
        deliver(server, "a@example.net")
    near.wait_for_messages(10)
    wait_until_empty(tmp_path)
    if not os.path.exists(f"/proc/{server.process.pid}/task/{server.process.pid}/children"):
        pytest.skip("there is no /proc to tell")
    wait_for(lambda: lab.children(server.process.pid) == [])


# ---- MX and the race --------------------------------------------------------------------


def relay(start, dns, mx_port):
    return start("6", *arguments("6", dns, mx_port))


def test_the_nearest_of_equals_wins(start, dns):
    near, far, spare = made = exchangers(3)
    far.set(greeting_delay=2)
    dns.mail("example.net", (10, far), (10, near), (20, spare))
    deliver(relay(start, dns, near.port), "a@example.net")
    near.wait_for_messages(1)
    assert far.messages == spare.messages == [] and spare.connections == []
    for exchanger in made:
        exchanger.stop()


@pytest.mark.parametrize("trouble", [{"drop_at": "CONNECT"}, {"replies": {"CONNECT": "554 5.3.2 go away"}},
                                     {"replies": {"MAIL": "451 4.3.0 later"}}, {"drop_at": "."}, None],
                         ids=["closes", "refuses", "later", "lost at the dot", "is not there"])
def test_the_next_preference_when_the_first_is_of_no_use(trouble, start, dns):
    first, second = exchangers(2)
    dns.mail("example.net", (20, second), (10, first))
    first.stop() if trouble is None else first.set(**trouble)
    deliver(relay(start, dns, second.port), "a@example.net")
    second.wait_for_messages(1)
    second.stop()
    first.stop() if trouble is not None else None


def test_preferences_are_tried_from_the_lowest(start, dns):
    made = exchangers(5)
    for exchanger in made[:4]:
        exchanger.set(replies={"MAIL": "451 4.3.0 later"})
    places = dict(zip((0, 1, 256, 300, 65535), made))
    dns.mail("example.net", *((preference, places[preference]) for preference in (300, 65535, 0, 256, 1)))
    deliver(relay(start, dns, made[0].port), "a@example.net")
    made[4].wait_for_messages(1)
    assert [len(exchanger.connections) for exchanger in made] == [1] * 5
    times = [exchanger.connections[0].opened for exchanger in made]
    assert times == sorted(times)
    for exchanger in made:
        exchanger.stop()


def test_a_domain_without_mx_is_its_own_exchanger(start, dns, near):
    dns.a("example.net", near.host)
    deliver(relay(start, dns, near.port), "a@example.net")
    near.wait_for_messages(1)


def test_an_exchanger_behind_an_alias(start, dns, near):
    dns.mx("example.net", (10, "mx.example.net"))
    dns.cname("mx.example.net", "other.example.org")
    dns.a("other.example.org", near.host)
    deliver(relay(start, dns, near.port), "a@example.net")
    near.wait_for_messages(1)


def test_a_domain_that_does_not_exist(start, dns, tmp_path):
    server = relay(start, dns, 1)
    id = deliver(server, "a@nowhere.example")
    wait_for(lambda: [path.name for path in files(tmp_path / "spool/failed")] == [id])
    assert server.logged(rf"{id} FAIL TO:<a@nowhere\.example> \(there is no such domain\)")


@pytest.mark.parametrize("rcode", [2, 5])
def test_a_name_server_in_trouble(rcode, start, dns):
    dns.rcode("example.net", rcode)
    server = relay(start, dns, 1)
    deliver(server, "a@example.net")
    wait_for(lambda: server.logged("RCPT TO:<a@example.net> "))


def test_a_lost_packet(start, dns, near):
    dns.mail("example.net", (10, near))
    dns.drop("example.net", 1, "MX")
    deliver(relay(start, dns, near.port), "a@example.net")
    near.wait_for_messages(1)
    asked = [query for query in dns.queries if query.type == "MX"]
    assert len(asked) == 2 and len({query.id for query in asked}) == len({query.client_port for query in asked}) == 2


def mx_answer(query, name, id=None, question=None, flags=lab.RESPONSE):
    """An answer that names an exchanger."""
    data = b"\0\x0a" + lab.encode_name(name)
    return (lab.header(lab.query_id(query) if id is None else id, flags, 1, 1)
            + (question or lab.question(query)) + lab.record(lab.TO_QUESTION, "MX", data))


@pytest.mark.parametrize("forge", [
    lambda query: mx_answer(query, "evil.example.com", id=lab.query_id(query) ^ 1),
    lambda query: mx_answer(query, "evil.example.com", question=lab.encode_name("example.com") + b"\0\x0f\0\1"),
    lambda query: mx_answer(query, "evil.example.com", flags=0x0100),
    lambda query: b"\0" * 5, lambda query: b"",
], ids=["another id", "another question", "a query", "short", "empty"])
def test_a_forged_answer_is_not_taken(forge, start, dns, near):
    evil, = exchangers(1)
    dns.a("mx.example.net", near.host)
    dns.a("evil.example.com", evil.host)
    dns.raw("example.net", lambda query: [forge(query), mx_answer(query, "mx.example.net")], "MX")
    deliver(relay(start, dns, near.port), "a@example.net")
    near.wait_for_messages(1)
    evil.stop()
    assert not evil.connections


@pytest.mark.parametrize("wire", [
    lab.encode_name("mx.example.net")[:-3], b"\xc0\xff", b"\xc0\x0c\0", b"\xc0", b"\x80\0", b"\xff" * 600],
    ids=["cut off", "a pointer forward", "longer than it says", "half a pointer", "no label", "garbage"])
def test_a_malformed_answer_is_trouble_and_no_more(wire, start, dns):
    dns.raw("example.net", lambda query: (lab.header(lab.query_id(query), answers=3) + lab.question(query)
                                          + lab.record(lab.TO_QUESTION, "MX", b"\0\x0a" + wire)), "MX")
    server = relay(start, dns, 1)
    deliver(server, "a@example.net")
    wait_for(lambda: server.logged("RCPT TO:<a@example.net> "))


# ---- The chapters -----------------------------------------------------------------------


def test_each_program_has_its_chapter():
    assert [path.stem for path in course.CHAPTERS] == [path.stem for path in course.SOURCES]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What course.play() says of each chapter.  They wait most of the time: all play at once."""
    with concurrent.futures.ThreadPoolExecutor(len(course.CHAPTERS)) as pool:
        yield {path: pool.submit(course.play, path, tmp_path_factory.mktemp(path.stem))
               for path in course.CHAPTERS if not course.missing_tools(path)}


@pytest.mark.parametrize("path", course.CHAPTERS, ids=lambda path: path.stem)
def test_the_commands_of_a_chapter_show_what_it_says(path, played):
    missing = course.missing_tools(path)
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    assert len(course.commands(path)) > 5
    difference = played[path].result()
    if difference is not None:
        pytest.fail("$ {}\n---- has to show:\n{}---- and shows:\n{}".format(*difference), pytrace=False)


@pytest.mark.parametrize("path", wire.PAGES, ids=lambda path: path.stem)
def test_a_page_shows_what_goes_over_the_wire(path):
    """If not: python3 tests/wire.py makes both anew."""
    assert wire.settled(path.read_text()) == wire.settled(wire.PAGES[path]())


# ---- The exercises ----------------------------------------------------------------------


def titles():
    """{number: title}, as the text has them."""
    text = (course.COURSE / "exercises.md").read_text()
    return {int(number): title for number, title in re.findall(r"^## (\d+)\. (.*)$", text, re.MULTILINE)}


def test_each_exercise_has_its_text_its_test_and_its_solution():
    assert list(titles()) == sorted(grade.EXERCISES) == list(range(1, len(grade.EXERCISES) + 1))
    assert [int(path.name[:2]) for path in sorted(grade.HERE.glob("*.diff"))] == sorted(grade.EXERCISES)
    for number, title in titles().items():
        assert grade.EXERCISES[number].__doc__.lower() == title.lower()
        assert grade.solution(number).read_text().startswith(f"Solution of exercise {number}, ")


def test_the_index_has_the_length_of_each_program():
    """To about one in twenty."""
    text = (course.COURSE / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| .* \| ([\d,]+)(?:, \d+)? \|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == list("123456")
    for number, lines in rows:
        count = len(course.source(number).read_text().splitlines())
        assert abs(count - int(lines.replace(",", ""))) <= count / 20, number


def test_each_exercise_belongs_to_a_chapter():
    """But the last two, which belong to changing.md and reading.md."""
    chapters = "".join(path.read_text() for path in course.CHAPTERS)
    named = [int(number) for number in re.findall(r"exercises\.md#(\d+)-", chapters)]
    assert sorted(named) == sorted(grade.EXERCISES)[:-2]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """What the grader says of each exercise, without its solution and with it: all at once, too."""
    def both(number):
        tree = tmp_path_factory.mktemp("exercise") / "tree"
        shutil.copytree(course.COURSE, tree / "docs/course")
        for path in lab.ROOT.glob("*.[ch]"):
            shutil.copy(path, tree)
        command = [sys.executable, grade.HERE / "grade.py", str(number), tree]
        before = subprocess.run(command, capture_output=True, text=True)
        subprocess.run(["patch", "-s", "-p0", "-i", grade.solution(number)], cwd=tree, check=True)
        return before, subprocess.run(command, capture_output=True, text=True)

    tmp_path_factory.getbasetemp()      # the first call makes it: two threads would make two
    with concurrent.futures.ThreadPoolExecutor(len(grade.EXERCISES)) as pool:
        yield {number: pool.submit(both, number) for number in grade.EXERCISES}


@pytest.mark.parametrize("number", grade.EXERCISES)
def test_an_exercise_is_not_solved_before_and_solved_after(number, graded):
    for tool in ("patch",) + (("strace", "nc") if number == 9 else ()):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if number == 4 and hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"no process may open more than {hard} files here")
    before, after = graded[number].result()
    assert before.returncode == 1 and before.stderr.startswith(f"exercise {number}: not yet.\n")
    assert "came to an end" not in before.stderr
    assert (after.returncode, after.stdout, after.stderr) == (0, f"exercise {number}: done.\n", "")


def test_make_exercise():
    said = subprocess.run(["make", "-s", "exercise", "N=7"], cwd=lab.ROOT, capture_output=True, text=True)
    assert said.returncode != 0
    assert said.stderr.startswith("exercise 7: not yet.\nRCPT TO:<friend@localhost> is answered")
    said = subprocess.run(["make", "-s", "exercise"], cwd=lab.ROOT, capture_output=True, text=True)
    assert "make exercise N=7: N is the number of an exercise" in said.stderr
