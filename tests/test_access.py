"""Who may relay, loopback and the networks of -a, and where to: -d.

A stranger needs an address that is not loopback's.  Those of the documentation
(RFC 5737, RFC 3849) are put on the loopback interface of a network that the
relay has to itself, so that nothing outside sees them.
"""
import contextlib
import ctypes
import ipaddress
import os
import random
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lab import BINARY, HOSTNAME, Client, run, transcript, wait_for

RCPT_SYNTAX = "501 5.5.4 Syntax: RCPT TO:<address>"

IPV4 = ("192.0.2.1", "192.0.2.128", "198.51.100.1")
IPV6 = ("2001:db8::1", "2001:db9::1")
# All other addresses there are, too, may be had there by whoever asks for one to come from.
PREPARE = " && ".join(["ip link set lo up", *(f"ip addr add {address}/32 dev lo" for address in IPV4),
                       *(f"ip addr add {address}/128 dev lo nodad" for address in IPV6),
                       "ip route add local 0.0.0.0/0 dev lo", "ip -6 route add local ::/0 dev lo",
                       "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind"])
CLONE_NEWNET = 0x40000000


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """A program that is the relay in a network of its own."""
    missing = [program for program in ("unshare", "ip") if not shutil.which(program)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")
    if os.geteuid() != 0:
        pytest.skip("only root may make a network")
    tried = subprocess.run(["unshare", "-n", "sh", "-c", PREPARE], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no network of our own: {tried.stderr.strip()}")
    path = tmp_path_factory.mktemp("alone") / "smtp"
    path.write_text(f"""#!/bin/sh
exec unshare -n sh -c '{PREPARE} && exec "$0" "$@"' '{BINARY}' "$@"
""")
    path.chmod(0o700)
    return path


def enter_network(pid):
    """Puts this thread, and with it the sockets it makes, into the network of a process."""
    with open(f"/proc/{pid}/ns/net") as network:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def alone(relay, binary, tmp_path):
    """alone("-a", "192.0.2.0/24", before="ulimit -n 64"): a relay that listens everywhere
    in its network, started by a shell that has done this before.  .connect(address) is a
    Client that comes from that address, and goes to it, too."""
    made = []

    def make(*options, before=":"):
        wrapper = tmp_path / "before"
        wrapper.write_text(f'#!/bin/sh\n{before} && exec {binary} "$@"\n')
        wrapper.chmod(0o700)
        server = relay(*options, binary=wrapper, addresses=["0.0.0.0", "::"])
        ipv4_port, ipv6_port = server.ports
        inside = ThreadPoolExecutor(1, initializer=enter_network, initargs=(server.pid,))
        server.within = lambda *arguments, **options: inside.submit(*arguments, **options).result()

        def connect(address):
            port = ipv6_port if ":" in address else ipv4_port
            made.append(server.within(Client, port, address, greeting=False, source=address))
            return made[-1]
        return SimpleNamespace(relay=server, connect=connect)
    yield make
    for client in made:
        client.close()


@pytest.mark.parametrize("source", ["127.0.0.1", "127.9.8.7", "127.255.255.254"])
def test_all_of_loopback_may_relay(world, source):
    with socket.create_connection(("127.0.0.1", world.relay.port), 20, (source, 0)) as sock:
        assert sock.makefile().readline().startswith("220 ")


def test_ipv6_loopback_may_relay(relay, ipv6):
    with relay(addresses=["::1"]).client() as client:
        assert client.greeting.startswith("220 ")


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_a_stranger_is_told_why_and_what_to_do(alone, address):
    here = alone()
    with here.connect(address) as client:
        refusal = client.reply()
        assert refusal.startswith("554 5.7.1 ")
        assert address in refusal.split() and f"-a {address}" in refusal
        assert client.say("QUIT") == "221 2.0.0 OK" and client.eof()
    here.relay.wait_for_log(rf"{address}.*refused")
    for loopback in "127.0.0.1", "::1":
        with here.connect(loopback) as client:
            assert client.reply().startswith("220 ")


def test_a_stranger_may_only_quit(alone):
    """RFC 5321 3.1: 503 to everything else."""
    here = alone()
    with here.connect("192.0.2.1") as client:
        assert client.reply().startswith("554 ")
        lines = ["EHLO me.com", "HELO me.com", "NOOP", "MAIL FROM:<>", "RCPT TO:<b@example.net>", "DATA", "RSET", "X", ""]
        client.send("".join(line + "\r\n" for line in [*lines, "QUIT"]).encode())
        for _ in lines:
            assert client.reply().startswith("503 5.5.1 ")
        assert client.reply() == "221 2.0.0 OK" and client.eof()
    assert here.relay.tmp() == here.relay.queue() == []


@pytest.mark.parametrize("talks", [False, True])
def test_a_stranger_is_heard_for_a_moment(alone, talks):
    """Whatever it says: its time is not extended."""
    with alone().connect("192.0.2.1") as client:
        assert client.reply().startswith("554 ")
        if talks:
            client.send(b"NOOP\r\n")
            assert client.reply().startswith("503 ")
        assert client.reply().startswith("421 4.4.2 ") and client.eof()


def is_heard(stranger):
    """Whether the server has it wait, and says 503; else it is hung up on."""
    assert stranger.reply().startswith("554 ")
    with contextlib.suppress(OSError, AssertionError):
        return stranger.say("NOOP").startswith("503 ")
    return False


def test_only_some_strangers_are_heard_at_once(alone):
    """RFC 5321 7.8: the others are told the same, and hung up on."""
    here = alone()

    def heard():
        with contextlib.ExitStack() as stack:
            return [is_heard(stack.enter_context(here.connect("192.0.2.1"))) for _ in range(20)]
    # Again where the first had been heard for long enough before the last came.
    wait_for(lambda: heard() == [True] * 16 + [False] * 4)
    wait_for(lambda: is_heard(here.connect("2001:db8::1")))


def test_strangers_take_no_clients_place(alone):
    """The table divides when it is full of clients, whether there are strangers or not."""
    def let_in(here, count):
        for _ in range(count):
            assert here.connect("127.0.0.1").reply().startswith("220 ")

    here = alone("-c", 0, before="ulimit -n 64")
    while not here.relay.logged("table full"):
        let_in(here, 1)
    size = int(here.relay.logged(r"table full: process \d+ serves (\d+) clients")[0][1])
    here.relay.stop()

    here = alone("-c", 0, before="ulimit -n 64")
    assert all([is_heard(here.connect("192.0.2.1")) for _ in range(16)])
    let_in(here, size - 1)
    last = here.connect("192.0.2.1")
    here.relay.wait_for_log(f"^192.0.2.1:{last.local_port} refused: 554 ")
    assert not here.relay.logged("table full")
    let_in(here, 1)
    here.relay.wait_for_log("table full")


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_what_the_refusal_says_helps(alone, address):
    here = alone()
    _, option, rest = here.connect(address).reply().partition("-a ")
    here.relay.stop()
    assert alone(option.strip(), rest.split()[0]).connect(address).reply().startswith("220 ")


@pytest.mark.parametrize("networks, welcome", [
    ([], ()),
    (["192.0.2.1"], ("192.0.2.1",)),
    (["192.0.2.1/32"], ("192.0.2.1",)),
    (["192.0.2.0/25"], ("192.0.2.1",)),
    (["192.0.2.128/25"], ("192.0.2.128",)),
    (["192.0.2.0/24"], ("192.0.2.1", "192.0.2.128")),
    (["192.0.2.2/31", "192.0.2.64/26"], ()),
    (["192.0.2.0/24", "198.51.100.0/30"], IPV4),
    (["0.0.0.0/0"], IPV4),
    (["2001:db8::1"], ("2001:db8::1",)),
    (["2001:db8::/32"], ("2001:db8::1",)),
    (["2001:db8::/31"], IPV6),
    (["2001:db8::2/127"], ()),
    (["::/0"], IPV6),
    (["0.0.0.0/0", "::/0"], IPV4 + IPV6)])
def test_networks_that_may_relay(alone, networks, welcome):
    here = alone(*(word for network in networks for word in ("-a", network)))
    replies = {address: here.connect(address).reply()[:3] for address in IPV4 + IPV6 + ("127.0.0.1", "::1")}
    trusted = welcome + ("127.0.0.1", "::1")
    assert replies == {address: "220" if address in trusted else "554" for address in replies}


@pytest.fixture
def chance():
    """The same in every run."""
    return random.Random(4632)      # RFC 4632 is CIDR


def some_address(chance, version):
    """Of those that a host may have, and loopback's, which may always relay."""
    number = chance.getrandbits(32 if version == 4 else 128)
    if version == 6:                # global unicast, or unique local
        number = number >> 3 | 1 << 125 if number % 4 else number >> 7 | 0xFC << 120
    address = ipaddress.ip_address(number.to_bytes(4 if version == 4 else 16, "big"))
    return address if is_a_hosts(address) else some_address(chance, version)


def is_a_hosts(address):
    if address.version == 6:
        return address in ipaddress.ip_network("2000::/3") or address in ipaddress.ip_network("fc00::/7")
    return 1 <= int(address) >> 24 < 224


def edges(network):
    """The addresses on both sides of where it begins and ends."""
    first, last = int(network[0]), int(network[-1])
    make = type(network[0])
    return [make(number) for number in (first - 1, first, last, last + 1) if 0 <= number < 2 ** network.max_prefixlen]


@pytest.mark.parametrize("version, bits", [
    (4, range(1, 33)), (4, range(16, 33)), (6, range(1, 129)), (6, range(64, 129))], ids=str)
def test_networks_are_what_python_takes_them_for(unharmed, alone, chance, version, bits):
    """Random ones, and clients from both sides of their edges and from anywhere."""
    networks = [ipaddress.ip_network((some_address(chance, version), chance.choice(bits)), strict=False)
                for _ in range(20)]
    here = alone(*(word for network in networks for word in ("-a", network)))
    addresses = {some_address(chance, version) for _ in range(300)}
    addresses.update(network[chance.randrange(network.num_addresses)] for network in networks)
    addresses.update(address for network in networks for address in edges(network))
    wrong = []
    for address in filter(is_a_hosts, addresses):
        with here.connect(str(address)) as client:
            welcome = client.reply().startswith("220 ")
        if welcome != (address.is_loopback or any(address in network for network in networks)):
            wrong.append(address)
    assert wrong == []


@pytest.mark.parametrize("network", ["::ffff:192.0.2.1", "::ffff:c000:201"])
def test_an_ipv4_address_written_as_ipv6_is_an_ipv4_address(alone, network):
    """RFC 4291 2.5.5.2.  No client comes as one: the IPv6 sockets take IPv6 only."""
    here = alone("-a", network)
    assert here.connect("192.0.2.1").reply().startswith("220 ")
    assert here.connect("192.0.2.128").reply().startswith("554 ")
    with pytest.raises(OSError):
        here.relay.within(Client, here.relay.ports[1], "::ffff:192.0.2.1", source="::ffff:192.0.2.1")


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0"])
def test_a_network_of_everybody_is_warned_of(relay, network):
    server = relay("-a", network, "-a", "192.0.2.0/24")
    warning, = server.logged("^warning: .*")
    assert network in warning.string


def test_no_warning_without_reason(relay):
    assert not relay("-a", "192.0.2.0/24", "-a", "128.0.0.0/1", "-a", "2000::/3").logged("warning")


def test_a_welcome_stranger_sends(alone):
    here = alone("-a", "192.0.2.0/24")
    transcript(here.connect("192.0.2.1"), """
        S: 220 <hostname> ESMTP smtp ...
        C: HELO me.com
        S: 250 <port> OK
        C: MAIL FROM:<a@example.org>
        S: 250 2.1.0 Ok
        C: RCPT TO:<b@example.net>
        S: 250 2.1.5 Ok
        C: DATA
        S: 354 End data with <CR><LF>.<CR><LF>
        C: Subject: x
        C: .
        S: 250 2.0.0 Ok: queued as ...
    """)
    message, = wait_for(here.relay.queue)
    assert b"Received: from me.com ([192.0.2.1]:" in message.read_bytes()


# What open relays have fallen for.  Here no command of a stranger is obeyed.
OPEN_RELAY = [(sender, recipient)
              for sender in (
                  "a@example.org", "", "a@[192.0.2.1]", f"a@{HOSTNAME}", "a@localhost", "a@127.0.0.1", "localhost")
              for recipient in (
                  "b@example.net", "b%example.net", f"b%example.net@{HOSTNAME}", "b%example.net@[127.0.0.1]",
                  "b%example.net@localhost", "b%example.net@", "example.net!b", f"example.net!b@{HOSTNAME}",
                  f"@{HOSTNAME}:b@example.net", f"@{HOSTNAME},@example.net:b@example.net", "@[127.0.0.1]:b@example.net",
                  '"b@example.net"', f'"b@example.net"@{HOSTNAME}', '"b%example.net"', f'"b%example.net"@{HOSTNAME}',
                  "b@[198.51.100.1]", "b@[IPv6:2001:db8::1]", "b@example.net@", f"b@example.net@{HOSTNAME}",
                  "postmaster", "Postmaster", f"postmaster@{HOSTNAME}", "postmaster@example.net",
                  "b@example.net,c@example.net", "")]


def test_no_form_of_address_makes_a_stranger_welcome(unharmed, alone):
    here = alone()
    for sender, recipient in OPEN_RELAY:
        with here.connect("192.0.2.1") as client:
            with contextlib.suppress(OSError):      # it may be quicker
                client.send(f"HELO localhost\r\nMAIL FROM:<{sender}>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n"
                            "Subject: x\r\n\r\n.\r\nQUIT\r\n".encode())
            while client.receive():
                pass
        heard = b"".join(client.chunks)
        assert re.fullmatch(rb"554 5\.7\.1 .*\r\n(503 5\.5\.1 .*\r\n){7}221 2\.0\.0 OK\r\n", heard)
    assert here.relay.tmp() == here.relay.queue() == []


@pytest.mark.parametrize("network", [
    "", "x", "192.0.2", "192.0.2.256", "192.0.2.0/33", "192.0.2.0/-1", "192.0.2.0/", "192.0.2.0/x", "192.0.2.0/24x",
    "192.0.2.0/24/24", "/24", "192.0.2.1/24", "192.0.2.0 /24", "example.net", "2001:db8::/129", "2001:db8::1/32",
    "2001:db8:::/32", "[2001:db8::]/32", "::ffff:192.0.2.0/120", "192.0.2.0/255.255.255.0", "1" * 100])
def test_a_bad_network_stops_the_start(spool, network):
    """One that has bits behind its prefix, too: which of two networks is meant?"""
    ended = run("-p", 0, "-q", spool, "-h", HOSTNAME, "-a", network, "127.0.0.1")
    assert ended.returncode == 2
    line, = ended.stderr.splitlines()
    assert "-a" in line and (network.split("/")[-1] in line)
    assert not spool.exists()


# ---- Where to ------------------------------------------------------------------------------------


DOMAINS = ("example.net", "Mail.Example.ORG", "[192.0.2.1]", "[IPv6:2001:db8::1]")

TAKEN = [
    "a@example.net", "a@EXAMPLE.NET", "a@eXample.Net", "a@mail.example.org", "a@[192.0.2.1]", "a@[IPv6:2001:db8::1]",
    "a@[ipv6:2001:DB8::1]", "Postmaster", "pOSTMASTER", "postmaster@example.net",
    # Whatever stands before the last @ is example.net's to understand.
    "a%evil.example@example.net", "evil.example!a@example.net", '"a@evil.example"@example.net',
    '"@evil.example:a"@example.net', '"a@evil.example>"@example.net', '"a\\"@evil.example"@example.net',
    "evil.example@example.net", "@evil.example:a@example.net", "@evil.example,@other.example:a@example.net"]

NOT_TAKEN = {
    "a@evil.example": "evil.example", "postmaster@evil.example": "evil.example", "a@example.net.evil.example":
    "example.net.evil.example", "a@sub.example.net": "sub.example.net", "a@xexample.net": "xexample.net",
    "a@example.ne": "example.ne", "a@example.nett": "example.nett", "a@net": "net", "a@example-net": "example-net",
    "a@example.org": "example.org", "a%example.net@evil.example": "evil.example",
    '"a@example.net"@evil.example': "evil.example", "example.net!a@evil.example": "evil.example",
    "example.net@evil.example": "evil.example", "@example.net:a@evil.example": "evil.example",
    "@mail.example.org,@example.net:a@evil.example": "evil.example", "a@[192.0.2.2]": "[192.0.2.2]",
    "a@[IPv6:::ffff:192.0.2.1]": "[IPv6:::ffff:192.0.2.1]", "a@[IPv6:2001:db8::2]": "[IPv6:2001:db8::2]",
    "a@192.0.2.1": "192.0.2.1"}

NO_ADDRESSES = [
    "a@example.net.", "a@example.net@evil.example", "a@evil.example@example.net", "a@evil.example,a@example.net",
    "a@evil.example>,<a@example.net", "a@evil.example @example.net", "a@example.net @evil.example", "a",
    "a@evil.example:@example.net", "@example.net", "@example.net:Postmaster", "Postmaster@", '"Postmaster"', ""]


@pytest.fixture
def limited(relay, unharmed):
    """A client of a relay for DOMAINS, who may send to somebody there."""
    server = relay(*(word for domain in (*DOMAINS, unharmed) for word in ("-d", domain)))
    with server.client() as client:
        client.say("HELO me.com")
        client.say("MAIL FROM:<a@example.org>")
        yield SimpleNamespace(relay=server, rcpt=lambda path: client.say(f"RCPT TO:<{path}>"))


def recipients(server):
    draft, = server.tmp()
    return draft.read_bytes().count(b"RCPT")


@pytest.mark.parametrize("path", TAKEN)
def test_mail_for_a_domain_of_d_is_taken(limited, path):
    assert limited.rcpt(path) == "250 2.1.5 Ok"
    assert recipients(limited.relay) == 1


@pytest.mark.parametrize("path", NOT_TAKEN)
def test_mail_for_other_domains_is_not_taken(limited, path):
    """And who was refused is not among those who are sent to."""
    reply = limited.rcpt(path)
    assert reply.startswith("550 5.7.1 ") and NOT_TAKEN[path] in reply.split()
    assert recipients(limited.relay) == 0


@pytest.mark.parametrize("path", NO_ADDRESSES)
def test_what_is_no_address_is_no_way_around_d(limited, path):
    assert limited.rcpt(path) == RCPT_SYNTAX
    assert recipients(limited.relay) == 0


def test_only_those_of_d_are_sent_to(world, relay, tmp_path):
    server = relay("-d", "example.net", mx_port=world.exchanger.port, spool=tmp_path / "other")
    with server.client() as client:
        for line in "HELO me.com", "MAIL FROM:<>", "RCPT TO:<a@evil.example>", "RCPT TO:<b@example.net>", "DATA":
            client.say(line)
        client.send(b"Subject: x\r\n.\r\n")
        assert client.reply().startswith("250 2.0.0 ")
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<b@example.net>"]
    wait_for(lambda: not server.queue())
    assert {query.name for query in world.dns.queries} == {"example.net", world.exchanger.name}
