"""The programs of docs/course: how they are found, built, started and talked to.

    with start("4", 0, spool) as server, server.client() as client:
        client.deliver(...)
"""
import atexit
import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import lab
from lab import ROOT, wait_for

COURSE = ROOT / "docs" / "course"
SOURCES = sorted(COURSE.glob("[1-6]-*.c"))
CHAPTERS = sorted(COURSE.glob("[1-6]-*.md"))
STRICT = ("-std=c99 -pedantic -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings"
          " -Werror -O2").split()
COMPILERS = [name for name in ("cc", "gcc", "clang", "musl-gcc", "tcc") if shutil.which(name)]


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


class Server:
    """One of the programs, running."""

    def __init__(self, program, *arguments, limit=None):
        self.port = lab.unused_port()
        self.lines = []                 # of its standard error
        self.printed = bytearray()      # its standard output
        command = [str(program), str(self.port), *map(str, arguments)]
        if limit is not None:
            command = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
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
                if not select.select([terminal], [], [], timeout)[0]:
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
