"""RFC 5321, section 3: the procedures."""
import re

from dialogue import (DATE, FROM, UNKNOWN, Closed, Ended, expect, fail, letter, must, not_applicable, nothing,
                      reject, should, unless_later)

NOBODY = "no-such-user-f3a91c"
MAILBOX = re.compile(r"[^\s<>@]+@[^\s<>@]+")


def refused(target):
    """A session that was greeted with 554."""
    session = target.connect(target.stranger)
    if session.greeting.code != "554":
        not_applicable("the server does not refuse this session with 554"
                       + (": name an address that it refuses with --stranger" if not target.stranger else ""))
    return session


@must
def test_3_1_a_a_refused_session_stays_open_until_quit(target):
    """RFC 5321 3.1: who greets with 554 still waits for QUIT."""
    session = refused(target)
    try:
        session.say("QUIT")
    except Closed:
        fail("after its greeting of 554 the server closes the connection")


@should
def test_3_1_b_commands_in_a_refused_session_are_answered_503(target):
    """RFC 5321 3.1: behind a 554 everything but QUIT is out of sequence."""
    session = refused(target)
    try:
        reply = session.say("NOOP")
    except Ended:
        not_applicable("the server does not wait")
    expect(reply, "503")


@must
def test_3_2_a_helo_is_not_answered_as_ehlo_is(target):
    """RFC 5321 3.2: no list of extensions for who says HELO."""
    keywords = target.session().extensions
    reply = target.connect().welcomed().say("HELO client.example")
    nothing([line for line in reply.lines[1:] if line[4:].split(" ")[0].upper() in keywords],
            "extensions listed to HELO")


@must
def test_3_3_a_rcpt_needs_mail(session):
    """RFC 5321 3.3: RCPT without MAIL before it is answered 503."""
    expect(session.say("RCPT TO:<Postmaster>"), "503")


@must
def test_3_3_b_data_needs_a_recipient(session):
    """RFC 5321 3.3, 4.1.4: a transaction without a recipient sends nothing: DATA is answered
    503 or 554, or else the final dot is refused."""
    session.mail()
    reply = session.say("DATA")
    if reply.code == "354":
        reply = session.say(".")
    expect(reply, "4", "5")


@should
def test_3_3_c_messages_are_not_judged_by_their_header(session):
    """RFC 5321 3.3: a message is not refused for what seems wrong with its header or body."""
    expect(session.offer(letter(b"Date: yesterday", b"From: ;", b"no field at all")), "2")


@must
def test_3_3_d_resent_fields_need_not_match(session):
    """RFC 5321 3.3: nor for Resent- fields without their like."""
    expect(session.offer(letter(b"Resent-To: a@example.net", b"Resent-To: b@example.net", FROM, DATE)), "2")


@should
def test_3_5_1_a_expn_is_supported(session):
    """RFC 5321 3.5.1, 3.5.2, 7.3: EXPN is there."""
    reject(session.say("EXPN postmaster"), *UNKNOWN)


@should
def test_3_5_1_b_vrfy_takes_a_whole_address(session):
    """RFC 5321 3.5.1: a "user name" may be local-part@domain, too."""
    reply = session.say(f"VRFY {session.target.recipient or 'postmaster@example.net'}")
    if reply.code in UNKNOWN:
        not_applicable(f"VRFY is not supported: {reply.told}")
    reject(reply, "50")


def verified(tour):
    replies = [tour.replies["VRFY postmaster"], tour.replies["EXPN postmaster"]]
    found = [line for reply in replies if reply.code in ("250", "251", "551") for line in reply.lines]
    return found or not_applicable("the server verifies nothing")


@must
def test_3_5_1_c_what_is_verified_is_named(tour):
    """RFC 5321 3.5.1, 3.5.2: a positive answer to VRFY or EXPN holds the mailbox, with its domain."""
    nothing([line for line in verified(tour) if not MAILBOX.search(line)], "a mailbox without its domain")


@should
def test_3_5_2_a_what_is_verified_is_in_brackets(tour):
    """RFC 5321 3.5.2: the addresses stand in pointed brackets."""
    nothing([line for line in verified(tour) if MAILBOX.search(line) and not re.search("<.*>", line)],
            "an address without brackets")


@must
def test_3_5_2_b_no_route_is_verified(tour):
    """RFC 5321 3.5.2: VRFY and EXPN return no source routes."""
    nothing([line for line in verified(tour) if re.search("<@[^>]*:", line)], "a source route")


@must
def test_3_5_2_c_expn_is_announced(extended):
    """RFC 5321 3.5.2: a server that has EXPN says so in its answer to EHLO."""
    if extended.say("EXPN postmaster").code != "250":
        not_applicable("the server expands nothing")
    if "EXPN" not in extended.extensions:
        fail("EXPN is answered 250, and is not announced")


@must
def test_3_5_3_a_nothing_is_verified_by_its_syntax(session):
    """RFC 5321 3.5.3: 250 to VRFY says that somebody is there, not that the syntax is right."""
    reject(session.say(f"VRFY {NOBODY}"), "250", "251")


@should
def test_3_6_2_a_who_does_not_relay_says_550(session):
    """RFC 5321 3.6.2, 7.9: mail that is not relayed, by policy, is refused with 550."""
    session.mail()
    reply = session.say(f"RCPT TO:<{NOBODY}@elsewhere.example>")
    if unless_later(reply).taken:
        not_applicable("the server relays for us")
    expect(reply, "550")


@must
def test_3_6_3_a_a_relay_changes_no_message(session):
    """RFC 5321 3.6.3, 2.3.10, 6.4: it adds its trace, and leaves header and body as they are."""
    content = letter(body=b"  Indented, \tand more.  \r\n\r\n\r\nThe end, after empty lines. \r\n\r\n")
    if not session.deliver(content).data.endswith(content):
        fail("the message has not arrived as it was sent: see what arrived at the other end")


@must
def test_3_7_2_a_trace_fields_of_others_are_not_judged(session):
    """RFC 5321 3.7.2: no mail is refused for the format of a Received field."""
    expect(session.offer(letter(b"Received: by hand, some day last week", b"Received:", FROM, DATE)), "2")


@must
def test_3_8_a_unknown_commands_close_no_connection(session):
    """RFC 5321 3.8: a server awaits further instructions after what it did not understand."""
    session.stays("XYZZY")
