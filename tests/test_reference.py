"""The scripts reproduce the vectors of tests/reference (or $REFERENCE_DIR); see its README.md."""

import os
from pathlib import Path

import pytest
import torch
from reference.make import COLUMNS, blends, entries, file_name, follow, read

HERE = Path(__file__).parent / "reference"
FILES = sorted(Path(os.environ.get("REFERENCE_DIR", HERE)).glob("*.npz"))
EARLY = {"image_features", "images", "zero_shot_logits", "gradient_used_0", "mixed_features"}


def close(found, expected, tolerance, what):
    """Assert that the norm of the difference over the norm of `expected` is below the tolerance."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    assert found.shape == expected.shape
    assert error < tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_script_trains_as_in_the_reference(file):
    """1e-4 before the first step, 1e-3 after it; each column of the log by itself.

    RESTORE's consistency is a sum of squared differences of nearly equal numbers, and coarser."""
    config, arrays = read(file)
    mixed = [torch.from_numpy(arrays[name]) for name in ("mixed_features", "mixed_labels")
             if name in arrays]
    training = follow(config, mixed=[*zip(*mixed)])
    found, expected_log = entries(training), arrays.pop("log")
    for name, expected in arrays.items():
        early = name in EARLY or "initial" in name
        close(found[name], expected, 1e-4 if early else 1e-3, name)
    for k, column in enumerate(COLUMNS[config["method"]]):
        times = 10 if column == "consistency" else 1
        close(found["log"][:1, k], expected_log[:1, k], times * 1e-4, f"{column}, first step")
        close(found["log"][:, k], expected_log[:, k], times * 1e-3, column)
    if config["method"] == "restore":
        shapes = {file_name(name): list(p.shape) for name, p in training.initial.items()}
        assert shapes == config["parameters"]
        before = torch.tensor([config["blend_text"], config["blend_visual"]])
        after = torch.tensor([config["blend_text_after"], config["blend_visual_after"]])
        close(blends(training.prompt) - before, after - before, 2e-3, "growth of the blends")


def test_there_are_references_of_every_method():
    assert {read(file)[0]["method"] for file in FILES} == set(COLUMNS)
