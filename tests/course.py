"""The programs of docs/course: how they are found, built, started and talked to.

    with start("4", 0, spool) as server, server.client() as client:
        client.deliver(...)
"""
import atexit
import contextlib
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import lab
from lab import ROOT, wait_for

COURSE = ROOT / "docs" / "course"
SOURCES = sorted(COURSE.glob("[1-6]-*.c"))
CHAPTERS = sorted(COURSE.glob("[1-6]-*.md"))
STRICT = ("-std=c99 -pedantic -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings"
          " -Werror -O2").split()
COMPILERS = [name for name in ("gcc", "clang", "musl-gcc", "tcc") if shutil.which(name)] or ["cc"]


def source(number, directory=COURSE):
    """The source of program `number` in a directory such as docs/course."""
    path, = Path(directory).glob(f"{number}-*.c")
    return path


def compile(path, output, compiler="cc", flags=()):
    subprocess.run([compiler, *flags, "-o", output, path], check=True, stdin=subprocess.DEVNULL)
    return output


_built = {}


def build(path):
    """A program of this source, built once with cc alone, as the chapters say."""
    path = Path(path).resolve()
    if path not in _built:
        directory = tempfile.mkdtemp(prefix="course-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        _built[path] = compile(path, Path(directory, path.stem))
    return _built[path]


_given = set()


def free_port():
    """A port of 127.0.0.1 that is free for TCP and UDP, and was not given before.  Not from
    the ports that the kernel gives to clients: one of these may be taken at any time."""
    for _ in range(1000):
        port = random.randrange(10000, 30000)
        if port in _given:
            continue
        _given.add(port)
        with contextlib.suppress(OSError), socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Server:
    """One of the programs, running."""

    def __init__(self, program, *arguments, limit=None):
        """`limit`: options of the shell's ulimit, such as "-n 30"."""
        self.port = free_port()
        self.lines = []                 # of its standard error
        self.printed = bytearray()      # its standard output
        command = [str(program), str(self.port), *map(str, arguments)]
        if limit is not None:
            command = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, start_new_session=True)
        self._readers = [threading.Thread(target=self._read, args=(stream,), daemon=True)
                         for stream in (self.process.stdout, self.process.stderr)]
        for reader in self._readers:
            reader.start()
        wait_for(lambda: self.lines or self.process.poll() is not None, what="the program listening")
        if self.process.poll() is not None:
            self.kill()

    def _read(self, stream):
        with stream:
            if stream is self.process.stdout:
                for chunk in iter(lambda: os.read(stream.fileno(), 65536), b""):
                    self.printed += chunk
            else:
                for line in stream:
                    self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))

    def client(self, **options):
        return lab.Client(self.port, **options)

    def logged(self, pattern):
        return [line for line in self.lines if re.search(pattern, line)]

    def kill(self):
        """kill -9, to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join(20)


@contextlib.contextmanager
def start(program, *arguments, **options):
    for _ in range(5):
        server = Server(program, *arguments, **options)
        if "cannot listen: Address already in use" not in server.lines:
            break
    try:
        if not server.logged("^listening on "):
            raise AssertionError(f"the program does not start: {server.lines}")
        yield server
    finally:
        server.kill()


def readable(file, timeout):
    """Whether there is something to read within so many seconds.  Not by select(), which
    chapter 2 is about: a test process may have more than 1,024 descriptors."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return poller.poll(timeout * 1000) != []


def telnet(port, turns, timeout=20):
    """Types at a telnet that sits at a terminal: each turn is what to type, and what to
    wait for behind it.  Returns all that the terminal has shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execlp("telnet", "telnet", "127.0.0.1", str(port))
    shown = ""
    try:
        for typed, expected in turns:
            os.write(terminal, typed.encode())
            seen = len(shown) if typed else 0
            while not re.search(expected, shown[seen:]):
                if not readable(terminal, timeout):
                    raise AssertionError(f"/{expected}/ was not shown after {typed!r}:\n{shown}")
                try:
                    shown += os.read(terminal, 4096).decode("utf-8", "replace")
                except OSError:     # Linux's word for the end of a terminal
                    raise AssertionError(f"telnet ended before /{expected}/:\n{shown}") from None
        return shown
    finally:
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- Chapters ----------------------------------------------------------------------------
#
# A block marked as `console` holds commands, each behind "$ " (its further lines behind
# "> "), and below each what it shows.  There "..." stands for any text in a line, and in a
# line by itself for any number of lines.

TOOLS = ("nc", "ps", "awk", "patch", "strace", "swaks", "telnet", "python3", "timeout", "mkfifo")
PORTS = re.compile(r"\b(2[56]\d\d|53\d\d)\b")      # what the chapters call their ports


def commands(path):
    """[(command, what it shows)] of a chapter."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", Path(path).read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append([line[2:], ""])
            elif line.startswith("> ") or line == ">":
                found[-1][0] += "\n" + line[2:]
            else:
                found[-1][1] += line + "\n"
    return found


def missing_tools(path):
    words = set(re.findall(r"[\w-]+", " ".join(command for command, _ in commands(path))))
    return [tool for tool in TOOLS if tool in words and shutil.which(tool) is None]


def _shown(text):
    """What a chapter shows, as a regular expression."""
    pattern = ""
    for line in text.splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.split("..."))) + "\n"
    return re.compile(pattern)


class Shell:
    """A shell, as the reader of a chapter has it before him: one for the whole chapter, in a
    copy of docs/course.  Ports are free ones in place of those of the chapter."""

    MARK = "----- done "

    def __init__(self, directory):
        for path in COURSE.iterdir():
            if path.is_file():
                shutil.copy(path, directory)
        self.ports = {}
        self._output = bytearray()
        self.process = subprocess.Popen(["sh"], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True,
                                        env={**os.environ, "LC_ALL": "C"})

    def _port(self, match):
        if match[0] not in self.ports:
            self.ports[match[0]] = str(free_port())
        return self.ports[match[0]]

    def run(self, command, shown, timeout=30):
        """Runs a command, and returns what it showed; waits until it shows what it has to."""
        self._output.clear()
        command = PORTS.sub(self._port, command).replace("../../tests", str(ROOT / "tests"))
        self.process.stdin.write(f"{{ {command}\n}} </dev/null\necho '{self.MARK}'\n".encode())
        self.process.stdin.flush()
        deadline, text = time.monotonic() + timeout, None
        while time.monotonic() < deadline:
            quiet = not readable(self.process.stdout, 0.1)
            if not quiet:
                chunk = os.read(self.process.stdout.fileno(), 65536)
                if not chunk:
                    break
                self._output += chunk
            text = self.text()
            if quiet and text and not text.endswith("\n"):     # as a last line may be, when all has come
                text += "\n"
            if text is not None and _shown(shown).fullmatch(text):
                break
        return text if text is not None else self._output.decode("utf-8", "replace")

    def text(self):
        text = self._output.decode("utf-8", "replace").replace("\r", "")
        if self.MARK + "\n" not in text:
            return None
        text = text.replace(self.MARK + "\n", "", 1)
        for name, port in self.ports.items():
            text = re.sub(rf"\b{port}\b", name, text)
        return text

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def play(path, directory):
    """Runs all commands of a chapter.  Returns the first that shows something else, as
    (command, expected, shown), or None."""
    shell = Shell(directory)
    try:
        for command, expected in commands(path):
            shown = shell.run(command, expected)
            if not _shown(expected).fullmatch(shown):
                return command, expected, shown
    finally:
        shell.close()
    return None
