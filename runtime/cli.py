"""A command line made from a frozen dataclass, so that options and `--help` cannot disagree.

    @dataclass(frozen=True)
    class Options(Checked):
        '''Quantize a checkpoint.'''                        # first paragraph of --help
        checkpoint: Path = arg(positional=True, help="folder to read")
        bits: int = arg(4, help="bits per weight", choices=(4, 8))
        windows: int = arg(128, help="windows of calibration text", least=1)
        eval_text: Path | None = arg(None, help="text to measure perplexity on", group="measuring")

    def main(argv=None) -> int:
        return run(Options, "quantize", argv, epilog=EXAMPLES)

    if __name__ == "__main__":        # before the imports of the work: --help and errors of arguments need no PyTorch
        raise SystemExit(main())

    import torch
    def quantize(options: Options) -> None: ...

A field becomes `--field-name` (or a positional). `bool` gives `--flag/--no-flag`, a tuple takes several values, `X |
None` takes an X. Rules of a field hold for the dataclass itself, whoever makes it. `run` turns `UserError` into one
line on stderr and exit code 2, `CheckFailed` into 1, and Ctrl-C into 130; anything else is a bug and keeps its
traceback.
"""

import argparse
import dataclasses
import errno
import importlib
import importlib.util
import math
import os
import re
import select
import sys
import types
import typing
from difflib import get_close_matches
from pathlib import Path

from .errors import CheckFailed, UserError, pip_line

SIZE_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
EXTRAS = {"models": "train", "compress": "quant", "export": "export", __package__: "cpu", "lm_eval": "eval", "sacrebleu": "eval",
          "rouge_score": "eval", "nltk": "eval", "gensim": "embed", "tensorrt_rtx": "rtx", "tensorrt": "gpu", "cuda": "rtx", "onnxruntime": "cpu", "ray": "ray",
          **dict.fromkeys(("fastapi", "uvicorn", "httptools", "prometheus_client", "llguidance"), "serve")}
# What transformers and peft load wherever it is installed and none of a package's commands uses: seconds, and lines of its own.
_KEPT_OUT = {"models": ("torchao", "neural_compressor"), "compress": ("torchao",), "export": ("torchao",)}


def arg(default=dataclasses.MISSING, *, help: str, positional: bool = False, choices=None, short: str | None = None,
        metavar: str | None = None, group: str | None = None, least=None, most=None, above=None, below=None, size: bool = False):
    """A dataclass field that knows its help text; no default means the option must be given.

    group: the heading of --help under which it stands. Rules: choices; least <= value <= most; above < value < below;
    size: a text such as "92MB", with its unit. None breaks no rule.
    """
    meta = {"help": help, "positional": positional, "choices": choices, "short": short, "metavar": metavar, "group": group,
            "least": least, "most": most, "above": above, "below": below, "size": size}
    return dataclasses.field(default=default, metadata=meta)


class Checked:
    """Base of a dataclass of options: making one raises UserError for a value outside its field's rules."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.metadata and (value := getattr(self, field.name)) is not None:
                _check(field.metadata, field.name if field.metadata["positional"] else _flag(field), value)


def _check(meta: typing.Mapping, name: str, value) -> None:
    """Raises UserError for a value outside the rules of its `arg`."""
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name} is {value!r}{did_you_mean(value, meta['choices'])}: choose from "
                        f"{', '.join(map(str, meta['choices']))}")
    if meta["size"]:
        parse_size(value, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, which should be a finite number")
    rules = [("at least", "least", lambda v, bound: v >= bound), ("above", "above", lambda v, bound: v > bound),
             ("at most", "most", lambda v, bound: v <= bound), ("below", "below", lambda v, bound: v < bound)]
    given = [(words, meta[key], holds) for words, key, holds in rules if meta[key] is not None]
    if not all(holds(value, bound) for _, bound, holds in given):
        raise UserError(f"{name} is {value}, which should be {' and '.join(f'{words} {bound}' for words, bound, _ in given)}")


def parse_size(text: str, name: str = "the size") -> int:
    """Bytes of a size such as "92MB" or "1.5 GiB". Raises UserError, calling it `name`, for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match and not match[2]:
        raise UserError(f"{name} is {text}, without a unit: write {match[1]}MB, or {match[1]}B for bytes")
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if not unit or not 1 <= float(match[1]) * unit < 2**63:
        raise UserError(f"{name} is {text!r:.60}, which should be a size such as 92MB")
    return int(float(match[1]) * unit)


def did_you_mean(name, known) -> str:
    """" (did you mean ...?)" where something known is near, else nothing."""
    found = get_close_matches(str(name), [str(one) for one in known], 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


# What the machine refuses, and the mend; any other OSError is a bug.
_OF_THE_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, errno.EDQUOT), "make room, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or choose another place"),
    **dict.fromkeys((errno.EROFS, errno.EIO, errno.ENAMETOOLONG), "choose another place")}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (try --help)\n")

    def refuse_misspelt(self, argv: list[str]) -> None:
        """Before argparse misses what was meant: an unknown option is named, with the nearest known one."""
        for word in argv:
            name = word.split("=")[0]
            if word == "--":
                return
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                near = [flag for flag in known if flag.startswith(name)][:1] or get_close_matches(name, known, 1)
                self.error(f"there is no option {name}" + (f", did you mean {near[0]}?" if near else ""))


def module_name(options_class) -> str:
    """The name by which a command's module is imported and called, though it may run as __main__."""
    spec = getattr(sys.modules.get(options_class.__module__), "__spec__", None)
    return spec.name if spec else options_class.__module__


def parse(options_class, argv=None, *, epilog: str | None = None):
    """Parse argv (default: sys.argv[1:]) into an instance of the dataclass `options_class`. Raises UserError (see Checked)."""
    prog = f"python -m {module_name(options_class)}"
    parser = _Parser(prog=prog, usage=_usage(prog, options_class), description=options_class.__doc__, epilog=epilog,
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints, groups = typing.get_type_hints(options_class), {}
    own = options_class.__dict__.get("__annotations__", {})
    for field in sorted(dataclasses.fields(options_class), key=lambda field: field.name not in own):     # then what it shares
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups.get(title, parser), field, hints[field.name])
    argv = sys.argv[1:] if argv is None else argv
    parser.refuse_misspelt(argv)
    values = vars(parser.parse_args(argv))
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _usage(prog: str, options_class) -> str:
    """What must be given, and that there are options."""
    words = [prog]
    for field in sorted(dataclasses.fields(options_class), key=lambda field: not field.metadata["positional"]):
        required, name = field.default is dataclasses.MISSING, field.name.upper()
        if field.metadata["positional"]:
            words.append(name if required else f"[{name}]")
        elif required:
            words.append(f"{field.metadata['short'] or _flag(field)} {field.metadata['metavar'] or name}")
    return " ".join([*words, "[options]"]).replace("%", "%%")


def _add(parser, field, hint):
    meta, required = field.metadata, field.default is dataclasses.MISSING
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:   # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    kwargs = {"help": meta["help"], "choices": meta["choices"], "metavar": meta["metavar"]}
    if not required:
        kwargs["default"] = field.default
        if field.default not in (None, (), "") and hint is not bool:
            shown_as = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            kwargs["help"] += f" (default: {shown_as})"
    if hint is bool:
        kwargs.pop("choices"), kwargs.pop("metavar")
        kwargs["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is tuple:
        kwargs.update(type=typing.get_args(hint)[0], nargs="+" if required else "*")
        if kwargs.get("default") == () and not meta["positional"]:
            kwargs.update(action="extend", default=[])               # given twice, it has the values of both
    else:
        kwargs["type"] = hint
    if meta["positional"]:
        kwargs["metavar"] = meta["metavar"] or field.name.upper()
        if not required and "nargs" not in kwargs:
            kwargs["nargs"] = "?"
        parser.add_argument(field.name, **kwargs)
    else:
        flags = [meta["short"], _flag(field)] if meta["short"] else [_flag(field)]
        parser.add_argument(*flags, dest=field.name, required=required, **kwargs)


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def run(options_class, stage, argv=None, *, epilog: str | None = None) -> int:
    """Parse, call `stage(options)`, and return its exit code (None counts as 0).

    stage: a function, or the name of one in the command's module, which is imported when the arguments are right.
    """
    module = module_name(options_class)
    room = module.split(".")[0]
    try:
        options = parse(options_class, argv, epilog=epilog)
        if options_class.__module__ == "__main__":          # the process is this command's alone
            for name in _KEPT_OUT.get(room, ()):
                sys.modules.setdefault(name, None)          # which an import takes for a package that is not there
            if not sys.stderr.isatty():
                os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of others; models.progress says a line a stage
        if isinstance(stage, str):
            stage = getattr(importlib.import_module(module), stage)
        code = stage(options) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        said, code = f"error: {error}", 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("models", "compress", "export", __package__, ""):
            raise
        extra = EXTRAS.get(missing) or EXTRAS.get(room, "dev")
        said, code = f"error: this command needs {missing}, which is not installed: {pip_line(extra)}", 2
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141                                          # as if SIGPIPE had ended it: 128 and its number
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        said, code = f"error: {error.filename or 'a file'}: {error.strerror}; {_OF_THE_DISK[error.errno]}", 2
    except CheckFailed as error:
        said, code = f"failed: {error}", 1
    except KeyboardInterrupt:
        said, code = "interrupted", 130
    print(said, file=sys.stderr)
    return code


def _reader_left() -> bool:
    """Whether nobody reads standard output any more (`... | head`). Nothing is written to it from then on."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)       # for the flush at the interpreter's end
    return True


def list_commands(package: str, groups: dict[str, tuple[str, ...]], argv=None) -> int:
    """`python -m PACKAGE`: what can be done there, a line a command."""
    argv = sys.argv[1:] if argv is None else argv
    names = [name for group in groups.values() for name in group]
    if argv and argv[0] not in ("-h", "--help"):
        near = get_close_matches(argv[0], names, 1)
        print(f"error: a command is python -m {package}.NAME" + (f": did you mean python -m {package}.{near[0]}?" if near else
              f"; python -m {package} lists them"), file=sys.stderr)
        return 2
    width = max(map(len, names)) + len(package) + 1
    lines = []
    for title, group in groups.items():
        modules = [f"{package}.{name}" for name in group]
        lines += [title, *(f"  python -m {module:{width}}  {summary(module)}" for module in modules), ""]
    print("\n".join([*lines, "Each has a --help."]))
    return 0


def summary(module: str) -> str:
    """What a command does, read without importing it: the first line of the docstring of its options."""
    import ast
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text("utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    options = [call.args[0].id for call in ast.walk(main) if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "run"]
    described = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == options[0])
    return ast.get_docstring(described).splitlines()[0].rstrip(".")


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
