"""The embedded data sets: what is drawn, how it gets on disk, how the tiny CLIP came to be."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
from safetensors.torch import load_file

from data import world
from data.files import CATALOGUE, load_data

DATA = Path(world.__file__).parent
EMBEDDED = [name for name, spec in CATALOGUE.items() if spec["kind"] == "world"]
SHIFTED = ["shapes_clean", "shapes_sketch", "shapes_noise", "shapes_lowres"]


@pytest.fixture
def three_per_class(monkeypatch):
    monkeypatch.setattr(world, "PER_CLASS", {"train": 1, "val": 1, "test": 1})


def random_scenes(count):
    rng = random.Random(0)
    return [(world.scene(rng), rng) for _ in range(count)]


# ---------------------------------------------------------------- scenes

def test_a_scene_has_a_word_for_every_attribute_and_keeps_what_is_given():
    rng = random.Random(0)
    for _ in range(200):
        scene = world.scene(rng, shape="moon", colour=["red", "blue"])
        assert scene["shape"] == "moon"
        assert scene["colour"] in ("red", "blue")
        assert all(scene[a] in words for a, words in world.ATTRIBUTES.items())


def test_a_caption_says_nothing_untrue():
    for scene, rng in random_scenes(500):
        sentence, said = world.caption(scene, rng)
        assert said.items() <= scene.items()
        for word in sentence.strip(".").split():
            known = word != "photo" and any(word in words for words in world.ATTRIBUTES.values())
            assert not known or word in scene.values(), (sentence, scene)


def test_what_a_caption_claims_to_say_is_in_it():
    for scene, rng in random_scenes(500):
        sentence, said = world.caption(scene, rng)
        for attribute, word in said.items():
            ways = world.HOW[word] if attribute == "style" else world.SAY.get(word, [word])
            assert any(way in sentence for way in ways), (sentence, said)


def test_every_picture_may_be_called_a_photo_so_no_caption_claims_it():
    assert all(world.caption(scene, rng)[1].get("style") != "photo"
               for scene, rng in random_scenes(500))


@pytest.mark.parametrize("attribute", list(world.ATTRIBUTES))
def test_every_word_of_an_attribute_changes_the_picture(attribute):
    scene = world.scene(random.Random(0), shape="heart", colour="red", texture="dotted",
                        size="large", place="center", ground="sand", style="photo")
    pictures = [world.draw(scene | {attribute: word}, random.Random(1)).tobytes()
                for word in world.ATTRIBUTES[attribute]]
    assert len(set(pictures)) == len(world.ATTRIBUTES[attribute])


# ---------------------------------------------------------------- data sets

def test_the_catalogue_has_eleven_data_sets_and_four_shifted_versions_of_shapes():
    assert len(EMBEDDED) == 15
    assert set(EMBEDDED) == set(world.CAMERAS) == {*world.CLASSES, *SHIFTED}


def test_classes_are_in_an_order_shuffled_by_the_name_of_the_set():
    for name, classes in world.CLASSES.items():
        order = list(classes)
        random.Random(name).shuffle(order)
        assert world.class_names(name) == order != list(classes)


def test_shapes_is_the_largest_set():
    sizes = {name: len(classes) for name, classes in world.CLASSES.items()}
    assert sizes.pop("shapes") == 24
    assert 6 <= min(sizes.values()) and max(sizes.values()) < 24


@pytest.mark.parametrize("name", SHIFTED)
def test_a_shifted_version_shows_the_classes_of_shapes(name):
    assert world.class_names(name) == world.class_names("shapes")


def test_a_shifted_version_shows_the_scenes_of_shapes():
    for classname in world.class_names("shapes"):
        clean = world.picture("shapes_clean", classname, 0)
        assert clean == world.picture("shapes", classname, 0, camera=False)
        assert world.picture("shapes_lowres", classname, 0) == world.lower(world.tint(clean), 20)


def test_no_two_pictures_of_a_class_are_the_same():
    classname = world.class_names("shapes")[0]
    assert len({world.picture("shapes", classname, k).tobytes() for k in range(88)}) == 88


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_set_is_drawn_on_first_use(name, tmp_path, three_per_class):
    data = load_data(name, tmp_path)
    assert data.classnames == world.class_names(name)
    for part in (data.train, data.val, data.test):
        assert [item.classname for item in part] == data.classnames
        assert all(item.path.is_file() for item in part)


@pytest.mark.parametrize("name", ["scenes", "shapes_noise"])
def test_the_pictures_are_the_same_every_time(name, tmp_path, three_per_class):
    a, b = (world.build(tmp_path / place, name) for place in ("a", "b"))
    files = [path.relative_to(a) for path in a.rglob("*.*")]
    assert len(files) == 3 * len(world.class_names(name)) + 1
    assert all((a / path).read_bytes() == (b / path).read_bytes() for path in files)


def test_a_picture_does_not_depend_on_what_was_drawn_before(tmp_path, three_per_class):
    file = world.build(tmp_path, "scenes") / "images" / "wood" / "0002.png"
    fresh = tmp_path / "fresh.png"
    world.picture("scenes", "wood", 2).save(fresh, compress_level=1)
    assert file.read_bytes() == fresh.read_bytes()


# ---------------------------------------------------------------- whole or not at all

DRAW = """
import sys
from data import world
world.PER_CLASS = {"train": 10, "val": 10, "test": 10}
world.build(sys.argv[1], "shapes")
"""


def drawing(root):
    """Another process that draws `shapes` below `root`, and has begun to."""
    process = subprocess.Popen([sys.executable, "-c", DRAW, root], cwd=DATA.parent)
    while not any(root.glob(".shapes-*/images/*/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("signal", ["terminate", "kill"])
def test_what_an_ended_run_has_half_drawn_is_cleared_away(signal, tmp_path, three_per_class):
    process = drawing(tmp_path)
    getattr(process, signal)()
    process.wait()
    assert not (tmp_path / "shapes").exists()
    assert any(tmp_path.glob(".shapes-*"))
    world.build(tmp_path, "shapes")
    assert len(list(tmp_path.glob("shapes/images/*/*.png"))) == 3 * 24
    assert not any(tmp_path.glob(".shapes-*"))


def test_what_an_ended_run_of_another_set_has_left_stays(tmp_path, three_per_class):
    (tmp_path / ".shapes_clean-unfinished").mkdir()
    world.build(tmp_path, "shapes")
    assert (tmp_path / ".shapes_clean-unfinished").exists()


def test_of_two_that_build_at_once_one_draws_and_the_other_waits(tmp_path, three_per_class):
    process = drawing(tmp_path)
    world.build(tmp_path, "shapes")
    assert len(list(tmp_path.glob("shapes/images/*/*.png"))) == 30 * 24  # the other's pictures
    assert process.wait() == 0


def test_a_set_that_cannot_be_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world, "picture", full)
    with pytest.raises(OSError, match="No space"):
        world.build(tmp_path, "scenes")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------- the tiny CLIP

def test_the_check_admits_what_keeps_the_rules(capsys, monkeypatch):
    monkeypatch.setattr(world, "PER_CLASS", {"train": 20, "val": 20, "test": 48})
    monkeypatch.setitem(world.CAMERAS, "scenes", ("none", lambda img, rng: img))
    world.check(["colours", "scenes"])
    verdicts = [line.split(maxsplit=4)[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert verdicts == ["admitted", "NOT ADMITTED"]


def test_the_sheet_of_all_sets_is_the_same_every_time():
    assert world.sheet() == world.sheet()


def test_pretraining_writes_a_clip_of_the_same_form(tmp_path):
    flags = ["--steps", "2", "--pictures", "1", "--out", tmp_path]
    subprocess.run([sys.executable, DATA / "pretrain.py", *flags], check=True)
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", require_pretrained=True)
    new, shipped = (folder / "open_clip_config.json" for folder in (tmp_path, DATA / "tiny_clip"))
    assert json.loads(new.read_text()) == json.loads(shipped.read_text())
    new, shipped = (load_file(folder / "open_clip_model.safetensors")
                    for folder in (tmp_path, DATA / "tiny_clip"))
    assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in shipped.items()}
    learned, words = (v["token_embedding.weight"].any(-1) for v in (new, shipped))
    assert learned.equal(words)  # the words of the captions, no others
