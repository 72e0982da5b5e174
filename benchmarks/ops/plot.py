"""Draws the kernel benchmark: rate on the kept work over density, one panel a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffaccel.benchmarks.ops.report import MEASURED, Row
from diffaccel.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C6D31")
_MARKERS = "os^Dv<>P"


def draw(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Writes a PNG with a panel for each shape and dtype that has a measured row.

    Needs matplotlib, of the extra `bench`.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status == MEASURED:
            panels.setdefault((row.shape, row.dtype), []).append(row)
    labels = sorted({row.label for row in rows if not _is_dense(row) and row.status == MEASURED})
    columns = max(1, min(2 if len(panels) in (2, 4) else 3, len(panels)))
    lines = max(1, ceil(len(panels) / columns))
    legend_inches = 0.35 + 0.19 * ceil((len(labels) + 1) / columns)
    inches = 3.9 * lines + legend_inches
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.6 * columns, inches), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, found in zip(axes.flat, panels.values(), strict=False):
        _draw_panel(axis, found, _styles(labels))
    handles = {}
    for axis in figure.axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.suptitle("Rate on the kept query-key pairs (higher is better)", fontsize=13)
    figure.text(
        0.5, 0.07 / inches, facts.get("device", ""), ha="center", fontsize=8, color="#555555"
    )
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=columns, fontsize=8,
        frameon=False, bbox_to_anchor=(0.5, 0.2 / inches),
    )  # fmt: skip
    figure.tight_layout(rect=(0, legend_inches / inches, 1, 1))
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=140)
    pyplot.close(figure)


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One colour for each choice of pairs; dotted where centroids stand for the rest."""
    families = sorted({label.replace(", centroids", "") for label in labels})
    styles = {}
    for label in labels:
        index = families.index(label.replace(", centroids", ""))
        styles[label] = {
            "color": _COLORS[index % len(_COLORS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": ":" if ", centroids" in label else "-",
        }
    return styles


def _rate(row: Row) -> float:
    return cast(float, row.tflops)  # drawn rows have one


def _draw_panel(axis: Axes, rows: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> None:
    first = rows[0]
    text = f" + {first.text}" if first.text else ""
    axis.set_title(
        f"{first.shape}, {first.dtype}: {first.tokens}{text} tokens, H={first.heads}, "
        f"D={first.head_dim}",
        fontsize=9,
    )
    factor, unit = (1e3, "GFLOP/s") if max(map(_rate, rows)) < 1 else (1, "TFLOP/s")
    for label, style in styles.items():
        points = sorted((row.density, _rate(row) * factor) for row in rows if row.label == label)
        if points:
            axis.plot(
                *zip(*points, strict=True), label=label, markersize=5, linewidth=1.5, **style
            )
    dense = [row for row in rows if _is_dense(row)]
    if dense:
        best = max(dense, key=_rate)
        height = _rate(best) * factor
        axis.axhline(
            height, color="black", linestyle="--", linewidth=1.3, label="best dense backend"
        )
        # On the left, where sparse lines are low.
        axis.annotate(
            best.backend, (0.01, height), xycoords=("axes fraction", "data"), va="bottom",
            fontsize=8,
        )  # fmt: skip
    shown = sorted({row.density for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(shown, [f"{density:g}" for density in shown])
    axis.minorticks_off()
    axis.set_xlabel("density asked for (log scale)", fontsize=9)
    axis.set_ylabel(f"{unit} over kept pairs", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _is_dense(row: Row) -> bool:
    return row.op == "dense"
