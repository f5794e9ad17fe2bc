"""The benchmark's own soundness: that a lost message, or one that comes twice, is seen."""
import collections
import contextlib
import shutil
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import bench
import charts
import lab
import peers


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Everything on ports that anybody may take, and mail straight to the sink."""
    if shutil.which("cc") is None:
        pytest.skip("there is no cc here")
    harness = bench.Bench(tmp_path_factory.mktemp("bench"), quick=True, resolver=False, before=lab.BINARY)
    yield harness
    harness.close()


def is_time(milliseconds):
    """Whether it may be a processor time: without a control group, hundredths of a second are counted."""
    return milliseconds > 0 or not peers.Group.exist()


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


def test_sink_answers_late(harness, tmp_path):
    with contextlib.closing(bench.Sink(harness.directory, [lab.loopback()], harness.slow.port, delay=0.5)) as sink:
        sink.start()
        began = time.monotonic()
        clients = [lab.Client(sink.port, sink.host) for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(f"MAIL FROM:<a@b.c>\r\nRCPT TO:<{number}r1@b.c>\r\nDATA\r\nx\r\n.\r\nNOOP\r\n".encode())
        for client in clients:
            assert [client.reply()[:3] for _ in range(3)] == ["250", "250", "354"]
        # What came behind the final dot waits, too; another delay begins with another message.
        for client in clients:
            assert [client.reply()[:3] for _ in range(2)] == ["250", "250"]
        assert all(arrival.time - began >= 0.5 for arrival in sink.wait("r1", range(3)))
        assert clients[0].deliver("a@b.c", ["3r1@b.c"], "x\n") == "250 2.0.0 Ok"
        assert sink.wait("r1", range(4))[-1].time - began >= 1
        for client in clients:
            client.close()


def test_sink_listens_at_all_addresses(harness):
    hosts = [lab.loopback() for _ in range(20)]
    with contextlib.closing(bench.Sink(harness.directory, hosts, harness.slow.port)) as sink:
        sink.start()
        for number, host in enumerate(hosts):
            with lab.Client(sink.port, host) as client:
                assert client.deliver("a@b.c", [f"{number}r1@b.c"], "x\n") == "250 2.0.0 Ok"
        sink.wait("r1", range(20))


def source(harness, to, *counts, **how):
    run = harness.run()
    bench.send(harness.directory / "source", to, run, *counts, **how)
    return run


def test_source_sends_to_all_domains_in_turn(harness):
    run = source(harness, harness.sink, 100, 7, domains=bench.DOMAINS, size=1000)
    arrivals = harness.sink.wait(run, range(1, 101))
    assert {arrival.number: arrival.domain for arrival in arrivals} == {
        number: bench.DOMAINS[(number - 1) % 20] for number in range(1, 101)}
    assert all(1000 < arrival.octets < 1500 for arrival in arrivals)


def test_source_sends_what_does_not_go_out_at_once(harness):
    run = source(harness, harness.sink, 4, 2, size=bench.LARGE)
    assert all(arrival.octets > bench.LARGE for arrival in harness.sink.wait(run, range(1, 5)))


@pytest.mark.parametrize("keep, connections", [(False, 10), (True, 3)])
def test_source_keeps_its_connections_if_told(harness, exchangers, keep, connections):
    exchanger, = exchangers(1)
    run = source(harness, exchanger, 10, 3, keep=keep)
    messages = exchanger.wait_for_messages(10)
    assert sorted(message.recipients for message in messages) == sorted(
        [f"<{number}{run}@example.net>"] for number in range(1, 11))
    assert len({message.connection for message in messages}) == connections


def test_source_says_what_it_was_refused_with(harness, exchangers):
    exchanger, = exchangers(1)
    exchanger.set(replies={"RCPT": ["250 2.1.5 Ok", "452 4.3.1 no room"]})
    with pytest.raises(bench.Failed, match=r"^source: message 2: 452 4\.3\.1 no room$"):
        source(harness, exchanger, 5, 1)
    harness.slow.stop()
    with pytest.raises(bench.Failed, match="Connection refused"):
        source(harness, harness.slow, 5, 1)


def test_source_connects_again_where_the_server_never_had_its_connection(harness, exchangers):
    exchanger, = exchangers(1)
    exchanger.set(drop_at="CONNECT", reset=True)
    with futures.ThreadPoolExecutor() as pool:
        sent = pool.submit(source, harness, exchanger, 5, 2)
        try:
            lab.wait_for(lambda: len(exchanger.connections) > 4, what="further connections")
        finally:
            exchanger.set(drop_at=None)
        run = sent.result()
    assert sorted(message.recipients for message in exchanger.messages) == [
        [f"<{number}{run}@example.net>"] for number in range(1, 6)]


def test_a_round(harness, tmp_path):
    assert bench.measure_all(harness, ["latency", "drain"], ["smtp", "before"], 1), harness.notes
    found = {(record["peer"], record["metric"]): record["value"] for record in harness.records}
    for peer in ("smtp", "before"):
        for metric in ("drain", "latency reply", "latency arrival"):
            assert found[peer, metric] > 0
        assert is_time(found[peer, "drain cpu"])
    text = bench.report({"surroundings": {"system": "this"}, "versions": {}, "notes": ["a note"],
                         "records": harness.records})
    assert "backlog drained /s" in text and "smtp/before" in text and text.endswith("a note\n")
    bench.draw(bench.Results(harness.records), tmp_path / "charts")
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == ["drain.svg", "latency.svg"]


def test_a_backlog_for_twenty_domains_and_a_slow_exchanger(harness, monkeypatch):
    monkeypatch.setattr(harness, "records", [])
    assert bench.measure(harness, "drain-20", 40, "smtp") and bench.measure(harness, "slow", 3, "smtp"), harness.notes
    found = {(record["metric"], record["at"]): record["value"] for record in harness.records}
    assert found["twenty drain", 0] > 0 and is_time(found["twenty drain cpu", 0])
    assert found["slow", 3] >= 1


def test_throughput_to_one_domain_and_to_twenty(harness, monkeypatch):
    monkeypatch.setattr(harness, "count", lambda *_: 50)
    monkeypatch.setattr(harness, "records", [])
    assert bench.measure_all(harness, ["throughput", "throughput-20"], ["smtp"], 1), harness.notes
    found = {(record["metric"], record["at"]): record["value"] for record in harness.records}
    for metric, at in (("accepted", 1), ("accepted", 20), ("twenty accepted", 20)):
        assert found[metric, at] > 0 and found[metric.replace("accepted", "cpu"), at] > 0


def test_tls_beside_plain(harness, monkeypatch):
    try:
        harness.gateway
    except peers.Absent as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(harness, "count", lambda *_: 30)
    monkeypatch.setattr(harness, "records", [])
    assert bench.measure_all(harness, ["tls"], ["smtp", "exim"], 1), harness.notes
    assert "exim: tls: its TLS is not set up here" in harness.notes
    found = {record["metric"]: record["value"] for record in harness.records}
    for way in "plain", "tls":
        for figure in "single reply", "single arrival", "accepted", "delivered":
            assert found[f"{way} {figure}"] > 0
        assert is_time(found[f"{way} single cpu"]) and is_time(found[f"{way} cpu"])


def test_every_run_has_a_new_spool_and_peers_take_turns(harness, monkeypatch):
    runs = []

    def run(bench, peer, at):
        assert all(not spool.exists() for _, _, spool in runs)
        assert not list(peer.directory.glob("spool/queue/*"))
        runs.append((peer.name, at, peer.directory / "spool"))

    monkeypatch.setitem(bench.MEASURES, "all", bench.Measure(run, (), (1, 2)))
    monkeypatch.setitem(bench.MEASURES, "first", bench.Measure(run, (), (0,), every_round=False))
    assert bench.measure_all(harness, ["all", "first"], ["smtp", "before"], 2), harness.notes
    assert [(name, at) for name, at, _ in runs] == [
        ("smtp", 1), ("before", 1), ("smtp", 2), ("before", 2), ("smtp", 0), ("before", 0),
        ("before", 1), ("smtp", 1), ("before", 2), ("smtp", 2)]
    assert len({spool for _, _, spool in runs}) == len(runs)


def test_spools_are_placed_apart_where_that_can_be_asked_for(tmp_path):
    if not bench.spread_out(tmp_path):
        pytest.skip("this file system places as it likes")
    flags = subprocess.run(["lsattr", "-d", tmp_path], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "T" in flags.split()[0]


def test_a_machine_that_is_not_quiet_is_told():
    assert bench.unquiet(0.05) is None
    assert "load was 1.50" in bench.unquiet(1.5)


def test_results_are_medians():
    records = [{"peer": "smtp", "metric": "accepted", "at": at, "round": round, "value": value}
               for at, values in ((1, (30, 10, 20)), (20, (1000, 3000, 2000))) for round, value in enumerate(values)]
    results = bench.Results(records)
    assert results.lines("accepted") == {"smtp": [(1, 20), (20, 2000)]}
    assert "accepted /s  2,000 (1,000-3,000)" in "".join(bench.tables(results))


def test_charts_show_what_is_above_nothing():
    records = [{"peer": peer, "metric": "idle", "at": at, "round": 0, "value": value}
               for peer, at, value in (("smtp", 0, 5), ("smtp", 200, -0.5), ("smtp", 1000, 0.3), ("before", 200, -1))]
    assert bench.Results(records).lines("idle") == {"smtp": [(1000, 0.3)]}


def test_ratios_are_those_of_each_round():
    records = [{"peer": peer, "metric": "accepted", "at": 20, "round": round, "value": value}
               for peer, values in (("smtp", (30, 40, 90)), ("before", (20, 80, 30)), ("postfix", (10, None, 10)))
               for round, value in enumerate(values) if value]
    results = bench.Results(records)
    assert results.ratios("smtp", "before", "accepted", 20) == [1.5, 0.5, 3]
    assert results.ratios("smtp", "postfix", "accepted", 20) == [3, 9]
    text = "".join(bench.tables(results))
    assert "smtp/before" in text and "accepted /s  1.5 (0.5-3)" in text and "6 (3-9)" in text


def test_chart_is_svg():
    chart = charts.lines("Rate <1>", "sessions", "1/s", {"a & b": [(1, 5), (20, 90)], "c": [(1, 7)]}, log_y=True)
    names = [element.text for element in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Rate <1>", "a & b", "c", "20", "100"} <= set(names)
    ElementTree.fromstring(charts.bars("Latency", "ms", {"a": (5, 4, 6)}))


def test_an_older_binary_that_was_not_built_is_told(tmp_path):
    done = subprocess.run([sys.executable, bench.__file__, "--before", tmp_path / "smtp"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and f"{tmp_path / 'smtp'} is no program" in done.stderr
