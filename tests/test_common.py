"""Few-shot samples, class halves, class features, the schedule."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import coop
import prograd
from data.files import Item
from data.records import append_line

PUBLISHED = json.loads((Path(__file__).parent / "few_shot.json").read_text())


@pytest.mark.parametrize("name, key", [(name, key) for name in PUBLISHED for key in PUBLISHED[name]["expected"]])
def test_few_shot_samples_are_the_published_ones(name, key):
    labels = [label for label, count in PUBLISHED[name]["label_counts"] for _ in range(count)]
    sample = common.few_shot([Item(str(row), label, "") for row, label in enumerate(labels)], *map(int, key.split("-")))
    assert [int(item.path) for item in sample] == PUBLISHED[name]["expected"][key]


def test_few_shot_with_fewer_images_than_shots_takes_them_all_in_order():
    items = [Item(str(k), k % 2, "") for k in range(5)]  # three of label 0, two of label 1
    assert common.few_shot(items, 3, 1)[3:] == [items[1], items[3]]
    assert sorted(common.few_shot(items, 99, 1)) == sorted(items)


def test_few_shot_of_one_class():
    items = [Item(str(k), 0, "") for k in range(9)]
    assert len(set(common.few_shot(items, 4, 1))) == 4


def test_few_shot_goes_by_first_appearance_not_by_label():
    items = [Item(str(k), label, "") for k, label in enumerate([2, 0, 2, 1, 0, 1])]
    assert [item.label for item in common.few_shot(items, 1, 1)] == [2, 0, 1]
    assert common.few_shot(items, 1, 1) == common.few_shot(items, 1, 1) and common.few_shot(items, 1, 1) != common.few_shot(items, 1, 2)


def test_base_and_new_halves_are_relabelled_and_the_odd_class_is_base():
    items, names = [Item(str(k), k % 5, f"c{k % 5}") for k in range(10)], [f"c{k}" for k in range(5)]
    base, base_names = common.half(items, names, new=False)
    new, new_names = common.half(items, names, new=True)
    assert (base_names, new_names) == (names[:3], names[3:])
    assert {(item.label, item.classname) for item in new} == {(0, "c3"), (1, "c4")}
    assert {(item.label, item.classname) for item in base} == {(0, "c0"), (1, "c1"), (2, "c2")} and len(base) + len(new) == 10


def test_learning_rate_is_the_authors():
    rates = [common.learning_rate(epoch, 200, 0.002) for epoch in range(200)]
    assert rates[0] == 1e-5 and rates[1] == 0.002 and rates[101] == pytest.approx(0.001)
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 1e-6


def full_length(clip, prompts):
    """What open_clip computes at 77 tokens from prompts of embeddings."""
    model = clip.model
    x = torch.stack([torch.cat([p, p.new_zeros(77 - len(p), p.shape[1])]) for p in prompts]) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return F.normalize(torch.stack([row[len(p) - 1] for row, p in zip(x, prompts)]) @ model.text_projection, dim=-1)


NAMES = ["blue arrow", "a_thing with (many) more words", "heart"]


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_cut_and_shared_prompts_give_the_features_of_77_tokens(tiny, position, specific):
    v = torch.randn(3, 5, 80) if specific else torch.randn(5, 80)
    prompt, (start, end), prompts = coop.Prompt(tiny, v, position), common.start_end(tiny), []
    for c, name in enumerate(NAMES):
        words, name = v[c] if specific else v, name.replace("_", " ")
        a, b = common.embed(tiny, tiny.tokenizer.encode(name)), common.embed(tiny, tiny.tokenizer.encode("."))
        k = {"end": 5, "middle": 2, "front": 0}[position]
        prompts.append(torch.cat([start, words[:k], a, words[k:], b, end]))
    with torch.no_grad():
        assert (prompt.class_features(NAMES) - full_length(tiny, prompts)).abs().max() < 1e-5


@pytest.mark.parametrize("script", [coop, prograd])
def test_chunks_of_classes_change_neither_features_nor_gradients(tiny, monkeypatch, script):
    names, v = common.name_tokens(tiny, [f"thing {k} of many" + " more" * (k % 3) for k in range(20)]), torch.randn(6, 80)
    d, found = torch.randn(2, 20, 128), []
    for chunk in (128, 20, 7, 1):
        monkeypatch.setattr(tiny, "class_chunk", chunk)
        prompt = script.Prompt(tiny, v.clone())
        w = prompt(names)
        both = torch.autograd.grad(w, prompt.v, d, is_grads_batched=True, retain_graph=True)[0]
        w.backward(d[0])
        found.append((w.detach(), prompt.v.grad, *both))
        assert torch.allclose(both[0], prompt.v.grad, rtol=1e-5, atol=1e-6)
    for other in found[1:]:
        assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(found[0], other))


def test_template_features_are_open_clips(tiny):
    texts = ["a photo of a blue arrow.", "a photo of a a thing with (many) more words.", "a photo of a heart."]
    with torch.no_grad():
        expected = tiny.model.encode_text(tiny.tokenizer(texts), normalize=True)
    assert (common.template_features(tiny, "a photo of a {}.", NAMES) - expected).abs().max() < 1e-5


def test_a_name_that_does_not_fit_is_named(tiny):
    with pytest.raises(common.Problem, match="endless"):
        common.template_features(tiny, "a photo of a {}.", ["endless " * 80])
    with pytest.raises(common.Problem, match="n-ctx"):
        coop.Prompt(tiny, torch.zeros(76, 80)).class_features(["arrow"])


def test_lines_are_added_whole(tmp_path):
    file = tmp_path / "a.jsonl"
    append_line(file, "1")
    file.write_bytes(file.read_bytes() + b'{"cut sh')
    append_line(file, "2")
    assert file.read_text().splitlines() == ["1", '{"cut sh', "2"] and os.path.getsize(file) == 13
