"""The queue: what is owed is tried until it is delivered or given up, and what is
done is done, whoever is killed in between."""
import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from lab import BINARY, WATCHED, children, memory, run, wait_for

LONG_AGO = 1            # whatever has such a modification time is due
DAY = 24 * 3600
YEAR = 365 * DAY


@pytest.fixture
def house(dns, exchangers, relay):
    """house("-r", "1"): a relay with these options, and the exchangers .net and .org
    of example.net and example.org."""
    def make(*options):
        net, org = exchangers(2)
        dns.mail("example.net", (10, net))
        dns.mail("example.org", (10, org))
        return SimpleNamespace(relay=relay(*options, mx_port=net.port), net=net, org=org, dns=dns)
    return make


NUMBERS = itertools.count()


def stamp(age, form="%Y-%m-%dT%H:%M:%SZ"):
    return time.strftime(form, time.gmtime(time.time() - age))


def put(server, *recipients, sender="", age=0, due=LONG_AGO, outcomes=(), body="Subject: x\r\n"):
    """Puts a message into the queue as if it had come so many seconds ago; `outcomes`
    are (age, text) of the tries since then.  Returns its path."""
    lines = ["HELO me.com", f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{to}>" for to in recipients), "DATA", body + "."]
    lines += [f"{stamp(when)} {text}" for when, text in outcomes]
    new = server.spool / "new"
    new.write_text("".join(line + "\r\n" for line in lines), newline="")
    owner = server.spool.stat()
    os.chown(new, owner.st_uid, owner.st_gid)
    os.utime(new, (due, due))
    path = server.spool / "queue" / f"{stamp(age, '%Y%m%dT%H%M%S')}.{next(NUMBERS):06d}-1-1"
    return new.rename(path)


def look_through(server):
    """Has the manager look through the queue, and waits until it has: what it finds last
    of all is found in a second look, and so the first is over."""
    for _ in range(2):
        sentinel = put(server, "b@nowhere.invalid")     # fails at once, and is reported to nobody
        server.hangup()
        wait_for(lambda: not sentinel.exists(), what="the manager's look through the queue")


def outcomes_in(path):
    """The lines below the dot."""
    return path.read_bytes().decode().partition("\r\n.\r\n")[2]


def label(exchanger):
    return f"{exchanger.name}[{exchanger.host}]"


def wait_until_empty(server, timeout=20):
    wait_for(lambda: not server.queue(), timeout, "an empty queue")


def hangup_until_empty(server):
    server.hangup_until(lambda: not server.queue(), what="an empty queue")


def received_by(*each):
    """How many times each recipient was delivered to."""
    return Counter(path for exchanger in each for message in exchanger.messages for path in message.recipients)


def manager_of(server):
    """The queue manager: the only child of a server that has no message in hand."""
    return wait_for(lambda: min(children(server.pid), default=None), what="a queue manager")


class Withheld:
    """A reply that an exchanger gives when it is told to."""

    def __init__(self):
        self.asked = threading.Event()
        self._told = threading.Event()

    def __call__(self, connection):
        self.asked.set()
        self._told.wait(60)

    def give(self):
        self._told.set()


# ---- Outcomes ---------------------------------------------------------------------------------


def test_outcome_lines(house):
    world = house()
    world.net.set(replies={("RCPT", "<b@example.net>"): "550-5.1.1 nobody\n550 5.1.1 of this name",
                           ("RCPT", "<c@example.net>"): "451 4.7.1 greylisted",
                           ".": "250 2.0.0 Ok: queued as 17"})
    world.org.stop()
    world.relay.send("a@example.net", "b@example.net", "c@example.net", "d@example.org", sender="")
    path, = world.relay.queue()
    wait_for(lambda: outcomes_in(path).count("\r\n") == 4)
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    net, org = re.escape(label(world.net)), re.escape(label(world.org))
    lines = sorted(outcomes_in(path).split("\r\n"), key=lambda line: line[len("2026-11-23T11:08:19Z "):].split("<")[1:])
    for line, pattern in zip(lines, ["", rf"{when} sent <a@example\.net> {net} 250 2\.0\.0 Ok: queued as 17",
                                     rf"{when} failed <b@example\.net> {net} 550 5\.1\.1 nobody 5\.1\.1 of this name",
                                     rf"{when} later <c@example\.net> {net} 451 4\.7\.1 greylisted",
                                     rf"{when} later <d@example\.org> {org} 4\.4\.1 Connection refused"]):
        assert re.fullmatch(pattern, line)
    for name in "abcd":
        world.relay.outcomes(f"{name}@example.{'org' if name == 'd' else 'net'}")
    assert len(world.relay.logged(r" status=\w+ \(")) == 4


def test_mixed_recipients_across_a_kill(house):
    """First delivered once, second reported once, third delivered once at the retry."""
    world = house()
    world.net.set(replies={("RCPT", "<b@example.net>"): "550 5.1.1 nobody",
                           ("RCPT", "<c@example.net>"): ["450 4.2.0 greylisted"]})
    world.org.set(stall_at="MAIL")      # the report waits
    world.relay.send("a@example.net", "b@example.net", "c@example.net")
    for name in "abc":
        world.relay.outcomes(f"{name}@example.net")
    wait_for(lambda: any(connection.commands[1:] for connection in world.org.connections))
    world.relay.kill()
    assert len(world.relay.queue()) == 2
    world.org.set(stall_at=None)
    world.relay.start()
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<a@example.net>": 1, "<c@example.net>": 1}
    assert [command for command in world.net.connections[1].commands if command.startswith("RCPT")] == [
        "RCPT TO:<c@example.net>"]
    report, = world.org.messages
    assert report.recipients == ["<nour@example.org>"]
    assert report.data.count(b"Final-Recipient:") == 1
    assert b"Final-Recipient: rfc822; b@example.net\r\n" in report.data


def test_done_is_done_even_where_the_message_cannot_be_removed(house, strace):
    world = house()
    manager_of(world.relay)
    with strace(world.relay.pid, "inject=/^unlink:error=EIO") as trace:
        world.relay.send("b@example.net")
        world.relay.outcomes("b@example.net")
        wait_for(lambda: "INJECTED" in trace())
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1}


def test_record_that_fails_takes_no_earlier_one_with_it(house, strace):
    """Two transactions, and the disk does not take the second one's outcome at once."""
    world = house()
    world.net.set(replies={("RCPT", "<last@example.net>"): ["450 4.2.0 later"]})
    recipients = [f"b{n}@example.net" for n in range(100)] + ["next@example.net"]
    with strace(world.relay.pid, "inject=fsync:error=EIO:when=4") as trace:     # file, directory, record, record
        world.relay.send(*recipients, "last@example.net")
        path, = world.relay.queue()
        world.relay.outcomes("last@example.net")
        assert "INJECTED" in trace()
    assert set(re.findall(r" sent <(.*?)>", outcomes_in(path))) == set(recipients)
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {f"<{to}>": 1 for to in [*recipients, "last@example.net"]}


@pytest.mark.parametrize("torn", [b"", b"2026-11-23T11:08"], ids=["whole", "torn"])
def test_message_that_cannot_be_read_is_left_as_it_is(house, strace, torn):
    """Its records say who has it already: without them it would be sent again."""
    world = house()
    manager = manager_of(world.relay)
    look_through(world.relay)
    path = put(world.relay, "a@example.net", "b@example.net", due=time.time() + 200,
               outcomes=[(60, "sent <a@example.net> - 250 Ok"), (60, "later <b@example.net> - 451 later")])
    whole = path.read_bytes() + torn
    path.write_bytes(whole)
    with strace(manager, "inject=/^pread:error=EIO:when=3") as trace:    # envelope, dot, records
        world.relay.hangup_until(lambda: "INJECTED" in trace())
        world.relay.wait_for_log(f"^queue/{path.name} cannot be read ")
        assert path.read_bytes() == whole
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1}


def test_report_is_withdrawn_where_its_failure_cannot_be_recorded(relay, dns, exchangers, wrapped):
    """The report fits on the disk, and the record does not: else each try would report it."""
    net, org = exchangers(2)
    dns.mail("example.net", (10, net))
    dns.mail("example.org", (10, org))
    net.set(replies={("RCPT", "<b@example.net>"): "550 5.1.1 nobody", "RCPT": "451 4.7.1 later"})
    full = relay(binary=wrapped("ulimit -f 16"), mx_port=net.port)
    path = put(full, "b@example.net", "c@example.net", sender="nour@example.org", body="")
    room = 16 * 512 - path.stat().st_size - 30          # of which half a record takes all
    path.write_bytes(path.read_bytes().replace(b"\r\n.\r\n", b"\r\nX: " + b"x" * (room - 5) + b"\r\n.\r\n"))
    full.hangup_until(lambda: len(full.logged(f"^{path.name} report .* is withdrawn")) >= 3)
    wait_for(lambda: full.queue() == [path])
    assert org.connections == []
    full.stop()
    net.set(replies={("RCPT", "<b@example.net>"): "550 5.1.1 nobody"})
    server = relay(mx_port=net.port)
    hangup_until_empty(server)
    report, = org.messages
    assert b"\r\nFinal-Recipient: rfc822; b@example.net\r\n" in report.data
    assert received_by(net) == {"<c@example.net>": 1}


def test_report_stands_where_the_record_may_not_be_durable(house, strace):
    """The record is in the file: nobody would find the failure again."""
    world = house()
    world.net.set(replies={("RCPT", "<b@example.net>"): "550 5.1.1 nobody", ("RCPT", "<c@example.net>"): ["451 later"]})
    with strace(world.relay.pid, "inject=fsync:error=EIO:when=5") as trace:     # two files, two directories, record
        id = world.relay.send("b@example.net", "c@example.net")
        world.relay.wait_for_log(f"^{id} outcomes cannot be recorded")
        assert "INJECTED" in trace()
    hangup_until_empty(world.relay)
    report, = world.org.messages
    assert b"\r\nFinal-Recipient: rfc822; b@example.net\r\n" in report.data
    assert received_by(world.net) == {"<c@example.net>": 1}


# ---- When ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("retry, age, wait", [
    (1000, 0, 1000), (1000, 1000, 2000), (1000, 2000, 3000), (1000, 2700, 3600), (1000, DAY, 3600),
    (7200, 0, 7200), (7200, 8000, 7200),
])
def test_back_off(house, retry, age, wait):
    """-r first, then as long again as it has waited already, and at most an hour."""
    world = house("-r", retry)
    world.relay.stop()
    world.net.set(replies={"RCPT": "451 4.7.1 later"})
    tries = range(0, age, max(wait, 1000))
    path = put(world.relay, "b@example.net", age=age,
               outcomes=[(age - when, "later <b@example.net> - 451 4.7.1 later") for when in tries])
    world.relay.start()
    world.relay.outcomes("b@example.net")
    assert wait - 15 <= path.stat().st_mtime - time.time() <= wait + 15


def test_greylisted(house):
    """Delivered at the next try, which comes by itself when it is due, and not before."""
    world = house("-r", "1")
    world.net.set(replies={"RCPT": ["451 4.7.1 greylisted"]})
    world.relay.send("b@example.net")
    world.net.wait_for_messages(1)
    wait_until_empty(world.relay)
    assert [outcome.status for outcome in world.relay.outcomes("b@example.net", 2)] == ["later", "sent"]
    assert len(world.net.connections) == 2


def test_nothing_is_tried_before_it_is_due_unless_by_sighup(house):
    world = house()
    world.relay.stop()
    early = [put(world.relay, f"b{n}@example.net", due=time.time() + 200) for n in range(3)]
    put(world.relay, "due@example.net")
    world.relay.start()
    world.net.wait_for_messages(1)
    wait_for(lambda: world.relay.queue() == early)
    assert received_by(world.net) == {"<due@example.net>": 1}
    world.relay.hangup()
    world.net.wait_for_messages(4)
    wait_until_empty(world.relay)
    assert set(received_by(world.net).values()) == {1}


@pytest.mark.parametrize("age, due, tries", [
    (0, 2 * YEAR, []), (0, 10 * YEAR, []), (10 * YEAR, LONG_AGO, []), (10 * YEAR, 10 * YEAR, []),
    (10 * YEAR, LONG_AGO, [10 * YEAR - 300, 10 * YEAR - 900]), (-10 * YEAR, LONG_AGO, []),
    (0, LONG_AGO, [-10 * YEAR]), (0, 0, []), (0, -10, []),
], ids=["due in two years", "due in ten years", "ten years old", "ten years old and due in ten",
        "ten years old and tried then", "from the future", "tried in the future", "due in 1970", "due before 1970"])
def test_clock_that_jumped(house, age, due, tries):
    """Neither expires the mail nor keeps it waiting."""
    world = house()
    world.relay.stop()
    world.net.set(replies={"RCPT": ["451 4.7.1 later"]})
    path = put(world.relay, "b@example.net", age=age, due=due + time.time() if due > LONG_AGO else due,
               outcomes=[(when, "later <b@example.net> - 451 4.7.1 later") for when in tries])
    world.relay.start()
    outcome, = world.relay.outcomes("b@example.net")
    assert outcome.status == "later"
    assert 0 < path.stat().st_mtime - time.time() <= 3600
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1}


EXPIRED = [(800, "later <b@example.net> - 451 4.7.1 greylisted"), (400, "later <b@example.net> - 451 4.7.1 greylisted")]


@pytest.mark.parametrize("expire, status", [(500, "failed"), (1500, "later")])
def test_expiry(house, expire, status):
    world = house("-r", "400", "-e", expire)
    world.relay.stop()
    world.net.set(replies={"RCPT": "451 4.7.1 greylisted"})
    put(world.relay, "b@example.net", sender="nour@example.org", age=1000, outcomes=EXPIRED)
    world.relay.start()
    outcome, = world.relay.outcomes("b@example.net")
    assert outcome.status == status
    if status == "failed":
        assert re.fullmatch(rf"4\.4\.7 given up after \d+ seconds; last: {re.escape(label(world.net))} "
                            r"451 4\.7\.1 greylisted", outcome.words)
        world.org.wait_for_messages(1)
        wait_until_empty(world.relay)


def test_last_try_may_succeed(house):
    """What is old enough to be given up is tried once more before."""
    world = house("-r", "400", "-e", "500")
    world.relay.stop()
    put(world.relay, "b@example.net", age=1000, outcomes=EXPIRED)
    world.relay.start()
    assert world.relay.outcomes("b@example.net")[0].status == "sent"


def test_expiry_by_the_clock(house):
    world = house("-r", "1", "-e", "2")
    world.net.stop()
    world.relay.send("b@example.net")
    report, = world.org.wait_for_messages(1)
    assert b"\r\nStatus: 4.4.7\r\n" in report.data
    statuses = [match[1] for match in world.relay.logged(r"to=<b@example\.net> .* status=(\w+)")]
    assert statuses == ["later"] * (len(statuses) - 1) + ["failed"] and len(statuses) > 1
    wait_until_empty(world.relay)


def test_removed_message_is_tried_no_more(house):
    world = house()
    world.net.set(replies={"RCPT": ["451 4.7.1 later"]})
    world.relay.send("b@example.net")
    world.relay.outcomes("b@example.net")
    path, = world.relay.queue()
    path.unlink()
    look_through(world.relay)
    assert len(world.net.connections) == 1


# ---- The queue by file commands --------------------------------------------------------------------


def test_touched_message_is_tried(house):
    """At the next look through the queue, without a signal."""
    world = house("-r", "1")
    path = put(world.relay, "b@example.net", due=time.time() + 200)
    sentinel = put(world.relay, "b@nowhere.invalid")
    wait_for(lambda: not sentinel.exists(), what="a look through the queue")
    assert world.relay.queue() == [path]
    subprocess.run(["touch", "-t", "202001010000", path], check=True)
    world.net.wait_for_messages(1)
    wait_until_empty(world.relay)


def test_message_that_is_moved_away_is_held(house):
    world = house("-r", "1")
    path = put(world.relay, "b@example.net", due=time.time() + 200)
    held = world.relay.spool / "held"
    held.mkdir()
    subprocess.run(["mv", path, held], check=True)
    os.utime(held / path.name, (LONG_AGO, LONG_AGO))
    look_through(world.relay)
    assert world.net.connections == []
    subprocess.run(["mv", held / path.name, path], check=True)
    world.net.wait_for_messages(1)
    wait_until_empty(world.relay)


def test_message_that_is_moved_away_while_it_is_tried_is_not_sent_again(house):
    world = house("-r", "1")
    reply = Withheld()
    world.net.set(replies={".": reply})
    world.relay.send("b@example.net", sender="")
    path, = world.relay.queue()
    held = path.rename(world.relay.spool / "held")
    reply.give()
    assert world.relay.outcomes("b@example.net")[0].status == "sent"
    held.rename(path)
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1}


# ---- Who is killed ---------------------------------------------------------------------------------


def is_stalled(exchanger, stage):
    """Whether somebody waits for the reply to this."""
    return any(stage == "CONNECT" or connection.commands[-1:] and connection.commands[-1].startswith(stage)
               for connection in exchanger.connections)


@pytest.mark.parametrize("others", [[], ["a@example.org"]], ids=["alone", "after another's outcome"])
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "."])
def test_killed_forwarder_defers_its_message(house, stage, others):
    world = house("-r", "200")
    manager = manager_of(world.relay)
    world.net.set(stall_at=stage)
    world.relay.send(*others, "b@example.net")
    path, = world.relay.queue()
    wait_for(lambda: is_stalled(world.net, stage))
    for other in others:
        world.relay.outcomes(other)
    forwarder, = set(children(world.relay.pid)) - {manager}
    for pid in [forwarder, *children(forwarder)]:
        with contextlib.suppress(ProcessLookupError):       # the other's may have ended just now
            os.kill(pid, signal.SIGKILL)
    world.relay.wait_for_log(f"process {forwarder} died of signal 9")
    assert 150 < path.stat().st_mtime - time.time() <= 203
    world.net.set(stall_at=None)
    hangup_until_empty(world.relay)
    assert received_by(world.net, world.org) == {f"<{to}>": 1 for to in [*others, "b@example.net"]}


def test_killed_child_of_one_domain_defers_its_recipients(house):
    world = house()
    manager = manager_of(world.relay)
    world.net.set(stall_at=".")
    world.relay.send("a@example.org", "b@example.net")
    wait_for(lambda: is_stalled(world.net, "."))
    world.relay.outcomes("a@example.org")
    forwarder, = set(children(world.relay.pid)) - {manager}
    child = wait_for(lambda: len(children(forwarder)) == 1 and children(forwarder)[0])
    os.kill(child, signal.SIGKILL)
    world.relay.wait_for_log(f"process {child} died of signal 9")
    world.net.set(stall_at=None)
    hangup_until_empty(world.relay)
    assert received_by(world.net, world.org) == {"<a@example.org>": 1, "<b@example.net>": 1}


def test_message_of_a_killed_forwarder_is_not_touched_before_its_children_are_done(house):
    world = house()
    manager = manager_of(world.relay)
    reply = Withheld()
    world.net.set(replies={".": reply})
    world.relay.send("a@example.org", "b@example.net")
    reply.asked.wait(20)
    world.relay.outcomes("a@example.org")
    forwarder, = set(children(world.relay.pid)) - {manager}
    os.kill(forwarder, signal.SIGKILL)
    world.relay.wait_for_log(f"process {forwarder} died of signal 9")
    look_through(world.relay)
    assert len(world.net.connections) == 1
    reply.give()
    assert world.relay.outcomes("b@example.net")[0].status == "sent"
    hangup_until_empty(world.relay)
    assert received_by(world.net, world.org) == {"<a@example.org>": 1, "<b@example.net>": 1}


def test_killed_manager_is_replaced(house):
    world = house()
    first = manager_of(world.relay)
    os.kill(first, signal.SIGKILL)
    put(world.relay, "b@example.net")
    world.net.wait_for_messages(1)
    assert manager_of(world.relay) != first
    world.relay.wait_for_log(f"process {first} died of signal 9")


def test_sighup_while_there_is_no_manager(house):
    """It is passed on to the next one."""
    world = house()
    first = manager_of(world.relay)
    os.kill(first, signal.SIGKILL)
    world.relay.wait_for_log(f"process {first} died of signal 9")
    put(world.relay, "b@example.net", due=time.time() + 200)
    world.relay.hangup()
    world.net.wait_for_messages(1)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
def test_restart_while_old_forwarders_run(house, ends):
    world = house()
    manager = manager_of(world.relay)
    reply = Withheld()
    world.net.set(replies={".": [reply]})
    world.relay.send("b@example.net")
    reply.asked.wait(20)
    put(world.relay, "c@example.net")
    os.kill(world.relay.pid, ends)
    assert world.relay.process.wait(20) == (0 if ends == signal.SIGTERM else -ends)
    if ends == signal.SIGKILL:          # it was not told, and looks around from time to time
        os.kill(manager, signal.SIGHUP)
    world.relay.start()
    look_through(world.relay)
    world.net.wait_for_messages(1)
    assert received_by(world.net) == {"<c@example.net>": 1}
    reply.give()
    world.net.wait_for_messages(2)
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1, "<c@example.net>": 1}


def test_killed_with_all_its_children(house):
    """What it had said 250 to is delivered after the restart."""
    world = house()
    world.net.set(stall_at="CONNECT")
    for n in range(5):
        world.relay.send(f"b{n}@example.net")
    world.relay.kill()
    assert len(world.relay.queue()) == 5
    world.net.set(stall_at=None)
    world.relay.start()
    hangup_until_empty(world.relay)
    assert received_by(world.net) == {f"<b{n}@example.net>": 1 for n in range(5)}


def test_what_is_being_stored_at_sigterm_is_stored_and_answered(house, strace):
    world = house()
    with world.relay.client() as client:
        with strace(world.relay.pid, "trace=fsync", "inject=fsync:delay_enter=300000:when=1") as trace:
            for command in ["HELO me.com", "MAIL FROM:<>", "RCPT TO:<b@example.net>", "DATA"]:
                client.say(command)
            client.send(b"Subject: x\r\n.\r\n")
            wait_for(lambda: "fsync(" in trace())
            world.relay.process.terminate()
            assert client.reply().startswith("250 2.0.0 Ok: queued as ")
            assert client.reply().startswith("421 4.3.2 ")
            assert client.eof()
    assert world.relay.process.wait(20) == 0
    world.net.wait_for_messages(1)      # by a forwarder that stays
    wait_until_empty(world.relay)


# ---- Many --------------------------------------------------------------------------------------------


class Crowd:
    """Counts who is at an exchanger at once, between DATA and the final dot."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.Lock()

    def enter(self, connection):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.03)        # the longer, the more would be here at once

    def leave(self, connection):
        with self._lock:
            self.now -= 1


@pytest.mark.parametrize("forwarders", [1, 3])
def test_no_more_forwarders_than_j(house, forwarders):
    world = house("-j", forwarders)
    crowd = Crowd()
    world.net.set(replies={"DATA": crowd.enter, ".": crowd.leave})
    domains = [f"d{n}.example.net" for n in range(12)]
    for domain in domains:
        world.dns.mail(domain, (10, world.net))
    for domain in domains[:6]:
        put(world.relay, f"b@{domain}")
    world.relay.hangup()
    for domain in domains[6:]:
        world.relay.send(f"b@{domain}")
    world.net.wait_for_messages(len(domains))
    wait_until_empty(world.relay)
    assert received_by(world.net) == {f"<b@{domain}>": 1 for domain in domains}
    assert 1 <= crowd.most <= forwarders


def break_off(exchanger):
    exchanger.stop()


def fall_silent(exchanger):
    exchanger.set(stall_at="CONNECT")


def fall_silent_late(exchanger):
    exchanger.set(stall_at="EHLO")


def recover(exchanger):
    exchanger.stop()
    exchanger.set(stall_at=None)
    exchanger.start()


@pytest.mark.parametrize("forwarders", [2, 50])
@pytest.mark.parametrize("die", [break_off, fall_silent, fall_silent_late])
def test_dead_exchanger_does_not_hold_up_a_live_one(house, die, forwarders):
    world = house("-r", "2", "-j", forwarders)
    world.relay.stop()
    die(world.org)
    many = [put(world.relay, f"b{n}@example.org") for n in range(300)]
    world.relay.start()
    wait_for(lambda: world.org.connections or world.relay.logged("refused"))
    sent = time.monotonic()
    world.relay.send("fresh@example.net")
    put(world.relay, "old@example.net")
    world.relay.hangup()
    world.net.wait_for_messages(2, timeout=10)      # its own time-outs are minutes
    assert time.monotonic() - sent < 10
    assert len(world.relay.queue()) >= len(many)
    recover(world.org)
    world.relay.hangup()
    world.org.wait_for_messages(len(many), timeout=30)
    wait_until_empty(world.relay, timeout=30)
    assert received_by(world.org) == {f"<b{n}@example.org>": 1 for n in range(300)}


def test_slow_exchanger_does_not_fill_all_the_places(house):
    """Its mail is more than can wait for it in memory; what comes behind is seen all the same."""
    world = house("-j", "4")
    world.relay.stop()
    world.org.set(replies={"MAIL": lambda connection: time.sleep(2)})
    for n in range(1500):
        put(world.relay, f"b{n}@example.org")
    many = [put(world.relay, f"b{n}@example.net") for n in range(30)]
    world.relay.start()
    wait_for(lambda: not any(path.exists() for path in many), 60, what="the mail for the other domain")
    assert len(world.org.messages) < 200




@pytest.mark.skipif(b"__asan_" in BINARY.read_bytes(), reason="a sanitizer keeps what was freed")
@pytest.mark.skipif(WATCHED, reason="an emulator's memory, or valgrind's, is more than the program's")
def test_memory_does_not_grow_with_the_queue(house):
    world = house("-r", "2", "-j", "4")
    world.org.stop()
    manager = manager_of(world.relay)
    look_through(world.relay)
    before = [memory(pid) for pid in (world.relay.pid, manager)]
    for n in range(3000):
        put(world.relay, f"b{n}@example.org", due=LONG_AGO if n % 2 else time.time() + 3000)
    look_through(world.relay)
    after = [memory(pid) for pid in (world.relay.pid, manager)]
    assert all(now - then < 400 * 1024 for then, now in zip(before, after)), f"{before} {after}"
    assert manager in children(world.relay.pid)


# ---- The log --------------------------------------------------------------------------------------------


def test_accepted_message_has_a_line(house):
    """Before those of its outcomes, since the child that stores it writes both."""
    world = house()
    body = "Subject: x\n\nDear Nour\n..\n"
    with world.relay.client() as client:
        reply = client.deliver("nour@example.org", ["a@example.net", "b@example.net"], body)
        id, port = reply.rpartition(" ")[2], client.local_port
    world.relay.outcomes("b@example.net")
    lines = [line for line in world.relay.log if line.startswith(id)]
    size = len(body.replace("\n", "\r\n"))
    assert lines[0] == f"{id} client=127.0.0.1:{port} helo=me.com from=<nour@example.org> size={size} recipients=2"


def test_accepted_message_is_logged_where_another_forwards_it(house):
    world = house("-j", "1")
    ids = [world.relay.send(f"b{n}@example.net", sender="") for n in range(3)]
    for id in ids:
        world.relay.wait_for_log(rf"^{id} client=127\.0\.0\.1:\d+ helo=me\.com from=<> size=25 recipients=1$")
    wait_until_empty(world.relay)


def test_refusal_names_sender_and_recipient_where_they_are_known(house):
    world = house("-d", "example.net", "-m", "100")
    with world.relay.client() as client:
        def refused(line, code, known):
            assert client.say(line).startswith(code)
            world.relay.wait_for_log(rf"^127\.0\.0\.1:{client.local_port} refused: {code} [^=]*{known}$")

        client.say("HELO me.com")
        refused("FOO", "500", "")
        refused("MAIL FROM:<nour@example.org", "501", "")
        refused("MAIL FROM:<nour@example.org> SIZE=101", "552", " from=<nour@example.org>")
        refused("RCPT TO:<b@example.net>", "503", "")
        client.say("MAIL FROM:<nour@example.org>")
        refused("RCPT TO:<b@example.com>", "550", " from=<nour@example.org> to=<b@example.com>")
        refused("RCPT TO:<b@example.com", "501", " from=<nour@example.org>")
        client.say("RCPT TO:<a@example.net>")
        client.say("RCPT TO:<b@example.net>")
        client.say("DATA")
        refused("x" * 100 + "\r\n.", "552", " from=<nour@example.org> to=<b@example.net> recipients=2")
        refused("BAR", "500", "")


# ---- smtp -l --------------------------------------------------------------------------------------------


def listing(server, *words):
    result = run("-l", "-q", server.spool, *words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_listing(house):
    world = house()
    world.relay.stop()
    other = "mx1.example.net[192.0.2.1] 250 2.0.0 Ok"
    said = "mx1.example.net[192.0.2.1] 451 4.7.1 greylisted"
    now = time.time()
    newest = put(world.relay, "c@example.net", age=20, due=now + 250, body="Subject: x\r\n\r\nDear Nour\r\n")
    oldest = put(world.relay, "a@example.net", "b@example.net", "c@example.org", sender="nour@example.org",
                 age=DAY + 3661, due=now - 100,
                 outcomes=[(DAY, f"later <a@example.net> {said}"), (DAY, f"sent <b@example.net> {other}"),
                           (4000, f"later <a@example.net> {said} again")])
    put(world.relay, "a@example.net", age=3700, due=now + 7300, sender='"a b"@example.org')
    middle = world.relay.queue()[1]
    (world.relay.spool / "queue" / "junk").write_bytes(b"")
    lines = listing(world.relay).splitlines()
    for line, pattern in zip(lines, [
            rf"{oldest.name}  12 octets  age 1d01h01m  from <nour@example\.org>  2 tries  next try in 0m00s",
            rf"    <a@example\.net>  {re.escape(said)} again",
            r"    <c@example\.org>  not tried yet",
            rf'{middle.name}  12 octets  age 0d01h01m  from <"a b"@example\.org>  0 tries  next try in 0d02h0[01]m',
            r"    <a@example\.net>  not tried yet",
            rf"{newest.name}  25 octets  age 0m[2-5]\ds  from <>  0 tries  next try in [34]m\d\ds",
            r"    <c@example\.net>  not tried yet",
            r"3 messages for 4 recipients, 49 octets"]):
        assert re.fullmatch(pattern, line), line
    assert len(lines) == 8


def test_listing_of_an_empty_queue(house):
    assert listing(house().relay) == "0 messages for 0 recipients, 0 octets\n"


def test_listing_of_what_has_a_word(house):
    """In its id, its sender or a recipient that it is owed to, in any case."""
    world = house()
    world.relay.stop()
    first = put(world.relay, "a@example.net", "done@example.com", sender="nour@example.org", due=time.time() + 200,
                outcomes=[(60, "sent <done@example.com> - 250 Ok"), (60, "later <a@example.net> - 451 later")])
    second = put(world.relay, "b@example.net", sender="lina@example.org", due=time.time() + 200)

    def ids(*words):
        *lines, last = listing(world.relay, *words).splitlines()
        found = [line.split()[0] for line in lines if not line.startswith(" ")]
        assert last.startswith(f"{len(found)} message{'s' * (len(found) != 1)} for ")
        return found
    for words, found in [(("nour",), [first]), (("B@EXAMPLE",), [second]), (("example.net",), [first, second]),
                         ((first.name,), [first]), (("nour", "lina"), [first, second]), (("done@",), []),
                         (("a@example.nex",), []), (("451",), []), (("nour@", "a@"), [first, second])]:
        assert ids(*words) == [path.name for path in found], words
    def timeless(*words):
        return re.sub(r"\d+m\d\ds", "-", listing(world.relay, *words)).splitlines()
    assert timeless("nour") == [*[line for line in timeless() if "nour" in line or "a@example.net" in line],
                                "1 message for 1 recipient, 12 octets"]


def test_words_of_all_exchangers_are_recorded_and_listed(dns, exchangers, relay):
    """Those of the last try, each exchanger's once, in a line that reads back as one try."""
    first, second, dead = exchangers(3)
    dns.mail("example.net", (10, first), (20, second), (30, dead))
    first.set(replies={"RCPT": "451 4.7.1 greylisted"})
    second.set(replies={"CONNECT": "421 4.3.2 too busy"})
    dead.stop()
    server = relay(mx_port=first.port)
    server.send("b@example.net", "c@example.net", sender="")
    said = (rf"{re.escape(label(first))} 451 4\.7\.1 greylisted; {re.escape(label(second))} 421 4\.3\.2 too busy; "
            rf"{re.escape(label(dead))} 4\.4\.1 Connection refused")
    outcome = server.outcomes("c@example.net")[0]
    assert re.fullmatch(said, f"{outcome.relay} {outcome.words}")
    path, = server.queue()
    record = rf"(?m)^\S+ later <b@example\.net> {said}\r$"
    wait_for(lambda: len(re.findall(record, outcomes_in(path))) == 1)
    line, *owed, _ = listing(server).splitlines()
    assert "  1 try  " in line
    assert [re.fullmatch(rf"    <\w@example\.net>  {said}", line) is not None for line in owed] == [True, True]
    server.hangup_until(lambda: re.search("  [2-9] tries  ", listing(server)))
    wait_for(lambda: f"  {len(re.findall(record, outcomes_in(path)))} tries  " in listing(server))
    second.set(replies={"RCPT": "550 5.1.1 nobody"})       # a failure is one exchanger's, and so are its words
    hangup_until_empty(server)
    wait_for(lambda: server.outcomes("b@example.net")[-1].words == "550 5.1.1 nobody")


def test_listing_without_a_queue(tmp_path):
    result = run("-l", "-q", tmp_path / "nothing")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1 and str(tmp_path / "nothing") in result.stderr


def test_listing_while_a_message_is_tried(house):
    """Looking disturbs nobody: the message's lock is still there after it."""
    world = house()
    reply = Withheld()
    world.net.set(replies={".": reply})
    id = world.relay.send("b@example.net", sender="")
    reply.asked.wait(20)
    for _ in range(2):
        assert re.fullmatch(rf"{id}  \d+ octets  age 0m\d\ds  from <>  0 tries  being tried now\n"
                            r"    <b@example\.net>  not tried yet\n"
                            r"1 message for 1 recipient, \d+ octets\n", listing(world.relay))
    look_through(world.relay)
    reply.give()
    wait_until_empty(world.relay)
    assert received_by(world.net) == {"<b@example.net>": 1}
