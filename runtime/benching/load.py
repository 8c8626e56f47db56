"""Servers under load: `python -m runtime.bench --load URL --clients 16 --seconds 60`.

Works against any server of OpenAI's API: streams from /v1/chat/completions, greedy, past the end of the text where the server knows
`ignore_eos`. Prompts are of common words, of about as many tokens as asked for (two small requests tell how many tokens the words
and the template make), and differ from the first word on, so that no kept prefix helps, except for --same-prefix.

    closed loop   each of --clients asks again as soon as it has its whole reply
    open loop     --rate requests a second at random (Poisson) times, whoever waits; times count from when a request was due

Several servers take turns of --seconds, --repeat rounds. Figures of a round:

    new_tokens_per_s     of replies; total_tokens_per_s with the prompts that were read
    requests_per_s       whole replies that came in the round
    ttft_ms_*            to the first text;  tpot_ms_*: a reply's time for each further token, its mean;  reply_ms_*: whole replies
    first_ttft_ms        --same-prefix: of the request that brings it; again_ttft_ms: median of those that follow
    prompt_tokens, new_tokens   means of the replies, as the server's usage tells, else the pieces that came
    errors               requests that got no whole reply
"""

import asyncio
import collections
import random
import time
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from .http import Address, Answer, Connection
from .report import Samples
from .statistics import percentiles

WORDS = ("time year people way day man thing woman life child world school state family student group country problem hand part place "
         "case week company system program question work government number night point home water room mother area money story fact "
         "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
         "member law car city community name president team minute idea kid body information back parent face others level office door "
         "health person art war history party result change morning reason research girl guy moment air teacher force education").split()


@dataclass(frozen=True)
class Ask:
    """What is asked of one server. words: how many of a prompt's the prefix has, and how many it has in all."""

    address: Address
    model: str | None
    new_tokens: int
    prefix_words: int
    words: int

    def request(self, prefix: str) -> bytes:
        words = f"{prefix} {' '.join(random.choices(WORDS, k=max(1, self.words - self.prefix_words)))}".strip()
        return self.address.request("POST", "/v1/chat/completions", {
            **({"model": self.model} if self.model else {}), "messages": [{"role": "user", "content": words}], "stream": True,
            "stream_options": {"include_usage": True}, "max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True})


@dataclass
class Got:
    """One request's end. due: when it should have been sent."""

    due: float
    ended: float
    answer: Answer
    error: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    leads: bool = False                           # it brought the shared prefix


def load(options) -> tuple[Samples, dict[str, str]]:
    """Drive all servers in turns. options: of runtime.bench. Raises UserError where one cannot be asked."""
    key = read_key(options)
    asks = {url: asyncio.run(prepared(Address.of(url, key), options)) for url in options.load}
    rounds, errors = options.repeat or 1, collections.Counter()
    found: dict[str, list[dict[str, float]]] = {url: [] for url in asks}
    for turn in range(rounds):
        for url in reversed(asks) if turn % 2 else asks:
            got, start, end = asyncio.run(drive(asks[url], options))
            found[url].append(figures(got, start, end))
            errors.update(f"{one.error} (at {url})" for one in got if one.error)
    samples = {url: {name: [turn[name] for turn in turns if name in turn] for name in turns[0]} for url, turns in found.items()}
    clients = f"{options.rate:g} requests a second" if options.rate else f"{options.clients} clients"
    header = {"load": f"{clients}, {options.prompt_tokens} prompt tokens" + f" of which {options.same_prefix} shared" * bool(options.same_prefix)
              + f", {options.new_tokens} new, {rounds} rounds of {options.seconds:g} s"}
    return samples, header | {f"error, {count} times": text for text, count in errors.most_common(5)}


def read_key(options) -> str | None:
    """The server's API key. Raises UserError."""
    try:
        return options.key_file.read_text("ascii").strip() if options.key_file else None
    except (OSError, ValueError) as error:
        raise UserError(f"{options.key_file}: no API key can be read from it ({error})") from None


async def prepared(address: Address, options) -> Ask:
    """How many words make the tokens of a prompt there. The last of three requests warms up too. Raises UserError."""
    async def tokens(ask: Ask) -> int:
        try:
            got = await send(ask, "")
        except OSError as error:
            raise UserError(f"{address.url}: {error.strerror or error}") from None
        if got.error:
            raise UserError(f"{address.url} answers: {got.error}")
        return got.prompt_tokens or ask.words     # a server that tells no usage: a word is a token

    ask = Ask(address, options.model, 1, 0, 8)
    few, many = await tokens(ask), await tokens(replace(ask, words=24))
    each = max((many - few) / 16, .1)
    ask = replace(ask, new_tokens=options.new_tokens, words=max(1, 8 + round((options.prompt_tokens - few) / each)))
    words = max(1, ask.words + round((options.prompt_tokens - await tokens(ask)) / each))
    return replace(ask, words=words, prefix_words=min(words - 1, round(options.same_prefix / each)))


async def drive(ask: Ask, options) -> tuple[list[Got], float, float]:
    """One round. Returns all requests of it, its start and its end (time.perf_counter())."""
    prefix, got = " ".join(random.choices(WORDS, k=ask.prefix_words)), []
    if options.same_prefix:
        got.append(replace(await send(ask, prefix), leads=True))
    start = time.perf_counter()
    end = start + options.seconds
    if options.rate:
        await _open_loop(ask, prefix, options.rate, end, got)
    else:
        await asyncio.gather(*(_client(ask, prefix, end, got) for _ in range(options.clients)))
    return got, start, end


async def _client(ask: Ask, prefix: str, end: float, got: list[Got]) -> None:
    connection = None
    while time.perf_counter() < end:
        try:
            if connection is None or connection.closed:
                connection = await Connection.open(ask.address)
            got.append(await send(ask, prefix, connection))
        except OSError as error:
            got.append(Got(time.perf_counter(), time.perf_counter(), Answer(0), error=error.strerror or "no connection"))
        if got[-1].error:
            await asyncio.sleep(.1)               # a server that refuses everything is not flooded


async def _open_loop(ask: Ask, prefix: str, rate: float, end: float, got: list[Got]) -> None:
    async def one(due: float) -> None:
        connection = idle.pop() if idle else None
        try:
            if connection is None or connection.closed:
                connection = await Connection.open(ask.address)
            got.append(await send(ask, prefix, connection, due))
            idle.append(connection)
        except OSError as error:
            got.append(Got(due, time.perf_counter(), Answer(0), error=error.strerror or "no connection"))

    idle: list[Connection] = []
    due, tasks = time.perf_counter(), []
    while (due := due + random.expovariate(rate)) < end:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)


async def send(ask: Ask, prefix: str, connection: Connection | None = None, due: float | None = None) -> Got:
    """Ask once, on a connection of its own where none is given. Raises OSError where there is none to be had."""
    own = connection is None
    connection = await Connection.open(ask.address) if own else connection
    request, used = ask.request(prefix), connection.used
    try:
        answer = await connection.ask(request)
        if used and not answer.head:              # a server may close a connection that was idle just then: as every client, ask anew
            connection, own = await Connection.open(ask.address), True
            answer = await connection.ask(request)
    finally:
        if own:
            connection.close()
    got = Got(answer.sent if due is None else due, time.perf_counter(), answer)
    got.error = error_of(answer)
    if not got.error:
        events = answer.events()
        usage = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
        got.prompt_tokens = usage.get("prompt_tokens", 0)
        got.new_tokens = usage.get("completion_tokens", len(answer.arrivals))
    return got


def error_of(answer: Answer) -> str | None:
    """What was wrong with an answer that should be a stream; None: nothing."""
    if answer.status != 200:
        error = answer.json().get("error", {})
        return f"{answer.status}: {error.get('message', answer.body[:80]) if isinstance(error, dict) else error}" if answer.status else "no answer"
    if not answer.whole:
        return "the reply breaks off"
    error = next((event["error"] for event in answer.events() if event.get("error")), None)
    return str(error.get("message", error) if isinstance(error, dict) else error) if error else None


def figures(got: list[Got], start: float, end: float) -> dict[str, float]:
    """Of one round: speeds count what came in it (a reply's tokens spread over the times at which its pieces came), latencies are
    those of all that was asked in it, however late the answers were."""
    answered = [one for one in got if not one.error and one.answer.first]
    good, leads = [one for one in answered if not one.leads], [one for one in answered if one.leads]
    seconds, firsts = end - start, [(one.answer.first - one.due) * 1e3 for one in good]
    new = sum(one.new_tokens * np.mean([at <= end for at in one.answer.arrivals]) for one in good)
    found = {"new_tokens_per_s": float(new) / seconds,
             "total_tokens_per_s": float(new + sum(one.prompt_tokens for one in good if one.answer.first <= end)) / seconds,
             "requests_per_s": sum(one.ended <= end for one in good) / seconds, **percentiles("ttft_ms", firsts),
             **percentiles("tpot_ms", [(one.answer.arrivals[-1] - one.answer.first) / (one.new_tokens - 1) * 1e3 for one in good
                                       if one.new_tokens > 1]),
             **percentiles("reply_ms", [(one.ended - one.due) * 1e3 for one in good])}
    if leads and good:
        found |= {"first_ttft_ms": (leads[0].answer.first - leads[0].due) * 1e3, "again_ttft_ms": float(np.median(firsts))}
    if good:
        found |= {name: float(np.mean([getattr(one, name) for one in good])) for name in ("prompt_tokens", "new_tokens")}
    return found | {"errors": float(sum(one.error is not None for one in got))}
