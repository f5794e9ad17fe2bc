"""Any Unix: builds the program with every compiler, C library, make and machine that the system's packages
offer, without a warning, and runs tests against each.

    make portability                            all of it: installs what is missing, as root with apt-get
    make portability PORTABILITY='--only s390x --only tcc'
    make portability PORTABILITY=--quick        the few tests in every cell
    make portability PORTABILITY=--write        and puts the table into docs/portability.md

What runs on another machine's instructions runs under qemu-user.  Ends with 1 where anything failed, or nothing ran.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("smtp.c", "dns.c", "forward.c")
PAGE = ROOT / "docs" / "portability.md"
BEGIN, END = "<!-- begin: make portability -->\n", "<!-- end: make portability -->\n"

PACKAGES = """clang tcc pcc lcc musl-tools dietlibc-dev make bmake libfaketime locales-all qemu-user libc6-dev-i386
    gcc-s390x-linux-gnu libc6-dev-s390x-cross gcc-powerpc-linux-gnu libc6-dev-powerpc-cross
    gcc-arm-linux-gnueabihf libc6-dev-armhf-cross gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    gcc-riscv64-linux-gnu libc6-dev-riscv64-cross""".split()

STRICT = "-pedantic -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings -Werror".split()

# For what differs in its instructions alone, and for what may differ in its library, its numbers or its octets.
FEW = ("dialogue", "message", "portability")
MANY = (*FEW, "access", "dns", "forwarding", "proxy", "queue", "reports", "spool", "start")
TIMEOUT = 3600          # seconds that the tests of one cell may take


class Cell(NamedTuple):
    name: str
    compiler: tuple         # a command, and what makes it compile for that machine or library
    flags: tuple = ()
    warnings: tuple = tuple(STRICT)
    tests: tuple = FEW
    make: str = ""          # the make that builds it, with no flags but the Makefile's
    emulator: tuple = ()
    missing: tuple = ()     # what keeps it from being built: names that the errors have to mention


def cell(name, compiler, flags="", **more):
    return Cell(name, tuple(compiler.split()), tuple(flags.split()), **more)


def cross(name, triplet, emulator, **more):
    return cell(name, f"{triplet}-gcc", "-std=c99 -O2", emulator=(emulator, "-L", f"/usr/{triplet}"), **more)


# The kernel's headers are where the compiler for 64 bits looks; the package that would lead this one
# there, gcc-multilib, does not go with cross compilers.
M32 = "-m32 -idirafter /usr/include/x86_64-linux-gnu"

CELLS = [
    *(cell(f"{compiler} -std=c99 {level}", compiler, f"-std=c99 {level}", tests=MANY if level == "-O2" else FEW)
      for compiler in ("gcc", "clang") for level in ("-O0", "-O2", "-O3", "-Os")),
    *(cell(f"{compiler} -std=c11", compiler, "-std=c11") for compiler in ("gcc", "clang")),
    cell("gcc -fsigned-char", "gcc", "-std=c99 -O2 -fsigned-char"),
    cell("gcc -funsigned-char", "gcc", "-std=c99 -O2 -funsigned-char"),
    # It knows no function that does not return, and so takes the ends of some for ends without a value.
    cell("tcc -std=c99", "tcc", "-std=c99", warnings=("-Werror",), tests=MANY),
    cell("tcc -std=c11", "tcc", "-std=c11", warnings=("-Werror",)),
    cell("pcc", "pcc -Wl,-z,noexecstack", warnings=("-Werror",)),
    cell("lcc", "lcc", warnings=()),
    cell("gcc -m32", f"gcc {M32}", "-std=c99 -O2", tests=MANY),
    cell("clang -m32", f"clang {M32}", "-std=c99 -O2"),
    cell("musl", "musl-gcc", "-std=c99 -O2"),
    cell("musl, static", "musl-gcc -static", "-std=c99 -Os", tests=MANY),
    cell("dietlibc", "diet gcc", "-Os", missing=("open_memstream", "futimens", "IPV6_V6ONLY")),
    cell("GNU make", "gcc", make="make"),
    cell("bmake", "gcc", make="bmake"),
    cross("s390x", "s390x-linux-gnu", "qemu-s390x", tests=MANY),
    cross("powerpc", "powerpc-linux-gnu", "qemu-ppc"),
    cross("armhf", "arm-linux-gnueabihf", "qemu-arm"),
    cross("aarch64", "aarch64-linux-gnu", "qemu-aarch64"),
    cross("riscv64", "riscv64-linux-gnu", "qemu-riscv64"),
]

ABOUT = {"gcc -m32": "32 bits", "clang -m32": "32 bits", "s390x": "64 bits, big-endian",
         "powerpc": "32 bits, big-endian", "armhf": "32 bits", "aarch64": "64 bits", "riscv64": "64 bits"}


class Row(NamedTuple):
    """What became of a cell."""

    cell: Cell
    version: str = ""
    size: int = 0
    fault: str = ""         # why it failed, or, with `absent`, why it did not run
    absent: bool = False
    passed: int = 0
    failed: int = 0
    skips: tuple = ()       # the reason of each test that was skipped
    seconds: float = 0


def install():
    """What is missing; what -m32 links has the compiler's number in its name."""
    script = ROOT / "tests" / "install"
    subprocess.run(["sh", script, *PACKAGES], check=True)
    if shutil.which("gcc"):
        said = subprocess.run(["gcc", "-dumpversion"], stdout=subprocess.PIPE, text=True, check=True).stdout
        subprocess.run(["sh", script, f"lib32gcc-{said.strip().partition('.')[0]}-dev"], check=True)


# ---- Building ---------------------------------------------------------------------------------


def version(compiler):
    """Its own words, without where it comes from."""
    for option in "--version", "-v":
        said = subprocess.run([compiler, option], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        found = re.search(r"(?<![\w.])\d+\.\d+(\.\w+)*", said.stdout + said.stderr)
        if found:
            return found[0]
    return "?"


def library_version(cell):
    """What the C library calls itself, where it has a name of its own here."""
    loader = next(Path("/lib").glob("ld-musl-*.so.1"), None)
    if "musl-gcc" in cell.compiler and loader:
        said = subprocess.run([loader], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return " (musl " + re.search(r"Version (\S+)", said.stderr)[1] + ")"
    return f" ({cell.emulator[0]} {version(cell.emulator[0])})" if cell.emulator else ""


def compiler_script(cell, place):
    """cc: the compiler as one word, as CC has it.  What it links for another machine becomes a script that runs it.
    Sanitizers are another library; these tests are about what this cell makes of the program."""
    command = shlex.join([*cell.compiler, *cell.flags])
    emulate = f"""
case " $* " in *" -c "*) exit ;; esac
for word do
    [ "$before" != -o ] || program=$word
    before=$word
done
mv "$program" "$program.real" || exit
printf '#!/bin/sh\\nexec {shlex.join(cell.emulator)} "%s" "$@"\\n' "$program.real" >"$program"
chmod 755 "$program"
"""
    script = place / "cc"
    script.write_text(f"""#!/bin/sh
case " $* " in *" -fsanitize="*) exit 1 ;; esac
before= program=
{command} "$@" || exit
{emulate if cell.emulator else ''}""")
    script.chmod(0o755)
    return script


def compile_program(command, text="", **options):
    """Its status, and what was said; `text` is what it reads where it reads "-"."""
    built = subprocess.run(list(map(str, command)), input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, errors="replace", **options)
    return built.returncode, built.stdout.strip()


def build(cell, place):
    """As the README says, which has to be silent, and with all warnings, or by a make.  Returns what was wrong."""
    sources = [ROOT / name for name in SOURCES]
    status, said = compile_program([*cell.compiler, "-o", place / "bare", *sources])
    if cell.missing:
        return said if status == 0 or not all(name in said for name in cell.missing) else ""
    if status != 0 or said:
        return f"{shlex.join(cell.compiler)} -o smtp {' '.join(SOURCES)}:\n{said or status}"
    script = compiler_script(cell, place)
    if cell.make:
        for name in (*SOURCES, "smtp.h", "Makefile"):
            shutil.copy(ROOT / name, place)
        status, said = compile_program([cell.make, "-s", f"CC={script}"], cwd=place)
    else:
        status, said = compile_program([script, *cell.warnings, "-o", place / "smtp", *sources])
    return said or (f"status {status}" if status != 0 else "")


def program_size(cell, place):
    """Of the program that the tests run, without its symbols."""
    program = place / ("smtp.real" if cell.emulator else "smtp")
    strip = cell.compiler[0].replace("-gcc", "-strip") if "-linux-" in cell.compiler[0] else "strip"
    subprocess.run([strip, "-o", place / "stripped", program], check=True)
    return (place / "stripped").stat().st_size


# ---- Testing ----------------------------------------------------------------------------------


def test(cell, place):
    """(passed, failed, skips, the end of what pytest said)"""
    report, log = place / "report.xml", place / "log"
    environment = {**os.environ, "SMTP": str(place / "smtp"), "CC": str(place / "cc"), "TMPDIR": str(place)}
    if cell.emulator:
        environment["EMULATED"] = cell.emulator[0]
    files = [f"tests/test_{name}.py" for name in cell.tests]
    with log.open("w") as output:
        try:
            subprocess.run(["sh", "tests/run", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}",
                            *files], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                           timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return 0, 1, (), f"not done after {TIMEOUT} seconds"
    words = log.read_text()
    if not report.exists():
        return 0, 1, (), words
    outcomes = [(case.find("failure") is not None or case.find("error") is not None, case.find("skipped"))
                for case in ElementTree.parse(report).iter("testcase")]
    failed = sum(bad for bad, _ in outcomes)
    skips = tuple(skipped.get("message") for bad, skipped in outcomes if skipped is not None and not bad)
    return len(outcomes) - failed - len(skips), failed, skips, words if failed else ""


def compile_least(cell, program):
    """Not to /dev/null: in root's hands, a linker puts a file in its place."""
    return compile_program([*cell.compiler, "-x", "c", "-o", program, "-"], "int main(void) { return 0; }\n")


def absent(cell):
    """What of it is not here."""
    for program in (cell.compiler[0], cell.make, *cell.emulator[:1]):
        if program and not shutil.which(program):
            return f"no {program}"
    if "-m32" in cell.compiler:
        with tempfile.TemporaryDirectory() as place:
            if compile_least(cell, f"{place}/program")[0] != 0:
                return "no library for 32 bits"
    return ""


def runnable(cell):
    """With an emulator for 32 bits where this kernel has none of its own."""
    if "-m32" in cell.compiler and shutil.which("qemu-i386"):
        with tempfile.TemporaryDirectory() as place:
            program = f"{place}/program"
            compile_least(cell, program)
            try:
                subprocess.run([program])
            except OSError:
                return cell._replace(emulator=("qemu-i386",))
    return cell


def run(cell, work):
    begun = time.monotonic()
    cell = runnable(cell)
    reason = absent(cell)
    if reason:
        return Row(cell, fault=reason, absent=True)
    place = work / re.sub(r"\W+", "_", cell.name)
    place.mkdir(mode=0o755)
    row = Row(cell, version=f"{cell.compiler[0].rpartition('-')[2]} {version(cell.compiler[0])}{library_version(cell)}")
    fault = build(cell, place)
    if fault or cell.missing:
        return row._replace(fault=fault, seconds=time.monotonic() - begun)
    size = program_size(cell, place)
    passed, failed, skips, words = test(cell, place)
    return row._replace(size=size, passed=passed, failed=failed, skips=skips, fault=words,
                        seconds=time.monotonic() - begun)


# ---- Telling ----------------------------------------------------------------------------------


def table(rows):
    text = ("| cell | compiler | octets | warnings | passed | failed | skipped | seconds |\n"
            "|---|---|--:|--:|--:|--:|--:|--:|\n")
    for row in rows:
        name = row.cell.name + (f" ({ABOUT[row.cell.name]})" if row.cell.name in ABOUT else "")
        if row.absent:
            text += f"| {name} | not to be had: {row.fault} | | | | | | |\n"
        elif row.cell.missing and not row.fault:
            text += f"| {name} | cannot carry it: no `{'`, no `'.join(row.cell.missing)}` | | | | | | |\n"
        elif not row.size:
            text += f"| {name} | {row.version} | | {row.fault.count(chr(10)) + 1} | | | | {row.seconds:.0f} |\n"
        else:
            text += (f"| {name} | {row.version} | {row.size:,} | 0 | {row.passed} | {row.failed} | {len(row.skips)} |"
                     f" {row.seconds:.0f} |\n")
    return text


def skipped(rows):
    """Each reason, how often, and where."""
    reasons = {}
    for row in rows:
        for reason, count in Counter(row.skips).items():
            reasons.setdefault(reason, {})[row.cell.name] = count
    return "".join(f"- {reason}: {', '.join(f'{name} {count}' for name, count in where.items())}\n"
                   for reason, where in reasons.items())


def report(rows):
    system = re.search(r'^PRETTY_NAME="?(.*?)"?$', Path("/etc/os-release").read_text(), re.MULTILINE)
    return (f"{date.today()}, {system[1] if system else sys.platform}, {os.uname().machine}.\n\n{table(rows)}\n"
            f"What was skipped, and why:\n\n{skipped(rows) or '- nothing'}")


def main():
    parser = argparse.ArgumentParser(description="Builds and tests the program in every way there is here.")
    parser.add_argument("--only", action="append", metavar="CELL",
                        help="this cell, or all that begin so; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the few tests in every cell")
    parser.add_argument("--list", action="store_true", help="print the names of the cells, and exit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() + 1,
                        help="how many cells at once (one more than processors: tests wait most of the time)")
    parser.add_argument("--no-install", action="store_true", help="take what is there")
    parser.add_argument("--write", action="store_true", help=f"renew the table of {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write is for all cells")
    cells = [cell for cell in CELLS if not options.only or cell.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    if options.quick:
        cells = [cell._replace(tests=FEW) for cell in cells]
    if not options.no_install:
        install()
    with tempfile.TemporaryDirectory(prefix="portability-") as work, ThreadPoolExecutor(options.jobs) as pool:
        os.chmod(work, 0o755)           # the tests run the program as somebody else

        def show(cell):
            row = run(cell, Path(work))
            print(table([row]).splitlines()[-1], flush=True)
            if row.fault and not row.absent:
                print(f"---- {cell.name}\n{row.fault}\n----", flush=True)
            return row
        longest_first = sorted(cells, key=lambda cell: -len(cell.tests))
        done = {row.cell.name: row for row in pool.map(show, longest_first)}
    rows = [done[cell.name] for cell in cells]
    print("\n" + report(rows))
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + report(rows) + END + rest.partition(END)[2])
    ran = [row for row in rows if not row.absent]
    return 0 if ran and not any(row.fault or row.failed for row in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
