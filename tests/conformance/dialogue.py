"""The dialogue with the server under test, and what the tests say of it.

A test is one requirement of one RFC, and its name says which: test_4_1_1_5_b_...
is R-4.1.1.5-b of RFC 5321, test_rfc1870_6_1_a_... is R-1870-6.1-a of RFC 1870.  It
is marked @must or @should.  It ends in one of four ways:

    it returns              pass
    it raises Departure     fail: the server does otherwise, and the text says in words how
    it raises Unasked       error: the server could not be asked
    not_applicable()        there is nothing to be judged
"""
import base64
import contextlib
import functools
import random
import re
import select
import socket
import ssl
import time

import pytest

from sink import wait_for

must = pytest.mark.must         # MUST, MUST NOT, SHALL, and what the grammar says
should = pytest.mark.should     # SHOULD, SHOULD NOT

NAME = "client.example"         # what a session calls itself
CONNECTIONS = 800               # more than all tests need: a run that went wild would be stopped
TOKEN = re.compile(rb"conformance-[0-9a-f]{16}")
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
DOMAIN = rf"{LABEL}(?:\.{LABEL})*"
LITERAL = r"\[[!-Z^-~]+\]"
UNKNOWN = ("500", "502")        # the command is not recognized, or not implemented

# How long a client waits for the reply to a command, in seconds (RFC 5321 4.5.3.2).
WAITS = {"DATA": 120, ".": 600}
USUAL_WAIT = 300
BLOCK_WAIT = 180                # for room to send more of a message
RETURN_WAIT = 30                # for a server that stopped listening under load to listen again
FIRST_NEWS, NEWS = 10, 20       # after how long a wait is told, and how often from then on
SILENCES = 3                    # so many in a row to one verb, and it is not waited for any more


# ---- What becomes of a test ----------------------------------------------------------------


class Departure(AssertionError):
    """The server does otherwise than the requirement says."""


class Unasked(Exception):
    """The server could not be asked, so nothing can be said of the requirement."""


class Silent(Unasked):
    """It did not answer in time."""


class Ended(Unasked):
    """It ended the session."""


class Closed(Ended):
    """It did so without a word."""


class Dismissed(Ended):
    """It did so with 421, as it may: it defends itself, or is shut down."""


def not_applicable(reason):
    pytest.skip(reason)


def fail(reason):
    raise Departure(reason)


def verdict(error):
    """What an exception of a test says of the server, and its words for that."""
    if error is None:
        return "pass", ""
    if isinstance(error, pytest.skip.Exception):
        return "n/a", str(error)
    if isinstance(error, Departure):
        return "fail", str(error)
    if isinstance(error, Unasked):
        return "error", str(error)
    return "error", f"the suite itself failed: {type(error).__name__}: {error}".partition("\n")[0]


def either(codes):
    """Codes, in words.  A single digit stands for all codes that begin with it."""
    words = [f"{code}yz" if len(code) == 1 else code for code in codes]
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def expect(reply, *codes):
    """That a reply has one of these codes, or begins with one of these digits."""
    if not reply.code.startswith(codes):
        fail(f"{reply.told}; it should be {either(codes)}")
    return reply


def reject(reply, *codes):
    """That it has none of them."""
    if reply.code.startswith(codes):
        fail(f"{reply.told}; it should not be {either(codes)}")
    return reply


def nothing(found, what):
    """That a list of faults is empty."""
    if found:
        shown = "; ".join(readable(each) for each in list(found)[:5])
        fail(f"{what}: {shown}" + f"; and {len(found) - 5} more" * (len(found) > 5))


def as_sent(message, end):
    """That the end of a message that has arrived is what was sent."""
    if not message.data.endswith(end):
        fail("the message has not arrived as it was sent: see what arrived at the other end")


# ---- Replies -------------------------------------------------------------------------------


class Reply(str):
    """A whole reply, its lines joined by \\n."""

    command = ""        # what it is the reply to

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
    def told(self):
        """The reply and its command, in a sentence."""
        what = {"": "the greeting is", ".": "the message is answered"}.get(self.command)
        command = self.command if len(self.command) <= 80 else self.command[:70] + "..."
        return f"{what or readable(command) + ' is answered'} “{' / '.join(map(readable, self.lines[:3]))}”"

    @property
    def policy(self):
        """Whether it may be the site's policy, which 7.9 leaves to the site.  What says that the
        command is not understood (500 to 504) or a parameter is not (555) is never policy."""
        return self[:1] == "4" or (self[:1] == "5" and self.code not in ("500", "501", "502", "503", "504", "555"))


def unless_refused(reply):
    """The reply, but the end of the test where it is a refusal by policy."""
    if reply.policy:
        not_applicable(f"the server refuses, as it may: {reply.told}")
    return reply


def unless_later(reply):
    """The reply, but the end of the test where it is a refusal for now."""
    if reply.code[:1] == "4":
        not_applicable(f"the server refuses for now: {reply.told}")
    return reply


def unless_unknown(reply):
    """The reply, but the end of the test where the command is unknown: that is another requirement's."""
    if reply.code in UNKNOWN:
        not_applicable(f"the server does not have that command: {reply.told}")
    return reply


# ---- The server ----------------------------------------------------------------------------


class Target:
    """The server under test, and what may be done to it."""

    def __init__(self, host, port, sender="", recipient=None, sink=None, patience=0, reply_timeout=None,
                 delivery_timeout=300, start_timeout=0, stranger=None, tls=False, user=None, password="",
                 tell=lambda text: None):
        self.host, self.port = host, port
        self.sender = sender        # for MAIL; "" is the null reverse-path
        self.recipient = recipient  # where mail may be sent; None: nowhere
        self.sink = sink            # the Sink that this mail arrives at
        self.patience = patience    # seconds of silence that may be spent
        self.reply_timeout = reply_timeout          # seconds for any reply; None: those of the RFC
        self.delivery_timeout = delivery_timeout    # seconds for a message to get to the sink
        self.start_timeout = start_timeout          # seconds for the server to begin to listen
        self.stranger = stranger    # an address of ours that the server refuses
        self.tls = tls              # whether a connection begins with a handshake
        self.user, self.password = user, password   # to log in with; None: nobody
        self._wants_login = None
        self.tell = tell            # called with a line of progress
        self.sessions = []          # those of the current test
        self.connections = 0
        self.silences = {}          # waits in vain for the reply to a verb, or a delivery, one after the other

    def wait(self, command=""):
        """How long to wait for the reply to a command."""
        return self.reply_timeout or WAITS.get(command[:4].upper(), USUAL_WAIT)

    def connect(self, source=None):
        """A session that has been greeted, whatever the greeting; from an address of ours."""
        self.connections += 1
        if self.connections > CONNECTIONS:
            pytest.exit("more connections than the suite may make", 3)
        self.sessions.append(Session(self, source))
        return self.sessions[-1].greet()

    def socket(self, source=None):
        """A connection.  A server that listens no more may be under load, and is waited for a little; one
        that does not listen yet, as long as is wanted."""
        patience = min(RETURN_WAIT, self.wait()) if self.connections > 1 else self.start_timeout
        deadline = time.monotonic() + patience
        waiting = Waiting(self, "the server to listen")
        while True:
            try:
                return socket.create_connection((self.host, self.port), self.wait(), (source, 0) if source else None)
            except OSError as error:
                reason = error.strerror or str(error) or "no answer"
            if time.monotonic() > deadline:
                raise Unasked(f"cannot connect to {self.host} port {self.port}: {reason}")
            waiting.tell()
            time.sleep(0.2)

    def session(self, greeting=None, login=True):
        """A session that has been welcomed; `greeting` is EHLO, HELO or what there is.  It has logged
        in, where that is needed for mail and there is a user to do so."""
        session = self.connect().welcomed()
        session.introduce(greeting)
        if self.user is not None and login and greeting is None and self.wants_login():
            session.protect()
            if "AUTH" in session.extensions:
                session.log_in()        # where that fails, what needs it is refused
        return session

    def wants_login(self):
        """Whether no transaction can be begun without; found out once."""
        if self._wants_login is None:
            session = self.connect().welcomed()
            session.introduce()
            try:
                session.begin()
                self._wants_login = False
            except pytest.skip.Exception:
                self._wants_login = True
            session.close()
        return self._wants_login

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
            not_applicable("where the message arrives cannot be seen: name the other end with --sink")

    # Messages at the other end.

    def delivered(self, content):
        """A message as it arrived.  One that is returned instead is a departure."""
        def found():
            return self.arrived(content) or self.returned(content)

        if self.silences.get("delivery", 0) >= SILENCES:
            raise Unasked(f"messages are not waited for any more: {SILENCES} times in a row none arrived")
        waiting = Waiting(self, "the message to arrive")
        message = wait_for(lambda: found() or waiting.tell(), self.delivery_timeout)
        if message is None:
            self.silences["delivery"] = self.silences.get("delivery", 0) + 1
            raise Unasked(f"the message was accepted, and did not arrive within {self.delivery_timeout:g} seconds")
        self.silences["delivery"] = 0
        self._show(message)
        if f"<{self.sender}>" in message.recipients and self.sender:
            fail("the message was accepted, and then returned to its sender")
        return message

    def overtaken(self, content):
        """The same of a message that another one is sent after: where only that arrives,
        this one never will.  None then."""
        began = time.monotonic()
        self.session().deliver(letter())
        took = time.monotonic() - began
        message = wait_for(lambda: self.arrived(content) or self.returned(content),
                           min(self.delivery_timeout, 5 + 2 * took))
        if message:
            self._show(message)
        return self.arrived(content)

    def arrived(self, content):
        """The message, if it is there already.  A report to the sender, which may quote it, is another one."""
        return self._found(content, lambda message: f"<{self.sender}>" not in message.recipients)

    def returned(self, content):
        """The report that it could not be delivered, if there is one."""
        return self._found(content, lambda message: self.sender and f"<{self.sender}>" in message.recipients)

    def _found(self, content, condition):
        token = TOKEN.search(content)[0]
        return next((message for message in reversed(list(self.sink.messages))
                     if token in message.raw and condition(message)), None)

    def _show(self, message):
        self.sessions[-1].transcript += ["", "At the other end:", f"MAIL FROM:{readable(message.reverse_path)}", *(
            f"RCPT TO:{readable(path + more)}" for path, more in zip(message.recipients, message.parameters)),
            *_lines(message.raw)]


class Waiting:
    """Says early that something takes long, and how long it takes by now."""

    def __init__(self, target, what):
        self.target, self.what = target, what
        self.began = time.monotonic()
        self.next = FIRST_NEWS

    def tell(self):
        passed = time.monotonic() - self.began
        if passed >= self.next:
            self.target.tell(f"waiting for {self.what}, {passed:.0f} s")
            self.next += NEWS


@functools.lru_cache(None)
def _unverified():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Session:
    """One connection.  It reads as generously as a client may, so that one fault is
    one test's; what was strictly heard is in `raw`."""

    def __init__(self, target, source=None):
        self.target = target
        self.transcript = []
        self.raw = b""
        self.greeting = None
        self.said = ""              # the last command
        self.extended = False       # whether EHLO was accepted
        self.extensions = {}        # keyword: its parameters
        self._buffer = b""
        self._sock = target.socket(source)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.tls:
            error = self.shake_hands()
            if error:
                raise Unasked(f"there is no TLS handshake: {error}")

    @property
    def address(self):
        """Our own, as an address literal."""
        host = self._sock.getsockname()[0]
        return f"[IPv6:{host}]" if ":" in host else f"[{host}]"

    # What is said and heard.

    def send(self, octets, shown=None):
        """Sends octets.  Where the server has closed, what it said before is still to be read."""
        self.transcript += [shown] if shown else ["C: " + line for line in _lines(octets)]
        self.said = octets.decode("utf-8", "replace").rstrip("\r\n").rpartition("\n")[2]
        self._sock.settimeout(self.target.reply_timeout or BLOCK_WAIT)
        try:
            self._sock.sendall(octets)
        except socket.timeout:
            raise Silent(f"the server took no more octets for {self._sock.gettimeout():g} seconds") from None
        except OSError:
            self.transcript.append("C: (finds the connection closed)")

    def line(self, timeout=None):
        """The next line, as it came; less than a line where the server closes."""
        timeout = timeout or self.target.wait(self.said)
        verb, silences = self.said.partition(" ")[0].upper(), self.target.silences
        what = {"": "the greeting", ".": "the reply to the message"}.get(verb, f"{verb}'s reply")
        if silences.get(verb, 0) >= SILENCES:
            raise Unasked(f"{what} is not waited for any more: {SILENCES} times in a row it did not come")
        waiting = Waiting(self.target, what)
        while b"\n" not in self._buffer:
            left = waiting.began + timeout - time.monotonic()
            if left <= 0:
                silences[verb] = silences.get(verb, 0) + 1
                raise Silent(f"waited {timeout:g} seconds for {what} in vain")
            if self._readable(min(left, 1)):
                self._sock.settimeout(1)
                try:
                    octets = self._sock.recv(65536)
                except socket.timeout:      # inside TLS: there was something, and none of it was for us
                    continue
                except OSError:
                    octets = b""
                if not octets:
                    break
                self._buffer += octets
            waiting.tell()
        line, end, self._buffer = self._buffer.partition(b"\n")
        silences[verb] = 0
        return line + end

    def _readable(self, timeout):
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return True
        return bool(select.select([self._sock], [], [], max(timeout, 0))[0])

    def reply(self, command=None, timeout=None):
        """The next one; `command` is what it answers, where that is not what was said last.  It
        ends the test where the server says no more, or nothing before a client has authenticated."""
        lines = []
        while not lines or lines[-1][3:4] == "-":
            line = self.line(timeout)
            if not line:
                self.transcript.append("S: (closes)")
                raise Closed("the server closed the connection in place of "
                             + (f"the reply to {readable(self.said[:70])}" if self.said else "a greeting"))
            self.raw += line
            lines.append(line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"))
            self.transcript += ["S: " + line for line in _lines(line)]
        reply = Reply("\n".join(lines))
        reply.command = self.said if command is None else command
        if reply.code == "421":
            raise Dismissed(f"the server ends the session: {reply.told}")
        if reply.code == "530" and reply.command[:4].upper() not in ("AUTH", "EHLO", "HELO", "NOOP", "RSET", "QUIT"):
            not_applicable(f"the server wants more before that: {reply.told}")     # RFC 3207 4, RFC 4954 6
        return reply

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
        except Ended:
            return replies
        return replies[:-1]

    def stays(self, line):
        """Says a line, and then NOOP: the connection has to be there for both."""
        try:
            self.say(line)
            self.say("NOOP")
        except Closed:
            fail(f"after {line} the server closes the connection")

    def closed(self, within):
        """Whether the server says no more and closes."""
        try:
            return not self.line(within)
        except Silent:
            return False

    def close(self):
        """Leaves, and waits until the server has left, too: it never has more of us than a test needs."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(5)
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(65536):
                pass
        self._sock.close()

    # The steps of a session.  A step that policy forbids ends the test as not applicable.

    def greet(self):
        self.greeting = self.reply()
        return self

    def welcomed(self):
        if self.greeting.code != "220":
            not_applicable(f"the server takes no session: {self.greeting.told}")
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
        not_applicable(f"the server refuses the session: {reply.told}")

    def shake_hands(self):
        """TLS, whoever the server is; returns what is in the way of it, or None.  What was said in plain
        and is not read yet is not read any more."""
        self._sock.settimeout(self.target.wait())
        try:
            self._sock = _unverified().wrap_socket(self._sock)
        except OSError as error:
            return getattr(error, "reason", None) or str(error)
        self._buffer = b""
        self.transcript.append("(from here on inside TLS)")
        return None

    def begin_tls(self):
        reply = self.say("STARTTLS")
        error = self.shake_hands() if reply.code == "220" else reply.told
        if error:
            not_applicable(f"TLS cannot be begun: {error}")

    def protect(self):
        """TLS, where it is offered: no password is sent in plain then."""
        if "STARTTLS" in self.extensions:
            self.begin_tls()
            self.introduce()

    def log_in(self):
        """AUTH PLAIN (RFC 4616), or LOGIN; returns the last reply."""
        user, password = self.target.user, self.target.password
        if user is None:
            not_applicable("nobody can log in: give --user and --password")
        mechanisms = [each.upper() for each in self.needs("AUTH")]
        if "PLAIN" in mechanisms:
            return self.say_secretly(b"AUTH PLAIN ", f"\0{user}\0{password}")
        if "LOGIN" not in mechanisms:
            not_applicable("neither PLAIN nor LOGIN is announced")
        reply = self.say("AUTH LOGIN")
        for word in user, password:
            if reply.code == "334":
                reply = self.say_secretly(b"", word)
        return reply

    def say_secretly(self, command, secret):
        """Sends a secret in base64, which no transcript shows; returns the reply to it."""
        self.send(command + base64.b64encode(secret.encode()) + b"\r\n", f"C: {command.decode()}...")
        self.said = "AUTH ..."
        return self.reply()

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

    def unlike(self, line, *controls):
        """The reply to a line.  A refusal of it counts only where another session shows that
        nothing else is refused: there the controls, which are like it in all but what
        is tried, are accepted.  Then no policy explains it, whatever its code."""
        reply = unless_later(self.say(line))
        if not reply.taken:
            other = self.target.session()
            for control in controls:
                answer = other.say(control)
                if not answer.taken:
                    not_applicable(f"the server refuses more than that, as it may: {answer.told}")
        return reply

    def begin(self, sender=None, recipients=(None,), parameters=""):
        """A transaction, as far as its last recipient."""
        for reply in [self.mail(sender, parameters), *(self.rcpt(path) for path in recipients)]:
            if not reply.taken:
                not_applicable(f"no transaction can be begun: {reply.told}")
        return self

    def data(self, **envelope):
        """A transaction, as far as 354: only where mail may be sent."""
        if self.target.recipient is None:
            not_applicable("no mail may be sent: name a recipient with --to")
        reply = unless_refused(self.begin(**envelope).say("DATA"))
        if reply.code != "354":
            not_applicable(f"no message is taken: {reply.told}")
        return self

    def transfer(self, content, **envelope):
        """A whole message; returns the reply to the final dot."""
        return self.data(**envelope).finish(content)

    def finish(self, content):
        """The message behind 354, dots stuffed; returns the reply to the final dot."""
        self.send(re.sub(rb"(\A|\r\n)\.", rb"\1..", content) + b".\r\n")
        return self.reply(".")

    def accepts(self, content):
        """Whether a whole message is accepted.  421 is a refusal, too."""
        self.data()
        try:
            return self.finish(content).taken
        except Dismissed:
            return False

    def offer(self, content):
        """The same of a message with something odd.  A refusal counts only where the server
        takes a message with nothing odd."""
        reply = unless_later(self.transfer(content))
        if not reply.taken:
            answer = self.target.session().transfer(letter())
            if not answer.taken:
                not_applicable(f"the server refuses any message, as it may: {answer.told}")
        return reply

    def deliver(self, content, **envelope):
        """A message as it arrived at the other end."""
        self.target.needs_sink()
        reply = self.transfer(content, **envelope)
        if not reply.taken:
            not_applicable(f"the message is refused: {reply.told}")
        self.rest()
        return self.target.delivered(content)


# ---- What is shown ---------------------------------------------------------------------------


def readable(text):
    """Text, or octets that may be UTF-8, as somebody can read them: what cannot be printed is
    written as an escape."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shortened(lines):
    return lines if len(lines) < 80 else [*lines[:30], f"... {len(lines) - 40} lines ...", *lines[-10:]]


def _lines(octets):
    """Octets as a transcript shows them."""
    lines = octets.split(b"\r\n")
    lines = _shortened(lines[:-1] if not lines[-1] else lines)
    lines = (line if isinstance(line, bytes) else line.encode() for line in lines)
    return [readable(line[:300]) + "..." * (len(line) > 300) for line in lines]


# ---- Messages --------------------------------------------------------------------------------

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
