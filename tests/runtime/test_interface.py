"""What an app sees: the names of `runtime`, and the conveniences of an engine."""

import subprocess
import sys

import numpy as np
import pytest

import runtime
from runtime import Engine, GenerationOptions, UserError

ON_THE_CPU = {"provider": "cpu", "threads": 1}


def test_the_interface_is_visible_and_light():
    assert {"Engine", "GenerationOptions", "Reply", "Stream", "Timings", "TokenLogprobs", "UserError", "CheckFailed"} <= set(dir(runtime))
    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    program = "import runtime, sys; print(sorted({'numpy', 'tokenizers', 'jinja2', 'onnxruntime'} & set(sys.modules)), runtime.UserError)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] <class")


def test_a_misspelt_option_is_told(golden_bundle):
    with Engine(golden_bundle, **ON_THE_CPU) as engine:
        for call in (engine.generate, engine.stream, lambda text, **o: engine.chat([{"role": "user", "content": text}], **o)):
            with pytest.raises(UserError, match="did you mean 'temperature'"):
                call("Once", temprature=0.5)
    with pytest.raises(TypeError):
        GenerationOptions(temprature=0.5)


def test_a_stream_is_given_up(golden_bundle):
    with Engine(golden_bundle, **ON_THE_CPU) as engine:
        whole = engine.generate("Once upon", max_new_tokens=40)[0]
        with engine.stream("Once upon", max_new_tokens=40) as stream:
            pieces = [next(stream), next(stream)]
            stream.close()
            stream.close()
            assert list(stream) == []
        assert "".join(pieces) == stream.reply.text and whole.text.startswith(stream.reply.text)
        assert stream.reply.finish_reason is None and 0 < len(stream.reply.tokens) < len(whole.tokens)


def test_tokens_have_their_texts_beside_their_log_probabilities(golden_bundle):
    with Engine(golden_bundle, **ON_THE_CPU) as engine:
        reply, = engine.generate("Once upon", max_new_tokens=12, logprobs=3)
        raw = engine.tokenizer
        for entry, token in zip(reply.logprobs, reply.tokens, strict=True):
            assert entry.token == token and entry.text == raw.decode([token]) and entry.top_texts[0] == entry.text
            assert len(entry.top_texts) == len(entry.top) == 3
        assert all("\ufffd" in entry.text or entry.text in reply.text for entry in reply.logprobs)
        eos = engine.bundle.model["eos_token_ids"][0]
        assert raw.alone(eos) == raw.token_text(eos) != ""
        assert np.isclose(reply.logprobs[0].logprob, reply.logprobs[0].top[0][1])
