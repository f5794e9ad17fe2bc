"""One message on its way, live on this machine's loopback: `make demo`.

A name server and three exchangers are set up, the relay is started between
them, and a client sends it the mail that everybody sends first.  With `make demo
TLS=1` the exchangers offer TLS.
"""
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from lab import BINARY, OPENSSL, Authority, Client, Nameserver, Relay, exchangers, wait_for

# What the client says before it waits for a reply; the dot ends the content.
SESSION = [
    "HELO me.com",
    "MAIL FROM:<nour@example.org>",
    "RCPT TO:<friend@example.net>",
    "DATA",
    "SUBJECT: testing my smtp server\n"
    "FROM: nour@example.org\n"
    "\n"
    "Dear Nour, This is me testing my server\n"
    ".",
]


def heading(text):
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


def show(text, prefix=""):
    for line in text.split("\n"):
        print(f"  {prefix}{line}".rstrip(), flush=True)


def say(client, text):
    """One turn of the dialogue, shown as it is said."""
    show(text, "C: ")
    client.send(text.replace("\n", "\r\n").encode() + b"\r\n")
    show(client.reply(), "S: ")


def offer_tls(stack, exchangers):
    """Gives each exchanger a certificate of its own."""
    if OPENSSL is None:
        sys.exit("demo: TLS needs openssl; install it, or leave TLS=1 out")
    authority = Authority(stack.enter_context(tempfile.TemporaryDirectory()))
    for exchanger in exchangers:
        exchanger.set(certificate=authority.certificate(exchanger.name))


def set_the_stage(stack, encrypted):
    """The world around the relay.  Returns the name server and the exchangers."""
    dns = Nameserver()
    stack.callback(dns.stop)
    near, far, spare = made = exchangers(3)
    for exchanger, name, delay in (near, "near", 0.005), (far, "far", 0.060), (spare, "spare", 0):
        stack.callback(exchanger.stop)
        exchanger.set(name=f"{name}.example.net", greeting_delay=delay)
    # Far comes first here, so that near cannot win by its place in the list.
    routes = [(10, far), (10, near), (20, spare)]
    dns.mail("example.net", *routes)
    if encrypted:
        offer_tls(stack, made)

    heading("The stage")
    show(f"name server        {dns.address}, which says that mail for example.net goes to")
    for preference, exchanger in routes:
        show(f"{exchanger.name:18} {exchanger.host}, preference {preference},"
             f" greets after {exchanger.greeting_delay * 1000:.0f} ms" + (", offers TLS" if encrypted else ""))
    return dns, made


def main(encrypted):
    if not BINARY.exists():
        sys.exit(f"demo: there is no {BINARY}; build it first, with make")
    with contextlib.ExitStack() as stack:
        dns, made = set_the_stage(stack, encrypted)
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "spool"
        relay = Relay("-v", spool=spool, dns=dns, mx_port=made[0].port)
        stack.callback(relay.stop)
        show(f"smtp               127.0.0.1:{relay.port}, the relay")

        heading("A client sends a message")
        client = Client(relay.port)
        show(client.greeting, "S: ")
        for text in SESSION:
            handed_over = time.monotonic()
            say(client, text)

        # The log has the client's dialogue as well, which has been shown.
        heading("The relay forwards it, and logs; the client has not even said QUIT")
        shown = 0

        def delivered():
            nonlocal shown
            lines = relay.log[shown:]
            shown += len(lines)
            for line in lines:
                if f":{client.local_port} " not in line and "listening on" not in line:
                    show(line)
            return not relay.queue() and [exchanger for exchanger in made if exchanger.messages]

        winner, = wait_for(delivered, timeout=8, what="the message at an exchanger")
        delivered()

        heading("The client leaves")
        say(client, "QUIT")

        message = winner.messages[0]
        heading(f"{winner.name} won, and this is what it has")
        show(f"from {message.reverse_path}, to {', '.join(message.recipients)}")
        if encrypted:
            show(f"by {message.connection.tls}, {message.connection.cipher}")
        show("")
        show(message.data.decode().rstrip().replace("\r\n", "\n"), "| ")
        print(f"\ndelivered in {(message.received - handed_over) * 1000:.0f} ms")


if __name__ == "__main__":
    try:
        main(encrypted=sys.argv[1:] == ["1"])
    except (AssertionError, OSError) as error:
        sys.exit(f"demo: not delivered: {error}")
