"""A checkpoint or a bundle, opened for measuring: one interface for both.

A folder with a manifest.json is a bundle and runs through `runtime`; any other is a checkpoint and runs in PyTorch. Both
end in a `runtime.backend.Backend`, so whatever is measured above it is measured by the same lines.
"""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from models.formats.chat import chat_encoder, special_ids, special_tokens
from models.checkpoint import load_decoder, open_checkpoint
from models.formats.teacher_cache import shared_vocabulary
from models.network.torch_backend import TorchBackend
from models.progress import progress as shown
from runtime import decode, reply
from runtime.backend import Backend
from runtime.backends import open_backend
from runtime.bundle import MANIFEST, open_bundle
from runtime.chat_tokens import ChatEncoder, bundle_encoder
from runtime.compare import log_softmax
from runtime.errors import UserError
from runtime.machine import cpu_threads
from runtime.sampling import Sampler, SamplingOptions
from runtime.text import ReplyText, Tokenizer

BATCH = 8                # prompts decoded together


@dataclass
class LanguageModel:
    folder: Path
    backend: Backend
    tokenizer: Tokenizer
    context: int                     # most tokens of prompt and reply
    eos: frozenset[int]              # ids that end a reply
    vocab_size: int                  # rows of its table: the tokenizer's tokens, and perhaps more
    special_tokens: dict[str, str]   # as templates know them
    open_chat: Callable[[], ChatEncoder | None]

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """int64 ids [n], n >= 1 (ids pass through). Raises UserError for an empty prompt or one as long as the context."""
        ids = prompt if isinstance(prompt, np.ndarray) else self.tokenizer.encode(prompt)
        if not 1 <= len(ids) < self.context:
            raise UserError(f"a prompt has {len(ids)} tokens; {self.folder.name} takes 1 to {self.context - 1}: "
                            "use fewer shots or shorter examples")
        return ids

    def chat_prompt(self, text: str) -> np.ndarray:
        """int64 ids of one user message in the model's chat template, or of the text itself where it has none."""
        if self.chat is None:
            return self.tokenizer.encode(text + "\n")
        return self.chat.tokens([{"role": "user", "content": text}])

    @cached_property
    def chat(self) -> ChatEncoder | None:
        """The chat template with the tokenizer; None: there is none."""
        return self.open_chat()

    def special_id(self, name: str) -> int | None:
        """The id of the tokenizer's "bos_token", "eos_token", ...; None where it has none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.tokenizer.token_id(text)

    def generate(self, prompts: Items[str | np.ndarray], max_new_tokens: int, stop: Items[str] = (), *,
                 sampling: SamplingOptions = SamplingOptions(), label: str = "generating",
                 progress: bool = True) -> list[reply.Reply]:
        """Replies, cut at the first stop string and at the context's end. Similar lengths are decoded together."""
        drafts = []
        for number, ids in enumerate(map(self.encode, prompts)):
            limit = min(max_new_tokens, self.context - len(ids))
            sequence = decode.Sequence(ids, Sampler(sampling, ids, number), limit, self.eos)
            drafts.append(reply.Draft(sequence, ReplyText(self.tokenizer, tuple(stop))))
        order = sorted(drafts, key=lambda draft: len(draft.sequence.prompt))
        with shown(total=len(drafts), label=label, unit="prompt", quiet=not progress) as bar:
            for start in range(0, len(order), BATCH):
                for draft, _ in reply.run(self.backend, order[start:start + BATCH]):
                    bar.update(draft.sequence.finish_reason is not None)
        return [draft.reply for draft in drafts]

    def continuation_logprobs(self, prompt: str, continuations: Items[str]) -> list[float]:
        """ln p(continuation | prompt) of each, summed over its tokens. Prompt and continuation are tokenized apart, so
        the same prompt tokens serve all of them."""
        tails = [self.tokenizer.encode(text, special_tokens=False) for text in continuations]
        return [score for score, _ in self.score_tails(self.encode(prompt), tails)]

    def classify(self, prompt: str, labels: Items[str], words: dict[str, str]) -> str:
        """The label that is the likeliest continuation, after a space, as `words` spell it."""
        scores = self.continuation_logprobs(prompt, [" " + words.get(label, label) for label in labels])
        return labels[int(np.argmax(scores))]

    def score_tails(self, ids: np.ndarray, tails: Items[np.ndarray]) -> list[tuple[float, bool]]:
        """ln p(tail | ids) of each tail (int64 [n], n >= 1), and whether greedy decoding would write it."""
        if min(map(len, tails)) == 0:
            raise UserError("a continuation has no tokens")
        cache = self.backend.new_cache(1, len(ids) + max(map(len, tails)))
        first, scores = log_softmax(decode.logits(self.backend, ids, len(ids) - 1, cache)), []
        after = cache.snapshot(0)
        for tail in tails:
            log_p = first
            if len(tail) > 1:
                cache.restore(0, after)
                log_p = np.concatenate((first, log_softmax(decode.logits(self.backend, tail[:-1], cache=cache))))
            scores.append((float(log_p[np.arange(len(tail)), tail].sum()), bool((log_p.argmax(axis=1) == tail).all())))
        return scores


def open_model(folder: Path | str, *, threads: int | None = None, graph: str | None = None, exact: bool = False,
               provider: str | None = None) -> LanguageModel:
    """Open a checkpoint or a bundle.

    A bundle runs as an app would run it (runtime/backends.py; `provider` insists on one of its engines), or, where
    `graph` or `exact` is given, in that graph on ONNX Runtime's CPU (runtime/ort_backend.py).
    Raises UserError where the folder is neither, or its tokenizer is missing.
    """
    folder = Path(folder)
    threads = cpu_threads(threads)
    if (folder / MANIFEST).is_file():
        bundle = open_bundle(folder)
        if (graph or exact) and provider not in (None, "cpu"):
            raise UserError(f"--graph and --exact are ONNX Runtime's on the CPU; leave out --provider {provider}")
        provider = "cpu" if graph or exact else provider
        backend, _ = open_backend(bundle, provider, threads, cpu={"exact": exact, "role": graph})
        model, tokenizer = bundle.model, Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
        return LanguageModel(folder, backend, tokenizer, bundle.max_context, frozenset(model["eos_token_ids"]),
                             model["config"]["vocab_size"], model.get("special_tokens") or {},
                             partial(bundle_encoder, bundle, tokenizer))
    if graph or exact or provider:
        raise UserError(f"{folder}: is a checkpoint; only a bundle has graphs and engines to choose from")
    config = open_checkpoint(folder).config
    torch.set_num_threads(threads)
    backend, tokenizer = TorchBackend(load_decoder(folder)), Tokenizer(folder / "tokenizer.json")
    return LanguageModel(folder, backend, tokenizer, config.context_length,
                         frozenset(special_ids(config, folder)["eos_token_ids"]), config.vocab_size,
                         special_tokens(folder), partial(chat_encoder, folder, tokenizer))


def check_same_tokenizer(model: LanguageModel, reference: LanguageModel) -> int | None:
    """Raises UserError unless both give every token the same id: their distributions could not be compared.

    Returns how many tokens they share where one's table is padded to another size (models/formats/teacher_cache.py),
    else None.
    """
    if model.tokenizer.vocabulary() != reference.tokenizer.vocabulary():
        raise UserError(f"{reference.folder}: has another tokenizer than {model.folder}; a reference must share the vocabulary")
    return shared_vocabulary(model.folder, model.vocab_size, reference.vocab_size)
