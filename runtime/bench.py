"""Measure bundles on this machine, beside other runtimes if wished: `python -m runtime.bench BUNDLE`.

Each run generates greedily from random tokens, past any end-of-text token. One round warms up and is not counted. Systems take
turns within every round, so that what changes with time meets all; the ratios are those of pairs of one round. Reported is the
median over the rounds of each figure, with its extremes and the interval that holds it with 95% (bootstrap):

    decode_tokens_per_s   tokens after the first, by the time from the first to the last
    prefill_tokens_per_s  prompt tokens by the time to the first token
    ttft_ms               time to first token; of a bundle with encoding as many tokens of text
    tpot_ms_p50/p95/p99   percentiles, within a run, of the time from one token to the next; choosing it and its text included
    at_N_tokens_per_s     --context: decode speed of the last tokens before N in the cache (a quarter of N, at most --new-tokens)
    streams_N_tokens_per_s, streams_N_whole_tokens_per_s
                          --streams: N sequences at once through the scheduler; all their decode tokens while all are at it, and
                          prompts and replies by the whole time
    joules                energy of the processor in a run, where the system lets one read it
    load_ms               Engine(), once, imports not included
    peak_rss_mb           most memory resident in the process (MiB), imports and tokenizer included

--speculate measures guesses instead, on prompts of three classes (benching/guessing.py has its figures). Without it nothing is guessed,
since what comes after random tokens repeats itself.

Runs of other processes show in the spread and in the line of conditions.

Encoders' bundles are measured by texts a second (benching/encoders.py).

--load measures servers instead, with many clients (benching/load.py), and --soak checks one under mixed load (benching/soak.py).
"""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .benching.conditions import Conditions
from .benching.ours import Apart, Bundle, figures      # noqa: F401 (figures: for whoever looks for it here)
from .benching.peers import peer
from .benching.report import Samples, as_json, markdown, terminal
from .cli import arg, run
from .encoder_bundle import is_encoder_bundle
from .errors import UserError
from .files import write
from .generate import OpeningOptions
from .machine import available_cpus, cpu_name, cpu_threads

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 --prompt-tokens 512 --threads 1 --json bench.json
  %(prog)s build/smollm2-135m-int4 --context 128,1024,4096 --streams 1,4,16 --plot bench.png \\
      --against llama.cpp@/opt/llama.cpp/bin/llama-bench=smollm2-Q4_0.gguf
  %(prog)s --load http://127.0.0.1:8080 --clients 16 --seconds 60
  %(prog)s --soak http://127.0.0.1:8080 --clients 16 --minutes 60
"""
COMPARING, SERVING = "comparing", "a server (instead of a bundle)"


@dataclass(frozen=True, kw_only=True)
class Options(OpeningOptions):
    """Measure bundles on this machine: load, prefill, decode, memory; or a server under load."""
    bundle: tuple[Path, ...] = arg((), positional=True, help="folders of bundles, the first of which is compared with the others")
    prompt_tokens: int = arg(128, help="tokens of the prompt", least=1)
    new_tokens: int = arg(128, help="tokens to generate", least=2)
    speculate: str = arg("off", help="measure what guessing tokens ahead gains on prompts that repeat much or little: on, or a draft")
    repeat: int | None = arg(None, help="rounds that count (default: 5; with --load 1)", least=1)
    json: Path | None = arg(None, help="write the figures to this file")
    markdown: Path | None = arg(None, help="write the table to this file")
    plot: Path | None = arg(None, help="draw the speeds into this PNG file (needs matplotlib)")
    context: str = arg("", metavar="N,N", help="decode speed with so many tokens in the cache, such as 128,1024,4096")
    streams: str = arg("", metavar="N,N", help="total decode speed of so many sequences at once, such as 1,4,8,16")
    against: tuple[str, ...] = arg((), metavar="NAME=MODEL", group=COMPARING, help="another runtime: llama.cpp=FILE.gguf, "
                                   "onnxruntime-genai=FOLDER; NAME@PROGRAM=MODEL where its llama-bench, or its Python, is elsewhere")
    load: tuple[str, ...] = arg((), metavar="URL", group=SERVING, help="measure servers of OpenAI's API, several in turns")
    soak: str | None = arg(None, metavar="URL", group=SERVING, help="mixed load with clients that come and go, every whole reply "
                           "compared with what it is alone; exit code 1 where a reply, a stream or memory is not as it should be")
    clients: int = arg(16, help="clients, each of which asks again as soon as it has its reply", least=1, group=SERVING)
    rate: float | None = arg(None, help="so many requests a second instead, at random times, whether or not replies have come",
                             above=0, group=SERVING)
    seconds: float = arg(60.0, help="of one round of --load", above=0, group=SERVING)
    minutes: float = arg(15.0, help="of --soak", above=0, group=SERVING)
    same_prefix: int = arg(0, help="of the prompt's tokens, how many all prompts of a round share", least=0, group=SERVING)
    model: str | None = arg(None, help="name of the model to ask for; default: the first that the server lists", group=SERVING)
    key_file: Path | None = arg(None, help="file with the server's API key", group=SERVING)
    pid: int | None = arg(None, help="of the server's process, to read its memory; default: as its /metrics tell", group=SERVING)


def bench(options: Options) -> int | None:
    """Measure, print the table, write the files. Raises UserError, CheckFailed."""
    for file in (options.json, options.markdown, options.plot):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{file}: no such folder to write it in")
    if options.plot:
        from .benching.plot import needs_matplotlib, plot
        needs_matplotlib()
    if sum(map(bool, (options.bundle or options.against, options.load, options.soak))) != 1:
        raise UserError("give bundles to measure, or --load with addresses of servers, or --soak with one")
    if options.soak:
        from .benching.soak import soak
        return soak(options)
    watch = Conditions()
    if options.load:
        from .benching.load import load
        samples, header = load(options)
    elif options.speculate != "off":
        samples, header = guesses(options)
    elif options.bundle and all(map(is_encoder_bundle, options.bundle)):
        samples, header = of_encoders(options)
    else:
        samples, header = systems(options)
    header = {**header, "machine": f"{cpu_name()}, {available_cpus()} CPUs, {platform.system()} {platform.release()}",
              **watch.told(*["servers and other programs"] if options.load else [])}
    print(terminal(samples, header))
    if options.json:
        write(options.json, json.dumps(as_json(samples, header), indent=2) + "\n")
    if options.markdown:
        write(options.markdown, markdown(samples, header))
    if options.plot:
        plot(options.plot, samples)


def guesses(options: Options) -> tuple[Samples, dict[str, str]]:
    """--speculate."""
    if len(options.bundle) != 1 or options.against:
        raise UserError("--speculate measures one bundle at a time, against itself")
    from .benching.guessing import guessing
    rounds = options.repeat or 3
    with options.open_bundle(options.bundle[0], options.max_memory_mb) as engine:
        return guessing(engine, options.new_tokens, rounds), {
            "bundle": options.bundle[0].name, "engine": engine.explain().splitlines()[0],
            "run": f"replies of up to {options.new_tokens} tokens, {rounds} rounds after one to warm up"}


def of_encoders(options: Options) -> tuple[Samples, dict[str, str]]:
    """Bundles of encoders."""
    from .benching.encoders import encoders
    if options.against or options.context or options.streams:
        raise UserError("--against, --context and --streams are for decoders: an encoder's texts have no tokens after them")
    from .encoder import Encoder
    names = unique([folder.name for folder in options.bundle], options.bundle)
    openers = {name: partial(Encoder, folder, threads=options.threads, provider=options.provider) for name, folder in zip(names, options.bundle)}
    return encoders(openers, options.prompt_tokens, options.repeat or 5)


def systems(options: Options) -> tuple[Samples, dict[str, str]]:
    """All rounds of bundles and peers."""
    contexts, streams = numbers(options.context, "--context", 8), numbers(options.streams, "--streams", 1)
    parts = [("single", options.prompt_tokens, options.new_tokens), *(("context", n, min(options.new_tokens, n // 4)) for n in contexts),
             *(("streams", n, options.prompt_tokens, options.new_tokens) for n in streams)]
    rounds, opened = options.repeat or 5, []
    try:
        opening = OpeningOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(OpeningOptions)})
        for name, folder in zip(unique([folder.name for folder in options.bundle], options.bundle), options.bundle):
            kind = Bundle if len(options.bundle) == 1 else Apart
            opened.append(kind(name, partial(opening.open_bundle, folder, options.max_memory_mb), max(streams, default=1)))
        opened += [peer(text, cpu_threads(options.threads)) for text in options.against]
        found = [measure(opened, parts, bool(turn % 2)) for turn in range(rounds + 1)][1:]
        told = [system.described() for system in opened]
        found.append([system.finish() for system in opened])
    except BaseException:
        for system in opened:
            with contextlib.suppress(Exception):
                system.finish()
        raise
    several = len(opened) > 1
    names = unique([system.name for system in opened], options.bundle + options.against)
    header = {f"{key} of {name}" if several else key: text for name, one in zip(names, told) for key, text in one.items()}
    header = {"bundle": ", ".join(names[:len(options.bundle)]), **header,
              "run": f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new, {rounds} runs after one to warm up"}
    return {name: joined([turn[place] for turn in found]) for place, name in enumerate(names)}, header


def measure(systems: list, parts: list[tuple], backwards: bool) -> list[dict[str, float]]:
    """One round: for each part, each system in turn. Returns what each system's figures were."""
    found = [{} for _ in systems]
    for part, *sizes in parts:
        for place in reversed(range(len(systems))) if backwards else range(len(systems)):
            found[place] |= getattr(systems[place], part)(*sizes)
    return found


def joined(turns: list[dict[str, float]]) -> dict[str, list[float]]:
    """Each figure's values."""
    return {figure: [turn[figure] for turn in turns if figure in turn] for figure in dict.fromkeys(key for turn in turns for key in turn)}


def unique(names: list[str], longer: Iterable) -> list[str]:
    """Names to tell systems apart by: those that are given twice in full."""
    return [name if names.count(name) == 1 else str(full) for name, full in zip(names, longer)]


def numbers(text: str, flag: str, least: int) -> list[int]:
    """Of a text such as "1,4,16". Raises UserError, naming the flag."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UserError(f"{flag} is {text!r}: write whole numbers of at least {least} with commas between them")
    return [int(word) for word in dict.fromkeys(words)]


def main(argv=None) -> int:
    return run(Options, bench, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
