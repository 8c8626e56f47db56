"""What clients of a soak ask for: requests whose replies are known beforehand, long ones, and bad ones; and how replies are judged."""

import random
from dataclasses import dataclass, field

from .http import Answer
from .load import WORDS

NEAR = .1                         # nats between the two likeliest tokens, within which either is right in another batch
_CHAT, _COMPLETE = "/v1/chat/completions", "/v1/completions"
_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]},
                                            "count": {"type": "integer", "minimum": 0, "maximum": 99}},
           "required": ["name", "size", "count"], "additionalProperties": False}


@dataclass
class Known:
    """A request with its reply, alone. tokens: text of each, and how much likelier it was than the next (none: not told)."""

    name: str
    path: str
    body: dict
    text: str = ""
    finish: str | None = None
    tokens: list[tuple[str, float]] = field(default_factory=list)

    @property
    def sampled(self) -> bool:
        return self.body["temperature"] > 0

    def learn(self, answer: Answer, told: Answer) -> None:
        """From the reply alone, and from that with its log probabilities asked for."""
        self.text, self.finish = reply_of(answer)
        probabilities = (told.json().get("choices") or [{}])[0].get("logprobs") or {}
        if "content" in probabilities:
            pairs = [(one["token"], [top["logprob"] for top in one["top_logprobs"]]) for one in probabilities["content"] or []]
        else:
            pairs = zip(probabilities.get("tokens", ()), ([*top.values()] for top in probabilities.get("top_logprobs", ())))
        self.tokens = [(text, max(tops) - sorted(tops)[-2] if len(tops) > 1 else 0) for text, tops in pairs]

    def judge(self, text: str, finish: str | None) -> str:
        """"same", "near tie" (it parts from the known one where two tokens were about as likely), "sampled" or "wrong"."""
        if (text, finish) == (self.text, self.finish):
            return "same"
        if self.sampled:
            return "sampled"
        parts = next((place for place, (a, b) in enumerate(zip(text, self.text)) if a != b), min(len(text), len(self.text)))
        end, before = 0, float("inf")
        for piece, gap in self.tokens:            # the token it parts in, or the one before, which another may begin alike
            end += len(piece)
            if end > parts:
                return "near tie" if min(gap, before) <= NEAR else "wrong"
            before = gap
        return "near tie" if before <= NEAR else "wrong"


def known(tokens: int) -> list[Known]:
    """Requests of every kind; tokens: of a usual prompt, which sets how long others are."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    def chat(name: str, messages: list[dict], most: int = 24, **more) -> Known:
        return Known(name, _CHAT, {"messages": messages, "max_tokens": most, "temperature": 0, **more})

    def user(text: str) -> list[dict]:
        return [{"role": "user", "content": text}]

    system = [{"role": "system", "content": words(tokens)}]
    story = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    return [chat("greedy", user("Name three colours."), 48), chat("seeded", user("Tell me a story."), temperature=.8, seed=7),
            chat("shared prefix", system + user("Which word came first?")), chat("shared prefix", system + user("And which one last?")),
            chat("second turn", [*system, *user("Hello."), {"role": "assistant", "content": "Hello!"}, *user("How are you?")]),
            chat("long", user(words(2 * tokens)), 8), chat("logprobs", user("Count to five."), logprobs=True, top_logprobs=2),
            chat("stop string", user("Write a long sentence."), 32, stop=["e"]),
            chat("structured", user("Describe a cat."), 64, response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": _SCHEMA}}),
            Known("completion", _COMPLETE, story), Known("penalized", _COMPLETE, {**story, "presence_penalty": .7, "frequency_penalty": .3}),
            Known("seeded", _COMPLETE, {**story, "temperature": 1, "seed": 11, "top_p": .9})]


def with_logprobs(one: Known) -> dict:
    return {**one.body, **({"logprobs": True, "top_logprobs": 2} if one.path == _CHAT else {"logprobs": 2})}


def fresh(tokens: int, new_tokens: int, stream: bool) -> tuple[str, dict]:
    """(path, body) of a request that nobody has made before."""
    return _CHAT, {"messages": [{"role": "user", "content": " ".join(random.choices(WORDS, k=max(1, tokens)))}], "max_tokens": new_tokens,
                   "temperature": 0, "stream": stream, "ignore_eos": True}


def bad() -> tuple[str, str, dict | bytes | None]:
    """(method, path, body) of a request that must be answered 4xx."""
    hello = [{"role": "user", "content": "Hi"}]
    return random.choice([
        ("POST", _CHAT, b'{"messages": [{"role": "user"'), ("POST", _CHAT, {"messages": "Hi"}), ("POST", _CHAT, {"messages": []}),
        ("POST", _CHAT, {"messages": hello, "model": "no such model"}), ("POST", _CHAT, {"messages": hello, "temperature": "hot"}),
        ("POST", _CHAT, {"messages": hello, "max_tokens": -5}), ("POST", _CHAT, b"[" * 1000), ("POST", _CHAT, b"\xff\xfe"),
        ("POST", _CHAT, {"messages": [{"role": "user", "content": "many words " * 20000}]}), ("GET", "/v1/nowhere", None),
        ("POST", _COMPLETE, {"prompt": [1, -2]}), ("GET", _CHAT, None),
        ("POST", _CHAT, {"messages": hello, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}})])


def reply_of(answer: Answer) -> tuple[str, str | None]:
    """Text and finish reason of a whole or streamed reply."""
    events = answer.events() if b"text/event-stream" in answer.head.lower() else [answer.json()]
    choices = [choice for event in events for choice in event.get("choices") or ()]
    parts = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    text = "".join(part.get(name) or "" for part in parts for name in ("reasoning_content", "content", "text"))
    return text, next((choice["finish_reason"] for choice in reversed(choices) if choice.get("finish_reason")), None)
