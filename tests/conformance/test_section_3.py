"""RFC 5321, section 3: the procedures."""
import re

from dialogue import DATE, FROM, UNKNOWN, Closed, letter, must, not_applicable, should

NOBODY = "no-such-user-f3a91c"
MAILBOX = re.compile(r"[^\s<>@]+@[^\s<>@]+")


def refused(target):
    """A session that was greeted with 554."""
    session = target.connect(target.stranger)
    if session.greeting.code != "554":
        not_applicable("the server does not refuse this session with 554"
                       + (": name an address that it refuses with STRANGER" if not target.stranger else ""))
    return session


@must
def test_3_1_a_a_refused_session_stays_open_until_quit(target):
    """RFC 5321 3.1: who greets with 554 still waits for QUIT."""
    assert refused(target).say("QUIT")


@should
def test_3_1_b_commands_in_a_refused_session_are_answered_503(target):
    """RFC 5321 3.1: behind a 554 everything but QUIT is out of sequence."""
    session = refused(target)
    try:
        reply = session.say("NOOP")
    except (Closed, ConnectionError):
        not_applicable("the server does not wait")
    assert reply.code == "503"


@must
def test_3_2_a_helo_is_not_answered_as_ehlo_is(target):
    """RFC 5321 3.2: no list of extensions for who says HELO."""
    keywords = target.session().extensions
    reply = target.connect().welcomed().say("HELO client.example")
    assert [line for line in reply.lines[1:] if line[4:].split(" ")[0].upper() in keywords] == []


@must
def test_3_3_a_rcpt_needs_mail(session):
    """RFC 5321 3.3: RCPT without MAIL before it is answered 503."""
    assert session.say("RCPT TO:<Postmaster>").code == "503"


@must
def test_3_3_b_data_needs_a_recipient(session):
    """RFC 5321 3.3, 4.1.4: a transaction without a recipient sends nothing: DATA is answered
    503 or 554, or else the final dot is refused."""
    session.mail()
    reply = session.say("DATA")
    if reply.code == "354":
        reply = session.say(".")
    assert reply.code[0] in "45"


@should
def test_3_3_c_messages_are_not_judged_by_their_header(session):
    """RFC 5321 3.3: a message is not refused for what seems wrong with its header or body."""
    assert session.transfer(letter(b"Date: yesterday", b"From: ;", b"no field at all")).taken


@must
def test_3_3_d_resent_fields_need_not_match(session):
    """RFC 5321 3.3: nor for Resent- fields without their like."""
    assert session.transfer(letter(b"Resent-To: a@example.net", b"Resent-To: b@example.net", FROM, DATE)).taken


@should
def test_3_5_1_a_expn_is_supported(session):
    """RFC 5321 3.5.1, 3.5.2, 7.3: EXPN is there."""
    assert session.say("EXPN postmaster").code not in UNKNOWN


@should
def test_3_5_1_b_vrfy_takes_a_whole_address(session):
    """RFC 5321 3.5.1: a "user name" may be local-part@domain, too."""
    reply = session.say(f"VRFY {session.target.recipient or 'postmaster@example.net'}")
    if reply.code in UNKNOWN:
        not_applicable(f"VRFY is not supported: {reply}")
    assert reply.code[:2] != "50"


def verified(tour):
    replies = [tour.replies["VRFY postmaster"], tour.replies["EXPN postmaster"]]
    found = [line for reply in replies if reply.code in ("250", "251", "551") for line in reply.lines]
    return found or not_applicable("the server verifies nothing")


@must
def test_3_5_1_c_what_is_verified_is_named(tour):
    """RFC 5321 3.5.1, 3.5.2: a positive answer to VRFY or EXPN holds the mailbox, with its domain."""
    assert [line for line in verified(tour) if not MAILBOX.search(line)] == []


@should
def test_3_5_2_a_what_is_verified_is_in_brackets(tour):
    """RFC 5321 3.5.2: the addresses stand in pointed brackets."""
    assert [line for line in verified(tour) if MAILBOX.search(line) and not re.search("<.*>", line)] == []


@must
def test_3_5_2_b_no_route_is_verified(tour):
    """RFC 5321 3.5.2: VRFY and EXPN return no source routes."""
    assert [line for line in verified(tour) if re.search("<@[^>]*:", line)] == []


@must
def test_3_5_2_c_expn_is_announced(extended):
    """RFC 5321 3.5.2: a server that has EXPN says so in its answer to EHLO."""
    if extended.say("EXPN postmaster").code != "250":
        not_applicable("the server expands nothing")
    assert "EXPN" in extended.extensions


@must
def test_3_5_3_a_nothing_is_verified_by_its_syntax(session):
    """RFC 5321 3.5.3: 250 to VRFY says that somebody is there, not that the syntax is right."""
    assert session.say(f"VRFY {NOBODY}").code not in ("250", "251")


@should
def test_3_6_2_a_who_does_not_relay_says_550(session):
    """RFC 5321 3.6.2, 7.9: mail that is not relayed, by policy, is refused with 550."""
    session.mail()
    reply = session.say(f"RCPT TO:<{NOBODY}@elsewhere.example>")
    if reply.code[0] != "5":
        not_applicable("the server relays for us")
    assert reply.code == "550"


@must
def test_3_6_3_a_a_relay_changes_no_message(session):
    """RFC 5321 3.6.3, 2.3.10, 6.4: it adds its trace, and leaves header and body as they are."""
    content = letter(body=b"  Indented, \tand more.  \r\n\r\n\r\nThe end, after empty lines. \r\n\r\n")
    assert session.deliver(content).data.endswith(content)


@must
def test_3_7_2_a_trace_fields_of_others_are_not_judged(session):
    """RFC 5321 3.7.2: no mail is refused for the format of a Received field."""
    assert session.transfer(letter(b"Received: by hand, some day last week", b"Received:", FROM, DATE)).taken


@must
def test_3_8_a_unknown_commands_close_no_connection(session):
    """RFC 5321 3.8: a server awaits further instructions after what it did not understand."""
    session.say("XYZZY")
    assert session.say("NOOP")
