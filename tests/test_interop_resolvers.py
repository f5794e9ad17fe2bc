"""Name servers that others wrote: some know the zone, some ask one that does, over UDP
and TCP, with signatures and without.  By each of them the relay finds its exchangers."""
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import lab
from programs import CROWD, KINDS, LETTER, ask, deliver, name_server, on_the_wire, without_received


@pytest.fixture(scope="module")
def fleet():
    """The exchangers at all the addresses that a name server may know."""
    made = lab.exchangers(CROWD)
    yield made
    with ThreadPoolExecutor(CROWD) as pool:     # one by one it would take seconds
        list(pool.map(lab.Exchanger.stop, made))


@pytest.fixture(scope="module", params=KINDS)
def world(request, fleet, tmp_path_factory):
    """A name server, and a relay that asks it: one for all tests, who mail different domains."""
    directory = tmp_path_factory.mktemp("dns")
    with name_server(request.param, [exchanger.host for exchanger in fleet], directory) as dns:
        relay = lab.Relay(spool=directory / "spool", dns=dns, mx_port=fleet[0].port)
        try:
            yield SimpleNamespace(dns=dns, relay=relay, fleet=fleet)
        finally:
            relay.stop()


@pytest.fixture
def mail(world):
    """mail(domain): what became of a message to it, and where it is now, as often as it is."""
    first_line = len(world.relay.log)

    def mail_to(domain):
        for exchanger in world.fleet:
            exchanger.messages.clear()
        deliver(world.relay, [f"friend@{domain}"], LETTER)
        outcome, = world.relay.outcomes(f"friend@{domain}")
        return outcome, [message for exchanger in world.fleet for message in exchanger.messages]
    yield mail_to
    print(*world.relay.log[first_line:], sep="\n")      # pytest shows it where a test has failed


@pytest.mark.parametrize("domain", [
    pytest.param("example.net", id="MX"),
    pytest.param("host.example.net", id="no MX but an address"),        # RFC 5321 5.1
    pytest.param("alias.example.net", id="CNAME"),
    pytest.param("chain.example.net", id="CNAME of a CNAME"),
    pytest.param("alias-mx.example.net", id="MX names a CNAME"),
])
def test_name_server_leads_to_an_exchanger(mail, domain):
    outcome, messages = mail(domain)
    assert outcome.status == "sent"
    message, = messages
    assert message.recipients == [f"<friend@{domain}>"]
    assert without_received(message.data) == on_the_wire(LETTER)


@pytest.mark.parametrize("domain, type", [
    pytest.param("crowd.example.net", "MX", id="MX and the best amid them"),
    pytest.param("fleet.example.net", "MX", id="MX all of one preference"),
    pytest.param("many.example.net", "A", id="addresses"),
])
def test_name_server_knows_more_than_fits_a_packet(world, mail, domain, type):
    """The answer is truncated, and whole over TCP (RFC 1035 4.2.1)."""
    flags, _ = ask(world.dns, domain, type)
    assert flags & lab.TRUNCATED
    outcome, messages = mail(domain)
    assert outcome.status == "sent"
    assert len(messages) == 1


def test_name_server_leads_to_an_ipv6_exchanger(ipv6, world, exchangers, relay):
    exchanger, = exchangers(0, "::1")
    deliver(relay(dns=world.dns, mx_port=exchanger.port), ["friend@mail6.example.net"], LETTER)
    message, = exchanger.wait_for_messages(1)
    assert without_received(message.data) == on_the_wire(LETTER)


@pytest.mark.parametrize("domain, status", [
    pytest.param("nobody.example.net", "5.1.2", id="NXDOMAIN"),
    pytest.param("text.example.net", "5.4.4", id="NODATA"),
    pytest.param("null.example.net", "5.1.10", id="null MX"),           # RFC 7505
])
def test_name_server_knows_no_exchanger(mail, domain, status):
    outcome, messages = mail(domain)
    assert outcome.status == "failed"
    assert outcome.words.startswith(status + " ")
    assert messages == []


def test_where_signatures_are_checked_nobody_is_led_to_a_forger(world, mail):
    """The relay checks none, but its name server may: then it says SERVFAIL (RFC 4035 5.5),
    and that is for later."""
    outcome, messages = mail("forged.example.net")
    if world.dns.kind.validates:
        assert (outcome.status, messages) == ("later", [])
        assert outcome.words.startswith("4.4.3 ")
    else:
        assert outcome.status == "sent"
        assert len(messages) == 1
