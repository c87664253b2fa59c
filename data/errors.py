"""How bad input ends: one line on stderr that names the thing and the way out, and exit status 2."""

import argparse
import contextlib
import math
import sys
import warnings
from pathlib import Path

import torch


class Problem(Exception):
    """Something that the user can mend; the message is the one line that says what and how."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(message)


def number(kind=float, low=0.0, high=math.inf, low_ok=False):
    """An argparse type: an int or float in (low, high), or [low, high) with low_ok."""
    def parse(text):
        value = kind(text)
        if not (low <= value < high and (low_ok or value > low)):
            raise argparse.ArgumentTypeError(f"{text} is out of range: wants {'at least' if low_ok else 'more than'} {low:g}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
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


@contextlib.contextmanager
def one_line_errors():
    """Around main(): what the user can mend ends in one line on stderr and status 2, Ctrl-C in status 130."""
    warnings.filterwarnings("ignore", module="PIL|torch|open_clip|timm|torchvision")
    name = Path(sys.argv[0]).name
    try:
        yield
    except Problem as problem:
        status, message = 2, str(problem)
    except torch.OutOfMemoryError:
        status, message = 2, "out of GPU memory; a smaller --batch-size or backbone needs less"
    except OSError as error:  # no space, no permission, ...
        status, message = 2, f"{error.filename or 'writing'}: {error.strerror or error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    else:
        return
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
