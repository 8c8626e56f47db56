"""Examples with the loss on the answer alone: chats through the model's own template, or a question and its answer.

    examples = Examples([*encode_chat(...), ...], pad=2)     # or join(question, answer)
    input_ids, labels = examples.rows(np.array([3, 7]))      # int64 [2, longest of these], right-padded

An encoded example is (ids, learned): int64 ids [n], and bool [n], whether a token belongs to an answer. In a chat the
answers are all replies of the assistant with the template's end-of-turn token; whatever else the template writes is
context. The text of a reply is found by rendering the chat up to it and through it, so any template works that leaves
what comes before a reply as it was when the reply was asked for.
"""

import os

import numpy as np

from models.data.corpus import IGNORE
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError

Encoded = tuple[np.ndarray, np.ndarray]


def encode_chat(messages: list[dict], chat: ChatEncoder, **variables) -> list[Encoded]:
    """A chat that ends with the assistant's reply, as one example. Where the template rewrites earlier turns (leaves
    out a thought once there is a next question), as one a reply, each after what the model reads before it. A reply with
    "weight": 0, as OpenAI's files have it, is read and not learned. variables: see `ChatTemplate.render`. Raises UserError
    where replies cannot be told apart."""
    marked, replies = chat.marked(messages, variables), []
    messages, text = marked.messages, chat.render(marked, marked.messages, add_generation_prompt=False)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            asked = chat.render(marked, messages[:index], add_generation_prompt=True)
            through = text if index + 1 == len(messages) else chat.render(marked, messages[:index + 1], add_generation_prompt=False)
            if not through.startswith(asked):        # a prompt that opens a thought, which this reply has not
                asked = _header(asked, chat.render(marked, messages[:index], add_generation_prompt=False), through, message)
            if asked is None:
                raise UserError("the chat template rewrites earlier turns, so replies cannot be told apart; give chats "
                                "of one reply, or another chat_template.jinja")
            replies.append((through, (len(asked), len(through.rstrip()))))
    if all(text.startswith(through) for through, _ in replies):
        return [_encoded(text, [span for _, span in replies], chat, marked.mark)]
    return [_encoded(through, [span], chat, marked.mark) for through, span in replies]


def _encoded(text: str, spans: list[tuple[int, int]], chat: ChatEncoder, mark: str | None) -> Encoded:
    """A rendered chat of which these characters (first, end) are learned."""
    ids, offsets = chat.encode(text, mark)
    learned = [any(start <= first and last <= stop for start, stop in spans) for first, last in offsets.tolist()]
    return ids, np.array(learned)


def _header(asked: str, before: str, through: str, message: dict) -> str | None:
    """What of the prompt `asked` stands before the reply in `through` too: the turns before and the head of the reply's
    own, but nothing of what it says. None where the turns before are others."""
    if not (asked.startswith(before) and through.startswith(before)):
        return None
    shared = os.path.commonprefix([asked, through])
    parts = message["content"] if isinstance(message.get("content"), list) else ()
    texts = [text for name, text in message.items() if name != "role"] + [part.get("text") for part in parts]
    said = [through.find(text.strip(), len(before)) for text in texts if isinstance(text, str) and text.strip()]
    return shared[:min([len(shared), *(place for place in said if place >= 0)])]


def join(question: np.ndarray, answer: np.ndarray) -> Encoded:
    """Tokens of a question, then those of its answer, which are learned."""
    return np.concatenate((question, answer)), np.arange(len(question) + len(answer)) >= len(question)


class Examples:
    """Encoded examples as rows for the trainer; `lengths` in tokens, `context` the longest, `labels` the most of one."""

    def __init__(self, encoded: list[Encoded], pad: int):
        self.encoded, self.pad = encoded, pad
        self.lengths = np.array([len(ids) - 1 for ids, _ in encoded])
        self.context = int(self.lengths.max())
        self.labels = max(int(learned[1:].sum()) for _, learned in encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [self.encoded[i] for i in indices]
        width = max(len(ids) for ids, _ in chosen) - 1
        input_ids = np.full((len(chosen), width), self.pad, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for row, (ids, learned) in enumerate(chosen):
            input_ids[row, :len(ids) - 1] = ids[:-1]
            labels[row, :len(ids) - 1] = np.where(learned[1:], ids[1:], IGNORE)
        return input_ids, labels


def fitting(encoded: list[Encoded], context: int, what: str) -> list[Encoded]:
    """Those of at most `context` tokens; says how many are left out. Raises UserError where none is left."""
    kept = [(ids, learned) for ids, learned in encoded if len(ids) <= context and learned[1:].any()]
    if not kept:
        longest = max((len(ids) for ids, _ in encoded), default=0)
        raise UserError(f"{what}: none of {len(encoded)} examples has an answer within --context {context} tokens (the "
                        f"longest has {longest}); raise --context or give other data")
    if len(kept) < len(encoded):
        print(f"{what}: {len(encoded) - len(kept)} of {len(encoded)} examples left out: longer than {context} tokens")
    return kept
