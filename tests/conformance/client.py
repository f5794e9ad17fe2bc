"""Runs a client once for each way in which a server may be unusual, and judges it by client_rules.

The client is a command of the shell, in which {host}, {port}, {sender}, {recipient} and {message} (a file,
which is also its standard input) are replaced; or a function that takes them.
"""
import inspect
import os
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import client_rules
import report
from dialogue import Unasked, verdict
from sink import wait_for
from unusual import PAUSE, WAYS, Unusual

MESSAGE = b"From: {sender}\r\nTo: {recipient}\r\nDate: Tue, 24 Nov 2026 06:00:00 +0000\r\nSubject: a test\r\n\r\n"
RECIPIENT = "friend@example.net"
QUIET = 1.0         # seconds without a connection, after which a client that has ended makes no more


def requirements():
    """All rules, by number: {id: level}."""
    return {report.Requirement.named(rule.__name__)[2]: level for rule, level in client_rules.LEVELS.items()}


def run_once(command, server, way, directory, timeout):
    """Runs the client with the server that is unusual in this way.  Returns what was heard."""
    sender = f"nour-{way}@example.org"
    header = MESSAGE.replace(b"{sender}", sender.encode()).replace(b"{recipient}", RECIPIENT.encode())
    message = Path(directory, f"{way}.eml")
    message.write_bytes((header + client_rules.BODY).replace(b"\r\n", b"\n"))
    server.way, server.heard = WAYS[way], []
    words = {"host": server.host, "port": server.port, "sender": sender, "recipient": RECIPIENT, "message": message}
    if callable(command):
        command(**words)
    else:
        call(command, words, message, timeout)
    # What the client hands to a daemon is sent on by that.
    wait_for(lambda: server.heard, timeout)
    count, since = 0, time.monotonic()
    while time.monotonic() - since < QUIET or not all(each.over for each in server.heard):
        if len(server.heard) != count:
            count, since = len(server.heard), time.monotonic()
        time.sleep(PAUSE / 4)
        if time.monotonic() - since > timeout:
            break
    # A daemon may try an earlier message once more.
    return [each for each in server.heard if not each.said("MAIL") or sender in each.said("MAIL")]


def call(command, words, message, timeout):
    """Runs a command of the shell; kills it if it takes too long."""
    for name, value in words.items():
        command = command.replace("{" + name + "}", shlex.quote(str(value)))
    with open(message, "rb") as stdin:
        process = subprocess.Popen(command, shell=True, stdin=stdin, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(command, listen, seconds=3, timeout=60, only=None, tell=lambda text: None):
    """Judges a client; returns the results."""
    rules = [(rule, level) for rule, level in client_rules.LEVELS.items() if requirement_of(rule, level).among(only)]
    wanted = {way for rule, _ in rules for way in ways_of(rule)}
    heard = {way: [] for way in WAYS}
    server = Unusual(*listen, seconds)
    try:
        with tempfile.TemporaryDirectory() as directory:
            for way in filter(wanted.__contains__, WAYS):
                tell(f"{way}: {WAYS[way].what}")
                heard[way] = run_once(command, server, way, directory, timeout)
                if not any(heard.values()):
                    raise Unasked(f"the client has made no connection within {timeout:g} seconds")
    finally:
        server.stop()
    return [judge(rule, level, heard) for rule, level in rules]


def requirement_of(rule, level):
    *where, title = report.Requirement.named(rule.__name__)
    return report.Requirement(*where, level, title, " ".join(inspect.getdoc(rule).split()))


def ways_of(rule):
    """The ways in which a rule needs the server to be unusual: those that it names, or all."""
    source = inspect.getsource(rule)
    return list(WAYS) if "every(" in source else [way for way in WAYS if f'"{way}"' in source]


def judge(rule, level, heard):
    error = None
    try:
        rule(heard)
    except BaseException as found:      # pytest's skip is no Exception
        if isinstance(found, KeyboardInterrupt):
            raise
        error = found
    found, reason = verdict(error)
    shown = ways_of(rule)
    transcript = "\n".join(line for way in shown for each in heard[way]
                           for line in ["", f"With {WAYS[way].what}:", *each.transcript[:60]]).strip()
    return report.Result(requirement_of(rule, level), found, reason, transcript)
