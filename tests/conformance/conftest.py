"""What the conformance tests are given, and what becomes of their results.

suite.py runs them, and leaves a Target in config.target and the requirements that are
asked for in config.only; what they find is left in config.results.
"""
from pathlib import Path
from types import SimpleNamespace

import pytest
import report
from dialogue import Dismissed, Unasked, verdict


def pytest_configure(config):
    config.addinivalue_line("markers", "must: the RFC says MUST, MUST NOT or SHALL, or its grammar does")
    config.addinivalue_line("markers", "should: the RFC says SHOULD or SHOULD NOT")


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        item.requirement = report.Requirement.of(item)
    unwanted = [item for item in ours if not item.requirement.among(getattr(config, "only", None))]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


# ---- The server ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def target(request):
    if not hasattr(request.config, "target"):
        pytest.exit("these tests ask a server: python3 tests/conformance --help", 2)
    return request.config.target


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


class Replies(dict):
    """Replies by command."""

    def __missing__(self, command):
        raise Unasked(f"the server ended the session in place of the reply to {command}")


class Tour:
    """What a server says to a little of everything.  A server may count errors, and defend
    itself (RFC 5321 7.8): so each command that may be one has a session of its own."""

    COMMANDS = "NOOP", "HELP", "VRFY postmaster", "EXPN postmaster", "MAIL FROM:<", "XYZZY"

    def __init__(self, target):
        self.replies, self.raw, self.transcript, self.ended = Replies(), b"", [], None
        for command in self.COMMANDS:
            session = target.connect().welcomed()
            self.replies[""] = session.greeting
            try:
                self.replies["EHLO client.example"] = session.say("EHLO client.example")
                self.replies[command] = session.say(command)
            except Dismissed as reason:
                self.ended = reason
            self.raw += session.raw
            self.transcript += ["", *session.transcript]
            session.close()

    def complete(self):
        """For a test that looks at all replies, and has found no fault: that these are all."""
        if self.ended:
            raise self.ended


@pytest.fixture(scope="session")
def tours():
    return []


@pytest.fixture
def tour(target, tours):
    """A Tour; made once for all."""
    if not tours:
        tours.append(Tour(target))
        target.hang_up()
    target.sessions.append(SimpleNamespace(transcript=tours[0].transcript, close=lambda: None))
    return tours[0]


# ---- The results -----------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Every test has one result, from the phase that decides it."""
    outcome = (yield).get_result()
    item.seconds = getattr(item, "seconds", 0) + outcome.duration
    if not hasattr(item, "requirement") or outcome.when == "teardown" or (outcome.when == "setup" and outcome.passed):
        return
    target = item.funcargs.get("target")
    transcript = target.hang_up() if target else ""
    found, reason = verdict(call.excinfo and call.excinfo.value)
    result = report.Result(item.requirement, found, reason, transcript, item.seconds)
    item.config.results = getattr(item.config, "results", [])
    item.config.results.append(result)
    outcome.result = result


LETTERS = {"pass": ".", "fail": "F", "n/a": "-", "error": "E"}


def pytest_report_teststatus(report):
    """A letter for each test; a small one for a SHOULD."""
    result = getattr(report, "result", None)
    if result is None:
        return None
    letter = LETTERS[result.verdict]
    return result.verdict, letter.lower() if result.requirement.level == "SHOULD" else letter, result.verdict
