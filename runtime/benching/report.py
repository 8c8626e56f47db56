"""What was measured, as a table for the terminal, for Markdown and as JSON.

samples: {system: {figure: [a value of each round]}}; systems in the order given, the first of which is compared with each other.
"""

from ..cli import table
from .statistics import Estimate, estimate, ratio

Samples = dict[str, dict[str, list[float]]]


def rows(samples: Samples) -> list[dict[str, str]]:
    """A row a figure. Of one system: median, extremes, interval; of several: each one's median, and ratios of the first to others."""
    names = list(samples)
    figures = dict.fromkeys(figure for one in samples.values() for figure in one)
    if len(names) == 1:
        return [{"": figure, "median": f"{estimate(values).median:.2f}", "min": f"{min(values):.2f}", "max": f"{max(values):.2f}",
                 "95% interval": _interval(estimate(values), len(values))} for figure, values in samples[names[0]].items()]
    compared = ratios(samples)
    return [{"": figure, **{name: f"{estimate(values).median:.2f}" if (values := samples[name].get(figure)) else "" for name in names},
             **{title: _ratio(found, figure, samples) for title, found in compared.items()}} for figure in figures]


def ratios(samples: Samples) -> dict[str, dict[str, Estimate]]:
    """{"A / B": {figure: of the pairs}} of the first system to each other."""
    (first, ours), *others = samples.items()
    return {f"{first} / {name}": {figure: ratio(ours[figure], theirs[figure]) for figure in ours
                                  if len(ours[figure]) == len(theirs.get(figure, ())) and all(theirs[figure])}
            for name, theirs in others}


def terminal(samples: Samples, header: dict[str, str]) -> str:
    return "\n".join([*(f"{key}: {value}" for key, value in header.items()), table(rows(samples))])


def markdown(samples: Samples, header: dict[str, str]) -> str:
    found = rows(samples)
    lines = [list(found[0]), ["---", *["---:"] * (len(found[0]) - 1)], *(list(row.values()) for row in found)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join([*(f"- {key}: {value}" for key, value in header.items()), "", *(f"| {' | '.join(line)} |" for line in cells), ""])


def as_json(samples: Samples, header: dict[str, str]) -> dict:
    """The first system's medians and samples at the top; everyone's under "systems", with intervals; and the ratios."""
    everyone = {name: {"figures": {figure: estimate(values).median for figure, values in one.items()},
                       "intervals": {figure: estimate(values)[1:] for figure, values in one.items()}, "samples": one}
                for name, one in samples.items()}
    first = next(iter(everyone.values()))
    return {**first["figures"], "samples": first["samples"], **header, "systems": everyone,
            "ratios": {title: {figure: found._asdict() for figure, found in each.items()} for title, each in ratios(samples).items()}}


def _interval(found: Estimate, count: int) -> str:
    return f"{found.low:.2f} to {found.high:.2f}" if count > 1 else ""


def _ratio(found: dict[str, Estimate], figure: str, samples: Samples) -> str:
    if figure not in found:
        return ""
    one = found[figure]
    several = len(next(iter(samples.values()))[figure]) > 1
    return f"{one.median:.2f} ({one.low:.2f} to {one.high:.2f})" if several else f"{one.median:.2f}"
