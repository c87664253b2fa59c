"""User errors: one line on stderr that names the thing and the way out, and exit status 2."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

if sys.version_info < (3, 11, 4):
    sys.exit("this repository needs Python 3.11.4 or newer")


class Problem(Exception):
    """Something that the user can mend; the message is the one line that says what and how."""


@contextlib.contextmanager
def one_line_errors():
    """Around main(): end user errors in one line and status 2, Ctrl-C in status 130."""
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files may be no UTF-8
    try:
        yield
        print(end="", flush=True)
    except BaseException as error:
        status, line = explain(error)
        if status is None:
            raise
        if line:
            print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
        sys.exit(status)


def explain(error):
    """Return the exit status and line of an error that is no fault of the code, else None, ""."""
    if isinstance(error, Problem):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):          # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")          # Python flushes once more at its end
        return 141, ""
    if isinstance(error, OSError):                  # no space, no permission
        return 2, f"{error.filename or 'cannot write'}: {error.strerror or error}"
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return 2, "out of memory: use a smaller --class-chunk, --batch-size or --backbone"
    return None, ""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are Problems."""

    def error(self, message):
        raise Problem(message)
