"""How far a long stage is: a bar on a terminal, one line for the stage anywhere else."""

import sys


def progress(items=None, *, label: str, unit: str, total: int | None = None, quiet: bool = False, **how):
    """`items` (or None, for `.update()`) with tqdm's bar on stderr; where that is no terminal, a line as the stage begins.

    unit: what is counted, in the singular. quiet: neither. how: what else tqdm takes.
    """
    from tqdm import tqdm
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    terminal = sys.stderr.isatty()
    bar = tqdm(items, desc=label, unit=unit, total=total, disable=quiet or not terminal, file=sys.stderr, mininterval=1.0, **how)
    if quiet or terminal:
        return bar
    line = label if total is None or how.get("unit_scale") else f"{label}: {total} {unit}{('es' if unit.endswith('ch') else 's') * (total != 1)}"
    if items is None:
        print(line, file=sys.stderr, flush=True)
        return bar
    return _told(line, items)


def _told(line: str, items):
    print(line, file=sys.stderr, flush=True)
    yield from items
