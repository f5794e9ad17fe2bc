"""The spool: what is on disk while a message is received and after, and what the
client is told when the disk, or the machine, does not take it."""
import contextlib
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import BINARY, children, run, wait_for

LONG_AGO = (1, 1)       # a time: whatever has it is due

# What a refusal says (RFC 5321 4.2.2, RFC 3463 3.4).
FULL = "452 4.3.1 Error: insufficient system storage, try again later"
NOT_STORED = "451 4.3.0 Error: message not stored, try again later"

DATE = (r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} "
        r"\d\d:\d\d:\d\d \+0000")


@pytest.fixture
def waiting(world):
    """A world whose exchanger never greets: what is queued stays as it was stored."""
    world.exchanger.set(stall_at="CONNECT")
    return world


def begin(client, *commands):
    """Says commands that are all accepted."""
    for command in commands:
        reply = client.say(command)
        assert reply[0] in "23", f"{command}: {reply}"


ENVELOPE = ("HELO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<b@example.net>")


def wait_until_empty(server):
    wait_for(lambda: not server.queue() and not server.tmp(), what="an empty spool")


# ---- The file ---------------------------------------------------------------------------


def test_file_grows_with_the_dialogue(waiting):
    server = waiting.relay
    with server.client() as client:
        begin(client, "HELO me.com")
        assert server.tmp() == []
        expected = b"HELO me.com\r\n"
        for command in (*ENVELOPE[1:], "RCPT TO:<c@example.net>"):
            begin(client, command)
            expected += command.encode() + b"\r\n"
            draft, = server.tmp()
            assert draft.read_bytes() == expected
        begin(client, "DATA")
        # RFC 5321 4.4
        trace = (rf"Received: from me\.com \(\[127\.0\.0\.1\]:{client.local_port}\)\r\n"
                 rf"\tby relay\.example\.org with SMTP id {re.escape(draft.name)};\r\n\t{DATE}\r\n").encode()
        head = draft.read_bytes()
        assert re.fullmatch(re.escape(expected + b"DATA\r\n") + trace, head)
        body = b"Subject: testing my smtp server\r\n\r\nDear Nour, This is me testing my server\r\n"
        client.send(body)
        wait_for(lambda: draft.read_bytes() == head + body, what="the body in the draft")
        assert server.tmp() == [draft] and server.queue() == []
        client.send(b".\r\n")
        assert client.reply() == f"250 2.0.0 Ok: queued as {draft.name}"
    message, = server.queue()
    assert (server.tmp(), message.name) == ([], draft.name)
    assert message.read_bytes() == head + body + b".\r\n"


def test_one_name_everywhere(world):
    """In the spool, in the reply, in the log and in the trace."""
    world.exchanger.set(replies={"RCPT": ["451 4.7.1 later"]})
    with world.relay.client() as client:
        id = client.deliver("", ["b@example.net"], "Subject: x\n").rpartition(" ")[2]
        port = client.local_port
    outcome, = world.relay.outcomes("b@example.net")
    path, = world.relay.queue()
    assert outcome.id == path.name == id
    assert f" id {id};\r\n".encode() in path.read_bytes()
    when = re.fullmatch(rf"(\d{{8}}T\d{{6}})\.\d{{6}}-{port}-[0-9a-f]+", id)[1]
    assert abs(time.time() - time.mktime(time.strptime(when + "UTC", "%Y%m%dT%H%M%S%Z")) + time.timezone) < 60


def test_modes(dns, exchangers, relay):
    exchanger, = exchangers(1)
    exchanger.set(stall_at="CONNECT")
    dns.mail("example.net", (10, exchanger))
    before = os.umask(0)
    try:
        server = relay(mx_port=exchanger.port)
    finally:
        os.umask(before)
    server.send("b@example.net")
    with server.client() as client:
        begin(client, *ENVELOPE)
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in server.spool.rglob("*")}
    assert {path.parent.name for path in found} == {server.spool.name, "tmp", "queue"}
    assert {path: mode for path, mode in found.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}
    assert stat.S_IMODE(server.spool.stat().st_mode) == 0o700


@pytest.mark.parametrize("said, stored", [
    (["helo me.com", "mail from:<nour@example.org>", "rcpt to:<b@example.net>"],
     ["HELO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<b@example.net>"]),
    (["EhLo [127.0.0.1]  ", "MAIL FROM:<> ", "RCPT TO:<B@Example.NET>"],
     ["EHLO [127.0.0.1]", "MAIL FROM:<>", "RCPT TO:<B@Example.NET>"]),
    (["EHLO me.com", "MAIL FROM:<@a.example,@b.example:nour@example.org>", "RCPT TO:<@c.example:b@example.net>"],
     ["EHLO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<b@example.net>"]),       # RFC 5321 appendix C
    (["EHLO me.com", "MAIL FROM:<nour@example.org> size=1000 body=8bitmime", "RCPT TO:<b@example.net>"],
     ["EHLO me.com", "MAIL FROM:<nour@example.org> BODY=8BITMIME", "RCPT TO:<b@example.net>"]),
    (["EHLO me.com", "MAIL FROM:<nour@example.org> BODY=7BIT SIZE=0", "RCPT TO:<b@example.net>"],
     ["EHLO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<b@example.net>"]),
    (["HELO me.com", 'MAIL FROM:<"a>\\"b c"@example.org>', "RCPT TO:<b@[127.0.0.1]>"],
     ["HELO me.com", 'MAIL FROM:<"a>\\"b c"@example.org>', "RCPT TO:<b@[127.0.0.1]>"]),
    (["HELO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<postMASTER>"],
     ["HELO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<postmaster@relay.example.org>"]),
], ids=["lower case", "blanks at the end", "source routes", "8BITMIME", "7BIT", "quoted", "postmaster"])
def test_commands_are_stored_in_canonical_form(relay, said, stored):
    server = relay()
    with server.client() as client:
        begin(client, *said)
        draft, = server.tmp()
        assert draft.read_bytes().decode() == "".join(line + "\r\n" for line in stored)


@pytest.mark.parametrize("end, said, stored", [
    (b"\r\n", b"Subject: x\r\n\r\n..a\r\n...\r\n.\r\n", b"Subject: x\r\n\r\n..a\r\n...\r\n.\r\n"),
    (b"\r\n", b"\r\n.a dot that hides nothing\r\n.\r\n", b"\r\na dot that hides nothing\r\n.\r\n"),
    (b"\r\n", b".\r\n", b".\r\n"),
    (b"\r\n", b"\r\n" + b"x" * 100000 + b"\r\n.\r\n", b"\r\n" + b"x" * 100000 + b"\r\n.\r\n"),
    (b"\r\n", b"\r\n\0\x80\xff\r\n.\r\n", b"\r\n\0\x80\xff\r\n.\r\n"),
    (b"\n", b"Subject: x\n\n..a\n.b\nc\r\n.\n", b"Subject: x\r\n\r\n..a\r\nb\r\nc\r\n.\r\n"),
], ids=["doubled dots", "single dot", "nothing", "long line", "binary", "LF session"])
def test_body_is_stored_as_it_goes_over_the_wire(waiting, end, said, stored):
    """RFC 5321 4.5.2: dots doubled, and nothing but CRLF ends a line."""
    with waiting.relay.client() as client:
        for command in (*ENVELOPE, "DATA"):
            client.send(command.encode() + end)
            assert client.reply()[0] in "23"
        client.send(said)
        assert client.reply().startswith("250 2.0.0 ")
    path, = waiting.relay.queue()
    body = re.sub(rb"\A.*\r\nDATA\r\nReceived: .*?\r\n\t.*?\r\n\t.*?\r\n", b"", path.read_bytes(), flags=re.DOTALL)
    assert body == stored


# ---- What was begun and not finished --------------------------------------------------------

def disconnect(server, client):
    client.close()


def terminate(server, client):
    server.process.terminate()
    assert client.reply().startswith("421 4.3.2 ")


def say_nothing(server, client):
    assert client.reply() == "421 4.4.2 relay.example.org Error: timeout exceeded"


def say(command):
    def end(server, client):
        assert client.say(command)[0] == "2"
    end.__name__ = command
    return end


STATES = {"MAIL": ENVELOPE[:2], "RCPT": ENVELOPE, "DATA": (*ENVELOPE, "DATA"), "body": (*ENVELOPE, "DATA")}


@pytest.mark.parametrize("state, end", [
    *((state, say(command)) for state in ("MAIL", "RCPT")
      for command in ("RSET", "QUIT", "HELO me.com", "EHLO me.com")),
    *((state, end) for state in STATES for end in (disconnect, terminate)),
    ("body", say_nothing),
], ids=lambda value: getattr(value, "__name__", value))
def test_unfinished_transaction_leaves_nothing(relay, state, end):
    server = relay(*(["-t", "1"] if end is say_nothing else []))
    with server.client() as client:
        begin(client, *STATES[state])
        if state == "body":
            client.send(b"Subject: x\r\n" * 1000)
        assert len(server.tmp()) == 1
        end(server, client)
        wait_for(lambda: not server.tmp(), what="an empty tmp/")
    assert server.queue() == []


@pytest.mark.parametrize("options, body, reply", [
    ([], b"Subject: x\r\n\r\na\nb\r\n.\r\n", "550 5.5.2 "),
    (["-m", "20"], b"Subject: x\r\n\r\n01234567890\r\n.\r\n", "552 5.3.4 "),
    ([], b"Received: x\r\n" * 100 + b"\r\n.\r\n", "554 5.4.6 "),
], ids=["bare LF", "too big", "loop"])
def test_refused_message_leaves_nothing(relay, options, body, reply):
    server = relay(*options)
    with server.client() as client:
        begin(client, *ENVELOPE, "DATA")
        client.send(body)
        assert client.reply().startswith(reply)
        assert server.tmp() == server.queue() == []


# ---- Durable, and then answered -------------------------------------------------------------


def test_synced_renamed_synced_and_then_answered(waiting, strace):
    with waiting.relay.client() as client:
        with strace(waiting.relay.pid, "trace=fsync,fdatasync,/^rename,write,sendto") as trace:
            id = re.search(r"\S+$", client.deliver("", ["b@example.net"], "Subject: x\n"))[0]
            wait_for(lambda: trace().count(f"queued as {id}") >= 2)
            seen = trace()
    spool = re.escape(str(waiting.relay.spool))
    number = r'^(\d+) +'
    steps = [rf'{number}write\(\d+<{spool}/tmp/{id}>, ".*\.\\r\\n", \d+\) += \d+$',
             rf'{number}f(?:data)?sync\(\d+<{spool}/tmp/{id}>\) += 0$',
             rf'{number}rename\w*\(.*"tmp/{id}", .*"queue/{id}".*\) += 0$',
             rf'{number}fsync\(\d+<{spool}/queue>\) += 0$',
             rf'{number}write\(\d+<(?:UNIX|socket|pipe):.*>, "250 2\.0\.0 Ok: queued as {id}\\n"',
             rf'{number}(?:write|sendto)\(\d+<(?:TCP|socket):.*>, "250 2\.0\.0 Ok: queued as {id}\\r\\n"']
    found = [re.search(step, seen, re.MULTILINE) for step in steps]
    assert all(found), f"missing: {[step for step, match in zip(steps, found) if not match]}\n{seen}"
    assert [match.start() for match in found] == sorted(match.start() for match in found), seen
    server, *child, answerer = [match[1] for match in found]
    assert server == answerer == str(waiting.relay.pid)         # the loop, which waits for no disk
    assert len(set(child)) == 1 and child[0] != server


def test_what_is_there_already_is_never_written_to(waiting, strace):
    """Not a file of the same name, not what a link leads to, and no FIFO is waited for."""
    server = waiting.relay
    waiting.exchanger.stop()
    with strace(server.pid, "trace=/^open") as trace:
        server.send("b@example.net", sender="")
        server.outcomes("b@example.net")
        seen = trace()
    with strace(children(server.pid)[0], "trace=/^open") as trace:      # the queue manager, and its batch
        server.hangup_until(lambda: len(server.logged(" to=<b@example.net>")) >= 2)
        seen += trace()
    flags = {directory: [set(found.split("|")) for found in re.findall(
        rf'"{directory}/\d{{8}}T[^"]*", (\S+?)[,)]', seen)] for directory in ("tmp", "queue")}
    created, = flags["tmp"]
    assert {"O_CREAT", "O_EXCL", "O_NOFOLLOW"} <= created, seen
    assert all({"O_NOFOLLOW", "O_NONBLOCK"} <= found for found in flags["queue"]) and flags["queue"], seen


# ---- When the machine fails -------------------------------------------------------------------


def say_all(client, steps):
    """Says what is left of a message; returns the last reply, or the first refusal."""
    for step in steps:
        client.send(step)
        reply = client.reply()
        if reply[0] not in "23":
            break
    return reply


MESSAGE = [b"MAIL FROM:<>\r\n", b"RCPT TO:<b@example.net>\r\n", b"DATA\r\n", b"Subject: x\r\n\r\nDear Nour\r\n.\r\n"]


def check_recovery(world, client):
    """The same client, in the same session, is served as if nothing had been."""
    assert say_all(client, [b"RSET\r\n", *MESSAGE]).startswith("250 2.0.0 Ok: queued as ")
    wait_until_empty(world.relay)
    assert len(world.exchanger.messages) == 1


# Faults that meet calls of valgrind's own, or that it (3.19) does not survive.
TOO_MUCH_FOR_VALGRIND = ("write:", "fcntl,", "/^(clone3?")


@pytest.mark.parametrize("said, fault, reply", [
    # In the server: `said` steps of MESSAGE are through when it begins.
    (0, "/^open(at)?$:error=ENOSPC", FULL),
    (0, "/^open(at)?$:error=EDQUOT", FULL),
    (0, "/^open(at)?$:error=EIO", NOT_STORED),
    (0, "/^open(at)?$:error=EMFILE", NOT_STORED),
    (0, "write:error=ENOSPC:when=1", FULL),
    (1, "write:error=ENOSPC:when=1", FULL),
    (2, "write:error=EIO:when=1", NOT_STORED),
    (3, "write:error=ENOSPC:when=1", FULL),             # the body
    (3, "write:error=EDQUOT:when=2", FULL),             # the final dot
    (3, "/^pipe2?:error=EMFILE", NOT_STORED),
    (3, "/^(clone3?|v?fork)$:error=EAGAIN", NOT_STORED),
    # In the child.
    (3, "fcntl,?fcntl64:error=ENOLCK", NOT_STORED),
    (3, "fsync:error=EIO:when=1", NOT_STORED),
    (3, "fsync:error=ENOSPC:when=1", FULL),
    (3, "fsync:error=EDQUOT:when=1", FULL),
    (3, "/^rename:error=EIO", NOT_STORED),
    (3, "/^rename:error=ENOSPC", FULL),
    (3, "/^open(at)?$:error=EMFILE:when=1", NOT_STORED),
    (3, "fsync:error=EIO:when=2", NOT_STORED),          # ... and its sync
    (3, "fsync:error=ENOSPC:when=2", FULL),
    (3, "fsync:signal=KILL:when=1", NOT_STORED),
])
def test_no_false_250(world, strace, said, fault, reply):
    """A message that was not stored is refused where that is known, leaves nothing
    behind, and the next one is taken without a restart."""
    if BINARY.name == "valgrind" and fault.startswith(TOO_MUCH_FOR_VALGRIND):
        pytest.skip("valgrind does not stand this fault")
    with world.relay.client() as client:
        begin(client, "HELO me.com")
        assert said == 0 or say_all(client, MESSAGE[:said])[0] in "23"
        with strace(world.relay.pid, "inject=" + fault) as trace:
            assert say_all(client, MESSAGE[said:]) == reply
            wait_for(lambda: "INJECTED" in trace() or "KILL" in trace(), what="the fault")
            left = world.relay.tmp() + world.relay.queue()
        if "KILL" in fault:                             # nobody was left to remove it
            assert [path.parent.name for path in left] == ["tmp"]
            left[0].unlink()
        else:
            assert left == []
        check_recovery(world, client)


def test_what_close_says_does_not_matter(world, strace):
    """What is synced is safe."""
    with world.relay.client() as client:
        begin(client, "HELO me.com")
        with strace(world.relay.pid, "inject=close:error=EIO") as trace:
            assert say_all(client, MESSAGE).startswith("250 2.0.0 ")
            world.exchanger.wait_for_messages(1)
            wait_until_empty(world.relay)
            assert "INJECTED" in trace()
    assert len(world.exchanger.messages) == 1


@pytest.fixture
def small_disk(dns, exchangers, relay, tmp_path):
    """small_disk("size=256k"): a world whose spool is a file system of its own, seen
    by no other process; the mount goes with the server."""
    def make(options):
        mount = tmp_path / "disk"
        mount.mkdir()
        command = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(mount))}"
        if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", command],
                                                             capture_output=True).returncode != 0:
            pytest.skip("this machine does not let us mount")
        inside = shlex.quote(command + ' && exec "$0" "$@"')
        script = tmp_path / "smtp-on-a-small-disk"
        script.write_text(f'#!/bin/sh\nexec unshare -m sh -c {inside} {shlex.quote(str(BINARY))} "$@"\n')
        script.chmod(0o755)
        exchanger, = exchangers(1)
        dns.mail("example.net", (10, exchanger))
        server = relay(spool=mount / "spool", mx_port=exchanger.port, binary=script)
        server.spool = Path(f"/proc/{server.pid}/root{mount}/spool")
        return SimpleNamespace(relay=server, exchanger=exchanger)
    return make


@contextlib.contextmanager
def filled(directory):
    """Leaves no room on its disk, for a while."""
    filler = directory / "filler"
    filler.mkdir()
    try:
        with contextlib.suppress(OSError), open(filler / "0", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with contextlib.suppress(OSError):
            for n in range(1, 10000):
                (filler / str(n)).touch()
        yield
    finally:
        shutil.rmtree(filler)


def check_refusal_of_content(world, client, said):
    """One reply to the message, as soon as there can be one: no line of it is a command."""
    steps = MESSAGE[said:-1] + [b"Subject: x\r\n\r\n" + b"EXPN a\r\n" * 10000 + b".\r\n"]
    assert say_all(client, steps) == FULL
    assert world.relay.tmp() == world.relay.queue() == []
    assert client.say("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("said", [0, 3])
def test_full_disk(small_disk, said):
    world = small_disk("size=256k,nr_inodes=50")
    with world.relay.client() as client:
        begin(client, "HELO me.com")
        assert said == 0 or say_all(client, MESSAGE[:said])[0] in "23"
        with filled(world.relay.spool.parent):
            check_refusal_of_content(world, client, said)
        check_recovery(world, client)


def test_limit_on_the_size_of_files(dns, exchangers, relay, tmp_path):
    """ulimit -f: no signal ends the server or its child."""
    script = tmp_path / "smtp-with-small-files"
    script.write_text(f'#!/bin/sh\nulimit -f 8 && exec {shlex.quote(str(BINARY))} "$@"\n')
    script.chmod(0o755)
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    world = SimpleNamespace(relay=relay(mx_port=exchanger.port, binary=script), exchanger=exchanger)
    with world.relay.client() as client:
        begin(client, "HELO me.com")
        check_refusal_of_content(world, client, 0)
        check_recovery(world, client)


@pytest.fixture
def public_spool():
    """A spool that every user can reach: the directories of the tests are root's alone."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        yield Path(directory) / "spool"


@pytest.mark.parametrize("removed", ["", "tmp", "queue"], ids=["all", "tmp", "queue"])
@pytest.mark.parametrize("said", [0, 1, 3])
def test_spool_that_is_removed_and_made_again(dns, exchangers, relay, public_spool, removed, said):
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    server = relay(spool=public_spool, mx_port=exchanger.port)
    owner = public_spool.stat()
    with server.client() as client:
        begin(client, "HELO me.com")
        assert said == 0 or say_all(client, MESSAGE[:said])[0] in "23"
        shutil.rmtree(public_spool / removed)
        assert say_all(client, MESSAGE[said:]) == NOT_STORED
        for name in ("", "tmp", "queue"):
            if not (public_spool / name).exists():
                (public_spool / name).mkdir(mode=0o700)
                os.chown(public_spool / name, owner.st_uid, owner.st_gid)
        check_recovery(SimpleNamespace(relay=server, exchanger=exchanger), client)


# ---- What an earlier run left, and what is not ours ---------------------------------------------


def owned_by_the_server(server, path):
    """Gives it to who owns the spool: root's server is somebody else."""
    owner = server.spool.stat()
    os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def test_stale_drafts_are_removed(relay):
    """At an hour and twelve times -t: younger ones may still be written to by a process that
    outlived the server before."""
    server = relay("-t", "100")
    server.stop()
    now = time.time()
    ages = {"20260101T000000.000000-1-1": 3600 + 12 * 100 - 10, "20260101T000000.000001-1-1": 3600 + 12 * 100 + 100,
            "20260101T000000.000002-1-1": 0, "junk": 100000}
    for name, age in ages.items():
        path = server.spool / "tmp" / name
        path.write_bytes(b"HELO me.com\r\n")
        owned_by_the_server(server, path)
        os.utime(path, (now - age, now - age))
    directory = server.spool / "tmp" / "20260101T000000.000003-1-1"
    directory.mkdir()
    os.utime(directory, LONG_AGO)
    server.start()
    stale = "20260101T000000.000001-1-1"
    server.wait_for_log(f"^{stale} stale draft removed$")
    assert {path.name for path in server.tmp()} == {*ages, directory.name} - {stale}
    assert len(server.logged("stale")) == 1


def queued(world):
    """Stops the server with one message in its queue, that is still owed; returns its path."""
    world.exchanger.set(replies={"RCPT": ["451 4.7.1 later"]})
    world.relay.send("b@example.net", sender="")
    world.relay.outcomes("b@example.net")
    world.relay.stop()
    path, = world.relay.queue()
    return path


def test_foreign_things_are_left_alone(world, tmp_path):
    """One log line each, none again, and nothing that waits for them."""
    message = queued(world)
    whole = message.read_bytes()
    os.utime(message, LONG_AGO)
    queue = message.parent
    outside = tmp_path / "outside"
    outside.write_bytes(whole)
    owned_by_the_server(world.relay, outside)
    names = [f"20260101T000000.00000{n}-1-1" for n in range(7)]
    (queue / names[0]).symlink_to(outside)
    os.mkfifo(queue / names[1])
    (queue / names[2]).mkdir()
    (queue / names[3]).write_bytes(whole[:whole.index(b"\r\n.\r\n") + 2])     # no lone dot
    (queue / names[4]).write_bytes(b"")
    (queue / names[5]).write_bytes(b"HELO " + b"x" * 100000 + whole)
    socket_path = queue / names[6]
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        here = os.getcwd()
        os.chdir(queue)         # such a path may not be long
        unix.bind(names[6])
        os.chdir(here)
    assert stat.S_ISSOCK(socket_path.lstat().st_mode)
    (queue / "README").write_bytes(whole)
    foreign = sorted(set(queue.iterdir()) - {message})
    for path in foreign:
        owned_by_the_server(world.relay, path)
        os.utime(path, LONG_AGO, follow_symlinks=False)
    before = {path: path.lstat() for path in foreign}
    world.relay.start()
    world.exchanger.wait_for_messages(1)
    wait_for(lambda: world.relay.queue() == foreign)
    world.relay.hangup()
    world.relay.send("b@example.net", sender="")
    world.exchanger.wait_for_messages(2)
    complaints = [line for line in world.relay.log if line.startswith("queue/") or "left alone" in line]
    assert sorted(re.match(r"queue/(\S+) ", line)[1] for line in complaints) == [path.name for path in foreign]
    wait_for(lambda: world.relay.queue() == foreign)
    for path, old in before.items():
        new = path.lstat()
        assert (new.st_ino, new.st_size, new.st_mode) == (old.st_ino, old.st_size, old.st_mode)
    assert outside.read_bytes() == whole


NO_ENVELOPE = {
    "no greeting": (b"HELO me.com\r\n", b""), "no sender": (b"MAIL FROM", b"MAIL TO"),
    "a sender without end": (b"MAIL FROM:<>", b"MAIL FROM:<a@example.org"),
    "a sender too long": (b"MAIL FROM:<", b"MAIL FROM:<a@" + b"x." * 130 + b"x"),
    "nobody": (b"RCPT TO:<b@example.net>\r\n", b""), "a recipient without end": (b"<b@example.net>", b"<b@example.net"),
    "a recipient without domain": (b"<b@example.net>", b"<b>"),
    "a recipient too long": (b"<b@", b"<b@" + b"x." * 130), "no DATA": (b"\r\nDATA\r\n", b"\r\nBDAT\r\n")}


@pytest.mark.parametrize("case", NO_ENVELOPE)
def test_what_this_server_does_not_write_is_no_message(world, case):
    """Whoever put it there: it is sent to nobody, and neither changed nor removed."""
    path = queued(world)
    before, after = NO_ENVELOPE[case]
    assert before in path.read_bytes()
    text = path.read_bytes().replace(before, after, 1)
    path.write_bytes(text)
    os.utime(path, LONG_AGO)
    tried = len(world.exchanger.connections)
    world.relay.start()
    world.relay.wait_for_log(rf"^queue/{path.name} is no whole message: left alone$")
    assert path.read_bytes() == text and len(world.exchanger.connections) == tried


@pytest.mark.parametrize("line", ["sent <b@example.net> - 250 x", "2026-01-01 sent <b@example.net> - 250 x",
                                  "2026-01-01T00:00:00Z sent b@example.net - 250 x",
                                  "2026-01-01T00:00:00Z sent <b@example.net - 250 x",
                                  "2026-01-01T00:00:00Z sent <c@example.net> - 250 x",
                                  "2026-01-01T00:00:00Z done <b@example.net> - 250 x"])
def test_an_outcome_that_is_none_settles_nothing(world, line):
    path = queued(world)
    path.write_bytes(path.read_bytes() + line.encode() + b"\r\n")
    os.utime(path, LONG_AGO)
    world.exchanger.set(replies={})
    world.relay.start()
    assert world.exchanger.wait_for_messages(1)[0].recipients == ["<b@example.net>"]


WHOLE = "2026-11-23T11:08:19Z sent <b@example.net> mx1.example.net[192.0.2.1] 250 2.0.0 Ok"


@pytest.mark.parametrize("torn", [WHOLE[:4], WHOLE[:50], WHOLE[:-3], WHOLE, WHOLE + "\r", "\0" * 20000],
                         ids=["date", "word", "last word", "line", "CR", "what a disk may leave"])
def test_torn_outcome_counts_for_nothing_and_is_ended(world, torn):
    """The CRLF is what makes it a line: without it a crash came between.  It counts for no
    more when another record stands behind it."""
    path = queued(world)
    whole = path.read_bytes() + torn.encode()
    path.write_bytes(whole)
    os.utime(path, LONG_AGO)
    world.exchanger.set(replies={"RCPT": ["451 4.7.1 later again"]})
    world.relay.start()
    world.relay.outcomes("b@example.net", count=2)
    added = path.read_bytes()
    assert added.startswith(whole + b"\r\r\n")
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ later <b@example\.net> \S+ 451 4\.7\.1 later again\r\n",
                        added[len(whole) + 3:])
    world.relay.hangup_until(lambda: not world.relay.queue())
    assert [message.recipients for message in world.exchanger.messages] == [["<b@example.net>"]]


# ---- Whose spool it is ---------------------------------------------------------------------------


def refused(*arguments):
    """Starts a server that cannot start; returns the one line it says."""
    result = run("-p", "0", "-h", "relay.example.org", *arguments, "127.0.0.1")
    assert result.returncode == 1
    line, = result.stderr.splitlines()
    return line


def test_second_server_is_refused(relay):
    server = relay()
    assert refused("-q", server.spool) == (f"smtp: another server holds the spool {server.spool}: "
                                           "stop it, or name another spool with -q")
    server.send("b@nowhere.example.net", sender="")     # the first one is not disturbed
    server.stop()
    server.start()


def test_lock_file_holds_the_server_s_pid(waiting):
    server, lock = waiting.relay, waiting.relay.spool / "lock"
    assert lock.read_text() == f"{server.pid}\n"
    server.send("b@example.net", sender="")             # a forwarder changes nothing
    assert lock.read_text() == f"{server.pid}\n"
    server.terminate()
    assert lock.read_text() == ""                       # a pid that may be another process's soon
    lock.write_text("12345678901234567890\n")
    server.start()
    assert lock.read_text() == f"{server.pid}\n"


def test_lock_file_holds_the_server_s_pid_after_its_table_was_divided(relay, wrapped):
    server = relay("-c", 0, binary=wrapped("ulimit -n 64"))
    for _ in range(40):
        server.client()
    divided = int(server.wait_for_log(r"table full: process (\d+) serves")[1])
    server.hang_up()
    wait_for(lambda: not Path(f"/proc/{divided}").exists(), what="the end of the divided process")
    assert (server.spool / "lock").read_text() == f"{server.pid}\n"


def test_server_starts_where_its_pid_cannot_be_written(relay, wrapped):
    server = relay(binary=wrapped("ulimit -f 0"))
    assert server.logged(rf"^cannot write the pid into {server.spool}/lock \(")
    assert (server.spool / "lock").read_text() == ""


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_spool_that_others_may_write_to_is_refused(relay, mode):
    server = relay()
    server.stop()
    server.spool.chmod(mode)
    assert refused("-q", server.spool) == f"smtp: others may write to the spool {server.spool}: chmod 700 it"
    server.spool.chmod(0o700)
    server.start()


def test_spool_of_somebody_else_is_refused(spool):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    spool.mkdir(mode=0o755)
    spool.chmod(0o755)
    assert re.fullmatch(rf"smtp: the spool {spool} belongs to uid 0, not to uid \d+: chown it, or name another with -q",
                        refused("-q", spool))
