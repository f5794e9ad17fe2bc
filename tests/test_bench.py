"""The benchmark's own soundness: that a lost message, or one that comes twice, is seen."""
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import bench
import charts
import lab


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Everything on ports that anybody may take, and mail straight to the sink."""
    for name in ("cc", "smtp-source"):
        if shutil.which(name, path=bench.peers.SYSTEM_PATH) is None:
            pytest.skip(f"there is no {name} here")
    harness = bench.Bench(tmp_path_factory.mktemp("bench"), quick=True, resolver=False)
    yield harness
    harness.close()


@pytest.fixture
def run(harness):
    return harness.run()


@pytest.fixture
def send(harness, run):
    """send(7): message 7 of this test's run, to the sink itself."""
    def sent(number, body="Subject: x\n\nDear Nour\n"):
        with lab.Client(harness.sink.port, harness.sink.host) as client:
            assert client.deliver("nour@example.org", [f"{number}{run}@example.net"], body) == "250 2.0.0 Ok"
            assert client.say("QUIT") == "221 2.0.0 Bye"
    return sent


def test_sink_writes_down_what_comes(harness, run, send):
    bodies = ["", ".\n", "..\n\n", "x\n" * 300000, "\n.\n" * 70000]
    for number, body in enumerate(bodies):
        send(number, body)
    arrivals = harness.sink.wait(run, range(len(bodies)))
    assert [arrival.number for arrival in arrivals] == list(range(len(bodies)))
    # As they were sent: an empty body is a line, and a dot that begins one is doubled.
    assert [arrival.octets for arrival in arrivals] == [2, 4, 7, 900000, 70000 * 6]
    assert [arrival.time for arrival in arrivals] == sorted(arrival.time for arrival in arrivals)


def test_sink_takes_piece_by_piece(harness, run):
    commands = ["HELO me.com", "MAIL FROM:<a@b.c>", f"RCPT TO:<1{run}@example.net>", "DATA", ".x", ".", "QUIT"]
    with lab.Client(harness.sink.port, harness.sink.host) as client:
        for octet in "".join(f"{command}\r\n" for command in commands).encode():
            client.send(bytes([octet]))
        assert [client.reply()[:3] for _ in range(6)] == ["250", "250", "250", "354", "250", "221"]
    assert harness.sink.wait(run, [1])[0].octets == 4


def test_sink_takes_transactions_in_one_piece(harness, run):
    first, second = (f"MAIL FROM:<a@b.c>\r\nRCPT TO:<{number}{run}@example.net>\r\nDATA\r\nx\r\n.\r\n"
                     for number in (1, 2))
    with lab.Client(harness.sink.port, harness.sink.host) as client:
        client.send(f"EHLO me.com\r\n{first}{second}QUIT\r\n".encode())
        assert [client.reply()[:3] for _ in range(10)] == ["250"] * 3 + ["354"] + ["250"] * 3 + ["354", "250", "221"]
    harness.sink.wait(run, [1, 2])


@pytest.mark.parametrize("sent, words", [
    ([1, 2, 3], None),
    ([1, 3], "of 3 messages 1 lost, 0 twice, 0 never sent"),
    ([1, 2, 2, 3], "of 3 messages 0 lost, 1 twice, 0 never sent"),
    ([1, 2, 3, 4], "of 3 messages 0 lost, 0 twice, 1 never sent"),
    ([1, 1, 4], "of 3 messages 2 lost, 1 twice, 1 never sent"),
])
def test_nothing_lost_and_nothing_twice(harness, run, send, sent, words):
    for number in sent:
        send(number)
    if words is None:
        harness.sink.wait(run, range(1, 4))
        return
    with pytest.raises(bench.Failed) as failure:
        harness.sink.wait(run, range(1, 4), patience=0)
    assert str(failure.value) == words


def test_a_round(harness, tmp_path):
    assert bench.measure_all(harness, ["latency", "drain"], ["smtp"], 1), harness.notes
    found = {record["metric"]: record["value"] for record in harness.records}
    assert found["drain"] > 0 and found["drain cpu"] > 0
    assert 0 < found["latency reply"] and 0 < found["latency arrival"]
    text = bench.report({"surroundings": {"system": "this"}, "versions": {}, "notes": ["a note"],
                         "records": harness.records})
    assert "backlog drained /s" in text and text.endswith("a note\n")
    bench.draw(bench.Results(harness.records), tmp_path / "charts")
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == ["drain.svg", "latency.svg"]


def test_results_are_medians():
    records = [{"peer": "smtp", "metric": "accepted", "at": at, "round": round, "value": value}
               for at, values in ((1, (30, 10, 20)), (20, (1000, 3000, 2000))) for round, value in enumerate(values)]
    results = bench.Results(records)
    assert results.lines("accepted") == {"smtp": [(1, 20), (20, 2000)]}
    assert "accepted /s  2,000 (1,000-3,000)" in bench.summary(results)


def test_chart_is_svg():
    chart = charts.lines("Rate <1>", "sessions", "1/s", {"a & b": [(1, 5), (20, 90)], "c": [(1, 7)]}, log_y=True)
    names = [element.text for element in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Rate <1>", "a & b", "c", "20", "100"} <= set(names)
    ElementTree.fromstring(charts.bars("Latency", "ms", {"a": (5, 4, 6)}))
