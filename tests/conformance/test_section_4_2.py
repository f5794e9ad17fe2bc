"""RFC 5321, sections 4.2 and 4.3: replies, and when they are given."""
import re

from dialogue import (DOMAIN, LITERAL, UNKNOWN, expect, fail, letter, must, not_applicable, nothing, should,
                      with_hops)

LISTED = set("""
    211 214 220 221 250 251 252 354 421 450 451 452 455 500 501 502 503 504 550 551 552 553 554 555
    """.split())
ANY_COMMAND = {"421", "500", "501"}
TABLE = {"VRFY postmaster": {"250", "251", "252", "550", "551", "553", "502", "504"},
         "EXPN postmaster": {"250", "252", "550", "500", "502", "504"}}


def lines(tour):
    return [line for reply in tour.replies.values() for line in reply.lines]


@must
def test_4_2_a_every_command_has_one_reply(session):
    """RFC 5321 4.2: not more, not fewer."""
    for command in ("NOOP", "RSET", "NOOP"):
        session.say(command)
    nothing(session.rest(), "replies too many")


@must
def test_4_2_b_codes_are_three_digits_the_first_of_them_2_to_5(tour):
    """RFC 5321 4.2, 4.3.2: no others, without an extension that brings them."""
    nothing([line for line in lines(tour) if not re.match("[2-5][0-9][0-9]", line)], "no such code")
    tour.complete()


@must
def test_4_2_c_the_text_of_a_reply_is_printable(tour):
    """RFC 5321 4.2: behind code and space or hyphen, printable ASCII and tabs."""
    nothing([line for line in lines(tour) if not re.fullmatch(r"...([ -][\t -~]*)?", line)],
            "characters that cannot be printed")
    tour.complete()


@must
def test_4_2_d_the_greeting_begins_with_the_server_s_name(tour):
    """RFC 5321 4.2, 4.3.1: its domain, or its address as a literal, right behind 220."""
    if not re.match(rf"220[ -](?:{DOMAIN}|{LITERAL})(?: |$)", tour.replies[""].lines[0]):
        fail(tour.replies[""].told)


@should
def test_4_2_e_codes_are_those_of_the_rfc(tour):
    """RFC 5321 4.2: a server sends the codes that are listed there."""
    codes = {reply.code for reply in tour.replies.values()}
    nothing(sorted({code for code in codes if re.match("[2-5][0-9][0-9]", code)} - LISTED), "codes that are not listed")
    tour.complete()


@must
def test_4_2_1_a_all_lines_of_a_reply_have_one_code(tour):
    """RFC 5321 4.2.1: the client may take it from any of them."""
    several = [reply.lines for reply in tour.replies.values() if len(reply.lines) > 1]
    if not several:
        not_applicable("all replies are single lines")
    nothing([" / ".join(each) for each in several if len({line[:3] for line in each}) > 1], "lines of several codes")
    tour.complete()


@should
def test_4_2_1_b_a_space_follows_the_code(tour):
    """RFC 5321 4.2.1: even where no text does."""
    nothing([reply for reply in tour.replies.values() if reply.lines[-1][3:4] != " "], "without a space")
    tour.complete()


@must
def test_4_2_4_a_what_is_announced_is_implemented(session):
    """RFC 5321 4.2.4: nothing is listed in the answer to EHLO that is then answered 500 or 502."""
    commands = [c for c in ("HELP", "EXPN postmaster", "VRFY postmaster") if c[:4] in session.extensions]
    if not commands:
        not_applicable("no extension announces a command that can be tried without harm")
    nothing([command for command in commands if session.say(command).code in UNKNOWN], "announced, and not implemented")


@should
def test_4_2_4_b_unknown_commands_are_answered_500(session):
    """RFC 5321 4.2.4, 4.1.5: 502 is for those that are known and not implemented."""
    expect(session.say("XYZZY"), "500")


@must
def test_4_2_5_a_what_is_refused_is_not_sent(target):
    """RFC 5321 4.2.5: after a 4yz or 5yz to the final dot the message is the client's again."""
    target.needs_sink()
    refused = next((content for content in (letter(body=b"one\ntwo\r\n"), with_hops(200))
                    if not target.session().accepts(content)), None)
    if refused is None:
        not_applicable("the server refuses no message")
    target.session().deliver(letter())      # whatever was sent before it is there by then
    if target.arrived(refused):
        fail("the message was refused, and has arrived")


@should
def test_4_3_2_a_a_session_is_opened_with_220_or_554(target):
    """RFC 5321 4.3.2, 3.1: the greeting is one of two, or 421."""
    expect(target.connect().greeting, "220", "554")


@should
def test_4_3_2_b_replies_are_those_of_the_table(tour):
    """RFC 5321 4.3.1, 4.3.2: VRFY and EXPN have the replies that are listed for them."""
    replies = [(tour.replies[command], codes) for command, codes in TABLE.items()]
    nothing([reply.told for reply, codes in replies if reply.code in LISTED - codes - ANY_COMMAND], "not in the table")
