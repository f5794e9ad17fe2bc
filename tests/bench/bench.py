"""The benchmark: this server beside others, on this machine, in one run.

    make bench                                        all of it, in an hour or more
    python3 tests/bench/bench.py --quick              in a few minutes, and roughly
    python3 tests/bench/bench.py --only throughput,latency --peers smtp,postfix --rounds 5
    python3 tests/bench/bench.py --json bench.json --text bench.txt --charts docs/bench

Beside an older revision of this server, as the peer `before`:

    git worktree add /tmp/before REVISION
    cc -O2 -o /tmp/before/smtp /tmp/before/smtp.c /tmp/before/dns.c /tmp/before/forward.c
    python3 tests/bench/bench.py --before /tmp/before/smtp --peers smtp,postfix --rounds 5

The way of a message is client, relay, name server, sink, all on loopback. The
client is source.c, with a connection for each message, the name server Unbound,
the sink sink.c. Most mail is for one domain, whose one exchanger is the sink; where
a measure's name says 20, for twenty domains in turn, with an exchanger each: the
sink, at twenty addresses.

Every run is that of one peer, started for it alone, with a spool that is new: a
file system may be slow where many files were deleted a moment ago, so each spool is
a new directory, away from the others where chattr(1) can ask for that. The peers
take turns, each round in another order, so that what else this machine does meets
all alike. The results are medians and ranges of all rounds. To compare peers, look
at the ratios: each is a median and a range, too, of what the rounds gave.

For TLS (`--only tls --peers smtp,postfix`) a Postfix that offers STARTTLS stands before
the sink, and the mail of example.int goes to it.

The sink writes down every message by its id, which is its recipient. After each
run every message that was accepted has arrived once, or the run is no result and
this program's exit status is 1.

Processor time is that of a peer's control group: of all its processes, including
those that have ended and those whose parent never waited for them. Where there are
no control groups, the results say so.

It needs a quiet machine, and says so where it is not one. It runs as root only: the
exchangers' port is 25, the name server's 53, since not every peer can be told
another; and see peers.py.

Contents, to be read from the end:
    The far end         the sink, the name server, and what is lost or comes twice
    Clients             those that send, and those that do nothing
    Processes           what they take
    Measures            one function each
    Results             tables and charts
    The command
"""
import argparse
import collections
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # where the lab is

import charts
import lab
import peers

SERVERS = ("smtp", "postfix", "opensmtpd", "exim", "haraka")
BEFORE = "before"               # an older binary of this server
COMPARED = ("smtp", BEFORE, *SERVERS[1:])
DOMAIN, DEAD_DOMAIN, SLOW_DOMAIN, TLS_DOMAIN = "example.net", "example.com", "example.edu", "example.int"
DOMAINS = [f"d{number}.example.net" for number in range(1, 21)]
SIZE = 4096                     # octets of a message's body
LARGE = 10 * 1024 * 1024
SESSIONS = (1, 20, 100, 500)
USUAL = 20                      # sessions, where only one number is tried
WAITING = 2000                  # messages of a backlog
SLOW = 100                      # messages for an exchanger that takes a second for each
IDLE = (1000, 5000, 20000)
QUEUED = (100, 10000, 100000)
FILLING = 300                   # seconds that a queue may take to fill
HELD_BY_ONE = 5000              # idle clients that one process holds: descriptors are limited
CLIENTS_AT_ADDRESS = 200        # below what any peer allows to one client address
QUIET = 0.3                     # processes that want to run, on average: more are no quiet machine


class Failed(Exception):
    """A run that is no result, and why."""


class Beyond(Exception):
    """What this peer, or this machine, is not made for."""


# ---- The far end -------------------------------------------------------------------


class Arrival:
    """A message at the sink."""

    def __init__(self, line):
        recipient, micros, octets = line.split()
        self.time, self.octets = int(micros) / 1e6, int(octets)
        number, self.run, self.domain = re.fullmatch(r"(\d+)(\D\w*)@(.*)", recipient).groups()
        self.number = int(number)


def account(numbers, arrivals):
    """Every message has arrived, and once."""
    count = collections.Counter(arrival.number for arrival in arrivals)
    lost = sum(number not in count for number in numbers)
    twice = sum(times > 1 for times in count.values())
    strange = len(set(count) - set(numbers))
    if lost or twice or strange:
        raise Failed(f"of {len(numbers)} messages {lost} lost, {twice} twice, {strange} never sent")


def built(directory, name):
    """A program of this directory, built in that one."""
    binary = directory / name
    if not binary.exists():
        subprocess.run(["cc", "-O2", "-o", binary, Path(__file__).with_name(f"{name}.c")], check=True)
    return binary


class Sink:
    """Takes all mail at some addresses, from start() to stop(), and knows what came. It
    answers a message after `delay` seconds."""

    def __init__(self, directory, hosts, port, delay=0):
        self.hosts, self.host, self.port = hosts, hosts[0], port
        self._command = [built(directory, "sink"), "-d", str(round(delay * 1000)), str(port), *hosts]
        self._path = directory / f"arrivals-{self.host}"
        self._path.touch()
        self._stream = open(self._path, encoding="ascii")
        self._part = ""                                 # a line that is not whole yet
        self._runs = collections.defaultdict(list)      # run: its arrivals
        self._process = None

    def start(self):
        with open(self._path, "ab") as output:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=output)
        lab.wait_for(self._listens, what="the sink listening")

    def _listens(self):
        if self._process.poll() is not None:
            raise Failed("the sink does not start")
        with contextlib.suppress(OSError):
            socket.create_connection((self.hosts[-1], self.port), 1).close()
            return True
        return False

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self):
        self.stop()
        self._stream.close()

    def arrivals(self, run):
        """What has come of a run so far."""
        whole, _, self._part = (self._part + self._stream.read()).rpartition("\n")
        for line in whole.splitlines():
            arrival = Arrival(line)
            self._runs[arrival.run].append(arrival)
        return self._runs[run]

    def wait(self, run, numbers, patience=60, remind=None):
        """The arrivals of a run, each message once.  The patience is for the next one;
        `remind` is called where none came for ten seconds."""
        seen, since, reminded = -1, time.monotonic(), 0
        while len(self.arrivals(run)) < len(numbers):
            now = time.monotonic()
            if len(self._runs[run]) > seen:
                seen, since, reminded = len(self._runs[run]), now, 0
            if now - since > patience:
                break
            if remind and now - since > 10 * (reminded + 1):
                remind()
                reminded += 1
            time.sleep(0.002)
        account(numbers, self._runs[run])
        return self._runs[run]


class Unbound:
    """The name server: some domains, each with one exchanger at an address, and nothing
    else in the world."""

    SETTINGS = """\
server:
    interface: {host}
    port: 53
    access-control: 127.0.0.0/8 allow
    do-daemonize: no
    username: ""
    chroot: ""
    directory: "{directory}"
    pidfile: ""
    use-syslog: no
    module-config: "iterator"
    local-zone: "." static
{data}
remote-control:
    control-enable: no
"""

    def __init__(self, directory, exchangers):
        self.host = lab.loopback()
        data = "".join(f'    local-data: "{name} IN MX 10 mx.{name}"\n    local-data: "mx.{name} IN A {address}"\n'
                       for name, address in exchangers.items())
        settings = directory / "unbound.conf"
        settings.write_text(self.SETTINGS.format(host=self.host, directory=directory, data=data))
        self._process = subprocess.Popen([peers.program("unbound"), "-d", "-c", settings], stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lab.wait_for(self._answers, what="the name server's first answer")

    def _answers(self):
        query = lab.header(1, 0x0100) + lab.encode_name(DOMAIN) + b"\0\x0f\0\1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.settimeout(1)
            sock.connect((self.host, 53))
            sock.send(query)
            return sock.recv(512)

    def stop(self):
        self._process.kill()
        self._process.wait()


# ---- Clients -----------------------------------------------------------------------


def send(source, peer, run, count, sessions, domains=(DOMAIN,), size=SIZE, keep=False):
    """Sends `count` messages by the source, one in each connection unless it shall `keep`
    those; returns the seconds until all have been accepted."""
    command = [source, *(["-k"] if keep else []), sessions, count, size, run, peer.host, peer.port, *domains]
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=900)
    if done.returncode != 0:
        raise Failed(f"source: {done.stderr.strip()}")
    seconds, accepted = done.stdout.split()
    assert int(accepted) == count, done.stdout
    return float(seconds)


LETTER = "Subject: one message\n\n" + ("x" * 63 + "\n") * (SIZE // 64)


def one_message(peer, sink, run, number, domain=DOMAIN):
    """Sends a message; returns the seconds from the connection's beginning to the 250,
    and to its arrival at the sink."""
    began = time.monotonic()
    with lab.Client(peer.port, peer.host, timeout=60) as client:
        reply = client.deliver("bench@example.org", [f"{number}{run}@{domain}"], LETTER)
        replied = time.monotonic()
        if not reply.startswith("250 "):
            raise Failed(f"the final dot: {reply}")
        client.say("QUIT")
    arrivals = sink.wait(run, range(number + 1))
    return replied - began, arrivals[-1].time - began


def hold(host, port, first, count, pipe):
    """In a process of its own: connects `count` clients, says how many, and holds them.
    Told the name of a run, each sends a message, and it says how many were taken."""
    clients, letter = [], LETTER.replace("\n", "\r\n").encode() + b".\r\n"
    with contextlib.suppress(OSError):
        for number in range(first, first + count):
            third, fourth = divmod(number // CLIENTS_AT_ADDRESS, 250)
            sock = socket.socket()
            sock.settimeout(60)
            sock.bind((f"127.77.{third}.{fourth + 1}", 0))
            sock.connect((host, port))
            for command in (b"", b"EHLO client.example.org\r\n"):
                sock.sendall(command)
                if not sock.recv(4096).startswith(b"2"):
                    raise ConnectionRefusedError
            clients.append(sock)
    pipe.send(len(clients))
    with contextlib.suppress(EOFError):
        while True:         # holds them until the other end is gone
            run, taken = pipe.recv(), 0
            for number, sock in enumerate(clients, first + 1):
                with contextlib.suppress(OSError):
                    for part in (b"MAIL FROM:<bench@example.org>\r\n", f"RCPT TO:<{number}{run}@{DOMAIN}>\r\n".encode(),
                                 b"DATA\r\n", letter):
                        sock.sendall(part)
                        reply = sock.recv(4096)
                    taken += reply.startswith(b"250 ")
            pipe.send(taken)


class Crowd:
    """Clients that have said EHLO, and nothing since."""

    def __init__(self, peer):
        self._peer = peer
        self._count = 0
        self._holders = []

    def grow(self, count):
        """To so many."""
        started = []
        while self._count < count:
            number = min(HELD_BY_ONE, count - self._count)
            here, there = multiprocessing.Pipe()
            holder = multiprocessing.Process(target=hold, daemon=True,
                                             args=(self._peer.host, self._peer.port, self._count, number, there))
            holder.start()
            there.close()
            started.append((here, number))
            self._holders.append((holder, here))
            self._count += number
        missing = sum(number - here.recv() for here, number in started)
        if missing:
            raise Beyond(f"serves {count - missing} of {count} idle clients")

    def deliver(self, run):
        """Each of them sends a message; the seconds until all are taken."""
        began = time.monotonic()
        for _, here in self._holders:
            here.send(run)
        taken = sum(here.recv() for _, here in self._holders)
        if taken < self._count:
            raise Failed(f"of {self._count} clients {self._count - taken} could not send a message")
        return time.monotonic() - began

    def leave(self):
        for holder, here in self._holders:
            holder.kill()
            holder.join()
            here.close()


# ---- Processes ---------------------------------------------------------------------


def memory(pid, kind):
    """Kilobytes of a process: "Rss", or "Pss", in which shared pages count by their share."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{kind}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        if found:
            return int(found[1])
    return 0            # it has just ended


def memory_of_all(peer):
    return sum(memory(pid, "Pss") for pid in peer.pids())


def available_memory():
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


class Watch:
    """Looks at a peer's memory, ten times a second, until the block ends."""

    def __init__(self, peer):
        self._peer = peer
        self.one = self.own = self.all = 0      # kilobytes: the largest process, its own share of it, all together
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self):
        while not self._end.wait(0.1):
            pids = self._peer.pids()
            self.one = max(self.one, *(memory(pid, "Rss") for pid in pids))
            shares = [memory(pid, "Pss") for pid in pids]
            self.own, self.all = max(self.own, *shares), max(self.all, sum(shares))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def quiet(peer, patience=30):
    """Waits until a peer rests: less than a hundredth of a processor for half a second."""
    deadline, before = time.monotonic() + patience, peer.cpu()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = peer.cpu()
        if now - before < 0.005:
            return
        before = now


# ---- Measures ----------------------------------------------------------------------


class Bench:
    """What every measure needs, and what they have found."""

    # The clients of a benchmark come from one address; a relay's do not.
    OPTIONS = ("-c", "0")

    def __init__(self, directory, quick=False, resolver=True, before=None):
        """Without `resolver`, mail goes straight to a sink, and no port below 1024 is taken.
        `before` is the binary of the peer of that name."""
        self.directory, self.quick, self._before = directory, quick, before
        self.records, self.notes = [], []
        self.round = self._runs = 0
        self._source = built(directory, "source")
        self.sink = self._make_sink(resolver, len(DOMAINS) if resolver else 1)
        self.dead = self._make_sink(resolver)               # down until it is needed
        self.slow = self._make_sink(resolver, delay=1)      # so is this one
        self._gateway, self._gateway_host = None, lab.loopback()
        self.dns = Unbound(directory, {DOMAIN: self.sink.host, **dict(zip(DOMAINS, self.sink.hosts)),
                                       DEAD_DOMAIN: self.dead.host, SLOW_DOMAIN: self.slow.host,
                                       TLS_DOMAIN: self._gateway_host}) if resolver else None
        self.sink.start()

    @property
    def gateway(self):
        """Postfix, which offers STARTTLS and brings all mail to the sink."""
        if self._gateway is None:
            if lab.OPENSSL is None:
                raise peers.Absent("there is no openssl here")
            place = self.directory / "authority"
            place.mkdir()
            pem = lab.Authority(place).certificate(f"mx.{TLS_DOMAIN}")
            self._gateway = peers.start(
                "postfix", host=self._gateway_host, next_hop=(self.sink.host, self.sink.port),
                services="{host}:25 inet n - n - 0 smtpd" if self.dns else "",
                more=f"myhostname = mx.{TLS_DOMAIN}\nsmtpd_tls_security_level = may\nsmtpd_tls_chain_files = {pem}")
        return self._gateway

    def _make_sink(self, resolver, addresses=1, delay=0):
        hosts = [lab.loopback() for _ in range(addresses)]
        port = 25 if resolver else 0
        for host in hosts:
            with socket.create_server((host, port)) as free:
                port = free.getsockname()[1]
        return Sink(self.directory, hosts, port, delay)

    def close(self):
        if self._gateway:
            self._gateway.stop()
        for sink in (self.sink, self.dead, self.slow):
            sink.close()
        if self.dns:
            self.dns.stop()

    def start(self, name, sink=None, options=(), **settings):
        """The peer, with a new spool, sending to where the name server says, or straight to
        a sink; `options` are for this server."""
        sink = sink or self.sink
        way = {"nameserver": self.dns.host} if self.dns else {"next_hop": (sink.host, sink.port)}
        if name == BEFORE:
            way.update(binary=self._before, label=BEFORE)
            name = "smtp"
        return peers.start(name, *((*self.OPTIONS, *options) if name == "smtp" else ()), directory=self.directory,
                           **way, **settings)

    def run(self):
        """The name of the next run."""
        self._runs += 1
        return f"r{self._runs}"

    def send(self, peer, count, sessions, **how):
        """A run of messages: its name, their numbers, and the seconds until all were accepted."""
        run = self.run()
        return run, range(1, count + 1), send(self._source, peer, run, count, sessions, **how)

    def rate(self, peer, sessions=USUAL, domains=(DOMAIN,)):
        """Messages that go all the way in a second, roughly; the peer is warm after this."""
        began = time.monotonic()
        run, numbers, _ = self.send(peer, max(100, sessions), sessions, domains=domains)
        last = max(arrival.time for arrival in self.sink.wait(run, numbers))
        return len(numbers) / (last - began)

    def count(self, rate, seconds, most=20000):
        """So many messages that they take about so many seconds."""
        return max(10, min(most, round(rate * (seconds / 4 if self.quick else seconds))))

    def record(self, peer, metric, at, value):
        self.records.append({"peer": peer.name, "metric": metric, "at": at, "round": self.round, "value": value})

    def note(self, text):
        self.notes.append(text)
        print(f"    {text}", file=sys.stderr, flush=True)


def load(bench, peer, at, rate, sessions, metric="", domains=(DOMAIN,)):
    """A run of messages, and what it took: metrics with `metric` before their names."""
    quiet(peer)
    cpu, began = peer.cpu(), time.monotonic()
    run, numbers, seconds = bench.send(peer, bench.count(rate, 4), sessions, domains=domains)
    last = max(arrival.time for arrival in bench.sink.wait(run, numbers))
    quiet(peer)
    bench.record(peer, metric + "accepted", at, len(numbers) / seconds)
    bench.record(peer, metric + "delivered", at, len(numbers) / (last - began))
    bench.record(peer, metric + "cpu", at, 1000 * (peer.cpu() - cpu) / len(numbers))


def throughput(bench, peer, sessions):
    """Messages a second, and processor time of each, as sessions grow."""
    load(bench, peer, sessions, bench.rate(peer, sessions), sessions)


def throughput_20(bench, peer, sessions):
    """The same, to twenty domains."""
    load(bench, peer, sessions, bench.rate(peer, sessions, DOMAINS), sessions, "twenty ", DOMAINS)


def one_by_one(bench, peer, at, metric, most=30, domain=DOMAIN):
    """Milliseconds of single messages, with nothing else to do; returns how many they were."""
    run, began, times = bench.run(), time.monotonic(), []
    while len(times) < most and time.monotonic() - began < (2 if bench.quick else 8):
        times.append(one_message(peer, bench.sink, run, len(times), domain))
    for name, values in zip(("reply", "arrival"), zip(*times)):
        bench.record(peer, metric + name, at, 1000 * statistics.median(values))
    return len(times)


def latency(bench, peer, _):
    """How long one message takes when there is no other."""
    bench.rate(peer)
    quiet(peer)
    one_by_one(bench, peer, 0, "latency ")


def tls_settings(name, encrypted):
    """What tells a peer to send by TLS, or not to."""
    known = {"smtp": {"options": ("-T", "must" if encrypted else "never")},
             "postfix": {"more": f"smtp_tls_security_level = {'may' if encrypted else 'none'}"}}
    if name not in known:
        raise Beyond("its TLS is not set up here")
    return known[name]


def tls(bench, peer, encrypted):
    """Messages one by one, and many, over connections that are kept: in plain and by TLS."""
    metric, domains = "tls " if encrypted else "plain ", (TLS_DOMAIN,)
    rate = bench.rate(peer, domains=domains)
    quiet(peer)
    cpu = peer.cpu()
    count = one_by_one(bench, peer, 0, metric + "single ", domain=TLS_DOMAIN)
    quiet(peer)
    bench.record(peer, metric + "single cpu", 0, 1000 * (peer.cpu() - cpu) / count)
    load(bench, peer, 0, rate, USUAL, metric, domains)


def large(bench, peer, _):
    """Messages of 10 MB, four at a time."""
    run, numbers, seconds = bench.send(peer, 4, 4, size=LARGE)
    bench.sink.wait(run, numbers)
    with Watch(peer) as watch:
        began = time.monotonic()
        run, numbers, _ = bench.send(peer, bench.count(4 / seconds, 5, 100), 4, size=LARGE)
        last = max(arrival.time for arrival in bench.sink.wait(run, numbers))
    bench.record(peer, "large rate", 0, len(numbers) * LARGE / 1e6 / (last - began))
    bench.record(peer, "large one process", 0, watch.one / 1024)
    bench.record(peer, "large own", 0, watch.own / 1024)
    bench.record(peer, "large all processes", 0, watch.all / 1024)


def drained(bench, peer, sink, run, numbers, at, metric):
    """Messages a second, from the first that arrives; the wait for that one is its own figure."""
    cpu, began = peer.cpu(), time.monotonic()
    if not peer.flush():
        bench.note(f"{peer.name}: cannot be told that the next hop is back, and finds out by itself")
    # A message that was being tried misses the first order: hence further ones.
    arrivals = sink.wait(run, numbers, 180, peer.flush)
    quiet(peer)
    times = sorted(arrival.time for arrival in arrivals)
    bench.record(peer, metric, at, (len(times) - 1) / (times[-1] - times[0]))
    bench.record(peer, metric + " wait", at, times[0] - began)
    bench.record(peer, metric + " cpu", at, 1000 * (peer.cpu() - cpu) / len(times))


def drain(bench, peer, most, metric="drain", domains=(DOMAIN,)):
    """How fast a backlog leaves when the next hop is back."""
    rate = bench.rate(peer, domains=domains)
    quiet(peer)
    bench.sink.stop()
    try:
        # Slow peers have a shorter backlog: its rate is what counts.
        run, numbers, _ = bench.send(peer, bench.count(rate, 20, most), USUAL, domains=domains, keep=True)
        quiet(peer)
    finally:
        bench.sink.start()
    drained(bench, peer, bench.sink, run, numbers, 0, metric)


def drain_20(bench, peer, most):
    """The same, to twenty domains."""
    drain(bench, peer, most, "twenty drain", DOMAINS)


def slow(bench, peer, count):
    """How long messages take to arrive where the exchanger takes a second for each."""
    bench.slow.start()
    try:
        began = time.monotonic()
        run, numbers, _ = bench.send(peer, count, USUAL, domains=[SLOW_DOMAIN])
        last = max(arrival.time for arrival in bench.slow.wait(run, numbers, 120))
        bench.record(peer, "slow", count, last - began)
    finally:
        bench.slow.stop()


def queue(bench, peer, length):
    """Fresh mail while a queue waits for another domain, and how that queue drains."""
    rate = bench.rate(peer)
    if length / rate > FILLING:
        raise Beyond(f"a queue of {length} would take {length / rate:.0f} s to fill")
    run, numbers, _ = bench.send(peer, length, USUAL, domains=[DEAD_DOMAIN], keep=True)
    load(bench, peer, length, rate, USUAL, "queue ")
    bench.dead.start()
    try:
        drained(bench, peer, bench.dead, run, numbers, length, "queue drain")
    finally:
        bench.dead.stop()


def idle(bench, peer, _):
    """What clients cost that do nothing, and how long a message takes beside them."""
    bench.rate(peer)
    quiet(peer)
    one_by_one(bench, peer, 0, "crowded ", 20)
    crowd, before, each = Crowd(peer), memory_of_all(peer), 0
    try:
        for count in (200, 1000) if bench.quick else IDLE:
            if count * each > 0.7 * available_memory():
                raise Beyond(f"{count} idle clients would take {count * each / 1024 ** 2:.0f} GiB")
            crowd.grow(count)
            quiet(peer)
            each = (memory_of_all(peer) - before) / count
            bench.record(peer, "idle", count, each)
            one_by_one(bench, peer, count, "crowded ", 20)
        if isinstance(peer, peers.Ours):        # of some others it would take an hour
            run = bench.run()
            seconds = crowd.deliver(run)
            bench.sink.wait(run, range(1, count + 1))
            bench.record(peer, "crowd", count, count / seconds)
    finally:
        crowd.leave()


def syncs(bench, peer, _):
    """Syncs of a message that come before its 250, and in all."""
    bench.rate(peer)
    quiet(peer)
    trace, count, run, spans = bench.directory / "trace", 2 if bench.quick else 10, bench.run(), []
    pids = [option for pid in peer.pids() for option in ("-p", str(pid))]
    tracer = subprocess.Popen([peers.program("strace"), "-f", "-ttt", "-e", "trace=fsync,fdatasync,sync,syncfs,msync",
                               "-o", trace, *pids], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(len(pids) // 2):
            if "attached" not in tracer.stderr.readline():
                raise Beyond("strace cannot attach to it")
        for number in range(count):
            began = time.time()
            reply, _ = one_message(peer, bench.sink, run, number)
            spans.append((began, began + reply))
            quiet(peer)
    finally:
        tracer.terminate()
        tracer.communicate()
    calls = [float(line.split()[1]) for line in trace.read_text().splitlines() if re.search(r"sync\w*\(", line)]
    bench.record(peer, "syncs before 250", 0, sum(any(a <= at <= b for a, b in spans) for at in calls) / count)
    bench.record(peer, "syncs", 0, len(calls) / count)


class Measure(NamedTuple):
    run: Callable               # run(bench, peer, at): of a peer that was started for this run alone
    points: tuple               # what `at` is in one run after another
    quick: tuple                # the same with --quick
    every_round: bool = True    # no: it hardly varies and takes long, and is measured in the first round alone
    sink: str = "sink"          # the Bench's that mail goes to, where there is no name server
    settings: Callable = lambda name, at: {}    # of a peer of this name, for this point


MEASURES = {
    "throughput": Measure(throughput, SESSIONS, (1, USUAL)),
    "throughput-20": Measure(throughput_20, SESSIONS, (USUAL,)),
    "latency": Measure(latency, (0,), (0,)),
    "tls": Measure(tls, (0, 1), (0, 1), sink="gateway", settings=tls_settings),
    "large": Measure(large, (0,), (0,)),
    "drain": Measure(drain, (WAITING,), (WAITING // 10,)),
    "drain-20": Measure(drain_20, (WAITING,), (WAITING // 10,)),
    "slow": Measure(slow, (SLOW,), (SLOW // 10,), sink="slow"),
    "syncs": Measure(syncs, (0,), (0,), every_round=False),
    "idle": Measure(idle, (0,), (0,), every_round=False),
    "queue": Measure(queue, QUEUED, (100, 500), every_round=False),
}


def measure(bench, name, at, peer_name):
    """One run of one peer, started for it alone.  False: it is no result."""
    what = f"{name} at {at}" if at else name
    print(f"round {bench.round + 1}: {what}: {peer_name}", file=sys.stderr, flush=True)
    try:
        settings = MEASURES[name].settings(peer_name, at)
        with bench.start(peer_name, getattr(bench, MEASURES[name].sink), **settings) as peer:
            MEASURES[name].run(bench, peer, at)
    except (peers.Absent, Beyond) as why:
        bench.note(f"{peer_name}: {what}: {why}")
    except (Failed, AssertionError, subprocess.TimeoutExpired) as why:
        bench.note(f"{peer_name}: {what}: NO RESULT: {why}")
        return False
    return True


def measure_all(bench, names, peer_names, rounds):
    """True: in all runs every message arrived once."""
    well = True
    for bench.round in range(rounds):
        turn = bench.round % len(peer_names)
        for name in names:
            if bench.round > 0 and not MEASURES[name].every_round:
                continue
            for at in MEASURES[name].quick if bench.quick else MEASURES[name].points:
                for peer_name in peer_names[turn:] + peer_names[:turn]:
                    well = measure(bench, name, at, peer_name) and well
    return well


def spread_out(directory):
    """Asks the file system to place what is made in the directory far apart, and not each
    new directory where another's files were just deleted. True: it will."""
    try:
        return subprocess.run(["chattr", "+T", directory], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def sync_some(directory, number):
    """As a server stores a message: written, synced, renamed, and the name synced."""
    parent = os.open(directory, os.O_RDONLY)
    for i in range(100):
        path = directory / f"sync-{number}-{i}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x" * SIZE)
        os.fsync(fd)
        os.close(fd)
        os.rename(path, f"{path}-stored")
        os.fsync(parent)
        os.unlink(f"{path}-stored")


def sync_rate(directory, processes):
    """Files a second that the disk takes so from as many processes."""
    workers = [multiprocessing.Process(target=sync_some, args=(directory, i)) for i in range(processes)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return round(100 * processes / (time.monotonic() - began))


def surroundings(directory, apart):
    """What the figures depend on; `apart` is whether the spools are spread out in the directory."""
    load = os.getloadavg()      # before anything here is a load itself
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    disk = subprocess.run(["df", "--output=fstype", directory], stdout=subprocess.PIPE, text=True, check=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python3", "tests/bench/bench.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2 ** 30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "disk": disk.stdout.split()[-1],
        "spools": "new for each run, " + ("placed apart" if apart else "placed by the file system"),
        "processor time": "of control groups" if peers.Group.exist() else
                          "of children only as their parents waited for them: there are no control groups here",
        "load before": " ".join(f"{each:.2f}" for each in load),
        "files stored a second by one process": sync_rate(directory, 1),
        "files stored a second by twenty": sync_rate(directory, 20),
    }


def unquiet(load):
    """A warning, or None: whether other work is done on this machine, by the load of the last minute."""
    if load > QUIET:
        return f"this machine is not quiet: its load was {load:.2f} before the start; take the figures again later"
    return None


def versions(bench, peer_names):
    """What each peer says of itself, and the names of those that are here."""
    found, here = {}, []
    for name in peer_names:
        try:
            with bench.start(name) as peer:
                found[name] = peer.version()
            here.append(name)
        except peers.Absent as why:
            found[name] = f"absent: {why}"
    return found, here


# ---- Results -----------------------------------------------------------------------


class Results:
    """The records, by what they are about."""

    def __init__(self, records):
        self._values = collections.defaultdict(dict)        # (peer, metric, at): {round: value}
        for record in records:
            self._values[record["peer"], record["metric"], record["at"]][record["round"]] = record["value"]
        self.peers = [name for name in COMPARED if any(peer == name for peer, _, _ in self._values)]

    def values(self, peer, metric, at):
        """Those of all rounds."""
        return list(self._values.get((peer, metric, at), {}).values())

    def ratios(self, one, other, metric, at):
        """One peer's values by another's, in each round that has both."""
        values, others = (self._values.get((peer, metric, at), {}) for peer in (one, other))
        return [value / others[number] for number, value in values.items() if others.get(number)]

    def ats(self, metric):
        return sorted({at for _, name, at in self._values if name == metric})

    def lines(self, metric):
        """For a chart, whose axes may be logarithmic: each peer's medians where both `at` and
        they are above 0. Memory can be less than 0: freed meanwhile, in processes that ended."""
        series = {}
        for peer in self.peers:
            medians = [(at, statistics.median(self.values(peer, metric, at)))
                       for at in self.ats(metric) if at > 0 and self.values(peer, metric, at)]
            series[peer] = [(at, median) for at, median in medians if median > 0]
        return {peer: line for peer, line in series.items() if line}

    def bars(self, metric):
        """For a chart: each peer's median, least and most."""
        found = {peer: self.values(peer, metric, 0) for peer in self.peers}
        return {peer: (statistics.median(values), min(values), max(values)) for peer, values in found.items() if values}


# Title, metric, and at what, of the summary's lines; None: at all that were tried.
SUMMARY = [
    ("accepted /s", "accepted", USUAL),
    ("delivered /s", "delivered", USUAL),
    ("CPU ms per message", "cpu", USUAL),
    ("to twenty domains: accepted /s", "twenty accepted", USUAL),
    ("... delivered /s", "twenty delivered", USUAL),
    ("... CPU ms per message", "twenty cpu", USUAL),
    ("syncs before the 250", "syncs before 250", 0),
    ("syncs per message", "syncs", 0),
    ("one message, ms to the 250", "latency reply", 0),
    ("one message, ms to its arrival", "latency arrival", 0),
    *((title.format(way), metric.format(metric_way), 0)
      for way, metric_way in (("in plain", "plain"), ("by TLS", "tls"))
      for title, metric in (("one message {}, through a Postfix, ms to its arrival", "{} single arrival"),
                            ("... CPU ms", "{} single cpu"),
                            ("many {}, over connections that are kept, delivered /s", "{} delivered"),
                            ("... CPU ms per message", "{} cpu"))),
    ("KB per idle client", "idle", None),
    ("one message beside them, ms to its arrival", "crowded arrival", None),
    ("... a message from each of them, accepted /s", "crowd", None),
    ("backlog drained /s", "drain", 0),
    ("CPU ms per drained message", "drain cpu", 0),
    ("seconds until it begins", "drain wait", 0),
    ("to twenty domains: backlog drained /s", "twenty drain", 0),
    ("... CPU ms per drained message", "twenty drain cpu", 0),
    ("... seconds until it begins", "twenty drain wait", 0),
    ("seconds for messages to an exchanger that takes one for each", "slow", None),
    ("10 MB messages, MB/s", "large rate", 0),
    ("largest process then, MB", "large one process", 0),
    ("... without its share of what others use, too", "large own", 0),
    ("all processes then, MB", "large all processes", 0),
]

# Title, what grows, and the columns.
GROWTH = [
    ("By sessions", "sessions", [("accepted /s", "accepted"), ("delivered /s", "delivered"), ("CPU ms", "cpu")]),
    ("By sessions, to twenty domains", "sessions", [
        ("accepted /s", "twenty accepted"), ("delivered /s", "twenty delivered"), ("CPU ms", "twenty cpu")]),
    ("By messages that wait for another domain", "waiting", [
        ("accepted /s", "queue accepted"), ("delivered /s", "queue delivered"), ("CPU ms", "queue cpu"),
        ("drained /s", "queue drain"), ("drain CPU ms", "queue drain cpu")]),
]

# File, title, labels of x and y, metric, and whether by the logarithm of y.
LINE_CHARTS = [
    ("accepted", "Accepted, by sessions", "sessions", "messages/s", "accepted", False),
    ("delivered", "Delivered, by sessions", "sessions", "messages/s", "delivered", False),
    ("cpu", "Processor time of a message, by sessions", "sessions", "ms", "cpu", True),
    ("accepted-20", "Accepted for twenty domains, by sessions", "sessions", "messages/s", "twenty accepted", False),
    ("cpu-20", "Processor time of a message to twenty domains", "sessions", "ms", "twenty cpu", True),
    ("idle", "Memory of an idle client", "clients", "KB", "idle", True),
    ("crowded", "One message beside idle clients", "clients", "ms to its arrival", "crowded arrival", True),
    ("queue", "Accepted while a queue waits", "waiting messages", "messages/s", "queue accepted", False),
    ("queue-drain", "Drained, by length of the queue", "waiting messages", "messages/s", "queue drain", False),
]
BAR_CHARTS = [      # file, title, label, metric
    ("latency", "One message, and nothing else to do", "ms to its arrival", "latency arrival"),
    ("drain", "A backlog drained", "messages/s", "drain"),
    ("drain-20", "A backlog for twenty domains drained", "messages/s", "twenty drain"),
    ("large", "Messages of 10 MB", "MB/s", "large rate"),
]


def shown(values):
    """A median, and the range where there are several."""
    if not values:
        return "-"
    middle, least, most = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                           for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least}-{most})"


def table(title, head, rows):
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
             for row in (head, ["-" * width for width in widths], *rows)]
    return "\n".join([title, "", *lines, ""])


# The columns of these two are (heading, cell), where cell(metric, at) is a text.


def summary(results, title, columns):
    """The table with a line for each metric."""
    rows = []
    for name, metric, at in SUMMARY:
        for each in results.ats(metric) if at is None else [at]:
            cells = [cell(metric, each) for _, cell in columns]
            if any(cell != "-" for cell in cells):
                rows.append([name if at is not None else f"{name}: {each:,}", *cells])
    return [table(title, ["", *(heading for heading, _ in columns)], rows)] if rows else []


def growth(results, title, columns):
    """Tables with the metrics side by side, and a line for each of the columns."""
    found = []
    for name, what, metrics in GROWTH:
        rows = []
        for at in results.ats(metrics[0][1]):
            for heading, cell in columns:
                cells = [cell(metric, at) for _, metric in metrics]
                if any(cell != "-" for cell in cells):
                    rows.append([f"{at:,}", heading, *cells])
        if rows:
            found.append(table(f"{name}: {title}", [what, "", *(metric for metric, _ in metrics)], rows))
    return found


def tables(results):
    """Medians of all peers, and the ratios of the first, this server as a rule, to each of the others."""
    first, *others = results.peers or [None]
    medians = [(peer, lambda metric, at, peer=peer: shown(results.values(peer, metric, at))) for peer in results.peers]
    ratios = [(f"{first}/{peer}", lambda metric, at, peer=peer: shown(results.ratios(first, peer, metric, at)))
              for peer in others]
    found = []
    for title, columns in (("medians, and ranges, of all rounds", medians),
                           ("medians, and ranges, of the rounds' ratios", ratios)):
        found += summary(results, title[0].upper() + title[1:], columns) + growth(results, title, columns)
    return found


def report(outcome):
    """The text of it all."""
    results = Results(outcome["records"])
    head = [f"{name}: {value}" for part in ("surroundings", "versions") for name, value in outcome[part].items()]
    notes = "\n".join(dict.fromkeys(outcome["notes"]))
    return "\n".join(["\n".join(head) + "\n", *tables(results), notes, ""])


def draw(results, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name, title, x_label, y_label, metric, log in LINE_CHARTS:
        if results.lines(metric):
            chart = charts.lines(title, x_label, y_label, results.lines(metric), log)
            (directory / f"{name}.svg").write_text(chart)
    for name, title, label, metric in BAR_CHARTS:
        if results.bars(metric):
            (directory / f"{name}.svg").write_text(charts.bars(title, label, results.bars(metric)))


# ---- The command -------------------------------------------------------------------


def some_of(known):
    def parse(text):
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return text.split(",")
    return parse


def options():
    measures = [f"  {name:15} {measure.run.__doc__.splitlines()[0]}" for name, measure in MEASURES.items()]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     epilog="\n".join(["measures:", *measures]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=some_of(MEASURES), default=list(MEASURES), metavar="MEASURE,...",
                        help="of " + ", ".join(MEASURES))
    parser.add_argument("--peers", type=some_of(SERVERS), default=list(SERVERS), metavar="PEER,...",
                        help="of " + ", ".join(SERVERS))
    parser.add_argument("--before", type=Path, metavar="PATH",
                        help="an older binary of this server, one more peer; bench.py's head says how it is built")
    parser.add_argument("--rounds", type=int, default=3, help="3, unless given")
    parser.add_argument("--quick", action="store_true", help="fewer messages, fewer sizes, one round")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw figures go")
    parser.add_argument("--text", type=Path, metavar="FILE", help="where the tables go, beside the terminal")
    parser.add_argument("--charts", type=Path, metavar="DIRECTORY", help="where the charts go")
    parser.add_argument("--again", type=Path, metavar="FILE", help="measures nothing, shows the raw figures of a run")
    chosen = parser.parse_args()
    chosen.before = chosen.before and chosen.before.resolve()
    if chosen.before and not os.access(chosen.before, os.X_OK):
        parser.error(f"--before: {chosen.before} is no program: bench.py's head says how to build it")
    return chosen


def run(chosen):
    """Measures, and returns all that is worth keeping."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # all that are started inherit it
    # Exits, so that all that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    warning = unquiet(os.getloadavg()[0])
    with tempfile.TemporaryDirectory(prefix="bench-", dir=chosen.directory) as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        outcome = {"surroundings": surroundings(directory, spread_out(directory))}
        bench = Bench(directory, chosen.quick, before=chosen.before)
        stack.callback(bench.close)
        if warning:
            bench.note(warning)
        names = [name for name in COMPARED if name in chosen.peers or (name == BEFORE and chosen.before)]
        outcome["versions"], names = versions(bench, names)
        outcome["well"] = measure_all(bench, chosen.only, names, 1 if chosen.quick else chosen.rounds)
        outcome.update(notes=bench.notes, records=bench.records)
    return outcome


def main():
    chosen = options()
    if chosen.again:
        outcome = json.loads(chosen.again.read_text())
    elif os.geteuid() == 0:
        outcome = run(chosen)
    else:
        sys.exit("bench: only root can take the ports 25 and 53, and not every peer can be told others")
    print(report(outcome), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(outcome, indent=1) + "\n")
    if chosen.text:
        chosen.text.write_text(report(outcome))
    if chosen.charts:
        draw(Results(outcome["records"]), chosen.charts)
    sys.exit(0 if outcome["well"] else 1)


if __name__ == "__main__":
    main()
