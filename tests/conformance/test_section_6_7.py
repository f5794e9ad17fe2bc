"""RFC 5321, sections 6 and 7: problems and security."""
import re

from dialogue import DATE, FROM, expect, fail, letter, must, not_applicable, should, with_hops
from test_section_4_4 import named


@should
def test_6_3_a_a_hundred_hops_are_not_a_loop(session):
    """RFC 5321 6.3: who counts Received fields stops at no fewer than 100; a message that has
    one fewer, with the server's own, arrives."""
    content = with_hops(98)
    expect(session.offer(content), "2")
    session.rest()
    if session.target.sink and not session.target.overtaken(content):
        fail("the message was accepted, and does not arrive where another does that was sent after it")


@must
def test_6_3_b_loops_end(target):
    """RFC 5321 6.3: a message that has been everywhere is not handed on for ever."""
    target.needs_sink()
    looping = with_hops(1000)
    if target.session().accepts(looping):
        target.session().deliver(letter())      # whatever was sent before it is there by then
        if target.arrived(looping):
            fail("a message with 1000 Received fields has been sent on")


@must
def test_6_4_a_a_relay_adds_no_missing_fields(session):
    """RFC 5321 6.4: Date, Message-ID and complete addresses are for whoever a message is first
    given to; this one was on its way already."""
    message = session.deliver(b"Received: from a.example by b.example; Mon, 23 Nov 2026 06:00:00 +0000\r\n"
                              + letter(b"From: nour", b"To: friend"))
    header = message.data.partition(b"\r\n\r\n")[0]
    added = re.search(rb"^(?:date|message-id):.*", header, re.M | re.I)
    if added:
        fail(f"there was no such field: {added[0].decode('latin-1').strip()}")
    if b"\r\nFrom: nour\r\n" not in header or b"\r\nTo: friend\r\n" not in header:
        fail("the incomplete addresses in From and To have been changed")


@should
def test_7_2_a_recipients_are_not_copied_into_the_header(session):
    """RFC 5321 7.2: not the whole set of them, neither as trace nor otherwise."""
    header, one, other = named(session)
    if one in re.sub("(?m)^To: .*", "", header) and other in header:
        fail(f"both {one} and {other} stand in the header")


@should
def test_7_2_b_there_is_no_apparently_to(session):
    """RFC 5321 7.2: a relay makes no such field up out of the envelope."""
    if b"\napparently-to:" in session.deliver(letter(FROM, DATE)).data.lower():
        fail("there is a field Apparently-To")


@must
def test_7_3_a_vrfy_that_is_disabled_says_252(session):
    """RFC 5321 7.3: Postmaster exists everywhere: who cannot say so says 252, and not that he does not."""
    reply = session.say("VRFY postmaster")
    if reply.code[:2] == "50":
        not_applicable(f"VRFY is not supported: {reply.told}")
    expect(reply, "250", "251", "252")
