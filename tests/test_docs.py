"""What the documents name is there."""
import re

import pytest

import portability
from lab import ROOT, run

DOCS = sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"]
SOURCES = "".join((ROOT / name).read_text() for name in ("smtp.h", "smtp.c", "forward.c", "dns.c"))
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
OPTIONS = sorted(set(re.findall(r"(?<!\S)\(?-(\w)\b", run("-h").stderr)))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(path):
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", path.read_text()))
    assert [name for name in sorted(named) if f"def {name}(" not in TESTS] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_functions_that_are_named_exist(path):
    """Those of ours: what is not in the source is a system's, and has no business in a page that names it alone."""
    text = re.sub(r"(?s)```yaml.*?```", "", path.read_text())      # a CI has functions of its own
    named = set(re.findall(r"\b([a-z_]+)\(\)", text))
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\(", SOURCES)] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_option_is_explained_everywhere():
    readme = re.findall(r"^\| `-(\w)[ `]", (ROOT / "README.md").read_text(), re.MULTILINE)
    manual = re.findall(r"^\.It Fl (\w)", (ROOT / "docs" / "smtp.8").read_text(), re.MULTILINE)
    assert sorted(readme) == sorted(manual) == OPTIONS


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
