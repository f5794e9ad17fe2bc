"""Behind a proxy: -X, and version 2 of HAProxy's PROXY protocol."""
import ipaddress
import struct

import pytest

from lab import HOSTNAME, run, wait_for

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PROXY, LOCAL = 0x21, 0x20
GREETING = f"220 {HOSTNAME} ESMTP smtp "


def header(source, port=4711, command=PROXY, family=None, extra=b""):
    """What a proxy says of a client that connects from `source`."""
    ip = ipaddress.ip_address(source)
    body = ip.packed + ip.packed + struct.pack("!HH", port, 25) + extra
    if family is None:
        family = 0x11 if ip.version == 4 else 0x21
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body)) + body


@pytest.fixture
def behind(relay):
    """behind(b"...") is a Client that begins so, of a relay behind a proxy on 127.0.0.1."""
    server = relay("-X", "127.0.0.1", "-a", "192.0.2.0/24", "-a", "2001:db8::/32", "-c", 2,
                   "-s", "127.0.0.1:1")         # where nobody listens: mail stays in the queue
    clients = []

    def connect(*pieces):
        clients.append(server.client(greeting=False))
        for piece in pieces:
            clients[-1].send(piece)
        return clients[-1]
    connect.server = server
    yield connect
    for client in clients:
        client.close()


@pytest.mark.parametrize("source", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_the_client_is_the_one_that_the_proxy_names(behind, source):
    client = behind(header(source))
    assert client.reply().startswith(GREETING)
    assert client.say("HELO me.com") == "250 4711 OK"
    for command in "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>", "DATA":
        assert client.say(command)[0] in "23"
    client.send(b"Subject: x\r\n.\r\n")
    assert client.reply().startswith("250 2.0.0 Ok: queued as ")
    message, = wait_for(behind.server.queue)
    address = source.replace("::ffff:", "").replace("2001:", "IPv6:2001:")
    assert f"from me.com ([{address}]:4711)".encode() in message.read_bytes()


@pytest.mark.parametrize("source", ["192.0.3.1", "2001:db9::1", "::ffff:192.0.3.1", "0.0.0.0"])
def test_a_stranger_behind_the_proxy_is_a_stranger(behind, source):
    client = behind(header(source))
    assert client.reply().startswith(f"554 5.7.1 {source.replace('::ffff:', '')} may not relay here")
    assert client.say("MAIL FROM:<>").startswith("503 5.5.1 ")
    assert client.say("QUIT") == "221 2.0.0 OK" and client.eof()
    behind.server.wait_for_log(rf"^{source.replace('::ffff:', '')}:4711 refused: 554 ")


def test_only_some_strangers_behind_the_proxy_are_heard_at_once(behind):
    def heard():
        strangers = [behind(header("192.0.3.1") + b"NOOP\r\n") for _ in range(20)]
        assert all(client.reply().startswith("554 5.7.1 ") for client in strangers)
        replies = [not client.eof() for client in strangers]
        assert behind(header("192.0.2.1")).reply().startswith(GREETING)
        for client in strangers:
            client.close()
        return replies
    # Again where the first had been heard for long enough before the last came.
    wait_for(lambda: heard() == [True] * 16 + [False] * 4)


def test_one_client_of_the_proxy_has_not_the_connections_of_all(behind):
    for source in "192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.2":
        assert behind(header(source)).reply().startswith(GREETING)
    assert behind(header("192.0.2.1")).reply().startswith("421 4.7.0 ")
    assert behind(header("192.0.2.3")).reply().startswith(GREETING)


def test_connections_of_the_proxy_that_say_nothing_yet_are_nobodys(behind):
    silent = [behind(), behind()]
    assert behind(header("127.0.0.1")).reply().startswith(GREETING)
    silent[0].send(header("127.0.0.1"))
    assert silent[0].reply().startswith(GREETING)
    silent[1].send(header("127.0.0.1"))
    assert silent[1].reply().startswith("421 4.7.0 ")


def test_a_header_may_come_in_pieces_and_commands_behind_it(behind):
    stream = header("192.0.2.1", extra=b"\x04\0\1x") + b"NOOP\r\n"
    client = behind(*(stream[i:i + 1] for i in range(len(stream))))
    assert client.reply().startswith(GREETING)
    assert client.reply() == "250 2.0.0 Ok"


def test_nobody_is_greeted_before_it_is_known_who_it_is(behind):
    client = behind(header("192.0.2.1")[:-1])
    assert behind(header("192.0.2.2")).reply().startswith(GREETING)    # which has been served behind it
    client.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.sock.recv(1)


@pytest.mark.parametrize("family", [0x11, 0x00])
def test_a_proxy_that_looks_whether_the_relay_lives(behind, family):
    """It is on loopback here, so it may relay, too; test_running.py has one that may not."""
    client = behind(header("192.0.3.1", command=LOCAL, family=family))
    assert client.reply().startswith(GREETING)
    assert client.say("HELO me.com") == f"250 {client.local_port} OK"
    assert client.say("MAIL FROM:<a@example.org>") == "250 2.1.0 Ok"


NO_HEADERS = {
    "a client": b"EHLO me.com\r\n",
    "version 1": b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 25\r\n",
    "version 3": header("192.0.2.1", command=0x31),
    "another command": header("192.0.2.1", command=0x22),
    "UDP": header("192.0.2.1", family=0x12),
    "no family": header("192.0.2.1", family=0x00),
    "half an address": SIGNATURE + b"\x21\x11\0\x0b" + bytes(11),
    "half an IPv6 address": SIGNATURE + b"\x21\x21\0\x0c" + bytes(12),
    "one octet off": header("192.0.2.1").replace(b"QUIT", b"QUIt"),
    "too long": header("192.0.2.1", extra=bytes(5000)),
}


@pytest.mark.parametrize("case", NO_HEADERS)
def test_what_is_no_header_is_closed(behind, case):
    assert behind(NO_HEADERS[case]).eof()
    behind.server.wait_for_log(r"^127\.0\.0\.1:\d+ closed: a proxy has to begin with ")


def test_only_proxies_are_believed(relay):
    server = relay("-X", "192.0.2.7")
    client = server.client()
    client.send(header("192.0.2.1"))
    assert client.reply().startswith("500 5.5.2 ")


def test_a_proxy_that_may_be_anybody_is_warned_of(relay):
    assert relay("-X", "0.0.0.0/0").logged(r"^warning: -X 0\.0\.0\.0/0 ")


@pytest.mark.parametrize("network", ["", "x", "192.0.2.1/24", "haproxy.example.net"])
def test_a_bad_network_stops_the_start(spool, network):
    ended = run("-p", 0, "-q", spool, "-h", HOSTNAME, "-X", network, "127.0.0.1")
    assert ended.returncode == 2 and "-X" in ended.stderr
