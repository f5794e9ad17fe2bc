"""What would a power cut leave?  Reads a log of strace(1) and keeps account of it.

    strace -f -y -o trace -e trace=openat,write,fsync,/^rename ./4-spool 2525 spool
    python3 powercut.py trace

The kernel keeps what is written in memory and brings it to the disk when it likes.  What
is sure to be there is a file's content once fsync() of the file has returned, and a name
once fsync() of its directory has.  At each 250 for a message this says which of the two
is sure.
"""
import os
import re
import sys
import time

CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")


def read(path):
    """The lines of the log, once the traced program has ended."""
    for _ in range(100):
        with open(path) as file:
            lines = file.read().splitlines()
        if lines and "+++ " in lines[-1]:
            break
        time.sleep(0.1)
    return lines


def main(path):
    content, name = {}, {}      # of each message, by its id: is it sure to be on the disk?
    for line in read(path):
        call = CALL.match(line)
        if not call or int(call[3]) < 0:
            continue
        what, arguments = call[1], call[2]
        file = re.match(r"\d+<([^>]*)>", arguments)
        directory, id = os.path.split(file[1]) if file else ("", "")
        if what == "write" and os.path.basename(directory) in ("tmp", "queue"):
            content[id] = False
        elif what == "fsync" and id == "queue":
            name.update(dict.fromkeys(name, True))
        elif what == "fsync":
            content[id] = True
        elif what.startswith("rename"):
            name[os.path.basename(arguments.split('"')[3])] = False
        told = re.search(r"250 2\.0\.0 Ok: queued as (\S+?)(?:\\r|\")", arguments)
        if what == "write" and told:
            for word, known in ("content", content), ("name in queue/", name):
                state = "on the disk" if known.get(told[1]) else "in memory only: a power cut may lose it"
                print(f"at 250, the {word} is {state}")


if __name__ == "__main__":
    main(sys.argv[1])
