"""What --export writes is enough to repeat a run in another program, without images."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open


@pytest.fixture
def exported(cli, tmp_path):
    """Export a run: its arrays, its metadata and its record."""
    def export(method, *flags):
        file = tmp_path / "exported"
        run = cli(method, "--epochs", 3, "--views", 2, "--batch-size", 16, "--base-to-new",
                  *flags, export=file)
        assert run.status == 0, run.err
        with safe_open(file, "np") as content:
            told = {name: json.loads(value) for name, value in content.metadata().items()
                    if name != "kind"}
            return {name: content.get_tensor(name) for name in content.keys()}, told, run.records[0]
    return export


def text_encoder(model, prompts):
    """Return the class features of prompts (L, W), with open_clip's modules alone."""
    features = []
    for x in prompts:
        length = len(x)
        x = (x + model.positional_embedding[:length])[None]
        for block in model.transformer.resblocks:
            x = block(x, attn_mask=model.attn_mask[:length, :length])
        features.append(model.ln_final(x[0, -1]) @ model.text_projection)
    return F.normalize(torch.stack(features), dim=-1)


def test_schedule_and_accuracies_are_repeated_in_numpy(exported):
    a, told, record = exported("mvp_mi", "--transfer", "scenes")
    lr, epochs = told["flags"]["lr"], told["flags"]["epochs"]
    cosine = [lr * (1 + np.cos(np.pi * (e - 1) / epochs)) / 2 for e in range(1, epochs)]
    assert np.allclose(a["learning_rates"], [1e-5, *cosine])
    expected = {("base", "zero_shot"): record["zero_shot_base"], ("base", "end"): record["base"],
                ("new", "zero_shot"): record["zero_shot_new"], ("new", "end"): record["new"],
                ("scenes", "end"): record["transfer"]["scenes"]["accuracy"]}
    for (part, name), accuracy in expected.items():
        predicted = (a[f"{part}/features"] @ a[f"{part}/{name}"].T).argmax(1)
        assert 100 * (predicted == a[f"{part}/labels"]).mean() == pytest.approx(accuracy)
    assert set(told["tokens"]) == set(told["results"]) == {"base", "new", "scenes"}


@pytest.mark.parametrize("method", ["coop", "prograd"])
def test_a_whole_training_is_repeated_with_a_text_encoder(exported, tiny, method):
    """From start/v and the numbers of the tokens to end/v."""
    a, told, _ = exported(method)
    tokens, tau, optimizer = told["tokens"]["base"], told["logit_scale"], told["optimizer"]

    def embed(numbers):
        return tiny.model.token_embedding(torch.tensor(numbers))

    def prompts(before, lists):
        start, end = (embed([tokens[name]]) for name in ("start_of_text", "end_of_text"))
        return [torch.cat([start, *before, embed(numbers), end]) for numbers in lists]

    w_zs = text_encoder(tiny.model, prompts([], tokens["prograd_templates"][0])).detach()
    v, u, losses = torch.tensor(a["start/v"], requires_grad=True), 0, []
    for name, (before, lists) in {"zero_shot": ([], tokens["templates"][0]),
                                  "start": ([v], tokens["names_with_full_stop"])}.items():
        w = text_encoder(tiny.model, prompts(before, lists)).detach()
        assert np.allclose(w, a[f"base/{name}"], atol=1e-5)
    steps = [(lr, *step) for lr, rows, crops in zip(a["learning_rates"], a["rows"], a["crops"])
             for step in zip(rows, crops)]
    for lr, rows, crops in steps:
        f, y = (torch.from_numpy(x) for x in (a["features"][rows, crops], a["labels"][rows]))
        w = text_encoder(tiny.model, prompts([v], tokens["names_with_full_stop"]))
        logits = tau * f @ w.T
        losses.append(F.cross_entropy(logits, y))
        (g,) = torch.autograd.grad(losses[-1], v, retain_graph=True)
        if method == "prograd":
            l_g = F.cross_entropy(logits, (tau * f @ w_zs.T).softmax(-1))   # KL plus an entropy
            (g_g,) = torch.autograd.grad(l_g, v)
            dot = (g * g_g).sum()
            g = g if dot >= 0 else g - dot / g_g.square().sum() * g_g
        with torch.no_grad():
            u = optimizer["momentum"] * u + g + optimizer["weight_decay"] * v
            v -= lr * u
    moved = np.abs(a["end/v"] - a["start/v"]).max()
    assert np.abs(v.detach().numpy() - a["end/v"]).max() < 1e-3 * moved
    loss = torch.stack(losses).reshape(a["rows"].shape[:2]).mean(1)         # of each epoch
    assert loss.tolist() == pytest.approx(told["log"]["loss"], rel=1e-3)
