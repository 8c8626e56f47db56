"""Replies over any opened backend: sequences of tokens become text, each until a stop token, a stop string or its length.

    draft = Draft(decode.Sequence(ids, Sampler(options, ids), 64, stop_tokens), ReplyText(tokenizer, stop_strings))
    for draft, text in run(backend, [draft, ...]): ...   # the text that each gained
    draft.reply                                  # .text .tokens .finish_reason .logprobs .timings .thought .answer

`Engine` answers through it, and so does whoever measures a model, in PyTorch too.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from . import decode
from .backend import Backend
from .sampling import TokenLogprobs
from .text import ReplyText
from .thoughts import Thoughts


@dataclass(frozen=True)
class Timings:
    """When each token of a reply was there, in milliseconds of wall clock since the request's tokens went to the model
    (so prefill is in it, tokenizing and templates are not), or to the scheduler (`Engine.submit`: so waiting is in it too).
    In a batch, steps are shared with the neighbours."""

    prompt_tokens: int
    token_ms: list[float]

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token; None where there is none."""
        return self.token_ms[0] if self.token_ms else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first, per second; None where there are none."""
        if len(self.token_ms) < 2:
            return None
        return (len(self.token_ms) - 1) / (self.token_ms[-1] - self.token_ms[0]) * 1e3


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: list[int]                         # of the reply; a stop token is not among them, a stop string's are
    finish_reason: str | None                 # "stop", "length"; None: still going, or given up
    logprobs: list[TokenLogprobs]             # one for each token where `logprobs` was asked for, else empty
    timings: Timings
    thought: str | None = None                # in a chat, what of the text the model thought first; None: nothing
    answer: str = ""                          # and the rest of the text: all of it where there is no thought


class Draft:
    """A reply in the making: a sequence of tokens, and the text it has become."""

    def __init__(self, sequence: decode.Sequence, text: ReplyText, thoughts: Thoughts | None = None):
        self.sequence, self._text, self._thoughts = sequence, text, thoughts
        self.start: float | None = None           # when the prompt first went to a model
        self._pieces: list[str] = []
        self._token_ms: list[float] = []          # one for each token that has gone through the detokenizer

    def advance(self) -> str:
        """Text that may be shown since the last call; ends the sequence at a stop string, and drops what was decoded
        beyond it."""
        sequence, text, stopped = self.sequence, "", False
        while not stopped and (n := len(self._token_ms)) < len(sequence.tokens):
            self._token_ms.append((sequence.times[n] - self.start) * 1e3)
            piece, stopped = self._text.push(sequence.tokens[n])
            text += piece
        del sequence.tokens[len(self._token_ms):]
        if not stopped and sequence.finish_reason:
            tail, stopped = self._text.finish()
            text += tail
        if stopped:
            sequence.finish_reason = "stop"
        self._pieces.append(text)
        return text

    @property
    def shown(self) -> int:
        """How many tokens have become text, or part of it."""
        return len(self._token_ms)

    def told(self, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """The same with the texts of their tokens."""
        alone = self._text.tokenizer.alone
        return [entry._replace(text=alone(entry.token), top_texts=[alone(token) for token, _ in entry.top]) for entry in logprobs]

    @property
    def reply(self) -> Reply:
        """The reply so far; without tokens that were made when an exception came, before their text was."""
        sequence, count = self.sequence, self.shown
        logprobs = self.told(sequence.logprobs[:count])
        text, tokens, thought = "".join(self._pieces), sequence.tokens[:count], None
        answer = text
        if self._thoughts:
            thought, answer = self._thoughts.split(self._text.tokenizer, sequence.prompt, tokens, text, self._text.spelled)
        timings = Timings(len(sequence.prompt), self._token_ms)
        return Reply(text, tokens, sequence.finish_reason, logprobs, timings, thought, answer)


def run(backend: Backend, drafts: list[Draft], samples: int = 1) -> Iterator[tuple[Draft, str]]:
    """Decode all drafts to their end (see `decode.run`); yields each with the text it gained."""
    by_sequence, now = {draft.sequence: draft for draft in drafts}, time.perf_counter()
    for draft in drafts:
        draft.start = draft.start or now
    cache = backend.new_cache(len(drafts), decode.first_capacity(list(by_sequence)))
    for sequence in decode.run(backend, cache, list(by_sequence), samples):
        draft = by_sequence[sequence]
        yield draft, draft.advance()
