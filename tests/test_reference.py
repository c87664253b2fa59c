"""The scripts against the vectors of tests/reference (or $REFERENCE_DIR); see its README.md."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.make import follow, read, tokens

HERE = Path(__file__).parent
FILES = sorted(Path(os.environ.get("REFERENCE_DIR", HERE / "reference")).glob("*.npz"))
LEARNED = [file for file in FILES if not file.name.startswith("restore")]
RESTORE = [file for file in FILES if file.name.startswith("restore")]
REPLAYED = [file for file in LEARNED if "gradient_used_0" in read(file)[1]]
COLUMNS = {"coop": ["loss"], "prograd": ["loss", "general_loss", "cosine"]}


def by_name(file):
    return file.name


def close(found, expected, tolerance, what):
    """The norm of the difference over the norm of what is expected is below the tolerance."""
    found, expected = torch.as_tensor(found).detach().double(), torch.as_tensor(expected).double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    assert found.shape == expected.shape
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def close_log(found, expected, columns):
    """Every column by itself, so that a large one hides no small one; the first row more closely.

    RESTORE's consistency is a sum of squared differences of nearly equal numbers, and coarser."""
    for k, column in enumerate(columns):
        values = np.array([float(step[column]) for step in found])
        first, all_steps = (1e-3, 1e-2) if column == "consistency" else (1e-4, 1e-3)
        close(values[:1], expected[:1, k], first, f"{column} of the first step")
        close(values, expected[:, k], all_steps, column)


@pytest.mark.parametrize("file", LEARNED, ids=by_name)
def test_a_learned_context_goes_the_way_of_the_reference(file):
    config, arrays = read(file)
    mixed = [arrays.get(name, []) for name in ("mixed_features", "mixed_labels")]
    training = follow(config, mixed=[tuple(map(torch.from_numpy, step)) for step in zip(*mixed)])
    found = {"logits_initial": training.logits_initial, "logits_final": training.logits_final,
             "context_initial": training.context, "context_final": training.prompt.v,
             "gradient_initial": training.gradients[0]["v"],
             **{f"gradient_used_{k}": step["v"] for k, step in enumerate(training.gradients)}}
    for name in found.keys() & arrays.keys():
        early = "initial" in name or name == "gradient_used_0"
        close(found[name], arrays[name], 1e-4 if early else 1e-3, name)
    close_log(training.log, arrays["log"], config.get("columns") or COLUMNS[config["method"]])


@pytest.mark.parametrize("file", RESTORE, ids=by_name)
def test_restore_goes_the_way_of_the_reference(file):
    config, arrays = read(file)
    training = follow(config)
    end = training.prompt
    assert {name: list(p.shape) for name, p in end.named_parameters()} == config["parameters"]
    words = training.parameters_initial["text_prompts.0"]
    close(words, arrays["text_prompts_0_initial"], 1e-4, "first words")
    for entry in arrays:
        kind, _, name = entry.partition("/")
        if kind == "gradient_initial":
            close(training.gradients[0][name], arrays[entry], 1e-4, entry)
        elif kind == "final":
            close(end.get_parameter(name), arrays[entry], 1e-3, entry)
        elif entry in ("shift_text", "shift_vision"):
            close(torch.stack([step[entry] for step in training.log]), arrays[entry], 1e-3, entry)
        elif entry in ("logits_initial", "logits_final"):
            close(getattr(training, entry), arrays[entry], 1e-3, entry)
    close_log(training.log, arrays["log"], ["loss", "consistency"])
    if config["shift"] == "gram":
        found = torch.stack([norms.mean() for norms in end.gram_norms()])
        close(found, [config["gram_text_final"], config["gram_visual_final"]], 1e-3, "Gram norms")
    before = torch.tensor([config["blend_text"], config["blend_visual"]])
    after = torch.tensor([config["blend_text_after"], config["blend_visual_after"]])
    close(end.blend - before, after - before, 2e-3, "what the blends have grown by")


@pytest.mark.parametrize("file", REPLAYED, ids=by_name)
def test_momentum_and_weight_decay_lead_from_the_gradients_to_the_final_context(file):
    """No CLIP is needed for this: what any port's optimiser has to do with recorded gradients."""
    config, arrays = read(file)
    v = arrays["context_initial"].astype(np.float64)
    u = np.zeros_like(v)
    for step in range(config["steps"]):
        u = config["momentum"] * u + arrays[f"gradient_used_{step}"] + config["weight_decay"] * v
        v = v - config["lr"] * u
    assert np.abs(v - arrays["context_final"]).max() < 1e-6


@pytest.mark.parametrize("file", sorted((HERE / "reference").glob("*.npz")), ids=by_name)
def test_the_json_beside_says_the_same_and_the_tokens_are_the_tokenizers(file):
    config, arrays = read(file)
    beside = json.loads(file.with_suffix(".json").read_text())
    assert beside == {"config": config, "tokens": tokens(config)}
    assert ("images" if config["method"] == "restore" else "image_features") in arrays


def test_a_comma_costs_prograd_a_learned_word():
    """Eight words, nine tokens: a type of pet , a photo of | a."""
    learned, left_over = [320, 3877, 539, 3703, 267, 320, 1125, 539], [320]
    found = tokens(read(HERE / "reference" / "prograd_comma.npz")[0])
    assert (found["words_learned"], found["words_left_over"]) == (learned, left_over)


def test_there_are_references():
    assert {config["method"] for config, _ in map(read, FILES)} >= {"coop", "prograd", "restore"}
