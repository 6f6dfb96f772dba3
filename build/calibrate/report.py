"""What a calibration found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blockzoo.zoo.manifest import ReuseRecord
from blockzoo.zoo.summary import reuse_settings_text


def print_record(model: str, record: ReuseRecord) -> None:
    """All settings that were tried, and what came of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {record.num_prompts} prompts ({record.prompts})", title_justify="left")
    for column in ("computed anew", "equal top tokens", "KL, nats", "computes", "first token"):
        table.add_column(column)
    table.add_row("all, in bf16", f"{record.bf16_agreement:.1%}", f"{record.bf16_kl:.1e}", "100%", "")
    for point in record.curve:
        table.add_row(
            reuse_settings_text(point.settings),
            f"{point.agreement:.1%}",
            f"{point.kl:.1e}",
            f"{point.computed:.0%}",
            f"{point.speedup:.1f} times as fast",
            style="bold" if point.settings == record.settings else None,
        )
    console = Console()
    console.print(table)
    least = f"{record.asked * record.bf16_agreement:.1%} equal top tokens"
    if record.settings is None:
        console.print(
            f"{model}: nothing keeps {least} and is {record.least_speedup:g} times as fast: requests for "
            "approximate reuse are computed exactly\n"
        )
    else:
        console.print(f"{model}: {reuse_settings_text(record.settings)} (at least {least})\n", markup=False)


def draw(records: Mapping[str, ReuseRecord], path: Path) -> None:
    """Agreement over what it costs, a panel for each model, as a PNG. Needs matplotlib (ImportError)."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(records), figsize=(5 * len(records), 4), squeeze=False)
    for axis, (model, record) in zip(axes[0], records.items(), strict=True):
        points = sorted(record.curve, key=lambda point: point.computed)
        axis.plot([p.computed for p in points], [p.agreement for p in points], marker="o")
        for point in points:
            label = f"{point.settings.selector} {point.settings.recompute:.0%}, {point.speedup:.1f} x"
            axis.annotate(label, (point.computed, point.agreement), fontsize=7)
        axis.axhline(record.bf16_agreement, color="grey", label="a full prefill in bf16")
        axis.axhline(record.asked * record.bf16_agreement, color="red", linestyle=":", label="asked")
        axis.set_xlabel("tokens computed, of the prompts'")
        axis.set_ylabel("equal top tokens")
        axis.set_title(model)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
