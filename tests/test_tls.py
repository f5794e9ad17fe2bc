"""TLS, by openssl(1): to exchangers that offer it, and to smarthosts with a password."""
import pytest

from lab import wait_for


@pytest.fixture
def secure(world, authority):
    """The world, whose exchanger offers STARTTLS."""
    world.exchanger.set(certificate=authority.certificate(world.exchanger.name, world.exchanger.host))
    return world


def test_where_it_is_offered(secure):
    secure.relay.send("friend@example.net")
    message, = secure.exchanger.wait_for_messages(1)
    assert message.connection.tls == "TLSv1.3"
    outcome, = secure.relay.outcomes("friend@example.net")
    assert outcome.relay.endswith("]/tls")
