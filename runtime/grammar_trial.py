"""The process in which a reply's form is tried first: started by runtime/structured.py, JSON in, JSON out, then it ends.

    {"kind": "json_schema" | "regex" | "grammar", "source": TEXT, "control": {ID: SPELLING}, "vocab": N}
    -> {"grammar": TEXT} or {"error": WHY}

A schema, an expression or a grammar is from a stranger, and llguidance can take exponential time over one, or end the process
over another (rules that name each other for thousands of steps). Its own limits do not hold for either. So the system sets the
bounds, MEMORY bytes of address space and SECONDS of CPU, over a vocabulary of single bytes and the model's control tokens; and the
trial has a smaller stack (STACK) than any thread in which the real one is compiled.
"""

import json
import sys
import threading

MEMORY = 1 << 30
SECONDS = 2
STACK = 1 << 20
LIMITS = dict(max_lexer_states=20_000, verbose_errors=False)       # of a lexer about 40 MB; the library's own would be 500
# One space, or a new line with its indentation: a model that is unsure would write white space for ever.
WHITE_SPACE = r"( |\n[ \t]{0,32})"


class _Bytes:
    """A tokenizer of single bytes, behind the control tokens' ids."""

    bos_token_id = None

    def __init__(self, control: dict[str, str], vocab: int):
        self.tokens = [b""] * vocab + [bytes([byte]) for byte in range(256)] + [b"<|end|>"]
        for token, spelling in control.items():
            self.tokens[int(token)] = spelling.encode()
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = [*map(int, control), self.eos_token_id]
        self._first = vocab

    def __call__(self, text: bytes | str) -> list[int]:
        return [self._first + byte for byte in (text if isinstance(text, bytes) else text.encode())]


def answer(kind: str, source: str, control: dict[str, str], vocab: int) -> dict:
    """The form as llguidance's grammar, compiled once and asked for its first tokens."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
    try:
        grammar = LLMatcher.grammar_from_json_schema(source, {"whitespace_pattern": WHITE_SPACE}) if kind == "json_schema" else \
            grammar_from(kind, source)
        tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(control, vocab)))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return {"error": "no text satisfies it" if "NoExtension" in matcher.get_error() else matcher.get_error()}
        return {"grammar": grammar}
    except BaseException as error:                # panics of Rust are no `Exception`
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):    # no such limits here; the other end waits only so long
        pass
    request = json.load(sys.stdin)
    threading.stack_size(STACK)
    trial = threading.Thread(target=lambda: json.dump(answer(**request), sys.stdout))
    trial.start()
    trial.join()


if __name__ == "__main__":
    main()
