"""Runs that are killed, pictures that are damaged."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
from data.files import Item

HERE = Path(__file__).parent.parent
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import common, coop
import open_clip, torchvision
rng, stages = random.Random(0), []
for attempt in range(20):  # a fork per attempt: nothing is imported anew, and nothing but the disk is shared
    child = os.fork()
    if child == 0:
        with common.one_line_errors():
            coop.main()
        os._exit(0)
    time.sleep(rng.uniform(0.05, 1.5))
    os.kill(child, signal.SIGKILL)
    stages.append(os.waitpid(child, 0)[1])
print("killed:", sum(status == signal.SIGKILL for status in stages))
with common.one_line_errors():
    coop.main()
"""


def test_a_run_killed_twenty_times_leaves_nothing_that_changes_the_next(cli, root, tmp_path):
    flags = ["--epochs", "40", "--views", "2", "--shots", "1,2", "--out", tmp_path / "killed.jsonl", "--cache", tmp_path / "cache", "--data-root", tmp_path / "root"]
    small = "from data import world; world.PER_CLASS.update(train=20, val=2, test=8)\n"
    done = subprocess.run([sys.executable, "-c", KILLER.replace("import common, coop\n", "import common, coop\n" + small), HERE, *flags], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert int(done.stdout.split("killed: ")[1].split()[0]) >= 5  # some tries had ended before they were killed
    lines = (tmp_path / "killed.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines[-2:]]
    undisturbed = cli("coop", "--epochs", 40, "--views", 2, "--shots", "1,2").records
    for a, b in zip(last, undisturbed):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["accuracy"] == pytest.approx(b["accuracy"], abs=0.6)  # one thread and two
    assert all(json.loads(line)["shots"] in (1, 2) for line in lines)  # every line is whole


def picture(kind, rng):
    """The bytes of a made-up picture of the given kind."""
    out, rgb = io.BytesIO(), Image.frombytes("RGB", (12, 9), rng.randbytes(324)).resize((80, 60))
    if kind == "cmyk":
        rgb.convert("CMYK").save(out, "JPEG")
    elif kind == "palette":
        rgb.convert("P").save(out, "PNG", transparency=3)
    elif kind == "16-bit":
        Image.frombytes("I;16", (40, 30), rng.randbytes(2400)).save(out, "PNG")
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
    return content[:rng.randrange(len(content) - 40)] if kind == "cut" else rng.randbytes(300) if kind == "noise" else content


@pytest.mark.parametrize("kind", ["plain", "cmyk", "palette", "16-bit", "animated", "1x1", "wide", "rotated", "alpha", "cut", "noise"])
def test_odd_pictures_are_read_as_pillow_and_clip_read_them_or_refused_by_name(tiny, tmp_path, kind):
    rng = random.Random(kind)
    for k in range(1 if kind == "wide" else 9):
        path = tmp_path / f"{k}.jpg"  # the ending is wrong for half of them, which must not matter
        path.write_bytes(picture(kind, rng))
        if kind in ("cut", "noise"):
            with pytest.raises(common.Problem, match=str(path)):
                common.encode_images(tiny, [Item(path, 0, "")], None)
        else:
            expected = tiny.model.encode_image(tiny.preprocess(Image.open(path).convert("RGB"))[None], normalize=True)
            assert torch.allclose(common.encode_images(tiny, [Item(path, 0, "")], None), expected, atol=1e-5)
            assert common.encode_images(tiny, [Item(path, 0, "")], None, [0]).isfinite().all()
