"""What the tests are given: the lab's parts, put together and cleaned up again."""
import contextlib
import ctypes
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from types import SimpleNamespace

import pytest

import lab
import peers


def pytest_configure(config):
    """The marks of tests/conformance."""
    config.addinivalue_line("markers", "must: the RFC says MUST, MUST NOT or SHALL, or its grammar does")
    config.addinivalue_line("markers", "should: the RFC says SHOULD or SHOULD NOT")


@pytest.fixture
def spool(tmp_path):
    """A spool that does not exist yet: the relay makes its own."""
    return tmp_path / "spool"


@pytest.fixture
def ipv6():
    """For tests that need ::1, which not every machine and container has."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


@pytest.fixture
def dns():
    nameserver = lab.Nameserver()
    yield nameserver
    nameserver.stop()


@pytest.fixture
def exchangers():
    """near, far = exchangers(2): see lab.exchangers()."""
    with contextlib.ExitStack() as stack:
        def make(count, *hosts):
            made = lab.exchangers(count, *hosts)
            for exchanger in made:
                stack.callback(exchanger.stop)
            return made
        yield make


@pytest.fixture(scope="session")
def authority():
    """Signs certificates: see lab.Authority.  Every user has to be able to read its own,
    as a relay that was started by root does as another."""
    if lab.OPENSSL is None:
        pytest.skip("openssl is not installed")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield lab.Authority(directory)


@pytest.fixture
def relay(spool, dns):
    """relay("-v", mx_port=near.port): a Relay with this test's spool and name server."""
    with contextlib.ExitStack() as stack:
        def make(*options, **settings):
            made = lab.Relay(*options, **{"spool": spool, "dns": dns, **settings})
            make.made.append(made)
            # Called in reverse order; pytest shows the log of a test that failed.
            stack.callback(lambda: print(*made.log, sep="\n"))
            stack.callback(made.stop)
            return made
        make.made = []
        yield make


@pytest.fixture
def own_network():
    """A network of nobody else's, which this thread and all that it starts is in until the test
    is over.  own_network("ip", "link", "set", "lo", "up") runs a command in it."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root may make a network, and needs ip")
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    with open("/proc/thread-self/ns/net") as home:
        if libc.unshare(clone_newnet) != 0:
            pytest.skip(f"no network of our own: {os.strerror(ctypes.get_errno())}")
        try:
            yield lambda *command: subprocess.run(command, check=True)
        finally:
            if libc.setns(home.fileno(), clone_newnet) != 0:
                pytest.exit("there is no way back into the network of this machine")


@pytest.fixture
def unharmed(request, relay):
    """For a test that attacks: when it is over, each of its relays still runs, has
    forgotten the attack and is at work (see Relay.expect_unharmed()).  The value is
    the domain that mail is sent to then."""
    host = lab.loopback()
    shared = [request.getfixturevalue("server")] if "server" in request.fixturenames else []
    yield f"[{host}]"
    for server in shared + relay.made:
        server.expect_unharmed(host)


@pytest.fixture
def world(dns, exchangers, relay):
    """All at its simplest: mail for example.net goes to world.exchanger."""
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    return SimpleNamespace(dns=dns, exchanger=exchanger, relay=relay(mx_port=exchanger.port))


@pytest.fixture
def wrapped(tmp_path):
    """wrapped("ulimit -n 64"): the program, started by a shell that has done this before;
    wrapped(command="strace"): started by that command; wrapped(redirect="2>&-"): so."""
    def wrap(before=":", command="", redirect=""):
        path = tmp_path / "wrapped"
        path.write_text(f"""#!/bin/sh
{before} || exit
exec {command} {shlex.quote(str(lab.BINARY))} "$@" {redirect}
""")
        path.chmod(0o700)
        return path
    return wrap


@pytest.fixture
def many_descriptors():
    """Room for as many in the test itself; the relay is given it, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 2500
    if hard != resource.RLIM_INFINITY and hard < enough:
        pytest.skip(f"no process may open more than {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def start_peer():
    """start_peer("postfix", next_hop=...): a peer, or a skipped test where it is absent."""
    with contextlib.ExitStack() as stack:
        def start(name, **settings):
            try:
                peer = stack.enter_context(peers.start(name, **settings))
            except peers.Absent as reason:
                pytest.skip(str(reason))
            stack.callback(lambda: print(peer.log()))
            return peer
        yield start


def whole_calls(seen):
    """What strace has written, with each system call in one line: where another process got between its beginning and
    its end, these are two lines.  It stands where it ended; one that has not ended yet, where it began."""
    lines, begun = [], {}
    for line in seen.splitlines():
        pid = line.partition(" ")[0]
        rest = re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line)
        if rest and pid in begun:
            start = begun.pop(pid)
            line = lines[start].removesuffix(" <unfinished ...>") + rest[1]
            lines[start] = None
        elif line.endswith(" <unfinished ...>"):
            begun[pid] = len(lines)
        lines.append(line)
    return "".join(f"{line}\n" for line in lines if line is not None)


@pytest.fixture
def strace(tmp_path):
    """with strace(pid, "trace=fsync,write", "inject=fsync:error=EIO") as trace: watches a
    process and all it forks, and makes its system calls fail, until the block ends.
    trace() is what was seen so far, each line with the process's id before it.  With a
    `path`, system calls that have nothing to do with it are left alone."""
    if lab.EMULATED:
        pytest.skip("an emulator calls more than the program does")
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")

    @contextlib.contextmanager
    def attached(pid, *expressions, path=None):
        output = tmp_path / "trace"
        options = [option for expression in expressions for option in ("-e", expression)]
        options += ["-P", path] if path else []
        tracer = subprocess.Popen(["strace", "-f", "-y", "-s", "200", "-o", output, "-p", str(pid), *options],
                                  stderr=subprocess.PIPE, text=True)
        line = tracer.stderr.readline()
        if "attached" not in line:
            tracer.communicate()
            if "ptrace" in line or "not permitted" in line:
                pytest.skip(f"this machine does not let us trace: {line.strip()}")
            raise AssertionError(line)
        try:
            yield lambda: whole_calls(output.read_text())
        finally:
            # It lets go, and the process runs on.  The signal that comes just before
            # strace begins to wait is seen only when that ends: so it is said again.
            while tracer.poll() is None:
                tracer.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tracer.communicate(timeout=0.2)
    return attached


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One relay for all tests of a module that talk to it and send nothing on."""
    dns = lab.Nameserver()
    relay = lab.Relay(spool=tmp_path_factory.mktemp("server") / "spool", dns=dns)
    yield relay
    relay.stop()
    dns.stop()


@pytest.fixture
def client(server):
    """Somebody who talks to it."""
    with server.client() as client:
        yield client
