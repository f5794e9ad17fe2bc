"""What was acknowledged survives, whenever and wherever the relay is killed."""
import collections
import os
import random
import re

import pytest

from crash import soak
from lab import children, wait_for

BODY = "Subject: x\n\nDear Nour\n"


def send(client):
    """Whether the relay said that it has the message."""
    try:
        return client.deliver("nour@example.org", ["b@example.net"], BODY).startswith("250 ")
    except (OSError, AssertionError):
        return False


def test_soak(spool):
    """`make crash` is the long one."""
    lost, cut, _, unexplained = soak(spool, 8).account()
    assert lost == cut == unexplained == []


def life(trace):
    """The system calls of each process, (name, how often), as strace has seen them."""
    calls = collections.Counter(re.findall(r"^(\d+) +(\w+)\(", trace, re.MULTILINE))
    most = collections.defaultdict(int)
    for (_, name), count in calls.items():
        most[name] = max(most[name], count)
    return [(name, n) for name, count in sorted(most.items()) for n in range(1, count + 1)]


@pytest.mark.skipif("SANITIZED" in os.environ, reason="strace and sanitizers do not go together")
@pytest.mark.parametrize("forwarders", [50, 1], ids=["server", "manager"])
def test_killed_at_each_system_call(world, relay, tmp_path, strace, forwarders):
    """Whichever process comes to a call for the n-th time is killed there, and then all others are:
    the server and the child that stores and forwards; or, where no slot is for fresh mail, the
    queue manager and its batch.  A sample of the calls, or with CRASH=all every one."""
    exchanger = world.exchanger
    server = relay("-j", forwarders, mx_port=exchanger.port, spool=tmp_path / "other")

    def victim():
        manager = wait_for(lambda: children(server.pid), what="the queue manager")[0]
        return server.pid if forwarders > 1 else manager

    with server.client() as client, strace(victim(), "trace=all") as trace:
        assert send(client)
        exchanger.wait_for_messages(1)
        wait_for(lambda: not server.queue(), what="the message removed")
        points = life(trace())
    assert len(points) > 50
    if os.environ.get("CRASH") != "all":
        points = random.sample(points, 8)
    for name, n in points:
        before = len(exchanger.messages)
        with server.client() as client, strace(victim(), f"inject={name}:signal=KILL:when={n}"):
            acknowledged = send(client)
            server.kill()
        arrived = len(exchanger.messages) - before
        server.start()
        server.hangup()
        wait_for(lambda: not server.queue(), what=f"an empty queue after {name} number {n}")
        got = len(exchanger.messages) - before
        assert got >= acknowledged, f"killed at {name} number {n}: acknowledged, and lost"
        assert got <= 1 + arrived, f"killed at {name} number {n}: sent again after its record"
        for message in exchanger.messages[before:]:
            assert message.data.endswith(BODY.replace("\n", "\r\n").encode())
