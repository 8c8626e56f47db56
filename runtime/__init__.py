"""Open a bundle without torch: `from runtime import Engine` generates text, `from runtime import Encoder` tells vectors, labels, entities."""

from typing import TYPE_CHECKING

from .errors import CheckFailed, UserError

if TYPE_CHECKING:
    from .encoder import Encoder
    from .engine import Engine, GenerationOptions, Pending, Reply, Stream, Timings
    from .sampling import TokenLogprobs

__version__ = "0.1.0"               # of all of Edgewright; pyproject.toml reads it here
__all__ = ["CheckFailed", "Encoder", "Engine", "GenerationOptions", "Pending", "Reply", "Stream", "Timings", "TokenLogprobs", "UserError"]


def __getattr__(name: str):
    """What needs numpy and the tokenizer, imported on first use, so that `import runtime` and its command lines stay light."""
    if name == "Encoder":
        from .encoder import Encoder
        return Encoder
    if name in __all__:
        from . import engine
        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
