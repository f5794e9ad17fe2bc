"""Runs the suite: against a Target, without a word about where it comes from."""
import contextlib
import io
import os
import re
from pathlib import Path

import pytest

import report

SUITE = Path(__file__).resolve().parent


class Bringer:
    """Gives a run what it needs, and keeps what it finds."""

    def __init__(self, target, only):
        self.target, self.only, self.results = target, only, []

    def pytest_configure(self, config):
        config.target, config.only, config.results = self.target, self.only, self.results


def requirements():
    """All that have a test: {id: level}."""
    found = {}
    for path in sorted(SUITE.glob("test_*.py")):
        for level, name in re.findall(r"@(must|should)\ndef (test_\w+)", path.read_text(encoding="utf-8")):
            found[report.Requirement.named(name)[2]] = level.upper()
    return found


def run(target, only=None, quiet=False):
    """Asks a server for these requirements, or for all.  Returns (results, whether all went well
    with the suite itself, what pytest printed where it was to be quiet)."""
    bringer = Bringer(target, only)
    os.environ.pop("PYTEST_ADDOPTS", None)      # these are for other tests
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext() as printed:
        status = pytest.main(["-q", "-s", "-rN", "--tb=short" if quiet else "--tb=no", "-p", "no:cacheprovider",
                              "-p", "no:faulthandler", "-c", os.devnull, "--rootdir", str(SUITE), "--confcutdir",
                              str(SUITE), str(SUITE)], plugins=[bringer])
    return bringer.results, status in (0, 1), printed.getvalue() if quiet else ""
