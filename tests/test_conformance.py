"""The conformance suite itself: that each of its tests can fail, and for its own reason only."""
import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import lab

SUITE = Path(__file__).parent / "conformance"
sys.path.insert(0, str(SUITE))

import broken_client        # noqa: E402
import client       # noqa: E402
import report       # noqa: E402
import suite        # noqa: E402
from broken import FAULTS, SEEN_BY, Broken      # noqa: E402
from dialogue import Target, readable       # noqa: E402
from sink import Sink       # noqa: E402


OF_TLS = {fault for fault in FAULTS if fault.startswith("3207-")}


class Found(NamedTuple):
    """What a run found: results, and what it printed."""

    results: list
    printed: str

    def of(self, verdict):
        """The requirements with this verdict, without the R-."""
        return {result.requirement.id[2:] for result in self.results if result.verdict == verdict}

    def reasons(self, verdict):
        return {result.reason for result in self.results if result.verdict == verdict}


@functools.lru_cache(None)
def certificate():
    """A file with a key and a certificate, made once; None where there is no openssl."""
    if shutil.which("openssl") is None:
        return None
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    return lab.Authority(directory).certificate("127.0.0.1")


def run_on(fault, only=None, **settings):
    """Runs the suite in this process where this is wrong.  All that the broken server relays has
    arrived before its 250, so what does not come need not be awaited."""
    sink = Sink("127.0.0.1")
    server = Broken(fault, sink.port, certificate=certificate())
    target = Target("127.0.0.1", server.port, "nour@example.org", "friend@example.net", sink,
                    **{"delivery_timeout": 0, "reply_timeout": 30, "stranger": lab.loopback(), "user": "nour",
                       "password": "secret", **settings})
    results, went_well, printed = suite.run(target, only, quiet=True)
    server.stop()
    sink.stop()
    assert went_well, printed
    return Found(results, printed)


@pytest.fixture(scope="module")
def runs(request):
    """The runs that the selected tests ask for, by fault, as many at once as there are processors."""
    faults = [item.callspec.params["fault"] for item in request.session.items
              if "runs" in getattr(item, "fixturenames", ())]
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"))
    yield {fault: pool.submit(run_on, fault) for fault in faults}
    pool.shutdown(cancel_futures=True)


def test_nothing_is_found_where_nothing_is_wrong():
    found = run_on(None)
    print(found.printed)
    assert found.of("fail") == found.of("error") == set()
    tls = set() if certificate() else OF_TLS
    assert found.of("n/a") == {"4.5.3.2.7-a"} | tls     # silence takes its time: it is tried below
    assert found.of("pass") == FAULTS - found.of("n/a")


@pytest.mark.parametrize("fault", sorted(FAULTS - {"4.5.3.2.7-a"}))
def test_what_is_wrong_is_found_and_nothing_else(runs, fault):
    """And it is told in words, not as a comparison of two values."""
    if fault in OF_TLS and not certificate():
        pytest.skip("openssl is not installed")
    found = runs[fault].result()
    print(found.printed)
    assert found.of("fail") == SEEN_BY.get(fault, {fault})
    assert found.of("error") == set()
    for reason in found.reasons("fail"):
        assert re.search("[a-z]{3}", reason) and not re.search("assert|[!=]=|None", reason), reason


def test_impatience_is_found():
    assert run_on("4.5.3.2.7-a", ["4.5.3.2.7"], patience=20).of("fail") == {"4.5.3.2.7-a"}
    assert run_on(None, ["4.5.3.2.7"], patience=0.2).of("pass") == {"4.5.3.2.7-a"}


# ---- A server that cannot be asked ----------------------------------------------------------


@pytest.mark.parametrize("trouble, settings, words", [
    ("silent", {"reply_timeout": 0.5}, "waited 0.5 seconds for MAIL's reply in vain"),
    ("gone", {}, "the server closed the connection in place of the reply to MAIL FROM:<nour@example.org>"),
    ("full", {}, "the server ends the session: the greeting is “421 4.3.2 one at a time”"),
    ("deaf", {}, "the message was accepted, and did not arrive within 0 seconds")])
def test_a_server_that_cannot_be_asked_fails_nothing(trouble, settings, words):
    found = run_on(trouble, ["3.6.3"], **settings)
    assert (found.of("error"), found.reasons("error")) == ({"3.6.3-a"}, {words})


def test_a_server_that_relays_nothing_is_given_up_in_the_end():
    found = run_on("deaf", ["4.4"])
    assert found.of("fail") == set()
    assert "messages are not waited for any more: 3 times in a row none arrived" in found.reasons("error")


def test_a_server_that_says_nothing_is_given_up_in_the_end():
    found = run_on("silent", ["4.1.2", "4.1.3"], reply_timeout=0.2)
    assert found.of("fail") == set()
    assert "MAIL's reply is not waited for any more: 3 times in a row it did not come" in found.reasons("error")


def test_no_session_makes_more_errors_than_one_requirement_needs():
    """A server that ends a session at its second error is judged nearly whole."""
    found = run_on("strict")
    assert found.of("fail") == set()
    assert found.of("error") == {"2920-3.2-c", "4.1.4-g"}       # which are about what follows an error


def test_a_slow_server_is_waited_for():
    found = run_on("slow", ["4.5.1-b", "4.1.4-h"])
    assert found.of("pass") == {"4.5.1-b", "4.1.4-h"}


def test_a_long_wait_is_told_early(monkeypatch):
    monkeypatch.setattr("dialogue.FIRST_NEWS", 0.1)
    told = []
    run_on("silent", ["4.5.1-b"], reply_timeout=1.5, tell=told.append)
    assert "waiting for MAIL's reply, 1 s" in told


def test_a_server_that_listens_again_is_asked_again():
    """It may have stopped under load."""
    server = Broken()
    target = Target("127.0.0.1", server.port)
    target.connect().close()
    server.stop()
    restarted = []
    target.tell = lambda text: restarted or restarted.append(Broken(port=server.port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dialogue.FIRST_NEWS", 0)
        assert target.connect().greeting.code == "220"
    restarted[0].stop()


@pytest.mark.parametrize("octets, shown", [
    ("müller".encode(), "müller"), (b"m\xfcller", r"m\xfcller"), (b"a\tb\x00", r"a\tb\x00"),
    ("a\u200bb".encode(), r"a\u200bb")])
def test_octets_are_shown_as_a_reader_can_read_them(octets, shown):
    assert readable(octets) == shown


# ---- Clients -----------------------------------------------------------------------------------


def judged(fault):
    """What the rules say of the client with this fault."""
    def send(host, port, sender, recipient, message):
        with contextlib.suppress(SystemExit, OSError):
            broken_client.send(host, port, sender, recipient, message, fault)

    return Found(client.run(send, ("127.0.0.1", 0), seconds=0.5), "")


@pytest.fixture(scope="module")
def clients():
    """The broken clients, judged; many at once, since most of the time they wait."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(20) as pool:
        patch.setattr("unusual.PAUSE", 0.05)
        patch.setattr("client.QUIET", 0.1)
        yield {fault: pool.submit(judged, fault) for fault in [None, *broken_client.FAULTS]}


def test_nothing_is_found_where_a_client_does_nothing_wrong(clients):
    found = clients[None].result()
    assert found.of("pass") == set(broken_client.FAULTS) and found.reasons("fail") == set()


@pytest.mark.parametrize("fault", sorted(broken_client.FAULTS))
def test_what_a_client_does_wrong_is_found_and_nothing_else(clients, fault):
    found = clients[fault].result()
    assert found.of("fail") == {fault}, found.reasons("fail")
    assert found.of("error") == set()


def test_a_client_is_a_command(command):
    client = f"{sys.executable} {SUITE / 'broken_client.py'} {{host}} {{port}} {{sender}} {{recipient}} {{message}}"
    done = command("--client", client + " 4.5.2-d", "--only", "4.5.2", "--listen", "127.0.0.1:0")
    assert done.returncode == 1 and "It is not so: the message is not what was to be sent." in done.stdout, done.stderr
    done = command("--client", "true", "--delivery-timeout", 0.5)
    assert done.returncode == 3 and "the client has made no connection" in done.stderr


# ---- The command ------------------------------------------------------------------------------


@pytest.fixture
def broken():
    """broken("4.1.1.9-a"): host:port of a server with this fault."""
    servers = []

    def start(fault=None):
        servers.append(Broken(fault))
        return f"127.0.0.1:{servers[-1].port}"
    yield start
    for server in servers:
        server.stop()


def test_a_server_that_speaks_tls_from_the_first_octet_is_asked_with_tls(command):
    if not certificate():
        pytest.skip("openssl is not installed")
    server = Broken(certificate=certificate(), tls=True)
    done = command("--server", f"127.0.0.1:{server.port}", "--only", "4.1.1.9,3207", "--tls")
    server.stop()
    assert done.returncode == 0, done.stdout
    assert re.search(r"^4\.1 Commands +2 +\. +\. +\. +1", done.stdout, re.M)
    assert "STARTTLS is not announced" in done.stdout


def test_who_logs_in_is_asked_behind_the_login_and_no_report_has_the_password(command, tmp_path):
    server = Broken("shy")
    words = ["--server", f"127.0.0.1:{server.port}", "--only", "4.5.1-b,4.5.1-c,4954-4-e"]
    assert "the server wants more before that" in command(*words).stdout
    done = command(*words, "--user", "nour", "--password", "secret", "--report", tmp_path)
    server.stop()
    assert done.returncode == 0 and re.search(r"^all +3 +\. +\. +\. ", done.stdout, re.M), done.stdout
    report = (tmp_path / "report.json").read_text()
    assert "AUTH PLAIN ..." in report and "secret" not in report and "bm91cgBzZWNyZXQ" not in report


@pytest.fixture
def command(tmp_path):
    """Runs the suite from a copy of its folder that stands alone, as anybody does."""
    folder = tmp_path / "copy"
    shutil.copytree(SUITE, folder, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*words):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run([sys.executable, folder, *map(str, words)], cwd=tmp_path, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=120, env={**environment, "PYTHONUTF8": "1"})
    return run


def test_help_tells_all_options_and_the_exit_status(command):
    done = command("--help")
    assert done.returncode == 0
    for word in "--server", "--reply-timeout", "--only", "--strict", "--known", "--report", "exit status", "incomplete":
        assert word in done.stdout


def test_a_server_that_is_not_there_takes_one_line(command):
    done = command("--server", f"127.0.0.1:{lab.unused_port()}")
    assert done.returncode == 3
    assert re.fullmatch(r"cannot connect to 127\.0\.0\.1 port \d+: Connection refused\n", done.stderr)


def test_a_server_that_is_still_starting_is_waited_for(command):
    port = lab.unused_port()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(command, "--server", f"127.0.0.1:{port}", "--only", "4.1.1.9", "--start-timeout", 60)
        server = Broken(port=port)
        assert done.result().returncode == 0, done.result().stderr
        server.stop()


@pytest.mark.parametrize("words, complaint", [
    ([], "--server is needed"), (["--server", "a:b"], "'a:b' is not host:port"),
    (["--server", "a:1", "--only", "4.9"], "no requirement is called '4.9'"),
    (["--server", "a:1", "--known", "/nowhere"], "No such file")])
def test_wrong_options_are_explained(command, words, complaint):
    done = command(*words)
    assert done.returncode == 2 and complaint in done.stderr


@pytest.mark.parametrize("fault, options, status", [
    (None, [], 0), ("4.1.1.9-a", [], 1), ("4.1.1.9-c", [], 0), ("4.1.1.9-c", ["--strict"], 1),
    ("full", [], 3), ("4.1.1.9-a", ["--only", "R-4.1.1.9-b"], 0)])
def test_the_exit_status_says_how_it_went(command, broken, fault, options, status):
    done = command("--server", broken(fault), "--only", "4.1.1.9", *options)
    assert done.returncode == status, done.stdout + done.stderr


def test_only_what_is_asked_for_is_asked(command, broken, tmp_path):
    command("--server", broken(), "--only", "4.1.1.9,R-2920, R-4.1.1.1-a", "--report", tmp_path / "report")
    found = json.loads((tmp_path / "report/report.json").read_text())["results"]
    numbers = [result["id"] for result in found]
    assert [number for number in numbers if not number.startswith("R-2920-")] == [
        "R-4.1.1.1-a", "R-4.1.1.9-a", "R-4.1.1.9-b", "R-4.1.1.9-c"]
    assert len(numbers) > 6


def test_known_departures_do_not_count_and_one_that_is_none_is_told(command, broken, tmp_path):
    (tmp_path / "known").write_text("# ours\n\nR-4.1.1.9-a  NOOP is of no use here\nR-4.1.1.9-b  an old fault\n")
    done = command("--server", broken("4.1.1.9-a"), "--only", "4.1.1.9", "--known", tmp_path / "known",
                   "--report", tmp_path / "report")
    assert done.returncode == 0
    assert "This is known: NOOP is of no use here" in done.stdout
    assert "Passed, and given as known departures: R-4.1.1.9-b" in done.stdout
    found = json.loads((tmp_path / "report/report.json").read_text())
    assert found["unexpected passes"] == ["R-4.1.1.9-b"]
    (tmp_path / "known").write_text("R-4.1.1.9-a\n")
    assert "needs a reason" in command("--server", "a:1", "--known", tmp_path / "known").stderr


def test_ci_reads_junit_and_sees_each_kind_of_verdict(command, broken, tmp_path):
    def cases(fault, *options):
        command("--server", broken(fault), "--only", "4.1.1.9,4.5.3.2.7", "--report", tmp_path, *options)
        suite = xml.etree.ElementTree.parse(tmp_path / "report.xml").getroot().find("testsuite")
        assert int(suite.get("tests")) == len(suite) == 4
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        return {case.get("name")[2:11]: (case[0].tag, case[0].get("message")) for case in suite if len(case)}

    silence = ("skipped", "not applicable: it takes five minutes: give them with --patience 300")
    failed = "NOOP whatever is answered “501 5.5.2 what?”; it should be 250"
    assert cases(None) == {"4.5.3.2.7": silence}
    assert cases("4.1.1.9-c") == {"4.5.3.2.7": silence, "4.1.1.9-c": ("skipped", "SHOULD failed: " + failed)}
    assert cases("4.1.1.9-c", "--strict") == {"4.5.3.2.7": silence, "4.1.1.9-c": ("failure", failed)}
    assert {tag for tag, _ in cases("full").values()} == {"error"}


def test_reports_hold_what_a_server_says_whatever_that_is(tmp_path):
    """In each form: markup, octets that are not text, and characters that XML cannot hold."""
    nasty = "<b>&\"'\x00\x1b müller]]>"
    what = report.Requirement("5321", "4.2", "R-4.2-a", "MUST", "a title", "a rule")
    report.write(tmp_path, report.Outcome("<host>", [report.Result(what, "fail", nasty, nasty)]))
    assert xml.etree.ElementTree.parse(tmp_path / "report.xml").find(".//failure") is not None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>&" not in page and "müller" in page
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["counts"]["MUST"]["fail"] == 1


# ---- The index of requirements --------------------------------------------------------------

INDEX = SUITE.parent.parent / "docs" / "requirements.md"


@pytest.fixture(scope="module")
def index():
    """The rows of docs/requirements.md: number, level, how it is tested."""
    rows = re.findall(r"^\| (R-\S+) \| (\w+) \| .* \| (.*) \|$", INDEX.read_text(encoding="utf-8"), re.M)
    assert len(rows) == INDEX.read_text(encoding="utf-8").count("\n| R-") == len({number for number, _, _ in rows})
    return rows


def test_the_index_has_every_test_of_the_suite_and_its_level(index):
    tests = {}
    for path in SUITE.glob("test_*.py"):
        for level, rfc, section, letter in re.findall(
                r"@(must|should)\ndef test_(?:rfc(\d+)_)?((?:\d+_)+)([a-z])_", path.read_text(encoding="utf-8")):
            number = f"R-{rfc + '-' if rfc else ''}{section.strip('_').replace('_', '.')}-{letter}"
            tests[number] = level.upper()
    assert {"R-" + fault for fault in FAULTS} == set(tests)
    assert {number: level for number, level, test in index if test == "suite"} == tests


def test_the_index_has_every_rule_for_clients_and_its_level(index):
    assert set(client.requirements().items()) <= {(number, level) for number, level, _ in index}


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
