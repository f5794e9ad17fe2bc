"""The peers relay as peers.py says: what is compared with them stands on that."""
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

import lab
import peers

RELAYS = [name for name in peers.PEERS if name != "aiosmtpd"]


def send(peer):
    with lab.Client(peer.port, peer.host) as client:
        reply = client.deliver("nour@example.org", ["friend@example.net"], "Subject: x\n\nDear Nour\n")
    assert reply.startswith("250 ")


def arrived(exchanger):
    message, = exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    assert message.data.endswith(b"Dear Nour\r\n")


@pytest.mark.parametrize("name", RELAYS)
def test_relays_to_the_next_hop_and_tries_again_when_told(start_peer, exchangers, name):
    exchanger, = exchangers(1)
    peer = start_peer(name, next_hop=(exchanger.host, exchanger.port))
    if peer.flush():                # else it cannot be told
        exchanger.set(replies={"MAIL": ["451 4.7.1 greylisted"]})
    send(peer)
    # What it is told while it still writes down the first try is in vain.
    lab.wait_for(lambda: exchanger.messages or (exchanger.connections and not peer.flush()), what="it arriving")
    arrived(exchanger)
    # Without a control group, hundredths of a second are counted.
    assert peer.cpu() > 0 or not peers.Group.exist()


@pytest.mark.parametrize("name", RELAYS)
def test_relays_where_the_name_server_says(start_peer, name):
    if os.geteuid() != 0:
        pytest.skip("only root may take the ports 53 and 25")
    with ExitStack() as stack:
        exchanger = lab.Exchanger(lab.loopback(), 25)
        stack.callback(exchanger.stop)
        dns = lab.Nameserver(lab.loopback(), 53)
        stack.callback(dns.stop)
        dns.mail("example.net", (10, exchanger))
        dns.a("example.org", "192.0.2.1")       # the sender's domain
        send(start_peer(name, nameserver=dns.address.partition(":")[0]))
        arrived(exchanger)
        assert ("example.net", "MX") in [(query.name, query.type) for query in dns.queries]


def test_processor_time_is_that_of_all_descendants():
    """Of one that has ended and was not waited for, too."""
    group = peers.Group()
    if group.directory is None:
        pytest.skip("there are no control groups here")
    try:
        busy = "i=0; while [ $i -lt 30000 ]; do i=$((i + 1)); done"
        # The shell that is busy loses its parent, and init gets it: no child of ours has this time.
        subprocess.run(group.within(["sh", "-c", f"sh -c '{busy}' & exit"]), check=True)
        lab.wait_for(lambda: not group.pids(), what="the busy process ending")
        assert group.cpu() > 0.01
    finally:
        group.remove()


def test_this_server_is_in_its_control_group_from_the_beginning(start_peer):
    peer = start_peer("smtp")
    if peer._group.directory is None:
        pytest.skip("there are no control groups here")
    # The shell that put it there has become it.
    lab.wait_for(lambda: len(peer.pids()) > 1, what="the queue manager")
    assert set(peer.pids()) == set(peer._group.pids())


def test_what_a_peer_is_told_to_do_counts_as_its_own_work(start_peer):
    if not peers.Group.exist():
        pytest.skip("there are no control groups here")
    peer = start_peer("postfix")
    assert peer._order("sh", "-c", f"grep -q {peer._group.directory.name} /proc/self/cgroup")


def test_another_binary_goes_by_its_label(start_peer, exchangers, tmp_path):
    exchanger, = exchangers(1)
    binary = tmp_path / "older"
    binary.symlink_to(lab.BINARY)
    peer = start_peer("smtp", binary=binary, label="before", next_hop=(exchanger.host, exchanger.port))
    assert (peer.name, peer.version()) == ("before", f"this server, as in {binary}")
    assert Path(f"/proc/{peer.process.pid}/cmdline").read_bytes().startswith(bytes(binary) + b"\0")
    send(peer)
    arrived(exchanger)


def test_a_plain_server_takes_mail(start_peer):
    send(start_peer("aiosmtpd"))


def runs(pid):
    """Not where it has ended, and init has yet to take note of that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_of_a_peer_is_left(start_peer):
    peer = start_peer("postfix")
    pids = peer.pids()
    assert len(pids) > 1
    peer.stop()
    assert not any(runs(pid) for pid in pids)
    assert not peer.directory.exists()
