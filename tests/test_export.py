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
        file = tmp_path / f"{method}.safetensors"
        run = cli(method, "--epochs", 3, "--views", 2, "--batch-size", 16, "--base-to-new",
                  *flags, export=file)
        assert run.status == 0, run.err
        with safe_open(file, "np") as content:
            told = {name: value if name == "kind" else json.loads(value)
                    for name, value in content.metadata().items()}
            return {name: content.get_tensor(name) for name in content.keys()}, told, run.records[0]
    return export


def cross_entropy(logits, labels):
    largest = logits.max(1)
    log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    return (log_sum - logits[np.arange(len(labels)), labels]).mean()


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


def test_schedule_loss_and_accuracies_are_repeated_in_numpy(exported):
    """In the first epoch, at 1e-5, the loss is still that of the context at the start."""
    a, told, record = exported("coop")
    lr, epochs = told["flags"]["lr"], told["flags"]["epochs"]
    cosine = [lr * (1 + np.cos(np.pi * (e - 1) / epochs)) / 2 for e in range(1, epochs)]
    assert np.allclose(a["learning_rates"], [1e-5, *cosine])
    f = a["features"][a["rows"], a["crops"]]                            # (epochs, steps, B, D)
    y = a["labels"][a["rows"]]                                          # (epochs, steps, B)
    w = a["base/start"]
    losses = [cross_entropy(told["logit_scale"] * x @ w.T, t) for x, t in zip(f[0], y[0])]
    assert np.mean(losses) == pytest.approx(told["log"]["loss"][0], rel=1e-3)
    for part in ("base", "new"):
        for name, found in (("zero_shot", f"zero_shot_{part}"), ("end", part)):
            predicted = (a[f"{part}/features"] @ a[f"{part}/{name}"].T).argmax(1)
            assert 100 * (predicted == a[f"{part}/labels"]).mean() == pytest.approx(record[found])


@pytest.mark.parametrize("method", ["coop", "prograd"])
def test_a_whole_training_is_repeated_with_a_text_encoder(exported, tiny, method):
    """From start/v and the numbers of the tokens to end/v."""
    a, told, _ = exported(method)
    tokens, tau, optimizer = told["tokens"]["base"], told["logit_scale"], told["optimizer"]

    def prompts(before, lists):
        start, end = (embed([tokens[name]]) for name in ("start_of_text", "end_of_text"))
        return [torch.cat([start, *before, embed(numbers), end]) for numbers in lists]

    def embed(numbers):
        return tiny.model.token_embedding(torch.tensor(numbers))

    w_zs = text_encoder(tiny.model, prompts([], tokens["prograd_templates"][0])).detach()
    v, u = torch.tensor(a["start/v"], requires_grad=True), 0
    steps = [(lr, *step) for lr, rows, crops in zip(a["learning_rates"], a["rows"], a["crops"])
             for step in zip(rows, crops)]
    for lr, rows, crops in steps:
        f, y = (torch.from_numpy(x) for x in (a["features"][rows, crops], a["labels"][rows]))
        w = text_encoder(tiny.model, prompts([v], tokens["names_with_full_stop"]))
        logits = tau * f @ w.T
        (g,) = torch.autograd.grad(F.cross_entropy(logits, y), v, retain_graph=True)
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


def test_mvp_mi_is_exported_and_its_parts_are_named(exported):
    a, told, record = exported("mvp_mi", "--transfer", "scenes")
    assert (told["kind"], told["method"]) == ("export", "mvp_mi")
    assert set(told["tokens"]) == set(told["results"]) == {"base", "new", "scenes"}
    assert told["results"]["scenes"]["accuracy"] == record["transfer"]["scenes"]["accuracy"]
    assert not np.allclose(a["start/v"], a["end/v"]) and "scenes/end" in a


def test_the_tokens_of_all_templates_are_exported(exported, tiny):
    _, told, _ = exported("coop", "--template", "a photo of a {}.|a {}.")
    name = told["classnames"][0]
    for text in (f"a photo of a {name}.", f"a {name}."):
        assert str(tiny.tokenizer.encode(text)) in str(told["tokens"]["base"]["templates"])
