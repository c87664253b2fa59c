"""Saved prompts, which know where they come from, and the runs of one command."""

import json
import shutil

import pytest
from conftest import make_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import coop

QUICK = ("--epochs", 1, "--views", 1, "--shots", 1)
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
TINY = f"local-dir:{common.TINY_CLIP}"


def refused(run, *words):
    """Status 2, nothing recorded, and one line on stderr that has the words in it."""
    assert run.status == 2 and not run.records, run.out + run.err
    assert len(run.err.splitlines()) == 1 and "Traceback" not in run.err, run.err
    assert all(str(word) in run.err for word in words), run.err


def rewrite(file, tensors=None, **metadata):
    """Save a prompt file's content again, with other tensors or metadata."""
    with safe_open(file, "pt") as content:
        metadata = {**content.metadata(), **metadata}
    save_file(tensors or load_file(file), file, metadata)


@pytest.fixture
def saved(cli, tmp_path):
    """A prompt of CoOp's in a file, of 2 shots and seed 3."""
    file = tmp_path / "saved.safetensors"
    cli("coop", "--epochs", 1, "--views", 1, "--shots", 2, "--seeds", 3, "--lr", 0.1, save=file)
    return file


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test where a training begins."""
    monkeypatch.setattr(coop, "train", lambda *some: pytest.fail("was trained"))


# ---------------------------------------------------------------- saved and loaded prompts

@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_prompt_is_as_accurate_as_the_saved_one(cli, tmp_path, method):
    flags = ("--epochs", 2, "--views", 1, "--shots", 2, "--lr", 0.1, "--base-to-new")
    trained = cli(method, *flags, transfer="forms", save=tmp_path / "saved").records[0]
    loaded = cli(method, "--base-to-new", transfer="forms", load=tmp_path / "saved").records[0]
    for name in ("base", "new", "zero_shot_base", "kl", "confusion", "transfer", "shots", "seed"):
        assert loaded[name] == trained[name], name
    assert "loss" not in loaded


def test_a_prompt_file_brings_data_set_template_and_training_flags(cli, tmp_path, no_training):
    own = ("--position", "front", "--n-ctx", 3, "--batch-size", 2, "--template", "{} night.")
    file = tmp_path / "saved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coop, "train", lambda prompt, run: prompt.v.data.add_(0.1))
        trained = cli("coop", *QUICK, *own, dataset="forms", save=file).records[0]
    loaded = cli("coop", load=file).records[0]
    assert (loaded["dataset"], loaded["data"]) == ("forms", trained["data"])
    assert loaded["accuracy"] == trained["accuracy"]
    for name in ("position", "n_ctx", "batch_size", "template", "epochs", "lr", "backbone"):
        assert loaded["flags"][name] == trained["flags"][name]


@pytest.mark.parametrize("flags", [("--epochs", 2), ("--batch-size", 5), ("--shots", 4),
                                   ("--seeds", 1), ("--n-ctx", 3), ("--position", "front")])
def test_flags_that_contradict_the_prompt_file_are_refused(cli, saved, flags):
    refused(cli("coop", *flags, load=saved), saved, flags[0].strip("-s"))
    same = ("--epochs", 1, "--shots", 2, "--seeds", 3, "--lr", 0.1)
    assert cli("coop", *same, load=saved).status == 0


def test_a_prompt_is_tested_with_the_flags_of_a_test(cli, saved):
    (record,) = cli("coop", "--template", "{} night.", "--test-images", 24, load=saved).records
    assert record["changed"]["template"] == "{} night." and record["flags"]["test_images"] == 24
    assert sum(map(sum, record["confusion"]["all classes"])) == 24


def test_another_data_set_is_tested_with_its_own_template(cli, tmp_path):
    cli("coop", *QUICK, "--template", "{} night.", dataset="forms", save=tmp_path / "saved")
    loaded = cli("coop", load=tmp_path / "saved", dataset="scenes").records[0]
    plain = cli("coop", *QUICK, dataset="scenes").records[0]
    assert loaded["zero_shot"] == plain["zero_shot"] and loaded["data"] == plain["data"]


def test_a_class_is_predicted_from_a_prompt_file_alone(cli, tmp_path, root):
    image = next((root / "shapes/images/red_heart").iterdir())
    trained = cli("coop", *QUICK, "--predict", image, save=tmp_path / "all")
    loaded = cli("coop", "--predict", image, load=tmp_path / "all", data_root=tmp_path / "none")
    assert loaded.status == 0 and not (tmp_path / "none/shapes").exists() and not loaded.records
    assert loaded.out in trained.out and "red heart" in loaded.out
    lines = [line.split() for line in loaded.out.splitlines()[2:]]
    assert len(lines) == 5 and float(lines[0][2]) >= float(lines[1][2])
    both = cli("coop", "--predict", image, load=tmp_path / "all", transfer="forms")
    assert "forms" in both.records[0]["transfer"] and str(image) in both.out


def test_classes_that_a_prompt_has_learned_are_not_new(cli, saved, tmp_path, root):
    refused(cli("coop", "--base-to-new", load=saved), saved, "new half")
    refused(cli("coop", "--base-to-new", load=saved, dataset="shapes_clean"), saved)
    assert cli("coop", "--base-to-new", load=saved, dataset="scenes").status == 0


def test_contexts_of_other_classes_are_refused(cli, tmp_path):
    cli("coop", *QUICK, "--class-specific", save=tmp_path / "own")
    assert cli("coop", load=tmp_path / "own").status == 0
    refused(cli("coop", load=tmp_path / "own", dataset="scenes"), "of other classes")


def test_mvp_mi_keeps_its_template_and_its_trained_classes(cli, tmp_path):
    file, scenes = tmp_path / "saved", {"transfer": "scenes"}
    flags = (*QUICK, "--template", "{} night.")
    with_transfer = cli("mvp_mi", *flags, **scenes, save=file).records[0]
    alone = cli("mvp_mi", *flags, "--again").records[0]
    loaded = cli("mvp_mi", load=file).records[0]
    elsewhere = cli("mvp_mi", load=file, dataset="scenes").records[0]
    again = cli("mvp_mi", load=file, **scenes).records[0]
    assert with_transfer["accuracy"] == alone["accuracy"] == loaded["accuracy"]
    target = with_transfer["transfer"]["scenes"]
    assert again["transfer"]["scenes"] == target
    assert elsewhere["accuracy"] == target["accuracy"]


def test_words_that_prograd_has_left_over_travel_with_the_prompt(cli, tmp_path):
    flags = ("--template", "a type of pet, a photo of a {}.", "--lr", 0.1)     # 9 tokens, 8 words
    trained = cli("prograd", *QUICK, *flags, save=tmp_path / "saved", transfer="forms").records[0]
    assert len(load_file(tmp_path / "saved")["left_over"]) == 1
    loaded = cli("prograd", load=tmp_path / "saved", dataset="forms").records[0]    # has none
    assert loaded["accuracy"] == trained["transfer"]["forms"]["accuracy"]


# ---------------------------------------------------------------- prompt files that do not fit

def test_prompts_of_another_method_or_other_weights_are_refused(cli, saved, tmp_path):
    refused(cli("prograd", load=saved), saved, "coop", "prograd")
    clip = shutil.copytree(common.TINY_CLIP, tmp_path / "clip")
    tensors = load_file(clip / "open_clip_model.safetensors")
    tensors["text_projection"] += 0.1
    save_file(tensors, clip / "open_clip_model.safetensors")
    refused(cli("coop", load=saved, backbone=f"local-dir:{clip}"), saved, "other weights")


def test_damaged_bits_and_other_dtypes_are_refused(cli, saved):
    content = bytearray(saved.read_bytes())
    tensors = load_file(saved)
    content[-3] ^= 64
    saved.write_bytes(content)
    refused(cli("coop", load=saved), saved, "damaged")
    saved.write_bytes(content[:-8])
    refused(cli("coop", load=saved), saved)
    content[-3] ^= 64
    saved.write_bytes(content)
    rewrite(saved, {"v": tensors["v"].half()})
    refused(cli("coop", load=saved), saved)


def test_tensors_of_another_form_are_refused(cli, saved):
    v = load_file(saved)["v"][:3].clone()
    with safe_open(saved, "pt") as content:
        origin = json.loads(content.metadata()["origin"])
    origin["tensors"] = common.features.tensor_digest({"v": v})
    rewrite(saved, {"v": v}, origin=json.dumps(origin))
    refused(cli("coop", load=saved), saved, "(3, 80)")


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"])
def test_what_is_no_prompt_is_refused(cli, tmp_path, content):
    (tmp_path / "odd").write_bytes(content)
    refused(cli("coop", load=tmp_path / "odd"), "odd", "no prompt")
    refused(cli("coop", load=tmp_path), f"--load {tmp_path}: is a folder")
    refused(cli("coop", load=tmp_path / "none"), "--load", "none: No such file")


@pytest.mark.parametrize("origin", ["[]", "{", '{"method": "coop"}', "[" * 9999])
def test_a_prompt_whose_origin_is_not_told_is_refused(cli, saved, origin):
    rewrite(saved, origin=origin)
    refused(cli("coop", load=saved), saved, "no prompt")


# ---------------------------------------------------------------- the runs of a command

def test_runs_are_counted_and_say_where_their_results_went(cli, tmp_path):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "1,2", "--seeds", "1,2,3")
    assert [f"run {k} of 6" in run.out for k in range(1, 8)] == 6 * [True] + [False]
    assert run.out.count(f"recorded in {tmp_path}/results.jsonl") == len(run.records) == 6
    assert "run 1" not in cli("coop", *QUICK).out


@pytest.mark.parametrize("processes", [1, 2, 4, 9])
def test_torchrun_deals_the_runs_in_blocks(monkeypatch, processes):
    jobs, dealt = [(name, 1, seed) for name in "ab" for seed in range(3)], []
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        dealt.append(common.share(jobs))
    assert sum(dealt, []) == jobs                       # each once, in order: neighbours together
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_process_without_a_run_says_so(cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = cli("coop", *QUICK, "--seeds", "1,2")
    assert run.status == 0 and not run.records and run.out.startswith("nothing to do for process 0")


@pytest.mark.parametrize("name, value", [("RANK", ""), ("RANK", "x"), ("RANK", "-1"), ("RANK", "2"),
                                         ("WORLD_SIZE", "0"), ("WORLD_SIZE", "1.5")])
def test_a_rank_that_makes_no_sense_is_refused(cli, monkeypatch, name, value):
    for key, given in {"RANK": "0", "WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    refused(cli("coop", *QUICK), name)


def test_one_data_set_that_fails_does_not_end_the_others(cli, tmp_path):
    make_images(tmp_path / "mine/only_class", 3)
    run = cli("coop", *QUICK, dataset=f"forms,{tmp_path}/mine,scenes", backbone=TINY)
    assert run.status == 2 and [r["dataset"] for r in run.records] == ["forms", "scenes"]
    *_, last = run.err.splitlines()
    assert f"{tmp_path}/mine" in last and "1 " in last and "forms" not in last, run.err


def test_one_run_that_fails_does_not_end_the_others(cli, monkeypatch):
    def train(prompt, run):
        if run.seed == 2:
            raise common.Problem("the training failed")

    monkeypatch.setattr(coop, "train", train)
    run = cli("coop", *QUICK, "--seeds", "1,2,3")
    assert run.status == 2 and [record["seed"] for record in run.records] == [1, 3]
    assert "seed 2" in run.err.splitlines()[-1] and "over 2 seeds" in run.out
    refused(cli("coop", *QUICK, "--seeds", 2), "the training failed")


def test_more_shots_than_images_are_recorded_as_those_that_were_used(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "20,1000")
    assert [record["shots"] for record in run.records] == [20] and "using the 20" in run.out


def test_a_sample_of_test_images_is_the_same_for_all_and_never_mixed(cli):
    flags = (*QUICK, "--test-images", 48)
    found = [cli(method, *flags).records[0] for method in METHODS[:3]]
    assert len({record["data"] for record in found}) == 1
    assert found[0]["flags"]["test_images"] == 48
    cli("coop", *QUICK)
    run = cli("coop", *flags, "--seeds", "1,2", keep=True)
    assert len({record["data"] for record in run.records}) == 2 and "over 2 seeds" in run.out


def test_a_bad_test_image_is_found_before_the_training(cli, eurosat, no_training):
    flags = {"dataset": "eurosat", "data_root": eurosat, "backbone": TINY}
    image = eurosat / "eurosat/2750/River/River_3.jpg"
    image.write_bytes(b"no image")
    refused(cli("coop", *QUICK, **flags), image, "--skip-unreadable")
    refused(cli("coop", *QUICK, "--predict", eurosat / "none.jpg"), "none.jpg")


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_diverges_says_so(cli, tmp_path, method):
    flags = ("--epochs", 3, "--views", 1, "--shots", 1, "--lr", 1e30)
    refused(cli(method, *flags, save=tmp_path / "saved"), "epoch", "loss", "smaller --lr")
    assert not (tmp_path / "saved").exists()
