"""Runs that are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import common, coop
import open_clip, torchvision
from data import world
world.PER_CLASS.update(train=20, val=2, test=8)
rng, stages = random.Random(0), []
for attempt in range(6):  # a fork each: nothing is imported anew, only the disk is shared
    child = os.fork()
    if child == 0:
        with common.one_line_errors():
            coop.main()
        os._exit(0)
    time.sleep(rng.uniform(0.05, 1.2))
    os.kill(child, signal.SIGKILL)
    stages.append(os.waitpid(child, 0)[1])
print("killed:", sum(status == signal.SIGKILL for status in stages))
with common.one_line_errors():
    coop.main()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a sweep printed and recorded that was killed up to six times, then left alone."""
    folder = tmp_path_factory.mktemp("killed")
    flags = ["--epochs", "40", "--views", "2", "--shots", "1,2", "--out", folder / "r.jsonl",
             "--cache", folder / "cache", "--data-root", folder / "root"]
    done = subprocess.run([sys.executable, "-c", KILLER, HERE, *flags], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout, (folder / "r.jsonl").read_text().splitlines()


def test_it_was_killed_while_it_worked(killed):
    times = int(killed[0].split("killed: ")[1].split()[0])
    assert times >= 3  # later tries may have nothing left to do


def test_every_line_is_whole_and_every_run_recorded_once(killed):
    assert [json.loads(line)["shots"] for line in killed[1]] == [1, 2]


def test_it_comes_to_what_an_undisturbed_one_comes_to(cli, killed):
    undisturbed = cli("coop", "--epochs", 40, "--views", 2, "--shots", "1,2").records
    for a, b in zip(map(json.loads, killed[1]), undisturbed):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # one thread and two
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.6)
