"""Talk with a bundle in the terminal: `python -m runtime.chat BUNDLE`.

The conversation so far goes into every reply. /reset forgets it, /exit or Ctrl-D ends, and Ctrl-C stops a reply that
is being made: what has been said of it stays.
"""

import sys
from dataclasses import dataclass

from .cli import arg, run
from .engine import Engine, GenerationOptions
from .errors import UserError
from .generate import ChatOptions, generation, show, summary

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
  %(prog)s build/qwen3-0.6b-int4 --tools tools.json --template enable_thinking=false
"""
COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops a reply"


@dataclass(frozen=True, kw_only=True)
class Options(ChatOptions):
    """Talk with a bundle in the terminal."""
    system: str | None = arg(None, help="instructions that begin the conversation")


def answer(engine: Engine, messages: list[dict], chatting: dict) -> dict | None:
    """Print the reply to `messages`. Returns what was said of it before it ended or was stopped, as a message with the
    thought apart from the answer, for the template to keep or leave out; None: nothing was."""
    stream = engine.stream_chat(messages, **chatting)
    try:
        print(summary(show(stream)), file=sys.stderr)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    reply = stream.reply
    return {"role": "assistant", "content": reply.answer, "reasoning_content": reply.thought} if reply.text else None


def chat(options: Options) -> None:
    """Read lines and answer them until there are no more. A message without an answer leaves no trace."""
    GenerationOptions(**generation(options))             # refused before the bundle is loaded
    chatting = options.chatting()
    try:
        import readline                                   # noqa: F401  (line editing and history in input())
    except ImportError:
        pass
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    with options.open() as engine:
        print(f"{engine.bundle.name}: {COMMANDS}", file=sys.stderr)
        messages = beginning
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print(f"\n{COMMANDS}", file=sys.stderr)
                continue
            if text == "/exit":
                return
            if text == "/reset":
                messages = beginning
            elif text.startswith("/"):
                print(f"{text}: no such command; {COMMANDS}", file=sys.stderr)
            elif text:
                asked = [*messages, {"role": "user", "content": text}]
                try:
                    if said := answer(engine, asked, chatting):
                        messages = [*asked, said]
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)


def main(argv=None) -> int:
    return run(Options, chat, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
