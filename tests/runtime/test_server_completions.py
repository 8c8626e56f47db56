"""/v1/completions through the `openai` package, and lm-eval's `local-completions` against `models.lm_eval_adapter`."""

import json

import httpx
import numpy as np
import pytest

openai = pytest.importorskip("openai")

from openai.types import Completion

from runtime import decode
from runtime.engine import Engine

TEXT = "The answer is 42, I'm sure."


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def engine(served_bundle):
    """Not the server's: the oracle."""
    with Engine(served_bundle, provider="native", threads=1) as made:
        yield made


def test_prompts_are_texts_or_tokens_one_or_many(client, engine):
    ids = [engine.tokenizer.encode(text).tolist() for text in ("a b", TEXT)]
    wanted = [engine.stream(one, max_new_tokens=8) for one in ids]
    texts = ["".join(stream) for stream in wanted]
    for prompt, found in (("a b", texts[:1]), (["a b", TEXT], texts), (ids[1], texts[1:]), (ids, texts)):
        answer = client.completions.with_raw_response.create(model="tiny", prompt=prompt, max_tokens=8)
        made = Completion.model_validate_json(answer.content, strict=True)
        assert [(one.index, one.text, one.finish_reason) for one in made.choices] == [(n, text, "length") for n, text in enumerate(found)]
        assert made.usage.completion_tokens == 8 * len(found) and made.id.startswith("cmpl-")


def test_choices_go_over_the_whole_batch(client, engine):
    wanted = engine.generate(["a b", TEXT], n=2, temperature=1.0, seed=3, max_new_tokens=6)
    made = client.completions.create(model="tiny", prompt=["a b", TEXT], n=2, temperature=1.0, seed=3, max_tokens=6)
    assert [one.text for one in made.choices] == [reply.text for reply in wanted]
    assert made.usage.prompt_tokens == sum(len(engine.tokenizer.encode(text)) for text in ("a b", TEXT))


def test_many_prompts_wait_for_their_turn(serve, engine):
    one = serve(rows=2, queue=3)
    answer = httpx.post(f"{one.url}/v1/completions", json={"prompt": [[n] for n in range(5, 45)], "max_tokens": 3}, timeout=60)
    wanted = engine.generate([[n] for n in range(5, 45)], max_new_tokens=3)
    assert sum(a["text"] == b.text for a, b in zip(answer.json()["choices"], wanted, strict=True)) >= 38


def oracle(engine, ids: list[int]) -> np.ndarray:
    """float64 log probability of each token but the first."""
    found = decode.logits(engine.backend, np.array(ids))[:-1].astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    return (found - np.log(np.exp(found).sum(axis=1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_echo_scores_the_prompt(client, engine, limit):
    ids = engine.tokenizer.encode(TEXT).tolist()
    made = client.completions.create(model="tiny", prompt=[ids, TEXT], max_tokens=limit, echo=True, logprobs=1, temperature=0)
    wanted = oracle(engine, ids)
    reply = engine.generate(ids, max_new_tokens=limit or 1, logprobs=1)[0]
    for choice in made.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == len(ids) + limit
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        np.testing.assert_allclose(told.token_logprobs[1:len(ids)], wanted, atol=2e-3)
        np.testing.assert_allclose(told.token_logprobs[len(ids):], [one.logprob for one in reply.logprobs[:limit]], atol=2e-3)
        assert choice.text == TEXT + (reply.text if limit else "") and choice.finish_reason == "length"
        assert all(TEXT[at:].startswith(token) for at, token in zip(told.text_offset[:len(ids)], told.tokens))
        assert all(max(top.values()) >= logprob for top, logprob in zip(told.top_logprobs[1:], told.token_logprobs[1:]))


def test_a_scored_prompt_is_followed_by_a_token_even_where_the_model_ends(client, engine):
    """lm-eval leaves the last entry out, whatever it is."""
    ends = engine.bundle.model["eos_token_ids"]
    made = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=1, echo=True, logprobs=1, temperature=0,
                                     logit_bias={str(ends[0]): 1000})
    assert len(made.choices[0].logprobs.tokens) == 4 and made.choices[0].finish_reason == "stop"


def test_a_stream_joins_to_the_reply(server, client, engine):
    wanted = client.completions.create(model="tiny", prompt=["a b", TEXT], max_tokens=9, echo=True, logprobs=2)
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["a b", TEXT], "max_tokens": 9, "echo": True, "logprobs": 2,
                                                             "stream": True, "stream_options": {"include_usage": True}})
    *parts, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    *found, last = [json.loads(part.removeprefix("data: ")) for part in parts]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 18
    for choice in wanted.choices:
        mine = [one["choices"][0] for one in found if one["choices"][0]["index"] == choice.index]
        assert "".join(one["text"] for one in mine) == choice.text and mine[-1]["finish_reason"] == "length"
        logprobs = [value for one in mine if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
        assert logprobs[0] is None and logprobs[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=2e-3)


@pytest.mark.parametrize("body, param", [({"prompt": ""}, None), ({"prompt": [10 ** 6]}, None), ({"prompt": [-1]}, "prompt"), ({}, "prompt"),
                                         ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 3}, "best_of"),
                                         ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": [[2 ** 70]]}, "prompt"),
                                         ({"prompt": "a", "logprobs": 100}, "logprobs"), ({"prompt": ["a 1 " * 300]}, "prompt")])
def test_what_is_wrong_is_400(server, body, param):
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "max_tokens": 2} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param or param is None


# lm-eval

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


NAMES = ["tiny_choice", "tiny_rolling"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """evaluated(model as the harness has it) -> its results and samples on two small tasks."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"The answer to {a} plus {b} is", "choices": [f" {a + b}", f" {a * b}", " never"], "answer": a % 3}
            for a in range(6) for b in range(3)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(NAMES, (CHOICE, ROLLING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + text)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(NAMES)
    return lambda model: evaluate(model, tasks, log_samples=True, bootstrap_iters=0)


@pytest.fixture(scope="module")
def adapted(evaluated, served_bundle):
    """The same with the bundle in this process."""
    from models.judging.language_model import open_model
    from models.lm_eval_adapter import EdgewrightLM
    return evaluated(EdgewrightLM(open_model(served_bundle, threads=1), progress=False))


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_scores_a_bundle_unmodified(server, tiny_bundle, evaluated, adapted, backend):
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    how = {"tokenizer": str(tiny_bundle("smollm2", 4)[0])} if backend == "huggingface" else {}
    served = evaluated(LocalCompletionsAPI(model="tiny", base_url=f"{server.url}/v1/completions", tokenizer_backend=backend, batch_size=4,
                                           max_length=256, **how))
    for one, other in zip(served["samples"]["tiny_choice"], adapted["samples"]["tiny_choice"], strict=True):
        for (score, greedy), (wanted, wanted_greedy) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert score == pytest.approx(wanted, abs=5e-3) and bool(greedy) == bool(wanted_greedy)
    results = [found["results"] for found in (served, adapted)]
    assert results[0]["tiny_choice"]["acc,none"] == results[1]["tiny_choice"]["acc,none"]
    perplexities = [found["tiny_rolling"]["word_perplexity,none"] for found in results]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=2e-3)
