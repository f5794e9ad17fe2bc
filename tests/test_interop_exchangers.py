"""Exchangers that others wrote take what the relay forwards, or do not, each in its
own way; what they took is what the relay was given, byte by byte."""
import contextlib
import json
import re
import subprocess
import sys

import pytest

from lab import HOSTNAME, Exchanger, loopback
from programs import (GREETINGS, LETTER, check_dump, daemon, deliver, listens, on_the_wire, smtp_sink,
                      without_received)


@pytest.fixture
def relay_to(dns, relay):
    """relay_to(exchanger): a relay whose mail for example.net goes there."""
    def make(exchanger):
        dns.mx("example.net", (10, "mx.example.net"))
        dns.a("mx.example.net", exchanger.host)
        return relay(mx_port=exchanger.port)
    return make


# ---- smtp-sink -----------------------------------------------------------------------


@pytest.mark.parametrize("options, protocol", [
    pytest.param([], b"ESMTP", id="all that it offers"),
    pytest.param(["-p", "-8", "-E", "-a", "-C", "-F", "-N"], b"ESMTP", id="nothing beside EHLO"),
    pytest.param(["-e"], b"SMTP", id="HELO"),               # a server of the time before EHLO
    pytest.param(["-f", "EHLO"], b"SMTP", id="EHLO refused"),
    pytest.param(["-P"], b"SMTP", id="behind a firewall that writes stars over the greeting"),
    pytest.param(["-T", "1024", "-H", "1"], b"ESMTP", id="slow to read"),
    pytest.param(["-W", "DATA:1"], b"ESMTP", id="slow to answer"),
])
def test_smtp_sink_takes_a_message(relay_to, tmp_path, options, protocol):
    with smtp_sink(tmp_path / "sink", *options) as sink:
        server = relay_to(sink)
        deliver(server, ["friend@example.net"], LETTER)
        server.wait_for_log(r"to=<friend@example.net> relay=mx.example.net\S* .*status=sent \(250 ")
        check_dump(sink.dump(), protocol, LETTER)


@pytest.mark.parametrize("commands", ["CONNECT", "EHLO,HELO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("option, status, words", [
    pytest.param("-f", "failed", r"500 5\.3\.0 Error: command failed", id="5xx"),
    pytest.param("-r", "later", r"450 4\.3\.0 Error: command failed", id="4xx"),
    pytest.param("-Q", "later", r"421 4\.0\.0 .*", id="421"),
    pytest.param("-q", "later", r"4\.4\.2 connection lost .*", id="close"),
])
def test_smtp_sink_takes_no_message(relay_to, tmp_path, option, status, words, commands):
    with smtp_sink(tmp_path / "sink", option, commands) as sink:
        server = relay_to(sink)
        deliver(server, ["friend@example.net"], LETTER)
        outcome, = server.outcomes("friend@example.net")
    assert outcome.status == status
    assert re.fullmatch(words, outcome.words)


# ---- aiosmtpd ------------------------------------------------------------------------

# It keeps what it takes in files; argv[3] says in what it differs from others.
AIOSMTPD = '''
import asyncio, itertools, json, os, sys
from aiosmtpd.smtp import SMTP

host, port, ways = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])

class Server(SMTP):
    async def smtp_EHLO(self, hostname):
        if "no EHLO" in ways:
            await self.push("500 5.5.1 What is EHLO?")
        else:
            await super().smtp_EHLO(hostname)

class Keeper:
    def __init__(self):
        self.numbers = itertools.count(1)
        self.seen = set()

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        session.host_name = hostname
        return [line for line in responses if line[4:].split()[0] not in ways.get("hides", [])]

    async def handle_RCPT(self, server, session, envelope, address, options):
        if "greylists" in ways and address not in self.seen:
            self.seen.add(address)
            return "451 4.7.1 Greylisted"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, server, session, envelope):
        with open("unfinished", "wb") as file:
            file.write(envelope.original_content)
        with open("envelope", "w") as file:
            print(session.host_name, envelope.mail_from, envelope.rcpt_tos, envelope.mail_options, file=file)
        os.rename("unfinished", f"message{next(self.numbers)}")
        return "250 2.0.0 Kept"

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
keeper = Keeper()
loop.run_until_complete(loop.create_server(
    lambda: Server(keeper, loop=loop, data_size_limit=ways.get("limit", 33554432)), host, port))
loop.run_forever()
'''


def python_with(module):
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL).returncode == 0:
                return python
    pytest.skip(f"no Python here has {module}")


@pytest.fixture
def aiosmtpd(tmp_path):
    """aiosmtpd(limit=5000): .kept() is all that it took, .envelope() who sent the last."""
    directory = tmp_path / "aiosmtpd"
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        def start(**ways):
            python = python_with("aiosmtpd")
            server = stack.enter_context(daemon(lambda host, port: [
                python, "-c", AIOSMTPD, host, str(port), json.dumps(ways)], listens, directory))
            server.kept = lambda: [file.read_bytes() for file in sorted(directory.glob("message*"))]
            server.envelope = lambda: (directory / "envelope").read_text()
            return server
        yield start


@pytest.fixture
def home(dns):
    """home(port): the exchanger of example.org, where reports to the sender go."""
    with contextlib.ExitStack() as stack:
        def start(port):
            exchanger = Exchanger(loopback(), port, "mx.example.org")
            stack.callback(exchanger.stop)
            dns.mail("example.org", (10, exchanger))
            return exchanger
        yield start


def test_aiosmtpd_takes_a_message(relay_to, aiosmtpd):
    exchanger = aiosmtpd()
    server = relay_to(exchanger)
    deliver(server, ["a@example.net", "b@example.net"], GREETINGS)
    server.wait_for_log(r"to=<b@example.net> relay=mx.example.net\S* .*status=sent \(250 2.0.0 Kept\)")
    kept, = exchanger.kept()
    assert without_received(kept) == on_the_wire(GREETINGS)
    assert exchanger.envelope() == (f"{HOSTNAME} nour@example.org ['a@example.net', 'b@example.net'] "
                                    f"['SIZE={len(kept)}', 'BODY=8BITMIME']\n")


@pytest.mark.parametrize("ways", [
    pytest.param({"no EHLO": True}, id="no EHLO"),
    pytest.param({"hides": ["SIZE", "8BITMIME", "SMTPUTF8", "AUTH"]}, id="no extension"),
])
def test_aiosmtpd_of_few_words_takes_a_message(relay_to, aiosmtpd, ways):
    exchanger = aiosmtpd(**ways)
    server = relay_to(exchanger)
    deliver(server, ["friend@example.net"], LETTER)
    server.wait_for_log(r"to=<friend@example.net> .*status=sent \(250 2.0.0 Kept\)")
    kept, = exchanger.kept()
    assert without_received(kept) == on_the_wire(LETTER)
    assert exchanger.envelope() == f"{HOSTNAME} nour@example.org ['friend@example.net'] []\n"


def test_aiosmtpd_greylists(relay_to, aiosmtpd):
    exchanger = aiosmtpd(greylists=True)
    server = relay_to(exchanger)
    deliver(server, ["a@example.net", "b@example.net"], GREETINGS)
    for recipient in "a@example.net", "b@example.net":
        outcome, = server.outcomes(recipient)
        assert (outcome.status, outcome.words) == ("later", "451 4.7.1 Greylisted")
    assert exchanger.kept() == []
    server.hangup_until(lambda: not server.queue(), what="an empty queue")
    kept, = exchanger.kept()
    assert without_received(kept) == on_the_wire(GREETINGS)
    assert "['a@example.net', 'b@example.net']" in exchanger.envelope()


# RFC 1870 6.3, RFC 6152 3: what an exchanger has said it cannot take, it is not sent.
@pytest.mark.parametrize("ways, letter, words", [
    pytest.param({"limit": 5000}, LETTER, "5.3.4 the message is larger than this exchanger takes", id="SIZE"),
    pytest.param({"limit": 5000, "hides": ["SIZE"]}, LETTER, "552 Error: Too much mail data", id="size, untold"),
    pytest.param({"hides": ["8BITMIME"]}, GREETINGS,
                 "5.6.3 8-bit content, and this exchanger offers no 8BITMIME", id="no 8BITMIME"),
    pytest.param({"no EHLO": True}, GREETINGS,
                 "5.6.3 8-bit content, and this exchanger offers no 8BITMIME", id="no EHLO"),
])
def test_aiosmtpd_cannot_take_the_message_and_the_sender_knows(relay_to, aiosmtpd, home, ways, letter, words):
    exchanger = aiosmtpd(**ways)
    sender = home(exchanger.port)
    server = relay_to(exchanger)
    deliver(server, ["friend@example.net"], letter)
    outcome, = server.outcomes("friend@example.net")
    assert (outcome.status, outcome.words) == ("failed", words)
    assert exchanger.kept() == []
    report, = sender.wait_for_messages(1)
    assert report.recipients == ["<nour@example.org>"]
    assert words.encode() in report.data
