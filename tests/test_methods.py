"""The scripts, run as a user runs them; and what is special to each method."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import made_up_pictures, without_times

import common
import coop
import mvp_mi
import prograd
import restore

HERE = Path(__file__).parent.parent
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
SHORT = ("--epochs", 3, "--views", 2)


@pytest.mark.parametrize("method", METHODS)
def test_method_runs_and_records_and_gives_the_same_numbers_again(cli, method):
    first, second = cli(method, *SHORT), cli(method, *SHORT)
    assert first.status == 0 and not first.err and "zero-shot" in first.out
    (record,) = first.records
    assert record["method"] == method and record["dataset"] == "shapes" and record["protocol"] == "few-shot" and (record["shots"], record["seed"]) == (4, 1)
    assert 0 < record["zero_shot"] < 100 and 0 < record["accuracy"] < 100 and record["parameters"] > 0
    assert len(record["loss"]) == 3 and record["flags"]["epochs"] == 3 and record["seconds"]["training"] > 0
    assert without_times(record) == without_times(second.records[0])


@pytest.mark.parametrize("method", METHODS)
def test_base_to_new_and_transfer(cli, method):
    run = cli(method, "--epochs", 1, "--views", 1, "--shots", "1,2", "--seeds", "1,2", "--base-to-new", "--transfer", "shapes_sketch,scenes")
    assert run.status == 0 and [(r["shots"], r["seed"]) for r in run.records] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for r in run.records:
        assert r["protocol"] == "base-to-new" and set(r["transfer"]) == {"shapes_sketch", "scenes"}
        assert r["harmonic"] == pytest.approx(2 * r["base"] * r["new"] / (r["base"] + r["new"])) and r["zero_shot_harmonic"] > 0
    alone = cli(method, "--epochs", 1, "--views", 1, "--shots", 2, "--seeds", 2, "--base-to-new").records[0]
    assert alone["new"] == run.records[-1]["new"] and alone["loss"] == run.records[-1]["loss"]  # no run leans on the one before


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(cli, tmp_path, method):
    file = tmp_path / "learned.safetensors"
    trained = cli(method, *SHORT, save=file).records[0]
    loaded = cli(method, "--transfer", "scenes", load=file).records[0]
    again = cli(method, load=tmp_path / "{shots}-{seed}.safetensors", backbone=f"local-dir:{os.path.relpath(HERE)}/data/tiny_clip")
    assert again.status == 2 and "4-1.safetensors" in again.err
    file.rename(file := tmp_path / "4-1.safetensors")
    assert cli(method, load=tmp_path / "{shots}-{seed}.safetensors", backbone=f"local-dir:{os.path.relpath(HERE)}/data/tiny_clip").status == 0
    assert loaded["accuracy"] == trained["accuracy"] and loaded["transfer"]["scenes"]["accuracy"] >= 0 and "loss" not in loaded
    other = cli("coop" if method != "coop" else "prograd", load=file)
    assert other.status == 2 and f"saved by {method}" in other.err


@pytest.mark.parametrize("method", METHODS)
def test_new_views_every_epoch(cli, method):
    assert cli(method, "--epochs", 2, "--views", 0, "--shots", 1).status == 0


def test_as_a_command_in_another_folder(root, tmp_path):
    command = [sys.executable, HERE / "prograd.py", "--epochs", "1", "--views", "1", "--data-root", root, "--cache", root / "cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "prograd" in done.stdout
    (line,) = (tmp_path / "runs/results.jsonl").read_text().splitlines()
    assert json.loads(line)["backbone"] == "data/tiny_clip"


@pytest.mark.parametrize("rank, size", [("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")])
def test_two_processes_share_the_runs_of_a_sweep_and_a_cold_cache(root, tmp_path, rank, size):
    command = [sys.executable, HERE / "coop.py", "--epochs", "2", "--views", "1", "--shots", "1,2", "--seeds", "1,2", "--data-root", root, "--cache", tmp_path / "cache", "--out", tmp_path / "r.jsonl"]
    both = [subprocess.Popen(command, env={**os.environ, rank: str(k), size: "2"}, stdout=subprocess.DEVNULL) for k in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert sorted((r["shots"], r["seed"]) for r in records) == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_slurm_arrays_leave_no_run_out(cli, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    for task, seeds in ((1, "1,2,3"), (2, "1,2,3"), (3, "1,2,3"), (2, "7")):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        found = [r["seed"] for r in cli("coop", "--epochs", 1, "--views", 1, "--shots", 1, "--seeds", seeds).records]
        assert found == ([7] if seeds == "7" else [task % 3 + 1])  # a task that names its own seed runs it
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    run = cli("coop", "--seeds", "1,2,3")
    assert run.status == 2 and "gaps" in run.err


@pytest.mark.parametrize("backbone, method", [("ViT-B-16", "prograd"), ("RN50", "coop")])
def test_real_backbones_with_random_weights_on_eurosats_layout(cli, eurosat, tmp_path, backbone, method):
    run = cli(method, "--dataset", "eurosat", "--backbone", backbone, "--pretrained", "random", "--epochs", 1, "--views", 1, "--shots", 1, "--n-ctx", 4,
              data_root=eurosat, cache=tmp_path / "cache")
    assert run.status == 0, run.err
    assert run.records[0]["backbone"] == backbone and math.isfinite(run.records[0]["loss"][0])


def test_restore_on_a_real_vision_transformer(cli, eurosat, tmp_path):
    run = cli("restore", "--dataset", "eurosat", "--backbone", "ViT-B-32", "--pretrained", "random", "--epochs", 1, "--views", 1, "--shots", 1, "--batch-size", 10,
              data_root=eurosat, cache=tmp_path / "cache")
    assert run.status == 0 and len(run.records[0]["shift_after"]["vision"]) == 12 and not run.err


def test_openai_weights_get_quickgelu(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(common.open_clip, "create_model_and_transforms", lambda *a, **k: asked.append((a[0], k["force_quick_gelu"])) or 1 / 0)
    for backbone, tag in (("ViT-B-16", "openai"), ("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k"), ("ViT-B-16-quickgelu", "metaclip_400m")):
        with pytest.raises(common.Problem, match="cannot load"):
            common.load_clip(Namespace(backbone=backbone, pretrained=tag, device="cpu", precision="fp32"))
    assert asked == [("ViT-B-16", True), ("ViT-B-16", True), ("ViT-B-16", False), ("ViT-B-16", True)]


def test_own_pictures(cli, tmp_path, tiny):
    for name in ("red_thing", "blue_thing", "other"):
        made_up_pictures(tmp_path / "mine" / name, 6, ending="png")
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", 2, "--backbone", common.TINY_CLIP, dataset=tmp_path / "mine")
    assert run.status == 0 and "seeded 50/20/30" in run.out and not run.err


@pytest.mark.parametrize("flags", [["--class-specific"], ["--position", "middle"], ["--position", "front"], ["--ctx-init", "a photo of a"]])
def test_coop_contexts(cli, flags):
    run = cli("coop", *SHORT, *flags)
    width = 80
    expected = {"--class-specific": 24 * 16 * width, "--ctx-init": 4 * width}.get(flags[0], 16 * width)
    assert run.status == 0 and run.records[0]["parameters"] == expected and "nearest words" in run.out


# ---------------------------------------------------------------- ProGrad

def test_projection_takes_out_what_conflicts_and_only_that():
    g_d, g_g = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    g, cosine = prograd.project(g_d, g_g)
    assert torch.allclose(g, torch.tensor([[0.5, 0.5]])) and cosine == pytest.approx(-math.sqrt(0.5)) and (g * g_g).sum().abs() < 1e-6
    assert torch.allclose(prograd.project(g_d, g_g, 0.5)[0], torch.tensor([[0.75, 0.25]]))
    assert torch.equal(prograd.project(g_d, -g_g)[0], g_d)


def test_general_loss_is_kl_up_to_the_entropy():
    logits, zero_shot, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    p = F.softmax(zero_shot / 2, -1)
    kl = F.kl_div(F.log_softmax(logits / 2, -1), p, reduction="batchmean")
    entropy = -(p * p.log()).sum(-1).mean()
    assert prograd.losses(logits, zero_shot, y, 2.0)[1] == pytest.approx(4 * (kl + entropy).item(), rel=1e-5)


def test_prograd_without_projection_is_coop_started_from_the_template(cli, monkeypatch):
    with_it, without = cli("prograd", *SHORT).records[0], cli("prograd", *SHORT, "--projection", 0).records[0]
    monkeypatch.setattr(coop, "first_context", prograd.first_context)
    assert without["loss"] == pytest.approx(cli("coop", *SHORT).records[0]["loss"], rel=1e-4)
    assert sum(with_it["conflicts"]) > 0 and with_it["loss"] != pytest.approx(without["loss"], rel=1e-4)


# ---------------------------------------------------------------- MVP-MI

def test_mvp_mi_with_all_off_is_coop_to_the_last_digit(cli):
    coop_record = cli("coop", *SHORT).records[0]
    record = cli("mvp_mi", *SHORT, "--mi-weight", 0, "--augment", 0, "--classifier", "soft").records[0]
    assert record["loss"] == coop_record["loss"] and record["accuracy"] == coop_record["accuracy"]


def test_the_bound_behaves_as_one():
    s, log_c = F.normalize(torch.randn(20, 64), dim=-1), math.log(20)
    bound = lambda a, b: log_c - mvp_mi.info_nce(a, b, 0.07).item()
    assert log_c - 0.05 < bound(s, s) < log_c
    assert bound(s, s.roll(1, 0)) < 0 and bound(s, F.normalize(torch.randn(20, 64), dim=-1)) < bound(s, s)
    assert all(bound(F.normalize(torch.randn(20, 3), dim=-1), s[:, :3]) <= log_c for _ in range(20))
    assert mvp_mi.info_nce(s, s.roll(1, 0), 0.07) == pytest.approx(mvp_mi.info_nce(s.roll(1, 0), s, 0.07).item(), rel=1e-5)


def test_the_bounds_gradient_against_finite_differences():
    s, h = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a: mvp_mi.info_nce(a, h, 0.5), s.requires_grad_())


def test_combinations_stay_inside_their_class():
    labels, features = torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5, 3, 4)
    features[:2, :, 0], features[2:4, :, 1], features[4, :, 2] = 1, 1, 1
    made, y = mvp_mi.augment(features, labels, torch.tensor([1, 2, 1]), 3, torch.Generator().manual_seed(0))
    assert y.tolist() == [1, 1, 1, 2, 2, 2] and torch.allclose(made, F.one_hot(y, 4).float())


# ---------------------------------------------------------------- RESTORE

def restore_args(**given):
    return Namespace(**{"shift": "features", "ctx_init": "a photo of a", "n_ctx": 2, "depth": 4, "towers": "both", "prompts": "independent", "blend": 0.1, **given})


def test_restore_without_prompts_is_clip(tiny):
    prompts, names = restore.Prompt(tiny, restore_args(blend=0)), ["red heart", "a large blue arrow"]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        w, states = prompts.encode_text(common.name_tokens(tiny, names), [])
        f, _ = prompts.encode_image(pixels, [])
        assert torch.allclose(w, tiny.model.encode_text(tiny.tokenizer([f"a photo of a {name}." for name in names])), atol=1e-5)
        assert torch.allclose(f, tiny.model.encode_image(pixels), atol=1e-5) and states.shape == (2, 4, 80)
    assert torch.equal(restore.feature_shift(states, states), torch.zeros(4))
    assert restore.feature_shift(3 * states, states).tolist() == pytest.approx([2.0] * 4)


def test_restore_starts_at_the_same_features_with_and_without_surgery(tiny):
    prompts = restore.Prompt(tiny, restore_args())
    f = torch.randn(3, 128)
    with torch.no_grad():
        assert torch.allclose(prompts.operate(f, "text"), F.normalize(f, dim=-1), atol=1e-6)


@pytest.mark.parametrize("flags, parameters", [
    (["--shift-weight", 0, "--blend", 0], 4 * 2 * (80 + 128)), (["--towers", "text", "--blend", 0], 4 * 2 * 80),
    (["--towers", "vision", "--blend", 0], 4 * 2 * 128), (["--prompts", "coupled", "--shift", "gram", "--blend", 0], 4 * (2 * 80 + 81 * 128))])
def test_restore_parts_can_be_switched_off(cli, flags, parameters):
    run = cli("restore", "--epochs", 1, "--views", 1, "--shots", 1, *flags)
    assert run.status == 0 and run.records[0]["parameters"] == parameters
    shift = run.records[0]["shift_after"]
    assert (max(shift["text"]) == 0) == ("vision" in flags) and (max(shift["vision"]) == 0) == ("text" in flags) and shift["gap"] > 0


def test_restore_in_chunks_of_classes_has_the_same_features_and_gradients(tiny, monkeypatch):
    names, found = common.name_tokens(tiny, [f"thing {k} of many" + " more" * (k % 3) for k in range(10)]), []
    for chunk in (10, 3):
        monkeypatch.setattr(tiny, "class_chunk", chunk)
        torch.manual_seed(0)
        prompts = restore.Prompt(tiny, restore_args())
        w, states = prompts.encode_text(names, prompts.text_prompts)
        (w.sum() + states.square().mean()).backward()
        found.append([w.detach(), states.detach(), *(p.grad for p in prompts.text_prompts)])
    assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(*found))


def test_restore_raises_its_blends_once(tiny):
    prompts = restore.Prompt(tiny, restore_args())
    prompts.raise_blends([0.5, 1.0])
    assert prompts.blend.tolist() == pytest.approx([0.11, 0.105])


def test_restore_cuts_its_depth_and_wants_a_vision_transformer(cli, eurosat, tmp_path):
    assert "have 4 blocks in common" in cli("restore", "--epochs", 1, "--views", 1, "--shots", 1).out
    run = cli("restore", "--dataset", "eurosat", "--backbone", "RN50", "--pretrained", "random", data_root=eurosat, cache=tmp_path / "cache")
    assert run.status == 2 and "vision transformer" in run.err and not run.records
