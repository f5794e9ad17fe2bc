"""A client with a fault of one's choice, to prove that the rules for clients can be broken.

    python3 tests/conformance/broken_client.py HOST PORT SENDER RECIPIENT MESSAGE [FAULT]
"""
import re
import socket
import sys

# What it does, each of them against one rule.
FAULTS = {
    "2.2.1-c": "it begins with HELO", "2.2.1-d": "it gives up where EHLO is refused",
    "2.3.5-b": "its name has an underscore", "2.3.8-d": "a line of the message ends by LF",
    "2.4-a": "it knows no keyword but in capitals", "3.3-i": "it sends the message whatever DATA is answered",
    "4.1.1.1-g": "it goes on after a greeting of 421", "4.1.1.3-d": "it gives SIZE to all",
    "4.1.1.10-f": "it closes without QUIT", "4.1.1.10-g": "it does not wait for the reply to QUIT",
    "4.2-g": "it knows the codes 250 and 354 only", "4.2-h": "it reads one line of a reply only",
    "4.2.1-e": "it wants words", "4.3.1-a": "it sends MAIL and RCPT together to all",
    "4.3.1-b": "it sends EHLO before the greeting", "4.5.2-d": "it doubles no dot",
    "4.5.3.2-c": "it waits for a moment",
    "1870-3-b": "it declares a size in words", "2920-3.1-a": "it sends the message with DATA where it may send groups"}


class Client:
    def __init__(self, host, port, fault):
        self.fault = fault
        self.sock = socket.create_connection((host, port), 0.2 if fault == "4.5.3.2-c" else 30)
        self.lines = self.sock.makefile("rb")

    def send(self, *lines):
        self.sock.sendall(b"".join(line.encode("latin-1") + b"\r\n" for line in lines))

    def reply(self, to_ehlo=False):
        lines = [self.lines.readline().decode().rstrip("\r\n")]
        while lines[-1][3:4] == "-" and (to_ehlo or self.fault != "4.2-h"):
            lines.append(self.lines.readline().decode().rstrip("\r\n"))
        if self.fault == "4.2.1-e" and not lines[-1][4:]:
            sys.exit("no words")
        return lines

    def expect(self, digit, usual):
        code = self.reply()[-1][:3]
        if code[:1] != digit or (self.fault == "4.2-g" and code not in usual):
            self.leave()

    def say(self, line, digit="2", usual=("220", "250")):
        self.send(line)
        self.expect(digit, usual)

    def leave(self):
        if self.fault == "4.1.1.10-f":
            sys.exit(0)
        self.send("QUIT")
        if self.fault != "4.1.1.10-g":
            self.reply()
        sys.exit(0)


def send(host, port, sender, recipient, path, fault=None):
    client = Client(host, int(port), fault)
    name = "my_pc.example" if fault == "2.3.5-b" else "client.example"
    if fault == "4.3.1-b":
        client.send(f"EHLO {name}")
    if client.reply()[-1][:1] != "2" and fault != "4.1.1.1-g":
        client.leave()
    if fault == "2.2.1-c":
        client.send(f"HELO {name}")
    elif fault != "4.3.1-b":
        client.send(f"EHLO {name}")
    said = client.reply(to_ehlo=True)
    if said[-1][:1] != "2":
        if fault == "2.2.1-d":
            client.leave()
        client.say(f"HELO {name}")
        said = []
    keywords = [line[4:] if fault == "2.4-a" else line[4:].upper() for line in said[1:]]
    if fault == "2.4-a" and any(word != word.upper() for word in keywords):
        client.leave()
    with open(path, "rb") as message:
        content = message.read().replace(b"\n", b"\r\n")
    mail = f"MAIL FROM:<{sender}>"
    if fault == "4.1.1.3-d" or any(word.startswith("SIZE") for word in keywords):
        mail += " SIZE=" + ("some" if fault == "1870-3-b" else str(len(content)))
    if "PIPELINING" in keywords or fault == "4.3.1-a":
        client.send(mail, f"RCPT TO:<{recipient}>")
        client.expect("2", ("250",))
        client.expect("2", ("250",))
    else:
        client.say(mail)
        client.say(f"RCPT TO:<{recipient}>")
    if fault == "3.3-i":
        client.send("DATA")
        client.reply()
    elif not (fault == "2920-3.1-a" and "PIPELINING" in keywords):
        client.say("DATA", "3", ("354",))
    if fault != "4.5.2-d":
        content = re.sub(rb"(?m)^\.", b"..", content)
    else:
        content = content.replace(b"\r\n.\r\n", b"\r\n")
    if fault == "2.3.8-d":
        content = b"X-Odd: one\n" + content
    if fault == "2920-3.1-a" and "PIPELINING" in keywords:
        client.sock.sendall(b"DATA\r\n" + content + b".\r\n")
        client.reply()
    else:
        client.sock.sendall(content + b".\r\n")
    client.expect("2", ("250",))
    client.leave()


if __name__ == "__main__":
    send(*sys.argv[1:])
