"""A checkpoint or a bundle, opened for measuring: one face for both kinds of luggage.

A folder with a manifest.json is a bundle and runs through `runtime`; any other is a checkpoint and runs in PyTorch. Both
end in a `runtime.backend.Backend`, so whatever is measured above it is measured by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from models.checkpoint import load_decoder, open_checkpoint
from models.teacher_cache import shared_vocabulary
from models.torch_backend import TorchBackend
from runtime import decode
from runtime.backend import Backend
from runtime.backends import open_backend
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.machine import cpu_threads
from runtime.sampling import Sampler, SamplingOptions
from runtime.template import ChatTemplate, open_template
from runtime.text import Tokenizer

BATCH = 8                # prompts decoded together


@dataclass
class LanguageModel:
    folder: Path
    backend: Backend
    tokenizer: Tokenizer
    context: int                     # most tokens of prompt and reply
    eos: frozenset[int]
    vocab_size: int                  # rows of its table: the tokenizer's tokens, and perhaps more
    bos: int | None = None

    @property
    def raw_tokenizer(self) -> tokenizers.Tokenizer:
        """The `tokenizers` object itself, for offsets and comparison."""
        return tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """int64 ids [n], n >= 1 (ids pass through). Raises UserError for an empty prompt or one as long as the context."""
        ids = prompt if isinstance(prompt, np.ndarray) else self.tokenizer.encode(prompt)
        if not 1 <= len(ids) < self.context:
            raise UserError(f"a prompt has {len(ids)} tokens; {self.folder.name} takes 1 to {self.context - 1}: "
                            "use fewer shots or shorter examples")
        return ids

    def chat_prompt(self, text: str) -> np.ndarray:
        """int64 ids of one user message in the model's chat template, or of the text itself where it has none."""
        if self._template is None:
            return self.tokenizer.encode(text + "\n")
        return self.tokenizer.encode(self._template.render([{"role": "user", "content": text}]), special_tokens=False)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """Compiled once: every prompt of a comparison goes through it."""
        ids = {"bos_token": self.bos, "eos_token": min(self.eos, default=None)}
        return open_template(self.folder, {name: None if i is None else self.tokenizer.token_text(i) for name, i in ids.items()})

    def generate(self, prompts: Items[str | np.ndarray], max_new_tokens: int, stop: Items[str] = (), *, label: str = "generating",
                 progress: bool = True) -> list[str]:
        """Greedy replies, cut at the first stop string. Similar lengths are decoded together."""
        encoded = [self.encode(p) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        replies = [""] * len(prompts)
        with tqdm(total=len(prompts), desc=label, unit="prompt", disable=not progress) as bar:
            for start in range(0, len(order), BATCH):
                batch = order[start:start + BATCH]
                for i, text in zip(batch, self._decode([encoded[i] for i in batch], max_new_tokens, stop)):
                    replies[i] = text
                bar.update(len(batch))
        return replies

    def _decode(self, prompts: list[np.ndarray], max_new_tokens: int, stop: Items[str]) -> list[str]:
        greedy = SamplingOptions()
        sequences = [decode.Sequence(p, Sampler(greedy, p), min(max_new_tokens, self.context - len(p)), self.eos)
                     for p in prompts]
        cache = self.backend.new_cache(len(sequences), decode.first_capacity(sequences))
        for sequence in decode.run(self.backend, cache, sequences):
            if stop and any(s in self.tokenizer.decode(sequence.tokens) for s in stop):
                sequence.finish_reason = sequence.finish_reason or "stop"
        texts = [self.tokenizer.decode(s.tokens) for s in sequences]
        return [min((t.split(s, 1)[0] for s in stop), key=len) if stop else t for t in texts]

    def continuation_logprobs(self, prompt: str, continuations: Items[str]) -> list[float]:
        """ln p(continuation | prompt) of each, summed over its tokens; the prompt is read once.

        Prompt and continuation are tokenized apart, so the same prompt tokens serve all of them.
        """
        return [score for score, _ in self.score_tails(
            self.encode(prompt), [self.tokenizer.encode(c, special_tokens=False) for c in continuations])]

    def score_tails(self, ids: np.ndarray, tails: Items[np.ndarray]) -> list[tuple[float, bool]]:
        """ln p(tail | ids) of each tail (int64 [n], n >= 1), and whether greedy decoding would write it."""
        longest = max(map(len, tails))
        if min(map(len, tails)) == 0:
            raise UserError("a continuation has no tokens")
        cache = self.backend.new_cache(1, len(ids) + longest)
        first = _log_softmax(self._run(ids, np.array([len(ids) - 1]), cache))[0]
        scores = []
        for tail in tails:
            score, greedy = float(first[tail[0]]), bool(first.argmax() == tail[0])
            if len(tail) > 1:
                cache.lengths[0] = len(ids)
                rest = _log_softmax(self._run(tail[:-1], np.arange(len(tail) - 1), cache))
                score += float(rest[np.arange(len(tail) - 1), tail[1:]].sum())
                greedy = greedy and bool((rest.argmax(-1) == tail[1:]).all())
            scores.append((score, greedy))
        return scores

    def _run(self, ids: np.ndarray, wanted: np.ndarray, cache) -> np.ndarray:
        """Append ids [s] to the one row of `cache`; logits [k, vocab] at `wanted` [k]."""
        start = cache.lengths.copy()
        logits = self.backend.forward(ids[None], start[:, None] + np.arange(len(ids)), start, wanted[None], cache)
        cache.lengths += len(ids)
        return logits[0].copy()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def open_model(folder: Path | str, *, threads: int | None = None, graph: str | None = None, exact: bool = False,
               provider: str | None = None) -> LanguageModel:
    """Open a checkpoint or a bundle.

    A bundle runs as an app would run it (runtime/backends.py; `provider` insists on one of its engines), or, where
    `graph` or `exact` is given, in that graph on ONNX Runtime's CPU (runtime/ort_backend.py).
    Raises UserError where the folder is neither, or its tokenizer is missing.
    """
    folder = Path(folder)
    threads = cpu_threads(threads)
    if (folder / "manifest.json").is_file():
        bundle = open_bundle(folder)
        if graph or exact:
            if provider not in (None, "cpu"):
                raise UserError(f"--graph and --exact are ONNX Runtime's on the CPU; leave out --provider {provider}")
            from runtime.ort_backend import OrtBackend
            backend = OrtBackend(bundle, threads=threads, exact=exact, role=graph)
        else:
            backend, _ = open_backend(bundle, provider, threads)
        context, eos, bos = bundle.max_context, bundle.model["eos_token_ids"], bundle.model["bos_token_id"]
        vocab_size = bundle.model["config"]["vocab_size"]
    else:
        if graph or exact or provider:
            raise UserError(f"{folder}: is a checkpoint; only a bundle has graphs and engines to choose from")
        config = open_checkpoint(folder).config
        torch.set_num_threads(threads)
        backend = TorchBackend(load_decoder(folder))
        context, eos, bos = config.context_length, config.eos_token_ids, config.bos_token_id
        vocab_size = config.vocab_size
    return LanguageModel(folder, backend, Tokenizer(folder / "tokenizer.json"), context, frozenset(eos), vocab_size, bos)


def check_same_tokenizer(model: LanguageModel, reference: LanguageModel) -> int | None:
    """Raises UserError unless both give every token the same id: their distributions could not be compared.

    Returns how many tokens they share where one's table is padded to another size (models/teacher_cache.py), else None.
    """
    if model.raw_tokenizer.get_vocab() != reference.raw_tokenizer.get_vocab():
        raise UserError(f"{reference.folder}: has another tokenizer than {model.folder}; a reference must share the vocabulary")
    return shared_vocabulary(model.folder, model.vocab_size, reference.vocab_size)
