"""The engine around the mock backend: a model over bytes whose replies are arbitrary, often invalid, UTF-8."""

import shutil

import numpy as np
import pytest
from make_bundle import BOS, EOS, VOCAB, write_bundle
from mock_backend import logits_after

import runtime.engine
from runtime import Engine
from runtime.errors import CheckFailed, UserError


def oracle(prompt: bytes, count: int) -> tuple[list[int], str]:
    """Greedy tokens and their text, by brute force."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        token = int(logits_after(tokens, VOCAB).argmax())
        if token == EOS:
            break
        tokens.append(token)
    tokens = tokens[len(prompt):]
    return tokens, bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


PROMPTS = ["Hello", "naïve 日本", "x", "👋 " * 9, "\x00", "The quick brown fox"]


def test_greedy_replies_are_the_oracles(engine):
    replies = engine.generate(PROMPTS, max_new_tokens=40)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        tokens, text = oracle(prompt.encode(), 40)
        assert (reply.tokens, reply.text) == (tokens, text)
        assert reply.finish_reason == ("length" if len(tokens) == 40 else "stop")
        assert reply.timings.prompt_tokens == len(prompt.encode()) and reply.logprobs == []
        assert len(reply.timings.token_ms) == len(tokens) and reply.timings.token_ms == sorted(reply.timings.token_ms)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 4}, {"stop": ("e", "\ufffd\ufffd", "zz")},
                                     {"temperature": 1.0, "top_p": 0.9, "seed": 1, "stop": "a"}], ids=str)
def test_a_stream_joins_to_what_is_not_streamed(engine, options):
    for prompt in PROMPTS:
        whole, = engine.generate(prompt, max_new_tokens=60, **options)
        stream = engine.stream(prompt, max_new_tokens=60, **options)
        pieces = list(stream)
        assert "".join(pieces) == whole.text == stream.reply.text and all(pieces)
        assert (stream.reply.tokens, stream.reply.finish_reason) == (whole.tokens, whole.finish_reason)


def test_stop_strings_end_the_text_before_them(engine):
    text = engine.generate("abc", max_new_tokens=80)[0].text
    for start in (0, 1, 7, len(text) // 2):
        for length in (1, 2, 5):
            stop = text[start:start + length]
            reply, = engine.generate("abc", max_new_tokens=80, stop=("never there", stop))
            assert reply.text == text[:text.index(stop)] and reply.finish_reason == "stop"
    reply, = engine.generate("abc", max_new_tokens=80, stop="never there")
    assert reply.text == text and reply.finish_reason == "length"


def test_stop_tokens(engine):
    tokens, _ = oracle(b"abc", 80)
    reply, = engine.generate("abc", max_new_tokens=80, stop_tokens=(tokens[10],))
    assert reply.tokens == tokens[:tokens.index(tokens[10])] and reply.finish_reason == "stop"


def test_the_models_own_stop_tokens_can_be_passed_by(engine):
    always = {EOS: 1e9}
    reply, = engine.generate("abc", logit_bias=always, max_new_tokens=5)
    assert (reply.tokens, reply.text, reply.finish_reason) == ([], "", "stop")
    assert reply.timings.ttft_ms is None and reply.timings.decode_tokens_per_s is None
    reply, = engine.generate("abc", logit_bias=always, max_new_tokens=5, ignore_model_stop=True)
    assert (reply.tokens, reply.text, reply.finish_reason) == ([EOS] * 5, "", "length")


GENERATION = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "eos_token_id": EOS}


@pytest.mark.parametrize("generation, sampling", [
    ({**GENERATION, "do_sample": True}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2}),
    (GENERATION, {"repetition_penalty": 1.2}), ({"do_sample": True, "top_k": None}, {"temperature": 1.0}), ({}, {})], ids=str)
def test_the_models_own_sampling_is_the_default(engine, open_engine, generation, sampling):
    """What its generation_config.json says, exactly as if it were given; whatever is given comes first."""
    own = open_engine(generation=generation)
    for given in ({}, {"temperature": 0}, {"temperature": 0.5, "top_p": 1.0}):
        want, got = (e.generate(PROMPTS, seed=5, max_new_tokens=20, **options)
                     for e, options in ((engine, {**sampling, **given}), (own, given)))
        assert [reply.tokens for reply in got] == [reply.tokens for reply in want]
    chat = [{"role": "user", "content": "Hi"}]
    assert own.chat(chat, seed=1, max_new_tokens=20).text == engine.chat(chat, seed=1, max_new_tokens=20, **sampling).text


def test_sampling_of_a_model_that_cannot_be_is_refused(open_engine):
    with pytest.raises(UserError, match="manifest.json: model.generation: top_p is 'most'"):
        open_engine(generation={"do_sample": True, "top_p": "most"})


def test_samples_neither_depend_on_the_batch_nor_on_each_other(engine):
    options = {"temperature": 1.2, "seed": 9, "max_new_tokens": 12}
    together = engine.generate(PROMPTS, n=3, **options)
    alone = [reply for prompt in PROMPTS for reply in engine.generate(prompt, n=3, **options)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({tuple(r.tokens) for r in together}) == 3 * len(PROMPTS)
    assert engine.generate("Hello", **options)[0].tokens == together[0].tokens


def test_token_ids_are_a_prompt_too(engine):
    ids = list("Hello".encode())
    want = engine.generate("Hello", max_new_tokens=5)[0].tokens
    assert engine.generate(ids, max_new_tokens=5)[0].tokens == want
    assert engine.generate(np.array(ids, np.int32), max_new_tokens=5)[0].tokens == want
    both = engine.generate([ids, "Hello"], max_new_tokens=5)
    assert [r.tokens for r in both] == [want, want]


def test_logprobs(engine):
    reply, = engine.generate("Hello", max_new_tokens=5, logprobs=2)
    assert [entry.token for entry in reply.logprobs] == reply.tokens
    assert all(entry.top[0] == (entry.token, pytest.approx(entry.logprob)) and len(entry.top) == 2 for entry in reply.logprobs)


def test_chat_goes_through_the_template(engine):
    messages = [{"role": "user", "content": "Hi"}]
    tokens, text = oracle(b"[user]Hi\n[assistant]", 20)
    assert engine.chat_tokens(messages).tolist() == list(b"[user]Hi\n[assistant]")
    assert engine.chat(messages, max_new_tokens=20).tokens == tokens
    assert "".join(engine.stream_chat(messages, max_new_tokens=20)) == text


def test_tools_and_what_else_a_template_reads(open_engine):
    source = "{% if tools %}{{ tools[0].name }}{% endif %}{{ messages[0].content }}{% if seed %}{{ seed }}{% endif %}{% if enable_thinking %}<think>{% endif %}"
    engine, asked = open_engine(template=source), [{"role": "user", "content": "Hi"}]
    for more, prompt in (({"tools": [{"name": "now"}]}, "nowHi"), ({"enable_thinking": True}, "Hi<think>"), ({"template": {"seed": 7}}, "Hi7"),
                         ({"template": {"tools": [{"name": "a"}], "enable_thinking": False}}, "aHi"), ({"template": None}, "Hi"), ({"template": {}}, "Hi"),
                         ({"enable_thinking": False, "template": {"enable_thinking": True}}, "Hi<think>")):
        tokens, text = oracle(prompt.encode(), 20)
        assert engine.chat_tokens(asked, **more).tolist() == list(prompt.encode())
        assert engine.chat(asked, max_new_tokens=20, **more).tokens == tokens
        assert "".join(engine.stream_chat(asked, max_new_tokens=20, seed=3, **more)) == text
    for more in ({"template": {"enable_thinkin": True}}, {"template": "enable_thinking"}, {"template": {3: 1}}, {"template": {"messages": []}},
                 {"template": {"self": 1}}, {"enable_thinkin": True}, {"tools": "now"}):
        with pytest.raises(UserError, match="^[^\n]*(enable_thinking|template has|must be a list of dicts)"):
            engine.chat(asked, **more)


def test_a_chat_tells_the_thought_from_the_answer(open_engine, monkeypatch):
    """The prompt opens the thought; a plain prompt of the same text does not say so."""
    engine = open_engine(template="{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}{{ '</think>' if never }}")
    said = list(b"I must.\n</think>\n\nYes.")
    monkeypatch.setattr(engine.backend, "forward", _says(said))
    reply = engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=99)
    assert (reply.thought, reply.answer) == ("I must.", "Yes.") and reply.text == bytes(said).decode() and reply.tokens == said
    reply, = engine.generate("Hi<think>\n", max_new_tokens=99)
    assert (reply.thought, reply.answer) == (None, reply.text) and reply.tokens == said


def _says(tokens):
    """A forward whose greedy reply is these tokens, after prompts of 10 tokens, which it reads in one call."""
    def forward(input_ids, position_ids, write_index, logits_positions, *rest):
        logits = np.zeros((1, logits_positions.shape[1], VOCAB), np.float32)
        for i, place in enumerate(position_ids[0, logits_positions[0]] - 9):
            logits[0, i, [*tokens, EOS][min(place, len(tokens))]] = 9
        return logits
    return forward


def test_templates_know_the_special_tokens(open_engine):
    engine = open_engine(template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}")
    assert engine.chat_tokens([{"role": "user", "content": "é"}]).tolist() == [BOS, *"é".encode(), EOS, EOS + 1]


def test_leaving_a_stream_early(engine):
    stream = engine.stream("Hello", max_new_tokens=400)
    first = next(stream)
    calls = len(engine.backend.calls)
    assert stream.reply.finish_reason is None and stream.reply.text == first
    del stream
    assert engine.generate("Hello", max_new_tokens=3) and len(engine.backend.calls) <= calls + 3


def test_two_streams_at_once(engine):
    a, b = engine.stream("Hello", max_new_tokens=30), engine.stream("x", max_new_tokens=30)
    texts = ["", ""]
    for i in range(60):
        texts[i % 2] += next((a, b)[i % 2], "")
    assert texts == [engine.generate(p, max_new_tokens=30)[0].text for p in ("Hello", "x")]


def test_capacity_is_chosen_for_the_request(engine):
    engine.generate("Hello", max_new_tokens=10, logit_bias={EOS: 1e9})
    engine.generate("Hello" * 20, max_new_tokens=300, logit_bias={EOS: 1e9})
    assert engine.backend.capacities == [64, 384]


def test_default_length_is_what_the_context_leaves(open_engine):
    engine = open_engine(max_context=100)
    assert len(engine.generate("a" * 97, ignore_model_stop=True)[0].tokens) == 3
    assert len(open_engine(max_context=512).generate("a", ignore_model_stop=True)[0].tokens) == 256


def test_context_can_be_filled_to_the_last_token(open_engine):
    engine = open_engine(max_context=100)
    reply, = engine.generate("a" * 60, max_new_tokens=40, ignore_model_stop=True)
    assert len(reply.tokens) == 40


# Bad input

@pytest.mark.parametrize("prompt, options, message", [
    ("a" * 600, {}, "the prompt has 600 tokens and the reply may have 1, but the model's context is 512"),
    ("a" * 100_000, {}, "100000 tokens"),
    ("a" * 512, {}, "context is 512"),
    ("a" * 500, {"max_new_tokens": 13}, "500 tokens and the reply may have 13"),
    ("", {}, "the prompt is empty"), (["a", ""], {}, "the prompt is empty"), (np.empty(0, np.int64), {}, "is empty"),
    ([], {}, "the batch is empty"),
    ("a\ud800", {}, "lone surrogate"),
    ([VOCAB], {}, "token id outside 0..258"), ([-1, 5], {}, "token id outside"),
    ([1.5, 2], {}, "must be a text or a list of token ids"), ([None], {}, "must be a text"), ([["a"]], {}, "must be a text"),
    ("a", {"n": 0}, "n is 0"), ("a", {"n": -1}, "n is -1"), ("a", {"n": 1.5}, "n is 1.5"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"), ("a", {"max_new_tokens": -5}, "max_new_tokens is -5"),
    ("a", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ("a", {"temperature": -1}, "temperature is -1"), ("a", {"temperature": float("nan")}, "temperature is nan"),
    ("a", {"stop": ("",)}, "stop strings"),
    ("a", {"logit_bias": {VOCAB: 1.0}}, "token 259")], ids=lambda value: repr(value)[:30])
def test_requests_that_are_refused(engine, prompt, options, message):
    with pytest.raises(UserError, match=message):
        engine.generate(prompt, **options)
    assert engine.generate("still fine", max_new_tokens=1)


def test_nothing_is_allocated_for_a_refused_request(engine):
    for prompt, options in (("a" * 600, {}), ("", {}), ("a", {"temperature": -1}), ("a", {"max_new_tokens": 0})):
        with pytest.raises(UserError):
            engine.generate(prompt, **options)
    assert engine.backend.capacities == [] and engine.backend.calls == []


def test_a_cache_past_the_budget_is_refused_before_it_is_allocated(open_engine):
    engine = open_engine(max_memory_mb=0.03)                 # 31457 bytes: 256 of weights, 100 a slot
    assert engine.generate("a", max_new_tokens=100)
    with pytest.raises(UserError, match=r"KV cache of 4 x 128 tokens needs 0 MB, but max_memory_mb leaves 0 MB"):
        engine.generate(["a"] * 4, max_new_tokens=100)
    assert len(engine.backend.capacities) == 1


def test_a_cache_larger_than_the_machine_is_refused(engine, monkeypatch):
    monkeypatch.setattr(runtime.engine, "available_memory", lambda: 12_000)
    with pytest.raises(UserError, match="this machine has free"):
        engine.generate("a", max_new_tokens=100)
    assert engine.generate("a", max_new_tokens=20)


def test_weights_past_the_budget_are_refused_before_they_are_loaded(open_engine):
    with pytest.raises(UserError, match="the weights alone take 0 MB, more than max_memory_mb=0.0001"):
        open_engine(max_memory_mb=0.0001)


@pytest.mark.parametrize("options, message", [
    ({"threads": 0}, "threads is 0"), ({"threads": 1.5}, "threads is 1.5"), ({"max_memory_mb": -1}, "max_memory_mb is -1"),
    ({"max_memory_mb": float("nan")}, "max_memory_mb is nan")])
def test_engine_options_that_are_refused(open_engine, options, message):
    with pytest.raises(UserError, match=message):
        open_engine(**options)


def test_an_unknown_provider_is_refused(tmp_path):
    with pytest.raises(UserError, match="provider is 'tpu'; known: "):
        Engine(write_bundle(tmp_path / "bundle"), provider="tpu")


def test_a_bundle_without_template_cannot_chat(tmp_path, open_engine):
    engine = open_engine()
    engine.bundle.manifest["chat_template"] = None
    with pytest.raises(UserError, match="no chat template in this bundle"):
        engine.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ ''.__class__ }}", "{% if %}"])
def test_a_template_that_raises(open_engine, template):
    engine = open_engine(template=template)
    with pytest.raises(UserError, match="chat_template.jinja: "):
        engine.chat([{"role": "user", "content": "Hi"}])
    assert engine.generate("works without it", max_new_tokens=1)


def test_verify_compares_hashes(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    (folder / "fast.onnx").write_bytes(b"nor a graph")
    with pytest.raises(CheckFailed, match="fast.onnx"):
        Engine(folder, verify=True)


@pytest.mark.parametrize("content", [b"\xff", b"not a graph "])
def test_a_graph_that_is_none_is_refused(tiny_bundle, tmp_path, content):
    folder = shutil.copytree(tiny_bundle()[1], tmp_path / "bundle")
    size = (folder / "fast.onnx").stat().st_size
    (folder / "fast.onnx").write_bytes((content * size)[:size])
    with pytest.raises(UserError, match="fast.onnx"):
        Engine(folder, provider="cpu")


def test_closing(engine):
    with engine:
        pass
    assert engine.backend.closed


@pytest.mark.parametrize("provider", ["native", "cpu"])
def test_files_replaced_by_renaming_while_an_engine_is_open(tiny_bundle, tmp_path, provider):
    """A bundle may be updated under an open engine, file by file: it goes on with what it opened."""
    folder, other = (shutil.copytree(tiny_bundle(family)[1], tmp_path / family) for family in ("smollm2", "llama"))
    with Engine(folder, provider=provider) as engine:
        before = engine.generate("The sea is", max_new_tokens=12)[0].tokens
        for file in other.iterdir():
            file.replace(folder / file.name)
        assert engine.generate("The sea is", max_new_tokens=12)[0].tokens == before
    with Engine(folder, provider=provider) as engine:
        assert engine.generate("The sea is", max_new_tokens=12)[0].tokens != before
