"""A server that is correct, and unusual in one of the ways that the RFCs allow, to see what a client makes of it.

It keeps what each connection said, and what of that came before it may.
"""
import contextlib
import re
import select
import socket
import time
from typing import NamedTuple

from dialogue import _lines
from sink import Lines, Listener

PAUSE = 0.2         # seconds before each reply, in which a client has to wait
NAME = "unusual.example"


class Way(NamedTuple):
    """How it is unusual."""

    what: str
    extensions: tuple = ()
    replies: dict = {}          # {verb, "" for the greeting or "." for a message: reply}
    style: str = "{0} {1}"      # of all replies but that to EHLO: code and words
    slow: bool = False


WAYS = {
    "usual": Way("the usual extensions", ("PIPELINING", "SIZE 1000000", "8BITMIME")),
    "bare": Way("no extension"),
    "old": Way("no EHLO", replies={"EHLO": "500 what?"}),
    "lines": Way("several lines in each reply", ("PIPELINING",), style="{0}-{1}\r\n{0}-\r\n{0} {1}"),
    "wordless": Way("codes without words", style="{0}"),
    "strange": Way("unknown extensions, in any case", ("XYZZY", "xPlugh=1 2", "pipelining", "Size")),
    "codes": Way("codes that no RFC lists", replies={"MAIL": "259 fine", "RCPT": "257 fine", "DATA": "358 go on",
                                                     ".": "299 fine", "QUIT": "229 bye"}),
    "slow": Way("slow replies", slow=True),
    "mail": Way("not now, at MAIL", replies={"MAIL": "451 4.3.0 later"}),
    "rcpt": Way("not now, at RCPT", ("PIPELINING",), {"RCPT": "450 4.2.0 later"}),
    "data": Way("not now, at DATA", replies={"DATA": "451 4.3.0 later"}),
    "dot": Way("not now, at the end of the message", replies={".": "452 4.3.1 later"}),
    "busy": Way("no connection now", replies={"": "421 4.3.2 later"}),
}
USUAL = {"": f"220 {NAME}", "HELO": f"250 {NAME}", "MAIL": "250 fine", "RCPT": "250 fine", "DATA": "354 go on",
         ".": "250 fine", "RSET": "250 fine", "NOOP": "250 fine", "QUIT": "221 bye"}
LAST = {"", "EHLO", "HELO", "DATA", "QUIT", "NOOP", "VRFY", "EXPN"}     # of a group (RFC 2920 3.1)


class Heard:
    """What came over one connection."""

    def __init__(self):
        self.commands, self.replies, self.transcript = [], [], []
        self.octets = b""           # all of it
        self.content = None         # of the last message, dots stuffed
        self.early = []             # what was followed by more, or by the end, before it was answered
        self.left = ""              # the command behind whose reply the client left
        self.over = False

    @property
    def accepted(self):
        """Whether a message was taken."""
        return any(command == "." and reply[0] == "2" for command, reply in zip(self.commands, self.replies))

    def said(self, verb):
        return next((command for command in self.commands if command.upper().startswith(verb)), None)


class Unusual:
    """Listens at .host and .port until stop(); .way is how it is unusual just now."""

    def __init__(self, host, port, seconds):
        self.host, self.way, self.seconds, self.heard = host, WAYS["usual"], seconds, []
        self._listener = Listener(host, port, self._serve)
        self.port = self._listener.port

    def stop(self):
        self._listener.stop()

    def _serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard, way = Heard(), self.way
        self.heard.append(heard)
        with contextlib.suppress(OSError):
            self._converse(sock, Recorder(sock, heard), heard, way)
        heard.over = True

    def _converse(self, sock, lines, heard, way):
        line, code = "", ""
        while True:
            verb = line[:4].upper() if line != "." else "."
            reply = self._reply(verb, way)
            if verb == "DATA" and not any(command[:4].upper() == "RCPT" and each[0] == "2"
                                          for command, each in zip(heard.commands, heard.replies)):
                reply = "503 no recipient"
            time.sleep(self.seconds if way.slow else PAUSE)
            grouped = verb not in LAST and any(each.upper() == "PIPELINING" for each in way.extensions)
            if not grouped and (lines.buffer or has_more(sock, verb == "QUIT")):
                heard.early.append(line or "the greeting")
            code = reply[:3]
            heard.replies.append(reply)
            heard.commands.append(line)
            heard.transcript += ["S: " + each for each in reply.split("\r\n")]
            sock.sendall(reply.encode() + b"\r\n")
            heard.left = line
            if verb == "QUIT" or (line and code == "421"):
                return
            if verb == "DATA" and code[0] == "3":
                heard.content = lines.content()
                line = "."
                continue
            octets = lines.line()
            if octets is None:
                return
            line = octets.decode("latin-1")
            heard.transcript += ["C: " + each for each in _lines(octets)]

    @staticmethod
    def _reply(verb, way):
        if verb == "EHLO" and verb not in way.replies and way is not WAYS["busy"]:
            said = [NAME, *way.extensions]
            return "\r\n".join(["250-" + each for each in said[:-1]] + ["250 " + said[-1]])
        reply = way.replies.get(verb, USUAL.get(verb, "500 what?"))
        if way is WAYS["busy"] and verb != "QUIT":
            reply = way.replies[""]
        code, _, words = reply.partition(" ")
        # The greeting and the reply to HELO have a name in any case (4.2, 4.1.1.1).
        return reply if way is WAYS["wordless"] and verb in ("", "HELO") else way.style.format(code, words)


def has_more(sock, end):
    """Whether something is to be read; the end, if that counts."""
    return bool(select.select([sock], [], [], 0)[0]) and (end or sock.recv(1, socket.MSG_PEEK) != b"")


class Recorder(Lines):
    """Keeps what it reads."""

    def __init__(self, sock, heard):
        super().__init__(sock)
        self.heard = heard

    def line(self):
        line = super().line()
        self.heard.octets += self.buffer if line is None else line + b"\r\n"
        return line

    def content(self):
        content = []
        while True:
            line = self.line()
            if line is None:
                raise ConnectionAbortedError
            self.heard.transcript += ["C: " + each for each in _lines(line + b"\r\n")] if len(content) < 40 else []
            if line == b".":
                return b"".join(content)
            content.append(line + b"\r\n")


def bare(octets):
    """CR and LF that stand alone."""
    return re.findall(rb"[^\r\n]{0,20}(?:(?<!\r)\n|\r(?!\n))[^\r\n]{0,20}", octets)
