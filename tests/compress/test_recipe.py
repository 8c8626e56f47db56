"""Recipes: what they say against each stage's own command line, and what they may not say."""

import dataclasses
import importlib

import pytest

from compress.recipe import FILLED, STAGES, Stage, check_stage, command_line, open_recipe, shipped
from runtime.cli import parse
from runtime.errors import UserError


def test_every_recipe_that_ships_is_understood_by_its_stages():
    assert [recipe.name for recipe in shipped()] == ["balanced", "faithful", "tiny"]
    for recipe in shipped():
        assert recipe.about and recipe.stages
        for stage in recipe.stages:
            words = command_line(stage, {"checkpoint": "A", "teacher": "B", "out": "C", "data": ("D", "E")})
            options = parse(stage.options_class, words)
            assert all(getattr(options, name) == value for name, value in stage.settings.items())


def test_a_command_line_gives_back_every_kind_of_value():
    stage = check_stage({"stage": "distill", "loss": "skew", "mix": 0.25, "live": True, "steps": 7, "languages": ["en", "zh"],
                         "temperature": 2, "teacher_cache": "some folder"}, "here")
    options = parse(stage.options_class, command_line(stage, {"teacher": "T", "student": "S", "out": "O", "data": ("D",)}))
    for name, value in stage.settings.items():
        assert getattr(options, name) == value and type(getattr(options, name)) is type(value)
    off = Stage("quantize", {"symmetric": False})
    assert parse(off.options_class, command_line(off, {"checkpoint": "A", "out": "B"})).symmetric is False


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_options_and_a_command(name):
    module = importlib.import_module(f"compress.{name}")
    assert callable(module.main)
    assert {"out", "data"} < {field.name for field in dataclasses.fields(module.Options)} and "out" in FILLED


@pytest.mark.parametrize("text,words", [
    ('stage = "quantise"', "did you mean 'quantize'"), ('steps = 3', "is no stage"),
    ('stage = "recover"\nstepz = 3', "no option 'stepz' (did you mean 'steps'?)"),
    ('stage = "recover"\nsteps = "three"', "steps is 'three', which should be a whole number"),
    ('stage = "recover"\nsteps = true', "a whole number"), ('stage = "quantize"\nfold = "awq"', "a list"),
    ('stage = "quantize"\nmethod = "gpt"', "did you mean 'gptq'"), ('stage = "quantize"\nout = "x"', "given by the run"),
    ('stage = "quantize"\n\n[other]\nx = 1', "'other' is no part of a recipe"), ("stage = ", "cannot be read as TOML")])
def test_what_no_stage_takes_is_refused(text, words, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f"[[stages]]\n{text}\n")
    with pytest.raises(UserError) as error:
        open_recipe(file)
    assert words in str(error.value) and str(file) in str(error.value)


def test_a_recipe_without_stages_or_of_no_name_is_refused(tmp_path):
    (tmp_path / "none.toml").write_text('about = "nothing"\n')
    with pytest.raises(UserError, match="has no stages"):
        open_recipe(tmp_path / "none.toml")
    with pytest.raises(UserError, match="did you mean 'balanced'"):
        open_recipe("balancd")
    with pytest.raises(UserError, match="cannot be read"):
        open_recipe(tmp_path / "missing.toml")
