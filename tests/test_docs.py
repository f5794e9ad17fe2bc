"""What the documents name is there."""
import re

import pytest

import portability
from lab import ROOT, run

DOCS = sorted(ROOT.glob("docs/**/*.md")) + [ROOT / "README.md"]
COURSE = "".join(path.read_text() for path in ROOT.glob("docs/course/*.c"))
IN_THE_COURSE = ROOT / "docs" / "course"
SOURCES = "".join((ROOT / name).read_text() for name in ("smtp.h", "smtp.c", "forward.c", "dns.c"))
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
OPTIONS = sorted(set(re.findall(r"(?<!\S)\(?-(\w)\b", run("-h").stderr)))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(path):
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", path.read_text()))
    assert [name for name in sorted(named) if f"def {name}(" not in TESTS] == []


# What pages may name beside functions of ours: what POSIX, C or Python has, and what a page suggests to write.
SYSTEM = set("""
    _encode _exit abort accept alarm bind close connect do_xwho exit fcntl ferror fflush flock fopen fork fprintf fstat
    fsync fwrite getaddrinfo getopt htonl htons inet_ntop listen malloc mkdir open pipe poll pselect read realloc recv
    rename renameat rewind select send setsockopt sigaction sigprocmask socket sscanf tmpfile transcript unlink vdprintf
    wait_for waitpid write
""".split())
NAME = r"\b([a-z_][a-z0-9_]*)\(\)"


def defined(name, sources):
    return re.search(rf"^(?:[a-z].*\W)?{re.escape(name)}\([^;]*$", sources, re.MULTILINE) is not None


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_functions_that_are_named_exist(path):
    """In the course also those of its programs; but what it says of the real one is about the real one."""
    text = re.sub(r"(?s)```(?:yaml|console).*?```", "", path.read_text())      # a CI has functions of its own
    here = re.search(r"(?s)^## In the real one$.*?(?=^## )", text, re.MULTILINE)
    unknown = set(re.findall(NAME, here[0] if here else "")) - SYSTEM
    unknown = {name for name in unknown if not defined(name, SOURCES)}
    sources = SOURCES + COURSE if path.parent == IN_THE_COURSE else SOURCES
    unknown |= {name for name in set(re.findall(NAME, text)) - SYSTEM if not defined(name, sources)}
    assert sorted(unknown) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tables_and_types_that_are_named_exist(path):
    text = path.read_text()
    named = re.findall(r"`((?:struct|enum|union) \w+)`", text)
    named += [name + "[" for name in re.findall(r"`(\w+)\[\]`", text)]
    assert [name for name in named if name not in SOURCES + COURSE] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_lines_that_are_quoted_exist(path):
    """Those in blocks that are marked as C; `...` is what was left out."""
    lines = {line.strip() for line in (SOURCES + COURSE).splitlines()}
    blocks = re.findall(r"^ *```c\n(.*?)^ *```$", path.read_text(), re.MULTILINE | re.DOTALL)
    quoted = [line.strip() for block in blocks for line in block.splitlines()]
    assert [line for line in quoted if line not in lines and line != "..."] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_option_is_explained_everywhere():
    readme = re.findall(r"^\| `-(\w)[ `]", (ROOT / "README.md").read_text(), re.MULTILINE)
    manual = re.findall(r"^\.It Fl (\w)", (ROOT / "docs" / "smtp.8").read_text(), re.MULTILINE)
    assert sorted(readme) == sorted(manual) == OPTIONS


def test_every_option_of_the_usage_text_is_taken():
    """getopt() has its letter."""
    assert [letter for letter in OPTIONS if "there is no option" in run(f"-{letter}").stderr] == []


def test_every_letter_for_getopt_is_explained():
    letters = re.search(r'getopt\(argc, argv, ":([^"]+)"\)', SOURCES)[1].replace(":", "")
    assert sorted(letters) == OPTIONS


def test_help_names_the_verbs():
    """All that do something."""
    rows = re.search(r"commands\[\] = \{\n(.*?)\n\};", SOURCES, re.DOTALL)[1]
    verbs = re.findall(r'^ *\{ "(\w+)", (?:do_(?!http)\w+|NULL, "2)', rows, re.MULTILINE)
    named = re.search(r'"214 2\.0\.0 ([A-Z ]+):', rows)[1].split()
    assert len(verbs) > 8 and sorted(named) == sorted(verb for verb in verbs if verb != "HELP")


def test_the_drawing_has_all_phases():
    phases = re.findall(r"^    ([A-Z]+)\b", re.search(r"enum phase \{\n(.*?)\n\};", SOURCES, re.DOTALL)[1], re.MULTILINE)
    text = (ROOT / "docs" / "reading.md").read_text()
    drawing = text.partition("\n## The phases of a session\n")[2].partition("\n## ")[0]
    assert len(phases) > 8 and [phase for phase in phases if not re.search(rf"\b{phase}\b", drawing)] == []


def test_the_index_of_fixtures_is_whole():
    fixtures = re.findall(r"@pytest\.fixture.*\ndef (\w+)", (ROOT / "tests" / "conftest.py").read_text())
    section = (ROOT / "docs" / "changing.md").read_text().partition("\n## The tests' fixtures\n")[2]
    rows = re.findall(r"^\| (`.*?) \| ", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(fixtures)


def test_the_matrix_is_that_of_make_portability():
    """Its rows are cells, in their order, and none failed."""
    text = portability.PAGE.read_text().partition(portability.BEGIN)[2].partition(portability.END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    names = [row[0].partition(" (")[0] for row in rows]
    assert names != [] and names == [cell.name for cell in portability.CELLS if cell.name in names]
    for name, compiler, *figures in rows:
        if not compiler.startswith(("not to be had", "cannot carry it")):
            octets, warnings, passed, failed = (int(figure.replace(",", "")) for figure in figures[:4])
            assert octets > 0 and warnings == failed == 0 and passed > 500, name
