"""The comparison: python common.py over recorded runs, as tables and as pictures."""

import json
import math
import re
import sys

import pytest
from PIL import Image

import common
from data import pictures, results


def record(method, seed, shots=4, protocol="few-shot", changed=None, **more):
    """A made-up line of results."""
    measured = {"zero_shot": 60.0, "accuracy": 70.0 + seed}
    if protocol == "base-to-new":
        measured = {"base": 90.0, "new": 50.0, "harmonic": 64.3, "zero_shot_base": 80.0, "zero_shot_new": 60.0, "zero_shot_harmonic": 68.6}
    return {"method": method, "dataset": "shapes", "backbone": "tiny", "protocol": protocol, "shots": shots, "seed": seed,
            "changed": changed or {}, "transfer": {}, **measured, **more}


RUNS = [record("coop", 1), record("coop", 2), record("coop", 3), record("prograd", 1, accuracy=50.0),
        record("coop", 1, shots=16, accuracy=90.0), record("restore", 1, changed={"blend": 0.0, "depth": 2, "seeds": [1], "out": "x"}, transfer={"scenes": {"zero_shot": 41.0, "accuracy": 40.0}}),
        record("coop", 1, accuracy=0.0, loaded="a.safetensors")]


@pytest.fixture
def compare(tmp_path, monkeypatch, capfd):
    """Writes the records into a file, runs `python common.py FILE FLAGS` and returns its output and the folder."""

    def run(records, *flags):
        file = tmp_path / "results.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"method": "cut sh')
        monkeypatch.setattr(sys, "argv", ["common.py", str(file), *flags])
        common.main()
        return capfd.readouterr().out, tmp_path

    return run


def test_table_shows_mean_and_deviation_over_seeds_with_zero_shot_beside(compare):
    out, _ = compare(RUNS)
    rows = [[cell.strip() for cell in re.split("  +", line.strip())] for line in out.splitlines()]
    assert ["shapes, tiny, few-shot"] in rows and "\033" not in out
    assert rows[2:7] == [["accuracy", "4 shots", "16 shots"], ["zero-shot", "60.0", "60.0"], ["coop", "72.0 ± 1.0", "90.0"], ["prograd", "50.0"],
                         ["restore --blend 0 --depth 2", "71.0"]]
    assert rows[-3:] == [["accuracy", "shots", "scenes"], ["zero-shot", "41.0"], ["restore --blend 0 --depth 2", "4", "40.0"]]


def test_of_equal_runs_the_last_one_counts(compare):
    out, _ = compare([record("coop", 1, accuracy=10.0), record("coop", 1, accuracy=20.0)])
    assert "20.0" in out and "10.0" not in out and "±" not in out
    out, _ = compare([record("coop", 1, transfer={"scenes": {"zero_shot": 41.0, "accuracy": 43.0}}), record("coop", 1, transfer={})])
    assert "43.0" in out  # a run without --transfer does not take away what the same run with it has found
    out, _ = compare([record("coop", 1, pretrained="openai", accuracy=10.0), record("coop", 1, pretrained="laion2b", accuracy=20.0)])
    assert "shapes, tiny openai, few-shot" in out and "10.0" in out and "20.0" in out


def test_best_is_bold_where_the_terminal_can_and_in_markdown(compare, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    bold, _ = compare(RUNS)
    assert "\033[1m72.0 ± 1.0\033[0m" in bold and "\033[1m41.0\033[0m" in bold and bold.count("\033[1m") == 3  # zero-shot may be the best
    monkeypatch.setenv("NO_COLOR", "1")
    plain, _ = compare(RUNS)
    assert plain == bold.replace("\033[1m", "").replace("\033[0m", "")  # and nothing moves
    markdown, _ = compare(RUNS, "--markdown")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert "| coop | **72.0 ± 1.0** | **90.0** |" in table and {line.count("|") for line in table[:5]} == {4}


def test_base_new_and_the_shift_gap(compare):
    runs = [record("coop", 1, protocol="base-to-new"), *(record("restore", seed, protocol="base-to-new", shift_after={"gap": gap}) for seed, gap in ((1, 0.1), (2, 0.3)))]
    lines = compare(runs, "--markdown")[0].splitlines()
    assert "| accuracy | shots | base | new | harmonic | shift gap |" in lines
    assert "| zero-shot |  | 80.0 | **60.0** | **68.6** |  |" in lines and "| coop | 4 | **90.0** | 50.0 | 64.3 |  |" in lines
    assert "| restore | 4 | **90.0 ± 0.0** | 50.0 ± 0.0 | 64.3 ± 0.0 | 0.20 |" in lines
    assert "shift gap" not in compare(runs[:1])[0]


def test_one_picture_per_question(compare):
    training = {"conflicts": [0.0, 0.5, 1.0], "cosine": [0.5, 0.0, -0.5]}
    runs = [record("coop", 1), record("coop", 1, shots=16), record("prograd", 1, **training), record("mvp_mi", 1, bound=[1.0, 2.0], log_C=math.log(24)),
            record("prograd", 1, protocol="base-to-new", **training),
            *(record("restore", s, protocol="base-to-new", shift_after={"gap": s / 10}) for s in (1, 2))]
    out, folder = compare(runs, "--plot")
    drawn = {path.name.removeprefix("shapes-"): path for path in folder.glob("*.png")}
    assert set(drawn) == {"accuracy-over-shots.png", "base-against-new.png", "conflicts.png", "gap-against-gain.png", "bound.png"}
    assert all(f"{path}: " in out for path in drawn.values()) and out.count("?") == 5
    for path in drawn.values():
        with Image.open(path) as image:
            assert image.width > 600 and len(image.convert("L").getcolors(256)) > 20  # something is drawn, in shades
    before = {name: path.read_bytes() for name, path in drawn.items()}
    compare(runs, "--plot")
    assert before == {name: path.read_bytes() for name, path in drawn.items()}
    assert [path.name for path in compare(runs[:1], "--plot")[1].glob("*.png")]


def figures(records, tmp_path):
    """The axes of every question's figure that can be drawn."""
    from matplotlib.figure import Figure

    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    groups, found = results.read(tmp_path / "r.jsonl"), {}
    protocols = {protocol: methods for (_, _, protocol), methods in groups.items()}
    for question in (pictures.accuracy_over_shots, pictures.base_against_new, pictures.conflicts, pictures.gap_against_gain, pictures.bound):
        figure = Figure()
        if question(figure, protocols.get("few-shot", {}), protocols.get("base-to-new", {})):
            found[question.__name__] = figure.axes
    return found


def test_pictures_draw_what_was_recorded(tmp_path):
    found = figures([record("prograd", seed, conflicts=[0.0, seed - 1.0], cosine=[0.5, -0.5]) for seed in (1, 2)], tmp_path)
    assert set(found) == {"accuracy_over_shots", "conflicts"}
    assert found["conflicts"][0].lines[0].get_ydata() == pytest.approx([0.0, 0.5]) and found["conflicts"][0].lines[0].get_xdata() == pytest.approx([25, 75])
    point, _, bars = found["accuracy_over_shots"][0].containers[0]
    assert point.get_ydata() == pytest.approx([71.5])
    assert bars[0].get_segments()[0][:, 1] == pytest.approx([71.5 - math.sqrt(0.5), 71.5 + math.sqrt(0.5)])
    gains = figures([record("restore", seed, protocol="base-to-new", shift_after={"gap": seed / 10}, new=60.0 - seed) for seed in (1, 2)], tmp_path)["gap_against_gain"]
    assert gains[0].lines[0].get_xydata().ravel() == pytest.approx([0.1, -1.0, 0.2, -2.0])


def test_curves_of_equal_harmonic_mean(tmp_path):
    axes = figures([record("coop", 1, protocol="base-to-new")], tmp_path)["base_against_new"][0]
    named = {float(text.get_text().removeprefix("H = ")) for text in axes.texts}
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 50]
    means = {round((2 / (1 / curve).sum(1)).mean(), 6) for curve in curves}
    assert means == named and means and all((2 / (1 / curve).sum(1)).std() < 1e-9 for curve in curves)


def test_styles_can_be_told_apart_without_colour():
    assert len({marker for _, marker, _ in pictures.STYLES}) == len({str(dashes) for *_, dashes in pictures.STYLES}) == len(pictures.STYLES)


def test_without_matplotlib_the_rest_still_works(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "72.0 ± 1.0" in compare(RUNS)[0]
    with pytest.raises(common.Problem, match="pip install matplotlib"):
        compare(RUNS, "--plot")


def test_no_results_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["common.py", str(tmp_path / "none.jsonl"), "--plot"])
    with pytest.raises(common.Problem, match="no results yet"):
        common.main()


def test_from_the_four_methods_to_pictures(cli, compare):
    records = [r for method in ("coop", "prograd", "mvp_mi", "restore") for r in cli(method, "--epochs", 1, "--views", 1, "--shots", 1, "--base-to-new").records]
    out, folder = compare(records, "--plot")
    assert {path.name for path in folder.glob("*.png")} == {f"shapes-{name}.png" for name in ("base-against-new", "conflicts", "gap-against-gain", "bound")}
    assert all(f"\n  {method} " in out for method in ("coop", "prograd", "mvp_mi", "restore"))  # --epochs and --views are named
