"""A GPU against the CPU, in fp32 and under --precision amp.

Skipped without a GPU. `DEVICE=cpu pytest tests/test_cuda.py` tries the tests themselves on a CPU.
"""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_run

import common
import coop
import mvp_mi
import prograd
import restore
from data import features
from data.load import Item

DEVICE = os.environ.get("DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="needs a GPU")
NAMES = ["cat", "red car", "sea or lake", "annual crop land"]
METHODS = {script.__name__: script for script in (coop, prograd, mvp_mi, restore)}
STEPS = 5                                       # of an epoch: 20 images in batches of 4
every_method = pytest.mark.parametrize("method", METHODS)
every_precision = pytest.mark.parametrize("precision", ["fp32", "amp"])


def load(device, precision="fp32"):
    """ViT-S-32 with random weights, which are drawn on the CPU: the same on every device."""
    return common.load_clip("ViT-S-32", "random", device, precision)


def make(method, clip, folder, *flags):
    """A Run of 20 images of noise in 4 classes with two views each, and its prompt.

    Features of noise are nearly the same for all images, so the run gets random ones instead.
    RESTORE encodes the images."""
    script = METHODS[method]
    run = make_run(clip, script, NAMES, None, "--device", clip.device, "--views", "2",
                   "--epochs", "2", "--batch-size", "4", "--lr", "0.02", "--cache", str(folder),
                   *flags)
    del run.batches, run.pixel_batches          # make_run's own: the run has its usual ones
    run.items = [Item(path, k % 4) for k, path in enumerate(make_images(folder / "noise", 20))]
    run.labels = torch.arange(20, device=clip.device) % 4
    rng, dim = torch.Generator().manual_seed(1), clip.model.visual.output_dim
    run.features = F.normalize(torch.randn(20, 2, dim, generator=rng), dim=-1).to(clip.device)
    torch.manual_seed(1)
    if method == "restore":
        released = restore.Released if run.args.prompts == "coupled" else restore.Prompt
        return run, released(clip, run.args)
    start = script.initial_context(run)
    return run, script.Prompt(clip, *(start if isinstance(start, tuple) else [start]))


# ---------------------------------------------------------------- before the training

def test_pixels_are_the_same_to_the_bit(tmp_path):
    """Read by worker processes that are forked after CUDA has begun, and normalized on the GPU."""
    paths, found = make_images(tmp_path, 70, size=250), []
    for device, workers in (("cpu", 0), (DEVICE, 2)):
        clip = load(device)
        batches = features.load_pixels([(path, 0) for path in paths], clip.preprocess, 16, device,
                                       workers=workers)
        found.append(torch.cat([clip.pixels(batch).cpu() for batch in batches]))
    assert torch.equal(*found)


@every_precision
def test_image_features(tmp_path, precision):
    data = common.Data("noise", NAMES, "{}", "{}")
    items = [Item(path, 0) for path in make_images(tmp_path, 20)]
    clip = load(DEVICE, precision)
    plain, found = (common.encode_images(some, data, items) for some in (load("cpu"), clip))
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    assert (found - plain).abs().max() < (1e-5 if clip.dtype == torch.float32 else 0.01)


@every_precision
def test_class_features(precision):
    clip = load(DEVICE, precision)
    plain, found = (common.template_features(some, "a photo of a {}.", NAMES)
                    for some in (load("cpu"), clip))
    assert found.dtype == torch.float32
    assert (found.cpu() - plain).abs().max() < (0.01 if clip.amp else 1e-5)


# ---------------------------------------------------------------- training

@every_precision
@pytest.mark.parametrize("method, flags", [
    ("coop", []), ("prograd", []), ("mvp_mi", []), ("restore", []),
    ("restore", ["--prompts", "coupled"])])
def test_ten_steps_from_the_same_start_on_the_same_batches(tmp_path, method, flags, precision):
    losses, amp = [], load(DEVICE, precision).amp
    for clip in (load("cpu"), load(DEVICE, precision)):
        run, prompt = make(method, clip, tmp_path, *flags)
        METHODS[method].train(prompt, run)
        losses.append(run.history()["loss"])                    # of each epoch
    plain, found = losses
    assert abs(plain[1] - plain[0]) > 0.01                      # it has learned something
    assert found == pytest.approx(plain, rel=0.03 if amp else 1e-3)


@every_precision
@every_method
def test_the_gradient_of_a_step(tmp_path, method, precision):
    gradients, amp = [], load(DEVICE, precision).amp
    for clip in (load("cpu"), load(DEVICE, precision)):
        run, prompt = make(method, clip, tmp_path, "--epochs", "1", "--batch-size", "20")
        METHODS[method].train(prompt, run)
        learned = [p for name, p in prompt.named_parameters() if "surgery" not in name]
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in learned]))
    plain, found = gradients
    assert F.cosine_similarity(found, plain, dim=0) > (0.995 if amp else 0.99999)
    assert found.norm() == pytest.approx(plain.norm().item(), rel=0.03 if amp else 1e-4)


# MVP-MI draws on the CPU which images it mixes; RESTORE's batches come from image files.
WAITS = {"coop": 0, "prograd": 0, "mvp_mi": 9, "restore": 5}


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU waits for nothing")
@pytest.mark.parametrize("classes", [4, 300])
@every_method
def test_a_step_hardly_waits_for_the_gpu(tmp_path, monkeypatch, method, classes):
    """From an epoch's second step on, with the batches that it draws."""
    monkeypatch.setattr(f"{__name__}.NAMES", [f"number {k}" for k in range(classes)])
    run, prompt = make(method, load(DEVICE, "amp"), tmp_path, "--epochs", "1")
    name = "pixel_batches" if method == "restore" else "batches"
    batches = getattr(run, name)(0)

    def watched(epoch):
        yield next(batches)
        torch.cuda.set_sync_debug_mode("warn" if WAITS[method] else "error")
        yield from batches

    setattr(run, name, watched)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            METHODS[method].train(prompt, run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing CUDA operation" in str(line.message) for line in told)
    assert waits <= WAITS[method] * (STEPS - 1)


# ---------------------------------------------------------------- whole runs

@every_precision
@every_method
def test_a_prompt_of_the_gpu_is_tested_on_the_cpu(cli, tmp_path, method, precision):
    """The accuracies agree within 3 points: there are few test images."""
    flags, file = ("--shots", 2, "--epochs", 3, "--views", 2), tmp_path / "prompt.safetensors"
    saved, = cli(method, "--base-to-new", *flags, "--precision", precision, "--save", file,
                 device=DEVICE).records
    tested, = cli(method, "--base-to-new", "--load", file).records
    for name in ("base", "new", "zero_shot_base", "zero_shot_new"):
        assert tested[name] == pytest.approx(saved[name], abs=3)
