.POSIX:
# cc -o smtp smtp.c dns.c forward.c does the same.

CC = cc
CFLAGS = -O2
LDFLAGS =
OBJECTS = smtp.o dns.o forward.o

# Where to install; a DESTDIR goes before all of it.
PREFIX = /usr/local
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man

# Bound at the start where the linker can do that, or each child that is forked binds its functions anew.
BIND = -Wl,-z,now

smtp: $(OBJECTS)
	$(CC) $(BIND) $(LDFLAGS) -o smtp $(OBJECTS) 2>/dev/null || $(CC) $(LDFLAGS) -o smtp $(OBJECTS)

$(OBJECTS): smtp.h

# A program that runs keeps what it runs: hence the rm.
install: smtp
	mkdir -p $(DESTDIR)$(SBINDIR) $(DESTDIR)$(MANDIR)/man8
	rm -f $(DESTDIR)$(SBINDIR)/smtp
	cp smtp $(DESTDIR)$(SBINDIR)/smtp
	chmod 755 $(DESTDIR)$(SBINDIR)/smtp
	cp docs/smtp.8 $(DESTDIR)$(MANDIR)/man8/smtp.8
	chmod 644 $(DESTDIR)$(MANDIR)/man8/smtp.8

uninstall:
	rm -f $(DESTDIR)$(SBINDIR)/smtp $(DESTDIR)$(MANDIR)/man8/smtp.8

test: smtp
	sh tests/run

# What a server does of what the RFCs ask: this one, or SERVER=host:port, which needs no compiler;
# CONFORMANCE='--from me@example.org --strict' has more, and CONFORMANCE=--help says what.
SERVER =
CONFORMANCE =

conformance:
	@test -n '$(SERVER)' || $(MAKE) smtp
	sh tests/run python tests/conformance --report report `test -z '$(SERVER)' || echo --server '$(SERVER)'` \
		$(CONFORMANCE)

# The same of this server and of others, side by side.
conformance-peers: smtp
	sh tests/run python tests/conformance/compare.py report

# The rules for clients, on this relay's forwarder and on other clients.
conformance-clients: smtp
	sh tests/run python tests/conformance/compare_clients.py report

# Kills it at random moments, and at each system call of a message's life.
crash: smtp
	python3 tests/crash.py 300
	CRASH=all sh tests/run tests/test_crash.py

# Each fuzz target for so many seconds, with clang; and the corpus once, with any compiler.
FUZZ_SECONDS = 60

fuzz:
	sh tests/fuzz/run fuzz $(FUZZ_SECONDS)

fuzz-replay:
	CC='$(CC)' sh tests/fuzz/run replay

# Beside other mail servers, those that can be had here: an hour or more, or minutes with
# make bench BENCH=--quick; the beginning of tests/bench/bench.py has more.
BENCH =

bench: smtp
	python3 tests/bench/bench.py $(BENCH)

# The six small programs of docs/course and what its chapters show, with every compiler here.
course:
	sh tests/run -q tests/test_course.py

# Whether exercise N of docs/course/exercises.md is solved; if not, what is missing.
N =

exercise:
	@python3 tests/exercises/grade.py $(N)

# One message on its way; with make demo TLS=1, encrypted.
TLS =

demo: smtp
	python3 tests/demo.py $(TLS)

# With every compiler, C library, make and machine that can be had here: docs/portability.md.
PORTABILITY =

portability:
	python3 tests/portability.py $(PORTABILITY)

# The real thing, for mail from this machine to the world, without root.
run: smtp
	@echo 'In another terminal: telnet 127.0.0.1 2525'
	@echo 'and type: HELO me.com, MAIL FROM:<you@...>, RCPT TO:<friend@...>, DATA,'
	@echo 'a message, a line with a dot, QUIT.  Ctrl-C here ends it.'
	./smtp -v -p 2525 -q $${TMPDIR:-/tmp}/smtp-spool-`id -u` 127.0.0.1

clean:
	rm -f smtp $(OBJECTS)
	rm -rf tests/fuzz/build
