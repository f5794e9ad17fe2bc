.POSIX:
# cc -o smtp smtp.c dns.c forward.c does the same.

CC = cc
CFLAGS = -O2
LDFLAGS =
OBJECTS = smtp.o dns.o forward.o

smtp: $(OBJECTS)
	$(CC) $(LDFLAGS) -o smtp $(OBJECTS)

$(OBJECTS): smtp.h

test: smtp
	sh tests/run

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

demo: smtp
	python3 tests/demo.py

# The real thing, for mail from this machine to the world, without root.
run: smtp
	@echo 'In another terminal: telnet localhost 2525'
	@echo 'and type: HELO me.com, MAIL FROM:<you@...>, RCPT TO:<friend@...>, DATA,'
	@echo 'a message, a line with a dot, QUIT.  Ctrl-C here ends it.'
	./smtp -v -p 2525 -q $${TMPDIR:-/tmp}/smtp-spool-`id -u` localhost

clean:
	rm -f smtp $(OBJECTS)
	rm -rf tests/fuzz/build
