"""The report: what a server does of what the RFCs ask, as text, as JSON and as a page."""
import html
import inspect
import json
import re
from typing import NamedTuple

VERDICTS = ("pass", "fail", "n/a")
LEVELS = ("MUST", "SHOULD")

# The sections of RFC 5321 that have tests, and the other RFCs.
TITLES = {
    "2.2": "The extension model", "2.3": "Terminology", "2.4": "Syntax principles", "3.1": "Session initiation",
    "3.2": "Client initiation", "3.3": "Mail transactions", "3.5": "VRFY and EXPN", "3.6": "Relaying",
    "3.7": "Gatewaying", "3.8": "Closing connections", "4.1": "Commands", "4.2": "Replies", "4.3": "Sequences",
    "4.4": "Trace information", "4.5": "Minimum, transparency, sizes", "6.3": "Loops", "6.4": "Irregularities",
    "7.2": "Blind copies", "7.3": "VRFY and security",
    "1870": "SIZE", "2034": "ENHANCEDSTATUSCODES", "2920": "PIPELINING", "6152": "8BITMIME"}


class Requirement(NamedTuple):
    rfc: str
    section: str
    id: str         # R-4.1.1.5-b, or R-1870-6.1-a where the RFC is another than 5321
    level: str
    title: str
    rule: str

    @classmethod
    def of(cls, item):
        """What a test says of itself: by its name, its mark and its docstring."""
        rfc, section, letter, title = re.match(r"test_(?:rfc(\d+)_)?((?:\d+_)+)([a-z])_(.*)", item.name).groups()
        section = section.strip("_").replace("_", ".")
        text = " ".join(inspect.getdoc(item.function).split())
        level, = (level for level in LEVELS if item.get_closest_marker(level.lower()))
        return cls(rfc or "5321", section, f"R-{rfc + '-' if rfc else ''}{section}-{letter}", level,
                   title.replace("_s_", "'s ").replace("_", " "), text)

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

    @classmethod
    def of(cls, requirement, outcome, excinfo, transcript):
        verdict = {"passed": "pass", "failed": "fail", "skipped": "n/a"}[outcome.outcome]
        reason = str(excinfo.value).partition("\n")[0] if excinfo else ""
        return cls(requirement, verdict, reason, transcript)


def write(directory, server, results):
    """Writes the three; returns the text."""
    results = sorted(results, key=lambda result: result.requirement.order)
    directory.mkdir(parents=True, exist_ok=True)
    text = as_text(server, results)
    for name, content in ("txt", text), ("json", as_json(server, results)), ("html", as_html(server, results)):
        (directory / f"report.{name}").write_text(content)
    return f"\n{text}\nThe report is in {directory}: report.txt, report.json, report.html\n"


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


def as_text(server, results):
    verdicts = "".join(f"{verdict:>7}" for verdict in VERDICTS)
    lines = [f"Conformance of {server}", "", f"{'':42}{'------- MUST ------':>21}{'------ SHOULD -----':>23}",
             f"{'':42}{verdicts}  {verdicts}"]
    for name, each in [*by_chapter(results).items(), ("all", results)]:
        counts = count(each)
        must, should = ("".join(f"{counts[level][verdict] or '.':>7}" for verdict in VERDICTS) for level in LEVELS)
        lines.append(f"{name:42}{must}  {should}")
    failed = [result for result in results if result.verdict == "fail"]
    lines += ["", f"Failed: {len(failed) or 'none'}"]
    for result in failed:
        r = result.requirement
        lines += ["", f"{r.id} {r.level}: {r.title}"]
        lines += ["    " + line for line in (r.rule, "It is not so: " + result.reason, "",
                                            *result.transcript.splitlines())]
    undecided = [result for result in results if result.verdict == "n/a"]
    lines += ["", f"Not applicable: {len(undecided) or 'none'}"]
    lines += [f"    {result.requirement.id} {result.requirement.title}: {result.reason}" for result in undecided]
    return "\n".join(line.rstrip() for line in lines) + "\n"


# ---- JSON -----------------------------------------------------------------------------------


def as_json(server, results):
    return json.dumps({
        "server": server,
        "counts": count(results),
        "results": [{**result.requirement._asdict(), "verdict": result.verdict, "reason": result.reason,
                     "transcript": result.transcript.splitlines()} for result in results]}, indent=1) + "\n"


# ---- HTML -----------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #fff; --card: #f4f5f7; --line: #d8dce1;
        --pass: #1a7f37; --fail: #c5221f; --na: #6e7781; }
@media (prefers-color-scheme: dark) {
:root { --text: #e6e9ed; --soft: #9aa4ae; --page: #14171b; --card: #1e2329; --line: #343b44;
        --pass: #4ac26b; --fail: #ff7b72; --na: #8b949e; } }
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
.pass { color: var(--pass); } .fail { color: var(--fail); } .na { color: var(--na); }
pre { background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .5rem;
      font-size: .8rem; line-height: 1.4; white-space: pre-wrap; margin: .5rem 0 0; }
p { margin: .4rem 0 0; }
a { color: inherit; white-space: nowrap; }
body > table { margin-top: 1rem; font-size: .9rem; }

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
<thead><tr><th><th colspan="3">MUST<th colspan="3">SHOULD
<tr><th>RFC 5321{columns}
<tbody>
{rows}
</table>
{sections}
</html>
"""


def as_html(server, results):
    chapters = by_chapter(results)
    sections = (f"<h2>{html.escape(name)}</h2>\n" + "\n".join(map(_details, each)) for name, each in chapters.items())
    return PAGE.format(server=html.escape(server), style=STYLE, summary="\n".join(_summary(results)),
                       sections="\n".join(sections),
                       columns="".join(f"<th>{verdict}" for verdict in VERDICTS) * 2,
                       rows="\n".join(_row(name, each) for name, each in [*chapters.items(), ("All", results)]))


def _summary(results):
    """How it stands, and where to look."""
    for level, counts in count(results).items():
        failed = ", ".join(f'<a href="#{r.requirement.id}">{r.requirement.id}</a>' for r in results
                           if r.requirement.level == level and r.verdict == "fail")
        yield (f"<p><b>{level}:</b> {counts['pass']} of {counts['pass'] + counts['fail']} that could be tried"
               + (f"; not {failed}" if failed else ""))


def _row(name, results):
    counts = count(results)
    cells = (f'<td class="{_class(verdict) if counts[level][verdict] else "na"}">{counts[level][verdict] or "·"}'
             for level in LEVELS for verdict in VERDICTS)
    return f"<tr><td>{html.escape(name)}{''.join(cells)}"


def _details(result):
    """One requirement: open where it failed."""
    r = result.requirement
    said = f"<p>{html.escape(result.reason)}</p>" if result.reason else ""
    if result.transcript:
        said += f"<pre>{html.escape(result.transcript)}</pre>"
    return (f'<details id="{r.id}"{" open" if result.verdict == "fail" else ""}><summary>'
            f'<b class="{_class(result.verdict)}">{result.verdict}</b>'
            f"<span>{html.escape(r.title)}<br><small>{r.id} · {r.level}</small></span></summary>"
            f"<p><small>{html.escape(r.rule)}</small></p>{said}</details>")


def _class(verdict):
    return verdict.replace("/", "")
