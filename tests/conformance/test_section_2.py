"""RFC 5321, section 2: the SMTP model."""
import re

import pytest

from dialogue import UNKNOWN, Ended, expect, fail, letter, must, nothing, reject, should, unless_later

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
    expect(stranger.say("EHLO client.example"), "250")


@must
def test_2_2_1_b_helo_is_supported(stranger):
    """RFC 5321 2.2.1, 4.1.1.1, 4.5.1: HELO stays, for clients that know no other."""
    expect(stranger.say("HELO client.example"), "250")


@must
def test_2_2_2_a_only_registered_extensions_are_offered(session):
    """RFC 5321 2.2.2: a keyword without X before it is that of a registered extension."""
    nothing(sorted({keyword for keyword in session.extensions if keyword[0] != "X"} - REGISTERED),
            "not registered, and announced")


@pytest.fixture
def single_reply(session):
    """Says something that is one line to who knows lines, and looks how many it is taken for."""
    def check(octets):
        session.send(octets)
        try:
            session.reply()
        except Ended:
            return
        if session.rest():
            fail(f"{octets.decode()!r} has one CRLF, and is answered twice")
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
    nothing(re.findall(rb"[^\n]*(?<!\r)\n|[^\n]*\r(?!\n)[^\n]*", tour.raw), "lines that do not end by CRLF alone")
    tour.complete()


@must
def test_2_4_a_case_does_not_matter_in_verbs_and_keywords(session):
    """RFC 5321 2.4: verbs, and the keywords behind them, may come in any case."""
    expect(session.say("nOoP"), "250")
    expect(session.say("rSeT"), "250")
    reject(session.say(f"mail from:<{session.target.sender}>"), *UNKNOWN, "501")


@must
def test_2_4_b_the_case_of_local_parts_is_kept(session):
    """RFC 5321 2.4: a relay hands local parts on with their capitals."""
    local, _, domain = (session.target.recipient or "").rpartition("@")
    path = f"{local.swapcase()}@{domain}"
    arrived = session.deliver(letter(), recipients=[path]).recipients
    if arrived != [f"<{path}>"]:
        fail(f"<{path}> has become {' '.join(arrived)}")


@should
def test_2_4_c_envelopes_beyond_ascii_are_refused(session):
    """RFC 5321 2.4: a command with octets beyond ASCII is to be refused.  SMTPUTF8 (RFC 6531)
    permits them in MAIL and RCPT with its parameter, and in no other command."""
    expect(unless_later(session.say("MAIL FROM:<müller@example.org>")), "5")


@should
def test_2_4_d_8bitmime_is_supported(extended):
    """RFC 5321 2.4: 8-bit content can be asked for with 8BITMIME."""
    if "8BITMIME" not in extended.extensions:
        fail("8BITMIME is not announced")
