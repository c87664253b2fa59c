"""What defines each method, number by number: a test fails when one of them is changed.

All methods
    optimiser       SGD, momentum 0.9 (not Nesterov's, not dampened), weight decay 5e-4
    learning rate   1e-5 in epoch 0, then lr (1 + cos(pi (e - 1) / E)) / 2
    epoch           every training image once, shuffled; what does not fill a batch is dropped,
                    unless there is no other batch
    training image  random crop of 0.08 to 1 of the area, 3:4 to 4:3, bicubic, flipped half the
                    time; ten views of each; CLIP's mean and standard deviation
    test image      shorter side resized, bicubic, centre crop
    logits          tau f . w with tau = exp(logit_scale), both features of length 1
    base, new       the first ceil(C / 2) classes, the others; harmonic mean    (test_methods.py)
    few-shot sample the authors', draw for draw                                  (test_common.py)
    templates       below, one for CLIP and one for ProGrad
CoOp, ProGrad and MVP-MI
    defaults        lr 0.002, batch 32, 16 context tokens; 50, 100, 100, 200, 200 epochs for
                    1, 2, 4, 8, 16 shots; 50 for ImageNet
    first context   noise of standard deviation 0.02; ProGrad: as many tokens of its template as
                    that has words, at the end of the slots, zeros before (prograd_*.npz)
    prompt          start, context, name, ".", end; read at the end token (coop_*.npz)
ProGrad             lambda 1, T 1, L_g times T^2, the test on the sign of the dot product, the
                    teacher from its own template                         (prograd_*.npz)
RESTORE
    defaults        lr 0.0035 (embedded sets 0.0005), batch 4, 2 tokens in 9 blocks, 10 epochs,
                    "a photo of a", gamma 10, blends 0.1
    start           noise of 0.02, the first words; the surgery changes nothing
    surgery         z + down(QuickGELU(up(norm(z)))), four times as wide  (restore_*.npz)
    blends          grow once, after epoch E // 3, by 0.02 and 0.005 of the shift
    consistency     the towers' last blocks paired                        (restore_paper.npz)
"""

import importlib
import sys
from collections import namedtuple

import pytest
import torch
from conftest import made_up_run
from PIL import Image
from reference.make import NAMES, SMALL, follow
from torchvision.transforms import InterpolationMode

import common
from data.files import CATALOGUE

METHODS = ["coop", "prograd", "mvp_mi", "restore"]

SHARED = {"epochs": None, "views": 10, "shots": [4], "seeds": [1], "base_to_new": False}
CONTEXT = {**SHARED, "lr": 0.002, "batch_size": 32, "n_ctx": 16, "ctx_init": "",
           "class_specific": False, "position": "end"}
DEFAULTS = {
    "coop": CONTEXT,
    "prograd": {**CONTEXT, "projection": 1.0, "temperature": 1.0},
    "mvp_mi": {**CONTEXT, "mi_weight": 4.0, "image_weight": 1.0, "mi_temperature": 0.07,
               "critic": "learned", "augment": 2, "classifier": "seen"},
    "restore": {**SHARED, "lr": 0.0035, "batch_size": 4, "n_ctx": 2, "ctx_init": "a photo of a",
                "depth": 9, "prompts": "independent", "towers": "both", "shift": "features",
                "shift_weight": 10.0, "blend": 0.1},
}
EMBEDDED_LR = {"restore": 0.0005}  # chosen on validation images; the papers' data sets have 0.0035

PHOTO = "a photo of a {}."
TEMPLATES = {  # CLIP's, and ProGrad's where it has its own
    "caltech101": (PHOTO, PHOTO),
    "oxford_pets": ("a photo of a {}, a type of pet.", "a type of pet, a photo of a {}."),
    "stanford_cars": (PHOTO, PHOTO),
    "oxford_flowers": ("a photo of a {}, a type of flower.", "a type of flower, a photo of a {}."),
    "food101": ("a photo of {}, a type of food.", "a type of food, a photo of {}."),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",
                      "a type of aircraft, a photo of a {}."),
    "sun397": (PHOTO, PHOTO),
    "dtd": ("{} texture.", "a texture of {}."),
    "eurosat": ("a centered satellite photo of {}.", "a centered satellite photo of {}."),
    "ucf101": ("a photo of a person doing {}.", "a photo of a person doing {}."),
    "imagenet": (PHOTO, PHOTO), "imagenetv2": (PHOTO, PHOTO), "imagenet_sketch": (PHOTO, PHOTO),
    "imagenet_a": (PHOTO, PHOTO), "imagenet_r": (PHOTO, PHOTO),
}


def config(method, **given):
    """A short training on the made-up CLIP, for tests/reference/make.py to follow."""
    made = {"method": method, "classnames": NAMES, "template": "a centered satellite photo of {}.",
            "labels": [0, 3, 1, 4], "n_ctx": 16, "class_specific": False,
            "class_token_position": "end", "context_words": "", "context_seed": 11, "image_seed": 7,
            "image_size": 32, "projection_strength": 1.0, "temperature": 1.0, "lr": 1.0,
            "steps": 3, "clip": {**SMALL, "t_layers": 2}}
    if method == "restore":
        made.update(prompts="independent", shift="features", n_ctx=2, context_words="a photo of a",
                    depth=2, blend_text=0.1, blend_visual=0.1, shift_weight=10.0)
    return {**made, **given}


@pytest.mark.parametrize("method", METHODS)
def test_sgd_has_momentum_and_weight_decay(method):
    """At a learning rate of 1 weight decay moves a context by 1e-5 a step, a hundred times what
    float32 loses: the replay from the gradients tells 5e-4 from 0, or momentum from Nesterov's."""
    training = follow(config(method))
    for name, start in training.parameters_initial.items():
        v, u = start.double(), torch.zeros_like(start).double()
        for gradients in training.gradients:
            u = 0.9 * u + gradients[name].double() + 5e-4 * v
            v = v - u
        found = training.prompt.get_parameter(name).double()
        assert (found - v).abs().max() < 5e-7 * (1 + v.abs().max()), name


@pytest.mark.parametrize("method", METHODS)
def test_the_schedule_sets_the_learning_rate_of_every_epoch(method):
    asked = []

    def learning_rate(epoch, epochs, lr):
        asked.append((epoch, epochs, lr))
        return 0.0

    training = follow(config(method, lr=0.25, epochs=3), learning_rate)
    assert sorted(set(asked)) == [(0, 3, 0.25), (1, 3, 0.25), (2, 3, 0.25)]
    for name, start in training.parameters_initial.items():
        assert training.prompt.get_parameter(name).equal(start), name


def test_the_learning_rate_warms_up_for_one_epoch_then_follows_a_cosine():
    assert [common.learning_rate(0, epochs, 0.002) for epochs in (1, 50)] == [1e-5, 1e-5]
    found = [common.learning_rate(epoch, 50, 0.002) for epoch in (1, 2, 26, 49)]
    assert found == pytest.approx([0.002, 0.00199802672, 0.001, 7.885299e-6], rel=1e-6)


def epochs_of(method, shots, dataset):
    """The number of epochs that a script trains for when none is given."""
    class Asked(Exception):
        pass

    def learning_rate(epoch, epochs, lr):
        raise Asked(epochs)

    with pytest.raises(Asked) as asked:
        follow(config(method, epochs=None, shots=shots, dataset=dataset), learning_rate)
    return asked.value.args[0]


@pytest.mark.parametrize("dataset, shots, epochs", [
    ("eurosat", 1, 50), ("eurosat", 2, 100), ("eurosat", 4, 100), ("eurosat", 8, 200),
    ("eurosat", 16, 200), ("imagenet", 1, 50), ("imagenet", 16, 50)])
def test_epochs_of_coop(dataset, shots, epochs):
    assert epochs_of("coop", shots, dataset) == epochs


@pytest.mark.parametrize("method, epochs", [("prograd", 200), ("mvp_mi", 200), ("restore", 10)])
def test_epochs_for_16_shots(method, epochs):
    assert epochs_of(method, 16, "eurosat") == epochs


@pytest.mark.parametrize("method", METHODS)
def test_defaults(method, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(common, "runs", lambda _, args, **__: given.append(vars(args)) or [])
    for dataset in ("eurosat", "shapes"):
        argv = [method, "--dataset", dataset, "--device", "cpu", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(method).main()
    papers, embedded = given
    assert {flag: papers[flag] for flag in DEFAULTS[method]} == DEFAULTS[method]
    assert embedded["lr"] == EMBEDDED_LR.get(method, papers["lr"])


@pytest.mark.parametrize("method", ["coop", "mvp_mi"])
def test_a_context_starts_as_noise(method):
    v = follow(config(method, steps=1)).made["v"]
    assert v.shape == (16, 128) and v.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(v.mean().item()) < 0.002


def test_restore_starts_as_words_noise_and_a_surgery_that_changes_nothing():
    made = follow(config("restore", steps=1)).made
    noise = torch.cat([made[name].flatten() for name in made
                       if "_prompts." in name and name != "text_prompts.0"])
    assert noise.std().item() == pytest.approx(0.02, rel=0.1)
    for tower in ("text", "visual"):
        assert not made[f"{tower}_surgery.down.weight"].any()
        assert not made[f"{tower}_surgery.down.bias"].any()
        assert made[f"{tower}_surgery.norm.weight"].eq(1).all()


@pytest.mark.parametrize("epochs, last_before", [(10, 3), (5, 1), (2, 0)])
def test_restore_raises_its_blends_once_after_a_third_of_the_epochs(epochs, last_before):
    training = follow(config("restore", epochs=epochs, steps=1, lr=0.0035, blend_text=0.3))
    blends = torch.stack([buffers["blend"] for buffers in training.buffers])        # (epochs, 2)
    start, after = torch.tensor([0.3, 0.1]), slice(last_before + 1, None)
    shift = [training.log[last_before][f"shift_{tower}"].mean() for tower in ("text", "vision")]
    end = start + torch.tensor([0.02, 0.005]) * torch.stack(shift)
    assert torch.allclose(blends[:last_before + 1], start.expand(last_before + 1, 2))
    assert torch.allclose(blends[after], end.expand(len(blends[after]), 2), atol=1e-6)
    assert torch.allclose(training.prompt.blend, end, atol=1e-6)


@pytest.mark.parametrize("images, batches", [(70, [32, 32]), (64, [32, 32]), (10, [10])])
def test_what_does_not_fill_a_batch_is_dropped_unless_it_is_all(images, batches, tmp_path):
    parser = common.flags("", lr=0.1, batch_size=32, n_ctx=4)
    args = common.parse(parser, ["--device", "cpu", "--views", "1", "--out", str(tmp_path / "out")])
    run = made_up_run(None, [], "", [], args)
    run.items, run.labels = range(images), torch.arange(images)
    run.features = torch.arange(images).view(-1, 1, 1)
    found = [y for _, y in common.Run.batches(run, 0)]
    assert [len(y) for y in found] == batches
    assert len(torch.cat(found).unique()) == sum(batches)
    assert torch.cat(found).tolist() != list(range(sum(batches)))


def test_the_base_classes_are_the_first_half_rounded_up():
    Item = namedtuple("Item", "path label classname")
    items, names = [Item("", label, "") for label in range(5)], list("abcde")
    base, new = common.half(items, names, new=False), common.half(items, names, new=True)
    assert (base[1], new[1]) == (["a", "b", "c"], ["d", "e"])
    assert [item.label for item in base[0]] == [0, 1, 2]
    assert [item.label for item in new[0]] == [0, 1]


def test_training_images_are_cropped_and_flipped_at_random(tiny):
    crop, flip, *_ = tiny.augment.transforms
    assert type(crop).__name__ == "RandomResizedCrop"
    assert type(flip).__name__ == "RandomHorizontalFlip" and flip.p == 0.5
    assert crop.scale == (0.08, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.size == (64, 64) and crop.interpolation == InterpolationMode.BICUBIC


def test_images_are_normalised_with_clips_mean_and_standard_deviation(tiny):
    grey = Image.new("RGB", (90, 70), (128, 128, 128))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for transform in (tiny.preprocess, tiny.augment):
        found = transform(grey)
        assert found.shape == (3, 64, 64)
        assert torch.allclose(found.mean((1, 2)), (128 / 255 - mean) / std, atol=1e-5)


def test_a_test_image_keeps_the_middle_of_its_longer_side(tiny):
    picture = Image.new("RGB", (128, 64))
    picture.paste((255, 255, 255), (32, 0, 96, 64))                                   # the middle
    assert tiny.preprocess(picture).min() > 1.5


def test_the_logits_are_scaled_by_the_exponential_of_clips_logit_scale(tiny):
    assert tiny.logit_scale == pytest.approx(tiny.model.logit_scale.exp().item())


def test_layer_norms_have_clips_epsilon(tiny):
    """1e-5, in CLIP and in RESTORE's surgery."""
    surgery = follow(config("restore", steps=1)).prompt.text_surgery
    norms = [m for model in (tiny.model, surgery) for m in model.modules() if hasattr(m, "eps")]
    assert len(norms) > 20 and {norm.eps for norm in norms} == {1e-5}


def test_templates():
    found = {name: (entry["template"], entry.get("prograd_template", entry["template"]))
             for name, entry in CATALOGUE.items() if name in TEMPLATES}
    assert found == TEMPLATES
