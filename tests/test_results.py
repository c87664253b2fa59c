"""The comparison, python common.py: lines to rows, averages, tables and pictures."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data import compare, pictures, results
from data.errors import Problem

HERE = Path(__file__).parent.parent
REAL = ("caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd "
        "eurosat ucf101 imagenet").split()


def few_shot(method="coop", seed=1, accuracy=70.0, **more):
    """A made-up record of a run on all classes; zero-shot is at 60."""
    return {"method": method, "dataset": "shapes", "backbone": "tiny", "protocol": "few-shot",
            "shots": 4, "seed": seed, "changed": {}, "transfer": {},
            "zero_shot": 60.0, "accuracy": accuracy, **more}


def base_to_new(method="coop", seed=1, base=90.0, new=50.0, zero_shot=(80.0, 60.0), **more):
    """A made-up record of a run from base to new classes."""
    def h(base, new):
        return 2 * base * new / (base + new)

    return {"method": method, "dataset": "shapes", "backbone": "tiny", "protocol": "base-to-new",
            "shots": 4, "seed": seed, "changed": {}, "transfer": {},
            "base": base, "new": new, "harmonic": h(base, new), "zero_shot_base": zero_shot[0],
            "zero_shot_new": zero_shot[1], "zero_shot_harmonic": h(*zero_shot), **more}


@pytest.fixture
def compared(tmp_path, monkeypatch, capfd):
    """`python common.py FILE FLAGS` on records: tables {title: rows of cells}, output, folder."""

    def run(records, *flags):
        file = tmp_path / "results.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
        monkeypatch.setattr(sys, "argv", ["common.py", str(file), *flags])
        compare.main()
        out = capfd.readouterr().out
        found = {}
        for block in re.split(r"\n\n+", out.strip("\n")):
            title, *rows = block.splitlines()
            found[title] = [re.split("  +", row.strip()) for row in rows]
        return found, out, tmp_path

    return run


# ---------------------------------------------------------------- lines

def test_what_is_no_record_is_passed_over_and_counted(tmp_path):
    good = few_shot()
    odd = [
        b"{\"method\": \"cut sh",
        b"null",
        b"[1]",
        b"7" * 5000,
        b"[" * 10000 + b"]" * 10000,
        json.dumps({**good, "accuracy": None}).encode(),
        json.dumps({**good, "accuracy": "70.0"}).encode(),
        json.dumps({**good, "accuracy": math.nan}).encode(),
        json.dumps({**good, "accuracy": 10 ** 400}).encode(),
        json.dumps({**good, "shots": 0}).encode(),
        json.dumps({**good, "seed": "1"}).encode(),
        json.dumps({**good, "changed": None}).encode(),
        json.dumps({**good, "protocol": ["few-shot"]}).encode(),
        json.dumps({**good, "transfer": {"scenes": 3}}).encode(),
        json.dumps({**good, "bound": [1.0, None]}).encode(),
        json.dumps({**good, "bound": []}).encode(),
        json.dumps({**good, "shift_after": {"gap": None}}).encode(),
        json.dumps({**good, "per_class": {"base": [["red", "x", None]]}}).encode(),
        json.dumps({**good, "code": 3}).encode(),
        json.dumps({**good, "dataset": "\ud800"}).encode(),
        json.dumps(good).encode() + b"\xff",
    ]
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b"\n".join([b"\xef\xbb\xbf" + json.dumps(good).encode(), b"", *odd]))
    records, passed_over = results.read(file)
    assert records == [good]
    assert passed_over == len(odd)


@pytest.mark.parametrize("more", [
    {"shift_after": None}, {"per_class": {"base": [["red", None, None]]}}, {"split": None},
    {"flags": {"lr": None}}, {"bound": [0.5], "image_bound": [0.5]}, {"conflicts": [1, 0.5]},
])
def test_what_a_record_may_hold(more):
    assert results.is_record({**few_shot(), **more})


def test_the_number_of_lines_passed_over_is_told(tmp_path, monkeypatch, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(few_shot()) + "\nnull\n{}\n")
    monkeypatch.setattr(sys, "argv", ["common.py", str(file)])
    compare.main()
    assert "passed over 2 lines" in capsys.readouterr().err


def test_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["common.py", str(tmp_path / "none.jsonl")])
    with pytest.raises(Problem, match="no results yet"):
        compare.main()
    (tmp_path / "none.jsonl").write_text("null\n")
    with pytest.raises(Problem, match="no line of results"):
        compare.main()


def test_answers_without_torch(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(few_shot()))
    code = ("import sys; sys.argv = ['common.py', *sys.argv[1:]]; from data.compare import main; "
            "main(); sys.exit('torch' in sys.modules)")
    for flags in ([tmp_path / "r.jsonl"], ["--data", "--data-root", tmp_path]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=HERE,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"shapes" in done.stdout


# ---------------------------------------------------------------- rows

def rows_of(records):
    """{row: {shots: {seed: accuracy}}} of few-shot records on one data set."""
    (sets,) = results.group(records).values()
    (methods,) = sets.values()
    return {label: {n: {seed: r["accuracy"] for seed, r in seeds.items()}
                    for n, seeds in runs.items()} for label, runs in methods.items()}


def test_a_row_is_a_method_and_the_flags_that_are_no_defaults():
    changed = {"blend": [0.1, 0.0], "depth": 2, "ctx_init": "a photo", "class_specific": True,
               "seeds": [1], "out": "x", "dataset": "y", "again": True}
    assert results.name(few_shot("restore", changed=changed)) == (
        "restore --blend 0.1,0 --depth 2 --ctx-init 'a photo' --class-specific")


def test_of_equal_runs_the_last_one_counts():
    assert rows_of([few_shot(accuracy=10.0), few_shot(accuracy=20.0)]) == {"coop": {4: {1: 20.0}}}


def test_a_run_without_transfer_does_not_take_away_what_the_same_one_has_found(compared):
    scenes = {"scenes": {"zero_shot": 41.0, "accuracy": 43.0}}
    found, _, _ = compared([few_shot(transfer=scenes), few_shot()])
    assert found["shapes, tiny, few-shot, transfer to other data sets, 4 shots"][-1] == [
        "coop", "43.0"]


def test_runs_of_other_code_stand_side_by_side():
    old, new = few_shot(code="3fa2bc11"), few_shot(code="3fa2bd22", accuracy=80.0)
    assert rows_of([old]) == {"coop": {4: {1: 70.0}}}
    assert set(rows_of([old, new])) == {"coop [3fa2bc]", "coop [3fa2bd, newest]"}
    assert set(rows_of([new, old])) == {"coop [3fa2bd]", "coop [3fa2bc, newest]"}
    assert set(rows_of([few_shot(), new])) == {"coop [older]", "coop [3fa2, newest]"}
    assert set(rows_of([old, few_shot("prograd", code="ffff")])) == {"coop", "prograd"}


def test_a_loaded_run_adds_what_the_run_that_saved_it_was_not_tested_on():
    scenes = {"scenes": {"zero_shot": 41.0, "accuracy": 43.0}}
    loaded = few_shot(transfer=scenes, loaded="ctx", code="other", accuracy=70.1)
    (sets,) = results.group([loaded, few_shot(code="this")]).values()
    run = sets["shapes"]["coop"][4][1]
    assert (run["accuracy"], run["transfer"]) == (70.0, scenes)


def test_a_loaded_run_of_another_prompt_has_a_row_of_its_own():
    saved, loaded = few_shot(), few_shot(loaded="ctx", accuracy=33.0)
    assert rows_of([saved, loaded]) == {"coop": {4: {1: 70.0}}, "coop, loaded": {4: {1: 33.0}}}


def test_weights_splits_and_suites_are_kept_apart():
    records = [few_shot(pretrained="openai"), few_shot(pretrained="laion2b"),
               few_shot(dataset="eurosat", split="published split"),
               few_shot(dataset="eurosat", split="seeded 50/20/30 split"),
               few_shot(dataset="/home/u/pics", split="seeded 50/20/30 split")]
    groups = {key[:2]: list(sets) for key, sets in results.group(records).items()}
    assert groups == {
        ("embedded", "tiny openai"): ["shapes"],
        ("embedded", "tiny laion2b"): ["shapes"],
        ("papers", "tiny"): ["eurosat (published split)", "eurosat (seeded 50/20/30 split)"],
        ("own", "tiny"): ["pics"],
    }


def test_folders_are_named_by_as_much_of_the_path_as_tells_them_apart():
    folders = ["/home/u/birds", "/home/v/birds", "/data/cats", "shapes"]
    assert results.short_names(folders) == {
        "/home/u/birds": "u/birds", "/home/v/birds": "v/birds", "/data/cats": "cats",
        "shapes": "shapes"}


# ---------------------------------------------------------------- averages

def test_average_and_its_deviation_are_over_seeds_of_the_average(compared):
    runs = [base_to_new(dataset=dataset, seed=seed, base=base + seed, new=new - seed)
            for dataset, base, new in (("shapes", 90.0, 50.0), ("scenes", 70.0, 60.0))
            for seed in (1, 2, 3)]
    found, _, _ = compared(runs)
    assert found["average over 2 embedded data sets, tiny, base-to-new, 4 shots"] == [
        ["accuracy", "base", "new", "harmonic"],
        ["zero-shot", "80.0", "60.0", "68.6"],
        ["coop", "82.0 ± 1.0", "53.0 ± 1.0", "64.4 ± 0.4"],
    ]
    opposed = [few_shot(dataset="shapes", seed=1, accuracy=60.0),
               few_shot(dataset="shapes", seed=2, accuracy=80.0),
               few_shot(dataset="scenes", seed=1, accuracy=80.0),
               few_shot(dataset="scenes", seed=2, accuracy=60.0)]
    found, _, _ = compared(opposed)
    average = found["average over 2 embedded data sets, tiny, few-shot"]
    assert average[-1] == ["coop", "70.0 ± 0.0"]


def test_harmonic_mean_of_the_average_is_the_papers():
    runs = [base_to_new(base=82.69 + d, new=63.22 - 2 * d) for d in (-10, 10)]
    assert results.mean_record(runs)["harmonic"] == pytest.approx(71.66, abs=0.005)


def test_average_is_over_the_data_sets_that_all_rows_have_and_says_so(compared):
    runs = [few_shot(dataset=dataset) for dataset in ("shapes", "scenes", "shapes_noise")]
    runs += [few_shot("prograd", dataset=dataset) for dataset in ("shapes", "scenes")]
    runs += [few_shot("mvp_mi", dataset="shapes", accuracy=10.0)]
    runs += [few_shot(seed=2)]
    found, out, _ = compared(runs)
    rows = found["average over 2 embedded data sets, tiny, few-shot"]
    assert [row[0] for row in rows] == ["accuracy", "zero-shot", "coop", "prograd"]
    assert "over the 2 data sets that all rows have, without shapes_noise" in out
    assert "fewer than half of the data sets: mvp_mi" in out
    assert "the average of coop is over the seeds that all its data sets have: 1" in out
    matrix = found["embedded data sets, tiny, few-shot, 4 shots"]
    assert set(matrix[0]) == {"accuracy", "shapes", "shapes_noise", "scenes", "average"}
    assert ["mvp_mi", "10.0"] in matrix


def test_averages_come_first_and_markdown_folds_the_rest(compared):
    runs = [few_shot(dataset=dataset) for dataset in ("shapes", "scenes")]
    _, out, _ = compared(runs, "--markdown")
    order = [out.index(text) for text in ("**average", "<details>", "**shapes", "</details>")]
    assert order == sorted(order)


def test_transfer_has_an_average_over_targets_and_shifted_versions_have_their_own(compared):
    def to(**accuracy):
        return {name: {"zero_shot": 50.0, "accuracy": a} for name, a in accuracy.items()}

    runs = [few_shot(seed=1, transfer=to(scenes=40.0, sizes=60.0, shapes_noise=70.0)),
            few_shot(seed=2, transfer=to(scenes=42.0, sizes=58.0, shapes_noise=70.0))]
    found, _, _ = compared(runs)
    assert found["shapes, tiny, few-shot, transfer to other data sets, 4 shots"] == [
        ["accuracy", "scenes", "sizes", "average"],
        ["zero-shot", "50.0", "50.0", "50.0"],
        ["coop", "41.0 ± 1.4", "59.0 ± 1.4", "50.0 ± 0.0"]]
    assert found["shapes, tiny, few-shot, transfer to shifted versions, 4 shots"][-1] == [
        "coop", "70.0 ± 0.0"]


def test_published_numbers_stand_beside_the_real_eleven_only(compared, tmp_path, monkeypatch):
    published = {"method": "CoOp", "dataset": "average over 11", "backbone": "ViT-B-16",
                 "shots": 16, "seeds": [1, 2, 3], "protocol": "base-to-new", "base": 82.69,
                 "new": 63.22, "harmonic": 71.66, "source": "a table", "note": ""}
    (tmp_path / "published.json").write_text(json.dumps([published]))
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "published.json")

    def runs(sets, **more):
        more = {"backbone": "ViT-B-16", "pretrained": "openai", "shots": 16, **more}
        return [base_to_new(dataset=dataset, base=80.0, new=65.0, seed=seed, **more)
                for dataset in sets for seed in (1, 2)]

    found, _, _ = compared(runs(REAL))
    rows = found["average over 11 of the papers' data sets, ViT-B-16 openai, base-to-new, 16 shots"]
    assert rows[-2:] == [["published: CoOp, a table", "82.69", "63.22", "71.66"],
                         ["difference (here seeds 1,2, not 1,2,3)", "-2.7", "+1.8", "+0.1"]]
    assert "here RN50, not ViT-B-16" in compared(runs(REAL, backbone="RN50"))[1]
    assert "published: CoOp" in compared(runs(REAL, changed={"views": 0}))[1]
    seeded = [{**r, "split": "seeded 50/20/30 split"} if r["dataset"] == "dtd" else r
              for r in runs(REAL)]
    for others in (runs(REAL[1:]), runs(REAL, shots=4), runs(REAL, changed={"position": "front"}),
                   runs(["shapes", "scenes"]), seeded):
        assert "published:" not in compared(others)[1]


def test_against_another_row(compared):
    runs = [base_to_new(method, dataset=dataset, seed=seed, new=new + seed * (method == "prograd"))
            for method, news in (("coop", (50.0, 50.0)), ("prograd", (60.0, 44.0)))
            for dataset, new in zip(("shapes", "scenes"), news) for seed in (1, 2)]
    found, _, _ = compared(runs, "--against", "coop")
    rows = found["embedded data sets, tiny, base-to-new, 4 shots"]
    assert rows[0] == ["above coop by, on", "base", "new", "harmonic"]
    assert rows[1][:3] == ["zero-shot", "-10.0 ± 0.0, 0 of 2", "+10.0 ± 0.0, 2 of 2"]
    assert rows[2][:3] == ["prograd", "+0.0 ± 0.0, 0 of 2", "+3.5 ± 0.7, 1 of 2"]
    with pytest.raises(Problem, match="there are zero-shot, coop, prograd"):
        compared(runs, "--against", "CoOp")


def test_class_by_class_of_the_newest_run(compared):
    old = base_to_new(seed=2, per_class={"base": [["red", 0.0, "old"]]})
    new = base_to_new(seed=1, per_class={"base": [["red", 90.0, None], ["blue", 62.5, "red"]]})
    found, _, _ = compared([old, new, base_to_new("prograd")], "--classes")
    title = ("shapes, tiny, base-to-new, base classes (most often taken for), worst first; "
             "4 shots, seed 1")
    assert found == {title: [["class", "coop"], ["blue", "62.5 (red)"], ["red", "90.0"]]}
    with pytest.raises(Problem, match="no run has recorded its classes"):
        compared([few_shot()], "--classes")


# ---------------------------------------------------------------- tables

def test_mean_and_deviation_over_seeds_with_zero_shot_beside(compared):
    runs = [*(few_shot(seed=seed, accuracy=70.0 + seed) for seed in (1, 2, 3)),
            few_shot("prograd", accuracy=50.0), few_shot(shots=16, accuracy=90.0)]
    found, out, _ = compared(runs)
    assert "\033" not in out
    assert found == {"shapes, tiny, few-shot": [
        ["accuracy", "4 shots", "16 shots"],
        ["zero-shot", "60.0", "60.0"],
        ["coop", "72.0 ± 1.0", "90.0"],
        ["prograd", "50.0"]]}


def test_chosen_data_sets_only(compared):
    runs = [few_shot(), few_shot(dataset="scenes"), base_to_new(dataset="scenes")]
    assert set(compared(runs, "--datasets", "shapes")[0]) == {"shapes, tiny, few-shot"}
    with pytest.raises(Problem, match="there are runs on scenes, shapes"):
        compared(runs, "--datasets", "nonsense")


def test_another_template_has_another_zero_shot_row(compared):
    runs = [few_shot(), few_shot(changed={"template": "a {}."}, zero_shot=33.0)]
    rows = compared(runs)[0]["shapes, tiny, few-shot"]
    assert rows[1:3] == [["zero-shot", "60.0"], ["zero-shot --template 'a {}.'", "33.0"]]


def test_a_table_for_each_number_of_shots_with_the_shift_gap(compared):
    runs = [base_to_new("restore", seed=seed, shift_after={"gap": gap})
            for seed, gap in ((1, 0.1), (2, 0.3))]
    found, _, _ = compared([base_to_new(), *runs, base_to_new(shots=16)])
    assert found["shapes, tiny, base-to-new, 4 shots"] == [
        ["accuracy", "base", "new", "harmonic", "shift gap"],
        ["zero-shot", "80.0", "60.0", "68.6"],
        ["coop", "90.0", "50.0", "64.3"],
        ["restore", "90.0 ± 0.0", "50.0 ± 0.0", "64.3 ± 0.0", "0.20"]]
    assert found["shapes, tiny, base-to-new, 16 shots"][-1] == ["coop", "90.0", "50.0", "64.3"]


def test_the_best_is_bold_where_the_terminal_can_and_in_markdown(compared, monkeypatch):
    runs = [few_shot(), few_shot("prograd", accuracy=50.0)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, bold, _ = compared(runs)
    assert "\033[1m70.0\033[0m" in bold
    assert bold.count("\033[1m") == 1
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain, _ = compared(runs)
    assert plain == bold.replace("\033[1m", "").replace("\033[0m", "")  # nothing moves
    _, markdown, _ = compared(runs, "--markdown")
    assert "| accuracy | 4 shots |\n| --- | --- |\n| zero-shot | 60.0 |" in markdown
    assert "| coop | **70.0** |" in markdown


def test_odd_names_break_neither_columns_nor_lines(compared):
    long = {"ctx_init": "a photo of a thing that nobody has ever seen"}
    odd = {"ctx_init": "a|b\n\033[31mc"}
    _, out, _ = compared([few_shot(), few_shot(changed=long), few_shot(changed=odd)])
    lines = out.splitlines()
    place = next(k for k, line in enumerate(lines) if "nobody" in line)
    assert lines[place].endswith("seen'")
    assert len({len(line) for line in lines[2:] if "nobody" not in line}) == 1
    assert "\033" not in out
    assert r"a\|b" in compared([few_shot(changed=odd)], "--markdown")[1]


# ---------------------------------------------------------------- pictures

def drawn(records):
    """{question: axes} of what can be drawn, the average over data sets if there is one."""
    from matplotlib.figure import Figure

    found = {}
    _, _, few, base, sets = next(pictures.worlds(results.group(records)))
    for question in (pictures.accuracy_over_shots, pictures.base_against_new, pictures.conflicts,
                     pictures.gap_against_gain, pictures.bound):
        figure = Figure()
        if question(figure, few, base)[0]:
            found[question.__name__] = figure.axes
    figure = Figure()
    if pictures.change_by_data_set(figure, *sets)[0]:
        found["change_by_data_set"] = figure.axes
    return found


def legend(axes):
    return axes.get_legend_handles_labels()[1]


def test_one_picture_per_question_the_same_every_time(compared):
    training = {"conflicts": [0.0, 0.5, 1.0], "cosine": [0.5, 0.0, -0.5]}
    runs = [few_shot(), few_shot("prograd", **training),
            few_shot("mvp_mi", bound=[1.0, 2.0], log_C=math.log(24)),
            *(base_to_new("restore", seed=seed, shift_after={"gap": seed / 10}) for seed in (1, 2)),
            base_to_new()]
    _, out, folder = compared(runs, "--plot")
    files = {path.stem: path for path in folder.glob("*.png")}
    assert set(files) == {
        "shapes-accuracy-over-shots", "shapes-base-against-new", "shapes-conflicts",
        "shapes-gap-against-gain", "shapes-bound"}
    for path in files.values():
        assert f"{path}: " in out
        with Image.open(path) as image:
            shades = image.convert("L").getcolors(256)
            assert image.width > 600 and len(shades) > 20  # something is drawn
    before = {name: path.read_bytes() for name, path in files.items()}
    compared(runs, "--plot")
    assert before == {name: path.read_bytes() for name, path in files.items()}


def test_pictures_of_averages_stand_for_those_of_their_data_sets(compared):
    runs = [base_to_new(), base_to_new(dataset="scenes"), few_shot()]
    _, _, folder = compared(runs, "--plot")
    assert {path.stem for path in folder.glob("*.png")} == {
        "embedded-base-against-new", "embedded-change-by-data-set", "shapes-accuracy-over-shots"}
    compared(runs, "--plot", "--datasets", "shapes")
    assert (folder / "shapes-base-against-new.png").exists()


def test_accuracy_over_shots_stands_at_its_tick():
    (axes,) = drawn([few_shot(seed=seed, accuracy=70.0 + seed) for seed in (1, 2)])[
        "accuracy_over_shots"]
    point, _, bars = axes.containers[0]
    assert point.get_xdata() == pytest.approx([2])  # log2 of 4 shots
    assert point.get_ydata() == pytest.approx([71.5])
    ends = bars[0].get_segments()[0][:, 1]
    assert ends == pytest.approx([71.5 - math.sqrt(0.5), 71.5 + math.sqrt(0.5)])
    assert axes.get_ylim()[1] - axes.get_ylim()[0] >= 10


def test_several_methods_stand_side_by_side_around_the_tick():
    (axes,) = drawn([few_shot(), few_shot("prograd"), few_shot("mvp_mi")])["accuracy_over_shots"]
    x = [container[0].get_xdata()[0] for container in axes.containers]
    assert sum(x) / 3 == pytest.approx(2)
    assert len(set(x)) == 3


def test_curves_of_equal_harmonic_mean():
    (axes,) = drawn([base_to_new()])["base_against_new"]
    named = {float(text.get_text().removeprefix("H = ")) for text in axes.texts}
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 50]
    means = {round((2 / (1 / curve).sum(1)).mean(), 6) for curve in curves}
    assert named and means == named


def test_shots_are_told_apart():
    restore = {"method": "restore", "shift_after": {"gap": 0.2}}
    runs = [base_to_new(**restore), base_to_new(shots=16, **restore)]
    found = drawn(runs)
    for question in ("base_against_new", "gap_against_gain"):
        texts = {text.get_text() for text in found[question][0].texts}
        assert {"4", "16"} <= texts
    assert pictures.about_shots([16]) == " (16 shots)"


def test_gap_against_gain_of_single_runs():
    runs = [base_to_new("restore", seed=seed, new=60.0 - seed, shift_after={"gap": seed / 100})
            for seed in (1, 2)]
    (axes,) = drawn(runs)["gap_against_gain"]
    assert axes.lines[0].get_xydata().ravel() == pytest.approx([0.01, -1.0, 0.02, -2.0])
    assert axes.get_xlim()[1] - axes.get_xlim()[0] >= 0.1


def test_conflicts_are_means_over_seeds_and_data_sets():
    runs = [few_shot("prograd", seed=seed, dataset=dataset, conflicts=[0.0, seed - 1.0],
                     cosine=[0.5, -0.5]) for seed in (1, 2) for dataset in ("shapes", "scenes")]
    rate, _ = drawn(runs)["conflicts"]
    assert rate.lines[0].get_ydata() == pytest.approx([0.0, 0.5])
    assert rate.lines[0].get_xdata() == pytest.approx([25, 75])


def test_all_bounds_are_drawn_and_what_coincides_is_said():
    runs = [few_shot("mvp_mi", bound=[1.0, 2.0], image_bound=[0.5, 0.7], log_C=2.0),
            few_shot("mvp_mi", shots=16, bound=[1.0, 2.0], image_bound=[0.5, 0.9], log_C=2.0)]
    (axes,) = drawn(runs)["bound"]
    written, images = ", of the written prompt", ", of mixed images"
    assert legend(axes) == [
        f"MVP-MI, 4 shots{written}", f"MVP-MI, 16 shots{written} (as MVP-MI, 4 shots{written})",
        f"MVP-MI, 4 shots{images}", f"MVP-MI, 16 shots{images}"]


def test_a_bound_is_drawn_as_a_share_of_log_C():
    (axes,) = drawn([few_shot("mvp_mi", bound=[1.0, 2.0], log_C=2.0)])["bound"]
    assert axes.lines[0].get_ydata() == pytest.approx([50, 100])


def test_change_by_data_set_and_on_average():
    runs = [base_to_new(method, dataset=dataset, new=new, zero_shot=(80.0, 60.0))
            for method in ("coop", "prograd")
            for dataset, new in (("shapes", 50.0), ("scenes", 64.0))]
    (axes,) = drawn(runs)["change_by_data_set"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["shapes", "scenes", "average"]
    changes = [container[0].get_ydata()[0] for container in axes.containers]
    assert changes == pytest.approx(2 * [-10, 4, -3])
    assert legend(axes) == ["CoOp", "ProGrad"]


def test_at_most_eight_names_and_the_others_are_told(compared):
    runs = [few_shot(changed={"lr": k / 10}) for k in range(1, 10)] + [few_shot("restore")]
    assert len(legend(drawn(runs)["accuracy_over_shots"][0])) == 8 + 1  # zero-shot
    _, out, _ = compared(runs, "--plot")
    assert "a picture holds 8 names: coop --lr 0.8; coop --lr 0.9" in out


@pytest.mark.parametrize("label, words", [
    ("coop", "CoOp"),
    ("restore --towers text --blend 0", "RESTORE, text prompts only, no surgery"),
    ("restore --blend 0.1", "RESTORE, --blend 0.1"),
    ("coop --ctx-init 'a photo of a'", 'CoOp, from "a photo of a"'),
    ("prograd --projection 0 [3fa2, newest]", "ProGrad, no projection [3fa2, newest]"),
    ("kgcoop, loaded", "kgcoop, loaded"),
    ("coop --ctx-init 'a $x_$'", r'CoOp, from "a \$x_\$"'),
])
def test_legends_speak_the_words_of_the_readme(label, words):
    assert pictures.in_words(label) == words


def test_styles_can_be_told_apart_without_colour():
    styles = [style for _, style in pictures.styled(["coop", *"abcdefg"])]
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == 8


def test_the_four_methods_always_look_alike():
    alone = dict(pictures.styled(["restore"]))["restore"]
    among = dict(pictures.styled(["a", "coop", "b", "restore"]))["restore"]
    assert alone == among


def test_without_matplotlib_the_rest_still_works(compared, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "70.0" in compared([few_shot()])[1]
    with pytest.raises(Problem, match="pip install matplotlib"):
        compared([few_shot()], "--plot")


def test_from_the_four_methods_to_pictures(cli, compared):
    flags = ("--epochs", 1, "--views", 1, "--shots", 1, "--base-to-new")
    methods = ("coop", "prograd", "mvp_mi", "restore")
    records = [r for method in methods for r in cli(method, *flags).records]
    found, _, folder = compared(records, "--plot")
    (rows,) = found.values()
    assert [row[0].split()[0] for row in rows[2:6]] == list(methods)
    assert {path.stem for path in folder.glob("*.png")} == {
        "shapes-base-against-new", "shapes-conflicts", "shapes-gap-against-gain", "shapes-bound"}
