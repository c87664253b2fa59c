"""CLIP weights from names, tags and files, and the activation that they were trained with."""

import copy
import json
import shutil
import socket
import urllib.request

import open_clip
import pytest
import torch

import common
from data import weights
from data.errors import Problem

CONFIG = {"embed_dim": 32,
          "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                         "patch_size": 16},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                       "layers": 1}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, known to open_clip as test-clip and test-clip-quickgelu."""
    folder = tmp_path_factory.mktemp("configs")
    both_ways = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}}
    for name, config in (("test-clip", CONFIG), ("test-bidirectional", both_ways),
                         ("test-clip-quickgelu", {**CONFIG, "quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    return open_clip.create_model("test-clip").eval()


@pytest.fixture
def plain(small, tmp_path):
    """A state dict of the small model in a file."""
    torch.save(small.state_dict(), tmp_path / "plain.pt")
    return str(tmp_path / "plain.pt")


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
    model, _, _, activation = weights.create("test-clip", str(file), chosen=False)
    assert activation == "QuickGELU" and same_weights(model, small)
    blocks = [model.transformer.resblocks[0], model.visual.transformer.resblocks[0]]
    assert [type(block.mlp.gelu) for block in blocks] == 2 * [open_clip.transformer.QuickGELU]


def test_a_file_that_does_not_tell_its_activation_asks_for_it(small, plain):
    with pytest.raises(Problem, match="--backbone test-clip-quickgelu .*or --backbone test-clip$"):
        weights.create("test-clip", plain, chosen=False)


def test_a_typed_backbone_tells_the_activation_and_gelu_is_said(small, plain, capfd):
    model, _, _, activation = weights.create("test-clip", plain)
    assert activation == "GELU" and same_weights(model, small)
    assert "GELU; for QuickGELU" in capfd.readouterr().out
    assert weights.create("test-clip-quickgelu", plain)[3] == "QuickGELU"
    assert not capfd.readouterr().out


def test_openai_weights_are_known_by_their_published_digest(small, plain, monkeypatch):
    assert len(weights.openai_digests()) == 9
    monkeypatch.setattr(weights, "openai_digests", lambda: {weights.sha256(plain)})
    assert weights.create("test-clip", plain, chosen=False)[3] == "QuickGELU"


def test_open_clips_training_checkpoints_are_taken(small, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in small.state_dict().items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": state, "optimizer": {"state": {}}},
               tmp_path / "epoch_3.pt")
    assert same_weights(weights.create("test-clip", str(tmp_path / "epoch_3.pt"))[0], small)


def test_the_activation_is_recorded_and_makes_other_runs(small, plain, cli):
    flags = ("--epochs", 1, "--views", 1, "--shots", 1, "--dataset", "forms", "--pretrained", plain)
    found = [cli("coop", *flags, backbone=name).records[0]
             for name in ("test-clip", "test-clip-quickgelu")]
    assert [record["activation"] for record in found] == ["GELU", "QuickGELU"]
    assert found[0]["weights"] != found[1]["weights"] and found[0]["run"] != found[1]["run"]


def test_a_saved_prompt_knows_the_activation_of_its_weights(small, plain, cli, tmp_path):
    flags = ("--epochs", 1, "--views", 1, "--shots", 1, "--dataset", "forms", "--pretrained", plain)
    trained = cli("coop", *flags, backbone="test-clip", save=tmp_path / "saved")
    loaded = cli("coop", load=tmp_path / "saved")
    assert loaded.status == 0, loaded.err
    assert loaded.records[0]["accuracy"] == trained.records[0]["accuracy"]


# ---------------------------------------------------------------- what does not work, in one line

def problem(*names):
    """Return the line about weights that cannot be used; it blames no network."""
    with pytest.raises(Problem) as caught:
        weights.create(*names)
    line = str(caught.value)
    assert "\n" not in line and "reached" not in line and "network" not in line
    return line


def test_an_unknown_backbone_is_told_the_nearest():
    assert "did you mean ViT-B-16" in problem("ViT-B/16", "openai")
    assert "local-dir:PATH" in problem("nothing like it", "openai")


def test_a_tag_that_is_no_file_either_is_told_the_tags():
    line = problem("ViT-B-16", "openia")
    assert "openia" in line and "openai, " in line and "no such file" in line


def test_files_that_are_no_weights_of_this_model_are_named(small, plain, tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt: is no file of CLIP weights" in problem("test-clip", f"{tmp_path}/text.pt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "number.pt")
    assert "number.pt: is no file" in problem("test-clip", f"{tmp_path}/number.pt")
    torch.save({}, tmp_path / "empty.pt")
    assert "empty.pt: is no file" in problem("test-clip", f"{tmp_path}/empty.pt")
    torch.save({"text_projection": torch.zeros(32, 32)}, tmp_path / "part.pt")
    assert "part.pt" in problem("test-clip", f"{tmp_path}/part.pt")


def test_a_local_folder_without_weights_is_named(tmp_path):
    assert "nowhere" in problem(f"local-dir:{tmp_path}/nowhere", "")
    shutil.copy(common.TINY_CLIP / "open_clip_config.json", tmp_path)
    assert str(tmp_path) in problem(f"local-dir:{tmp_path}", "")


def test_a_text_encoder_that_is_not_causal_is_refused(small):
    assert "not CLIP's causal transformer" in problem("test-bidirectional", "random")


@pytest.mark.parametrize("setting", ["", "https_proxy", "HF_HUB_OFFLINE"])
def test_missing_weights_without_a_network_name_the_ways_out(monkeypatch, tmp_path, setting):
    def refuse(*address, **more):
        raise OSError(101, "Network is unreachable")

    from huggingface_hub import constants
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if setting == "https_proxy":
        monkeypatch.setenv(setting, "http://127.0.0.1:9")
    if setting == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Problem) as caught:
        weights.create("ViT-B-16", "openai")
    for way_out in ("--backbone local-dir:", "--pretrained random", "`python prograd.py`"):
        assert way_out in str(caught.value), caught.value
