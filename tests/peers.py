"""Other people's mail servers, started as relays on loopback, and this one beside them.

    with peers.start("postfix", next_hop=("127.1.2.3", 2525)) as peer:
        ... peer.host, peer.port, peer.log(), peer.pids(), peer.cpu() ...

    python3 tests/peers.py          starts each one once, and says which are here
    python3 tests/peers.py fetch    gets those that the system does not install

All mail for anybody goes to `next_hop`, or, with `nameserver`, where that says: an
address whose port 53 is asked for MX records, whose exchangers listen on port 25.
Without either a peer accepts mail and keeps it.  All of them trust 127.0.0.0/8,
take messages of 50 MiB and sync to disk as they do by default.

Debian lets only one mail server be installed.  So the others are unpacked beside
the system (fetch()), and every one that has paths and users built in gets a World:
a view of the file system of its own, in which these paths are.  That takes root.
A peer that cannot be had here raises Absent, which says why.
"""
import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import lab

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smtp-peers")
SYSTEM_PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
SIZE = 50 * 1024 * 1024     # the largest message, as this server has it


class Absent(Exception):
    """This peer is not to be had here; the text says why."""


def program(name):
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise Absent(f"there is no {name} here")
    return found


def start(name, *options, **settings):
    """A running Peer, to be stopped by stop() or as a context manager. This server
    takes options of its own, and another `binary` under another `label`."""
    return SERVERS[name](*options, **settings)


def said(*command):
    """The first line of what a program says of itself."""
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    return done.stdout.strip().partition("\n")[0]


# ---- Processes ---------------------------------------------------------------------


def tree(pid):
    """The ids of a process and of all below it, parents first."""
    children = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):      # it has ended meanwhile
            # The parent's id is the second word behind the name, which is in brackets.
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(directory.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def times(pid):
    """Seconds of processor time of a process and of the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Group:
    """A control group. It counts the processor time of all that ran in it to the
    microsecond: of children that have ended, and of those whose parent ended first or
    never waited for them. Without cgroup v2, or without root, there is none."""

    _numbers = itertools.count()

    def __init__(self):
        self.directory = None
        for mount in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")):
            if (mount / "cgroup.controllers").exists():
                own = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.M)[1]
                directory = mount / own / f"smtp-peer-{os.getpid()}-{next(self._numbers)}"
                with contextlib.suppress(OSError):
                    directory.mkdir()
                    self.directory = directory

    def within(self, command):
        """The command, to run in it from its first instruction."""
        if self.directory is None:
            return command
        return ["sh", "-c", 'echo 0 >"$0" && exec "$@"', str(self.directory / "cgroup.procs"), *command]

    def pids(self):
        """The processes that run in it now."""
        return [int(pid) for pid in (self.directory / "cgroup.procs").read_text().split()]

    @classmethod
    def exist(cls):
        """Whether there are any here."""
        group = cls()
        try:
            return group.directory is not None
        finally:
            group.remove()

    def cpu(self):
        """Seconds of processor time, or None."""
        if self.directory is None:
            return None
        return int((self.directory / "cpu.stat").read_text().split()[1]) / 1e6

    def remove(self):
        """Ends all that still runs in it, which takes the kernel a moment."""
        def removed():
            with contextlib.suppress(OSError):
                self.directory.rmdir()
            return not self.directory.exists()
        if self.directory:
            with contextlib.suppress(OSError):      # where the system is older than that
                (self.directory / "cgroup.kill").write_text("1")
            lab.wait_for(removed, what=f"nothing running in {self.directory}")


# ---- A peer ------------------------------------------------------------------------


class Peer:
    """A mail server that runs: at .host and .port, until stop()."""

    name = None

    def __init__(self, next_hop=None, nameserver=None, directory=None, host=None):
        self.host = host or lab.loopback()
        self.next_hop = next_hop
        self.nameserver = nameserver or self.host       # where nobody answers
        self._stack = contextlib.ExitStack()
        try:
            self._group = Group()
            self._stack.callback(self._group.remove)
            # The disk of the spool is that of `directory`, or of the system's temporary files.
            path = self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{self.name}-", dir=directory))
            self.directory = Path(path)
            self.directory.chmod(0o755)
            self._start()
            lab.wait_for(self._greets, 60, f"{self.name} greeting")
        except BaseException:
            self.stop()
            raise

    def _greets(self):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} does not start:\n{self.log()}")
        try:
            with socket.create_connection((self.host, self.port), 10) as sock:
                return sock.recv(4) in (b"220 ", b"220-")
        except OSError:
            return False

    def _run(self, *command):
        """The server's process, in a session of its own.  Ends with stop()."""
        with open(self.directory / "output", "ab") as output:
            process = subprocess.Popen(self._group.within(list(map(str, command))), stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True)
        self._stack.callback(self._kill, process)
        self.process = process

    def _kill(self, process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _free_port(self):
        with socket.create_server((self.host, 0)) as free:
            self.port = free.getsockname()[1]

    def pids(self):
        """All its processes, as of now."""
        return tree(self.process.pid)

    def cpu(self):
        """Seconds of processor time that all its processes have taken so far, those that
        have ended included."""
        seconds = self._group.cpu()
        if seconds is None:
            seconds = 0
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    seconds += times(pid)
        return seconds

    def flush(self):
        """Tells it to try all that waits in its queue now.  False: it has no way to be told."""
        return False

    def log(self):
        """All that it has logged."""
        path = self.directory / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def version(self):
        """What it is, in a few words."""
        raise NotImplementedError

    def stop(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Ours(Peer):
    """This server; or another binary of it, which goes by the label."""

    name = "smtp"

    def __init__(self, *options, binary=lab.BINARY, label=name, **settings):
        self._options, self._binary = options, binary
        self.name = label
        super().__init__(**settings)

    def _start(self):
        # With a next hop it never looks for exchangers: the port of those does not matter.
        way = (["-s", "{}:{}".format(*self.next_hop)] if self.next_hop else ["-n", self.nameserver, "-P", 25])
        self._run(self._binary, "-p", 0, "-q", self.directory / "spool", "-h", lab.HOSTNAME, *way, *self._options,
                  self.host)
        self.port = int(lab.wait_for(self._listens, what=f"{self.name} listening")[1])

    def _listens(self):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} does not start:\n{self.log()}")
        return re.search(r"listening on \S+:(\d+)$", self.log(), re.M)

    def flush(self):
        self.process.send_signal(signal.SIGHUP)
        return True

    def version(self):
        return "this server" if self._binary == lab.BINARY else f"this server, as in {self._binary}"


class Aiosmtpd(Peer):
    """aiosmtpd, which takes mail and throws it away: for what a server has to answer."""

    name = "aiosmtpd"

    def _start(self):
        self._command = program("aiosmtpd")
        self._free_port()
        self._run(self._command, "-n", "-l", f"{self.host}:{self.port}", "-c", "aiosmtpd.handlers.Sink")

    def version(self):
        return Path(said(self._command, "--version")).name


# ---- Peers with a world of their own -------------------------------------------------


class World:
    """A view of the file system in which some directories are a peer's own.

    It is made by a shell in new mount and process namespaces, which stays as the
    parent of all that lose theirs.  Where that shell ends, all of it ends.
    """

    OWN = ("etc", "run", "var/lib", "var/log", "var/spool")
    SCRIPT = """
        set -e
        root=$1; opt=$2; shift 2
        for name in etc run var/lib var/log var/spool; do mount --bind "$root/$name" "/$name"; done
        if [ -n "$opt" ]; then mount --bind "$opt" /opt; fi
        "$@" &
        wait $!
    """

    def __init__(self, root, users, nameserver, opt):
        if os.geteuid() != 0:
            raise Absent("only root can give it directories and users of its own")
        self.root = root
        self._opt = str(opt or "")
        for name in self.OWN:
            (root / name).mkdir(parents=True)
        self._write_etc(users, nameserver)
        tried = subprocess.run(self.command("true"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, timeout=60)
        if tried.returncode != 0:
            raise Absent(f"this machine does not let us mount: {tried.stdout.strip()}")

    def _write_etc(self, users, nameserver):
        """No more than a server asks of the C library, and nothing of this machine's mail."""
        etc = self.root / "etc"
        for name in ("ld.so.cache", "services", "protocols", "localtime"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(Path("/etc", name), etc / name)
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\nservices: files\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost {lab.HOSTNAME}\n")
        (etc / "resolv.conf").write_text(f"nameserver {nameserver}\n")
        (etc / "aliases").write_text("")
        for name, fields in (("passwd", "x:{id}:{id}::/nonexistent:/usr/sbin/nologin"), ("group", "x:{id}:")):
            lines = Path("/etc", name).read_text().splitlines()
            known = {line.partition(":")[0] for line in lines}
            for id, user in enumerate(users, 59001):
                if user not in known:
                    lines.append(f"{user}:{fields.format(id=id)}")
            (etc / name).write_text("\n".join(lines) + "\n")

    def command(self, *command):
        return [program("unshare"), "--mount", "--pid", "--kill-child", "--mount-proc",
                "sh", "-c", self.SCRIPT, "world", str(self.root), self._opt, *map(str, command)]


def settings_text(text, **values):
    """Settings written in a class: without its indentation, with values in place."""
    return re.sub("(?m)^        ", "", text).format(**values)


class WorldPeer(Peer):
    """A peer that lives in a World."""

    users = ()

    def _make_world(self):
        self.world = World(self.directory / "world", self.users, self.nameserver, self._opt())
        self._free_port()

    def _opt(self):
        """What stands at /opt, if anything: the directory where it was unpacked."""
        return None

    def _run_in_world(self, *command):
        self._run(*self.world.command(*command))

    def _order(self, *command, input=b""):
        """Runs a command inside its world and its control group; whether that went well."""
        shell = tree(self.process.pid)[1]
        within = self._group.within([program("nsenter"), "--target", str(shell), "--mount", "--pid", *command])
        done = subprocess.run(within, input=input, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)
        return done.returncode == 0

    def _kill(self, process):
        """The shell is the first process in its namespace: when it has ended, all have."""
        for shell in tree(process.pid)[1:2]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(shell, signal.SIGKILL)
            process.wait()
        super()._kill(process)

    def write(self, name, text):
        """A file of its world: its settings."""
        path = self.world.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def pids(self):
        return super().pids()[2:]       # without unshare and the shell

    def log(self):
        files = sorted(each for each in (self.directory / "world/var/log").rglob("*") if each.is_file())
        return super().log() + "".join(each.read_text(errors="replace") for each in files)


class Postfix(WorldPeer):
    """Postfix, as it is installed."""

    name = "postfix"
    users = ("postfix", "postdrop")

    # service, type, private, unpriv, chroot, wakeup, maxproc, command: Postfix's own
    # table, without what a relay does not use.  In a chroot it would need copies of
    # /etc; a world is apart enough.  maxproc 0 is no limit but the machine's.
    MASTER = """\
        {port}    inet  n - n - 0 smtpd
        pickup    unix  n - n 60 1 pickup
        cleanup   unix  n - n - 0 cleanup
        qmgr      unix  n - n 300 1 qmgr
        rewrite   unix  - - n - - trivial-rewrite
        bounce    unix  - - n - 0 bounce
        defer     unix  - - n - 0 bounce
        trace     unix  - - n - 0 bounce
        verify    unix  - - n - 1 verify
        flush     unix  n - n 1000? 0 flush
        proxymap  unix  - - n - - proxymap
        smtp      unix  - - n - - smtp
        relay     unix  - - n - - smtp
        showq     unix  n - n - - showq
        error     unix  - - n - - error
        retry     unix  - - n - - error
        discard   unix  - - n - - discard
        anvil     unix  - - n - 1 anvil
        scache    unix  - - n - 1 scache
        postlog   unix-dgram n - n - 1 postlogd
        tlsmgr    unix  - - n 1000? 1 tlsmgr
        {services}
        """
    MAIN = """\
        compatibility_level = 3.6
        myhostname = {hostname}
        mydestination =
        mynetworks = 127.0.0.0/8
        inet_interfaces = loopback-only
        inet_protocols = ipv4
        relayhost = {relayhost}
        message_size_limit = {size}
        mailbox_size_limit = 0
        alias_maps =
        alias_database =
        maillog_file = /var/log/mail.log
        # No TLS on loopback, and no names looked up for clients that are known.
        smtpd_tls_security_level = none
        smtp_tls_security_level = none
        smtpd_peername_lookup = no
        # Clients are not slowed down while the queue grows.
        in_flow_delay = 0
        # One next hop takes all: as many connections as to a hundred hosts.
        default_process_limit = 100
        initial_destination_concurrency = 20
        default_destination_concurrency_limit = 50
        # A queue of 100,000 is kept in memory whole (the default: 20,000).
        qmgr_message_active_limit = 100000
        qmgr_message_recipient_limit = 100000
        {more}
        """

    def __init__(self, more="", services="", accounts=None, **settings):
        """`more` is what main.cf has more, or instead; `services` the same of master.cf, in which {host} is its
        address; `accounts` are {name: password}, of Cyrus SASL."""
        self._more, self._services, self._accounts = more, services, accounts or {}
        super().__init__(**settings)

    def _start(self):
        postfix = program("postfix")
        self._make_world()
        self.write("etc/postfix/master.cf", settings_text(
            self.MASTER, port=f"{self.host}:{self.port}", services=self._services.format(host=self.host)))
        self.write("etc/postfix/main.cf", settings_text(
            self.MAIN, hostname=lab.HOSTNAME, size=SIZE, more=self._more,
            relayhost="[{}]:{}".format(*self.next_hop) if self.next_hop else ""))
        shutil.copy("/etc/postfix/postfix-files", self.world.root / "etc/postfix")
        (self.world.root / "var/spool/postfix").mkdir()
        self._run_in_world("sh", "-c", f"""
            mkdir /var/lib/postfix
            chown postfix /var/lib/postfix
            {self._add_accounts()}
            exec {postfix} start-fg""")

    def _add_accounts(self):
        """Shell commands that put them into Cyrus SASL's file."""
        if not self._accounts:
            return ""
        self.write("etc/postfix/sasl/smtpd.conf", "pwcheck_method: auxprop\nauxprop_plugin: sasldb\n"
                   "mech_list: PLAIN LOGIN\n")
        adding = [f"printf %s {shlex.quote(password)} | {program('saslpasswd2')} -p -c -u {lab.HOSTNAME} {name}"
                  for name, password in self._accounts.items()]
        return "\n".join([*adding, "chown postfix /etc/sasldb2"])

    def flush(self):
        return self._order(program("postqueue"), "-f")

    def sendmail(self, sender, recipient, letter):
        """Hands it a letter as a program of its own machine does; whether that went well."""
        return self._order(program("sendmail"), "-i", "-f", sender, recipient, input=letter.encode())

    def version(self):
        return said(program("postconf"), "mail_version").replace("mail_version =", "Postfix")


class UnpackedPeer(WorldPeer):
    """A peer from a package that would remove another: unpacked, and seen as /opt."""

    packages = ()
    binary = None
    place = "usr/sbin"      # where the package has it

    @classmethod
    def _installed(cls):
        return shutil.which(cls.binary, path=SYSTEM_PATH)

    def _opt(self):
        """The directory it was unpacked in, or None where the system has it installed."""
        if self._installed():
            return None
        directory = CACHE / self.name
        if not (directory / self.place / self.binary).exists():
            raise Absent(f"there is no {self.binary} here: python3 tests/peers.py fetch")
        return directory

    def _program(self):
        return f"/opt/{self.place}/{self.binary}" if self._opt() else program(self.binary)

    def _make_world(self):
        super()._make_world()
        linked = subprocess.run(self.world.command("ldd", self._program()), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, text=True, timeout=60).stdout
        missing = re.findall(r"(\S+) => not found", linked)
        if missing:
            raise Absent(f"it needs {', '.join(missing)}")

    @classmethod
    def fetch(cls):
        """Unpacks it from the system's packages, where it is not here yet."""
        directory = CACHE / cls.name
        if cls._installed() or directory.exists() or not shutil.which("apt-get"):
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            Path(work, "root").mkdir()
            subprocess.run(["apt-get", "-qq", "download", *cls.packages], cwd=work, check=True,
                           stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for package in Path(work).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, "root"], cwd=work, check=True)
            os.rename(Path(work, "root"), directory)


class Exim(UnpackedPeer):
    """Exim, Debian's light daemon."""

    name = "exim"
    binary = "exim4"
    packages = ("exim4-daemon-light", "exim4-base")
    users = ("Debian-exim",)
    CONFIGURATION = """\
        primary_hostname = {hostname}
        exim_path = {program}
        keep_environment =
        exim_user = Debian-exim
        exim_group = Debian-exim
        local_interfaces = {host}
        daemon_smtp_ports = {port}
        log_file_path = /var/log/exim4/%slog
        {tls}
        message_size_limit = {size}
        qualify_domain = {hostname}
        acl_smtp_rcpt = rcpt
        acl_smtp_data = accept
        # Neither names nor users are looked up for clients that are known.
        host_lookup =
        rfc1413_query_timeout = 0s
        # Each message is delivered as it comes, however many clients there are.
        smtp_accept_max = 0
        smtp_accept_queue = 0
        smtp_accept_queue_per_connection = 0
        smtp_connect_backlog = 1024
        smtp_accept_max_per_connection = 0
        smtp_reserve_hosts = *
        queue_run_max = 20
        remote_max_parallel = 20
        # A directory of 100,000 messages is slow; 62 are not.
        split_spool_directory = true
        # As for the others here.
        disable_ipv6 = true
        begin acl
        rcpt:
          accept hosts = 127.0.0.0/8
          deny message = relay not permitted
        begin routers
        {router}
        begin transports
        remote:
          driver = smtp
          hosts_try_dane =
          hosts_avoid_tls = *
          # The sink is on this machine, and this is not a loop.
          allow_localhost = true
        begin retry
        * * F,5d,15m
        """
    NO_TLS = "tls_advertise_hosts ="
    BY_ROUTE = "all:\n  driver = manualroute\n  transport = remote\n  route_list = * {}::{} byname\n  self = send\n"
    BY_DNS = "all:\n  driver = dnslookup\n  transport = remote\n  self = send\n"

    def __init__(self, tls=NO_TLS, **settings):
        """`tls` are its settings of that."""
        self._tls = tls
        super().__init__(**settings)

    def _start(self):
        self._make_world()
        router = self.BY_ROUTE.format(*self.next_hop) if self.next_hop else self.BY_DNS
        self.write("etc/exim4/exim4.conf", settings_text(
            self.CONFIGURATION, hostname=lab.HOSTNAME, program=self._program(), host=self.host, port=self.port,
            size=SIZE, router=router, tls=self._tls))
        self._run_in_world("sh", "-c", f"""
            mkdir -p /var/spool/exim4 /var/log/exim4
            chown Debian-exim:Debian-exim /var/spool/exim4 /var/log/exim4
            exec {self._program()} -bdf -q15m""")

    def flush(self):
        """-qqff: also what its notes of hosts that were down would hold back, route by route."""
        return self._order("sh", "-c", f"{self._program()} -qqff &")

    def version(self):
        output = subprocess.run(self.world.command(self._program(), "-bV"), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60).stdout
        return "Exim " + re.search(r"Exim version (\S+)", output)[1]


class OpenSMTPD(UnpackedPeer):
    """OpenSMTPD."""

    name = "opensmtpd"
    binary = "smtpd"
    packages = ("opensmtpd",)
    users = ("opensmtpd", "opensmtpq")
    CONFIGURATION = """\
        listen on {host} port {port} hostname {hostname}
        smtp max-message-size "{size}"
        # Its client side is made polite to the world: pauses between connections,
        # few of them to a host.  The one next hop here takes what it is given.
        mta limit conn-delay-host 0
        mta limit conn-delay-source 0
        mta limit conn-delay-connector 0
        mta limit conn-delay-relay 0
        mta limit conn-delay-domain 0
        mta limit session-transaction-delay 0
        mta limit max-conn-per-host 50
        mta limit max-conn-per-route 50
        mta limit max-conn-per-connector 50
        mta limit max-conn-per-source 100
        mta limit max-conn-per-relay 100
        mta limit max-conn-per-domain 100
        mta max-deferred 100000
        action "out" relay {host_option}
        match from any for any action "out"
        """

    def _start(self):
        self._make_world()
        self.write("etc/smtpd.conf", settings_text(
            self.CONFIGURATION, host=self.host, port=self.port, hostname=lab.HOSTNAME, size=SIZE,
            host_option='host "smtp://{}:{}"'.format(*self.next_hop) if self.next_hop else ""))
        self.write("etc/mailname", f"{lab.HOSTNAME}\n")
        (self.world.root / "var/lib/opensmtpd/empty").mkdir(parents=True)
        (self.world.root / "var/spool/smtpd").mkdir(mode=0o711)
        (self.world.root / "etc/smtpd.conf").chmod(0o600)
        # Its control program insists on a group that it is unpacked without.
        self._run_in_world("sh", "-c", f"""
            cp "$(dirname {self._program()})/smtpctl" /run
            chgrp opensmtpq /run/smtpctl
            chmod 2755 /run/smtpctl
            exec {self._program()} -d""")

    def flush(self):
        """It also takes a host that did not answer for down, for a while, unless it is told."""
        return self._order("sh", "-c", "/run/smtpctl resume route all; /run/smtpctl schedule all")

    def version(self):
        return said(*self.world.command(self._program(), "-h")).replace("version: ", "")


class Sendmail(UnpackedPeer):
    """Sendmail, with the configuration that its own macros make."""

    name = "sendmail"
    binary = "sendmail"
    place = "usr/libexec/sendmail"
    packages = ("sendmail-bin", "sendmail-cf", "m4")
    users = ("smmta", "smmsp")
    CONFIGURATION = """\
        include(`/opt/usr/share/sendmail/cf/m4/cf.m4')
        OSTYPE(`linux')
        DOMAIN(`generic')
        FEATURE(`no_default_msa')
        FEATURE(`nocanonify')
        FEATURE(`use_cw_file')
        FEATURE(`promiscuous_relay')
        FEATURE(`accept_unresolvable_domains')
        define(`confDOMAIN_NAME', `{hostname}')
        define(`confMAX_MESSAGE_SIZE', `{size}')
        define(`confPID_FILE', `/run/sendmail.pid')
        define(`ALIAS_FILE', `/etc/mail/aliases')
        define(`STATUS_FILE', `')
        define(`HELP_FILE', `/opt/etc/mail/helpfile')
        define(`confSERVICE_SWITCH_FILE', `/etc/mail/service.switch')
        DAEMON_OPTIONS(`Port={port}, Addr={host}, Name=MTA')
        {route}
        MAILER(`local')
        MAILER(`smtp')
        """
    ROUTE = "define(`SMART_HOST', `relay:[{0}]')\ndefine(`RELAY_MAILER_ARGS', `TCP $h {1}')"

    @classmethod
    def _installed(cls):
        """What the system calls sendmail may be any mail server's."""
        return None

    def _start(self):
        self._make_world()
        self.write("etc/mail/sendmail.mc", settings_text(
            self.CONFIGURATION, hostname=lab.HOSTNAME, size=SIZE, host=self.host, port=self.port,
            route=self.ROUTE.format(*self.next_hop) if self.next_hop else ""))
        for path in ("var/spool/mqueue", "var/spool/clientmqueue", "etc/mail"):
            (self.world.root / path).mkdir(exist_ok=True)
            (self.world.root / path).chmod(0o700 if path[0] == "v" else 0o755)
        self.write("etc/mail/local-host-names", f"{lab.HOSTNAME}\n")
        self.write("etc/mail/aliases", "postmaster: root\n")
        self.write("etc/mail/service.switch", "hosts files\n" if self.next_hop else "hosts dns files\n")
        self._run_in_world("sh", "-c", f"""
            M4PATH= /opt/usr/bin/m4 /etc/mail/sendmail.mc >/etc/mail/sendmail.cf
            {self._program()} -bi -C /etc/mail/sendmail.cf
            exec {self._program()} -bD -q15m -C /etc/mail/sendmail.cf""")

    def version(self):
        output = subprocess.run(self.world.command(self._program(), "-d0.1", "-bv", "-C", "/dev/null", "root"),
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                timeout=60).stdout
        return "Sendmail " + re.search(r"Version (\S+)", output)[1]


class Chasquid(UnpackedPeer):
    """chasquid, which relays for nobody without a password: it keeps mail for one domain."""

    name = "chasquid"
    binary = "chasquid"
    place = "usr/bin"
    packages = ("chasquid",)

    def _start(self):
        self._make_world()
        self.write("etc/chasquid/chasquid.conf",
                   f'hostname: "{lab.HOSTNAME}"\nsmtp_address: "{self.host}:{self.port}"\nmail_log_path: "<stderr>"\n')
        self.write("etc/chasquid/domains/example.net/aliases", "*: | /bin/true\n")
        self.write("etc/ssl/openssl.cnf", "[req]\ndistinguished_name = name\n[name]\n")
        for path in ("etc/chasquid/certs", "var/lib/chasquid"):
            (self.world.root / path).mkdir(parents=True)
        self._run_in_world("sh", "-c", f"""
            mkdir -p /etc/chasquid/certs/{lab.HOSTNAME}
            openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN={lab.HOSTNAME} \\
                -addext subjectAltName=DNS:{lab.HOSTNAME} -keyout /etc/chasquid/certs/{lab.HOSTNAME}/privkey.pem \\
                -out /etc/chasquid/certs/{lab.HOSTNAME}/fullchain.pem
            exec {self._program()}""")

    def version(self):
        return "chasquid " + said(*self.world.command(self._program(), "--version")).split()[1]


class SmtpServer(Peer):
    """smtp-server, a module for Node.js: it takes mail and throws it away."""

    name = "smtp-server"
    user, password = "nour", "secret"
    SCRIPT = """\
        const [host, port, size, pem, secure] = process.argv.slice(2);
        const {{ SMTPServer }} = require('smtp-server');
        const own = pem ? require('fs').readFileSync(pem) : undefined;
        new SMTPServer({{
            authOptional: true,
            ...(own && {{ key: own, cert: own, secure: secure === 'secure', authOptional: false }}),
            size: Number(size),
            onAuth: (auth, session, callback) =>
                callback(auth.password === '{password}' ? null : new Error('wrong'), {{ user: auth.username }}),
            onData: (stream, session, callback) => {{
                stream.on('end', () => callback());
                stream.resume();
            }},
        }}).on('error', () => {{ }}).listen(Number(port), host);
        """

    def __init__(self, certificate="", secure=False, **settings):
        """With a `certificate`, a file that has its key, too, it takes mail only by TLS and with the password
        "secret"; `secure`: TLS begins with the connection."""
        self._tls = [certificate, "secure" if secure else ""] if certificate else []
        super().__init__(**settings)

    def _start(self):
        node, modules = program("node"), CACHE / self.name / "node_modules"
        if not (modules / "smtp-server").exists():
            raise Absent("there is no smtp-server here: python3 tests/peers.py fetch")
        self._free_port()
        path = self.directory / "server.js"
        path.write_text(settings_text(self.SCRIPT, password=self.password))
        self._run("env", f"NODE_PATH={modules}", node, path, self.host, self.port, SIZE, *self._tls)

    def _greets(self):
        if not self._tls:
            return super()._greets()
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 10):
            return True

    def version(self):
        package = (CACHE / self.name / "node_modules/smtp-server/package.json").read_text()
        return "smtp-server " + re.search(r'"version": "(.*)"', package)[1]

    @classmethod
    def fetch(cls):
        install_modules(cls.name, "smtp-server@3")


def install_modules(name, *modules):
    """What npm has of these, where it is not here yet."""
    directory = CACHE / name
    if directory.exists() or not shutil.which("npm"):
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        root = Path(work, "root")
        root.mkdir()
        (root / "package.json").write_text("{}\n")
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts",
                        "--omit=optional", *modules], cwd=root, check=True, stdin=subprocess.DEVNULL)
        os.rename(root, directory)


class Haraka(WorldPeer):
    """Haraka, from npm."""

    name = "haraka"
    PLUGIN = """\
        exports.register = function () {{
            this.register_hook('connect', 'trust');
            {register}
        }};
        exports.trust = function (next, connection) {{
            connection.relaying = /^127\\./.test(connection.remote.ip);
            next();
        }};
        exports.way = function (next) {{
            next(OK, [{{ priority: 0, exchange: '{host}', port: {port} }}]);
        }};
        """

    def _opt(self):
        directory = CACHE / self.name
        if not (directory / "node_modules/Haraka/bin/haraka").exists():
            raise Absent("there is no Haraka here: python3 tests/peers.py fetch")
        return directory

    def _start(self):
        node = program("node")
        self._make_world()
        host, port = self.next_hop or ("", 0)
        home = "var/lib/haraka"
        shutil.copytree(self._opt() / "node_modules/Haraka/config", self.world.root / home / "config")
        self.write(f"{home}/config/plugins", "way\n")
        self.write(f"{home}/config/me", f"{lab.HOSTNAME}\n")
        self.write(f"{home}/config/smtp.ini", f"listen={self.host}:{self.port}\n")
        # Lines as long as RFC 5321 4.5.3.1.6 has them, with one dot more: it breaks what is longer.
        limits = self.world.root / home / "config/connection.ini"
        text = limits.read_text()
        for name, value in (("max_lines", 10000), ("bytes", SIZE), ("data_line_length", 1001)):
            text = re.sub(f"(?m)^{name}=.*", f"{name}={value}", text)
        limits.write_text(text)
        # Exchangers on loopback are meant, as many at once as others may have, and tried
        # again soon: it cannot be told when one is back.
        self.write(f"{home}/config/outbound.ini", "enable_tls=false\nlocal_mx_ok=true\nconcurrency_max=100\n"
                   "temp_fail_intervals=20s*6,5m,15m,1h*120\n")
        self.write(f"{home}/plugins/way.js", settings_text(
            self.PLUGIN, host=host, port=port,
            register="this.register_hook('get_mx', 'way');" if self.next_hop else ""))
        (self.world.root / home / "queue").mkdir()
        self._run_in_world(node, "/opt/node_modules/Haraka/bin/haraka", "-c", f"/{home}")

    def version(self):
        package = (CACHE / self.name / "node_modules/Haraka/package.json").read_text()
        return "Haraka " + re.search(r'"version": "(.*)"', package)[1]

    @classmethod
    def fetch(cls):
        install_modules(cls.name, "Haraka@3")


PEERS = {peer.name: peer for peer in (Ours, Postfix, OpenSMTPD, Exim, Haraka, Aiosmtpd)}


# Those that are compared by what they answer; the others relay, too.
SERVERS = {**PEERS, **{peer.name: peer for peer in (Sendmail, Chasquid, SmtpServer)}}
KEEPERS = {"aiosmtpd", "chasquid", "smtp-server"}     # these send nothing on


def fetch():
    """Gets what the system's packages do not bring side by side."""
    for peer in SERVERS.values():
        if hasattr(peer, "fetch"):
            try:
                peer.fetch()
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{peer.name} cannot be fetched: {error}", file=sys.stderr)


def show():
    for name in SERVERS:
        try:
            with start(name) as peer:
                print(f"{name:10} {peer.version()}")
        except Absent as reason:
            print(f"{name:10} absent: {reason}")


if __name__ == "__main__":
    fetch() if sys.argv[1:] == ["fetch"] else show()
