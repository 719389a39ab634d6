"""Trade-offs: the front is that of the definition, and the plot shows every mark."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.eval.pareto import Mark, pareto_front, trade_off


@pytest.mark.parametrize("higher", [(True, True), (True, False), (False, False)])
def test_the_front_is_what_nothing_beats(higher):
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(1)).tolist()
    front = set(pareto_front([tuple(p) for p in points], higher))
    signs = [1 if up else -1 for up in higher]

    def beats(a, b):
        gains = [sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    for index, point in enumerate(points):
        assert (index in front) is not any(beats(other, point) for other in points)


def test_equal_points_share_the_front_and_nan_is_never_there():
    points = [(1.0, 1.0), (1.0, 1.0), (0.0, 2.0), (math.nan, 9.0)]
    assert pareto_front(points, (True, True)) == [2, 0, 1]


def test_every_mark_and_family_is_drawn():
    marks = [
        Mark("cfg", "2", 0.7, 60.0, 0.02),
        Mark("cfg", "4", 0.9, 45.0),
        Mark("apg", "", 0.8, 40.0),
    ]
    figure = trade_off(marks, x_label="accuracy", y_label="fd", higher=(True, False))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "4", ""]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(legend) == {"not beaten in both", "cfg", "apg"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("accuracy ↑", "fd ↓")
    assert list(axes.lines[0].get_xdata()) == [0.8, 0.9]  # cfg at 2 is beaten by apg in both


def test_nothing_to_plot_is_an_error():
    with pytest.raises(ValueError, match="nothing to plot"):
        trade_off([], x_label="x", y_label="y")
