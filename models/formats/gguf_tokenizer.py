"""The tokenizer of a GGUF file as Hugging Face's tokenizer files.

A GGUF file holds a vocabulary, special ids and the name of a kind: "gpt2" is byte-level BPE and stands below, "llama",
"gemma4" and "t5" are SentencePiece's (models/formats/gguf_sentencepiece.py).

Byte-level BPE has merges and the *name* of a pre-tokenizer; what that name means is known only to llama.cpp
(src/llama-vocab.cpp) and to the tokenizer.json the name was derived from. The names below are written out as in those
tokenizer.json files and as transformers reads them. Where llama.cpp and tokenizer.json disagree (Qwen2's NFC
normalization, which llama.cpp leaves out), tokenizer.json is followed, because the model was trained with it.

Not read: tokenizers of another kind ("bert", "rwkv") and other pre-tokenizers; both are refused.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from models.formats.gguf_sentencepiece import build_bpe, build_unigram, listed, said_of
from runtime.errors import UserError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5                        # gguf.TokenType
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, marks: str = "") -> str:
    """GPT-4's pattern, with runs of digits cut into pieces of `digits` ("1" or "1,3"); marks: what words hold besides
    letters."""
    return SHORT + (r"|[^\r\n\p{L}\p{N}]?[\p{L}%s]+|\p{N}{%s}| ?[^\s\p{L}%s\p{N}]+[\r\n]*"
                    % (marks, digits, marks)) + ENDS


def _cased(digits: str, short: str = "") -> str:
    """GPT-4o's pattern, which also cuts where small letters end and capitals begin; short: what may end a word."""
    word = r"[^\r\n\p{L}\p{N}]?"
    return (f"{word}{UPPER}*{LOWER}+{short}|{word}{UPPER}+{LOWER}*{short}"
            r"|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n/]*" % digits + ENDS)


# How a text is cut before its bytes are merged, by llama.cpp's names for it; None: GPT-2's own pattern alone.
DIGITS = "digits"                                                         # GPT-2's, digits one by one
PRE_TOKENIZERS = {
    "gpt-2": None, **dict.fromkeys(("smollm", "starcoder", "refact"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "smaug-bpe", "dbrx"),
                    _words("1,3")),
    **dict.fromkeys(("qwen2", "megrez"), _words("1")), "qwen35": _words("1", r"\p{M}"), "tekken": _cased("1"),
    **dict.fromkeys(("gpt-4o", "llama4"), _cased("1,3", SHORT + "?"))}
NFC = ("qwen2", "qwen35")
# Llama 3's and Tekken's: a word in the vocabulary is one token, whatever merges lead to it, and texts begin with BOS.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "tekken")
DEFAULT_IDS = {"llama": {"unknown": 0, "bos": 1, "eos": 2}, "t5": {"padding": 0, "eos": 1, "unknown": 2}}  # llama.cpp's
# Ends of a turn; files that name none (Gemma's) are read by these spellings, as llama.cpp reads them.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>")
STRIPS_NOTHING = ("<unk>", "<s>", "<|endoftext|>")              # Phi-3's other control tokens take the space after them


def build_tokenizer(metadata: dict, path: Path) -> Tokenizer:
    """The tokenizer that the `tokenizer.*` keys of a GGUF file's `metadata` describe.

    Control tokens become special added tokens, user-defined ones plain added tokens; placeholders for unused ids are
    left out. BOS and EOS are added around a text where the file says so. Raises UserError.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise UserError(f"{path}: its tokenizer is of the kind {kind!r}; read from GGUF are {', '.join(KINDS)}, so get "
                        "the model as a Hugging Face folder")
    tokens = listed(metadata, "tokens", str, path)
    types = listed(metadata, "token_type", int, path, [1] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise UserError(f"{path}: its tokenizer is incomplete: {len(tokens)} tokens and {len(types)} types of them")
    unknown = token_id(metadata, "unknown", path)
    if unknown is None and UNKNOWN in types:
        unknown = types.index(UNKNOWN)
    tokenizer = KINDS[kind](metadata, tokens, types, unknown, path)
    strips = kind == "llama" and metadata.get("general.architecture") == "phi3"
    added = []
    for i, (token, number) in enumerate(zip(tokens, types)):
        if number in (CONTROL, USER_DEFINED) or i == unknown and number == UNKNOWN:
            special = number == CONTROL or i == unknown or token in TURN_ENDS
            if tokenizer.token_to_id(token) == i:
                added.append(AddedToken(token, special=special, normalized=False,
                                        rstrip=strips and token not in STRIPS_NOTHING))
    tokenizer.add_tokens(added)
    if processor := _post_processor(metadata, path):
        tokenizer.post_processor = processor
    return tokenizer


def _byte_level(metadata: dict, tokens: list[str], types: list[int], unknown: int | None, path: Path) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{path}: its pre-tokenizer {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}; get the model "
                        "as a Hugging Face folder")
    merges = [tuple(merge.split(" ")) for merge in listed(metadata, "merges", str, path)]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    with said_of(path):
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS)
    tokenizer, cut = Tokenizer(model), PRE_TOKENIZERS[pre]
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, DIGITS))]
    if cut:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True) if cut == DIGITS else
                     pre_tokenizers.Split(Regex(cut), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


KINDS = {"gpt2": _byte_level, "llama": build_bpe, "gemma4": build_bpe, "t5": build_unigram}


def _post_processor(metadata: dict, path: Path):
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    begins = kind in ("llama", "gemma4") or kind == "gpt2" and pre in WHOLE_WORDS
    wanted = {"bos": metadata.get("tokenizer.ggml.add_bos_token", begins),
              "eos": metadata.get("tokenizer.ggml.add_eos_token", kind == "t5")}
    ids = {name: token_id(metadata, name, path) for name, add in wanted.items() if add}
    tokens = {name: metadata["tokenizer.ggml.tokens"][i] for name, i in ids.items() if i is not None}
    if not tokens:
        return None
    bos, eos = ([tokens[name]] if name in tokens else [] for name in ("bos", "eos"))
    second = [f"{token}:1" for token in (*bos, "$B", *eos)]
    return processors.TemplateProcessing(single=[*bos, "$A", *eos], pair=[*bos, "$A", *eos, *second],
                                         special_tokens=[(token, ids[name]) for name, token in tokens.items()])


def token_id(metadata: dict, name: str, path: Path) -> int | None:
    """The id under `tokenizer.ggml.{name}_token_id` ("bos", "eos", "eot", "padding", ...); None where there is none."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    default = DEFAULT_IDS.get(metadata.get("tokenizer.ggml.model"), {}).get(name)
    i, count = metadata.get(f"tokenizer.ggml.{name}_token_id", default), len(tokens)
    if i is not None and not (type(i) is int and 0 <= i < count):
        raise UserError(f"{path}: its {name} token has id {i!r}, but there are {count} tokens; get it again")
    return i


def _turn_ends(metadata: dict) -> list[int]:
    """Ids of the control tokens that end a turn by their spelling, where the file names none."""
    if "tokenizer.ggml.eot_token_id" in metadata:
        return []
    types = metadata.get("tokenizer.ggml.token_type", ())
    return [i for i, (token, kind) in enumerate(zip(metadata["tokenizer.ggml.tokens"], types))
            if token in TURN_ENDS and kind in (CONTROL, USER_DEFINED)]


def write_tokenizer(metadata: dict, path: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and, if the file has one,
    chat_template.jinja into `folder`. `path` names the GGUF file in errors."""
    build_tokenizer(metadata, path).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(metadata, in_gguf, path) for name, in_gguf in names.items()}
    write_json(folder / "tokenizer_config.json", {
        # Not the family's own class (GPT2Tokenizer, Qwen2Tokenizer): those rebuild the pre-tokenizer themselves.
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **{name: metadata["tokenizer.ggml.tokens"][i] for name, i in ids.items() if i is not None}})
    # BOS, PAD and every id that ends a reply (end of text, of turn, of message), by Hugging Face's names
    bos, pad, *ends = (token_id(metadata, name, path) for name in ("bos", "padding", "eos", "eot", "eom"))
    ends = list(dict.fromkeys(i for i in (*ends, *_turn_ends(metadata)) if i is not None))
    found = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad,
             "suppress_tokens": metadata.get("tokenizer.ggml.suppress_tokens")}
    write_json(folder / "generation_config.json", {name: value for name, value in found.items() if value is not None})
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write a file of settings as `transformers` lays it out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
