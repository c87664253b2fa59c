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
