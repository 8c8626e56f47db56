"""Examples of a task as rows to learn from: the prompt that the task asks with, then the answer, which is learned.

    encoded = encode(task, example, tokenizer, chat, end=2)      # [(ids int64 [n], learned bool [n])]

The prompt's ids are those of `Task.prompt`, so what is trained on is what `models.evaluate` and `Engine.solve` ask. Of a
conversation every reply of the assistant's is learned, as models/data/examples.py has it; the last one is what would be asked.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.data.corpus import IGNORE
from models.data.examples import Encoded, Examples, encode_chat, join
from models.progress import progress
from models.tasks.examples import Example
from models.tasks.options import words_of
from models.training.trainer import Trainer
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError
from runtime.task import Task, template_variables
from runtime.text import Tokenizer

SCORED_TOGETHER = 16             # examples whose accuracy is measured at once


def encode(task: Task, example: Example, tokenizer: Tokenizer, chat: ChatEncoder | None, end: int | None) -> list[Encoded]:
    """An example as rows; of a conversation perhaps several. end: the token behind a text that no template ends. Raises UserError,
    which names the example's place."""
    fields = example.fields
    try:
        if not task.example:
            if chat is None:
                raise UserError("the model has no chat template; put one beside it as chat_template.jinja")
            return encode_chat([*task.messages(fields), fields["reply"]], chat, **template_variables(fields))
        tail = task.tail(fields, words_of(task, example), tokenizer, chat, end if task.answer == "text" else None)
        return [join(task.prompt(fields, tokenizer, chat), tail)]
    except UserError as error:
        raise UserError(f"{example.place}: {str(error).removeprefix(f'{example.place}: ')}") from None


@torch.no_grad()
def accuracy(trainer: Trainer, encoded: list[Encoded], answers: list[np.ndarray], pad: int) -> float:
    """Share of the examples whose own answer, of all `answers` (ids), continues the prompt most likely."""
    right = 0
    examples = sorted(encoded, key=lambda example: len(example[0]))
    trainer.module.eval()
    for start in progress(range(0, len(examples), SCORED_TOGETHER), label="accuracy", unit="batch"):
        chunk = [(ids[~learned], ids[learned]) for ids, learned in examples[start:start + SCORED_TOGETHER]]
        rows = Examples([join(question, answer) for question, _ in chunk for answer in answers], pad)
        with trainer.accelerator.autocast():
            scores = _row_scores(trainer.module, *trainer.tensors(rows.rows(range(len(rows)))))
        best = scores.view(len(chunk), -1).argmax(1)
        right += sum(answers[i].tolist() == answer.tolist() for i, (_, answer) in zip(best, chunk))
    trainer.module.train()
    return right / len(examples)


def _row_scores(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """ln p of each row's labels. Rows of equal inputs (answers of one token) are run once."""
    input_ids, which = input_ids.unique(dim=0, return_inverse=True)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    labels = labels[:, columns]
    logits = model(input_ids, logits_positions=columns.expand(len(input_ids), -1))[which]
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none").sum(1)
