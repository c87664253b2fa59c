"""How a run ends that cannot go on: one line on stderr that names the thing and the way out.

Imported before anything heavy, so that Ctrl-C is answered while PyTorch is still being imported."""

import argparse
import contextlib
import logging
import math
import os
import signal
import stat
import sys
import warnings
from pathlib import Path


class Problem(Exception):
    """Something that the user can mend; the message is the one line that says what and how."""


# ------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """Its errors are Problems."""

    def error(self, message):
        raise Problem(message)


def number(kind=float, low=0, high=None, low_ok=False):
    """An argparse type: an int or float with low < value < high, or low <= value with low_ok.

    Without `high` an int is below 2**31 and a float finite."""
    high = high or {int: 2**31, float: math.inf}[kind]
    named = {int: "whole number", float: "number"}[kind]
    wanted = f"a {named} {'of at least' if low_ok else 'above'} {low:g}"
    wanted += " that is finite" if high == math.inf else f" and below {high}"

    def parse(text):
        value = kind(text)
        if not (low <= value < high and (low_ok or value > low)):
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: wants {wanted}")
        return value
    parse.__name__ = named
    return parse


def several(kind):
    """An argparse type: values separated by commas."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list (1,2,3) of {kind.__name__}"
    return parse


def words(text):
    """An argparse type: the words of a context, which may also be written a_photo_of_a."""
    return " ".join(text.replace("_", " ").split())


# ------------------------------------------------------- files

def regular_file(path):
    """The path of a plain file or a link to one, as a Path; nothing is opened.

    Raises Problem for what is missing, for a folder, and for a pipe or device, where reading might
    never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: there is a NUL in the path
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise Problem(f"{path}: is a {kind}, not a file")
    return Path(path)


@contextlib.contextmanager
def naming(file):
    """An OSError in here is about `file`: Python does not say so where a write fails."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


# ------------------------------------------------------- the end of a run

def ending(error):
    """(exit status, line to print or "") of an error that is no fault of the code, else None."""
    if isinstance(error, Problem):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):  # who reads the output, such as `head`, has seen enough
        return 141, ""
    if isinstance(error, OSError):  # no space, no permission; what has no name is the output
        return 2, f"{error.filename or 'cannot write'}: {error.strerror or error}"
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for it
        return 2, "out of GPU memory; a smaller --batch-size, --class-chunk or backbone needs less"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 2, "out of memory; a smaller --batch-size, --class-chunk or backbone needs less"
    if isinstance(error, (RecursionError, OverflowError)):  # of the input, or of one's own code
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        place = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
        return 2, f"{type(error).__name__} in {place}: {error}"


def say(line):
    """The line on stderr, behind the script's name; what no terminal can show is escaped."""
    line = " ".join(line.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(OSError):  # nobody listens
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """Around main(): what the user can mend ends in one line and status 2, Ctrl-C in status 130."""
    quiet_libraries()
    if signal.getsignal(signal.SIGINT) is stop_at_once:  # now there is something to clear away
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe is expected, and not at Python's end
    except BaseException as error:
        if not (known := ending(error)):
            raise
        status, line = known
        if line:
            say(line)
        try:
            sys.stdout.flush()
        except OSError:  # Python tries once more at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)


# ------------------------------------------------------- before main()

def quiet_libraries():
    """What a library warns of or logs is dealt with here, or nothing that a user could change."""
    warnings.filterwarnings("ignore", module="PIL|torch|open_clip|timm|huggingface_hub")
    logging.disable(logging.CRITICAL)  # open_clip logs to the root


def stop_at_once(*_):
    """Ctrl-C during imports: there is nothing to clear away yet, and no module can swallow it."""
    say("interrupted")
    os._exit(130)


def guard():
    """From the first import on, a script of this repository ends as it does in main()."""
    def hook(kind, error, trace):
        if not (known := ending(error)):
            return sys.__excepthook__(kind, error, trace)
        say(known[1])
        os._exit(known[0])

    quiet_libraries()
    sys.excepthook = hook
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal may know ASCII only
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, stop_at_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # through `finally`, which clears away
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


started = getattr(sys.modules["__main__"], "__file__", None) or "/"
if Path(__file__).resolve().parent.parent in Path(started).resolve().parents:
    guard()  # a script of this repository was started, not a notebook or pytest
