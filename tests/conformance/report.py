"""The report: what a server does of what the RFCs ask, as text, as JSON, as a page, and for CI as JUnit's XML."""
import html
import inspect
import json
import re
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

VERDICTS = ("pass", "fail", "n/a", "error")
LEVELS = ("MUST", "SHOULD")

# The sections of RFC 5321 that have tests, and the other RFCs.
TITLES = {
    "2.2": "The extension model", "2.3": "Terminology", "2.4": "Syntax principles", "3.1": "Session initiation",
    "3.2": "Client initiation", "3.3": "Mail transactions", "3.5": "VRFY and EXPN", "3.6": "Relaying",
    "3.7": "Gatewaying", "3.8": "Closing connections", "4.1": "Commands", "4.2": "Replies", "4.3": "Sequences",
    "4.4": "Trace information", "4.5": "Minimum, transparency, sizes", "6.3": "Loops", "6.4": "Irregularities",
    "7.2": "Blind copies", "7.3": "VRFY and security",
    "1870": "SIZE", "2034": "ENHANCEDSTATUSCODES", "2920": "PIPELINING", "3030": "CHUNKING, BINARYMIME",
    "3207": "STARTTLS", "3461": "DSN", "4954": "AUTH", "6152": "8BITMIME", "6531": "SMTPUTF8"}


def matches(number, word):
    """Whether a requirement, without its R-, is this one or of this section or RFC."""
    return re.match(rf"(?:R-)?{re.escape(word)}(?![\w])", number) is not None


class Requirement(NamedTuple):
    rfc: str
    section: str
    id: str         # R-4.1.1.5-b, or R-1870-6.1-a where the RFC is another than 5321
    level: str
    title: str
    rule: str

    @staticmethod
    def named(name):
        """What the name of a test says: RFC, section, id, title."""
        rfc, section, letter, title = re.match(r"test_(?:rfc(\d+)_)?((?:\d+_)+)([a-z])_(.*)", name).groups()
        section = section.strip("_").replace("_", ".")
        return (rfc or "5321", section, f"R-{rfc + '-' if rfc else ''}{section}-{letter}",
                title.replace("_s_", "'s ").replace("_", " "))

    @classmethod
    def of(cls, item):
        """What a test says of itself: by its name, its mark and its docstring."""
        rfc, section, number, title = cls.named(item.name)
        level, = (level for level in LEVELS if item.get_closest_marker(level.lower()))
        return cls(rfc, section, number, level, title, " ".join(inspect.getdoc(item.function).split()))

    def among(self, words):
        """Whether it is asked for.  None: all are."""
        return words is None or any(matches(self.id, word) for word in words)

    @property
    def chapter(self):
        """The heading it is counted under."""
        if self.rfc != "5321":
            return f"RFC {self.rfc} {TITLES[self.rfc]}"
        number = ".".join(self.section.split(".")[:2])
        return f"{number} {TITLES[number]}"

    @property
    def order(self):
        return self.rfc != "5321", int(self.rfc), [int(n) for n in self.section.split(".")], self.id


class Result(NamedTuple):
    requirement: Requirement
    verdict: str
    reason: str         # of what is not a pass
    transcript: str
    seconds: float = 0


class Outcome:
    """All results of a run, and how they count."""

    def __init__(self, server, results, known=(), strict=False):
        self.server, self.known, self.strict = server, dict(known), strict
        self.results = sorted(results, key=lambda result: result.requirement.order)

    def of(self, verdict):
        return [result for result in self.results if result.verdict == verdict]

    def is_known(self, result):
        return result.requirement.id in self.known

    def counts(self, result):
        """Whether it fails the run."""
        return (result.verdict == "fail" and not self.is_known(result)
                and (self.strict or result.requirement.level == "MUST"))

    @property
    def counting(self):
        return [result for result in self.results if self.counts(result)]

    @property
    def surprises(self):
        """Known departures that are none."""
        return [result for result in self.of("pass") if self.is_known(result)]


def write(directory, outcome):
    """Writes all forms of it."""
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, form in ("txt", as_text), ("json", as_json), ("html", as_html), ("xml", as_junit):
        (directory / f"report.{suffix}").write_text(form(outcome), encoding="utf-8")


def count(results):
    """How many there are, by level and verdict."""
    return {level: {verdict: sum(r.requirement.level == level and r.verdict == verdict for r in results)
                    for verdict in VERDICTS} for level in LEVELS}


def by_chapter(results):
    chapters = {}
    for result in results:
        chapters.setdefault(result.requirement.chapter, []).append(result)
    return chapters


# ---- Text ---------------------------------------------------------------------------------


def as_text(outcome):
    verdicts = "".join(f"{verdict:>6}" for verdict in VERDICTS)
    lines = [f"Conformance of {outcome.server}", "", f"{'':42}{' MUST ':-^24}  {' SHOULD ':-^24}",
             f"{'':42}{verdicts}  {verdicts}"]
    for name, each in [*by_chapter(outcome.results).items(), ("all", outcome.results)]:
        counts = count(each)
        must, should = ("".join(f"{counts[level][verdict] or '.':>6}" for verdict in VERDICTS) for level in LEVELS)
        lines.append(f"{name:42}{must}  {should}")
    failed = outcome.of("fail")
    lines += ["", f"Failed: {len(failed) or 'none'}"]
    for result in failed:
        r = result.requirement
        lines += ["", f"{r.id} {r.level}: {r.title}"]
        lines += ["    " + line for line in (r.rule, f"It is not so: {result.reason}.", *_known(outcome, result), "",
                                            *result.transcript.splitlines())]
    for verdict, title in ("error", "Incomplete, the server could not be asked"), ("n/a", "Not applicable"):
        found = outcome.of(verdict)
        lines += ["", f"{title}: {len(found) or 'none'}"]
        lines += [f"    {result.requirement.id} {result.requirement.title}: {result.reason}" for result in found]
    if outcome.surprises:
        lines += ["", "Passed, and given as known departures: "
                  + ", ".join(result.requirement.id for result in outcome.surprises)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _known(outcome, result):
    return [f"This is known: {outcome.known[result.requirement.id]}"] if outcome.is_known(result) else []


# ---- JSON -----------------------------------------------------------------------------------


def as_json(outcome):
    return json.dumps({
        "server": outcome.server,
        "counts": count(outcome.results),
        "unexpected passes": [result.requirement.id for result in outcome.surprises],
        "results": [{**result.requirement._asdict(), "verdict": result.verdict, "reason": result.reason,
                     "known": outcome.known.get(result.requirement.id), "counts": outcome.counts(result),
                     "seconds": round(result.seconds, 3), "transcript": result.transcript.splitlines()}
                    for result in outcome.results]}, indent=1, ensure_ascii=False) + "\n"


# ---- JUnit ----------------------------------------------------------------------------------

CONTROL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")     # what XML cannot hold


def as_junit(outcome):
    """What CI shows.  What does not count is skipped there, and says why: a SHOULD that has failed,
    a known departure, and what is not applicable."""
    results = outcome.results
    elements = [_junit(outcome, result) for result in results]
    total = (f'tests="{len(results)}" failures="{len(outcome.counting)}" errors="{len(outcome.of("error"))}" '
             f'skipped="{sum("<skipped" in element for element in elements)}" '
             f'time="{sum(result.seconds for result in results):.3f}"')
    return CONTROL.sub("?", f"""<?xml version="1.0" encoding="utf-8"?>
<testsuites {total}>
<testsuite name={quoteattr("SMTP conformance of " + outcome.server)} {total}>
""" + "".join(elements) + "</testsuite>\n</testsuites>\n")


def _junit(outcome, result):
    r = result.requirement
    attributes = (f"classname={quoteattr(r.chapter)} name={quoteattr(f'{r.id} {r.level}: {r.title}')} "
                  f'time="{result.seconds:.3f}"')
    if result.verdict == "pass":
        return f"<testcase {attributes}/>\n"
    if outcome.counts(result) or result.verdict == "error":
        tag = "failure" if result.verdict == "fail" else "error"
        return (f"<testcase {attributes}>\n<{tag} type={quoteattr(r.level)} message={quoteattr(result.reason)}>"
                f"{escape(r.rule)}\n\n{escape(result.transcript)}</{tag}>\n</testcase>\n")
    why = {"n/a": "not applicable: "}.get(result.verdict, f"{r.level} failed: ")
    said = why + result.reason + "".join(f" ({each})" for each in _known(outcome, result))
    return f"<testcase {attributes}>\n<skipped message={quoteattr(said)}/>\n</testcase>\n"


# ---- HTML -----------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #fff; --card: #f4f5f7; --line: #d8dce1;
        --pass: #1a7f37; --fail: #c5221f; --na: #6e7781; --error: #9a6700; }
@media (prefers-color-scheme: dark) {
:root { --text: #e6e9ed; --soft: #9aa4ae; --page: #14171b; --card: #1e2329; --line: #343b44;
        --pass: #4ac26b; --fail: #ff7b72; --na: #8b949e; --error: #d4a72c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .2rem 0 1rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .25rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal;
         overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
thead { color: var(--soft); font-size: .8rem; }
tbody tr:last-child > * { font-weight: 600; }
details { background: var(--card); border-radius: .5rem; margin: .4rem 0; padding: .5rem .7rem; }
summary { cursor: pointer; list-style: none; display: flex; gap: .6rem; align-items: baseline; }
summary::-webkit-details-marker { display: none; }
summary b { flex: none; width: 2.8rem; }
small { color: var(--soft); }
.pass { color: var(--pass); } .fail { color: var(--fail); } .na { color: var(--na); } .error { color: var(--error); }
pre { background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .5rem;
      font-size: .8rem; line-height: 1.4; white-space: pre-wrap; margin: .5rem 0 0; }
p { margin: .4rem 0 0; }
a { color: inherit; white-space: nowrap; }
body > table { margin-top: 1rem; font-size: .9rem; }
@media (max-width: 34rem) {
tr { display: grid; grid-template-columns: repeat(8, 1fr); }
tr > :first-child { grid-column: 1 / -1; border: 0; padding-bottom: 0; }
thead tr > :first-child { display: none; }
th[colspan] { grid-column: span 4; } }

"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SMTP conformance: {server}</title>
<style>{style}</style>
<h1>SMTP conformance<br><small>{server}</small></h1>
{summary}
<table>
<thead><tr><th><th colspan="4">MUST<th colspan="4">SHOULD
<tr><th>RFC 5321{columns}
<tbody>
{rows}
</table>
{sections}
</html>
"""


def as_html(outcome):
    chapters = by_chapter(outcome.results)
    sections = (f"<h2>{html.escape(name)}</h2>\n" + "\n".join(_details(outcome, result) for result in each)
                for name, each in chapters.items())
    return PAGE.format(server=html.escape(outcome.server), style=STYLE, summary="\n".join(_summary(outcome)),
                       sections="\n".join(sections),
                       columns="".join(f"<th>{verdict}" for verdict in VERDICTS) * 2,
                       rows="\n".join(_row(name, each) for name, each in [*chapters.items(), ("All", outcome.results)]))


def _links(results):
    return ", ".join(f'<a href="#{r.requirement.id}">{r.requirement.id}</a>' for r in results)


def _summary(outcome):
    """How it stands, and where to look."""
    for level, counts in count(outcome.results).items():
        failed = [r for r in outcome.of("fail") if r.requirement.level == level]
        yield (f"<p><b>{level}:</b> {counts['pass']} of {counts['pass'] + counts['fail']} that could be tried"
               + (f"; not {_links(failed)}" if failed else ""))
    for title, found in (("Incomplete, the server could not be asked", outcome.of("error")),
                         ("Passed, and given as known departures", outcome.surprises)):
        if found:
            yield f"<p><b>{title}:</b> {_links(found)}"


def _row(name, results):
    counts = count(results)
    cells = (f'<td class="{_class(verdict) if counts[level][verdict] else "na"}">{counts[level][verdict] or "·"}'
             for level in LEVELS for verdict in VERDICTS)
    return f"<tr><td>{html.escape(name)}{''.join(cells)}"


def _details(outcome, result):
    """One requirement: open where it failed."""
    r = result.requirement
    said = "".join(f"<p>{html.escape(text)}</p>" for text in (result.reason, *_known(outcome, result)) if text)
    if result.transcript:
        said += f"<pre>{html.escape(result.transcript)}</pre>"
    return (f'<details id="{r.id}"{" open" if result.verdict in ("fail", "error") else ""}><summary>'
            f'<b class="{_class(result.verdict)}">{result.verdict}</b>'
            f"<span>{html.escape(r.title)}<br><small>{r.id} · {r.level}</small></span></summary>"
            f"<p><small>{html.escape(r.rule)}</small></p>{said}</details>")


def _class(verdict):
    return verdict.replace("/", "")
