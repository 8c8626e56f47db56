"""A picture of what was measured: speed against context and against streams where these were asked for, else one bar a system.
Whiskers: the interval of the median."""

import io
import re
from pathlib import Path

from ..errors import UserError
from ..files import write
from .report import Samples
from .statistics import estimate

_CURVES = {r"at_(\d+)_tokens_per_s": "tokens in the context", r"streams_(\d+)_tokens_per_s": "streams at once"}
_BARS = ("decode_tokens_per_s", "new_tokens_per_s")


def needs_matplotlib() -> type:
    """matplotlib's Figure. Raises UserError where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return Figure


def plot(file: Path, samples: Samples) -> None:
    """Write a PNG. Raises UserError."""
    panels = {title: curves for pattern, title in _CURVES.items() if (curves := _curves(samples, pattern))}
    figure = needs_matplotlib()(figsize=(5.5 * max(1, len(panels)), 4), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for place, (title, curves) in zip(axes, panels.items()):
        for name, points in curves.items():
            place.errorbar(*_whiskers(points), marker="o", capsize=3, label=name)
        ticks = sorted({x for points in curves.values() for x in points})
        place.set(xlabel=title, xscale="log")
        place.set_xticks(ticks, list(map(str, ticks)))
        place.minorticks_off()
        place.legend()
    if not panels:
        x, y, (low, high) = _whiskers({name: one[key] for name, one in samples.items() for key in _BARS if key in one})
        axes[0].bar(x, y, yerr=(low, high), capsize=3)
    for place in axes:
        place.set(ylabel="tokens/s", ylim=(0, None))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write(file, image.getvalue())


def _curves(samples: Samples, pattern: str) -> dict[str, dict[int, list[float]]]:
    """{system: {number in a figure's name: its values}} of the figures of that pattern."""
    found = {name: {int(match[1]): values for key, values in one.items() if (match := re.fullmatch(pattern, key))}
             for name, one in samples.items()}
    return {name: points for name, points in found.items() if points}


def _whiskers(points: dict) -> tuple[list, list[float], tuple[list[float], list[float]]]:
    """Where, the medians, and how far their intervals reach below and above."""
    found = [estimate(values) for values in points.values()]
    return list(points), [one.median for one in found], ([one.median - one.low for one in found], [one.high - one.median for one in found])
