"""The suite on several servers, side by side, each of them started in the lab, as a relay where it is one.

    python3 tests/conformance/compare.py [directory [name...]]

The names are those of tests/peers.py.  Each server's report goes to the directory;
the tables of docs/conformance.md go to standard output.
"""
import json
import socket
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parent
sys.path.insert(0, str(SUITE.parent))

import lab      # noqa: E402
import peers    # noqa: E402

MARKS = {"pass": "✓", "fail": "**✗**", "n/a": "·", "error": "!"}


def free_endpoint():
    """Where the suite can listen as the exchanger."""
    host = lab.loopback()
    with socket.create_server((host, 0)) as free:
        return host, free.getsockname()[1]


def report_on(name, directory):
    """Runs the suite on a server; returns its report, or None where the server is absent."""
    sink = free_endpoint()
    try:
        with peers.start(name, next_hop=sink) as peer:
            options = ["--server", f"{peer.host}:{peer.port}",
                       "--from", "nour@example.org", "--to", "friend@example.net"]
            if hasattr(peer, "user"):
                options += ["--user", peer.user, "--password", peer.password]
            if name not in peers.KEEPERS:
                options += ["--sink", "{}:{}".format(*sink)]
            subprocess.run([sys.executable, SUITE, *options, "--report", directory / name],
                           stdin=subprocess.DEVNULL, stdout=sys.stderr)
            found = json.loads((directory / name / "report.json").read_text(encoding="utf-8"))
            return {**found, "server": peer.version()}
    except peers.Absent as reason:
        print(f"{name} is absent: {reason}", file=sys.stderr)
        return None


def totals(reports):
    yield "| server | MUST: pass | fail | n/a | error | SHOULD: pass | fail | n/a | error |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for report in reports:
        counts = [str(report["counts"][level][verdict]) for level in ("MUST", "SHOULD") for verdict in MARKS]
        yield f"| {report['server']} | {' | '.join(counts)} |"


def departures(reports):
    """A row for every requirement that somebody fails."""
    yield f"| requirement | | {' | '.join(report['server'] for report in reports)} |"
    yield "|---|---|" + ":-:|" * len(reports)
    verdicts = [{result["id"]: result["verdict"] for result in report["results"]} for report in reports]
    for result in reports[0]["results"]:
        each = [verdict[result["id"]] for verdict in verdicts]
        if "fail" in each:
            yield f"| {result['id']} {result['title']} | {result['level']} | {' | '.join(MARKS[v] for v in each)} |"


def main(directory="report", *names):
    reports = [report_on(name, Path(directory).resolve()) for name in names or peers.SERVERS]
    reports = [report for report in reports if report]
    print("\n".join([*totals(reports), "", *departures(reports)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
