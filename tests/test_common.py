"""What the methods share: few-shot samples, halves, class features; and the house's rules."""

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import common
import coop
import mvp_mi
import prograd
import restore
from data.files import Item

HERE = Path(__file__).parent.parent
SCRIPTS = [coop, prograd, mvp_mi, restore]
CONTEXT_SCRIPTS = [coop, prograd, mvp_mi]       # those that learn a context


def name_of(script):
    return script.__name__


# ---------------------------------------------------------------- few-shot samples

PUBLISHED = json.loads((HERE / "tests" / "few_shot.json").read_text())
SAMPLES = [(name, key) for name in PUBLISHED for key in PUBLISHED[name]["expected"]]


@pytest.mark.parametrize("name, key", SAMPLES)
def test_few_shot_samples_are_the_published_ones(name, key):
    counts, shots_and_seed = PUBLISHED[name]["label_counts"], map(int, key.split("-"))
    labels = [label for label, count in counts for _ in range(count)]
    items = [Item(str(row), label, "") for row, label in enumerate(labels)]
    sample = common.few_shot(items, *shots_and_seed)
    assert [int(item.path) for item in sample] == PUBLISHED[name]["expected"][key]


def items_of(labels):
    return [Item(str(k), label, f"class {label}") for k, label in enumerate(labels)]


def test_a_class_with_fewer_images_than_shots_gives_all_in_their_order():
    items = items_of([0, 1, 0, 1, 0])
    assert common.few_shot(items, 3, 1)[3:] == [items[1], items[3]]


def test_no_image_is_drawn_twice():
    assert len(set(common.few_shot(items_of([0] * 9), 8, 1))) == 8


def test_classes_stand_in_the_order_of_their_first_image():
    sample = common.few_shot(items_of([2, 0, 2, 1, 0, 1]), 1, 1)
    assert [item.label for item in sample] == [2, 0, 1]


def test_the_seed_decides_the_sample():
    items = items_of([0] * 20)
    one, again, two = (common.few_shot(items, 5, seed) for seed in (1, 1, 2))
    assert one == again != two


# ---------------------------------------------------------------- base and new classes

def test_of_an_odd_number_of_classes_the_middle_one_is_a_base_class():
    items, names = items_of([0, 1, 2, 3, 4]), list("abcde")
    assert common.half(items, names, new=False)[1] == ["a", "b", "c"]
    assert common.half(items, names, new=True)[1] == ["d", "e"]


def test_both_halves_together_hold_every_image_once():
    items, names = items_of([0, 1, 2, 3, 4] * 2), list("abcde")
    base, new = (common.half(items, names, new)[0] for new in (False, True))
    assert sorted(item.path for item in base + new) == sorted(item.path for item in items)


def test_new_classes_are_labelled_from_0():
    new, _ = common.half(items_of([0, 1, 2, 3, 4]), list("abcde"), new=True)
    assert [(item.label, item.classname) for item in new] == [(0, "class 3"), (1, "class 4")]


# ---------------------------------------------------------------- prompts to class features

NAMES = ["blue arrow", "a_thing with (many) more words", "heart"]


@pytest.mark.parametrize("encode_text", [common.encode_text, common.plain_encode_text])
def test_a_written_prompt_has_the_features_that_open_clip_gives_it(tiny, encode_text):
    texts = [f"a photo of a {name}." for name in NAMES]
    start, end = common.start_end(tiny)
    with torch.no_grad():
        found = encode_text(tiny, [[start, common.embed(tiny, text), end] for text in texts])
        expected = tiny.model.encode_text(tiny.tokenizer(texts), normalize=True)
    assert torch.allclose(found, expected, atol=1e-5)


def test_underscores_in_a_class_name_are_spaces(tiny):
    a, b = common.template_features(tiny, "a photo of a {}.", ["red_heart", "red heart"])
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name, lengths", [
    ("red heart", (2, 1)),
    ("red_heart", (2, 1)),
    ("hearts (red)", (4, 0)),       # as in CoOp's code: ")." is one token, and part of the name
])
def test_a_name_and_its_full_stop_are_embedded_apart(tiny, name, lengths):
    ((words, dot),) = common.name_embeddings(tiny, [name])
    assert (len(words), len(dot)) == lengths
    assert torch.equal(torch.cat([words, dot]), common.embed(tiny, name.replace("_", " ") + "."))


@pytest.mark.parametrize("script", CONTEXT_SCRIPTS, ids=name_of)
@pytest.mark.parametrize("position, template", [
    ("end", "a large green {}."),
    ("middle", "a {} large green."),
    ("front", "{} a large green."),
])
def test_a_context_of_words_is_the_written_prompt(tiny, script, position, template):
    words = common.embed(tiny, "a large green")
    with torch.no_grad():
        left_over = [words[:0]] if script is prograd else []
        found = script.Prompt(tiny, words, *left_over, position).class_features(NAMES)
    assert torch.allclose(found, common.template_features(tiny, template, NAMES), atol=1e-5)


def features_and_gradients(clip, v, position, classes, encode_text, monkeypatch):
    """Of a context v: its class features (C, D), and the gradients of two random sums of them."""
    monkeypatch.setattr(common, "encode_text", encode_text)
    names = [f"thing {k} of many" + " more" * (k % 3) for k in range(classes)]
    prompt = coop.Prompt(clip, v.clone(), position)
    w = prompt(common.name_embeddings(clip, names))
    directions = torch.randn(2, *w.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(w, prompt.v, d, retain_graph=True)[0] for d in directions]
    return w.detach(), *gradients


@pytest.mark.parametrize("classes, chunk", [(1, 128), (7, 128), (7, 7), (7, 3), (7, 1)])
@pytest.mark.parametrize("copies", ["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_the_quick_text_tower_agrees_with_the_plain_one(
        tiny, monkeypatch, position, copies, classes, chunk):
    monkeypatch.setattr(tiny, "class_chunk", chunk)
    v = 0.02 * torch.randn(*([classes] if copies == "class-specific" else []), 5, 80)
    quick, plain = (features_and_gradients(tiny, v, position, classes, encode_text, monkeypatch)
                    for encode_text in (common.encode_text, common.plain_encode_text))
    for a, b in zip(quick, plain):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_a_name_that_is_too_long_is_named(tiny):
    with pytest.raises(common.Problem, match="endless"):
        common.template_features(tiny, "a photo of a {}.", ["endless " * 80])


def test_a_context_that_leaves_no_room_for_the_name_points_to_the_flag(tiny):
    with pytest.raises(common.Problem, match="--n-ctx"):
        coop.Prompt(tiny, torch.zeros(76, 80)).class_features(["arrow"])


def test_the_nearest_words_of_words_are_these_words(tiny):
    words = common.embed(tiny, "a large green heart")
    nudged = words + 1e-3 * torch.randn_like(words)
    assert common.nearest_words(tiny, nudged) == "a large green heart"


# ---------------------------------------------------------------- threads

@pytest.mark.parametrize("backbone, environment, asked", [
    ([], None, [1]),
    ([], "2", []),
    (["--backbone", "ViT-B-16", "--pretrained", "random"], None, []),
], ids=["the tiny CLIP", "as the environment says", "as PyTorch says"])
def test_only_the_tiny_clip_is_kept_to_one_thread(
        tmp_path, monkeypatch, backbone, environment, asked):
    called = []
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    flags = common.flags("", lr=1, batch_size=1, n_ctx=1)
    argv = ["--device", "cpu", "--out", str(tmp_path / "r.jsonl"), *backbone]
    common.load_clip(common.parse(flags, argv))
    assert called == asked


def test_tables_are_printed_without_pytorch(tmp_path):
    command = [sys.executable, "-X", "importtime", HERE / "common.py", "--data"]
    done = subprocess.run([*command, "--data-root", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "eurosat" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "data.compare" in imported and "torch" not in imported


# ---------------------------------------------------------------- the house's rules

PYTHON = sorted(file for folder in ("", "data", "tests", "tests/reference")
                for file in (HERE / folder).glob("*.py"))
LONG_LINES_ALLOWED = set()      # files that are tables of data


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(HERE)))
def test_no_line_is_longer_than_100_columns(file):
    if file.relative_to(HERE).as_posix() not in LONG_LINES_ALLOWED:
        lines = enumerate(file.read_text().splitlines(), 1)
        assert not [number for number, line in lines if len(line) > 100]


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_imports_common_pytorch_and_nothing_else(script):
    tree = ast.parse(inspect.getsource(script))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", alias.name) for node in imports for alias in node.names}
    assert names <= {"common", "math", "torch", "torch.nn.functional"}


@pytest.mark.parametrize("passage, one, other", [
    ("Prompt.forward", coop, mvp_mi),
    ("Prompt.class_features", coop, prograd),
    ("first_context", coop, mvp_mi),
])
def test_what_scripts_share_is_the_same_to_the_letter(passage, one, other):
    a, b = (inspect.getsource(attrgetter(passage)(script)) for script in (one, other))
    assert a == b


@pytest.mark.parametrize("script", [prograd, mvp_mi], ids=name_of)
def test_the_update_is_described_in_the_same_words_as_coops(script):
    ours, coops = (re.search(r"    u <- .*?\n\n", s.__doc__, re.S)[0] for s in (script, coop))
    assert ours == coops


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_what_to_try_first_are_commands_of_that_script(script, tmp_path, monkeypatch):
    commands = re.findall(r"python (\w+)\.py(.*)", script.__doc__.split("Try first:")[1])
    monkeypatch.setattr(common, "runs", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path)
    for name, flags in commands:
        assert name == script.__name__
        flags = flags.split("  ")[0]                        # what is behind it is a comment
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(flags)])
        script.main()
    assert len(commands) in (2, 3)
