"""What a checkpoint's files say about talking with it: chat template, special tokens, the ids that end a reply.

Several files say it, and they often disagree. Read as `transformers` reads them: a template's `bos_token` and its like
are the tokenizer's (never the ids in config.json), and a reply ends where generation_config.json says, or config.json
where that says nothing. Every stage asks here, and a bundle's manifest keeps the answers.
"""

import json
from pathlib import Path

from models.network.config import ModelConfig
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError
from runtime.files import LARGEST_TOKENIZER, read_json
from runtime.template import ChatTemplate
from runtime.text import Tokenizer
from runtime.token_ids import pad_id, token_id, token_ids

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TEMPLATES = "additional_chat_templates"       # folder of those with other names
_SAID_BY = {        # `transformers` gives these classes special tokens where tokenizer_config.json names none
    "Qwen2Tokenizer": {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "GPT2Tokenizer": {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}}
_CLASS_OF = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}      # by model_type


def tokenizer_file(folder: Path) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; make one with python -m models.tokenizer train")
    return folder / "tokenizer.json"


def tokenizer_facts(folder: Path) -> tuple[int, int]:
    """(EOS id, vocabulary size) of a tokenizer folder."""
    tokenizer = Tokenizer(folder / "tokenizer.json")
    eos = tokenizer.token_id(special_tokens(folder).get("eos_token", "<|endoftext|>"))
    if eos is None:
        raise UserError(f"{folder / 'tokenizer_config.json'}: no eos_token that tokenizer.json knows; add one to end documents with")
    return eos, len(tokenizer)


def special_tokens(folder: Path) -> dict[str, str]:
    """Name -> text of the special tokens that the folder's tokenizer names, as a chat template knows them."""
    config = _optional(folder / "tokenizer_config.json")
    said = _named(config)
    if "added_tokens_decoder" not in config:
        said |= _named(_optional(folder / "special_tokens_map.json"))
    tokens = _SAID_BY.get(_tokenizer_class(folder, config), {}) | said
    for name, value in tokens.items():
        tokens[name] = value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str | None):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is {value!r:.60}, which should be a text")
    return {name: value for name, value in tokens.items() if value is not None}


def _named(config: dict) -> dict:
    """What a file says of special tokens, those by names of the model's own included (image_token)."""
    extra = config.get("extra_special_tokens")
    return {name: value for name, value in config.items() if name in NAMES or name.endswith("_token") and isinstance(value, str | dict)} \
        | (extra if isinstance(extra, dict) else {})


def _tokenizer_class(folder: Path, config: dict) -> str | None:
    """The class that `transformers` would open the tokenizer with; None: its general one."""
    hf = _optional(folder / "config.json")
    own, known = config.get("tokenizer_class") or hf.get("tokenizer_class"), _CLASS_OF.get(hf.get("model_type"))
    name = own.removesuffix("Fast") if isinstance(own, str) else known
    if name == "LlamaTokenizer":           # which declares this and splits by bytes, is no Llama's of old
        parts = [_optional(folder / "tokenizer.json").get(part) for part in ("pre_tokenizer", "decoder")]
        return None if '"ByteLevel"' in json.dumps(parts) else name
    return name


def special_ids(config: ModelConfig, folder: Path) -> dict:
    """bos_token_id and pad_token_id, config.json's first, and eos_token_ids, the tokens that end a reply,
    generation_config.json's first: as a manifest has them. Raises UserError where that file gives something else for one."""
    file = folder / "generation_config.json"
    told = _optional(file)

    def said(name: str, check):
        return check(told.get(name), config.vocab_size, f"{file}: {name}")

    bos, pad, ends = said("bos_token_id", token_id), said("pad_token_id", pad_id), said("eos_token_id", token_ids)
    return {"bos_token_id": bos if config.bos_token_id is None else config.bos_token_id,
            "eos_token_ids": list(config.eos_token_ids if told.get("eos_token_id") is None else ends),
            "pad_token_id": pad if config.pad_token_id is None else config.pad_token_id}


def named_templates(folder: Path) -> dict[str, str]:
    """Name -> text of a checkpoint's chat templates: chat_template.jinja, else what tokenizer_config.json or
    chat_template.json says, is the "default"; more by name are there or in additional_chat_templates. {}: it has none.
    Raises UserError."""
    file = folder / "chat_template.jinja"
    try:
        found = file.read_text("utf-8") if file.is_file() else _optional(folder / "tokenizer_config.json").get("chat_template")
        found = _optional(folder / "chat_template.json").get("chat_template") if found is None else found
        if isinstance(found, list):                   # an older form
            found = {entry["name"]: entry["template"] for entry in found}
        more = {path.stem: path.read_text("utf-8") for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
        templates = (found if isinstance(found, dict) else {} if found is None else {"default": found}) | more
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: the chat template cannot be read ({error}); mend it there") from None
    if any(not isinstance(text, str) for text in templates.values()):
        raise UserError(f"{folder}: the chat template cannot be read (it is no text); mend it there")
    return templates


def template_source(folder: Path) -> str | None:
    """The chat template that every stage and the bundle use; None: there is none. Of several by name the default, and
    the one for tools where tools are given. Raises UserError."""
    templates = named_templates(folder)
    if templates and "default" not in templates:
        raise UserError(f"{folder}: has chat templates of the names {', '.join(map(str, templates))}, but no default; put the one to "
                        "use there as chat_template.jinja")
    if "tool_use" not in templates:
        return templates.get("default")
    # Whitespace as if each stood alone: a tag's own line end is not shown, and the empty text keeps the last line's spaces.
    return ("{% if tools is not none %}\n" + templates["tool_use"].removesuffix("\n") + "{{ '' }}{% else %}\n"
            + templates["default"].removesuffix("\n") + "{{ '' }}{% endif %}")


def chat_encoder(folder: Path, tokenizer: Tokenizer) -> ChatEncoder | None:
    """A checkpoint's chat template with its tokenizer; None: it has no template. Raises UserError."""
    source = template_source(folder)
    template = None if source is None else ChatTemplate(source, f"{folder}: chat template", special_tokens(folder))
    return template and ChatEncoder(template, tokenizer)


def _optional(file: Path) -> dict:
    """A JSON file of a checkpoint that need not be there."""
    return read_json(file, strict=False, largest=LARGEST_TOKENIZER) if file.is_file() else {}
