"""What several commands of compress share: where a teacher's predictions are kept, and which models they take."""

from pathlib import Path

from runtime.errors import UserError

TEACHER_CACHE = Path("~/.cache/edgewright/teacher")


def check_compresses(checkpoint) -> None:
    """Raises UserError for a checkpoint (models.checkpoint.Checkpoint) of a kind that is neither quantized nor pruned."""
    if checkpoint.config.gated:
        raise UserError(f"{checkpoint.path} is a {checkpoint.config.gated}, which is neither quantized nor pruned: train a smaller one, or "
                        "distill into one (compress.distill --student)")
