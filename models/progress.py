"""How far a long stage is: a bar on a terminal, one line for the stage anywhere else."""

from __future__ import annotations

import sys


def progress(items=None, *, label: str, unit: str, total: int | None = None, quiet: bool = False, **how):
    """`items` (or None, for `.update()`) with tqdm's bar on stderr; where that is no terminal, a line that names the stage.

    unit: what is counted, in the singular. quiet: neither. how: what else tqdm takes.
    """
    from tqdm import tqdm
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    shown = not quiet and sys.stderr.isatty()
    if not quiet and not shown:
        print(label if total is None or how.get("unit_scale") else f"{label}: {total} {unit}{'s' if total != 1 else ''}",
              file=sys.stderr, flush=True)
    return tqdm(items, desc=label, unit=unit, total=total, disable=not shown, file=sys.stderr, mininterval=1.0, **how)
