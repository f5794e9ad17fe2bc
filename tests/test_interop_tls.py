"""TLS and passwords with mail servers that others wrote, with OpenSSL, GnuTLS and Node.js."""
import shutil

import pytest

import lab
from lab import loopback
from programs import GREETINGS, LETTER, deliver, on_the_wire

SMARTHOST = "smtp.example.net"
NAME, PASSWORD = "nour", "correct horse"


@pytest.fixture
def far(exchangers):
    """Where the others bring the mail."""
    return exchangers(1)[0]


@pytest.fixture
def trusted(authority, monkeypatch):
    """A certificate for the smarthost, which the relay trusts; the file has the key, too."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.pem))
    return authority.certificate(SMARTHOST)


@pytest.fixture
def password_file(tmp_path):
    """password_file(name, password): the file for -A."""
    def make(name=NAME, password=PASSWORD):
        path = tmp_path / "password"
        path.write_text(f"{name}\n{password}\n")
        path.chmod(0o600)
        return path
    return make


def settings_of(name, pem):
    """A peer's settings for STARTTLS."""
    if name == "postfix":
        return {"more": f"smtpd_tls_security_level = encrypt\nsmtpd_tls_chain_files = {pem}\nsmtpd_tls_loglevel = 1\n"
                        "smtpd_tls_received_header = yes"}
    return {"tls": f"tls_advertise_hosts = *\ntls_certificate = {pem}\ntls_privatekey = {pem}"}


# ---- Exchangers --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-T", "must")], ids=["may", "must"])
@pytest.mark.parametrize("name, trace", [
    pytest.param("postfix", b"using TLSv1.3 with cipher", id="postfix"),        # OpenSSL
    pytest.param("exim", b"with esmtps  (TLS1.3)", id="exim")])                 # GnuTLS
def test_an_exchanger_by_starttls(dns, relay, start_peer, far, authority, name, trace, options):
    """What arrives is what was sent, octet by octet."""
    peer = start_peer(name, next_hop=(far.host, far.port), **settings_of(name, authority.certificate("mx.example.net")))
    dns.mx("example.net", (10, "mx.example.net"))
    dns.a("mx.example.net", peer.host)
    server = relay(*options, mx_port=peer.port)
    deliver(server, ["friend@example.net"], GREETINGS)
    message, = far.wait_for_messages(1, timeout=60)
    assert server.outcomes("friend@example.net")[0].relay == f"mx.example.net[{peer.host}]/tls"
    assert message.data.endswith(on_the_wire(GREETINGS)) and trace in message.data


def test_many_messages_to_postfix_by_one_connection(dns, relay, start_peer, far, authority):
    peer = start_peer("postfix", next_hop=(far.host, far.port), **settings_of("postfix", authority.certificate("mx")))
    down = lab.unused_port()
    server = relay("-s", f"{loopback()}:{down}", "-r", "1h", "-T", "must")
    for _ in range(20):
        deliver(server, ["friend@example.net"], LETTER)
    server.stop()
    server = relay("-s", f"{peer.host}:{peer.port}", "-T", "must")
    server.hangup_until(lambda: len(far.messages) == 20 and not server.queue())
    assert peer.log().count("TLS connection established") < 20
    assert all(b"using TLSv1.3 with cipher" in message.data for message in far.messages)


# ---- Smarthosts ----------------------------------------------------------------------------------


@pytest.fixture
def submission(start_peer, far, trusted):
    """Postfix's submission service with Cyrus SASL: .ports are those that stand for 587 and 465."""
    if not shutil.which("saslpasswd2", path="/usr/sbin:/usr/bin"):
        pytest.skip("saslpasswd2 is not installed")
    ports = {"-s": lab.unused_port(), "-S": lab.unused_port()}
    common = ("-o smtpd_sasl_auth_enable=yes -o mynetworks= -o smtpd_tls_auth_only=yes"
              " -o smtpd_relay_restrictions=permit_sasl_authenticated,reject")
    peer = start_peer(
        "postfix", next_hop=(far.host, far.port), accounts={NAME: PASSWORD},
        more=f"smtpd_tls_chain_files = {trusted}\nsmtpd_tls_received_header = yes\n"
             f"smtpd_sasl_local_domain = {lab.HOSTNAME}\n"
             "smtpd_sasl_authenticated_header = yes\ncyrus_sasl_config_path = /etc/postfix/sasl",
        services=f"{{host}}:{ports['-s']} inet n - n - 0 smtpd -o smtpd_tls_security_level=encrypt {common}\n"
                 f"{{host}}:{ports['-S']} inet n - n - 0 smtpd -o smtpd_tls_wrappermode=yes {common}")
    peer.ports = ports
    return peer


@pytest.mark.parametrize("by", ["-s", "-S"])
def test_submission_to_postfix(dns, relay, submission, far, password_file, by):
    dns.a(SMARTHOST, submission.host)
    server = relay(by, f"{SMARTHOST}:{submission.ports[by]}", "-A", password_file(), "-v")
    deliver(server, ["friend@example.net"], GREETINGS)
    message, = far.wait_for_messages(1, timeout=60)
    assert b"(Authenticated sender: nour@" in message.data and b"with ESMTPSA" in message.data
    assert server.outcomes("friend@example.net")[0].relay == f"{SMARTHOST}[{submission.host}]/tls"
    assert not any(PASSWORD in line for line in server.log)


@pytest.mark.parametrize("by", ["-s", "-S"])
def test_submission_to_postfix_with_a_wrong_password(dns, relay, submission, far, password_file, by):
    dns.a(SMARTHOST, submission.host)
    server = relay(by, f"{SMARTHOST}:{submission.ports[by]}", "-A", password_file(password="wrong"))
    deliver(server, ["friend@example.net"], LETTER)
    outcome, = server.outcomes("friend@example.net")
    assert outcome.status == "later" and outcome.words.startswith("535 5.7.8 ")
    assert not far.messages


@pytest.mark.parametrize("by", ["-s", "-S"])
@pytest.mark.parametrize("password, status", [("secret", "sent"), ("wrong", "later")])
def test_submission_to_smtp_server(dns, relay, start_peer, trusted, password_file, by, password, status):
    """nodemailer's, in Node.js."""
    peer = start_peer("smtp-server", certificate=trusted, secure=by == "-S")
    dns.a(SMARTHOST, peer.host)
    server = relay(by, f"{SMARTHOST}:{peer.port}", "-A", password_file(password=password))
    deliver(server, ["friend@example.net"], GREETINGS)
    outcome, = server.outcomes("friend@example.net")
    assert (outcome.status, outcome.relay) == (status, f"{SMARTHOST}[{peer.host}]/tls")
