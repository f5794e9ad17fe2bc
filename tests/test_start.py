"""From the command line to the last client: starting, who it runs as, how many it
serves, and how it stops."""
import contextlib
import errno
import fcntl
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab import BINARY, HOSTNAME, Client, children, loopback, run, wait_for

ROOT = os.geteuid() == 0
QUEUED = "250 2.0.0 Ok: queued as "
HERE = ("-p", 0, "-h", HOSTNAME, "127.0.0.1")       # a start that is all right

IN_DATA = ["HELO me.com", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>", "DATA"]

needs_root = pytest.mark.skipif(not ROOT, reason="only root becomes somebody else")
VALGRIND = BINARY.name == "valgrind"       # which needs a standard error, and descriptors beyond the limit, of its own
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")


def user():
    """Whom the relay runs as, as its tests start it."""
    if not ROOT:
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam("smtp")
    except KeyError:
        return pwd.getpwnam("nobody")


def refusal(status, *arguments, program=(BINARY,)):
    """The one line that a start ends with."""
    ended = subprocess.run([*program, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, timeout=20)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    line, = ended.stderr.splitlines()
    assert line.startswith("smtp: ")
    return line


def as_nobody():
    """The program, started by somebody who is not root."""
    become = ["setpriv", "--reuid", "64321", "--clear-groups"] if ROOT else []
    if become and (not shutil.which("setpriv") or subprocess.run([*become, BINARY, "-V"]).returncode != 0):
        pytest.skip("nobody but root can start the program here")
    return (*become, BINARY)


def begin(client):
    for line in IN_DATA:
        client.say(line)


def process_status(pid):
    """/proc/PID/status: {"Uid": ["65534", ...], ...}."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


# ---- The command line ------------------------------------------------------------------------


@pytest.mark.parametrize("option, values", [
    ("-b", ["", "x", "localhost", "192.0.2.0/24", "192.0.2.256", "192.0.2.1:25", "[2001:db8::1]", "224.0.0.1",
            "255.255.255.255", "ff02::1"]),
    ("-p", ["", "x", "-1", "+1", " 1", "65536", "25x", "0x19"]),
    ("-P", ["", "x", "0", "-1", "65536"]),
    ("-c", ["", "x", "-1", "1k", "1M", "1.5"]),
    ("-m", ["", "x", "M", "-1", "-1M", "1.5M", "1k", "1m", "1s", "1MB", "1M ", "9" * 30, str(2**64), "17179869184G"]),
    ("-d", ["", " ", "x y", "x,y", "@example.net", "a@example.net", "example.net.", ".example.net", "*.example.net",
            "a..b", "-x", "a_b", "192.0.2.1]", "[192.0.2.1", "[192.0.2.256]", "[2001:db8::1]", "[IPv6:192.0.2.1]", "[]",
            "a\nb", "x" * 64, "x." * 130 + "x"]),
    ("-j", ["", "x", "0", "-1", "1m", "9" * 30]),
    *((option, ["", "x", "m", "0", "0d", "-1", "-1m", "1.5h", "1M", "1w", "1mm", "1m ", "9" * 30, "9" * 15 + "d",
                "213503982334602d"]) for option in ("-e", "-r", "-t", "-w")),
    *((option, ["86401", "2d", "25h", "1441m"]) for option in ("-r", "-t", "-w")),
    ("-n", ["", "x", "example.net", "192.0.2.256", "192.0.2.1:", "192.0.2.1:x", "192.0.2.1:65536", "[2001:db8::1",
            "fe80::1", "fe80::1%", "fe80::1%nowhere", "[fe80::1%nowhere]:53", "fe80::1%0", "fe80::1%-1",
            f"fe80::1%{2**32 + 1}", "192.0.2.1%lo"]),
    ("-s", ["", "-x", "a b", "a..b", "192.0.2.1:x", "example.net:65536", "[2001:db8::1", "a@example.net"]),
    ("-M", ["", "x", "@example.net", "a@", "<a@example.net>", "a@b c", "a@example.net,b@example.net",
            "a" * 243 + "@example.net"]),
    ("-h", ["", " ", "a b", "-x", "x-", "a..b", ".a", "a.", "a_b", "a\nb", "x" * 64, "x." * 130 + "x", "[192.0.2.1]"])])
def test_a_value_that_cannot_be(spool, option, values):
    for value in values:
        assert option in refusal(2, option, value, "-q", spool, *(HERE if option != "-h" else ("-p", 0, "127.0.0.1")))
        assert not spool.exists()


@pytest.mark.parametrize("arguments, wrong", [
    (("-x", "127.0.0.1"), "-x"), (("--help", "127.0.0.1"), "-"), (("-p",), "-p"), (("-l", "-p", 25, "word"), "-l"),
    (("-V", "word"), "-V"), (("--version", "word"), "-"), (("--versio",), "-"), (("-q", "spool", "-v", "-M"), "-M"),
    (("-p", 0), "address"), (("-v", "-q", "spool"), "address")])
def test_a_command_line_that_cannot_be(tmp_path, monkeypatch, arguments, wrong):
    monkeypatch.chdir(tmp_path)
    assert wrong in refusal(2, *arguments)
    assert not Path("spool").exists()


@pytest.mark.parametrize("first, second", [("127.0.0.1", "127.0.0.2"), ("::", "::1"), ("0.0.0.0", "::ffff:127.0.0.1")])
def test_two_sources_of_one_family(spool, first, second):
    assert f"-b {second}: one IPv4 address and one IPv6" in refusal(2, "-b", first, "-b", second, "-q", spool, *HERE)


@pytest.mark.parametrize("address", ["203.0.113.77", "2001:db8::77"])
def test_source_that_this_machine_does_not_have(spool, address):
    """Without it no mail would get out.  So too where it is not there yet: to listen fails then, too."""
    assert f"cannot connect from {address} (-b " in refusal(1, "-b", address, "-q", spool, *HERE)


def test_four_name_servers_are_too_many(spool):
    refusal(2, *("-n", "192.0.2.1") * 4, "-q", spool, *HERE)


def test_help_and_version():
    """Where they are asked for, they are no error."""
    for arguments, text in ((("--help",), run("-h").stderr), (("--version",), run("-V").stdout)):
        ended = run(*arguments)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, text, "")
    assert re.fullmatch(r"smtp \d+(\.\d+)+\n", run("-V").stdout)


@pytest.mark.parametrize("arguments", [(), ("-h",)])
def test_usage_names_every_option(arguments):
    ended = run(*arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    for option in "abcdehjMmnPpqrstuVvwX":
        assert re.search(rf"(?<!\S)\(?-{option}\b", ended.stderr)
    assert re.search(r"smtp -l \[-q spool\]", ended.stderr)


@pytest.mark.parametrize("option, value, taken", [
    ("-m", "5x", "one with K, M or G"), ("-e", "1w", "one with s, m, h or d"), ("-t", "2d", "1 to 86400 seconds")])
def test_a_wrong_value_is_told_what_is_taken(option, value, taken):
    assert taken in refusal(2, option, value, *HERE)


@pytest.mark.parametrize("most", ["86400", "86400s", "1440m", "24h", "1d"])
def test_times_take_units(most):
    """A day is the most that -r, -t and -w take: what is left to find fault with is that no address is named."""
    for option in "-r", "-t", "-w":
        assert "name an address" in refusal(2, option, most)
    assert "name an address" in refusal(2, "-e", most.replace("1d", "20d"))


# ---- What the options do, where no other file tells -----------------------------------------------


def test_h_is_what_it_calls_itself(relay):
    with relay("-h", "other.example.org").client() as client:
        assert client.greeting.startswith("220 other.example.org ESMTP smtp ")


def test_the_system_names_it_otherwise(spool):
    name = socket.gethostname()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", name, re.IGNORECASE):
        pytest.skip(f"this machine has no name that a mail host may have: {name}")
    with started(BINARY, "-p", 0, "-q", spool, "127.0.0.1") as (_, port), Client(port) as client:
        assert client.greeting.startswith(f"220 {name} ESMTP smtp ")


def test_p_0_takes_free_ports_and_prints_them(relay, ipv6):
    """On a line for each address, in their order."""
    addresses = ["127.0.0.1", loopback(), "::1"]
    server = relay(addresses=addresses)
    assert [line for line in server.log if "listening" in line] == [
        f"listening on {f'[{address}]' if ':' in address else address}:{port}"
        for address, port in zip(addresses, server.ports)]
    for address, port in zip(addresses, server.ports):
        with Client(port, address) as client:
            assert client.say("HELO me.com") == f"250 {client.local_port} OK"


def test_p_is_the_port(relay):
    address = loopback()
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    assert relay("-p", port, addresses=[address]).ports == [port]


@pytest.fixture
def localhost():
    """The addresses that this name has: none where there is not even an /etc/hosts."""
    try:
        return {info[4][0] for info in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        pytest.skip(f"no localhost here: {error}")


def test_localhost_is_all_addresses_that_it_has(localhost, relay):
    server = relay(addresses=["localhost"])
    assert 1 <= len(server.ports) <= len(localhost)
    for line in server.log:
        host, port = re.fullmatch(r"listening on \[?(\S+?)\]?:(\d+)", line).groups()
        with Client(int(port), host) as client:
            assert client.greeting.startswith("220 ")


def test_q_is_made_for_its_owner_alone(relay, spool):
    with relay().client() as client:
        begin(client)
        draft, = spool.glob("tmp/*")
        for path, mode in (spool, 0o700), (spool / "tmp", 0o700), (spool / "queue", 0o700), (draft, 0o600):
            assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (mode, user().pw_uid)


@pytest.mark.parametrize("form", ["{host}:{port}", "[{host}]:{port}", "{name}:{port}"])
def test_s_takes_all_mail(world, relay, tmp_path, form):
    """Also for domains that do not exist, and with no look-up of theirs."""
    smarthost = form.format(host=world.exchanger.host, port=world.exchanger.port, name=world.exchanger.name)
    relay("-s", smarthost, spool=tmp_path / "other").send("b@nowhere.example", "c@[192.0.2.1]")
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<b@nowhere.example>", "<c@[192.0.2.1]>"]
    assert {query.name for query in world.dns.queries} <= {world.exchanger.name}


def test_v_logs_both_dialogues_line_by_line(world, relay, tmp_path):
    server = relay("-v", mx_port=world.exchanger.port, spool=tmp_path / "other")
    with server.client() as client:
        peer = f"127.0.0.1:{client.local_port}"
        client.say("FOO \x1b[31m\t\x7f\xe9")
        client.deliver("a@example.org", ["b@example.net"], "x")
    server.wait_for_log("S: 221 ")
    lines = [line.partition(" ")[2] for line in server.log if line.startswith(peer)]
    assert lines[0].startswith(f"S: 220 {HOSTNAME} ESMTP smtp ")
    assert lines[1].startswith("C: FOO ?[31m") and lines[2].startswith("S: 500 5.5.2 ")
    assert lines[3:] == ["C: HELO me.com", f"S: 250 {client.local_port} OK", "C: MAIL FROM:<a@example.org>",
                         "S: 250 2.1.0 Ok", "C: RCPT TO:<b@example.net>", "S: 250 2.1.5 Ok", "C: DATA",
                         "S: 354 End data with <CR><LF>.<CR><LF>", *(line for line in lines if QUEUED in line)]
    assert len(lines) == 12
    for said in f"220 {world.exchanger.name} ESMTP", f"EHLO {HOSTNAME}", "RCPT TO:<b@example.net>", "354 ", "221 ":
        assert any(said in line for line in server.log if not line.startswith(peer))
    assert all(re.fullmatch("[ -~]*", line) for line in server.log)


def test_without_v_the_dialogue_is_not_logged(world):
    world.relay.send("b@example.net")
    world.relay.wait_for_log("status=sent")
    assert not world.relay.logged("HELO|EHLO|MAIL FROM|: 354 ")


def test_r_is_the_time_to_the_next_try(world, relay, tmp_path):
    world.exchanger.set(replies={"RCPT": ["451 4.7.1 later"]})
    server = relay("-r", 1, mx_port=world.exchanger.port, spool=tmp_path / "other")
    begun = time.monotonic()
    server.send("b@example.net")
    world.exchanger.wait_for_messages(1)
    first, second = world.exchanger.connections
    assert 0.9 < second.opened - begun      # not since the first, which a busy machine sees late


def test_e_is_when_it_gives_up(world, relay, tmp_path):
    world.exchanger.set(replies={("RCPT", "<b@example.net>"): "451 4.7.1 later"})
    server = relay("-r", 1, "-e", 1, mx_port=world.exchanger.port, spool=tmp_path / "other")
    server.send("b@example.net", sender="a@example.net")
    report, = world.exchanger.wait_for_messages(1)
    assert report.reverse_path.split()[0] == "<>" and report.recipients == ["<a@example.net>"]


def test_w_is_the_longest_wait(dns, exchangers, relay):
    silent, other = exchangers(2)
    silent.set(stall_at="CONNECT")
    dns.mail("example.net", (10, silent), (20, other))
    relay("-w", 1, mx_port=other.port).send("b@example.net")
    other.wait_for_messages(1)
    assert 0.9 < other.connections[0].opened - silent.connections[0].opened


# ---- What it cannot start with -------------------------------------------------------------------


def test_a_taken_port(relay, tmp_path):
    port = relay().port
    line = refusal(1, "-p", port, "-q", tmp_path / "other", "-h", HOSTNAME, "127.0.0.1")
    assert f"127.0.0.1 port {port}" in line and re.search("Address (already )?in use", line)    # glibc's words, or musl's
    assert not (tmp_path / "other").exists()


def test_a_port_that_only_root_may_have(spool):
    """The first that is not an ordinary one where the system says so."""
    free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if free.exists() and int(free.read_text()) <= 1:
        pytest.skip("anybody may have any port here")
    line = refusal(1, "-p", 1, "-q", spool, "-h", HOSTNAME, "127.0.0.1", program=as_nobody())
    assert "127.0.0.1 port 1 " in line and os.strerror(errno.EACCES) in line and "-p" in line


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_is_not_ours(spool, address):
    assert address in refusal(1, "-p", 0, "-q", spool, "-h", HOSTNAME, "127.0.0.1", address)


@pytest.mark.parametrize("address", ["::1%nowhere", "a..b"])
def test_an_address_that_is_none(spool, address):
    assert f"{address} is no address" in refusal(1, "-q", spool, *HERE, address)
    assert not spool.exists()


def test_an_address_that_is_named_twice(localhost, relay):
    """As localhost is, in many an /etc/hosts."""
    server = relay("127.0.0.1", "localhost")
    with server.client() as client:
        assert client.greeting.startswith("220 ")
    assert len(server.logged("listening on 127.0.0.1:")) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a loopback of few addresses")
def test_more_addresses_than_it_listens_on(spool):
    assert "16 addresses" in refusal(1, "-q", spool, *HERE, *(f"127.0.0.{n}" for n in range(2, 18)))
    assert not spool.exists()


def test_a_host_name_that_leaves_no_room_for_a_postmaster(spool):
    """RFC 5321 4.5.3.1.3: with its < and > a path has 256 octets."""
    name = ".".join(["a" * 60] * 4)             # postmaster@ and 243 octets
    with started(BINARY, "-h", name, "-p", 0, "-q", spool, "127.0.0.1"):
        pass
    assert "-M" in refusal(2, "-h", name + "a", "-p", 0, "-q", spool, "127.0.0.1")


def own_directory(path):
    """A new directory of whom the relay runs as."""
    path.mkdir(mode=0o700)
    os.chown(path, user().pw_uid, user().pw_gid)
    return path


@pytest.fixture
def own_spool(spool):
    """An empty spool that the relay may use."""
    return own_directory(spool)


def test_a_spool_that_is_there_already(own_spool, relay):
    relay()
    assert {path.name for path in own_spool.iterdir()} == {"tmp", "queue", "lock"}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702, 0o777, 0o1777])
def test_a_spool_that_others_may_write_to(own_spool, mode):
    own_spool.chmod(mode)
    assert str(own_spool) in refusal(1, "-q", own_spool, *HERE)
    assert list(own_spool.iterdir()) == []


def test_a_spool_that_cannot_be_written(own_spool):
    own_spool.chmod(0o500)
    if os.access(own_spool, os.W_OK) and not ROOT:
        pytest.skip("modes mean nothing here")
    line = refusal(1, "-q", own_spool, *HERE)
    assert str(own_spool) in line and os.strerror(errno.EACCES) in line


def test_a_spool_whose_name_is_too_long():
    assert "-q" in refusal(1, "-q", "/" + "x" * 4096, *HERE)


@pytest.mark.parametrize("path, why", [
    ("missing/spool", errno.ENOENT), ("file", errno.ENOTDIR), ("file/spool", errno.ENOTDIR)])
def test_a_spool_that_cannot_be_made(tmp_path, path, why):
    (tmp_path / "file").touch()
    line = refusal(1, "-q", tmp_path / path, *HERE)
    assert str(tmp_path / path) in line and os.strerror(why) in line


@needs_root
def test_a_spool_of_another_owner(spool):
    spool.mkdir(mode=0o700)
    assert str(spool) in refusal(1, "-q", spool, *HERE)
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", "/"])
def test_a_spool_that_is_a_link(own_spool, tmp_path, suffix):
    """Who may change where it leads may say where mail is kept."""
    link = tmp_path / "link"
    link.symlink_to(own_spool)
    assert str(link) in refusal(1, "-q", f"{link}{suffix}", *HERE)
    assert list(own_spool.iterdir()) == []


@pytest.mark.parametrize("name", ["tmp", "queue"])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_spool_whose_parts_others_may_write_to(own_spool, name, mode):
    own_directory(own_spool / name).chmod(mode)
    assert f"{own_spool}/{name}" in refusal(1, "-q", own_spool, *HERE)


@needs_root
@pytest.mark.parametrize("name", ["tmp", "queue"])
def test_a_spool_whose_parts_are_somebody_elses(own_spool, name):
    (own_spool / name).mkdir(mode=0o700)
    assert f"{own_spool}/{name}" in refusal(1, "-q", own_spool, *HERE)


@pytest.mark.parametrize("name", ["tmp", "queue", "lock"])
def test_a_spool_whose_parts_are_elsewhere(own_spool, tmp_path, name):
    """A link is not followed, wherever it leads."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch() if name == "lock" else elsewhere.mkdir()
    (own_spool / name).symlink_to(elsewhere)
    assert str(own_spool) in refusal(1, "-q", own_spool, *HERE)


def test_a_spool_that_another_server_holds(relay, spool):
    server = relay()
    assert str(spool) in refusal(1, "-q", spool, *HERE)
    server.stop()
    server.start()


@needs_root
@pytest.mark.parametrize("name", ["root", "nobody-has-this-name", ""])
def test_a_user_whom_root_cannot_become(spool, name):
    refusal(1, "-u", name, "-q", spool, *HERE)
    assert not spool.exists()


@needs_root
@pytest.mark.parametrize("number", ["0", "12x", "9" * 30])
def test_a_number_that_is_no_user(spool, number):
    assert "-u" in refusal(2, "-u", number, "-q", spool, *HERE)
    assert not spool.exists()


@needs_root
def test_a_number_that_has_no_name(relay, spool):
    with relay("-u", 64321).client() as client:
        begin(client)
    assert (spool.stat().st_uid, spool.stat().st_gid) == (64321, 64321)


def libraries(pid):
    """The libraries in a process's memory."""
    with open(f"/proc/{pid}/maps") as maps:
        return set(re.findall(r"/\S+\.so\S*", maps.read()))


@needs_root
@needs_proc
def test_the_look_up_of_the_user_leaves_no_library_in_memory(relay):
    """Each child that is forked would have to take it over.  `nobody` is found in passwd; `smtp` is looked for where
    nsswitch.conf says, if it is not there."""
    server = relay("-u", "nobody")
    without = libraries(server.pid)
    server.stop()
    assert libraries(relay().pid) == without


def test_who_is_not_root_stays_who_he_is(spool):
    assert "-u" in refusal(2, "-u", "nobody", "-q", spool, *HERE, program=as_nobody())


# ---- The process -------------------------------------------------------------------------------


@needs_root
@needs_proc
@pytest.mark.parametrize("options, name", [((), None), (("-u", "daemon"), "daemon")])
def test_root_is_given_up_for_good(world, relay, wrapped, tmp_path, options, name):
    """By all its children, too, and theirs: all four ids, and every group."""
    world.exchanger.set(stall_at="CONNECT")
    world.dns.mail("example.org", (10, world.exchanger))
    groups = f"{sys.executable} -c 'import os, sys; os.setgroups([1, 2, 3]); os.execv(sys.argv[1], sys.argv[1:])'"
    server = relay(*options, binary=wrapped(command=groups), mx_port=world.exchanger.port, spool=tmp_path / "other")
    becomes = pwd.getpwnam(name) if name else user()
    server.send("b@example.net", "b@example.org")
    # The queue manager, the forwarder, and its children for two domains.
    for pid in (server.pid, *wait_for(lambda: len(descendants(server.pid)) == 4 and descendants(server.pid))):
        status = process_status(pid)
        assert (status["Uid"], status["Gid"], status["Groups"]) == (
            [str(becomes.pw_uid)] * 4, [str(becomes.pw_gid)] * 4, [])
        assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == 0


@needs_root
@pytest.mark.skipif("SANITIZED" in os.environ, reason="strace and sanitizers do not go together")
@pytest.mark.parametrize("fault, why", [
    ("setgroups:error=EPERM", "cannot become"), ("setgid:error=EPERM", "cannot become"),
    ("setuid:error=EAGAIN", "cannot become"), ("setuid:retval=0", "cannot give up"), ("setgid:retval=0", "cannot give up")])
def test_a_system_that_does_not_let_root_go(spool, wrapped, tmp_path, fault, why):
    """It says so, or it only says that it has."""
    name, _, what = fault.partition(":")
    calls = f"{name},?{name}32"         # the second in programs for 32 bits
    strace = f"strace -f --seccomp-bpf -o {tmp_path}/trace -e inject={calls}:{what} -e trace={calls}"
    if not shutil.which("strace") or subprocess.run([*strace.split(), "true"]).returncode != 0:
        pytest.skip("strace is not installed, or is old, or may not trace")
    program = wrapped(command=strace)
    assert why in refusal(1, "-q", spool, *HERE, program=(program,))


def descendants(pid):
    return [each for child in children(pid) for each in (child, *descendants(child))]


@contextlib.contextmanager
def started(program, *arguments, **options):
    """Starts it, whatever becomes of its log: its process and its first port, as /proc tells it."""
    process = subprocess.Popen([program, *map(str, arguments)], start_new_session=True, stderr=subprocess.DEVNULL,
                               **options)
    try:
        yield process, wait_for(lambda: listening_ports(process.pid), what="a listening socket")[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def descriptors(pid):
    """What the process has open, such as "socket:[4711]"."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(path))
    return found


def listening_ports(pid):
    sockets = descriptors(pid)
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@needs_proc
@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_a_standard_descriptor_that_is_closed_is_no_socket(wrapped, spool, closed):
    """A client that became descriptor 2 would be told the log."""
    if VALGRIND and 2 in closed:
        pytest.skip("valgrind does not run without a standard error")
    program = wrapped(redirect=" ".join(f"{number}>&-" for number in closed))
    with started(program, "-v", "-q", spool, *HERE) as (process, port), Client(port) as client:
        assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in closed} == {"/dev/null"}
        assert client.say("FOO").startswith("500 5.5.2 ")
        assert client.deliver("a@example.org", ["b@[127.0.0.1]"], "x").startswith(QUEUED)
        assert client.say("QUIT") == "221 2.0.0 OK"
        assert client.eof()


@needs_proc
@pytest.mark.parametrize("least, before", [(3, ":"), (500, ":"), (500, "ulimit -n 64")],
                         ids=["low", "high", "beyond the limit"])
def test_what_else_was_open_is_closed(wrapped, spool, least, before):
    """Or whoever waits for the end of a pipe of his waits for that of the server."""
    if VALGRIND and "ulimit" in before:
        pytest.skip("valgrind hides what is open beyond the limit")
    reading, writing = os.pipe()
    inherited = fcntl.fcntl(writing, fcntl.F_DUPFD, least)
    with started(wrapped(before), "-q", spool, *HERE, pass_fds=[inherited]) as (process, _):
        os.close(writing)
        os.close(inherited)
        assert select.select([reading], [], [], 20)[0] and os.read(reading, 1) == b""
        assert process.poll() is None
    os.close(reading)


@needs_proc
def test_a_child_holds_nobodys_socket(world):
    """A client who has said QUIT hears the end at once, however long his message is on its way."""
    world.exchanger.set(stall_at="MAIL")
    with world.relay.client() as client:
        assert client.deliver("", ["b@example.net"], "x").startswith(QUEUED)
        wait_for(lambda: world.exchanger.connections and "MAIL FROM:<>" in str(world.exchanger.connections[0].commands))
        assert client.say("QUIT") == "221 2.0.0 OK"
        assert client.eof()

    def sockets():
        return [{name for name in descriptors(pid) if name.startswith("socket:")} for pid in children(world.relay.pid)]
    # The queue manager's, once it has begun, and the forwarder's: to the server and to the exchanger.
    wait_for(lambda: sorted(map(len, sockets())) == [0, 1])
    assert not set.union(*sockets()) & descriptors(world.relay.pid)


@pytest.mark.parametrize("how", ["signal.signal(number, signal.SIG_IGN)",
                                 "signal.pthread_sigmask(signal.SIG_BLOCK, [number])"], ids=["ignored", "blocked"])
def test_signals_that_its_parent_did_not_want(world, relay, wrapped, tmp_path, how):
    """nohup ignores SIGHUP, a shell SIGINT, and many a program forgets what it has blocked."""
    names = ["HUP", "INT", "TERM", "CHLD", "ALRM", "PIPE", "USR1", "XFSZ"]
    program = (f"import os, signal, sys; [{how} for number in [{', '.join('signal.SIG' + name for name in names)}]]; "
               "os.execv(sys.argv[1], sys.argv[1:])")
    world.dns.mail("example.org", (10, world.exchanger))
    world.exchanger.set(replies={("RCPT", "<b@example.org>"): ["451 4.7.1 later"]})
    server = relay("-t", 1, binary=wrapped(command=f"{sys.executable} -c {shlex.quote(program)}"),
                   mx_port=world.exchanger.port, spool=tmp_path / "other")
    server.send("b@example.net", "b@example.org", sender="")        # two domains: two children of the forwarder
    assert server.outcomes("b@example.net")[0].status == "sent"
    server.hangup_until(lambda: not server.queue())
    with server.client() as client:
        assert client.reply().startswith("421 4.4.2 ")
    server.expect_unharmed(loopback())
    assert server.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_child_hears_what_would_end_it(world, number):
    """The server hears signals only while it waits, and what it forks must not stay as deaf:
    neither who forwards fresh mail, nor who forwards from the queue, nor who looks through it."""
    server = world.relay

    def expect_end(pid):
        os.kill(pid, number)
        server.wait_for_log(rf"^process {pid} died of signal {number}$")

    def forwarder(count):
        """That of the message, which has come as far as its exchanger lets it."""
        wait_for(lambda: len(world.exchanger.connections) == count
                 and "MAIL FROM:<>" in str(world.exchanger.connections[-1].commands))
        pid, = wait_for(lambda: (set(children(server.pid)) | set(children(manager))) - {manager})
        return pid

    manager, = wait_for(lambda: children(server.pid))
    world.exchanger.set(stall_at="MAIL")
    server.send("b@example.net", sender="")
    expect_end(forwarder(1))
    server.hangup_until(lambda: len(world.exchanger.connections) == 2)
    expect_end(forwarder(2))
    expect_end(manager)
    world.exchanger.set(stall_at=None)
    wait_for(lambda: set(children(server.pid)) - {manager}, what="another queue manager")
    server.hangup_until(lambda: not server.queue())
    assert len(world.exchanger.messages) == 1


# ---- Many clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 64])
def test_few_open_files_are_enough_for_many_clients(world, relay, tmp_path, wrapped, limit):
    """Also the fewest that the refusal asks for.  The table divides, and comes together again."""
    if VALGRIND and limit is None:
        pytest.skip("valgrind takes some of so few")
    if limit is None:
        line = refusal(1, "-q", tmp_path / "other", *HERE, program=(wrapped("ulimit -n 20"),))
        assert "ulimit -n" in line
        limit = int(re.search(r"(\d+) or more", line)[1])
        refusal(1, "-q", tmp_path / "other", *HERE, program=(wrapped(f"ulimit -n {limit - 1}"),))
    server = relay("-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other", binary=wrapped(f"ulimit -n {limit}"))
    clients = [server.client() for _ in range(40)]
    for client in clients:
        assert client.deliver("a@example.org", ["b@example.net"], "x").startswith(QUEUED)
    world.exchanger.wait_for_messages(40)
    assert server.logged("table full")
    for client in clients:
        client.close()
    if Path("/proc/self/task").exists():
        wait_for(lambda: len(children(server.pid)) == 1, what="nobody but the queue manager left")


@pytest.mark.skipif("SANITIZED" in os.environ, reason="strace and sanitizers do not go together")
@pytest.mark.parametrize("error, rests", [("EMFILE", True), ("ENFILE", True), ("ENOBUFS", True), ("ECONNABORTED", False)])
def test_accept_that_fails(relay, strace, error, rests):
    """Where something has run out, trying on would only burn time: the next try is in a second.
    A client that has left the queue is no reason to keep the others waiting."""
    server = relay()
    with strace(server.pid, "trace=/^accept", f"inject=/^accept:error={error}:when=1") as trace:
        begun = time.monotonic()
        with server.client() as client:
            assert client.greeting.startswith("220 ")
        took = time.monotonic() - begun
        wait_for(lambda: "EAGAIN" in trace(), what="nobody else to be accepted")
    assert len(re.findall(r"accept4?\(", trace())) < 6
    assert bool(server.logged("^accept failed .*: resting for a second$")) == rests
    assert took > 0.9 or not rests


@pytest.mark.skipif("SANITIZED" in os.environ, reason="strace and sanitizers do not go together")
def test_a_client_that_nobody_knows_has_no_session(relay, strace):
    """Some systems accept a client that has gone again, and say nothing of its address (xnu's accept())."""
    server = relay()
    with strace(server.pid, "trace=/^accept", "inject=/^accept:poke_exit=@arg3=00000000:when=1") as trace:
        with server.client(greeting=False) as client:
            assert client.eof()
        assert "INJECTED" in trace()
        with server.client() as client:
            assert client.say("NOOP") == "250 2.0.0 Ok"


def test_more_clients_than_an_fd_set_holds(world, relay, tmp_path, many_descriptors):
    """1,200 of them, each with a draft open besides, and every kind of place in the
    tables is tried."""
    server = relay("-c", 0, mx_port=world.exchanger.port, spool=tmp_path / "other")
    clients = [server.client() for _ in range(1200)]
    for client in clients:
        client.send(b"HELO me.com\r\nMAIL FROM:<a@example.org>\r\n")
    for client in clients:
        assert [client.reply()[:3], client.reply()] == ["250", "250 2.1.0 Ok"]
    assert len(server.tmp()) == 1200
    assert len({client.local_port for client in clients}) == 1200
    sample = clients[:3] + clients[490:505] + clients[700:1200:50] + clients[-3:]
    for client in sample:
        assert client.deliver("a@example.org", [f"b{client.local_port}@example.net"], "x").startswith(QUEUED)
    messages = world.exchanger.wait_for_messages(len(set(sample)))
    assert {m.recipients[0] for m in messages} == {f"<b{client.local_port}@example.net>" for client in sample}
    clients.append(server.client())
    assert server.process.poll() is None
    for client in clients:
        client.close()


# ---- Clients that take their time -------------------------------------------------------------------


def test_a_client_that_never_reads_delays_nobody(world):
    with world.relay.client() as deaf, world.relay.client() as other:
        deaf.sock.setblocking(False)
        sent, noops = 0, b"NOOP\r\n" * 10000
        while select.select([], [deaf.sock], [], 0.3)[1]:
            sent += deaf.sock.send(noops[sent % 6:])
        assert other.deliver("a@example.org", ["b@example.net"], "x").startswith(QUEUED)
        world.exchanger.wait_for_messages(1)
        # All that it asked was answered, once it listens.
        deaf.sock.settimeout(20)
        for _ in range(sent // 6):
            assert deaf.line() == b"250 2.0.0 Ok"


def test_a_client_that_sends_octet_by_octet_delays_nobody(world):
    session = b"HELO me.com\r\nMAIL FROM:<slow@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n"
    with world.relay.client() as slow, world.relay.client() as other:
        for place in range(len(session)):
            slow.send(session[place:place + 1])
            assert other.deliver("quick@example.org", ["b@example.net"], "x").startswith(QUEUED)
        codes = [slow.reply()[:3] for _ in range(6)]
        assert codes == ["250", "250", "250", "354", "250", "221"]
    world.exchanger.wait_for_messages(len(session) + 1)


def flood(client):
    """Sends for as long as somebody listens."""
    def send():
        with contextlib.suppress(OSError):
            while True:
                client.send(b"x\r\n" * 1000000)
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_who_goes_on_after_quit_is_hung_up_on(relay):
    client = relay().client()
    assert client.say("QUIT") == "221 2.0.0 OK"
    thread = flood(client)
    thread.join(10)
    assert not thread.is_alive()


# ---- The end --------------------------------------------------------------------------------------


def test_clients_that_send_on_and_on_do_not_hold_up_the_end(relay):
    """Though there is always something to read, the signal is heard."""
    server = relay("-m", 1000)
    for client in [server.client() for _ in range(3)]:
        begin(client)
        flood(client)
    assert server.terminate(timeout=8) == 0
    assert server.tmp() == server.queue() == []


def refuses(host, port):
    with socket.socket() as client:
        return client.connect_ex((host, port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("limit", [64, 1000])
def test_a_signal_ends_it_with_421_to_everybody(relay, wrapped, number, limit):
    """Those whom a divided table serves, too; and nothing half done stays."""
    address = loopback()        # where nobody else takes the port at once
    server = relay("-c", 0, binary=wrapped(f"ulimit -n {limit}"), addresses=[address])
    clients = [server.client() for _ in range(40)]
    for client, said in zip(clients, range(len(IN_DATA) + 1)):
        for line in IN_DATA[:said]:
            client.say(line)
    clients[-1].send(b"HELO me")
    assert len(server.tmp()) == 3
    os.kill(server.pid, number)
    for client in clients:
        assert client.reply().startswith(f"421 4.3.2 {HOSTNAME} ")
        assert client.eof()
        client.close()
    assert server.process.wait(20) == 0
    assert server.tmp() == server.queue() == []
    wait_for(lambda: refuses(address, server.port))     # for a moment another program may have the port


def test_a_client_that_does_not_hang_up_is_not_waited_for(relay):
    server = relay()
    client = server.client()
    assert server.terminate(timeout=10) == 0
    assert client.reply().startswith("421 4.3.2 ")


@pytest.mark.skipif("SANITIZED" in os.environ, reason="a traced process cannot look for leaks when it ends")
def test_what_is_being_stored_is_stored_and_answered_before_the_end(world, strace):
    """All others hear 421 meanwhile; commands that came behind the dot are not taken."""
    server = world.relay
    clients = [server.client() for _ in range(3)]
    idle = server.client()
    with strace(server.pid, "trace=fsync", "inject=fsync:delay_enter=500000"):
        for client in clients:
            begin(client)
            client.send(b"Subject: x\r\n.\r\nNOOP\r\nNOOP\r\n")
        idle.say("NOOP")        # the dots have been read now
        server.process.terminate()
        assert idle.reply().startswith("421 4.3.2 ")
        idle.close()
        replies = [client.reply() for client in clients]
        assert all(reply.startswith(QUEUED) for reply in replies)
        for client in clients:
            assert client.reply().startswith("421 4.3.2 ")
            assert client.eof()
            client.close()
        assert server.process.wait(20) == 0
    server.start()      # for what was accepted, and only stored
    messages = world.exchanger.wait_for_messages(3)
    assert {re.search(rb" id (\S+);", m.raw)[1].decode() for m in messages} == {
        reply.removeprefix(QUEUED) for reply in replies}
    assert server.tmp() == []
