"""CLIP weights from names, tags and files, and the activation that they were trained with."""

import copy
import json
import urllib.request

import open_clip
import pytest
import torch

from data import weights
from data.errors import Problem

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CONFIG = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
OTHERS = {"test-clip": {}, "test-clip-quickgelu": {"quick_gelu": True},
          "test-heads": {"vision_cfg": {**VISION, "head_width": 8}},
          "test-bidirectional": {"text_cfg": {**TEXT, "no_causal_mask": True}}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, known to open_clip as test-clip, and others of the same shapes."""
    folder = tmp_path_factory.mktemp("configs")
    for name, changed in OTHERS.items():
        (folder / f"{name}.json").write_text(json.dumps({**CONFIG, **changed}))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    return open_clip.create_model("test-clip").eval()


@pytest.fixture
def checkpoint(small, tmp_path):
    """The small model in a file as open_clip's training writes it."""
    state = {f"module.{name}": tensor for name, tensor in small.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    return str(tmp_path / "epoch_3.pt")


def same_weights(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore")       # tracing is deprecated; OpenAI's files stay as they are
def test_openai_torchscript_files_are_loaded_with_quickgelu(small, tmp_path):
    small, file = copy.deepcopy(small).half().float(), tmp_path / "ViT-B-32.pt"
    openai = copy.deepcopy(small)
    openai.attn_mask = vars(openai)["_buffers"].pop("attn_mask")
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        vars(openai).pop(name, None)
        openai.register_buffer(name, torch.tensor(value))       # as in OpenAI's
    inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.trace(openai, inputs, check_trace=False).half().save(file)
    found = weights.create("test-clip", str(file))
    assert found["activation"] == "QuickGELU" and same_weights(found["model"], small)


def test_a_file_wants_a_typed_backbone_which_tells_its_activation(checkpoint, cli):
    run = cli("coop", dataset="eurosat", pretrained=checkpoint)
    assert run.status == 2 and "wants --backbone" in run.err and "quickgelu" in run.err


def test_a_typed_backbone_tells_the_activation_and_gelu_is_said(small, checkpoint, capfd):
    found = weights.create("test-clip", checkpoint)
    assert found["activation"] == "GELU" and same_weights(found["model"], small)
    assert "GELU; for QuickGELU" in capfd.readouterr().out
    assert weights.create("test-clip-quickgelu", checkpoint)["activation"] == "QuickGELU"
    assert not capfd.readouterr().out


def test_weights_activation_and_architecture_are_in_the_key_of_image_features(
        small, checkpoint, tmp_path):
    other = small.state_dict()
    other["visual.proj"] = -other["visual.proj"]
    torch.save(other, tmp_path / "other.pt")
    found = [weights.create(*names) for names in (
        ("test-clip", checkpoint), ("test-clip", f"{tmp_path}/other.pt"),
        ("test-clip-quickgelu", checkpoint), ("test-heads", checkpoint))]
    for name in ("image_key", "weights"):
        assert len({one[name] for one in found}) == 4
        assert weights.create("test-clip", checkpoint)[name] == found[0][name]


def test_a_prompt_is_trained_and_loaded_with_the_activation_of_its_weights(
        small, checkpoint, cli, tmp_path):
    clip = {"backbone": "test-clip-quickgelu", "pretrained": checkpoint}
    trained = cli("coop", "--epochs", 1, "--views", 1, **clip, save=tmp_path / "saved").records[0]
    loaded = cli("coop", load=tmp_path / "saved").records[0]
    assert trained["activation"] == loaded["activation"] == "QuickGELU"
    assert trained["accuracy"] == loaded["accuracy"]


# ---------------------------------------------------------------- what does not work, in one line

def refuse(name, tag, *words):
    """Creating a model ends in a Problem with these words; it blames no network."""
    with pytest.raises(Problem) as problem:
        weights.create(name, tag)
    line = str(problem.value)
    assert all(word in line for word in words) and "network" not in line, line


def test_an_unknown_backbone_folder_or_tag_is_named_with_those_that_there_are(tmp_path):
    refuse("ViT-B/16", "openai", "did you mean ViT-B-16", "local-dir:PATH")
    refuse("ViT-B-16", "openia", "openia", "openai, ", "no such file")
    refuse(f"local-dir:{tmp_path}", "", str(tmp_path))


def test_files_that_are_no_weights_of_this_model_are_named(small, tmp_path):
    for content, words in (("no weights", "is no file of CLIP weights"),
                           ({"text_projection": torch.zeros(32, 32)}, "cannot load test-clip")):
        torch.save(content, tmp_path / "file.pt")
        refuse("test-clip", f"{tmp_path}/file.pt", "file.pt", words)


def test_a_text_encoder_that_is_not_causal_is_refused(small):
    refuse("test-bidirectional", "random", "not CLIP's causal transformer")


def test_missing_weights_without_a_network_name_the_ways_out(monkeypatch, tmp_path):
    def unreachable(*address, **more):
        raise OSError(101, "Network is unreachable")

    from huggingface_hub import constants
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)     # is set, and set back at the end
    with pytest.raises(Problem, match="cannot load ViT-B-16 openai: .*--pretrained FILE, .*"
                                      "tiny_clip .*--pretrained random, or `python prograd"):
        weights.create("ViT-B-16", "openai")
