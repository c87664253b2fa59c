"""What tests share: small embedded data sets, the tiny CLIP, scripts run in-process, images."""

import functools
import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import open_clip
import pytest
from PIL import Image

import common
from data.errors import one_line_errors
from data.world import sets

# Hundreds of runs in one process ask for the same one, which takes a tenth of a second to make.
open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root and cache for all tests: embedded data sets are drawn once, in few images."""
    sets.PER_CLASS.update(train=20, val=2, test=8)
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run every test in a folder of its own: what a user has in runs/ does not matter."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(root, tmp_path, monkeypatch, capfd):
    """Run a script's main() as `python METHOD.py FLAGS`: its status, out, err and records.

    keep   leave the records of runs before in --out; otherwise a run begins without any
    given  flags in place of those that every test has: out=..., data_root=..., device=..."""

    def run(method, *flags, keep=False, **given):
        values = {"data-root": root, "out": tmp_path / "results.jsonl", "device": "cpu"}
        values.update((name.replace("_", "-"), value) for name, value in given.items())
        argv = [f"{method}.py", *flags]
        for name, value in values.items():
            argv += [f"--{name}", value] if value is not None else []
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        out = Path(values["out"])
        if out.is_file() and not keep:
            out.unlink()
        status = 0
        try:
            with one_line_errors():
                importlib.import_module(method).main()
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        lines = out.read_text().splitlines() if out.is_file() else []
        records = [json.loads(line) for line in lines]
        return Namespace(status=status, out=printed.out, err=printed.err, records=records)

    return run


@pytest.fixture(scope="session")
def tiny():
    """The tiny CLIP on the CPU."""
    return common.load_clip()


def make_run(clip, script, names, batches, *flags):
    """A Run of made-up classes whose batches, of every epoch, are `batches`, a list.

    script  the method's module; flags as on its command line"""
    args = common.parse(script.flags(), [*flags])
    args = common.settle(args, "shapes")
    data = common.Data("made up", names, "a photo of a {}.", "a photo of a {}.")
    run = common.Run(script.__name__, "", args, clip, data, 1, 1, [],
                     list(enumerate(names)), [])
    run.batches = run.pixel_batches = lambda epoch: batches
    return run


def make_images(folder, count, size=64, seed=0):
    """Write `count` images of noise into `folder`; return their paths."""
    rng, folder = random.Random(f"{folder.name}{seed}"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{folder.name}_{k + 1}.jpg" for k in range(count)]
    for path in paths:
        Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((size, size)).save(path)
    return paths


@pytest.fixture
def mine(tmp_path):
    """A folder of one's own: two classes, two training and two test images of each."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            make_images(tmp_path / "mine" / part / name, 2)
    return tmp_path / "mine"
