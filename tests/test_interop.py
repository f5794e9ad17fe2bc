"""Programs that others wrote, on all sides of the relay: clients that hand it mail,
name servers that it asks, exchangers that it forwards to.  Where one of them is
missing its tests are skipped; tests/install sees to them all."""
import contextlib
import email.message
import os
import pty
import re
import select
import shutil
import signal
import smtplib
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import HOSTNAME, TYPES, Exchanger, encode_name, header, loopback, run, wait_for

# What a relay could spoil: dots, white space, empty lines, the longest line there
# may be (RFC 5321 4.5.3.1.6).  Plain ASCII: not every exchanger here takes more.
LETTER = """\
From: nour@example.org
To: friend@example.net
Subject: testing my smtp server

.A line that begins with a dot, and
..one that begins with two, and
.
..
before this one.  Trailing spaces:  \n\t

QUIT
is no command here, and nor is
%s
""" % ("x" * 998)
GREETINGS = LETTER + "Grüße.\n"


def program(name):
    """The path of a program, or the end of a test that is nothing without it."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"there is no {name} here")
    return found


def without_received(content):
    """The content but for the one header line, folded, that the relay put before it."""
    received = re.match(rb"Received: from .*\n(?:[ \t].*\n)*", content)
    assert received, f"no Received: line of the relay's in front of {content[:200]}"
    return content[received.end():]


def on_the_wire(text):
    return text.replace("\n", "\r\n").encode()


@contextlib.contextmanager
def daemon(command, ready, directory):
    """`command(host, port)` as a process in `directory`, until the block ends.  It has
    an address of this machine to itself when `ready(host, port)` has said yes."""
    log = Path(directory, "log")
    for _ in range(10):
        host = loopback()
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        with open(log, "wb") as output:
            process = subprocess.Popen(command(host, port), cwd=directory, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True)
        try:
            wait_for(lambda: process.poll() is not None or ready(host, port), what=f"{process.args[0]} ready")
            if process.poll() is None:
                yield SimpleNamespace(host=host, port=port, address=f"{host}:{port}", process=process)
                return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # It ended by itself: the port was taken meanwhile, and the next may be free.
    raise AssertionError(f"{process.args[0]} does not start:\n{log.read_text()}")


# ---- Clients -------------------------------------------------------------------------


def finish(*command, input=None):
    """Runs a client to its end, which has to be a good one; returns all that it said."""
    done = subprocess.run(list(map(str, command)), input=input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=60, **({} if input else {"stdin": subprocess.DEVNULL}))
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


def swaks(port, letter):
    said = finish(program("swaks"), "--server", f"127.0.0.1:{port}", "--helo", "me.com",
                  "--from", "nour@example.org", "--to", "friend@example.net", "--data", f"@{letter}")
    assert re.search(r"^<-  250 2\.0\.0 Ok: queued as \S+$", said, re.M), said


def curl(port, letter):
    finish(program("curl"), "--silent", "--show-error", "--url", f"smtp://127.0.0.1:{port}/me.com", "--crlf",
           "--mail-from", "nour@example.org", "--mail-rcpt", "friend@example.net", "--upload-file", letter)


def python_smtplib(port, letter):
    with smtplib.SMTP("127.0.0.1", port, "me.com", timeout=20) as client:
        assert not client.sendmail("nour@example.org", ["friend@example.net"],
                                   on_the_wire(letter.read_text()), ["BODY=8BITMIME"])


def smtp_source(port, letter):
    finish(program("smtp-source"), "-M", "me.com", "-f", "nour@example.org", "-t", "friend@example.net",
           "-F", letter, f"127.0.0.1:{port}")


# Some add an empty line to what they are given.
@pytest.mark.parametrize("send, surplus", [
    (swaks, "\n"), (curl, ""), (python_smtplib, ""), (smtp_source, "\n")
], ids=["swaks", "curl", "smtplib", "smtp-source"])
def test_client_sends_a_message(world, tmp_path, send, surplus):
    letter = tmp_path / "letter"
    letter.write_text(GREETINGS)
    send(world.relay.port, letter)
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.data) == on_the_wire(GREETINGS + surplus)


# The session that everybody types first: (what is typed, the reply).
WALK_THROUGH = [
    ("HELO me.com", "250 <port> OK"),
    ("MAIL FROM:<nour@example.org>", "250 2.1.0 Ok"),
    ("RCPT TO:<friend@example.net>", "250 2.1.5 Ok"),
    ("DATA", "354 End data with <CR><LF>.<CR><LF>"),
    ("SUBJECT: testing my smtp server", None),
    ("FROM: nour@example.org", None),
    ("", None),
    ("Dear Nour, This is me testing my server", None),
    (".", "250 2.0.0 Ok: queued as <id>"),
    ("QUIT", "221 2.0.0 OK")]
WALKED_THROUGH = (b"SUBJECT: testing my smtp server\r\nFROM: nour@example.org\r\n\r\n"
                  b"Dear Nour, This is me testing my server\r\n")


def as_heard(lines):
    """A walk-through as a pattern: ports and ids are what they are."""
    text = re.escape("".join(line + "\n" for line in lines if line is not None))
    return text.replace("<port>", r"\d+").replace("<id>", r"\S+").replace(r"<hostname>", re.escape(HOSTNAME))


class Terminal:
    """A pseudo-terminal with a program at it, and somebody who types and reads."""

    def __init__(self, *command):
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.screen = ""

    def type(self, line):
        os.write(self._master, line.encode() + b"\r")       # what the Enter key sends

    def read_until(self, pattern):
        """Until the screen matches; `None` is until the program has left."""
        def seen():
            if pattern is not None and re.search(pattern, self.screen):
                return True
            if select.select([self._master], [], [], 0)[0]:
                try:
                    self.screen += os.read(self._master, 4096).decode().replace("\r\n", "\n")
                except OSError:     # nobody has the terminal's other side open any more
                    return pattern is None
            return False
        wait_for(seen, what=f"{pattern} on a screen")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def test_telnet_with_somebody_who_types(world):
    with Terminal(program("telnet"), "127.0.0.1", str(world.relay.port)) as terminal:
        terminal.read_until(r"\n220 .*\n")
        for typed, reply in WALK_THROUGH:
            terminal.type(typed)
            # The terminal echoes; a line of content has no other answer.
            terminal.read_until(as_heard([typed, reply]) + r"\Z" if typed != "QUIT" else None)
        dialogue = [line for turn in WALK_THROUGH for line in turn]
        assert re.search(r"\n220 .*\n" + as_heard(dialogue) + "Connection closed", terminal.screen), terminal.screen
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.raw) == WALKED_THROUGH


def test_session_piped_through_nc_ends_its_lines_with_lf(world):
    """printf 'HELO me.com\\n...' | nc: all at once, before the greeting, and then the end."""
    with socket.create_connection(("127.0.0.1", world.relay.port), 20) as nc:
        nc.sendall("".join(typed + "\n" for typed, _ in WALK_THROUGH).encode())
        nc.shutdown(socket.SHUT_WR)
        with nc.makefile("r", newline="\r\n") as replies:
            said = replies.read().replace("\r\n", "\n")
    assert re.fullmatch(r"220 .*\n" + as_heard(reply for _, reply in WALK_THROUGH), said), said
    message, = world.exchanger.wait_for_messages(1)
    assert without_received(message.raw) == WALKED_THROUGH


def test_smtp_source_sends_many_messages_in_several_sessions(world):
    def send(host, port, *options):
        finish(program("smtp-source"), "-l", 5000, "-N", "-M", "me.com", "-f", "nour@example.org",
               "-t", "friend@example.net", *options, f"{host}:{port}")

    def body(message):
        return message.data.partition(b"\r\n\r\n")[2]

    send(world.exchanger.host, world.exchanger.port)
    pattern = body(world.exchanger.messages.pop())      # as it is without a relay on the way
    send("127.0.0.1", world.relay.port, "-s", 10, "-m", 100)
    messages = world.exchanger.wait_for_messages(100, timeout=60)
    recipients = [recipient for message in messages for recipient in message.recipients]
    assert sorted(recipients) == sorted(f"<{i}friend@example.net>" for i in range(1, 101))
    assert {body(message) for message in messages} == {pattern}
    wait_for(lambda: not world.relay.queue(), what="an empty queue")


def test_smtplib_finds_the_extensions(world):
    with smtplib.SMTP("127.0.0.1", world.relay.port, "me.com", timeout=20) as client:
        code, text = client.ehlo()
        assert code == 250 and text.startswith(HOSTNAME.encode())
        assert client.esmtp_features == {"pipelining": "", "size": "52428800", "8bitmime": "",
                                         "enhancedstatuscodes": ""}


def test_smtplib_is_told_which_recipient_is_refused(world):
    letter = email.message.EmailMessage()
    letter["Subject"] = "testing my smtp server"
    letter.set_content("Grüße\n", cte="8bit")
    with smtplib.SMTP("127.0.0.1", world.relay.port, "me.com", timeout=20) as client:
        refused = client.send_message(letter, "nour@example.org", ["friend@example.net", "nowhere"])
    assert refused == {"nowhere": (501, b"5.5.4 Syntax: RCPT TO:<address>")}
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.data) == letter.as_bytes().replace(b"\n", b"\r\n")


@pytest.mark.parametrize("options, reply", [
    (["--mail-rcpt", "friend@example.net"], r"252 2\.0\.0 .*"),         # a VRFY
    (["--request", "NOOP"], r"250 2\.0\.0 Ok"),
    (["--request", "HELP"], r"214 .*"),
], ids=["VRFY", "NOOP", "HELP"])
def test_curl_asks(world, options, reply):
    said = finish(program("curl"), "--silent", "--show-error", "--verbose",
                  "--url", f"smtp://127.0.0.1:{world.relay.port}/me.com", *options)
    assert re.search(rf"^< {reply}\r?$", said, re.M), said


# ---- Exchangers ----------------------------------------------------------------------


def deliver(relay, recipients, letter):
    with relay.client() as client:
        assert client.deliver("nour@example.org", recipients, letter).startswith("250 ")


def greets(host, port):
    """Whether an SMTP server has begun to serve there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5) as sock:
        return sock.recv(512).startswith(b"220")
    return False


@pytest.fixture
def smtp_sink(tmp_path):
    """smtp_sink("-e"): Postfix's exchanger for tests; .dump() is what it took."""
    directory = tmp_path / "sink"
    directory.mkdir()
    unprivileged = []
    if os.geteuid() == 0:       # it insists; and writes below its current directory only
        shutil.chown(directory, "nobody")
        unprivileged = ["-u", "nobody"]

    def dump():
        file, = wait_for(lambda: list(directory.glob("message.*")), what="a message at smtp-sink")
        return file.read_bytes()

    with contextlib.ExitStack() as stack:
        def start(*options):
            sink = stack.enter_context(daemon(lambda host, port: [
                program("smtp-sink"), *unprivileged, *options, "-d", "message.", f"{host}:{port}", "100",
            ], greets, directory))
            sink.dump = dump
            return sink
        yield start


def check_dump(dump, protocol, letter):
    """smtp-sink writes down who said what, in lines that end with LF, then what it
    took below a Received: line of its own, and in the end an empty line."""
    pattern = (rb"X-Client-Addr: 127\.0\.0\.1\n"
               rb"X-Client-Proto: %s\n"
               rb"X-Helo-Args: %s\n"
               rb"X-Mail-Args: <nour@example\.org>\n"
               rb"X-Rcpt-Args: <friend@example\.net>\n"
               rb"Received: .*\n(?:\t.*\n)*") % (protocol, re.escape(HOSTNAME.encode()))
    noted = re.match(pattern, dump)
    assert noted, dump
    assert without_received(dump[noted.end():]) == letter.encode() + b"\n"


# In turn: all that it offers; nothing beside; a server of the time before EHLO.
@pytest.mark.parametrize("options, protocol", [
    ([], b"ESMTP"), (["-p", "-8", "-E"], b"ESMTP"), (["-e"], b"SMTP")
], ids=["ESMTP", "plain", "HELO"])
def test_smtp_sink_takes_a_message(dns, relay, smtp_sink, options, protocol):
    sink = smtp_sink(*options)
    dns.mx("example.net", (10, "sink.example.net"))
    dns.a("sink.example.net", sink.host)
    server = relay(mx_port=sink.port)
    deliver(server, ["friend@example.net"], LETTER)
    server.wait_for_log(r"to=<friend@example.net> relay=sink.example.net\S* .*status=sent \(250 ")
    check_dump(sink.dump(), protocol, LETTER)


AIOSMTPD = '''
import asyncio, os, sys
from aiosmtpd.smtp import SMTP

class Keeper:
    async def handle_DATA(self, server, session, envelope):
        with open("unfinished", "wb") as file:
            file.write(envelope.original_content)
        with open("envelope", "w") as file:
            print(session.host_name, envelope.mail_from, envelope.rcpt_tos, envelope.mail_options, file=file)
        os.rename("unfinished", "message")
        return "250 2.0.0 Kept"

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(loop.create_server(lambda: SMTP(Keeper(), loop=loop), sys.argv[1], int(sys.argv[2])))
loop.run_forever()
'''


def python_with(module):
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL).returncode == 0:
                return python
    pytest.skip(f"no Python here has {module}")


def test_aiosmtpd_takes_a_message(dns, relay, tmp_path):
    python = python_with("aiosmtpd")
    with daemon(lambda host, port: [python, "-c", AIOSMTPD, host, str(port)], greets, tmp_path) as exchanger:
        dns.mx("example.net", (10, "aio.example.net"))
        dns.a("aio.example.net", exchanger.host)
        server = relay(mx_port=exchanger.port)
        deliver(server, ["a@example.net", "b@example.net"], GREETINGS)
        server.wait_for_log(r"to=<b@example.net> relay=aio.example.net\S* .*status=sent \(250 2.0.0 Kept\)")
        kept = (tmp_path / "message").read_bytes()
        assert without_received(kept) == on_the_wire(GREETINGS)
        assert (tmp_path / "envelope").read_text() == (
            f"{HOSTNAME} nour@example.org ['a@example.net', 'b@example.net'] "
            f"['SIZE={len(kept)}', 'BODY=8BITMIME']\n")


# ---- Name servers --------------------------------------------------------------------


def zone(host):
    """(name, type, value) of all there is; mail is taken at `host`, and at ::1."""
    # The only one of use is in the middle, so that whoever cuts leaves it out.
    crowd = [("crowd.example.net", "MX", (10 + i, f"exchanger-number-{i}.crowd.example.net")) for i in range(120)]
    crowd[60] = ("crowd.example.net", "MX", (5, "host.example.net"))
    return [("host.example.net", "A", host),
            ("example.net", "MX", (20, "host.example.net")),
            ("host6.example.net", "AAAA", "::1"),
            ("mail6.example.net", "MX", (10, "host6.example.net")),
            ("alias.example.net", "CNAME", "example.net"),
            *crowd,
            ("null.example.net", "MX", (0, "")),
            ("text.example.net", "TXT", "no mail here")]


def dnsmasq(rows, directory):
    spelled = {
        "A": "--host-record={0},{1}".format,
        "AAAA": "--host-record={0},{1}".format,
        "MX": lambda name, value: f"--mx-host={name},{value[1]},{value[0]}" if value[1]
        else f"--dns-rr={name},15,000000",      # it knows no root, but hexadecimal digits
        "CNAME": "--cname={0},{1}".format,
        "TXT": "--txt-record={0},{1}".format}
    options = [spelled[type](name, value) for name, type, value in rows]
    return lambda host, port: [
        program("dnsmasq"), "--conf-file=/dev/null", "--keep-in-foreground", "--log-facility=-", "--pid-file",
        *(["--user=root"] if os.geteuid() == 0 else []), f"--listen-address={host}", f"--port={port}",
        "--bind-interfaces", "--no-resolv", "--no-hosts", "--local=/example.net/", *options]


def zone_lines(rows):
    """The rows as RFC 1035 5 writes them."""
    for name, type, value in rows:
        if type == "MX":
            value = f"{value[0]} {value[1]}."
        elif type == "CNAME":
            value += "."
        elif type == "TXT":
            value = f'"{value}"'
        yield f"{name}. 60 IN {type} {value}"


def unbound(rows, directory):
    data = "\n".join(f"  local-data: '{line}'" for line in zone_lines(rows))

    def command(host, port):
        Path(directory, "unbound.conf").write_text(f"""\
server:
  interface: {host}@{port}
  so-reuseport: no
  do-daemonize: no
  use-syslog: no
  logfile: ""
  pidfile: ""
  chroot: ""
  directory: ""
  username: ""
  module-config: "iterator"
  local-zone: "example.net." static
{data}
remote-control:
  control-enable: no
""")
        return [program("unbound"), "-c", "unbound.conf"]
    return command


def nsd(rows, directory):
    authority = ["example.net. 60 IN SOA host.example.net. nour.example.org. 1 60 60 60 60",
                 "example.net. 60 IN NS host.example.net."]
    Path(directory, "zone").write_text("\n".join([*authority, *zone_lines(rows), ""]))

    def command(host, port):
        Path(directory, "nsd.conf").write_text(f"""\
server:
  server-count: 1
  ip-address: {host}@{port}
  username: ""
  zonesdir: "{directory}"
  xfrdir: "{directory}"
  xfrdfile: "{directory}/xfrd"
  zonelistfile: "{directory}/zones"
  database: ""
  pidfile: ""
  logfile: "{directory}/nsd.log"
remote-control:
  control-enable: no
zone:
  name: example.net.
  zonefile: zone
""")
        return [program("nsd"), "-d", "-c", "nsd.conf"]
    return command


def knows_the_zone(host, port):
    asked = header(1, 0x0100) + encode_name("example.net") + struct.pack("!HH", TYPES["MX"], 1)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect((host, port))
        sock.send(asked)
        return int.from_bytes(sock.recv(512)[6:8], "big") > 0
    return False


@contextlib.contextmanager
def name_server(kind, exchanger_host, directory):
    program(kind.__name__)
    with daemon(kind(zone(exchanger_host), directory), knows_the_zone, directory) as server:
        server.exchanger_host = exchanger_host
        yield server


@pytest.fixture(scope="module", params=[dnsmasq, unbound, nsd], ids=lambda kind: kind.__name__)
def server(request, tmp_path_factory):
    """One name server for all its tests; what they ask for is the same."""
    with name_server(request.param, loopback(), tmp_path_factory.mktemp("dns")) as started:
        yield started


@pytest.fixture
def mail_through(server, relay):
    """mail_through(exchanger, domain): mails the domain; returns the relay."""
    def mail(exchanger, domain):
        made = relay(dns=server, mx_port=exchanger.port)
        deliver(made, [f"friend@{domain}"], LETTER)
        return made
    return mail


@contextlib.contextmanager
def exchanger_at(host):
    exchanger = Exchanger(host)
    yield exchanger
    exchanger.stop()


@pytest.mark.parametrize("domain", [
    pytest.param("example.net", id="MX"),
    pytest.param("host.example.net", id="no MX but an address"),        # RFC 5321 5.1
    pytest.param("alias.example.net", id="CNAME"),
    pytest.param("crowd.example.net", id="MX too many for UDP"),        # RFC 1035 4.2.1: truncated
])
def test_name_server_leads_to_the_exchanger(server, mail_through, domain):
    with exchanger_at(server.exchanger_host) as exchanger:
        mail_through(exchanger, domain)
        message, = exchanger.wait_for_messages(1)
    assert message.recipients == [f"<friend@{domain}>"]
    assert without_received(message.data) == on_the_wire(LETTER)


def test_name_server_leads_to_an_ipv6_exchanger(ipv6, mail_through):
    with exchanger_at("::1") as exchanger:
        mail_through(exchanger, "mail6.example.net")
        message, = exchanger.wait_for_messages(1)
    assert without_received(message.data) == on_the_wire(LETTER)


@pytest.mark.parametrize("domain, status", [
    pytest.param("nobody.example.net", "5.1.2", id="NXDOMAIN"),
    pytest.param("text.example.net", "5.4.4", id="NODATA"),
    pytest.param("null.example.net", "5.1.10", id="null MX"),           # RFC 7505
])
def test_name_server_knows_no_exchanger(server, mail_through, domain, status):
    with exchanger_at(server.exchanger_host) as exchanger:
        relay = mail_through(exchanger, domain)
        relay.wait_for_log(rf"to=<friend@{domain}> .*status=failed \({re.escape(status)} ")
    assert exchanger.connections == []


# ---- All of them at once -----------------------------------------------------------------


def test_nothing_but_the_relay_is_ours(relay, smtp_sink, tmp_path):
    """swaks sends; dnsmasq says where to; smtp-sink takes it; and smtp -l has nothing left."""
    sink = smtp_sink()
    letter = tmp_path / "letter"
    letter.write_text(LETTER)
    with name_server(dnsmasq, sink.host, tmp_path) as server:
        ours = relay(dns=server, mx_port=sink.port)
        swaks(ours.port, letter)
        ours.wait_for_log(r"to=<friend@example.net> relay=host.example.net\S* .*status=sent ")
    check_dump(sink.dump(), b"ESMTP", LETTER + "\n")      # the empty line is swaks'
    wait_for(lambda: not ours.queue(), what="an empty queue")
    assert run("-l", "-q", ours.spool).returncode == 0
