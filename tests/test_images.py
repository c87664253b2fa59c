"""From picture files to features: what is read, and a cache in which nothing is computed twice."""

import copy
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import made_up_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from data import images
from data.files import Item

HERE = Path(__file__).parent.parent


def items_of(paths):
    return [Item(str(path), 0, "") for path in paths]


def pieces(cache):
    """The cache's files of features."""
    digests = images.digest("contents of pictures").hex()
    return [file for file in cache.glob("*/*.safetensors") if file.parent.name != digests]


@pytest.fixture
def encoded(tiny, monkeypatch):
    """encode_images of the tiny CLIP, and how many pictures it encoded, each view counted."""
    def run(items, cache, views=None):
        count, original = [], images.Pictures.__getitem__

        def counted(pictures, i):
            count.append(len(pictures.views[i]))
            return original(pictures, i)

        with monkeypatch.context() as patch:
            patch.setattr(images.Pictures, "__getitem__", counted)
            return common.encode_images(tiny, items, cache, views), sum(count)

    return run


# ---------------------------------------------------------------- features

def test_image_features_are_clips_own(tiny, tmp_path):
    paths = made_up_pictures(tmp_path / "a", 3)
    pixels = [tiny.preprocess(Image.open(path))[None] for path in paths]
    expected = [tiny.model.encode_image(x, normalize=True)[0] for x in pixels]
    found = common.encode_images(tiny, items_of(paths), None)
    assert (found - torch.stack(expected)).abs().max() < 1e-5


def test_features_are_the_same_to_the_bit_in_any_place_and_company(encoded, tmp_path):
    items = items_of(made_up_pictures(tmp_path / "a", 40))
    whole, _ = encoded(items, tmp_path / "whole")
    for rows in ([7], [39, 0, 7], list(range(5, 30)), random.Random(0).sample(range(40), 40)):
        some = [items[row] for row in rows]
        assert torch.equal(encoded(some, None)[0], whole[rows])
        assert torch.equal(encoded(some, tmp_path / "parts")[0], whole[rows])


def test_views_do_not_depend_on_the_place_or_company_of_a_picture(encoded, tmp_path):
    here, there = (made_up_pictures(tmp_path / place / "a", 3) for place in ("here", "there"))
    both, _ = encoded(items_of(here), None, [0, 1])
    one, _ = encoded(items_of(there[2:]), None, [1])
    assert torch.equal(both[2, 1], one[0, 0])
    assert not torch.allclose(both[:, 0], both[:, 1], atol=1e-3)


def test_a_picture_may_be_listed_twice(encoded, tmp_path):
    a, b = items_of(made_up_pictures(tmp_path / "a", 2))
    expected = encoded([a, b], None)[0]
    for cache in (None, tmp_path / "cache"):
        assert torch.equal(encoded([a, b, a], cache)[0], expected[[0, 1, 0]])


# ---------------------------------------------------------------- nothing twice

def test_what_is_in_the_cache_is_not_encoded_again(encoded, tmp_path):
    items, cache = items_of(made_up_pictures(tmp_path / "a", 6)), tmp_path / "cache"
    first, count = encoded(items[:4], cache)
    assert count == 4 and first.shape == (4, 128)
    more, count = encoded(items[::-1], cache)
    assert count == 2 and torch.equal(more[2:], first.flip(0))

    views, count = encoded(items, cache, [0, 1, 2])
    assert count == 18 and views.shape == (6, 3, 128)
    more, count = encoded(items[1:], cache, [2, 3])
    assert count == 5 and torch.equal(more[:, 0], views[1:, 2])


def test_a_picture_is_what_is_in_it_wherever_it_lies(encoded, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first, _ = encoded(items_of(made_up_pictures(tmp_path / "a/x", 3)), cache)
    (tmp_path / "a").rename(tmp_path / "b")
    moved, count = encoded(items_of(sorted((tmp_path / "b/x").iterdir())), cache)
    assert count == 0 and torch.equal(moved, first)

    made_up_pictures(tmp_path / "a/x", 3, seed=1)
    for place in "ab":  # the same relative names, sizes and times
        for path in (tmp_path / place / "x").iterdir():
            path.write_bytes(path.read_bytes().ljust(9000, b"\0"))
            os.utime(path, (1, 1))
    monkeypatch.chdir(tmp_path / "b")
    in_b, _ = encoded(items_of(sorted(Path("x").iterdir())), cache)
    monkeypatch.chdir(tmp_path / "a")
    in_a, _ = encoded(items_of(sorted(Path("x").iterdir())), cache)
    assert torch.equal(in_b, first) and not torch.isclose(in_a, in_b).all(1).any()


def test_a_changed_picture_is_encoded_anew(encoded, tmp_path):
    items, cache = items_of(made_up_pictures(tmp_path / "a", 3)), tmp_path / "cache"
    first, _ = encoded(items, cache)
    made_up_pictures(tmp_path / "a", 1, seed=7)
    changed, count = encoded(items, cache)
    assert count == 1 and not torch.equal(first[0], changed[0])
    assert torch.equal(first[1:], changed[1:])


def test_base_to_new_after_all_classes_encodes_nothing(cli, tmp_path, monkeypatch):
    flags = ["--epochs", 1, "--views", 2, "--shots", "1,2"]
    assert cli("coop", *flags, cache=tmp_path / "cache").status == 0
    monkeypatch.setattr(common, "load_pixels", None)
    assert cli("prograd", *flags, "--base-to-new", cache=tmp_path / "cache").status == 0


def test_the_key_knows_architecture_weights_and_preprocessing(tiny):
    def changed(change):
        visual = copy.deepcopy(tiny.model.visual)
        change(visual)
        return common.image_key(visual, tiny.preprocess)

    def quick_gelu(visual):
        visual.transformer.resblocks[1].mlp.gelu = open_clip.transformer.QuickGELU()

    def more_heads(visual):
        visual.transformer.resblocks[1].attn.num_heads *= 2

    keys = [changed(lambda visual: None), changed(quick_gelu), changed(more_heads),
            changed(lambda visual: setattr(visual, "pool_type", "avg")),
            changed(lambda visual: visual.proj[0, 0].add_(1)),
            common.image_key(tiny.model.visual, tiny.augment)]
    assert len(set(keys)) == len(keys) and changed(lambda visual: None) == keys[0]


# ---------------------------------------------------------------- nothing lost, nothing wrong

DAMAGES = {"cut": lambda b: b[:-5], "flipped": lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
           "empty": lambda b: b"", "zeros": lambda b: b"\0" * len(b),
           "type": lambda b: b.replace(b"F32", b"I32"),
           "shape": lambda b: b.replace(b"[3,128]", b"[128,3]")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_found_and_made_anew(encoded, tmp_path, damage):
    items, cache = items_of(made_up_pictures(tmp_path / "a", 3)), tmp_path / "cache"
    first, _ = encoded(items, cache)
    (file,) = pieces(cache)
    content = file.read_bytes()
    assert DAMAGES[damage](content) != content
    file.write_bytes(DAMAGES[damage](content))
    again, count = encoded(items, cache)
    assert count == 3 and torch.equal(first, again)
    assert [piece.read_bytes() for piece in pieces(cache)] == [content]
    assert encoded(items, cache)[1] == 0


def test_swapped_pieces_or_names_are_not_believed(encoded, tmp_path):
    a, b = (items_of(made_up_pictures(tmp_path / name, 3)) for name in "ab")
    cache = tmp_path / "cache"
    expected = [encoded(items, cache)[0] for items in (a, b)]
    one, other = pieces(cache)
    content = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(content)
    found = [encoded(items, cache) for items in (a, b)]
    assert [count for _, count in found] == [3, 3]
    for file in pieces(cache):
        content = load_file(file)
        save_file({**content, "names": content["names"].flip(0)}, file)
    found += [encoded(items, cache) for items in (a, b)]
    assert all(torch.equal(f, w) for (f, _), w in zip(found, expected * 2))


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import common
from data import images
from data.files import Item

images.SECONDS = 10**9  # pieces are full, however slow the machine is
folder = Path(sys.argv[1])
items = [Item(str(path), 0, "") for path in sorted((folder / "a").iterdir())]


def child(cache, name, most):  # encodes all pictures; kills itself after more than `most` of them
    torch.set_num_threads(1)
    flags = ["--device", "cpu", "--out", str(folder / "unused.jsonl")]
    clip = common.load_clip(common.parse(common.flags("", 1, 1, 1), flags))
    counts = []

    def encode(x):
        counts.append(int(x.flatten(1).any(1).sum()))  # what is all zeros only fills up the batch
        (folder / f"{name}.count").write_text(str(sum(counts)))
        if sum(counts) > most:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip.model.encode_image(x)

    features = common.encode_images(clip, items, folder / cache, None, encode, "counted")
    torch.save(features, folder / f"{name}.features")


def together(cache, **most):  # a child for each name; a fork, so that nothing is imported anew
    children = []
    for name, limit in most.items():
        children.append(os.fork())
        if not children[-1]:
            child(cache, name, limit)
            os._exit(0)
    for process in children:
        os.waitpid(process, 0)


never = 10**9
for k in range(3):
    together("killed", **{f"killed-{k}": 140})
together("killed", last=never)
together("two", two_0=never, two_1=never)
together("three", three_0=20, three_1=never, three_2=never)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Processes have encoded 400 pictures: (how many each of them, the features that they got)."""
    folder = tmp_path_factory.mktemp("processes")
    made_up_pictures(folder / "a", 400, size=16)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return ({file.stem: int(file.read_text()) for file in folder.glob("*.count")},
            {file.stem: torch.load(file) for file in folder.glob("*.features")})


def test_a_killed_encoding_goes_on_from_its_last_piece(processes):
    counts, features = processes
    assert [counts[f"killed-{k}"] for k in range(3)] == [144] * 3  # a batch is 8, a piece 128
    assert counts["last"] == 400 - 3 * 128 and torch.equal(features["last"], features["two_0"])


def test_two_processes_on_a_cold_cache_share_the_work(processes):
    counts, features = processes
    assert counts["two_0"] + counts["two_1"] == 400 and counts["two_0"] and counts["two_1"]
    assert torch.equal(features["two_0"], features["two_1"])


def test_a_process_that_dies_leaves_nothing_locked(processes):
    counts, features = processes
    assert counts["three_0"] == 24 and counts["three_1"] + counts["three_2"] == 400
    assert torch.equal(features["three_1"], features["two_0"])
    assert torch.equal(features["three_2"], features["two_0"])


def test_where_there_are_no_locks_the_work_is_done_all_the_same(encoded, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    items = items_of(made_up_pictures(tmp_path / "a", 3))
    monkeypatch.setattr(images.fcntl, "lockf", no_locks)
    assert encoded(items, tmp_path / "cache")[1] == 3 and encoded(items, tmp_path / "cache")[1] == 0


# ---------------------------------------------------------------- disks

def test_a_disk_that_is_too_small_ends_in_a_line_with_the_file(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SECONDS", 10**9)  # full pieces, which do not fit
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, limit[1]))
    try:
        run = cli("coop", "--epochs", 1, "--views", 1, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert run.status == 2 and len(run.err.splitlines()) == 1
    assert f"cannot write {tmp_path / 'cache'}" in run.err
    assert not list(tmp_path.glob("cache/*/*.part"))


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_points_to_the_flag(cli, tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error), "a temporary file")

    monkeypatch.setattr(images.tempfile, "TemporaryFile", refuse)
    run = cli("coop", "--epochs", 1, "--views", 1, cache=tmp_path / "cache")
    assert run.status == 2
    assert all(word in run.err for word in ("--cache", os.strerror(error), str(tmp_path / "cache")))


def test_a_cache_that_cannot_be_written_but_holds_all_is_enough(encoded, tmp_path, monkeypatch):
    items = items_of(made_up_pictures(tmp_path / "a", 3))
    encoded(items, tmp_path / "cache")
    monkeypatch.setattr(images.tempfile, "TemporaryFile", None)
    monkeypatch.setattr(images.tempfile, "mkstemp", None)
    assert encoded(items, tmp_path / "cache")[1] == 0


def test_a_folder_in_the_place_of_a_piece_is_named(encoded, tmp_path):
    items, cache = items_of(made_up_pictures(tmp_path / "a", 3)), tmp_path / "cache"
    encoded(items, cache)
    (file,) = pieces(cache)
    file.unlink()
    file.mkdir()
    with pytest.raises(common.Problem, match=f"{file}.*[Dd]irectory"):
        encoded(items, cache)


# ---------------------------------------------------------------- odd pictures

def picture(kind, rng):
    """The bytes of a made-up picture of the given kind."""
    out, rgb = io.BytesIO(), Image.frombytes("RGB", (12, 9), rng.randbytes(324)).resize((80, 60))
    if kind == "cmyk":
        rgb.convert("CMYK").save(out, "JPEG")
    elif kind == "palette":
        rgb.convert("P").save(out, "PNG", transparency=3)
    elif kind == "animated":
        rgb.save(out, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    elif kind == "1x1":
        rgb.resize((1, 1)).save(out, "PNG")
    elif kind == "wide":
        rgb.resize((20000, 90)).save(out, "JPEG")
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(out, "JPEG", exif=exif)
    elif kind == "alpha":
        rgb.convert("LA").save(out, "WEBP")
    else:
        rgb.save(out, "JPEG")
    content = out.getvalue()
    if kind == "cut":
        return content[:rng.randrange(len(content) - 40)]
    return rng.randbytes(300) if kind == "noise" else content


KINDS = ["plain", "cmyk", "palette", "animated", "1x1", "wide", "rotated", "alpha", "cut", "noise"]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_are_read_as_pillow_reads_them_or_refused_by_name(tiny, tmp_path, kind):
    rng, count = random.Random(kind), 1 if kind == "wide" else 9
    paths = [tmp_path / f"{k}.jpg" for k in range(count)]
    for path in paths:  # the ending is wrong for half of them, which must not matter
        path.write_bytes(picture(kind, rng))
    if kind in ("cut", "noise"):
        for path in paths:
            with pytest.raises(common.Problem, match=str(path)):
                common.encode_images(tiny, items_of([path]), None)
    else:
        pixels = torch.stack([tiny.preprocess(Image.open(path).convert("RGB")) for path in paths])
        expected = tiny.model.encode_image(pixels, normalize=True)
        found = common.encode_images(tiny, items_of(paths), None)
        assert torch.allclose(found, expected, atol=1e-5)
        assert common.encode_images(tiny, items_of(paths), None, [0]).isfinite().all()


GREY = np.linspace(0, 1, 30 * 40).reshape(30, 40)
RANGES = {"16-bit PNG": ("png", (GREY * 65535).astype(np.uint16)),
          "16-bit TIFF": ("tif", (GREY * 65535).astype(np.uint16)),
          "32-bit TIFF": ("tif", (GREY * 65535).astype(np.int32)),
          "floats to 1": ("tif", GREY.astype(np.float32)),
          "floats to 255": ("tif", (GREY * 255).astype(np.float32))}


@pytest.mark.parametrize("kind", RANGES)
def test_grey_values_of_other_ranges_are_scaled_to_8_bits(tmp_path, kind):
    ending, values = RANGES[kind]
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    found = np.asarray(images.rgb(Image.open(tmp_path / f"a.{ending}")), dtype=float)
    assert found.shape == (30, 40, 3) and np.abs(found - 255 * GREY[..., None]).max() <= 1


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[0.0, 300.0]], [[0.0, float("nan")]]])
def test_grey_values_of_no_known_range_are_refused_by_name(encoded, tmp_path, values):
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(common.Problem, match="odd.tif .grey values"):
        encoded(items_of([tmp_path / "odd.tif"]), None)


@pytest.mark.parametrize("cache", [None, "cache"])
def test_a_missing_picture_or_a_named_pipe_is_refused_by_name(encoded, tmp_path, cache):
    cache = cache and tmp_path / cache
    with pytest.raises(common.Problem, match="missing picture .*a.jpg"):
        encoded(items_of([tmp_path / "a.jpg"]), cache)
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(common.Problem, match="a.jpg is not a plain file"):
        encoded(items_of([tmp_path / "a.jpg"]), cache)


def test_a_damaged_picture_says_why(encoded, tmp_path):
    (path,) = made_up_pictures(tmp_path / "a", 1)
    content = path.read_bytes()
    for damaged, why in ((content[:-300], "truncated"), (b"", "format"), (b"no picture", "format")):
        path.write_bytes(damaged)
        with pytest.raises(common.Problem, match=f"{path} .*{why}"):
            encoded(items_of([path]), None)
