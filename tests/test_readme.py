"""The README's commands and patches work on the scripts as they are."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
METHODS = ["coop.py", "prograd.py", "mvp_mi.py", "restore.py"]
PATCHES = re.findall(r"```diff\n(--- a/(\S+)\n.*?)```", README, re.S)


def shell_lines():
    """The lines of the README's shell commands; a line that goes on in the next is one."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.sub(r";\s*done.*", "", line).split("&&")


def commands():
    """[SCRIPT, FLAG, ...] of every run of a script that the README asks for, loops unrolled."""
    variables, found = {"$set": ["shapes"]}, []
    for line in shell_lines():
        if assigned := re.match(r'\s*(\w+)="(.*)"$', line):
            variables["$" + assigned[1]] = [assigned[2]]
        for name, values in re.findall(r"for (\w+) in (.*?); do", line):
            if "$" not in values:
                variables["$" + name] = shlex.split(values)
        lines = [line]
        for name, values in variables.items():
            lines = [some.replace(name, value) for some in lines for value in values]
        for words in map(lambda text: shlex.split(text, comments=True), dict.fromkeys(lines)):
            start = [k for k, word in enumerate(words) if word in ("python", "!python")]
            argv = words[start[0] + 1:] if start else [""]
            if argv and argv[0] in [*METHODS, "common.py"]:
                found.append(argv)
    return found


def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("path/to/images").mkdir(parents=True)
    called = []

    def understand(script, parser, argv=None):
        called.append(parser.parse_args(argv))
        return []

    monkeypatch.setattr(common, "runs", understand)
    methods = [argv for argv in commands() if argv[0] != "common.py"]
    for argv in methods:
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(Path(argv[0]).stem).main()
    assert len(called) == len(methods) >= 20


@pytest.mark.parametrize("patch, name", PATCHES, ids=[name for _, name in PATCHES])
def test_a_patch_fits_and_runs(patch, name, cli, tmp_path, monkeypatch):
    original = HERE / (name if name in METHODS else "coop.py")
    (tmp_path / name).write_text(original.read_text())
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, check=True)
    assert (tmp_path / name).read_text() != original.read_text()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    done = cli(Path(name).stem, "--epochs", 2, "--views", 1, "--shots", 1)
    assert done.status == 0 and done.records[0]["method"] == Path(name).stem in done.out, done.err
    assert Path(sys.modules[Path(name).stem].__file__).parent == tmp_path


def test_the_python_example_runs(root, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(import .*?)```", README, re.S)
    small = f'"16", "--data-root", "{root}", "--epochs", "2"'
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"16"', small), {})
    accuracy, similarities = capsys.readouterr().out.split("\n", 1)
    assert 0 <= float(accuracy) <= 100 and "tensor" in similarities
    assert not (tmp_path / "runs").exists()


def test_the_patches_are_these():
    assert [name for _, name in PATCHES] == ["prograd.py", "kgcoop.py"]


def test_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) > 1 and all((HERE / picture).is_file() for picture in pictures)
