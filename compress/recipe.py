"""A recipe: a TOML file that names the stages of a compression, in order, with their options.

    about = "one line for --list"

    [[stages]]
    stage = "quantize"                   # one of STAGES
    method = "gptq"                      # any option of that stage's command, - as _
    target_bpw = 5.47

    [[stages]]
    stage = "recover"
    steps = 80

What the run itself provides (`FILLED`: the checkpoint to read, the teacher, the text, where to write) is no option of a
recipe. The recipes that ship are the TOML files in compress/recipes, known by their names.
"""

import dataclasses
import importlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import did_you_mean
from runtime.errors import UserError
from runtime.files import read_toml

STAGES = ("quantize", "prune", "distill", "recover", "teacher")
FILLED = ("checkpoint", "student", "teacher", "out", "data", "resume", "device")
SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Stage:
    name: str
    settings: dict              # option -> value, checked, those that the recipe gives

    @property
    def options_class(self) -> type:
        return importlib.import_module(f"compress.{self.name}").Options

    @property
    def fields(self) -> dict[str, dataclasses.Field]:
        return {field.name: field for field in dataclasses.fields(self.options_class)}


@dataclass(frozen=True)
class Recipe:
    name: str
    about: str
    stages: tuple[Stage, ...]


def shipped() -> list[Recipe]:
    """The recipes that ship, by name."""
    return [open_recipe(file.stem) for file in sorted(SHIPPED.glob("*.toml"))]


def open_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe: a TOML file, or the name of one that ships. Raises UserError for what cannot be run."""
    file = Path(name)
    if file.suffix != ".toml":
        names = sorted(recipe.stem for recipe in SHIPPED.glob("*.toml"))
        if str(name) not in names:
            raise UserError(f"no recipe {str(name)!r}{did_you_mean(str(name), names)}: give a .toml file, or one of "
                            f"{', '.join(names)}")
        file = SHIPPED / f"{name}.toml"
    data = read_toml(file)
    for key in data:
        if key not in ("about", "stages"):
            raise UserError(f"{file}: {key!r} is no part of a recipe{did_you_mean(key, ('about', 'stages'))}")
    tables = data.get("stages")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{file} has no stages: write at least one [[stages]] table")
    return Recipe(file.stem, str(data.get("about", "")), tuple(
        check_stage(table, f"{file}: stage {number}") for number, table in enumerate(tables, 1)))


def check_stage(table: dict, place: str) -> Stage:
    """A stage from its table. Raises UserError, beginning with `place`, for names and values its command does not take."""
    settings = dict(table)
    name = settings.pop("stage", None)
    if name not in STAGES:
        raise UserError(f"{place}: {name!r} is no stage{did_you_mean(str(name), STAGES)}: stages are {', '.join(STAGES)}")
    stage = Stage(name, settings)
    hints, known = typing.get_type_hints(stage.options_class), [field for field in stage.fields if field not in FILLED]
    for key, value in settings.items():
        if key in FILLED:
            raise UserError(f"{place} ({name}): {key!r} is given by the run: leave it out of the recipe")
        if key not in known:
            raise UserError(f"{place} ({name}): there is no option {key!r}{did_you_mean(key, known)}")
        try:
            settings[key] = _typed(value, hints[key])
        except TypeError as error:
            raise UserError(f"{place} ({name}): {key} is {value!r}, which should be {error}") from None
    return checked(stage, place)


def checked(stage: Stage, place: str) -> Stage:
    """The stage, if its options go together. Raises UserError, beginning with `place`."""
    given = {key: (str(SHIPPED),) if key == "data" else SHIPPED for key in FILLED if key in stage.fields and key not in ("resume", "device")}
    try:
        stage.options_class(**given | stage.settings)
    except UserError as error:
        raise UserError(f"{place} ({stage.name}): {error}") from None
    return stage


def command_line(stage: Stage, filled: dict) -> list[str]:
    """What one would type after `python -m compress.NAME`; of `filled`, what the stage has an option for."""
    words, named = [], []
    for key, value in (filled | stage.settings).items():
        if key not in stage.fields or value == stage.fields[key].default:
            continue
        flag = "--" + key.replace("_", "-")
        if stage.fields[key].metadata["positional"]:
            words.append(str(value))
        elif isinstance(value, bool):
            named.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            named += [flag, *map(str, value)]
        else:
            named += [flag, str(value)]
    return words + named


def _typed(value, hint):
    """A TOML value as the dataclass has it. Raises TypeError that says in words what it should be."""
    if isinstance(hint, types.UnionType):                                       # X | None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError("a list")
        return tuple(_typed(item, typing.get_args(hint)[0]) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise TypeError({int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text in quotes"))
    return value
