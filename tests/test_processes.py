"""The processes: a child for each transaction, the queue manager, and its batches."""
import os
import re
import shutil
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from lab import children, loopback, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to see processes in")

QUEUED = "250 2.0.0 Ok: queued as "
LETTER = "Subject: x\n\nDear Nour\n"


def manager_of(server):
    """The queue manager is the oldest child."""
    return wait_for(lambda: children(server.pid), what="the queue manager")[0]


def transactions(server):
    """The children that store and forward: all but the queue manager."""
    return set(children(server.pid)) - {min(children(server.pid))}


def batches(server):
    return set(children(manager_of(server)))


@pytest.fixture
def gate(world):
    """Holds up every message at the exchanger until it is set."""
    gate = threading.Event()
    world.exchanger.set(replies={"MAIL": lambda connection: None if gate.wait(60) else "451 4.3.0 no"})
    yield gate
    gate.set()


@pytest.fixture
def server(world):
    manager_of(world.relay)
    return world.relay


@pytest.fixture
def narrow(world, relay, tmp_path):
    """A server with two slots for fresh mail, one of them for one place, and two for batches."""
    return relay("-j", 4, mx_port=world.exchanger.port, spool=tmp_path / "narrow")


def accepted(server, count, to="b{}@example.net"):
    """Sends so many messages over one connection."""
    with server.client() as client:
        for number in range(count):
            assert client.deliver("", [to.format(number)], LETTER).startswith(QUEUED)


# ---- Transactions ----------------------------------------------------------------------------------


def test_a_message_gets_a_child_that_stores_and_forwards_it(world, server, gate):
    """And that ends with its message."""
    for _ in range(3):
        server.send("b@example.net", sender="")
    wait_for(lambda: len(world.exchanger.connections) == 3)
    assert len(transactions(server)) == 3 and not batches(server)
    gate.set()
    assert len(server.outcomes("b@example.net", count=3)) == 3
    wait_for(lambda: not transactions(server), what="the end of the children")


def test_a_lane_has_a_tenth_of_the_slots_for_fresh_mail(world, server, gate):
    """Further children only store, and the lane's batch forwards; another lane has slots of its own."""
    accepted(server, 12)
    wait_for(lambda: len(transactions(server)) == 5 and len(batches(server)) == 1)
    wait_for(lambda: len(world.exchanger.connections) == 6)
    world.dns.mail("example.org", (10, world.exchanger))
    server.send("c@example.org", sender="")
    wait_for(lambda: len(transactions(server)) == 6)
    gate.set()
    world.exchanger.wait_for_messages(13)
    wait_for(lambda: not server.queue() and not transactions(server) and not batches(server))


@pytest.mark.parametrize("forwarders, direct", [(1, 0), (3, 0), (4, 1), (50, 5)])
def test_slots_for_fresh_mail(world, relay, tmp_path, gate, forwarders, direct):
    """Below -j 4 there are none: the queue manager needs what there is."""
    server = relay("-j", forwarders, mx_port=world.exchanger.port, spool=tmp_path / "other")
    accepted(server, 12)
    wait_for(lambda: len(transactions(server)) == direct and len(batches(server)) == 1)
    gate.set()
    world.exchanger.wait_for_messages(12)
    wait_for(lambda: not server.queue())


def test_a_child_that_is_to_end_answers_before(world, server, strace):
    """A signal to the whole process group does not cut off the reply to a message that is being stored."""
    client = server.client()
    client.say("HELO me.com")
    with strace(server.pid, "trace=fsync", "inject=fsync:delay_enter=1000000:when=1") as trace:
        client.send(b"MAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: x\r\n.\r\n")
        child, = wait_for(lambda: transactions(server), what="a child")
        wait_for(lambda: re.search(rf"^{child} +fsync", trace(), re.M), what="its sync")
        os.kill(child, signal.SIGTERM)
        replies = [client.reply() for _ in range(4)]
        assert replies[-1].startswith(QUEUED), replies
        server.wait_for_log(f"process {child} died of signal")      # strace, when it lets go, may lose a signal
    server.hangup_until(lambda: not server.queue(), what="an empty queue")


def test_a_child_that_dies_before_it_has_stored_leaves_a_451(world, server, strace):
    """End of file on the reply pipe without a line."""
    with server.client() as client, strace(server.pid, "inject=fsync:signal=KILL:when=1"):
        assert client.deliver("", ["b@example.net"], LETTER).startswith("451 4.3.0 ")
    assert not world.exchanger.connections


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
    wait_for(lambda: not transactions(server), what="the end of all others")


def test_a_client_that_hangs_up_while_its_message_is_stored_keeps_its_place(world, relay, wrapped, strace, tmp_path):
    """The child's reply pipe is still a descriptor: too many such clients divide the table, as others do."""
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
    assert not server.logged("has gone before|accept failed|can be made")


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
    """Each message whole, for its own recipient; and QUIT is said at the end."""
    def shared():
        connections[:] = drained(world, narrow, letters, later)
        return len(connections) < len(letters)      # not where the manager is slower than the exchanger

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
        assert "RSET" not in verbs      # each transaction came to its final dot
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
    """A message that comes later goes over another."""
    with strace(manager_of(narrow), "trace=?alarm,?setitimer", "inject=?alarm,?setitimer:delay_enter=300000"):  # around each try
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
    """They are stored some at a time, each by a child, and each client hears of its own."""
    most, clients = 0, [server.client() for _ in range(60)]
    for number, client in enumerate(clients):
        for command in "HELO me.com", "MAIL FROM:<>", f"RCPT TO:<b{number}@example.net>", "DATA":
            client.say(command)
    with strace(server.pid, "trace=fsync", "inject=fsync:delay_enter=300000"):
        for client in clients:
            client.send(b"x\r\n.\r\nQUIT\r\n")
        while len(world.exchanger.messages) < len(clients):
            most = max(most, len(transactions(server)))
    assert 16 <= most <= 40     # sixteen that store; some that have replied, and some that forward
    for number, client in enumerate(clients):
        queued = client.reply()
        assert queued.startswith(QUEUED) and client.reply() == "221 2.0.0 OK"
        taken = server.logged(re.escape(queued.removeprefix(QUEUED)) + f" to=<b{number}@example.net> .*status=sent")
        assert len(taken) == 1


@pytest.mark.parametrize("way", ["421", "hanging up"])
def test_an_exchanger_that_takes_one_message_a_connection(world, narrow, way):
    """It refuses a second MAIL.  That says nothing of the message, which goes over a connection of its own."""
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


# ---- What a lane may have ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["MX", "-s"])
@pytest.mark.parametrize("limit", [1, 3, 10])
def test_a_burst_for_an_exchanger_that_takes_few_connections(world, relay, tmp_path, limit, way):
    """All of it goes out in the order of the time that the exchanger needs: no message has to back off."""
    exchanger = world.exchanger
    exchanger.set(connection_limit=limit, replies={".": lambda connection: time.sleep(0.05)})
    if way == "-s":
        server = relay("-s", f"{exchanger.host}:{exchanger.port}", spool=tmp_path / "other")
    else:
        server = relay(mx_port=exchanger.port, spool=tmp_path / "other")
    accepted(server, 60)
    exchanger.wait_for_messages(60, timeout=60)
    wait_for(lambda: not server.queue())
    assert not server.logged("status=(later|failed)")
    assert sorted(message.recipients[0] for message in exchanger.messages) == sorted(f"<b{n}@example.net>" for n in range(60))


def letters_for_two(server, count):
    """Sends messages of which each is for example.net and for example.org."""
    with server.client() as client:
        for number in range(count):
            to = [f"b{number}@example.net", f"c{number}@example.org"]
            assert client.deliver("", to, LETTER).startswith(QUEUED)


@pytest.fixture
def pair(world, exchangers):
    """Exchangers at one port: of example.net, and of example.org."""
    world.exchanger.stop()
    net, org = exchangers(2)
    world.dns.mail("example.net", (10, net))
    world.dns.mail("example.org", (10, org))
    return net, org


def test_a_burst_of_messages_for_two_domains_that_take_few_connections(pair, relay, tmp_path):
    """Each domain's child waits for room; no message has to back off, and no domain gets one twice."""
    for exchanger in pair:
        exchanger.set(connection_limit=3, replies={".": lambda connection: time.sleep(0.05)})
    server = relay(mx_port=pair[0].port, spool=tmp_path / "other")
    letters_for_two(server, 30)
    wait_for(lambda: not server.queue(), 60)
    assert any(exchanger.refused for exchanger in pair)
    assert not server.logged("status=(later|failed)")
    for letter, exchanger in zip("bc", pair):
        assert sorted(message.recipients[0].partition("@")[0] for message in exchanger.messages) \
            == sorted(f"<{letter}{number}" for number in range(30))


def test_want_of_room_at_one_domain_slows_down_no_other(pair, relay, tmp_path):
    """The other domain has its copy at once, and the mail behind it waits for some seconds at most."""
    net, org = pair
    org.set(replies={"CONNECT": ["421 4.7.0 too busy"] * 3})
    server = relay("-j", 1, mx_port=net.port, spool=tmp_path / "other")
    manager = manager_of(server)
    os.kill(manager, signal.SIGSTOP)
    letters_for_two(server, 2)
    accepted(server, 20)
    os.kill(manager, signal.SIGCONT)
    net.wait_for_messages(22)
    wait_for(lambda: not server.queue())
    assert len(org.connections) > 3 and len(org.messages) == 2 and len(net.messages) == 22
    assert not server.logged("status=(later|failed)")


def test_no_room_beside_a_domain_that_is_not_reached(pair, relay, tmp_path):
    """The dead domain is not tried again because the other is busy; after some seconds the message backs off."""
    busy, dead = pair
    busy.set(replies={"CONNECT": "421 4.7.0 too busy"})
    dead.stop()
    server = relay("-w", 2, mx_port=busy.port, spool=tmp_path / "other")
    letters_for_two(server, 1)
    outcome, = server.outcomes("b0@example.net")
    assert outcome.status == "later" and outcome.words.count("421 4.7.0 too busy") == 1
    assert len(server.outcomes("c0@example.org")) == 1 < len(busy.connections) < 5


def test_a_dead_domain_of_several_costs_one_try_for_all_of_a_batch(pair, relay, tmp_path):
    """The first message waits for it; the others go to their live domain without that."""
    live, dead = pair
    dead.set(stall_at="CONNECT")
    server = relay("-j", 1, "-w", 2, mx_port=live.port, spool=tmp_path / "other")
    manager = manager_of(server)
    os.kill(manager, signal.SIGSTOP)
    letters_for_two(server, 20)
    os.kill(manager, signal.SIGCONT)
    live.wait_for_messages(20)
    wait_for(lambda: len(server.logged("to=<c.* status=later .*no answer in time")) == 20)
    assert len(dead.connections) <= 10      # one for each batch, which takes what it can in a second


def test_domains_that_are_not_reached_give_the_slot_to_others_in_between(pair, world, relay, tmp_path):
    """Each message of the batch waits for another of its two dead domains; other mail does not wait for all of them."""
    live, dead = pair
    dead.set(stall_at="CONNECT")
    world.dns.mail("example.edu", (10, dead))
    world.dns.mail("example.com", (10, live))
    server = relay("-j", 1, "-w", 1, mx_port=live.port, spool=tmp_path / "other")
    manager = manager_of(server)
    os.kill(manager, signal.SIGSTOP)
    with server.client() as client:
        for number in range(10):
            to = [f"b{number}@example.net", f"c{number}@example.org", f"d{number}@example.edu"]
            assert client.deliver("", to, LETTER).startswith(QUEUED)
    server.send("e@example.com", sender="")
    os.kill(manager, signal.SIGCONT)
    live.wait_for_messages(11)
    assert ["<e@example.com>"] in [message.recipients for message in live.messages[:6]]


def test_a_signal_during_a_message_for_two_domains_leaves_no_draft(pair, relay, tmp_path):
    """Its failures are passed on by a file that has no name."""
    for exchanger in pair:
        exchanger.set(stall_at="MAIL")
    server = relay(mx_port=pair[0].port, spool=tmp_path / "other")
    manager_of(server)
    letters_for_two(server, 1)
    wait_for(lambda: all(exchanger.connections for exchanger in pair))
    child, = transactions(server)
    os.kill(child, signal.SIGTERM)
    server.wait_for_log(f"process {child} died of signal")
    assert not server.tmp() and len(server.queue()) == 1


def test_reports_for_an_exchanger_that_takes_few_connections(pair, relay, tmp_path):
    """A report that finds no room has no batch yet; it does not back off, either."""
    net, org = pair
    net.set(replies={"RCPT": "550 5.1.1 no such user"})
    org.set(connection_limit=1, replies={".": lambda connection: time.sleep(0.1)})
    server = relay("-r", 2, mx_port=net.port, spool=tmp_path / "other")      # the queue is searched as often
    with server.client() as client:
        for number in range(20):
            assert client.deliver("c@example.org", [f"b{number}@example.net"], LETTER).startswith(QUEUED)
    org.wait_for_messages(20, timeout=60)
    wait_for(lambda: not server.queue())
    assert org.refused and not server.logged("status=later")


@pytest.mark.parametrize("say", ["421 4.7.0 too busy", "450 4.3.2 later"])
def test_an_exchanger_that_never_has_room(world, server, say):
    """After a few tries its mail has to back off, with its words."""
    world.exchanger.set(replies={"CONNECT": say})
    accepted(server, 3)
    for number in range(3):
        outcome, = server.outcomes(f"b{number}@example.net")
        assert outcome.status == "later" and say in outcome.words
    assert len(world.exchanger.connections) < 12


def test_a_refused_connection_beside_another_means_no_room(world, server):
    """As where a firewall counts connections: the message goes to its lane's next batch before it
    has to back off.  One that is refused alone backs off at once."""
    def shut(connection):
        world.exchanger._server.stop()      # it listens no more, and goes on with this one
        shut_down.set()
        opened.wait(60)

    shut_down, opened = threading.Event(), threading.Event()
    world.exchanger.set(replies={"MAIL": [shut]})
    server.send("b0@example.net", sender="")
    shut_down.wait(20)
    os.kill(manager_of(server), signal.SIGSTOP)
    server.send("b1@example.net", sender="")
    server.wait_for_log("no room for another connection .*onnection refused")
    opened.set()
    world.exchanger.start()
    os.kill(manager_of(server), signal.SIGCONT)
    world.exchanger.wait_for_messages(2)
    wait_for(lambda: not server.queue())
    assert len(server.logged("status=later")) == 0
    world.exchanger.stop()
    server.send("b2@example.net", sender="")
    outcome, = server.outcomes("b2@example.net")
    assert outcome.status == "later" and "onnection refused" in outcome.words


def test_a_slow_exchanger_gets_more_connections(world, server):
    """One more for each batch that ended well, up to half of the slots for batches; and a tenth of -j for fresh mail."""
    world.exchanger.set(replies={".": lambda connection: time.sleep(0.3)})
    accepted(server, 150)
    world.exchanger.wait_for_messages(150, timeout=60)
    assert 5 < world.exchanger.most <= 5 + 12
    wait_for(lambda: not server.queue())


def test_a_burst_for_one_place_is_shared_by_few_connections(world, server):
    accepted(server, 1000)
    world.exchanger.wait_for_messages(1000, timeout=120)
    assert world.exchanger.most <= 5 + 12
    wait_for(lambda: not server.queue())
    assert not server.logged("status=(later|failed)")


def test_a_dead_place_costs_one_try_for_all_of_a_batch(world, relay, tmp_path):
    """The others are settled with the same words."""
    world.exchanger.stop()
    server = relay("-j", 1, mx_port=world.exchanger.port, spool=tmp_path / "other")
    manager = manager_of(server)
    os.kill(manager, signal.SIGSTOP)
    accepted(server, 50)
    os.kill(manager, signal.SIGCONT)
    wait_for(lambda: len(server.logged("status=later .*onnection refused")) == 50)
    assert len(server.logged(" race: ")) <= 3


@pytest.fixture
def dead_places(world, exchangers):
    """Thirty domains: ten whose exchanger is silent, ten that refuse, ten that are slow at every step."""
    world.exchanger.stop()
    live, silent, slow = exchangers(3)      # at one port
    silent.set(stall_at="CONNECT")
    slow.set(replies={step: lambda connection: time.sleep(1) for step in ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", ".")})
    for number in range(10):
        world.dns.mail(f"silent{number}.example.org", (10, silent))
        world.dns.mail(f"slow{number}.example.org", (10, slow))
        world.dns.mx(f"refusing{number}.example.org", (10, "refusing.example.org"))
    world.dns.a("refusing.example.org", loopback())
    world.exchanger = live
    return [f"{kind}{number}.example.org" for number in range(10) for kind in ("silent", "refusing", "slow")]


def test_fresh_mail_beside_thirty_dead_places(world, relay, tmp_path, dead_places):
    """Their mail waits, and has slots; that of live places is tried all the same."""
    server = relay(mx_port=world.exchanger.port, spool=tmp_path / "other")
    manager = manager_of(server)
    with server.client() as client:
        for number in range(100):
            for domain in dead_places:
                assert client.deliver("", [f"b{number}@{domain}"], LETTER).startswith(QUEUED)
    for number in range(20):
        world.dns.mail(f"live{number}.example.org", (10, world.exchanger))
        accepted(server, 1, to=f"b@live{number}.example.org")
    world.exchanger.wait_for_messages(20, timeout=30)
    assert manager in children(server.pid) and server.queue()


def test_fresh_mail_beside_two_dead_places_with_long_queues(world, relay, tmp_path):
    """More of their mail waits than the queue manager can list; it does not fill the list."""
    server = relay("-j", 3, mx_port=world.exchanger.port, spool=tmp_path / "other")     # no slots for fresh mail
    server.stop()
    one = server.spool / "queue" / "20261123T110819.000000-1-1"
    world.dns.a("refusing.example.org", loopback())
    for number in range(6000):
        domain = f"dead{number % 2}.example.org"
        world.dns.mx(domain, (10, "refusing.example.org"))
        path = one.with_name(f"20261123T110819.{number:06d}-1-1")
        path.write_bytes(b"HELO me\r\nMAIL FROM:<>\r\nRCPT TO:<b@%s>\r\nDATA\r\nSubject: x\r\n\r\n.\r\n" % domain.encode())
        shutil.chown(path, one.parent.owner(), one.parent.group())
    server.start()
    server.wait_for_log("status=later", timeout=60)
    accepted(server, 1)
    world.exchanger.wait_for_messages(1, timeout=10)
    assert server.queue()


def test_a_retry_beside_two_slow_places_with_long_queues(world, exchangers, relay, tmp_path):
    """A lane without a batch comes before one that has some, even if its mail was tried before."""
    world.exchanger.stop()
    live, slow = exchangers(2)
    world.dns.mail("live.example.org", (10, live))
    for number in range(2):
        world.dns.mail(f"slow{number}.example.org", (10, slow))
    slow.set(replies={".": lambda connection: time.sleep(1)})
    live.stop()
    server = relay("-r", 6, mx_port=live.port, spool=tmp_path / "other")
    server.send("b@live.example.org", sender="")
    server.outcomes("b@live.example.org")
    live.start()
    with server.client() as client:
        for number in range(800):
            assert client.deliver("", [f"b@slow{number % 2}.example.org"], LETTER).startswith(QUEUED)
    retried, = live.wait_for_messages(1, timeout=60)
    assert sum(message.received < retried.received for message in slow.messages) < 500


# ---- Deaths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["manager", "batch", "child"])
def test_nothing_is_lost_or_sent_twice_when_one_of_them_is_killed(world, server, victim):
    """Whichever it is, and wherever it was: a message that was at its final dot may come twice.
    While there is no manager, a child that stores takes the place of the oldest one: then a client hears 451."""
    def send_one(number):
        with server.client() as client:
            if client.deliver("", [f"b{number}@example.net"], LETTER).startswith(QUEUED):
                taken.append(f"<b{number}@example.net>")

    def kill_one():
        found = {"manager": {manager_of(server)}, "batch": batches(server), "child": transactions(server)}[victim]
        for pid in list(found)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return len(killed) >= 3 or len(world.exchanger.messages) >= 200

    killed, taken = [], []
    world.exchanger.set(replies={".": lambda connection: time.sleep(0.02)})
    if victim != "child":
        sender = threading.Thread(target=lambda: [send_one(number) for number in range(200)])
        sender.start()
        wait_for(kill_one, 60)
        sender.join()
    else:
        while len(killed) < 3:
            send_one(len(taken))
            kill_one()
    assert killed
    server.hangup_until(lambda: not server.queue(), what="an empty queue")
    count = {}
    for message in world.exchanger.messages:
        count[message.recipients[0]] = count.get(message.recipients[0], 0) + 1
    assert set(count) >= set(taken)
    assert sum(count.values()) - len(count) <= len(killed) * (1 if victim != "manager" else 12)
    wait_for(lambda: children(server.pid) == [manager_of(server)] and not batches(server))


def test_a_batch_ends_with_its_server(world, server, gate):
    """After the message in hand, once the queue manager has noticed that the server is gone."""
    accepted(server, 12)
    batch, = wait_for(lambda: len(batches(server)) == 1 and batches(server))
    manager = manager_of(server)
    everybody = [manager, batch, *transactions(server)]
    wait_for(lambda: len(world.exchanger.connections) == 6)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(20)
    gate.set()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everybody), 90, what="the end of all")
    assert 6 <= len(world.exchanger.messages) <= 12
    server.start()
    world.exchanger.wait_for_messages(12)
    wait_for(lambda: not server.queue())
    assert len(world.exchanger.messages) == 12


def test_the_manager_notices_a_due_pipe_that_was_full(world, relay, tmp_path):
    """What found no room in it is found in the queue."""
    server = relay("-j", 1, mx_port=world.exchanger.port, spool=tmp_path / "other")
    manager = manager_of(server)
    os.kill(manager, signal.SIGSTOP)
    accepted(server, 1300)          # 58 octets each, and a pipe of Linux takes 65,536
    os.kill(manager, signal.SIGCONT)
    world.exchanger.wait_for_messages(1300, timeout=60)
    wait_for(lambda: not server.queue())
