"""Programs that others wrote: how they are run, and what is sent through them.

Where one of them is missing, the test that asks for it is skipped; tests/install
sees to them all.  Other people's mail servers are in peers.py.
"""
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple, Optional

import pytest

import peers
from lab import HOSTNAME, TYPES, encode_name, header, loopback, wait_for

# ---- Letters -----------------------------------------------------------------------


def _rough_line(dice):
    """What programs stumble over, in any order, in a line of up to 900 octets."""
    pieces = (".", "..", " ", "\t", "From ", "=3D", "QUIT", "word", "x" * 100)
    return "".join(dice.choice(pieces) for _ in range(dice.randrange(10)))


# All that a server might add to the header is there.
HEADER = """\
From: nour@example.org
To: friend@example.net
Subject: testing my smtp server
Date: Mon, 23 Nov 2026 11:08:19 +0000
Message-ID: <1@example.org>
"""
# What a relay could spoil: dots, white space, empty lines, the longest line there may
# be (RFC 5321 4.5.3.1.6).  Plain ASCII: not every exchanger here takes more.
BODY = """\
.A line that begins with a dot, and
..one that begins with two, and
.
..
before this one.  Trailing spaces:  \n\t

QUIT
is no command here, and nor is
%s
%s
""" % ("x" * 998, "\n".join(map(_rough_line, [random.Random(5321)] * 200)))
LETTER = HEADER + "\n" + BODY
GREETINGS = LETTER + "Grüße.\n"


def on_the_wire(text):
    return text.replace("\n", "\r\n").encode()


def without_received(content):
    """The content but for the one header line, folded, that the relay put before it."""
    received = re.match(rb"Received: from .*\n(?:[ \t].*\n)*", content)
    assert received, f"no Received: line of the relay's in front of {content[:200]}"
    return content[received.end():]


def deliver(relay, recipients, letter):
    with relay.client() as client:
        assert client.deliver("nour@example.org", recipients, letter).startswith("250 ")


# ---- Processes ---------------------------------------------------------------------


def program(name):
    """The path of a program, or the end of a test that is nothing without it."""
    try:
        return peers.program(name)
    except peers.Absent as reason:
        pytest.skip(str(reason))


def finish(*command, input=None, **settings):
    """Runs a program to its end, which has to be a good one; returns all that it said."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                          **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}), **settings)
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


@contextlib.contextmanager
def daemon(command, ready, directory, host=None):
    """`command(host, port)` as a process in `directory`, until the block ends.  It has
    an address of this machine to itself, but where it can have no other than `host`,
    when `ready(server)` has said yes."""
    log = Path(directory, "log")
    for _ in range(10):
        where = host or loopback()
        with socket.create_server((where, 0)) as free:
            port = free.getsockname()[1]
        with open(log, "wb") as output:
            process = subprocess.Popen(command(where, port), cwd=directory, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True)
        server = SimpleNamespace(host=where, port=port, address=f"{where}:{port}", process=process)
        try:
            wait_for(lambda: process.poll() is not None or ready(server), what=f"{process.args[0]} ready")
            if process.poll() is None:
                yield server
                return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # It ended by itself: the port was taken meanwhile, and the next may be free.
    raise AssertionError(f"{process.args[0]} does not start:\n{log.read_text()}")


# ---- A client, and an exchanger ----------------------------------------------------


def swaks(port, letter, name="me.com"):
    said = finish(program("swaks"), "--server", f"127.0.0.1:{port}", "--helo", name,
                  "--from", "nour@example.org", "--to", "friend@example.net", "--data", f"@{letter}")
    assert re.search(r"^<-  250 2\.0\.0 Ok: queued as \S+$", said, re.M), said


def listens(server):
    """Whether it can be connected to.  Not every server greets."""
    with contextlib.suppress(OSError), socket.create_connection((server.host, server.port), 5):
        return True
    return False


@contextlib.contextmanager
def smtp_sink(directory, *options):
    """Postfix's exchanger for tests, in a new directory; .dump() is what it took, as soon
    as it has."""
    directory.mkdir()
    unprivileged = []
    if os.geteuid() == 0:       # it insists; and writes below its current directory only
        shutil.chown(directory, "nobody")
        unprivileged = ["-u", "nobody"]

    def dump():
        file, = wait_for(lambda: list(directory.glob("message.*")), what="a message at smtp-sink")
        return file.read_bytes()

    with daemon(lambda host, port: [
        program("smtp-sink"), *unprivileged, *options, "-d", "message.", f"{host}:{port}", "100",
    ], listens, directory) as sink:
        sink.dump = dump
        yield sink


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


# ---- Name servers --------------------------------------------------------------------
#
# A way to start one is a function of what it is to know, and of a directory of its
# own; it returns the command as daemon() wants it.

# Exchangers of a domain, and addresses of a host: more than fit a packet; and fewer
# than 100, where BIND takes no more.
CROWD = 80


def zone(hosts):
    """(name, type, value) of all there is.  Mail is taken at `hosts`, and at ::1."""
    # The only one of use is in the middle, so that whoever cuts leaves it out.
    crowd = [("crowd.example.net", "MX", (10 + i, f"exchanger-number-{i}.crowd.example.net")) for i in range(CROWD)]
    crowd[CROWD // 2] = ("crowd.example.net", "MX", (5, "host.example.net"))
    fleet = [(f"ship-{i}.example.net", host) for i, host in enumerate(hosts)]
    return [("host.example.net", "A", hosts[0]),
            ("example.net", "MX", (20, "host.example.net")),
            ("host6.example.net", "AAAA", "::1"),
            ("mail6.example.net", "MX", (10, "host6.example.net")),
            ("alias.example.net", "CNAME", "example.net"),
            ("chain.example.net", "CNAME", "alias.example.net"),
            ("alias-host.example.net", "CNAME", "host.example.net"),
            ("alias-mx.example.net", "MX", (10, "alias-host.example.net")),
            *crowd,
            *[("fleet.example.net", "MX", (10, ship)) for ship, _ in fleet],
            *[(ship, "A", host) for ship, host in fleet],
            *[("many.example.net", "A", host) for host in hosts],
            ("forged.example.net", "MX", (10, "host.example.net")),
            ("null.example.net", "MX", (0, "")),
            ("text.example.net", "TXT", "no mail here")]


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


def zone_file(rows, directory):
    authority = ["example.net. 60 IN SOA host.example.net. nour.example.org. 1 60 60 60 60",
                 "example.net. 60 IN NS host.example.net."]
    file = Path(directory, "zone")
    file.write_text("\n".join([*authority, *zone_lines(rows), ""]))
    return file


def dnsmasq(rows, directory):
    spelled = {
        "A": "--host-record={0},{1}".format,
        "AAAA": "--host-record={0},{1}".format,
        "MX": lambda name, value: f"--mx-host={name},{value[1]},{value[0]}" if value[1]
        else f"--dns-rr={name},15,000000",      # it knows no root, but hexadecimal digits
        "CNAME": "--cname={0},{1}".format,
        "TXT": "--txt-record={0},{1}".format}
    return _dnsmasq("--local=/example.net/", *[spelled[type](name, value) for name, type, value in rows])


def _dnsmasq(*options):
    return lambda host, port: [
        program("dnsmasq"), "--conf-file=/dev/null", "--keep-in-foreground", "--log-facility=-", "--pid-file",
        *(["--user=root"] if os.geteuid() == 0 else []), f"--listen-address={host}", f"--port={port}",
        "--bind-interfaces", "--no-resolv", "--no-hosts", *options]


UNBOUND = """\
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
{more}
remote-control:
  control-enable: no
"""


def _unbound(directory, more):
    def command(host, port):
        Path(directory, "unbound.conf").write_text(UNBOUND.format(host=host, port=port, more=more))
        return [program("unbound"), "-c", "unbound.conf"]
    return command


def unbound(rows, directory):
    """All else it denies, and asks nobody in the world: not even where a report goes."""
    data = [f"  local-data: '{line}'" for line in zone_lines(rows)]
    return _unbound(directory, "\n".join(['  module-config: "iterator"', '  local-zone: "." static', *data]))


def nsd(rows, directory):
    zone_file(rows, directory)

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


BIND_HOST = "127.0.0.1"     # it listens on addresses that interfaces have, and on no others
NAMED = """\
options {{
  directory "{directory}";
  listen-on port {port} {{ {host}; }};
  listen-on-v6 {{ none; }};
  pid-file none;
  session-keyfile none;
  minimal-responses no;
{more}
controls {{ }};
"""


def _named(directory, more):
    def command(host, port):
        Path(directory, "named.conf").write_text(
            NAMED.format(directory=directory, host=host, port=port, more=more))
        return [program("named"), "-g", "-n", "1", "-c", "named.conf"]
    return command


def named(rows, directory):
    """BIND, which has signed what it says (RFC 4034), but for one record: forged since."""
    file = sign(zone_file(rows, directory), directory)
    text, count = re.subn(r"(?m)^(forged\.example\.net\.\s+60 IN MX\s+)10 ", r"\g<1>11 ", file.read_text())
    assert count == 1
    file.write_text(text)
    return _named(directory, f"""\
  recursion no;
  dnssec-validation no;
}};
zone "example.net" {{ type primary; file "{file}"; }};
""")


def sign(file, directory):
    """The zone with keys and signatures; their digest is in dsset-example.net. beside it."""
    for more in ([], ["-f", "KSK"]):
        finish(program("dnssec-keygen"), "-q", "-a", "ECDSAP256SHA256", *more, "example.net", cwd=directory)
    finish(program("dnssec-signzone"), "-q", "-S", "-O", "full", "-o", "example.net", "-f", "signed", file.name,
           cwd=directory)
    return Path(directory, "signed")


class Upstream(NamedTuple):
    """The name server that a resolver asks for all, so that it asks nobody in the world,
    and by what it knows the answers to be genuine."""

    host: str
    port: int
    digest: str     # of the zone's key: the four fields of a DS record


def dnsmasq_asking(upstream, directory):
    return _dnsmasq(f"--server={upstream.host}#{upstream.port}")


def unbound_asking(upstream, directory):
    return _unbound(directory, f"""\
  do-not-query-localhost: no
  trust-anchor: "example.net. DS {upstream.digest}"
forward-zone:
  name: "."
  forward-addr: {upstream.host}@{upstream.port}
""")


def named_asking(upstream, directory):
    tag, algorithm, type, digest = upstream.digest.split()
    return _named(directory, f"""\
  recursion yes;
  forward only;
  forwarders {{ {upstream.host} port {upstream.port}; }};
  dnssec-validation yes;
}};
trust-anchors {{ example.net. static-ds {tag} {algorithm} {type} "{digest}"; }};
""")


def kresd_asking(upstream, directory):
    def command(host, port):
        Path(directory, "kresd.conf").write_text(f"""\
net.listen('{host}', {port}, {{ kind = 'dns' }})
cache.size = 10 * MB
modules.unload('priming')
trust_anchors.remove('.')
trust_anchors.add('example.net. IN DS {upstream.digest}')
policy.add(policy.all(policy.FORWARD('{upstream.host}@{upstream.port}')))
""")
        return [program("kresd"), "-n", "-q", "-c", "kresd.conf", str(directory)]
    return command


def pdns_recursor_asking(upstream, directory):
    def command(host, port):
        Path(directory, "anchor.lua").write_text(f'addTA("example.net", "{upstream.digest}")\n')
        return [program("pdns_recursor"), f"--config-dir={directory}", f"--socket-dir={directory}", "--daemon=no",
                "--disable-syslog", "--security-poll-suffix=", "--threads=1", "--dont-query=",
                f"--local-address={host}", f"--local-port={port}",
                f"--forward-zones-recurse=.={upstream.host}:{upstream.port}",
                "--dnssec=validate", f"--lua-config-file={directory}/anchor.lua"]
    return command


class Kind(NamedTuple):
    """One way to have a name server."""

    name: str
    start: Callable
    host: Optional[str] = None  # where it has to listen
    asks: bool = False          # an Upstream, in place of knowing the zone
    validates: bool = False     # looks at signatures


KINDS = {kind.name: kind for kind in (
    Kind("dnsmasq", dnsmasq),
    Kind("unbound", unbound),
    Kind("nsd", nsd),
    Kind("named", named, BIND_HOST),
    Kind("dnsmasq forwards", dnsmasq_asking, asks=True),
    Kind("unbound validates", unbound_asking, asks=True, validates=True),
    Kind("named validates", named_asking, BIND_HOST, asks=True, validates=True),
    Kind("kresd validates", kresd_asking, asks=True, validates=True),
    Kind("pdns_recursor validates", pdns_recursor_asking, asks=True, validates=True))}


def ask(server, name, type):
    """The flags of its answer over UDP, and how many records are in it."""
    opt = b"\0" + struct.pack("!HHIH", TYPES["OPT"], 1232, 0, 0)     # the size that the relay takes
    query = header(1, 0x0100, additional=1) + encode_name(name) + struct.pack("!HH", TYPES[type], 1) + opt
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect((server.host, server.port))
        sock.send(query)
        return struct.unpack("!2xH2xH", sock.recv(1232)[:8])


def knows_the_zone(server):
    with contextlib.suppress(OSError):
        return ask(server, "example.net", "MX")[1] > 0
    return False


@contextlib.contextmanager
def name_server(name, hosts, directory):
    """A name server of this kind, by which mail goes to `hosts`."""
    kind = KINDS[name]
    with contextlib.ExitStack() as stack:
        knowledge = zone(hosts)
        if kind.asks:
            own = directory / "upstream"
            own.mkdir()
            upstream = stack.enter_context(daemon(named(knowledge, own), knows_the_zone, own, BIND_HOST))
            tag, algorithm, type, *digest = Path(own, "dsset-example.net.").read_text().split(" DS ")[1].split()
            knowledge = Upstream(upstream.host, upstream.port, f"{tag} {algorithm} {type} {''.join(digest)}")
        server = stack.enter_context(daemon(kind.start(knowledge, directory), knows_the_zone, directory, kind.host))
        server.kind = kind
        yield server
