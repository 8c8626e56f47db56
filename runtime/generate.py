"""Generate text from a bundle: `python -m runtime.generate BUNDLE -p TEXT`. The reply goes to stdout as it is made."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from runtime.cli import arg, run
from runtime.engine import PROVIDERS, Engine, GenerationOptions, Reply

EXAMPLES = """examples:
  python -m runtime.generate build/smollm2-135m-int4 -p "What is the capital of France?" --chat
  python -m runtime.generate build/smollm2-135m-int4 -p "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
"""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What every command that opens a bundle takes."""
    bundle: Path = arg(positional=True, help="folder of the bundle")
    provider: str | None = arg(None, help="insist on this device", choices=PROVIDERS)
    threads: int | None = arg(None, help="CPU threads; default: the CPUs this process may use")
    max_memory_mb: float | None = arg(None, help="refuse when weights and KV cache would take more than this")
    verify: bool = arg(False, help="compare the sha256 of every file first")
    cache_dtype: str | None = arg(None, choices=("float16", "float32", "int8"), help="KV cache of the native core; default: "
                                  "float16, or int8 where the bundle's was quantized")
    repack_cache: bool = arg(False, help="keep the native core's repacked weights beside the bundle's, to open sooner")

    def open(self) -> Engine:
        """The engine these options ask for. Raises UserError, CheckFailed."""
        return Engine(self.bundle, provider=self.provider, threads=self.threads, max_memory_mb=self.max_memory_mb,
                      verify=self.verify, cache_dtype=self.cache_dtype, repack_cache=self.repack_cache)


@dataclass(frozen=True, kw_only=True)
class ReplyOptions(EngineOptions):
    """How replies are made; named as in `runtime.engine.GenerationOptions`. None: what the model's generation_config.json
    says, else the default there."""
    max_new_tokens: int | None = arg(None, help="tokens of a reply at most; default: 256, or what the context leaves")
    temperature: float | None = arg(None, help="0 always takes the likeliest token (default: the model's, else 0)")
    top_k: int | None = arg(None, help="only the K likeliest tokens; 0: off (default: the model's, else 0)")
    top_p: float | None = arg(None, help="only the likeliest tokens that together reach this probability; 1: off "
                              "(default: the model's, else 1)")
    min_p: float | None = arg(None, help="only tokens at least this times as likely as the likeliest; 0: off "
                              "(default: the model's, else 0)")
    repetition_penalty: float | None = arg(None, help="divide the logits of tokens seen in prompt or reply; 1: off "
                                           "(default: the model's, else 1)")
    frequency_penalty: float = arg(0.0, help="lower a token's logit by this for each time the reply has it")
    presence_penalty: float = arg(0.0, help="lower a token's logit by this where the reply has it")
    seed: int | None = arg(None, help="the same seed gives the same reply")
    stop: tuple[str, ...] = arg((), help="end the reply before any of these texts; a special token's spelling counts")
    control_tokens: bool = arg(False, help="take control tokens that a text spells, such as <|im_end|>, for the token, not for text")

    def generation(self) -> dict:
        """The keyword arguments of `Engine.stream` and its like."""
        names = {field.name for field in fields(GenerationOptions)}
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


@dataclass(frozen=True, kw_only=True)
class Options(ReplyOptions):
    """Generate text from a bundle."""
    prompt: str = arg(short="-p", help="text to continue, or with --chat to answer")
    chat: bool = arg(False, help="put the prompt through the model's chat template, as the user's message")


def show(stream) -> Reply:
    """Print the pieces of a `runtime.engine.Stream` as they come, and a line of figures on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")          # a terminal that lacks a character shows another
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    return stream.reply


def summary(reply: Reply) -> str:
    """One line about how fast a reply came."""
    timings = reply.timings
    speed = f", {timings.decode_tokens_per_s:.0f} tokens/s" if timings.decode_tokens_per_s else ""
    first = f", first after {timings.ttft_ms:.0f} ms" if timings.ttft_ms else ""
    return f"[{timings.prompt_tokens} prompt tokens, {len(reply.tokens)} new{first}{speed}, {reply.finish_reason}]"


def generate(options: Options) -> None:
    """Open the bundle and stream one reply."""
    GenerationOptions(**options.generation())             # refused before the bundle is loaded
    with options.open() as engine:
        if options.chat:
            stream = engine.stream_chat([{"role": "user", "content": options.prompt}], **options.generation())
        else:
            stream = engine.stream(options.prompt, **options.generation())
        print(summary(show(stream)), file=sys.stderr)


def main(argv=None) -> int:
    return run(Options, generate, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
