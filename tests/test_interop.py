"""The relay among programs that others wrote, and nothing else of ours in that world."""
import re

import pytest

import peers
from lab import run, wait_for
from programs import BODY, GREETINGS, LETTER, check_dump, deliver, name_server, on_the_wire, smtp_sink, swaks


def test_nothing_but_the_relay_is_ours(relay, tmp_path):
    """swaks sends; dnsmasq says where to; smtp-sink takes it; and smtp -l has nothing left."""
    letter = tmp_path / "letter"
    letter.write_text(LETTER)
    with smtp_sink(tmp_path / "sink") as sink, name_server("dnsmasq", [sink.host], tmp_path) as server:
        ours = relay(dns=server, mx_port=sink.port)
        swaks(ours.port, letter)
        ours.wait_for_log(r"to=<friend@example.net> relay=host.example.net\S* .*status=sent ")
        check_dump(sink.dump(), b"ESMTP", LETTER + "\n")      # the empty line is swaks'
        wait_for(lambda: not ours.queue(), what="an empty queue")
    assert run("-l", "-q", ours.spool).returncode == 0


@pytest.mark.parametrize("name", ["postfix", "exim", "opensmtpd", "haraka"])
def test_mail_server_between_two_of_ours(dns, exchangers, relay, start_peer, monkeypatch, tmp_path, name):
    """It is the exchanger of the first, and the second is its smarthost."""
    monkeypatch.setattr(peers, "SIZE", 2 * len(GREETINGS))
    far, = exchangers(1)
    second = relay("-s", f"{far.host}:{far.port}", "-h", "second.example.org", spool=tmp_path / "second")
    between = start_peer(name, next_hop=("127.0.0.1", second.port))
    dns.mx("example.net", (10, "mx.example.net"))
    dns.a("mx.example.net", between.host)
    first = relay("-h", "first.example.org", mx_port=between.port)

    deliver(first, ["friend@example.net"], GREETINGS)
    message, = far.wait_for_messages(1, timeout=60)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    # Above the letter stands who had it, and nothing else; some write a line for each way.
    trace = re.match(rb"(?:Received: .*\n(?:[ \t].*\n)*)+", message.data)[0]
    by = re.findall(rb"\n\s+by (\S+)", trace)
    assert (by[0], by[-1]) == (b"second.example.org", b"first.example.org")
    assert message.data[len(trace):] == on_the_wire(GREETINGS)

    deliver(first, ["other@example.net"], GREETINGS + BODY + BODY)      # RFC 1870: it said what it takes
    outcome, = first.outcomes("other@example.net")
    assert (outcome.status, outcome.words) == ("failed", "5.3.4 the message is larger than this exchanger takes")
