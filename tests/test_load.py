"""Data sets: names, layouts, splits, and what is refused because it would give wrong numbers."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import make_images

from data.errors import Problem
from data.load import CATALOGUE, check_template, dataset_names, load_data


def write(file, content):
    """Write a text or JSON file, with its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def fill(folder, *classes, count=10):
    """Make class folders, each with `count` files that look like images."""
    for classname in classes:
        for number in range(count):
            write(folder / classname / f"{number}.jpg", "")
    return folder


def refuse(name, root, *words):
    """Loading the data set ends in a Problem with all of these words."""
    with pytest.raises(Problem) as problem:
        load_data(name, root)
    assert all(word in str(problem.value) for word in words), problem.value


def files(items):
    """The files of items, as CLASS/FILE."""
    return ["/".join(item.path.parts[-2:]) for item in items]


# ---------------------------------------------------------------- names

def test_suites_and_names_are_separated_by_commas():
    assert dataset_names("eurosat, shapes") == ["eurosat", "shapes"]
    assert len(dataset_names("embedded,papers")) == 22
    assert dataset_names("papers")[-1] == "imagenet"


def test_a_folder_is_one_data_set_however_its_path_is_written(tmp_path):
    folder = str(fill(tmp_path / "red green", "a", "b"))
    for way in (folder, "./red green/"):
        assert dataset_names(way) == [load_data(way, ".").name] == [folder]


@pytest.mark.parametrize("text", ["a {}.|a photo", "{} or {}", "a {0}"])
def test_every_prompt_of_a_template_needs_one_place_for_the_name(text):
    with pytest.raises(Problem, match="needs one {}"):
        check_template(text)


def test_a_given_template_also_replaces_prograds(tmp_path):
    data = load_data(fill(tmp_path, "a", "b"), "", template="a {}.|the {}.")
    assert data.template == data.prograd_template == "a {}.|the {}."


def test_the_catalogue_has_torchvisions_addresses_and_checksums():
    """Read as text: to import torchvision takes seconds."""
    folder = Path(find_spec("torchvision").origin).parent / "datasets"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    archives = [spec["archive"] for spec in CATALOGUE.values() if "archive" in spec]
    assert len(archives) == 7
    for archive in archives:
        assert archive["url"] in source or archive["url"].rsplit("/", 1)[1] in source
        assert archive.get("md5", "") in source


# ---------------------------------------------------------------- a user's folder

def test_class_folders_are_split_50_20_30_the_same_way_every_time(tmp_path):
    data = load_data(fill(tmp_path, "b", "a"), "")
    assert data.classnames == ["a", "b"] and data.own
    assert [len(data.train), len(data.val), len(data.test)] == [10, 4, 6]
    assert files(data.train)[:5] == ["a/6.jpg", "a/8.jpg", "a/9.jpg", "a/7.jpg", "a/5.jpg"]
    assert files(data.test)[3:] == ["b/7.jpg", "b/1.jpg", "b/3.jpg"]
    assert data.note == ("2 classes (a, b), images: 10 for training, 4 for validation, 6 for "
                         "testing; seeded 50/20/30 split")


@pytest.mark.parametrize("train, test", [("train", "test"), ("TRAIN", "Validation")])
def test_train_and_test_folders_are_ones_own_split(tmp_path, train, test):
    fill(tmp_path / train, "cat", "dog", count=3)
    fill(tmp_path / test, "cat", "dog", count=1)
    data = load_data(tmp_path, "")
    assert data.classnames == ["cat", "dog"] and data.origin == "own train/test folders"
    assert files(data.train)[2:4] == ["cat/2.jpg", "dog/0.jpg"]
    assert [item.path.parts[-3] for item in data.test] == [test, test]


def test_a_class_without_images_is_named_and_refused(tmp_path):
    fill(tmp_path / "train", "cat", "dog", "bird")
    fill(tmp_path / "test", "cat", "dog")
    refuse(tmp_path, "", "no test images", "bird")


def test_two_folders_for_one_part_are_refused(tmp_path):
    for part in ("train", "val", "valid"):
        fill(tmp_path / part, "cat", "dog")
    refuse(tmp_path, "", "of train, val, valid two mean the same")


def test_class_folders_that_have_the_same_sub_folders_are_refused(tmp_path):
    for classname in ("cat", "dog"):
        fill(tmp_path / classname, "train", "test")
    refuse(tmp_path, "", "cat, dog", "test, train")


def test_hidden_files_and_those_that_are_no_images_are_skipped_at_any_depth(tmp_path):
    fill(tmp_path, "cat", "dog", "__MACOSX", ".ipynb_checkpoints")
    fill(tmp_path / "cat", "old", ".ipynb_checkpoints", count=1)
    for name in ("._0.jpg", "notes.txt"):
        write(tmp_path / "cat" / name, "")
    data = load_data(tmp_path, "")
    found = [*data.train, *data.val, *data.test]
    assert data.classnames == ["cat", "dog"] and len(found) == 21
    assert "old/0.jpg" in files(found)


def test_training_images_with_the_content_of_test_images_are_counted(mine, cli):
    make_images(mine / "train/cat", 2, seed=1)                  # the dogs are those of the test
    done = cli("coop", "--epochs", 1, dataset=mine, backbone="tiny_clip")
    assert "mine: training images that are test images as well: 2" in done.out


ROWS = {"train": [["b.jpg", 1, "bee"], ["a.jpg", 0, "ant"]],
        "test": [["c.jpg", 0, "ant"], ["d.jpg", 1, "bee"]]}


@pytest.mark.parametrize("place", ["", "images"])
def test_a_split_file_in_a_folder_is_used(tmp_path, place):
    write(tmp_path / "split_mine.json", ROWS)
    fill(tmp_path, "c", "d")
    for name in "ab":
        write(tmp_path / place / f"{name}.jpg", "")
    data = load_data(tmp_path, "")
    assert data.classnames == ["ant", "bee"] and data.origin == "your own split"
    assert [item.path for item in data.train] == [tmp_path / place / "b.jpg",
                                                  tmp_path / place / "a.jpg"]


def test_classnames_txt_renames_class_folders_and_equal_names_stay_two_classes(tmp_path):
    fill(tmp_path, "001.Crane", "002.crane", "003")
    write(tmp_path / "classnames.txt", "001.Crane crane\n002.crane crane\n")
    data = load_data(tmp_path, "")
    assert data.classnames == ["crane", "crane", "003"]
    assert {item.label for item in data.test} == {0, 1, 2}
    write(tmp_path / "classnames.txt", "004 heron\n")
    refuse(tmp_path, "", "there is no class folder 004")
    write(tmp_path / "classnames.txt", "003 crane\n\n003 again\n")
    refuse(tmp_path, "", "'003 again' is not a new folder")


# ---------------------------------------------------------------- the papers' layouts

def dtd(root, split):
    """DTD with this split file, which begins with a byte order mark."""
    fill(root / "dtd/images", "a", "b", count=4)
    write(root / CATALOGUE["dtd"]["split"], "\ufeff" + json.dumps(split))
    return root


def test_a_split_file_keeps_its_order_and_may_have_no_val(tmp_path):
    data = load_data("dtd", dtd(tmp_path, ROWS))
    assert [(item.path.name, item.label) for item in data.train] == [("b.jpg", 1), ("a.jpg", 0)]
    assert data.classnames == ["ant", "bee"] and not data.val and not data.own
    assert (data.template, data.prograd_template) == ("{} texture.", "a texture of {}.")


def test_other_counts_than_the_published_ones_are_ones_own_split(tmp_path, monkeypatch):
    data = load_data("dtd", dtd(tmp_path, ROWS))
    assert data.origin == "your own split" and "[2, 0, 2] images" in data.note
    monkeypatch.setitem(CATALOGUE["dtd"], "counts", [2, 0, 2])
    data = load_data("dtd", tmp_path)
    assert data.origin == "published split" and not data.note


@pytest.mark.parametrize("row, words", [
    (["e.jpg", 1, "wasp"], "label 1 stands for 'bee' and 'wasp'"),
    (["e.jpg", 3, "wasp"], "labels are not 0, 1, 2"),
    (["e.jpg", 1], "not a split file")])
def test_a_split_file_of_another_form_is_refused(tmp_path, row, words):
    split = {**ROWS, "test": [*ROWS["test"], row]}
    refuse("dtd", dtd(tmp_path, split), "split_zhou_DescribableTextures.json", words)


def imagenet(root, name, classes, names):
    """One of the ImageNets with these class folders, and a classnames.txt of these lines."""
    write(root / CATALOGUE[name]["names"], "\n".join(names))
    for part in CATALOGUE[name]["parts"].values():
        fill(root / CATALOGUE[name]["images"] / part, *classes, count=1)
    return root


FOUR = ["n3 tench", "n1 goldfish", "n4 great white shark", "n2 tiger shark"]


def test_imagenet_is_read_in_the_order_of_its_class_names(tmp_path):
    data = load_data("imagenet", imagenet(tmp_path, "imagenet", ["n1", "n2", "n3", "n4"], FOUR))
    assert data.classnames == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert files(data.train) == files(data.test) == ["n3/0.jpg", "n1/0.jpg", "n4/0.jpg", "n2/0.jpg"]


def test_imagenet_a_has_200_of_the_1000_classes(tmp_path):
    names = [f"n{number} class {number}" for number in range(1000)]
    folders = [f"n{5 * number}" for number in range(200)]
    data = load_data("imagenet_a", imagenet(tmp_path, "imagenet_a", folders, names))
    assert data.classnames[:2] == ["class 0", "class 5"] and data.test[-1].label == 199
    (tmp_path / CATALOGUE["imagenet_a"]["images"] / "n5").rename(tmp_path / "gone")
    refuse("imagenet_a", tmp_path, "199 of 200 class folders")


def test_imagenetv2s_folders_are_the_numbers_of_lines(tmp_path):
    data = load_data("imagenetv2", imagenet(tmp_path, "imagenetv2", "0123", FOUR))
    assert data.test[2].path.parent.name == "2" and data.classnames[2] == "great white shark"
    refuse("imagenetv2", imagenet(tmp_path, "imagenetv2", "0123", FOUR[:3]), "3 lines", "4 folders")


def test_aircraft_are_read_from_their_own_lists(tmp_path):
    place = tmp_path / "fgvc_aircraft"
    write(place / "images/1.jpg", "")
    write(place / "variants.txt", "707-320\nA 300\n")
    for part in ("train", "val", "test"):
        write(place / f"images_variant_{part}.txt", "1 A 300\n2 707-320\n")
    data = load_data("fgvc_aircraft", tmp_path)
    assert data.classnames == ["707-320", "A 300"] and data.train[0].label == 1


def test_a_data_root_that_cannot_be_written_is_named(tmp_path):
    write(tmp_path / "file", "")
    refuse("shapes", tmp_path / "file/root", "file/root", "--data-root DIR")
