"""Many requests on one engine over the mock backend, whose logits are a hash of the whole sequence: any slot that is lost, moved
wrongly or restored from another prompt changes a reply."""

import asyncio
import os
import random
import threading
import time

import numpy as np
import pytest
from make_bundle import VOCAB, write_bundle
from mock_backend import MockBackend

import runtime.engine
import runtime.prefixes
import runtime.scheduler
from runtime import Engine
from runtime.errors import DeviceError, UserError
from runtime.pending import Busy, Expired

SYSTEM = "You are the voice of a small machine in a lighthouse, and you answer in one sentence. " * 3


@pytest.fixture(params=["plain", "recurrent"])
def engine(request, tmp_path, monkeypatch):
    backend = MockBackend(VOCAB, chunk=64 if request.param == "recurrent" else None)
    monkeypatch.setattr(runtime.engine, "open_backend", lambda *a, **k: (backend, ["mock runs nothing"]))
    monkeypatch.setattr(runtime.prefixes, "_MOST_INTERVAL", 128)              # the mock's states are large beside its slots
    with Engine(write_bundle(tmp_path / "bundle", max_context=2048)) as engine:
        yield engine


class Gate:
    """Holds the backend's calls up until it is opened."""

    def __init__(self, backend, monkeypatch):
        self.open, forward = threading.Event(), backend.forward

        def held(*arguments, **more):
            assert self.open.wait(20)
            return forward(*arguments, **more)
        monkeypatch.setattr(backend, "forward", held)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.002)


def test_replies_are_those_given_alone(engine):
    engine.serve_with(rows=5)
    rng = random.Random(0)
    beginnings = ["", SYSTEM, SYSTEM[:100], "日本語 " * 30]
    requests = [(rng.choice(beginnings) + str(i) * rng.randrange(1, 40),
                 dict(max_new_tokens=rng.randrange(1, 60), temperature=rng.choice([0, 1.1]), seed=i, logprobs=rng.choice([None, 2]),
                      stop=rng.choice([(), ("e", "zz")]))) for i in range(40)]
    alone = [engine.generate(prompt, **options)[0] for prompt, options in requests]
    pending = [engine.submit(prompt, **options) for prompt, options in requests]
    for whole, one in zip(alone, pending):
        reply = one.result(20)
        assert (reply.text, reply.tokens, reply.finish_reason, reply.logprobs) == (whole.text, whole.tokens, whole.finish_reason, whole.logprobs)
    stats = engine.scheduler.stats()
    assert stats.finished == 40 and stats.new_tokens == sum(len(reply.tokens) for reply in alone) and stats.cached_tokens > 0
    assert max(rows for rows, tokens in engine.backend.calls) == 5


def test_pieces_join_to_the_reply_in_threads_and_in_loops(engine):
    alone = engine.generate("Hello", max_new_tokens=50, logprobs=1)[0]
    pending = engine.submit("Hello", max_new_tokens=50, logprobs=1)
    pieces = list(iter(pending.next_piece, None))
    assert "".join(piece.text for piece in pieces) == alone.text and sum((piece.tokens for piece in pieces), []) == alone.tokens
    assert sum((piece.logprobs for piece in pieces), []) == alone.logprobs

    async def many():
        async def one(number):
            texts = [text async for text in engine.submit("Hello", max_new_tokens=50, sample=number)]
            assert all(texts)
            return "".join(texts)
        return await asyncio.gather(*(one(number) for number in range(20)), one(0))
    assert set(asyncio.run(many())) == {alone.text}
    assert asyncio.run(engine.submit("Hello", max_new_tokens=50).reply_async()).text == alone.text


def test_a_beginning_in_common_is_read_once(engine):
    first, second = engine.submit(SYSTEM + "What is a fog horn?", max_new_tokens=4), None
    first.result(10)
    before = sum(rows * tokens for rows, tokens in engine.backend.calls)
    second = engine.submit(SYSTEM + "And what is a lamp?", max_new_tokens=1)
    assert second.result(10).tokens == engine.generate(SYSTEM + "And what is a lamp?", max_new_tokens=1)[0].tokens
    assert first.cached_tokens == 0 and second.cached_tokens in ((len(SYSTEM) + 5) // 16 * 16, len(SYSTEM) // 128 * 128)
    assert sum(rows * tokens for rows, tokens in engine.backend.calls) - before <= 2 * len(SYSTEM)
    # requests that come together: one reads, the others wait for it; samples of one prompt as well
    third = [engine.submit("Z" + SYSTEM * 2, max_new_tokens=3, sample=i, temperature=1.0, seed=3) for i in range(6)]
    replies = [one.result(10) for one in third]
    assert [one.cached_tokens > 300 for one in third] == [False] + 5 * [True]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in engine.generate("Z" + SYSTEM * 2, n=6, max_new_tokens=3, temperature=1.0,
                                                                                            seed=3)]


def test_the_next_turn_of_a_chat_pays_for_itself_alone(engine):
    text = SYSTEM + "Tell me of the sea."
    said = engine.submit(text, max_new_tokens=200, ignore_model_stop=True).result(20).tokens
    tokens = [*text.encode(), *said]
    again = engine.submit([*tokens, *b"And then?"], max_new_tokens=1)
    again.result(10)
    assert len(tokens) - again.cached_tokens <= (17 if not engine.backend.chunk else 128 + 1)
    edited = engine.submit([*tokens[:len(text)], *b"And then?"], max_new_tokens=1)
    assert edited.result(10).tokens == engine.generate([*tokens[:len(text)], *b"And then?"], max_new_tokens=1)[0].tokens
    assert len(text) - edited.cached_tokens <= (17 if not engine.backend.chunk else 128)


def test_kept_prefixes_stay_within_their_bytes_and_the_least_recently_used_goes(engine):
    most = 1 << (19 if engine.backend.chunk else 14)
    engine.serve_with(prefix_mb=most / 2**20)
    prompts = [f"{i:03}" + SYSTEM for i in range(30)]
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=1).result(10)
        assert engine.scheduler.stats().prefix_bytes <= most
    assert engine.scheduler.stats().evictions > 0
    last, first = engine.submit(prompts[-1], max_new_tokens=1), engine.submit(prompts[0], max_new_tokens=1)
    last.result(10), first.result(10)
    assert last.cached_tokens > 100 and first.cached_tokens == 0


def test_who_goes_first(engine, monkeypatch):
    gate = Gate(engine.backend, monkeypatch)
    engine.serve_with(rows=2)
    running = engine.submit("a", max_new_tokens=30, ignore_model_stop=True, user="greedy")
    until(lambda: engine.scheduler.stats().rows == 1)
    names = [("greedy 1", "greedy", 0), ("greedy 2", "greedy", 0), ("modest", "modest", 0), ("urgent", "greedy", 5)]
    pending = {name: engine.submit(name, max_new_tokens=1, user=user, priority=priority, ignore_model_stop=True) for name, user, priority in names}
    gate.open.set()
    for one in [running, *pending.values()]:
        one.result(20)
    assert sorted(pending, key=lambda name: pending[name].draft.sequence.times[0]) == ["urgent", "modest", "greedy 1", "greedy 2"]


def test_a_full_queue_a_deadline_and_a_cancelled_request(engine, monkeypatch):
    gate = Gate(engine.backend, monkeypatch)
    engine.serve_with(rows=1, queue=2)
    running = engine.submit("a", max_new_tokens=400, ignore_model_stop=True)
    until(lambda: engine.scheduler.stats().rows == 1)
    late, cancelled = engine.submit("b", deadline_s=0.01), engine.submit("c")
    with pytest.raises(Busy, match="wait already"):
        engine.submit("d")
    time.sleep(0.02)
    cancelled.cancel()
    gate.open.set()
    with pytest.raises(Expired, match="deadline"):
        late.result(10)
    assert cancelled.result(10).finish_reason is None
    until(lambda: len(running.reply.tokens) > 3)
    running.cancel()
    reply = running.result(10)
    assert reply.finish_reason is None and 3 < len(reply.tokens) < 400
    with pytest.raises(Expired):
        engine.submit("e", max_new_tokens=1500, ignore_model_stop=True, deadline_s=0.05).result(10)
    stats = engine.scheduler.stats()
    assert (stats.cancelled, stats.expired, stats.refused, stats.rows, stats.queued) == (2, 2, 1, 0, 0)


def test_admission_is_by_bytes_computed_before(engine, monkeypatch):
    per_slot = engine.backend.bytes_per_slot
    engine.serve_with(rows=8, cache_mb=1500 * per_slot / 2**20, prefix_mb=0)
    largest, new_cache = [], engine.backend.new_cache
    monkeypatch.setattr(engine.backend, "new_cache", lambda rows, capacity: largest.append(rows * capacity) or new_cache(rows, capacity))
    lengths = [(10, 5), (600, 300), (300, 100), (10, 900), (40, 40), (700, 20), (1, 1)] * 2
    prompts = ["x" * prompt + str(i) for i, (prompt, _) in enumerate(lengths)]
    alone = [engine.generate(prompt, max_new_tokens=new)[0].tokens for prompt, (_, new) in zip(prompts, lengths)]
    largest.clear()
    pending = [engine.submit(prompt, max_new_tokens=new) for prompt, (_, new) in zip(prompts, lengths)]
    assert [one.result(20).tokens for one in pending] == alone and max(largest) <= 1500
    with pytest.raises(UserError, match="requests may have"):
        engine.submit("x" * 1000, max_new_tokens=900)


def test_replies_that_outgrow_the_memory_wait_and_go_on(engine, monkeypatch):
    """Six replies of 700 tokens where all may begin, and two can end at once."""
    per_slot = engine.backend.bytes_per_slot
    engine.serve_with(rows=6, cache_mb=2000 * per_slot / 2**20)
    prompts = [f"{i}" * 20 for i in range(6)]
    options = dict(max_new_tokens=700, ignore_model_stop=True, temperature=0.8, seed=1, frequency_penalty=0.1)
    alone = [engine.generate(prompt, **options)[0] for prompt in prompts]
    sizes, new_cache = [], engine.backend.new_cache
    monkeypatch.setattr(engine.backend, "new_cache", lambda rows, capacity: sizes.append(rows * capacity) or new_cache(rows, capacity))
    pending = [engine.submit(prompt, prompt_logprobs=0 if i == 5 else None, priority=int(i == 4), **options) for i, prompt in enumerate(prompts)]
    replies = [one.result(60) for one in pending]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in alone] and max(sizes) <= 2000
    assert max(rows for rows, tokens in engine.backend.calls if tokens == 1) >= 4 and len(pending[5].prompt_logprobs) == 20
    ends = [reply.timings.token_ms[-1] for reply in replies]
    assert ends[4] <= min(ends[1:]) and engine.scheduler.stats().new_tokens == 6 * 700


def test_a_failed_device_is_stepped_down_from_and_nobody_notices(engine, monkeypatch):
    prompts = [SYSTEM + str(i) for i in range(5)]
    alone = [engine.generate(prompt, max_new_tokens=30)[0].tokens for prompt in prompts]
    failing, calls = engine.backend, []
    forward = failing.forward

    def fails(*arguments, **more):
        calls.append(1)
        if len(calls) > 25:
            raise DeviceError("the GPU failed")
        return forward(*arguments, **more)
    monkeypatch.setattr(failing, "forward", fails)
    monkeypatch.setattr(runtime.engine, "provider_of", lambda backend: "cuda")
    monkeypatch.setattr(runtime.engine, "open_backend", lambda *a, **k: (MockBackend(VOCAB, chunk=failing.chunk), ["mock", "again"]))
    pending = [engine.submit(prompt, max_new_tokens=30) for prompt in prompts]
    assert [one.result(20).tokens for one in pending] == alone and failing.closed and engine.backend is not failing


def test_what_fails_ends_alone_and_a_bug_ends_all_but_the_thread(engine, monkeypatch):
    other = engine.submit("Hello", max_new_tokens=300, ignore_model_stop=True)
    bad = engine.submit("Bye", max_new_tokens=5, logit_bias={VOCAB + 1: 1.0})
    with pytest.raises(UserError, match="logit_bias"):
        bad.result(10)
    assert len(other.result(20).tokens) == 300
    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit("Hello", max_new_tokens=3).result(10)
    assert engine.submit("Hello", max_new_tokens=3).result(10).tokens == engine.generate("Hello", max_new_tokens=3)[0].tokens


def test_the_prompts_own_log_probabilities(engine):
    engine.submit(SYSTEM, max_new_tokens=1).result(10)                        # kept, and of no use here
    pending = engine.submit(SYSTEM + "!", max_new_tokens=1, prompt_logprobs=2)
    pending.result(10)
    whole = engine.generate(SYSTEM + "!", max_new_tokens=1, logprobs=2)[0]
    told = pending.prompt_logprobs
    assert len(told) == pending.prompt_tokens == len(SYSTEM) + 1 and told[0] is None and pending.cached_tokens == 0
    for place in (1, 2, 77, len(SYSTEM)):
        before = engine.generate(SYSTEM[:place], max_new_tokens=1, logprobs=2, temperature=0)[0].logprobs[0]
        assert told[place].top == before.top and chr(told[place].token) == (SYSTEM + "!")[place] and len(told[place].top_texts) == 2
    assert whole.tokens == pending.reply.tokens


def test_closing_ends_all_in_words_and_idleness_ends_the_thread(engine, monkeypatch):
    monkeypatch.setattr(runtime.scheduler, "IDLE_S", 0.05)
    assert engine.submit("Hello", max_new_tokens=2).result(10)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "edgewright-scheduler"])
    assert engine.scheduler.stats().cache_bytes == 0
    pending = [engine.submit(text, max_new_tokens=1500, ignore_model_stop=True) for text in "abc"]
    until(lambda: pending[0].reply.tokens)
    engine.close()
    for one in pending:
        with pytest.raises(UserError, match="this engine was closed"):
            one.result(10)
    with pytest.raises(UserError, match="this engine was closed"):
        engine.submit("d")


def test_the_child_of_a_fork_has_a_scheduler_of_its_own(engine):
    text = engine.submit("Hello", max_new_tokens=20).result(10).text
    running = engine.submit("Hello again", max_new_tokens=1500, ignore_model_stop=True)
    child = os.fork()
    if not child:
        os._exit(engine.submit("Hello", max_new_tokens=20).result(10).text != text)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    running.cancel()


def test_threads_and_clients_that_leave(engine):
    """Eight threads, each with requests of its own, a third of which it gives up; the rest are whole and right."""
    engine.serve_with(rows=4, queue=1000)
    prompts = {i: (SYSTEM if i % 2 else "") + f"request {i}" for i in range(12)}
    right = {i: engine.generate(prompt, max_new_tokens=25)[0].tokens for i, prompt in prompts.items()}
    wrong = []

    def client(seed):
        rng = random.Random(seed)
        for _ in range(15):
            i = rng.randrange(12)
            pending = engine.submit(prompts[i], max_new_tokens=25)
            if rng.random() < 0.33:
                for _ in range(rng.randrange(3)):
                    pending.next_piece(20)
                pending.cancel()
            elif pending.result(20).tokens != right[i]:
                wrong.append(i)
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    until(lambda: engine.scheduler.stats().rows == 0)
    assert not wrong and engine.scheduler.stats().failed == 0


def test_what_is_no_request_is_refused(engine):
    for wrong, match in (({"prompt": ""}, "empty"), ({"prompt": "x" * 3000}, "context"), ({"prompt": "x", "temperatur": 1}, "no option"),
                         ({"prompt": [VOCAB]}, "token id outside"), ({"prompt": None}, "must be a text"), ({"prompt": "x", "sample": -1}, "sample is"),
                         ({"prompt": "x", "deadline_s": 0}, "deadline_s is"), ({"prompt": "x", "priority": float("nan")}, "priority is"),
                         ({"prompt": "x", "prompt_logprobs": "2"}, "prompt_logprobs is"), ({"prompt": "x", "user": 3}, "user is")):
        with pytest.raises(UserError, match=match):
            engine.submit(**wrong)
    for limits in ({"rows": 0}, {"rows": 1.5}, {"queue": -1}, {"cache_mb": "8"}):
        with pytest.raises(UserError, match=next(iter(limits))):
            engine.serve_with(**limits)
    assert engine.scheduler.stats().queued == 0
    with pytest.raises(UserError, match="before the first submit"):
        engine.serve_with(rows=2)
    assert np.array_equal(engine.chat_tokens([{"role": "user", "content": "a"}]), engine.submit_chat([{"role": "user", "content": "a"}], max_new_tokens=1)
                          .draft.sequence.prompt)
