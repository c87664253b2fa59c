"""What each method does: learned parameters, start, loss, update; and its constants."""

import difflib
import functools
import importlib
import inspect
import math
import subprocess
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_run
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from reference.make import NAMES, SMALL, blends, follow, small_clip

import common
import coop
import mvp_mi
import prograd
import restore
from data.load import CATALOGUE

HERE = Path(__file__).parent.parent
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
every_method = pytest.mark.parametrize("method", METHODS)
SIZES = {**SMALL, "t_layers": 3, "v_layers": 4}


def config(method, **given):
    """Three steps at --lr 1 on the small CLIP, for reference/make.py to follow."""
    made = {"method": method, "classnames": NAMES, "template": "a centered satellite photo of {}.",
            "labels": [0, 3, 1, 4], "n_ctx": 16, "context_words": "", "context_seed": 11,
            "image_seed": 7, "image_size": 32, "lr": 1.0, "steps": 3, "clip": SIZES}
    if method == "restore":
        made.update(n_ctx=2, context_words="a photo of a", blend_text=0.1, blend_visual=0.1)
    return {**made, **given}


@functools.cache
def trained(method):
    return follow(config(method))


@pytest.fixture(scope="module")
def small():
    return small_clip(**SIZES)


def with_flags(script, clip, *flags):
    """A run with flags, without images."""
    return make_run(clip, script, NAMES, [], *map(str, flags))


# ---------------------------------------------------------------- every method

@every_method
def test_sgd_has_momentum_and_weight_decay(method):
    """At a learning rate of 1, weight decay is a hundred times what float32 loses: replayed from
    the gradients, 5e-4 differs from 0, and plain momentum from Nesterov's or a dampened one."""
    training = trained(method)
    for name, start in training.initial.items():
        v, u = start.double(), torch.zeros_like(start).double()
        for gradients in training.gradients:
            u = 0.9 * u + gradients[name].double() + 5e-4 * v
            v = v - u
        found = training.prompt.get_parameter(name).double()
        assert (found - v).abs().max() < 5e-7 * (1 + v.abs().max()), name


@every_method
def test_one_epoch_of_warm_up_then_half_a_cosine(method):
    training = follow(config(method, lr=0.002, epochs=4, steps=2))
    expected = [1e-5, 0.002, 0.001 * (1 + math.cos(math.pi / 4)), 0.001]
    assert training.run.history()["lr"] == pytest.approx(expected, rel=1e-6)
    for step, rates in enumerate(training.rates):       # of all parameter groups
        assert rates == pytest.approx([expected[step // 2]] * len(rates))


@pytest.mark.parametrize("dataset, shots, epochs", [
    ("eurosat", 1, 50), ("eurosat", 2, 100), ("eurosat", 7, 100), ("eurosat", 8, 200),
    ("imagenet", 16, 50)])
def test_coops_number_of_epochs(dataset, shots, epochs):
    run = SimpleNamespace(shots=shots, data=SimpleNamespace(name=dataset))
    assert common.default_epochs(run) == epochs


@pytest.mark.parametrize("method, epochs", [*zip(METHODS, [7, 7, 7, 10])])
def test_without_epochs_it_is_coops_number_and_10_for_restore(method, epochs, monkeypatch):
    monkeypatch.setattr(common, "default_epochs", lambda run: 7)
    assert follow(config(method, epochs=None, steps=1, lr=0.001)).epochs == epochs


SHARED = {"epochs": None, "views": 10, "shots": [4], "seeds": [1], "base_to_new": False}
CONTEXT = {**SHARED, "lr": 0.002, "batch_size": 32, "n_ctx": 16, "ctx_init": None,
           "class_specific": False, "position": "end"}
DEFAULTS = {
    "coop": CONTEXT,
    "prograd": {**CONTEXT, "projection": 1.0},
    "mvp_mi": {**CONTEXT, "mi_weight": 1.0, "image_weight": 1.0, "mi_temperature": 0.07,
               "critic": "learned", "augment": 2, "classifier": "seen"},
    "restore": {**SHARED, "lr": 0.0035, "batch_size": 4, "n_ctx": 2, "ctx_init": "a photo of a",
                "depth": 9, "prompts": "independent", "towers": "both", "shift": "features",
                "shift_weight": 10.0, "blend": [0.1]},
}


@every_method
def test_defaults(method):
    parser = importlib.import_module(method).flags()
    args = common.settle(common.parse(parser, []), "eurosat")
    assert {flag: vars(args)[flag] for flag in DEFAULTS[method]} == DEFAULTS[method]
    embedded = common.settle(common.parse(parser, []), "shapes")
    assert embedded.lr == (0.0005 if method == "restore" else 0.002)


@every_method
def test_under_autocast_a_steps_gradient_keeps_its_direction_and_size(method, small):
    one_step = config(method, steps=1, context_seed=None, n_ctx=2, context_words="a photo")
    exact, found = (follow(one_step, replace(small, amp=amp)).gradients[0] for amp in (False, True))
    for name in exact:
        if name[0] in "vPQ":
            assert found[name].dtype == torch.float32 and not torch.equal(found[name], exact[name])
            assert F.cosine_similarity(found[name], exact[name], dim=-1).min() > 0.99
            assert found[name].norm() / exact[name].norm() == pytest.approx(1, abs=0.03)


@every_method
def test_classes_in_chunks_give_the_same_gradients(method, small):
    whole, chunks = (follow(config(method, steps=1), replace(small, class_chunk=size)).gradients[0]
                     for size in (5, 2))
    for name in whole:
        assert (whole[name] - chunks[name]).norm() < 1e-4 * whole[name].norm(), name


# ---------------------------------------------------------------- scripts as texts

def committed(name):
    """Return a script's lines as committed, if this is a git clone: a user may edit it."""
    done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=HERE, capture_output=True, text=True)
    return (done.stdout or (HERE / name).read_text()).splitlines()


def test_at_most_60_lines_differ_between_coop_and_prograd():
    changed = [line for line in difflib.ndiff(committed("coop.py"), committed("prograd.py"))
               if line[0] in "+-"]
    assert 0 < len(changed) <= 60


@pytest.mark.parametrize("passage", ["Prompt.forward", "initial_context"])
def test_mvp_mi_has_coops_prompt_and_start_to_the_letter(passage):
    ours, theirs = (inspect.getsource(attrgetter(passage)(some)) for some in (coop, mvp_mi))
    assert ours == theirs


# ---------------------------------------------------------------- a learned context

def test_a_context_starts_as_noise():
    v = trained("coop").made["v"]
    assert v.shape == (16, 128) and v.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(v.mean().item()) < 0.002


@pytest.mark.parametrize("script", [coop, prograd])
@pytest.mark.parametrize("position, template", [
    ("end", "a very large green {}."), ("middle", "a very {} large green."),
    ("front", "{} a very large green.")])
def test_a_context_of_words_is_the_hand_crafted_prompt(small, script, position, template):
    v = common.embed(small, "a very large green")
    left_over = [v[:0]] if script is prograd else []
    found = script.Prompt(small, v, *left_over, position)(common.name_embeddings(small, NAMES))
    assert torch.allclose(found, common.template_features(small, template, NAMES), atol=1e-5)


# ---------------------------------------------------------------- ProGrad

@pytest.mark.parametrize("general, lambda_, expected", [
    ([-1.0, 1.0], 1.0, [0.5, 0.5]), ([-1.0, 1.0], 0.5, [0.75, 0.25]),
    ([1.0, 1.0], 1.0, [1.0, 0.0]), ([0.0, 0.0], 1.0, [1.0, 0.0])])
def test_projection_removes_a_share_of_a_conflict_and_nothing_else(general, lambda_, expected):
    g = prograd.project(torch.tensor([1.0, 0.0]), torch.tensor(general), lambda_)
    assert g.tolist() == pytest.approx(expected)


def test_without_projection_it_is_coop_with_another_start():
    without = follow(config("prograd", projection_strength=0))      # and context_seed is coop's
    assert torch.equal(without.prompt.v, trained("coop").prompt.v)


@pytest.mark.parametrize("n_ctx, zeros, words", [(6, 2, "a photo of a"), (3, 0, "photo of a")])
def test_the_context_ends_with_the_templates_words_after_zeros(small, n_ctx, zeros, words):
    run = with_flags(prograd, small, "--n-ctx", n_ctx)
    v, left_over = prograd.initial_context(run)
    assert v.shape == (n_ctx, 128) and not v[:zeros].any() and not len(left_over)
    assert torch.equal(v[zeros:], common.embed(small, words))


# ---------------------------------------------------------------- MVP-MI

def test_with_everything_off_it_is_coop_to_the_bit():
    off = {"mi_weight": 0, "image_weight": 0, "augment": 0, "classifier": "soft"}
    found = follow(config("mvp_mi", **off))
    assert torch.equal(found.prompt.v, trained("coop").prompt.v)
    assert [step["loss"] for step in found.log] == [step["loss"] for step in trained("coop").log]


def test_the_loss_is_the_docstrings_term_by_term(small):
    y = [0, 3, 1, 0]
    training = follow(config("mvp_mi", steps=1, labels=y, mi_weight=4, image_weight=0.5))
    w = mvp_mi.Prompt(small, training.initial["v"])(common.name_embeddings(small, NAMES)).detach()
    h = common.template_features(small, "a centered satellite photo of {}.", NAMES)
    f, (z, y_z) = training.run.features[:, 0], training.mixed[0]
    views, own = w @ h.T / 0.07, torch.arange(5)
    l_view = (F.cross_entropy(views, own) + F.cross_entropy(views.T, own)) / 2
    l_img = F.cross_entropy(z @ w.T / 0.07, y_z)
    loss = F.cross_entropy(100 * torch.cat([f, z]) @ w.T, torch.tensor([*y, *y_z]))
    step = training.log[0]
    assert y_z.tolist() == [0, 0, 1, 1, 3, 3]
    assert step["loss"].item() == pytest.approx((loss + 4 * l_view + 0.5 * l_img).item(), rel=1e-4)
    assert step["bound"].item() == pytest.approx((math.log(5) - l_view).item(), abs=1e-4)
    assert step["image_bound"].item() == pytest.approx((math.log(5) - l_img).item(), abs=1e-4)


def test_the_critic_is_the_cosine_of_mapped_features_over_a_temperature():
    w, b, critic = torch.randn(3, 8), torch.randn(5, 8), mvp_mi.Critic(8, 0.07)
    critic.P.data, critic.Q.data = P, Q = torch.randn(2, 8, 8)
    cosine = F.cosine_similarity((w @ P.T)[:, None], b @ Q.T, dim=-1)
    assert torch.allclose(critic(w, b), cosine / 0.07, atol=1e-4)


def test_a_learned_critic_is_trained_without_weight_decay_and_a_cosine_not_at_all():
    v, critic = trained("mvp_mi").optimizer.param_groups
    assert (len(v["params"]), v["weight_decay"], critic["weight_decay"]) == (1, 5e-4, 0)
    for p, start in zip(critic["params"], mvp_mi.Critic(128, 0.07).parameters(), strict=True):
        assert not torch.equal(p, start)
    assert len(follow(config("mvp_mi", critic="cosine")).optimizer.param_groups) == 1


def test_mixtures_are_of_two_views_of_one_class_with_uniform_shares_and_unit_norm():
    """Of orthogonal features the shares can be read from the mixture."""
    features, labels, count = torch.eye(12).view(4, 3, 12), torch.tensor([0, 0, 1, 1]), 10000
    z, y_z = mvp_mi.mixup(features, labels, torch.tensor([1, 0, 1]), count, torch.Generator())
    assert y_z.tolist() == [0] * count + [1] * count
    assert not z[:count, 6:].any() and not z[count:, :6].any()
    assert z.min() >= 0 and torch.allclose(z.norm(dim=-1), torch.ones(2 * count))
    assert (z > 0).double().mean(0).tolist() == pytest.approx([11 / 72] * 12, abs=0.01)
    mixed = z[(z > 0).sum(-1) == 2]                             # without those of one view only
    shares = (mixed / mixed.sum(-1, keepdim=True))[mixed > 0]
    quarters = torch.histc(shares, 4, 0, 1) / len(shares)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("classifier, takes_the_mean", [
    ("soft", [False, False]), ("seen", [False, True])])
def test_trained_classes_use_w_and_new_ones_the_mean_with_h(classifier, takes_the_mean):
    training = follow(config("mvp_mi", classifier=classifier, steps=0))
    clip, names = training.run.clip, [NAMES[3], "River"]
    w = training.prompt(common.name_embeddings(clip, names))
    h = common.template_features(clip, training.run.template, names)
    part = common.Part("", None, [], [(3, names[0]), (8, names[1])])
    expected = torch.where(torch.tensor(takes_the_mean)[:, None], F.normalize(w + h, dim=-1), w)
    assert torch.allclose(training.prompt.class_features(part), expected, atol=1e-6)


# ---------------------------------------------------------------- RESTORE

def restored(clip, *flags):
    """A prompt of restore.py as it starts."""
    torch.manual_seed(0)
    return restore.Prompt(clip, with_flags(restore, clip, *flags).args)


def test_without_prompts_both_encoders_are_clips(small):
    prompt, pixels = restored(small), torch.randn(2, 3, 32, 32)
    texts = small.tokenizer([f"a photo of a {name}." for name in NAMES])
    t, s_t = prompt.encode_text(common.name_embeddings(small, NAMES), [])
    i, s_i = prompt.encode_image(pixels, [])
    assert torch.allclose(t, small.model.encode_text(texts), atol=1e-4)
    assert torch.allclose(i, small.model.encode_image(pixels), atol=1e-4)
    assert s_t.shape == (5, 3, 128) and s_i.shape == (2, 4, 128)


def test_prompts_start_as_words_and_noise_and_the_words_stay_what_they_are(small):
    made, words = trained("restore").made, common.embed(small, "a photo of a")
    assert torch.equal(made["P.0"], words[:2])
    assert torch.equal(trained("restore").prompt.words, words)              # after the training
    noise = torch.cat([made[name].flatten() for name in ("P.1", "P.2", "Q.0", "Q.1", "Q.2")])
    assert noise.std().item() == pytest.approx(0.02, rel=0.05) and abs(noise.mean().item()) < 0.002


@pytest.mark.parametrize("flags, words", [
    (["--n-ctx", "5"], "which has 4 tokens"), (["--blend", "0.1,0.2,0.3"], "wants one number")])
def test_prompts_that_do_not_fit_are_refused(small, flags, words):
    with pytest.raises(common.Problem, match=words):
        restored(small, *flags)


def test_the_surgery_blends_in_a_quickgelu_network_that_starts_as_the_identity():
    z, surgery = torch.randn(3, 8), restore.Surgery(8, 0.25)
    assert torch.allclose(surgery(z), F.normalize(z, dim=-1), atol=1e-6)
    assert surgery.up.weight.shape == (32, 8) and surgery.norm.eps == 1e-5
    torch.nn.init.normal_(surgery.down.weight)
    change = surgery.down(QuickGELU()(surgery.up(F.layer_norm(z, (8,)))))
    assert torch.allclose(surgery(z), F.normalize(z + 0.25 * change, dim=-1), atol=1e-6)


@pytest.mark.parametrize("flags, prompts, used, b", [
    ([], (3, 3), (True, True), (0.1, 0.1)),                     # not 9 blocks, but 3
    (["--towers", "text"], (3, 0), (True, False), (0.1, 0)),
    (["--towers", "vision"], (0, 3), (False, True), (0, 0.1)),
    (["--blend", "0,0.2"], (3, 3), (False, True), (0, 0.2))])
def test_an_encoder_without_prompts_or_blend_has_no_surgery(small, flags, prompts, used, b):
    prompt = restored(small, *flags)
    assert (len(prompt.P), len(prompt.Q)) == prompts
    assert (prompt.text_surgery.used, prompt.image_surgery.used) == used
    assert blends(prompt).tolist() == pytest.approx(b)


def test_the_loss_is_cross_entropy_and_10_times_the_consistency():
    training = trained("restore")
    loss = F.cross_entropy(training.logits_initial, torch.tensor([0, 3, 1, 4]))
    step, m = training.log[0], 3
    gaps = step["shift_vision"][-m:] - step["shift_text"][-m:]
    assert step["consistency"].item() == pytest.approx(gaps.square().mean().item(), rel=1e-5)
    assert step["loss"].item() == pytest.approx((loss + 10 * step["consistency"]).item(), rel=1e-5)


@pytest.mark.parametrize("views", [0, 2])
def test_an_encoder_without_prompts_does_not_shift_in_any_epoch(cli, views):
    """The frozen states that are compared are those of the same images in the same crops."""
    (record,) = cli("restore", "--epochs", 2, "--shots", 1, "--views", views, "--towers", "text",
                    "--blend", 0, "--test-images", 1).records
    assert max(map(max, record["shift_vision"])) < 1e-5
    assert min(map(max, record["shift_text"])) > 0.1
    after = record["shift_after"]
    assert max(after["vision"]) < 1e-5
    assert after["gap"] == pytest.approx(sum(after["text"]) / len(after["text"]), rel=1e-3)


@pytest.mark.parametrize("epochs, raised_after", [(10, 3), (2, 0), (1, None)])
def test_blends_are_raised_once_after_a_third_and_never_after_the_last_update(epochs, raised_after):
    training = follow(config("restore", epochs=epochs, steps=1, lr=0.0035, blend_text=0.3))
    start = end = torch.tensor([0.3, 0.1])
    if raised_after is not None:
        step = training.log[raised_after]
        shifts = torch.stack([step["shift_text"].mean(), step["shift_vision"].mean()])
        end = start + torch.tensor([0.02, 0.005]) * shifts
    for epoch, blend in enumerate([*training.blends, blends(training.prompt)]):
        later = raised_after is not None and epoch > raised_after
        assert torch.allclose(blend, end if later else start, atol=1e-7), epoch


def test_a_resnet_is_refused(small):
    visual = ModifiedResNet((1, 1, 1, 1), output_dim=8, heads=1, image_size=32, width=8)
    with pytest.raises(common.Problem, match="vision transformer"):
        restored(replace(small, model=SimpleNamespace(visual=visual)))


def test_text_prompts_take_the_place_of_words_and_cannot_be_more(small):
    with pytest.raises(common.Problem, match="--n-ctx 5: .* 4 tokens"):
        restored(small, "--n-ctx", 5)
    assert len(restored(small, "--n-ctx", 5, "--towers", "vision").Q[0]) == 5


# ---------------------------------------------------------------- templates

PHOTO = "a photo of a {}."
TEMPLATES = {       # CLIP's and ProGrad's
    "oxford_pets": ("a photo of a {}, a type of pet.", "a type of pet, a photo of a {}."),
    "oxford_flowers": ("a photo of a {}, a type of flower.", "a type of flower, a photo of a {}."),
    "food101": ("a photo of {}, a type of food.", "a type of food, a photo of {}."),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",
                      "a type of aircraft, a photo of a {}."),
    "dtd": ("{} texture.", "a texture of {}."),
    "eurosat": ("a centered satellite photo of {}.", "a centered satellite photo of {}."),
    "ucf101": ("a photo of a person doing {}.", "a photo of a person doing {}."),
    **dict.fromkeys(["caltech101", "stanford_cars", "sun397", "imagenet", "imagenetv2",
                     "imagenet_sketch", "imagenet_a", "imagenet_r"], (PHOTO, PHOTO)),
}


def test_templates_of_the_papers_data_sets():
    found = {name: (spec["template"], spec.get("prograd_template", spec["template"]))
             for name, spec in CATALOGUE.items()}
    assert found == TEMPLATES
