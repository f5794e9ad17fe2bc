"""Who may relay: loopback, and the networks of -a.

A stranger needs an address that is not loopback's.  Those of the documentation
(RFC 5737, RFC 3849) are put on the loopback interface of a network that the
relay has to itself, so that nothing outside sees them.
"""
import ctypes
import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lab import BINARY, HOSTNAME, Client, run, transcript, wait_for

IPV4 = ("192.0.2.1", "192.0.2.128", "198.51.100.1")
IPV6 = ("2001:db8::1", "2001:db9::1")
PREPARE = " && ".join(["ip link set lo up", *(f"ip addr add {address}/32 dev lo" for address in IPV4),
                       *(f"ip addr add {address}/128 dev lo nodad" for address in IPV6)])
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
def alone(relay, binary):
    """alone("-a", "192.0.2.0/24"): a relay that listens everywhere in its network.
    .connect(address) is a Client that comes from that address, for it goes to it."""
    made = []

    def make(*options):
        server = relay(*options, binary=binary, addresses=["0.0.0.0", "::"])
        ipv4_port, ipv6_port = server.ports
        inside = ThreadPoolExecutor(1, initializer=enter_network, initargs=(server.pid,))

        def connect(address):
            port = ipv6_port if ":" in address else ipv4_port
            made.append(inside.submit(Client, port, address, greeting=False).result())
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
        assert client.eof()
    here.relay.wait_for_log(rf"{address}.*refused")
    for loopback in "127.0.0.1", "::1":
        with here.connect(loopback) as client:
            assert client.reply().startswith("220 ")


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


def test_what_a_stranger_says_is_ignored(alone):
    here = alone()
    with here.connect("192.0.2.1") as client:
        try:
            client.send(b"HELO me.com\r\nMAIL FROM:<a@example.org>\r\n" * 100)
        except OSError:
            pass        # it was quicker
        while client.receive():
            pass
    heard = b"".join(client.chunks)
    assert heard.startswith(b"554 5.7.1 ") and heard.count(b"\r\n") == 1
    assert here.relay.tmp() == []


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
