"""The pictures of reproduce_targets.py: curves of the loss and of a learned k."""

from __future__ import annotations

from pathlib import Path

from _targets_points import Point


def plot_curves(found: dict[str, Point], path: Path) -> None:
    """Loss over updates at every k (seed 0), and the learned k of every seed.

    Raises:
        ImportError: if matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, point in found.items():
        k, seed = name.removeprefix("k-").rsplit("-", 1)
        curve = point["curve"][len(point["curve"]) // 12 :]  # the fall of the start hides the rest
        steps, losses = [row[0] for row in curve], [row[1] for row in curve]
        smooth = [sum(losses[max(0, i - 4) : i + 5]) / len(losses[max(0, i - 4) : i + 5])
                  for i in range(len(losses))]  # fmt: skip
        if seed == "0":
            left.plot(steps, smooth, label=f"k = {k}" if k[0].isdigit() else k, linewidth=1.2)
        if k == "learned":
            rows = point["curve"]
            right.plot([r[0] for r in rows], [r[2] for r in rows], label=f"seed {seed}")
    left.set(xlabel="update", ylabel="velocity loss")
    right.set(xlabel="update", ylabel="learned k")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
