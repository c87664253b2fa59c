"""Data sets: names, layouts, splits, and what is refused because it would give wrong numbers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from data import load
from data.errors import Problem
from data.load import CATALOGUE, check_template, dataset_names, load_data


def write(file, content):
    """Write a text or JSON file, with its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def fill(folder, *classes, count=10):
    """Make class folders, each with `count` files that look like images and differ."""
    for classname in classes:
        for number in range(count):
            write(folder / classname / f"{number}.jpg", ascii((str(folder), classname, number)))
    return folder


def refuse(name, root, *words, **given):
    """Loading the data set ends in a Problem with all of these words."""
    with pytest.raises(Problem) as problem:
        load_data(name, root, **given)
    assert all(word in str(problem.value) for word in words), problem.value


def files(items):
    """The files of items, as CLASS/FILE."""
    return ["/".join(item.path.parts[-2:]) for item in items]


# ---------------------------------------------------------------- names

def test_suites_and_names_are_separated_by_commas():
    assert dataset_names("eurosat, shapes") == ["eurosat", "shapes"]
    assert len(dataset_names("embedded,papers")) == 22
    assert dataset_names("papers")[-1] == "imagenet"


def test_a_folder_is_one_data_set_however_its_path_is_written(tmp_path, monkeypatch):
    fill(tmp_path / "birds", "a", "b")
    monkeypatch.chdir(tmp_path)
    for way in ("birds", "./birds/", "birds/../birds", str(tmp_path / "birds")):
        assert dataset_names(way) == [str(tmp_path / "birds")] == [load_data(way, ".").name]


def test_a_folder_may_have_a_comma_in_its_path(tmp_path):
    folder = fill(tmp_path / "red, green", "a", "b")
    assert dataset_names(str(folder)) == [str(folder)]


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    for text in ("eurosta", "shapes,eurosta"):
        with pytest.raises(Problem, match="'eurosta': did you mean eurosat"):
            dataset_names(text)


def test_a_data_set_that_is_named_twice_is_refused():
    with pytest.raises(Problem, match="names shapes twice"):
        dataset_names("embedded,shapes")


@pytest.mark.parametrize("text", ["a photo", "{} or {}", "a {0}", "a {}.|a photo", "{{}}"])
def test_every_prompt_of_a_template_needs_one_place_for_the_name(text):
    with pytest.raises(Problem, match="needs one {}"):
        check_template(text)


def test_a_given_template_also_replaces_prograds(tmp_path):
    fill(tmp_path, "a", "b")
    data = load_data(tmp_path, "", template="a {}.|the {}.")
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


def test_data_sets_are_listed_without_torch_download_or_drawing(tmp_path):
    fill(tmp_path / "dtd/images", "dotted")
    code = """if True:
        import sys
        from data import load
        load.list_data(sys.argv[1])
        assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(load.__file__).parent.parent)
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert not done.returncode and os.listdir(tmp_path) == ["dtd"], done.stderr
    assert "drawn on first use" in rows["shapes"] and "found" in rows["dtd"]
    assert "downloaded on first use" in rows["eurosat"] and "not there" in rows["sun397"]


# ---------------------------------------------------------------- a user's folder

def test_class_folders_are_split_50_20_30_the_same_way_every_time(tmp_path):
    data = load_data(fill(tmp_path, "b", "a"), "")
    assert data.classnames == ["a", "b"] and data.own and data.origin == "seeded 50/20/30 split"
    assert [len(data.train), len(data.val), len(data.test)] == [10, 4, 6]
    assert files(data.train)[:5] == ["a/6.jpg", "a/8.jpg", "a/9.jpg", "a/7.jpg", "a/5.jpg"]
    assert files(data.test)[3:] == ["b/7.jpg", "b/1.jpg", "b/3.jpg"]


def test_what_was_found_is_said(tmp_path):
    data = load_data(fill(tmp_path, *"fedcba", count=4), "")
    assert data.note == ("6 classes (a, b, c, d and 2 more), images: 12 for training, "
                         "6 for testing; seeded 50/20/30 split")


@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Train", "TEST"), ("train", "val"), ("train", "valid"),
    ("TRAIN", "Validation")])
def test_train_and_test_folders_are_ones_own_split(tmp_path, train, test):
    fill(tmp_path / train, "cat", "dog", count=3)
    fill(tmp_path / test, "cat", "dog", count=1)
    data = load_data(tmp_path, "")
    assert data.classnames == ["cat", "dog"] and data.origin == "own train/test folders"
    assert files(data.train)[2:4] == ["cat/2.jpg", "dog/0.jpg"]
    assert [item.path.parts[-3] for item in data.test] == [test, test]


def test_a_class_without_images_is_named_and_refused(tmp_path):
    fill(tmp_path / "folders", "cat", "dog")
    (tmp_path / "folders/bird").mkdir()
    refuse(tmp_path / "folders", "", "no train images", "bird")
    fill(tmp_path / "parts/train", "cat", "dog", "bird")
    fill(tmp_path / "parts/test", "cat", "dog")
    refuse(tmp_path / "parts", "", "no test images", "bird")
    fill(tmp_path / "new/train", "cat", "dog")
    fill(tmp_path / "new/test", "cat", "dog", "bird")
    refuse(tmp_path / "new", "", "no train images", "bird")


def test_class_folders_that_have_the_same_sub_folders_are_refused(tmp_path):
    for classname in ("cat", "dog"):
        fill(tmp_path / classname, "train", "test")
    refuse(tmp_path, "", "cat, dog", "test, train")


def test_hidden_folders_are_skipped_at_any_depth(tmp_path):
    fill(tmp_path, "cat", "dog", "__MACOSX", ".ipynb_checkpoints")
    fill(tmp_path / "cat", "old", ".ipynb_checkpoints", "__MACOSX", count=1)
    write(tmp_path / "cat/._0.jpg", "of macOS")
    data = load_data(tmp_path, "")
    found = [*data.train, *data.val, *data.test]
    assert data.classnames == ["cat", "dog"] and len(found) == 21
    assert "old/0.jpg" in files(found)


def test_what_no_reader_reads_is_no_image(tmp_path):
    fill(tmp_path, "cat", "dog", count=4)
    for ending in ("pdf", "h5", "eps", "txt", "mpg"):
        write(tmp_path / f"cat/0.{ending}", "no image")
    data = load_data(tmp_path, "")
    assert len([*data.train, *data.val, *data.test]) == 8


def test_pillow_reads_the_formats_of_all_endings():
    formats = Image.registered_extensions()
    assert all(formats[ending] in {*Image.OPEN, "MPO"} for ending in load.ENDINGS)


def test_test_images_with_the_content_of_training_images_are_counted(tmp_path):
    fill(tmp_path / "train", "cat", "dog", count=3)
    fill(tmp_path / "test", "cat", "dog", count=3)
    copied = (tmp_path / "train/cat/0.jpg").read_text()
    for place in ("test/cat/7.jpg", "test/dog/8.jpg"):
        write(tmp_path / place, copied)
    assert load_data(tmp_path, "").note.endswith(
        "2 test images are training images as well (same content)")


def test_a_folder_name_that_is_no_text_is_refused(tmp_path):
    fill(tmp_path, "cat", "dog", os.fsdecode(b"caf\xe9"))
    refuse(tmp_path, "", r"'caf\udce9' is no text")


def test_a_class_without_a_name_is_refused(tmp_path):
    refuse(fill(tmp_path, "cat", "_ _"), "", "a class has no name ('_ _')")


ROWS = {"train": [["b.jpg", 1, "bee"], ["a.jpg", 0, "ant"]],
        "test": [["c.jpg", 0, "ant"], ["d.jpg", 1, "bee"]]}


@pytest.mark.parametrize("place", ["", "images"])
def test_a_split_file_in_a_folder_is_used(tmp_path, place):
    write(tmp_path / "split_mine.json", ROWS)
    for name in "abcd":
        write(tmp_path / place / f"{name}.jpg", name)
    data = load_data(tmp_path, "")
    assert data.classnames == ["ant", "bee"] and data.origin == "your own split"
    assert [item.path for item in data.train] == [tmp_path / place / "b.jpg",
                                                  tmp_path / place / "a.jpg"]


def test_two_split_files_in_a_folder_are_refused(tmp_path):
    write(tmp_path / "split_1.json", ROWS)
    write(tmp_path / "split_2.json", ROWS)
    refuse(tmp_path, "", "split_1.json, split_2.json")


def test_classnames_txt_renames_class_folders_and_equal_names_stay_two_classes(tmp_path):
    fill(tmp_path, "001.Crane", "002.crane", "003")
    write(tmp_path / "classnames.txt", "001.Crane crane\n002.crane crane\n")
    data = load_data(tmp_path, "")
    assert data.classnames == ["crane", "crane", "003"]
    assert {item.label for item in data.test} == {0, 1, 2}
    write(tmp_path / "classnames.txt", "004 heron\n")
    refuse(tmp_path, "", "there is no class folder 004")


def test_unreadable_images_are_left_out_and_said(tmp_path):
    fill(tmp_path / "train", "cat", "dog", count=1)
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "1.png")
    data = load_data(tmp_path, "", skip_unreadable=True)
    assert files(data.train) == ["cat/1.png", "dog/1.png"]
    assert f"2 unreadable images left out, first {tmp_path}/train/cat/0.jpg" in data.note
    write(tmp_path / "test/dog/1.png", "broken")
    refuse(tmp_path, "", "no test images: dog", skip_unreadable=True)


# ---------------------------------------------------------------- the papers' layouts

def dtd(root, split, bom=""):
    """DTD with this split file."""
    fill(root / "dtd/images", "a", "b", count=4)
    (root / CATALOGUE["dtd"]["split"]).write_text(bom + json.dumps(split), encoding="utf-8")
    return root


def test_a_split_file_keeps_its_order_and_may_have_a_bom_and_no_val(tmp_path):
    data = load_data("dtd", dtd(tmp_path, ROWS, bom="\ufeff"))
    assert [(item.path.name, item.label, item.classname) for item in data.train] == [
        ("b.jpg", 1, "bee"), ("a.jpg", 0, "ant")]
    assert not data.val and not data.own
    assert (data.template, data.prograd_template) == ("{} texture.", "a texture of {}.")


def test_other_counts_than_the_published_ones_are_ones_own_split(tmp_path, monkeypatch):
    data = load_data("dtd", dtd(tmp_path, ROWS))
    assert data.origin == "your own split" and "[2, 0, 2] images" in data.note
    monkeypatch.setitem(CATALOGUE["dtd"], "counts", [2, 0, 2])
    data = load_data("dtd", tmp_path)
    assert data.origin == "published split" and not data.note


@pytest.mark.parametrize("part, row, word", [
    ("train", ["./a.jpg", 1, "bee"], "./a.jpg has two labels"),
    ("test", ["e.jpg", 1, "wasp"], "label 1 stands for 'bee' and 'wasp'"),
    ("test", ["e.jpg", 3, "wasp"], "labels are not 0, 1, 2"),
    ("test", ["e.jpg", "1", "bee"], "not a split file"),
    ("test", ["e.jpg", 1], "not a split file"),
    ("val", None, "not a split file")])
def test_a_split_file_of_another_form_is_refused(tmp_path, part, row, word):
    refuse("dtd", dtd(tmp_path, {**ROWS, part: [*ROWS.get(part, []), row]}),
           "split_zhou_DescribableTextures.json", word)


def test_a_class_of_a_split_file_without_test_images_is_refused(tmp_path):
    split = {**ROWS, "train": [*ROWS["train"], ["e.jpg", 2, "wasp"]]}
    refuse("dtd", dtd(tmp_path, split), "no test images: wasp")


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


@pytest.mark.parametrize("name", ["imagenet", "imagenet_sketch", "imagenet_r"])
def test_an_imagenet_that_is_half_unpacked_is_refused(tmp_path, name):
    refuse(name, imagenet(tmp_path, name, ["n1", "n3"], FOUR), "great white shark, tiger shark")


def test_imagenet_a_has_200_of_the_1000_classes(tmp_path):
    names = [f"n{number} class {number}" for number in range(1000)]
    folders = [f"n{5 * number}" for number in range(200)]
    data = load_data("imagenet_a", imagenet(tmp_path, "imagenet_a", folders, names))
    assert data.classnames[:2] == ["class 0", "class 5"] and data.test[-1].label == 199
    (tmp_path / CATALOGUE["imagenet_a"]["images"] / "n5").rename(tmp_path / "gone")
    refuse("imagenet_a", tmp_path, "199 of 200 class folders")


def test_imagenetv2s_folders_are_the_numbers_of_lines(tmp_path):
    data = load_data("imagenetv2", imagenet(tmp_path, "imagenetv2", "0123", FOUR))
    assert (data.test[2].path.parent.name, data.test[2].classname) == ("2", "great white shark")
    refuse("imagenetv2", imagenet(tmp_path, "imagenetv2", "0123", FOUR[:3]), "3 lines", "4 folders")


def test_classnames_txt_may_have_tabs_and_a_bom(tmp_path):
    names = ["\ufeffn3\ttench", "", "  n1   goldfish  "]
    data = load_data("imagenet", imagenet(tmp_path, "imagenet", ["n1", "n3"], names))
    assert data.classnames == ["tench", "goldfish"]


@pytest.mark.parametrize("line", ["n1", "n3 again"])
def test_a_line_of_classnames_txt_that_is_no_class_is_refused_by_its_number(tmp_path, line):
    names = ["n3 tench", "", line, "n4 great white shark"]
    refuse("imagenet", imagenet(tmp_path, "imagenet", ["n1"], names), f"line 3: {line!r}")


def test_aircraft_are_read_from_their_own_lists(tmp_path):
    place = tmp_path / "fgvc_aircraft"
    write(place / "images/1.jpg", "")
    write(place / "variants.txt", "707-320\nA 300\n")
    for part in ("train", "val", "test"):
        write(place / f"images_variant_{part}.txt", "1 A 300\n2 707-320\n")
    data = load_data("fgvc_aircraft", tmp_path)
    assert data.classnames == ["707-320", "A 300"] and data.train[0].label == 1
    write(place / "images_variant_val.txt", "1 A 300\n\n2 747\n")
    refuse("fgvc_aircraft", tmp_path, "line 3: '2 747'")


def test_a_missing_data_set_names_its_files_and_ways_out(tmp_path):
    refuse("imagenet", tmp_path, "imagenet/images", "imagenet/classnames.txt", "--data-root",
           "`python prograd.py` needs no download")


def test_an_embedded_data_set_is_drawn_on_first_use(tmp_path, monkeypatch):
    def build(root, name):
        write(root / name / f"split_{name}.json", ROWS)

    monkeypatch.setattr(load.sets, "build", build)
    data = load_data("shapes", tmp_path)
    assert data.origin == "embedded" and not data.own
    assert data.train[0].path == tmp_path / "shapes/images/b.jpg"


def test_a_data_root_that_cannot_be_written_is_named(tmp_path):
    write(tmp_path / "file", "")
    refuse("shapes", tmp_path / "file/root", "file/root", "--data-root DIR")
