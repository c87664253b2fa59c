"""What a user may get wrong, and what then happens: one line, status 2, and no file is lost."""

import errno
import json
import multiprocessing
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_images
from test_runs import METHODS, QUICK, TINY, refused
from test_tables import record

import common
import coop
import restore
from data.errors import Problem
from data.results import records

HERE = Path(common.__file__).parent


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, word", [
    (["--dataset", "eurosta"], "eurosat"),
    (["--transfer", "shapes"], "the data set that is learned"),
    (["--ctx-init", "a photo of a {}"], "--ctx-init"),
    (["--ctx-init", "a" + 80 * " a"], "tokens"),
    (["--n-ctx", "3", "--ctx-init", "a photo of a"], "--n-ctx beside --ctx-init"),
    (["--shots", "0"], "--shots: '0': wants a whole number above 0"),
    (["--shots", "4,4"], "twice"),
    (["--shot", "4"], "--shot"),
    (["--class-specific", "--base-to-new"], "--class-specific"),
    (["--pretrained", "openai"], "tiny_clip holds its own weights"),
    (["--save", " "], "--save: is empty"),
    (["--save", "x", "--seeds", "1,2"], "--save: wants a single run"),
    (["--save", "x", "--export", "x"], "the same file"),
    (["--export", "x", "--views", "0"], "--views above 0")])
def test_flags_that_make_no_sense_are_refused(cli, flags, word):
    refused(cli("coop", *flags), word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(cli):
    refused(cli("coop", device="cuda"), "--device cuda")


@pytest.mark.parametrize("folders, flags, word", [
    (["a", "b", "c"], ["--base-to-new"], "two classes or more in each half"),
    (["train/a", "train/b", "test/a", "test/b"], ["--validation"], "no validation images"),
    (["barn_owl", "Barn owl"], [], "'Barn owl' and 'barn_owl' have the same prompt")])
def test_folders_that_do_not_serve_are_refused(cli, tmp_path, folders, flags, word):
    for folder in folders:
        make_images(tmp_path / "mine" / folder, 2)
    refused(cli("coop", *QUICK, *flags, dataset=tmp_path / "mine", backbone=TINY), "mine", word)


def test_words_that_the_tiny_clip_has_never_met_are_named(cli):
    flags = ("--template", "zebra {}", "--ctx-init", "giraffe photo")
    assert "never met 'zebra', 'giraffe';" in cli("coop", *QUICK, *flags).out


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_method_and_its_flags(cli, method):
    run = cli(method, "--help")
    assert run.status == 0 and "arXiv" in run.out and "--ctx-init" in run.out


# ---------------------------------------------------------------- files that a run writes

def test_only_a_file_of_the_same_kind_is_replaced(cli, tmp_path):
    kinds = {f"--{name}": tmp_path / name for name in ("out", "save", "export")}
    cli("coop", *QUICK, out=kinds["--out"], save=kinds["--save"], export=kinds["--export"])
    (tmp_path / "text").write_text("my thesis\n")
    for flag, own in kinds.items():
        common.parse(coop.flags(), [flag, str(own)])
        for other in {*kinds.values(), tmp_path / "text"} - {own}:
            with pytest.raises(Problem, match=f"{flag} {other}: exists and holds something else"):
                common.parse(coop.flags(), [flag, str(other)])


def test_places_where_nothing_can_be_written_are_found_first(cli, tmp_path):
    (tmp_path / "text").write_text("my thesis\n")
    refused(cli("coop", *QUICK, save=tmp_path), f"--save {tmp_path}: neither new nor a plain file")
    refused(cli("coop", *QUICK, save=f"{tmp_path}/new/"), "new/: neither new nor a plain file")
    refused(cli("coop", *QUICK, save=tmp_path / "text/new"), "--save", "cannot write there")
    refused(cli("coop", *QUICK, cache=tmp_path / "text"), "--cache", tmp_path / "text")


def test_a_method_that_trains_on_pixels_is_not_exported(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "train", lambda *some: pytest.fail("was trained"))
    refused(cli("restore", *QUICK, export=tmp_path / "x"), "--export")


# ---------------------------------------------------------------- lines of results

def test_odd_lines_are_passed_over_and_counted(tmp_path):
    lines = [json.dumps(record(protocol="base-to-new")), "null", "{}", "{", "\xff"]
    text = "\n".join([*lines, "", json.dumps(record(seed=2))])
    (tmp_path / "odd.jsonl").write_bytes(text.encode("latin-1"))
    found, odd = records.read(tmp_path / "odd.jsonl")
    assert [r["seed"] for r in found] == [2] and odd == len(lines)


def test_a_line_that_was_cut_short_does_not_eat_the_next_record(tmp_path):
    file = tmp_path / "results.jsonl"
    for seed in (1, 2):
        records.append(file, record(seed=seed))
    file.write_bytes(file.read_bytes()[:-20])
    records.append(file, record(seed=3))
    found, odd = records.read(file)
    assert [r["seed"] for r in found] == [1, 3] and odd == 1


def test_lines_of_several_processes_do_not_mix(tmp_path):
    file = tmp_path / "results.jsonl"
    several = [record(seed=seed, padding="x" * 30000) for seed in range(1000)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(partial(records.append, file), several, chunksize=250)
    found, odd = records.read(file)
    assert sorted(r["seed"] for r in found) == list(range(1000)) and odd == 0


# ---------------------------------------------------------------- how a command ends

@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     "out of memory: use a smaller --class-chunk"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "out of memory: use a smaller")])
def test_a_command_ends_in_one_line(cli, monkeypatch, error, status, words):
    def train(prompt, run):
        raise error

    monkeypatch.setattr(coop, "train", train)
    run = cli("coop", *QUICK, "--seeds", "1,2")
    assert run.status == status and len(run.err.splitlines()) == 1 and not run.records
    assert run.err.startswith("coop.py: ") and words in run.err


def test_an_old_python_is_told_so_before_anything_else():
    code = "import sys; sys.version_info = (3, 10, 9); import common"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert run.returncode == 1 and run.stderr == b"this repository needs Python 3.11.4 or newer\n"


def test_a_closed_pipe_is_no_error():
    pipe = f"set -o pipefail; {sys.executable} common.py --data | true"
    run = subprocess.run(["bash", "-c", pipe], cwd=HERE, capture_output=True)
    assert run.returncode == 141 and not run.stderr
