"""What a client has to do, and what it is asked by: its behaviour with an unusual server.

A rule is a function, named like the tests of servers; it is given what was heard, by way.
"""
import re

from dialogue import DOMAIN, LITERAL, fail, not_applicable, nothing, readable
from unusual import bare

LEVELS = {}         # function: level
BODY = b"One.\r\n.Two, behind a dot.\r\n.\r\n..\r\nThe end.\r\n"


def must(rule):
    LEVELS[rule] = "MUST"
    return rule


def should(rule):
    LEVELS[rule] = "SHOULD"
    return rule


def connected(heard, way):
    """The connections of a way."""
    return heard[way] or not_applicable("the client has made no connection")


def accepted(heard, way):
    """The connection in which a message was taken."""
    found = [each for each in connected(heard, way) if each.accepted]
    if not found:
        last = heard[way][-1]
        fail(f"no message is sent; the last command is {readable(last.left or 'none')}")
    return found[0]


def every(heard):
    return [each for found in heard.values() for each in found]


def hurried(found):
    """The commands that more was sent behind, before they were answered; with QUIT that is another rule's."""
    return [command for command in found.early if command.upper() not in ("QUIT", "THE GREETING")]


@must
def test_2_3_8_d_cr_and_lf_are_sent_as_crlf_only(heard):
    """RFC 5321 2.3.8: neither alone, in commands or in messages."""
    nothing(bare(b"".join(each.octets for each in every(heard))), "a CR or LF alone")


@must
def test_2_3_5_b_the_name_in_ehlo_is_a_domain_or_an_address(heard):
    """RFC 5321 2.3.5, 4.1.1.1: the client's own name, or a literal."""
    said = [each.said("EHLO") or each.said("HELO") for each in every(heard)]
    nothing([each for each in said if each and not re.fullmatch(f".... (?:{DOMAIN}|{LITERAL})", each)], "no name")


@should
def test_2_2_1_c_clients_begin_with_ehlo(heard):
    """RFC 5321 2.2.1, 4.1.1.1: and not with HELO."""
    for each in connected(heard, "usual"):
        first = (each.commands + ["", "nothing"])[1]
        if not first.upper().startswith("EHLO"):
            fail(f"the first command is {readable(first)}")


@must
def test_2_2_1_d_clients_fall_back_to_helo(heard):
    """RFC 5321 2.2.1, 3.2: where EHLO is answered 500, in this session or the next."""
    accepted(heard, "old")


@must
def test_4_1_1_3_d_parameters_are_those_of_announced_extensions(heard):
    """RFC 5321 4.1.1.3, 4.1.1.11, RFC 1870 6: none where none is announced."""
    found = accepted(heard, "bare")
    nothing([each for each in found.commands if re.match("(?i)(MAIL|RCPT) .*> +.", each)], "parameters")


@must
def test_4_1_1_10_f_clients_leave_by_quit(heard):
    """RFC 5321 4.1.1.10: the connection is not closed before, after a message."""
    found = accepted(heard, "usual")
    if found.left.upper() != "QUIT":
        fail(f"the client leaves behind {readable(found.left)}")


@should
def test_4_1_1_10_g_clients_wait_for_the_reply_to_quit(heard):
    """RFC 5321 4.1.1.10: even then."""
    if "QUIT" in (each.upper() for found in connected(heard, "usual") for each in found.early):
        fail("the client closes the connection without it")


@must
def test_4_2_g_codes_count_by_their_first_digit(heard):
    """RFC 5321 4.2, 4.3.2: where no RFC lists them."""
    accepted(heard, "codes")


@must
def test_4_2_h_any_text_will_do(heard):
    """RFC 5321 4.2, 4.2.1: several lines of it, in each reply."""
    accepted(heard, "lines")


@must
def test_4_2_1_e_no_text_will_do(heard):
    """RFC 5321 4.2.1: not even a space behind the code."""
    accepted(heard, "wordless")


@must
def test_2_4_a_keywords_come_in_any_case(heard):
    """RFC 5321 2.4, 4.1.1.1: and those of unknown extensions among them."""
    accepted(heard, "strange")


@must
def test_4_3_1_a_each_reply_is_waited_for(heard):
    """RFC 5321 4.3.1: where no PIPELINING is announced."""
    nothing(hurried(accepted(heard, "bare")), "more is sent before the reply to")


@should
def test_4_3_1_b_the_greeting_is_waited_for(heard):
    """RFC 5321 4.3.1: before the first command."""
    if any("the greeting" in each.early for each in every(heard)):
        fail("a command is sent before it")


@must
def test_rfc2920_3_1_a_groups_end_where_they_have_to(heard):
    """RFC 2920 3.1: EHLO, DATA and QUIT are the last of their group."""
    nothing(hurried(accepted(heard, "usual")), "more is sent before the reply to")


@must
def test_4_5_2_d_dots_are_doubled(heard):
    """RFC 5321 4.5.2: at the beginning of each line."""
    content = re.sub(rb"(\A|\r\n)\.", rb"\1", accepted(heard, "usual").content)
    if BODY not in content:
        fail("the message is not what was to be sent")


@should
def test_4_5_3_2_c_slow_servers_are_waited_for(heard):
    """RFC 5321 4.5.3.2: for minutes; here, for seconds."""
    accepted(heard, "slow")


@must
def test_3_3_i_a_message_is_sent_behind_354_only(heard):
    """RFC 5321 3.3, 4.1.1.4: and not where MAIL, all recipients or DATA are refused."""
    nothing([way for way in ("mail", "rcpt", "data") if any(each.content is not None for each in heard[way])],
            "a message is sent all the same where this is refused")
    verbs = {command[:4].upper() for way in ("mail", "rcpt", "data") for each in heard[way]
             for command in each.commands}
    nothing(sorted(verbs - {"", ".", "EHLO", "HELO", "MAIL", "RCPT", "DATA", "RSET", "NOOP", "QUIT", "STAR", "AUTH"}),
            "no command, but a part of the message")


@must
def test_4_1_1_1_g_mail_comes_after_ehlo_or_helo(heard):
    """RFC 5321 4.1.1.1, 4.1.4: one of them has been accepted before, and the greeting has."""
    for each in every(heard):
        greeted = [reply[0] for command, reply in zip(each.commands, each.replies)
                   if command[:4].upper() in ("EHLO", "HELO")]
        if each.said("MAIL") and "2" not in greeted:
            fail("MAIL is sent without")
    if any(each.commands[1:] and each.commands[1].upper() != "QUIT" and "the greeting" not in each.early
           for each in heard["busy"]):
        fail("the session goes on after a greeting of 421")


@must
def test_rfc1870_3_b_a_declared_size_is_a_number(heard):
    """RFC 1870 3: of 1 to 20 digits."""
    mail = accepted(heard, "usual").said("MAIL")
    size = re.search("(?i) SIZE=([^ ]*)", mail) or not_applicable("the client declares no size")
    if not re.fullmatch("[0-9]{1,20}", size[1]):
        fail(f"it is {size[1]}")
