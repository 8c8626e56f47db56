"""Random mixes of requests on real backends, with hardly any memory: each reply is exactly what `Engine.generate` gives alone.

Prompts share beginnings that are cut at any token, are edited, and go on from earlier replies; rows are few and move, caches are
made anew, blocks are evicted, prefixes saved, forgotten and loaded, and some requests are cancelled. Models with recurrent layers
have prompts beyond the 128 tokens between two of their snapshots.
"""

import random

import pytest
from cuda_double import cuda_is_there

import export.onnx
import export.ort
from runtime import Engine

RECURRENT = ("lfm2", "qwen3_5", "granite4_h", "granite4_tiny", "lfm2_moe")
CASES = [(family, "native") for family in (*RECURRENT, "smollm2", "gemma4")] + [("granite4_h", "cpu"), ("gemma3", "cpu"), ("gemma3", "cuda"), ("smollm2", "cuda")]


@pytest.mark.parametrize("family, provider", CASES, ids=map("-".join, CASES))
def test_a_mix_of_requests_gives_what_each_gives_alone(family, provider, tiny_checkpoint, tmp_path):
    bundle, rng = tmp_path / "bundle", random.Random(family + provider)
    checkpoint = tiny_checkpoint(family, max_position_embeddings=1024)
    dtype = "fp16" if provider == "cuda" else "fp32"
    assert export.onnx.main([str(checkpoint), "-o", str(bundle), "--dtype", dtype]) == 0 == export.ort.main([str(bundle)])
    with cuda_is_there(), Engine(bundle, provider=provider, threads=1) as engine:
        room = engine.backend.cache_bytes(1, 1024) * rng.choice([1.1, 2.5]) / 2**20
        engine.serve_with(rows=4, queue=1000, prefix_mb=rng.choice([0.1, 0.5]), cache_mb=room)
        known, requests = [[rng.randrange(3, 384) for _ in range(700)]], []
        for _ in range(10):
            prompt, options = _prompt(rng, rng.choice(known)), _options(rng)
            replies = engine.generate(prompt, n=2, **options)
            requests += [(prompt, options | {"sample": sample}, reply) for sample, reply in enumerate(replies)]
            known.append(prompt + replies[0].tokens)
        for turn in range(2):
            rng.shuffle(requests)
            running = []
            for prompt, options, alone in requests:
                running.append((engine.submit(prompt, **options), alone))
                if rng.random() < 0.1:
                    running[-1][0].cancel()
            engine.scheduler.save(tmp_path / "kept", family)
            engine.scheduler.forget()
            engine.scheduler.load(tmp_path / "kept", family)
            for pending, alone in running:
                reply = pending.result(60)
                if pending.cancelled and reply.finish_reason is None:
                    assert alone.tokens[:len(reply.tokens)] == reply.tokens and alone.text.startswith(reply.text)
                    continue
                assert (reply.tokens, reply.text, reply.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
                if provider == "native":                        # to the bit, whoever shares the steps
                    assert reply.logprobs == alone.logprobs
        stats = engine.scheduler.stats()
        assert stats.cached_tokens > 0 and not stats.failed and stats.finished + stats.cancelled >= 2 * len(requests)


def _prompt(rng: random.Random, base: list[int]) -> list[int]:
    """A beginning of `base`, cut anywhere or at an edge of blocks and snapshots, perhaps with another end."""
    prompt = base[:rng.choice([rng.randrange(1, len(base) + 1), 16, 17, 127, 128, 129, 256, 385])]
    if rng.random() < 0.3:
        prompt = prompt[:-1] + [rng.randrange(3, 384) for _ in range(rng.randrange(1, 30))]
    return prompt[:900]


def _options(rng: random.Random) -> dict:
    options = {"max_new_tokens": rng.choice([1, 5, 17, 60, 120]), "temperature": rng.choice([0, 0, 0.8, 1.3]), "seed": rng.randrange(1000),
               "ignore_model_stop": True}
    more = {"logprobs": 2, "stop": ("e", "a ", "1"), "repetition_penalty": 1.3, "logit_bias": {5: 3.0, 9: -9.0}, "top_k": 40, "top_p": 0.9}
    return options | {name: value for name, value in more.items() if rng.random() < 0.25}
