"""A mail server with a fault of one's choice, to prove that the tests can fail.

    python3 tests/conformance/broken.py 4.1.1.5-a       one that RSET makes no impression on

Without a fault it does all that the tests ask, small as it is: it relays what it is
given at once, to a Sink.  With a fault it departs from just the requirement that the
fault is named after.  With one of TROUBLES it departs from none, and cannot be asked.
"""
import base64
import email.utils
import re
import smtplib
import socket
import socketserver
import ssl
import sys
import threading
import time

from dialogue import DOMAIN, LITERAL

NAME = "broken.example"
LIMIT = 100_000         # octets in a message
CROWD = 200             # recipients of one
HOPS = 100              # Received fields in one
ATOM = r"[\w!#$%&'*+/=?^`{|}~-]+"
LOCAL = rf'(?:{ATOM}(?:\.{ATOM})*|"(?:[ !#-\[\]-~]|\\[ -~])*")'
PATH = re.compile(rf"<((?:@{DOMAIN}(?:,@{DOMAIN})*:)?)({LOCAL}@(?:{DOMAIN}|{LITERAL}))>(.*)", re.A)
TRACE = "Received: from {helo} ([{client}])\r\n\tby broken.example with ESMTP id 1 for <{recipient}>;\r\n\t{date}\r\n"

# ---- The faults -----------------------------------------------------------------------------

# A wrong reply: where, and what.  Where is "state previous-verb>line".
REPLIES = {
    "2.2.1-a": (".*>EHLO.*", "500 5.5.1 what?"),
    "2.2.1-b": (".*>HELO.*", "500 5.5.1 what?"),
    "2.3.8-c": (".*>HELP", "214-2.0.0 help\n214 2.0.0 yourself"),
    "2.4-a": (".*>[a-z].*", "500 5.5.1 no small letters"),
    "2.4-c": (".*>MAIL FROM:<m.+ller@.*", "250 2.1.0 Ok"),
    "3.2-a": (".*>HELO.*", "250-broken.example\r\n250-SIZE 100000\r\n250 HELP"),
    "3.3-a": ("ready EHLO>RCPT TO:<Postmaster>", "501 5.5.1 not now"),
    "3.5.1-a": (".*>EXPN.*", "502 5.5.1 not here"),
    "3.5.1-b": (".*>VRFY .*@.*", "501 5.5.2 too much"),
    "3.5.1-c": (".*>VRFY postmaster", "250 2.1.5 somebody"),
    "3.5.2-a": (".*>VRFY postmaster", "250 2.1.5 postmaster@broken.example"),
    "3.5.2-b": (".*>VRFY postmaster", "250 2.1.5 <@a.example:postmaster@broken.example>"),
    "3.5.3-a": (".*>VRFY [^@]*", "250 2.1.5 <anybody@broken.example>"),
    "3.6.2-a": (".*>RCPT TO:<.*@elsewhere.example>", "554 5.7.1 no relaying"),
    "4.1.1-a": (r".*>.*\s", "501 5.5.2 space"),
    "4.1.1-b": (".*>RSET now", "250 2.0.0 Ok"),
    "4.1.1.1-b": (".*sIzE.*", "555 5.5.4 no such parameter"),
    "4.1.1.1-d": (".*>HELO .*", "250 Hello"),
    "4.1.1.2-a": (".*>MAIL FROM:<>.*", "501 5.1.7 nobody"),
    "4.1.1.3-a": (".*>RCPT TO:<@.*", "501 5.1.3 at"),
    "4.1.1.4-d": (r".*>\.", "252 2.0.0 perhaps"),
    "4.1.1.5-b": ("new .*>RSET", "550 5.5.1 not yet"),
    "4.1.1.8-b": (".*>HELP", "502 5.5.1 not here"),
    "4.1.1.9-a": (".*>NOOP", "252 2.0.0 Ok"),
    "4.1.1.9-c": (".*>NOOP .*", "501 5.5.2 what?"),
    "4.1.1.10-a": ("new .*>QUIT", "250 2.0.0 Bye"),
    "4.1.1.11-a": (".*>MAIL .* XYZZY=1", "501 5.5.4 what?"),
    "4.1.1.11-b": (".*>RCPT .* XYZZY=1", "501 5.5.4 what?"),
    "4.1.2-a": (r".*>MAIL FROM:<a\.b.*", "501 5.1.7 strange"),
    "4.1.2-b": ('.*>MAIL FROM:<".*', "501 5.1.7 strange"),
    "4.1.2-c": (".*>MAIL .*_score.*", "250 2.1.0 Ok"),
    "4.1.2-d": (".*>EHLO .*_score.*", "250 broken.example"),
    "4.1.3-a": (r".*>MAIL .*@\[IPv6.*", "501 5.1.7 new"),
    "4.1.3-b": (r".*>EHLO \[.*", "501 nameless"),
    "4.1.4-a": ("new .*>VRFY.*", "503 5.5.1 not yet"),
    "4.1.4-c": (".*>EHLO", "504 5.5.4 who?"),
    "4.1.4-e": (".*else>MAIL .*", "550 5.7.1 a liar"),
    "4.1.4-f": (".*>MAIL FROM:<a@b@.*", "504 5.1.7 two"),
    "4.1.4-h": ("new .*>MAIL .*", "501 5.5.1 not yet"),
    "4.2-a": (".* RSET>NOOP", "250 2.0.0 Ok\r\n250 2.0.0 Ok"),
    "4.2-b": (".*>EXPN.*", "650 2.1.5 postmaster@broken.example"),
    "4.2-c": (".*>XYZZY", "500 5.5.2 what?\a"),
    "4.2-d": ("new >", "220 -broken- ready"),
    "4.2-e": (".*>EXPN.*", "299 2.1.5 perhaps"),
    "4.2.1-a": (".*>HELP", "214-2.0.0 help\r\n211 2.0.0 yourself"),
    "4.2.1-b": (".*>XYZZY", "500"),
    "4.2.4-a": (".*>HELP", "502 5.5.1 not here"),
    "4.2.4-b": (".*>XYZZY", "502 5.5.1 not here"),
    "4.3.2-a": ("new >", "250 broken.example ready"),
    "4.3.2-b": (".*>EXPN.*", "451 4.3.0 later"),
    "4.5.1-a": (".*>VRFY.*", "502 5.5.1 not here"),
    "4.5.1-b": (".*>MAIL FROM:<nour@example.org>", "252 2.1.0 perhaps"),
    "4.5.1-c": ("mail .*>RCPT TO:<friend@example.net>", "252 2.1.5 perhaps"),
    "4.5.1-d": ("rcpt .*>DATA", "502 5.5.1 not here"),
    "4.5.1-e": ("(mail|rcpt) .*>RCPT TO:<Postmaster>", "501 5.1.3 no domain"),
    "4.5.1-f": (".*>RCPT TO:<pOsTMASTer>", "550 5.1.1 nobody"),
    "4.5.3.1.1-a": (".*>MAIL FROM:<a{60}.*", "501 5.1.7 too long"),
    "4.5.3.1.2-a": (".*>EHLO .{200}.*", "501 too long"),
    "4.5.3.1.3-a": (r".*>MAIL FROM:<a@x{49}\.x{49}.*", "501 5.1.7 too long"),
    "4.5.3.1.4-a": (".*>NOOP .{300}.*", "500 5.5.2 too long"),
    "4.5.3.1.5-a": (".*>XYZZY", "500 5.5.2 " + "what? " * 90),
    "7.3-a": (".*>VRFY postmaster", "550 5.1.1 nobody"),
    "1870-3-b": (".* SIZE=0{9}.*", "501 5.5.4 too long"),
    "1870-6.1-a": (f".* SIZE={LIMIT + 1}", "250 2.1.0 Ok"),
    "1870-6.3-a": (r"sized .*>\.", "552 5.3.4 too big after all"),
    "2034-4-a": (".*>XYZZY", "500 what?"),
    "2034-4-b": (".*>XYZZY", "500 4.5.2 what?"),
    "2034-4-c": (".*>HELP", "214-2.0.0 help\r\n214 2.0.1 yourself"),
    "2920-3.2-b": (r".* \.>RSET", ""),
    "3030-2-b": (".*>BDAT 0 LAST", "252 2.0.0 perhaps"),
    "3030-3-b": (".* BODY=BINARYMIME", "501 5.5.4 no"),
    "3207-4-a": (".*>STARTTLS now", "220 go on"),
    "3461-4.1-a": (".* NOTIFY=NEVER", "555 5.5.4 no such parameter"),
    "3461-4.2-a": (r".* ORCPT=rfc822;friend\+.*", "555 5.5.4 no such parameter"),
    "3461-4.3-a": (".* RET=FULL", "555 5.5.4 no such parameter"),
    "3461-4.4-a": (r".* ENVID=QQ314159\+.*", "555 5.5.4 no such parameter"),
    "4954-4-a": (".*>AUTH X-.*", "501 5.5.4 what?"),
    "4954-6-a": ("ready NOOP>RSET", "530 5.7.0 log in first"),
    "6531-3.3-a": (".*>MAIL FROM:<m[^a-z].* SMTPUTF8", "553 5.6.7 not in letters of ours"),
    "2920-3.2-c": ("ready MAIL>RCPT TO:<friend@.*", "250 2.1.5 Ok"),
    "6152-2-b": (".* BODY=8BITMIME", "501 5.5.4 seven are enough")}

# The transaction is forgotten where it must not be.
FORGETS = {
    "4.1.1.6-a": ".*>VRFY.*", "4.1.1.7-a": ".*>EXPN.*", "4.1.1.8-a": ".*>HELP", "4.1.1.9-b": ".*>NOOP",
    "4.1.4-d": ".*>EHLO", "4.1.4-i": "mail .*>DATA"}

# It is kept where it must not be.
KEEPS = {"4.1.1.4-e": r".*>\.", "4.1.1.5-a": "rcpt .*>RSET", "4.1.4-b": "rcpt .*>EHLO .*"}

# The connection is closed.
CLOSES = {"3.8-a": ".*>XYZZY", "4.1.1.5-c": ".* EHLO>RSET", "4.1.1.10-c": ".* EHLO>DATA"}

# The list of extensions: a part of it, and what stands there.
KEYWORDS = {
    "2.2.2-a": ("EXPN", "PLUGH\r\n250-EXPN"), "2.4-d": ("8BITMIME\r\n250-SMTPUTF8\r\n250-", ""),
    "3.5.1-a": ("-EXPN\r\n250", ""),
    "3.5.2-c": ("-EXPN\r\n250", ""), "4.1.1.1-a": ("broken.example", "broken_server.example"),
    "4.1.1.1-c": (" HELP", " EXPN"), "4.1.1.8-b": (" HELP", " EXPN"), "1870-3-a": (f"SIZE {LIMIT}", "SIZE unlimited"),
    "2034-3-a": ("STATUSCODES", "STATUSCODES 1"), "2920-2-a": ("PIPELINING", "PIPELINING 1"),
    "3030-2-a": ("CHUNKING", "CHUNKING yes"), "3030-3-a": ("BINARYMIME", "BINARYMIME yes"),
    "3207-2-a": ("STARTTLS", "STARTTLS yes"), "3461-4-a": ("DSN", "DSN yes"), "4954-3-a": ("AUTH", "AUTH plain+"),
    "6152-2-a": ("8BITMIME", "8BITMIME yes"), "6531-3.1-a": ("SMTPUTF8", "SMTPUTF8 yes"),
    "6531-3.1-b": ("8BITMIME\r\n250-", "")}

# What ends a message, beside CRLF.CRLF.
ENDS = {"4.1.1.4-a": rb"[^\r]\n\.\n", "4.1.1.4-c": rb"[^\r]\n\.\r\n"}

# What a message is refused for.
REFUSES = {"3.3-c": b"no field", "3.3-d": b"Resent-To", "3.7.2-a": b"Received: by hand",
           "4.5.3.1.7-a": b"x{62}\r\n" * 600, "6.3-a": rb"(?:Received: [^\r]*\r\n){50}"}

# Another trace field: what is replaced in it, and by what.
TRACES = {
    "4.4-a": ("Received", "X-Received"), "4.4-b": ("from {helo} ([{client}])\r\n\t", ""),
    "4.4-c": (" ([{client}])", ""), "4.4-d": ("by broken.example ", ""),
    "4.4-e": ("{date}", "Tue, 24 Nov 26 06:00:00 -0800"),
    "4.4-f": ("{date}", "Tue, 24 Nov 2026 14:00:00 GMT"),
    "4.4-g": ("for <{recipient}>", "for <{recipient}> <{recipient}>"),
    "4.4-i": ("ESMTP", "FTP"), "4.4-j": ("id 1", "id 1 mood good")}

# What is replaced in a message, the trace included.
CHANGES = {
    "3.6.3-a": (rb"(\r\n)+\Z", b"\r\n"), "4.4-h": (rb"Received: from far(.*\r\n\s)*.*\r\n", b""),
    "4.5.2-a": (rb"(?<=\n)\.\.(?=\r\n)", b"..."), "4.5.2-b": (rb"[\x01-\x08]", b"?"),
    "4.5.3.1.6-a": (rb"(?<=[xy]{990})[xy]+", b""),
    "6.4-a": (rb"(?=From: nour\r\n)", b"Date: Tue, 24 Nov 2026 06:00:00 +0000\r\n"),
    "7.2-b": (rb"(?=From: nour@example.org\r\nDate)", b"Apparently-To: x\r\n"), "6152-3-a": (rb"[\x80-\xff]", b"?")}

# And what takes a line or two in the server itself.
OTHERS = {"2.3.8-a", "2.3.8-b", "2.4-b", "3.1-a", "3.1-b", "3.3-b", "4.1.1.3-b", "4.1.1.3-c", "4.1.1.4-b", "4.1.1.10-b",
          "4.1.1.10-d", "4.1.1.10-e", "4.1.4-g", "4.2.5-a", "4.5.3.1.8-a", "4.5.3.1.10-a", "4.5.3.2.7-a", "4.5.4.2-a",
          "4.5.5-a", "6.3-b", "7.2-a", "1870-4-a", "1870-6-a", "2920-3.2-a", "2920-3.2-f", "2920-3.2-g", "3030-2-c",
          "3030-2-d", "3030-2-e", "3030-3-c", "3207-4-b", "3207-4.2-a", "3207-4.2-b", "3207-4.2-c", "3207-4.2-d",
          "3461-5.2.1-a", "4954-4-b", "4954-4-c", "4954-4-d", "4954-4-e", "4954-4-f", "4954-4-g"}

FAULTS = set().union(REPLIES, FORGETS, KEEPS, CLOSES, KEYWORDS, ENDS, REFUSES, TRACES, CHANGES, OTHERS)

# What keeps a server from being asked, and is no departure.
TROUBLES = {
    "silent": "it answers no MAIL", "gone": "it closes the connection in place of a reply to MAIL",
    "full": "it greets with 421", "strict": "it says 421 to the second error of a session",
    "shy": "it wants a password first", "slow": "it answers MAIL after half a second",
    "deaf": "it takes no message further"}

# Where two requirements say the same of one thing, both tests see it.
SEEN_BY = {"4.2.4-a": {"4.2.4-a", "4.1.1.8-b"}, "6531-3.1-b": {"6531-3.1-b", "2.4-d"}}


# ---- The server -----------------------------------------------------------------------------


class Broken(socketserver.ThreadingTCPServer):
    """Listens at .port.  `sink` is the port of the Sink that it relays to; `certificate` a file with
    a key and a certificate, without which it has no TLS; with `tls` it has nothing else."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, fault=None, sink=None, port=0, certificate=None, tls=False):
        if fault not in FAULTS | set(TROUBLES) | {None}:
            raise ValueError(f"no such fault: {fault}; there are {' '.join(sorted(FAULTS | set(TROUBLES)))}")
        super().__init__(("127.0.0.1", port), Session)
        self.fault, self.sink, self.port = fault, sink, self.server_address[1]
        self.sessions, self.context, self.tls = [], None, tls
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Session(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        self.helo, self.previous, self.queue, self.pending, self.held = None, "", [], [], ""
        self.errors, self.last, self.early = 0, "", ""
        self.tls, self.user = False, None
        if self.server.tls:
            self.state = "new"
            self.begin_tls()
        self.reset()
        crowded = self.has("4.5.4.2-a") and any(session.state == "rcpt" for session in self.server.sessions)
        self.server.sessions.append(self)
        crowded = crowded or self.has("full")
        try:
            self.converse("421 4.3.2 one at a time" if crowded else "220 broken.example ESMTP")
        except ConnectionError:
            pass
        self.server.sessions.remove(self)

    def has(self, *faults):
        return self.server.fault in faults

    def hits(self, table, where):
        """Whether the fault stands in the table, and this is the place for it."""
        entry = table.get(self.server.fault)
        return entry is not None and re.fullmatch(entry if isinstance(entry, str) else entry[0], where, re.S)

    # Lines in, replies out.

    def converse(self, greeting):
        if self.client_address[0] != "127.0.0.1":
            return self.turn_away()
        self.say(greeting, "new >")
        going_on = greeting[0] == "2"
        while going_on:
            try:
                line = self.next_line()
            except socket.timeout:
                return self.say("421 4.4.2 too slow", "")
            going_on = line is not None and self.serve(line)
        return None

    def turn_away(self):
        self.say("554 broken.example takes no mail from there", "")
        if self.has("3.1-a"):
            return
        while self.next_line() not in ("QUIT", None):
            self.say("250 2.0.0 Ok" if self.has("3.1-b") else "503 5.5.1 never", "")
        self.say("221 2.0.0 Bye", "")

    def say(self, reply, where):
        if self.hits(REPLIES, where):
            reply = REPLIES[self.server.fault][1]
        if self.has("2920-3.2-a") and where == "rcpt RCPT>RCPT TO:<":
            self.held = reply + "\r\n"
        elif self.has("2920-3.2-f") and where == "ready RSET>RSET":
            self.early = reply + "\r\n"
        elif reply:
            self.wfile.write((self.early + reply + "\r\n" + self.held).encode())
            self.held = self.early = ""

    def next_line(self):
        """Without its CRLF; None at the end."""
        if self.has("4.5.3.2.7-a"):
            self.connection.settimeout(0.1)
        while not self.queue:
            line = b""
            while not line.endswith(b"\r\n"):
                more = self.rfile.readline()
                if not more:
                    return None
                line += more
            separator = {"2.3.8-a": b"\n", "2.3.8-b": b"\r"}.get(self.server.fault, b"\r\n")
            self.queue = line[:-2].split(separator)
        return self.queue.pop(0).decode("latin-1")

    def serve(self, line):
        """Obeys a line.  False: that was the last."""
        before, where = self.state, f"{self.state} {self.previous}>{line}"
        self.previous = line.strip()[:4].upper()
        if self.has("slow") and self.previous == "MAIL":
            time.sleep(0.5)
        if self.has("silent", "gone") and self.previous == "MAIL":
            return self.has("silent")
        reply = self.obey(line.rstrip(" \t"))
        self.errors += reply[0] == "5"
        if self.has("strict") and self.errors == 2:
            self.say("421 4.7.0 too many errors", "")
            return False
        if self.hits(FORGETS, where):
            self.reset()
        if self.hits(KEEPS, where):
            self.state = before
        self.say(reply, where)
        self.last = reply
        if reply.startswith("354"):
            return self.take_content()
        if reply.startswith("220"):
            return self.begin_tls()
        return not self.hits(CLOSES, where) and (reply[:3] != "221" or self.has("4.1.1.10-b"))

    def obey(self, line):
        verb, _, argument = line.partition(" ")
        command = getattr(self, "do_" + verb.lower(), None)
        international = re.fullmatch("(MAIL|RCPT) .*SMTPUTF8", line)
        if not command or not (re.fullmatch("[ -~]*", line) or international):
            return "500 5.5.2 what?"
        return command(argument)

    # The commands: argument in, reply out.

    def reset(self):
        self.state = "ready" if self.helo else "new"
        self.sender, self.route, self.recipients, self.size = None, "", [], None
        self.binary, self.chunks, self.parameters, self.notify = False, [], "", []

    def do_ehlo(self, name):
        if not re.fullmatch(f"{DOMAIN}|{LITERAL}", name):
            return "501 who?"
        self.helo = name
        self.previous = "else" if name == "somebody-else.example" else self.previous
        if not (self.has("3207-4.2-b") and self.tls):
            self.reset()
        keywords = ["PIPELINING", f"SIZE {LIMIT}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "AUTH PLAIN LOGIN",
                    "CHUNKING", "BINARYMIME", "DSN", "EXPN", "HELP"]
        if self.server.context and (not self.tls or self.has("3207-4.2-c")):
            keywords.insert(0, "STARTTLS")
        lines = ["broken.example", *keywords]
        reply = "\r\n".join(["250-" + line for line in lines[:-1]] + ["250 " + lines[-1]])
        return reply.replace(*KEYWORDS.get(self.server.fault, ("", "")))

    def do_helo(self, name):
        return self.do_ehlo(name).partition("\r\n")[0].replace("-", " ", 1)

    def do_mail(self, argument):
        if self.has("shy") and not self.user:
            return "530 5.7.0 log in first"
        if self.state != "ready":
            return "503 5.5.1 not now"
        found = PATH.fullmatch(re.sub("[^\0-~]+", "x", argument[5:].replace("<>", "<nobody@null>", 1)))
        if argument[:5].upper() != "FROM:" or not found:
            self.state = "mail" if self.has("4.1.4-g") and argument == "FROM:<" else "ready"
            return "501 5.5.2 from whom?"
        for word in found[3].split():
            size = re.fullmatch(r"SIZE=(\d{1,20})", word, re.I)
            if size and int(size[1]) > LIMIT:
                return "552 5.3.4 too big"
            if not size and not re.fullmatch(r"BODY=(7BIT|8BITMIME|BINARYMIME)|SMTPUTF8|RET=(FULL|HDRS)|ENVID=\S+",
                                             word, re.I):
                return "555 5.5.4 no such parameter"
            self.binary = self.binary or word == "BODY=BINARYMIME"
            self.parameters += " " + word if re.match("RET|ENVID", word) else ""
            self.size = int(size[1]) if size else self.size
        self.state, self.sender = "mail", found[2].replace("nobody@null", "")
        return "250 2.1.0 Ok"

    def do_rcpt(self, argument):
        if self.state not in ("mail", "rcpt"):
            return "503 5.5.1 not now"
        found = PATH.fullmatch(re.sub("(?i)^TO:<postmaster>", f"TO:<postmaster@{NAME}>", argument)[3:])
        if argument[:3].upper() != "TO:" or not found:
            return "501 5.5.2 to whom?"
        if not re.fullmatch(r"( (NOTIFY=[A-Z,]+|ORCPT=\S+))*", found[3]):
            return "555 5.5.4 no such parameter"
        if found[2].endswith("@elsewhere.example"):
            return "550 5.7.1 no relaying"
        if len(self.recipients) == (50 if self.has("4.5.3.1.8-a") else CROWD):
            return f"{552 if self.has('4.5.3.1.10-a') else 452} 4.5.3 too many"
        self.state, self.route = "rcpt", found[1]
        self.recipients.append((found[1] if self.has("4.1.1.3-b") else "") + found[2])
        self.notify.append(found[3])
        return "250 2.1.5 Ok"

    def do_data(self, argument):
        if argument:
            return "501 5.5.4 DATA"
        if (self.chunks and not self.has("3030-2-d")) or (self.binary and not self.has("3030-3-c")):
            return "503 5.5.1 BDAT"
        if self.has("2920-3.2-g") and self.last[0] == "5":
            return "503 5.5.1 not after that"
        if self.state == "rcpt" or (self.state == "mail" and self.has("3.3-b")):
            return "354 go on"
        return "503 5.5.1 not now"

    def do_rset(self, argument):
        if argument:
            return "501 5.5.4 RSET"
        self.reset()
        return "250 2.0.0 Ok"

    def do_noop(self, argument):
        return "250 2.0.0 Ok"

    def do_quit(self, argument):
        for message in self.pending:
            self.relay(*message)
        return "501 5.5.4 QUIT" if argument else "221 2.0.0 Bye"

    def do_vrfy(self, argument):
        if argument == "postmaster":
            return f"250 2.1.5 <postmaster@{NAME}>"
        return "252 2.1.5 perhaps" if "@" in argument else "550 5.1.1 nobody"

    def do_expn(self, argument):
        return f"250 2.1.5 <postmaster@{NAME}>"

    def do_help(self, argument):
        return "214-2.0.0 help\r\n214 2.0.0 yourself"

    # Extensions.

    def do_starttls(self, argument):
        if not self.server.context:
            return "502 5.5.1 not here"
        if self.has("3207-4.2-d"):
            self.connection.setblocking(False)      # what has come by now came before the handshake
            self.queue = self.rfile.peek().split(b"\r\n")[:-1]
            self.connection.setblocking(True)
        return "501 5.5.4 STARTTLS" if argument else "503 5.5.1 again?" if self.tls else "220 2.0.0 go on"

    def begin_tls(self):
        if self.has("3207-4-b"):
            return False
        try:
            self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        except OSError:
            return False
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.tls, self.user = True, None
        if not (self.has("3207-4.2-a") or (self.has("3207-4.2-b") and self.state == "rcpt")):
            self.helo = None
            self.reset()
        return True

    def do_auth(self, argument):
        mechanism, _, response = argument.partition(" ")
        inside = self.state in ("mail", "rcpt") and not self.has("4954-4-d")
        if inside or (self.user and not self.has("4954-4-f")):
            return "503 5.5.1 not now"
        if mechanism.upper() not in ("PLAIN", "LOGIN"):
            return "504 5.5.4 no such mechanism"
        words = [response] if response else []
        while len(words) < (2 if mechanism.upper() == "LOGIN" else 1):
            self.say("334 ", "")
            words.append(self.next_line() or "*")
            if words[-1] == "*":
                return "535 5.7.8 no star" if self.has("4954-4-b") else "501 5.7.0 as you like"
        try:
            words = [base64.b64decode(word, validate=True).decode() for word in words]
        except ValueError:
            return "535 5.7.8 no" if self.has("4954-4-c") else "501 5.5.2 no base64"
        if words not in (["\0nour\0secret"], ["nour", "secret"]):
            return "550 5.7.1 no" if self.has("4954-4-g") else "535 5.7.8 no"
        self.user = "nour"
        return "250 2.7.0 in" if self.has("4954-4-e") else "235 2.7.0 in"

    def do_bdat(self, argument):
        size, last = re.fullmatch(r"(\d+)( LAST)?", argument, re.I).groups()
        if self.state != "rcpt" and self.has("3030-2-e"):
            return "503 5.5.1 not now"
        chunk = self.rfile.read(int(size))
        if self.state != "rcpt":
            return "503 5.5.1 not now"
        self.chunks.append(chunk)
        if last:
            content = b"".join(self.chunks)
            self.relay(self.sender, self.recipients,
                       re.sub(rb"(\A|\n)\.", rb"\1", content) if self.has("3030-2-c") else content,
                       self.parameters, self.notify)
            self.reset()
        return "250 2.0.0 Ok"

    # The message.

    def take_content(self):
        """From 354 to the final dot.  False: the client has gone."""
        content = b""
        while not self.ends(content):
            line = self.rfile.readline()
            if not line:
                if self.has("4.1.1.10-d"):
                    self.relay(self.sender, self.recipients, content, self.parameters, self.notify)
                return False
            content += line
        content = re.sub(rb"(\A|\n)\.", rb"\1", re.sub(rb"\.\r?\n\Z", b"", content))
        refusal = self.judge(content)
        where = f"{'sized' if self.size else self.state} DATA>{'!' if refusal else '.'}"
        if not refusal or self.has("4.2.5-a"):
            message = self.sender, self.recipients, content, self.parameters, self.notify
            if self.has("4.1.1.10-e"):
                self.pending.append(message)
            else:
                self.relay(*message)
        if not self.hits(KEEPS, where):
            self.reset()
        self.previous = "."
        self.say(refusal or "250 2.0.0 Ok", where)
        return True

    def ends(self, content):
        if self.has("1870-6-a") and self.size and len(content) >= self.size and content.endswith(b"\r\n"):
            return True
        end = ENDS.get(self.server.fault)
        return content == b".\r\n" or content.endswith(b"\r\n.\r\n") or (end and re.search(end + rb"\Z", content))

    def judge(self, content):
        """What is to be said against it."""
        if re.search(rb"(?<!\r)\n|\r(?!\n)", content) and not self.has("4.1.1.4-b"):
            return "550 5.5.2 bare CR or LF"
        if len(content) > LIMIT and not self.has("1870-4-a"):
            return "552 5.3.4 too big"
        if content.count(b"Received:") > HOPS and not self.has("6.3-b"):
            return "554 5.4.6 a loop"
        refused = REFUSES.get(self.server.fault)
        return "552 5.6.0 not this one" if refused and re.search(refused, content) else None

    def relay(self, sender, recipients, content, parameters, notify):
        if self.server.sink is None or not recipients or self.has("deaf"):
            return
        fault = self.server.fault
        trace = TRACE.replace(*TRACES.get(fault, ("", ""))).format(
            helo=self.helo, client=self.client_address[0], recipient=recipients[0],
            date=email.utils.formatdate(localtime=True))
        message = trace.encode() + re.sub(rb"\r?\n", b"\r\n", content)
        message = re.sub(*CHANGES.get(fault, (b"", b"")), message)
        if self.has("7.2-a"):
            message = f"X-Envelope-To: {', '.join(recipients)}\r\n".encode() + message
        if self.has("2.4-b"):
            recipients = [recipient.lower() for recipient in recipients]
        if self.has("4.5.5-a"):
            sender = sender or f"postmaster@{NAME}"
        if self.has("4.1.1.3-c"):
            sender = self.route + sender
        with smtplib.SMTP("127.0.0.1", self.server.sink, local_hostname="broken.example", timeout=20) as client:
            client.ehlo()
            told = not self.has("3461-5.2.1-a")
            client.docmd("MAIL", f"From:<{sender}>" + parameters * told)
            for recipient, more in zip(recipients, notify):
                client.docmd("RCPT", f"To:<{recipient}>" + more * told)
            client.data(message)


if __name__ == "__main__":
    print(f"127.0.0.1:{Broken(*sys.argv[1:2]).port}", flush=True)
    threading.Event().wait()
