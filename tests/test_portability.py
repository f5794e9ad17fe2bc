"""What must not depend on where it runs: the locale, the time zone, the century, and the
width of a number."""
import os
import re
import subprocess
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from lab import run, wait_for

FUTURE = datetime(2040, 2, 29, 12, 30, 15, tzinfo=timezone.utc)    # behind the end of a signed 32-bit time_t


def put(server, id, lines, size=0):
    """Puts a message into the queue of a server that is stopped; with `size`, its text
    is a hole of so many octets.  Returns its path."""
    path = server.spool / "queue" / id
    with path.open("wb") as file:
        file.write("".join(line + "\r\n" for line in lines).encode())
        file.seek(size, os.SEEK_CUR)
        file.write(b"\r\n.\r\n")
    owner = server.spool.stat()
    os.chown(path, owner.st_uid, owner.st_gid)
    return path


def envelope(*recipients):
    return ["HELO me.com", "MAIL FROM:<a@example.org>", *(f"RCPT TO:<{to}>" for to in recipients), "DATA"]


# ---- Where and when ---------------------------------------------------------------------------


@pytest.fixture(params=[("C", "UTC"), ("tr_TR.UTF-8", "Asia/Kathmandu"), ("ja_JP.SJIS", "<-12>12:34")])
def elsewhere(request, monkeypatch):
    """Turkish has an i without its dot, Japanese octets that look like a backslash;
    Kathmandu is 5:45 ahead."""
    locale, zone = request.param
    for name, value in ("LC_ALL", locale), ("LANG", locale), ("TZ", zone):
        monkeypatch.setenv(name, value)


def is_now(date):
    return abs(datetime.now(timezone.utc) - date) < timedelta(minutes=5)


def test_dates_are_the_same_everywhere(elsewhere, world):
    """In the trace, the id, the record and the report."""
    world.exchanger.set(replies={("RCPT", "<later@example.net>"): "451 4.7.1 later",
                                 ("RCPT", "<never@example.net>"): "550 5.1.1 no"})
    id = world.relay.send("b@example.net", "later@example.net", sender="")
    world.exchanger.wait_for_messages(1)
    world.relay.outcomes("later@example.net")
    trace = re.search(rb"Received: [^;]*;\s*(.*?)\r\n(?!\s)", world.exchanger.messages[0].raw, re.DOTALL)[1].decode()
    assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000", trace)
    assert parsedate_to_datetime(trace).strftime("%a, %d %b %Y %H:%M:%S +0000") == trace
    assert is_now(parsedate_to_datetime(trace))
    assert is_now(datetime.strptime(id[:15] + "+0000", "%Y%m%dT%H%M%S%z"))
    record = re.search(rb"^(\S+) later ", world.relay.queue()[0].read_bytes(), re.MULTILINE)[1].decode()
    assert is_now(datetime.strptime(record, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc))
    world.relay.send("never@example.net", sender="a@example.net")
    report = world.exchanger.wait_for_messages(2)[1].data.decode()
    for name in "Date", "Arrival-Date", "Last-Attempt-Date":
        assert is_now(parsedate_to_datetime(re.search(rf"^{name}: (.*? \+0000)\r$", report, re.MULTILINE)[1]))


def test_letters_are_the_same_everywhere(elsewhere, world, relay, tmp_path):
    """Commands, parameters and domains, in either case; and an i is an i."""
    world.dns.mail("INSIDE.example", (10, world.exchanger))
    server = relay("-d", "inside.example", mx_port=world.exchanger.port, spool=tmp_path / "other")
    with server.client() as client:
        for command in ["ehlo I.example", "mail from:<i@I.example> size=9 body=8bitmime", "rcpt to:<I@INSIDE.EXAMPLE>",
                        "RCPT TO:<i@inside.example>", "rcpt to:<postmaster>", "rset", "noop", "vrfy i@i.example"]:
            assert client.say(command)[0] == "2"
        assert client.say("quıt").startswith("500 ")
        client.say("mail from:<i@I.example>")
        client.say("rcpt to:<I@INSIDE.EXAMPLE>")
        client.say("RCPT TO:<i@inside.example>")
        client.say("data")
        assert client.say("received: x\r\n\r\nx\r\n.").startswith("250 ")
    message, = world.exchanger.wait_for_messages(1)     # one domain, so one transaction
    assert message.recipients == ["<I@INSIDE.EXAMPLE>", "<i@inside.example>"]


# ---- After 2038 -------------------------------------------------------------------------------


def test_a_file_from_after_2038_is_seen_and_delivered(world):
    """It is further away than any wait: the clock was wrong, so it is due."""
    server = world.relay
    server.stop()
    path = put(server, f"{FUTURE:%Y%m%dT%H%M%S}.000000-1-1", [*envelope("b@example.net"), "Subject: x", "", "x"])
    os.utime(path, (FUTURE.timestamp(), FUTURE.timestamp()))
    if path.stat().st_mtime != FUTURE.timestamp():
        pytest.skip("this file system ends before 2040")
    listed = run("-l", "-q", server.spool).stdout
    days = (FUTURE - datetime.now(timezone.utc)).days
    assert path.name in listed and int(re.search(r"next try in (\d+)d", listed)[1]) in (days, days - 1)
    server.start()
    world.exchanger.wait_for_messages(1)


def test_a_clock_after_2038(world, relay, tmp_path, wrapped):
    """Ids, the trace and due times go on."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    binary = wrapped(f"export LD_PRELOAD={library} FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME='@{FUTURE:%Y-%m-%d %H:%M:%S}'")
    said = subprocess.run([binary, "-V"], capture_output=True, text=True)
    if said.returncode != 0 or said.stderr:
        pytest.skip("libfaketime is a library for other programs than this one")
    world.exchanger.set(replies={("RCPT", "<later@example.net>"): "451 4.7.1 later"})
    server = relay("-r", 1000, binary=binary, mx_port=world.exchanger.port, spool=tmp_path / "other")
    # Files are stamped by another clock than the program's, for which every draft is stale: so the manager must
    # have looked for such, which it does before it looks into the queue, when there is none yet.
    server.stop()
    junk = put(server, "20261123T110819.123456-54321-1f3a", ["nothing of a message"])
    server.start()
    server.wait_for_log(f"^queue/{junk.name} is no whole message")
    junk.unlink()
    id = server.send("b@example.net", "later@example.net")
    if not id.startswith("2040"):
        pytest.skip("libfaketime does not reach a static program")
    message, = world.exchanger.wait_for_messages(1)
    assert re.search(rb"Wed, 29 Feb 2040 \d\d:\d\d:\d\d \+0000\r\n", message.raw)
    assert server.outcomes("later@example.net")[0].status == "later"
    path, = server.queue()
    assert b"\r\n2040-02-29T" in path.read_bytes()
    wait_for(lambda: path.stat().st_mtime >= FUTURE.timestamp() + 1000, what="the next try put off")
    assert path.stat().st_mtime < FUTURE.timestamp() + 86400


# ---- Large files ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2 ** 31, 5 * 2 ** 30], ids=["2G", "5G"])
def test_a_message_that_a_32_bit_offset_cannot_hold(relay, size):
    """Its end is found, and its size is told."""
    server = relay()
    server.stop()
    try:
        path = put(server, "20261123T110819.123456-54321-1f3a", envelope("b@example.net"), size)
    except OSError as error:
        pytest.skip(f"no file so large here: {error}")
    listed = run("-l", "-q", server.spool)
    assert listed.returncode == 0
    assert f"{path.name}  {size + 2} octets" in listed.stdout and "<b@example.net>" in listed.stdout
