"""Saved prompts, which know where they come from, and the runs of one command."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import common
import coop
from data.weights import TINY_CLIP

QUICK = ("--epochs", 1, "--views", 1, "--shots", 1)
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
TINY = "tiny_clip"


def refused(run, *words):
    """Status 2, nothing recorded, and one line on stderr that has the words in it."""
    assert run.status == 2 and not run.records, run.out + run.err
    assert len(run.err.splitlines()) == 1 and "Traceback" not in run.err, run.err
    assert all(str(word) in run.err for word in words), run.err


def copy_clip(folder, change):
    """Copy the tiny CLIP to a folder, with a change added to a weight; return its --backbone."""
    file = shutil.copytree(TINY_CLIP, folder) / "open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["text_projection"] += change
    save_file(tensors, file)
    return f"local-dir:{folder}"


@pytest.fixture
def saved(cli, tmp_path):
    """A prompt of CoOp's in a file, of 2 shots and seed 3."""
    file = tmp_path / "saved"
    cli("coop", "--epochs", 1, "--views", 1, "--shots", 2, "--seeds", 3, "--lr", 0.1, save=file)
    return file


# ---------------------------------------------------------------- saved and loaded prompts

@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_prompt_is_as_accurate_as_the_saved_one(cli, tmp_path, method):
    flags = ("--epochs", 2, "--views", 1, "--shots", 2, "--lr", 0.1, "--base-to-new")
    trained = cli(method, *flags, transfer="forms", save=tmp_path / "saved").records[0]
    loaded = cli(method, "--base-to-new", transfer="forms", load=tmp_path / "saved").records[0]
    for name in ("base", "new", "zero_shot_base", "kl", "confusion", "transfer", "shots", "seed"):
        assert loaded[name] == trained[name], name
    assert "loss" not in loaded


def test_a_prompt_file_brings_data_set_template_and_training_flags(cli, tmp_path):
    own = ("--position", "front", "--n-ctx", 3, "--batch-size", 2, "--template", "{} night.")
    file = tmp_path / "saved"
    trained = cli("coop", *QUICK, *own, "--lr", 0.1, dataset="forms", save=file).records[0]
    loaded = cli("coop", load=file).records[0]
    assert loaded["changed"] == {"load": str(file), "template": "{} night."}
    for name in ("dataset", "data", "accuracy"):
        assert loaded[name] == trained[name]
    for name in ("position", "n_ctx", "batch_size", "template", "epochs", "lr", "backbone"):
        assert loaded["flags"][name] == trained["flags"][name]


def test_flags_that_contradict_the_prompt_file_are_refused(cli, saved):
    for flag, value in (("--epochs", 2), ("--shots", 4), ("--seeds", 1)):
        refused(cli("coop", flag, value, load=saved), saved, flag)
    same = ("--epochs", 1, "--shots", 2, "--seeds", 3, "--lr", 0.1)
    assert cli("coop", *same, load=saved).status == 0


def test_a_prompt_is_tested_with_the_flags_of_a_test(cli, saved):
    (record,) = cli("coop", "--template", "{} night.", "--test-images", 24, load=saved).records
    assert record["changed"]["template"] == "{} night."
    assert sum(map(sum, record["confusion"]["all classes"])) == 24


def test_a_class_is_predicted_from_a_prompt_file_alone(cli, tmp_path, root):
    image = next((root / "shapes/images/red_heart").iterdir())
    trained = cli("coop", *QUICK, "--predict", image, save=tmp_path / "saved")
    loaded = cli("coop", "--predict", image, load=tmp_path / "saved", data_root=tmp_path / "none")
    assert loaded.status == 0 and not loaded.records and not (tmp_path / "none/shapes").exists()
    assert loaded.out in trained.out and "red heart" in loaded.out
    lines = [line.split() for line in loaded.out.splitlines()[3:]]
    assert len(lines) == 5 and float(lines[0][2]) >= float(lines[1][2])


def test_classes_that_a_prompt_has_learned_are_not_new(cli, saved):
    refused(cli("coop", "--base-to-new", load=saved), saved, "new half")
    refused(cli("coop", "--base-to-new", load=saved, dataset="shapes_clean"), saved, "new half")
    assert cli("coop", "--base-to-new", load=saved, dataset="scenes").status == 0


def test_contexts_of_other_classes_are_refused(cli, tmp_path):
    cli("coop", *QUICK, "--class-specific", save=tmp_path / "saved")
    assert cli("coop", load=tmp_path / "saved").status == 0
    refused(cli("coop", load=tmp_path / "saved", dataset="scenes"), "of other classes")


def test_another_data_set_is_tested_as_a_target_of_transfer_is(cli, tmp_path):
    """MVP-MI: the prompt keeps its template and trained classes, the data set has its template."""
    flags, file = (*QUICK, "--template", "{} night."), tmp_path / "saved"
    trained = cli("mvp_mi", *flags, transfer="scenes", save=file).records[0]
    elsewhere = cli("mvp_mi", load=file, dataset="scenes").records[0]
    for name, value in trained["transfer"]["scenes"].items():
        assert elsewhere[name] == value, name


def test_words_that_prograd_has_left_over_travel_with_the_prompt(cli, tmp_path):
    flags = ("--template", "a type of pet, a photo of a {}.", "--lr", 0.1)     # 9 tokens, 8 words
    trained = cli("prograd", *QUICK, *flags, save=tmp_path / "saved", transfer="forms").records[0]
    assert len(load_file(tmp_path / "saved")["left_over"]) == 1
    loaded = cli("prograd", load=tmp_path / "saved", dataset="forms").records[0]    # has none
    assert loaded["accuracy"] == trained["transfer"]["forms"]["accuracy"]


# ---------------------------------------------------------------- prompt files that do not fit

def test_prompts_of_another_method_or_other_weights_are_refused(cli, saved, tmp_path):
    refused(cli("prograd", load=saved), saved, "coop", "prograd")
    other = copy_clip(tmp_path / "clip", 0.1)
    refused(cli("coop", load=saved, backbone=other), saved, "other weights")


def test_a_damaged_prompt_is_refused_even_if_its_run_is_recorded(cli, saved):
    cli("coop", load=saved)
    content = bytearray(saved.read_bytes())
    content[-3] ^= 64
    for damaged in (content, content[:-8]):
        saved.write_bytes(damaged)
        run = cli("coop", load=saved, keep=True)
        assert run.status == 2 and str(saved) in run.err and "already in" not in run.out


def test_what_is_no_prompt_is_refused(cli, tmp_path):
    (tmp_path / "text").write_text("text")
    refused(cli("coop", load=tmp_path / "text"), "text", "no prompt")
    weights = TINY_CLIP / "open_clip_model.safetensors"
    refused(cli("coop", load=weights), weights, "no prompt")
    refused(cli("coop", load=tmp_path), f"--load {tmp_path}: there is no such file")
    refused(cli("coop", load=tmp_path / "none"), "--load", "none: there is no such file")


# ---------------------------------------------------------------- the runs of a command

def test_torchrun_deals_the_runs_in_blocks(monkeypatch):
    jobs, dealt = [(name, 1, seed) for name in "ab" for seed in range(3)], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "0123":
        monkeypatch.setenv("RANK", rank)
        dealt.append(common.share(jobs))
    assert sum(dealt, []) == jobs                       # each once, in order: neighbours together
    assert {len(some) for some in dealt} == {1, 2}


def test_after_a_run_that_failed_the_command_goes_on_where_it_stopped(cli, monkeypatch):
    def train(prompt, run):
        if run.seed == 2:
            raise common.Problem("the training failed")

    with monkeypatch.context() as patched:
        patched.setattr(coop, "train", train)
        run = cli("coop", *QUICK, "--seeds", "1,2,3")
    assert run.status == 2 and [record["seed"] for record in run.records] == [1]
    run = cli("coop", *QUICK, "--seeds", "1,2,3", keep=True)
    assert [record["seed"] for record in run.records] == [1, 2, 3] and "already in" in run.out


def test_more_shots_than_images_are_recorded_as_those_that_were_used(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "20,1000")
    assert [record["shots"] for record in run.records] == [20] and "using the 20" in run.out
    assert "run 1 of 2" in run.out and "already in" in run.out.split("run 2 of 2")[1]


def test_a_bad_image_is_found_before_the_training(cli, mine, monkeypatch):
    monkeypatch.setattr(coop, "train", lambda *some: pytest.fail("was trained"))
    flags, image = {"dataset": mine, "backbone": TINY}, mine / "test/cat/cat_2.jpg"
    refused(cli("coop", *QUICK, "--predict", mine / "none.jpg", **flags), "none.jpg")
    image.write_bytes(b"no image")
    refused(cli("coop", *QUICK, **flags), image, "mend it or take it away")


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_diverges_says_so(cli, tmp_path, method):
    flags = ("--epochs", 3, "--views", 1, "--shots", 1, "--lr", 1e30)
    refused(cli(method, *flags, save=tmp_path / "saved"), "not finite", "smaller --lr")
    assert not (tmp_path / "saved").exists()
