"""What tests share: a small copy of the embedded data, the tiny CLIP, scripts run in-process."""

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
from data import world
from data.files import CATALOGUE

# Hundreds of runs in one process ask for the same one, which takes a tenth of a second to make.
open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)

EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
           "PermanentCrop", "Residential", "River", "SeaLake"]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root and cache for all tests: embedded data sets are drawn once, in few pictures."""
    world.PER_CLASS.update(train=20, val=2, test=8)
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def cli(root, tmp_path, monkeypatch, capfd):
    """Runs a script's main() as `python METHOD.py FLAGS`: its status, out, err and records.

    keep   leave the records of runs before in --out; otherwise a run begins without any
    given  flags in place of those that every test has: out=..., data_root=..., cache=..."""

    def run(method, *flags, keep=False, **given):
        values = {"data-root": root, "cache": root / "cache", "out": tmp_path / "results.jsonl"}
        values.update((name.replace("_", "-"), value) for name, value in given.items())
        argv = [f"{method}.py", *flags]
        for name, value in values.items():
            argv += [f"--{name}", value]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        out = Path(values["out"])
        if out.is_file() and not keep:
            out.unlink()
        status = 0
        try:
            with common.one_line_errors():
                importlib.import_module(method).main()
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        lines = out.read_text().splitlines() if out.is_file() else []
        records = [json.loads(line) for line in lines]
        return Namespace(status=status, out=printed.out, err=printed.err, records=records)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny CLIP."""
    out = tmp_path_factory.mktemp("tiny") / "unused.jsonl"
    flags = common.flags("", lr=1, batch_size=1, n_ctx=1)
    return common.load_clip(common.parse(flags, ["--device", "cpu", "--out", str(out)]))


def made_up_run(clip, names, template, batches, args):
    """A Run whose run.batches (or run.pixel_batches) are `batches`, a list, in every epoch."""
    data = common.Data("made up", names, template, template, [], [], [])
    run = common.Run("", args, clip, data, [], 1, 1, names, [])
    run.batches = run.pixel_batches = lambda epoch: batches
    return run


def made_up_pictures(folder, count, size=64, seed=0, ending="jpg"):
    """`count` pictures of noise in `folder`, as a list of paths."""
    rng, folder = random.Random(f"{folder.name}{seed}"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{folder.name}_{k + 1}.{ending}" for k in range(count)]
    for path in paths:
        Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((size, size)).save(path)
    return paths


@pytest.fixture
def eurosat(tmp_path):
    """A data root with three made-up pictures per class in EuroSAT's layout and split file."""
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(EUROSAT):
        paths = made_up_pictures(tmp_path / "root/eurosat/2750" / name, 3)
        for part, path in zip(split, paths):
            split[part].append([f"{name}/{path.name}", label, name])
    (tmp_path / "root" / CATALOGUE["eurosat"]["split"]).write_text(json.dumps(split))
    return tmp_path / "root"


def without_times(record):
    """A record without what may differ between two runs of the same."""
    return {key: value for key, value in record.items() if key not in ("seconds", "flags")}
