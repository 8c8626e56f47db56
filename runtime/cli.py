"""A command line made from a frozen dataclass, so that options and `--help` cannot disagree.

    @dataclass(frozen=True)
    class Options:
        '''Quantize a checkpoint.'''                        # first paragraph of --help
        checkpoint: Path = arg(positional=True, help="folder to read")
        bits: int = arg(4, help="bits per weight", choices=(4, 8))
        skip: tuple[str, ...] = arg((), help="patterns of layers to leave alone")
        eval_text: Path | None = arg(None, help="text to measure perplexity on")

    def main(argv=None) -> int:
        return run(Options, quantize, argv, epilog=EXAMPLES)

A field becomes `--field-name` (or a positional). `bool` gives `--flag/--no-flag`, a tuple takes several values,
`X | None` takes an X. `run` turns `UserError` into one line on stderr and exit code 2, `CheckFailed` into 1, and
Ctrl-C into 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from pathlib import Path

from runtime.errors import CheckFailed, UserError


def arg(default=dataclasses.MISSING, *, help: str, positional: bool = False, choices=None, short: str | None = None,
        metavar: str | None = None):
    """A dataclass field that knows its help text; no default means the option must be given."""
    meta = {"help": help, "positional": positional, "choices": choices, "short": short, "metavar": metavar}
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (try --help)\n")


def parse(options_class, argv=None, *, epilog: str | None = None):
    """Parse argv (default: sys.argv[1:]) into an instance of the dataclass `options_class`."""
    module = getattr(sys.modules.get(options_class.__module__), "__spec__", None)
    name = module.name if module else options_class.__module__
    parser = _Parser(prog=f"python -m {name}", description=options_class.__doc__, epilog=epilog,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        _add(parser, field, hints[field.name])
    values = vars(parser.parse_args(argv))
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _add(parser, field, hint):
    meta, required = field.metadata, field.default is dataclasses.MISSING
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:   # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    kwargs = {"help": meta["help"], "choices": meta["choices"], "metavar": meta["metavar"]}
    if not required:
        kwargs["default"] = field.default
        if field.default not in (None, (), "") and hint is not bool:
            kwargs["help"] += f" (default: {field.default})"
    if hint is bool:
        kwargs.pop("choices"), kwargs.pop("metavar")
        kwargs["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is tuple:
        kwargs.update(type=typing.get_args(hint)[0], nargs="+" if required else "*")
    else:
        kwargs["type"] = hint
    if meta["positional"]:
        if not required and "nargs" not in kwargs:
            kwargs["nargs"] = "?"
        parser.add_argument(field.name, **kwargs)
    else:
        flags = ([meta["short"]] if meta["short"] else []) + ["--" + field.name.replace("_", "-")]
        parser.add_argument(*flags, dest=field.name, required=required, **kwargs)


def run(options_class, stage, argv=None, *, epilog: str | None = None) -> int:
    """Parse, call `stage(options)`, and return its exit code (None counts as 0)."""
    options = parse(options_class, argv, epilog=epilog)
    try:
        return stage(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def table(rows: list[dict], *, title: str | None = None) -> str:
    """Rows of equal keys as an aligned text table; numbers are right-aligned."""
    if not rows:
        return f"{title}: nothing" if title else ""
    head = list(rows[0])
    cells = [head] + [["" if row.get(k) is None else str(row[k]) for k in head] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    right = [all(not isinstance(row.get(k), str) for row in rows) for k in head]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(([title] if title else []) + lines)


__all__ = ["arg", "parse", "run", "table", "Path"]
