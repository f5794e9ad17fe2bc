"""RFC 5321, section 2: the SMTP model."""
import re

import pytest

from dialogue import UNKNOWN, Closed, letter, must, should

# The registry of service extensions that IANA keeps (2.2.2), and VRFY, which may be
# listed all the same (3.5.2).
REGISTERED = set("""
    8BITMIME ATRN AUTH BINARYMIME BURL CHECKPOINT CHUNKING CONNEG CONPERM DELIVERBY DSN
    ENHANCEDSTATUSCODES ETRN EXPN FUTURERELEASE HELP LIMITS MT-PRIORITY MTRK NO-SOLICITING ONEX
    PIPELINING REQUIRETLS RRVS SAML SEND SIZE SMTPUTF8 SOML STARTTLS SUBMITTER TURN UTF8SMTP VERB VRFY
    """.split())


@must
def test_2_2_1_a_ehlo_is_supported(stranger):
    """RFC 5321 2.2.1, 4.5.1: every server supports EHLO, even one without any extension."""
    assert stranger.say("EHLO client.example").code == "250"


@must
def test_2_2_1_b_helo_is_supported(stranger):
    """RFC 5321 2.2.1, 4.1.1.1, 4.5.1: HELO stays, for clients that know no other."""
    assert stranger.say("HELO client.example").code == "250"


@must
def test_2_2_2_a_only_registered_extensions_are_offered(session):
    """RFC 5321 2.2.2: a keyword without X before it is that of a registered extension."""
    assert {keyword for keyword in session.extensions if keyword[0] != "X"} - REGISTERED == set()


@pytest.fixture
def single_reply(session):
    """Says something that is one line to who knows lines, and looks how many it is taken for."""
    def check(octets):
        session.send(octets)
        try:
            session.reply()
        except Closed:
            return
        assert session.rest() == []
    return check


@must
def test_2_3_8_a_a_bare_lf_ends_no_command(single_reply):
    """RFC 5321 2.3.8: nothing but CRLF is recognized as the end of a line: not LF."""
    single_reply(b"NOOP\nNOOP\r\n")


@must
def test_2_3_8_b_a_bare_cr_ends_no_command(single_reply):
    """RFC 5321 2.3.8: nothing but CRLF is recognized as the end of a line: not CR."""
    single_reply(b"NOOP\rNOOP\r\n")


@must
def test_2_3_8_c_replies_end_with_crlf(tour):
    """RFC 5321 2.3.8: nothing but CRLF is generated as the end of a line."""
    assert re.fullmatch(rb"([^\r\n]*\r\n)+", tour.raw)


@must
def test_2_4_a_case_does_not_matter_in_verbs_and_keywords(session):
    """RFC 5321 2.4: verbs, and the keywords behind them, may come in any case."""
    assert session.say("nOoP").code == "250"
    assert session.say("rSeT").code == "250"
    assert session.say(f"mail from:<{session.target.sender}>").code not in UNKNOWN + ("501",)


@must
def test_2_4_b_the_case_of_local_parts_is_kept(session):
    """RFC 5321 2.4: a relay hands local parts on with their capitals."""
    local, _, domain = (session.target.recipient or "").rpartition("@")
    path = f"{local.swapcase()}@{domain}"
    assert session.deliver(letter(), recipients=[path]).recipients == [f"<{path}>"]


@should
def test_2_4_c_envelopes_beyond_ascii_are_refused(session):
    """RFC 5321 2.4: a command with octets beyond ASCII is to be refused, unless an
    extension (RFC 6531) was asked for."""
    assert session.say("MAIL FROM:<müller@example.org>").code[0] == "5"


@should
def test_2_4_d_8bitmime_is_supported(extended):
    """RFC 5321 2.4: 8-bit content can be asked for with 8BITMIME."""
    assert "8BITMIME" in extended.extensions
