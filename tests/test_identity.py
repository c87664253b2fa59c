"""One identity of a run: what is already recorded, and what may stand in one mean or one row."""

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


def count(run):
    assert run.status == 0, run.err
    return len(run.records)


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
    file = clip / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_projection": tensors["text_projection"] + 0.1}, file)
    common.load_clip.cache_clear()              # weights are read once a process
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


def test_transfer_targets_are_compared_by_their_images(cli, mine):
    flags = {"transfer": mine, "keep": True}
    assert count(cli("coop", *QUICK, **flags)) == 1
    assert count(cli("coop", *QUICK, keep=True)) == 1       # the record holds more
    make_images(mine / "test/cat", 2, seed=1)
    first, again = cli("coop", *QUICK, **flags).records
    assert first["run"] == again["run"]
    assert first["transfer"][str(mine)]["data"] != again["transfer"][str(mine)]["data"]


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


def test_a_folder_that_grew_is_not_averaged_with_what_it_was(cli, mine, tmp_path, capfd):
    flags = {"dataset": mine, "backbone": TINY, "keep": True}
    cli("coop", *QUICK, **flags)
    for part in ("train", "test"):
        make_images(mine / part / "owl", 2)
    run = cli("coop", *QUICK, "--seeds", "2", **flags)
    assert count(run) == 2 and run.records[0]["data"] != run.records[1]["data"]
    tables.main([str(tmp_path / "results.jsonl")])
    text = capfd.readouterr().out
    assert "±" not in text and "left out: 1 older run" in text


@pytest.mark.parametrize("flags", [("--validation",), ("--test-images", 24),
                                   ("--template", "{} night.")])
def test_other_tests_are_other_rows_also_of_loaded_prompts(cli, tmp_path, capfd, flags):
    plain = cli("coop", *QUICK, save=tmp_path / "saved").records[0]
    other = cli("coop", *flags, load=tmp_path / "saved", keep=True).records[1]
    assert plain["zero_shot"] != other["zero_shot"] and plain["data"] != other["data"]
    tables.main([str(tmp_path / "results.jsonl")])
    text = capfd.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["zero-shot", f"{plain['zero_shot']:.1f}"] in rows and "left out" not in text
    assert f"zero-shot {flags[0]}" in text and f"coop --load {tmp_path}/saved" in text


def test_the_template_of_a_loaded_prompt_is_recorded_as_one_that_was_typed(cli, tmp_path):
    cli("coop", *QUICK, "--template", "{} night.", save=tmp_path / "saved")
    changed = cli("coop", load=tmp_path / "saved").records[0]["changed"]
    assert changed == {"load": str(tmp_path / "saved"), "template": "{} night."}


def test_a_mean_of_loaded_prompts_is_of_different_files(cli, tmp_path):
    cli("coop", *QUICK, save=tmp_path / "saved-1")
    shutil.copy(tmp_path / "saved-1", tmp_path / "saved-2")
    for name in ("saved-1", "saved-{seed}"):
        run = cli("coop", "--seeds", "1,2", load=tmp_path / name)
        assert run.status == 2 and len(run.err.splitlines()) == 2 and "±" not in run.out


def test_prompts_of_two_data_sets_do_not_share_a_mean(cli, tmp_path):
    for seed, dataset in ((1, "shapes"), (2, "forms")):
        cli("coop", *QUICK, "--seeds", seed, dataset=dataset, save=tmp_path / f"c-{seed}")
    run = cli("coop", "--seeds", "1,2", load=tmp_path / "c-{seed}", dataset="scenes")
    assert count(run) == 2 and "±" not in run.out


def test_files_of_one_command_that_were_trained_differently_are_refused(cli, tmp_path):
    for seed, position in ((1, "end"), (2, "front")):
        cli("coop", *QUICK, "--seeds", seed, "--position", position, save=tmp_path / f"c-{seed}")
    run = cli("coop", "--seeds", "1,2", load=tmp_path / "c-{seed}")
    assert run.status == 2 and "c-2" in run.err and "--position" in run.err
    assert [record["seed"] for record in run.records] == [1]
