"""The plot in README: CPU per result, results per second, and figures of chords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import Key, Records

#: The bars, from the top: label, peer, method, colour.
OTHER, OURS, LIMIT = "#8c9aab", "#e8710a", "#3d8bd4"
BARS = [
    ("Celery rpc", "Celery rpc", "get", OTHER),
    ("Celery redis", "Celery redis", "get", OTHER),
    ("kombu Consumer", "kombu Consumer", "get_many", OTHER),
    ("fastres, pure Python", "fastres (Python)", "get", OURS),
    ("fastres", "fastres", "get", OURS),
    ("fastres, get_many", "fastres", "get_many", OURS),
    ("rabbitmq-c, decodes nothing", "rabbitmq-c", "get_many", LIMIT),
]

#: The panels of chords: title, method, measure, factor, label.
CHORDS = [
    ("last of {:,} parts\nto body, s", "fire", "wall", "{:,.2f}"),
    ("CPU of a part\nover its result, µs", "part", "part", "{:,.0f}"),
    ("a chord of\n{:,} tasks, s", "chord", "wall", "{:,.1f}"),
    ("{:,} chords of\n10 tasks, s", "small", "wall", "{:,.1f}"),
]
CHORD_BARS = [("Celery redis", OTHER), ("fastres", OURS), ("fastres, not kept", OURS)]

#: The colour of text and axes: a grey that is legible on white and on black.
INK = "#7a828c"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "svg.fonttype": "path",
    # The same run gives the same file.
    "svg.hashsalt": "fastres",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

#: Results of the join that is drawn: the first number from here that was measured.
SHOWN = 50_000


def draw(records: Records, target: Path) -> None:
    counts = records.counts(peer="fastres", how="get")
    count = next((count for count in counts if count >= SHOWN), counts[-1])
    with mpl.rc_context(STYLE):
        whole = Figure(figsize=(9.6, 5.9), layout="constrained")
        whole.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        figure, below = whole.subfigures(2, 1, height_ratios=(3.8, 2.1))
        left, right = figure.subplots(1, 2, sharey=True)
        panel(left, records, "cpu", count, "CPU per result, µs", "{:,.1f}")
        panel(right, records, "rate", count, "results per second, thousands", "{:,.0f}", 1e-3)
        figure.suptitle(f"Joining {count:,} results of 320 bytes of JSON with GroupResult.get", size=12)
        draw_chords(below, records)
        whole.savefig(target, transparent=True, metadata={"Date": None})


def draw_chords(figure: Any, records: Records) -> None:
    """A panel for each figure of chords."""
    figure.suptitle("Chords", size=12)
    for axes, (title, how, measure, label) in zip(figure.subplots(1, len(CHORDS), sharey=True), CHORDS):
        count = records.counts(peer="fastres", how=how)[-1]
        found = [(name, records.median(measure, Key(name, how, count)), color) for name, color in CHORD_BARS]
        bars(axes, found, title.format(count), label)
        axes.set_title(axes.get_title(), size=10)


def panel(
    axes: Axes, records: Records, measure: str, count: int, title: str, label: str, factor: float = 1.0
) -> None:
    found = [(name, records.median(measure, Key(peer, how, count)), color) for name, peer, how, color in BARS]
    bars(axes, found, title, label, factor)


def bars(
    axes: Axes, found: list[tuple[str, float | None, str]], title: str, label: str, factor: float = 1.0
) -> None:
    values = [(value or 0) * factor for _, value, _ in found]
    drawn = axes.barh([name for name, _, _ in found], values, color=[color for _, _, color in found], height=0.66)
    labels = ["" if value is None else label.format(value * factor) for _, value, _ in found]
    axes.bar_label(drawn, labels, padding=4)
    axes.set_title(title, size=11, color=INK)
    axes.set_xlim(0, max(values) * 1.18)
    axes.invert_yaxis() if not axes.yaxis_inverted() else None
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
