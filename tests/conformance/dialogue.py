"""The dialogue with the server under test, and what the tests say of it.

A test is one requirement of one RFC, and its name says which: test_4_1_1_5_b_...
is R-4.1.1.5-b of RFC 5321, test_rfc1870_6_1_a_... is R-1870-6.1-a of RFC 1870.  It
is marked @must or @should.  What it cannot judge, it calls not applicable.
"""
import contextlib
import random
import re
import socket

import pytest

from lab import wait_for

must = pytest.mark.must         # MUST, MUST NOT, SHALL, and what the grammar says
should = pytest.mark.should     # SHOULD, SHOULD NOT

NAME = "client.example"         # what a session calls itself
CONNECTIONS = 400               # more than all tests need: one that went wild would be stopped
TOKEN = re.compile(rb"conformance-[0-9a-f]{16}")
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
DOMAIN = rf"{LABEL}(?:\.{LABEL})*"
LITERAL = r"\[[!-Z^-~]+\]"
UNKNOWN = ("500", "502")        # the command is not recognized, or not implemented


def not_applicable(reason):
    pytest.skip(reason)


class Closed(AssertionError):
    """The server closed the connection where it had to answer."""


class Reply(str):
    """A whole reply, its lines joined by \\n."""

    @property
    def code(self):
        return self[:3]

    @property
    def lines(self):
        return self.split("\n")

    @property
    def taken(self):
        return self[:1] == "2"

    @property
    def policy(self):
        """Whether it may be the site's policy, which the RFC leaves to the site: a
        syntax or sequence error (50z) and an unknown parameter (555) are not."""
        return self[:1] == "4" or (self[:1] == "5" and self[1:2] != "0" and self.code != "555")


def unless_refused(reply):
    """The reply, but the end of the test where it is a refusal by policy."""
    if reply.policy:
        not_applicable(f"the server refuses, as it may: {reply}")
    return reply


class Target:
    """The server under test, and what may be done to it."""

    def __init__(self, host, port, sender="", recipient=None, sink=None, patience=0, wait=60,
                 stranger=None):
        self.host, self.port = host, port
        self.sender = sender        # for MAIL; "" is the null reverse-path
        self.recipient = recipient  # where mail may be sent; None: nowhere
        self.sink = sink            # the lab's Exchanger that this mail arrives at
        self.patience = patience    # seconds of silence that may be spent
        self.wait = wait            # seconds for a message to get there
        self.stranger = stranger    # an address of ours that the server refuses
        self.sessions = []          # those of the current test
        self.connections = 0

    def connect(self, source=None):
        """A session that has been greeted, whatever the greeting; from an address of ours."""
        self.connections += 1
        if self.connections > CONNECTIONS:
            pytest.exit("more connections than the suite may make", 3)
        self.sessions.append(Session(self, source))
        return self.sessions[-1].greet()

    def session(self, greeting=None):
        """A session that has been welcomed; `greeting` is EHLO, HELO or what there is."""
        session = self.connect().welcomed()
        session.introduce(greeting)
        return session

    def hang_up(self):
        """Ends the sessions of a test.  Returns what was said in them."""
        transcript = "\n\n".join("\n".join(_shortened(session.transcript)) for session in self.sessions)
        for session in self.sessions:
            session.close()
        self.sessions = []
        return transcript

    def recipients(self, count):
        """So many addresses beside the one that mail may be sent to."""
        if self.recipient is None:
            return ["Postmaster"] * count
        return [f"conformance-{n}@{self.recipient.rpartition('@')[2]}" for n in range(count)]

    def needs_sink(self):
        if self.sink is None:
            not_applicable("where the message arrives cannot be seen: name the other end with SINK")

    def delivered(self, content):
        """A message as it arrived at the other end."""
        message = wait_for(lambda: self.arrived(content), self.wait, "the message at the other end")
        self.sessions[-1].transcript += ["", "At the other end:", f"MAIL FROM:{message.reverse_path}", *(
            f"RCPT TO:{path}" for path in message.recipients), *_lines(message.raw)]
        return message

    def arrived(self, content):
        """The same, if it is there already.  A report to the sender, which may quote it, is another message."""
        token = TOKEN.search(content)[0]
        return next((message for message in reversed(list(self.sink.messages))
                     if token in message.raw and f"<{self.sender}>" not in message.recipients), None)


class Session:
    """One connection.  It reads as generously as a client may, so that one fault is
    one test's; what was strictly heard is in `raw`."""

    def __init__(self, target, source=None, timeout=30):
        self.target = target
        self.transcript = []
        self.raw = b""
        self.greeting = None
        self.extended = False       # whether EHLO was accepted
        self.extensions = {}        # keyword: its parameters
        self._sock = socket.create_connection((target.host, target.port), timeout, (source, 0) if source else None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._sock.makefile("rb")

    @property
    def address(self):
        """Our own, as an address literal."""
        host = self._sock.getsockname()[0]
        return f"[IPv6:{host}]" if ":" in host else f"[{host}]"

    # What is said and heard.

    def send(self, octets):
        self.transcript += ["C: " + line for line in _lines(octets)]
        self._sock.sendall(octets)

    def reply(self):
        lines = []
        while not lines or lines[-1][3:4] == "-":
            try:
                line = self._stream.readline(65536)
            except socket.timeout:
                raise AssertionError(f"no reply within {self._sock.gettimeout()} seconds") from None
            except ConnectionError:
                line = b""
            if not line:
                self.transcript.append("S: (closes)")
                raise Closed("the server closed the connection")
            self.raw += line
            lines.append(line.rstrip(b"\r\n").decode("latin-1"))
            self.transcript += ["S: " + line for line in _lines(line)]
        return Reply("\n".join(lines))

    def say(self, line):
        """Sends a line and returns the reply to it."""
        self.send(line.encode() + b"\r\n")
        return self.reply()

    def rest(self):
        """QUIT, and all replies that come before the one to it."""
        replies = []
        try:
            self.send(b"QUIT\r\n")
            while not replies or replies[-1].code != "221":
                replies.append(self.reply())
        except (Closed, ConnectionError):
            pass
        return replies[:-1]

    def closed(self, within=None):
        """Whether the server says no more and closes."""
        self._sock.settimeout(within or self._sock.gettimeout())
        try:
            return not self._stream.readline(65536)
        except socket.timeout:
            return False
        except ConnectionError:
            return True

    def close(self):
        """Leaves, and waits until the server has left, too: it never has more of us than a test needs."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(5)
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(65536):
                pass
        self._stream.close()
        self._sock.close()

    # The steps of a session.  A step that policy forbids ends the test as not applicable.

    def greet(self):
        self.greeting = self.reply()
        return self

    def welcomed(self):
        if self.greeting.code != "220":
            not_applicable(f"the server takes no session: {self.greeting}")
        return self

    def introduce(self, greeting=None, name=NAME):
        """EHLO; HELO where that is refused, as a client should (3.2)."""
        for verb in [greeting] if greeting else ["EHLO", "HELO"]:
            reply = self.say(f"{verb} {name}")
            if reply.taken:
                self.extended = verb == "EHLO"
                keywords = [line[4:].split() for line in reply.lines[1:]] if self.extended else []
                self.extensions = {words[0].upper(): words[1:] for words in keywords if words}
                return
        not_applicable(f"the server refuses the session: {reply}")

    def needs(self, keyword):
        """The parameters of an extension."""
        if keyword not in self.extensions:
            not_applicable(f"{keyword} is not announced")
        return self.extensions[keyword]

    def mail(self, path=None, parameters=""):
        path = self.target.sender if path is None else path
        return unless_refused(self.say(f"MAIL FROM:<{path}>{parameters}"))

    def rcpt(self, path=None):
        return unless_refused(self.say(f"RCPT TO:<{path or self.target.recipient or 'Postmaster'}>"))

    def begin(self, sender=None, recipients=(None,), parameters=""):
        """A transaction, as far as its last recipient."""
        for reply in [self.mail(sender, parameters), *(self.rcpt(path) for path in recipients)]:
            if not reply.taken:
                not_applicable(f"no transaction can be begun: {reply}")
        return self

    def data(self, **envelope):
        """A transaction, as far as 354: only where mail may be sent."""
        if self.target.recipient is None:
            not_applicable("no mail may be sent: name a recipient with TO")
        reply = unless_refused(self.begin(**envelope).say("DATA"))
        if reply.code != "354":
            not_applicable(f"no message is taken: {reply}")
        return self

    def transfer(self, content, **envelope):
        """A whole message, dots stuffed; returns the reply to the final dot."""
        self.data(**envelope).send(re.sub(rb"(\A|\r\n)\.", rb"\1..", content) + b".\r\n")
        return self.reply()

    def deliver(self, content, **envelope):
        """A message as the lab's Message, as it arrived at the other end."""
        self.target.needs_sink()
        reply = self.transfer(content, **envelope)
        if not reply.taken:
            not_applicable(f"the message is refused: {reply}")
        self.rest()
        return self.target.delivered(content)


def _shortened(lines):
    return lines if len(lines) < 80 else [*lines[:30], f"... {len(lines) - 40} lines ...", *lines[-10:]]


def _lines(octets):
    """Octets as a transcript shows them."""
    lines = _shortened(octets.decode("latin-1").removesuffix("\r\n").split("\r\n"))
    return ["".join(c if " " <= c <= "~" else repr(c)[1:-1] for c in line[:300]) + "..." * (len(line) > 300)
            for line in lines]


DATE = b"Date: Tue, 24 Nov 2026 06:00:00 +0000"
FROM = b"From: nour@example.org"


def letter(*header, body=b"Dear Nour, This is a test.\r\n"):
    """A message that can be told from all others: complete, unless `header` is given."""
    token = b"conformance-%016x" % random.getrandbits(64)
    header = header or (DATE, FROM, b"To: friend@example.net", b"Message-ID: <%s@client.example>" % token)
    return b"".join(line + b"\r\n" for line in (*header, b"Subject: " + token)) + b"\r\n" + body


def with_hops(count):
    """A message that has been through so many servers."""
    return b"".join(b"Received: from hop%d.example by hop%d.example; Mon, 23 Nov 2026 06:00:00 +0000\r\n"
                    % (n + 1, n) for n in range(count)) + letter()
