"""Vocabulary trimming: keep the tokens that a corpus or a language uses, and every byte, so that any text still encodes.

For byte-level BPE tokenizers (GPT-2's kind) and those on characters that spell others in bytes, `<0xE4>` (SentencePiece's
kind). Kept are all special and added tokens, every byte, the tokens the corpus uses (all, or the most frequent), and those
that BPE goes through on its way to them. Ids become compact in their old order; merges whose result is gone go too, so
text outside the corpus falls apart into shorter kept tokens and decodes to itself. Rows of the embedding, the head and
a table of inputs to every layer follow. On a model of 135M parameters the embedding is a fifth of all bytes.
"""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.files import LARGEST_TOKENIZER, read_json

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def plan(tokenizer: dict, counts: Counter, size: int | None) -> list[int]:
    """Old ids of the kept tokens, ascending. tokenizer: the contents of tokenizer.json; counts: uses of each id.

    size: at most so many tokens, the rarest of the corpus left out first; None keeps all it uses.
    Raises UserError for another kind of tokenizer, or a size that cannot hold what must stay.
    """
    model = tokenizer.get("model", {})
    bytewise = "ByteLevel" in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    if model.get("type") != "BPE" or not (bytewise or model.get("byte_fallback") and model["vocab"].keys() >= BYTES):
        raise UserError("only the vocabulary of byte-level BPE, or of BPE with a token for every byte, can be trimmed; this "
                        f"one is {model.get('type', 'of no known kind')}")
    vocabulary, ranks = model["vocab"], {tuple(_halves(merge)): rank for rank, merge in enumerate(model["merges"])}
    # U+2581 stands for a space: in bytes it would decode to itself
    always = {text for text in vocabulary if len(text) == 1} if bytewise else BYTES | {"\u2581"}
    kept = {entry["id"] for entry in tokenizer.get("added_tokens", [])}
    kept |= {vocabulary[text] for text in always | {model.get("unk_token")} if text in vocabulary}
    if size is not None and size < len(kept):
        raise UserError(f"a vocabulary of {size} tokens cannot hold the {len(kept)} bytes and special tokens")
    names = {i: text for text, i in vocabulary.items()}
    for i, _ in counts.most_common():
        if i not in names or i in kept:
            continue
        closure = {vocabulary[text] for text in _way_to(names[i], ranks) if text in vocabulary} - kept
        if size is None or len(kept) + len(closure) <= size:
            kept |= closure
    return sorted(kept)


def _way_to(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """What BPE makes on its way to a token, the token included: a vocabulary may have several merges that lead to one,
    and only those that are taken matter. What stands beside the token in a text changes nothing within it."""
    symbols, seen = list(token), {*token, token}
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
        if rank == len(ranks):
            break
        symbols[at:at + 2] = ["".join(symbols[at:at + 2])]
        seen.add(symbols[at])
    return seen


def trimmed_tokenizer(tokenizer: dict, kept: list[int]) -> dict:
    """The contents of tokenizer.json with only the kept tokens, renumbered by their place in `kept`."""
    new = {old: i for i, old in enumerate(kept)}
    result = copy.deepcopy(tokenizer)
    vocabulary = {text: new[i] for text, i in tokenizer["model"]["vocab"].items() if i in new}
    result["model"]["vocab"] = vocabulary
    result["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"]
                                 if vocabulary.keys() >= {*_halves(merge), "".join(_halves(merge))}]
    for entry in result.get("added_tokens", []):
        entry["id"] = new[entry["id"]]
    _renumber_template(result.get("post_processor"), new)
    return result


def _halves(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _renumber_template(node, new: dict[int, int]) -> None:
    """Ids inside a TemplateProcessing post-processor, wherever it is nested."""
    if isinstance(node, dict) and node.get("type") == "TemplateProcessing":
        for special in node.get("special_tokens", {}).values():
            special["ids"] = [new[i] for i in special["ids"]]
    if isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            _renumber_template(value, new)


def renumbered(value, new: dict[int, int]):
    """A token id, a list of them, or None, in the new numbering; ids that are gone are left out of lists."""
    if isinstance(value, list):
        return [new[i] for i in value if i in new]
    return new.get(value) if isinstance(value, int) else value


def rewrite_files(folder: Path, kept: list[int]) -> None:
    """Tokenizer and generation files of a checkpoint folder in the new numbering, in place."""
    new = {old: i for i, old in enumerate(kept)}

    def generation(data: dict) -> dict:
        ids = ("token_id", "token_ids", "suppress_tokens")
        return {key: renumbered(value, new) if key.endswith(ids) else value for key, value in data.items()}

    def configuration(data: dict) -> dict:
        added = {str(new[int(i)]): entry for i, entry in data.get("added_tokens_decoder", {}).items() if int(i) in new}
        return data | ({"added_tokens_decoder": added} if "added_tokens_decoder" in data else {})
    for name, change in (("tokenizer.json", lambda data: trimmed_tokenizer(data, kept)), ("generation_config.json", generation),
                         ("tokenizer_config.json", configuration)):
        file = folder / name
        if file.is_file():
            text = json.dumps(change(read_json(file, largest=LARGEST_TOKENIZER)), ensure_ascii=False, indent=1)
            file.write_text(text + "\n", "utf-8")


def count_tokens(tokens: np.ndarray) -> Counter:
    """How often each id occurs."""
    ids, counts = np.unique(tokens, return_counts=True)
    return Counter(dict(zip(ids.tolist(), counts.tolist())))
