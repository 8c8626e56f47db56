"""The byte-level BPE tokenizer of a GGUF file as Hugging Face's tokenizer files.

A GGUF file holds a vocabulary, merges, special ids and the *name* of a pre-tokenizer; what that name means is known
only to llama.cpp (src/llama-vocab.cpp) and to the tokenizer.json the name was derived from. The four names below are
written out as in those tokenizer.json files. Where the two disagree (Qwen2's NFC normalization, which llama.cpp leaves
out), tokenizer.json is followed, because the model was trained with it.

Not read: tokenizers of another kind (SentencePiece "llama", "bert", "t5") and other pre-tokenizers; both are refused.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from runtime.errors import UserError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5                                    # gguf.TokenType
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _split(digits: str):
    """GPT-4's word pattern, with runs of digits cut into pieces of `digits` ("1" or "1,3")."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % digits), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": lambda: _split("1,3"),
    "qwen2": lambda: _split("1"),
}


def build_tokenizer(metadata: dict, path: Path) -> Tokenizer:
    """The tokenizer that the `tokenizer.*` keys of a GGUF file's `metadata` describe.

    Control tokens become special added tokens, user-defined ones plain added tokens; placeholders for unused ids are
    left out. BOS and EOS are added around a text where the file says so. Raises UserError.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(f"{path}: its tokenizer is of the kind {kind!r}; only byte-level BPE ('gpt2') is read from "
                        "GGUF, so get the model as a Hugging Face folder")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{path}: its pre-tokenizer {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}; get the model "
                        "as a Hugging Face folder")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens or ()))
    if not tokens or merges is None or len(types) != len(tokens):
        raise UserError(f"{path}: its tokenizer is incomplete (tokens, token types or merges are missing)")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    try:
        model = models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges],
                           ignore_merges=pre == "llama-bpe")   # Llama 3: a word in the vocabulary is one token
    except Exception as error:                                 # tokenizers raises bare Exception
        raise UserError(f"{path}: its merges do not fit its vocabulary ({str(error).splitlines()[0]:.200})") from None
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)
                          for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)])
    if processor := _post_processor(metadata, path):
        tokenizer.post_processor = processor
    return tokenizer


def _post_processor(metadata: dict, path: Path):
    wanted = {"bos": metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.pre"] == "llama-bpe"),
              "eos": metadata.get("tokenizer.ggml.add_eos_token", False)}
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
    i, count = metadata.get(f"tokenizer.ggml.{name}_token_id"), len(metadata.get("tokenizer.ggml.tokens", ()))
    if i is not None and not (type(i) is int and 0 <= i < count):
        raise UserError(f"{path}: its {name} token has id {i!r}, but there are {count} tokens; get it again")
    return i


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
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    found = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad}
    write_json(folder / "generation_config.json", {name: value for name, value in found.items() if value is not None})
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write a file of settings as `transformers` lays it out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
