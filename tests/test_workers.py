"""The children that store and forward: one message at a time, and perhaps several after another."""
import os
import re
import signal
import socket
import struct
import threading
from pathlib import Path

import pytest

from lab import children, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to see processes in")

QUEUED = "250 2.0.0 Ok: queued as "
LETTER = "Subject: x\n\nDear Nour\n"


def workers(server):
    """All children but the queue runner, which is the oldest."""
    return set(children(server.pid)) - {min(children(server.pid))}


@pytest.fixture
def gate(world):
    """Holds up every message at the exchanger until it is set."""
    gate = threading.Event()
    world.exchanger.set(replies={"MAIL": lambda connection: None if gate.wait(60) else "451 4.3.0 no"})
    yield gate
    gate.set()


@pytest.fixture
def server(world):
    wait_for(lambda: children(world.relay.pid), what="the queue runner")
    return world.relay


@pytest.fixture
def narrow(world, relay, tmp_path):
    """A server that forwards two messages to one place at once."""
    return relay("-j", 4, mx_port=world.exchanger.port, spool=tmp_path / "narrow")


def test_a_worker_takes_several_messages(world, server):
    """One after another, as long as they come soon."""
    def again():
        server.send("b@example.net", sender="")
        server.outcomes("b@example.net", count=len(seen) + 1)
        seen.append(workers(server))
        return any(a & b for a, b in zip(seen, seen[1:]))       # not where this machine sleeps that long

    seen = []
    wait_for(again, what="a worker that takes a second message")
    wait_for(lambda: not workers(server), what="the end of a worker that is not needed")


def test_messages_at_once_get_a_worker_each(world, server, gate):
    """Nobody waits behind a message that takes long."""
    for _ in range(5):
        server.send("b@example.net", sender="")
    wait_for(lambda: len(world.exchanger.connections) == 5)
    assert len(workers(server)) == 5
    gate.set()
    assert len(server.outcomes("b@example.net", count=5)) == 5


def test_a_worker_that_died_while_it_waited_is_not_missed(world, server):
    """The next message gets another."""
    def killed():
        server.send("b@example.net", sender="")
        count[0] += 1
        server.outcomes("b@example.net", count=count[0])
        victims = workers(server)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        # One that is given an order just before it dies has no time to reply: 451.
        wait_for(lambda: not victims & set(children(server.pid)), what="the end of those that were killed")
        return victims

    count = [0]
    for _ in range(3):
        wait_for(killed, what="a worker that waits")
    server.send("b@example.net", sender="")
    assert all(outcome.status == "sent" for outcome in server.outcomes("b@example.net", count=count[0] + 1))
    assert server.queue() == server.tmp() == []


def test_a_worker_that_is_to_end_answers_before(world, server, strace):
    """Who stops a whole group of processes does not cut off what the server has just handed to one of them."""
    client = server.client()
    client.say("HELO me.com")
    with strace(server.pid, "trace=/^open", "inject=/^open:delay_enter=1000000:when=1") as trace:
        client.send(b"MAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: x\r\n.\r\n")
        worker, = wait_for(lambda: workers(server), what="a worker")
        wait_for(lambda: re.search(rf"^{worker} +open", trace(), re.M), what="its look at the draft")
        os.kill(worker, signal.SIGTERM)
        replies = [client.reply() for _ in range(4)]
    assert replies[-1].startswith(QUEUED), replies
    server.wait_for_log(f"process {worker} died of signal")
    server.hangup_until(lambda: not server.queue(), what="an empty queue")


def test_a_message_that_no_worker_can_be_told_of_is_tried_soon(world, server, strace):
    """The machine has run out of descriptors for a moment."""
    world.exchanger.stop()
    server.send("b@example.net", sender="")
    server.outcomes("b@example.net")
    wait_for(lambda: not workers(server), what="the end of the worker")
    world.exchanger.start()
    with strace(server.pid, "trace=socketpair", "inject=socketpair:error=ENFILE:when=1"):
        server.hangup()
        server.wait_for_log("^no process can be told")
        wait_for(lambda: not server.queue(), what="an empty queue")     # the runner looks again only in a minute
    assert len(server.logged("^no process can be told")) == 1


def test_few_are_kept_in_touch_with(world, relay, tmp_path, gate):
    """However many forward: descriptors are for clients."""
    server = relay("-j", 120, "-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other")
    wait_for(lambda: children(server.pid), what="the queue runner")
    for _ in range(60):
        server.send("b@example.net", sender="")
    wait_for(lambda: len(world.exchanger.connections) == 60)
    assert len(workers(server)) == 60
    assert server.footprint().descriptors <= server.fresh.descriptors + 32
    gate.set()
    assert {outcome.status for outcome in server.outcomes("b@example.net", count=60)} == {"sent"}
    wait_for(lambda: not workers(server), what="the end of all workers")
    assert server.footprint().descriptors == server.fresh.descriptors


def test_a_full_table_divides_while_a_message_is_stored(world, relay, wrapped, strace, tmp_path):
    """The reply finds its way to the client, through the process that has it by now."""
    server = relay("-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other", binary=wrapped("ulimit -n 64"))
    client = server.client()
    client.say("HELO me.com")
    with strace(server.pid, "trace=fsync", "inject=fsync:delay_enter=5000000:when=1") as trace:
        client.send(b"MAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: x\r\n.\r\n")
        wait_for(lambda: "fsync" in trace(), what="a message that is being stored")
        others = [server.client() for _ in range(20)]
        server.wait_for_log("table full")
        replies = [client.reply() for _ in range(4)]
        assert replies[-1].startswith(QUEUED), replies
    assert client.deliver("", ["b@example.net"], LETTER).startswith(QUEUED)
    for other in others:
        assert other.deliver("", ["b@example.net"], LETTER).startswith(QUEUED)
    world.exchanger.wait_for_messages(22)
    server.hang_up()
    wait_for(lambda: not workers(server), what="the end of all others")


def test_who_hangs_up_while_his_message_is_stored_has_not_gone(world, relay, wrapped, strace, tmp_path):
    """Its worker is still a descriptor: too many such clients divide the table, as others do."""
    server = relay("-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other", binary=wrapped("ulimit -n 64"))
    with strace(server.pid, "trace=fsync,/^open", "inject=fsync:delay_enter=5000000:when=1",
                "inject=/^open:delay_enter=20000"):         # so that it is gone before it can be answered
        for _ in range(60):
            client = server.client()
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))    # RST in place of FIN
            client.send(b"HELO me.com\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: x\r\n.\r\n")
            client.close()
    server.wait_for_log("table full")
    world.exchanger.wait_for_messages(60)
    assert not server.logged("nobody waits for|accept failed|no process can be told")


# ---- One connection for several messages ------------------------------------------------------------


def drained(world, server, letters, count):
    """What waits goes out when the exchanger is back; the connections that it took."""
    exchanger, before = world.exchanger, len(world.exchanger.messages)
    exchanger.stop()
    exchanger.connections.clear()
    for letter in letters:
        server.send(*letter["to"], sender="", body=letter.get("body", LETTER))
    wait_for(lambda: len(server.logged("status=later")) >= count[0] + len(letters))
    exchanger.start()
    server.hangup_until(lambda: not server.queue(), what="an empty queue")
    count[0] = len(server.logged("status=later"))
    assert len(exchanger.messages) == before + len(letters)
    return exchanger.connections


def test_what_waits_for_one_exchanger_shares_connections(world, narrow):
    """Each message whole, for its own recipient, after RSET; and QUIT is said at the end."""
    def shared():
        connections[:] = drained(world, narrow, letters, later)
        return len(connections) < len(letters)      # not where the runner is slower than the exchanger

    letters = [{"to": [f"b{number}@example.net"], "body": f"Subject: {number}\n\nx\n"} for number in range(8)]
    connections, later = [], [0]
    wait_for(shared, 60, what="a connection that takes several messages")
    wait_for(lambda: all(connection.closed for connection in connections), what="the end of all connections")
    for message in world.exchanger.messages:
        number = message.recipients[0][2:message.recipients[0].index("@")]
        assert len(message.recipients) == 1 and f"Subject: {number}\r\n".encode() in message.raw
    for connection in connections:
        verbs = [command.split()[0].upper() for command in connection.commands]
        assert verbs[0] == "EHLO" and verbs.count("EHLO") == 1 and verbs[-1] == "QUIT", verbs
        assert verbs.count("RSET") == verbs.count("MAIL") - 1
    assert narrow.logged("like the message before")


def test_a_backup_keeps_no_mail_from_the_best(dns, exchangers, relay):
    """What the best refuses goes to the backup, and the message after it to the best again."""
    best, backup = exchangers(2)
    dns.mail("example.net", (10, best), (20, backup))
    server = relay("-j", "1", mx_port=best.port)
    grey = [f"grey{number}@example.net" for number in range(3)]
    best.stop()
    backup.stop()
    for number in range(9):
        server.send(grey[number // 3] if number % 3 == 0 else f"b{number}@example.net", sender="", body=LETTER)
    wait_for(lambda: len(server.logged("status=later")) >= 9)
    best.set(replies={("RCPT", f"<{to}>"): "450 4.2.0 not yet" for to in grey})
    best.start()
    backup.start()
    server.hangup_until(lambda: not server.queue(), what="an empty queue")
    assert (len(best.messages), len(backup.messages)) == (6, 3)


def test_a_connection_that_does_not_last_costs_nothing(world, narrow):
    """The exchanger hangs up after every message: each goes over a new connection, and is sent once."""
    world.exchanger.set(drop_after=".")
    letters = [{"to": ["b@example.net"]}] * 8
    connections = drained(world, narrow, letters, [0])
    assert len(connections) == len(world.exchanger.messages) == 8


def test_a_connection_waits_for_a_moment_only(world, narrow, strace):
    """A message that comes later goes over another, even if its worker has had something else to do in between."""
    with strace(narrow.pid, "trace=?alarm,?setitimer", "inject=?alarm,?setitimer:delay_enter=300000"):  # around each try
        connections = drained(world, narrow, [{"to": ["b@example.net"]}] * 4, [0])
    assert len(connections) == 4
    wait_for(lambda: all(connection.closed for connection in connections), what="the end of all connections")
    assert {connection.commands[-1] for connection in connections} == {"QUIT"}


def test_a_connection_serves_one_domain(world, narrow):
    """Others may share its exchanger, but who says so is their name server, each time."""
    world.dns.mail("example.org", (10, world.exchanger))
    letters = [{"to": [f"b@example.{'net' if number % 2 else 'org'}"]} for number in range(8)]
    for connection in drained(world, narrow, letters, [0]):
        paths = {command.rpartition("@")[2] for command in connection.commands if command.startswith("RCPT")}
        assert len(paths) <= 1


def test_many_final_dots_at_once(world, server, strace):
    """They are stored some at a time, each by a worker, and each client hears of his own."""
    most, clients = 0, [server.client() for _ in range(60)]
    for number, client in enumerate(clients):
        for command in "HELO me.com", "MAIL FROM:<>", f"RCPT TO:<b{number}@example.net>", "DATA":
            client.say(command)
    with strace(server.pid, "trace=fsync", "inject=fsync:delay_enter=300000"):
        for client in clients:
            client.send(b"x\r\n.\r\nQUIT\r\n")
        while len(world.exchanger.messages) < len(clients):
            most = max(most, len(workers(server)))
    assert 16 <= most <= 40
    for number, client in enumerate(clients):
        queued = client.reply()
        assert queued.startswith(QUEUED) and client.reply() == "221 2.0.0 OK"
        taken = server.logged(re.escape(queued.removeprefix(QUEUED)) + f" to=<b{number}@example.net> .*status=sent")
        assert len(taken) == 1


@pytest.mark.parametrize("way", ["421", "hanging up"])
def test_an_exchanger_that_takes_one_message_a_connection(world, narrow, way):
    """It agrees to RSET and not to MAIL.  That says nothing of the message, which goes over a connection of its own."""
    def once(connection):
        if sum(command.startswith("MAIL") for command in connection.commands) < 2:
            return None
        second.append(connection)
        if way == "421":
            connection.reply("421 4.7.0 one message a connection")
        connection.hang_up(False)

    def met():
        drained(world, narrow, [{"to": ["b@example.net"]}] * 8, later)
        sent[0] += 8
        return second

    second, later, sent = [], [0], [0]
    world.exchanger.set(replies={"MAIL": once})
    wait_for(met, 60, what="a connection that is tried for a second message")
    assert len(narrow.logged("status=later")) == sent[0], "only those that came while nobody listened"
