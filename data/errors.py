"""User errors: one line on stderr that names the thing and the way out, and exit status 2."""

import argparse
import contextlib
import math
import os
import stat
import sys
from pathlib import Path

if sys.version_info < (3, 11, 4):
    sys.exit("this repository needs Python 3.11.4 or newer")


class Problem(Exception):
    """Something that the user can mend; the message is the one line that says what and how."""


@contextlib.contextmanager
def one_line_errors():
    """Around main(): end user errors in one line and status 2, Ctrl-C in status 130."""
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
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for it
        return 2, "out of GPU memory: use a smaller --class-chunk, --batch-size or --backbone"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 2, "out of memory: use a smaller --class-chunk, --batch-size or --backbone"
    return None, ""


def plain_file(path):
    """Return the path of an existing plain file, as a Path, without opening it.

    Raises Problem for what is missing, for a folder, and for a pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:          # ValueError: a NUL in the path
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise Problem(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}")
    return Path(path)


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are Problems."""

    def error(self, message):
        raise Problem(message)


def bounded(text, kind, low, what):
    """Return a number of at least `low`. Raises argparse's error if a flag's text is none."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value < (2**31 if kind is int else math.inf):
            return value
    raise argparse.ArgumentTypeError(f"{text[:40]!r}: wants {what}")


# argparse types

def count(text):
    return bounded(text, int, 1, "a whole number above 0")


def whole(text):
    return bounded(text, int, 0, "a whole number, 0 or more")


def positive(text):
    return bounded(text, float, math.ulp(0), "a number above 0")


def nonnegative(text):
    return bounded(text, float, 0, "a number, 0 or more")


def counts(text):
    return [count(part) for part in text.split(",")]


def wholes(text):
    return [whole(part) for part in text.split(",")]


def nonnegatives(text):
    return [nonnegative(part) for part in text.split(",")]


def words(value):
    """An argparse type: the words of a context, which may also be written a_photo_of_a."""
    found = " ".join(value.replace("_", " ").split())
    if not found or set("{}") & set(found):
        raise argparse.ArgumentTypeError(f"{value!r}: wants words, and no braces")
    return found
