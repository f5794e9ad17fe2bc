"""The extensions that protect a session: RFC 3207 STARTTLS, RFC 4954 AUTH."""
import base64
import re

import pytest

from dialogue import Ended, expect, fail, must, not_applicable, nothing, reject, should, unless_later

# ---- RFC 3207: STARTTLS ----------------------------------------------------------------------


@pytest.fixture
def plain(target):
    """A session that has not begun TLS, and may."""
    session = target.session(login=False)
    session.needs("STARTTLS")
    return session


@must
def test_rfc3207_2_a_the_keyword_has_no_parameter(plain):
    """RFC 3207 2: it stands alone on its line."""
    nothing(plain.needs("STARTTLS"), "parameters of the keyword")


@must
def test_rfc3207_4_a_starttls_takes_no_parameter(plain):
    """RFC 3207 4: with one it is answered 501."""
    expect(unless_later(plain.say("STARTTLS now")), "501")


@must
def test_rfc3207_4_b_what_is_announced_can_be_begun(plain):
    """RFC 3207 4: STARTTLS is answered 220 (454 for now), and a handshake follows."""
    expect(unless_later(plain.say("STARTTLS")), "220")
    error = plain.shake_hands()
    if error:
        fail(f"after the reply there is no handshake: {error}")


@must
def test_rfc3207_4_2_a_the_session_is_forgotten(plain, target):
    """RFC 3207 4.2: what the client said before the handshake, such as EHLO, counts no more."""
    other = target.connect()
    if other.say(f"MAIL FROM:<{target.sender}>").code != "503":
        not_applicable("the server needs no EHLO")
    other.close()
    plain.begin_tls()
    expect(plain.say(f"MAIL FROM:<{target.sender}>"), "503")


@must
def test_rfc3207_4_2_b_a_transaction_is_forgotten(plain, target):
    """RFC 3207 4.2: the state after the handshake is that after the greeting: RCPT needs another MAIL."""
    plain.begin()
    plain.begin_tls()
    plain.introduce()
    expect(plain.say(f"RCPT TO:<{target.recipient or 'Postmaster'}>"), "503")


@must
def test_rfc3207_4_2_c_starttls_is_not_announced_inside_tls(plain):
    """RFC 3207 4.2: the answer to EHLO after the handshake does not have it."""
    plain.begin_tls()
    plain.introduce()
    if "STARTTLS" in plain.extensions:
        fail("STARTTLS is announced once more")


@must
def test_rfc3207_4_2_d_what_came_in_plain_is_discarded(plain):
    """RFC 3207 4.2, 6: commands in the packet of STARTTLS may be an attacker's, and are not answered
    inside TLS."""
    plain.send(b"STARTTLS\r\nDATA\r\n")
    if plain.reply("STARTTLS").code != "220":
        not_applicable("the server refuses it")
    if plain.shake_hands():
        return
    try:
        expect(plain.say("QUIT"), "2")      # 5yz is what DATA is answered
    except Ended:
        return


# ---- RFC 4954: AUTH --------------------------------------------------------------------------


@pytest.fixture
def anonymous(target):
    """A session that has not logged in, and may: inside TLS, where that is needed for it."""
    session = target.session(login=False)
    session.protect()
    session.needs("AUTH")
    return session


@pytest.fixture
def exchange(anonymous):
    """A session that is asked for a response: after 334."""
    mechanism = next((each for each in ("PLAIN", "LOGIN") if each in map(str.upper, anonymous.needs("AUTH"))), None)
    if mechanism is None:
        not_applicable("neither PLAIN nor LOGIN is announced")
    reply = anonymous.say(f"AUTH {mechanism}")
    if reply.code != "334":
        not_applicable(f"the server asks for nothing: {reply.told}")
    return anonymous


@must
def test_rfc4954_3_a_the_keyword_lists_mechanisms(anonymous):
    """RFC 4954 3, RFC 4422 3.1: each has 1 to 20 capital letters, digits, hyphens and underscores."""
    mechanisms = anonymous.needs("AUTH")
    if not mechanisms:
        fail("no mechanism stands behind AUTH")
    nothing([each for each in mechanisms if not re.fullmatch("[A-Z0-9_-]{1,20}", each)], "not a mechanism's name")


@must
def test_rfc4954_4_a_unknown_mechanisms_are_answered_504(anonymous):
    """RFC 4954 4: a mechanism that the server does not have."""
    expect(unless_later(anonymous.say("AUTH X-CONFORMANCE")), "504")


@must
def test_rfc4954_4_b_a_star_cancels_the_exchange(exchange):
    """RFC 4954 4: a lone * in place of a response is answered 501."""
    expect(exchange.say("*"), "501")


@must
def test_rfc4954_4_c_what_is_not_base64_is_answered_501(exchange):
    """RFC 4954 4: a response that cannot be decoded."""
    expect(exchange.say("!!!"), "501")


@must
def test_rfc4954_4_d_auth_is_refused_inside_a_transaction(anonymous):
    """RFC 4954 4: it is answered 503 there."""
    anonymous.begin()
    expect(anonymous.say("AUTH PLAIN"), "503")


@must
def test_rfc4954_4_e_the_right_password_is_answered_235(anonymous):
    """RFC 4954 4: that is what success is."""
    expect(unless_later(anonymous.log_in()), "235")


@must
def test_rfc4954_4_f_nobody_logs_in_twice(anonymous):
    """RFC 4954 4: after a success any further AUTH is answered 503."""
    if anonymous.log_in().code != "235":
        not_applicable("there is no success")
    expect(anonymous.say("AUTH PLAIN"), "503")


@should
def test_rfc4954_4_g_a_wrong_password_is_answered_535(anonymous):
    """RFC 4954 4, 6: where no other code says it better, such as 534 and 538 for a mechanism."""
    if "PLAIN" not in map(str.upper, anonymous.needs("AUTH")):
        not_applicable("PLAIN is not announced")
    response = base64.b64encode(b"\0conformance\0wrong").decode()
    expect(unless_later(anonymous.say(f"AUTH PLAIN {response}")), "535", "534", "538")


@must
def test_rfc4954_6_a_some_commands_need_no_login(anonymous):
    """RFC 4954 6: NOOP, RSET and EHLO are not answered 530."""
    for command in "NOOP", "RSET", "EHLO client.example":
        reject(anonymous.say(command), "530")
