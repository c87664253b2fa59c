"""A step under autocast, as on a graphics card: bfloat16, or float16 where there is none (T4)."""

import dataclasses

import open_clip
import pytest
import torch
from reference.make import follow
from test_constants import METHODS, config

import common


@pytest.fixture(scope="module")
def clip():
    """ViT-B-16 with random weights; images of 64 pixels, which is quicker and changes no layer."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16", force_quick_gelu=True, force_image_size=64)
    model.eval().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer()
    return common.Clip(model, model, tokenizer, None, None, 100.0, "cpu", "fp32", "")


def step(clip, method, kind=None):
    """One step of a method, under autocast to `kind` or in float32."""
    clip = dataclasses.replace(clip)
    clip.autocast = lambda: torch.autocast("cpu", kind or torch.bfloat16, enabled=bool(kind))
    return follow(config(method, steps=1, lr=0.002, n_ctx=2, context_words="a photo", depth=9,
                         context_seed=None, classnames=["cat", "red car"], labels=[0, 1],
                         image_size=64), clip=clip)


def gradient(training):
    """The gradient of what stands in the prompts, as one vector."""
    return torch.cat([g.flatten() for name, g in training.gradients[0].items()
                      if name == "v" or "_prompts." in name])


@pytest.mark.parametrize("method", METHODS)
def test_a_steps_gradient_under_autocast(clip, method):
    """Cosine and norm against float32; class features are of length 1 to float32's precision.

    float16 has no gradient below 6e-8 and few digits below 6e-5. A context's gradient is true down
    to a norm of about 0.1, at which 1 is the size of a step early in a training."""
    exact = gradient(step(clip, method))
    for kind in (torch.bfloat16, torch.float16):
        training = step(clip, method, kind)
        g = gradient(training)
        assert g.dtype == torch.float32
        assert torch.cosine_similarity(g, exact, dim=0) > 0.999, kind
        assert g.norm() / exact.norm() == pytest.approx(1, abs=0.02), kind
        with torch.no_grad(), torch.autocast("cpu", kind):
            w = training.prompt.class_features(["cat", "red car"])
        assert w.dtype == torch.float32
        assert w.norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_small_gradients_survive_float16(clip):
    """On their way through the text tower they are scaled: float16 has nothing below 6e-8."""
    start, end = common.start_end(clip)
    v, names = 0.02 * torch.randn(4, 512), common.name_embeddings(clip, ["cat", "red car"])
    d, found = 1e-5 * torch.randn(2, 512), []
    for kind in (None, torch.float16):
        context = v.clone().requires_grad_()
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=bool(kind)):
            w = common.encode_text(clip, [[start, context, *pair, end] for pair in names])
        w.backward(d)
        found.append(context.grad.flatten())
    assert torch.cosine_similarity(*found, dim=0) > 0.999
    assert found[1].norm() / found[0].norm() == pytest.approx(1, abs=0.02)
