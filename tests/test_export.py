"""What --export writes is enough to repeat a run, in NumPy as far as no text tower is needed."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open


@pytest.fixture
def exported(cli, tmp_path):
    """An exported run: its arrays, its metadata and its record."""
    def export(method, *flags):
        file = tmp_path / f"{method}.safetensors"
        run = cli(method, "--epochs", 3, "--views", 2, "--batch-size", 16, "--base-to-new",
                  *flags, export=file)
        assert run.status == 0, run.err
        with safe_open(file, "np") as content:
            told = {name: json.loads(value) for name, value in content.metadata().items()}
            return {name: content.get_tensor(name) for name in content.keys()}, told, run.records[0]
    return export


def cross_entropy(logits, labels):
    largest = logits.max(1)
    log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    return (log_sum - logits[np.arange(len(labels)), labels]).mean()


def test_replay_without_a_tower(exported):
    """Schedule, batches, logits, loss and accuracy. The first epoch's learning rate is 1e-5: its
    loss is still that of the context it starts from."""
    a, told, record = exported("coop")
    lr, epochs = told["flags"]["lr"], told["flags"]["epochs"]
    cosine = [lr * (1 + np.cos(np.pi * (e - 1) / epochs)) / 2 for e in range(1, epochs)]
    assert np.allclose(a["learning_rates"], [1e-5, *cosine])
    f = a["features"][a["rows"], a["crops"]]                            # (epochs, steps, B, D)
    y = a["labels"][a["rows"]]                                          # (epochs, steps, B)
    w = a["base/start"]                                                 # the base half is learned
    losses = [cross_entropy(told["logit_scale"] * x @ w.T, t) for x, t in zip(f[0], y[0])]
    assert np.mean(losses) == pytest.approx(told["log"]["loss"][0], rel=1e-3)
    for part in ("base", "new"):
        for name, found in (("zero_shot", f"zero_shot_{part}"), ("end", part)):
            predicted = (a[f"{part}/features"] @ a[f"{part}/{name}"].T).argmax(1)
            assert 100 * (predicted == a[f"{part}/labels"]).mean() == pytest.approx(record[found])


def text_tower(model, prompts):
    """Class features of prompts (L, W), of any lengths, written with open_clip's modules alone."""
    features = []
    for x in prompts:
        length = len(x)
        x = (x + model.positional_embedding[:length])[None]
        for block in model.transformer.resblocks:
            x = block(x, attn_mask=model.attn_mask[:length, :length])
        features.append(model.ln_final(x[0, -1]) @ model.text_projection)
    return F.normalize(torch.stack(features), dim=-1)


def test_a_whole_training_from_the_file_and_a_text_tower(exported, tiny):
    """CoOp's, in another program: from start/v to end/v."""
    a, told, _ = exported("coop")
    optimizer, tokens, model = told["optimizer"], told["tokens"]["base"], tiny.model
    start, end, *names = (model.token_embedding(torch.tensor(numbers)) for numbers in (
        [tokens["start_of_text"]], [tokens["end_of_text"]], *tokens["names_with_full_stop"]))
    v, u = torch.tensor(a["start/v"], requires_grad=True), 0
    for lr, rows, crops in zip(a["learning_rates"], a["rows"], a["crops"]):
        for row, crop in zip(rows, crops):
            f, y = (torch.from_numpy(x) for x in (a["features"][row, crop], a["labels"][row]))
            w = text_tower(model, [torch.cat([start, v, name, end]) for name in names])
            (g,) = torch.autograd.grad(F.cross_entropy(told["logit_scale"] * f @ w.T, y), v)
            with torch.no_grad():
                u = optimizer["momentum"] * u + g + optimizer["weight_decay"] * v
                v -= lr * u
    moved = np.abs(a["end/v"] - a["start/v"]).max()
    assert np.abs(v.detach().numpy() - a["end/v"]).max() < 1e-3 * moved


def test_prograd_and_mvp_mi_are_exported_too(exported):
    for method in ("prograd", "mvp_mi"):
        a, told, _ = exported(method)
        assert told["method"] == method and a["start/v"].shape == a["end/v"].shape
        assert not np.allclose(a["start/v"], a["end/v"])
        assert set(told["tokens"]) == {"base", "new"}


@pytest.mark.parametrize("method, flags, named", [
    ("restore", [], "pixels"), ("coop", ["--views", 0], "--views 0"),
    ("coop", ["--shots", "1,2"], "a single run"), ("coop", ["--seeds", "1,2"], "a single run")])
def test_what_cannot_be_exported_is_said_before_the_training(cli, tmp_path, method, flags, named):
    run = cli(method, *flags, export=tmp_path / "run.safetensors")
    assert run.status == 2 and named in run.err and run.err.count("\n") == 1
    assert not list(tmp_path.glob("*.safetensors"))
