"""What the tests are given: the lab's parts, put together and cleaned up again."""
import contextlib
import socket
from types import SimpleNamespace

import pytest

import lab


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


@pytest.fixture
def relay(spool, dns):
    """relay("-v", mx_port=near.port): a Relay with this test's spool and name server."""
    with contextlib.ExitStack() as stack:
        def make(*options, **settings):
            made = lab.Relay(*options, **{"spool": spool, "dns": dns, **settings})
            # Called in reverse order; pytest shows the log of a test that failed.
            stack.callback(lambda: print(*made.log, sep="\n"))
            stack.callback(made.stop)
            return made
        yield make


@pytest.fixture
def world(dns, exchangers, relay):
    """All at its simplest: mail for example.net goes to world.exchanger."""
    exchanger, = exchangers(1)
    dns.mail("example.net", (10, exchanger))
    return SimpleNamespace(dns=dns, exchanger=exchanger, relay=relay(mx_port=exchanger.port))
