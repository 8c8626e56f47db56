"""Examples with the loss on the answer alone: chats through the model's own template, texts with their label in words.

    examples = Examples([encode_chat(...), ...], pad=2)      # or encode_labelled(...)
    input_ids, labels = examples.rows(np.array([3, 7]))      # int64 [2, longest of these], right-padded

An encoded example is (ids, learned): int64 ids [n], and bool [n], whether a token belongs to an answer. In a chat the
answers are all replies of the assistant with the template's end-of-turn token; whatever else the template writes is
context. The text of a reply is found by rendering the chat up to it and through it, so any template works that only
ever appends; one that rewrites earlier turns is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.data import IGNORE
from runtime.errors import UserError
from runtime.files import read_json
from runtime.template import ChatTemplate, open_template

Encoded = tuple[np.ndarray, np.ndarray]


def checkpoint_template(folder: Path) -> ChatTemplate:
    """The chat template of a checkpoint, with the special tokens of its tokenizer_config.json. Raises UserError."""
    file, config = folder / "tokenizer_config.json", {}
    if file.is_file():
        config = read_json(file, strict=False)
    tokens = {name: token["content"] if isinstance(token, dict) else token
              for name in ("bos_token", "eos_token", "pad_token") if (token := config.get(name))}
    template = open_template(folder, tokens)
    if template is None:
        raise UserError(f"{folder} has no chat template; put one beside it as chat_template.jinja")
    return template


def encode_chat(messages: list[dict], template: ChatTemplate, tokenizer: Tokenizer, place: str) -> Encoded:
    """A chat that ends with the assistant's reply. Raises UserError where the template rewrites earlier turns."""
    text, spans = template.render(messages, add_generation_prompt=False), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:index], add_generation_prompt=True)
            through = template.render(messages[:index + 1], add_generation_prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise UserError(f"{place}: the chat template rewrites earlier turns, so replies cannot be told apart; "
                                "give chats of one reply, or another chat_template.jinja")
            spans.append((len(before), len(through.rstrip())))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    learned = [any(start <= first and last <= stop for start, stop in spans) for first, last in encoding.offsets]
    return np.array(encoding.ids, dtype=np.int64), np.array(learned)


def encode_labelled(text: str, label: str, prompt: str, tokenizer: Tokenizer) -> Encoded:
    """`prompt` with {text} filled in, and the label's words after a space. The two are tokenized apart."""
    question = tokenizer.encode(prompt.replace("{text}", text), add_special_tokens=False).ids
    return join(question, tokenizer.encode(" " + label, add_special_tokens=False).ids)


def join(question: list[int], answer: list[int]) -> Encoded:
    """Tokens of a question, then those of its answer, which are learned."""
    return np.array([*question, *answer], dtype=np.int64), np.arange(len(question) + len(answer)) >= len(question)


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
