"""Tables of recorded runs: what shares a row, averages, differences, classes, and the form."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import Problem
from data.load import PUBLISHED, SUITES
from data.results import records
from data.results.records import digest
from data.results.tables import main

HERE = Path(__file__).parent.parent
BASE = "tiny_clip, base-to-new"
TRANSFER = "tiny_clip, few-shot, 4 shots, accuracy"


def record(method="coop", seed=1, dataset="shapes", shots=4, **more):
    """A made-up record; zero-shot is at 60, or at 80 on base and 60 on new classes."""
    r = {"method": method, "dataset": dataset, "shots": shots, "seed": seed,
         "backbone": "tiny_clip", "pretrained": "", "changed": {}, "code": "c0de0001",
         "weights": "aaaabbbb", "data": digest(dataset), "split": PUBLISHED, "transfer": {},
         "per_class": {}, **more}
    if "new" in more:
        r = {"protocol": "base-to-new", "zero_shot_base": 80.0, "zero_shot_new": 60.0,
             "zero_shot_harmonic": 68.6, "base": 90.0, **r}
        r["harmonic"] = 2 * r["base"] * r["new"] / (r["base"] + r["new"])
    else:
        r = {"protocol": "few-shot", "zero_shot": 60.0, "accuracy": 70.0, **r}
    flags = {name: value for name, value in r["changed"].items() if name != "load"}
    r.setdefault("setting", digest((method, r["code"], r["weights"], r["protocol"], flags)))
    return {**r, "run": digest((r["setting"], r["data"], dataset, shots, seed, r["changed"]))}


@pytest.fixture
def printed(tmp_path, monkeypatch, capfd):
    """`python common.py FILE FLAGS` on made-up records: {title: rows of texts}, and the output."""
    monkeypatch.setattr(records, "current_code", lambda method: "c0de0001")

    def run(found, *flags):
        file = tmp_path / "results.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in found))
        main([str(file), *flags])
        out = capfd.readouterr().out
        found = {}
        for block in re.split(r"\n\n+", out.strip("\n")):
            title, *rows = block.splitlines()
            found[title] = [re.split("  +", row.strip()) for row in rows]
        return found, out

    return run


def rows_of(printed, found, *flags):
    """{row: texts} of the first table."""
    first, *_ = printed(found, *flags)[0].values()
    return {name: texts for name, *texts in first[1:]}


# ---------------------------------------------------------------- rows

def test_a_row_is_a_method_and_its_flags_in_any_order(printed):
    changed = {"depth": 2, "blend": [0.1, 0.0], "ctx_init": "a photo", "class_specific": True}
    other = dict(reversed(changed.items()))
    name = "restore --blend 0.1,0 --class-specific --ctx-init 'a photo' --depth 2"
    rows = rows_of(printed, [record("restore", changed=changed, setting="a"),
                             record("restore", changed=other, setting="a", seed=2, accuracy=72.0)])
    assert rows == {"zero-shot": ["60.0"], name: ["71.0 ± 1.4"]}


def test_mean_and_deviation_over_seeds_with_shots_as_columns(printed):
    found = [record(seed=seed, accuracy=70.0 + seed) for seed in (1, 2, 3)]
    found += [record(shots=16, accuracy=90.0), record("prograd", accuracy=50.0)]
    tables, _ = printed(found)
    assert tables["shapes, tiny_clip, few-shot"] == [
        ["4 shots", "16 shots"],
        ["zero-shot", "60.0", "60.0"], ["coop", "72.0 ± 1.0", "90.0"], ["prograd", "50.0"]]


def test_base_to_new_has_a_table_for_each_number_of_shots(printed):
    more = {"new": 50.0, "kl": {"base": 0.5, "new": 0.25}}
    tables, _ = printed([record(**more), record("restore", **more, shift_after={"gap": 0.126}),
                         record(new=50.0, shots=16)])
    assert tables[f"shapes, {BASE}, 4 shots"] == [
        ["base", "new", "H", "KL base", "KL new", "shift gap"],
        ["zero-shot", "80.0", "60.0", "68.6"],
        ["coop", "90.0", "50.0", "64.3", "0.50", "0.25"],
        ["restore", "90.0", "50.0", "64.3", "0.50", "0.25", "0.13"]]
    assert tables[f"shapes, {BASE}, 16 shots"][0] == ["base", "new", "H"]


def test_of_equal_runs_the_last_counts_and_for_transfer_the_last_that_has_the_target(printed):
    to = {"scenes": {"zero_shot": 41.0, "accuracy": 43.0, "data": "d"}}
    tables, _ = printed([record(accuracy=10.0, transfer=to), record(accuracy=20.0)], "--all")
    assert tables["shapes, tiny_clip, few-shot"][-1] == ["coop", "20.0"]
    assert tables[f"shapes to other data sets, {TRANSFER}"][1:] == [
        ["zero-shot", "41.0"], ["coop", "43.0"]]


def test_a_tag_only_where_a_table_holds_two_settings_and_the_current_code_has_none(printed):
    old, new = record(code="0ld", accuracy=10.0), record(accuracy=20.0)
    tag = f"coop [{old['setting'][:6]}]"
    assert rows_of(printed, [old]) == {"zero-shot": ["60.0"], "coop": ["10.0"]}
    for found in ([old, new], [new, old]):
        assert rows_of(printed, found) == {"zero-shot": ["60.0"], "coop": ["20.0"], tag: ["10.0"]}
    assert rows_of(printed, [record(code="1", accuracy=1.0), old])["coop"] == ["10.0"]  # the newest
    assert rows_of(printed, [new, old], "--against", "coop") == {
        "zero-shot": ["+40.0"], tag: ["-10.0"]}


def test_a_table_holds_the_newest_images_and_weights_and_the_older_runs_are_counted(printed):
    found = [record(seed=1, data="three classes", accuracy=90.0),
             record("prograd", weights="0ld0ld0ld"),
             record(seed=2, data="seven classes", accuracy=50.0, zero_shot=40.0)]
    assert rows_of(printed, found) == {"zero-shot": ["40.0"], "coop": ["50.0"]}
    assert "left out: 2 older runs on other images, classes or weights" in printed(found)[1]
    assert "left out" not in printed(found[2:])[1]


def test_transfer_is_of_the_newest_images_of_target_and_source(printed):
    def to(accuracy, data="new"):
        return {"scenes": {"zero_shot": 40.0, "accuracy": accuracy, "data": data}}

    tables, _ = printed([record(seed=1, transfer=to(10.0, data="old")),
                         record(seed=2, transfer=to(20.0), data="other classes of shapes"),
                         record(seed=3, transfer=to(50.0))])
    assert tables[f"shapes to other data sets, {TRANSFER}"][2] == ["coop", "50.0"]


def test_flags_of_a_test_are_another_comparison(printed):
    to = {"scenes": {"zero_shot": 40.0, "accuracy": 50.0, "data": "scenes"}}
    found = [record(), record(changed={"template": "a {}."}, zero_shot=33.0, transfer=to)]
    tables, _ = printed(found, "--all")
    about = "tiny_clip --template 'a {}.', few-shot"
    assert tables["shapes, tiny_clip, few-shot"][1] == ["zero-shot", "60.0"]
    assert tables[f"shapes, {about}"][1:] == [["zero-shot", "33.0"], ["coop", "70.0"]]
    assert f"shapes to other data sets, {about}, 4 shots, accuracy" in tables


def test_a_folder_of_ones_own_has_a_table_of_its_own(printed):
    names = "dtd", "/u/birds", "/v/birds", "/x/shapes", "/x/cats to dogs", "shapes"
    tables, _ = printed([record(dataset=name) for name in names], "--all")
    wanted = "dtd", "/u/birds", "/v/birds", "/x/shapes", "cats to dogs", "shapes"
    assert set(tables) == {f"{name}, tiny_clip, few-shot" for name in wanted}
    to = {"shapes": {"zero_shot": 40.0, "accuracy": 50.0, "data": "shapes"}}
    tables, _ = printed([record(dataset="/x/s", transfer=to)])
    assert f"s to other data sets, {TRANSFER}" in tables


# ---------------------------------------------------------------- averages

def test_the_harmonic_mean_is_that_of_the_averages_seed_by_seed_as_in_the_papers(printed):
    found = [record(dataset=dataset, base=82.69 + d, new=63.22 - 2 * d)
             for dataset, d in (("shapes", -10), ("scenes", 10))]
    assert rows_of(printed, found)["coop"] == ["82.7", "63.2", "71.7"]     # CoOp's 71.66
    found = [record(dataset=dataset, seed=seed, base=base + seed, new=new - seed)
             for dataset, base, new in (("shapes", 90.0, 50.0), ("scenes", 70.0, 60.0))
             for seed in (1, 2, 3)]
    assert rows_of(printed, found)["coop"] == ["82.0 ± 1.0", "53.0 ± 1.0", "64.4 ± 0.4"]


def test_what_an_average_leaves_out_is_named(printed):
    found = [record(dataset=dataset) for dataset in ("shapes", "scenes", "sizes", "forms")]
    found += [record("prograd", dataset=dataset) for dataset in ("shapes", "scenes")]
    found += [record("mvp_mi", changed={"lr": 0.1}), record(seed=2)]
    tables, _ = printed(found)
    rows = tables["average over 2 embedded data sets, tiny_clip, few-shot"]
    assert [row[0] for row in rows[1:]] == [
        "zero-shot", "coop", "prograd",
        "(average, 4 shots, without coop seed 2, forms, mvp_mi --lr 0.1, sizes)"]
    alone = tables["embedded data sets, tiny_clip, few-shot, 4 shots"]      # shown in this case
    assert alone[0] == ["shapes", "forms", "scenes", "sizes", "average"]


def test_transfer_has_an_average_over_targets_and_shifted_versions_their_own(printed):
    def to(**accuracy):
        return {name: {"zero_shot": 50.0, "accuracy": percent, "data": name}
                for name, percent in accuracy.items()}

    tables, _ = printed([record(seed=1, transfer=to(scenes=40.0, sizes=60.0, shapes_noise=70.0)),
                         record(seed=2, transfer=to(scenes=42.0, sizes=58.0, shapes_noise=71.0))])
    assert tables[f"shapes to other data sets, {TRANSFER}"] == [
        ["scenes", "sizes", "average"], ["zero-shot", "50.0", "50.0", "50.0"],
        ["coop", "41.0 ± 1.4", "59.0 ± 1.4", "50.0 ± 0.0"]]
    assert tables[f"shapes to shifted versions, {TRANSFER}"][-1] == ["coop", "70.5 ± 0.7"]


def test_published_numbers_stand_beside_averages_of_the_papers_eleven_only(printed):
    def out(names, **more):
        more = {"backbone": "ViT-B-16", "pretrained": "openai", "shots": 16, "new": 65.0, **more}
        return printed([record(dataset=name, **more) for name in names])[1]

    eleven = SUITES["papers"]
    row = re.search("published: CoOp .*", out(eleven))[0]
    assert row.split()[-3:] == ["82.7", "63.2", "71.7"]
    for other in (out(eleven[1:]), out(eleven, shots=4), out(eleven, backbone="RN50"),
                  out(eleven, split="seeded 50/20/30 split"), out(["shapes", "scenes"])):
        assert "published" not in other


# ---------------------------------------------------------------- differences and classes

def test_differences_of_averages_and_on_how_many_data_sets(printed):
    found = [record(method, dataset=dataset, seed=seed, new=new + seed * (method == "prograd"))
             for method, news in (("coop", (50.0, 50.0)), ("prograd", (60.0, 44.0)))
             for dataset, new in zip(("shapes", "scenes"), news) for seed in (1, 2)]
    rows = rows_of(printed, found, "--against", "coop")
    assert rows["zero-shot"][:2] == ["-10.0 ± 0.0 (0 of 2)", "+10.0 ± 0.0 (2 of 2)"]
    assert rows["prograd"][:2] == ["+0.0 ± 0.0 (0 of 2)", "+3.5 ± 0.7 (1 of 2)"]
    with pytest.raises(Problem, match="there are zero-shot, coop, prograd"):
        printed(found, "--against", "CoOp")
    assert "(no run in common with prograd)" in printed(
        [record(), record("prograd", seed=2)], "--against", "coop")[1]


def test_classes_are_averaged_over_seeds_worst_first_and_shots_kept_apart(printed):
    def classes(red, blue):
        return {"all classes": [["red", red, None, 8], ["blue", blue, "red", 8]]}

    found = [record(seed=1, per_class=classes(90.0, 60.0)),
             record(seed=2, per_class=classes(92.0, 64.0)),
             record(shots=16, per_class=classes(10.0, 20.0)),
             record("prograd", per_class=classes(91.0, 50.0))]
    tables, _ = printed(found, "--classes")
    assert tables["shapes, all classes, tiny_clip, few-shot, 4 shots"] == [
        ["coop", "prograd"],
        ["blue", "62.0 ± 2.8 (red)", "50.0 (red)"], ["red", "91.0 ± 1.4", "91.0"]]
    assert tables["shapes, all classes, tiny_clip, few-shot, 16 shots"][1:] == [
        ["red", "10.0"], ["blue", "20.0 (red)"]]


# ---------------------------------------------------------------- what is shown, and how

def test_only_the_newest_comparison_without_all(printed):
    found = [record(new=50.0), record(dataset="dtd"), record(), record(dataset="scenes")]
    tables, out = printed(found)
    assert [*tables][:-1] == ["average over 2 embedded data sets, tiny_clip, few-shot"]
    assert out.endswith("\n--all shows each data set, and all comparisons\n")
    tables, out = printed(found, "--all")
    assert [*tables] == [
        f"shapes, {BASE}, 4 shots", "dtd, tiny_clip, few-shot",
        "average over 2 embedded data sets, tiny_clip, few-shot",
        "embedded data sets, tiny_clip, few-shot, 4 shots"]


def test_the_best_is_bold_in_markdown(printed):
    found = [record(), record("prograd", accuracy=50.0, changed={"ctx_init": "a|b"})]
    markdown = printed(found, "--markdown")[1]
    assert "|  | 4 shots |\n| --- | --- |\n| zero-shot | 60.0 |" in markdown
    assert "| coop | **70.0** |" in markdown and r"a\|b" in markdown


def test_without_a_record_it_says_what_makes_one(tmp_path):
    with pytest.raises(Problem, match="no results yet; every run of a method adds a line there"):
        main([str(tmp_path / "none.jsonl")])


def test_answers_without_torch_and_lists_data_sets(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(record()))
    code = ("import sys; from data.results.tables import main; main(sys.argv[1:]); "
            "sys.exit('torch' in sys.modules)")
    for flags in ([tmp_path / "r.jsonl"], ["--data", "--data-root", tmp_path]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=HERE,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "shapes" in done.stdout
