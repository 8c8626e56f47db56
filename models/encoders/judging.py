"""Judge an encoder, in PyTorch or as a bundle, by the same lines of code: `judge(encoder, "ner", examples)`.

Accuracy, macro F1 and Matthews' correlation of labels; Pearson's and Spearman's correlations of numbers and cosines; precision, recall
and F1 of entities, which count where type, beginning and end agree (CoNLL, seqeval).
"""

from pathlib import Path

import numpy as np
import torch

from models.encoders.network import embedding, max_tokens
from models.encoders.rows import asked
from models.judging import metrics
from models.tasks.examples import Example
from runtime.encoder import Encoded, Encoder, TextEncoder, padded
from runtime.encoder_bundle import EncoderBundle
from runtime.entities import spans
from runtime.errors import UserError
from runtime.text import Tokenizer

TASKS = {"classify": "text-classification", "pair": "text-classification", "regress": "regression", "ner": "token-classification",
         "similarity": "sentence-similarity"}
HEADLINE = {"classify": "accuracy", "pair": "accuracy", "regress": "spearman", "similarity": "spearman", "ner": "entity_f1"}


class TorchEncoder(Encoder):
    """A transformers model with `Encoder`'s methods. task: a key of runtime.encoder_bundle.TASKS."""

    def __init__(self, model, tokenizer: Tokenizer, task: str, labels: list[str], pooling: str | None, takes_types: bool):
        config = model.config
        self.bundle = EncoderBundle(Path(config.model_type), {"name": config.model_type, "task": task, "labels": labels, "model": {
            "max_tokens": max_tokens(config), "vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id or 0}})
        self.truncated, self._encode = 0, TextEncoder(tokenizer, max_tokens(config))
        self._model, self._pooling, self._takes_types = model, pooling, takes_types

    @property
    def runs_as(self) -> str:
        return "PyTorch"

    @property
    def device(self) -> str:
        kind = next(self._model.parameters()).device.type
        return kind if kind == "cpu" else "cuda"

    @torch.no_grad()
    def call(self, encoded: list[Encoded]) -> np.ndarray:
        device = next(self._model.parameters()).device
        ids, mask, types = (torch.from_numpy(part).to(device) for part in padded(encoded, self.bundle.manifest["model"]["pad_token_id"]))
        result = self._model(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if self._takes_types else {}))
        found = result.logits if self._pooling is None else embedding(result.last_hidden_state, mask, self._pooling)
        return found.float().cpu().numpy()


def judge(encoder: Encoder, task: str, examples: list[Example], words: dict[str, str] | None = None,
          stride: int | None = None) -> dict[str, float]:
    """The task's metrics of an encoder on these examples, each with its interval, HEADLINE's first. words: what it calls the examples'
    labels. stride: of windows over long texts, of ner. Raises UserError."""
    if task == "similarity" and any("text2" not in one.fields for one in examples):
        raise UserError(f"{examples[0].place}: a similarity is of two texts")
    texts, right = list(map(asked, examples)), [(words or {}).get(one.answers[0], one.answers[0]) for one in examples]
    if task in ("classify", "pair"):
        if unknown := next((one for one, label in zip(examples, right) if label not in encoder.bundle.labels), None):
            raise UserError(f"{unknown.place}: label {unknown.answers[0]!r} was never seen; known are {', '.join(encoder.bundle.labels)}. Mend the "
                            "file, or say what the model calls it with --labels NAME=WORDS")
        pairs, names = list(zip([found.label for found in encoder.classify(texts)], right)), ("accuracy", "macro_f1", "matthews")
        measures = {name: lambda some, name=name: metrics.classification(*zip(*some))[name] for name in names}
    elif task == "ner":
        found = [[(one.label, one.start, one.end) for one in some] for some in encoder.entities(texts, stride=stride)]
        pairs, names = list(zip(found, map(gold, examples))), ("f1", "precision", "recall")
        measures = {f"entity_{name}": lambda some, name=name: metrics.entities(*zip(*some))[name] for name in names}
    else:
        numbers = encoder.regress(texts) if task == "regress" else encoder.similarity(*map(list, zip(*texts)))
        pairs = [(float(number), float(one)) for number, one in zip(numbers, right)]
        measures = {name: lambda some, name=name: getattr(metrics, name)(*zip(*some)) for name in ("spearman", "pearson")}
    result = {}
    for name, measure in measures.items():
        result[name], result[f"{name}_interval"] = measure(pairs), list(metrics.bootstrap(pairs, measure, resamples=200))
    return result


def gold(one: Example) -> list[tuple[str, int, int]]:
    """(type, first character, behind the last) of an example's entities."""
    starts = np.cumsum([0, *(len(word) + 1 for word in one.fields["tokens"])]).tolist()
    return [(kind, starts[first], starts[stop] - 1) for kind, first, stop in spans(one.fields["tags"])]
