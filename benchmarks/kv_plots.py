"""Pictures of what approximate reuse gives and costs, from the figures of `kv_reuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kv_sides import SELECTORS, SHARES


def draw(results: dict[str, Any], folder: Path, shape: str) -> list[Path]:
    """One PNG for quality and one for time, of what `results` holds."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    drawn = []
    if results.get("quality"):
        drawn.append(_quality(results["quality"], folder / f"kv_reuse_quality_{shape}.png"))
    if results.get("first token"):
        drawn.append(_time(results["first token"], folder / f"kv_reuse_first_token_{shape}.png"))
    return drawn


def _quality(tasks: dict[str, Any], path: Path) -> Path:
    """Agreement with the full prefill, and KL, over the share that is computed anew; a column per task."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(tasks), figsize=(5 * len(tasks), 7), squeeze=False, sharex=True)
    for column, (task, sides) in enumerate(tasks.items()):
        for row, (key, label) in enumerate((("agrees", "top-1 agreement"), ("kl", "KL, nats"))):
            axis = axes[row][column]
            for name in SELECTORS:
                points = {0.0: "naive"} | {share: f"{name} {share:g}" for share in SHARES}
                taken = {share: sides[side][key] for share, side in points.items() if side in sides}
                axis.plot(list(taken), list(taken.values()), marker="o", label=name)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("share of reused tokens computed anew")
    axes[0][0].legend(fontsize=7)
    return _saved(figure, path)


def _time(sides: dict[str, Any], path: Path) -> Path:
    """First tokens relative to a full prefill, split where the engine is ours."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.4 * len(sides) + 1.5))
    full = sides["full"]["median_ms"]
    names = list(sides)[::-1]
    left = [0.0] * len(names)
    for part in ("match", "copy", "compute"):
        values = [sides[name]["parts_ms"][part] / full for name in names]
        axis.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    rest = [max(0.0, sides[name]["median_ms"] / full - done) for name, done in zip(names, left, strict=True)]
    axis.barh(names, rest, left=left, label="the rest", color="lightgrey")
    axis.set_xlabel("time to first token, relative to a full prefill")
    axis.legend(fontsize=8)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
