"""One identity of a run: what is already recorded, and what may stand in one mean or one row."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_images
from safetensors.torch import load_file, save_file

import common
import coop
from data.results import records, tables

QUICK = ("--epochs", 1, "--views", 1, "--shots", 1)
TINY = f"local-dir:{common.TINY_CLIP}"


@pytest.fixture
def mine(tmp_path):
    """A folder of one's own: two classes, two training and two test images of each."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            make_images(tmp_path / "mine" / part / name, 2)
    return tmp_path / "mine"


@pytest.fixture
def table(tmp_path, capfd):
    """Print the tables of --out; return {row: its numbers} of all rows, and the text."""
    def read(*flags, file=tmp_path / "results.jsonl"):
        tables.main([str(file), *flags])
        text, rows, name = capfd.readouterr().out, {}, ""
        for line in text.splitlines():
            if line.startswith("  ") and "(" not in line[:4]:
                words = re.split("  +", line.strip())       # a long name has a line of its own
                name = words[0] if line[2] != " " else name
                rows.setdefault(name, []).extend(words[1:] if line[2] != " " else words)
        return rows, text
    return read


def count(run):
    assert run.status == 0, run.err
    return len(run.records)


def retrain(clip):
    """Change the weights in a copy of the tiny CLIP's folder; they are read once a process."""
    file = clip / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_projection": tensors["text_projection"] + 0.1}, file)
    common.load_clip.cache_clear()


# ---------------------------------------------------------------- already recorded

def test_a_recorded_run_is_not_repeated_unless_asked(cli):
    first = cli("coop", *QUICK)
    again = cli("coop", *QUICK, keep=True)
    assert again.records == first.records and "already in" in again.out
    assert count(cli("coop", *QUICK, "--again", keep=True)) == 2


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_images_under_the_same_names_are_another_run(cli, mine, part):
    flags = {"dataset": mine, "backbone": TINY, "keep": True}
    assert count(cli("coop", *QUICK, **flags)) == 1
    make_images(mine / part / "cat", 2, seed=1)
    assert count(cli("coop", *QUICK, **flags)) == 2
    assert count(cli("coop", *QUICK, **flags)) == 2


def test_other_weights_under_the_same_name_are_another_run(cli, tmp_path):
    clip = shutil.copytree(common.TINY_CLIP, tmp_path / "clip")
    flags = {"backbone": f"local-dir:{clip}", "keep": True}
    assert count(cli("coop", *QUICK, **flags)) == 1
    retrain(clip)
    assert count(cli("coop", *QUICK, **flags)) == 2


def test_edited_code_is_another_run(cli, tmp_path, monkeypatch):
    assert count(cli("coop", *QUICK)) == 1
    text = (records.HERE / "common.py").read_text()
    (tmp_path / "common.py").write_text(text.replace("1000003", "1000007"))
    monkeypatch.setattr(records, "COMPUTING", [tmp_path / "common.py", *records.COMPUTING[1:]])
    assert count(cli("coop", *QUICK, keep=True)) == 2


def test_comments_and_docstrings_are_no_code(tmp_path):
    texts = ['"""Doc."""\ndef f(x):\n    """Double."""\n    return 2 * x    # twice\n',
             '"""Other."""\n\n\ndef f(x):\n    # why\n    """Two."""\n    return (2 * x)\n',
             '"""Doc."""\ndef f(x):\n    """Double."""\n    return 3 * x    # twice\n']
    for k, text in enumerate(texts):
        (tmp_path / f"{k}.py").write_text(text)
    one, same, other = (records.code_digest(tmp_path / f"{k}.py") for k in range(3))
    assert one == same != other


def test_all_that_the_data_consist_of_identifies_them():
    items = [common.Item("a/1.jpg", 0, "a"), common.Item("b/1.jpg", 1, "b")]
    data = common.Data("d", ["a", "b"], "a {}.", "a {}.", items, [], items)
    others = [replace(data, **change) for change in (
        {"classnames": ["a", "c"]}, {"template": "b {}."}, {"prograd_template": "b {}."},
        {"train": items[:1]}, {"test": items[::-1]}, {"origin": "x"}, {"own": True},
        {"test": [items[0]._replace(label=1), items[1]]})]
    digests = {records.data_identity(some, [b"1", b"2"]) for some in (data, *others)}
    assert len(digests) == 1 + len(others)
    assert records.data_identity(data, [b"1", b"3"]) not in digests


def test_flags_that_matter_make_another_run_and_places_do_not(cli, tmp_path):
    def identify(*flags):
        argv = [*QUICK, "--out", tmp_path / "none", "--data-root", root, *flags]
        return next(common.runs(coop.__file__, coop.flags(), [str(word) for word in argv])).id

    root = cli("coop", *QUICK).records[0]["flags"]["data_root"]
    same = [(), ("--cache", tmp_path / "cache"), ("--class-chunk", 5), ("--predict", "a.jpg"),
            ("--save", tmp_path / "a"), ("--transfer", "forms"), ("--skip-unreadable",)]
    others = [("--lr", 0.1), ("--batch-size", 2), ("--views", 2), ("--n-ctx", 2), ("--epochs", 2),
              ("--ctx-init", "a"), ("--template", "a {}."), ("--test-images", 24),
              ("--base-to-new",), ("--seeds", 2), ("--shots", 2), ("--position", "front")]
    assert len({identify(*flags) for flags in same}) == 1
    assert len({identify(*flags) for flags in others + same}) == len(others) + 1


def test_a_script_elsewhere_is_identified_by_its_own_code(cli, tmp_path):
    def identify(text):
        (tmp_path / "coop.py").write_text(text)
        argv = [*QUICK, "--out", tmp_path / "none", "--data-root", root]
        return next(common.runs(str(tmp_path / "coop.py"), coop.flags(), list(map(str, argv)))).id

    run = cli("coop", *QUICK).records[0]
    root = run["flags"]["data_root"]
    records.code_digest.cache_clear()
    first = identify("a = 1")
    records.code_digest.cache_clear()
    assert len({run["run"], first, identify("a = 2")}) == 3


def test_transfer_targets_are_compared_by_their_images(cli, mine, table):
    flags = {"transfer": mine, "keep": True}
    assert count(cli("coop", *QUICK, **flags)) == 1
    assert count(cli("coop", *QUICK, keep=True)) == 1       # the record holds more
    make_images(mine / "test/cat", 2, seed=1)
    again = cli("coop", *QUICK, **flags, dataset="shapes")
    assert count(again) == 2
    new = again.records[1]["transfer"][str(mine)]["accuracy"]
    rows, _ = table()
    assert any(f"{new:.1f}" in " ".join(row) for row in rows.values())
    assert not any("±" in text for row in rows.values() for text in row)


def test_a_run_is_recorded_before_it_is_printed(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(common.report, "show", lambda *some: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("coop", *QUICK)
    assert len(records.read(tmp_path / "results.jsonl")[0]) == 1


# ---------------------------------------------------------------- means and rows

def test_a_mean_is_over_runs_that_differ_in_the_seed_only(cli):
    run = cli("coop", *QUICK, "--seeds", "1,2,3", "--lr", 0.1)
    values = torch.tensor([record["accuracy"] for record in run.records]).double()
    assert "mean ± std over 3 seeds" in run.out
    assert f"{values.mean():.1f} ± {values.std():.1f}" in run.out
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", "1,2", "--dataset", "shapes,forms")
    assert len(run.records) == 4 and "±" not in run.out


def test_a_folder_that_grew_is_not_averaged_with_what_it_was(cli, mine, table):
    flags = {"dataset": mine, "backbone": TINY, "keep": True}
    cli("coop", *QUICK, **flags)
    for part in ("train", "test"):
        make_images(mine / part / "owl", 2)
    run = cli("coop", *QUICK, "--seeds", 2, **flags)
    assert count(run) == 2 and "±" not in run.out
    rows, text = table()
    assert "±" not in text and "left out: 1 older run" in text
    assert [f"{run.records[1]['accuracy']:.1f}"] == rows["coop --epochs 1 --views 1"]


def test_runs_of_older_code_have_a_tag_beside_the_current_only(cli, table, monkeypatch):
    monkeypatch.setattr(records, "COMPUTING", records.COMPUTING[:1])
    cli("coop", *QUICK)
    assert "coop --epochs 1 --views 1" in table()[0]        # alone it needs none
    monkeypatch.undo()
    cli("coop", *QUICK, keep=True)
    names = [name for name in table()[0] if name.startswith("coop")]
    assert len(names) == 2 and "coop --epochs 1 --views 1" in names
    assert any(re.search(r" \[[0-9a-f]{6}\]$", name) for name in names)


def test_two_templates_are_two_zero_shot_rows_also_with_loaded_prompts(cli, table, tmp_path):
    other = ("--template", "{} night.")
    plain = cli("coop", *QUICK).records[0]["zero_shot"]
    saved = cli("coop", *QUICK, *other, save=tmp_path / "saved", keep=True)
    told = saved.records[1]["zero_shot"]
    assert count(cli("coop", load=tmp_path / "saved", keep=True)) == 3
    rows, text = table()
    assert rows["zero-shot"] == [f"{plain:.1f}"] != [f"{told:.1f}"], text
    assert rows["zero-shot --template '{} night.'"] == [f"{told:.1f}"]
    assert "coop --epochs 1 --views 1" in rows and "left out" not in text


@pytest.mark.parametrize("flags", [("--validation",), ("--test-images", 24)])
def test_other_test_images_are_rows_of_their_own(cli, table, flags):
    first = cli("coop", *QUICK).records[0]
    other = cli("coop", *QUICK, *flags, keep=True).records[1]
    rows, text = table()
    name = " ".join(map(str, flags))
    assert rows["zero-shot"] == [f"{first['zero_shot']:.1f}"] and "left out" not in text, text
    assert rows[f"zero-shot {name}"] == [f"{other['zero_shot']:.1f}"]
    assert len([row for row in rows if row.startswith("coop")]) == 2


def test_loaded_prompts_have_rows_of_their_own(cli, table, tmp_path):
    cli("coop", *QUICK)
    for seed in (1, 2):
        file = tmp_path / f"saved-{seed}"
        cli("coop", *QUICK, dataset="forms", seeds=seed, save=file, out=tmp_path / "others")
        assert count(cli("coop", load=file, dataset="shapes", keep=True)) == 1 + seed
    rows, text = table()
    assert len([name for name in rows if name.startswith("coop")]) == 3, text
    assert "±" not in text


def test_a_mean_of_loaded_prompts_is_of_different_files(cli, tmp_path):
    file = tmp_path / "saved"
    cli("coop", *QUICK, save=file)
    shutil.copy(file, tmp_path / "saved-1")
    shutil.copy(file, tmp_path / "saved-2")
    run = cli("coop", "--seeds", "1,2", load=tmp_path / "saved-{seed}")
    assert run.status == 2 and "saved-2" in run.err and "±" not in run.out
    assert len(run.err.splitlines()) <= 2


def test_prompts_of_two_data_sets_do_not_share_a_mean(cli, tmp_path):
    for seed, dataset in ((1, "shapes"), (2, "forms")):
        cli("coop", *QUICK, "--seeds", seed, dataset=dataset, save=tmp_path / f"c-{seed}")
    run = cli("coop", "--seeds", "1,2", load=tmp_path / "c-{seed}", dataset="scenes")
    assert "±" not in run.out


def test_files_of_one_command_that_were_trained_differently_are_refused(cli, tmp_path):
    for seed, position in ((1, "end"), (2, "front")):
        cli("coop", *QUICK, "--seeds", seed, "--position", position, save=tmp_path / f"c-{seed}")
    run = cli("coop", "--seeds", "1,2", load=tmp_path / "c-{seed}")
    assert run.status == 2 and "c-2" in run.err and "--position" in run.err
    assert [record["seed"] for record in run.records] == [1]
