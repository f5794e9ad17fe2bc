"""The exchanger that a server under test relays to, so that the suite sees what arrives.

It takes all that it is given, is as liberal about it as RFC 5321 2.4 wants (verbs in any
case, blanks behind the colon), and ends lines by CRLF only, so that a stray CR or LF is seen.
"""
import contextlib
import re
import socket
import socketserver
import threading
import time


def wait_for(condition, timeout):
    """Calls `condition` until it returns something true, and returns that; None if it never does."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value or None
        time.sleep(0.01)


class Listener(socketserver.ThreadingTCPServer):
    """Calls `serve(socket)` in a thread of its own for every connection."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host, port, serve):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), lambda request, client, server: serve(request))
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Lines:
    """Reads a socket by lines, which CRLF alone ends."""

    def __init__(self, sock):
        self.sock, self.buffer = sock, b""

    def line(self):
        """The next one, without its CRLF; None at the end."""
        while b"\r\n" not in self.buffer:
            try:
                octets = self.sock.recv(65536)
            except OSError:
                octets = b""
            if not octets:
                return None
            self.buffer += octets
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line


class Message:
    """What came in one transaction."""

    def __init__(self, reverse_path):
        self.reverse_path = reverse_path    # all that stood behind FROM:, parameters included
        self.recipients = []                # such as "<b@example.net>"
        self.parameters = []                # what stood behind each of them
        self.raw = b""                      # the content as it came, dots stuffed

    @property
    def data(self):
        """The content as it was meant (RFC 5321 4.5.2)."""
        return re.sub(rb"(\A|\r\n)\.", rb"\1", self.raw)


class Sink:
    """Listens at .host and .port until stop(), and keeps what comes in .messages."""

    EXTENSIONS = ("PIPELINING", "SIZE", "8BITMIME", "DSN")

    def __init__(self, host, port=0, extensions=EXTENSIONS):
        self.host, self.extensions, self.messages = host, extensions, []
        self._listener = Listener(host, port, self._serve)
        self.port = self._listener.port

    def stop(self):
        self._listener.stop()

    def _serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            self._converse(sock, Lines(sock))

    def _converse(self, sock, lines):
        def say(*reply):
            sock.sendall("".join(line + "\r\n" for line in reply).encode())

        say("220 sink.example ESMTP")
        message = None
        while True:
            line = lines.line()
            if line is None:
                return
            text = line.decode("latin-1")
            verb = text[:4].upper()
            path = re.fullmatch(r"(?:MAIL FROM|RCPT TO): *(<[^>]*>|<.*?>(?= |$))(.*)", text, re.I)
            if verb == "EHLO":
                keywords = [f"250-{keyword}" for keyword in self.extensions]
                say("250-sink.example", *keywords[:-1], "250 " + self.extensions[-1])
            elif verb == "MAIL" and path:
                message = Message(path[1] + path[2])
                say("250 2.1.0 Ok")
            elif verb == "RCPT" and path and message:
                message.recipients.append(path[1])
                message.parameters.append(path[2])
                say("250 2.1.5 Ok")
            elif verb == "DATA" and message:
                say("354 go on")
                message.raw = self._content(lines)
                self.messages.append(message)       # first kept, then answered
                message = None
                say("250 2.0.0 Ok")
            elif verb == "QUIT":
                return say("221 2.0.0 Bye")
            elif verb in ("HELO", "RSET", "NOOP"):
                message = None if verb != "NOOP" else message
                say("250 sink.example")
            else:
                say("503 5.5.1 not here, or not in this form")

    @staticmethod
    def _content(lines):
        content = []
        while True:
            line = lines.line()
            if line is None:
                raise ConnectionAbortedError
            if line == b".":
                return b"".join(content)
            content.append(line + b"\r\n")
