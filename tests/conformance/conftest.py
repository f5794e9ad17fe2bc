"""What the conformance tests are given, and what becomes of their results.

    --server host:port  the server under test; without it: this project's, in the lab
    --from address      for MAIL FROM; without it: the null reverse-path
    --to address        where mail may be sent; without it: nowhere
    --sink host:port    where the suite listens as the exchanger that mail for --to is
                        relayed to, so that it sees what arrives
    --stranger address  an address of this machine that the server refuses
    --patience seconds  how long to be silent for the time-outs; without it: not at all
    --report directory  where to write report.txt, report.json and report.html
"""
import re
from pathlib import Path
from types import SimpleNamespace

import lab
import pytest
import report
from dialogue import Target


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    for option, text in re.findall(r"^    --(\w+) \S+ +(.*(?:\n {8}.*)*)", __doc__, re.M):
        group.addoption("--" + option, default="", help=" ".join(text.split()))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.requirement = report.Requirement.of(item)
            item.add_marker(pytest.mark.section(item.requirement.rfc, item.requirement.section))


# ---- The server ------------------------------------------------------------------------


def option(config, name):
    return config.getoption("--" + name, default="")      # unknown where other tests run, too


def endpoint(text):
    host, port = re.fullmatch(r"(.*?)(?::(\d+))?", text).groups()
    return host.strip("[]"), int(port or 25)


@pytest.fixture(scope="session")
def target(request, tmp_path_factory):
    config = request.config
    patience = float(option(config, "patience") or 0)
    if hasattr(config, "target"):               # whoever runs the suite brings one
        yield config.target
    elif option(config, "server"):
        sink = lab.Exchanger(*endpoint(option(config, "sink"))) if option(config, "sink") else None
        yield Target(*endpoint(option(config, "server")), option(config, "from"), option(config, "to") or None,
                     sink, patience, stranger=option(config, "stranger") or None)
        if sink:
            sink.stop()
    else:
        yield from this_server(tmp_path_factory.mktemp("conformance"), patience)


def this_server(directory, patience):
    """The program in the lab, with a limit to the size of a message that can be tried."""
    dns, (exchanger,) = lab.Nameserver(), lab.exchangers(1)
    dns.mail("example.net", (10, exchanger))
    relay = lab.Relay("-m", 200_000, spool=directory / "spool", dns=dns, mx_port=exchanger.port)
    yield Target("127.0.0.1", relay.port, "nour@example.org", "friend@example.net", exchanger, patience)
    relay.stop()
    exchanger.stop()
    dns.stop()


@pytest.fixture
def stranger(target):
    """A session before EHLO."""
    return target.connect().welcomed()


@pytest.fixture
def session(target):
    """A session after EHLO."""
    return target.session()


@pytest.fixture
def extended(session):
    """A session after EHLO, and not the HELO that had to do instead."""
    if not session.extended:
        pytest.skip("EHLO is refused")
    return session


@pytest.fixture
def nameless(extended, stranger):
    """A session before EHLO, with a server that has it."""
    extended.close()
    return stranger


@pytest.fixture
def transaction(session):
    """A session with a transaction begun: it has a sender and a recipient."""
    return session.begin()


TOUR = ["EHLO client.example", "NOOP", "HELP", "VRFY postmaster", "EXPN postmaster", "MAIL FROM:<", "XYZZY"]


@pytest.fixture(scope="session")
def tours():
    return []


@pytest.fixture
def tour(target, tours):
    """What a session says to a little of everything, by command; heard once for all."""
    if not tours:
        session = target.connect().welcomed()
        replies = {"": session.greeting, **{command: session.say(command) for command in TOUR}}
        tours.append(SimpleNamespace(replies=replies, raw=session.raw, transcript=session.transcript))
        target.hang_up()
    target.sessions.append(SimpleNamespace(transcript=tours[0].transcript, close=lambda: None))
    return tours[0]


# ---- The results -----------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Every test has one result, from the phase that decides it.  A SHOULD that fails is
    reported, and fails the run no more than an expected failure does."""
    outcome = (yield).get_result()
    if not hasattr(item, "requirement") or outcome.when == "teardown" or (outcome.when == "setup" and outcome.passed):
        return
    target = item.funcargs.get("target")
    transcript = target.hang_up() if target else ""
    result = report.Result.of(item.requirement, outcome, call.excinfo, transcript)
    item.config.results = getattr(item.config, "results", [])
    item.config.results.append(result)
    outcome.sections.append(("The dialogue", transcript))
    if outcome.failed and item.requirement.level == "SHOULD":
        outcome.outcome, outcome.wasxfail = "skipped", f"SHOULD: {result.reason}"


def pytest_terminal_summary(terminalreporter, config):
    directory, results = option(config, "report"), getattr(config, "results", [])
    if directory and results:
        server = option(config, "server") or "this server, in the lab"
        terminalreporter.write(report.write(Path(directory), server, results))
