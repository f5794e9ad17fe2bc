"""The extensions: RFC 1870 SIZE, RFC 2034 ENHANCEDSTATUSCODES, RFC 2920 PIPELINING, RFC 6152 8BITMIME."""
import re
import time

from dialogue import (DATE, FROM, Silent, as_sent, expect, fail, letter, must, not_applicable, nothing, reject,
                      should, unless_later, unless_refused, unless_unknown)

# ---- RFC 1870: SIZE -----------------------------------------------------------------------

AFFORDABLE = 1 << 20        # octets that are sent to learn of a limit


def limit(session):
    """The size of the largest message, if the server says that there is one."""
    parameters = session.needs("SIZE")
    if not parameters or not parameters[0].isdigit() or int(parameters[0]) == 0:
        not_applicable("no limit is announced")
    return int(parameters[0])


@must
def test_rfc1870_3_a_the_limit_is_a_number(session):
    """RFC 1870 3: behind SIZE stands at most one parameter, of digits."""
    announced = " ".join(session.needs("SIZE"))
    if not re.fullmatch(r"\d*", announced):
        fail(f"SIZE {announced} is announced")


@must
def test_rfc1870_3_b_a_size_has_up_to_20_digits(session):
    """RFC 1870 3, 4: MAIL may declare one, in 1 to 20 digits."""
    session.needs("SIZE")
    mail = f"MAIL FROM:<{session.target.sender}>"
    expect(session.unlike(mail + " SIZE=" + "100".rjust(20, "0"), mail), "250")


@must
def test_rfc1870_4_a_what_is_larger_than_the_limit_is_answered_552(session):
    """RFC 1870 4, 5: at the end of a message that has more octets, however it was declared.  This one
    has more even where CRLF is counted as one octet."""
    size = limit(session)
    if size > AFFORDABLE:
        not_applicable(f"{size} octets are too many to try")
    line = b"x" * 70 + b"\r\n"
    expect(unless_later(session.transfer(letter() + line * (size // (len(line) - 1) + 1))), "552")


@must
def test_rfc1870_6_a_the_size_is_not_the_end_of_the_data(session):
    """RFC 1870 6: a message ends where it ends, whatever was declared."""
    session.needs("SIZE")
    session.transfer(letter(body=b"NOOP\r\n"), parameters=" SIZE=10")
    nothing(session.rest(), "content is answered as commands")


@must
def test_rfc1870_6_1_a_a_size_beyond_the_limit_is_answered_552(session):
    """RFC 1870 6.1, 7: at MAIL already."""
    size = limit(session)
    expect(unless_later(session.say(f"MAIL FROM:<{session.target.sender}> SIZE={size + 1}")), "552")


@should
def test_rfc1870_6_3_a_what_was_agreed_is_taken(session):
    """RFC 1870 6.3: a message is not too big after its size was accepted, and is kept to."""
    session.needs("SIZE")
    content = letter()
    reject(session.transfer(content, parameters=f" SIZE={len(content)}"), "552")


# ---- RFC 2034: ENHANCEDSTATUSCODES ----------------------------------------------------------


def status_lines(tour):
    """The lines that have to have a status code: not those of greeting, HELO and EHLO, nor 3yz."""
    ehlo = tour.replies["EHLO client.example"]
    if "ENHANCEDSTATUSCODES" not in ehlo.upper():
        not_applicable("ENHANCEDSTATUSCODES is not announced")
    return [line for command, reply in tour.replies.items() if command and reply is not ehlo
            for line in reply.lines if line[0] in "245" and line[4:]]


@must
def test_rfc2034_3_a_the_keyword_has_no_parameter(session):
    """RFC 2034 3: it stands alone on its line."""
    nothing(session.needs("ENHANCEDSTATUSCODES"), "parameters of the keyword")


@must
def test_rfc2034_4_a_replies_have_a_status_code(tour):
    """RFC 2034 3, 4: all 2yz, 4yz and 5yz, but those to connecting, HELO and EHLO."""
    code = r"...[ -][245]\.\d{1,3}\.\d{1,3}( |$)"
    nothing([line for line in status_lines(tour) if not re.match(code, line)], "lines without a status code")
    tour.complete()


@must
def test_rfc2034_4_b_status_codes_agree_with_the_reply(tour):
    """RFC 2034 4: 2.y.z with 2yz, 4.y.z with 4yz, 5.y.z with 5yz."""
    coded = [line for line in status_lines(tour) if re.match(r"...[ -]\d\.\d", line)]
    nothing([line for line in coded if line[0] != line[4]], "codes that do not agree")
    tour.complete()


@must
def test_rfc2034_4_c_all_lines_of_a_reply_have_one_status_code(tour):
    """RFC 2034 4: it is repeated at the beginning of each."""
    lines = status_lines(tour)
    several = [reply for reply in tour.replies.values() if len(reply.lines) > 1 and reply.lines[0] in lines]
    if not several:
        not_applicable("all replies that have one are single lines")
    nothing([" / ".join(reply.lines) for reply in several if len({line[4:].split(" ")[0] for line in reply.lines}) > 1],
            "several status codes in a reply")
    tour.complete()


# ---- RFC 2920: PIPELINING --------------------------------------------------------------------


def pipelined(session, *commands):
    session.needs("PIPELINING")
    session.send(b"".join(command.encode() + b"\r\n" for command in commands))
    return [session.reply(command) for command in commands]


@must
def test_rfc2920_2_a_the_keyword_has_no_parameter(session):
    """RFC 2920 2: it stands alone on its line."""
    nothing(session.needs("PIPELINING"), "parameters of the keyword")


@must
def test_rfc2920_3_2_a_commands_are_answered_in_their_order(session):
    """RFC 2920 3.2: each of a group, and all that are due when the group has been read."""
    replies = pipelined(session, f"MAIL FROM:<{session.target.sender}>",
                        f"RCPT TO:<{session.target.recipient or 'Postmaster'}>", "RCPT TO:<", "RSET", "QUIT")
    for reply, code in zip(replies[2:], "522"):
        expect(reply, code)


@must
def test_rfc2920_3_2_b_no_input_is_lost(session):
    """RFC 2920 3.2: what follows a message in the same packet is read as commands."""
    session.needs("PIPELINING")
    session.data().send(letter() + b".\r\nRSET\r\n")
    session.reply(".")
    session.send(b"QUIT\r\n")
    expect(session.reply("RSET, in the packet of the message,"), "250")


@must
def test_rfc2920_3_2_c_nothing_is_assumed_of_a_group(session):
    """RFC 2920 3.2: a MAIL that fails leaves RCPT and DATA without a transaction, one by one."""
    recipient = session.target.recipient or "postmaster@example.net"
    replies = pipelined(session, "MAIL FROM:<a@", f"RCPT TO:<{recipient}>", "NOOP")
    for reply, code in zip(replies, "552"):
        expect(reply, code)


@must
def test_rfc2920_3_2_f_replies_do_not_wait_for_the_rest_of_a_line(session):
    """RFC 2920 3.2: what is to be said is said when the input is empty, even where it ended within a command."""
    session.needs("PIPELINING")
    began = time.monotonic()
    session.say("NOOP")
    enough = 2 + 10 * (time.monotonic() - began)
    session.send(b"RSET\r\nRSET\r\nNO")
    try:
        for _ in range(2):
            session.reply("RSET", enough)
    except Silent:
        session.send(b"OP\r\n")
        session.reply("NOOP")
        fail("RSET is answered only when the command behind it is complete")


@should
def test_rfc2920_3_2_g_data_is_answered_354_if_there_is_a_recipient(session):
    """RFC 2920 3.2: in a group, too, and even where the last recipient is refused."""
    if session.target.recipient is None:
        not_applicable("no mail may be sent: name a recipient with --to")
    replies = pipelined(session, f"MAIL FROM:<{session.target.sender}>", f"RCPT TO:<{session.target.recipient}>",
                        "RCPT TO:<@>", "DATA")
    if not replies[0].taken or not replies[1].taken:
        not_applicable(f"no transaction can be begun: {replies[1].told}")
    expect(unless_unknown(unless_refused(replies[3])), "354")


# ---- RFC 6152: 8BITMIME -----------------------------------------------------------------------


@must
def test_rfc6152_2_a_the_keyword_has_no_parameter(session):
    """RFC 6152 2: it stands alone on its line."""
    nothing(session.needs("8BITMIME"), "parameters of the keyword")


@must
def test_rfc6152_2_b_mail_takes_a_body(session):
    """RFC 6152 2: BODY=7BIT and BODY=8BITMIME."""
    session.needs("8BITMIME")
    mail = f"MAIL FROM:<{session.target.sender}>"
    expect(session.unlike(mail + " BODY=8BITMIME", mail), "250")
    expect(session.say("RSET"), "2")
    expect(session.unlike(mail + " BODY=7BIT", mail), "250")


@must
def test_rfc6152_3_a_all_bits_arrive(session):
    """RFC 6152 3: content declared as 8-bit is handed on with all its bits."""
    session.needs("8BITMIME")
    body = bytes(range(128, 256)) + b"\r\n"
    header = (DATE, FROM, b"Message-ID: <8@client.example>", b"MIME-Version: 1.0",
              b"Content-Type: text/plain; charset=iso-8859-1", b"Content-Transfer-Encoding: 8bit")
    as_sent(session.deliver(letter(*header, body=body), parameters=" BODY=8BITMIME"), body)
