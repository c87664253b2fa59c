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


def number(kind=float, low=0, high=None, low_ok=False):
    """Return an argparse type: a number with low < value < high (low <= value with low_ok).

    Without `high` an int is below 2**31 and a float finite."""
    high = high or (2**31 if kind is int else math.inf)

    def parse(text):
        value = kind(text)
        if not (low < value < high or low_ok and value == low):
            bound = "at least" if low_ok else "above"
            raise argparse.ArgumentTypeError(f"{text[:40]}: wants a number {bound} {low:g}"
                                             + f" and below {high:g}" * (high < math.inf))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def several(kind):
    """Return an argparse type: values separated by commas."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list (1,2,3) of {kind.__name__}"
    return parse


def nonempty(value):
    """An argparse type: a text that is not empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return value
