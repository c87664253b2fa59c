"""Image files to pixels, the cache of rows of tensors, and files that appear whole."""

import itertools
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.transforms import (
    Compose, Normalize, PILToTensor, RandomHorizontalFlip, RandomResizedCrop, ToTensor)

from data import features
from data.errors import Problem
from data.features import (
    Store, digest_files, load_pixels, normalize, read_image, tensor_digest, write_whole)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROP = [RandomResizedCrop(24, (0.08, 1), interpolation=3), RandomHorizontalFlip()]


@pytest.fixture
def paths(tmp_path):
    """Ten images of noise."""
    return make_images(tmp_path / "noise", 10)


def batches_of(paths, views, size=4, workers=0):
    """The batches of pixels of all views of all images."""
    rows, transform = [*itertools.product(paths, views)], Compose([*CROP, PILToTensor()])
    return [*load_pixels(rows, transform, size, "cpu", workers=workers)]


# ---------------------------------------------------------------- pixels

def test_pixels_are_torchvisions_to_the_bit_and_seeded_by_content_and_view(paths):
    reference, expected = Compose([*CROP, ToTensor(), Normalize(MEAN, STD)]), []
    for path in paths:
        for view in (3, 0):
            torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(path.read_bytes())))
            expected.append(reference(Image.open(path)))
    found = normalize(torch.cat(batches_of(paths, [3, 0])), MEAN, STD)
    assert torch.equal(found, torch.stack(expected))


def test_batches_are_full_except_for_the_last_and_workers_change_nothing(paths):
    alone, shared = (batches_of(paths, range(8), 30, workers) for workers in (0, 2))
    assert [batch.shape for batch in shared] == [(30, 3, 24, 24)] * 2 + [(20, 3, 24, 24)]
    assert torch.equal(torch.cat(alone), torch.cat(shared))


def test_loading_leaves_the_global_generator_alone(paths):
    before = torch.get_rng_state()
    batches_of(paths, [0])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- unusual images

@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_with_the_cause(paths, workers):
    for content, cause in ((paths[5].read_bytes()[:-300], "truncated"), (b"no image", "format")):
        paths[5].write_bytes(content)
        with pytest.raises(Problem, match=f"^cannot read image {paths[5]} .*{cause}"):
            batches_of(paths, [0], workers=workers)


def test_own_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # turn by 90 degrees to be upright
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg", exif=exif)
    sizes = [read_image(tmp_path / "a.jpg", own)[1].size for own in (False, True)]
    assert sizes == [(50, 40), (40, 50)]


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_own_transparent_images_are_put_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    image.save(tmp_path / "a.png", **options)
    colours = [read_image(tmp_path / "a.png", own)[1].getpixel((0, 0)) for own in (False, True)]
    assert colours == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_grey_values_of_more_than_8_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((30, 40), dtype)).save(tmp_path / "grey.tif")
    with pytest.raises(Problem, match="grey.tif .*: convert it to 8 bits"):
        read_image(tmp_path / "grey.tif")


# ---------------------------------------------------------------- the cache

ROWS = torch.arange(5 * 4, dtype=torch.float32).view(5, 4)


def fill(folder, *names, key="key"):
    """Ask the cache for some of the rows 0 to 4; return the names of those that it lacked."""
    store = Store(folder, key, names)
    for name in store.missing:
        store.add(ROWS[name:name + 1])
    assert torch.equal(store.rows(), ROWS[list(names)])
    return store.missing


def test_rows_are_kept_under_their_names_and_key(tmp_path):
    assert fill(tmp_path, 2, 0, 2) == [2, 0]
    assert fill(tmp_path, 3, 1, 0) == [3, 1]                    # another process, another piece
    assert fill(tmp_path, 0, 1, 2, 3, 4) == [4]
    assert fill(tmp_path, 0, key="other") == fill(None, 0) == [0]


def test_a_killed_run_has_written_what_it_had_a_few_seconds_ago(tmp_path):
    store = Store(tmp_path, "key", [0, 1, 2])
    store.add(ROWS[:1])
    assert not os.listdir(tmp_path)
    store.due = 0                                               # the seconds are over
    store.add(ROWS[1:2])
    store.add(ROWS[2:])                                         # killed here
    assert fill(tmp_path, 0, 1, 2) == [2]


DAMAGES = {
    "cut": lambda b: b[:-5],
    "flipped": lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
    "names": lambda b: b.replace(features.digest(1).encode(), features.digest(4).encode())}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_made_anew(tmp_path, damage):
    fill(tmp_path, 0, 1)
    (file,) = tmp_path.glob("*/*.safetensors")
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content))
    assert Store(tmp_path, "key", [0, 4]).missing == [0, 4]
    assert fill(tmp_path, 0, 1) == [0, 1] and file.read_bytes() == content


# ---------------------------------------------------------------- digests

def test_only_changed_files_are_digested_again(paths, tmp_path, monkeypatch):
    first = digest_files([*paths, paths[0]], tmp_path / "cache")
    assert first == digest_files([*paths, paths[0]], None) and len(set(first)) == 10

    shutil.copy(paths[1], paths[0])
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file.name) or read_bytes(file))
    assert digest_files(paths, tmp_path / "cache") == [first[1], *first[1:10]]
    assert read == [paths[0].name]


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(Problem, match=f"cannot read image {tmp_path}/gone.jpg .No such file"):
        digest_files([tmp_path / "gone.jpg"], None)


def test_a_tensor_digest_covers_names_dtypes_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.bfloat16)
    variants = [{"a": x}, {"b": x}, {"a": x.half()}, {"a": x.view(2, 3)}, {"a": x.flip(0)}, {}]
    assert len({tensor_digest(tensors) for tensors in variants}) == len(variants)
    assert tensor_digest({"b": x, "a": x}) == tensor_digest({"a": x, "b": x})


# ---------------------------------------------------------------- files that appear whole

def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    write_whole(tmp_path / "new/a", {"x": ROWS.T})
    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(Problem, match=f"cannot write {tmp_path}/new/a .No space left on device"):
        write_whole(tmp_path / "new/a", {"x": ROWS})
    assert os.listdir(tmp_path / "new") == ["a"]
    assert torch.equal(load_file(tmp_path / "new/a")["x"], ROWS.T)
