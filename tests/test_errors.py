"""What goes wrong, and what the user then sees: one line, status 2, nothing half-written."""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import made_up_pictures

import common
import coop
from data.errors import Problem, number, regular_file
from data.files import CATALOGUE, parse_split

HERE = Path(__file__).parent.parent


def refused(run, *words):
    assert run.status == 2 and not run.records, run.out
    assert len(run.err.splitlines()) == 1 and "Traceback" not in run.err, run.err
    assert run.err.startswith("coop.py: "), run.err
    assert all(word in run.err for word in words), run.err


# ------------------------- flags

@pytest.mark.parametrize("flags, words", [
    (["--dataset", "eurosta"], ["eurosat"]),
    (["--dataset", "/nowhere/at/all"], ["/nowhere/at/all"]),
    (["--dataset", "stanford_cars"], ["stanford_cars", "data/README.md"]),
    (["--transfer", "shapes_noisy"], ["shapes_noise"]),
    (["--backbone", "ViT-B16"], ["ViT-B-16"]),
    (["--backbone", "local-dir:/nowhere"], ["/nowhere"]),
    (["--backbone", "ViT-B-16", "--pretrained", "opnai"], ["opnai", "openai"]),
    (["--shots", "0"], ["--shots"]),
    (["--shots", "1,x"], ["--shots"]),
    (["--shots", "-4"], ["--shots"]),
    (["--seeds", ""], ["--seeds"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "-1"], ["--lr"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--n-ctx", "76"], ["--n-ctx"]),
    (["--n-ctx", "300"], ["--n-ctx"]),
    (["--epochs", "1.5"], ["--epochs"]),
    (["--views", "-1"], ["--views"]),
    (["--device", "cuda"], ["--device"]),
    (["--position", "top"], ["--position"]),
    (["--shot", "4"], ["--shot"]),
    (["--load", "/nowhere.safetensors"], ["/nowhere"]),
    (["--save", "x", "--seeds", "1,2"], ["{seed}"]),
    (["--save", "{shots}", "--shots", "1,2", "--seeds", "1,2"], ["{seed}"]),
    (["--save", "a{b}"], ["--save"]),
    (["--save", "a{shots.b}"], ["--save"]),
    (["--seeds", "9" * 20], ["--seeds", "below 2147483648"]),
    (["--dataset", ""], ["shapes"]),
    (["--transfer", "scenes,"], ["unknown"]),
    (["--class-specific", "--base-to-new"], ["--class-specific"]),
    (["--ctx-init", "word " * 90], ["word"]),
    (["--lr", "inf"], ["--lr", "a number above 0 that is finite"]),
    (["--epochs", "9" * 30], ["--epochs", "below 2147483648"]),
    (["--views", "9" * 30], ["--views"]),
    (["--epochs", "9" * 5000], ["--epochs"]),
    (["--template", "a photo"], ["--template", "needs one {}"]),
    (["--template", "a {x} of a {}"], ["--template", "no other braces"]),
    (["--template", "{ {}"], ["--template", "no other braces"]),
])
def test_flags(cli, flags, words):
    refused(cli("coop", "--epochs", 1, "--views", 1, *flags), *words)


@pytest.mark.parametrize("parse, text, value", [
    (number(), "1e-3", 0.001),
    (number(), "inf", "wants a number above 0 that is finite"),
    (number(), "nan", "wants a number above 0 that is finite"),
    (number(low_ok=True, high=1), "0", 0.0),
    (number(low_ok=True, high=1), "1", "wants a number of at least 0 and below 1"),
    (number(int, 1, low_ok=True), "1", 1),
    (number(int, 1, low_ok=True), "0", "wants a whole number of at least 1 and below 2147483648"),
    (number(int, 1, 76, low_ok=True), "1000000000", "of at least 1 and below 76"),
])
def test_numbers_have_bounds_that_are_named(parse, text, value):
    if isinstance(value, str):
        with pytest.raises(argparse.ArgumentTypeError, match=value):
            parse(text)
    else:
        assert math.isclose(parse(text), value)


def test_a_text_tower_that_is_not_causal(cli, tmp_path):
    tiny = HERE / "data/tiny_clip"
    config = json.loads((tiny / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").symlink_to(tiny / "open_clip_model.safetensors")
    refused(cli("coop", backbone=f"local-dir:{tmp_path}"), "text tower", "causal")


def test_base_to_new_needs_four_classes(cli, tmp_path):
    for name in "abc":
        made_up_pictures(tmp_path / "mine" / name, 4)
    given = {"dataset": tmp_path / "mine", "backbone": common.TINY_CLIP}
    refused(cli("coop", "--base-to-new", **given), "two classes")


def test_out_that_cannot_be_written(cli, tmp_path):
    refused(cli("coop", out=tmp_path), str(tmp_path))
    (tmp_path / "file").write_text("")
    refused(cli("coop", out=tmp_path / "file/results.jsonl"), "file")


def test_more_shots_than_images_uses_what_there_is(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", 1000)
    assert run.status == 0 and "using the 20" in run.out


# ------------------------- files

@pytest.mark.parametrize("content", [
    "{",
    "[]",
    "\ufeff",
    "[" * 10000,
    '{"train": []}',
    '{"train": [["a", "0", "b"]], "val": [], "test": []}',
    '{"train": [["a", 0]], "val": [], "test": []}',
    '{"train": [["a\\u0000", 0, "b"]], "val": [], "test": []}',
    '{"train": [["a", 0, "\\ud800"]], "val": [], "test": []}',
    '{"train": [], "val": [], "test": [["a", 0, "b"], ["a", 0, "c"]]}',
    '{"train": [], "val": [], "test": [["a", 5, "b"]]}',
])
def test_wrong_split_files(cli, eurosat, content):
    (eurosat / CATALOGUE["eurosat"]["split"]).write_text(content)
    given = {"data_root": eurosat, "backbone": common.TINY_CLIP}
    refused(cli("coop", dataset="eurosat", **given), "eurosat")


def test_a_pipe_or_folder_in_the_place_of_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    assert regular_file(tmp_path / "link") == tmp_path / "link"
    for path, words in [("pipe", "is a pipe or device"), (".", "is a folder"), ("none", "No such"),
                        ("a\0b", "null byte"), ("file/a", "Not a directory")]:
        with pytest.raises(Problem, match=words):
            regular_file(tmp_path / path)
    with pytest.raises(Problem, match="not a file"):
        parse_split(tmp_path / "pipe")


def test_split_that_names_a_missing_picture(cli, eurosat):
    next((eurosat / "eurosat/2750/River").iterdir()).unlink()
    given = {"data_root": eurosat, "backbone": common.TINY_CLIP}
    refused(cli("coop", "--views", 1, dataset="eurosat", **given), "River")


@pytest.mark.parametrize("count", [0, 1])
def test_folders_with_too_few_pictures_or_classes(cli, tmp_path, count):
    given = {"dataset": tmp_path / "mine", "backbone": common.TINY_CLIP}
    made_up_pictures(tmp_path / "mine/a", 4)
    refused(cli("coop", **given), "sub-folder")
    made_up_pictures(tmp_path / "mine/b", count)
    refused(cli("coop", **given), "at least two pictures")


def test_a_picture_that_cannot_be_read_is_named_and_nothing_is_kept(cli, tmp_path):
    for name in "abc":
        bad = made_up_pictures(tmp_path / "mine" / name, 4)[0]
    for damage in (bad.read_bytes()[:100], b"", b"not a picture"):
        bad.write_bytes(damage)
        given = {"dataset": tmp_path / "mine", "cache": tmp_path / "cache"}
        refused(cli("coop", "--views", 1, backbone=common.TINY_CLIP, **given), str(bad))
    assert all(not path.name.startswith(".") for path in (tmp_path / "cache").glob("*"))


def test_loading_what_is_not_a_prompt(cli, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"nonsense")
    refused(cli("coop", load=file), "not a safetensors file")
    assert cli("coop", "--epochs", 1, "--views", 1, save=file).status == 0
    refused(cli("coop", "--n-ctx", 4, load=file), "(16, 80)", "(4, 80)")
    refused(cli("coop", "--position", "front", load=file), "--position end")
    refused(cli("coop", load=tmp_path), str(tmp_path))


def test_ctrl_c(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(coop, "train", interrupted)
    run = cli("coop")
    assert run.status == 130 and run.err == "coop.py: interrupted\n" and not run.records


# ------------------------- the end of a process, from its first import on

def script(code, **given):
    """A process that does what a script of the repository does when data.errors is imported."""
    code = "from data import errors; errors.guard()\n" + code
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **given})


def ended(process):
    """(status, stdout, stderr) without the script's name, which is -c here."""
    out, err = process.communicate()
    return process.returncode, out, err.replace("-c: ", "", 1)


def in_main(code):
    return f"with errors.one_line_errors():\n    {code}"


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_ctrl_c_during_the_imports_of_a_script(seconds, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "coop.py", "--data-root", "root"],
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "coop.py: interrupted\n" and process.returncode == 130


def test_errors_imports_nothing_that_takes_time():
    heavy = "import sys; print({'torch', 'numpy', 'PIL', 'open_clip'} & set(sys.modules))"
    assert ended(script(heavy)) == (0, "set()\n", "")


@pytest.mark.parametrize("code, status, line", [
    ("raise errors.Problem('a\\x1b[1m\\nb\\0')", 2, "a\\x1b[1m b\\x00"),
    ("raise KeyboardInterrupt", 130, "interrupted"),
    ("raise MemoryError", 2, "out of memory; a smaller"),
    ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", 2, "out of memory; a"),
    ("raise type('OutOfMemoryError', (RuntimeError,), {})", 2, "out of GPU memory; a smaller"),
    ("raise OSError(28, 'No space left on device', 'a.bin')", 2, "a.bin: No space left on device"),
    ("f = lambda: f(); f()", 2, "RecursionError in <string>, line 3: maximum recursion depth"),
    ("10.0 ** 999", 2, "OverflowError in <string>, line 3: "),
    ("f'{1:>9999999999999}'", 2, "out of memory; a smaller"),
])
def test_how_a_run_ends(code, status, line):
    for process in (script(in_main(code)), script("\n" + code)):  # in main(), and before it
        got, out, err = ended(process)
        assert (got, out) == (status, "") and err.startswith(line) and len(err.splitlines()) == 1


def test_a_mistake_in_the_code_keeps_its_traceback():
    status, _, err = ended(script(in_main("1 / 0")))
    assert status == 1 and "Traceback" in err and "ZeroDivisionError" in err


def test_libraries_log_and_warn_nothing():
    code = "import logging, warnings; logging.warning('No pretrained weights loaded')"
    assert ended(script(code)) == (0, "", "")


def test_a_terminal_that_knows_ascii_only():
    process = script("print('caf\u00e9')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended(process) == (0, "caf\\xe9\n", "")


@pytest.mark.parametrize("amount", [1, 100000])
def test_a_closed_pipe_is_no_error(amount):
    reading, writing = os.pipe()
    os.close(reading)
    process = script(in_main(f"print('line ' * {amount})"), stdout=writing)
    os.close(writing)
    assert ended(process) == (141, None, "")


def test_stdout_and_stderr_that_are_closed():
    closed = script(in_main("import sys; print(1); print(2, file=sys.stderr)"),
                    preexec_fn=lambda: (os.close(1), os.close(2)))
    assert ended(closed) == (0, "", "")


def test_a_full_disk_behind_stdout(tmp_path):
    with open(tmp_path / "out", "w") as out:
        process = script(in_main("print('x' * 99)"), stdout=out, preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))))
    assert ended(process) == (2, None, "cannot write: File too large\n")


def test_sigterm_clears_away():
    wait = "print(1, flush=True); import time; time.sleep(60)"
    process = script(in_main(f"try: {wait}\n    finally: print(2)"))
    assert process.stdout.readline() == "1\n"
    process.terminate()
    assert ended(process) == (143, "2\n", "")
