"""The relay among programs that others wrote, and nothing else of ours in that world."""
from lab import run, wait_for
from programs import LETTER, check_dump, name_server, smtp_sink, swaks


def test_nothing_but_the_relay_is_ours(relay, tmp_path):
    """swaks sends; dnsmasq says where to; smtp-sink takes it; and smtp -l has nothing left."""
    letter = tmp_path / "letter"
    letter.write_text(LETTER)
    with smtp_sink(tmp_path / "sink") as sink, name_server("dnsmasq", [sink.host], tmp_path) as server:
        ours = relay(dns=server, mx_port=sink.port)
        swaks(ours.port, letter)
        ours.wait_for_log(r"to=<friend@example.net> relay=host.example.net\S* .*status=sent ")
        check_dump(sink.dump(), b"ESMTP", LETTER + "\n")      # the empty line is swaks'
        wait_for(lambda: not ours.queue(), what="an empty queue")
    assert run("-l", "-q", ours.spool).returncode == 0
