"""The scripts, run as a user runs them; and what is special to each method."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import made_up_pictures, made_up_run, without_times
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file

import common
import coop
import mvp_mi
import prograd
import restore
from data import backbone

HERE = Path(__file__).parent.parent
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
QUICK = ("--epochs", 1, "--views", 1, "--shots", 1)
SHORT = ("--epochs", 3, "--views", 2, "--shots", 2)
SWEEP = ("--epochs", 2, "--views", 1, "--shots", 1, "--base-to-new")
every_method = pytest.mark.parametrize("method", METHODS)
DONE = {}


@pytest.fixture
def once(cli):
    """cli, but a command that a test of this file has run before is not run again."""
    def run(*command):
        if command not in DONE:
            DONE[command] = cli(*command)
        return DONE[command]

    return run


@pytest.fixture
def saved(root, method):
    """Where a method's SHORT training is saved."""
    return root.with_name(f"{method}.safetensors")


@pytest.fixture
def trained(once, saved, method):
    """What a method's SHORT training printed and recorded."""
    return once(method, *SHORT, "--save", saved)


# ---------------------------------------------------------------- every method

@every_method
def test_a_run_prints_zero_shot_and_its_own_accuracy(trained, method):
    (record,) = trained.records
    assert trained.status == 0 and not trained.err
    printed = next(line for line in trained.out.splitlines() if "all classes" in line)
    assert f"{record['zero_shot']:9.1f} {record['accuracy']:9.1f}" in printed


@every_method
def test_a_run_records_what_it_was(trained, method):
    (record,) = trained.records
    assert (record["method"], record["dataset"], record["protocol"]) == (
        method, "shapes", "few-shot")
    assert (record["shots"], record["seed"], record["flags"]["epochs"]) == (2, 1, 3)
    assert len(record["loss"]) == 3 and record["seconds"]["training"] > 0


@every_method
def test_training_lowers_the_loss(trained, method):
    loss = trained.records[0]["loss"]
    assert loss[-1] < loss[0]


@every_method
def test_the_same_command_gives_the_same_numbers(cli, trained, method):
    again = cli(method, *SHORT)
    assert without_times(again.records[0]) == without_times(trained.records[0])


@every_method
def test_base_to_new_measures_both_halves_and_their_harmonic_mean(once, method):
    record = once(method, *SWEEP, "--seeds", "1,2", "--transfer", "scenes").records[0]
    base, new = record["base"], record["new"]
    assert record["protocol"] == "base-to-new" and record["zero_shot_harmonic"] > 0
    assert record["harmonic"] == pytest.approx(2 * base * new / (base + new))


@every_method
def test_transfer_measures_other_data_sets(once, method):
    record = once(method, *SWEEP, "--seeds", "1,2", "--transfer", "scenes").records[0]
    assert set(record["transfer"]) == {"scenes"}
    assert record["transfer"]["scenes"].keys() == {"zero_shot", "accuracy"}


@every_method
def test_a_run_does_not_depend_on_the_one_before(cli, once, method):
    second = once(method, *SWEEP, "--seeds", "1,2", "--transfer", "scenes").records[1]
    (alone,) = cli(method, *SWEEP, "--seeds", 2).records
    assert (alone["loss"], alone["new"]) == (second["loss"], second["new"])


@every_method
def test_what_was_saved_is_as_good_when_it_is_loaded(cli, trained, saved, method):
    loaded = cli(method, "--load", saved, "--transfer", "scenes")
    assert loaded.records[0]["accuracy"] == trained.records[0]["accuracy"]
    assert "loss" not in loaded.records[0] and "scenes" in loaded.records[0]["transfer"]


@every_method
def test_what_one_method_saved_no_other_loads(cli, trained, saved, method):
    other = cli("prograd" if method == "coop" else "coop", "--load", saved)
    assert other.status == 2 and f"saved by {method}" in other.err and not other.records


@pytest.mark.parametrize("method", ["coop", "mvp_mi", "restore"])
def test_views_0_takes_new_crops_every_epoch(cli, method):
    run = cli(method, "--epochs", 2, "--views", 0, "--shots", 1)
    assert run.status == 0 and len(run.records[0]["loss"]) == 2


@pytest.mark.parametrize("method", ["coop", "restore"])
def test_own_pictures_are_learned_from(cli, tmp_path, method):
    folder = (tmp_path / "mine").resolve()
    for name in ("red_heart", "blue_arrow"):
        made_up_pictures(folder / name, 6, ending="png")
    run = cli(method, *QUICK, "--dataset", folder, "--backbone", common.TINY_CLIP)
    assert run.status == 0 and run.records[0]["dataset"] == str(folder), run.err


# ---------------------------------------------------------------- commands and processes

def test_a_script_runs_from_any_folder(root, tmp_path):
    flags = [*QUICK, "--data-root", root, "--cache", root / "cache"]
    command = [sys.executable, HERE / "prograd.py", *map(str, flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "prograd" in done.stdout
    (line,) = (tmp_path / "runs/results.jsonl").read_text().splitlines()
    assert json.loads(line)["backbone"] == "data/tiny_clip"


def test_a_backbone_is_the_same_however_its_path_is_written(cli, once, root):
    saved = root.with_name("coop.safetensors")
    once("coop", *SHORT, "--save", saved)
    relative = os.path.relpath(HERE / "data" / "tiny_clip")
    assert cli("coop", "--load", saved, "--backbone", f"local-dir:{relative}").status == 0


def test_two_processes_share_the_runs_of_a_sweep(cli, monkeypatch):
    done = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done.append([record["seed"] for record in cli("coop", *QUICK, "--seeds", "1,2,3").records])
    assert done == [[1, 3], [2]]


@pytest.mark.parametrize("task, seeds, done", [
    (1, "1,2,3", [2]),
    (2, "1,2,3", [3]),
    (3, "1,2,3", [1]),
    (2, "7", [7]),              # a task that names its own seed runs it
])
def test_the_tasks_of_a_slurm_array_leave_no_run_out(cli, monkeypatch, task, seeds, done):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    run = cli("coop", *QUICK, "--seeds", seeds)
    assert [record["seed"] for record in run.records] == done


def test_a_slurm_array_with_gaps_is_refused(cli, monkeypatch):
    for name, value in {"COUNT": "3", "ID": "1", "MIN": "1", "MAX": "9"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    run = cli("coop", "--seeds", "1,2,3")
    assert run.status == 2 and "gaps" in run.err


# ---------------------------------------------------------------- other backbones

def test_a_real_backbone_runs_on_the_layout_of_eurosat(cli, eurosat):
    flags = ["--dataset", "eurosat", "--backbone", "RN50", "--pretrained", "random"]
    run = cli("coop", *QUICK, *flags, data_root=eurosat, cache=eurosat / "cache")
    assert run.status == 0 and not run.err, run.err
    assert run.records[0]["backbone"] == "RN50" and math.isfinite(run.records[0]["loss"][0])


@pytest.mark.parametrize("name, tag, asked", [
    ("ViT-B-16", "openai", ("ViT-B-16", True)),
    ("ViT-B-16-quickgelu", "openai", ("ViT-B-16", True)),
    ("ViT-B-16", "laion2b_s34b_b88k", ("ViT-B-16", False)),
    ("ViT-B-16-quickgelu", "metaclip_400m", ("ViT-B-16", True)),
    ("ViT-B-16-quickgelu", __file__, ("ViT-B-16-quickgelu", False)),    # a file has no tag
])
def test_weights_that_were_trained_with_quickgelu_get_it(monkeypatch, name, tag, asked):
    called = []

    def create(name, force_quick_gelu, **_):
        called.append((name, force_quick_gelu))
        raise RuntimeError("no network")

    monkeypatch.setattr(backbone.open_clip, "create_model_and_transforms", create)
    with pytest.raises(common.Problem, match="cannot load"):
        backbone.create(name, tag, "cpu")
    assert called == [asked]


# ---------------------------------------------------------------- CoOp

def context_args(**given):
    return Namespace(**{"n_ctx": 16, "ctx_init": "", "class_specific": False, **given})


@pytest.mark.parametrize("flags, parameters", [
    (["--class-specific"], 24 * 16 * 80),
    (["--position", "middle"], 16 * 80),
    (["--position", "front"], 16 * 80),
    (["--ctx-init", "a photo of a"], 4 * 80),
])
def test_a_context_has_as_many_numbers_as_the_flags_ask_for(cli, flags, parameters):
    run = cli("coop", *QUICK, *flags)
    assert run.status == 0 and run.records[0]["parameters"] == parameters


@pytest.mark.parametrize("words", ["a large red heart", "a_large_red_heart"])
def test_a_context_can_start_from_words_that_are_printed_at_its_end(cli, words):
    run = cli("coop", *QUICK, "--lr", 1e-9, "--ctx-init", words)
    assert run.out.splitlines()[-1] == "  nearest words: a large red heart"


def test_a_class_specific_context_starts_from_the_words_for_every_class(tiny):
    run = made_up_run(tiny, ["heart", "arrow"], "", [], None)
    v = coop.first_context(run, context_args(ctx_init="a photo", class_specific=True))
    assert torch.equal(v, common.embed(tiny, "a photo").expand(2, -1, -1))


# ---------------------------------------------------------------- ProGrad

@pytest.mark.parametrize("share, expected", [
    (1.0, [0.5, 0.5]),
    (0.5, [0.75, 0.25]),
    (0.0, [1.0, 0.0]),
])
def test_projection_takes_out_its_share_of_a_conflict(share, expected):
    g = prograd.project(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), share)
    assert g.tolist() == [pytest.approx(expected)]


def test_what_is_left_of_a_conflict_does_not_touch_the_general_loss():
    g_d, g_g = torch.randn(16, 80), torch.randn(16, 80)
    g = prograd.project(g_d, -g_g if (g_d * g_g).sum() > 0 else g_g)
    assert abs((g * g_g).sum()) < 1e-3 * g.norm() * g_g.norm()


def test_gradients_that_agree_are_left_as_they_are():
    g_d = torch.randn(16, 80)
    assert torch.equal(prograd.project(g_d, g_d + 0.1), g_d)


def test_a_general_gradient_of_zero_is_no_conflict():
    g_d = torch.randn(16, 80)
    assert torch.equal(prograd.project(g_d, torch.zeros(16, 80)), g_d)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_the_general_loss_is_kl_but_for_the_entropy(tiny, T):
    names, template, f = ["heart", "arrow", "ring"], "a red {}.", F.normalize(torch.randn(4, 128))
    args = context_args(lr=0.01, epochs=1, projection=1.0, temperature=T)
    run = made_up_run(tiny, names, template, [(f, torch.arange(4) % 3)], args)
    start, left_over = prograd.first_context(run, args)
    prompt = prograd.Prompt(tiny, start.clone(), left_over)
    with torch.no_grad():
        logits = tiny.logit_scale * f @ prompt.class_features(names).T
    zero_shot = tiny.logit_scale * f @ common.template_features(tiny, template, names).T
    prograd.train(prompt, run, args)
    p = F.softmax(zero_shot / T, -1)
    kl = F.kl_div(F.log_softmax(logits / T, -1), p, reduction="batchmean")
    entropy = -(p * p.log()).sum(-1).mean()
    found = run.history()["general_loss"][0]
    assert found == pytest.approx(T ** 2 * (kl + entropy).item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [128, 3])
def test_both_gradients_in_one_pass_are_those_of_two(tiny, monkeypatch, chunk):
    monkeypatch.setattr(tiny, "class_chunk", chunk)
    prompt = coop.Prompt(tiny, 0.02 * torch.randn(6, 80))
    w = prompt(common.name_embeddings(tiny, ["heart", "blue arrow", "ring", "star", "a cross"]))
    logits, zero_shot = (tiny.logit_scale * F.normalize(torch.randn(4, 128), dim=-1) @ w.T
                         for w in (w, w.detach().flip(0)))
    losses = [F.cross_entropy(logits, y) for y in (torch.arange(4), zero_shot.softmax(-1))]
    two = [torch.autograd.grad(loss, prompt.v, retain_graph=True)[0] for loss in losses]
    for found, expected in zip(common.gradients(losses, w, prompt.v), two, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


PETS = "a type of pet, a photo of a {}."


def test_a_comma_leaves_the_last_word_over(tiny):
    run = made_up_run(tiny, [], PETS, [], None)
    learned, left_over = prograd.first_context(run, context_args(n_ctx=8))
    assert torch.equal(learned, common.embed(tiny, "a type of pet, a photo of"))
    assert torch.equal(left_over, common.embed(tiny, "a"))


def test_what_is_left_over_stays_before_the_name_and_is_not_learned(tiny):
    run = made_up_run(tiny, [], PETS, [], None)
    prompt = prograd.Prompt(tiny, *prograd.first_context(run, context_args(n_ctx=8)))
    with torch.no_grad():
        found = prompt.class_features(["red heart", "arrow"])
    expected = common.template_features(tiny, PETS, ["red heart", "arrow"])
    assert torch.allclose(found, expected, atol=1e-5)
    assert [name for name, _ in prompt.named_parameters()] == ["v"]


@pytest.mark.parametrize("n_ctx, zeros, words", [
    (6, 2, "a photo of a"),
    (4, 0, "a photo of a"),
    (3, 0, "photo of a"),
])
def test_the_context_ends_in_the_templates_words_with_zeros_before(tiny, n_ctx, zeros, words):
    run = made_up_run(tiny, [], "a photo of a {}.", [], None)
    v, left_over = prograd.first_context(run, context_args(n_ctx=n_ctx))
    assert not len(left_over)
    assert len(v) == n_ctx and not v[:zeros].any()
    assert torch.equal(v[zeros:], common.embed(tiny, words))


def test_what_was_left_over_in_the_training_stays_when_it_is_loaded(cli, tmp_path):
    short = ("--epochs", 1, "--views", 1, "--shots", 1, "--n-ctx", 4)
    words = ("--ctx-init", "red heart, red")            # four tokens, of which three are learned
    trained = cli("prograd", *short, *words, "--save", tmp_path / "saved").records[0]
    loaded = cli("prograd", *short, "--load", tmp_path / "saved").records[0]
    assert loaded["per_class"] == trained["per_class"]
    assert load_file(tmp_path / "saved")["left_over"].shape == (1, 80)


CONFLICTS = ("--epochs", 3, "--views", 2)


def test_without_projection_it_is_coop_started_from_the_template(once, cli, monkeypatch):
    without = once("prograd", *CONFLICTS, "--projection", 0).records[0]
    monkeypatch.setattr(coop, "first_context", lambda *of: prograd.first_context(*of)[0])
    from_template = cli("coop", *CONFLICTS).records[0]
    assert without["loss"] == pytest.approx(from_template["loss"], rel=1e-4)


def test_with_projection_conflicts_change_the_training(once):
    without = once("prograd", *CONFLICTS, "--projection", 0).records[0]
    with_it = once("prograd", *CONFLICTS).records[0]
    assert sum(with_it["conflicts"]) > 0
    assert with_it["loss"] != pytest.approx(without["loss"], rel=1e-4)


# ---------------------------------------------------------------- MVP-MI

OFF = ("--mi-weight", 0, "--image-weight", 0, "--augment", 0, "--classifier", "soft")


def test_with_all_off_it_is_coop_to_the_last_digit(once):
    found = once("mvp_mi", *CONFLICTS, *OFF).records[0]
    expected = once("coop", *CONFLICTS).records[0]
    for name in ("loss", "accuracy", "parameters", "per_class"):
        assert found[name] == expected[name]


@pytest.mark.parametrize("flags", [
    ("--mi-weight", 1),
    ("--augment", 2),
    ("--augment", 2, "--image-weight", 1),
])
def test_each_of_its_parts_changes_the_training(once, flags):
    without = once("mvp_mi", *CONFLICTS, *OFF).records[0]
    assert once("mvp_mi", *CONFLICTS, *OFF, *flags).records[0]["loss"] != without["loss"]


def test_without_mixed_features_there_is_no_bound_of_theirs(once):
    assert "image_bound" not in once("mvp_mi", *CONFLICTS, *OFF).records[0]


def test_the_critic_starts_as_the_cosine_over_its_temperature():
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    cosine = F.cosine_similarity(a[:, None], b, dim=-1)
    assert torch.allclose(mvp_mi.Critic(8, 0.07)(a, b), cosine / 0.07, atol=1e-4)


def test_a_learned_critic_parts_from_the_cosine_after_the_first_step(once):
    learned, cosine = (once("mvp_mi", *CONFLICTS, "--shots", 1, "--critic", critic).records[0]
                       for critic in ("learned", "cosine"))
    assert learned["bound"][0] == cosine["bound"][0]            # one batch, one step
    assert learned["bound"][-1] != cosine["bound"][-1]


def test_the_critic_is_no_part_of_what_is_learned_for_the_test(once):
    assert once("mvp_mi", *CONFLICTS, "--shots", 1, "--critic", "learned").records[0][
        "parameters"] == 16 * 80


def bound(a, b):
    """log C - L_view of features a and b (C, D), in nats."""
    return math.log(len(a)) - mvp_mi.info_nce(mvp_mi.Critic(a.shape[1], 0.07)(a, b)).item()


def test_the_bound_is_log_c_where_every_view_tells_its_class():
    s = torch.eye(20, 64)
    assert bound(s, s) == pytest.approx(math.log(20), abs=0.001)


def test_the_bound_is_below_zero_where_views_mean_other_classes():
    s = torch.eye(20, 64)
    assert bound(s, s.roll(1, 0)) < 0


def test_the_bound_is_zero_where_views_say_nothing():
    assert bound(torch.ones(20, 8), torch.randn(20, 8)) <= 1e-5
    assert bound(torch.ones(20, 8), torch.ones(20, 8)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_never_exceeds_log_c(seed):
    a, b = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(seed))
    assert bound(a, b) < math.log(20) and bound(a, a) < math.log(20)


def test_the_views_may_change_places():
    T = torch.randn(6, 6)
    assert mvp_mi.info_nce(T).item() == pytest.approx(mvp_mi.info_nce(T.T).item(), rel=1e-6)


def test_the_bounds_gradient_is_that_of_finite_differences():
    T = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mvp_mi.info_nce, T)


def mixed(labels, y, k, features):
    labels, y = torch.tensor(labels), torch.tensor(y)
    return mvp_mi.mixup(features, labels, y, k, torch.Generator().manual_seed(0))


def test_every_class_of_a_batch_gets_its_mixed_features():
    _, y_mix = mixed([0, 0, 1, 1, 2], [1, 2, 1], 3, torch.randn(5, 2, 4))
    assert y_mix.tolist() == [1, 1, 1, 2, 2, 2]


def test_only_features_of_one_class_are_mixed():
    labels = [0, 0, 1, 1, 2]
    features = F.one_hot(torch.tensor(labels), 4).float()[:, None].expand(5, 3, 4)
    f_mix, y_mix = mixed(labels, [0, 1, 2], 4, features)
    assert torch.allclose(f_mix, F.one_hot(y_mix, 4).float())


def test_mixed_features_have_length_1():
    f_mix, _ = mixed([0, 0, 1, 1], [0, 1], 5, torch.randn(4, 3, 8))
    assert torch.allclose(f_mix.norm(dim=-1), torch.ones(10))


def test_the_shares_of_a_mixture_are_uniform():
    """Of two features at a right angle the shares can be read from the mixture."""
    f_mix, _ = mixed([0, 0], [0], 20000, torch.eye(2)[:, None])
    u = (f_mix[:, 0] / f_mix.sum(-1))[(f_mix > 0).all(-1)]      # without those of one image only
    quarters = torch.histc(u, 4, 0, 1) / len(u)
    assert len(u) > 9000 and quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("classifier, learned, other", [
    ("soft", "w", "w"),
    ("mean", "both", "both"),
    ("seen", "w", "both"),
])
def test_which_view_classifies(cli, monkeypatch, classifier, learned, other):
    kept = []
    monkeypatch.setattr(common.Run, "finish", lambda run, prompt, **_: kept.append((run, prompt)))
    cli("mvp_mi", *QUICK, "--base-to-new", "--classifier", classifier)
    ((run, prompt),) = kept
    names = run.data.classnames[0], run.data.classnames[-1]     # of the base and the new classes
    with torch.no_grad():
        w = prompt(common.name_embeddings(run.clip, names))
        h = common.template_features(run.clip, run.data.template, names)
        found = prompt.class_features(names)
    views = {"w": w, "both": F.normalize(w + h, dim=-1)}
    assert torch.allclose(found[0], views[learned][0], atol=1e-6)
    assert torch.allclose(found[1], views[other][1], atol=1e-6)


# ---------------------------------------------------------------- RESTORE

NAMES = ["red heart", "a large blue arrow"]


def restore_args(**given):
    defaults = {"shift": "features", "prompts": "independent", "towers": "both", "depth": 4,
                "ctx_init": "a photo of a", "n_ctx": 2, "blend": 0.1}
    return Namespace(**{**defaults, **given})


def test_without_prompts_the_text_tower_is_clips(tiny):
    prompt = restore.Prompt(tiny, restore_args())
    texts = tiny.tokenizer([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        found, states = prompt.encode_text(common.name_embeddings(tiny, NAMES), [])
        assert torch.allclose(found, tiny.model.encode_text(texts), atol=1e-5)
    assert states.shape == (2, 4, 80)


def test_without_prompts_the_image_tower_is_clips(tiny):
    prompt, pixels = restore.Prompt(tiny, restore_args()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, states = prompt.encode_image(pixels, [])
        assert torch.allclose(found, tiny.model.encode_image(pixels), atol=1e-5)
    assert states.shape == (2, 6, 128)


def test_the_first_text_prompt_starts_as_the_words_whose_place_it_takes(tiny):
    prompt = restore.Prompt(tiny, restore_args(depth=1))
    names = common.name_embeddings(tiny, NAMES)
    with torch.no_grad():
        found, frozen = prompt.encode_text(names, prompt.text()), prompt.encode_text(names, [])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, frozen))


def test_text_prompts_take_the_place_of_those_of_the_block_before(tiny):
    """What a block makes of its prompts is not read by the next one, which has prompts."""
    prompt, seen = restore.Prompt(tiny, restore_args()), []
    hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
             for block in tiny.text.transformer.resblocks]
    with torch.no_grad():
        prompt.encode_text(common.name_embeddings(tiny, NAMES), prompt.text())
    for hook in hooks:
        hook.remove()
    assert len({x.shape for x in seen}) == 1                    # no prompt is added to another
    for x, p in zip(seen[1:], prompt.text()[1:]):
        assert torch.equal(x[0, 1:3], p)


def test_the_surgery_changes_nothing_at_the_start(tiny):
    prompt, z = restore.Prompt(tiny, restore_args()), torch.randn(3, 128)
    for operate in (prompt.operate_text, prompt.operate_image):
        assert torch.allclose(operate(z), F.normalize(z, dim=-1), atol=1e-6)


def test_the_blend_is_the_share_of_a_feature_that_is_operated_on(tiny):
    prompt, z = restore.Prompt(tiny, restore_args(blend=[0.25, 0.1])), torch.randn(3, 128)
    torch.nn.init.ones_(prompt.text_surgery.down.bias)          # A(z) = z + 1
    assert torch.allclose(prompt.operate_text(z), F.normalize(z + 0.25, dim=-1), atol=1e-6)


def test_the_shift_is_the_length_of_the_change_over_that_of_the_frozen_state():
    frozen = torch.randn(2, 4, 80)
    assert restore.feature_shift(3 * frozen, frozen).tolist() == pytest.approx([2.0] * 4)
    assert restore.feature_shift(frozen, frozen).tolist() == [0.0] * 4


@pytest.mark.parametrize("shift_t, shift_v, expected", [
    ([0.1, 0.5], [0.1, 0.5], 0.0),
    ([0.1, 0.5], [0.4, 0.5], 0.045),
    ([0.1, 0.5], [9.0, 9.0, 0.1, 0.5], 0.0),        # paired at the last blocks
])
def test_consistency_is_the_mean_square_of_the_gaps(tiny, shift_t, shift_v, expected):
    prompt = restore.Prompt(tiny, restore_args())
    found = prompt.consistency(torch.tensor(shift_t), torch.tensor(shift_v)).item()
    assert found == pytest.approx(expected, abs=1e-8)


def test_blends_grow_by_the_mean_shift(tiny):
    prompt = restore.Prompt(tiny, restore_args())
    prompt.raise_blends(torch.tensor([0.4, 0.6]), torch.tensor([0.5, 1.0, 1.5]))
    assert prompt.blend.tolist() == pytest.approx([0.1 + 0.02 * 0.5, 0.1 + 0.005 * 1.0])


@pytest.mark.parametrize("text, value", [
    ("0.1", 0.1),
    ("0", 0.0),
    ("0.05,0.1", [0.05, 0.1]),
])
def test_a_blend_is_one_number_or_one_for_each_tower(text, value):
    assert restore.blends(text) == value


def test_three_blends_are_refused():
    with pytest.raises(common.Problem, match="--blend 0.1,0.2,0.3"):
        restore.blends("0.1,0.2,0.3")


def test_prompts_in_chunks_of_classes_have_the_same_features_and_gradients(tiny, monkeypatch):
    names = common.name_embeddings(tiny, [f"thing {k}" + " more" * (k % 3) for k in range(7)])
    found = []
    for chunk in (128, 3):
        monkeypatch.setattr(tiny, "class_chunk", chunk)
        torch.manual_seed(0)
        prompt = restore.Prompt(tiny, restore_args())
        t, states = prompt.encode_text(names, prompt.text())
        (t.sum() + states.square().mean()).backward()
        found.append([t.detach(), states.detach(), *(p.grad for p in prompt.text())])
    for a, b in zip(*found):
        assert (a - b).norm() < 1e-5 * a.norm()


PLAIN = ("--shift-weight", 0, "--blend", 0)


@pytest.mark.parametrize("flags, parameters", [
    (PLAIN, 4 * 2 * (80 + 128)),
    (("--towers", "text", *PLAIN), 4 * 2 * 80),
    (("--towers", "vision", *PLAIN), 4 * 2 * 128),
    (("--prompts", "coupled", "--shift", "gram", *PLAIN), 4 * (2 * 80 + 81 * 128)),
])
def test_its_parts_can_be_switched_off(once, flags, parameters):
    run = once("restore", *QUICK, *flags)
    assert run.status == 0 and run.records[0]["parameters"] == parameters


@pytest.mark.parametrize("towers, still", [("text", "vision"), ("vision", "text")])
def test_a_tower_without_prompts_does_not_move(once, towers, still):
    shift = once("restore", *QUICK, "--towers", towers, *PLAIN).records[0]["shift_after"]
    assert max(shift[still]) == 0 and min(shift[towers]) > 0
    assert shift["gap"] > 0


def test_a_depth_is_cut_to_the_blocks_that_both_towers_have(once):
    assert "have 4 blocks in common" in once("restore", *QUICK, *PLAIN).out


def test_a_resnet_is_refused(tiny):
    resnet = ModifiedResNet((1, 1, 1, 1), output_dim=8, heads=1, image_size=32, width=8)
    clip = replace(tiny, model=Namespace(visual=resnet))
    with pytest.raises(common.Problem, match="vision transformer"):
        restore.check(clip, restore_args())


def test_more_prompts_than_words_are_refused(tiny):
    with pytest.raises(common.Problem, match="--n-ctx 5: .* 4 tokens"):
        restore.check(tiny, restore_args(n_ctx=5))


def test_without_text_prompts_they_may_be_more_than_the_words(tiny):
    args = restore_args(n_ctx=5, towers="vision")
    restore.check(tiny, args)
    assert [len(q) for q in restore.Prompt(tiny, args).visual()] == [5] * 4


@pytest.fixture(scope="module")
def vit():
    """OpenAI's ViT-B-32 with random weights."""
    model, _, tokenizer = backbone.create("ViT-B-32", "random", "cpu")
    return common.Clip(model, model, tokenizer, None, None, 100.0, "cpu", "fp32", "")


def test_it_fits_openais_vision_transformers(vit):
    args, pixels = restore_args(depth=9), torch.randn(1, 3, 224, 224)
    restore.check(vit, args)
    prompt = restore.Prompt(vit, args)
    with torch.no_grad():
        found = prompt.encode_image(pixels, [])[0]
        assert torch.allclose(found, vit.model.encode_image(pixels), atol=1e-4)


def test_every_prompt_of_a_vision_transformer_gets_a_gradient(vit):
    prompt = restore.Prompt(vit, restore_args(depth=9))
    f, w = prompt.image_features(torch.randn(1, 3, 224, 224)), prompt.class_features(["heart"])
    (f @ w.T).sum().backward()
    assert all(p.grad.any() for p in prompt.text() + prompt.visual())
    assert len(prompt.text()) == len(prompt.visual()) == 9


# ---------------------------------------------------------------- RESTORE as it was released

def test_coupled_visual_prompts_are_made_from_the_texts(tiny):
    prompt = restore.Released(tiny, restore_args(prompts="coupled"))
    for q, layer, p in zip(prompt.visual(), prompt.projections, prompt.text()):
        assert torch.equal(q, layer(p)) and q.shape == (2, 128)
    assert not hasattr(prompt, "visual_prompts")


def test_gram_norms_agree_at_the_start(tiny):
    prompt = restore.Released(tiny, restore_args(shift="gram"))
    assert prompt.consistency(None, None).item() == 0


def test_gram_norms_are_compared_from_the_second_block_on(tiny):
    prompt = restore.Released(tiny, restore_args(shift="gram"))
    for p in prompt.text():
        p.data *= 2 ** 0.5                                      # |P P^T| is twice what it was
    assert prompt.consistency(None, None).item() == pytest.approx(3, rel=1e-4)


def test_blends_grow_by_the_gram_norm(tiny):
    prompt = restore.Released(tiny, restore_args(shift="gram"))
    text, vision = prompt.gram_norms()
    prompt.raise_blends(None, None)
    expected = [0.1 + 0.02 * text.mean().item(), 0.1 + 0.005 * vision.mean().item()]
    assert prompt.blend.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("flags", [("--prompts", "coupled"), ("--shift", "gram")])
def test_the_released_code_has_prompts_in_both_towers(cli, flags):
    run = cli("restore", *QUICK, "--towers", "text", *flags)
    assert run.status == 2 and "--towers text" in run.err and not run.records


def test_what_coupled_prompts_learned_is_as_good_when_it_is_loaded(cli, tmp_path):
    flags = ("--prompts", "coupled", "--shift", "gram")
    trained = cli("restore", *QUICK, *flags, "--save", tmp_path / "saved")
    loaded = cli("restore", *flags, "--load", tmp_path / "saved")
    assert loaded.records[0]["accuracy"] == trained.records[0]["accuracy"]
