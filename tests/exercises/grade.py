"""Grades an exercise of docs/course/exercises.md: make exercise N=7.

Each function below is the test of one.  It looks at a tree of files, this one if no other
is named, and says in words what is missing.  Do not read on if you want to find out
yourself: a test tells what to do as clearly as the text does.
"""
import contextlib
import os
import pwd
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import course                                               # noqa: E402
from lab import (RESPONSE, ROOT, TO_QUESTION, Exchanger, Nameserver, Relay,         # noqa: E402
                 encode_name, exchangers, header, loopback, query_id, question, wait_for)


class Missing(Exception):
    """What is missing, in words."""


def need(condition, words):
    if not condition:
        raise Missing(words)


def within(seconds, condition, words):
    """Waits for it."""
    try:
        return wait_for(condition, seconds)
    except AssertionError:
        raise Missing(words) from None


class Tree:
    """A copy of the project, or the project itself."""

    def __init__(self, root):
        self.root = Path(root)
        self.course = self.root / "docs" / "course"
        self.scratch = tempfile.TemporaryDirectory()
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.scratch.cleanup)

    def path(self, name):
        return Path(self.scratch.name, name)

    def build(self, number, changes=()):
        """Program `number`, with some pieces of its text replaced first."""
        source = course.source(number, self.course)
        text = source.read_text()
        for old, new in changes:
            if old not in text:
                raise Missing(f"{source.name} has no longer the line that this exercise is about: {old.strip()}")
            text = text.replace(old, new)
        copy = Path(tempfile.mkdtemp(dir=self.scratch.name), source.name)
        copy.write_text(text)
        done = subprocess.run(["cc", "-o", copy.with_suffix(""), copy], capture_output=True, text=True)
        need(done.returncode == 0, f"{source.name} does not compile:\n{done.stderr}")
        return copy.with_suffix("")

    def start(self, program, *arguments, **options):
        return self.stack.enter_context(course.start(program, *arguments, **options))

    def run(self, number, *arguments, changes=(), **options):
        return self.start(self.build(number, changes), *arguments, **options)

    def client(self, server, **options):
        return self.stack.enter_context(server.client(**options))

    def exchanger(self, **behaviour):
        made = Exchanger(loopback(), **behaviour)
        self.stack.callback(made.stop)
        return made

    def spool(self):
        return self.path("spool")

    def file(self, name, words):
        path = self.course / name
        need(path.exists(), f"docs/course/{name} is not there: {words}")
        return path


def files(directory):
    return sorted(path.name for path in directory.iterdir())


LETTER = "Subject: hello\n\nDear Nour\n"


def deliver(client, *recipients, letter=LETTER):
    return client.deliver("nour@example.org", recipients or ["friend@example.net"], letter)


# ---- The exercises ------------------------------------------------------------------------


def exercise_1(tree):
    """count"""
    server = tree.run(1)
    for commands in 1, 4:
        client = tree.client(server)
        for _ in range(commands - 1):
            client.say("NOOP")
        said = client.say("QUIT")
        need(said == f"221 2.0.0 OK, commands: {commands}",
             f"after {commands} commands, QUIT among them, QUIT was answered {said!r};"
             f" it has to be '221 2.0.0 OK, commands: {commands}'")


def exercise_2(tree):
    """address"""
    server = tree.run(1)
    for address in "127.0.0.1", "127.0.0.7":
        client = tree.client(server, source=address)
        client.say("QUIT")
        line = f"client {address}:{client.local_port}"
        within(2, lambda: line in server.lines,
               f"a client came from {address} port {client.local_port}, and the program's standard error has no line"
               f" '{line}'; it has {server.lines[1:]}")


def exercise_3(tree):
    """idle"""
    try:
        server = tree.run(2, 1)
    except AssertionError as error:
        raise Missing(f"./2-many-clients does not take the seconds as its second argument: {error}") from None
    silent, busy = tree.client(server), tree.client(server)
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        need(busy.say("NOOP") == "250 2.0.0 Ok", "a client that says something is not served any more")
        time.sleep(0.2)
    need(course.readable(silent.sock, 5),
         "a client has been silent for longer than the one second of the second argument, and nothing happens")
    said = silent.line()
    need(said == b"421 4.4.2 Error: timeout exceeded",
         f"a client that was silent for too long heard {said!r} in place of '421 4.4.2 Error: timeout exceeded'")
    need(silent.eof(), "behind the 421 the connection stays open")
    need(busy.say("NOOP") == "250 2.0.0 Ok", "a client that says something every 200 ms was closed, too")


def exercise_4(tree):
    """poll"""
    source = re.sub(r"/\*.*?\*/", "", course.source(2, tree.course).read_text(), flags=re.DOTALL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))     # of this process, which has the clients
    server = tree.run(2, limit="-n 1500")
    clients = [tree.client(server, greeting=False) for _ in range(1400)]
    within(20, lambda: course.readable(clients[-1].sock, 0),
           "of 1400 clients the last one is not greeted: there must be no limit but that of open files, 1500 here")
    for client in clients[::100]:
        client.reply()
        need(client.say("NOOP") == "250 2.0.0 Ok", "one of 1400 clients is not served")
    need(not re.search(r"\bselect\(|\bFD_SET\(", source), "there is still a select() or an FD_SET() in the program")


def exercise_5(tree):
    """help"""
    server = tree.run(3)
    client = tree.client(server)
    said = client.say("HELP")
    need(said.startswith("214 "), f"HELP is answered {said!r}; it has to be a reply that begins with 214")
    rows = re.search(r"commands\[\] = \{(.*?)\n\};", course.source(3, tree.course).read_text(), re.DOTALL)[1]
    for verb in re.findall(r'\{ "([A-Z]+)', rows):
        need(verb in said.split(), f"the reply to HELP does not name {verb}, which is in the table: {said!r}")
    need(client.say("help me").startswith("214 "), "help, in small letters and with an argument, is not answered 214")


def exercise_6(tree):
    """messages"""
    server = tree.run(3)
    for count in 0, 1, 3:
        client = tree.client(server)
        for _ in range(count):
            deliver(client)
        client.say("HELO me.com")
        if count:
            deliver(client, letter=b"a bare\nline end\r\n")         # refused
        said = client.say("QUIT")
        need(said == f"221 2.0.0 OK, messages: {count}",
             f"{count} messages were taken{' and one refused' * bool(count)}, and QUIT was answered {said!r};"
             f" it has to be '221 2.0.0 OK, messages: {count}'")


def exercise_7(tree):
    """no dot"""
    server = tree.run(3)
    client = tree.client(server)
    client.say("HELO me.com")
    client.say("MAIL FROM:<root@localhost>")
    for path in "<friend@localhost>", "<a.b@c>":
        said = client.say(f"RCPT TO:{path}")
        need(said.startswith("550 5.1.2 "),
             f"RCPT TO:{path} is answered {said!r}: its domain has no dot, so it has to be 550 5.1.2 and some words")
    said = client.say("DATA")
    need(said.startswith("503 "), f"DATA is answered {said!r} when the only recipients were refused; it has to be 503")
    said = client.say("RCPT TO:<friend@example.net>")
    need(said == "250 2.1.5 Ok", f"RCPT TO:<friend@example.net> is answered {said!r}, and it should be taken")


KIND = [("    for (size_t i = 1; i < size; i++)\n        if (bytes[i - 1] == '\\r' && bytes[i] == '\\n')\n"
         "            return i + 1;",
         "    for (size_t i = 0; i < size; i++)\n        if (bytes[i] == '\\n' || bytes[i] == '\\r')\n"
         "            return i + 1 + (bytes[i] == '\\r' && i + 1 < size && bytes[i + 1] == '\\n');"),
        ('if (strcspn(s->in, "\\r\\n") != size - 2)', 'if (s->in[strcspn(s->in, "\\r\\n")] == 0)'),
        ("if (size != 3 || s->in", 'if (strcspn(s->in, "\\r\\n") != 1 || s->in')]


def exercise_8(tree):
    """smuggle"""
    script = tree.file("smuggle.sh", "it is to print the octets of a message")
    letter = subprocess.run(["sh", script], stdout=subprocess.PIPE, timeout=10).stdout
    need(b"\n" not in letter.replace(b"\r\n", b""),
         "there is an LF without a CR before it in the letter: the server in the middle refuses these")
    need(letter.endswith(b"\r\n"), "the letter does not end with CR LF")
    need(b"\r\n.\r\n" not in letter, "the letter holds CR LF . CR LF, where every server sees its end")
    server = tree.run(3, changes=KIND)
    client = tree.client(server)
    for command in "HELO me.com", "MAIL FROM:<mallory@example.org>", "RCPT TO:<friend@example.net>", "DATA":
        client.say(command)
    client.send(letter + b".\r\nQUIT\r\n")
    while client.line() is not None:
        pass
    with contextlib.suppress(AssertionError):
        wait_for(lambda: b"dismissed" in server.printed, 2)
    printed = server.printed.decode("latin-1")
    need("MAIL FROM:<boss@example.net>\r\nRCPT TO:<all@example.net>\r\n" in printed,
         "the server that takes CR alone for a line end has printed no message from <boss@example.net> to"
         f" <all@example.net>; it has printed:\n{printed}")
    need("Subject: You are all dismissed" in printed, "the smuggled message has no 'Subject: You are all dismissed'")
    strict = tree.run(3)
    with strict.client() as client:
        need(client.deliver("a@example.org", ["b@example.net"], letter).startswith("550 "),
             "program 3 itself does not refuse the letter any more")


def exercise_9(tree):
    """which fsync"""
    check = tree.file("check.sh", "it is to be the test that you write")
    faults = [
        ("as it is", [], 0),
        ("without fsync() of the file", [(" && fsync(fileno(s->draft)) == 0", "")], 1),
        ("without fsync() of the directory", [("\n        && fsync(queue_dir) == 0;", ";")], 1),
        ("with fsync() of the directory before the renameat()", [
            ("\n        && fsync(queue_dir) == 0;", ";"),
            ("&& renameat(", "&& fsync(queue_dir) == 0 && renameat(")], 1)]
    for words, changes, expected in faults:
        program = tree.build(4, changes)
        directory = Path(tempfile.mkdtemp(dir=tree.scratch.name))
        done = subprocess.run(["sh", check, program, str(course.free_port())], cwd=directory, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60,
                              env={**os.environ, "COURSE": str(tree.course)})
        need(done.returncode == expected,
             f"given program 4 {words}, check.sh ends with {done.returncode}, and it has to end with {expected};"
             f" it said:\n{done.stdout}{done.stderr}")


def exercise_10(tree):
    """stale drafts"""
    server = tree.run(4, tree.spool())
    client = tree.client(server)
    reply = deliver(client)
    client.say("MAIL FROM:<a@example.org>")
    need(len(files(tree.spool() / "tmp")) == 1, "a message that has begun is not in tmp/")
    server.kill()
    (tree.spool() / "tmp" / "notes").mkdir()
    tree.run(4, tree.spool())
    left = files(tree.spool() / "tmp")
    need("notes" in left, "a directory in tmp/ was removed: remove files only")
    need(left == ["notes"], f"a draft of the run before is still in tmp/ when the program listens again: {left}")
    need(files(tree.spool() / "queue") == [reply.rpartition(" ")[2]], "the message in queue/ is not there any more")


def exercise_11(tree):
    """give up"""
    exchanger = tree.exchanger(replies={"RCPT": "451 4.7.1 not now"})
    queue = tree.spool() / "queue"
    queue.mkdir(parents=True)
    for name, days in ("1-1-1", 6), ("1-1-2", 4):
        (queue / name).write_bytes(b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nx\r\n.\r\n")
        os.utime(queue / name, (time.time() - days * 86400,) * 2)
    server = tree.run(5, tree.spool(), exchanger.host, exchanger.port)
    within(10, lambda: len(server.logged("TO:<b@example.net> [(]451 4.7.1 not now")) == 2,
           "not each of two messages in the queue was tried, and has its line in the log")
    within(5, lambda: files(tree.spool() / "failed") == ["1-1-1"],
           "a message that is six days old, and was tried in vain, has to be in failed/; there is "
           + " ".join(files(tree.spool() / "failed") or ["nothing"]))
    need(files(queue) == ["1-1-2"], "a message that is only four days old has to stay in the queue")


def exercise_12(tree):
    """goodbye"""
    exchanger = tree.exchanger()
    server = tree.run(5, tree.spool(), exchanger.host, exchanger.port)
    client, other = tree.client(server), tree.client(server)
    deliver(client)
    server.process.terminate()
    for one in client, other:
        need(course.readable(one.sock, 5), "after SIGTERM a client is neither told anything nor closed")
        said = one.line()
        need(said is not None and said.startswith(b"421 4.3.2 "),
             f"after SIGTERM a client hears {said!r}; it has to be a reply that begins with 421 4.3.2")
    status = within(5, lambda: server.process.poll() is not None and [server.process.returncode],
                    "the program still runs 5 seconds after SIGTERM")
    need(status == [0], f"after SIGTERM the program ends with {status[0]}; it has to be 0")
    within(10, lambda: exchanger.messages, "a message that was acknowledged did not arrive")


def exercise_13(tree):
    """TXT"""
    dns = Nameserver()
    tree.stack.callback(dns.stop)
    texts = ["v=spf1 mx -all", "a second string", "x" * 255]

    def answer(query):
        wire = b"".join(bytes([len(text)]) + text.encode() for text in texts[:2])
        records = [(TO_QUESTION, wire), (encode_name("other.example"), bytes([255]) + texts[2].encode())]
        body = b"".join(owner + b"\0\x10\0\x01\0\0\0\x3c" + len(data).to_bytes(2, "big") + data
                        for owner, data in records)
        return header(query_id(query), RESPONSE, 1, 2) + question(query) + body

    dns.raw("example.net", answer)
    host, port = dns.address.split(":")
    program = tree.build(6)
    done = subprocess.run([program, "-t", "example.net", host, port], capture_output=True, text=True, timeout=20)
    need([query.type for query in dns.queries][:1] == ["16"],
         f"./6-relay -t example.net {host} {port} asked no question of type 16, TXT; it said:\n"
         + done.stdout + done.stderr)
    need(done.stdout.splitlines() == texts, f"it printed {done.stdout.splitlines()}; the strings are {texts}")
    dns.rcode("nowhere.example", 3)
    done = subprocess.run([program, "-t", "nowhere.example", host, port], capture_output=True, text=True, timeout=20)
    need(done.returncode == 1, f"for a name that does not exist it ended with {done.returncode}; it has to be 1")


def exercise_14(tree):
    """one transaction"""
    exchanger = tree.exchanger(replies={("RCPT", "<no@example.net>"): "550 5.1.1 no such user",
                                        ("RCPT", "<later@example.net>"): ["451 4.7.1 not now"]})
    server = tree.run(5, tree.spool(), exchanger.host, exchanger.port)
    client = tree.client(server)
    deliver(client, "a@example.net", "no@example.net", "later@example.net", "b@example.net")
    within(10, lambda: len(server.logged(r"<\w+@example\.net>")) >= 4,
           "not each of four recipients has its line in the log")
    need([message.recipients for message in exchanger.messages] == [["<a@example.net>", "<b@example.net>"]],
         "the two recipients that were accepted have to get the message in one transaction; the exchanger has taken "
         f"messages for {[message.recipients for message in exchanger.messages]}")
    text = (tree.spool() / "queue" / files(tree.spool() / "queue")[0]).read_text().partition("\nDATA\n")[0]
    need(text.splitlines()[1:] == ["SENT TO:<a@example.net>", "FAIL TO:<no@example.net>", "RCPT TO:<later@example.net>",
                                   "SENT TO:<b@example.net>"],
         f"each recipient has to have its own outcome; the file begins with:\n{text}")
    within(10, lambda: os.kill(server.process.pid, signal.SIGALRM) or len(exchanger.messages) == 2,
           "the recipient that was refused with 451 is not tried again")
    need(exchanger.messages[1].recipients == ["<later@example.net>"],
         f"the second try was for {exchanger.messages[1].recipients}; only <later@example.net> was left")


def exercise_15(tree):
    """forge"""
    forger = tree.file("forge.py", "it is to be your forger")
    victim = course.free_port()
    near, evil = exchangers(2)
    dns = Nameserver()
    for one in near, evil, dns:
        tree.stack.callback(one.stop)
    dns.mail("example.net", (10, near))
    dns.delay("example.net", 2, "MX")
    dns.a("evil.example.net", evil.host)
    weak = [("        if (read(random, query, 2) != 2)\n", f"""
        struct sockaddr_in a = {{ .sin_family = AF_INET, .sin_port = htons({victim}) }};

        bind(fd, (struct sockaddr *)&a, sizeof a);
        if (read(random, query + 1, 1) != 1)
"""), ("        connect(fd, (struct sockaddr *)&nameserver, sizeof nameserver);\n", ""),
            ("send(fd, query, size, 0);",
             "sendto(fd, query, size, 0, (struct sockaddr *)&nameserver, sizeof nameserver);")]
    server = tree.run(6, tree.spool(), *dns.address.split(":"), evil.port, changes=weak)
    process = subprocess.Popen([sys.executable, forger, str(victim)], stdout=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    tree.stack.callback(process.wait)
    tree.stack.callback(process.kill)
    for _ in range(5):
        deliver(tree.client(server))
        if wait_until(lambda: near.messages or evil.messages) and evil.messages:
            return
        near.messages.clear()
    raise Missing("five messages went to the true exchanger; none went to evil.example.net. The resolver of this"
                  f" exercise asks from port {victim}, its first argument to forge.py, with an id from 0 to 255")


def real(tree):
    """The program itself, built from the tree."""
    binary = tree.path("smtp")
    done = subprocess.run(["cc", "-o", binary, *(tree.root / name for name in ("smtp.c", "dns.c", "forward.c"))],
                          capture_output=True, text=True)
    need(done.returncode == 0, f"the program does not compile:\n{done.stderr}")

    def start(*options, **settings):
        relay = Relay(*options, binary=binary, spool=tree.spool(), **settings)
        tree.stack.callback(relay.stop)
        return relay
    return start


def exercise_16(tree):
    """a verb of the real one"""
    relay = real(tree)()
    client = relay.client()

    def ask(when):
        said, wanted = client.say("XWHO"), f"250 2.0.0 127.0.0.1:{client.local_port}"
        need(said == wanted, f"{when}, XWHO is answered {said!r}; it has to be {wanted!r}")

    ask("before HELO")
    client.say("HELO me.com")
    client.say("MAIL FROM:<a@example.org>")
    ask("inside a transaction")
    need(client.say("RCPT TO:<b@example.net>") == "250 2.1.5 Ok", "behind XWHO the transaction is gone")
    said = client.say("XWHO me")
    need(said == "501 5.5.4 Syntax: XWHO",
         f"with an argument, XWHO is answered {said!r}; it has to be '501 5.5.4 Syntax: XWHO'")
    need("XWHO" in re.findall(r"\w+", client.say("HELP")), "HELP does not name XWHO")


def exercise_17(tree):
    """old mail"""
    exchanger = tree.exchanger(replies={"RCPT": "451 4.7.1 not now"})
    start = real(tree)
    old = tree.spool() / "queue" / "20260101T000000.000001-1-1"
    old.parent.mkdir(parents=True)
    for directory in tree.spool(), old.parent:
        directory.chmod(0o700)
    old.write_bytes(f"HELO me.com\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@[{exchanger.host}]>\r\n"
                    "DATA\r\nx\r\n.\r\n".encode())
    os.utime(old, (0, 0))
    if os.geteuid() == 0:
        user = "nobody"
        with contextlib.suppress(LookupError):
            user = pwd.getpwnam("smtp").pw_name
        for path in tree.spool(), old.parent, old:
            os.chown(path, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        os.chmod(tree.scratch.name, 0o755)
    relay = start(mx_port=exchanger.port)
    fresh = relay.send(f"b@[{exchanger.host}]")
    for id in old.name, fresh:
        within(10, lambda: relay.logged(f"^{id} to=.* status=later"),
               f"message {id} was not tried; the log:\n" + "\n".join(relay.log))
    within(3, lambda: relay.logged(f"^{old.name} warning: waiting for [0-9]+ hours$"),
           f"there is no line '{old.name} warning: waiting for 24 hours', or so many, in the log:\n"
           + "\n".join(relay.log))
    relay.stop()
    need(not relay.logged(f"^{fresh} warning"), "a message that has just come is called old, too")


def wait_until(condition):
    with contextlib.suppress(AssertionError):
        return wait_for(condition, 15)


EXERCISES = {int(name[9:]): test for name, test in list(globals().items()) if name.startswith("exercise_")}


def solution(number):
    """The patch that solves an exercise, for a copy of the project."""
    path, = HERE.glob(f"{number:02}-*.diff")
    return path


def grade(number, root=ROOT):
    """None when the exercise is solved in this tree; else what is missing, in words."""
    tree = Tree(root)
    try:
        with tree.stack:
            EXERCISES[number](tree)
    except Missing as missing:
        return str(missing)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return f"the session came to an end that it should not have: {error}"
    return None


def main(arguments):
    if len(arguments) not in (1, 2) or not arguments[0].isdigit() or int(arguments[0]) not in EXERCISES:
        sys.exit(f"make exercise N=7: N is the number of an exercise, 1 to {max(EXERCISES)};"
                 " they are in docs/course/exercises.md")
    missing = grade(int(arguments[0]), *arguments[1:])
    if missing is not None:
        sys.exit(f"exercise {arguments[0]}: not yet.\n{missing}")
    print(f"exercise {arguments[0]}: done.")


if __name__ == "__main__":
    main(sys.argv[1:])
