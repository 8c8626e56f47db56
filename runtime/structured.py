"""Replies that keep to a form: JSON, a JSON schema, a regular expression or a grammar (the extra "serve": llguidance).

    constraint = constraint_for(engine, "json_schema", {"type": "object", ...})
    engine.submit(prompt, constraint=constraint)

A constraint says before every token which may come (a bit a token), and hears which came. When the form is complete, the end is
allowed; when nothing but the end may follow, the reply ends. It belongs to one reply. What was compiled is kept, so a form costs
its compilation once.

Forms come from strangers. A new one is tried in a process with limits of memory and time (runtime/grammar_trial.py), and only
one that passes is compiled here: whatever it is, the answer is a constraint or a sentence. A mask is bounded by llguidance's own
counters, and a reply whose mask takes longer than SLOWEST_S ends.
"""

import functools
import json
import re
import subprocess
import sys
import threading
import time
import weakref
from typing import Protocol

import numpy as np

from . import grammar_trial
from .errors import UserError, pip_line, shown
from .text import Tokenizer
from .thoughts import Thoughts

KINDS = ("json", "json_schema", "regex", "grammar")
LONGEST = 500_000                 # characters of a schema, an expression or a grammar
SLOWEST_S = 0.5                   # of CPU for one mask
_WAIT_S = 10.0                    # for a trial, which has 2 s of CPU
_TURN_S = 2.0                     # to wait for a turn: two are tried at a time
_KEPT = 16                        # compiled grammars of one tokenizer


class Constraint(Protocol):
    """Which tokens a reply may go on with. What raises UserError ends the reply it belongs to, and no other."""

    done: bool                    # nothing but the end may come

    def mask(self, allowed: np.ndarray) -> None:
        """Fill int32 [ceil(vocab / 32)]: bit i % 32 of word i // 32 is set where token i may come next."""

    def accept(self, token: int) -> None:
        """This token was chosen."""

    def fits(self, tokens: list[int]) -> int:
        """How many of these may come, one after the other. It may be missing, and saves passes: what is chosen is chosen by the mask."""


def constraint_for(engine, kind: str, source: str | dict | None = None) -> Constraint:
    """A fresh constraint for one reply of `engine` (any object with its `bundle` and `tokenizer`).

    kind: "json" (any JSON object; no source), "json_schema" (a dict, or its JSON), "regex" (the whole reply matches; Rust's
    syntax, without look-around), or "grammar" (Lark as llguidance has it, or llama.cpp's GBNF). May take 0.1 s for a new form.
    Raises UserError for a form that is invalid, that no text satisfies, or that is too large or too slow to work with; Busy (also
    one) where others' new forms take too long.
    """
    if kind not in KINDS:
        raise UserError(f"there is no structured output of kind {shown(kind)}; the kinds are {', '.join(KINDS)}")
    kind, source = ("json_schema", {"type": "object"}) if kind == "json" else (kind, source)
    if kind == "json_schema" and not isinstance(source, str):
        try:
            source = json.dumps(source, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"the JSON schema is no JSON ({error})") from None
    if not isinstance(source, str):
        raise UserError(f"a {kind} must be a text, not {shown(source)}")
    if len(source) > LONGEST:
        raise UserError(f"the {_NAMES[kind]} has {len(source)} characters, more than {LONGEST}; make it shorter")
    with _opening:                                # once, however many requests come first
        grammars = _of_tokenizer.get(engine.tokenizer)
        if grammars is None:
            grammars = _of_tokenizer[engine.tokenizer] = _Grammars(engine.tokenizer, engine.bundle.model)
    return grammars.constraint(kind, source)


def after_thought(constraint: Constraint, engine, thoughts: Thoughts | None, prompt: np.ndarray) -> Constraint:
    """`constraint` from the end of the thought on that `prompt` (ids) opens; itself where it opens none."""
    if thoughts is None or not thoughts.opened(engine.tokenizer, prompt):
        return constraint
    return _AfterThought(constraint, engine.tokenizer, thoughts.end, engine.bundle.model["eos_token_ids"])


_FRAME = re.compile(r"^ *(\d+ \|.*|\^+) *$|<non-verbose/>|^at \d+\(\d+\): ", re.MULTILINE)       # how llguidance points at a place
_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}
_opening, _trying = threading.Lock(), threading.Semaphore(2)
_of_tokenizer: weakref.WeakKeyDictionary[Tokenizer, "_Grammars"] = weakref.WeakKeyDictionary()


class _Grammars:
    """Compiled grammars over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, model: dict):
        try:
            import llguidance
        except ImportError:
            raise UserError(f"structured output needs llguidance: {pip_line('serve')}") from None
        self._library, vocab = llguidance, model["config"]["vocab_size"]
        self._trial = {"control": tokenizer.control_tokens, "vocab": vocab}
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.json(), n_vocab=vocab, eos_token=list(model["eos_token_ids"]) or None)
        except BaseException as error:            # panics of Rust are no `Exception`
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"structured output is not to be had with this bundle: llguidance does not read its tokenizer "
                            f"({_line(error)})") from None
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def constraint(self, kind: str, source: str) -> Constraint:
        return _Matched(self._compiled(kind, source).deep_copy(), _NAMES[kind], self._compiled.cache_clear)

    def _compile(self, kind: str, source: str):
        grammar = self._tried(kind, source)
        limits = self._library.LLParserLimits(**grammar_trial.LIMITS)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise UserError(f"the {_NAMES[kind]} cannot be used ({_line(matcher.get_error())})")
        return matcher

    def _tried(self, kind: str, source: str) -> str:
        """llguidance's grammar of a form that compiles within the limits. Raises UserError for any other."""
        file = grammar_trial.__file__
        boot = f"import sys; sys.path[:] = {sys.path!r}; exec(compile(open({file!r}).read(), {file!r}, 'exec'))"
        if not sys.executable or getattr(sys, "frozen", False):
            raise UserError("a form is tried by a Python of its own, and this program has none (sys.executable)")
        request = json.dumps({"kind": kind, "source": source, **self._trial}).encode("ascii")
        if not _trying.acquire(timeout=_TURN_S):
            from .pending import Busy             # which imports what imports this
            raise Busy("too many new grammars are being compiled; try again later")
        try:
            told = subprocess.run([sys.executable, "-S", "-c", boot], input=request, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, timeout=_WAIT_S, start_new_session=True).stdout
            found = json.loads(told)
        except (ValueError, subprocess.TimeoutExpired):
            raise UserError(f"the {_NAMES[kind]} takes too much time, memory or nesting to compile; make it simpler, with fewer "
                            "alternatives and smaller repetitions") from None
        except OSError as error:
            raise UserError(f"the process that tries a form cannot be started: {error.strerror}") from None
        finally:
            _trying.release()
        if "error" in found:
            raise UserError(f"the {_NAMES[kind]} cannot be used ({_line(found['error'])})")
        return found["grammar"]


class _Matched:
    """A grammar's state within one reply."""

    def __init__(self, matcher, name: str, forget):
        from llguidance.numpy import fill_next_token_bitmask
        self.done = False
        self._matcher, self._name, self._forget, self._fill = matcher, name, forget, fill_next_token_bitmask

    def mask(self, allowed: np.ndarray) -> None:
        begun = time.thread_time()
        self._fill(self._matcher, allowed[None])
        self._check()
        if time.thread_time() - begun > SLOWEST_S:
            raise UserError(f"the {self._name} took more than {SLOWEST_S} s for one token; make it simpler")

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.done = self._matcher.is_stopped()

    def fits(self, tokens: list[int]) -> int:
        return max(0, self._matcher.validate_tokens(tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            self._forget()                        # its lexer is shared by all replies, and may have grown to its limit
            raise UserError(f"the {self._name} became too complex for this reply ({_line(self._matcher.get_error())}); make it simpler")


class _AfterThought:
    """Anything but the end until a thought is over, which the prompt opened; then another constraint."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer, mark: str, ends: tuple[int, ...]):
        self._constraint, self._tokenizer, self._mark = constraint, tokenizer, mark
        self._ends = np.array(ends, np.int64)
        self._said, self._thinking = "", True

    @property
    def done(self) -> bool:
        return not self._thinking and self._constraint.done

    def mask(self, allowed: np.ndarray) -> None:
        if not self._thinking:
            self._constraint.mask(allowed)
            return
        bits = np.ones(32 * len(allowed), np.uint8)
        bits[self._ends] = 0
        allowed[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        if not self._thinking:
            self._constraint.accept(token)
            return
        self._said = self._said[-len(self._mark):] + self._tokenizer.alone(token)
        self._thinking = self._mark not in self._said

    def fits(self, tokens: list[int]) -> int:
        if not self._thinking:
            return self._constraint.fits(tokens)
        return next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))


def _line(error: object) -> str:
    """What a library says, in one short line."""
    said = " ".join(_FRAME.sub("", str(error)).split())
    return said if len(said) <= 200 else said[:197] + "..."
