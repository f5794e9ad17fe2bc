"""How it is built, installed and described: by its sources, its Makefile, its usage,
the README and the manual."""
import os
import re
import shutil
import subprocess

import pytest

from lab import HOSTNAME, ROOT, Client, run

SOURCES = ("smtp.c", "dns.c", "forward.c")


# ---- The sources, building and installing -----------------------------------------------------


@pytest.mark.parametrize("word", [
    "_GNU_SOURCE", "_DEFAULT_SOURCE", "__attribute__", "__extension__", "__linux__", "__APPLE__", "__FreeBSD__", "_WIN32",
    "/proc", "/sys", "setlocale", "localtime", "mktime", "toupper", "tolower", "isalpha", "isdigit",
    "isspace", "MSG_NOSIGNAL", "SOCK_NONBLOCK", "SOCK_CLOEXEC", "accept4", "pipe2", "epoll", "inotify", "sendfile",
    "strlcpy", "asprintf", "getline", "err.h", "sys/cdefs", "alloca", "typeof"])
def test_what_the_sources_do_without(word):
    """Extensions, Linux alone, the locale and the time zone."""
    for name in (*SOURCES, "smtp.h"):
        text = re.sub(r"/\*.*?\*/", "", (ROOT / name).read_text(), flags=re.DOTALL)
        assert not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text), name


@pytest.fixture
def tree(tmp_path):
    """A copy of what the program is built from: tree("a")."""
    def copy(name):
        (tmp_path / name / "docs").mkdir(parents=True)
        for file in (*SOURCES, "smtp.h", "Makefile", "docs/smtp.8"):
            shutil.copy(ROOT / file, tmp_path / name / file)
        return tmp_path / name
    return copy


def make(tree, *arguments, **environment):
    for name in "make", "bmake":
        if shutil.which(name):
            subprocess.run([name, "-s", *arguments], cwd=tree, check=True, env={**os.environ, **environment},
                           stdin=subprocess.DEVNULL)
            return
    pytest.skip("there is no make here")


def test_two_builds_are_the_same_to_the_octet(tree):
    """In another place, at another time, in another zone."""
    first, second = tree("a"), tree("somewhere/else")
    make(first, TZ="UTC")
    for path in second.iterdir():
        os.utime(path, (0, 0))
    make(second, TZ="Asia/Kathmandu", LC_ALL="tr_TR.UTF-8")
    assert (first / "smtp").read_bytes() == (second / "smtp").read_bytes()


def test_make_binds_functions_at_the_start(tree):
    """Or each child that is forked would bind its functions anew."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    place = tree("a")
    make(place)
    dynamic = subprocess.run(["readelf", "-d", place / "smtp"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bNOW\b", dynamic)


def test_make_does_without_what_the_linker_does_not_know(tree):
    place = tree("a")
    compiler = place / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *,-z,*) echo "unknown option -z" >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    make(place, f"CC={compiler}")
    assert subprocess.run([place / "smtp", "-V"], capture_output=True).returncode == 0


@pytest.mark.parametrize("macros, program, manual", [
    ((), "usr/local/sbin/smtp", "usr/local/share/man/man8/smtp.8"),
    (("PREFIX=/usr",), "usr/sbin/smtp", "usr/share/man/man8/smtp.8"),
    (("SBINDIR=/sbin", "MANDIR=/usr/man"), "sbin/smtp", "usr/man/man8/smtp.8")])
def test_install_and_uninstall(tree, macros, program, manual):
    """The running program is replaced, not written into; what is not ours stays."""
    place = tree("a")
    destination = place.parent / "destination"
    arguments = (f"DESTDIR={destination}", "CFLAGS=-O0", *macros)
    make(place, *arguments, "install")
    installed = {path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()}
    assert installed == {program, manual}
    assert (destination / program).stat().st_mode & 0o777 == 0o755
    assert (destination / manual).stat().st_mode & 0o777 == 0o644
    assert (destination / manual).read_bytes() == (ROOT / "docs/smtp.8").read_bytes()
    said = subprocess.run([destination / program, "-V"], capture_output=True, text=True, check=True).stdout
    assert said == f"smtp {version()}\n"
    inode = (destination / program).stat().st_ino
    with (destination / program).open("rb"):
        make(place, *arguments, "install")
        assert (destination / program).stat().st_ino != inode
    (destination / program).with_name("other").touch()
    make(place, *arguments, "uninstall")
    make(place, *arguments, "uninstall")        # there is nothing left to do, and that is no failure
    assert [path.name for path in destination.rglob("*") if path.is_file()] == ["other"]


def version():
    return re.search(r'#define VERSION "(.*)"', (ROOT / "smtp.h").read_text())[1]


# ---- An empty directory -----------------------------------------------------------------------


def container_flags():
    """Those that the Containerfile's program is built with."""
    text = (ROOT / "docs/running/Containerfile").read_text()
    return " ".join(re.search(rf"{name}='(.*)'", text)[1] for name in ("CFLAGS", "LDFLAGS")).split()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may chroot")
@pytest.mark.parametrize("options", [(), ("-T", "must")], ids=["TLS if it can be had", "only by TLS"])
def test_a_static_program_in_an_empty_directory(world, authority, tmp_path, options):
    """Nothing is there but /dev/urandom: no passwd, no resolv.conf, no library, and no openssl.  It is small, too."""
    world.exchanger.set(certificate=authority.certificate(world.exchanger.name))
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    root = tmp_path / "root"
    root.mkdir()
    (root / "dev").mkdir()
    for path in root, root / "dev":
        path.chmod(0o755)
    subprocess.run(["mknod", "-m", "444", root / "dev/urandom", "c", "1", "9"], check=True)     # as the manual has it
    subprocess.run(["musl-gcc", *container_flags(), "-o", root / "smtp", *(ROOT / name for name in SOURCES)], check=True)
    assert (root / "smtp").stat().st_size < 170_000
    # Closed descriptors have nothing to stand for them but what the program finds there.
    command = ["sh", "-c", 'exec "$@" <&- >&-', "sh", "chroot", root, "/smtp", "-p", "0", "-q", "/spool", "-u", "64321",
               "-h", HOSTNAME, "-n", world.dns.address, "-P", str(world.exchanger.port), *options, "127.0.0.1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"listening on \S+:(\d+)", process.stderr.readline())[1])
        with Client(port) as client:
            assert client.deliver("a@example.org", ["b@example.net"], "x").startswith("250 ")
        line = next(line for line in process.stderr if " to=<b@example.net>" in line)
        assert line.endswith(" status=later (4.7.5 no TLS: openssl: No such file or directory)\n" if options else
                             " status=sent (250 2.0.0 Ok)\n")
        assert len(world.exchanger.messages) == (0 if options else 1)
        assert (root / "spool").stat().st_uid == (root / "spool").stat().st_gid == 64321
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


# ---- What is written about it -----------------------------------------------------------------


def usage_options():
    """{"-p": "port", "-v": "", ...}"""
    text = run("-h").stderr
    options = {"-l": ""}
    assert "smtp -l" in text
    # Options that take the same value may share a line: -r, -e time.
    for names, value in re.findall(r"(?<!\S)\(?((?:-\w, )*-\w)\b(?: (\S*))?", text.partition("serving")[2]):
        for name in names.split(", "):
            options.setdefault(name, value)
    return options


def readme_options():
    text = (ROOT / "README.md").read_text()
    return dict(re.findall(r"^\| `(-\w) ?([^`]*)` \|", text, re.MULTILINE))


def manual(section):
    return re.search(rf"^\.Sh {section}$(.*?)^\.Sh ", (ROOT / "docs/smtp.8").read_text(), re.MULTILINE | re.DOTALL)[1]


def manual_options(section, macro):
    """Those of lines such as `.It Fl p Ar port`."""
    text = manual(section).replace(" Ns Op : Ns Ar port", "[:port]")
    found = re.findall(rf"^\.{macro}Fl (\w)(?: Ar (\S+))?$", text, re.MULTILINE)
    return {f"-{letter}": value for letter, value in found}


def test_usage_readme_and_manual_have_the_same_options():
    options = usage_options()
    assert len(options) > 20
    assert readme_options() == options
    assert manual_options("DESCRIPTION", "It ") == options
    assert manual_options("SYNOPSIS", "(?:Op )?") == options


def test_usage_fits_a_screen():
    lines = run("-h").stderr.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", [("mandoc", "-T", "lint"), ("groff", "-mandoc", "-ww", "-T", "utf8")])
def test_the_manual_has_no_fault(command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    said = subprocess.run([*command, ROOT / "docs/smtp.8"], capture_output=True, text=True)
    faults = said.stderr + (said.stdout if "lint" in command else "")
    # Whether the pages that it refers to are installed here is no fault of its own.
    about_here = re.compile("mandoc.db|referenced manual not found")
    assert [line for line in faults.splitlines() if not about_here.search(line)] == []


def test_the_manual_has_all_its_sections():
    text = (ROOT / "docs/smtp.8").read_text()
    sections = re.findall(r"^\.S[hs] (.*)$", text, re.MULTILINE)
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "The spool", "SIGNALS", "FILES", "EXIT STATUS", "EXAMPLES",
                    "DIAGNOSTICS", "SEE ALSO", "STANDARDS"):
        assert section in sections


def test_what_the_manual_says_of_diagnoses_is_what_the_program_says():
    """Up to the first word that varies."""
    diagnoses = [item.split(" Ar ")[0] for item in re.findall(r"^\.It (.*)$", manual("DIAGNOSTICS"), re.MULTILINE)]
    code = "".join((ROOT / name).read_text() for name in SOURCES)
    assert len(diagnoses) > 8
    for diagnosis in diagnoses:
        words = diagnosis.replace("no user smtp or nobody to become", "no user %s to become")
        assert words in code, diagnosis
