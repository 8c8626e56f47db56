"""Values of the wrong type, given to an engine or found in its bundle, end in one sentence."""

import json
import math

import numpy as np
import pytest
from make_bundle import VOCAB, write_bundle

from runtime import Engine, machine
from runtime.bundle import open_bundle
from runtime.errors import UserError

HUGE = 10**5000                       # which Python will not print


@pytest.mark.parametrize("name, values", {
    "temperature": [HUGE, 1e300, math.inf, "hot", None, True, [1], 1j], "top_k": [-1, 1.5, "3", True, None, math.nan],
    "top_p": [0, -HUGE, HUGE, math.nan, "x", None], "min_p": [-1, HUGE, math.nan, "x"],
    "repetition_penalty": [0, -1, 1e-300, 1e300, HUGE, math.nan, "x", None],
    "frequency_penalty": [HUGE, -HUGE, 1e300, math.inf, math.nan, "x", None], "presence_penalty": [HUGE, math.nan, "x", [0.0]],
    "logit_bias": [[], "x", {"a": 1}, {1: "b"}, {1: HUGE}, {-1: 0}, {1: math.nan}, {True: 1}, {1: True}, {1.5: 1}, None, {1: 1e300}],
    "seed": [HUGE, -1, -HUGE, 1.5, "7", True, math.nan, [1]], "logprobs": [-1, 1.5, "3", True, math.nan],
    "max_new_tokens": [0, -HUGE, HUGE, 1.5, "3", True, math.nan, [1]],
    "stop": [5, None, [5], ("a", None), b"a", {"a": 1}, "", ["a", ""], 1.5, True, HUGE],
    "stop_tokens": [5, np.array(5), np.array([1.5]), None, ["a"], [1.5], [-1], [True], [math.nan], "ab", {1: 2}],
    "ignore_model_stop": [1, "no", None, [], math.nan], "control_tokens": [1, "no", None], "n": [0, -HUGE, HUGE, 1.5, "3", True, None, [2], 1 << 17]}.items())
def test_options_of_the_wrong_type_end_in_a_sentence(engine, name, values):
    for value in values:
        with pytest.raises(UserError, match="^stop strings are" if name == "stop" else
                           "context is" if value is HUGE and name == "max_new_tokens" else f"^{name} is") as error:
            engine.generate("a", **{name: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300, value
    assert engine.backend.capacities == [] and engine.generate("a", max_new_tokens=1)


@pytest.mark.parametrize("prompt", [
    5, None, True, 1.5, {"a": 1}, {1, 2}, b"a", object(), HUGE, [HUGE], [1, -HUGE], [True, 5], [5, True], [1.0, 2.0], [math.nan],
    [1, math.nan], [[1, 2], [3.0]], [[1], [True]], [[[1]]], [["a"]], [None], [[]], [""], "", [], (), [5, "a"], ["a", 5],
    np.array([[1, 2], [3, 4]]), np.array(5), np.array([1.5]), np.array([math.nan, 1]), np.array([True]), np.array(["a"]),
    np.array([{}]), np.array([2**63], np.uint64), np.array([-1], np.int8), np.empty((0, 3), np.int64)], ids=lambda v: type(v).__name__)
def test_prompts_that_are_none_end_in_a_sentence(engine, prompt):
    for ask in (engine.generate, lambda p: list(engine.stream(p))):
        with pytest.raises(UserError) as error:
            ask(prompt)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert engine.backend.capacities == []


def test_numbers_of_numpy_are_numbers(engine):
    ids = [72, 101, 108]
    expected = engine.generate(ids, max_new_tokens=4, seed=3, temperature=0.5, n=2)[1].tokens
    for prompt in (np.array(ids, np.uint8), tuple(ids), [np.int32(i) for i in ids], np.array(ids)):
        options = {"max_new_tokens": np.int64(4), "seed": np.int64(3), "temperature": np.float32(0.5), "n": np.int64(2),
                   "stop_tokens": np.array([], np.int64)}
        assert engine.generate(prompt, **options)[1].tokens == expected
    assert machine.cpu_threads(np.int64(1)) == 1
    with Engine(engine.bundle.folder, threads=np.int64(1), max_memory_mb=np.float32(500)) as other:
        assert other.generate(ids, max_new_tokens=4)


@pytest.mark.parametrize("options", [
    {"threads": HUGE}, {"threads": True}, {"threads": "2"}, {"max_memory_mb": "9"}, {"max_memory_mb": True}, {"max_memory_mb": HUGE},
    {"max_memory_mb": [1]}, {"verify": "no"}, {"verify": None}, {"repack_cache": 1}, {"provider": 5}, {"provider": ["cpu"]},
    {"cache_dtype": 5}, {"cache_dtype": ["int8"]}], ids=lambda v: next(iter(v)))
def test_an_engines_options_of_the_wrong_type_end_in_a_sentence(tmp_path, options):
    with pytest.raises(UserError, match=f"{next(iter(options))}"):
        Engine(write_bundle(tmp_path / "bundle"), **options)


@pytest.mark.parametrize("folder", [5, None, b"x", ["a"], "a\0b", "x" * 5000, "~nobody-of-this-name/x", ""])
def test_a_folder_that_is_none_ends_in_a_sentence(folder):
    with pytest.raises(UserError) as error:
        Engine(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("generation, field", [
    ({"do_sample": True, "temperature": "hot"}, "temperature"), ({"do_sample": True, "temperature": HUGE}, "temperature"),
    ({"do_sample": "yes"}, "do_sample"), ({"do_sample": True, "top_k": [5]}, "top_k"), ({"repetition_penalty": True}, "repetition")])
def test_sampling_defaults_that_no_engine_opens(tmp_path, generation, field):
    folder = write_bundle(tmp_path / "bundle", generation=generation if HUGE not in generation.values() else {"do_sample": True, "temperature": 10**90})
    with pytest.raises(UserError, match=f"manifest.json: model.generation: {field}"):
        Engine(folder)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_ids", "pad_token_id"])
def test_a_manifests_ids_are_ids_of_the_vocabulary(tmp_path, key):
    folder = write_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    for value in (-2, VOCAB, 10**90, 1.5, True, "2", [[2]], {}, [VOCAB], [None]):
        manifest["model"][key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=f"model.{key}") as error:
            open_bundle(folder)
        assert len(str(error.value)) < 400
    manifest["model"].pop(key)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if key == "eos_token_ids":
        with pytest.raises(UserError, match="eos_token_ids should be list, not missing"):
            open_bundle(folder)
    else:
        assert open_bundle(folder).model[key] is None
