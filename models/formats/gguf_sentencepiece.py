"""The SentencePiece tokenizers of a GGUF file (Kudo and Richardson 2018), as `tokenizers` has them.

A space is U+2581 in the vocabulary, and characters that it lacks are spelled in bytes, `<0xE4>`, where it has those.

- "llama" is BPE without a list of merges: of two neighbours that join to a piece, those of the piece with the highest
  score join first. The merges are worked out from that (`merges_of`); transformers' converters do the same.
- "gemma4" is the same with its merges in the file.
- "t5" is Unigram, with the normalization that its `precompiled_charsmap` describes.

A GGUF file says whether a space is put before a text, and not whether each stretch between control tokens gets one.
Where there are none but BOS, EOS, UNK and PAD, each does, as in SentencePiece and in the tokenizer.json of Llama 2 and
Mistral 0.1; so too in Phi-3's. Other vocabularies with control tokens (Mistral 0.3) are read as transformers reads
them: the first stretch alone gets one, unless it begins with one.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime.errors import UserError

NORMAL, CONTROL, UNUSED = 1, 3, 5                                                    # gguf.TokenType
SPACE = "\u2581"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def build_bpe(metadata: dict, tokens: list[str], types: list[int], unknown: int | None, path: Path) -> Tokenizer:
    """BPE on characters. unknown: id of the token for characters without a spelling. Raises UserError."""
    # Runs of spaces that are tokens of their own (Gemma's): spelled in spaces in the file alone, joined before all else
    runs = {token: SPACE * len(token) for token in tokens if len(token) > 1 and not token.strip(" ")}
    vocabulary = {runs.get(token, token): i for i, token in enumerate(tokens) if types[i] != UNUSED}
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in listed(metadata, "merges", str, path)]
    else:
        scores = _scores(metadata, tokens, path)
        pieces = {token: scores[i] for token, i in vocabulary.items() if types[i] == NORMAL and token not in BYTES}
        merges = merges_of(pieces | dict.fromkeys(runs.values(), math.inf))
        if len(merges) > 1 and len(set(pieces.values())) == 1:
            raise UserError(f"{path}: its tokens all have the score {scores[0]:g}, so nothing says which join first; "
                            "get the model as a Hugging Face folder")
    if not (in_bytes := vocabulary.keys() >= BYTES) and unknown is None:
        raise UserError(f"{path}: its tokenizer has neither a token for each byte nor an unknown token; get it again")
    with said_of(path):
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token=None if unknown is None else tokens[unknown],
                           fuse_unk=True, byte_fallback=in_bytes)
    tokenizer, architecture = Tokenizer(model), str(metadata.get("general.architecture"))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not architecture.startswith("gemma"))
    space = normalizers.Replace(" ", SPACE)
    usual = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")} | {0, 1, 2, unknown}
    if prefix and architecture != "phi3" and any(kind == CONTROL and i not in usual for i, kind in enumerate(types)):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space]) if prefix else space
    tokenizer.decoder = _decoder(prefix, in_bytes)
    return tokenizer


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges, first to last, of a SentencePiece BPE whose pieces have these `scores`: every way in which two pieces
    join to a third, by its score; of one score, the longest left half first."""
    found = []
    for piece, score in scores.items():
        found += [(-score, -cut, cut - len(piece), piece) for cut in range(1, len(piece))
                  if piece[:cut] in scores and piece[cut:] in scores]
    found.sort(key=lambda merge: merge[:3])                    # stable: then in the order of the vocabulary
    return [(piece[:-cut], piece[-cut:]) for _, cut, _, piece in found]


def build_unigram(metadata: dict, tokens: list[str], types: list[int], unknown: int | None, path: Path) -> Tokenizer:
    """Unigram: the likeliest cut of a text by its pieces' scores. Placeholders at the vocabulary's end are left out;
    one within it gets the score of the least likely piece, so that it moves none. Raises UserError."""
    scores = _scores(metadata, tokens, path)
    count = max((i + 1 for i, kind in enumerate(types) if kind != UNUSED), default=0)
    least = min((score for score, kind in zip(scores, types) if kind == NORMAL), default=0.0)
    pieces = [(token, least if kind == UNUSED else score) for token, kind, score in zip(tokens, types, scores)][:count]
    if unknown is None or unknown >= count:
        raise UserError(f"{path}: its tokenizer has no unknown token; get it again")
    in_bytes = set(tokens[:count]) >= BYTES
    charsmap = listed(metadata, "precompiled_charsmap", int, path, [])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    with said_of(path):
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=in_bytes))
        steps = [normalizers.Precompiled(bytes(byte & 255 for byte in charsmap))] if charsmap else []
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        steps.append(normalizers.Replace(Regex(r"\A +| +\z|(?<= ) +"), ""))
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not any(SPACE in piece[1:] for piece, _ in pieces):     # word by word as in transformers: ties fall the same way
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    tokenizer.decoder = _decoder(prefix, in_bytes)
    return tokenizer


def _decoder(prefix: bool, in_bytes: bool):
    steps = [decoders.Replace(SPACE, " ")] + [decoders.ByteFallback()] * in_bytes + [decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)


def _scores(metadata: dict, tokens: list[str], path: Path) -> list[float]:
    scores = listed(metadata, "scores", (int, float), path)
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise UserError(f"{path}: its tokenizer has {len(scores)} scores of {len(tokens)} tokens, or some are no "
                        "numbers")
    return scores


def listed(metadata: dict, key: str, kind, path: Path, default: list | None = None) -> list:
    """The list under `tokenizer.ggml.{key}`, of values of a `kind`. Raises UserError where it is none."""
    values = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{path}: its tokenizer is incomplete: tokenizer.ggml.{key} is missing or not such a list")
    return values


@contextlib.contextmanager
def said_of(path: Path) -> Iterator[None]:
    """The errors of `tokenizers`, which raises bare Exceptions, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: its tokenizer does not fit together ({str(error).splitlines()[0]:.200})") from None
