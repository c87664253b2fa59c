"""What the authors' code computes, step by step, against what the scripts compute: one test per file of $REFERENCE_DIR.

A file holds a JSON `config` and arrays; the small CLIP's weights are made up from their names, the same everywhere."""

import importlib
import json
import os
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import made_up_run

import common

HERE = Path(__file__).parent
FILES = sorted(Path(os.environ.get("REFERENCE_DIR", HERE / "reference")).glob("*.npz"))


def made_up(name, shape):
    """The weight `name` of the small CLIP."""
    if name == "logit_scale":
        return torch.tensor(np.log(100.0), dtype=torch.float32)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "ln_" in name and name.endswith("weight"):
        x = 1 + 0.1 * x
    elif name.endswith("bias") or name == "token_embedding.weight":
        x = 0.02 * x
    elif name == "positional_embedding":
        x = 0.01 * x
    elif name in ("visual.class_embedding", "visual.positional_embedding"):
        x = x / shape[-1] ** 0.5
    elif name in ("visual.proj", "text_projection"):
        x = x / shape[0] ** 0.5
    else:
        x = x / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(x.astype(np.float32))


def small_clip(c):
    """The small CLIP of config["clip"], as the scripts know a CLIP."""
    model = open_clip.CLIP(c["embed"], {"image_size": c["image"], "layers": c["v_layers"], "width": c["v_width"], "patch_size": c["patch"]},
                           {"context_length": c["ctx"], "vocab_size": c["vocab"], "width": c["t_width"], "heads": c["t_width"] // 64, "layers": c["t_layers"]}, quick_gelu=True)
    model.load_state_dict({name: made_up(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()})
    model.eval().requires_grad_(False)
    return common.Clip(model, model, open_clip.SimpleTokenizer(), None, None, model.logit_scale.exp().item(), "cpu", "fp32", "")


def close(found, expected, tolerance, what):
    found, expected = torch.as_tensor(found).detach().double(), torch.as_tensor(expected).double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    assert found.shape == expected.shape and error < tolerance, f"{what}: relative error {error:.2e}"


def follow_context(method, config, arrays, monkeypatch):
    """CoOp and ProGrad: one learned context, image features that stay."""
    script, clip = importlib.import_module(method), small_clip(config["clip"])
    names, y = config["classnames"], torch.tensor(config["labels"])
    x = np.random.RandomState(config["image_seed"]).standard_normal((len(y), 3, config["image_size"], config["image_size"]))
    f = F.normalize(clip.model.encode_image(torch.from_numpy(x.astype(np.float32))), dim=-1)
    monkeypatch.setattr(common, "learning_rate", lambda epoch, epochs, lr: lr)

    def learn(steps):
        args = Namespace(lr=config["lr"], epochs=steps, n_ctx=config["n_ctx"], ctx_init=config["context_words"], class_specific=config["class_specific"],
                         projection=config["projection_strength"], temperature=config["temperature"])
        run = made_up_run(clip, names, config["template"], [(f, y)], args)
        v = script.first_context(run, args)
        if config["context_seed"] is not None:
            v = torch.from_numpy(0.02 * np.random.RandomState(config["context_seed"]).standard_normal(tuple(v.shape)).astype(np.float32))
        prompt = script.Prompt(clip, v, config["class_token_position"])
        if steps:
            script.train(prompt, run, args)
        return prompt, run.history()

    logits = lambda prompt: clip.logit_scale * f @ prompt.class_features(names).T
    start, (end, log) = learn(0)[0], learn(config["steps"])
    close(logits(start), arrays["logits_initial"], 1e-4, "logits before the first step")
    close(logits(end), arrays["logits_final"], 1e-3, "logits after the last step")
    if "context_initial" in arrays:
        close(start.v, arrays["context_initial"], 1e-4, "initial context")
    if "context_final" in arrays:
        close(end.v, arrays["context_final"], 1e-3, "final context")
    if "gradient_initial" in arrays:
        close(learn(1)[0].v.grad, arrays["gradient_initial"], 1e-4, "first gradient")
    for step in range(config["steps"]):
        if f"gradient_used_{step}" in arrays:
            close(learn(step + 1)[0].v.grad, arrays[f"gradient_used_{step}"], 1e-3 if step else 1e-4, f"gradient used in step {step}")
    if "zero_shot_logits" in arrays:
        close(clip.logit_scale * f @ common.template_features(clip, config["template"], names).T, arrays["zero_shot_logits"], 1e-4, "zero-shot logits")
    columns = {"coop": ["loss"], "prograd": ["loss", "general_loss", "cosine"]}[method]
    found = np.array([log[column] for column in columns]).T
    close(found[0], arrays["log"][0], 1e-4, "losses of the first step")
    close(found, arrays["log"], 1e-3, "losses")


def follow_restore(method, config, arrays, monkeypatch):
    """RESTORE: parameters in both towers, known by name."""
    script, clip = importlib.import_module(method), small_clip(config["clip"])
    names, y = config["classnames"], torch.tensor(config["labels"])
    x = np.random.RandomState(config["image_seed"]).standard_normal((len(y), 3, config["image_size"], config["image_size"])).astype(np.float32)
    monkeypatch.setattr(common, "learning_rate", lambda epoch, epochs, lr: lr)
    monkeypatch.setattr(script, "frozen_states", lambda *_: (torch.ones(len(names), 1, 1), torch.ones(len(y), 1, 1, 1)))
    args = Namespace(lr=config["lr"], epochs=1, n_ctx=config["n_ctx"], ctx_init=config["context_words"], depth=config["depth"], prompts=config["prompts"], towers="both",
                     shift=config["shift"], shift_weight=config["shift_weight"], blend=config["blend_text"], views=1)

    def learn(steps):
        batch = torch.from_numpy(x), y, torch.arange(len(y)), torch.zeros(len(y), dtype=torch.long)
        run = made_up_run(clip, names, "", [batch] * steps, args)
        prompts = script.Prompt(clip, args)
        prompts.blend[1] = config["blend_visual"]
        with torch.no_grad():
            for name, shape in config["parameters"].items():
                value = np.random.RandomState(zlib.crc32(f"restore/{name}".encode())).standard_normal(shape).astype(np.float32)
                value = 1 + 0.1 * value if name.endswith("norm.weight") else 0.02 * value if name.endswith("bias") or name.startswith("text_prompts.") else value / shape[-1] ** 0.5
                if name != "text_prompts.0":
                    prompts.get_parameter(name).copy_(torch.from_numpy(value.astype(np.float32)))
        assert {name for name, _ in prompts.named_parameters()} == set(config["parameters"])
        prompts.gram_at_start = [g.detach() for g in prompts.gram()]
        if steps:
            script.train(prompts, run, args)
        return prompts, run.history()

    start = learn(0)[0]
    close(start.text_prompts[0], arrays["text_prompts_0_initial"], 1e-4, "first text prompt")
    logs = [np.zeros(2)]
    for step in range(1, config["steps"] + 1):  # a log holds the mean over an epoch's steps: take it apart again
        end, log = learn(step)
        logs.append(step * np.array([log["loss"][0], log["consistency"][0]]))
        if step == 1:
            for name in [key for key in arrays if key.startswith("gradient_initial/")]:
                close(end.get_parameter(name.split("/")[1]).grad, arrays[name], 1e-4, name)
    close(np.diff(logs, axis=0)[0], arrays["log"][0], 1e-4, "losses of the first step")
    close(np.diff(logs, axis=0), arrays["log"], 1e-3, "losses")
    close(np.diff(logs, axis=0)[1:, 1], arrays["log"][1:, 1], 1e-2, "shift losses")  # differences of small numbers
    for name in [key for key in arrays if key.startswith("final/")]:
        close(end.get_parameter(name.split("/")[1]), arrays[name], 1e-3, name)
    close(torch.stack([g.mean() for g in end.gram()]), [config["gram_text_final"], config["gram_visual_final"]], 1e-3, "Gram norms")
    close(end.blend, [config["blend_text_after"], config["blend_visual_after"]], 1e-4, "blends after the update")
    with torch.no_grad():
        close(clip.logit_scale * end.image_features(torch.from_numpy(x)) @ end.class_features(names).T, arrays["logits_final"], 1e-3, "logits after the last step")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_reference(file, monkeypatch):
    with np.load(file) as content:
        arrays = {key: content[key] for key in content.files}
    config = json.loads(str(arrays.pop("config")))
    if not (HERE.parent / f"{config['method']}.py").exists():
        pytest.skip(f"there is no {config['method']}.py yet")
    follow = follow_restore if config["method"] == "restore" else follow_context
    follow(config["method"], config, arrays, monkeypatch)


def test_there_are_references():
    assert FILES
