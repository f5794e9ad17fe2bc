"""The rules for clients on several clients, side by side, as many at once as there are.

    python3 tests/conformance/compare_clients.py [directory]

Each client's report goes to the directory; the table of docs/conformance.md goes to
standard output.  Postfix and this relay are given their mail by smtplib.
"""
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import client       # noqa: E402
import peers        # noqa: E402
import report       # noqa: E402
from compare import MARKS       # noqa: E402
from dialogue import Unasked    # noqa: E402

SMTPLIB = (sys.executable + " -c 'import smtplib, sys; host, port, sender, recipient = sys.argv[1:]; "
           "server = smtplib.SMTP(host, int(port), local_hostname=\"client.example\"); "
           "server.sendmail(sender, [recipient], sys.stdin.read()); server.quit()' ")
NODEMAILER = ("NODE_PATH=/usr/share/nodejs node -e 'const [host, port, from, to, path] = process.argv.slice(1); "
              "require(\"nodemailer\").createTransport({host, port, name: \"client.example\", ignoreTLS: true})"
              ".sendMail({envelope: {from, to}, raw: require(\"fs\").readFileSync(path)}).catch(() => {})' ")
CLIENTS = {
    "swaks": "swaks --server {host} --port {port} --from {sender} --to {recipient} --helo client.example "
             "--data @{message}",
    "curl": "curl -s --crlf smtp://{host}:{port}/client.example --mail-from {sender} --mail-rcpt {recipient} "
            "-T {message}",
    "msmtp": "msmtp --host={host} --port={port} --domain=client.example --from={sender} {recipient}",
    "smtplib": SMTPLIB + "{host} {port} {sender} {recipient}",
    "nodemailer": NODEMAILER + "{host} {port} {sender} {recipient} {message}",
    "git send-email": "cd /tmp && git send-email --quiet --confirm=never --no-validate --suppress-cc=all "
                      "--smtp-server={host} --smtp-server-port={port} --smtp-domain=client.example "
                      "--envelope-sender={sender} --from={sender} --to={recipient} --8bit-encoding=UTF-8 {message}",
}
RELAYS = {"Postfix": "postfix", "this relay": "smtp"}


def results_of(name):
    """What the rules say of a client; None where it is absent."""
    try:
        if name not in RELAYS:
            return client.run(CLIENTS[name], ("127.0.0.1", 0), timeout=30)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with peers.start(RELAYS[name], next_hop=("127.0.0.1", port)) as peer:
            command = f"{SMTPLIB} {peer.host} {peer.port} {{sender}} {{recipient}}"
            return client.run(command, ("127.0.0.1", port), timeout=30)
    except (peers.Absent, Unasked) as reason:
        print(f"{name} is absent: {reason}", file=sys.stderr)
        return None


def main(directory="report"):
    names = [*CLIENTS, *RELAYS]
    with ThreadPoolExecutor(len(names)) as pool:
        found = {name: results for name, results in zip(names, pool.map(results_of, names)) if results}
    for name, results in found.items():
        report.write(Path(directory, name.replace(" ", "-")), report.Outcome(name, results))
    print(f"| requirement | | {' | '.join(found)} |\n|---|---|" + ":-:|" * len(found))
    verdicts = {name: {each.requirement.id: each.verdict for each in results} for name, results in found.items()}
    order = sorted((each.requirement for each in next(iter(found.values()))), key=lambda requirement: requirement.order)
    for each in order:
        print(f"| {each.id} {each.title} | {each.level} | "
              + " | ".join(MARKS[verdict[each.id]] for verdict in verdicts.values()) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
