"""What a user may get wrong, and what then happens: one line, status 2, and no file is lost."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images
from test_runs import METHODS, QUICK, TINY, refused

import common
import coop
from data.errors import Problem
from data.results import records, tables

HERE = Path(__file__).resolve().parent.parent
TWO = ("--seeds", "1,2")


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, word", [
    (["--dataset", "eurosta"], "eurosat"),
    (["--dataset", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--dataset", ""], "data set ''"),
    (["--transfer", "shapes"], "the one that is learned"),
    (["--dataset", "shapes,forms", "--transfer", "forms"], "the one that is learned"),
    (["--template", "a photo"], "{}"),
    (["--ctx-init", "a photo of a {}"], "--ctx-init"),
    (["--ctx-init", " "], "--ctx-init"),
    (["--ctx-init", "a" + 80 * " a"], "tokens"),
    (["--n-ctx", "76"], "--n-ctx"),
    (["--shots", "0"], "--shots"),
    (["--shots", "4,4"], "twice"),
    (["--seeds", ""], "--seeds"),
    (["--lr", "nan"], "--lr"),
    (["--shot", "4"], "--shot"),
    (["--class-specific", "--base-to-new"], "--class-specific"),
    (["--class-specific", "--transfer", "forms"], "--class-specific"),
    (["--backbone", TINY, "--pretrained", "openai"], "--pretrained openai"),
    (["--pretrained", "openai"], "tiny_clip holds its own weights"),
    (["--save", "x", *TWO], "{seed}"),
    (["--save", "{seed}", *TWO, "--shots", "1,2"], "{shots}"),
    (["--save", "{seed}", *TWO, "--dataset", "shapes,forms"], "{dataset}"),
    (["--save", "x", "--load", "y"], "y"),
    (["--export", "x", *TWO], "--export"),
    (["--export", "x", "--views", "0"], "--views")])
def test_flags_that_make_no_sense_are_refused(cli, flags, word):
    refused(cli("coop", *flags), word)


@pytest.mark.parametrize("flag", ["--out", "--save", "--load", "--export", "--cache", "--data-root",
                                  "--backbone", "--pretrained"])
def test_empty_values_are_refused(flag):
    for value in ("", " "):
        with pytest.raises(Problem, match=flag):
            common.parse(coop.flags(), [flag, value])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(cli):
    refused(cli("coop", device="cuda"), "--device cuda")


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_tokens_beside_the_words_that_decide_it(cli, method):
    run = cli(method, *QUICK, "--n-ctx", 3, "--ctx-init", "a photo of a")
    if method == "restore":                     # so many of the words are learned
        assert run.status == 0 and run.records[0]["changed"]["n_ctx"] == 3
    else:
        refused(run, "--n-ctx", "--ctx-init")


def test_base_to_new_needs_two_classes_in_each_half(cli, tmp_path):
    for name in "abc":
        make_images(tmp_path / "mine" / name, 2)
    run = cli("coop", *QUICK, "--base-to-new", dataset=tmp_path / "mine", backbone=TINY)
    refused(run, "two classes or more in each half")


@pytest.mark.parametrize("flags", [(), ("--base-to-new",), ("--transfer", "forms")])
def test_validation_needs_validation_images(cli, tmp_path, flags):
    for part in ("train", "test"):
        for name in "abcd":
            make_images(tmp_path / "mine" / part / name, 1)
    run = cli("coop", *QUICK, "--validation", *flags, dataset=tmp_path / "mine", backbone=TINY)
    refused(run, "mine", "no validation images")


def test_classes_with_the_same_prompt_are_refused(cli, tmp_path):
    for name in ("barn_owl", "Barn owl"):
        make_images(tmp_path / "mine" / name, 2)
    run = cli("coop", *QUICK, dataset=tmp_path / "mine", backbone=TINY)
    refused(run, "'barn_owl'", "'Barn owl'", "the same prompt")


def test_words_that_the_tiny_clip_has_never_met_are_named(cli):
    flags = ("--template", "zebra {}", "--ctx-init", "giraffe photo")
    assert "never met 'zebra', 'giraffe';" in cli("coop", *QUICK, *flags).out


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_method_and_its_flags_in_groups(cli, method):
    run = cli(method, "--help")
    assert run.status == 0 and "data and CLIP:" in run.out and "training:" in run.out
    assert "arXiv" in run.out and "--ctx-init" in run.out and "%(" not in run.out
    assert max(map(len, run.out.splitlines())) <= 100


# ---------------------------------------------------------------- files that a run writes

@pytest.fixture
def files(cli, tmp_path):
    """A file of every kind that a run writes, and others."""
    cli("coop", *QUICK, save=tmp_path / "prompt", out=tmp_path / "results")
    cli("coop", *QUICK, export=tmp_path / "export", out=tmp_path / "results")
    (tmp_path / "text").write_text("my thesis\n")
    (tmp_path / "json").write_text('{"a": 1}\n')
    return tmp_path


KINDS = {"--out": "results", "--save": "prompt", "--export": "export"}


@pytest.mark.parametrize("flag", KINDS)
def test_only_a_file_of_the_same_kind_is_replaced(files, flag):
    common.parse(coop.flags(), [flag, str(files / KINDS[flag])])
    for name in {*KINDS.values(), "text", "json"} - {KINDS[flag]}:
        with pytest.raises(Problem, match=f"{flag} {files / name}: exists and holds something"):
            common.parse(coop.flags(), [flag, str(files / name)])


@pytest.mark.parametrize("flag", KINDS)
def test_places_where_nothing_can_be_written_are_found_first(files, flag, monkeypatch):
    (files / "link").symlink_to(files / "elsewhere")
    os.mkfifo(files / "pipe")
    for place in (files, files / "link", files / "pipe", files / "text/new"):
        with pytest.raises(Problem, match=f"{flag} {place}: "):
            common.parse(coop.flags(), [flag, str(place)])
    monkeypatch.chdir("/")     # not below `files`; nothing is written
    monkeypatch.setattr(os, "access", lambda place, mode: str(files) not in str(place))
    for place in (files / KINDS[flag], files / "new"):
        with pytest.raises(Problem, match=f"{flag} {place}: cannot write there"):
            common.parse(coop.flags(), [flag, str(place)])


def test_one_file_cannot_take_two_things(cli, tmp_path):
    refused(cli("coop", *QUICK, save=tmp_path / "x", out=tmp_path / "x"), "the same file")
    refused(cli("coop", *QUICK, save=tmp_path / "x", export=tmp_path / "x"), "the same file")


def test_a_cache_that_cannot_be_written_names_the_flag(cli, files):
    refused(cli("coop", *QUICK, cache=files / "text"), "--cache", files / "text")


def test_a_method_that_trains_on_pixels_is_not_exported(cli, tmp_path, monkeypatch):
    import restore
    monkeypatch.setattr(restore, "train", lambda *some: pytest.fail("was trained"))
    refused(cli("restore", *QUICK, export=tmp_path / "x"), "--export")


# ---------------------------------------------------------------- lines of results

def record(**change):
    """Return a record with all its fields."""
    return {"method": "coop", "dataset": "shapes", "backbone": "tiny_clip", "pretrained": "",
            "shots": 4, "seed": 1, "changed": {}, "protocol": "few-shot", "setting": "a",
            "code": "b", "weights": "c", "data": "d", "run": "e", "zero_shot": 50.0,
            "accuracy": 60.0, "kl": {"all classes": 0.1}, "per_class": {}, "transfer": {}, **change}


ODD = [{name: None} for name in record() if name not in ("kl", "per_class")] + [
    {"accuracy": value} for value in (float("nan"), float("inf"), "60", True, [], -1, 10**400)] + [
    {"protocol": "base-to-new"}, {"protocol": []}, {"shots": 4.0}, {"seed": "1"}, {"changed": []},
    {"transfer": []}, {"transfer": {"forms": 1}},
    {"transfer": {"forms": {"zero_shot": 1, "accuracy": None, "data": "d"}}}]


def test_odd_lines_are_passed_over_and_counted(tmp_path, capfd):
    lines = [json.dumps(record(**change)) for change in ODD]
    lines += ["null", "[1]", "{", "[" * 9999, "{}", "\ud800", json.dumps(record())[:-9]]
    text = "\n".join([*lines, "", json.dumps(record(seed=2))])
    (tmp_path / "odd.jsonl").write_bytes(text.encode(errors="surrogatepass") + b"\n\xff\n")
    found, odd = records.read(tmp_path / "odd.jsonl")
    assert [r["seed"] for r in found] == [2] and odd == len(lines) + 1
    tables.main([str(tmp_path / "odd.jsonl")])
    printed = capfd.readouterr()
    assert f"passed over {odd} lines" in printed.err and "60.0" in printed.out


@pytest.mark.parametrize("change", [
    {"kl": None}, {"kl": {"all classes": "x"}}, {"kl": {"all classes": float("nan")}},
    {"per_class": None}, {"per_class": {"all classes": [["a", "x", None, 1]]}},
    {"changed": {"lr": None, "a": [1, "x"], "b": {}}}, {"dataset": "\ud800\n"}, {"loss": "x"},
    {"protocol": "base-to-new", "base": 1, "new": 1, "harmonic": 1, "zero_shot_base": 1,
     "zero_shot_new": 0, "zero_shot_harmonic": 1, "shift_after": {"gap": "x"}}])
@pytest.mark.parametrize("flags", [(), ("--classes",), ("--all", "--markdown")])
def test_odd_values_elsewhere_break_no_table(tmp_path, change, flags):
    (tmp_path / "odd.jsonl").write_text(f"{json.dumps(record(**change))}\n")
    try:
        tables.main([str(tmp_path / "odd.jsonl"), *flags])
    except Problem:
        pass


def test_a_line_that_was_cut_short_does_not_eat_the_next_record(tmp_path):
    file = tmp_path / "results.jsonl"
    for seed in (1, 2):
        records.append(file, record(seed=seed))
    file.write_bytes(file.read_bytes()[:-20])
    records.append(file, record(seed=3))
    found, odd = records.read(file)
    assert [r["seed"] for r in found] == [1, 3] and odd == 1


def test_lines_of_several_processes_do_not_mix(tmp_path):
    def append_many(seed):
        for _ in range(20):
            records.append(file, record(seed=seed, padding="x" * 30000))

    file, fork = tmp_path / "results.jsonl", multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found, odd = records.read(file)
    assert sorted(r["seed"] for r in found) == sorted(20 * [0, 1, 2, 3]) and odd == 0


# ---------------------------------------------------------------- how a command ends

@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 2, "a.txt: Permission denied"),
    (MemoryError(), 2, "out of memory: use a smaller --class-chunk"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "out of GPU memory")])
def test_a_command_ends_in_one_line(cli, monkeypatch, error, status, words):
    def train(prompt, run):
        raise error

    monkeypatch.setattr(coop, "train", train)
    run = cli("coop", *QUICK, *TWO)
    assert run.status == status and len(run.err.splitlines()) == 1 and not run.records
    assert run.err.startswith("coop.py: ") and words in run.err


def test_a_mistake_in_the_code_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr(coop, "train", lambda *some: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("coop", *QUICK)


def test_an_old_python_is_told_so_before_anything_else():
    code = "import sys; sys.version_info = (3, 10, 9); import common"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert "needs Python 3.11" in run.stderr


def test_a_closed_pipe_is_no_error(tmp_path):
    lines = [json.dumps(record(seed=seed, method=f"m{seed}", run=str(seed))) for seed in range(999)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    command = f"{sys.executable} common.py {tmp_path}/results.jsonl | head -1"
    run = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True)
    assert not run.stderr
