"""The conformance suite itself: that each of its tests can fail, and for its own reason only."""
import contextlib
import io
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import lab

SUITE = Path(__file__).parent / "conformance"
sys.path.insert(0, str(SUITE))

from broken import FAULTS, SEEN_BY, Broken      # noqa: E402
from dialogue import Target     # noqa: E402


class Verdicts:
    """Keeps those of a run, by requirement, without the R-."""

    def __init__(self, target):
        self.target, self.results = target, []

    def pytest_configure(self, config):
        config.target, config.results = self.target, self.results

    def of(self, verdict):
        return {result.requirement.id[2:] for result in self.results if result.verdict == verdict}


def run_on(fault, *arguments, patience=0):
    """Runs the suite in this process where this is wrong.  Returns (what fails, what is not
    applicable, what passes), and what it prints.  All that the broken server relays has
    arrived before its 250, so what does not come need not be awaited."""
    sink = lab.Exchanger("127.0.0.1")
    server = Broken(fault, sink.port)
    found = Verdicts(Target("127.0.0.1", server.port, "nour@example.org", "friend@example.net", sink, patience, wait=0,
                            stranger=lab.loopback()))
    os.environ.pop("PYTEST_ADDOPTS", None)      # it is for the run that this one is part of
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler",
                     "--rootdir", str(SUITE.parent), str(SUITE), *arguments], plugins=[found])
    server.stop()
    sink.stop()
    return tuple(map(found.of, ("fail", "n/a", "pass"))), printed.getvalue()


@pytest.fixture(scope="module")
def runs(request):
    """The runs that the selected tests ask for, by fault, as many at once as there are processors."""
    faults = [item.callspec.params["fault"] for item in request.session.items
              if "runs" in getattr(item, "fixturenames", ())]
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"))
    yield {fault: pool.submit(run_on, fault) for fault in faults}
    pool.shutdown(cancel_futures=True)


def test_nothing_is_found_where_nothing_is_wrong():
    (fail, not_applicable, passed), printed = run_on(None)
    print(printed)
    assert fail == set()
    assert not_applicable == {"4.5.3.2.7-a"}        # silence takes its time: it is tried below
    assert passed == FAULTS - not_applicable


@pytest.mark.parametrize("fault", sorted(FAULTS - {"4.5.3.2.7-a"}))
def test_what_is_wrong_is_found_and_nothing_else(runs, fault):
    (fail, _, _), printed = runs[fault].result()
    print(printed)
    assert fail == SEEN_BY.get(fault, {fault})


def test_impatience_is_found():
    assert run_on("4.5.3.2.7-a", "-k", "4_5_3_2_7", patience=20)[0][0] == {"4.5.3.2.7-a"}
    assert run_on(None, "-k", "4_5_3_2_7", patience=0.2)[0][2] == {"4.5.3.2.7-a"}


# ---- The index of requirements --------------------------------------------------------------

INDEX = SUITE.parent.parent / "docs" / "requirements.md"


@pytest.fixture(scope="module")
def index():
    """The rows of docs/requirements.md: number, level, how it is tested."""
    rows = re.findall(r"^\| (R-\S+) \| (\w+) \| .* \| (.*) \|$", INDEX.read_text(), re.M)
    assert len(rows) == INDEX.read_text().count("\n| R-") == len({number for number, _, _ in rows})
    return rows


def test_the_index_has_every_test_of_the_suite_and_its_level(index):
    tests = {}
    for path in SUITE.glob("test_*.py"):
        for level, rfc, section, letter in re.findall(
                r"@(must|should)\ndef test_(?:rfc(\d+)_)?((?:\d+_)+)([a-z])_", path.read_text()):
            number = f"R-{rfc + '-' if rfc else ''}{section.strip('_').replace('_', '.')}-{letter}"
            tests[number] = level.upper()
    assert {"R-" + fault for fault in FAULTS} == set(tests)
    assert {number: level for number, level, test in index if test == "suite"} == tests


def test_what_the_index_points_to_is_there(index):
    numbers = {number for number, _, _ in index}
    for number, _, test in index:
        if test.startswith("`"):
            path, *names = test.strip("`").split("::")
            source = (SUITE.parent / path).read_text()
            assert all(re.search(rf"^ *(?:def|class) {name}\b", source, re.M) for name in names), test
        elif test.startswith("R-"):
            assert set(test.split(", ")) <= numbers - {number}, number
        else:
            assert test == "suite" or test.startswith("none: "), number
