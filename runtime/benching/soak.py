"""Hours of mixed load, checked: `python -m runtime.bench --soak URL --minutes 60 --clients 16`.

A set of requests (soak_requests.py) is asked alone at first. Then every client, over and over, draws what to do: mostly one of that
set, streamed or not, whose whole reply must be as it was alone (near ties of tokens are counted; so are sampled replies that
differ, which one near tie in a hundred tokens explains); else it goes away in the middle of a stream, before the first token or
in the middle of its request, closes its sending half, does not read for a while, asks for something long, or for something
bad. At the end the set is asked alone again, and these must hold, or the exit code is 1:

    answers    no wrong reply, none that breaks off, no 5xx; every bad request answered 4xx in OpenAI's shape
    sampled    at most 5% of the sampled replies differ
    streams    none that had to be given up after STUCK_S seconds without a byte
    queue      nothing waits or runs in the server, as its /metrics tell
    memory     the server's resident memory within the last fifth of the time is at most 3% above that of the second fifth
"""

import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable

import numpy as np

from ..cli import table
from ..errors import CheckFailed, UserError
from ..files import write
from .conditions import resident_mb
from .http import Address, Answer, Connection
from .load import error_of, read_key
from .soak_requests import Known, bad, fresh, known, reply_of, with_logprobs

STUCK_S, REST_S = 120, 30
GROWTH = .03
SAMPLED = .05
_BUSY = re.compile(r"^(?:edgewright_(?:queued|rows)|llamacpp:requests_(?:processing|deferred)|vllm:num_requests_(?:running|waiting))"
                   r"(?:\{.*\})? (\S+)$", re.M)
_RESIDENT = re.compile(r"^process_resident_memory_bytes (\S+)$", re.M)


def soak(options) -> None:
    """options: of runtime.bench. Raises UserError where the server cannot be asked, CheckFailed."""
    asyncio.run(Soak(options).run())


class Soak:
    def __init__(self, options):
        self._options, self._address = options, Address.of(options.soak, read_key(options))
        self._counts, self._wrong = Counter(), []                # what happened, and how often; sentences about what must not
        self._memory: list[tuple[float, float]] = []             # (share of the time, MiB)
        self._known = known(options.prompt_tokens)

    async def run(self) -> None:
        try:
            for one in self._known:
                one.learn(await self._whole(one), await self._ask("POST", one.path, with_logprobs(one)))
        except OSError as error:
            raise UserError(f"{self._address.url}: {error.strerror or error}") from None
        if self._wrong:
            raise UserError(f"{self._address.url} does not answer what a soak asks: {self._wrong[0]}")
        for one in self._known:
            await self._do(one.name, self._check(one))
        start = time.monotonic()
        end = start + 60 * self._options.minutes
        watch = asyncio.create_task(self._watch(start, end))
        await asyncio.gather(*(self._client(end) for _ in range(self._options.clients)))
        watch.cancel()
        busy = await self._rest()
        for one in self._known:
            await self._do(one.name, self._check(one))
        self._tell(busy)

    async def _client(self, end: float) -> None:
        deeds = {self._good: 60, self._unread: 3, self._cut: 12, self._early: 8, self._half_closed: 3, self._half_sent: 3, self._bad: 6,
                 self._long: 5}
        while time.monotonic() < end:
            deed, = random.choices(list(deeds), weights=deeds.values())
            self._counts[deed.__name__.strip("_")] += 1
            await self._do(deed.__name__.strip("_"), deed())

    async def _do(self, name: str, deed: Awaitable[None]) -> None:
        try:
            await deed
        except TimeoutError:
            self._wrong.append(f"a stream without a byte for {STUCK_S} s ({name})")
        except OSError as error:
            self._wrong.append(f"no connection: {error.strerror or error}")
            await asyncio.sleep(1)

    # What clients do.

    async def _good(self) -> None:
        await self._check(random.choice(self._known), random.random() < .7)

    async def _check(self, one: Known, stream: bool = False) -> None:
        self._judge(one, await self._whole(one, stream))

    async def _unread(self) -> None:
        one = random.choice(self._known)

        async def wait(connection: Connection, answer: Answer) -> None:
            connection.transport.pause_reading()
            await asyncio.sleep(random.uniform(.1, 3))
            connection.transport.resume_reading()
        self._judge(one, await self._ask("POST", one.path, {**one.body, "stream": True}, wait))

    async def _half_closed(self) -> None:
        """A server may take the closed half for the end of all, or answer."""
        one = random.choice(self._known)

        async def half(connection: Connection, answer: Answer) -> None:
            connection.transport.write_eof()
        answer = await self._ask("POST", one.path, {**one.body, "stream": True}, half)
        if answer.whole:
            self._judge(one, answer)

    async def _cut(self) -> None:
        pieces = random.randint(1, 30)

        async def leave(connection: Connection, answer: Answer) -> None:
            while len(answer.pieces) < pieces and not (answer.whole or connection.closed):
                await connection.more(STUCK_S)
            connection.close()
        await self._ask("POST", *fresh(self._options.prompt_tokens // 2, self._options.new_tokens, True), leave)

    async def _early(self) -> None:
        async def leave(connection: Connection, answer: Answer) -> None:
            await asyncio.sleep(random.uniform(0, .05))
            connection.close()
        await self._ask("POST", *fresh(self._options.prompt_tokens, self._options.new_tokens, random.random() < .5), leave)

    async def _half_sent(self) -> None:
        request = self._address.request("POST", *fresh(50, 8, True))
        connection = await Connection.open(self._address)
        connection.send(request[:random.randrange(1, len(request))])
        await asyncio.sleep(random.uniform(0, 1))
        connection.close()

    async def _long(self) -> None:
        answer = await self._ask("POST", *fresh(random.randint(1, 2 * self._options.prompt_tokens), self._options.new_tokens, True))
        if not self._refused(answer) and (error := error_of(answer)):
            self._wrong.append(f"a long request: {error}")

    async def _bad(self) -> None:
        method, path, body = bad()
        answer = await self._ask(method, path, body)
        if self._refused(answer):
            return
        error = answer.json().get("error")
        if not 400 <= answer.status < 500 or not isinstance(error, dict) or not isinstance(error.get("message"), str):
            self._wrong.append(f"a bad request ({method} {path} {str(body)[:80]}) was answered {answer.status} {answer.body[:200]}")

    # How they ask, and what they think of it.

    async def _whole(self, one: Known, stream: bool = False) -> Answer:
        answer = await self._ask("POST", one.path, {**one.body, "stream": stream})
        if answer.status != 200 and not self._refused(answer):
            self._wrong.append(f"{one.name}: {error_of(answer)}")
        return answer

    async def _ask(self, method: str, path: str, body: dict | bytes | None, meanwhile=None) -> Answer:
        if isinstance(body, dict) and self._options.model:
            body = {"model": self._options.model, **body}
        connection = await Connection.open(self._address)
        try:
            if meanwhile is None:
                return await connection.ask(self._address.request(method, path, body), STUCK_S)
            answer = connection.send(self._address.request(method, path, body))
            await meanwhile(connection, answer)
            while not answer.whole and not connection.closed:
                await connection.more(STUCK_S)
            return answer
        finally:
            connection.close()

    def _refused(self, answer: Answer) -> bool:
        """Whether the server said that it has too much to do."""
        self._counts["refused"] += (refused := answer.status in (429, 503))
        return refused

    def _judge(self, one: Known, answer: Answer) -> None:
        if answer.status != 200:                  # counted where it was asked, or refused
            return
        if b"event-stream" in answer.head.lower() and (error := error_of(answer)):
            self._wrong.append(f"{one.name}: {error}")
            return
        text, finish = reply_of(answer)
        verdict = one.judge(text, finish)
        self._counts[f"replies {verdict}"] += 1
        self._counts["replies to seeds"] += one.sampled
        if verdict == "wrong":
            self._wrong.append(f"{one.name}: {text!r} ({finish}) where it was {one.text!r} ({one.finish})")

    async def _metrics(self) -> str:
        try:
            answer = await self._ask("GET", "/metrics", None)
        except OSError:                           # the clients tell
            return ""
        return answer.body.decode("utf-8", "replace") if answer.status == 200 else ""

    async def _watch(self, start: float, end: float) -> None:
        """Look at the memory, and say each minute how it goes."""
        said = start
        while True:
            await asyncio.sleep(min(5, (end - start) / 50))
            found = None if self._options.pid else _RESIDENT.search(await self._metrics())
            now, mb = time.monotonic(), resident_mb(self._options.pid) if self._options.pid else found and float(found[1]) / (1 << 20)
            if mb:
                self._memory.append(((now - start) / (end - start), mb))
            if now - said > 60:
                said = now
                print(f"{(now - start) / 60:.0f} min: {self._counts['replies same']} replies as alone, {self._counts['replies near tie']} near "
                      f"ties, {len(self._wrong)} wrong" + f", {mb:.0f} MiB" * bool(mb), file=sys.stderr, flush=True)

    async def _rest(self) -> float | None:
        """What still waits or runs in the server when it had REST_S to end it; None: not told."""
        for _ in range(2 * REST_S):
            found = [float(number) for number in _BUSY.findall(await self._metrics())]
            if not found or not sum(found):
                break
            await asyncio.sleep(.5)
        return sum(found) if found else None

    def _tell(self, busy: float | None) -> None:
        """Print what was found, write the JSON. Raises CheckFailed."""
        counts, growth = self._counts, grown(self._memory)
        sampled = counts["replies sampled"] / max(1, counts["replies to seeds"])
        good = {"answers and streams": not self._wrong, "sampled": sampled <= SAMPLED, "queue": not busy, "memory": growth is None or growth <= GROWTH}
        mb = [mb for _, mb in self._memory]
        said = {"answers and streams": f"{counts['replies same']} replies as alone, {counts['replies near tie']} near ties, {len(self._wrong)} wrong",
                "sampled": f"{counts['replies sampled']} of {counts['replies to seeds']} differ",
                "queue": "not told" if busy is None else f"{busy:.0f} left",
                "memory": "not told: give --pid" if growth is None else f"{growth:+.1%}, {min(mb):.0f} to {max(mb):.0f} MiB"}
        print(table([{"deed": deed, "times": count} for deed, count in sorted(counts.items())]), end="\n\n")
        print(table([{"check": name, "found": text, "": "ok" if good[name] else "FAILED"} for name, text in said.items()]))
        for sentence, times in Counter(self._wrong).most_common(10):
            print(f"{times} x {sentence}")
        if self._options.json:
            write(self._options.json, json.dumps({"good": good, "found": said, "counts": counts, "wrong": self._wrong[:1000],
                                                  "memory": self._memory}, indent=2) + "\n")
        if not all(good.values()):
            raise CheckFailed(f"{self._address.url}: {', '.join(name for name, fine in good.items() if not fine)} not as it should be")


def grown(memory: list[tuple[float, float]]) -> float | None:
    """By how much memory has grown from the second fifth of the time to the last; None: too little is known."""
    early, late = ([mb for share, mb in memory if first <= share <= first + .2] for first in (.2, .8))
    return float(np.median(late) / np.median(early) - 1) if early and late else None
