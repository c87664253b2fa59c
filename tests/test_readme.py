"""The README's commands and edits work on the scripts as they are."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
EDITS = re.findall(r"```diff\n--- (\S+)\n\+\+\+ (\S+)\n(.*?)```", README, re.S)


def commands():
    """Every `python METHOD.py ...` of the README, with its shell variables filled in."""
    variables, found = {}, []
    for line in re.findall(r"```sh\n(.*?)```", README, re.S):
        for part in re.split(r"\n|&&", line):
            if match := re.match(r'\s*(\w+)="(.*)"$', part):
                variables["$" + match[1]] = match[2]
            for method in ("coop", "prograd", "mvp_mi", "restore") if "$method" in part else ("",):
                command = part.replace("$method", method)
                for name, value in variables.items():
                    command = command.replace(name, value)
                words = shlex.split(command, comments=True)
                if words[:1] == ["python"] and (HERE / words[1]).exists() and "/" not in words[1]:
                    found.append(words[1:])
    return found


def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("path/to/pictures", "data/shapes/images"):
        Path(folder).mkdir(parents=True)
    called = []
    monkeypatch.setattr(common, "runs", lambda script, args, **_: called.append(args) or [])
    methods = [argv for argv in commands() if argv[0] != "common.py"]
    for argv in methods:
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(Path(argv[0]).stem).main()
    assert len(called) == len(methods) > 20


@pytest.mark.parametrize("old, new, edit", EDITS, ids=[new for _, new, _ in EDITS])
def test_edits_fit_and_run(old, new, edit, root, tmp_path):
    before = source = (HERE / old).read_text()
    for hunk in edit.split("...\n"):
        lines = hunk.splitlines(keepends=True)
        found, wanted = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(found) == 1, found
        source = source.replace(found, wanted)
    assert source != before
    (tmp_path / new).write_text(source)
    command = [sys.executable, tmp_path / new, "--epochs", "2", "--views", "1", "--shots", "1", "--data-root", root, "--cache", root / "cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and Path(new).stem in done.stdout, done.stderr


def test_there_are_edits():
    assert [new for _, new, _ in EDITS] == ["prograd.py", "kgcoop.py"]


def test_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) > 4 and all((HERE / picture).is_file() for picture in pictures)
