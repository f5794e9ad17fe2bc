"""The extensions of a transaction: RFC 3030 CHUNKING and BINARYMIME, RFC 6531 SMTPUTF8, RFC 3461 DSN."""
from dialogue import (as_sent, expect, fail, letter, must, not_applicable, nothing, unless_later, unless_refused,
                      unless_unknown)

# ---- RFC 3030: CHUNKING and BINARYMIME ---------------------------------------------------------


def chunk(session, octets, last=False):
    """Sends a chunk; returns the reply to it."""
    command = f"BDAT {len(octets)}" + " LAST" * last
    session.send(command.encode() + b"\r\n" + octets)
    return session.reply(command)


def chunks(session, *parts):
    """A message in chunks; returns the replies to them."""
    session.needs("CHUNKING")
    if session.target.recipient is None:
        not_applicable("no mail may be sent: name a recipient with --to")
    session.begin()
    return [unless_refused(chunk(session, octets, count == len(parts))) for count, octets in enumerate(parts, 1)]


@must
def test_rfc3030_2_a_the_keyword_has_no_parameter(session):
    """RFC 3030 2: CHUNKING stands alone on its line."""
    nothing(session.needs("CHUNKING"), "parameters of the keyword")


@must
def test_rfc3030_2_b_each_chunk_is_answered_250(session):
    """RFC 3030 2: the last one, too, which may be empty."""
    content = letter()
    for reply in chunks(session, content[:20], content[20:], b""):
        expect(reply, "250")


@must
def test_rfc3030_2_c_chunks_arrive_as_they_are(session):
    """RFC 3030 2: their size ends them: no dot is taken away, and none is an end."""
    session.target.needs_sink()
    body = b"one\r\n.\r\n..two\r\n"
    content = letter(body=body)
    if not all(reply.taken for reply in chunks(session, content[:-5], content[-5:])):
        not_applicable("the chunks are refused")
    session.rest()
    as_sent(session.target.delivered(content), b"\r\n\r\n" + body)


@must
def test_rfc3030_2_d_data_does_not_follow_bdat(session):
    """RFC 3030 2: in the same transaction it is answered 503."""
    session.needs("CHUNKING")
    reply = chunk(session.begin(), b"Subject: x\r\n\r\n")
    if not reply.taken:
        not_applicable(f"the chunk is refused: {reply.told}")
    expect(unless_unknown(session.say("DATA")), "503")


@must
def test_rfc3030_2_e_refused_chunks_are_discarded(session):
    """RFC 3030 2: without a transaction the octets of a chunk are read all the same, and not as commands."""
    session.needs("CHUNKING")
    expect(chunk(session, b"NOOP\r\n", True), "5")
    nothing(session.rest(), "the octets of the chunk are answered")


@must
def test_rfc3030_3_a_binarymime_comes_with_chunking(session):
    """RFC 3030 3: a server that announces it announces CHUNKING, too, and no parameter."""
    nothing(session.needs("BINARYMIME"), "parameters of the keyword")
    if "CHUNKING" not in session.extensions:
        fail("CHUNKING is not announced")


@must
def test_rfc3030_3_b_mail_takes_a_binary_body(session):
    """RFC 3030 3: BODY=BINARYMIME."""
    session.needs("BINARYMIME")
    mail = f"MAIL FROM:<{session.target.sender}>"
    expect(session.unlike(mail + " BODY=BINARYMIME", mail), "250")


@must
def test_rfc3030_3_c_a_binary_body_is_not_for_data(session):
    """RFC 3030 3: after BODY=BINARYMIME, DATA is answered 503."""
    session.needs("BINARYMIME")
    expect(unless_unknown(session.begin(parameters=" BODY=BINARYMIME").say("DATA")), "503")


# ---- RFC 6531: SMTPUTF8 ------------------------------------------------------------------------


@must
def test_rfc6531_3_1_a_the_keyword_has_no_parameter(session):
    """RFC 6531 3.1: it stands alone on its line."""
    nothing(session.needs("SMTPUTF8"), "parameters of the keyword")


@must
def test_rfc6531_3_1_b_8bitmime_comes_with_it(session):
    """RFC 6531 3.1: a server that announces SMTPUTF8 announces 8BITMIME, too."""
    session.needs("SMTPUTF8")
    if "8BITMIME" not in session.extensions:
        fail("8BITMIME is not announced")


@must
def test_rfc6531_3_3_a_addresses_may_be_utf_8(session):
    """RFC 6531 3.3, 3.4: in MAIL with the parameter SMTPUTF8, in the local part and in the domain."""
    session.needs("SMTPUTF8")
    for path in "müller@example.org", "muller@müller.example":
        control = path.replace("ü", "u")
        expect(session.unlike(f"MAIL FROM:<{path}> SMTPUTF8", f"MAIL FROM:<{control}> SMTPUTF8"), "250")
        session.say("RSET")


# ---- RFC 3461: DSN -----------------------------------------------------------------------------


@must
def test_rfc3461_4_a_the_keyword_has_no_parameter(session):
    """RFC 3461 4: it stands alone on its line."""
    nothing(session.needs("DSN"), "parameters of the keyword")


def rcpt_takes(session, *parameters):
    """That RCPT takes each of them."""
    session.needs("DSN")
    mail = f"MAIL FROM:<{session.target.sender}>"
    rcpt = f"RCPT TO:<{session.target.recipient or 'Postmaster'}>"
    for parameter in parameters:
        session.mail()
        expect(session.unlike(rcpt + parameter, mail, rcpt), "250", "251")
        session.say("RSET")


@must
def test_rfc3461_4_1_a_rcpt_takes_notify(session):
    """RFC 3461 4.1: NEVER, or a list of SUCCESS, FAILURE and DELAY."""
    rcpt_takes(session, " NOTIFY=NEVER", " NOTIFY=SUCCESS,FAILURE,DELAY")


@must
def test_rfc3461_4_2_a_rcpt_takes_orcpt(session):
    """RFC 3461 4.2: a type and an address in xtext."""
    rcpt_takes(session, " ORCPT=rfc822;friend+2Bx@example.net")


def mail_takes(session, *parameters):
    """That MAIL takes each of them."""
    session.needs("DSN")
    mail = f"MAIL FROM:<{session.target.sender}>"
    for parameter in parameters:
        expect(session.unlike(mail + parameter, mail), "250")
        session.say("RSET")


@must
def test_rfc3461_4_3_a_mail_takes_ret(session):
    """RFC 3461 4.3: FULL or HDRS."""
    mail_takes(session, " RET=FULL", " RET=HDRS")


@must
def test_rfc3461_4_4_a_mail_takes_envid(session):
    """RFC 3461 4.4: an identifier in xtext."""
    mail_takes(session, " ENVID=QQ314159+2B")


@must
def test_rfc3461_5_2_1_a_a_relay_hands_the_parameters_on(session):
    """RFC 3461 5.2.1: to an exchanger that announces DSN, too."""
    session.needs("DSN")
    session.target.needs_sink()
    content = letter()
    reply = unless_later(session.say(f"MAIL FROM:<{session.target.sender}> RET=HDRS ENVID=QQ314159"))
    if reply.taken:
        reply = session.say(f"RCPT TO:<{session.target.recipient}> NOTIFY=FAILURE ORCPT=rfc822;friend@example.net")
    if not reply.taken or session.say("DATA").code != "354" or not session.finish(content).taken:
        not_applicable("the message is refused")
    session.rest()
    message = session.target.delivered(content)
    said = f"{message.reverse_path} {' '.join(message.parameters)}".upper()
    nothing([each for each in ("RET=HDRS", "ENVID=QQ314159", "NOTIFY=FAILURE", "ORCPT=RFC822;FRIEND@EXAMPLE.NET")
             if each not in said], "not handed on")
