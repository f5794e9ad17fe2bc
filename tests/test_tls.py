"""TLS, by openssl(1): to exchangers that offer it, and to smarthosts that ask for a password.

The openssl here is the real one, but for a few tests in which a stand-in first writes down
how it was started.
"""
import base64
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import pytest

from lab import BINARY, HOSTNAME, OPENSSL, ROOT, WATCHED, Exchanger, loopback, run, wait_for

LARGE = b"Subject: x\r\n\r\n" + 160_000 * (b"x" * 62 + b"\r\n")     # 10 MB
NAME, PASSWORD = "nour@example.org", "correct horse \u00e9 battery"


@pytest.fixture
def certificate(authority, world):
    """The exchanger's own: its name and its address are in it, and its authority is trusted by nobody."""
    return authority.certificate(world.exchanger.name, world.exchanger.host)


@pytest.fixture
def secure(world, certificate):
    """The world, whose exchanger offers STARTTLS."""
    world.exchanger.set(certificate=certificate)
    return world


def label(exchanger, tls=True):
    return f"{exchanger.name}[{exchanger.host}]" + ("/tls" if tls else "")


def deliver(world, relay=None, **message):
    """A message to b@example.net; returns what became of it at the first try."""
    relay = relay or world.relay
    relay.send("b@example.net", **message)
    return relay.outcomes("b@example.net")[-1]


def openssl_of(relay):
    """The pids of the openssl processes that run for this relay: they are of its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):      # it has ended
            name, rest = path.read_text().partition("(")[2].rsplit(") ", 1)
            if name == "openssl" and int(rest.split()[3]) == relay.pid and rest[0] != "Z":
                found.append(int(path.parent.name))
    return found


def expect_no_openssl(relay):
    wait_for(lambda: not openssl_of(relay), what="the end of all openssl processes")


# ---- Exchangers: TLS where it is offered --------------------------------------------------------


def test_where_it_is_offered(secure):
    """The certificate is not verified; after TLS EHLO is said again; the label says it everywhere."""
    found = deliver(secure)
    assert (found.status, found.relay) == ("sent", label(secure.exchanger))
    message, = secure.exchanger.messages
    connection = message.connection
    assert connection.tls == "TLSv1.3" and connection.server_name == secure.exchanger.name
    assert connection.commands[:3] == [f"EHLO {HOSTNAME}", "STARTTLS", f"EHLO {HOSTNAME}"]
    assert connection.commands[-1] == "QUIT"
    expect_no_openssl(secure.relay)
    assert not secure.relay.tmp()


def test_the_label_in_the_record_and_the_listing(secure):
    secure.exchanger.set(replies={"RCPT": "451 4.7.1 greylisted"})
    assert deliver(secure).relay == label(secure.exchanger)
    path, = secure.relay.queue()
    record = f"later <b@example.net> {label(secure.exchanger)} 451 4.7.1 greylisted"
    assert path.read_text().splitlines()[-1].endswith(record)
    assert f"{label(secure.exchanger)} 451 4.7.1 greylisted" in run("-l", "-q", secure.relay.spool).stdout


def test_the_label_in_a_report(secure):
    """It is no part of the exchanger's name there (RFC 3464 2.3.5)."""
    secure.dns.mail("example.org", (10, secure.exchanger))
    secure.exchanger.set(replies={("RCPT", "<b@example.net>"): "550 5.1.1 nobody"})
    assert deliver(secure).status == "failed"
    report, = secure.exchanger.wait_for_messages(1)
    text = report.data.decode()
    assert f"Remote-MTA: dns; {secure.exchanger.name}\r\n" in text
    assert f"    {label(secure.exchanger)} 550 5.1.1 nobody\r\n" in text


def test_the_label_of_an_address_in_a_report(secure):
    secure.dns.mail("example.org", (10, secure.exchanger))
    literal = f"b@[{secure.exchanger.host}]"
    secure.exchanger.set(replies={("RCPT", f"<{literal}>"): "550 5.1.1 nobody"})
    secure.relay.send(literal)
    report, = secure.exchanger.wait_for_messages(1)
    assert f"Remote-MTA: dns; [{secure.exchanger.host}]\r\n" in report.data.decode()
    assert report.connection is not secure.exchanger.connections[0]
    assert secure.exchanger.connections[0].server_name is None      # RFC 6066 3: no address


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("close_notify", [True, False], ids=["close_notify", "no close_notify"])
def test_versions_and_ends(secure, version, close_notify):
    secure.exchanger.set(tls_version=getattr(ssl.TLSVersion, version), close_notify=close_notify)
    assert deliver(secure).status == "sent"
    connection, = secure.exchanger.connections
    wait_for(lambda: connection.closed)
    assert connection.tls == version.replace("_", ".") and connection.commands[-1] == "QUIT"


@pytest.mark.parametrize("certificate_of", ["another name", "yesterday"])
def test_who_it_is_does_not_matter(secure, authority, certificate_of):
    """RFC 7435: what is encrypted for an impostor is no worse than what is not encrypted."""
    secure.exchanger.set(certificate=authority.certificate("mx.example.com") if certificate_of == "another name"
                         else authority.certificate(secure.exchanger.name, days=-1))
    assert deliver(secure).relay == label(secure.exchanger)


def test_what_was_offered_in_plain_does_not_count(secure):
    """RFC 3207 4.2.  By TLS it offers nothing at all: one that goes on by what it heard
    before would send SIZE, or all commands at once."""
    secure.exchanger.set(replies={("EHLO", "TLS"): "250 only this"})
    assert deliver(secure).status == "sent"
    message, = secure.exchanger.messages
    assert message.reverse_path == "<nour@example.org>"
    assert not any(b"RCPT" in chunk and b"DATA" in chunk for chunk in message.connection.chunks)


def test_what_is_offered_by_tls_counts(secure):
    secure.exchanger.set(replies={("EHLO", "TLS"): "250-all of it\n250-SIZE 1000000\n250 PIPELINING"})
    assert deliver(secure).status == "sent"
    assert " SIZE=" in secure.exchanger.messages[0].reverse_path


def test_a_refusal_by_tls_is_final(secure):
    secure.exchanger.set(replies={"MAIL": "550 5.7.1 no"})
    found = deliver(secure)
    assert (found.status, found.relay) == ("failed", label(secure.exchanger))
    assert len(secure.exchanger.connections) == 1


LINES = [b"Q", b"Quit", b"R", b"RENEGOTIATE", b"r", b"k", b"K", b"B", b"q", b"\x00", b"\x00\x01\x7f\xff\xfe",
         b"\xc3\xa9", b"", bytes(octet for octet in range(256) if octet not in b"\r\n"), b"\x04",
         b"-----END CERTIFICATE-----"]


@pytest.mark.parametrize("extensions", [Exchanger.EXTENSIONS, ("8BITMIME",)], ids=["pipelined", "in lockstep"])
def test_any_octet_goes_through(secure, extensions):
    """Q, R, k and the like are commands to an openssl at a terminal."""
    secure.exchanger.set(extensions=extensions)
    body = b"".join(line + b"\r\n" for line in LINES)
    assert deliver(secure, body=body).status == "sent"
    assert secure.exchanger.messages[0].data.endswith(body)
    assert secure.exchanger.messages[0].connection.tls


@pytest.mark.parametrize("line", LINES[:9], ids=lambda line: line.decode())
def test_what_is_said_first_may_be_any_letter(secure, line):
    """A reply may begin with a letter only in its text; a command of ours may be RSET, RCPT or QUIT."""
    secure.exchanger.set(extensions=(), replies={"MAIL": f"250 {line.decode()}"})
    secure.relay.send("a@example.net", "b@example.net", body=line + b"\r\n")
    message, = secure.exchanger.wait_for_messages(1)
    assert message.recipients == ["<a@example.net>", "<b@example.net>"]
    wait_for(lambda: message.connection.commands[-1] == "QUIT")


def test_megabytes_both_ways(secure):
    """10 MB of message; and 50 replies of 200 KB each, to commands that were sent ahead."""
    reply = "\n".join(["250-" + "x" * 2000] * 99 + ["250 2.1.5 Ok"])
    secure.exchanger.set(replies={"RCPT": reply}, extensions=("PIPELINING",))
    recipients = [f"b{number}@example.net" for number in range(50)]
    secure.relay.send(*recipients, body=LARGE)
    message, = secure.exchanger.wait_for_messages(1, timeout=60)
    assert len(message.recipients) == 50 and message.data.endswith(LARGE)
    assert {secure.relay.outcomes(to)[0].status for to in recipients} == {"sent"}


def test_refused_while_the_message_is_on_its_way(secure):
    """An exchanger that hangs up may have said why before."""
    def refuse(connection):
        connection.reply("552 5.3.4 too much")
        connection.hang_up(reset=False)

    secure.exchanger.set(extensions=("PIPELINING",), replies={"BODY": refuse})
    found = deliver(secure, body=LARGE)
    assert (found.status, found.words) == ("failed", "552 5.3.4 too much")


def test_refused_by_an_exchanger_that_stops_reading(secure, relay, tmp_path):
    def refuse(connection):
        connection.receive()
        connection.send(b"552 5.3.4 too much\r\n")
        wait_for(lambda: server.logged("status=") or connection.closed)

    secure.exchanger.set(extensions=(), replies={"BODY": refuse})
    server = relay("-w", "1", mx_port=secure.exchanger.port, spool=tmp_path / "other")
    found = deliver(secure, server, body=LARGE)
    assert (found.status, found.words) == ("failed", "552 5.3.4 too much")


@pytest.mark.parametrize("reset", [False, True], ids=["hangs up", "resets"])
def test_lost_while_the_message_is_on_its_way(secure, reset):
    """That is noticed at once, and not when the time for the message is over."""
    secure.exchanger.set(drop_at="BODY", reset=reset)
    found = deliver(secure, body=LARGE)
    assert found.status == "later" and found.words.startswith("4.4.2 ")
    expect_no_openssl(secure.relay)


def test_an_exchanger_that_takes_one_message_by_a_connection(secure, relay):
    """Each of them is by TLS, and says so once."""
    def close(connection):
        if sum("MAIL" in command for command in connection.commands) == 2:
            connection.hang_up(reset=False)

    secure.relay.stop()
    secure.exchanger.stop()
    server = relay("-r", "1h", mx_port=secure.exchanger.port)
    for _ in range(6):
        server.send("b@example.net")
    server.outcomes("b@example.net", count=6)
    secure.exchanger.set(replies={"MAIL": close})
    secure.exchanger.start()
    server.hangup_until(lambda: len(secure.exchanger.messages) == 6)
    assert {found.relay for found in server.outcomes("b@example.net")[6:]} == {label(secure.exchanger)}


def test_the_log_of_a_connection_that_is_kept_for_no_message(secure, relay, tmp_path):
    """A batch whose time is over ends it: that is logged with the id of the message that it had last."""
    secure.exchanger.set(replies={".": lambda connection: time.sleep(1.2)})
    server = relay("-j", 1, "-v", mx_port=secure.exchanger.port, spool=tmp_path / "other")
    ids = [server.send(f"b{number}@example.net") for number in range(3)]
    wait_for(lambda: not server.queue())
    quits = server.logged(r"^(.*) \S+ C: QUIT$")
    assert len(quits) >= 2 and {quit[1] for quit in quits} <= set(ids)


def test_many_messages_by_one_connection(secure, relay):
    """A handshake for all of them, and an openssl for all of them."""
    secure.relay.stop()
    secure.exchanger.stop()
    server = relay("-r", "1h", mx_port=secure.exchanger.port)
    ids = [server.send("b@example.net") for _ in range(8)]
    server.outcomes("b@example.net", count=8)
    secure.exchanger.start()
    server.hangup_until(lambda: len(secure.exchanger.messages) == len(ids))
    assert all(connection.tls for connection in secure.exchanger.connections)
    most = max(secure.exchanger.connections, key=lambda connection: len(connection.commands))
    assert most.commands.count("STARTTLS") == 1 and sum("MAIL" in command for command in most.commands) >= 3
    wait_for(lambda: most.commands[-1] == "QUIT")       # it is said, and gets through openssl
    assert all(found.relay == label(secure.exchanger) for found in server.outcomes("b@example.net")[8:])
    expect_no_openssl(server)


# ---- Exchangers: where TLS is not to be had ----------------------------------------------------


def test_never(secure, relay, tmp_path):
    server = relay("-T", "never", mx_port=secure.exchanger.port, spool=tmp_path / "other")
    assert deliver(secure, server).relay == label(secure.exchanger, tls=False)
    assert "STARTTLS" not in secure.exchanger.messages[0].connection.commands


@pytest.mark.parametrize("reply", ["454 4.7.0 TLS not available", "502 5.5.1 no", "501 5.5.4 no", "250 why not"])
def test_refused_starttls_goes_on_in_plain(secure, reply):
    """On the same connection: s_client by itself would begin TLS after any of these."""
    secure.exchanger.set(replies={"STARTTLS": reply})
    found = deliver(secure)
    assert (found.status, found.relay) == ("sent", label(secure.exchanger, tls=False))
    connection, = secure.exchanger.connections
    assert connection.commands[:2] == [f"EHLO {HOSTNAME}", "STARTTLS"]
    assert connection.commands[2].startswith("MAIL FROM:<nour@example.org> SIZE=")
    expect_no_openssl(secure.relay)


def once(connection_number, exchanger, action):
    """A reply that does something odd on that connection alone."""
    return lambda connection: action if exchanger.connections.index(connection) == connection_number else None


BROKEN = {
    "it hangs up in place of 220": {"drop_at": "STARTTLS"},
    "it resets in place of 220": {"drop_at": "STARTTLS", "reset": True},
    "it hangs up after 220": {"drop_after": "STARTTLS"},
    "it resets after 220": {"drop_after": "STARTTLS", "reset": True},
    "it hangs up before TLS": {"drop_at": "TLS"},
    "it is silent after 220": {"stall_at": "TLS"},
    "it is silent in place of 220": {"stall_at": "STARTTLS"},
    "it goes on in plain": {"replies": {"TLS": b"250 Ok\r\n"}},
    "it says noise": {"replies": {"TLS": bytes(range(256)) * 400}},
    "it sends an alert": {"replies": {"TLS": b"\x15\x03\x03\x00\x02\x02\x28"}},
    "it hangs up by TLS": {"drop_at": ("EHLO", "TLS")},
    "it resets by TLS": {"drop_at": ("EHLO", "TLS"), "reset": True},
    "it is silent by TLS": {"stall_at": ("EHLO", "TLS")},
    "it says noise by TLS": {"replies": {("EHLO", "TLS"): b"noise\r\n"}},
    "a reply behind the 220": {"replies": {"STARTTLS": b"220 go\r\n250-injected\r\n250 PIPELINING\r\n"}},
    "a refusal behind the 220": {"replies": {"STARTTLS": b"220 go\r\n550 5.7.1 injected\r\n"}},
    "half a reply behind the 220": {"replies": {"STARTTLS": b"220 go\r\n25"}},
}


@pytest.fixture(params=BROKEN, ids=lambda name: name.replace(" ", "_"))
def broken(request, secure, relay, tmp_path):
    """The secure world, whose exchanger breaks the handshake in one of many ways; .start() makes a relay."""
    secure.exchanger.set(**BROKEN[request.param])
    secure.start = lambda *options: relay("-w", "1", *options, mx_port=secure.exchanger.port, spool=tmp_path / "other")
    return secure


def test_a_broken_handshake_is_followed_by_plain(broken):
    """Over a new connection, on which STARTTLS is not said."""
    server = broken.start()
    found = deliver(broken, server)
    assert (found.status, found.relay) == ("sent", label(broken.exchanger, tls=False))
    first, second = broken.exchanger.connections
    assert first.commands[:2] == [f"EHLO {HOSTNAME}", "STARTTLS"] and not any("MAIL" in each for each in first.commands)
    assert not second.tls and "STARTTLS" not in second.commands
    assert server.logged(rf"{re.escape(label(broken.exchanger, tls=False))}.*: once more in plain$")
    expect_no_openssl(server)


def test_must_means_that_nothing_goes_in_plain(broken):
    server = broken.start("-T", "must")
    found = deliver(broken, server)
    assert found.status == "later" and found.words.startswith("4.")
    assert found.relay == label(broken.exchanger, tls=False)
    assert len(broken.exchanger.connections) == 1 and not broken.exchanger.messages
    assert not any("MAIL" in command for command in broken.exchanger.connections[0].commands)
    expect_no_openssl(server)


@pytest.mark.parametrize("where", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("code", ["530 5.7.0 Must issue a STARTTLS command first", "554 5.7.1 no plain here"],
                         ids=["530", "554"])
def test_no_refusal_in_plain_is_final_after_a_broken_handshake(secure, where, code):
    """It may be refused because it is plain."""
    refuse = once(1, secure.exchanger, code)
    secure.exchanger.set(replies={"TLS": b"250 Ok\r\n", where: refuse, "HELO": code if where == "EHLO" else None})
    found = deliver(secure)
    assert found.status == "later"
    assert found.words == code or where == "CONNECT" and "TLS" in found.words
    assert len(secure.exchanger.connections) == 2 and len(secure.relay.queue()) == 1


def test_what_it_does_not_take_in_plain_is_not_final_either(secure):
    """Size and 8-bit content, which it might take by TLS."""
    secure.exchanger.set(replies={"TLS": b"250 Ok\r\n", "EHLO": "250-mx\n250-STARTTLS\n250 SIZE 10"})
    assert deliver(secure).status == "later"
    secure.exchanger.set(replies={"TLS": b"250 Ok\r\n", "EHLO": "250-mx\n250 STARTTLS"})
    secure.relay.send("c@example.net", body="\u00e9\n")
    assert secure.relay.outcomes("c@example.net")[0].status == "later"


def test_the_next_exchanger_after_must(exchangers, dns, relay, certificate_for):
    plain, encrypted = exchangers(2)
    encrypted.set(certificate=certificate_for(encrypted))
    dns.mail("example.net", (10, plain), (20, encrypted))
    server = relay("-T", "must", mx_port=plain.port)
    server.send("b@example.net")
    assert server.outcomes("b@example.net")[0].relay == label(encrypted)
    assert plain.connections[0].commands == [f"EHLO {HOSTNAME}", "QUIT"]


@pytest.fixture
def certificate_for(authority):
    return lambda exchanger: authority.certificate(exchanger.name, exchanger.host)


def test_must_where_it_is_not_offered(world, relay, tmp_path):
    server = relay("-T", "must", mx_port=world.exchanger.port, spool=tmp_path / "other")
    found = deliver(world, server)
    assert (found.status, found.relay) == ("later", label(world.exchanger, tls=False))
    assert found.words == "4.7.4 no STARTTLS is offered, and mail must not go in plain"
    assert world.exchanger.connections[0].commands == [f"EHLO {HOSTNAME}", "QUIT"]


def test_must_where_ehlo_is_unknown(world, relay, tmp_path):
    world.exchanger.set(replies={"EHLO": "502 5.5.1 what?"})
    server = relay("-T", "must", mx_port=world.exchanger.port, spool=tmp_path / "other")
    assert deliver(world, server).words.startswith("4.7.4 ")


@pytest.mark.parametrize("reply", ["454 4.7.0 TLS not available", "502 5.5.1 no"])
def test_must_where_it_is_refused(secure, relay, tmp_path, reply):
    secure.exchanger.set(replies={"STARTTLS": reply})
    server = relay("-T", "must", mx_port=secure.exchanger.port, spool=tmp_path / "other")
    found = deliver(secure, server)
    assert (found.status, found.words) == ("later", reply)


# ---- Smarthosts: verified, and with a password -------------------------------------------------


SMARTHOST = "smtp.example.net"


@pytest.fixture
def password_file(tmp_path):
    path = tmp_path / "password"
    path.write_text(f"{NAME}\n{PASSWORD}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def smarthost(dns, authority, monkeypatch, password_file, relay):
    """A submission service whose certificate is trusted.  .start(*options) makes a relay for it,
    .deliver() hands that a message and returns what became of it."""
    host = Exchanger(loopback(), 0, SMARTHOST, accounts={NAME: PASSWORD})
    host.set(certificate=authority.certificate(SMARTHOST, host.host))
    dns.a(SMARTHOST, host.host)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.pem))
    host.password_file = password_file

    def start(*options, by="-s", name=SMARTHOST, password=True, **settings):
        host.tls_first = by == "-S"
        secret = ["-A", password_file] if password else []
        host.relay = relay(by, f"{name}:{host.port}", *secret, *options, **settings)
        return host.relay

    def deliver(to="b@example.net", **message):
        host.relay.send(to, **message)
        return host.relay.outcomes(to)[-1]

    host.start_relay, host.deliver = start, deliver
    yield host
    host.stop()


BOTH_WAYS = pytest.mark.parametrize("by", ["-s", "-S"])


def secrets():
    """The password in all forms in which it goes over the wire."""
    both = f"\0{NAME}\0{PASSWORD}"
    return [PASSWORD, *(base64.b64encode(text.encode()).decode() for text in (PASSWORD, both, NAME))]


def expect_no_secret(relay):
    for line in relay.log:
        assert not any(secret in line for secret in secrets()), line


@BOTH_WAYS
@pytest.mark.parametrize("mechanisms", [("PLAIN", "LOGIN"), ("LOGIN",), ("CRAM-MD5", "login", "XPLAIN"), ("Plain",)],
                         ids=" ".join)
def test_a_password(smarthost, by, mechanisms):
    """PLAIN, or LOGIN where that is all there is; in no log, not with -v either."""
    smarthost.set(mechanisms=tuple(each.upper() for each in mechanisms))
    server = smarthost.start_relay("-v", by=by)
    found = smarthost.deliver()
    assert (found.status, found.relay) == ("sent", label(smarthost))
    message, = smarthost.messages
    assert message.connection.user == NAME and message.connection.server_name == SMARTHOST
    assert message.connection.commands.count("STARTTLS") == (by == "-s")
    wait_for(lambda: server.logged(" C: QUIT"))
    assert server.logged(" C: AUTH ")
    expect_no_secret(server)


@BOTH_WAYS
@pytest.mark.parametrize("mechanisms", [("PLAIN",), ("LOGIN",)], ids=" ".join)
def test_a_wrong_password_is_for_the_operator_to_mend(smarthost, by, mechanisms):
    smarthost.set(mechanisms=mechanisms, accounts={NAME: "another"})
    server = smarthost.start_relay("-v", by=by)
    found = smarthost.deliver()
    assert (found.status, found.words) == ("later", "535 5.7.8 Error: authentication failed")
    assert f"{label(smarthost)} 535 5.7.8 Error: authentication failed" in run("-l", "-q", server.spool).stdout
    expect_no_secret(server)
    smarthost.set(accounts={NAME: PASSWORD})
    server.hangup_until(lambda: smarthost.messages)


@pytest.mark.parametrize("code", ["530 5.7.0 log in", "535 5.7.8 no", "534 5.7.9 too weak", "538 5.7.11 no"])
@pytest.mark.parametrize("where", ["AUTH", "MAIL", "RCPT", "DATA", "."])
def test_what_a_smarthost_has_against_us_is_no_failure(smarthost, where, code):
    smarthost.set(replies={where: code})
    smarthost.start_relay()
    found = smarthost.deliver()
    assert (found.status, found.words) == ("later", code)


@BOTH_WAYS
def test_what_it_has_against_a_message_is_one(smarthost, by):
    smarthost.set(replies={"RCPT": "550 5.1.1 nobody"})
    smarthost.start_relay(by=by)
    assert smarthost.deliver().status == "failed"


@pytest.mark.parametrize("options", [("-s",), ("-S",)])
def test_a_smarthost_that_asks_for_a_password_that_nobody_gave(smarthost, options):
    smarthost.start_relay(by=options[0], password=False)
    found = smarthost.deliver()
    assert (found.status, found.words) == ("later", "530 5.7.0 Authentication required")


def test_a_smarthost_by_tls_from_the_first_octet_without_a_password(smarthost):
    smarthost.set(accounts={})
    server = smarthost.start_relay(by="-S", password=False)
    found = smarthost.deliver()
    assert (found.status, found.relay) == ("sent", label(smarthost))
    assert smarthost.messages[0].connection.commands[0] == f"EHLO {HOSTNAME}"
    assert not server.logged(r"greeting=\d")       # it was not waited for in the race


@BOTH_WAYS
def test_a_smarthost_by_its_address(smarthost, by):
    """Its certificate has to have that address in it."""
    smarthost.start_relay(by=by, name=smarthost.host)
    found = smarthost.deliver()
    assert (found.status, found.relay) == ("sent", f"[{smarthost.host}]/tls")
    assert smarthost.messages[0].connection.server_name is None


@BOTH_WAYS
@pytest.mark.parametrize("fault, words", [
    ("name", "hostname mismatch"), ("address", "IP address mismatch"), ("authority", "unable to get local issuer"),
    ("expired", "certificate has expired")])
def test_a_smarthost_that_may_be_another(smarthost, authority, monkeypatch, tmp_path, by, fault, words):
    """Nothing is said to it, and least of all the password."""
    other = {"name": ("smtp.example.com",), "address": (SMARTHOST, "192.0.2.1")}.get(fault, (SMARTHOST,))
    smarthost.set(certificate=authority.certificate(*other, days=-1 if fault == "expired" else 2))
    if fault == "authority":
        monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    server = smarthost.start_relay(by=by, name=smarthost.host if fault == "address" else SMARTHOST)
    found = smarthost.deliver()
    assert found.status == "later" and not smarthost.messages
    assert re.fullmatch(rf"4\.7\.5 no TLS: .*{words}.*", found.words)
    assert "/tls" not in found.relay
    for connection in smarthost.connections:
        assert not connection.tls and not any("AUTH" in each for each in connection.commands)
    assert found.words in run("-l", "-q", server.spool).stdout
    expect_no_openssl(server)


def test_no_password_without_tls(smarthost):
    """Whatever is offered in plain."""
    smarthost.set(certificate=None, extensions=("AUTH PLAIN LOGIN",), accounts={})
    smarthost.start_relay()
    found = smarthost.deliver()
    assert found.status == "later" and found.words.startswith("4.7.4 ")
    assert smarthost.connections[0].commands == [f"EHLO {HOSTNAME}", "QUIT"]


def test_no_password_where_it_is_not_asked_for(smarthost):
    smarthost.set(accounts={})
    smarthost.start_relay()
    assert smarthost.deliver().words == "4.7.0 neither AUTH PLAIN nor AUTH LOGIN is offered"


@pytest.mark.parametrize("replies", [
    {"AUTH": "334 more"}, {"AUTH": "250 fine"}, {"AUTH": "454 4.7.0 not now"}, {"AUTH": b"235"[:2] + b"\r\n"}])
def test_odd_answers_to_auth(smarthost, replies):
    smarthost.set(replies=replies)
    smarthost.start_relay("-w", "1")
    assert smarthost.deliver().status == "later" and not smarthost.messages


@pytest.mark.parametrize("moment", [{"drop_at": "AUTH"}, {"stall_at": "AUTH"}, {"drop_after": "AUTH"}], ids=str)
def test_a_smarthost_that_is_lost_at_auth(smarthost, moment):
    smarthost.set(**moment)
    smarthost.start_relay("-w", "1")
    assert smarthost.deliver().status == "later"


@BOTH_WAYS
@pytest.mark.parametrize("fault", [
    {"drop_at": "TLS"}, {"stall_at": "TLS"}, {"replies": {"TLS": b"220 smtp.example.net ESMTP\r\n"}},
    {"drop_at": "CONNECT"}], ids=str)
def test_a_smarthost_is_never_asked_in_plain(smarthost, by, fault):
    smarthost.set(**fault)
    smarthost.start_relay("-w", "1", by=by)
    found = smarthost.deliver()
    assert found.status == "later" and found.words.startswith("4.")
    assert not smarthost.messages and not any("MAIL" in each for c in smarthost.connections for each in c.commands)


@pytest.mark.parametrize("reply, status", [("554 5.7.1 not you", "failed"), ("421 4.3.2 not now", "later")])
def test_a_greeting_by_tls_that_is_none(smarthost, reply, status):
    """As in plain: RFC 5321 3.1."""
    smarthost.set(replies={"CONNECT": reply})
    smarthost.start_relay(by="-S")
    found = smarthost.deliver()
    assert (found.status, found.words) == (status, reply)


@BOTH_WAYS
def test_many_messages_after_one_login(smarthost, by):
    port = smarthost.port
    smarthost.stop()
    server = smarthost.start_relay("-r", "1h", by=by)
    for _ in range(6):
        server.send("b@example.net")
    server.outcomes("b@example.net", count=6)
    assert smarthost.port == port
    smarthost.start()
    server.hangup_until(lambda: len(smarthost.messages) == 6)
    most = max(smarthost.connections, key=lambda connection: len(connection.commands))
    assert sum("AUTH" in command for command in most.commands) == 1
    assert sum("MAIL" in command for command in most.commands) >= 3


def test_opportunistic_tls_with_a_smarthost(smarthost, monkeypatch):
    """With -s alone it is like any exchanger: unverified, and in plain where need be."""
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    smarthost.set(accounts={})
    smarthost.start_relay(password=False)
    assert smarthost.deliver().relay == label(smarthost)
    smarthost.set(drop_at="TLS")
    assert smarthost.deliver("c@example.net").relay == label(smarthost, tls=False)


# ---- The options -------------------------------------------------------------------------------


def start_fails(*arguments):
    said = run("-q", "/nonexistent/spool", *arguments, "127.0.0.1")
    assert said.stderr.count("\n") == 1
    return said.returncode, said.stderr


@pytest.mark.parametrize("arguments, status, words", [
    (("-T", "sometimes"), 2, "-T sometimes: not never, may or must"),
    (("-T", "verified"), 2, "not never, may or must"),
    (("-S", "no such host"), 2, "-S no such host: not a host"),
    (("-A", "/nonexistent/file"), 2, "-A is for a smarthost: name it with -s or -S"),
    (("-A", "/nonexistent/file", "-s", "mail.example.net"), 1, "cannot read the password file -A /nonexistent/file"),
    (("-S", "mail.example.net", "-T", "never"), 2, "-T never: -A and -S send nothing without TLS")])
def test_mistakes_on_the_command_line(arguments, status, words):
    found, said = start_fails(*arguments)
    assert found == status and words in said


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o700])
def test_a_password_that_others_may_read_is_refused(password_file, mode):
    password_file.chmod(mode)
    status, said = start_fails("-A", password_file, "-s", "mail.example.net")
    assert status == 1 and "must be a file of mode 600: chmod 600 it" in said


@pytest.mark.parametrize("content", [
    "", "\n", "name", "name\n", "name\n\n", "\npassword\n", "name\npassword\nmore\n", "x" * 256 + "\npassword\n",
    "name\n" + "x" * 256 + "\n", "name\npass\0word\n", "x" * 2000], ids=lambda text: repr(text[:20]))
def test_a_password_file_that_is_none(password_file, content):
    password_file.write_text(content)
    status, said = start_fails("-A", password_file, "-s", "mail.example.net")
    assert status == 1 and "must hold two lines, a name and a password" in said
    assert "password\n" not in content or "password" in said        # the words, not what is in the file
    assert "xxx" not in said


def test_a_password_file_that_nobody_writes(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    status, said = start_fails("-A", tmp_path / "fifo", "-s", "mail.example.net")
    assert status == 1 and "must be a file" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_password_file_of_somebody_else(password_file):
    os.chown(password_file, 65534, 65534)
    status, said = start_fails("-A", password_file, "-s", "mail.example.net")
    assert status == 1 and "belongs to uid 65534, who could change it: chown it to uid 0, or to root" in said


@pytest.mark.parametrize("content", [
    f"{NAME}\n{PASSWORD}", f"{NAME}\r\n{PASSWORD}\r\n", "n" * 255 + "\n" + "p" * 255 + "\n"],
                         ids=["no last line end", "CRLF", "longest"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_password_files(smarthost, content, mechanism):
    smarthost.password_file.write_bytes(content.encode())
    name, password = content.split()[0], content.split(maxsplit=1)[1].strip()
    smarthost.set(accounts={name: password}, mechanisms=(mechanism,))
    smarthost.start_relay()
    assert smarthost.deliver().status == "sent"


@pytest.mark.parametrize("by, port", [("-s", 587), ("-S", 465)])
def test_the_usual_ports(smarthost, relay, by, port):
    try:
        usual = Exchanger(smarthost.host, port, SMARTHOST, certificate=smarthost.certificate, tls_first=by == "-S",
                          accounts=smarthost.accounts)
    except PermissionError as reason:
        pytest.skip(f"only root may listen there: {reason}")
    try:
        server = relay(by, SMARTHOST, "-A", smarthost.password_file)
        server.send("b@example.net")
        usual.wait_for_messages(1)
    finally:
        usual.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_the_password_is_read_before_root_is_given_up(smarthost, tmp_path):
    """The file is root's, and its directory is nobody else's to enter."""
    assert os.stat(smarthost.password_file).st_uid == 0
    smarthost.password_file.parent.chmod(0o755)
    server = smarthost.start_relay()
    assert Path(f"/proc/{server.pid}").stat().st_uid != 0
    assert smarthost.deliver().status == "sent"


# ---- How openssl is run ------------------------------------------------------------------------


RECORDER = f"""#!{sys.executable} -I
import json, os, sys
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
found = {{"arguments": sys.argv[1:], "blocked": int(status["SigBlk"], 16), "parent": os.getppid(),
          "descriptors": [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)],
          "environment": {{name: os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}}}}
with open(sys.argv[0] + f".{{os.getpid()}}", "w") as record:
    json.dump(found, record)
os.execv({OPENSSL!r}, ["openssl", *sys.argv[1:]])
"""

# It does as LibreSSL's s_client, and would go on with a port.
LIBRESSL = f"""#!/bin/sh
echo "$@" >>"$0.calls"
for word; do
    if [ "$word" = -unix ]; then
        echo "unknown option -unix" >&2
        echo "usage: s_client args" >&2
        exit 1
    fi
done
exec {OPENSSL} "$@"
"""


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(script): makes a program the only one in PATH, as openssl, where every user can run it and it can
    write beside itself; returns its path.  stand_in(None): there is none."""
    if BINARY.name == "valgrind":
        pytest.skip("valgrind is found by PATH, too")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "openssl"
        path.parent.chmod(0o777)

        def make(script):
            if script is not None:
                path.write_text(script)
                path.chmod(0o755)
            monkeypatch.setenv("PATH", directory)
            return path
        yield make


@pytest.fixture
def recorded(stand_in):
    """recorded() is what every openssl that was started found."""
    path = stand_in(RECORDER)

    def records():
        return [json.loads(each.read_text()) for each in path.parent.glob("openssl.*")]
    return records


@pytest.fixture
def encrypted(recorded, world, certificate, relay, tmp_path):
    """The secure world, with an openssl that writes down how it was started."""
    world.exchanger.set(certificate=certificate)
    world.relay = relay("-v", mx_port=world.exchanger.port, spool=tmp_path / "other")
    return world


def test_how_it_is_started(encrypted, recorded):
    """With nothing but its three descriptors, deaf to signals, and without the system's authorities,
    which would take it longer to read than all the rest."""
    assert deliver(encrypted).relay == label(encrypted.exchanger)
    found, = recorded()
    assert found["arguments"][:3] == ["s_client", "-quiet", "-unix"] and found["arguments"][3].startswith("tmp/")
    assert found["arguments"][4:] == ["-servername", encrypted.exchanger.name]
    assert found["descriptors"] == [0, 1, 2]
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT} - set(range(32, 64)):
        assert found["blocked"] >> (number - 1) & 1, number
    assert found["environment"] == {"SSL_CERT_FILE": "/dev/null", "SSL_CERT_DIR": "/dev/null"}


def test_how_it_is_started_to_verify(smarthost, authority, recorded):
    """The operator's own authorities are those that count."""
    smarthost.start_relay()
    assert smarthost.deliver().status == "sent"
    smarthost.deliver("c@example.net")
    for found in recorded():
        assert found["arguments"][4:] == ["-servername", SMARTHOST, "-verify_return_error", "-verify", "9",
                                          "-verify_hostname", SMARTHOST]
        assert found["environment"]["SSL_CERT_FILE"] == str(authority.pem)
        assert found["environment"]["SSL_CERT_DIR"] == os.environ.get("SSL_CERT_DIR")
        assert not any(secret in word for secret in secrets() for word in found["arguments"])


def listening(session):
    """The TCP ports that the processes of a session listen on."""
    inodes = set()
    for stat_path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat_path.read_text().rsplit(") ", 1)[1].split()[3]) == session:
                inodes |= {os.readlink(fd) for fd in (stat_path.parent / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def test_nobody_else_can_come_before_it(secure):
    """It is connected to by a socket in a directory that is closed to others, and never by a port."""
    seen = []

    def look(connection):
        seen.append((listening(secure.relay.pid), [path.is_socket() for path in secure.relay.tmp()]))

    secure.exchanger.set(replies={"STARTTLS": look, ("EHLO", "TLS"): look})
    assert deliver(secure).status == "sent"
    assert seen == [([secure.relay.port], [])] * 2
    assert stat.S_IMODE((secure.relay.spool / "tmp").stat().st_mode) == 0o700


HOW_MISSING = {
    "none in PATH": (None, "openssl: No such file or directory"),
    "LibreSSL": (LIBRESSL, "unknown option -unix"),
    "ends at once": ("#!/bin/sh\nexit 0\n", "openssl does not start"),
    "says odd things": ("#!/bin/sh\nprintf '\\033[31m\\303\\251\\007%%s%%n\\r\\nmore\\n' >&2\nexit 1\n",
                        "?[31m???%s%n?"),
    "dies": ("#!/bin/sh\nkill -9 $$\n", "openssl does not start"),
}


@pytest.fixture(params=HOW_MISSING)
def missing(request, stand_in):
    """Why there is no TLS, in the words of the log."""
    script, words = HOW_MISSING[request.param]
    stand_in(script)
    return words


@pytest.fixture
def without(missing, secure, relay, tmp_path):
    """The secure world, with a relay that has no openssl: .start(*options)."""
    secure.start = lambda *options: relay(*options, mx_port=secure.exchanger.port, spool=tmp_path / "other")
    return secure


def test_without_openssl_mail_goes_in_plain(without):
    """On the connection that it has, to which STARTTLS is not said."""
    server = without.start()
    assert deliver(without, server).relay == label(without.exchanger, tls=False)
    connection, = without.exchanger.connections
    assert connection.commands[0] == f"EHLO {HOSTNAME}" and connection.commands[1].startswith("MAIL ")
    assert not server.tmp()


def test_without_openssl_must_waits(without, missing):
    server = without.start("-T", "must")
    found = deliver(without, server)
    assert (found.status, found.words) == ("later", f"4.7.5 no TLS: {missing}")
    assert f"4.7.5 no TLS: {missing}\n" in run("-l", "-q", server.spool).stdout
    assert without.exchanger.connections[0].commands == [f"EHLO {HOSTNAME}", "QUIT"]


@BOTH_WAYS
@pytest.mark.parametrize("password", [True, False], ids=["-A", "no -A"])
def test_without_openssl_a_smarthost_waits(smarthost, missing, by, password):
    if by == "-s" and not password:
        pytest.skip("that is TLS where it is to be had")
    smarthost.start_relay(by=by, password=password)
    found = smarthost.deliver()
    assert (found.status, found.words) == ("later", f"4.7.5 no TLS: {missing}")
    assert not any("AUTH" in command for connection in smarthost.connections for command in connection.commands)


def test_a_process_asks_once_for_openssl(exchangers, dns, relay, authority, stand_in):
    """And never asks it to take a port in place of the socket."""
    path = stand_in(LIBRESSL)
    first, second, third = made = exchangers(3)
    for exchanger in made:
        exchanger.set(certificate=authority.certificate(exchanger.name), replies={"MAIL": "451 4.3.0 not now"})
    third.set(replies={})
    dns.mail("example.net", (10, first), (20, second), (30, third))
    server = relay(mx_port=first.port)
    server.send("b@example.net")
    assert server.outcomes("b@example.net")[0].relay == label(third, tls=False)
    assert len(first.connections) == len(second.connections) == 1
    call, = path.with_name("openssl.calls").read_text().splitlines()
    assert "-unix" in call and "-connect" not in call


# ---- Signals, and processes that are killed ------------------------------------------------------


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_group_between_the_final_dot_and_the_250(secure, number):
    """openssl must not end of it: its forwarder is about to hear that the message is sent, and the
    message must not be sent again."""
    def interrupt(connection):
        os.killpg(secure.relay.pid, number)
        if number != signal.SIGHUP:
            secure.relay.process.wait()

    secure.exchanger.set(replies={".": interrupt})
    assert deliver(secure).status == "sent"
    expect_no_openssl(secure.relay)
    if number != signal.SIGHUP:
        secure.relay.start()
    secure.relay.hangup()
    secure.relay.send("c@example.net")
    secure.exchanger.set(replies={})
    secure.exchanger.wait_for_messages(2)
    assert [message.recipients for message in secure.exchanger.messages] == [["<b@example.net>"], ["<c@example.net>"]]
    wait_for(lambda: not secure.relay.queue(), what="an empty queue")


MOMENTS = ["STARTTLS", "TLS", ("EHLO", "TLS"), "MAIL", "RCPT", "DATA", "BODY", "."]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("victim", ["openssl", "forwarder", "server", "all"])
def test_killed_at_any_moment(secure, victim, moment):
    """Nothing is lost, and no openssl is left behind."""
    struck = []

    def strike(connection):
        if struck:
            return
        struck.append(victim)
        pid, = wait_for(lambda: openssl_of(secure.relay), what="openssl")
        target = {"openssl": pid, "forwarder": parent(pid), "server": secure.relay.pid}.get(victim)
        if target is not None:
            os.kill(target, signal.SIGKILL)
        else:
            os.killpg(secure.relay.pid, signal.SIGKILL)
        if victim != "server":
            wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), what="the end of openssl")

    secure.exchanger.set(replies={moment: strike}, extensions=("8BITMIME",))
    secure.relay.send("b@example.net", body=b"Subject: all of it\r\n\r\n" + b"x\r\n" * 100_000)
    wait_for(lambda: struck)
    if victim in ("server", "all"):
        secure.relay.process.wait()
        secure.relay.start()
    secure.relay.hangup_until(lambda: secure.exchanger.messages and not secure.relay.queue())
    if moment not in ("BODY", "."):     # then all of it may be on its way to the exchanger, or there
        assert len(secure.exchanger.messages) == 1
    assert all(message.data.endswith(b"x\r\n" * 100_000) for message in secure.exchanger.messages)
    expect_no_openssl(secure.relay)
    assert not secure.relay.tmp()


def test_a_socket_that_a_crash_left_is_cleared(secure, stand_in):
    """It is named like a draft; what is not named so is not ours."""
    stand_in("#!/bin/sh\nkill -9 $PPID\n")
    secure.relay.stop()
    secure.relay.start()
    secure.relay.send("b@example.net")
    left, = wait_for(lambda: [path for path in secure.relay.tmp() if path.is_socket()], what="a socket that is left")
    wait_for(lambda: secure.relay.logged("died of signal 9"))
    foreign = secure.relay.spool / "tmp/foreign"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(foreign))
    secure.relay.hangup()       # it is too young to be cleared
    for path in (left, foreign):
        os.utime(path, (1, 1))
    secure.relay.hangup_until(lambda: not left.exists(), what="the end of the socket")
    assert foreign.is_socket()
    assert secure.relay.logged(rf"{left.name} stale draft removed")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a name space of processes")
def test_process_1_of_a_container_reaps_openssl(secure, relay, wrapped, tmp_path):
    """It is the parent of those whose forwarder was killed."""
    prepare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*prepare, "true"], capture_output=True).returncode != 0:
        pytest.skip("no name space of processes here")
    server = relay(mx_port=secure.exchanger.port, spool=tmp_path / "other", binary=wrapped(command=" ".join(prepare)))
    secure.exchanger.set(stall_at="MAIL")
    server.send("b@example.net")
    wait_for(lambda: secure.exchanger.connections and "MAIL" in " ".join(secure.exchanger.connections[0].commands))
    pid, = openssl_of(server)
    os.kill(parent(pid), signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), what="the end of openssl, as a zombie too")
    server.kill()


def test_many_at_once(secure):
    """120 messages from 40 clients: each arrives by TLS, once."""
    def client(number):
        for _ in range(3):
            taken.append(secure.relay.send("b@example.net"))

    taken = []
    threads = [threading.Thread(target=client, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    secure.exchanger.wait_for_messages(120, timeout=60)
    wait_for(lambda: not secure.relay.queue())
    found = [re.search(rb"with \S+ id (\S+);|id (\S+)", message.data) for message in secure.exchanger.messages]
    assert len(taken) == len(secure.exchanger.messages) == 120
    assert all(message.connection.tls for message in secure.exchanger.messages)
    assert sorted(match[1] or match[2] for match in found) == sorted(id.encode() for id in taken)
    expect_no_openssl(secure.relay)


def unread(pipe):
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_key_updates(smarthost, authority):
    """The exchanger is openssl, which asks for new keys (RFC 8446 4.6.3) before it says anything, and now and
    then makes new ones of its own."""
    smarthost.stop()
    pem = authority.certificate(SMARTHOST)
    server = subprocess.Popen([OPENSSL, "s_server", "-accept", f"{smarthost.host}:{smarthost.port}", "-cert", pem,
                               "-key", pem], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    said = []

    def say(line, until=None):
        """It acts on the first letter of what it reads at once."""
        server.stdin.write(line + b"\n")
        server.stdin.flush()
        wait_for(lambda: not unread(server.stdin), what="openssl reading what to say")
        return until and hear(until)

    def hear(what):
        for line in server.stdout:
            said.append(line)
            if what in line:
                return
        raise AssertionError(f"no {what}")

    try:
        hear(b"ACCEPT")
        smarthost.start_relay(by="-S", password=False)
        smarthost.relay.send("b@example.net")
        hear(b"CIPHER is TLS_")
        for reply, command in [(b"220 smtp", b"EHLO"), (b"250 smtp", b"MAIL"), (b"250 Ok", b"RCPT"),
                               (b"250 Ok", b"DATA"),
                               (b"354 go on", b"Dear Nour"), (b"250 Ok", b"QUIT")]:
            say(b"K")
            say(b"k")
            say(reply + b"\r", until=command)
        assert smarthost.relay.outcomes("b@example.net")[0].status == "sent"
        assert said.count(b"SSL_do_handshake -> 1\n") >= 10
    finally:
        server.kill()
        server.communicate()
        smarthost.start()


# ---- Where the password stays; and the demonstration -------------------------------------------


def memory_of(pid):
    """All that a process may write to."""
    found = b""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            if "rw" in line.split()[1] and not line.rstrip().endswith("]") or "[heap]" in line or "[stack]" in line:
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(first)
                    found += memory.read(last - first)
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into another process")
@pytest.mark.skipif(WATCHED, reason="its memory is mostly its watcher's")
def test_a_process_that_forwards_nothing_forgets_the_password(smarthost, wrapped):
    """The one that serves the clients of a full table on.  The server has it once, in its settings."""
    server = smarthost.start_relay("-c", "0", binary=wrapped("ulimit -n 64"))
    clients = [server.client() for _ in range(40)]
    pid = int(server.wait_for_log("table full: process (\\d+)")[1])
    assert clients
    wait_for(lambda: PASSWORD.encode() not in memory_of(pid), what="a process without the password")
    assert memory_of(server.pid).count(PASSWORD.encode()) == 1


def test_the_demo(authority):
    """make demo TLS=1."""
    said = subprocess.run([sys.executable, ROOT / "tests/demo.py", "1"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "by TLSv1.3, " in said.stdout and "/tls C: MAIL FROM:<nour@example.org>" in said.stdout
