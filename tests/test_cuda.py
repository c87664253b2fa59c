"""A GPU against the CPU, in fp32 and under --precision amp.

Skipped without a GPU. `DEVICE=cpu pytest tests/test_cuda.py` tries the tests themselves on a CPU.
"""

import dataclasses
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


def train(method, clip, folder, *flags):
    """Return a prompt after ten steps, or as many as flags tell, and the loss of each epoch."""
    run, prompt = make(method, clip, folder, *flags)
    METHODS[method].train(prompt, run)
    return prompt, run.history()["loss"]


def check_direction(found, expected, exact):
    """Two tensors agree in direction and length, as well as the precision allows."""
    found, expected = (tensor.detach().float().cpu().flatten() for tensor in (found, expected))
    assert F.cosine_similarity(found, expected, dim=0) > (0.99999 if exact else 0.995)
    assert found.norm() == pytest.approx(expected.norm().item(), rel=1e-4 if exact else 0.03)


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


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_image_features(tmp_path, precision):
    data = common.Data("noise", NAMES, "{}", "{}")
    items = [Item(path, 0) for path in make_images(tmp_path, 20)]
    clip = load(DEVICE, precision)
    plain, found = (common.encode_images(some, data, items) for some in (load("cpu"), clip))
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    exact = clip.dtype == torch.float32
    assert (found - plain).abs().max() < (1e-5 if exact else 0.01)
    check_direction(found, plain, exact)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_class_features(precision):
    clip = load(DEVICE, precision)
    plain, found = (common.template_features(some, "a photo of a {}.", NAMES)
                    for some in (load("cpu"), clip))
    assert found.dtype == torch.float32
    assert (found.cpu() - plain).abs().max() < (0.01 if clip.amp else 1e-5)
    check_direction(found, plain, exact=not clip.amp)


@pytest.mark.parametrize("method, flags", [
    ("coop", []), ("prograd", []), ("mvp_mi", []), ("restore", []),
    ("restore", ["--prompts", "coupled"])])
def test_a_seed_starts_alike_on_every_device(tmp_path, method, flags):
    (a, plain), (b, found) = (make(method, load(device), tmp_path, *flags)
                              for device in ("cpu", DEVICE))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), tensor), name
    for epoch in (0, 1):
        for (f, y), (f_cpu, y_cpu) in zip(b.batches(epoch), a.batches(epoch)):
            assert torch.equal(f.cpu(), f_cpu) and torch.equal(y.cpu(), y_cpu)


# ---------------------------------------------------------------- training

def gradient(method, clip, folder):
    """Return the gradient of a step on all 20 images with respect to the prompt, as a vector."""
    prompt, _ = train(method, clip, folder, "--epochs", "1", "--batch-size", "20")
    learned = [p for name, p in prompt.named_parameters() if "surgery" not in name]
    assert all(p.grad.dtype == torch.float32 for p in learned)
    return torch.cat([p.grad.flatten() for p in learned])


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_step(tmp_path, method, precision):
    clip = load(DEVICE, precision)
    found, plain = (gradient(method, some, tmp_path) for some in (clip, load("cpu")))
    check_direction(found, plain, exact=not clip.amp)


@pytest.mark.parametrize("method", METHODS)
def test_classes_in_chunks(tmp_path, method):
    clip = load(DEVICE)
    whole, cut = (gradient(method, dataclasses.replace(clip, class_chunk=chunk), tmp_path)
                  for chunk in (128, 3))
    check_direction(cut, whole, exact=True)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(tmp_path, method, precision):
    clip = load(DEVICE, precision)
    (_, plain), (_, found) = (train(method, some, tmp_path) for some in (load("cpu"), clip))
    assert abs(plain[1] - plain[0]) > 0.01                      # it has learned something
    assert found == pytest.approx(plain, rel=0.03 if clip.amp else 1e-3)


# MVP-MI draws on the CPU which images it mixes; RESTORE's batches come from image files.
WAITS = {"coop": 0, "prograd": 0, "mvp_mi": 9, "restore": 5}


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU waits for nothing")
@pytest.mark.parametrize("classes", [4, 300])
@pytest.mark.parametrize("method", METHODS)
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

FEW = ["--base-to-new", "--shots", 2, "--epochs", 3, "--views", 2]


def check_accuracies(found, expected):
    """Accuracies agree within 3 points: there are few test images."""
    for name in ("base", "new", "zero_shot_base", "zero_shot_new"):
        assert found[name] == pytest.approx(expected[name], abs=3)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_the_cpu_is_tested_on_the_gpu(cli, tmp_path, method, precision):
    file, flags = tmp_path / "prompt.safetensors", ["--precision", precision]
    saved, = cli(method, *FEW, "--save", file).records
    tested, = cli(method, "--base-to-new", "--load", file, *flags, device=DEVICE).records
    check_accuracies(tested, saved)
    again, = cli(method, *FEW, *flags, device=DEVICE).records
    assert again["loss"][-1] == pytest.approx(saved["loss"][-1], rel=0.1)


def test_a_prompt_of_the_gpu_is_tested_on_the_cpu(cli, tmp_path):
    file = tmp_path / "prompt.safetensors"
    saved, = cli("prograd", *FEW, "--save", file, device=DEVICE).records
    tested, = cli("prograd", "--base-to-new", "--load", file).records
    check_accuracies(tested, saved)


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU's driver")
def test_the_record_names_the_gpu(cli):
    record, = cli("coop", "--epochs", 1, "--views", 1, device="cuda").records
    assert record["device"] == torch.cuda.get_device_name()
