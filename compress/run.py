"""Run a recipe: stages of compression in order, each on the result of the one before, with what each gained and lost.

    python -m compress.run balanced --model CKPT --data FILES -o OUT

A recipe is a TOML file or one that ships (compress/recipe.py). OUT/model is the finished checkpoint, its lineage one
entry a stage; OUT/N-STAGE-KEY holds each stage's result and figures. KEY is a hash of the stage's options, the
checkpoint it reads and the text it learns from: what is unchanged is skipped, a changed option runs that stage and those
after it, and an interrupted run goes on where it stopped (within a stage where the stage can). Results of other keys
stay until their folders are removed.

After every stage the ladder is printed (compress/ladder.py), judged on --valid FILES, or else on the last tenth of every
file of --data, which no stage then sees (compress/text.py).
"""

import dataclasses
import hashlib
import importlib
import json
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from compress.options import TEACHER_CACHE, check_compresses
from compress.recipe import Recipe, Stage, checked, command_line, open_recipe, shipped
from models.formats import lineage
from models.data.corpus import DataOptions
from models.data.records import find_sources, source_digest
from models.device import DeviceOptions, computing_on
from models.training.options import TrainerOptions
from runtime.capabilities import BACKENDS
from runtime.cli import arg, run, table
from runtime.errors import UserError
from runtime.files import lock, new_folder, read_json, restored, write

EXAMPLES = """examples:
  python -m compress.run --list
  python -m compress.run balanced --model build/smollm2-135m --data corpus.txt -o build/smollm2-balanced
  python -m compress.run balanced --model CKPT --data corpus.txt --target-size 92MB --backend onnx -o OUT
  python -m compress.run my-recipe.toml --model CKPT --data corpus.txt --valid other.txt -o OUT
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, DeviceOptions):
    """Run a recipe of compression stages and show what each gained and lost."""

    recipe: str | None = arg(None, positional=True, help="TOML file, or the name of a recipe that ships (see --list)")
    list: bool = arg(False, help="show the recipes that ship, and stop")
    model: Path | None = arg(None, help="checkpoint folder to compress")
    data: tuple[str, ...] = arg((), help="text to calibrate and train on: files, folders, globs or hf:NAME@SPLIT")
    valid: tuple[str, ...] = arg((), help="text to judge on (default: the last tenth of every file of --data)")
    out: Path | None = arg(None, short="-o", help="folder of the run; OUT/model is the finished checkpoint")
    target_size: str | None = arg(None, help="bytes of the bundle's weights, such as 92MB, in place of the recipe's", size=True)
    backend: str | None = arg(None, help="formats to choose from, in place of the recipe's", choices=tuple(BACKENDS))
    eval_windows: int = arg(16, help="windows of 512 tokens of each text to judge on", least=1)
    speed: bool = arg(True, help="export each result and measure its decode speed")

    def __post_init__(self):
        super().__post_init__()
        for name in () if self.list else ("recipe", "model", "data", "out"):
            if not getattr(self, name):
                raise UserError(f"{'--' if name != 'recipe' else ''}{name} is missing (see --help)")


def main(argv=None) -> int:
    return run(Options, "compress", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from compress.ladder import ladder, measure_quality, measure_speed
from compress.text import split_text
from models.checkpoint import open_checkpoint


def compress(options: Options) -> int:
    """Run the stages that are not done, print the ladder. Raises UserError for input that cannot be used."""
    if options.list:
        print(table([{"recipe": recipe.name, "": recipe.about} for recipe in shipped()]))
        return 0
    recipe = overridden(open_recipe(options.recipe), options)
    with lock(options.out):
        return _run_stages(options, recipe)


def _run_stages(options: Options, recipe: Recipe) -> int:
    checkpoint = open_checkpoint(options.model)
    check_compresses(checkpoint)
    original = checkpoint.sha256()
    if not (options.model / "tokenizer.json").is_file():
        raise UserError(f"{options.model} has no tokenizer.json, which reading text needs")
    text, judged = _texts(options)
    learned = _read_as(text)
    results = [("original", _figures(options, options.out / f"0-original-{original[:8]}", options.model, None, judged))]
    print(ladder(results))
    current, source = options.model, original
    for number, stage in enumerate(recipe.stages, 1):
        key = _hash([stage.name, stage.settings, source, original, learned])[:8]
        folder = options.out / f"{number}-{stage.name}-{key}"
        result = folder / "checkpoint" / ("last" if issubclass(stage.options_class, TrainerOptions) else "")
        if (folder / "done").is_file():
            print(f"\n{number} {stage.name}: unchanged, {folder}")
        else:
            measured = [stage.settings.get(name) for name in ("windows", "length", "sensitivity_windows")]
            code = _run_stage(options, stage, folder, current, text, _hash([source, learned, measured])[:8])
            if code:
                return code
        if stage.name != "teacher":
            current, source = result, open_checkpoint(result).sha256()
            results.append((f"{number} {stage.name}", _figures(options, folder, result, options.model, judged)))
            print(f"\n{ladder(results)}")
    with new_folder(options.out / "model") as out:
        shutil.copytree(current, out, ignore=shutil.ignore_patterns("training_state"), dirs_exist_ok=True)
    print(f"\n{options.out / 'model'}: the result")
    return 0


def overridden(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with --target-size and --backend in its quantize stages. Raises UserError where it has none, or they do
    not go with their other options."""
    given = {name: getattr(options, name) for name in ("target_size", "backend") if getattr(options, name) is not None}
    if given and not any(stage.name == "quantize" for stage in recipe.stages):
        raise UserError(f"--{next(iter(given)).replace('_', '-')}: the recipe {recipe.name} has no stage that quantizes")

    def changed(stage: Stage) -> Stage:
        settings = stage.settings | given
        if "target_size" in given:
            settings.pop("target_bpw", None)
        return checked(Stage(stage.name, settings), recipe.name)
    return replace(recipe, stages=tuple(changed(stage) if stage.name == "quantize" else stage for stage in recipe.stages))


def _texts(options: Options) -> tuple[DataOptions, tuple[str, ...]]:
    """(which text to learn from and how to read it, files to be judged on)."""
    reading = DataOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(DataOptions)})
    if options.valid:
        return reading, options.valid
    folder = options.out / f"0-text-{_hash(_read_as(reading))[:8]}"
    learn, judge = folder / "learn.jsonl", folder / "held-out.jsonl"
    if not judge.exists():
        learn, judge = split_text(reading, folder)
    return DataOptions(data=(str(learn),), cache=options.cache), (str(judge),)


def _read_as(text: DataOptions) -> list:
    """What decides the documents that a stage reads."""
    return [dataclasses.asdict(replace(text, data=(), cache=None)), *_digests(text.data)]


def _digests(files: tuple[str, ...]) -> list[str]:
    return [source_digest(source) for source in find_sources(files)]


def _run_stage(options: Options, stage: Stage, folder: Path, current: Path, text: DataOptions, read: str) -> int:
    """Run one stage by its command line; returns its exit code. `read` names the checkpoint and the windows it reads."""
    out = folder / "checkpoint"
    resume = restored(out / "last").exists()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)                  # a training run that was killed before its first save
    filled = {"checkpoint": current, "student": current, "teacher": options.model, "out": out, "resume": resume,
              "sensitivity": options.out / f"0-sensitivity-{read}.safetensors", "device": options.device}
    if stage.name == "teacher":
        filled |= {"checkpoint": options.model, "out": TEACHER_CACHE.expanduser()}
    words = command_line(stage, filled | dataclasses.asdict(text))
    print(f"\npython -m compress.{stage.name} {shlex.join(words)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    code = importlib.import_module(f"compress.{stage.name}").main(words)
    if code == 0:
        (folder / "done").touch()
    return code


def _figures(options: Options, folder: Path, checkpoint: Path, original: Path | None, judged: tuple[str, ...]) -> dict:
    """A result's figures, kept in its folder and measured only where they are not there or the text to judge on changed."""
    file = folder / "figures.json"
    folder.mkdir(parents=True, exist_ok=True)
    figures = read_json(file) if file.is_file() else {}
    judged_on = _hash([_digests(judged), options.eval_windows])
    before = dict(figures)
    if figures.get("judged_on") != judged_on:
        with computing_on(options.device) as device:
            figures |= measure_quality(checkpoint, original, judged, options.eval_windows, device) | {"judged_on": judged_on}
        if original is None:
            figures |= {"kl": 0.0, "top1_agreement": 1.0}
    if options.speed and "decode_tokens_per_s" not in figures:
        figures |= measure_speed(checkpoint, folder)
    if figures != before:
        if original is not None:
            lineage.add_metrics(checkpoint, {"ladder": figures})
        write(file, json.dumps(figures, indent=1) + "\n")        # last: with it, the result counts as measured
    return figures


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
