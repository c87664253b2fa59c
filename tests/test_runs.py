"""What a run leaves behind, what it says, and how the runs of one command are dealt out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import made_up_pictures
from safetensors.torch import load_file, save_file

import common
import coop
from data import records

HERE = Path(__file__).parent.parent
QUICK = ("--epochs", 1, "--views", 1, "--shots", 1)
TINY = HERE / "data" / "tiny_clip"


def refused(run, *words):
    """One line on stderr that has the words in it, status 2, nothing recorded."""
    assert run.status == 2 and not run.records, run.out
    assert len(run.err.splitlines()) == 1 and "Traceback" not in run.err, run.err
    assert all(str(word) in run.err for word in words), run.err


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test where a training begins."""
    monkeypatch.setattr(coop, "train", lambda *_: pytest.fail("was trained"))


@pytest.fixture
def learned(cli, tmp_path):
    """A prompt of CoOp's, learned on `shapes` with 2 shots and seed 3."""
    file = tmp_path / "learned.safetensors"
    cli("coop", "--epochs", 1, "--views", 1, "--shots", 2, "--seeds", 3, save=file)
    return file


# ---------------------------------------------------------------- recorded first, printed then

class Broken:
    """A standard output that takes nothing."""
    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space")])
def test_a_run_whose_output_cannot_be_written_has_its_record(cli, monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert len(cli("coop", *QUICK).records) == 1


def test_a_run_whose_stderr_is_closed_has_its_record(root, tmp_path):
    flags = [*QUICK, "--data-root", root, "--cache", root / "cache", "--out", tmp_path / "r.jsonl"]
    command = map(str, [sys.executable, HERE / "coop.py", *flags, "2>&-"])
    assert subprocess.run(" ".join(command), shell=True, stdout=subprocess.DEVNULL).returncode == 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_is_said_of_the_results_by_name(cli, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "open", full, raising=False)
    refused(cli("coop", *QUICK), "results.jsonl", "No space left")


# ---------------------------------------------------------------- --save

def test_saving_onto_the_results_is_refused(cli, tmp_path, no_training):
    out = tmp_path / "results.jsonl"
    refused(cli("coop", save=tmp_path / "x" / ".." / "results.jsonl", out=out), "--out")


def test_saving_onto_what_is_no_plain_file_is_refused(cli, tmp_path, no_training):
    os.mkfifo(tmp_path / "pipe")
    refused(cli("coop", save=tmp_path / "pipe"), "pipe", "plain file")
    refused(cli("coop", save=tmp_path), tmp_path, "plain file")


def test_saving_onto_a_link_is_refused(cli, tmp_path, no_training):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(cli("coop", save=tmp_path / "link"), "link")


def test_recording_onto_what_is_no_plain_file_is_refused(cli, tmp_path, no_training):
    os.mkfifo(tmp_path / "pipe")
    refused(cli("coop", out=tmp_path / "pipe"), "pipe", "plain file")


@pytest.mark.parametrize("name", ["{shots:>9999999999}", "{shots[0]}", "{shots!r}", "{", "{0}"])
def test_only_shots_and_seed_are_filled_in(cli, tmp_path, name, no_training):
    refused(cli("coop", save=tmp_path / name), "{shots} and {seed}")


def test_what_is_saved_goes_over_what_was_saved(cli, learned):
    before = learned.read_bytes()
    assert cli("coop", *QUICK, save=learned).status == 0 and learned.read_bytes() != before


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="not a git checkout")
def test_git_does_not_see_what_is_saved_in_the_repository():
    for file, ignored in (("ctx.safetensors", True), ("data/tiny_clip/a.safetensors", False),
                          ("tests/reference/a.safetensors", False)):
        found = subprocess.run(["git", "check-ignore", "-q", file], cwd=HERE)
        assert (found.returncode == 0) == ignored, file


# ---------------------------------------------------------------- --load

def test_what_is_loaded_carries_its_shots_seed_and_data_set(cli, learned):
    run = cli("coop", "--dataset", "scenes", load=learned)
    assert run.out.startswith("scenes with what was learned on shapes, 2 shots, seed 3 ")
    (record,) = run.records
    assert (record["dataset"], record["shots"], record["seed"]) == ("scenes", 2, 3)
    assert record["loaded"] == str(learned) and "loss" not in record


def test_class_specific_contexts_are_loaded_for_their_own_classes_only(cli, tmp_path):
    file, flags = tmp_path / "own.safetensors", (*QUICK, "--class-specific")
    assert cli("coop", *flags, save=file).status == cli("coop", *flags, load=file).status == 0
    origin = {"dataset": "others", "shots": 1, "seed": 1, "protocol": "few-shot",
              "classes": [f"class {k}" for k in range(24)]}
    metadata = {"meaning": '{"method": "coop"}', "learned": json.dumps(origin)}
    save_file(load_file(file), tmp_path / "others.safetensors", metadata)
    refused(cli("coop", *flags, load=tmp_path / "others.safetensors"), "of other classes")


def test_a_file_is_loaded_once_whatever_the_flags_ask_for(cli, learned):
    assert len(cli("coop", "--seeds", "1,2", load=learned).records) == 1


def test_several_files_are_loaded_one_by_one(cli, tmp_path):
    name = tmp_path / "{seed}.safetensors"
    trained = cli("coop", *QUICK, "--seeds", "1,2", save=name)
    loaded = cli("coop", "--seeds", "1,2", load=name)
    names = [Path(record["loaded"]).name for record in loaded.records]
    assert names == ["1.safetensors", "2.safetensors"]
    assert [r["accuracy"] for r in loaded.records] == [r["accuracy"] for r in trained.records]


def test_what_was_learned_on_all_classes_has_no_new_ones(cli, learned):
    refused(cli("coop", "--base-to-new", load=learned), learned, "all classes")
    assert cli("coop", "--base-to-new", "--dataset", "scenes", load=learned).status == 0


@pytest.mark.parametrize("key", ["meaning", "learned"])
@pytest.mark.parametrize("text", ["[]", "1", "null", "[" * 10000, '"a'])
def test_a_load_file_with_odd_metadata(cli, tmp_path, learned, key, text):
    metadata = {"meaning": '{"method": "coop"}', "learned": "{}", key: text}
    save_file(load_file(learned), tmp_path / "odd.safetensors", metadata)
    refused(cli("coop", load=tmp_path / "odd.safetensors"), "odd.safetensors", "not a safetensors")


@pytest.mark.parametrize("changed", [
    {"seed": 2**40}, {"seed": -1}, {"shots": "4"}, {"dataset": []}, {"more": 1},
    {"classes": [["a"]]}])
def test_a_load_file_whose_origin_makes_no_sense(cli, tmp_path, learned, changed):
    origin = {"dataset": "shapes", "shots": 4, "seed": 1, "protocol": "few-shot",
              "classes": ["a"], **changed}
    metadata = {"meaning": '{"method": "coop"}', "learned": json.dumps(origin)}
    save_file(load_file(learned), tmp_path / "odd.safetensors", metadata)
    refused(cli("coop", load=tmp_path / "odd.safetensors"), "odd.safetensors", "not a safetensors")


def test_a_load_file_whose_header_is_nested_deep(cli, tmp_path):
    header = b'{"__metadata__": ' + b"[" * 10000 + b"]" * 10000 + b"}"
    (tmp_path / "deep").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(cli("coop", load=tmp_path / "deep"), "deep", "not a safetensors")


def test_a_named_pipe_or_folder_is_not_loaded(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(cli("coop", load=tmp_path / "pipe"), "--load", "is a pipe")
    refused(cli("coop", load=tmp_path), f"--load {tmp_path}: is a folder")


# ---------------------------------------------------------------- a training that fails

@pytest.mark.parametrize("method, epochs", [
    ("coop", 2), ("coop", 3), ("prograd", 2), ("mvp_mi", 3), ("restore", 2)])
def test_a_training_that_diverges_says_so(cli, tmp_path, method, epochs):
    run = cli(method, *QUICK, "--epochs", epochs, "--lr", 1e30, save=tmp_path / "saved")
    refused(run, "epoch", "loss", "smaller --lr")
    assert not (tmp_path / "saved").exists() and not run.out.replace(DEPTH, "")


DEPTH = "--depth 9: the towers have 4 blocks in common, so 4\n"


def test_a_load_file_with_nan_is_named(cli, learned):
    tensors = {name: tensor * float("nan") for name, tensor in load_file(learned).items()}
    with common.records.safe_open(learned, "pt") as content:
        metadata = content.metadata()
    save_file(tensors, learned, metadata)
    refused(cli("coop", load=learned), learned, "not finite")


def test_a_backbone_with_nan_is_named(cli, tmp_path):
    shutil.copytree(TINY, tmp_path / "clip")
    file = tmp_path / "clip/open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["visual.proj"][0] = float("nan")
    save_file(tensors, file)
    refused(cli("coop", *QUICK, backbone=f"local-dir:{tmp_path}/clip"), "clip", "not finite")


def test_worse_than_zero_shot_has_a_word_beside_it(cli, monkeypatch):
    monkeypatch.setattr(coop, "train", lambda prompt, run, args: prompt.v.data.mul_(100))
    for flags in ((), ("--base-to-new",)):
        first, *others = cli("coop", *QUICK, *flags).out.splitlines()[1:-1]
        assert first.endswith("  below zero-shot") and not any("below" in line for line in others)


def test_a_loss_that_rose_has_a_word_beside_it(cli, monkeypatch):
    def printed(*losses):
        def train(prompt, run, args):
            for epoch, loss in enumerate(losses):
                run.log(epoch, loss=loss)

        monkeypatch.setattr(coop, "train", train)
        lines = cli("coop", *QUICK).out.splitlines()
        return [line.split() for line in lines if "above its start" in line]

    assert printed(2.0, 1.0) == []
    assert printed(1.0, 0.5, 2.0)[0][-5:] == ["1.000", "2.000", "above", "its", "start"]


# ---------------------------------------------------------------- before the training

@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_bad_test_picture_is_found_before_the_training(cli, eurosat, no_training, content):
    (picture,) = (eurosat / "eurosat/2750/River").glob("*_3.jpg")  # the one in "test"
    picture.unlink()
    if content:
        picture.write_bytes(content)
    flags = {"data_root": eurosat, "cache": eurosat / "cache", "backbone": f"local-dir:{TINY}"}
    refused(cli("coop", *QUICK, dataset="eurosat", **flags), picture)
    refused(cli("coop", *QUICK, transfer="eurosat", **flags), picture)


def test_pictures_are_encoded_before_the_training_bar_begins(cli, tmp_path, monkeypatch):
    bars, original = [], common.progress

    def progress(*some, desc, **more):
        bars.append(desc)
        return original(*some, desc=desc, **more)

    monkeypatch.setattr(common, "progress", progress)
    assert cli("coop", *QUICK, cache=tmp_path / "cold").status == 0
    assert bars[-1] == "training" and set(bars[:-1]) == {"encoding images"}


def test_a_terminal_is_told_something_at_once(cli, monkeypatch):
    monkeypatch.setattr(common, "load_data", lambda *_: sys.exit(0))
    assert not cli("coop").err
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    assert "reading" in cli("coop").err


def test_weights_beside_a_folder_that_has_its_own_are_refused(cli):
    refused(cli("coop", "--pretrained", "openai"), "--pretrained openai", "tiny_clip")


# ---------------------------------------------------------------- what the record says

def test_the_record_says_which_code_and_data_it_is_from(cli):
    a, b = cli("coop", *QUICK).records[0], cli("prograd", *QUICK).records[0]
    assert a["data"] == b["data"] != cli("coop", *QUICK, "--dataset", "scenes").records[0]["data"]
    assert a["code"] != b["code"] and len(a["code"]) == 8


def test_the_record_says_who_split_the_data(cli, tmp_path):
    for name in "ab":
        made_up_pictures(tmp_path / "mine" / name, 6)
    mine = {"dataset": tmp_path / "mine", "backbone": f"local-dir:{TINY}"}
    assert "seeded" in cli("coop", *QUICK, **mine).records[0]["split"]


def test_the_record_says_which_flags_made_the_run_another_one(cli, tmp_path):
    (record,) = cli("coop", *QUICK, "--again", "--predict", TINY / "../figures/world.png").records
    assert record["changed"] == {"epochs": 1, "views": 1}


def test_the_record_tells_how_well_each_class_is_told_and_its_most_frequent_confusion():
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 2, 1, 2, 1, 1])
    assert records.per_class(["a", "b", "c"], labels, predicted) == [
        ["a", 25.0, "c"], ["b", 100.0, None], ["c", None, None]]


def test_the_classes_percentages_average_to_the_accuracy(cli):
    (record,) = cli("coop", *QUICK, "--base-to-new", "--transfer", "scenes").records
    assert set(record["per_class"]) == {"base", "new"}
    for part, rows in record["per_class"].items():  # each class has as many pictures
        assert sum(percent for _, percent, _ in rows) / len(rows) == pytest.approx(record[part])


def test_shots_that_are_not_there_are_recorded_as_those_that_were_used(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "20,1000")
    assert [r["shots"] for r in run.records] == [20] and "using the 20" in run.out


# ---------------------------------------------------------------- a sweep

def test_a_run_that_is_recorded_is_not_repeated_unless_asked(cli):
    first = cli("coop", *QUICK)
    again = cli("coop", *QUICK, keep=True)
    assert again.records == first.records and len(again.out.splitlines()) == 1
    assert "already in" in again.out and f"{first.records[0]['accuracy']:.1f}" in again.out
    assert len(cli("coop", *QUICK, "--again", keep=True).records) == 2


def test_a_recorded_run_costs_no_model(cli, monkeypatch):
    cli("coop", *QUICK)
    monkeypatch.setattr(common, "load_clip", lambda _: pytest.fail("was loaded"))
    assert cli("coop", *QUICK, keep=True).status == 0


def test_another_flag_makes_another_run(cli):
    cli("coop", *QUICK)
    assert len(cli("coop", *QUICK, "--lr", 0.01, keep=True).records) == 2
    assert len(cli("coop", *QUICK, "--transfer", "scenes", keep=True).records) == 3
    assert len(cli("prograd", *QUICK, keep=True).records) == 4


def test_places_make_no_other_run(cli, tmp_path):
    cli("coop", *QUICK)
    elsewhere = cli("coop", *QUICK, "--class-chunk", 5, cache=tmp_path / "cache", keep=True)
    assert len(elsewhere.records) == 1


def test_restore_is_not_repeated_either(cli):
    cli("restore", *QUICK)
    assert len(cli("restore", *QUICK, keep=True).records) == 1


@pytest.mark.parametrize("key", ["code", "data", "flags"])
def test_a_record_of_other_code_or_data_or_of_none_does_not_count(cli, tmp_path, key):
    (record,) = cli("coop", *QUICK).records
    (tmp_path / "results.jsonl").write_text(json.dumps({**record, key: None}) + "\nnull\n[1]\n")
    assert len(cli("coop", *QUICK, keep=True).records) == 4


def test_lines_that_are_no_json_are_passed_over(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a\n{}\n\xff\n' + b"[" * 10000 + b"\n\n{}")
    assert records.recorded(tmp_path / "r.jsonl") == [{}, {}]


def test_what_is_to_be_saved_is_not_skipped(cli, tmp_path):
    cli("coop", *QUICK)
    assert len(cli("coop", *QUICK, save=tmp_path / "a", keep=True).records) == 2


def test_runs_are_counted_and_end_with_mean_and_deviation(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "1,2", "--seeds", "1,2")
    titles = [line for line in run.out.splitlines() if line.startswith("shapes")]
    assert [f"run {k} of 4" in title for k, title in zip((1, 2, 3, 4), titles)] == [True] * 4
    a, b = (record["accuracy"] for record in run.records[:2])
    mean, deviation = (a + b) / 2, abs(a - b) / 2 ** 0.5
    assert titles[4].startswith("shapes, 1 shot, mean ± deviation over 2 seeds")
    assert run.out.split(titles[4])[1].split("\n")[1].endswith(f" {mean:.1f} ± {deviation:.1f}")
    assert titles[5].startswith("shapes, 2 shots, mean") and len(titles) == 6


def test_a_single_run_is_not_counted(cli):
    run = cli("coop", *QUICK)
    assert "run 1" not in run.out and "±" not in run.out


def test_the_mean_takes_in_what_was_recorded_before(cli):
    cli("coop", *QUICK, "--seeds", 1)
    run = cli("coop", *QUICK, "--seeds", "1,2", keep=True)
    assert len(run.records) == 2 and "over 2 seeds" in run.out


# ---------------------------------------------------------------- dealt out

@pytest.mark.parametrize("name, value", [
    ("RANK", ""), ("RANK", "x"), ("RANK", "-1"), ("RANK", "2"), ("RANK", "9" * 30),
    ("WORLD_SIZE", ""), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "1.5")])
def test_a_rank_that_makes_no_sense(cli, monkeypatch, name, value):
    for key, given in {"RANK": "0", "WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    refused(cli("coop", *QUICK), name)


@pytest.mark.parametrize("name, value", [
    ("ID", ""), ("ID", "x"), ("COUNT", "0"), ("COUNT", ""), ("COUNT", "x"), ("MIN", "x"),
    ("MAX", "")])
def test_a_slurm_array_that_makes_no_sense(cli, monkeypatch, name, value):
    for key, given in {"ID": "0", "COUNT": "2", "MIN": "0", "MAX": "1", name: value}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", given)
    refused(cli("coop", *QUICK), f"SLURM_ARRAY_TASK_{name}")


def test_a_rank_with_nothing_to_do_says_so(cli, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = cli("coop", *QUICK, "--seeds", "1,2")
    assert run.status == 0 and not run.records and run.out.startswith("nothing to do for process 2")


# ---------------------------------------------------------------- --predict

@pytest.mark.parametrize("method", ["coop", "restore"])
def test_five_likeliest_classes_of_a_picture(cli, root, tmp_path, method):
    picture = next((root / "shapes/images/red_heart").iterdir())
    file = tmp_path / "saved"
    trained = cli(method, *QUICK, "--predict", picture, picture, save=file)
    assert trained.status == 0 and trained.out.count(f"{picture}\n") == 2
    loaded = cli(method, "--predict", picture, load=file)
    lines = loaded.out.split(f"{picture}\n")[1].splitlines()[:6]
    assert lines == trained.out.split(f"{picture}\n")[1].splitlines()[:6]
    assert lines[0].split() == [method, "zero-shot"] and len(lines) == 6
    words = [line.split() for line in lines[1:]]  # "red heart 99.9 red ring 80.0"
    learned, zero_shot = [float(row[2]) for row in words], [float(row[5]) for row in words]
    assert sorted(learned, reverse=True) == list(learned) and sum(learned) <= 100.5
    assert sorted(zero_shot, reverse=True) == list(zero_shot)


def test_probabilities_are_softmax_of_the_scaled_similarities(tiny, cli, root):
    item = common.Item(next((root / "shapes/images/red_heart").iterdir()), 0, "")
    data = common.load_data("shapes", root)
    f = common.encode_images(tiny, [item], None)
    w = common.template_features(tiny, data.template, data.classnames)
    p, k = (tiny.logit_scale * f @ w.T).softmax(-1).max(-1)
    out = cli("coop", *QUICK, "--predict", item.path).out
    likeliest = out.split(f"{item.path}\n")[1].splitlines()[1]
    assert likeliest.endswith(f"{data.classnames[k]:<14} {100 * p.item():5.1f}")


def test_a_picture_to_predict_that_cannot_be_read_is_found_before_the_training(
        cli, tmp_path, no_training):
    refused(cli("coop", "--predict", tmp_path / "none.jpg"), "none.jpg")
