"""What each method does: learned parameters, start, loss, update; and its constants."""

import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import math
import re
import shlex
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
from reference.make import NAMES, SMALL, clip_weight, follow, small_clip

import common
import coop
import mvp_mi
import prograd
import restore
from data.load import CATALOGUE

HERE = Path(__file__).parent.parent
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
CONTEXTS = [coop, prograd, mvp_mi]          # the methods that learn a context
every_method = pytest.mark.parametrize("method", METHODS)
every_context = pytest.mark.parametrize("script", CONTEXTS, ids=METHODS[:3])
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


def with_flags(script, clip, *flags, names=NAMES):
    """A run with flags, without images."""
    return make_run(clip, script, names, [], *map(str, flags))


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
    ("eurosat", 1, 50), ("eurosat", 2, 100), ("eurosat", 4, 100), ("eurosat", 8, 200),
    ("eurosat", 16, 200), ("imagenet", 1, 50), ("imagenet", 16, 50)])
def test_coops_number_of_epochs(dataset, shots, epochs):
    run = SimpleNamespace(shots=shots, data=SimpleNamespace(name=dataset))
    assert common.default_epochs(run) == epochs


@pytest.mark.parametrize("method, epochs", [*zip(METHODS, [7, 7, 7, 10])])
def test_without_epochs_it_is_coops_number_and_10_for_restore(method, epochs, monkeypatch):
    monkeypatch.setattr(common, "default_epochs", lambda run: 7)
    assert follow(config(method, epochs=None, steps=1, lr=0.001)).epochs == epochs


def test_clip_stays_frozen(small):
    for method in METHODS:
        assert trained(method).run.clip is small
    for name, weight in small.model.state_dict().items():
        assert torch.equal(weight, clip_weight(name, tuple(weight.shape))), name
    assert not any(p.requires_grad or p.grad is not None for p in small.model.parameters())


CRITIC = [((128, 128), 0), ((128, 128), 0), ((), 0)]


@pytest.mark.parametrize("method, more", [
    ("coop", []), ("prograd", []), ("mvp_mi", CRITIC), ("restore", [])])
def test_the_prompt_is_learned_with_weight_decay_and_mvp_mis_critic_without(method, more):
    training = trained(method)
    found = [(p.shape, group["weight_decay"]) for group in training.optimizer.param_groups
             for p in group["params"]]
    assert found == [(p.shape, 5e-4) for p in training.prompt.parameters()] + more


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
                "shift_weight": 10.0, "blend": 0.1},
}


@every_method
def test_defaults(method):
    parser = importlib.import_module(method).flags()
    args = common.settle(common.parse(parser, []), parser, "eurosat")
    assert {flag: vars(args)[flag] for flag in DEFAULTS[method]} == DEFAULTS[method]


def test_restore_learns_more_slowly_on_the_embedded_data_sets():
    parser = restore.flags()
    assert common.settle(common.parse(parser, []), parser, "shapes").lr == 0.0005


@every_method
def test_under_autocast_a_steps_gradient_keeps_its_direction_and_size(method, small):
    one_step = config(method, steps=1, context_seed=None, n_ctx=2, context_words="a photo")
    exact, found = (follow(one_step, replace(small, amp=amp)).gradients[0] for amp in (False, True))
    for name in exact:
        if name == "v" or "_prompts." in name:
            assert found[name].dtype == torch.float32 and not torch.equal(found[name], exact[name])
            assert F.cosine_similarity(found[name], exact[name], dim=-1).min() > 0.99
            assert found[name].norm() / exact[name].norm() == pytest.approx(1, abs=0.03)


@every_method
def test_classes_in_chunks_give_the_same_gradients(method, small):
    whole, chunks = (follow(config(method, steps=1), replace(small, class_chunk=size)).gradients[0]
                     for size in (5, 2))
    for name in whole:
        assert (whole[name] - chunks[name]).norm() < 1e-4 * whole[name].norm(), name


# ---------------------------------------------------------------- passages that scripts share

def missing(script, passage):
    """The lines of a passage of coop.py that another script has not, or not in this order."""
    ours, theirs = (inspect.getsource(attrgetter(passage)(some)).splitlines()
                    for some in (coop, script))
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    kept = {k for block in blocks for k in range(block.a, block.a + block.size)}
    return [line.split("  #")[0].strip() for k, line in enumerate(ours) if k not in kept]


@pytest.mark.parametrize("passage, script, lines", [
    ("Prompt.__init__", prograd, ['def __init__(self, clip, v, position="end"):']),
    ("Prompt.__init__", mvp_mi, ['def __init__(self, clip, v, position="end"):']),
    ("Prompt.forward", prograd, []),
    ("Prompt.forward", mvp_mi, []),
    ("Prompt.class_features", prograd, []),
    ("initial_context", mvp_mi, []),
    ("train", prograd, ["optimizer.zero_grad()", "loss.backward()",
                        "run.log(epoch, loss=loss, lr=lr)"]),
    ("train", mvp_mi, ['optimizer.param_groups[0]["lr"] = lr = 1e-5 if epoch == 0 else '
                       "args.lr * decay", "logits = clip.logit_scale * f @ w.T",
                       "loss = F.cross_entropy(logits, y)", "run.log(epoch, loss=loss, lr=lr)"]),
    ("flags", mvp_mi, []),
    ("main", prograd, ["prompt = Prompt(run.clip, initial_context(run), run.args.position)"]),
    ("main", mvp_mi, ["prompt = Prompt(run.clip, initial_context(run), run.args.position)",
                      "run.finish(prompt)"]),
])
def test_scripts_share_all_lines_but_these(passage, script, lines):
    assert missing(script, passage) == lines


@pytest.mark.parametrize("lines", [
    ["optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)"],
    ['for epoch in common.progress(range(epochs), desc="training", unit="epoch"):',
     "# One epoch of warm-up at 1e-5, then half a cosine from lr to almost 0.",
     "decay = (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2",
     'optimizer.param_groups[0]["lr"] = lr = 1e-5 if epoch == 0 else args.lr * decay'],
    ["optimizer.zero_grad()", "loss.backward()", "optimizer.step()"]],
    ids=["optimizer", "schedule", "step"])
def test_restore_has_coops_update_to_the_letter(lines):
    for script in (coop, restore):
        assert "\n".join(lines) in re.sub("\n +", "\n", inspect.getsource(script.train))


def test_at_most_60_lines_differ_between_coop_and_prograd():
    done = subprocess.run(["diff", "coop.py", "prograd.py"], cwd=HERE, capture_output=True)
    assert sum(line[:1] in (b"<", b">") for line in done.stdout.splitlines()) <= 60


@every_method
def test_a_script_imports_common_torch_and_nothing_else(method):
    tree = ast.parse((HERE / f"{method}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", alias.name) for node in imports for alias in node.names}
    assert names == {"common", "math", "torch", "torch.nn.functional"}


@every_method
def test_the_commands_of_a_docstring_are_understood(method):
    script = importlib.import_module(method)
    commands = re.findall(r"^    (--.*?)(?:  .*)?\n", script.__doc__, re.M)
    for flags in commands:
        common.parse(script.flags(), shlex.split(flags))
    assert commands and "--base-to-new --shots 16" in script.__doc__


# ---------------------------------------------------------------- a learned context

@pytest.mark.parametrize("method", ["coop", "mvp_mi"])
def test_a_context_starts_as_noise(method):
    v = trained(method).made["v"]
    assert v.shape == (16, 128) and v.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(v.mean().item()) < 0.002


@pytest.mark.parametrize("script", [coop, mvp_mi], ids=["coop", "mvp_mi"])
def test_a_context_starts_from_words_one_copy_per_class_if_class_specific(script, small):
    words = common.embed(small, "a photo")
    shared = with_flags(script, small, "--ctx-init", "a_photo")
    specific = with_flags(script, small, "--ctx-init", "a photo", "--class-specific")
    assert torch.equal(script.initial_context(shared), words)
    assert torch.equal(script.initial_context(specific), words.expand(len(NAMES), 2, 128))


def make_prompt(script, clip, v, position):
    left_over = [torch.zeros(0, v.shape[-1])] if script is prograd else []
    return script.Prompt(clip, v, *left_over, position)


@every_context
@pytest.mark.parametrize("position, template", [
    ("end", "a very large green {}."), ("middle", "a very {} large green."),
    ("front", "{} a very large green.")])
def test_a_context_of_words_is_the_hand_crafted_prompt(small, script, position, template):
    prompt = make_prompt(script, small, common.embed(small, "a very large green"), position)
    found = prompt(common.name_embeddings(small, NAMES))
    assert torch.allclose(found, common.template_features(small, template, NAMES), atol=1e-5)


@every_context
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_class_specific_context_serves_its_own_class(small, script, position):
    v, names = torch.randn(len(NAMES), 4, 128), common.name_embeddings(small, NAMES)
    found = make_prompt(script, small, v, position)(names)
    for c in range(len(NAMES)):
        (w,) = make_prompt(script, small, v[c], position)(names[c:c + 1])
        assert torch.allclose(found[c], w, atol=1e-5)


# ---------------------------------------------------------------- ProGrad

@pytest.mark.parametrize("lambda_, expected", [
    (1.0, [0.5, 0.5]), (0.5, [0.75, 0.25]), (0.0, [1.0, 0.0])])
def test_projection_removes_a_share_of_a_conflict(lambda_, expected):
    g = prograd.project(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), lambda_)
    assert g.tolist() == [pytest.approx(expected)]


def test_a_projected_gradient_is_orthogonal_to_the_general_one():
    g_d, g_g = torch.randn(2, 16, 80)
    g = prograd.project(g_d, -g_g if (g_d * g_g).sum() > 0 else g_g, 1.0)
    assert abs((g * g_g).sum()) < 1e-5 * g.norm() * g_g.norm()


@pytest.mark.parametrize("add, times", [(0.1, 1), (0, 0)], ids=["agreement", "general is 0"])
def test_without_a_conflict_the_gradient_is_unchanged(add, times):
    g_d = torch.randn(16, 80)
    assert torch.equal(prograd.project(g_d, times * g_d + add, 1.0), g_d)


def test_without_projection_it_is_coop_with_another_start():
    without = follow(config("prograd", projection_strength=0))      # and context_seed is coop's
    assert torch.equal(without.prompt.v, trained("coop").prompt.v)


@pytest.mark.parametrize("n_ctx, zeros, words", [
    (6, 2, "a photo of a"), (4, 0, "a photo of a"), (3, 0, "photo of a")])
def test_the_context_ends_with_the_templates_words_after_zeros(small, n_ctx, zeros, words):
    run = with_flags(prograd, small, "--n-ctx", n_ctx)
    v, left_over = prograd.initial_context(run)
    assert v.shape == (n_ctx, 128) and not v[:zeros].any() and not len(left_over)
    assert torch.equal(v[zeros:], common.embed(small, words))


def test_with_a_comma_the_last_word_of_the_template_is_left_over_before_the_name(small):
    run = with_flags(prograd, small, "--n-ctx", 8)
    run.data.prograd_template = template = "a type of pet, a photo of a {}."
    v, left_over = prograd.initial_context(run)
    assert torch.equal(v, common.embed(small, "a type of pet, a photo of"))
    assert torch.equal(left_over, common.embed(small, "a"))
    w = prograd.Prompt(small, v, left_over)(common.name_embeddings(small, NAMES))
    assert torch.allclose(w, common.template_features(small, template, NAMES), atol=1e-5)


# ---------------------------------------------------------------- MVP-MI

OFF = {"mi_weight": 0, "image_weight": 0, "augment": 0, "classifier": "soft"}


def test_with_everything_off_it_is_coop_to_the_bit():
    found = follow(config("mvp_mi", **OFF))
    assert torch.equal(found.prompt.v, trained("coop").prompt.v)
    assert [step["loss"] for step in found.log] == [step["loss"] for step in trained("coop").log]


def test_the_loss_is_the_docstrings_term_by_term(small):
    y = [0, 3, 1, 0]
    training = follow(config("mvp_mi", steps=1, labels=y, mi_weight=4, image_weight=0.5))
    w = mvp_mi.Prompt(small, training.initial["v"])(common.name_embeddings(small, NAMES)).detach()
    h = common.template_features(small, "a centered satellite photo of {}.", NAMES)
    f, C = training.run.features[:, 0], range(5)
    z, y_z = training.mixed[0]

    def T(a, b):
        return a @ b / 0.07

    views = torch.stack([torch.stack([T(w[c], h[k]) for k in C]) for c in C])
    l_view = -sum(views[c].log_softmax(0)[c] + views[:, c].log_softmax(0)[c] for c in C) / 10
    l_img = -sum(torch.stack([T(w[k], x) for k in C]).log_softmax(0)[c] for x, c in zip(z, y_z)) / 6
    pairs = [*zip(f, y), *zip(z, y_z)]
    loss = -sum((100 * w @ x).log_softmax(0)[c] for x, c in pairs) / 10
    step = training.log[0]
    assert y_z.tolist() == [0, 0, 1, 1, 3, 3]
    assert step["loss"].item() == pytest.approx((loss + 4 * l_view + 0.5 * l_img).item(), rel=1e-4)
    assert step["bound"].item() == pytest.approx((math.log(5) - l_view).item(), abs=1e-4)
    assert step["image_bound"].item() == pytest.approx((math.log(5) - l_img).item(), abs=1e-4)


def test_the_critic_is_the_cosine_of_mapped_features_over_a_temperature():
    w, b, critic = torch.randn(3, 8), torch.randn(5, 8), mvp_mi.Critic(8, 0.07)
    cosine = F.cosine_similarity(w[:, None], b, dim=-1)
    assert torch.allclose(critic(w, b), cosine / 0.07, atol=1e-4)           # as it starts
    critic.P.data, critic.Q.data = P, Q = torch.randn(2, 8, 8)
    cosine = F.cosine_similarity((w @ P.T)[:, None], b @ Q.T, dim=-1)
    assert torch.allclose(critic(w, b), cosine / 0.07, atol=1e-4)


@pytest.mark.parametrize("kind, moves", [("learned", True), ("cosine", False)])
def test_only_a_learned_critic_moves(kind, moves, monkeypatch):
    critics, make = [], mvp_mi.Critic
    monkeypatch.setattr(mvp_mi, "Critic", lambda *given: critics.append(make(*given)) or critics[0])
    follow(config("mvp_mi", critic=kind, lr=0.01))
    for found, start in zip(critics[0].parameters(), make(128, 0.07).parameters()):
        assert torch.equal(found, start) != moves


def mix(labels, y, count, features):
    labels, y = torch.tensor(labels), torch.tensor(y)
    return mvp_mi.mixup(features, labels, y, count, torch.Generator().manual_seed(0))


def test_mixtures_are_of_one_class_for_every_class_of_the_batch():
    labels = [0, 0, 1, 1, 2]
    features = F.one_hot(torch.tensor(labels), 4).float()[:, None].expand(5, 3, 4)
    z, y_z = mix(labels, [1, 2, 1], 3, features)
    assert y_z.tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.allclose(z, F.one_hot(y_z, 4).float())


def test_mixtures_are_convex_with_uniform_shares_and_unit_norm():
    """Of two orthogonal features the shares can be read from the mixture."""
    z, _ = mix([0, 0], [0], 20000, torch.eye(2)[:, None])
    assert z.min() >= 0 and torch.allclose(z.norm(dim=-1), torch.ones(20000))
    shares = (z[:, 0] / z.sum(-1))[(z > 0).all(-1)]             # without those of one image only
    quarters = torch.histc(shares, 4, 0, 1) / len(shares)
    assert len(shares) > 9000 and quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_mixtures_are_drawn_from_all_views():
    features = torch.eye(12).view(2, 6, 12)
    z, _ = mix([0, 0], [0], 200, features)
    assert (z > 0).any(0).all()


@pytest.mark.parametrize("classifier, trained_class, new_class", [
    ("soft", "w", "w"), ("mean", "mean", "mean"), ("seen", "w", "mean")])
def test_trained_classes_use_w_and_new_ones_the_mean_with_h(classifier, trained_class, new_class):
    training = follow(config("mvp_mi", classifier=classifier, steps=0))
    run, names = training.run, [NAMES[3], "River"]
    w = training.prompt(common.name_embeddings(run.clip, names))
    h = common.template_features(run.clip, run.data.template, names)
    views = {"w": w, "mean": F.normalize(w + h, dim=-1)}
    part = common.Part("", run.data, [], [(3, names[0]), (8, names[1])])
    found = training.prompt.class_features(part)
    assert torch.allclose(found[0], views[trained_class][0], atol=1e-6)
    assert torch.allclose(found[1], views[new_class][1], atol=1e-6)


# ---------------------------------------------------------------- RESTORE

def restored(clip, *flags):
    """A prompt of restore.py as it starts."""
    torch.manual_seed(0)
    return restore.Prompt(clip, with_flags(restore, clip, *flags).args)


def pass_through(blocks, encode, *given):
    """What an encoder returns, and of each of its blocks the input and the output."""
    seen = []
    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hook = block.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
            hooks.enter_context(hook)
        return encode(*given), seen


def test_without_prompts_both_encoders_are_clips(small):
    prompt, pixels = restored(small), torch.randn(2, 3, 32, 32)
    texts = small.tokenizer([f"a photo of a {name}." for name in NAMES])
    t, s_t = prompt.encode_text(common.name_embeddings(small, NAMES), [])
    i, s_i = prompt.encode_image(pixels, [])
    assert torch.allclose(t, small.model.encode_text(texts), atol=1e-4)
    assert torch.allclose(i, small.model.encode_image(pixels), atol=1e-4)
    assert s_t.shape == (5, 3, 128) and s_i.shape == (2, 4, 128)


def test_text_prompts_replace_tokens_1_to_n_of_the_first_blocks(small):
    prompt, names = restored(small, "--depth", 2), common.name_embeddings(small, NAMES)
    blocks, p = restore.text_blocks(small), prompt.text()
    (_, states), seen = pass_through(blocks, prompt.encode_text, names, p)
    first = p[0] + small.text.positional_embedding[1:3]
    assert torch.equal(seen[0][0][:, 1:3], first.expand(5, -1, -1))
    (_, y_1), (x_2, y_2), (x_3, y_3) = seen
    assert torch.equal(x_2, torch.cat([y_1[:, :1], p[1].expand(5, -1, -1), y_1[:, 3:]], 1))
    assert torch.equal(x_3, y_2)                                # later blocks run as they are
    ends = torch.tensor([5 + len(name) + len(dot) for name, dot in names])
    assert torch.equal(states[:, 2], y_3[torch.arange(5), ends])


def test_image_prompts_stand_behind_the_patches_and_are_replaced_in_the_first_blocks(small):
    prompt, pixels = restored(small, "--depth", 2), torch.randn(3, 3, 32, 32)
    blocks, q = restore.image_blocks(small), [some.expand(3, -1, -1) for some in prompt.image()]
    (_, states), seen = pass_through(blocks, prompt.encode_image, pixels, prompt.image())
    (x_1, y_1), (x_2, y_2), (x_3, _), (_, y_4) = seen           # 1 + 16 tokens, and 2 prompts
    assert torch.allclose(x_1[:, 17:], small.visual.ln_pre(q[0]), atol=1e-5)
    assert torch.equal(x_2, torch.cat([y_1[:, :17], q[1]], 1)) and torch.equal(x_3, y_2)
    assert torch.equal(states[:, 3], y_4[:, 0])


def test_prompts_start_as_words_and_noise_and_the_words_stay_what_they_are(small):
    made, words = trained("restore").made, common.embed(small, "a photo of a")
    assert torch.equal(made["text_prompts.0"], words[:2])
    assert torch.equal(trained("restore").prompt.words, words)              # after the training
    noise = [p.flatten() for name, p in made.items() if "_prompts." in name]
    assert torch.cat(noise[1:]).std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(torch.cat(noise[1:]).mean().item()) < 0.002


def test_the_surgery_is_a_quickgelu_network_that_starts_as_the_identity():
    z, surgery = torch.randn(3, 8), restore.Surgery(8)
    assert torch.equal(surgery(z), z) and surgery.up.weight.shape == (32, 8)
    assert surgery.norm.eps == 1e-5
    torch.nn.init.normal_(surgery.down.weight)
    expected = z + surgery.down(QuickGELU()(surgery.up(F.layer_norm(z, (8,)))))
    assert torch.allclose(surgery(z), expected, atol=1e-6)


def test_the_blend_is_the_share_of_the_surgery(small):
    prompt, z = restored(small, "--blend", "0.25,0.1"), torch.randn(3, 128)
    for operate, surgery, blend in ((prompt.operate_text, prompt.text_surgery, 0.25),
                                    (prompt.operate_image, prompt.image_surgery, 0.1)):
        torch.nn.init.ones_(surgery.down.bias)                  # A(z) = z + 1
        assert torch.allclose(operate(z), F.normalize(z + blend, dim=-1), atol=1e-6)


@pytest.mark.parametrize("flags, text, image", [
    (["--towers", "text"], True, False), (["--towers", "vision"], False, True),
    (["--blend", "0,0.1"], False, True), (["--blend", "0"], False, False), ([], True, True)])
def test_an_encoder_without_prompts_or_blend_has_no_surgery(small, flags, text, image):
    prompt = restored(small, *flags)
    assert (prompt.text_surgery is not None, prompt.image_surgery is not None) == (text, image)


def test_at_the_first_step_all_prompts_learn_and_of_the_surgery_only_down(small):
    prompt = restored(small)
    f, part = prompt.image_features(torch.randn(2, 3, 32, 32)), SimpleNamespace(classnames=NAMES)
    F.cross_entropy(100 * f @ prompt.class_features(part).T, torch.tensor([0, 1])).backward()
    for name, p in prompt.named_parameters():
        assert p.grad.any() == ("_prompts." in name or ".down." in name), name


def test_the_shift_is_the_change_of_a_state_over_its_norm():
    frozen = torch.randn(2, 4, 80)
    assert restore.feature_shift(frozen, frozen).tolist() == [0] * 4
    longer = frozen * torch.tensor([3.0, 2.0])[:, None, None]
    assert restore.feature_shift(longer, frozen).tolist() == pytest.approx([1.5] * 4)


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


@pytest.mark.parametrize("epochs, raised_after", [(10, 3), (5, 1), (2, 0), (1, None)])
def test_blends_are_raised_once_after_a_third_and_never_after_the_last_update(epochs, raised_after):
    training = follow(config("restore", epochs=epochs, steps=1, lr=0.0035, blend_text=0.3))
    start = end = torch.tensor([0.3, 0.1])
    if raised_after is not None:
        step = training.log[raised_after]
        shifts = torch.stack([step["shift_text"].mean(), step["shift_vision"].mean()])
        end = start + torch.tensor([0.02, 0.005]) * shifts
    for epoch, blend in enumerate(training.blends):
        later = raised_after is not None and epoch > raised_after
        assert torch.allclose(blend, end if later else start, atol=1e-7), epoch
    assert torch.allclose(training.prompt.blend, end, atol=1e-7)


@pytest.mark.parametrize("towers, text, image", [("both", 3, 3), ("text", 3, 0), ("vision", 0, 3)])
def test_prompts_enter_the_blocks_that_both_encoders_have(small, towers, text, image):
    prompt = restored(small, "--towers", towers)                            # not 9 blocks, but 3
    assert (len(prompt.text()), len(prompt.image())) == (text, image)


def test_a_resnet_is_refused(small):
    visual = ModifiedResNet((1, 1, 1, 1), output_dim=8, heads=1, image_size=32, width=8)
    with pytest.raises(common.Problem, match="vision transformer"):
        restored(replace(small, model=SimpleNamespace(visual=visual)))


def test_text_prompts_take_the_place_of_words_and_cannot_be_more(small):
    with pytest.raises(common.Problem, match="--n-ctx 5: .* 4 tokens"):
        restored(small, "--n-ctx", 5)
    assert len(restored(small, "--n-ctx", 5, "--towers", "vision").image()[0]) == 5


@pytest.mark.parametrize("flags", [("--prompts", "coupled"), ("--shift", "gram")])
def test_the_released_code_has_prompts_in_both_encoders(cli, flags):
    run = cli("restore", "--epochs", 1, "--shots", 1, "--towers", "text", *flags)
    assert run.status == 2 and "--towers both" in run.err and not run.records


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
