import builtins
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from hf_aselect import plots
from hf_aselect.plots import (
    plot_confusion_matrix,
    plot_overlays,
    plot_predictions,
    plot_timestep_curve,
    plot_timestep_heat_map,
)

TIMESTEPS, SCORES, LOG_SNR = [0, 50, 400, 999], [0.1, 0.3, 0.2, 0.1], [9.2, 3.5, -0.03, -10.1]
PICTURES = [Image.new("L", (8, 8), 30 * index) for index in range(3)]


def test_the_curve_is_a_picture(tmp_path):
    intervals = [[score - 0.05, score + 0.05] for score in SCORES]
    plot_timestep_curve(tmp_path / "c.png", TIMESTEPS, SCORES, LOG_SNR, 50, intervals, accuracies=SCORES)
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_the_choice_changes_the_picture(tmp_path):
    for chosen in (50, 400):
        plot_timestep_curve(tmp_path / f"{chosen}.png", TIMESTEPS, SCORES, LOG_SNR, chosen)
    assert (tmp_path / "50.png").read_bytes() != (tmp_path / "400.png").read_bytes()


def test_the_curve_has_interval_choice_and_both_axes_and_is_readable_in_grey(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    intervals = [[score - 0.05, score + 0.07] for score in SCORES]
    plot_timestep_curve(
        tmp_path / "c.png", TIMESTEPS, SCORES, LOG_SNR, 50, intervals, smoothed=SCORES[::-1], accuracies=SCORES
    )
    axes, right = drawn[0].axes
    (band,) = axes.collections
    places = [-value for value in LOG_SNR]
    corners = band.get_paths()[0].vertices
    for place, (low, high) in zip(places, intervals, strict=True):
        heights = corners[np.isclose(corners[:, 0], place), 1]
        assert np.allclose([heights.min(), heights.max()], [low, high])
    scores, neighbours, choice = axes.lines
    assert np.allclose(scores.get_xydata(), list(zip(places, SCORES, strict=True)))
    assert np.allclose(choice.get_xdata(), places[1])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0\n9.2", "50\n3.5", "400\n0.0", "999\n−10.1"]
    assert "log-SNR" in axes.get_xlabel()
    # No two lines differ by colour alone.
    styles = [(line.get_linestyle(), line.get_marker()) for line in (scores, neighbours, choice, *right.lines)]
    assert len(set(styles)) == 4


def test_a_choice_outside_the_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"selected timestep must be one of .*, got 7"):
        plot_timestep_curve(tmp_path / "c.png", TIMESTEPS, SCORES, LOG_SNR, 7)


@pytest.mark.parametrize("name", ["scores", "log_snr", "intervals", "accuracies"])
def test_lengths_that_differ_are_refused(tmp_path, name):
    values = {"scores": SCORES, "log_snr": LOG_SNR, "intervals": None, "accuracies": None, name: [0.1]}
    with pytest.raises(ValueError, match=f"`{name}` must have one entry for each of 4 timesteps, got 1"):
        plot_timestep_curve(tmp_path / "c.png", TIMESTEPS, selected=50, **values)


TAPS = ["block 0, hidden", "block 3, query"]


def test_the_heat_map_shows_its_choice(tmp_path):
    for tap in TAPS:
        plot_timestep_heat_map(
            tmp_path / f"{tap}.png", TIMESTEPS, LOG_SNR, TAPS, [SCORES, SCORES[::-1]], tap, 50, "accuracy"
        )
    pictures = [(tmp_path / f"{tap}.png").read_bytes() for tap in TAPS]
    assert pictures[0] != pictures[1]
    with Image.open(tmp_path / f"{TAPS[0]}.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": [SCORES]}, "`values` must have one row for each of 2 taps, got 1"),
        ({"values": [SCORES, SCORES[:3]]}, "block 3, query` must have one entry for each of 4 timesteps, got 3"),
        ({"log_snr": [1.0]}, "`log_snr` must have one entry for each of 4 timesteps, got 1"),
        ({"selected_tap": "block 9, key"}, "got 'block 9, key'"),
        ({"selected_timestep": 7}, "selected timestep must be one of .*, got 7"),
    ],
)
def test_a_heat_map_that_does_not_fit_is_refused(tmp_path, changed, message):
    good = {
        "timesteps": TIMESTEPS,
        "log_snr": LOG_SNR,
        "taps": TAPS,
        "values": [SCORES, SCORES],
        "selected_tap": TAPS[0],
        "selected_timestep": 50,
        "label": "accuracy",
    }
    with pytest.raises(ValueError, match=message):
        plot_timestep_heat_map(tmp_path / "h.png", **{**good, **changed})
    assert not list(tmp_path.iterdir())


def test_the_predictions_are_a_picture(tmp_path):
    plot_predictions(tmp_path / "p.png", PICTURES, ["cat", "dog", "cat"], ["cat", "cat", "cat"])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"


def test_long_names_are_cut_and_do_not_run_into_the_next_image(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    names = ["American pit bull terrier", "Staffordshire bull terrier", "Ankle boot"]
    plot_predictions(tmp_path / "p.png", PICTURES, names, [names[1], names[1], names[2]])
    (figure,) = drawn
    figure.draw_without_rendering()
    titles = [axes.title for axes in figure.axes]
    assert titles[0].get_text() == "✗ Staffordshire b…\ntrue: American pit…"
    assert titles[2].get_text() == "✓ Ankle boot"
    boxes = [title.get_window_extent() for title in titles]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_wrong_predictions_look_different(tmp_path):
    plot_predictions(tmp_path / "right.png", PICTURES, ["cat"] * 3, ["cat"] * 3)
    plot_predictions(tmp_path / "wrong.png", PICTURES, ["dog"] * 3, ["cat"] * 3)
    assert (tmp_path / "right.png").read_bytes() != (tmp_path / "wrong.png").read_bytes()


@pytest.mark.parametrize(("pictures", "names"), [([], []), (PICTURES, ["cat"])])
def test_a_sheet_without_a_name_for_each_picture_is_refused(tmp_path, pictures, names):
    with pytest.raises(ValueError, match="must have the same length of at least 1"):
        plot_predictions(tmp_path / "p.png", pictures, names, names)


MASKS = [np.array([[0, 1], [2, 255]]), np.array([[1, 1], [0, 0]])]


@pytest.mark.process
def test_overlays_show_pictures_masks_and_predictions(tmp_path):
    pictures = [np.zeros((2, 2)), np.ones((2, 2, 3))]
    plot_overlays(tmp_path / "o.png", pictures, MASKS, MASKS[::-1], ["sky", "road", "car"])
    shown = np.asarray(Image.open(tmp_path / "o.png").convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(shown, axis=0)}
    # The classes' colours (matplotlib's tab20), and black for pixels of no class.
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (0, 0, 0), (255, 255, 255)} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["o.png"]


def test_overlays_can_be_read_in_grey_by_the_numbers_of_classes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    mask = np.full((40, 60), 1)
    mask[5:35, 5:15] = mask[25:35, 5:50] = 0  # an L, whose mean lies beside it
    mask[0, :4] = 2  # less than 2 % of the pixels
    plot_overlays(tmp_path / "o.png", [np.zeros((40, 60))], [mask], [mask], ["sky", "road", "car"])
    (figure,) = drawn
    image, truth, prediction = figure.axes
    assert not image.texts and len(prediction.texts) == 2
    for text, index in zip(truth.texts, (0, 1), strict=True):
        column, row = text.get_position()
        assert text.get_text() == str(index) and (mask[row - 3 : row + 4, column - 3 : column + 4] == index).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0 sky", "1 road", "2 car"]


def test_overlays_need_a_mask_for_each_picture(tmp_path):
    with pytest.raises(ValueError, match="got 1, 2 and 2"):
        plot_overlays(tmp_path / "o.png", [np.zeros((2, 2))], MASKS, MASKS, ["sky"])


def test_a_plot_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "c.png").write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(plots.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_timestep_curve(tmp_path / "c.png", TIMESTEPS, SCORES, LOG_SNR, 50)
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    assert (tmp_path / "c.png").read_text() == "old"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'hf_aselect\[demo\]'"):
        plot_timestep_curve(tmp_path / "c.png", TIMESTEPS, SCORES, LOG_SNR, 50)


def texts_of_the_figure(monkeypatch):
    """Collect the texts of what is drawn."""
    found = []
    save = plots._save

    def collect(figure, path):
        for axes in figure.axes:
            found.append([text.get_text() for text in (*axes.get_yticklabels(), *axes.texts)])
        found.append([figure.get_suptitle()])
        save(figure, path)

    monkeypatch.setattr(plots, "_save", collect)
    return found


def test_the_confusion_matrix_tells_what_each_class_is_taken_for(tmp_path, monkeypatch):
    found = texts_of_the_figure(monkeypatch)
    true, predicted = [0, 0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 0, 0, 2]
    plot_confusion_matrix(tmp_path / "c.png", true, predicted, ["cat", "dog", "hen"])
    matrix, bars, (title,) = found
    assert matrix[:2] == ["hen", "cat"]  # the worst first; no image is a dog
    assert matrix[2:] == ["33", "67", "25", "75"]
    assert bars == ["33.3 % of 3", "75.0 % of 4"]
    assert title == "57.1% of 7 images correct"
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"


def test_of_many_classes_the_worst_are_drawn(tmp_path, monkeypatch):
    found = texts_of_the_figure(monkeypatch)
    true = np.repeat(np.arange(50), 2)
    predicted = true.copy()
    predicted[10:20:2] = 0
    plot_confusion_matrix(tmp_path / "c.png", true, predicted, [str(index) for index in range(50)], max_classes=6)
    assert found[0][:6] == ["5", "6", "7", "8", "9", "0"]
    assert found[-1] == ["95.0% of 100 images correct; the 6 worst of 50 classes"]


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [([], [], "the same length of at least 1"), ([0, 1], [0], "got 2 and 1"), ([0, 3], [0, 1], r"in \[0, 3\)")],
)
def test_a_confusion_of_nothing_is_refused(tmp_path, true, predicted, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion_matrix(tmp_path / "c.png", true, predicted, ["a", "b", "c"])
    assert not list(tmp_path.iterdir())
