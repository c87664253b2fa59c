"""What goes wrong, and what the user then sees: one line on stderr, status 2, nothing half-written."""

import pytest
from conftest import made_up_pictures

import common
import coop
from data.files import CATALOGUE


def refused(run, *words):
    assert run.status == 2 and not run.records, run.out
    assert len(run.err.splitlines()) == 1 and "Traceback" not in run.err and run.err.startswith("coop.py: "), run.err
    assert all(word in run.err for word in words), run.err


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "eurosta"], ["eurosat"]), (["--dataset", "/nowhere/at/all"], ["/nowhere/at/all"]),
    (["--dataset", "stanford_cars"], ["stanford_cars", "data/README.md"]), (["--transfer", "shapes_noisy"], ["shapes_noise"]),
    (["--backbone", "ViT-B16"], ["ViT-B-16"]), (["--backbone", "local-dir:/nowhere"], ["/nowhere"]),
    (["--backbone", "ViT-B-16", "--pretrained", "opnai"], ["opnai", "openai"]), (["--backbone", "ViT-B-16-SigLIP", "--pretrained", "random"], ["text tower"]),
    (["--shots", "0"], ["--shots"]), (["--shots", "1,x"], ["--shots"]), (["--shots", "-4"], ["--shots"]), (["--seeds", ""], ["--seeds"]),
    (["--lr", "nan"], ["--lr"]), (["--lr", "-1"], ["--lr"]), (["--batch-size", "0"], ["--batch-size"]), (["--n-ctx", "76"], ["--n-ctx"]), (["--n-ctx", "300"], ["--n-ctx"]),
    (["--epochs", "1.5"], ["--epochs"]), (["--views", "-1"], ["--views"]), (["--device", "cuda"], ["--device"]), (["--position", "top"], ["--position"]),
    (["--shot", "4"], ["--shot"]), (["--load", "/nowhere.safetensors"], ["/nowhere"]), (["--save", "x", "--seeds", "1,2"], ["{seed}"]), (["--save", "{shots}", "--shots", "1,2", "--seeds", "1,2"], ["{seed}"]),
    (["--save", "a{b}"], ["--save"]), (["--save", "a{shots.b}"], ["--save"]), (["--seeds", "9" * 20], ["--seeds"]), (["--dataset", ""], ["shapes"]), (["--transfer", "scenes,"], ["unknown"]),
    (["--class-specific", "--base-to-new"], ["--class-specific"]), (["--ctx-init", "word " * 90], ["word"])])
def test_flags(cli, flags, words):
    refused(cli("coop", "--epochs", 1, "--views", 1, *flags), *words)


def test_base_to_new_needs_four_classes(cli, tmp_path):
    for name in "abc":
        made_up_pictures(tmp_path / "mine" / name, 4)
    refused(cli("coop", "--base-to-new", dataset=tmp_path / "mine", backbone=common.TINY_CLIP), "two classes")


def test_out_that_cannot_be_written(cli, tmp_path):
    refused(cli("coop", out=tmp_path), str(tmp_path))
    (tmp_path / "file").write_text("")
    refused(cli("coop", out=tmp_path / "file/results.jsonl"), "file")


def test_more_shots_than_images_uses_what_there_is(cli):
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", 1000)
    assert run.status == 0 and "using the 20" in run.out


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"train": [["a", "0", "b"]], "val": [], "test": []}', '{"train": [["a", 0]], "val": [], "test": []}',
                                     '{"train": [], "val": [], "test": [["a", 0, "b"], ["a", 0, "c"]]}', '{"train": [], "val": [], "test": [["a", 5, "b"]]}', "\ufeff"])
def test_wrong_split_files(cli, eurosat, content):
    (eurosat / CATALOGUE["eurosat"]["split"]).write_text(content)
    refused(cli("coop", dataset="eurosat", data_root=eurosat, backbone=common.TINY_CLIP), "eurosat")


def test_split_that_names_a_missing_picture(cli, eurosat):
    next((eurosat / "eurosat/2750/River").iterdir()).unlink()
    refused(cli("coop", "--views", 1, dataset="eurosat", data_root=eurosat, backbone=common.TINY_CLIP), "River")


@pytest.mark.parametrize("count", [0, 1])
def test_folders_with_too_few_pictures_or_classes(cli, tmp_path, count):
    made_up_pictures(tmp_path / "mine/a", 4)
    refused(cli("coop", dataset=tmp_path / "mine", backbone=common.TINY_CLIP), "sub-folder")
    made_up_pictures(tmp_path / "mine/b", count)
    refused(cli("coop", dataset=tmp_path / "mine", backbone=common.TINY_CLIP), "at least two pictures")


def test_a_picture_that_cannot_be_read_is_named_and_nothing_is_kept(cli, tmp_path):
    for name in "abc":
        bad = made_up_pictures(tmp_path / "mine" / name, 4)[0]
    for damage in (bad.read_bytes()[:100], b"", b"not a picture"):
        bad.write_bytes(damage)
        refused(cli("coop", "--views", 1, dataset=tmp_path / "mine", backbone=common.TINY_CLIP, cache=tmp_path / "cache"), str(bad))
    assert all(not path.name.startswith(".") for path in (tmp_path / "cache").glob("*"))


def test_loading_what_is_not_a_prompt(cli, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"nonsense")
    refused(cli("coop", load=file), "not a safetensors file")
    assert cli("coop", "--epochs", 1, "--views", 1, save=file).status == 0
    refused(cli("coop", "--n-ctx", 4, load=file), "(16, 80)", "(4, 80)")
    refused(cli("coop", "--position", "front", load=file), "--position end")
    refused(cli("coop", load=tmp_path), str(tmp_path))


@pytest.mark.parametrize("content", [b"123\n{}\n[1]\n{broken", b'{"method": "coop", "dataset": "a", "backbone": "b", "protocol": "123", "shots": 1, "seed": 1, "changed": {}, "transfer": {}}', b"\xff\xfe\x00"])
def test_result_files_with_other_lines(tmp_path, content, monkeypatch, capsys):
    (tmp_path / "r.jsonl").write_bytes(content)
    monkeypatch.setattr("sys.argv", ["common.py", str(tmp_path / "r.jsonl")])
    with pytest.raises(common.Problem, match="no line of results" if b"123" in content else "result lines"):
        common.main()


def test_ctrl_c(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(coop, "train", interrupted)
    run = cli("coop")
    assert run.status == 130 and run.err == "coop.py: interrupted\n" and not run.records
