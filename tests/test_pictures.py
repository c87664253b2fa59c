"""Pictures of recorded runs: what each shows, and that a method looks the same everywhere."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from data.results import pictures
from data.results.tables import arrange, flatten, keep_one_version, name_rows
from test_tables import printed, record     # noqa: F401 (a fixture)


def axes_of(question, found):
    """The axes that a question draws of made-up records, which it can answer."""
    cells = arrange(name_rows(keep_one_version(flatten(found))[0]))
    _, _, some, means = next(pictures.views(cells))
    figure = Figure()
    assert question(figure, some, means)
    return figure.axes


def points(axes):
    return [tuple(point) for line in axes.lines for point in line.get_xydata()]


def colour(axes, label):
    handles, labels = axes.get_legend_handles_labels()
    return handles[labels.index(label)][0].get_color()


def test_one_picture_per_question(printed, tmp_path):      # noqa: F811
    found = [record("prograd", new=50.0, conflicts=[0.0, 0.5], kl={"new": 0.1}),
             record("prograd", new=50.0, dataset="scenes"), record(), record(shots=16)]
    _, out = printed(found, "--all", "--plot")
    files = {file.stem: file for file in tmp_path.glob("*.png")}
    assert set(files) == {
        "shapes-few-shot-accuracy-over-shots", "embedded-base-to-new-base-against-new",
        "embedded-base-to-new-change-by-data-set", "embedded-base-to-new-over-training",
        "embedded-base-to-new-gap-against-gain"}
    for file in files.values():
        assert f"{file}: " in out
        with Image.open(file) as image:
            assert image.width > 600 and len(image.convert("L").getcolors(256)) > 20


def test_accuracy_over_shots_is_mean_and_deviation_at_log2_of_the_shots():
    axes, = axes_of(pictures.accuracy_over_shots,
                    [record(seed=seed, accuracy=70.0 + seed) for seed in (1, 2)])
    point, _, bars = axes.containers[1]         # after zero-shot
    assert point.get_xdata() == pytest.approx([2], abs=0.1)
    assert point.get_ydata() == pytest.approx([71.5])
    assert bars[0].get_segments()[0][:, 1] == pytest.approx([71.5 - 0.5**0.5, 71.5 + 0.5**0.5])
    assert axes.get_ylim()[1] - axes.get_ylim()[0] >= 10


def test_base_against_new_names_the_shots_and_curves_of_equal_harmonic_mean():
    axes, = axes_of(pictures.base_against_new, [record(new=50.0), record(new=55.0, shots=16)])
    assert {(80, 60), (90, 50), (90, 55)} <= {tuple(map(round, point)) for point in points(axes)}
    texts = {text.get_text() for text in axes.texts}
    assert {"4", "16", "H = 65"} <= texts


def test_change_by_data_set_and_on_average():
    axes, = axes_of(pictures.change_by_data_set, [
        record(method, dataset=dataset, new=new) for method in ("coop", "prograd")
        for dataset, new in (("shapes", 50.0), ("scenes", 64.0))])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["shapes", "scenes", "average"]
    changed = [y for container in axes.containers for y in container[0].get_ydata()]
    assert changed == pytest.approx(2 * [-10, 4, -3])


def test_histories_are_means_over_seeds_and_data_sets_whatever_a_method_logs():
    found = [record("prograd", seed=seed, dataset=dataset, conflicts=[0.0, seed - 1.0])
             for seed in (1, 2) for dataset in ("shapes", "scenes")]
    found += [record("mine", entropy=[3.0, 2.0, 1.0], shift=[[1.0], [2.0]])]
    conflicts, entropy = axes_of(pictures.over_training, found)
    assert points(conflicts) == [(25, 0.0), (75, 0.5)]
    assert entropy.get_ylabel() == "entropy"


def test_gap_against_gain_of_single_runs():
    found = [record("restore", seed=seed, new=60.0 - seed, shift_after={"gap": seed / 100})
             for seed in (1, 2)]
    axes, = axes_of(pictures.gap_against_gain, found)
    assert points(axes)[:2] == [(0.01, -1.0), (0.02, -2.0)]


def test_a_method_has_its_colour_alone_and_among_others():
    alone, = axes_of(pictures.accuracy_over_shots, [record("prograd")])
    among, = axes_of(pictures.accuracy_over_shots, [
        record("a"), record(), record(changed={"lr": 0.1}), record("prograd"), record("restore")])
    assert colour(alone, "ProGrad") == colour(among, "ProGrad") == "#0072B2"
    labels = "a", "CoOp", "CoOp --lr 0.1", "ProGrad", "RESTORE", "zero-shot"
    assert len({colour(among, label) for label in labels}) == 6
