"""The soak: under load, all of the relay is killed at random moments.

    python3 tests/crash.py 300        that many rounds; status 1 if a message was lost

Every round starts the relay on the same spool, lets clients send to it, kills one of
its processes (the queue manager, a batch, a transaction's child) and then the whole
process group with SIGKILL.  At the end the relay is left to empty its
queue, and every message is accounted for: what was acknowledged has arrived,
and whole.  What arrived twice was hit between the exchanger's 250 and its
record, the one window in which that may happen: the relay was killed between
the two arrivals, and has logged but one of them as sent.
"""
import collections
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import lab

CLIENTS = 6
LIFE = 0.6          # seconds a relay lives at most


def message_id(message):
    """The name that the relay gave it."""
    return re.search(rb"\bid (\S+);", message.data)[1].decode()


def was_hit(kills, messages):
    """Whether the relay was killed between the arrivals of what should be one message."""
    times = sorted(message.received for message in messages)
    return all(any(first <= kill <= second for kill in kills) for first, second in zip(times, times[1:]))


class Soak:
    """Rounds of a relay's life, and what came of the messages sent in them."""

    def __init__(self, spool):
        self.spool = spool
        self.dns = lab.Nameserver()
        self.exchangers = lab.exchangers(2)
        self.dns.mail("example.net", *((10, each) for each in self.exchangers))
        for exchanger in self.exchangers:
            exchanger.set(replies={("RCPT", "<b@example.com>"): self._sometimes_later})
        self.dns.mail("example.com", (10, self.exchangers[0]))
        self.acknowledged = set()       # the numbers of messages answered with 250
        self.sent = 0
        self.kills = []                 # when, by time.monotonic()
        self._lock = threading.Lock()
        self._relay = None

    @staticmethod
    def _sometimes_later(_):
        return random.choice((None, "451 4.7.1 greylisted"))

    @staticmethod
    def body(number):
        """A text that shows whose it is, and whether it is whole."""
        return f"Subject: {number}\n\n" + f"line of {number}\n" * (number % 500) + "the end\n"

    def start(self):
        if self._relay is None:
            self._relay = lab.Relay("-r", 1, "-w", 5, spool=self.spool, dns=self.dns,
                                    mx_port=self.exchangers[0].port)
        else:
            self._relay.start()

    def round(self):
        self.start()
        clients = [threading.Thread(target=self._send) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(random.uniform(0, LIFE / 2)) # not to wait for anything: to hit anything
        self._kill_one()
        time.sleep(random.uniform(0, LIFE / 2))
        self._relay.kill()
        self.kills.append(time.monotonic())     # by now nothing of it runs
        for client in clients:
            client.join()

    def _kill_one(self):
        """Any process of the relay but the server, if there is one just now."""
        family = lab.children(self._relay.pid)
        family += [batch for child in family for batch in lab.children(child)]
        if family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(family), signal.SIGKILL)
                self.kills.append(time.monotonic())

    def _send(self):
        """Sends until the relay is no more."""
        try:
            with lab.Client(self._relay.port) as client:
                while True:
                    with self._lock:
                        self.sent += 1
                        number = self.sent
                    recipients = ["a@example.net", "b@example.com"][:1 + number % 2]
                    if client.deliver("nour@example.org", recipients, self.body(number)).startswith("250"):
                        self.acknowledged.add(number)
        except (OSError, AssertionError):
            pass

    def drain(self):
        """Lets the relay finish its work, now that nobody puts it off."""
        for exchanger in self.exchangers:
            exchanger.set(replies={})
        self.start()
        try:
            left = len(self._relay.queue())
            while left:         # thousands of messages take their time: each message fewer is a good sign
                lab.wait_for(lambda: self._left() < left, 60, f"fewer than {left} messages in the queue")
                left = self._left()
        finally:
            self._relay.stop()
            for exchanger in self.exchangers:
                exchanger.stop()
            self.dns.stop()

    def _left(self):
        self._relay.hangup()
        time.sleep(0.1)         # while it looks through a long queue it forwards nothing
        return len(self._relay.queue())

    def account(self):
        """Returns (lost, cut, duplicates, unexplained), each a list of
        (message, recipient)."""
        arrivals, cut = collections.defaultdict(list), []
        for exchanger in self.exchangers:
            for message in exchanger.messages:
                number = int(re.search(rb"Subject: (\d+)", message.data)[1])
                for recipient in message.recipients:
                    arrivals[number, recipient].append(message)
                if not message.data.endswith(self.body(number).replace("\n", "\r\n").encode()):
                    cut.append((number, message.recipients))
        logged = collections.Counter(match.groups() for match in self._relay.logged(
            r"^(\S+) to=(<\S+>) relay=\S+ delay=\d+ status=sent "))
        owed = [(number, recipient) for number in self.acknowledged
                for recipient in ["<a@example.net>", "<b@example.com>"][:1 + number % 2]]
        lost = [each for each in owed if each not in arrivals]
        duplicates = [each for each, messages in arrivals.items() if len(messages) > 1]
        unexplained = [each for each in duplicates
                       if logged[message_id(arrivals[each][0]), each[1]] > 1 or not was_hit(self.kills, arrivals[each])]
        return lost, cut, duplicates, unexplained


def soak(spool, rounds):
    """Returns the Soak after so many rounds, all its mail delivered."""
    it = Soak(spool)
    for _ in range(rounds):
        it.round()
    it.drain()
    return it


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        it = soak(Path(directory) / "spool", rounds)
    lost, cut, duplicates, unexplained = it.account()
    print(f"{rounds} rounds, {it.sent} messages begun, {len(it.acknowledged)} acknowledged: "
          f"{len(lost)} lost, {len(cut)} cut, {len(duplicates)} duplicates, "
          f"{len(unexplained)} of them outside the window")
    sys.exit(bool(lost or cut or unexplained))


if __name__ == "__main__":
    main()
