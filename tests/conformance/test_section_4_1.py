"""RFC 5321, section 4.1: the commands."""
import contextlib
import re

from dialogue import (DOMAIN, LITERAL, Dismissed, expect, fail, letter, must, not_applicable, nothing, reject,
                      should, unless_later, unless_refused)

# ---- 4.1.1: semantics and syntax -------------------------------------------------------


@should
def test_4_1_1_a_space_at_the_end_of_a_line_is_tolerated(session):
    """RFC 5321 4.1.1: white space before CRLF does no harm."""
    expect(session.say("RSET "), "250")
    reject(session.say(f"MAIL FROM:<{session.target.sender}> \t"), "50")


@should
def test_4_1_1_b_rset_data_and_quit_take_no_argument(target):
    """RFC 5321 4.1.1, 4.3.2: RSET, DATA and QUIT with one are answered 501."""
    for line in "RSET now", "DATA now", "QUIT now":
        session = target.session()
        expect((session.begin() if line[0] == "D" else session).say(line), "501")
        session.close()


@must
def test_4_1_1_1_a_ehlo_is_answered_by_the_grammar(tour):
    """RFC 5321 4.1.1.1: the server's domain, then one keyword with its parameters on each line."""
    reply = tour.replies["EHLO client.example"]
    if not reply.taken:
        not_applicable("EHLO is refused")
    if not re.fullmatch(rf"250[ -](?:{DOMAIN}|{LITERAL})(?: .+)?", reply.lines[0]):
        fail(f"{reply.told}: its first line has no name or address of the server's")
    keyword = r"250[ -][A-Za-z0-9][A-Za-z0-9-]*(?: [!-~]+)*"
    nothing([line for line in reply.lines[1:] if not re.fullmatch(keyword, line)], "no keyword with parameters")


@must
def test_4_1_1_1_b_case_does_not_matter_in_parameters(session):
    """RFC 5321 4.1.1.1: the keywords of extensions come in any case."""
    words = {"SIZE": " sIzE=10", "8BITMIME": " bOdY=7bIt"}
    known = [word for keyword, word in words.items() if keyword in session.extensions]
    if not known:
        not_applicable("no extension with a parameter is announced")
    mail = f"MAIL FROM:<{session.target.sender}>"
    expect(session.unlike(mail + "".join(known), mail), "250")


@must
def test_4_1_1_1_c_optional_commands_are_announced(extended, target):
    """RFC 5321 4.1.1.1: what the server has beyond the required commands, it lists."""
    optional = ("HELP", "SEND FROM:<>", "SOML FROM:<>", "SAML FROM:<>")
    unlisted = [line for line in optional if line[:4] not in extended.extensions]
    extended.close()
    nothing([line[:4] for line in unlisted if target.session().say(line).taken], "implemented, and not announced")


@should
def test_4_1_1_1_d_helo_is_answered_with_the_server_s_name(stranger, target):
    """RFC 5321 4.1.1.1: the server says who it is in its reply to HELO, too."""
    reply = stranger.say("HELO client.example")
    if not reply.taken:
        not_applicable(f"HELO is refused: {reply.told}")
    other = target.connect().say("EHLO client.example")
    name, *names = [re.split("[ \n]", each[4:])[0] for each in (reply, stranger.greeting, other)]
    if name not in names:
        fail(f"{reply.told}; the server calls itself {' and '.join(sorted(set(names)))} elsewhere")


@must
def test_4_1_1_2_a_the_reverse_path_may_be_null(session):
    """RFC 5321 4.1.1.2, 4.1.2, 4.5.5: MAIL FROM:<> is a sender, that of notifications."""
    expect(session.unlike("MAIL FROM:<>", f"MAIL FROM:<{session.target.sender or 'nour@example.org'}>"), "250")


@must
def test_4_1_1_3_a_source_routes_are_recognized(session):
    """RFC 5321 3.3, 4.1.1.3, 4.1.2: <@host,@host:mailbox> is no syntax error.  It may be
    refused by policy (3.6.1)."""
    session.mail()
    expect(session.rcpt(f"@a.example,@b.example:{session.target.recipient or 'postmaster@c.example'}"), "2")


def routed(session):
    return session.deliver(letter(), recipients=[f"@a.example,@b.example:{session.target.recipient}"])


@should
def test_4_1_1_3_b_source_routes_are_stripped(session):
    """RFC 5321 3.3, 3.6.1, 4.1.1.3: a relay sends to the mailbox as if there were no route."""
    arrived = routed(session).recipients
    if arrived != [f"<{session.target.recipient}>"]:
        fail(f"the recipient has become {' '.join(arrived)}")


@must
def test_4_1_1_3_c_source_routes_are_not_copied_into_the_reverse_path(session):
    """RFC 5321 4.1.1.3: nor does a route, or a part of it, become the sender's."""
    arrived = routed(session).reverse_path
    if arrived.split(" ")[0] != f"<{session.target.sender}>":
        fail(f"the sender has become {arrived}")


def answers_behind(false_end, session):
    """Says a message with octets in it that end none.  Returns the replies to what
    stands behind them, which is content; 421 is none, but the end of the session."""
    session.data().send(b"Subject: x\r\n\r\nfirst" + false_end + b"NOOP\r\nlast\r\n.\r\n")
    with contextlib.suppress(Dismissed):
        session.reply(".")
    return session.rest()


@must
def test_4_1_1_4_a_lf_dot_lf_ends_no_message(session):
    """RFC 5321 4.1.1.4: <LF>.<LF> is not the end of the data."""
    nothing(answers_behind(b"\n.\n", session), "content behind LF.LF is answered as commands")


@must
def test_4_1_1_4_b_lf_ends_no_line_of_a_message(session):
    """RFC 5321 4.1.1.4, 2.3.8: a bare LF is refused, or something in a line; a relay sends it
    on neither as CRLF nor as it is."""
    session.target.needs_sink()
    content = letter(body=b"one\ntwo\r\n")
    if session.accepts(content):
        data = session.target.delivered(content).data
        if b"one\r\ntwo" in data or b"one\ntwo" in data:
            fail("the line with a bare LF has arrived as two, or as it was")


@must
def test_4_1_1_4_c_nothing_but_crlf_dot_crlf_ends_a_message(target):
    """RFC 5321 4.1.1.4, 2.3.8: no mixture of CR, LF and a dot is the end of the data."""
    false_ends = (b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n")
    found = [end for end in false_ends if answers_behind(end, target.session())]
    nothing(found, "what stands behind these octets is answered as commands")


@must
def test_4_1_1_4_d_a_message_is_answered_250(session):
    """RFC 5321 3.3, 4.1.1.4: a message that is taken is answered with an OK."""
    expect(unless_refused(session.transfer(letter())), "250")


@must
def test_4_1_1_4_e_a_message_ends_its_transaction(session):
    """RFC 5321 4.1.1.4: with the final dot the buffers are cleared: RCPT needs another MAIL."""
    session.transfer(letter())
    expect(session.say("RCPT TO:<Postmaster>"), "503")


@must
def test_4_1_1_5_a_rset_forgets_the_transaction(transaction):
    """RFC 5321 4.1.1.5: sender and recipients are gone: RCPT needs another MAIL."""
    transaction.say("RSET")
    expect(transaction.say("RCPT TO:<Postmaster>"), "503")


@must
def test_4_1_1_5_b_rset_is_answered_250_at_any_time(stranger):
    """RFC 5321 4.1.1.5: before EHLO, behind it, and in a transaction."""
    expect(stranger.say("RSET"), "250")
    stranger.introduce()
    expect(stranger.begin().say("RSET"), "250")


@must
def test_4_1_1_5_c_rset_closes_no_connection(session):
    """RFC 5321 4.1.1.5: that is for QUIT."""
    session.stays("RSET")


def without_effect(transaction, command):
    transaction.say(command)
    if transaction.say("RCPT TO:<Postmaster>").code == "503":
        fail(f"after {command} the transaction is gone: RCPT is answered 503")


@must
def test_4_1_1_6_a_vrfy_changes_no_transaction(transaction):
    """RFC 5321 4.1.1.6: it has no effect on any buffer."""
    without_effect(transaction, "VRFY postmaster")


@must
def test_4_1_1_7_a_expn_changes_no_transaction(transaction):
    """RFC 5321 4.1.1.7: it has no effect on any buffer."""
    without_effect(transaction, "EXPN postmaster")


@must
def test_4_1_1_8_a_help_changes_no_transaction(transaction):
    """RFC 5321 4.1.1.8: it has no effect on any buffer."""
    without_effect(transaction, "HELP")


@should
def test_4_1_1_8_b_help_is_supported(session):
    """RFC 5321 4.1.1.8: HELP without an argument is answered."""
    expect(session.say("HELP"), "211", "214")


@must
def test_4_1_1_9_a_noop_is_answered_250(session):
    """RFC 5321 4.1.1.9, 4.5.1: it does nothing else."""
    expect(session.say("NOOP"), "250")


@must
def test_4_1_1_9_b_noop_changes_no_transaction(transaction):
    """RFC 5321 4.1.1.9: it has no effect on any buffer."""
    without_effect(transaction, "NOOP")


@should
def test_4_1_1_9_c_the_argument_of_noop_is_ignored(session):
    """RFC 5321 4.1.1.9: NOOP whatever is NOOP."""
    expect(session.say("NOOP whatever"), "250")


@must
def test_4_1_1_10_a_quit_is_answered_221(stranger):
    """RFC 5321 4.1.1.10, 4.5.1: at any time."""
    expect(stranger.say("QUIT"), "221")


@must
def test_4_1_1_10_b_quit_closes_the_connection(session):
    """RFC 5321 4.1.1.10, 3.8: after the reply the server closes."""
    session.say("QUIT")
    session.send(b"NOOP\r\n")       # answered by a server that is still there
    if not session.closed(min(30, session.target.wait())):
        fail("after the reply to QUIT the connection stays")


@must
def test_4_1_1_10_c_errors_close_no_connection(session):
    """RFC 5321 4.1.1.10: not before QUIT, even if there was an error."""
    session.stays("DATA")


@must
def test_4_1_1_10_d_a_lost_connection_cancels_the_transaction(target):
    """RFC 5321 4.1.1.10, 4.1.1.5: half a message is none; what was not finished is not sent."""
    target.needs_sink()
    half = letter()
    session = target.session()
    session.data().send(half)
    session.close()
    target.session().deliver(letter())
    if target.arrived(half):
        fail("half a message has been sent on")


@must
def test_4_1_1_10_e_a_lost_connection_undoes_no_earlier_transaction(session):
    """RFC 5321 4.1.1.10: what was answered 250 is sent, whether QUIT comes or not."""
    session.target.needs_sink()
    content = letter()
    if not session.transfer(content).taken:
        not_applicable("the message is refused")
    session.close()
    if not session.target.overtaken(content):
        fail("the message was accepted, and does not arrive where another does that was sent after it")


@should
def test_4_1_1_11_a_unknown_parameters_of_mail_are_answered_555(session):
    """RFC 5321 4.1.1.11, 4.3.2: a parameter that the server does not know."""
    mail = f"MAIL FROM:<{session.target.sender}>"
    expect(session.unlike(mail + " XYZZY=1", mail), "555")


@should
def test_4_1_1_11_b_unknown_parameters_of_rcpt_are_answered_555(session):
    """RFC 5321 4.1.1.11, 4.3.2: a parameter that the server does not know."""
    session.mail()
    rcpt = f"RCPT TO:<{session.target.recipient or 'Postmaster'}>"
    expect(session.unlike(rcpt + " XYZZY=1", f"MAIL FROM:<{session.target.sender}>", rcpt), "555")


# ---- 4.1.2 and 4.1.3: arguments ----------------------------------------------------------


@must
def test_4_1_2_a_local_parts_may_be_dot_strings_of_any_atext(session):
    """RFC 5321 4.1.2: all the characters of an atom are an address's."""
    expect(session.unlike("MAIL FROM:<a.b.!#$%&'*+-/=?^_`{|}~@example.org>", "MAIL FROM:<ab@example.org>"), "250")


@must
def test_4_1_2_b_local_parts_may_be_quoted(session):
    """RFC 5321 4.1.2: any printable character may stand in quotes, and a backslash before it."""
    expect(session.unlike(r'MAIL FROM:<"a b@c>\"\\"@example.org>', "MAIL FROM:<ab@example.org>"), "250")


@must
def test_4_1_2_c_underscores_in_the_domain_of_an_address_are_refused(session):
    """RFC 5321 4.1.2: labels are letters, digits and hyphens; else 501."""
    expect(session.mail("a@under_score.example"), "501")


@must
def test_4_1_2_d_underscores_in_the_domain_of_ehlo_are_refused(nameless):
    """RFC 5321 4.1.2: labels are letters, digits and hyphens; else 501."""
    expect(unless_refused(nameless.say("EHLO under_score.example")), "501")


@must
def test_4_1_3_a_address_literals_are_domains(session):
    """RFC 5321 4.1.2, 4.1.3: an address in brackets stands for a domain."""
    for literal in ("[192.0.2.1]", "[IPv6:2001:db8::1]", "[IPv6:::ffff:192.0.2.1]"):
        expect(session.unlike(f"MAIL FROM:<a@{literal}>", "MAIL FROM:<a@example.org>"), "250")
        session.say("RSET")


@must
def test_4_1_3_b_a_client_without_a_name_gives_its_address(nameless):
    """RFC 5321 4.1.1.1, 4.1.3: EHLO takes an address literal."""
    expect(unless_refused(nameless.say(f"EHLO {nameless.address}")), "250")


# ---- 4.1.4: order --------------------------------------------------------------------------


@should
def test_4_1_4_a_some_commands_need_no_ehlo(target):
    """RFC 5321 4.1.4: NOOP, HELP, EXPN, VRFY and RSET are not out of sequence before it."""
    commands = ("NOOP", "HELP", "EXPN postmaster", "VRFY postmaster", "RSET")
    nothing([command for command in commands if target.connect().welcomed().say(command).code == "503"], "answered 503")


@must
def test_4_1_4_b_ehlo_forgets_the_transaction(transaction):
    """RFC 5321 4.1.4, 4.1.1.1: as if RSET had been said: RCPT needs another MAIL."""
    transaction.introduce()
    expect(transaction.say(f"RCPT TO:<{transaction.target.recipient or 'Postmaster'}>"), "503")


@must
def test_4_1_4_c_ehlo_is_refused_with_501_500_502_or_550(stranger):
    """RFC 5321 4.1.4: one of these, where it is not acceptable: for want of a name, or because
    it was said before."""
    replies = [stranger.say(line) for line in ("EHLO", "EHLO client.example", "EHLO client.example")]
    refusals = [reply for reply in replies if not reply.taken]
    if not refusals:
        not_applicable("any EHLO is accepted")
    for reply in refusals:
        expect(reply, "501", "500", "502", "550")


@must
def test_4_1_4_d_a_refused_ehlo_changes_nothing(transaction):
    """RFC 5321 4.1.4: the state is what it was: here, a transaction."""
    if transaction.say("EHLO").taken:
        not_applicable("EHLO without a name is accepted")
    reject(transaction.say("RCPT TO:<Postmaster>"), "503")


@must
def test_4_1_4_e_no_mail_is_refused_for_another_s_name(target):
    """RFC 5321 4.1.4: that the name in EHLO is not that of the client's address is no reason."""
    target.session().begin().close()        # what is refused to all is refused by policy
    session = target.connect()
    session.introduce(name="somebody-else.example")
    expect(unless_later(session.say(f"MAIL FROM:<{target.sender}>")), "2")
    expect(unless_later(session.say(f"RCPT TO:<{target.recipient or 'Postmaster'}>")), "2")


@must
def test_4_1_4_f_a_bad_mail_is_answered_501(target):
    """RFC 5321 4.1.4: where the argument of MAIL is not acceptable; of a mailbox, 550 and 553
    say so, too (3.3, 4.2.2)."""
    mailboxes = ("FROM:<a@>", "FROM:<a@b@c.example>", "FROM:<a b@c.example>")
    replies = [target.session().say(f"MAIL {argument}") for argument in ("TO:<a@c.example>", *mailboxes)]
    expect(replies[0], "5")
    for reply in replies:
        expect(reply, "2", "501", "550", "553")


@must
def test_4_1_4_g_a_refused_mail_begins_nothing(session):
    """RFC 5321 4.1.4: the state is what it was: no transaction."""
    if session.say("MAIL FROM:<").taken:
        not_applicable("it is accepted")
    expect(session.say("RCPT TO:<Postmaster>"), "503")


@must
def test_4_1_4_h_what_is_out_of_order_is_answered_503(stranger):
    """RFC 5321 4.1.4: such as MAIL before EHLO, where that cannot be processed."""
    reply = stranger.mail()
    if reply.taken:
        not_applicable("the server needs no EHLO")
    expect(reply, "503")


@must
def test_4_1_4_i_what_is_out_of_order_changes_nothing(session):
    """RFC 5321 4.1.4: after DATA came too early, the transaction goes on."""
    session.mail()
    if session.say("DATA").code != "503":
        not_applicable("it is not answered 503")
    reject(session.say("RCPT TO:<Postmaster>"), "503")
