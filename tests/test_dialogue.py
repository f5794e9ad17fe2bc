"""The dialogue, as a client sees it: what each command is answered, in each state."""
import random
import re
import socket
import threading
import time

import pytest

from lab import HOSTNAME, Relay, transcript, wait_for

HELO_FIRST = "503 5.5.1 Error: send HELO/EHLO first"
NEED_MAIL = "503 5.5.1 Error: need MAIL command"
NEED_RCPT = "503 5.5.1 Error: need RCPT command"
NESTED_MAIL = "503 5.5.1 Error: nested MAIL command"
MAIL_SYNTAX = "501 5.5.4 Syntax: MAIL FROM:<address>"
RCPT_SYNTAX = "501 5.5.4 Syntax: RCPT TO:<address>"
VRFY_SYNTAX = "501 5.5.4 Syntax: VRFY address"
NOT_IMPLEMENTED = "502 5.5.1 Error: command not implemented"
UNKNOWN = "500 5.5.2 Error: command not recognized"
TOO_LONG = "500 5.5.2 Error: line too long"
OK = "250 2.0.0 Ok"

# What a command line may have with its CRLF: 512 octets (RFC 5321 4.5.3.1.4), and
# 26 more for SIZE (RFC 1870 3) and 17 for BODY (RFC 6152 2).
LINE_LIMIT = 512 + 26 + 17


@pytest.fixture
def introduced(client):
    client.say("EHLO me.com")
    return client


def draft(relay):
    """The lines of the one message that is being received."""
    path, = relay.tmp()
    return path.read_bytes().decode("latin-1").split("\r\n")[:-1]


# ---- Every reply -----------------------------------------------------------------------


def test_a_session_from_220_to_221(world):
    with world.relay.client(greeting=False) as client:
        transcript(client, """
            S: 220 <hostname> ESMTP smtp ...
            C: HELO me.com
            S: 250 <port> OK
            C: MAIL FROM:<nour@example.org>
            S: 250 2.1.0 Ok
            C: RCPT TO:<friend@example.net>
            S: 250 2.1.5 Ok
            C: DATA
            S: 354 End data with <CR><LF>.<CR><LF>
            C: Subject: testing my smtp server
            C:
            C: Dear Nour, This is me testing my server
            C: .
            S: 250 2.0.0 Ok: queued as ...
            C: QUIT
            S: 221 2.0.0 OK
            S: <close>
        """)
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<friend@example.net>"]


def test_greeting_tells_the_version(client):
    assert re.fullmatch(rf"220 {HOSTNAME} ESMTP smtp \d+(\.\d+)+", client.greeting)


def test_helo_tells_each_client_its_port(server):
    with server.client() as one, server.client() as other:
        assert one.say("HELO me.com") == f"250 {one.local_port} OK"
        assert other.say("HELO me.com") == f"250 {other.local_port} OK"
        assert one.local_port != other.local_port


@pytest.mark.parametrize("options, size", [
    ((), 50 * 1024 * 1024), (("-m", 1000), 1000), (("-m", 0), 0), (("-m", "3K"), 3 * 1024), (("-m", "25M"), 25 * 1024 ** 2),
    (("-m", "2G"), 2 * 1024 ** 3), (("-m", "17179869183G"), 2 ** 64 - 2 ** 30), (("-m", 2 ** 64 - 1), 2 ** 64 - 1)])
def test_ehlo_lists_the_extensions(relay, options, size):
    with relay(*options).client() as client:
        transcript(client, f"""
            C: EHLO me.com
            S: 250-<hostname> ...
            S: 250-PIPELINING
            S: 250-SIZE {size}
            S: 250-8BITMIME
            S: 250-ENHANCEDSTATUSCODES
            S: 250 HELP
        """)


@pytest.mark.parametrize("verb", ["HELO", "EHLO"])
@pytest.mark.parametrize("name, taken", [
    ("me.com", True), ("[192.0.2.1]", True), ("[IPv6:2001:db8::1]", True), ("localhost", True), ("pc-17", True),
    ("3com.example", True), ("-", True), ("me.com.", True), ("x" * 255, True), ("", False), ("me com", False),
    ("x" * 256, False)])
def test_a_name_is_one_word(client, verb, name, taken):
    reply = client.say(f"{verb} {name}")
    assert reply.startswith("250") if taken else reply == f"501 Syntax: {verb} hostname"
    # A refused one leaves the state as it was (RFC 5321 4.1.4).
    assert client.say("MAIL FROM:<a@example.org>") == ("250 2.1.0 Ok" if taken else HELO_FIRST)


@pytest.mark.parametrize("name", ["my_pc", "_", "me.com:25", "me@com", "[", "[192.0.2.1", "192.0.2.1]", "me.[com]"])
def test_a_name_of_other_characters_is_for_helo(client, name):
    """RFC 5321 4.1.2 wants 501; and nobody is sent away for what the machine is called."""
    assert client.say(f"EHLO {name}") == (
        "501 Syntax: EHLO hostname, with letters, digits, hyphens and dots only; HELO takes any name")
    assert client.say("MAIL FROM:<a@example.org>") == HELO_FIRST
    assert client.say(f"HELO {name}") == f"250 {client.local_port} OK"
    assert client.say("MAIL FROM:<a@example.org>") == "250 2.1.0 Ok"


@pytest.mark.parametrize("line, reply", [
    *((verb, NOT_IMPLEMENTED) for verb in (
        "EXPN staff", "EXPN", "TURN", "SEND FROM:<a@example.org>", "SOML FROM:<a@example.org>",
        "SAML FROM:<a@example.org>", "ETRN example.net", "AUTH PLAIN AGEAYg==", "STARTTLS", "BDAT 86 LAST",
        "eTrN example.net")),
    *((line, UNKNOWN) for line in (
        "", "FOO", "HELOO me.com", "HEL me.com", "MAILFROM:<a@example.org>", "NOOP:", ".", "-", " NOOP",
        "XCLIENT ADDR=192.0.2.1")),
    ("NOOP", OK), ("NOOP whatever", OK), ("RSET", OK), ("RSET now", "501 5.5.4 Syntax: RSET"),
    ("QUIT now", "501 5.5.4 Syntax: QUIT")])
def test_commands_that_need_no_helo(client, line, reply):
    """RFC 5321 4.1.4; and what this server does not have, it does not have in any state."""
    assert client.say(line) == reply
    assert client.say("HELO me.com").startswith("250")
    assert client.say(line) == reply


def test_help_is_answered(client):
    assert client.say("HELP").startswith("214 ")
    assert client.say("help MAIL").startswith("214 ")


# RFC 5321 4.5.3.1.2.  A path has no room for it, but VRFY takes an address without < and >.
LABELS = "a@" + ("x" * 63 + ".") * 3


@pytest.mark.parametrize("argument, taken", [
    ("nour", True), ("nour@example.org", True), ("<nour@example.org>", True), ('"nour m"@example.org', True),
    ("Postmaster", True), ("<@a.example:nour@example.org>", True), (LABELS + "x" * 63, True),
    (LABELS + "x" * 62 + ".x", False),
    ("", False), ("<nour@example.org", False), ("nour@", False), ("@example.org", False), ("nour m", False),
    ("nour@example..org", False), ("<>", False), ("nour@example.org>", False)])
def test_vrfy_checks_the_syntax_and_verifies_nothing(client, argument, taken):
    reply = client.say(f"VRFY {argument}")
    assert reply.startswith("252 2.0.0 ") if taken else reply == VRFY_SYNTAX


# ---- The order ----------------------------------------------------------------------------


def test_nothing_is_sent_before_helo(client):
    transcript(client, f"""
        C: MAIL FROM:<a@example.org>
        S: {HELO_FIRST}
        C: RCPT TO:<b@example.net>
        S: {HELO_FIRST}
        C: DATA
        S: {HELO_FIRST}
        C: MAIL nonsense
        S: {HELO_FIRST}
        C: RSET
        S: {OK}
        C: MAIL FROM:<a@example.org>
        S: {HELO_FIRST}
    """)


def test_order_within_a_transaction(client):
    """A command out of order changes nothing, so the one in order goes on."""
    transcript(client, f"""
        C: HELO me.com
        S: 250 ...
        C: RCPT TO:<b@example.net>
        S: {NEED_MAIL}
        C: DATA
        S: {NEED_MAIL}
        C: MAIL FROM:<a@example.org>
        S: 250 2.1.0 Ok
        C: MAIL FROM:<c@example.org>
        S: {NESTED_MAIL}
        C: DATA
        S: {NEED_RCPT}
        C: RCPT TO:<b@example.net>
        S: 250 2.1.5 Ok
        C: MAIL FROM:<c@example.org>
        S: {NESTED_MAIL}
        C: RCPT TO:<d@example.net>
        S: 250 2.1.5 Ok
        C: DATA now
        S: 501 5.5.4 Syntax: DATA
        C: DATA
        S: 354 End data with <CR><LF>.<CR><LF>
    """)


def test_a_transaction_needs_a_recipient_that_was_taken(introduced):
    transcript(introduced, f"""
        C: MAIL FROM:<a@example.org>
        S: 250 2.1.0 Ok
        C: RCPT TO:<nobody>
        S: {RCPT_SYNTAX}
        C: DATA
        S: {NEED_RCPT}
    """)


@pytest.mark.parametrize("line", ["HELO", "EHLO", "NOOP", "VRFY nour", "HELP", "FOO", "AUTH", "MAIL FROM:<>", "RSET now"])
def test_a_transaction_survives(introduced, server, line):
    """Of the refused ones, HELO and EHLO by RFC 5321 4.1.4."""
    introduced.say("MAIL FROM:<a@example.org>")
    introduced.say("RCPT TO:<b@example.net>")
    before = draft(server)
    introduced.say(line)
    assert draft(server) == before
    assert introduced.say("DATA").startswith("354")


@pytest.mark.parametrize("command", ["RSET", "HELO me.com", "EHLO me.com"])
@pytest.mark.parametrize("recipients", [0, 1, 2])
def test_reset_empties_everything(world, command, recipients):
    with world.relay.client() as client:
        client.say("HELO me.com")
        client.say("MAIL FROM:<old@example.org>")
        for n in range(recipients):
            client.say(f"RCPT TO:<old{n}@example.net>")
        assert len(world.relay.tmp()) == 1
        assert client.say(command).startswith("250")
        assert world.relay.tmp() == []
        assert client.say("RCPT TO:<b@example.net>") == NEED_MAIL
        assert client.say("DATA") == NEED_MAIL
        assert client.deliver("new@example.org", ["b@example.net"], "x").startswith("250")
    message, = world.exchanger.wait_for_messages(1)
    assert (message.reverse_path.split()[0], message.recipients) == ("<new@example.org>", ["<b@example.net>"])


def test_a_transaction_ends_with_its_message(world):
    """Another one is begun by MAIL again, and not by HELO (RFC 5321 4.1.4)."""
    with world.relay.client() as client:
        client.deliver("a@example.org", ["b@example.net"], "x")
        assert client.say("RCPT TO:<c@example.net>") == NEED_MAIL
        assert client.say("MAIL FROM:<a@example.org>") == "250 2.1.0 Ok"
        assert client.say("DATA") == NEED_RCPT


def test_many_transactions_in_a_session(world):
    with world.relay.client() as client:
        replies = [client.deliver(f"a{n}@example.org", [f"b{n}@example.net"], f"message {n}") for n in range(20)]
    assert all(re.fullmatch(r"250 2\.0\.0 Ok: queued as \S+", reply) for reply in replies)
    assert len(set(replies)) == 20
    messages = world.exchanger.wait_for_messages(20)
    assert sorted((m.recipients[0], m.data.splitlines()[-1].decode()) for m in messages) == sorted(
        (f"<b{n}@example.net>", f"message {n}") for n in range(20))


def test_hanging_up_leaves_nothing_behind(relay):
    server = relay()
    for lines in ["MAIL FROM:<a@example.org>"], ["MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>", "DATA", "text"]:
        with server.client() as client:
            client.say("HELO me.com")
            client.send("".join(line + "\r\n" for line in lines).encode())
            wait_for(server.tmp)
        wait_for(lambda: server.tmp() == [])
    assert server.queue() == []


# ---- Letters and spaces ---------------------------------------------------------------------


@pytest.mark.parametrize("change", [str.lower, str.upper, str.swapcase, str.title])
def test_verbs_and_keywords_in_any_case(introduced, server, change):
    """Local parts keep theirs (RFC 5321 2.4)."""
    lines = ["Helo me.com", "Mail From:", "Rcpt To:", "Rcpt To:", "Vrfy nour", "Noop", "Rset", "Data"]
    helo, mail, rcpt, rcpt_postmaster, vrfy, noop, rset, data = map(change, lines)
    said = [helo, f"{mail}<Nour@Example.ORG> " + change("Size=10 Body=8bitmime"), f"{rcpt}<Friend@Example.NET>",
            rcpt_postmaster + change("<Postmaster>"), vrfy, noop]
    assert [introduced.say(line)[:3] for line in said] == ["250", "250", "250", "250", "252", "250"]
    assert draft(server)[1:] == ["MAIL FROM:<Nour@Example.ORG> BODY=8BITMIME", "RCPT TO:<Friend@Example.NET>",
                                 f"RCPT TO:<postmaster@{HOSTNAME}>"]
    assert introduced.say(rset) == OK
    assert introduced.say(data) == NEED_MAIL
    assert introduced.say(change("Quit")) == "221 2.0.0 OK"


@pytest.mark.parametrize("space", [" ", "\t", " \t  "])
def test_space_at_the_end_of_a_line_is_ignored(client, space):
    """RFC 5321 4.1.1."""
    lines = ["HELO me.com", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>", "NOOP", "RSET", "EHLO me.com",
             "MAIL FROM:<a@example.org> SIZE=1", "RCPT TO:<b@example.net>", "DATA"]
    assert [client.say(line + space)[:3] for line in lines] == ["250"] * 8 + ["354"]


# ---- Paths --------------------------------------------------------------------------------


def label(size):
    return ("x" * 63 + ".") * (size // 64) + "x" * (size % 64)


LONGEST_PATH = "a" * 64 + "@" + label(256 - 64 - 3)        # < and > count (RFC 5321 4.5.3.1.3)
ATEXT = "!#$%&'*+-/=?^_`{|}~"

ADDRESSES = [
    "a@example.net", "a.b.c@example.net", "A@EXAMPLE.NET", "1@1.example", "a@localhost", "a@a-b--c.example",
    f"{ATEXT}@example.net", f"a@{'x' * 63}.net",
    '"a"@example.net', '"a b"@example.net', '"a@b"@example.net', '"a>b"@example.net', '"<"@example.net',
    r'"a\"b\\c"@example.net', r'"\a"@example.net', '".a..b."@example.net', '""@example.net',
    # RFC 5321 4.1.3.
    "a@[192.0.2.1]", "a@[127.0.0.01]", "a@[000.01.002.255]", "a@[IPv6:2001:db8::1]", "a@[ipv6:::1]", "a@[IPv6:::]",
    "a@[IPv6:1:2:3:4:5:6:7:8]", "a@[IPv6:0001:02:003:4:5:6:7:FffF]", "a@[IPv6:1:2:3:4:5:6::]", "a@[IPv6:1:2:3::4:5:6]",
    "a@[IPv6:::1:2:3:4:5:6]", "a@[IPv6:1::]", "a@[IPv6:::ffff:192.0.2.1]", "a@[IPv6:::192.0.2.01]",
    "a@[IPv6:1:2:3:4:5:6:192.0.2.1]", "a@[IPv6:1:2:3:4::192.0.2.1]", "a@[IPv6:1::4:192.0.2.1]",
    "a" * 64 + "@example.net", "a" * 65 + "@example.net", "a" * 64 + "+caf_=b=example.org@example.net",
    "a" * 242 + "@example.net", '"' + "a" * 240 + '"@example.net', LONGEST_PATH]

NO_ADDRESSES = [
    "a", "a@", "@example.net", "@", "a@b@example.net", "a b@example.net", "a(b)@example.net", "a,b@example.net",
    ".a@example.net", "a.@example.net", "a..b@example.net", "a:b@example.net", r"a\b@example.net",
    "a@.example.net", "a@example.net.", "a@example..net", "a@-example.net", "a@example-.net", "a@exam_ple.net",
    "a@example net", f"a@{'x' * 64}.net", " a@example.net", "a@example.net ", "<a@example.net>",
    '"a@example.net', '"a"b@example.net', 'a"b"@example.net', r'"a\"@example.net', '"a""b"@example.net',
    "a@192.0.2.1]", "a@[192.0.2.1", "a@[192.0.2.256]", "a@[192.0.2]", "a@[192.0.2.1]x", "a@[]", "a@[x]",
    "a@[192.0.2.0001]", "a@[192..2.1]", "a@[.192.0.2.1]", "a@[192.0.2.1.]", "a@[192.0.2.1.1]", "a@[0xc0.0.2.1]",
    "a@[192.0.2. 1]", "a@[3221225985]", "a@[192.0.2.-1]", "a@[192.0.2.1:25]",
    "a@[2001:db8::1]", "a@[IPv6:192.0.2.1]", "a@[IPv6:1::2::3]", "a@[IPv6:fe80::1%lo]", "a@[IPv6:]", "a@[tag:x]",
    "a@[IPv6:1:2:3:4:5:6:7::]", "a@[IPv6:::1:2:3:4:5:6:7]", "a@[IPv6:1:2:3::4:5:6:7]", "a@[IPv6:1:2:3:4:5:6:7:8::]",
    "a@[IPv6:1:2:3:4:5::192.0.2.1]", "a@[IPv6:::1:2:3:4:5:192.0.2.1]", "a@[IPv6:1:2:3:4:5:6:7:192.0.2.1]",
    "a@[IPv6:1:2:3:4:5:192.0.2.1]", "a@[IPv6:1:2:3:4:5:6:7]", "a@[IPv6:1:2:3:4:5:6:7:8:9]", "a@[IPv6:1:2:3:4:5:6:7:8:]",
    "a@[IPv6::1:2:3:4:5:6:7:8]", "a@[IPv6:1::2:]", "a@[IPv6::1::2]", "a@[IPv6:::::]", "a@[IPv6:::: ]", "a@[IPv6::]",
    "a@[IPv6:::00001]", "a@[IPv6:::g]", "a@[IPv6:::192.0.2.256]", "a@[IPv6:::192.0.2.1:1]", "a@[IPv6:::192.0.2.1",
    "a@[IPv6:::1", "a@[IPv6::::1]", "a@[IPv6 ::1]", "a@[IPv6:::0x1]", "a@[IPv6:::+1]"]

LONG_PATHS = [LONGEST_PATH + "x", "a" * 243 + "@example.net", '"' + "a" * 241 + '"@example.net', "a@" + label(255),
            "@a.example:" + LONGEST_PATH, "a" * 400 + "@example.net"]

ROUTES = ["@a.example:", "@a.example,@b.example,@c.example:"]
NO_ROUTES = ["@a.example", "@:", "a.example:", "@a.example,:", "@a.example,b.example:", "@a.example:@b.example:",
             "@[192.0.2.1]x:", "@a..example:"]


def paths(command):
    """RFC 5321 4.1.2."""
    for address in ADDRESSES:
        yield f"{command}:<{address}>", address
    # Clients may not send blanks behind the colon (3.3), and some do.
    for blanks in (" ", "\t", "  \t "):
        yield f"{command}:{blanks}<a@example.net>", "a@example.net"
    for address in NO_ADDRESSES:
        yield f"{command}:<{address}>", None
    # Source routes are read and ignored (appendix C).
    for route in ROUTES:
        yield f"{command}:<{route}a@example.net>", "a@example.net"
    for route in NO_ROUTES:
        yield f"{command}:<{route}a@example.net>", None
    for form in ("", ":", ": ", ":a@example.net", ": a@example.net", ":<a@example.net", ":a@example.net>",
                 " :<a@example.net>", "\t:<a@example.net>", ":< a@example.net>", ":<\ta@example.net>", ":<a@example.net\t>",
                 "<a@example.net>", ":<a@example.net>>", ":<a@example.net>x", ":<a@example.net>,<b@example.net>"):
        yield command + form, None


@pytest.mark.parametrize("line, stored", [
    *paths("MAIL FROM"), ("MAIL FROM:<>", ""), ("MAIL FROM: <>", ""), ("MAIL FROM:\t<>", ""), ("MAIL FROM:< >", None),
    ("MAIL FROM: <a@example.net> SIZE=1", "a@example.net"), ("MAIL FROM:<a@example.net>\tSIZE=1", None), ("MAIL", None), ("MAIL TO:<a@example.net>", None),
    ("MAIL FROM:<Postmaster>", None), ("MAIL  FROM:<a@example.net>", "a@example.net")])
def test_reverse_path(introduced, server, line, stored):
    assert introduced.say(line) == (MAIL_SYNTAX if stored is None else "250 2.1.0 Ok")
    # What is refused begins no transaction.
    assert server.tmp() == [] if stored is None else draft(server) == ["EHLO me.com", f"MAIL FROM:<{stored}>"]
    introduced.say("RSET")


@pytest.mark.parametrize("line, stored", [
    *paths("RCPT TO"), ("RCPT TO:<>", None), ("RCPT", None), ("RCPT FROM:<a@example.net>", None),
    ("RCPT TO:<Postmaster>", f"postmaster@{HOSTNAME}"), ("RCPT TO: \t<Postmaster>", f"postmaster@{HOSTNAME}"),
    ("RCPT TO:<pOSTMASTER>", f"postmaster@{HOSTNAME}"),
    ("RCPT TO:<Postmaster@example.net>", "Postmaster@example.net"), ("RCPT TO:<Postmasters>", None)])
def test_forward_path(introduced, server, line, stored):
    """<Postmaster> needs no domain (RFC 5321 4.5.1)."""
    introduced.say("MAIL FROM:<>")
    assert introduced.say(line) == (RCPT_SYNTAX if stored is None else "250 2.1.5 Ok")
    assert draft(server)[2:] == ([] if stored is None else [f"RCPT TO:<{stored}>"])
    introduced.say("RSET")


@pytest.mark.parametrize("command", ["MAIL FROM:", "RCPT TO:", "VRFY "])
@pytest.mark.parametrize("address", LONG_PATHS)
def test_a_path_that_is_too_long(introduced, server, command, address):
    """RFC 5321 4.5.3.1.3, and in words that say so: 4.5.3.1.10."""
    if command == "RCPT TO:":
        introduced.say("MAIL FROM:<>")
    before = server.tmp()
    assert re.fullmatch("501 5.5.4 .*too long.*", introduced.say(f"{command}<{address}>"))
    assert server.tmp() == before
    introduced.say("RSET")


def test_a_long_local_part_reaches_its_exchanger(world):
    """Of 242 octets: the path is as long as a path may be."""
    address = "a" * 242 + "@example.net"
    world.relay.send(address, sender=address)
    message, = world.exchanger.wait_for_messages(1)
    assert (message.reverse_path.split()[0], message.recipients) == (f"<{address}>", [f"<{address}>"])


def test_postmaster_goes_to_the_address_of_M(world, relay, tmp_path):
    server = relay("-M", "boss@example.net", mx_port=world.exchanger.port, spool=tmp_path / "other")
    with server.client() as client:
        assert client.deliver("a@example.org", ["Postmaster"], "x").startswith("250")
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<boss@example.net>"]


def test_a_thousand_recipients_and_no_more(introduced, server):
    """RFC 5321 4.5.3.1.10."""
    count = 1003
    introduced.say("MAIL FROM:<a@example.org>")
    introduced.send(b"".join(b"RCPT TO:<b%d@example.net>\r\n" % n for n in range(count)))
    replies = [introduced.reply() for _ in range(count)]
    assert replies[:1000] == ["250 2.1.5 Ok"] * 1000
    assert all(reply.startswith("452 4.5.3 ") for reply in replies[1000:])
    assert len(draft(server)) == 1002
    assert introduced.say("DATA").startswith("354")


# ---- Parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters, reply", [
    *((p, "250 2.1.0 Ok") for p in (
        " SIZE=0", " SIZE=1000", " SIZE=0000000000000001000", " BODY=7BIT", " BODY=8BITMIME", " SIZE=1 BODY=7BIT",
        " BODY=8bitmime  SIZE=1000 ")),
    *((p, MAIL_SYNTAX) for p in (
        " SIZE", " SIZE=", " SIZE=-1", " SIZE=+1", " SIZE=1k", " SIZE=0x10", " SIZE=1 SIZE=1",
        " SIZE=" + "9" * 21, " BODY", " BODY=", " BODY=8BIT", " BODY=BINARYMIME", " BODY=7BIT BODY=7BIT", " =1", "SIZE=1",
        " SIZE=1=1", " -=1")),
    *((p, "555 5.5.4 ...") for p in (
        " FOO", " FOO=1", " SMTPUTF8", " AUTH=<>", " RET=HDRS ENVID=1", " SIZES=1", " SIZE=1 FOO=1", " X-Y=1")),
    *((p, "552 5.3.4 ...") for p in (" SIZE=1001", " SIZE=4294967296", " SIZE=18446744073709551616", " SIZE=" + "9" * 20,
                                     " BODY=7BIT SIZE=1001"))])
def test_parameters_of_mail(tiny, parameters, reply):
    """RFC 1870, RFC 6152; 555 by RFC 5321 4.1.1.11."""
    with tiny.client() as client:
        client.say("EHLO me.com")
        transcript(client, f"""
            C: MAIL FROM:<a@example.org>{parameters}
            S: {reply}
            C: DATA
            S: {NEED_RCPT if reply[0] == "2" else NEED_MAIL}
        """)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A relay that takes 1,000 octets."""
    relay = Relay("-m", 1000, spool=tmp_path_factory.mktemp("tiny") / "spool")
    yield relay
    relay.stop()


def test_without_a_limit_any_size_may_be_declared(relay):
    with relay("-m", 0).client() as client:
        client.say("EHLO me.com")
        assert client.say("MAIL FROM:<a@example.org> SIZE=" + "9" * 20) == "250 2.1.0 Ok"


@pytest.mark.parametrize("parameter", ["FOO", "FOO=1", "NOTIFY=NEVER", "ORCPT=rfc822;b@example.net", "SIZE=1"])
def test_rcpt_takes_no_parameters(introduced, parameter):
    introduced.say("MAIL FROM:<a@example.org>")
    assert introduced.say(f"RCPT TO:<b@example.net> {parameter}").startswith("555 5.5.4 ")
    assert introduced.say("DATA") == NEED_RCPT


# ---- Lines ---------------------------------------------------------------------------------


def noop(size):
    """A NOOP of `size` octets, CRLF included."""
    return b"NOOP ".ljust(size - 2, b"x") + b"\r\n"


@pytest.mark.parametrize("size, reply", [(512, OK), (LINE_LIMIT, OK), (LINE_LIMIT + 1, TOO_LONG), (LINE_LIMIT + 2, TOO_LONG),
                                         (65536, TOO_LONG), (65537, TOO_LONG), (500000, TOO_LONG)])
def test_longest_line(introduced, size, reply):
    """Of a longer one the rest is skipped, whatever it may look like."""
    introduced.send(noop(size) + b"VRFY nour\r\n")
    assert introduced.reply() == reply
    assert introduced.reply().startswith("252")
    introduced.send(b"x" * size + b"\nQUIT\n" + noop(size))
    assert introduced.reply() == TOO_LONG
    assert introduced.say("NOOP") == OK


@pytest.mark.parametrize("size, reply", [(LINE_LIMIT, OK), (LINE_LIMIT + 1, TOO_LONG), (LINE_LIMIT + 2, TOO_LONG)])
def test_longest_line_in_two_pieces(introduced, server, size, reply):
    """The server has read the first piece when it answers somebody else."""
    with server.client() as pacer:
        for cut in (1, LINE_LIMIT - 2, LINE_LIMIT - 1, LINE_LIMIT, size - 1):
            line = noop(size)
            introduced.send(line[:cut])
            pacer.say("NOOP")
            introduced.send(line[cut:])
            assert introduced.reply() == reply
            assert introduced.say("RSET") == OK


@pytest.mark.parametrize("octet", [b"\0", b"\1", b"\r", b"\n", b"\r\r", b"\x1b", b"\x7f", b"\x80", b"\xff", "é".encode()])
@pytest.mark.parametrize("line", [b"NOOP a%sb", b"%sNOOP", b"NO%sOP", b"HELO me%s.com", b"MAIL FROM:<a%sb@example.org>",
                                  b'MAIL FROM:<"a%sb"@example.org>', b"QUIT%sQUIT"])
def test_only_printable_ascii_is_a_command(introduced, server, line, octet):
    """A bare CR or LF is no line end, so what is behind it is no command either."""
    introduced.send(line % octet + b"\r\n")
    assert introduced.reply().startswith("500 5.5.2 ")
    assert introduced.say("RCPT TO:<b@example.net>") == NEED_MAIL


@pytest.mark.parametrize("line, reply", [
    ("NOOP a\tb", "250 2.0.0 "), ("\tNOOP", UNKNOWN), ("NO\tOP", UNKNOWN), ("QUIT\tQUIT", UNKNOWN),
    ("HELO me\t.com", "501 Syntax: HELO "), ("EHLO [me\t]", "501 Syntax: EHLO "), ("VRFY a\tb", "501 5.5.4 "),
    ('MAIL FROM:<"a\tb"@example.org>', MAIL_SYNTAX), ("MAIL FROM:<a\tb@example.org>", MAIL_SYNTAX)])
def test_a_tab_is_text_of_no_command(introduced, line, reply):
    assert introduced.say(line).startswith(reply)
    assert introduced.say("RCPT TO:<b@example.net>") == NEED_MAIL


# ---- Pipelining (RFC 2920) ----------------------------------------------------------------------


def one_write(stream):
    return [stream]


def single_octets(stream):
    return [stream[i:i + 1] for i in range(len(stream))]


def random_pieces(stream):
    chance = random.Random(len(stream))
    cuts = sorted(chance.sample(range(len(stream)), min(60, len(stream) // 4)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]


@pytest.mark.parametrize("pieces, count", [
    (one_write, 1), (one_write, 2), (one_write, 40), (random_pieces, 20), (single_octets, 1), (single_octets, 8)])
def test_whole_transactions_at_once(world, pieces, count):
    stream, expected = b"EHLO me.com\r\n", [r"250-.*250-ENHANCEDSTATUSCODES\n250 HELP"]
    for n in range(count):
        stream += (b"MAIL FROM:<a%d@example.org>\r\nRCPT TO:<nobody>\r\nRCPT TO:<b%d@example.net>\r\nDATA\r\n"
                   b"Subject: %d\r\n\r\nNOOP\r\n..\r\n.\r\n" % (n, n, n))
        expected += [re.escape("250 2.1.0 Ok"), re.escape(RCPT_SYNTAX), re.escape("250 2.1.5 Ok"), "354 .*",
                     r"250 2\.0\.0 Ok: queued as \S+"]
    with world.relay.client() as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces(stream + b"NOOP\r\nQUIT\r\n"):
            client.send(piece)
        replies = [client.reply() for _ in expected]
        for reply, pattern in zip(replies, expected):
            assert re.fullmatch(pattern, reply, re.DOTALL)
        assert [client.reply(), client.reply(), client.eof()] == [OK, "221 2.0.0 OK", True]
    messages = world.exchanger.wait_for_messages(count)
    assert sorted(m.data.split(b"Subject: ")[1] for m in messages) == sorted(
        b"%d\r\n\r\nNOOP\r\n.\r\n" % n for n in range(count))


def test_many_small_commands_at_once(introduced):
    """More than any buffer of the server's holds, and so are the replies."""
    count = 20000
    sender = threading.Thread(target=introduced.send, args=(b"NOOP\r\n" * count,), daemon=True)
    sender.start()
    assert [introduced.reply() for _ in range(count)] == [OK] * count
    sender.join()


def test_a_pipelined_transaction_that_fails(introduced, server):
    """Each command is answered for itself (RFC 2920 3.2)."""
    transcript(introduced, f"""
        C: MAIL FROM:<nobody>
        C: RCPT TO:<b@example.net>
        C: DATA
        C: NOOP
        S: {MAIL_SYNTAX}
        S: {NEED_MAIL}
        S: {NEED_MAIL}
        S: {OK}
    """)
    assert server.tmp() == []


def test_nothing_is_answered_after_quit(client):
    client.send(b"HELO me.com\r\nNOOP\r\nQUIT\r\nNOOP\r\nMAIL FROM:<a@example.org>\r\nQUIT\r\nNO")
    assert [client.reply(), client.reply(), client.reply()] == [f"250 {client.local_port} OK", OK, "221 2.0.0 OK"]
    assert client.eof()


# ---- The end --------------------------------------------------------------------------------


TRANSACTION = (b"HELO me.com\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
               b"Subject: x\r\n\r\n.\r\n")


@pytest.mark.parametrize("rest", [b"", b"NOOP\r\n", b"NOOP\r\nQUIT\r\n", TRANSACTION])
def test_who_closes_one_half_gets_all_replies(world, rest):
    with world.relay.client() as client:
        client.send(TRANSACTION + rest)
        client.sock.shutdown(socket.SHUT_WR)
        codes = [client.reply()[:3] for _ in range(5)]
        assert codes == ["250", "250", "250", "354", "250"]
        expected = {b"": [], b"NOOP\r\n": ["250"], b"NOOP\r\nQUIT\r\n": ["250", "221"], TRANSACTION: codes}[rest]
        assert [client.reply()[:3] for _ in expected] == expected
        assert client.eof()
    world.exchanger.wait_for_messages(2 if rest == TRANSACTION else 1)


def test_half_a_line_or_message_at_the_end_does_nothing(relay):
    server = relay()
    for stream, codes in ((b"NOOP\r\nNOOP", ["250"]),
                          *((TRANSACTION[:-cut], ["250", "250", "250", "354"]) for cut in (1, 2, 3, 5))):
        with server.client() as client:
            client.send(stream)
            client.sock.shutdown(socket.SHUT_WR)
            assert [client.reply()[:3] for _ in codes] == codes
            assert client.eof()
    assert server.tmp() == server.queue() == []


IN_TRANSACTION = TRANSACTION[:TRANSACTION.index(b"RCPT")]


def test_silence_ends_a_session_in_every_state(relay):
    """RFC 5321 4.5.3.2.7; and no draft stays behind."""
    server = relay("-t", 1)
    begun = time.monotonic()
    clients = [server.client() for _ in range(5)]
    for client, said, replies in zip(clients, (b"", b"HELO me", b"HELO me.com\r\n", IN_TRANSACTION, TRANSACTION[:-3]),
                                     (0, 0, 1, 2, 4)):
        client.send(said)
        assert [client.reply()[0] for _ in range(replies)] == ["2", "2", "2", "3"][:replies]
    assert len(server.tmp()) == 2
    for client in clients:
        assert client.reply() == f"421 4.4.2 {HOSTNAME} Error: timeout exceeded"
        assert client.eof()
        client.close()
    assert time.monotonic() - begun > 0.9
    wait_for(lambda: server.tmp() == [])


def test_who_says_anything_is_not_silent(relay):
    """Any line counts, and any octet of a message."""
    server = relay("-t", 2)
    speaker, sender = (server.client() for _ in range(2))
    speaker.say("HELO me.com")
    sender.send(TRANSACTION[:-3])
    assert [sender.reply()[:3] for _ in range(4)] == ["250", "250", "250", "354"]
    begun = time.monotonic()

    def talk():
        sender.send(b"x")
        assert speaker.say("NOOP") == OK
        return time.monotonic() - begun > 3
    wait_for(talk)
    sender.send(b"\r\n.\r\n")
    assert sender.reply().startswith("250 2.0.0 Ok: queued as ")
    for client in (speaker, sender):
        client.close()
