"""What the methods share: samples, features of images and prompts, batches, evaluation."""

import json
import random
from argparse import Namespace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_run
from PIL import Image
from reference.make import SMALL, small_clip
from torchvision.transforms import InterpolationMode

import common
import coop
from common import Item
from data.weights import TINY_CLIP


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
    items = [Item(name, label) for label, name in enumerate("abcde")]
    items, classes = common.choose(data, items, which)
    assert classes == [("abcde".index(name), name) for name in names]
    assert [item.path for item in items] == list(names)
    assert [item.label for item in items] == [*range(len(names))]


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
    items = [Item(path, 0) for path in [*paths, copy]]
    return common.Data("made up", ["a"], "{}", "{}", test=items)


def test_zero_shot_logits_are_open_clips(tiny, some):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{TINY_CLIP}")
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


def test_an_edited_augmentation_is_not_served_from_the_cache(tiny, some, tmp_path, monkeypatch):
    before = common.encode_images(tiny, some, some.test, tmp_path / "cache", views=[0])
    monkeypatch.setattr(common.Clip, "augment", tiny.preprocess)
    after = common.encode_images(tiny, some, some.test, tmp_path / "cache", views=[0])
    assert not torch.equal(before, after)


def test_training_images_are_cropped_and_flipped_at_random(tiny):
    crop, flip, _ = tiny.augment.transforms
    assert type(crop).__name__ == "RandomResizedCrop" and crop.size == (64, 64)
    assert crop.scale == (0.08, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert type(flip).__name__ == "RandomHorizontalFlip" and flip.p == 0.5


def test_amp_encodes_images_in_16_bits_apart_in_the_cache_and_predictions_stay(
        tiny, some, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "feature_dtype", lambda *_: torch.bfloat16)
    clip = common.load_clip.__wrapped__(precision="amp")
    assert {p.dtype for p in clip.visual.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}
    w = common.template_features(tiny, "a photo of a {}.", NAMES)
    f, f_16 = (common.encode_images(one, some, some.test, tmp_path) for one in (tiny, clip))
    assert f_16.dtype == torch.float32 and torch.allclose(f_16.norm(dim=-1), torch.ones(10))
    p, p_16 = ((tiny.logit_scale * x @ w.T).softmax(-1) for x in (f, f_16))
    assert 0 < (p - p_16).abs().max() < 0.05


# ---------------------------------------------------------------- prompts to class features

NAMES = ["blue arrow", "a_thing with (many) more words", "heart", "ring", "red star", "cross"]


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
    run = run_of(64, "--views", "0")
    run.features = torch.zeros(64, 1, 2)                                # of Run.start
    monkeypatch.setattr(common.Run, "encode_views",
                        lambda _, epoch: torch.full((64, 1, 2), float(epoch)))
    found = [f.unique().item() for epoch in range(3) for f, _ in common.Run.batches(run, epoch)]
    assert found == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------- the record and evaluation

def test_a_record_has_means_over_the_steps_of_each_epoch():
    run = run_of(1)
    for epoch, loss in ((0, 1.0), (0, 3.0), (1, 5.0)):
        run.log(epoch, loss=loss, shift=torch.tensor([loss, 2 * loss]))
    assert run.history() == {"loss": [2, 5], "shift": [[2, 4], [5, 10]]}


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
