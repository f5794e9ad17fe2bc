"""Clients that others wrote hand mail to the relay, each in its own way; at the far end
it is what they were given, byte by byte."""
import email
import email.message
import os
import pty
import re
import select
import shlex
import smtplib
import socket
import subprocess
from pathlib import Path

import pytest

from lab import HOSTNAME, ROOT, wait_for
from programs import BODY, GREETINGS, finish, on_the_wire, program, swaks, without_received


def curl(port, letter, name="me.com"):
    finish(program("curl"), "--silent", "--show-error", "--url", f"smtp://127.0.0.1:{port}/{name}", "--crlf",
           "--mail-from", "nour@example.org", "--mail-rcpt", "friend@example.net", "--upload-file", letter)


def python_smtplib(port, letter, name="me.com"):
    with smtplib.SMTP("127.0.0.1", port, name, timeout=20) as client:
        assert not client.sendmail("nour@example.org", ["friend@example.net"],
                                   on_the_wire(letter.read_text()), ["BODY=8BITMIME"])


def smtp_source(port, letter, name="me.com"):
    finish(program("smtp-source"), "-M", name, "-f", "nour@example.org", "-t", "friend@example.net",
           "-F", letter, f"127.0.0.1:{port}")


def msmtp(port, letter, name="me.com"):
    finish(program("msmtp"), "--file=/dev/null", "--host=127.0.0.1", f"--port={port}", f"--domain={name}",
           "--from=nour@example.org", "friend@example.net", input=letter.read_bytes())


def perl_net_smtp(port, letter, name="me.com"):
    if subprocess.run([program("perl"), "-MNet::SMTP", "-e", "1"], stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("there is no Net::SMTP here")
    finish(program("perl"), "-MNet::SMTP", "-e", '''
        my ($port, $letter, $name) = @ARGV;
        open(my $file, "<:raw", $letter) or die;
        my $client = Net::SMTP->new("127.0.0.1", Port => $port, Hello => $name) or die $@;
        $client->mail("nour\\@example.org", Bits => "8") && $client->to("friend\\@example.net")
            && $client->data(<$file>) && $client->quit or die $client->message;''', port, letter, name)


def nodemailer(port, letter, name="me.com"):
    paths = os.pathsep.join([os.environ.get("NODE_PATH", ""), "/usr/share/nodejs"])     # where Debian has it
    node = [program("node"), "-e"]
    if subprocess.run([*node, "require('nodemailer')"], env={**os.environ, "NODE_PATH": paths},
                      stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("there is no nodemailer here")
    finish(*node, '''
        const [port, letter, name] = process.argv.slice(1);
        require("nodemailer").createTransport({ host: "127.0.0.1", port, name }).sendMail({
            envelope: { from: "nour@example.org", to: ["friend@example.net"], use8BitMime: true },
            raw: require("fs").readFileSync(letter)
        }).catch((error) => { console.error(error); process.exit(1); });''',
           port, letter, name, env={**os.environ, "NODE_PATH": paths})


# Some add an empty line to what they are given.
@pytest.mark.parametrize("send, surplus", [
    (swaks, "\n"), (curl, ""), (msmtp, ""), (python_smtplib, ""), (perl_net_smtp, ""), (nodemailer, ""),
    (smtp_source, "\n")
], ids=lambda value: getattr(value, "__name__", ""))
def test_client_sends_a_message(world, tmp_path, send, surplus):
    letter = tmp_path / "letter"
    letter.write_text(GREETINGS)
    send(world.relay.port, letter)
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.data) == on_the_wire(GREETINGS + surplus)


@pytest.mark.parametrize("send", [swaks, curl, msmtp, python_smtplib, perl_net_smtp, nodemailer, smtp_source],
                         ids=lambda value: value.__name__)
def test_client_on_a_machine_with_an_underscore_in_its_name(world, tmp_path, send):
    """EHLO is refused to it (RFC 5321 4.1.2), and it says HELO (3.2)."""
    letter = tmp_path / "letter"
    letter.write_text(GREETINGS)
    send(world.relay.port, letter, "my_pc")
    message, = world.exchanger.wait_for_messages(1)
    assert re.match(rb"Received: from my_pc \(\S+\)\s+by \S+\s+with SMTP ", message.data)
    assert on_the_wire(GREETINGS) in without_received(message.data)


# A subject in raw UTF-8, as scripts write it.  Without RFC 6532 it is 8-bit text in a place where none may be.
UTF8_SUBJECT = GREETINGS.replace("Subject: testing my smtp server", "Subject: Grüße")


def test_postfix_sendmail_with_a_raw_subject(world, start_peer):
    """It goes through as it is where Postfix is told so, as limits.md says."""
    postfix = start_peer("postfix", next_hop=("127.0.0.1", world.relay.port), more="smtputf8_enable = no")
    assert postfix.sendmail("nour@example.org", "friend@example.net", UTF8_SUBJECT)
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.data.endswith(on_the_wire(UTF8_SUBJECT))


def test_postfix_sendmail_with_a_raw_subject_by_default(world, start_peer):
    """It takes the message for one that needs SMTPUTF8 (RFC 6531), which is not offered here."""
    postfix = start_peer("postfix", next_hop=("127.0.0.1", world.relay.port))
    assert postfix.sendmail("nour@example.org", "friend@example.net", UTF8_SUBJECT)
    wait_for(lambda: "SMTPUTF8 is required, but was not offered" in postfix.log(), 60, what="the bounce")
    assert world.exchanger.messages == []


def test_curl_without_crlf(world, tmp_path):
    """A file with LF line ends is refused; curl needs --crlf, as README says."""
    letter = tmp_path / "letter"
    letter.write_text(GREETINGS)
    curl = program("curl")
    sent = subprocess.run([curl, "-sv", f"smtp://127.0.0.1:{world.relay.port}/me.com", "--mail-from", "nour@example.org",
                           "--mail-rcpt", "friend@example.net", "-T", letter], capture_output=True, text=True, timeout=60)
    assert sent.returncode != 0 and re.search("^< 550 5.5.2 Error: bare CR or LF", sent.stderr, re.M)
    assert world.relay.queue() == world.exchanger.messages == []


@pytest.mark.parametrize("page", ["README.md", "docs/smtp.8"])
def test_curl_as_the_documents_show_it(world, tmp_path, page):
    command, = re.findall(r"^(?: *|\.Dl )(curl smtp://.*)", (ROOT / page).read_text(), re.M)
    words = shlex.split(command.replace("127.0.0.1:2525", f"127.0.0.1:{world.relay.port}/me.com"))
    (tmp_path / words[-1]).write_text(GREETINGS)
    finish(program("curl"), "--silent", "--show-error", *words[1:], cwd=tmp_path)
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.data) == on_the_wire(GREETINGS)


# These write the header themselves, and are given the body alone.


def s_nail(port, body, home, name="me.com"):
    settings = [f"mta=smtp://127.0.0.1:{port}", "v15-compat=yes", "smtp-auth=none", f"hostname={name}",
                "from=nour@example.org", "ttycharset=utf-8", "sendwait"]
    finish(program("s-nail"), "-:/", "-s", "testing my smtp server",
           *[word for setting in settings for word in ("-S", setting)], "friend@example.net",
           input=body.read_bytes(), env={**os.environ, "HOME": str(home)})


def mutt(port, body, home, name="me.com"):
    (home / "muttrc").write_text(f"""\
set smtp_url="smtp://127.0.0.1:{port}" ssl_force_tls=no
set from=nour@example.org use_envelope_from=yes hostname={name}
set charset=utf-8 send_charset=utf-8 copy=no
""")
    finish(program("mutt"), "-n", "-F", home / "muttrc", "-s", "testing my smtp server", "-i", body,
           "friend@example.net", env={**os.environ, "HOME": str(home), "LC_ALL": "C.UTF-8"})


@pytest.mark.parametrize("send", [s_nail, mutt], ids=lambda value: value.__name__)
@pytest.mark.parametrize("text", [
    pytest.param(BODY + "Grüße.\n", id="long lines"),      # which they encode as quoted-printable
    pytest.param("..\n.\n \n\nGrüße. \n", id="short lines"),
])
def test_mail_user_agent_sends_what_is_written(world, tmp_path, send, text):
    body = tmp_path / "body"
    body.write_text(text)
    send(world.relay.port, body, tmp_path)
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    read = email.message_from_bytes(without_received(message.data))
    assert read["Subject"] == "testing my smtp server"
    # Quoted-printable may write an end of line as =0A.
    assert read.get_payload(decode=True).replace(b"\r\n", b"\n") == text.encode()


def test_git_send_email_carries_commits(world, tmp_path):
    """At the far end `git am` makes the same trees of them: every octet is in its place."""
    git = program("git")
    if not Path(finish(git, "--exec-path").strip(), "git-send-email").exists():
        pytest.skip("there is no git send-email here")
    settings = {"user.name": "Nour Müller", "user.email": "nour@example.org", "init.defaultBranch": "main",
                "sendemail.smtpServer": "127.0.0.1", "sendemail.smtpServerPort": world.relay.port,
                "sendemail.smtpDomain": "me.com", "sendemail.confirm": "never", "core.autocrlf": "false"}
    environment = {**os.environ, "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}

    def run_git(repository, *words):
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return finish(git, "-C", repository, *options, *words, env=environment)

    here, there = tmp_path / "here", tmp_path / "there"
    for repository in here, there:
        run_git(tmp_path, "init", "-q", repository)
        run_git(repository, "commit", "-q", "--allow-empty", "-m", "The beginning")
    # A line of a patch is longer by its first character, and longer than 998 it is encoded.
    for text in BODY.replace("x" * 998, "x" * 997), "Grüße.\n" * 100:
        (here / "letter").write_text(text)
        run_git(here, "add", "letter")
        run_git(here, "commit", "-q", "-m", "Write Grüße")
    run_git(here, "send-email", "-q", "--from=nour@example.org", "--to=friend@example.net", "-2")
    messages = world.exchanger.wait_for_messages(2)
    for number, message in enumerate(sorted(messages, key=lambda each: email.message_from_bytes(each.data)["Subject"])):
        (tmp_path / f"mail{number}").write_bytes(message.data)
        run_git(there, "am", "-q", "--keep-non-patch", tmp_path / f"mail{number}")
    for commit in "HEAD", "HEAD~":
        assert run_git(there, "rev-parse", f"{commit}^{{tree}}") == run_git(here, "rev-parse", f"{commit}^{{tree}}")


# The session that everybody types first: (what is typed, the reply).
WALK_THROUGH = [
    ("HELO me.com", "250 <port> OK"),
    ("MAIL FROM:<nour@example.org>", "250 2.1.0 Ok"),
    ("RCPT TO:<friend@example.net>", "250 2.1.5 Ok"),
    ("DATA", "354 End data with <CR><LF>.<CR><LF>"),
    ("SUBJECT: testing my smtp server", None),
    ("FROM: nour@example.org", None),
    ("", None),
    ("Dear Nour, This is me testing my server", None),
    (".", "250 2.0.0 Ok: queued as <id>"),
    ("QUIT", "221 2.0.0 OK")]
WALKED_THROUGH = (b"SUBJECT: testing my smtp server\r\nFROM: nour@example.org\r\n\r\n"
                  b"Dear Nour, This is me testing my server\r\n")


def as_heard(lines):
    """A walk-through as a pattern: ports and ids are what they are."""
    text = re.escape("".join(line + "\n" for line in lines if line is not None))
    return text.replace("<port>", r"\d+").replace("<id>", r"\S+").replace(r"<hostname>", re.escape(HOSTNAME))


class Terminal:
    """A pseudo-terminal with a program at it, and somebody who types and reads."""

    def __init__(self, *command):
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.screen = ""

    def type(self, line):
        os.write(self._master, line.encode() + b"\r")       # what the Enter key sends

    def read_until(self, pattern):
        """Until the screen matches; `None` is until the program has left."""
        def seen():
            if pattern is not None and re.search(pattern, self.screen):
                return True
            if select.select([self._master], [], [], 0)[0]:
                try:
                    self.screen += os.read(self._master, 4096).decode().replace("\r\n", "\n")
                except OSError:     # nobody has the terminal's other side open any more
                    return pattern is None
            return False
        wait_for(seen, what=f"{pattern} on a screen")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def test_telnet_with_somebody_who_types(world):
    with Terminal(program("telnet"), "127.0.0.1", str(world.relay.port)) as terminal:
        terminal.read_until(r"\n220 .*\n")
        for typed, reply in WALK_THROUGH:
            terminal.type(typed)
            # The terminal echoes; a line of content has no other answer.
            terminal.read_until(as_heard([typed, reply]) + r"\Z" if typed != "QUIT" else None)
        dialogue = [line for turn in WALK_THROUGH for line in turn]
        assert re.search(r"\n220 .*\n" + as_heard(dialogue) + "Connection closed", terminal.screen), terminal.screen
    message, = world.exchanger.wait_for_messages(1)
    assert message.reverse_path.split()[0] == "<nour@example.org>"
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.raw) == WALKED_THROUGH


def test_session_piped_through_nc_ends_its_lines_with_lf(world):
    """printf 'HELO me.com\\n...' | nc: all at once, before the greeting, and then the end."""
    with socket.create_connection(("127.0.0.1", world.relay.port), 20) as nc:
        nc.sendall("".join(typed + "\n" for typed, _ in WALK_THROUGH).encode())
        nc.shutdown(socket.SHUT_WR)
        with nc.makefile("r", newline="\r\n") as replies:
            said = replies.read().replace("\r\n", "\n")
    assert re.fullmatch(r"220 .*\n" + as_heard(reply for _, reply in WALK_THROUGH), said), said
    message, = world.exchanger.wait_for_messages(1)
    assert without_received(message.raw) == WALKED_THROUGH


def test_smtp_source_sends_many_messages_in_several_sessions(world):
    def send(host, port, *options):
        finish(program("smtp-source"), "-l", 5000, "-N", "-M", "me.com", "-f", "nour@example.org",
               "-t", "friend@example.net", *options, f"{host}:{port}")

    def body(message):
        return message.data.partition(b"\r\n\r\n")[2]

    send(world.exchanger.host, world.exchanger.port)
    pattern = body(world.exchanger.messages.pop())      # as it is without a relay on the way
    send("127.0.0.1", world.relay.port, "-s", 10, "-m", 100)
    messages = world.exchanger.wait_for_messages(100, timeout=60)
    recipients = [recipient for message in messages for recipient in message.recipients]
    assert sorted(recipients) == sorted(f"<{i}friend@example.net>" for i in range(1, 101))
    assert {body(message) for message in messages} == {pattern}
    wait_for(lambda: not world.relay.queue(), what="an empty queue")


def test_smtplib_finds_the_extensions(world):
    with smtplib.SMTP("127.0.0.1", world.relay.port, "me.com", timeout=20) as client:
        code, text = client.ehlo()
        assert code == 250 and text.startswith(HOSTNAME.encode())
        assert client.esmtp_features == {"pipelining": "", "size": "52428800", "8bitmime": "",
                                         "enhancedstatuscodes": "", "help": ""}


def test_smtplib_is_told_which_recipient_is_refused(world):
    letter = email.message.EmailMessage()
    letter["Subject"] = "testing my smtp server"
    letter.set_content("Grüße\n", cte="8bit")
    with smtplib.SMTP("127.0.0.1", world.relay.port, "me.com", timeout=20) as client:
        refused = client.send_message(letter, "nour@example.org", ["friend@example.net", "nowhere"])
    assert refused == {"nowhere": (501, b"5.5.4 Syntax: RCPT TO:<address>")}
    message, = world.exchanger.wait_for_messages(1)
    assert message.recipients == ["<friend@example.net>"]
    assert without_received(message.data) == letter.as_bytes().replace(b"\n", b"\r\n")


@pytest.mark.parametrize("options, reply", [
    (["--mail-rcpt", "friend@example.net"], r"252 2\.0\.0 .*"),         # a VRFY
    (["--request", "NOOP"], r"250 2\.0\.0 Ok"),
    (["--request", "HELP"], r"214 .*"),
], ids=["VRFY", "NOOP", "HELP"])
def test_curl_asks(world, options, reply):
    said = finish(program("curl"), "--silent", "--show-error", "--verbose",
                  "--url", f"smtp://127.0.0.1:{world.relay.port}/me.com", *options)
    assert re.search(rf"^< {reply}\r?$", said, re.M), said
