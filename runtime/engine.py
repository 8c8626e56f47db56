"""Text in, text out: the object an app holds.

    engine = Engine("build/smollm2-135m-int4")
    for piece in engine.stream("Once upon a time", max_new_tokens=64, temperature=0.8, seed=7): ...
    reply = engine.chat([{"role": "user", "content": "Hi"}])    # .text .tokens .finish_reason .timings .thought .answer
    replies = engine.generate(["a", "b"], n=2, logprobs=5)         # a's two, then b's two
    pending = engine.submit("Once upon a time")                    # from any thread or event loop: many share the steps

An engine opens a bundle, chooses a backend, and joins the parts: chat template, tokenizer, decode loop, sampling,
detokenizer, stop strings. It keeps no conversation, and no cache between requests except what `submit` has its scheduler
keep (scheduler.py). What a request can need is computed
before anything is allocated, and refused with a sentence where it exceeds the model's context or the memory.

Memory counted against `max_memory_mb` is that of the weights as stored and of the request's KV cache at its longest;
the backend's own working memory (for SmolLM2-135M about 100 MB) comes on top. Without `max_memory_mb`, the cache must
fit what the machine has free.

Threads may share an engine; every reply is what it would be alone. `close` may come at any time and from anywhere: a call that is
in the backend runs to its end, and whoever then goes on with a reply gets a UserError.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import decode, reply
from .backend import Backend
from .backends import PROVIDERS, open_backend, provider_of, step_down
from .bundle import MANIFEST, Bundle, open_bundle
from .cli import did_you_mean
from .errors import DeviceError, UserError, shown
from .likelihood import score_tails
from .machine import available_memory, cpu_threads, release_free_memory
from .options import GenerationOptions, SubmitOptions, is_id
from .pending import Pending
from .reply import Draft, Reply, Timings                     # Timings and TokenLogprobs: for whoever looks for them here
from .sampling import Sampler, TokenLogprobs, check_defaults
from .scheduler import Limits, Scheduler
from .speculation.opening import open_speculation
from .stream import Stream
from .structured import after_thought
from .text import ReplyText, Tokenizer
from .thoughts import Thoughts

if TYPE_CHECKING:
    from .chat_tokens import ChatEncoder
    from .solving import Answer
    from .task import Task

DEFAULT_NEW_TOKENS = 256
_MOST_REPLIES = 1 << 16
_MB = 1 << 20
_PREFIX_BYTES = 512 * _MB
_CLOSED = "{}: this engine was closed; open the bundle again with Engine()"


_OPTIONS = {field.name for field in fields(GenerationOptions)}


class Engine:
    """An opened bundle.

    bundle: its folder. provider: "tensorrt", "cuda", "native" or "cpu"; None: the first of them that can be had (`explain()` tells
    why). threads: of the CPU backend; None: the CPUs this process may use. verify: compare every file's sha256 first.
    Of the native core alone: cache_dtype, of the KV cache ("float16", "float32", "int8"; None: see native/backend.py), and
    repack_cache, which keeps the repacked weights beside the bundle's, so that it opens sooner next time (not with verify,
    which runs nothing but files whose sha256 it has compared).
    speculate: "auto" guesses tokens ahead where that pays and changes no bit (on the native core), from the text itself and the bundle's
    n-grams, "on" on every backend, "off" never; or the path of a draft, a smaller bundle with the same tokenizer or a file of n-grams.
    Replies are the same, near ties of logits aside (speculation/).
    Raises UserError for a bundle, device or option that cannot be used, CheckFailed for a changed file.
    """

    def __init__(self, bundle: str | Path, *, provider: str | None = None, threads: int | None = None,
                 max_memory_mb: float | None = None, verify: bool = False, cache_dtype: str | None = None,
                 repack_cache: bool = False, speculate: str | Path = "auto"):
        if max_memory_mb is not None and (not isinstance(max_memory_mb, numbers.Real) or isinstance(max_memory_mb, bool)
                                          or not 0 < max_memory_mb <= 1e12):
            raise UserError(f"max_memory_mb is {shown(max_memory_mb)}; it must be a positive number, at most 1e12")
        for name, value in (("verify", verify), ("repack_cache", repack_cache)):
            if not isinstance(value, bool):
                raise UserError(f"{name} is {shown(value)}; it must be true or false")
        self.bundle: Bundle = open_bundle(bundle, verify=verify)
        self._defaults = check_defaults(self.bundle.model.get("generation") or {}, f"{self.bundle.path(MANIFEST)}: model.generation",
                                        self.bundle.model["config"]["vocab_size"])
        if max_memory_mb is not None and self.bundle.weights_bytes > max_memory_mb * _MB:
            raise UserError(f"{self.bundle.folder}: the weights alone take {self.bundle.weights_bytes / _MB:.0f} MB, "
                            f"more than max_memory_mb={max_memory_mb:g}")
        self._max_memory_mb = max_memory_mb
        self._provider, self._threads, self._closed, self._stepping = provider, cpu_threads(threads), False, threading.RLock()
        asked = {"cache_dtype": cache_dtype, "repack_cache": repack_cache and not verify}
        self._native = {name: value for name, value in asked.items() if value}
        read_tokenizer = functools.cache(lambda: Tokenizer(self.bundle.path(self.bundle.manifest["tokenizer"])))
        self.backend, self._explanation = open_backend(self.bundle, provider, self._threads,
                                                       native={**self._native, "meanwhile": read_tokenizer})
        release_free_memory()                     # before the tokenizer, if it is still to be read: the peaks do not add up
        self.tokenizer = read_tokenizer()
        release_free_memory()
        self.speculation = open_speculation(speculate, self.bundle, lambda draft: open_backend(draft, provider, self._threads)[0])
        if self.speculation and max_memory_mb is not None and self._free_memory() < 0:
            raise UserError(f"{self.bundle.folder}: the weights and those of the draft take more than max_memory_mb={max_memory_mb:g}")
        self._chat = None
        self._limits, self._scheduler, self._making = Limits(), None, threading.Lock()

    def explain(self) -> str:
        """Which backend runs and, line by line, why nothing better does."""
        return "\n".join(self._explanation)

    def generate(self, prompts: str | list, *, n: int = 1, **options) -> list[Reply]:
        """`n` replies to each prompt, the first prompt's first; ragged prompts run together.

        prompts: a text, a list of texts, or token ids in place of a text. options: see GenerationOptions. Sample j of
        a prompt is the same whatever the other prompts are, near ties of logits aside. Raises UserError.
        """
        drafts = self._drafts(_as_list(prompts), n, self._options(options))
        for _ in self._run(drafts, n):
            pass
        count = len(drafts) // n
        return [draft.reply for first in range(count) for draft in drafts[first::count]]

    def stream(self, prompt, **options) -> Stream:
        """The reply to one prompt (a text, or token ids) as it is made: iterate over its pieces of text."""
        return Stream(self, self._drafts([prompt], 1, self._options(options)))

    def chat(self, messages: list[dict], **options) -> Reply:
        """The assistant's reply to `messages`: dicts with "role" (user, assistant, system, tool) and "content". options: those
        of GenerationOptions, and what the chat template reads besides, such as tools (a list of JSON schemas) or
        enable_thinking; in template={...} whatever their names are."""
        stream = self.stream_chat(messages, **options)
        for _ in stream:
            pass
        return stream.reply

    def solve(self, record: dict, task: Task | None = None, **options) -> Answer:
        """The answer to a record (a dict of the task's fields), asked as the bundle's own task asks, or as `task` (task.py) does:
        .text .scores .reply. options: those of GenerationOptions, where a text is to be written; by default greedy, with no penalty."""
        from .solving import solve
        return solve(self, record, task, options)

    def score(self, prompt, tails: list[np.ndarray]) -> list[tuple[float, bool]]:
        """ln p of each of these continuations (token ids) of one prompt, and whether greedy decoding would write it."""
        sequence = self._drafts([prompt], 1, self._options({"max_new_tokens": max(map(len, tails))}))[0].sequence
        while True:
            self._check_open()
            backend = self.backend
            try:
                return score_tails(backend, sequence.prompt, tails)
            except DeviceError as error:
                failure = error.with_traceback(None)        # whose frames hold the cache's memory
            self._step_down(backend, failure)

    def submit(self, prompt, **options) -> Pending:
        """Hand a prompt to the scheduler and return at once: requests of all threads and event loops share its steps. options:
        those of `generate`, and of SubmitOptions. Raises UserError, and Busy (which is one) where too many wait."""
        return self._submit(prompt, self._options(options, SubmitOptions), None)

    def submit_chat(self, messages: list[dict], *, template: dict | None = None, **options) -> Pending:
        """The same of the prompt that the chat template makes of `messages` and what it reads besides, in `template`. Where that
        opens a thought, the constraint begins behind it."""
        asked = self._options(options, SubmitOptions)
        tokens = self.chat_tokens(messages, control_tokens=asked.control_tokens, template=template)
        if asked.constraint is not None:
            asked = replace(asked, constraint=after_thought(asked.constraint, self, self._chat.thoughts, tokens))
        return self._submit(tokens, asked, self._chat.thoughts)

    def _submit(self, prompt, options: SubmitOptions, thoughts: Thoughts | None) -> Pending:
        self._check_open()
        draft = self._draft(self._encode(prompt, options), options, options.sample, thoughts, options.constraint, options.spelled)
        deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
        return self.scheduler.submit(Pending(draft, priority=options.priority, deadline=deadline, user=options.user,
                                             prompt_logprobs=options.prompt_logprobs))

    def serve_with(self, **limits) -> None:
        """Limits of the scheduler (its Limits), before the first `submit`. Raises UserError after it, and for what is no limit."""
        if self._scheduler:
            raise UserError("the scheduler runs already: set its limits before the first submit")
        self._limits = Limits(**limits)

    @property
    def scheduler(self) -> Scheduler:
        """What `submit` hands requests to; made on first use, and anew in the child of a fork."""
        with self._making:
            if self._scheduler is None or self._scheduler.pid != os.getpid():
                self._check_open()
                free = self._free_memory()
                room = getattr(self.backend, "free_memory", None)        # of a device: caches are there, kept prefixes are not
                prefix, cache = (None if mb is None else int(mb * _MB) for mb in (self._limits.prefix_mb, self._limits.cache_mb))
                if prefix is None:
                    prefix = _PREFIX_BYTES if free is None else min(_PREFIX_BYTES, free // 4)
                if cache is None and free is not None:
                    cache = max(0, free - prefix) if self._max_memory_mb is not None else (room() if room else free) // 2
                self._scheduler = Scheduler(lambda: self.backend, self._cache_bytes, limits=self._limits, cache_bytes=cache,
                                            prefix_bytes=prefix, step_down=self._step_down)
            return self._scheduler

    def stream_chat(self, messages: list[dict], **options) -> Stream:
        """`chat` as a stream."""
        variables = {name: options.pop(name) for name in set(options) - _OPTIONS}
        try:
            tokens = self.chat_tokens(messages, control_tokens=options.get("control_tokens", False), **variables)
        except UserError as error:                          # of a variable that the template does not read
            meant = next(filter(None, (did_you_mean(name, _OPTIONS) for name in variables)), "")
            raise UserError(f"{error}{meant}") from None
        return Stream(self, self._drafts([tokens], 1, self._options(options), self._chat.thoughts))

    def chat_tokens(self, messages: list[dict], *, control_tokens: bool = False, template: dict | None = None,
                    **variables) -> np.ndarray:
        """Token ids (int64) of the prompt that the bundle's chat template makes of `messages` and variables (tools, documents,
        enable_thinking, whatever it reads; those in `template` too). Control tokens that they spell are text, unless
        control_tokens. Raises UserError."""
        if not isinstance(template, dict | None):
            raise UserError(f"template is {shown(template)}; it must be a dict of what the chat template reads")
        variables |= template or {}
        for name in variables:
            if not isinstance(name, str) or name in ("self", "messages", "control_tokens"):
                raise UserError(f"template has {shown(name)}, which is no name for what a chat template may be given")
        return self.chat_encoder.tokens(messages, control_tokens=control_tokens, **variables)

    @property
    def chat_encoder(self) -> ChatEncoder:
        """The bundle's chat template with its tokenizer. Raises UserError where it has none."""
        if self._chat is None:
            from .chat_tokens import bundle_encoder
            self._chat = bundle_encoder(self.bundle, self.tokenizer)
        if self._chat is None:
            raise UserError(f"{self.bundle.folder}: no chat template in this bundle, so it cannot chat; give it a "
                            "prompt of its own making with `generate` or `stream`")
        return self._chat

    def _options(self, given: dict, kind: type[GenerationOptions] = GenerationOptions) -> GenerationOptions:
        known = {field.name for field in fields(kind)}
        for name in given:
            if name not in known:
                raise UserError(f"there is no option {name!r}{did_you_mean(name, known)}: options are those of {kind.__name__}")
        return kind(**self._defaults | given)

    def close(self) -> None:
        """Free the model's memory, once no call is in it; what is asked of the engine after is refused with a UserError."""
        self._closed = True
        if self._scheduler:
            self._scheduler.close(UserError(_CLOSED.format(self.bundle.folder)))
        self.backend.close()
        if self.speculation:
            self.speculation.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(_CLOSED.format(self.bundle.folder))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _drafts(self, prompts: list, n: int, options: GenerationOptions,
                thoughts: Thoughts | None = None) -> list[Draft]:
        """One draft for each reply: first samples of every prompt, then second ones."""
        self._check_open()
        if not is_id(n) or n < 1:
            raise UserError(f"n is {shown(n)}; it must be a whole number of at least 1")
        if not prompts:
            raise UserError("there is no prompt: the batch is empty")
        if n * len(prompts) > _MOST_REPLIES:
            raise UserError(f"n is {shown(n)}, of {len(prompts)} prompts; at most {_MOST_REPLIES} replies are made at once")
        encoded = [self._encode(prompt, options) for prompt in prompts]
        drafts = [self._draft(ids, options, sample, thoughts) for sample in range(n) for ids in encoded]
        self._check_memory([draft.sequence for draft in drafts])
        return drafts

    def _draft(self, ids: np.ndarray, options: GenerationOptions, sample: int, thoughts: Thoughts | None, constraint=None,
               spelled: frozenset[int] = frozenset()) -> Draft:
        stop = (options.stop,) if isinstance(options.stop, str) else options.stop
        stop_tokens = frozenset(options.stop_tokens) | frozenset(() if options.ignore_model_stop else self.bundle.model["eos_token_ids"])
        limit = min(options.max_new_tokens or DEFAULT_NEW_TOKENS, self.bundle.max_context - len(ids))
        sequence = decode.Sequence(ids, Sampler(options, ids, sample, constraint), limit, stop_tokens)
        if self.speculation and self.speculation.suits(self.backend):
            sequence.drafter = self.speculation.drafter(ids, sequence.sampler, limit)
        return Draft(sequence, ReplyText(self.tokenizer, stop, spelled), thoughts)

    def _encode(self, prompt, options: GenerationOptions) -> np.ndarray:
        """Token ids of a prompt that leaves room for the reply asked for."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, control_tokens=options.control_tokens) if prompt else np.empty(0, np.int64)
        elif isinstance(prompt, (list, tuple)) and all(map(is_id, prompt)):
            ids = np.array(prompt)
        elif isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
            ids = prompt
        else:
            raise UserError(f"a prompt must be a text or a list of token ids, not {shown(prompt)}")
        if not ids.size:
            raise UserError("the prompt is empty; give at least one character")
        vocab = self.bundle.model["config"]["vocab_size"]
        if ids.min() < 0 or ids.max() >= vocab:
            raise UserError(f"the prompt has a token id outside 0..{vocab - 1}")
        context = self.bundle.max_context
        if len(ids) + (options.max_new_tokens or 1) > context:
            raise UserError(f"the prompt has {len(ids)} tokens and the reply may have {shown(options.max_new_tokens or 1)}, but "
                            f"the model's context is {context}; shorten the prompt or lower max_new_tokens")
        return ids.astype(np.int64)

    def _check_memory(self, sequences: list[decode.Sequence]) -> None:
        needed, free = self._cache_bytes(len(sequences), decode.last_capacity(sequences)), self._free_memory()
        whose = "this machine has free" if self._max_memory_mb is None else "max_memory_mb leaves"
        if free is not None and needed > free:
            raise UserError(f"the KV cache of {len(sequences)} x {decode.last_capacity(sequences)} tokens needs "
                            f"{needed / _MB:.0f} MB, but {whose} {max(0, free) / _MB:.0f} MB; lower max_new_tokens, "
                            "shorten the prompt or ask for fewer replies at once")

    def _free_memory(self) -> int | None:
        """Bytes beside the weights that caches may take; None: nobody knows."""
        if self._max_memory_mb is None:
            return available_memory()
        return int(self._max_memory_mb * _MB) - self.bundle.weights_bytes - (self.speculation.draft_bytes if self.speculation else 0)

    def _cache_bytes(self, rows: int, capacity: int) -> int:
        """Of the first backend that can have such a cache."""
        while True:
            try:
                return self.backend.cache_bytes(rows, capacity) + (self.speculation.cache_bytes(rows) if self.speculation else 0)
            except DeviceError as error:
                self._step_down(self.backend, error)

    def _step_down(self, failed: Backend, error: DeviceError) -> None:
        """Put the next backend in the place of one that failed. Raises `error` where the provider was named, or is the last."""
        with self._stepping:
            self._check_open()
            if failed is not self.backend:                  # another reply has stepped down already
                return
            provider = provider_of(failed)
            if self._provider is not None or provider not in PROVIDERS[:-1]:
                raise error
            reason = step_down(provider, error)
            with contextlib.suppress(DeviceError):          # the device may be gone
                failed.close()
            self.backend, (runs, *passed_over) = open_backend(self.bundle, None, self._threads, below=provider, native=self._native)
            self._explanation = [runs, *self._explanation[1:], reason, *passed_over]
            if self._closed:                                # meanwhile, and closed the other one
                self.backend.close()
                self._check_open()

    def _run(self, drafts: list[Draft], samples: int) -> Iterator[tuple[Draft, str]]:
        """Decode; yields each draft with the text it gained. Where a device fails, the next backend goes on: it reads the
        prompt and the tokens so far, and what was said is not said again."""
        while drafts:
            self._check_open()
            backend = self.backend
            try:
                yield from reply.run(backend, drafts, samples)
                return
            except DeviceError as error:
                failure = error.with_traceback(None)        # whose frames hold the cache's memory
            self._step_down(backend, failure)
            drafts, samples = [draft for draft in drafts if draft.sequence.finish_reason is None], 1


def _as_list(prompts) -> list:
    """A single prompt, a text or token ids, as a batch of one."""
    several = isinstance(prompts, (list, tuple)) and not (prompts and isinstance(prompts[0], (int, np.integer)))
    return list(prompts) if several else [prompts]
