"""What the sender is told when his mail cannot be delivered (RFC 3464), and when nobody is."""
import email
import email.policy
import email.utils
import os
import re
import signal
from types import SimpleNamespace

import pytest

from lab import HOSTNAME, wait_for

STRICT = email.policy.SMTP.clone(raise_on_defect=True)
SENDER = "nour@example.org"
REFUSED = "550 5.1.1 there is no such person here"


@pytest.fixture
def house(dns, exchangers, relay):
    """house("-r", "1"): a relay with these options; .net refuses all recipients in
    example.net, .org takes the reports for senders in example.org."""
    def make(*options):
        net, org = exchangers(2)
        net.set(replies={"RCPT": REFUSED})
        dns.mail("example.net", (10, net))
        dns.mail("example.org", (10, org))
        return SimpleNamespace(relay=relay(*options, mx_port=net.port), net=net, org=org, dns=dns)
    return make


def wait_until_empty(server):
    wait_for(lambda: not server.queue() and not server.tmp(), what="an empty spool")


class Report:
    """A report as a program reads it: what is malformed raises."""

    def __init__(self, message):
        assert message.reverse_path.split()[0] == "<>"      # RFC 5321 4.5.5
        self.recipients = message.recipients
        self.raw = message.data
        # RFC 5321 4.5.3.1.6, and nothing but ASCII
        assert all(len(line) <= 998 for line in self.raw.split(b"\r\n"))
        assert re.fullmatch(rb"([\t -~]*\r\n)*", self.raw)
        self.mail = email.message_from_bytes(self.raw, policy=STRICT)
        assert [part.defects for part in self.mail.walk()] == [[] for _ in self.mail.walk()]
        self.text, self.status, self.headers = self.mail.get_payload()
        self.of_message, *self.of_recipients = self.status.get_payload()


def report_of(world):
    """The one report that there is, and then nothing more."""
    world.org.wait_for_messages(1)
    wait_until_empty(world.relay)
    message, = world.org.messages
    return Report(message)


# ---- Its form ---------------------------------------------------------------------------------


def test_report(house):
    world = house()
    world.net.set(replies={("RCPT", "<b@example.net>"): REFUSED,
                           ("RCPT", "<c@example.net>"): "550-5.7.1 no\n550 5.7.1 never"})
    id = world.relay.send("a@example.net", "b@example.net", "c@example.net", "d@nowhere.invalid", sender=SENDER,
                          body="From: Nour <nour@example.org>\nSubject: testing\n my smtp server\n\nDear Nour\n")
    report = report_of(world)
    mail = report.mail
    assert report.recipients == [f"<{SENDER}>"]
    assert (mail.get_content_type(), mail.get_param("report-type")) == ("multipart/report", "delivery-status")
    assert [part.get_content_type() for part in mail.iter_parts()] == [
        "text/plain", "message/delivery-status", "text/rfc822-headers"]     # RFC 6522 3
    assert mail["To"].addresses[0].addr_spec == SENDER
    assert mail["From"].addresses[0].domain == HOSTNAME
    assert mail["Auto-Submitted"] == "auto-replied"                         # RFC 3834 5
    assert mail["MIME-Version"] == "1.0"
    assert mail["Date"].datetime.utcoffset().total_seconds() == 0
    assert re.fullmatch(rf"<\S+@{re.escape(HOSTNAME)}>", mail["Message-ID"])
    for field in ("To", "From", "Date", "Message-ID", "Subject", "Auto-Submitted", "MIME-Version", "Content-Type"):
        assert len(mail.get_all(field)) == 1
    # RFC 3464 2.2 and 2.3
    assert list(report.of_message) == ["Reporting-MTA", "Arrival-Date"]
    assert report.of_message["Reporting-MTA"] == f"dns; {HOSTNAME}"
    assert email.utils.parsedate_to_datetime(report.of_message["Arrival-Date"]).strftime("%Y%m%dT%H%M%S") == id[:15]
    fields = [dict(of_recipient) for of_recipient in report.of_recipients]
    for of_recipient in fields:
        assert email.utils.parsedate_to_datetime(of_recipient.pop("Last-Attempt-Date")).utcoffset() is not None
    assert fields == [
        {"Final-Recipient": "rfc822; b@example.net", "Action": "failed", "Status": "5.1.1",
         "Remote-MTA": f"dns; {world.net.name}", "Diagnostic-Code": f"smtp; {REFUSED}"},
        {"Final-Recipient": "rfc822; c@example.net", "Action": "failed", "Status": "5.7.1",
         "Remote-MTA": f"dns; {world.net.name}", "Diagnostic-Code": "smtp; 550 5.7.1 no 5.7.1 never"},
        {"Final-Recipient": "rfc822; d@nowhere.invalid", "Action": "failed", "Status": "5.1.2",
         "Diagnostic-Code": "x-relay; 5.1.2 there is no domain nowhere.invalid"}]
    # For people.
    text = report.text.get_content()
    for words in ("<b@example.net>", "<c@example.net>", "<d@nowhere.invalid>", world.net.name, world.net.host, REFUSED,
                  "550 5.7.1 no 5.7.1 never", "there is no domain nowhere.invalid"):
        assert words in text
    assert "a@example.net" not in text
    # The header alone, the trace of this relay on top of it.
    header = report.headers.get_content()
    assert header.startswith("Received: from me.com ") and f" id {id};" in header
    assert header.rstrip().endswith("\nFrom: Nour <nour@example.org>\r\nSubject: testing\r\n my smtp server")
    assert b"Dear Nour" not in report.raw


def test_report_goes_to_the_end_of_a_route(house):
    """RFC 5321 6.1: a route in the reverse-path is stripped."""
    world = house()
    world.net.set(replies={"RCPT": REFUSED})
    world.relay.send("b@example.net", sender=f"@a.example,@b.example:{SENDER}")
    assert report_of(world).recipients == [f"<{SENDER}>"]


def test_report_is_logged(house):
    world = house()
    id = world.relay.send("b@example.net", sender=SENDER)
    report, = world.relay.outcomes(SENDER)
    assert report.id != id and report.status == "sent"
    failed, = world.relay.outcomes("b@example.net")
    assert (failed.id, failed.relay, failed.status, failed.words) == (
        id, f"{world.net.name}[{world.net.host}]", "failed", REFUSED)
    assert int(failed.delay) < 60
    assert len(world.relay.logged(rf"{id} .*{SENDER}.* {report.id}$")) == 1


@pytest.mark.parametrize("address", ['"a>b c"@example.{}', r'"\"\\ "@example.{}', "a!#$%&'*+-/=?^_`{{|}}~@example.{}",
                                     "n" * 64 + "@" + ("d" * 60 + ".") * 2 + "example.{}"])
def test_unusual_addresses(house, address):
    world = house()
    sender, recipient = address.format("org"), address.format("net")
    world.dns.mail(sender.rpartition("@")[2], (10, world.org))
    world.dns.mail(recipient.rpartition("@")[2], (10, world.net))
    world.relay.send(recipient, sender=sender)
    report = report_of(world)
    assert report.recipients == [f"<{sender}>"]
    assert report.mail["To"].addresses[0].domain == sender.rpartition("@")[2]
    assert [of["Final-Recipient"] for of in report.of_recipients] == [f"rfc822; {recipient}"]


def test_exchanger_s_words_are_made_harmless(house):
    world = house()
    world.net.set(replies={"RCPT": b"550 5.1.1 caf\xe9\r bell\x07 and\0zero \x1b[31m\r\n"})
    world.relay.send("b@example.net", sender=SENDER)
    of_recipient, = report_of(world).of_recipients
    assert of_recipient["Status"] == "5.1.1"
    assert re.fullmatch(r"smtp; 550 5\.1\.1 caf\?+ bell\? and\?zero \?\[31m", of_recipient["Diagnostic-Code"])


def test_exchanger_of_many_words(house):
    world = house()
    world.net.set(replies={"RCPT": "\n".join(["550-5.1.1 " + "word " * 90] * 20 + ["550 5.1.1 end"])})
    world.relay.send("b@example.net", sender=SENDER)
    of_recipient, = report_of(world).of_recipients
    assert of_recipient["Status"] == "5.1.1"
    assert of_recipient["Diagnostic-Code"].startswith("smtp; 550 5.1.1 word word ")


@pytest.mark.parametrize("header, shown", [
    (b"Subject: caf\xe9 \x80\xff\r\n", b"Subject: caf? ??\r\n"),
    (b"Subject: a\0b\x07c\x1b[31md\x7f\r\n", b"Subject: a?b?c?[31md?\r\n"),
    (b"Subject: a\r\n\tfolded\r\n line\r\n", b"Subject: a\r\n\tfolded\r\n line\r\n"),
    (b"Subject: x\r\n..\r\n", b"Subject: x\r\n..\r\n"),
    (b"Subject: " + b"x" * 900 + b"\r\n", b"Subject: " + b"x" * 900 + b"\r\n"),
    (b"Subject: " + b"x" * 5000 + b"\r\nTo: b\r\n", b"\r\nTo: b\r\n"),
    (b"Subject: " + b"x" * 100000 + b"\r\n", b""),
    (b"X: y\r\n" * 20000, b"X: y\r\n" * 1000),
    (b"--=_boundary\r\nContent-Type: text/plain\r\n", b"--=_boundary\r\nContent-Type: text/plain\r\n"),
    (b"no header at all\r\n", b""),
], ids=["8 bit", "control", "folded", "dots", "long", "longer", "endless line", "many", "boundary", "no header"])
def test_header_is_bounded_and_harmless(house, header, shown):
    world = house()
    with world.relay.client() as client:
        client.deliver(SENDER, ["b@example.net"], header + b"\r\nDear Nour\r\n")
    report = report_of(world)
    assert shown in report.raw
    assert len(report.raw) < 65536
    assert b"Dear Nour" not in report.raw
    assert len(report.of_recipients) == 1


# ---- How many, and to whom ----------------------------------------------------------------------


def test_one_report_names_all_that_failed_in_a_try(house):
    world = house()
    recipients = [f"b{n}@example.net" for n in range(250)]
    world.relay.send(*recipients, sender=SENDER)
    report = report_of(world)
    assert [of["Final-Recipient"] for of in report.of_recipients] == [f"rfc822; {to}" for to in recipients]
    assert all(f"<{to}>" in report.text.get_content() for to in recipients)


def test_one_report_for_each_try(house):
    world = house()
    world.net.set(replies={("RCPT", "<a@example.net>"): REFUSED,
                           ("RCPT", "<b@example.net>"): ["451 4.7.1 later", REFUSED]})
    world.relay.send("a@example.net", "b@example.net", sender=SENDER)
    world.org.wait_for_messages(1)
    world.relay.hangup_until(lambda: len(world.org.messages) == 2)
    wait_until_empty(world.relay)
    assert [[of["Final-Recipient"] for of in Report(message).of_recipients] for message in world.org.messages] == [
        ["rfc822; a@example.net"], ["rfc822; b@example.net"]]


def test_report_waits_in_the_queue_like_other_mail(house):
    world = house()
    world.org.stop()
    id = world.relay.send("b@example.net", sender=SENDER)
    world.relay.outcomes(SENDER)
    path, = world.relay.queue()
    assert path.name != id
    assert path.read_bytes().startswith(f"HELO {HOSTNAME}\r\nMAIL FROM:<>\r\nRCPT TO:<{SENDER}>\r\nDATA\r\n".encode())
    assert path.read_bytes().count(b"\r\n.\r\n") == 1
    world.org.start()
    world.relay.hangup_until(lambda: world.org.messages)
    report_of(world)


@pytest.mark.parametrize("sender", ["", SENDER], ids=["mail from nobody", "report"])
def test_never_a_report_on_a_report(house, sender):
    """RFC 5321 6.1: what came from <> and fails is dropped, and the log says so."""
    world = house()
    world.org.set(replies={"RCPT": "550 5.1.1 who is Nour?"})
    world.relay.send("b@example.net", sender=sender)
    last = world.relay.outcomes(sender or "b@example.net")[0]
    assert last.status == "failed"
    wait_until_empty(world.relay)
    world.relay.wait_for_log(rf"^{last.id} came from <>: its failures are reported to nobody$")
    assert len(world.org.connections) == (1 if sender else 0)
    assert world.org.messages == world.net.messages == []


# ---- Statuses (RFC 3463, RFC 7505 5) ---------------------------------------------------------------


def say(reply):
    return lambda world: world.net.set(replies={"RCPT": reply})


def take_no_mail(world):
    world.dns.null_mx("example.net")


def have_no_address(world):
    world.dns.mx("example.net", (10, "mx.invalid"))


def lead_here(world):
    world.dns.mx("example.net", (10, "here.example.net"))
    world.dns.a("here.example.net", "0.0.0.0")


def be_no_domain(world):
    world.dns.rcode("example.net", 3)


def take_ascii(world):
    world.net.set(replies={}, extensions=("PIPELINING",))


def take_little(world):
    world.net.set(replies={}, extensions=("SIZE 20",))


@pytest.mark.parametrize("world_is, status, diagnostic", [
    (say("550 5.2.1 closed"), "5.2.1", "smtp; 550 5.2.1 closed"),
    (say("550 no such user"), "5.0.0", "smtp; 550 no such user"),
    (say("550"), "5.0.0", "smtp; 550"),
    (say("553 4.2.0.1 odd"), "5.0.0", "smtp; 553 4.2.0.1 odd"),
    (be_no_domain, "5.1.2", "x-relay; 5.1.2 "),
    (take_no_mail, "5.1.10", "x-relay; 5.1.10 "),
    (have_no_address, "5.4.4", "x-relay; 5.4.4 "),
    (lead_here, "5.4.4", "x-relay; 5.4.4 "),
    (take_ascii, "5.6.3", "x-relay; 5.6.3 "),
    (take_little, "5.3.4", "x-relay; 5.3.4 "),
], ids=["5.2.1", "none", "code alone", "not quite", "NXDOMAIN", "null MX", "no address",
        "no usable address", "8BITMIME", "SIZE"])
def test_status(house, world_is, status, diagnostic):
    world = house()
    world_is(world)
    world.relay.send("b@example.net", sender=SENDER, body="Subject: x\n\nDear Nour \N{WHITE SMILING FACE}\n")
    of_recipient, = report_of(world).of_recipients
    assert of_recipient["Status"] == status
    assert of_recipient["Diagnostic-Code"].startswith(diagnostic.rstrip())
    assert ("Remote-MTA" in of_recipient) == bool(world.net.connections)
    assert world.net.messages == []


# ---- Durable before the failure is recorded ------------------------------------------------------------


@pytest.mark.parametrize("others", [[], ["later@example.net"]], ids=["the last recipient", "one of two"])
def test_report_is_durable_before_the_failure_is_recorded(house, strace, others):
    world = house()
    world.net.set(replies={("RCPT", "<later@example.net>"): "451 4.7.1 later", ("RCPT", "<b@example.net>"): REFUSED})
    world.org.set(stall_at="CONNECT")
    with strace(world.relay.pid, "trace=fsync,/^rename,write,/^unlink") as trace:
        id = world.relay.send("b@example.net", *others, sender=SENDER)
        report = world.relay.wait_for_log(rf"^{id} failures are reported to=<{SENDER}> by (\S+)$")[1]
        wait_for(lambda: world.org.connections)
        seen = trace()
    recorded = (rf'write\(\d+<[^>]*/queue/{id}>, "[^"]* failed <b@example\.net> ' if others
                else rf'unlink\w*\(.*"queue/{id}"')
    steps = [rf"fsync\(\d+<[^>]*/tmp/{report}>\) += 0$", rf'rename\w*\(.*"queue/{report}".*\) += 0$',
             r"fsync\(\d+<[^>]*/queue>\) += 0$", recorded]
    at = [match.start() for step in steps for match in list(re.finditer(step, seen, re.MULTILINE))[-1:]]
    assert len(at) == len(steps) and at == sorted(at), seen


@pytest.mark.parametrize("fault", [
    "/^open(at)?$:error=ENOSPC:when=5+",      # behind queue/, and /dev/urandom for each of three queries
    "fsync:error=EIO:when=3", "/^rename:error=ENOSPC:when=2", "fsync:error=EIO:when=4",
    "fsync:signal=KILL:when=3"])
def test_failure_that_cannot_be_reported_is_not_recorded(house, strace, fault):
    """The message waits for its next try, and then there is one report."""
    world = house("-r", "200")
    with world.relay.client() as client:
        for command in ("HELO me.com", f"MAIL FROM:<{SENDER}>", "RCPT TO:<b@example.net>", "DATA"):
            client.say(command)
        with strace(world.relay.pid, "inject=" + fault) as trace:
            client.send(b"Subject: x\r\n.\r\n")
            id = client.reply().rpartition(" ")[2]
            wait_for(lambda: "INJECTED" in trace() or "killed by SIGKILL" in trace())
            world.relay.wait_for_log("died of signal 9" if "KILL" in fault else f"{id} failures cannot be reported now")
    path, = world.relay.queue()
    assert path.name == id
    assert path.read_bytes().endswith(b"\r\n.\r\n")
    assert path.stat().st_mtime - path.stat().st_ctime > 100        # due much later than now
    for left in world.relay.tmp() if "KILL" in fault else []:
        left.unlink()
    world.relay.hangup_until(lambda: world.org.messages)
    report_of(world)
    assert len(world.net.connections) == 2


@pytest.mark.skipif("SANITIZED" in os.environ, reason="a traced process cannot look for leaks when it ends")
def test_report_is_made_once_though_the_relay_ends(house, strace):
    """What would end its forwarder politely waits until the failure is recorded, too."""
    world = house()
    with strace(world.relay.pid, "inject=fsync:delay_exit=400000"):
        world.relay.send("b@example.net", sender=SENDER)
        wait_for(lambda: any("-0-" in path.name for path in world.relay.queue()), what="the report")
        os.killpg(world.relay.pid, signal.SIGTERM)
        world.relay.process.wait(20)
        world.relay.wait_for_log("status=failed")       # by who is left
    world.relay.stop()
    world.relay.start()
    world.relay.hangup_until(lambda: world.org.messages)
    report_of(world)
    assert len(world.net.connections) == 1


def test_report_of_what_failed_before_a_kill(house):
    """Killed while the report is on its way, which was durable: it arrives, and once."""
    world = house()
    world.org.set(stall_at=".")
    world.relay.send("b@example.net", sender=SENDER)
    wait_for(lambda: any("." in connection.commands for connection in world.org.connections))
    world.relay.kill()
    world.org.set(stall_at=None)
    world.relay.start()
    world.relay.hangup_until(lambda: world.org.messages)
    report_of(world)
    assert len(world.net.connections) == 1
