"""RFC 5321, sections 4.4 and 4.5: trace, and the limits of an implementation."""
import email.utils
import re
import time

import pytest

from dialogue import (DOMAIN, LITERAL, NAME, UNKNOWN, Dismissed, Silent, as_sent, expect, fail, letter, must,
                      not_applicable, nothing, reject, should, unless_later, unless_refused)

# ---- 4.4: trace ---------------------------------------------------------------------------

# The registry of transmission types that IANA keeps (4.4, 8).
PROTOCOLS = set("""
    SMTP ESMTP ESMTPA ESMTPS ESMTPSA LMTP LMTPA LMTPS LMTPSA MMS UTF8SMTP UTF8SMTPA UTF8SMTPS
    UTF8SMTPSA UTF8LMTP UTF8LMTPA UTF8LMTPS UTF8LMTPSA
    """.split())
CLAUSES = {"from", "by", "via", "with", "id", "for", "tls", "group"}
FOREIGN = (b"Received: from far.example (far.example [192.0.2.7])\r\n"
           b"\tby near.example (8.8/8.8) with SMTP id AA00001;\r\n"
           b"\tMon, 23 Nov 2026 06:00:00 -0800 (PST)\r\n"
           b"Received: BY far.example; Mon, 23 Nov 2026 05:59:59 -0800\r\n")


class Stamp:
    """What a relay puts before a message that has a trace already."""

    def __init__(self, data):
        self.data = data
        added = re.match(rb"(?s).*?(?=Received: from far|Date: )", data)[0].decode("latin-1")
        self.received = re.findall(r"^Received:((?:.*\r\n)(?:[ \t].*\r\n)*)", added, re.M | re.I)

    @property
    def first(self):
        """The uppermost one, unfolded."""
        if not self.received:
            not_applicable("there is no Received field of the server's")
        return " ".join(self.received[0].split())

    @property
    def clauses(self):
        """Its clauses by name, comments left out."""
        bare, before = self.first.rpartition(";")[0], None
        while bare != before:
            bare, before = re.sub(r"\([^()]*\)", " ", bare), bare
        words = bare.split()
        return dict(zip(map(str.lower, words[::2]), words[1::2]))

    @property
    def date(self):
        return self.first.rpartition(";")[2].strip()


@pytest.fixture
def stamp(session):
    return Stamp(session.deliver(FOREIGN + letter()).data)


@must
def test_4_4_a_a_received_field_is_put_before_the_message(stamp):
    """RFC 5321 4.4, 4.1.1.4: trace information stands at the beginning of what is handed on."""
    if not stamp.received:
        fail("there is no Received field of the server's before those of others")


@must
def test_4_4_b_the_trace_says_from_whom(stamp):
    """RFC 5321 4.4: a Received field begins with a FROM clause."""
    if not re.match(rf"from (?:{DOMAIN}|{LITERAL})(?: |$)", stamp.first, re.I):
        fail(f"Received: {stamp.first}")


@should
def test_4_4_c_the_trace_has_the_name_and_the_address_of_the_client(stamp, session):
    """RFC 5321 4.4: what it called itself, and where it came from, as an address literal."""
    clause = re.match(r"from (.*?) by ", stamp.first + " by ", re.I)
    if not clause:
        not_applicable("there is no FROM clause")
    nothing([each for each in (NAME, session.address) if each not in clause[1]], f"missing in “{clause[0][:-4]}”")


@must
def test_4_4_d_the_trace_says_by_whom(stamp):
    """RFC 5321 4.4: the FROM clause is followed by a BY clause."""
    if not re.fullmatch(f"{DOMAIN}|{LITERAL}", stamp.clauses.get("by", "")):
        fail(f"Received: {stamp.first}")


@must
def test_4_4_e_the_trace_is_dated(stamp):
    """RFC 5321 4.4: a semicolon and a date-time of RFC 5322 end it, with four digits for the year."""
    if not (re.match(r"(?:[A-Z][a-z]{2}, )?\d{1,2} [A-Z][a-z]{2} \d{4} \d\d:\d\d(?::\d\d)? ", stamp.date)
            and email.utils.parsedate_tz(stamp.date)):
        fail(f"behind the last semicolon stands “{stamp.date}”")


@should
def test_4_4_f_the_date_has_an_offset(stamp):
    """RFC 5321 4.4: such as -0800, and no name of a time zone, unless in a comment."""
    if not re.search(r" [+-]\d{4}(?: \(.*\))?$", stamp.date):
        fail(f"the date is “{stamp.date}”")


def named(session):
    """The header of a message to two recipients, unfolded, and these two."""
    one, other = session.target.recipient, session.target.recipients(1)[0]
    header = session.deliver(letter(), recipients=[one, other]).data.partition(b"\r\n\r\n")[0]
    return re.sub(r"\r\n(?=[ \t])", "", header.decode("latin-1")), one, other


@must
def test_4_4_g_the_for_clause_has_one_path(session):
    """RFC 5321 4.4: if there is one, it has one path, however many recipients there are."""
    clause = re.search(r"^received:.*\bfor\b(.*?);", named(session)[0], re.I | re.M)
    if not clause:
        not_applicable("the trace has no FOR clause")
    if clause[1].count("@") != 1:
        fail(f"the trace has “for{clause[1]}”")


@must
def test_4_4_h_earlier_received_fields_stay(stamp):
    """RFC 5321 4.4: nothing is changed in them, removed from them, or put between or behind them."""
    if FOREIGN not in stamp.data or b"received:" in stamp.data.partition(FOREIGN)[2].lower():
        fail("the Received fields of other servers have not arrived as they were sent")


@should
def test_4_4_i_protocols_in_the_trace_are_registered(stamp):
    """RFC 5321 4.4: the WITH clause names SMTP, ESMTP or a registered one."""
    if "with" not in stamp.clauses:
        not_applicable("the trace has no WITH clause")
    if stamp.clauses["with"].upper() not in PROTOCOLS:
        fail(f"the trace has “with {stamp.clauses['with']}”")


@should
def test_4_4_j_clauses_of_the_trace_are_registered(stamp):
    """RFC 5321 4.4: behind BY come VIA, WITH, ID, FOR or registered ones."""
    nothing(sorted(set(stamp.clauses) - CLAUSES), "clauses that are not registered")


# ---- 4.5.1: the minimum -----------------------------------------------------------------------


@must
def test_4_5_1_a_vrfy_is_supported(session):
    """RFC 5321 4.5.1, 3.5.3: a server that answers it 500 or 502 is not in full compliance."""
    reject(session.say("VRFY postmaster"), *UNKNOWN)


@must
def test_4_5_1_b_mail_is_supported(session):
    """RFC 5321 4.5.1, 3.3: a sender that is accepted is answered 250."""
    expect(session.mail(), "250")


@must
def test_4_5_1_c_rcpt_is_supported(session):
    """RFC 5321 4.5.1, 3.3: a recipient that is accepted is answered 250 or 251."""
    session.mail()
    expect(session.rcpt(), "250", "251")


@must
def test_4_5_1_d_data_is_supported(session):
    """RFC 5321 4.5.1, 3.3: it is answered 354."""
    if session.target.recipient is None:
        not_applicable("no mail may be sent: name a recipient with --to")
    expect(unless_refused(session.begin().say("DATA")), "354")


@must
def test_4_5_1_e_postmaster_needs_no_domain(session):
    """RFC 5321 4.5.1, 2.3.5, 4.1.1.3: RCPT TO:<Postmaster> is accepted; the site's policy does not
    extend to that."""
    session.mail()
    expect(unless_later(session.say("RCPT TO:<Postmaster>")), "2")


@must
def test_4_5_1_f_postmaster_in_any_case(session):
    """RFC 5321 4.5.1, 4.1.1.3: capitals make no difference in that name."""
    session.mail()
    if not session.say("RCPT TO:<Postmaster>").taken:
        not_applicable("<Postmaster> is not accepted")
    expect(unless_later(session.say("RCPT TO:<pOsTMASTer>")), "2")


# ---- 4.5.2: transparency ------------------------------------------------------------------------


@must
def test_4_5_2_a_a_dot_is_taken_away_from_the_beginning_of_lines(session):
    """RFC 5321 4.5.2: of ..x arrives .x, and a line of two dots is one of one."""
    body = b".\r\n..\r\n.x\r\n. \r\nx.\r\n"
    as_sent(session.deliver(letter(body=body)), b"\r\n\r\n" + body)


@must
def test_4_5_2_b_all_ascii_characters_arrive(session):
    """RFC 5321 4.5.2: tabs, trailing spaces and control characters among them."""
    body = b"." + bytes(octet for octet in range(1, 128) if octet not in b"\r\n") + b"\r\n"
    as_sent(session.deliver(letter(body=body)), b"\r\n\r\n" + body)


# ---- 4.5.3.1: sizes -----------------------------------------------------------------------------


def domain(size):
    """A name of so many octets, in labels of at most 63."""
    return ("x" * 49 + ".") * (size // 50) + "x" * (size % 50)


@must
def test_4_5_3_1_1_a_local_parts_have_64_octets(session):
    """RFC 5321 4.5.3.1, 4.5.3.1.1: at least."""
    expect(session.unlike(f"MAIL FROM:<{'a' * 64}@example.org>", "MAIL FROM:<a@example.org>"), "250")


@must
def test_4_5_3_1_2_a_domains_have_255_octets(nameless):
    """RFC 5321 4.5.3.1, 4.5.3.1.2: at least; the DNS leaves 253 of them to be written."""
    expect(nameless.unlike(f"EHLO {domain(253)}", f"EHLO {domain(52)}"), "250")


@must
def test_4_5_3_1_3_a_paths_have_256_octets(session):
    """RFC 5321 4.5.3.1, 4.5.3.1.3: at least, < and > included."""
    expect(session.unlike(f"MAIL FROM:<a@{domain(252)}>", f"MAIL FROM:<a@{domain(52)}>"), "250")


@must
def test_4_5_3_1_4_a_command_lines_have_512_octets(target):
    """RFC 5321 4.5.3.1, 4.5.3.1.4, 4.3.2: at least, CRLF included; less is not too long."""
    for verb in "NOOP", "HELP", "VRFY":
        session = target.session()
        if session.say(f"{verb} xyzzy").code not in (*UNKNOWN, "501"):
            reject(session.say(f"{verb} ".ljust(510, "x")), "500")
            return
    not_applicable("there is no command to try it with")


@must
def test_4_5_3_1_5_a_reply_lines_have_at_most_512_octets(tour):
    """RFC 5321 4.5.3.1.5: CRLF included."""
    nothing([line for line in tour.raw.split(b"\n") if len(line) > 511], "more than 512 octets")
    tour.complete()


@must
def test_4_5_3_1_6_a_text_lines_have_1000_octets(session):
    """RFC 5321 4.5.3.1, 4.5.3.1.6: at least, CRLF included, and the doubled dot not counted."""
    body = b"x" * 998 + b"\r\n." + b"y" * 997 + b"\r\n"
    as_sent(session.deliver(letter(body=body)), body)


@must
def test_4_5_3_1_7_a_messages_have_64k_octets(session):
    """RFC 5321 4.5.3.1.7: at least."""
    content = letter()
    expect(session.offer(content + (b"x" * 62 + b"\r\n") * ((65536 - len(content)) // 64)), "2")


@must
def test_4_5_3_1_8_a_transactions_have_100_recipients(session):
    """RFC 5321 4.5.3.1.8: at least."""
    session.mail()
    for count, path in enumerate(session.target.recipients(100)):
        reply = session.say(f"RCPT TO:<{path}>")
        if not reply.taken and (count == 0 or (reply.code[0] == "4" and reply.code != "452")):
            not_applicable(f"the server refuses recipients, as it may: {reply.told}")
        if not reply.taken:
            fail(f"recipient {count + 1} is refused: {reply.told}")


@must
def test_4_5_3_1_10_a_too_many_recipients_are_answered_452(session):
    """RFC 5321 4.5.3.1.10, 4.5.3.1.8: where there is a limit; 552, which RFC 821 had, is wrong, and
    so is any other refusal that seems to be final."""
    if session.target.recipient is None:
        not_applicable("so many are only tried where mail may be sent: name a recipient with --to")
    session.mail()
    replies = (session.say(f"RCPT TO:<{path}>") for path in session.target.recipients(1050))
    count, reply = next(((count, reply) for count, reply in enumerate(replies) if not reply.taken), (0, None))
    if reply is None:
        not_applicable("the server takes more than a thousand recipients")
    if count < 100:
        not_applicable(f"that is no limit to their number: {reply.told}")
    expect(reply, "452")


# ---- 4.5.3.2 to 4.5.5 -----------------------------------------------------------------------------


@should
def test_4_5_3_2_7_a_a_server_waits_five_minutes_for_a_command(session):
    """RFC 5321 4.5.3.2.7: it closes no connection for a shorter silence."""
    patience = session.target.patience
    if not patience:
        not_applicable("it takes five minutes: give them with --patience 300")
    began = time.monotonic()
    session.closed(within=patience)
    if time.monotonic() - began < patience:
        fail(f"the server closes the connection after {time.monotonic() - began:.0f} seconds of silence")


@should
def test_4_5_4_2_a_several_clients_are_served_at_once(target):
    """RFC 5321 4.5.4.2: one transaction at a time is not the intent of the RFC."""
    first = target.session().begin()
    try:
        second = target.connect()
    except Dismissed as reason:
        fail(f"beside another session {reason}")
    except Silent:
        first.close()
        if target.sessions[-1].line():
            fail("a session is greeted only when the one before it has ended")
        raise
    expect(second.greeting, "220")
    second.introduce()
    expect(second.begin().say("RSET"), "2")


@should
def test_4_5_5_a_a_null_reverse_path_stays_null(session):
    """RFC 5321 4.5.5: what came from <> is handed on from <>."""
    arrived = session.deliver(letter(), sender="").reverse_path
    if arrived.split(" ")[0] != "<>":
        fail(f"<> has become {arrived}")
