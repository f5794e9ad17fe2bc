"""At home where it runs: the files of docs/running/ with the programs they are for,
and what docs/running.md says.

What needs an address that is not loopback's, or port 25, has a network of its own,
which nothing outside sees.
"""
import contextlib
import fcntl
import json
import os
import plistlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from crash import message_id, was_hit
from lab import BINARY, HOSTNAME, ROOT, Client, run, wait_for
from test_proxy import LOCAL, header
from programs import program

RUNNING = ROOT / "docs" / "running"
GUIDE = (ROOT / "docs" / "running.md").read_text()
INSTALLED = "/usr/local/sbin/smtp"      # where all files of docs/running/ have it
F_GETPIPE_SZ = 1032                     # Linux; Python 3.10 has it

PROXY, RELAYS = "192.0.2.10", ("192.0.2.11", "192.0.2.12", "192.0.2.13")    # as in haproxy.cfg
CLIENT, STRANGER = "192.0.2.65", "203.0.113.9"
LETTER = "Subject: %s\n\nDear Nour, This is me testing my server\n"


@pytest.fixture
def network(own_network):
    """A network of our own that has the addresses above."""
    own_network("ip", "link", "set", "lo", "up")
    for address in (PROXY, *RELAYS, CLIENT, STRANGER):
        own_network("ip", "address", "add", f"{address}/32", "dev", "lo")


@pytest.fixture
def start():
    """start("sleep", 9): a process of a session of its own, ended with the test."""
    def end(process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    with contextlib.ExitStack() as stack:
        def make(*command, **options):
            process = subprocess.Popen(list(map(str, command)), start_new_session=True,
                                       **{"stdin": subprocess.DEVNULL, **options})
            stack.callback(end, process)
            return process
        yield make


def replaced(text, *changes):
    for old, new in changes:
        assert old in text
        text = text.replace(old, str(new))
    return text


def listening_port(text):
    found = re.search(r"listening on 127\.0\.0\.1:(\d+)$", text, re.MULTILINE)
    return found and int(found[1])


def exists(pid):
    return Path(f"/proc/{pid}").exists()


# ---- The files ---------------------------------------------------------------------------------


def command_lines():
    """What the files have the program do: (file, arguments)."""
    for file in "smtp.service", "smtp.openbsd", "smtp.freebsd", "runit/run", "Containerfile":
        line = re.search(r"(-q \S+ )?-h relay\.example\.org .*0\.0\.0\.0( ::)?", (RUNNING / file).read_text())
        yield file, line[0].split()
    job = plistlib.loads((RUNNING / "org.example.smtp.plist").read_bytes())
    yield "org.example.smtp.plist", job["ProgramArguments"][1:]


@pytest.mark.parametrize("file, arguments", command_lines())
def test_options_are_such_as_there_are(file, arguments):
    """A port that cannot be, behind all others, is complained of only when those are right."""
    where = arguments.index("0.0.0.0")
    ended = run(*arguments[:where], "-p", "x", *arguments[where:])
    assert ended.returncode == 2 and ended.stderr.startswith("smtp: -p takes a number")


@pytest.mark.parametrize("file", ["smtp.freebsd", "smtp.openbsd", "runit/run", "runit/log/run"])
def test_shell_is_shell(file):
    subprocess.run(["sh", "-n", RUNNING / file], check=True)


def test_property_list_is_one():
    job = plistlib.loads((RUNNING / "org.example.smtp.plist").read_bytes())
    assert job["ProgramArguments"][0] == INSTALLED
    assert job["AbandonProcessGroup"] is True and job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["SoftResourceLimits"] == {"NumberOfFiles": 1024}


@pytest.fixture
def syslog(tmp_path):
    """What is sent to /dev/log elsewhere."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "syslog"))
        sock.settimeout(20)
        yield sock


RC_SUBR = """
load_rc_config() { smtp_enable=YES; }
run_rc_command() { rc_flags=$smtp_flags; "$start_cmd"; }
"""


def test_rc_script_and_logger(syslog, spool, dns, tmp_path):
    """As much of FreeBSD's rc.subr as the script's own start needs, and the real logger.
    The pid in the file is the server's; logger ends by itself when nobody is left to log."""
    arguments = re.search(r"\| logger (.*)$", GUIDE, re.MULTILINE)[1]
    pids, logger = [spool / "lock", tmp_path / "logger.pid"], tmp_path / "logger"
    logger.write_text(f'#!/bin/sh\n[ "$*" = "{arguments}" ] || exit\necho $$ >{pids[1]}\n'
                      f'exec {program("logger")} --socket {syslog.getsockname()} "$@"\n')
    logger.chmod(0o700)
    (tmp_path / "rc.subr").write_text(RC_SUBR)
    script = replaced((RUNNING / "smtp.freebsd").read_text(), ("/etc/rc.subr", tmp_path / "rc.subr"),
                      (INSTALLED, BINARY), ("/var/spool/smtp/lock", pids[0]))
    subprocess.run(["sh", "-c", script, "smtp", "start"], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                        "smtp_flags": f"-p 0 -q {spool} -h {HOSTNAME} -n {dns.address} 127.0.0.1"})
    said = syslog.recv(4096).decode()
    server, logger = [int(path.read_text()) for path in pids]
    try:
        assert re.fullmatch(r"<22>.* smtp(\[\d+\])?: listening on 127\.0\.0\.1:\d+", said)  # mail.info: RFC 5424 6.2.1
        with Client(listening_port(said)) as client:
            os.kill(server, signal.SIGTERM)
            assert client.reply().startswith("421 ")
        wait_for(lambda: not exists(server) and not exists(logger), what="both ended")
    finally:
        if exists(server):
            os.kill(server, signal.SIGKILL)


# What rc.subr(8) says of the variables: flags of rc.conf.local go before those of the script; the
# output goes to logger, of the facility and level that daemon_logger names; rc_bg puts the daemon into
# the background, and is NO unless the script says otherwise behind rc.subr.
OPENBSD_RC_SUBR = """
daemon_flags=${smtp_flags:-$daemon_flags}
rc_bg=NO
rc_cmd() {
    set -- $daemon $daemon_flags
    if [ "$rc_bg" = YES ]; then
        { "$@" & echo $! >server.pid; wait; } 2>&1 | logger -p "$daemon_logger" -t smtp &
    fi
}
"""


def test_openbsd_rc_script(syslog, spool, dns, tmp_path):
    """With as much of rc.subr as its start needs, and the real logger."""
    logger = tmp_path / "logger"
    logger.write_text(f'#!/bin/sh\nexec {program("logger")} --socket {syslog.getsockname()} "$@"\n')
    logger.chmod(0o700)
    (tmp_path / "rc.subr").write_text(OPENBSD_RC_SUBR)
    script = replaced((RUNNING / "smtp.openbsd").read_text(), ("/etc/rc.d/rc.subr", tmp_path / "rc.subr"),
                      (INSTALLED, BINARY))
    subprocess.run(["sh", "-c", script, "smtp", "start"], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path,
                   env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                        "smtp_flags": f"-p 0 -q {spool} -h {HOSTNAME} -n {dns.address} 127.0.0.1"})
    said = syslog.recv(4096).decode()
    server = int((tmp_path / "server.pid").read_text())
    try:
        assert re.fullmatch(r"<22>.* smtp(\[\d+\])?: listening on 127\.0\.0\.1:\d+", said)  # mail.info: RFC 5424 6.2.1
        with Client(listening_port(said)) as client:
            os.kill(server, signal.SIGTERM)
            assert client.reply().startswith("421 ")
        wait_for(lambda: not exists(server), what="its end")
    finally:
        if exists(server):
            os.kill(server, signal.SIGKILL)


# ---- systemd ------------------------------------------------------------------------------------


def test_unit_is_right(tmp_path):
    unit = tmp_path / "smtp.service"
    unit.write_text(replaced((RUNNING / "smtp.service").read_text(), (INSTALLED, BINARY)))
    said = subprocess.run([program("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_unit_exposes_little():
    stated = float(re.search(r"exposure of ([\d.]+)", GUIDE)[1])
    said = subprocess.run([program("systemd-analyze"), "security", "--offline=true", RUNNING / "smtp.service"],
                          capture_output=True, text=True)
    if "unrecognized option" in said.stderr:
        pytest.skip("this systemd-analyze looks at no files")
    assert float(re.search(r"exposure level for smtp.service: ([\d.]+)", said.stdout)[1]) <= stated


def members(group):
    """The system calls of one of systemd's groups, those of the groups in it included."""
    said = subprocess.run([program("systemd-analyze"), "syscall-filter", group], capture_output=True, text=True, check=True)
    words = [line.strip() for line in said.stdout.splitlines()[1:] if line.strip() and "#" not in line]
    return {call for word in words for call in (members(word) if word[0] == "@" else [word])}


@pytest.mark.skipif("SANITIZED" in os.environ, reason="strace and sanitizers do not go together")
def test_unit_permits_all_that_it_calls(world, strace, authority):
    """From a client's connection to the removed file, openssl's calls included.  Those of a start as root are
    left out: the unit's server is none."""
    world.exchanger.set(certificate=authority.certificate(world.exchanger.name))
    allowed, denied = [re.search(rf"^SystemCallFilter={sign}(@.*)$", (RUNNING / "smtp.service").read_text(), re.MULTILINE)[1]
                       .split() for sign in ("", "~")]
    permitted = set().union(*map(members, allowed)) - set().union(*map(members, denied))
    with strace(world.relay.pid, "trace=all") as trace:
        world.relay.send("b@example.net")
        world.exchanger.wait_for_messages(1)
        wait_for(lambda: not world.relay.queue(), what="the message removed")
        called = set(re.findall(r"^\d+ +(\w+)\(", trace(), re.MULTILINE))
    assert {"fsync", "connect", "sendto", "execve"} <= called and world.exchanger.messages[0].connection.tls
    assert "AF_UNIX" in re.search("^RestrictAddressFamilies=(.*)$", (RUNNING / "smtp.service").read_text(), re.M)[1]
    assert called <= permitted


# ---- runit --------------------------------------------------------------------------------------


@pytest.fixture
def service(start, tmp_path, spool, dns, exchangers):
    """The directory docs/running/runit under runsv: tell("down"), log(), and the exchanger of
    example.net."""
    runsv, sv = program("runsv"), program("sv")
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    directory, logs = tmp_path / "service", tmp_path / "logs"
    shutil.copytree(RUNNING / "runit", directory)
    options = f"-p 0 -q {spool} -n {dns.address} -P {exchanger.port}"
    for file, *changes in (("run", (INSTALLED, f"{BINARY} {options}"), ("0.0.0.0 ::", "127.0.0.1")),
                           ("log/run", ("/var/log/smtp", logs))):
        (directory / file).write_text(replaced((directory / file).read_text(), *changes))
    start(runsv, directory)

    def tell(command):
        return subprocess.run([sv, "-w", "20", command, directory], stdout=subprocess.PIPE, text=True).stdout

    def log():
        return (logs / "current").read_text() if (logs / "current").exists() else ""
    wait_for(lambda: listening_port(log()), what="the relay listening")
    yield tell, log, exchanger
    tell("down")


def test_runit_starts_and_stops_it(service):
    """A stop is for the server: its forwarder finishes, and logs."""
    tell, log, exchanger = service
    released = threading.Event()
    exchanger.set(replies={".": lambda _: released.wait(20) and None})
    with Client(listening_port(log())) as client:
        assert client.deliver("nour@example.org", ["b@example.net"], LETTER % 1).startswith("250 ")
        wait_for(lambda: exchanger.connections and ("C", ".") in exchanger.connections[0].transcript,
                 what="the final dot at the exchanger")
        assert "ok: down" in tell("down")
        assert client.reply().startswith("421 ")
    released.set()
    wait_for(lambda: "status=sent" in log(), what="the message sent without a server")
    assert "ok: run" in tell("up")
    wait_for(lambda: log().count("listening on") == 2, what="the relay listening again")
    os.kill(int(re.search(r"\(pid (\d+)\)", tell("status"))[1]), signal.SIGKILL)
    wait_for(lambda: log().count("listening on") == 3, what="the relay started again")
    assert len(exchanger.messages) == 1


# ---- A container --------------------------------------------------------------------------------

# What `podman run`, as the head of the Containerfile has it, makes of a root directory: with the
# devices that an engine adds, in a mount namespace that ends with it.  chroot is the price of
# doing it by hand.
CONTAINER = """#!/bin/sh
exec unshare --mount sh -c 'mount --bind {root} {root} && mount -o remount,bind,ro {root} &&
    mount --bind /dev {root}/dev &&
    mount --bind {volume} {root}{mount_point} &&
    exec setpriv --no-new-privs --bounding-set=-all,+net_bind_service,+setuid,+setgid,+chown,+sys_chroot \\
        chroot {root} {entry} "$@"' smtp "$@"
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the Containerfile describes: the root directory, the volume, entry and command."""
    program("musl-gcc")
    root, source = [tmp_path_factory.mktemp(name) for name in ("root", "source")]
    for path in [ROOT / "Makefile", *ROOT.glob("*.[ch]")]:
        shutil.copy(path, source)
    shutil.copytree(ROOT / "docs", source / "docs")
    text = (RUNNING / "Containerfile").read_text()
    make = re.search(r"^#   (make clean && make (?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\n#", "\n")
    subprocess.run(make, shell=True, cwd=source, check=True, stdout=subprocess.DEVNULL)
    said = defaultdict(list)
    for line in re.findall("^[A-Z].*$", text, re.MULTILINE):
        word, _, rest = line.partition(" ")
        said[word].append(rest)
    for come_from, to in map(str.split, said["COPY"]):
        target = root / to.lstrip("/")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source / come_from, target)
    volume, = said["VOLUME"]
    (root / volume.lstrip("/")).mkdir(parents=True)
    (root / "dev").mkdir()
    for path in root, root / "dev":
        path.chmod(0o755)
    assert said["FROM"] == ["scratch"]
    return root, volume, json.loads(said["ENTRYPOINT"][0]), json.loads(said["CMD"][0])


def test_image_is_small_and_whole(image):
    root, _, entry, command = image
    files = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    assert set(files) == {"smtp", "etc/passwd"}
    assert sum(files.values()) <= 1000 * int(re.search(r"image is (\d+) KB", GUIDE)[1])
    assert entry == ["/smtp"] and command == ["0.0.0.0"]


def test_container_relays(network, image, dns, exchangers, relay, tmp_path):
    """In a root directory that holds nothing else but devices, and may not be written to."""
    root, mount_point, (entry,), command = image
    for needed in "unshare", "setpriv", "chroot":
        program(needed)
    volume, script = tmp_path / "volume", tmp_path / "container"
    volume.mkdir()
    script.write_text(CONTAINER.format(root=root, volume=volume, mount_point=mount_point, entry=entry))
    script.chmod(0o700)
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    server = relay("-p", 25, binary=script, spool="/var/spool/smtp", mx_port=exchanger.port, addresses=command)
    with Client(25) as client:
        assert client.deliver("nour@example.org", ["b@example.net"], LETTER % 1).startswith("250 ")
    exchanger.wait_for_messages(1)
    wait_for(lambda: not list((volume / "smtp" / "queue").iterdir()), what="an empty queue")
    assert (volume / "smtp").stat().st_uid == 25
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert re.search(r"^Uid:\s*25\s+25\s+25\s+25$", status, re.MULTILINE)
    assert re.search(r"^CapPrm:\s*0+$", status, re.MULTILINE)


# ---- The log ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [os.pipe, socket.socketpair], ids=["pipe", "socket"])
def test_log_that_nobody_reads_stops_nothing(start, spool, dns, exchangers, channel):
    """Its lines are dropped and counted, and mail is forwarded meanwhile."""
    reader, writer = [end if isinstance(end, int) else end.detach() for end in channel()]
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    start(BINARY, "-v", "-c", 0, "-p", 0, "-q", spool, "-h", HOSTNAME, "-n", dns.address, "-P", exchanger.port,
          "127.0.0.1", stderr=writer)
    log, clients = b"", 4000 if channel is socket.socketpair else 1500
    while not listening_port(log.decode()):
        log += os.read(reader, 65536)
    port = listening_port(log.decode())
    for _ in range(clients):
        with Client(port) as client:
            assert client.greeting.startswith("220 ")
    with Client(port) as client:
        assert client.deliver("", ["b@example.net"], LETTER % 1).startswith("250 ")
    exchanger.wait_for_messages(1)
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK   # which others share, such as a shell
    os.close(writer)
    while not re.search(rb"C: NOOP\n", log):        # the first line that there is room for again
        if not select.select([reader], [], [], 0)[0]:
            with Client(port) as client:
                client.say("NOOP")
        log += os.read(reader, 65536)
    greetings, dropped = log.count(b" S: 220 "), re.findall(rb"^(\d+) lines of process (\d+) were dropped: ", log, re.M)
    assert clients - int(dropped[0][0]) <= greetings < clients
    assert {int(pid) for _, pid in dropped} == {int((spool / "lock").read_text())}
    os.close(reader)
    with Client(port) as client:
        assert client.say("NOOP") == "250 2.0.0 Ok"     # nor does a reader that has gone


def test_log_file_can_be_copied_and_truncated(start, spool, dns, tmp_path):
    """As logrotate's copytruncate does."""
    log = tmp_path / "log"
    start("sh", "-c", 'exec "$@" 2>>"$0"', log, BINARY, "-p", 0, "-q", spool, "-h", HOSTNAME, "-n", dns.address, "127.0.0.1")
    port = wait_for(lambda: log.exists() and listening_port(log.read_text()), what="the relay listening")
    os.truncate(log, 0)
    with Client(port) as client:
        client.say("FOO")
        assert re.fullmatch(r"127\.0\.0\.1:\d+ refused: 500 .*\n", log.read_text())


def test_health_check_leaves_no_trace(relay):
    check = re.search(r"^    (printf .*)$", GUIDE, re.MULTILINE)[1]
    program("nc")
    server = relay()
    check = replaced(check, ("127.0.0.1 25", f"127.0.0.1 {server.port}"))

    def healthy():
        return subprocess.run(["sh", "-c", check]).returncode == 0
    assert healthy()
    with server.client() as client:
        client.say("FOO")
    server.wait_for_log("refused: 500 ")
    assert len(server.log) == 2 and server.logged("^listening on ")
    server.terminate()
    assert not healthy()


# ---- Three relays behind HAProxy ----------------------------------------------------------------


@pytest.fixture
def relays(network, dns, exchangers, relay, tmp_path):
    """relays("-a", CLIENT): the three of haproxy.cfg, and the two exchangers of example.net."""
    def make(*options):
        near = exchangers(2)
        dns.mail("example.net", *((10, exchanger) for exchanger in near))
        made = [relay("-p", 25, "-r", 1, "-w", 5, "-X", PROXY, *options, spool=tmp_path / address, addresses=[address],
                      mx_port=near[0].port) for address in RELAYS]
        return made, near
    return make


@pytest.fixture
def haproxy(start, tmp_path):
    """haproxy() starts it with haproxy.cfg; haproxy.checks() is how it finds each relay."""
    path, control, more = program("haproxy"), tmp_path / "control", tmp_path / "more.cfg"
    more.write_text(f"global\n    stats socket {control}\n")
    files = ["-f", RUNNING / "haproxy.cfg", "-f", more]

    def checks():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control))
            sock.sendall(b"show stat -1 4 -1 json\n")
            with sock.makefile() as stream:
                return [field["value"]["value"] for server in json.load(stream) for field in server
                        if field["field"]["name"] == "check_status"]

    def make():
        subprocess.run([path, "-c", *files], check=True, stdout=subprocess.DEVNULL)
        start(path, "-db", *files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(control.exists, what="HAProxy")
    make.checks = checks
    return make


def test_haproxy_says_who_the_client_is(relays, haproxy):
    made, near = relays("-a", CLIENT)
    haproxy()
    wait_for(lambda: haproxy.checks() == ["L4OK"] * 3, what="HAProxy finding its relays well")
    assert [len(relay.log) for relay in made] == [1, 1, 1]      # its checks leave no trace
    with Client(25, PROXY, source=CLIENT) as client:
        assert client.deliver("nour@example.org", ["b@example.net"], LETTER % 1).startswith("250 ")
        received = f"from me.com ([{CLIENT}]:{client.local_port})".encode()
    message, = wait_for(lambda: near[0].messages + near[1].messages, what="the message")
    assert received in message.data
    with Client(25, PROXY, source=STRANGER) as client:
        assert client.greeting.startswith(f"554 5.7.1 {STRANGER} may not relay here")
        assert client.say("QUIT") == "221 2.0.0 OK" and client.eof()
    wait_for(lambda: any(relay.logged(rf"^{STRANGER}:\d+ refused: 554 ") for relay in made), what="the refusal in a log")


def test_haproxy_gives_clients_tls(relays, start, authority, tmp_path):
    """curl smtps:// is the client; who may relay is decided by its own address."""
    curl, haproxy = program("curl"), program("haproxy")
    settings, letter = tmp_path / "haproxy.cfg", tmp_path / "letter"
    settings.write_text(replaced((RUNNING / "haproxy-tls.cfg").read_text(),
                                 ("/etc/haproxy/relay.pem", authority.certificate("relay.example.org"))))
    letter.write_text(LETTER % 1)
    (server, *_), near = relays("-a", CLIENT)
    start(haproxy, "-db", "-f", settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def send(source):
        return subprocess.run([curl, "-sS", "smtps://relay.example.org", "--resolve", f"relay.example.org:465:{PROXY}",
                               "--cacert", authority.pem, "--interface", source, "--mail-from", "nour@example.org",
                               "--mail-rcpt", "b@example.net", "--crlf", "-T", letter], capture_output=True, text=True)
    wait_for(lambda: send(CLIENT).returncode == 0, what="a letter that is taken")
    message, = wait_for(lambda: near[0].messages + near[1].messages, what="the message")
    assert f"([{CLIENT}]:".encode() in message.data and b"Dear Nour" in message.data
    assert send(STRANGER).returncode != 0
    server.wait_for_log(rf"^{STRANGER}:\d+ refused: 554 ")


@pytest.fixture
def proxied(network, relay):
    """proxied(bytes): a client of a relay whose proxy is PROXY, from there."""
    server = relay("-X", PROXY, "-a", CLIENT, addresses=RELAYS[:1])

    def connect(data):
        client = server.client(greeting=False, source=PROXY)
        client.send(data)
        return client
    connect.server = server
    return connect


def test_a_proxy_without_an_a_may_look_and_not_relay(proxied):
    """It is greeted, and leaves no line in the log; whatever it would send is refused."""
    for last in "QUIT", "HELO me.com", None:
        client = proxied(header(CLIENT, command=LOCAL))
        assert client.reply().startswith("220 ")
        assert last is None or client.say(last)[0] == "2"
        client.close()
    assert proxied(header(CLIENT)).reply().startswith("220 ")      # which has been served behind them
    assert len(proxied.server.log) == 1
    client = proxied(header(CLIENT, command=LOCAL))
    assert client.reply().startswith("220 ")
    for command, code in [("EHLO me.com", "250-"), ("MAIL FROM:<a@example.org>", "550 5.7.1 "),
                          ("RCPT TO:<b@example.net>", "503 "), ("DATA", "503 "), ("RSET", "250 "),
                          ("MAIL FROM:<> SIZE=1", "550 5.7.1 "), ("RCPT TO:<Postmaster>", "503 ")]:
        assert client.say(command).startswith(code)
    assert proxied.server.tmp() == proxied.server.queue() == []


def test_a_proxy_that_connects_for_itself_as_a_client_is_a_client(proxied):
    client = proxied(header(PROXY))
    assert client.reply().startswith(f"554 5.7.1 {PROXY} may not relay here")
    assert client.say("QUIT") == "221 2.0.0 OK" and client.eof()


class Sender:
    """A client that says each message again until it is taken."""

    def __init__(self):
        self.taken = Counter()          # number: how many 250 it got
        self.unanswered = Counter()     # number: how often its final dot got no answer

    def send(self, number):
        for _ in range(100):
            with contextlib.suppress(OSError, AssertionError):
                if self._try(number):
                    self.taken[number] += 1
                    return

    def _try(self, number):
        with Client(25, PROXY, source=CLIENT) as client:
            for line in "HELO me.com", "MAIL FROM:<nour@example.org>", "RCPT TO:<b@example.net>", "DATA":
                if client.say(line)[0] not in "23":
                    return False
            client.send((LETTER % number).replace("\n", "\r\n").encode() + b".\r\n")
            self.unanswered[number] += 1
            reply = client.reply()
            self.unanswered[number] -= 1
            return reply.startswith("250 ")


def send_all(sender, numbers):
    for number in numbers:
        sender.send(number)


def test_one_of_three_relays_killed_under_load(relays, haproxy):
    """Clients notice no more than that they have to say it again.  Nothing that was acknowledged is
    lost.  What arrives twice was hit between an exchanger's 250 and its record, or its client heard
    no answer and gave it to another relay."""
    made, near = relays("-a", CLIENT)
    haproxy()
    sender, total = Sender(), 150
    threads = [threading.Thread(target=send_all, args=(sender, range(i, total, 4))) for i in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(sender.taken) > total // 4, 60, "a quarter of the messages taken")
    made[1].kill()
    kills = [time.monotonic()]
    wait_for(lambda: len(sender.taken) > total // 2, 60, "half of the messages taken")
    made[1].start()
    for thread in threads:
        thread.join(120)
    assert sender.taken == Counter(range(total))

    def emptied():
        for relay in made:
            relay.hangup()
        return not any(relay.queue() for relay in made)
    wait_for(emptied, 60, "empty queues")
    arrivals = defaultdict(lambda: defaultdict(list))
    for message in near[0].messages + near[1].messages:
        number = int(re.search(rb"Subject: (\d+)", message.data)[1])
        arrivals[number][message_id(message)].append(message)
    assert set(arrivals) == set(range(total))
    for number, by_id in arrivals.items():
        assert len(by_id) <= 1 + sender.unanswered[number]
        assert all(was_hit(kills, messages) for messages in by_id.values())
    assert all(relay.logged("status=sent") for relay in made)
