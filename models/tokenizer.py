"""Train a byte-level BPE tokenizer: `python -m models.tokenizer train --data FILES -o FOLDER --vocab-size 8192`.

Writes a folder with `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (ChatML), which `transformers`
and every stage here open. Byte-level (GPT-2; Radford et al. 2019): any text goes through and comes back unchanged.
Digits are split one by one, as in SmolLM2. Special tokens come first: <|endoftext|> (0: BOS, EOS and PAD), <|im_start|>
(1), <|im_end|> (2). Documents are read and cleaned as for `models.train`.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from models.formats import lineage
from models.data.corpus import DataOptions, read_documents
from models.data.records import find_sources, source_digest
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import new_folder

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
          "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
EXAMPLES = """examples:
  python -m models.tokenizer train --data ../shared/data/text/sotu-train.txt -o build/sotu-tokenizer --vocab-size 4096
"""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(DataOptions):
    """Train a byte-level BPE tokenizer on text."""
    action: str = arg(positional=True, choices=("train",), help="what to do")
    out: Path = arg(short="-o", help="folder to write; must not exist")
    vocab_size: int = arg(8192, help="tokens, special tokens and the 256 bytes included")
    min_frequency: int = arg(2, help="a pair must occur this often to be merged", least=1)


def train_tokenizer(options: TokenizerOptions) -> None:
    """Read the documents, learn the merges, write the folder. Raises UserError for data or options of no use."""
    if options.out.exists():
        raise UserError(f"{options.out} already exists; choose another -o or remove it")
    if options.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {options.vocab_size}: bytes and special tokens alone are {SMALLEST_VOCABULARY}")
    counts: Counter = Counter()
    sources = find_sources(options.data)
    tokenizer = learned(read_documents(options, sources, counts, "read"), options.vocab_size, options.min_frequency)
    if not counts["kept"]:
        raise UserError(f"{options.data[0]}: cleaning left no document: {dict(counts)}")
    inputs = {source: source_digest(source) for source in sources}
    with new_folder(options.out) as folder:
        write_files(folder, tokenizer)
        lineage.write(folder, [lineage.stage("tokenizer", options, inputs, dict(counts))])
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens from {counts['kept']} documents")


def learned(documents: Iterable[str], vocab_size: int = SMALLEST_VOCABULARY, min_frequency: int = 2) -> Tokenizer:
    """A tokenizer of the special tokens, the 256 bytes and what is merged in `documents`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_files(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's files, as every stage here and `transformers` read them."""
    end = SPECIAL_TOKENS[0]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end,
              "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHATML)


def main(argv=None) -> int:
    return run(TokenizerOptions, train_tokenizer, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
