"""The embedded benchmark: images and captions, files, and how the tiny CLIP is made."""

import json
import random
import subprocess
import sys

import open_clip
import pytest
from PIL import Image
from safetensors.torch import load_file

from data.errors import Problem
from data.world import draw, pretrain, sets
from data.world.captions import HOW, SYNONYMS, long_caption, short_caption

SHIPPED = sets.HERE / "tiny_clip"


@pytest.mark.parametrize("attribute", draw.ATTRIBUTES)
def test_every_word_of_an_attribute_changes_the_image(attribute):
    scene = draw.sample_scene(random.Random(0), shape="heart", colour="red", texture="dotted",
                              size="large", place="center", ground="sand", style="photo")
    words = draw.ATTRIBUTES[attribute]
    images = {draw.draw(scene | {attribute: word}, random.Random(1)).tobytes() for word in words}
    assert len(images) == len(words)


def test_short_captions_tell_what_they_claim():
    rng = random.Random(0)
    for _ in range(1000):
        text, told = short_caption(draw.sample_scene(rng), rng)
        for attribute, word in told.items():
            ways = HOW[word] if attribute == "style" else SYNONYMS.get(word, [word])
            assert any(way in text for way in ways), (text, told)


def test_long_captions_are_true_of_their_scene():
    rng, words = random.Random(0), set(sum(draw.ATTRIBUTES.values(), []))
    for _ in range(1000):
        scene = draw.sample_scene(rng)
        text = long_caption(scene, rng).replace(",", " ").replace("#", " ").rstrip(".")
        assert words.intersection(text.split()) <= {"photo", *scene.values()}


def test_shifted_versions_show_the_scenes_of_shapes():
    clean = sets.draw_image("shapes_clean", "red heart", 0)
    assert clean == sets.draw_image("shapes", "red heart", 0, camera=False)


def test_processes_that_build_at_once_draw_one_set_and_the_same_as_any_other(tmp_path):
    code = ("import sys; from data.world import sets; "
            "sets.PER_CLASS = dict.fromkeys(sets.PER_CLASS, 1); sets.build(sys.argv[1], 'places')")
    command = [sys.executable, "-c", code, tmp_path]
    processes = [subprocess.Popen(command, cwd=sets.HERE.parents[1]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    split = json.loads((tmp_path / "places" / "split_places.json").read_text())
    for name, row in zip(sets.SETS["places"].classes, split["test"], strict=True):
        image = Image.open(tmp_path / "places" / "images" / row[0])
        assert row[2] == name and image.tobytes() == sets.draw_image("places", name, 2).tobytes()


def test_a_set_that_is_there_stays_and_one_of_other_code_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "PER_CLASS", dict.fromkeys(sets.PER_CLASS, 1))
    sets.build(tmp_path, "forms")
    (tmp_path / "forms" / "mark").touch()
    sets.build(tmp_path, "forms")
    assert (tmp_path / "forms" / "mark").exists()
    monkeypatch.setattr(sets, "code_digest", lambda *files: "other")
    sets.build(tmp_path, "forms")
    assert not (tmp_path / "forms" / "mark").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "forms").mkdir()
    with pytest.raises(Problem, match="forms: .* holds something else: move it away"):
        sets.build(tmp_path, "forms")


def test_a_set_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "PER_CLASS", dict.fromkeys(sets.PER_CLASS, 1))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(sets.json, "dumps", lambda split: 1 / 0)  # after the images
        sets.build(tmp_path, "forms")
    assert not (tmp_path / "forms").exists()
    sets.build(tmp_path, "forms")
    assert len(list(tmp_path.rglob("*.png"))) == 36


def test_shipped_weights_classify_zero_shot_about_as_the_rules_ask(monkeypatch):
    monkeypatch.setattr(sets, "PER_CLASS", {"train": 20, "val": 6})
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    plain, accuracy, _, _, confidence, *fronts = sets.measure(model.eval(), preprocess, "forms")
    assert plain >= 85 and 45 <= accuracy <= 85  # 6 images a class leave a few points of noise
    assert abs(confidence - accuracy) <= 25 and max(abs(f - accuracy) for f in fronts) <= 6


def test_pretraining_runs_from_nothing_to_a_clip_of_the_shipped_form(tmp_path, monkeypatch):
    flags = ["--steps", "2", "--text-steps", "2", "--images", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    pretrain.main()
    config, file = "open_clip_config.json", "open_clip_model.safetensors"
    assert (tmp_path / config).read_text() == (SHIPPED / config).read_text()
    new, shipped = (load_file(folder / file) for folder in (tmp_path, SHIPPED))
    assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in shipped.items()}
    occur, known = (v["token_embedding.weight"].any(-1) for v in (new, shipped))
    assert occur.equal(known)  # the words of the captions, no others
