"""The loss of a language model on rows of tokens with labels, whose logits are made only where some row has a label.

    rows = label_columns((input_ids, labels))          # on the host, which then knows how many there are
    total = summed_loss(model, *rows on the device)    # nats

How many labels a row has decides the shape of the logits. Counted on the device, the host would have to wait for it before it
could go on; so they are counted before they are sent there.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.data.corpus import IGNORE


def label_columns(rows: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """(input_ids [r, s], labels [r, s]) as (input_ids, labels [r, k], positions [r, k]), k the most labels of a row; as they
    are where that is s. Positions of a row's labels come first, in order."""
    input_ids, labels = rows
    without = labels == IGNORE
    columns = labels.shape[1] - int(without.sum(1).min())
    if columns == labels.shape[1]:
        return rows
    positions = np.argsort(without, axis=1, kind="stable")[:, :columns]
    return input_ids, np.take_along_axis(labels, positions, 1), positions


def summed_loss(model, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the labels, in nats. positions: int64 [r, k], where in a row labels [r, k] belong.

    `model(input_ids, logits_positions=)` gives float32 logits.
    """
    logits = model(input_ids) if positions is None else model(input_ids, logits_positions=positions)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def label_loss(model, *rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": summed_loss(model, *rows)}
