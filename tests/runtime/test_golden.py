"""golden.json as a stranger may have written it: wrong contents are refused by the name of the field, none passes unread."""

import copy
import json
import math
import shutil

import pytest

import runtime.verify
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.golden import read_golden

ODD = [None, True, "x", 1.5, -1, 10**400, math.nan, math.inf, -1e308, [], {}, [[]], [None], {"mean_kl": 1e9}]


@pytest.fixture
def change(golden_bundle, tmp_path):
    """change(f) -> the bundle, with what f makes of the contents of golden.json, and a manifest that fits."""
    import hashlib
    folder = shutil.copytree(golden_bundle, tmp_path / "bundle")
    whole = json.loads((folder / "golden.json").read_text())

    def make(f):
        golden = copy.deepcopy(whole)
        golden = f(golden) or golden
        content = golden if isinstance(golden, bytes) else json.dumps(golden).encode()
        (folder / "golden.json").write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["golden.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder
    return make


def places(value, path=()):
    """Every path into the contents, but of long lists only the first item and the last."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1}):
            yield from places(value[i], (*path, i))


def put(golden, path, value):
    if not path:
        return value
    owner = golden
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value


def test_every_field_with_every_odd_value(golden_bundle, tmp_path):
    """In the file's two ends of every list. What is accepted is a number in the place of a number, or an unread field."""
    bundle = open_bundle(shutil.copytree(golden_bundle, tmp_path / "bundle"))
    whole = json.loads((golden_bundle / "golden.json").read_text())
    whole["prompts"] = whole["prompts"][:2]
    tried = 0
    for path in places(whole):
        field = ".".join(key for key in path if isinstance(key, str)) or "the contents"
        for value in ODD:
            golden = copy.deepcopy(whole)
            golden = put(golden, path, value) or golden if path else value
            bundle.path("golden.json").write_text(json.dumps(golden))
            tried += 1
            try:
                read_golden(bundle)
            except UserError as error:
                message = str(error)
                assert message.count("\n") == 0 and "golden.json" in message and len(message) < 500
                if path and path[-1] != "version" and value != 10**400:       # which no reader of JSON need take
                    assert path[0] in message and (not isinstance(path[-1], str) or path[-1] in message), (path, value, message)
            else:
                fine = path[0] == "source_checkpoint" or path[-1] in ("name", "text") and value == "x"
                number = isinstance(value, (int, float)) and len(path) > 2 and path[2] in ("logsumexp", "margins", "top_logits")
                assert fine or number and math.isfinite(value), (field, value)
    assert tried > 300


@pytest.mark.parametrize("words, edit", [
    ("budgets should be an object", lambda g: g.update(budgets={})),
    ("budgets should be an object with a budget for every graph, not missing", lambda g: g.pop("budgets") and None),
    ("budgets.fast is missing", lambda g: g["budgets"].pop("fast") and None),
    ("budgets.fast.mean_kl should be a number above 0 and at most 1", lambda g: g["budgets"].update(fast={"mean_kl": 1e9})),
    ("budgets.fast.mean_kl should be a number above 0", lambda g: g["budgets"].update(fast={"mean_kl": math.nan})),
    ("a name among budgets should be one of portable", lambda g: g["budgets"].update(fastest={"mean_kl": 0.01})),
    ("prompts should be a list of at least one prompt", lambda g: g.update(prompts=[])),
    ("the length of prompts[1].tokens should be 32, not 31", lambda g: g["prompts"][1]["tokens"].pop() and None),
    ("the length of prompts[0].top_ids[3] should be 20, not 19", lambda g: g["prompts"][0]["top_ids"][3].pop() and None),
    ("prompts[0].tokens[5] should be a token id from 0 to 383", lambda g: g["prompts"][0]["tokens"].__setitem__(5, 384)),
    ("prompts[1].name should be another one", lambda g: g["prompts"][1].update(name=g["prompts"][0]["name"])),
    ("largest first", lambda g: g["prompts"][0]["top_logits"][2].reverse()),
    ("token ids that all differ", lambda g: g["prompts"][0]["top_ids"][2].__setitem__(1, g["prompts"][0]["top_ids"][2][0])),
    ("prompts[0].text should be text", lambda g: g["prompts"][0].update(text="\ud800")),
    ("at most what new_tokens leave of 256", lambda g: g["prompts"][0].update(prompt_ids=[1] * 300)),
    ("cannot be read as JSON", lambda g: b"[" * 200_000), ("cannot be read as JSON", lambda g: b"\xff{}"), ("cannot be read as JSON", lambda g: b"9" * 10_000),
    ("holds list, where a JSON object should be", lambda g: b"[]")])
def test_wrong_contents_end_in_a_sentence(change, capsys, words, edit):
    assert runtime.verify.main([str(change(edit)), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize("edit", [
    lambda p: p.update(logsumexp=[1e6] * 32), lambda p: p.update(logsumexp=[-1e6] * 32),
    lambda p: p.update(top_logits=[[1e6] * 20] * 32), lambda p: p.update(top_logits=[[-1e6] * 20] * 32)])
def test_numbers_that_are_no_ones_logits_fail_the_check(change, capsys, recwarn, edit):
    assert runtime.verify.main([str(change(lambda g: edit(g["prompts"][0]))), "--threads", "1"]) == 1
    assert "mean KL of" in capsys.readouterr().err and not recwarn.list
