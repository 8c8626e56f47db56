"""Tool calls in the text of replies, one small module for each syntax that models use.

    syntax = parser_of(template_source, tokenizer)            # None: the model's chat template knows none
    content, calls = syntax.parse(reply_text, tools)          # of a whole reply, or as it comes:
    stream = syntax.stream(tools); stream.push(piece) -> [Content | CallBegun | CallArguments, ...]; stream.finish()

Marks that are control tokens must stand in the text: `engine.submit(..., spelled=syntax.spelled(tokenizer))`.
"""

from ..text import Tokenizer
from . import gemma4, hermes, lfm2, llama, ministral, qwen3_5
from .syntax import Call, CallArguments, CallBegun, CallStream, Content, Syntax

__all__ = ["Call", "CallArguments", "CallBegun", "CallStream", "Content", "Syntax", "parser_of"]

_KINDS = (qwen3_5.KIND, gemma4.KIND, ministral.KIND, hermes.KIND, llama.KIND, lfm2.KIND)     # the narrower mark first


def parser_of(template: str, tokenizer: Tokenizer) -> Syntax | None:
    """The syntax in which the model of a chat template (its source) writes calls; None: none that is known."""
    kind = next((kind for kind in _KINDS if kind.knows(template, tokenizer)), None)
    return kind and Syntax(kind, tokenizer)
