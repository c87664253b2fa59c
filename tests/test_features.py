"""Image files to pixels, the cache of rows of tensors, and files that appear whole."""

import copy
import os
import resource
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.transforms import (
    CenterCrop, Compose, Normalize, PILToTensor, RandomHorizontalFlip, RandomResizedCrop, Resize,
    ToTensor)

from data import features
from data.errors import Problem
from data.features import (
    Store, digest_files, load_pixels, normalize, read_whole, tensor_digest, write_whole)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPE = [Resize(24, interpolation=3), CenterCrop(24)]
CROP = [RandomResizedCrop(24, (0.08, 1), interpolation=3), RandomHorizontalFlip()]
PREPROCESS, AUGMENT = Compose([*SHAPE, PILToTensor()]), Compose([*CROP, PILToTensor()])


@pytest.fixture
def paths(tmp_path):
    """Ten images of noise."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{k}.jpg" for k in range(10)]
    for path in paths:
        noise = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((50, 40)).save(path)
    return paths


def pixels_of(paths, transform=PREPROCESS, views=(0,), **options):
    return torch.cat([*load_pixels(paths, transform, [views] * len(paths), 4, "cpu", **options)])


# ---------------------------------------------------------------- pixels

def test_plain_images_are_torchvisions_to_the_bit(paths):
    reference = Compose([*SHAPE, ToTensor(), Normalize(MEAN, STD)])
    expected = torch.stack([reference(Image.open(path)) for path in paths])
    found = normalize(pixels_of(paths), MEAN, STD)
    assert torch.equal(found, expected) and found.is_contiguous()


def test_views_are_seeded_by_content_and_number(paths):
    reference, expected = Compose([*CROP, ToTensor(), Normalize(MEAN, STD)]), []
    for path in paths:
        for view in (3, 0):
            torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(path.read_bytes())))
            expected.append(reference(Image.open(path)))
    found = normalize(pixels_of(paths, AUGMENT, [3, 0]), MEAN, STD)
    assert torch.equal(found, torch.stack(expected))


def test_a_view_is_the_same_in_any_company(paths):
    whole = pixels_of(paths, AUGMENT, [0, 1, 2]).view(10, 3, 3, 24, 24)
    assert torch.equal(pixels_of(paths[7:8], AUGMENT, [2])[0], whole[7, 2])
    assert not torch.equal(whole[7, 1], whole[7, 2])


def test_batches_are_full_except_for_the_last(paths):
    views = [[0], [1, 2, 3], [4, 5, 6, 7, 8, 9], []]
    batches = list(load_pixels(paths[:4], AUGMENT, views, 4, "cpu"))
    assert [batch.shape for batch in batches] == [(4, 3, 24, 24)] * 2 + [(2, 3, 24, 24)]
    assert all(batch.dtype == torch.uint8 for batch in batches)
    assert list(load_pixels([], AUGMENT, [], 4, "cpu")) == []


def test_worker_processes_change_nothing(paths):
    alone = pixels_of(paths, AUGMENT, range(20))
    assert torch.equal(pixels_of(paths, AUGMENT, range(20), workers=2), alone)


def test_a_problem_in_a_worker_is_the_same_line(paths):
    paths[5].write_bytes(b"")
    lines = []
    for workers in (0, 2):
        with pytest.raises(Problem) as caught:
            pixels_of(paths, workers=workers)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and str(paths[5]) in lines[0] and "\n" not in lines[0]


def test_loading_leaves_the_global_generator_alone(paths):
    before = torch.get_rng_state()
    pixels_of(paths, AUGMENT)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cores, processes, workers", [(8, 3, 2), (2, 4, 1), (64, 1, 16)])
def test_workers_share_the_cores_with_torchrun(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert features.count_workers() == workers


# ---------------------------------------------------------------- unusual images

def test_exif_orientation_is_applied_to_own_images_only(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # turn by 90 degrees to be upright
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg", exif=exif)
    sizes = [features.read_image(tmp_path / "a.jpg", own)[1].size for own in (False, True)]
    assert sizes == [(50, 40), (40, 50)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_own_transparent_images_are_put_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    image.save(tmp_path / "a.png", **options)
    colours = [features.read_image(tmp_path / "a.png", own)[1].getpixel((0, 0))
               for own in (False, True)]
    assert colours == [(0, 0, 0), (255, 255, 255)]


GREY = np.linspace(0, 1, 30 * 40).reshape(30, 40)


@pytest.mark.parametrize("name, values", [
    ("16.png", (GREY * 65535).astype(np.uint16)), ("16.tif", (GREY * 65535).astype(np.uint16)),
    ("32.tif", (GREY * 65535).astype(np.int32)), ("to-1.tif", GREY.astype(np.float32)),
    ("to-255.tif", (GREY * 255).astype(np.float32))])
def test_grey_values_are_scaled_to_8_bits(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(features.read_image(tmp_path / name)[1], dtype=float)
    assert found.shape == (30, 40, 3) and np.abs(found - 255 * GREY[..., None]).max() <= 1


@pytest.mark.parametrize("value", [-1, 300, float("nan")])
def test_grey_values_of_no_known_range_are_a_problem(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], dtype=np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(Problem, match="odd.tif .grey values .*--skip-unreadable"):
        pixels_of([tmp_path / "odd.tif"])


def test_an_image_that_cannot_be_read_is_named_with_the_cause(paths):
    content = paths[0].read_bytes()
    for damaged, why in ((content[:-300], "truncated"), (b"", "format"), (b"no image", "format")):
        paths[0].write_bytes(damaged)
        with pytest.raises(Problem, match=f"{paths[0]} .*{why}.*--skip-unreadable"):
            pixels_of(paths)


@pytest.mark.parametrize("read", [pixels_of, lambda paths: digest_files(paths, None)])
def test_a_missing_image_a_folder_and_a_pipe_are_a_problem(tmp_path, read):
    os.mkdir(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "folder", "pipe"):
        with pytest.raises(Problem, match=f"missing image .*{name}: .*--skip-unreadable"):
            read([tmp_path / name])


# ---------------------------------------------------------------- the cache

NAMES = [(bytes([k]) * 16, k) for k in range(6)]
ROWS = torch.arange(6 * 5, dtype=torch.float32).view(6, 5)


def kept(folder, key="key"):
    """Which of the rows 0 to 5 the cache holds, after a check of their values."""
    found = Store(folder, key).find(NAMES)
    assert all(torch.equal(row, ROWS[view]) for (_, view), row in found.items())
    return sorted(view for _, view in found)


def add(folder, first, last, key="key"):
    with Store(folder, key) as store:
        store.add(NAMES[first:last], ROWS[first:last])


def test_rows_are_found_under_their_names_and_key(tmp_path):
    add(tmp_path, 0, 3)
    add(tmp_path, 2, 5)                                         # another process, another piece
    assert kept(tmp_path) == [0, 1, 2, 3, 4] and kept(tmp_path, "other") == []
    assert [*Store(tmp_path, "key").find(NAMES[3:])] == NAMES[3:5]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(None, 0, 3)
    assert kept(None) == [] and not os.listdir(tmp_path)


def test_an_exception_loses_no_row(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Store(tmp_path, "key") as store:
            store.add(NAMES[:2], ROWS[:2])
            raise KeyboardInterrupt
    assert kept(tmp_path) == [0, 1]


def test_a_killed_process_leaves_its_pieces(tmp_path):
    child = os.fork()
    if not child:
        store = Store(tmp_path, "key", piece=4)
        for k in (0, 2, 4):
            store.add(NAMES[k:k + 2], ROWS[k:k + 2])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert kept(tmp_path) == [0, 1, 2, 3]


def test_a_piece_is_written_after_some_seconds(tmp_path, monkeypatch):
    store = Store(tmp_path, "key")
    store.add(NAMES[:1], ROWS[:1])
    assert kept(tmp_path) == []
    monkeypatch.setattr(features.time, "monotonic", lambda now=store.due: now + 1)
    store.add(NAMES[1:2], ROWS[1:2])
    assert kept(tmp_path) == [0, 1]


DAMAGES = {
    "cut": lambda b: b[:-5],
    "flipped": lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
    "empty": lambda b: b"",
    "type": lambda b: b.replace(b"F32", b"I32"),
    "shape": lambda b: b.replace(b"[2,5]", b"[5,2]"),
    "names": lambda b: b.replace(features.digest(NAMES[1]).encode(), b"0" * 32)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_deleted_and_made_anew(tmp_path, damage):
    add(tmp_path, 0, 2)
    (file,) = tmp_path.glob("*/*.safetensors")
    content = file.read_bytes()
    assert DAMAGES[damage](content) != content
    file.write_bytes(DAMAGES[damage](content))
    assert kept(tmp_path) == [] and not file.exists()
    add(tmp_path, 0, 2)
    assert kept(tmp_path) == [0, 1] and file.read_bytes() == content


def test_a_piece_of_another_folder_is_not_believed(tmp_path):
    add(tmp_path, 0, 2)
    (file,) = tmp_path.glob("*/*.safetensors")
    other = Store(tmp_path, "other").folder
    other.mkdir()
    shutil.copy(file, other)
    assert kept(tmp_path, "other") == [] and kept(tmp_path) == [0, 1]


def test_a_cache_that_is_removed_meanwhile_is_made_again(tmp_path):
    with Store(tmp_path / "cache", "key", piece=2) as store:
        store.add(NAMES[:2], ROWS[:2])
        shutil.rmtree(tmp_path / "cache")
        store.add(NAMES[2:4], ROWS[2:4])
    assert kept(tmp_path / "cache") == [2, 3]


def test_a_cache_that_cannot_be_written_points_to_the_flag(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(Problem, match=f"cannot write {tmp_path}/cache/.*directory.*: --cache DIR"):
        add(tmp_path / "cache", 0, 2)


# ---------------------------------------------------------------- digests

def test_only_changed_files_are_digested_again(paths, tmp_path, monkeypatch):
    first = digest_files([*paths, paths[0]], tmp_path / "cache")
    assert first == digest_files([*paths, paths[0]], None)
    assert len(set(first)) == 10 and {len(content) for content in first} == {16}

    shutil.copy(paths[1], paths[0])
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file.name) or read_bytes(file))
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in paths]
    assert digest_files(names, tmp_path / "cache") == [first[1], *first[1:10]]
    assert read == ["0.jpg"]


def test_a_tensor_digest_covers_names_dtypes_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.bfloat16)
    variants = [{"a": x}, {"b": x}, {"a": x.half()}, {"a": x.view(2, 3)}, {"a": x.flip(0)}, {},
                {"a": x[0]}, {"a": x, "b": x}, {"a": x[:0]}]
    digests = [tensor_digest(tensors) for tensors in variants]
    assert len(set(digests)) == len(digests)
    assert tensor_digest({"b": x, "a": x}) == tensor_digest({"a": x, "b": x})
    assert tensor_digest({"a": x.repeat(2, 1).T[:, 0]}) == digests[0]


def test_an_image_key_covers_architecture_weights_and_more():
    visual = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    others = [copy.deepcopy(visual) for _ in range(4)]
    others[1][1] = torch.nn.SiLU()
    others[2][0].heads = 2
    others[3][0].weight.data[0, 0] += 1
    keys = [features.image_key(other, "fp32") for other in others]
    assert keys[0] == features.image_key(visual, "fp32") != features.image_key(visual, "bf16")
    assert len(set(keys)) == 4


# ---------------------------------------------------------------- files that appear whole

def test_a_file_is_written_with_its_folder_and_metadata(tmp_path):
    write_whole(tmp_path / "new/a.safetensors", {"x": ROWS.T}, {"seed": "1"})
    with safe_open(tmp_path / "new/a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), ROWS.T) and file.metadata() == {"seed": "1"}
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a", {"x": ROWS})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(Problem, match=f"cannot write {tmp_path}/a .*large"):
            write_whole(tmp_path / "a", {"x": torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(tmp_path) == ["a"] and torch.equal(read_whole(tmp_path / "a", "")["x"], ROWS)


def test_a_damaged_file_is_named_with_its_flag(tmp_path):
    write_whole(tmp_path / "a", {"x": ROWS})
    assert torch.equal(read_whole(tmp_path / "a", "--load")["x"], ROWS)
    (tmp_path / "a").write_bytes(b"no tensors")
    with pytest.raises(Problem, match=f"--load {tmp_path}/a: is damaged"):
        read_whole(tmp_path / "a", "--load")
