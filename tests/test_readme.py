"""The commands and patches of the README and the docstrings work on the scripts as they are."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import METHODS, QUICK

import common

HERE = Path(common.__file__).parent
README = (HERE / "README.md").read_text()
PATCHES = re.findall(r"```diff\n(--- a/(\w+)\.py\n.*?)```", README, re.S)


def commands():
    """Yield [METHOD, FLAG, ...] of all runs that the README and the docstrings ask for."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in re.split(r"\n|&&", block.replace("$method", "coop")):
            found = re.search(r"(\w+)\.py( .*|$)", line)
            if found and found[1] in METHODS and line.split()[0] in ("python", "torchrun"):
                yield [found[1], *shlex.split(found[2], comments=True)]
    for method in METHODS:
        doc = importlib.import_module(method).__doc__
        for flags in re.findall(r"^    (?:python \w+.py|[.]{3}) (--.*?)(?:  .*)?$", doc, re.M):
            yield [method, *shlex.split(flags)]


def test_every_command_is_understood(tmp_path, monkeypatch):
    Path("path/to/images").mkdir(parents=True)
    called = []

    def understand(script, parser, argv=None):
        called.append(parser.parse_args(argv))
        return []

    monkeypatch.setattr(common, "runs", understand)
    for argv in commands():
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(argv[0]).main()
    assert len(called) >= 15, called


@pytest.mark.parametrize("patch, name", PATCHES, ids=[name for _, name in PATCHES])
def test_a_patch_fits_and_runs(patch, name, cli, tmp_path, monkeypatch):
    original = HERE / f"{name if name in METHODS else 'coop'}.py"
    script = tmp_path / f"{name}.py"
    script.write_text(original.read_text())
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, check=True)
    assert script.read_text() != original.read_text()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    done = cli(name, *QUICK)
    assert done.status == 0 and done.records[0]["method"] == name, done.err
    assert Path(sys.modules[name].__file__) == script


def test_the_python_example_runs(root, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(import .*?)```", README, re.S)
    small = f'"16", "--data-root", "{root}", "--epochs", "2"'
    exec(code.replace('"16"', small), {})
    *_, recorded, name = capsys.readouterr().out.splitlines()
    assert "recorded in" in recorded and "with a" in name


def test_patches_and_pictures_are_there():
    assert [name for _, name in PATCHES] == ["prograd", "kgcoop"]
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) > 1 and all((HERE / picture).is_file() for picture in pictures)
