"""The lab: everything the relay meets in the world, on this machine's loopback.

    Nameserver   a DNS server whose zone is written by the test
    Authority    signs the certificates of exchangers that speak TLS
    Exchanger    an SMTP server that records what it is told, and misbehaves on demand
    Relay        the program itself, as a process of its own
    Client       somebody with mail to send

All of it is real: real sockets, real packets, real processes.  So a test says
what the relay would see and looks at what it does, and knows nothing of its
inside.  Nothing here needs more than Python's standard library.

Nothing here waits for a fixed time either: on a busy machine any time is too
short, and on an idle one it is wasted.  wait_for() waits for what is meant.
"""
import base64
import contextlib
import errno
import ipaddress
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("SMTP", ROOT / "smtp")).resolve()
OPENSSL = shutil.which("openssl")
HOSTNAME = "relay.example.org"      # what every Relay calls itself
EMULATED = "EMULATED" in os.environ     # it is another machine's, and runs in an emulator
WATCHED = EMULATED or "SANITIZED" in os.environ or BINARY.name == "valgrind"    # its memory is then its watcher's, too
PROC = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def wait_for(condition, timeout=20, what="what was waited for"):
    """Calls `condition` until it returns something true, and returns that."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout} seconds")
        time.sleep(0.01)


class _Server:
    """Calls `serve(request, client)` in a thread of its own for every request."""

    daemon_threads = True
    block_on_close = False          # whoever still waits for a delay is left behind

    def __init__(self, host, port, serve):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), lambda request, client, server: serve(request, client))
        self.port = self.server_address[1]

    def run(self):
        # The interval is how long stop() may take; requests are served at once.
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class _TCPServer(_Server, socketserver.ThreadingTCPServer):
    """A request is the socket of a connection."""

    allow_reuse_address = True      # a port that was just left can be taken again
    request_queue_size = 128


class _UDPServer(_Server, socketserver.ThreadingUDPServer):
    """A request is a packet, and the socket to answer it from."""


# ---- DNS -----------------------------------------------------------------------
#
# The functions build the pieces of an answer (RFC 1035 4.1).  The Nameserver is
# made of them, and so are the hostile answers of the tests.

TYPES = {"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "MX": 15, "AAAA": 28, "OPT": 41}
TYPE_NAMES = {number: name for name, number in TYPES.items()}

RESPONSE = 0x8180       # flags of a usual answer: recursion desired, and available
AUTHORITATIVE = 0x0400  # the flag AA
TRUNCATED = 0x0200      # the flag TC: the rest is to be had over TCP
RECURSION_AVAILABLE = 0x0080    # the flag RA
TO_QUESTION = b"\xc0\x0c"   # a pointer to the name in the question


def header(id, flags=RESPONSE, questions=1, answers=0, authority=0, additional=0):
    return struct.pack("!6H", id, flags, questions, answers, authority, additional)


def encode_name(name, at=0, seen=None):
    """A name as it goes over the wire; "" is the root.

    `seen` says where in the packet names already stand.  What is found in it
    becomes a pointer (4.1.4); what is not is entered, as standing `at` here.
    """
    wire = b""
    labels = name.split(".") if name else []
    for i, label in enumerate(labels):
        rest = ".".join(labels[i:]).lower()
        if seen is not None:
            if rest in seen:
                return wire + struct.pack("!H", 0xC000 | seen[rest])
            if at + len(wire) < 0x4000:     # a pointer reaches no further
                seen[rest] = at + len(wire)
        wire += bytes([len(label)]) + label.encode("latin-1")
    return wire + b"\0"


def record(owner, type, data, ttl=60, size=None):
    """A resource record.  `owner` is a name, or bytes that are one already, such
    as TO_QUESTION; `size` is the length to claim in place of that of `data`."""
    if isinstance(owner, str):
        owner = encode_name(owner)
    size = len(data) if size is None else size
    return owner + struct.pack("!HHIH", TYPES[type], 1, ttl, size) + data


def query_id(query):
    return int.from_bytes(query[:2], "big")


def question(query):
    """The bytes of a query's question, for an answer to repeat."""
    at = 12
    while query[at]:
        at += 1 + query[at]
    return query[12:at + 5]     # the name's last octet, type and class


class Query(NamedTuple):
    """A query as the Nameserver saw it."""

    name: str               # in lower case
    type: str               # "MX"; the number where TYPES has no name for it
    transport: str          # "udp" or "tcp"
    client_port: int
    id: int
    edns_size: Optional[int]    # what the client says it takes; None: no OPT record


def parse_query(query, transport, client_port):
    asked = question(query)
    labels, rest = [], asked
    while rest[0]:
        labels.append(rest[1:1 + rest[0]].decode("latin-1").lower())
        rest = rest[1 + rest[0]:]
    number = int.from_bytes(asked[-4:-2], "big")
    # OPT is the only record that a client adds: root, type 41, and in the place
    # of the class the size (RFC 6891 6.1.2).
    opt = query[12 + len(asked):]
    edns_size = int.from_bytes(opt[3:5], "big") if opt[:3] == b"\0\0\x29" else None
    return Query(".".join(labels), TYPE_NAMES.get(number, str(number)), transport,
                 client_port, query_id(query), edns_size)


class Nameserver:
    """A DNS server, over UDP and TCP, that knows what the test tells it.

    A name it has no record of does not exist (NXDOMAIN).  What delay(), drop()
    and the like say of a name is for queries of every type, or of the one given.

    `flags` are those of its answers; the code and TC are added.
    """

    def __init__(self, host="127.0.0.1", port=0):
        self.queries = []       # a Query for each that came, in order
        self.flags = RESPONSE
        self._zone = {}         # name: {type: [value, ...]}
        self._alone = {}        # alias: whether its answer stops there
        self._ways = {}         # (way, name, type or None): how to answer oddly
        self._counting = threading.Lock()   # queries for A and AAAA come at once
        self._udp, self._tcp = self._bind(host, port)
        self.address = f"[{host}]:{self._tcp.port}" if ":" in host else f"{host}:{self._tcp.port}"
        self._udp.run()
        self._tcp.run()

    def _bind(self, host, port):
        """UDP and TCP on one port; one that is free for both may take some tries."""
        for _ in range(50):
            tcp = _TCPServer(host, port, self._serve_tcp)
            try:
                return _UDPServer(host, tcp.port, self._serve_udp), tcp
            except OSError as error:
                tcp.server_close()
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, "no port is free for both UDP and TCP")

    def stop(self):
        self._udp.stop()
        self._tcp.stop()

    # The zone.  Each call replaces what the name had of that type.

    def _set(self, name, type, values):
        self._zone.setdefault(name.lower(), {})[type] = list(values)

    def a(self, name, *addresses):
        self._set(name, "A", addresses)

    def aaaa(self, name, *addresses):
        self._set(name, "AAAA", addresses)

    def mx(self, name, *exchangers):
        """dns.mx("example.net", (10, "mx1.example.net"), (20, "mx2.example.net"))"""
        self._set(name, "MX", exchangers)

    def null_mx(self, name):
        """The domain takes no mail (RFC 7505)."""
        self.mx(name, (0, ""))

    def cname(self, alias, target, alone=False):
        """`alone`: the answer stops at the alias, and the client has to ask again."""
        self._set(alias, "CNAME", [target])
        self._alone[alias.lower()] = alone

    def mail(self, domain, *exchangers):
        """MX and address records at once: dns.mail("example.net", (10, near), (10, far))"""
        self.mx(domain, *((preference, exchanger.name) for preference, exchanger in exchangers))
        for _, exchanger in exchangers:
            publish = self.aaaa if ":" in exchanger.host else self.a
            publish(exchanger.name, exchanger.host)

    # Oddities.

    def _odd(self, way, name, type, value):
        self._ways[way, name.lower(), type] = value

    def rcode(self, name, code, type=None):
        """Answers with a code and no records: 2 SERVFAIL, 3 NXDOMAIN, 5 REFUSED.
        With 0, a name without records exists all the same."""
        self._odd("rcode", name, type, code)

    def delay(self, name, seconds, type=None):
        self._odd("delay", name, type, seconds)

    def drop(self, name, times=float("inf"), type=None):
        """Leaves the next queries, or all of them, without an answer."""
        self._odd("drop", name, type, times)

    def truncate(self, name, type=None):
        """Over UDP nothing but TC; over TCP the whole answer."""
        self._odd("truncate", name, type, True)

    def dislike_opt(self, name, code=None, type=None):
        """Answers queries with an OPT record with this code, or not at all."""
        self._odd("opt", name, type, "silence" if code is None else code)

    def authority(self, name, *records, type=None):
        """What stands in the authority section of its answers:
        dns.authority("example.net", ("example.net", "NS", "ns.example.net"))"""
        self._odd("authority", name, type, records)

    def raw(self, name, answer, type=None):
        """`answer(query)` takes and returns bytes; of a list or a generator each is sent."""
        self._odd("raw", name, type, answer)

    def _way(self, way, query):
        """What was said of this name and type, else of the name, as (key, value)."""
        for key in ((way, query.name, query.type), (way, query.name, None)):
            if key in self._ways:
                return key, self._ways[key]
        return None, None

    # Answering.

    def _serve_udp(self, request, client):
        packet, sock = request
        for answer in self._answers(packet, "udp", client[1]):
            with contextlib.suppress(OSError):      # stopped meanwhile
                sock.sendto(answer, client)

    def _serve_tcp(self, sock, client):
        with sock.makefile("rb") as stream, contextlib.suppress(OSError):
            while True:
                length = stream.read(2)     # goes before each message (4.2.2)
                if len(length) < 2:
                    return
                packet = stream.read(int.from_bytes(length, "big"))
                for answer in self._answers(packet, "tcp", client[1]):
                    sock.sendall(struct.pack("!H", len(answer)) + answer)

    def _answers(self, packet, transport, client_port):
        if packet[2] & 0x80:
            return []       # no query: another test floods a port with answers that was its client's
        query = parse_query(packet, transport, client_port)
        self.queries.append(query)
        with self._counting:
            key, left = self._way("drop", query)
            if left:
                self._ways[key] = left - 1
                return []
        disliked = self._way("opt", query)[1] if query.edns_size is not None else None
        if disliked == "silence":
            return []
        if disliked is not None:
            return [header(query.id, self.flags | disliked) + question(packet)]
        time.sleep(self._way("delay", query)[1] or 0)
        raw = self._way("raw", query)[1]
        if raw:
            answer = raw(packet)
            return [answer] if isinstance(answer, bytes) else answer
        return [self._answer(packet, query)]

    def _answer(self, packet, query):
        rcode, found = self._look_up(query)
        authority = self._way("authority", query)[1] or ()
        flags = self.flags | rcode
        opt = b"" if query.edns_size is None else struct.pack("!BHHIH", 0, TYPES["OPT"], 1232, 0, 0)
        asked = question(packet)
        seen = {}
        encode_name(query.name, 12, seen)       # where the question has it
        records = b""
        for owner, type, value in (*found, *authority):
            at = 12 + len(asked) + len(records)
            name = encode_name(owner, at, seen)
            data_at = at + len(name) + 10       # behind type, class, time to live, length
            records += record(name, type, self._encode(type, value, data_at, seen))
        limit = max(512, query.edns_size or 0)
        whole = 12 + len(asked) + len(records) + len(opt)
        if query.transport == "udp" and (whole > limit or self._way("truncate", query)[1]):
            flags, found, authority, records = flags | TRUNCATED, [], (), b""
        return header(query.id, flags, 1, len(found), len(authority), 1 if opt else 0) + asked + records + opt

    def _look_up(self, query):
        """The answer's code and its records, as (owner, type, value)."""
        rcode = self._way("rcode", query)[1]
        if rcode:
            return rcode, []
        found, name = [], query.name
        while "CNAME" in self._zone.get(name, {}) and query.type != "CNAME":
            if any(owner == name for owner, _, _ in found):
                return 0, found         # the chain bites its tail
            target = self._zone[name]["CNAME"][0]
            found.append((name, "CNAME", target))
            if self._alone[name]:
                return 0, found
            name = target.lower()
        if name not in self._zone and rcode is None:
            return 3, found
        values = self._zone.get(name, {}).get(query.type, [])
        return 0, found + [(name, query.type, value) for value in values]

    @staticmethod
    def _encode(type, value, at, seen):
        if type == "MX":
            preference, exchanger = value
            return struct.pack("!H", preference) + encode_name(exchanger, at + 2, seen)
        if type in ("CNAME", "NS"):
            return encode_name(value, at, seen)
        if type == "SOA":       # `value` is the primary name server
            names = encode_name(value, at, seen)
            return names + encode_name("hostmaster." + value, at + len(names), seen) + struct.pack("!5I", 1, 2, 3, 4, 5)
        return ipaddress.ip_address(value).packed


# ---- SMTP, the exchangers' side --------------------------------------------------


class Wire:
    """A socket that is read by lines.  Only CRLF ends a line, as RFC 5321 2.3.8
    has it, so that a stray CR or LF of the relay's is seen and not smoothed over."""

    def __init__(self, sock):
        self.sock = sock
        self.chunks = []            # the bytes as recv() returned them
        self._buffer = bytearray()

    def line(self):
        """The next line as bytes, without its CRLF; None when there is no more."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[:end + 2]
                return line
            if not self.receive():
                return None

    def receive(self):
        """Waits for more; false when the other side has closed."""
        try:
            chunk = self.sock.recv(65536)
        except ConnectionResetError:
            return False
        if chunk:
            self.chunks.append(chunk)
            self._buffer += chunk
        return bool(chunk)

    def send(self, data):
        self.sock.sendall(data)


class Authority:
    """Signs certificates, by openssl(1); `pem` is the file for SSL_CERT_FILE of all who trust it."""

    KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")

    def __init__(self, directory):
        self._directory = Path(directory)
        self.pem, self._key, self._count = self._directory / "authority.pem", self._directory / "authority.key", 0
        self._openssl("req", "-x509", *self.KEY, "-keyout", self._key, "-out", self.pem, "-days", "2",
                      "-subj", "/CN=The lab's authority")

    def _openssl(self, *arguments):
        subprocess.run([OPENSSL, *map(str, arguments)], cwd=self._directory, check=True, capture_output=True)

    def certificate(self, *names, days=2):
        """For these names and addresses; with negative `days` it has expired.  Returns the path of a
        file with the key and the certificate."""
        self._count += 1
        key, request, names_file, pem = (self._directory / f"{self._count}.{kind}"
                                         for kind in ("key", "request", "names", "pem"))
        kinds = ["IP" if name[-1].isdigit() or ":" in name else "DNS" for name in names]
        names_file.write_text("subjectAltName=" + ",".join(map(":".join, zip(kinds, names))))
        self._openssl("req", *self.KEY, "-keyout", key, "-out", request, "-subj", f"/CN={names[0]}")
        self._openssl("x509", "-req", "-in", request, "-CA", self.pem, "-CAkey", self._key, "-CAcreateserial",
                      "-days", days, "-extfile", names_file, "-out", pem)
        pem.write_text(key.read_text() + pem.read_text())     # Postfix wants the key first
        return pem


class Connection(Wire):
    """One connection to an Exchanger."""

    def __init__(self, sock, client):
        super().__init__(sock)
        # Replies to commands that came together would wait for each other's ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client_host, self.client_port = client[:2]
        self.opened = time.monotonic()
        self.closed = False
        self.tls = None             # the version, such as "TLSv1.3", once the handshake is done
        self.cipher = None          # the name of the ciphers then
        self.server_name = None     # what the client called us by in it (RFC 6066 3)
        self.user = None            # who has logged in
        self.transcript = []        # ("C" or "S", line); the content is left out

    @property
    def commands(self):
        return [line for who, line in self.transcript if who == "C"]

    def command(self):
        line = self.line()
        if line is None:
            return None
        self.transcript.append(("C", line.decode("latin-1")))
        return self.transcript[-1][1]

    def reply(self, reply):
        """Text of one line or several, or bytes to be sent as they are."""
        if isinstance(reply, bytes):
            self.transcript.append(("S", reply.decode("latin-1")))
            self.send(reply)
            return
        lines = reply.split("\n")
        self.transcript += [("S", line) for line in lines]
        self.send("".join(line + "\r\n" for line in lines).encode())

    def begin_tls(self, certificate, version):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        if version is not None:
            context.minimum_version = context.maximum_version = version

        def note(sock, name, context):
            self.server_name = name

        context.sni_callback = note
        self.sock = context.wrap_socket(self.sock, server_side=True)
        self.tls, self.cipher = self.sock.version(), self.sock.cipher()[0]

    def hang_up(self, reset):
        if reset:       # no time to linger: close() sends RST in place of FIN
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        raise ConnectionAbortedError


class Message:
    """What an Exchanger was given in one transaction."""

    def __init__(self, connection, helo, reverse_path):
        self.connection = connection
        self.helo = helo
        self.reverse_path = reverse_path    # all that stood behind FROM:, parameters included
        self.recipients = []                # the accepted ones, such as "<b@example.net>"
        self.raw = b""                      # the content as it came, dots stuffed
        self.received = None                # when the final dot came, by time.monotonic()

    @property
    def data(self):
        """The content as it was meant (RFC 5321 4.5.2)."""
        return re.sub(rb"(\A|\r\n)\.", rb"\1", self.raw)


class Exchanger:
    """An SMTP server that keeps what it is given, and does what it is told to.

    A moment of the dialogue has a key: "CONNECT", "EHLO", "HELO", "MAIL", "RCPT",
    ("RCPT", "<b@example.net>"), "DATA", "BODY" (the 354 is sent, nothing of
    the content is read), ".", "RSET", "QUIT", "STARTTLS", "TLS" (in the place of the handshake), ("EHLO", "TLS")
    (by TLS), "AUTH".  The behaviour can be changed at any time:

        replies         {key: reply}.  A reply is text, of several lines if need be;
                        or bytes, sent as they are; or a list, used up one by one;
                        or a function of the Connection that returns one of these,
                        or None.  None, and the end of a list, are the usual reply.
                        Where its lines differ in code, the last line says what it means.
        connection_limit    how many connections it serves at once: a further one is
                        greeted with BUSY and closed
        recipient_limit how many recipients it takes in a transaction: a further one
                        is answered with `too_many`
        stall_at        the key where it falls silent for good
        drop_at         the key where it closes in place of a reply
        drop_after      the key where it closes after its reply
        reset           whether it closes by RST
        greeting_delay  seconds
        extensions      what it answers to EHLO
        certificate     a file with a key and a certificate: it offers STARTTLS
        tls_first       whether TLS begins with the connection
        tls_version     the one that it speaks, of ssl.TLSVersion
        close_notify    whether it ends TLS before the connection
        accounts        {name: password}: only they may send mail, and only by TLS they log in
        mechanisms      of AUTH
    """

    EXTENSIONS = ("PIPELINING", "SIZE 10485760", "8BITMIME", "ENHANCEDSTATUSCODES")
    NOBODY = "554 5.5.1 Error: no valid recipients"
    # In any case (RFC 5321 2.4); with blanks that 3.3 forbids, and that clients send.
    PATH = re.compile(r"(?:MAIL FROM|RCPT TO):[ \t]*(?P<path><.*>)(?P<parameters>.*)", re.IGNORECASE)
    BUSY = "421 4.7.0 Error: too many connections"

    def __init__(self, host, port=0, name="mx.example.net", **behaviour):
        self.host, self.port, self.name = host, port, name
        self.replies = {}
        self.stall_at = self.drop_at = self.drop_after = None
        self.reset = False
        self.greeting_delay = 0
        self.extensions = self.EXTENSIONS
        self.certificate = self.tls_version = None
        self.tls_first = self.close_notify = False
        self.accounts = {}
        self.mechanisms = ("PLAIN", "LOGIN")
        self.connection_limit = self.recipient_limit = None
        self.too_many = "452 4.5.3 Error: too many recipients"
        self.connections = []
        self.refused = []           # the connections beyond the limit: these are not among the others
        self.most = 0               # how many connections were served at once, at most
        self._served = 0            # how many are served now
        self._counting = threading.Lock()
        self.messages = []          # those it answered with 250, in order
        self.set(**behaviour)
        self.start()

    def set(self, **behaviour):
        for name, value in behaviour.items():
            if not hasattr(self, name):
                raise TypeError(f"an Exchanger has no {name}")
            setattr(self, name, value)

    def start(self):
        """Listens, again on the port it had."""
        self._stopped = threading.Event()
        self._server = _TCPServer(self.host, self.port, self._serve)
        self.port = self._server.port
        self._server.run()

    def stop(self):
        """Stops listening and closes all connections."""
        self._stopped.set()
        self._server.stop()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)   # below TLS, which has its own shutdown()

    close = stop

    def wait_for_messages(self, count, timeout=20):
        wait_for(lambda: len(self.messages) >= count, timeout, f"{count} messages at {self.name}")
        return self.messages

    def _serve(self, sock, client):
        connection = Connection(sock, client)
        with self._counting:
            full = self.connection_limit is not None and self._served >= self.connection_limit
            (self.refused if full else self.connections).append(connection)
            self._served += not full
            self.most = max(self.most, self._served)
        with contextlib.suppress(OSError):      # hung up, by one side or the other
            if full:
                connection.reply(self.BUSY)
            else:
                self._converse(connection)
                if connection.tls and self.close_notify:
                    connection.sock.unwrap()
        if connection.tls:
            connection.sock.close()
        connection.closed = True
        with self._counting:
            self._served -= not full

    def _converse(self, c):
        if self.tls_first:
            self._begin_tls(c)
        self._stopped.wait(self.greeting_delay)
        self._say(c, "CONNECT", f"220 {self.name} ESMTP")
        helo = message = None
        while True:
            line = c.command()
            if line is None:
                return
            verb, _, argument = line.partition(" ")
            verb = verb.upper()
            path = self.PATH.fullmatch(line)
            if verb in ("EHLO", "HELO"):
                if self._say(c, verb, self._hello(c, verb), "TLS" if c.tls else None):
                    helo, message = argument, None
            elif verb == "STARTTLS" and self.certificate and not c.tls:
                self._say(c, verb, "220 2.0.0 Ready to start TLS")
                if c.transcript[-1][1].startswith("220"):
                    self._begin_tls(c)
                    helo = message = None
            elif verb == "AUTH" and c.tls and not c.user:
                self._say(c, verb, self._log_in(c, *argument.split(" ")))
            elif verb == "MAIL" and self.accounts and not c.user:
                self._say(c, verb, "530 5.7.0 Authentication required")
            elif verb == "MAIL" and path and helo and not message:
                if self._say(c, verb, "250 2.1.0 Ok"):
                    message = Message(c, helo, path["path"] + path["parameters"])
            elif verb == "RCPT" and path and message:
                full = self.recipient_limit is not None and len(message.recipients) >= self.recipient_limit
                if self._say(c, verb, self.too_many if full else "250 2.1.5 Ok", path["path"]):
                    message.recipients.append(path["path"])
            elif verb == "DATA" and message:
                usual = "354 End data with <CR><LF>.<CR><LF>" if message.recipients else self.NOBODY
                if self._say(c, verb, usual):
                    self._take_content(c, message)
                    message = None
            elif verb == "RSET":
                message = None
                self._say(c, verb, "250 2.0.0 Ok")
            elif verb == "QUIT":
                self._say(c, verb, "221 2.0.0 Bye")
                return
            else:
                self._say(c, verb, "503 5.5.1 Error: not here, or not in this form")

    def _begin_tls(self, c):
        instead = self._choose(c, ["TLS"], None)
        if instead is not None:
            c.send(instead)
            c.hang_up(self.reset)
        c.begin_tls(self.certificate, self.tls_version)

    def _log_in(self, c, mechanism, initial=None):
        """The reply to AUTH (RFC 4954)."""
        if mechanism == "PLAIN" and initial:
            _, name, password = base64.b64decode(initial).decode().split("\0")
        elif mechanism == "LOGIN" and not initial:
            c.reply("334 VXNlcm5hbWU6")
            name = base64.b64decode(c.command()).decode()
            c.reply("334 UGFzc3dvcmQ6")
            password = base64.b64decode(c.command()).decode()
        else:
            return "504 5.5.4 no such mechanism"
        if mechanism not in self.mechanisms or self.accounts.get(name) != password:
            return "535 5.7.8 Error: authentication failed"
        c.user = name
        return "235 2.7.0 Authentication successful"

    def _hello(self, c, verb):
        offered = list(self.extensions)
        if self.certificate and not c.tls:
            offered.append("STARTTLS")
        if self.accounts and c.tls:
            offered.append(" ".join(["AUTH", *self.mechanisms]))
        lines = [self.name, *(offered if verb == "EHLO" else ())]
        return "\n".join(["250-" + line for line in lines[:-1]] + ["250 " + lines[-1]])

    def _take_content(self, c, message):
        self._choose(c, ["BODY"], None)
        lines = []
        while True:
            line = c.line()
            if line is None:
                raise ConnectionAbortedError
            if line == b".":
                break
            lines.append(line + b"\r\n")
        c.transcript.append(("C", "."))
        message.raw = b"".join(lines)
        message.received = time.monotonic()
        reply = self._choose(c, ["."], "250 2.0.0 Ok" if message.recipients else self.NOBODY)
        # First kept, then answered: who has seen the 250 finds the message here.
        if self._positive(reply):
            self.messages.append(message)
        self._send(c, ["."], reply)

    def _say(self, c, verb, usual, path=None):
        """Answers, and says whether the answer was yes."""
        keys = [(verb, path), verb]
        reply = self._choose(c, keys, usual)
        self._send(c, keys, reply)
        return self._positive(reply)

    def _choose(self, c, keys, usual):
        if self.stall_at in keys:
            if self.stall_at == "BODY":     # to read on would take the content from a full socket
                self._stopped.wait()
            while c.receive():
                pass
            raise ConnectionAbortedError
        if self.drop_at in keys:
            c.hang_up(self.reset)
        for key in keys:
            reply = self.replies.get(key)
            if isinstance(reply, list):
                reply = reply.pop(0) if reply else None
            if callable(reply):
                reply = reply(c)
            if reply is not None:
                return reply
        return usual

    def _send(self, c, keys, reply):
        c.reply(reply)
        if self.drop_after in keys:
            c.hang_up(self.reset)

    @staticmethod
    def _positive(reply):
        text = reply.decode("latin-1") if isinstance(reply, bytes) else reply
        lines = text.replace("\r\n", "\n").split("\n")
        last = next((line for line in lines if line[3:4] != "-"), lines[-1])
        return last[:1] in ("2", "3")


def loopback():
    """An address of this machine that nobody else is likely to use now.  Linux has
    all of 127.0.0.0/8; other systems have 127.0.0.1 until they are given more."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def unused_port():
    """A port that was free just now at an address that nobody else uses."""
    with socket.create_server((loopback(), 0)) as listener:
        return listener.getsockname()[1]


def exchangers(count, *hosts):
    """`count` Exchangers at addresses of their own, and one at each of `hosts`, all
    on the same port, since the relay has one port for all of them.  Their names are
    mx1.example.net and so on."""
    for _ in range(50):
        made = []
        try:
            for host in [loopback() for _ in range(count)] + list(hosts):
                port = made[0].port if made else 0
                made.append(Exchanger(host, port, f"mx{len(made) + 1}.example.net"))
            return made
        except OSError as error:        # the port is taken at one of the addresses
            for exchanger in made:
                exchanger.stop()
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, "no port is free at all addresses")


def children(pid):
    """All of them, those included that nobody has waited for."""
    if PROC:        # a small Linux has no ps
        with contextlib.suppress(FileNotFoundError):        # it has ended
            return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return []
    rows = [list(map(int, row.split())) for row in _ps("-A", "-o", "pid=", "-o", "ppid=")]
    return [child for child, parent in rows if parent == pid]


def memory(pid):
    """How many octets of it are in memory."""
    if PROC:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(_ps("-o", "rss=", "-p", str(pid))[0]) * 1024


def _ps(*options):
    return subprocess.run(["ps", *options], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


# ---- The relay ---------------------------------------------------------------------


def run(*arguments, timeout=20):
    """Runs the program to its end; .returncode, .stdout and .stderr are the result."""
    return subprocess.run([BINARY, *map(str, arguments)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=timeout)


class Outcome(NamedTuple):
    """What became of a recipient in one try, as the log has it."""

    id: str
    relay: str
    delay: str
    status: str
    words: str


class Footprint(NamedTuple):
    """What a process holds, as Linux's /proc tells it."""

    descriptors: int
    children: int       # zombies among them
    memory: int         # octets of its own: its heap, its data and its stack


class Relay:
    """The program, started on a free port and run until stop().

    The spool is made by the program itself; its parent has to exist.  Without an
    `mx_port` its exchangers listen where nobody does: no test has mail for this
    machine's own server.
    """

    MARGIN = 8 * 1024 * 1024    # octets that malloc() may keep for later, after hundreds of clients at once
    SANITIZER = re.compile("AddressSanitizer|LeakSanitizer|runtime error:|^==[0-9]+== ")     # the last is valgrind's

    def __init__(self, *options, spool, dns=None, mx_port=None, addresses=("127.0.0.1",), binary=BINARY):
        self.spool = Path(spool)
        self.mx_port = mx_port or unused_port()
        self.log = []           # the lines of stderr, those of earlier runs included
        # Makes what has sockets, for those who are in the relay's network, where that is not ours.
        self.within = lambda make, *arguments, **options: make(*arguments, **options)
        self._command = [str(binary), "-p", "0", "-q", str(spool), "-h", HOSTNAME,
                         "-P", str(self.mx_port)]
        if dns is not None:
            self._command += ["-n", dns.address]
        self._command += [*map(str, options), *addresses]
        self._addresses = addresses
        self._processes, self._readers, self._clients = [], [], []
        self.start()

    def start(self):
        """Starts it, or starts it again on the same spool."""
        self._first_line = len(self.log)
        # A session of its own: kill() then reaches all children, and nobody else.
        process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, start_new_session=True)
        reader = threading.Thread(target=self._read_log, args=(process.stderr,), daemon=True)
        reader.start()
        self._processes.append(process)
        self._readers.append(reader)
        try:
            wait_for(lambda: len(self.ports) >= len(self._addresses) or process.poll() is not None,
                     what="the relay listening")
        finally:
            if process.poll() is not None or not self.ports:
                self.kill()
                raise AssertionError("the relay did not start:\n" + "\n".join(self.log[self._first_line:]))
        self.fresh = self.footprint()

    def _read_log(self, stream):
        with stream:
            for line in stream:
                self.log.append(line.decode("utf-8", "replace").rstrip("\n"))

    @property
    def process(self):
        return self._processes[-1]

    @property
    def pid(self):
        return self.process.pid

    @property
    def ports(self):
        """In the order in which it began to listen."""
        found = (re.search(r"listening on \S+:(\d+)$", line) for line in self.log[self._first_line:])
        return [int(match[1]) for match in found if match]

    @property
    def port(self):
        return self.ports[0]

    def client(self, **options):
        """A Client connected to it, closed with it at the latest."""
        self._clients.append(self.within(Client, self.port, self._addresses[0], **options))
        return self._clients[-1]

    def hang_up(self):
        """Closes the clients that client() made."""
        while self._clients:
            self._clients.pop().close()

    def send(self, *recipients, sender="nour@example.org", body="Subject: x\n\nDear Nour\n"):
        """A message, taken; returns its id."""
        with self.client() as client:
            reply = client.deliver(sender, recipients, body)
        taken = re.fullmatch(r"250 2\.0\.0 Ok: queued as (\S+)", reply)
        if not taken:
            raise AssertionError(f"the final dot: {reply}")
        return taken[1]

    def queue(self):
        return sorted(self.spool.glob("queue/*"))

    def tmp(self):
        return sorted(self.spool.glob("tmp/*"))

    def logged(self, pattern):
        """A match for every line of the log that holds the pattern."""
        return [match for match in (re.search(pattern, line) for line in self.log) if match]

    def wait_for_log(self, pattern, timeout=20):
        return wait_for(lambda: self.logged(pattern), timeout, f"/{pattern}/ in the log")[0]

    def outcomes(self, to, count=1):
        """What the log says became of the recipient, as soon as it says so `count` times."""
        pattern = rf"^(\S+) to=<{re.escape(to)}> relay=(\S+) delay=(\d+) status=(sent|later|failed) \((.*)\)$"
        wait_for(lambda: len(self.logged(pattern)) >= count, what=f"{count} outcomes for {to}")
        return [Outcome(*match.groups()) for match in self.logged(pattern)]

    def footprint(self):
        """What the server holds now; None where there is no /proc to tell it."""
        proc = Path(f"/proc/{self.pid}")
        if not (proc / f"task/{self.pid}/children").exists():
            return None
        memory = re.search(r"^RssAnon:\s*(\d+) kB$", (proc / "status").read_text(), re.MULTILINE)
        return Footprint(descriptors=len(os.listdir(proc / "fd")), children=len(children(self.pid)),
                         memory=int(memory[1]) * 1024)

    def expect_bounded_memory(self, used=0):
        """To what it had when it was fresh no more has come than these octets and the margin."""
        now = self.footprint()
        if now is not None and not WATCHED and now.memory > self.fresh.memory + used + self.MARGIN:
            raise AssertionError(f"its memory has grown from {self.fresh.memory} to {now.memory} octets")

    def expect_unharmed(self, host, timeout=20):
        """Whatever was done to it, nothing is left of that: it holds what it held when it
        was fresh, with no child but the queue manager, and the spool holds only what it
        says to be owed still.  And it is at work: a client is greeted, and his message
        arrives at an exchanger, which this makes at `host`."""
        if self.process.poll() is not None:
            raise AssertionError(f"it has ended with {self.process.returncode}")
        self.hang_up()
        self._expect_rest(timeout)
        friend = self.within(Exchanger, host, self.mx_port)
        with contextlib.closing(friend):
            with self.client() as client:
                assert client.greeting.startswith("220 ")
                assert client.deliver("", [f"friend@[{host}]"], b"Subject: x\r\n\r\nDear Nour\r\n").startswith("250 ")
            message, = friend.wait_for_messages(1, timeout)
            assert message.raw.endswith(b"\r\nSubject: x\r\n\r\nDear Nour\r\n")
        self._expect_rest(timeout)

    def _expect_rest(self, timeout):
        def rests():
            now, owed = self.footprint(), {match[1] for match in self.logged(r"^(\S+) to=<.* status=later ")}
            seen[:] = now, self.tmp(), [path.name for path in self.queue() if path.name not in owed]
            return seen[1:] == [[], []] and (
                now is None or (now.descriptors, now.children) == (self.fresh.descriptors, 1))

        seen = []
        try:
            wait_for(rests, timeout)
        except AssertionError:
            raise AssertionError("it had {} when it was fresh and has now {}, in tmp/ {}, in queue/ {}".format(
                self.fresh, *seen)) from None
        self.expect_bounded_memory()

    def hangup(self):
        os.kill(self.pid, signal.SIGHUP)

    def hangup_until(self, condition, what="what was waited for"):
        """SIGHUP, and again: one that comes while a message is still being tried is in vain."""
        wait_for(lambda: condition() or self.hangup(), what=what)

    def terminate(self, timeout=20):
        """SIGTERM; returns the exit status.  Forwarders that are under way stay."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the relay still ran {timeout} seconds after SIGTERM") from None

    def stop(self, timeout=20):
        """SIGTERM, and then nothing of it is left; returns the exit status."""
        status = self.terminate(timeout)
        self.kill()
        return status

    def kill(self):
        """SIGKILL to the relay and all its children at once."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for reader in self._readers:        # ends when the last writer is gone
            reader.join(20)
            if reader.is_alive():
                raise AssertionError("something of the relay outlived it")
        self.hang_up()
        reports = [line for line in self.log if self.SANITIZER.search(line)]
        if reports:
            raise AssertionError("a sanitizer reports:\n" + "\n".join(self.log))


# ---- SMTP, the client's side ---------------------------------------------------------


class Client(Wire):
    """A client that says what it is told to, byte by byte if need be."""

    def __init__(self, port, host="127.0.0.1", greeting=True, timeout=20, source=None, window=None):
        """`source` is the address it comes from; `window` how many octets, about, its
        system takes for it while it does not read."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.settimeout(timeout)
        if window is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        if source is not None:
            sock.bind((source, 0))
        try:
            sock.connect((host, port))
        except OSError:
            sock.close()
            raise
        super().__init__(sock)
        self.timeout = timeout
        self.local_port = self.sock.getsockname()[1]
        self.greeting = self.reply() if greeting else None

    def reply(self, timeout=None):
        """A whole reply, its lines joined by \\n."""
        self.sock.settimeout(timeout or self.timeout)
        lines = []
        while not lines or lines[-1][3:4] == "-":
            line = self.line()
            if line is None:
                raise AssertionError(f"the server closed the connection after {lines}")
            lines.append(line.decode("latin-1"))
        return "\n".join(lines)

    def say(self, line):
        """Sends a line and returns the reply to it."""
        self.send(line.encode("utf-8") + b"\r\n")
        return self.reply()

    def deliver(self, sender, recipients, body):
        """A whole transaction, HELO first; returns the reply to the final dot.  The
        body is lines of text, or bytes that have their CRLFs already."""
        if isinstance(body, str):
            body = body.replace("\n", "\r\n").encode("utf-8")
        if not body.endswith(b"\r\n"):
            body += b"\r\n"
        commands = ["HELO me.com", f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{to}>" for to in recipients), "DATA"]
        for command in commands:
            reply = self.say(command)
            if reply[0] not in "23":
                raise AssertionError(f"{command}: {reply}")
        self.send(re.sub(rb"(\A|\r\n)\.", rb"\1..", body) + b".\r\n")
        return self.reply()

    def eof(self, timeout=None):
        """Whether the server closed, and said nothing more."""
        self.sock.settimeout(timeout or self.timeout)
        try:
            return self.line() is None and not self._buffer
        except socket.timeout:
            return False

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def transcript(client, text):
    """Plays a dialogue, and compares what the server says with what is written.

        C: HELO me.com
        S: 250 <port> OK
        C: QUIT
        S: 221 2.0.0 OK
        S: <close>

    C: lines that follow each other are sent at once.  In an S: line <port> is the
    client's, <hostname> the relay's, and ... stands for the rest of a word, at the
    end for the rest of the line.  `S: <close>` is the end of the connection.
    Returns the lines that the server said.
    """
    said, rows, pending = [], [], b""
    for line in filter(None, map(str.lstrip, text.splitlines())):
        who, words = line[:2], line[3:]
        if who == "C:":
            pending += words.encode("utf-8") + b"\r\n"
            rows.append((line, ""))
            continue
        if who != "S:":
            raise ValueError(f"neither C: nor S: {line}")
        if pending:
            client.send(pending)
            pending = b""
        said.append(_hear(client))
        rows.append((line, "S: " + said[-1]))
        if not _pattern(words, client.local_port).fullmatch(said[-1]):
            width = max(len(left) for left, _ in rows)
            shown = "\n".join(f"  {left:{width}}  {right}".rstrip() for left, right in rows)
            raise AssertionError(f"the dialogue differs at its last line; expected, and got:\n{shown}")
    if pending:
        client.send(pending)
    return said


def _hear(client):
    client.sock.settimeout(client.timeout)
    try:
        line = client.line()
    except socket.timeout:
        return f"(nothing in {client.timeout} seconds)"
    return "<close>" if line is None else line.decode("latin-1")


def _pattern(words, port):
    words = words.replace("<port>", str(port)).replace("<hostname>", HOSTNAME)
    rest = ".*" if words.endswith("...") else ""
    pieces = words[:-3].split("...") if rest else words.split("...")
    return re.compile(r"\S*".join(map(re.escape, pieces)) + rest)
