import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

import common
from data import world
from data.files import CATALOGUE

EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root that all tests share; the embedded data sets are drawn there once, with fewer pictures."""
    world.PER_CLASS.update(train=20, val=2, test=8)
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def cli(root, tmp_path, monkeypatch, capfd):
    """Runs a script's main() as `python METHOD.py FLAGS`; returns status, out, err and the records it wrote.

    With `keep`, those of runs before stay in --out."""

    def run(method, *flags, keep=False, **given):
        values = {"data-root": root, "cache": root / "cache", "out": tmp_path / "results.jsonl", **{k.replace("_", "-"): v for k, v in given.items()}}
        argv = [f"{method}.py", *map(str, flags), *(str(x) for k, v in values.items() for x in (f"--{k}", v))]
        monkeypatch.setattr(sys, "argv", argv)
        if Path(values["out"]).is_file() and not keep:
            Path(values["out"]).unlink()
        status = 0
        try:
            with common.one_line_errors():
                importlib.import_module(method).main()
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        lines = Path(values["out"]).read_text().splitlines() if Path(values["out"]).is_file() else []
        return Namespace(status=status, out=out, err=err, records=[json.loads(line) for line in lines])

    return run


@pytest.fixture(scope="session")
def tiny():
    """The tiny CLIP."""
    return common.load_clip(common.parse(common.flags("", 1, 1, 1), ["--device", "cpu", "--out", "/tmp/unused.jsonl"]))


def made_up_run(clip, names, template, batches, args):
    """A Run whose batches are given: `batches`, a list of what run.batches (or run.pixel_batches) yields in every epoch."""
    data = common.Data("made up", names, template, template, [], [], [])
    run = common.Run("", args, clip, data, [], 1, 1, names, [])
    run.batches = run.pixel_batches = lambda epoch: batches
    return run


def made_up_pictures(folder, count, size=64, seed=0, ending="jpg"):
    """`count` pictures of noise below `folder`, as a list of paths."""
    rng, folder = random.Random(f"{folder.name}{seed}"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{folder.name}_{k + 1}.{ending}" for k in range(count)]
    for path in paths:
        Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((size, size)).save(path)
    return paths


@pytest.fixture
def eurosat(tmp_path):
    """A data root with three made-up pictures per class in EuroSAT's true layout, split file included."""
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(EUROSAT):
        paths = made_up_pictures(tmp_path / "root/eurosat/2750" / name, 3)
        for part, path in zip(split, paths):
            split[part].append([f"{name}/{path.name}", label, name])
    (tmp_path / "root" / CATALOGUE["eurosat"]["split"]).write_text(json.dumps(split))
    return tmp_path / "root"


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "flags")}
