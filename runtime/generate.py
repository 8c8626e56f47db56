"""Generate text from a bundle: `python -m runtime.generate BUNDLE -p TEXT`. The reply goes to stdout as it is made."""

import contextlib
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import get_type_hints

from .cli import Checked, arg, run
from .engine import PROVIDERS, Engine, GenerationOptions, Reply
from .errors import UserError
from .files import parse_json, read_json

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4 -p "What is the capital of France?" --chat
  %(prog)s build/smollm2-135m-int4 -p "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
"""


@dataclass(frozen=True, kw_only=True)
class OpeningOptions(Checked):
    """How bundles are opened."""
    provider: str | None = arg(None, help="insist on this device", choices=PROVIDERS)
    threads: int | None = arg(None, help="CPU threads; default: the CPUs this process may use")
    max_memory_mb: float | None = arg(None, help="refuse when weights and KV cache would take more than this")
    verify: bool = arg(False, help="compare the sha256 of every file first")
    cache_dtype: str | None = arg(None, choices=("float16", "float32", "int8"), help="KV cache of the native core; default: "
                                  "float16, or int8 where the bundle's was quantized")
    repack_cache: bool = arg(False, help="keep the native core's repacked weights beside the bundle's, to open sooner")
    speculate: str = arg("auto", help="guess tokens ahead where that pays: auto (on the native core, whose replies stay the same to the "
                         "bit), on (everywhere), off, or a draft: a smaller bundle, or a file of n-grams")

    def open_bundle(self, bundle: Path, max_memory_mb: float | None) -> Engine:
        """The engine these options ask for. Raises UserError, CheckFailed."""
        return Engine(bundle, provider=self.provider, threads=self.threads, max_memory_mb=max_memory_mb,
                      verify=self.verify, cache_dtype=self.cache_dtype, repack_cache=self.repack_cache,
                      speculate=self.speculate)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(OpeningOptions):
    """What every command that opens a bundle takes."""
    bundle: Path = arg(positional=True, help="folder of the bundle")

    def open(self) -> Engine:
        """Raises UserError, CheckFailed."""
        return self.open_bundle(self.bundle, self.max_memory_mb)


# EngineOptions and how replies are made: every field of GenerationOptions that has a help text. What is not given (None) is as the
# model's generation_config.json says, else as the default there.
ReplyOptions = make_dataclass("ReplyOptions", [
    (field.name, get_type_hints(GenerationOptions)[field.name] | None,
     arg(None, help=field.metadata["help"], group="sampling (default: as the model's own settings)"))
    for field in fields(GenerationOptions) if "help" in field.metadata], bases=(EngineOptions,), frozen=True, kw_only=True)


def generation(options: ReplyOptions) -> dict:
    """The keyword arguments of `Engine.stream` and its like."""
    names = {field.name for field in fields(GenerationOptions)}
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ReplyOptions):
    """What every command that chats takes."""
    tools: Path | None = arg(None, help="JSON file with a list of tools (JSON schemas) for the chat template")
    template: tuple[str, ...] = arg((), metavar="NAME=VALUE", help="what the chat template reads besides, such as "
                                    "enable_thinking=false; a value is JSON, or else text")

    def chatting(self) -> dict:
        """The keyword arguments of `Engine.stream_chat`. Raises UserError."""
        pairs, given = [word.partition("=") for word in self.template], {}
        for name, sign, value in pairs:
            if not (name and sign):
                raise UserError(f"--template {name}{sign}{value}: give it as NAME=VALUE")
            with contextlib.suppress(ValueError):
                value = parse_json(value)
            given[name] = value
        tools = {} if self.tools is None else {"tools": read_json(self.tools, list)}
        return generation(self) | {"template": tools | given}


@dataclass(frozen=True, kw_only=True)
class Options(ChatOptions):
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
    GenerationOptions(**generation(options))             # refused before the bundle is loaded
    chatting = options.chatting()
    if chatting["template"] and not options.chat:
        raise UserError("--tools and --template are for the chat template: give --chat too")
    with options.open() as engine:
        if options.chat:
            stream = engine.stream_chat([{"role": "user", "content": options.prompt}], **chatting)
        else:
            stream = engine.stream(options.prompt, **generation(options))
        print(summary(show(stream)), file=sys.stderr)


def main(argv=None) -> int:
    return run(Options, generate, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
