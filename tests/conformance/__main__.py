"""Asks a mail server for what the RFCs require of it."""
import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

SUITE = Path(__file__).resolve().parent
sys.path.insert(0, str(SUITE))
try:
    import pytest       # noqa: F401    what the tests are run by
except ImportError:
    sys.exit("the suite needs pytest: python3 -m pip install pytest, or apt-get install python3-pytest")

import client       # noqa: E402
import report       # noqa: E402
import suite        # noqa: E402
from dialogue import Target     # noqa: E402
from dialogue import Unasked    # noqa: E402
from sink import Sink       # noqa: E402

CONFORMS, FAILS, USAGE, INCOMPLETE, BROKEN = range(5)
EXIT_STATUS = """\
exit status:
  0   no MUST has failed (with --strict: nor has a SHOULD), but for known departures
  1   a requirement has failed
  2   wrong options
  3   incomplete: nothing has failed, but the server could not be asked for everything
  4   the suite itself has failed, or was interrupted
"""


def endpoint(text):
    """host:port; the port is 25 where there is none."""
    host, port = re.fullmatch(r"(\[.*\]|[^:]*)(?::(\d+))?|(.*)", text).groups()[:2]
    if not host or int(port or 25) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port or 25)


def numbers():
    """Of all requirements, of servers and of clients."""
    return {**suite.requirements(), **client.requirements()}


def selection(text):
    """Sections, RFCs and numbers of requirements."""
    words = [word[2:] if word.upper().startswith("R-") else word for word in re.split(r"[,\s]+", text.strip(", "))]
    for word in words:
        if not any(report.matches(number, word) for number in numbers()):
            raise argparse.ArgumentTypeError(f"no requirement is called {word!r}, nor begins so")
    return words


def known(path):
    """A file of departures that are known: {number: reason}."""
    found = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}")
    for count, line in enumerate(lines, 1):
        number, _, reason = line.strip().partition(" ")
        if number and not number.startswith("#"):
            if number not in numbers():
                raise argparse.ArgumentTypeError(f"{path}, line {count}: no requirement is called {number!r}")
            if not reason.strip():
                raise argparse.ArgumentTypeError(f"{path}, line {count}: {number} needs a reason behind it")
            found[number] = reason.strip()
    return found


def options():
    parser = argparse.ArgumentParser(
        prog="python3 tests/conformance", description=__doc__, epilog=EXIT_STATUS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--server", metavar="HOST:PORT", type=endpoint,
        help="the server under test; without it: this repository's, which has to be built, on this machine alone")
    add("--client", metavar="COMMAND",
        help="judge a client instead: a command of the shell that sends a message, run about 15 times; {host}, {port}, "
             "{sender}, {recipient} and {message}, a file that is also its standard input, are replaced in it")
    add("--listen", metavar="HOST:PORT", type=endpoint, default=("127.0.0.1", 0),
        help="where the suite listens for the client (127.0.0.1 and any port)")
    add("--from", dest="sender", metavar="ADDRESS", default="", help="for MAIL FROM; without it: the null reverse-path")
    add("--to", dest="recipient", metavar="ADDRESS", help="where mail may be sent; without it: nowhere")
    add("--sink", metavar="HOST:PORT", type=endpoint,
        help="where the suite listens as the exchanger that mail for --to is relayed to, so that it sees what arrives")
    add("--stranger", metavar="ADDRESS", help="an address of this machine that the server refuses")
    add("--patience", metavar="SECONDS", type=float, default=0,
        help="how long to be silent to see whether the server waits: 300 for what the RFC asks; without it: not at all")
    add("--tls", action="store_true", help="connections begin with a TLS handshake, as on port 465")
    add("--user", metavar="NAME", help="log in where the server takes no mail without, inside TLS if it offers that")
    add("--password", metavar="WORD", default="", help="with this password")
    add("--start-timeout", metavar="SECONDS", type=float, default=0,
        help="how long to wait for the server to listen (0): for one that has just been started")
    add("--reply-timeout", metavar="SECONDS", type=float,
        help="how long to wait for a reply; without it: as long as RFC 5321 4.5.3.2 says, 2 to 10 minutes")
    add("--delivery-timeout", metavar="SECONDS", type=float, default=300,
        help="how long to wait for a message at --sink (300)")
    add("--only", metavar="NUMBERS", type=selection,
        help="ask only for these: sections, RFCs, requirements, with commas between them (4.1.1,R-2920,R-4.5.1-e)")
    add("--strict", action="store_true", help="a SHOULD counts as a MUST")
    add("--known", metavar="FILE", type=known, default={},
        help="departures that are known and do not count: a number and a reason on each line")
    add("--report", metavar="DIRECTORY", type=Path,
        help="where to write report.txt, report.json, report.html and report.xml (JUnit)")
    return parser


def tell(text):
    print(f"\n{text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def server(arguments):
    """The Target that the options tell of."""
    waits = {"patience": arguments.patience, "reply_timeout": arguments.reply_timeout,
             "delivery_timeout": arguments.delivery_timeout, "start_timeout": arguments.start_timeout, "tell": tell}
    if arguments.server is None:
        with this_server(waits) as target:
            yield target
        return
    sink = Sink(*arguments.sink) if arguments.sink else None
    try:
        yield Target(*arguments.server, arguments.sender, arguments.recipient, sink, stranger=arguments.stranger,
                     tls=arguments.tls, user=arguments.user, password=arguments.password, **waits)
    finally:
        if sink:
            sink.stop()


@contextlib.contextmanager
def this_server(waits):
    """This repository's program, with a limit to the size of a message that can be tried."""
    sys.path.insert(0, str(SUITE.parent))
    import lab
    with tempfile.TemporaryDirectory() as directory:
        dns, sink = lab.Nameserver(), Sink(lab.loopback())
        dns.mx("example.net", (10, "mx.example.net"))
        dns.a("mx.example.net", sink.host)
        relay = lab.Relay("-m", 200_000, spool=Path(directory, "spool"), dns=dns, mx_port=sink.port)
        try:
            yield Target("127.0.0.1", relay.port, "nour@example.org", "friend@example.net", sink, **waits)
        finally:
            relay.stop()
            sink.stop()
            dns.stop()


def main(*words):
    parser = options()
    arguments = parser.parse_args(words or None)
    if arguments.client:
        return judge_client(arguments)
    if arguments.server is None and not (SUITE.parent / "lab.py").exists():
        parser.error("--server is needed: which server is to be asked?")
    name = "{}:{}".format(*arguments.server) if arguments.server else "this server, in the lab"
    try:
        with server(arguments) as target:
            target.socket().close()
            results, went_well, _ = suite.run(target, arguments.only)
    except (Unasked, OSError) as error:
        print(error, file=sys.stderr)
        return INCOMPLETE
    return finish(arguments, name, results, went_well)


def judge_client(arguments):
    try:
        results = client.run(arguments.client, arguments.listen, timeout=min(arguments.delivery_timeout, 60),
                             only=arguments.only, tell=tell)
    except (Unasked, OSError) as error:
        print(error, file=sys.stderr)
        return INCOMPLETE
    return finish(arguments, arguments.client, results)


def finish(arguments, name, results, went_well=True):
    """Tells and writes the results; returns the exit status."""
    outcome = report.Outcome(name, results, arguments.known, arguments.strict)
    print("\n" + report.as_text(outcome), end="")
    if arguments.report:
        report.write(arguments.report, outcome)
        print(f"\nThe report is in {arguments.report}: report.txt, report.json, report.html, report.xml")
    if not went_well:
        return BROKEN
    return FAILS if outcome.counting else INCOMPLETE if outcome.of("error") else CONFORMS


if __name__ == "__main__":
    sys.exit(main())
