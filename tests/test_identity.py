"""One identity of a run: what is already recorded, and what may stand in one mean."""

from dataclasses import replace

import pytest
from conftest import make_images
from test_runs import QUICK, TINY, copy_clip

import common
import coop
from data.results import records


@pytest.fixture
def identify(root, tmp_path):
    """Return the identity of a run with these flags, without running it."""
    def identify(*flags, script=coop.__file__):
        argv = [*QUICK, "--out", tmp_path / "none", "--data-root", root, *flags]
        return next(common.runs(str(script), coop.flags(), [str(word) for word in argv])).id

    return identify


def test_a_recorded_run_is_repeated_with_again_only(cli):
    first = cli("coop", *QUICK)
    again = cli("coop", *QUICK, keep=True)
    assert again.records == first.records and "already in" in again.out
    assert len(cli("coop", *QUICK, "--again", keep=True).records) == 2


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_images_under_the_same_names_are_another_run(cli, mine, part):
    flags = {"dataset": mine, "backbone": TINY, "keep": True}
    assert len(cli("coop", *QUICK, **flags).records) == 1
    make_images(mine / part / "cat", 2, seed=1)
    assert len(cli("coop", *QUICK, **flags).records) == 2


def test_weights_matter_and_their_place_does_not(identify, tmp_path):
    copied, changed = (identify("--backbone", copy_clip(tmp_path / f"clip{change}", change))
                       for change in (0.0, 0.1))
    assert copied == identify() != changed


def test_edited_code_is_another_run(identify, tmp_path, monkeypatch):
    edited = tmp_path / "coop.py"
    edited.write_text("x = 1")
    found = [identify(), identify(script=edited)]
    monkeypatch.setattr(records, "COMPUTING", [edited, *records.COMPUTING[1:]])
    assert identify() not in found and found[0] != found[1]


def test_comments_and_docstrings_are_no_code(tmp_path):
    texts = ['"""Doc."""\ndef f(x):\n    """Double."""\n    return 2 * x    # twice\n',
             '"""Other."""\n\n\ndef f(x):\n    # why\n    """Two."""\n    return (2 * x)\n',
             '"""Doc."""\ndef f(x):\n    """Double."""\n    return 3 * x    # twice\n']
    for k, text in enumerate(texts):
        (tmp_path / f"{k}.py").write_text(text)
    one, same, other = (records.code_digest(tmp_path / f"{k}.py") for k in range(3))
    assert one == same != other


def test_all_that_the_data_consist_of_identifies_them():
    items = [common.Item("a/1.jpg", 0, b"1"), common.Item("b/1.jpg", 1, b"2")]
    data = common.Data("d", ["a", "b"], "a {}.", "a {}.", items, [], items)
    others = [replace(data, **change) for change in (
        {"classnames": ["a", "c"]}, {"template": "b {}."}, {"prograd_template": "b {}."},
        {"train": items[:1]}, {"test": items[::-1]}, {"origin": "x"}, {"own": True},
        {"test": [items[0]._replace(label=1), items[1]]},
        {"test": [items[0]._replace(content=b"3"), items[1]]})]
    digests = {records.data_identity(some) for some in (data, *others)}
    assert len(digests) == 1 + len(others)


def test_flags_that_matter_make_another_run_and_places_do_not(identify, tmp_path):
    same = [(), ("--cache", tmp_path / "cache"), ("--class-chunk", 5), ("--predict", "a.jpg"),
            ("--save", tmp_path / "a"), ("--transfer", "forms")]
    others = [("--lr", 0.1), ("--views", 2), ("--ctx-init", "a"), ("--template", "a {}."),
              ("--test-images", 24), ("--base-to-new",), ("--seeds", 2), ("--shots", 2)]
    assert len({identify(*flags) for flags in same}) == 1
    assert len({identify(*flags) for flags in others + same}) == len(others) + 1


def test_a_default_that_was_typed_is_no_change(cli):
    plain, = cli("coop", *QUICK).records
    typed, = cli("coop", *QUICK, "--lr", "0.002", "--precision", "fp32").records
    assert typed["run"] == plain["run"] and typed["changed"] == plain["changed"]


def test_transfer_targets_are_compared_by_their_images(cli, mine):
    flags = {"transfer": mine, "keep": True}
    assert len(cli("coop", *QUICK, **flags).records) == 1
    assert len(cli("coop", *QUICK, keep=True).records) == 1       # the record holds more
    make_images(mine / "test/cat", 2, seed=1)
    first, again = cli("coop", *QUICK, **flags).records
    assert first["run"] == again["run"]
    assert first["transfer"][str(mine)]["data"] != again["transfer"][str(mine)]["data"]


def test_a_run_is_recorded_before_it_is_printed(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(common.tables, "show_run", lambda *some: 1 / 0)
    with pytest.raises(ZeroDivisionError):      # a mistake in the code keeps its traceback
        cli("coop", *QUICK)
    assert len(records.read(tmp_path / "results.jsonl")[0]) == 1
