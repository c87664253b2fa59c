"""What the methods share: samples, features of images and prompts, batches, evaluation."""

import json
import math
import random
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_run
from PIL import Image
from reference.make import SMALL, as_clip, small_clip
from torchvision.transforms import InterpolationMode

import common
import coop
from common import Item


# ---------------------------------------------------------------- few-shot samples, halves

PUBLISHED = json.loads((Path(__file__).parent / "few_shot.json").read_text())
SAMPLES = [(name, key) for name in PUBLISHED for key in PUBLISHED[name]["expected"]]


def items_of(labels):
    return [Item(str(k), label) for k, label in enumerate(labels)]


@pytest.mark.parametrize("name, key", SAMPLES)
def test_few_shot_samples_are_those_that_coops_authors_published(name, key):
    labels = [label for label, count in PUBLISHED[name]["label_counts"] for _ in range(count)]
    sample = common.few_shot(items_of(labels), *map(int, key.split("-")))
    assert [int(item.path) for item in sample] == PUBLISHED[name]["expected"][key]


def test_a_class_with_too_few_images_gives_all_in_their_order():
    items = items_of([0, 1, 0, 1, 0])
    drawn = random.Random(1).sample(items[::2], 3)      # exactly enough are drawn, too
    assert common.few_shot(items, 3, 1) == [*drawn, items[1], items[3]]


@pytest.mark.parametrize("which, names", [("base", "abc"), ("new", "de"), ("all classes", "abcde")])
def test_base_classes_are_the_first_half_rounded_up_and_items_count_from_0(which, names):
    data = common.Data("made up", list("abcde"), "{}", "{}")
    items, classes = common.choose(data, items_of([4, 3, 2, 1, 0]), which)
    assert classes == [("abcde".index(name), name) for name in names]
    assert [(item.path, item.label) for item in items] == [
        (str(4 - label), k) for k, (label, _) in reversed([*enumerate(classes)])]


def test_a_sample_of_test_images_has_equally_many_of_each_class_and_is_always_the_same(root):
    data, classes = common.load_data("shapes", root), range(24)
    args = Namespace(validation=False, test_images=3 * 24, cache=root / "cache")
    one, again = (common.choose_tests(data, args).test for _ in range(2))
    assert sorted(item.label for item in one) == sorted([*classes] * 3)
    assert len({item.path for item in one}) == 3 * 24 and one == again


def test_settings_are_chosen_on_validation_images(root):
    data = common.load_data("shapes", root)
    args = Namespace(validation=True, test_images=None, cache=root / "cache")
    tested = common.choose_tests(data, args).test
    assert [item.path for item in tested] == [item.path for item in data.val]


# ---------------------------------------------------------------- image features

@pytest.fixture
def some(tmp_path):
    """A data set of ten images of noise, one of them twice."""
    paths = make_images(tmp_path / "noise", 9)
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(paths[0].read_bytes())
    return common.Data("made up", ["a"], "{}", "{}", test=[Item(path, 0) for path in [*paths, copy]])


def test_zero_shot_logits_are_open_clips(tiny, some):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{common.TINY_CLIP}")
    pixels = torch.stack([transform(Image.open(item.path)) for item in some.test])
    texts = [f"a photo of a {name}.".replace("_", " ") for name in NAMES]
    f, w, logit_scale = model(pixels, tiny.tokenizer(texts))
    assert torch.allclose(common.encode_images(tiny, some, some.test), f, atol=1e-5)
    assert torch.allclose(common.template_features(tiny, "a photo of a {}.", NAMES), w, atol=1e-5)
    assert tiny.logit_scale == pytest.approx(logit_scale.item())


def test_features_of_an_image_or_view_are_the_same_to_the_bit_in_any_company(tiny, some):
    plain = common.encode_images(tiny, some, some.test)
    views = common.encode_images(tiny, some, some.test, views=[0, 1, 2])
    assert plain.shape == (10, 128) and views.shape == (10, 3, 128)
    alone = common.encode_images(tiny, some, some.test[4:5])
    one_view = common.encode_images(tiny, some, some.test[4:6], views=[2])
    assert torch.equal(alone[0], plain[4]) and torch.equal(one_view[:, 0], views[4:6, 2])
    assert not torch.equal(views[4, 1], views[4, 2])


def test_features_in_the_cache_are_not_computed_again(tiny, some, tmp_path):
    def refuse(pixels):
        raise AssertionError("encoded again")

    cache = tmp_path / "cache"
    common.encode_images(tiny, some, some.test[:6], cache)
    found = common.encode_images(tiny, some, some.test, cache)
    again = common.encode_images(tiny, some, some.test[::-1], cache, encode=refuse)
    assert torch.equal(again.flip(0), found)
    assert torch.equal(found, common.encode_images(tiny, some, some.test))
    with pytest.raises(AssertionError, match="encoded again"):
        common.encode_images(tiny, some, some.test, cache, views=[0], encode=refuse)


def test_training_images_are_cropped_and_flipped_at_random(tiny):
    crop, flip, _ = tiny.augment.transforms
    assert type(crop).__name__ == "RandomResizedCrop" and crop.size == (64, 64)
    assert crop.scale == (0.08, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert type(flip).__name__ == "RandomHorizontalFlip" and flip.p == 0.5


def test_amp_encodes_images_in_16_bits_and_zero_shot_predictions_stay(tiny, some, monkeypatch):
    monkeypatch.setattr(common, "feature_dtype", lambda *_: torch.bfloat16)
    clip = common.load_clip.__wrapped__(precision="amp")
    assert {p.dtype for p in clip.visual.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}
    w = common.template_features(tiny, "a photo of a {}.", NAMES)
    f, f_16 = (common.encode_images(one, some, some.test) for one in (tiny, clip))
    assert f_16.dtype == torch.float32 and torch.allclose(f_16.norm(dim=-1), torch.ones(10))
    p, p_16 = ((tiny.logit_scale * x @ w.T).softmax(-1) for x in (f, f_16))
    assert 0 < (p - p_16).abs().max() < 0.05


def test_the_cache_keeps_features_of_each_precision_apart(tiny, some, tmp_path):
    common.encode_images(tiny, some, some.test, tmp_path)
    other = replace(tiny, dtype=torch.bfloat16, visual=lambda pixels: torch.ones(len(pixels), 128))
    assert common.encode_images(other, some, some.test, tmp_path).unique().numel() == 1


@pytest.mark.parametrize("precision, units, dtype", [
    ("fp32", True, torch.float32), ("amp", True, torch.bfloat16), ("amp", False, torch.float32)])
def test_a_cpu_encodes_in_bf16_only_if_it_has_bf16_units(monkeypatch, precision, units, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    assert common.feature_dtype("cpu", precision) == dtype


# ---------------------------------------------------------------- prompts to class features

NAMES = ["blue arrow", "a_thing with (many) more words", "heart", "ring", "red star", "cross"]
CLASSES = [*NAMES, "very large green ring"]


def custom_text():
    """A CustomTextCLIP with a linear layer as projection, layer scales, and a ResNet for images."""
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    text = {"width": 64, "heads": 4, "layers": 2, "proj_bias": True, "ls_init_value": 0.3}
    return as_clip(open_clip.CustomTextCLIP(16, vision, text))


def plain_encode_text(clip, prompts):
    """open_clip's own encode_text, 77 tokens long: `prompts` replace the tokens' embeddings."""
    lengths = [sum(map(len, parts)) for parts in prompts]
    x = torch.stack([F.pad(torch.cat(parts), (0, 0, 0, 77 - length))
                     for parts, length in zip(prompts, lengths)])
    tokens = torch.zeros(len(prompts), 77, dtype=torch.long)
    tokens[torch.arange(len(prompts)), torch.tensor(lengths) - 1] = clip.tokenizer.eot_token_id
    with clip.text.token_embedding.register_forward_hook(lambda *_: x):
        return clip.model.encode_text(tokens, normalize=True)


@pytest.mark.parametrize("chunk", [128, 3])
@pytest.mark.parametrize("context", ["shared", "own"])
@pytest.mark.parametrize("make", [lambda: small_clip(**SMALL), custom_text],
                         ids=["CLIP", "CustomTextCLIP"])
def test_class_features_and_their_gradients_are_those_of_the_plain_encoder(make, context, chunk):
    clip = replace(make(), class_chunk=chunk)
    (start, end), names = common.start_end(clip), common.name_embeddings(clip, CLASSES)
    v = torch.randn(5, start.shape[1], requires_grad=True)
    if context == "shared":
        w = common.encode_text(clip, [start, v], [[*pair, end] for pair in names])
    else:
        w = common.encode_text(clip, [start], [[v, *pair, end] for pair in names])
    plain = plain_encode_text(clip, [[start, v, *pair, end] for pair in names])
    direction = torch.randn_like(w)
    g, g_plain = (torch.autograd.grad(x, v, direction)[0] for x in (w, plain))
    assert (w - plain).norm() < 1e-5 * plain.norm()
    assert (g - g_plain).norm() < 1e-5 * g_plain.norm()


@pytest.mark.parametrize("name, lengths", [
    ("red_heart", (2, 1)),
    ("hearts (red)", (4, 0))])      # as in CoOp's code: ")." is one token, and part of the name
def test_a_name_and_its_full_stop_are_embedded_apart(tiny, name, lengths):
    ((words, dot),) = common.name_embeddings(tiny, [name])
    assert (len(words), len(dot)) == lengths
    assert torch.equal(torch.cat([words, dot]), common.embed(tiny, name.replace("_", " ") + "."))


def test_of_several_templates_the_unit_norm_features_are_averaged(tiny):
    one, two = (common.template_features(tiny, some, NAMES) for some in ("a {}.", "green {}"))
    both = common.template_features(tiny, "a {}.|green {}", NAMES)
    assert torch.allclose(both, F.normalize((one + two) / 2, dim=-1), atol=1e-6)


def test_under_autocast_class_features_are_close_and_of_full_unit_norm(tiny):
    w, w_16 = (common.template_features(clip, "a photo of a {}.", NAMES)
               for clip in (tiny, replace(tiny, amp=True)))
    assert torch.allclose(w_16.norm(dim=-1), torch.ones(len(NAMES)), atol=1e-6)
    assert not torch.equal(w, w_16) and (w * w_16).sum(-1).min() > 0.999


def test_a_context_that_leaves_no_room_for_the_name_points_to_the_flag(tiny):
    start, end = common.start_end(tiny)
    common.encode_text(tiny, [start, torch.zeros(74, 80)], [[start, end]])      # 77 tokens
    with pytest.raises(common.Problem, match="78 tokens, CLIP reads 77.* --n-ctx"):
        common.encode_text(tiny, [start, torch.zeros(75, 80)], [[start, end]])


# ---------------------------------------------------------------- batches

def run_of(images, *flags):
    """A Run with made-up features, f of image k in view j is (k, j)."""
    run = make_run(small_clip(**SMALL), coop, ["a", "b"], [], *flags)
    run.items, run.labels = range(images), torch.arange(images) % 2
    k, j = torch.meshgrid(torch.arange(images), torch.arange(run.args.views), indexing="ij")
    run.features = torch.stack([k, j], -1)                              # (N, V, 2)
    return run


def epoch_of(run, epoch):
    """The images, views and labels of an epoch's batches."""
    return [(*f.T.tolist(), y.tolist()) for f, y in common.Run.batches(run, epoch)]


@pytest.mark.parametrize("images, sizes", [(70, [32, 32]), (64, [32, 32]), (10, [10])])
def test_an_incomplete_last_batch_is_dropped_unless_it_is_the_only_one(images, sizes):
    assert [len(y) for *_, y in epoch_of(run_of(images), 0)] == sizes


def test_every_epoch_shuffles_the_images_anew_each_in_one_of_its_views_with_its_label():
    run, orders, seen = run_of(64), [], []
    for epoch in range(10):
        rows, views, labels = (sum(column, []) for column in zip(*epoch_of(run, epoch)))
        assert sorted(rows) == [*range(64)] and labels == [row % 2 for row in rows]
        orders.append(rows)
        seen += views
    assert len({tuple(order) for order in [*orders, range(64)]}) == 11
    assert all(seen.count(view) > 30 for view in range(10))
    run.seed = 2
    assert epoch_of(run, 0)[0][0] != orders[0][:32]


def test_without_views_every_epoch_encodes_fresh_crops(monkeypatch):
    run, asked = run_of(64, "--views", "0"), []

    def encode_views(_, views, cache):
        asked.append((views, cache))
        return torch.full((64, 1, 2), float(views[0]))

    monkeypatch.setattr(common.Run, "encode_views", encode_views)
    run.features = torch.zeros(64, 1, 2)                                # of Run.start
    found = [f.unique().item() for epoch in range(3) for f, _ in common.Run.batches(run, epoch)]
    assert found == [0, 0, 1, 1, 2, 2] and asked == [([1], None), ([2], None)]


# ---------------------------------------------------------------- the record and evaluation

def test_a_record_has_means_over_the_steps_of_each_epoch():
    run = run_of(1)
    for epoch, loss in ((0, 1.0), (0, 3.0), (1, 5.0)):
        run.log(epoch, loss=loss, shift=torch.tensor([loss, 2 * loss]))
    assert run.history() == {"loss": [2, 5], "shift": [[2, 4], [5, 10]]}


def test_parameters_that_are_not_finite_are_no_result():
    prompt = torch.nn.ParameterList([torch.tensor([1.0, math.inf])])
    with pytest.raises(common.Problem, match="training failed"):
        run_of(1).finish(prompt)


def test_accuracies_divergence_and_counts_of_predictions_made_by_hand():
    run = run_of(1)
    part = common.Part("", run.data, items_of([0, 0, 0, 1]), run.classes)
    part.features = F.normalize(torch.tensor([[1, 0.2], [0.9, 1], [0.5, 1], [0, 1]]), dim=-1)
    part.zero_shot, w = torch.eye(2), F.normalize(torch.tensor([[1.0, 0.5], [0, 1]]), dim=-1)
    found = run.evaluate(Namespace(class_features=lambda _: w), part)
    assert found["zero_shot"] == 50                 # images 0 and 3
    assert found["accuracy"] == 75                  # w_0 has come nearer to image 1
    assert found["counts"] == [[2, 1], [0, 1]]
    zero_shot, p = ((100 * part.features @ some.T).softmax(-1) for some in (part.zero_shot, w))
    kl = sum((a * (a.log() - b.log())).sum() for a, b in zip(zero_shot.double(), p.double())) / 4
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4)
