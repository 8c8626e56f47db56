"""Tiny encoders with random weights, as transformers saves them, with a tokenizer of letters."""

from pathlib import Path

import tokenizers
import torch
import transformers

HEADS = {"text-classification": "AutoModelForSequenceClassification", "token-classification": "AutoModelForTokenClassification",
         "question-answering": "AutoModelForQuestionAnswering", "feature-extraction": "AutoModel"}
SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=64)


def tokenizer_of_letters(folder: Path) -> None:
    """A tokenizer.json of 99 tokens, [CLS] and [SEP] around them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(c) for c in range(97, 123)), *(f"##{chr(c)}" for c in range(97, 123))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


def tiny(folder: Path, task: str, model_type: str = "bert") -> Path:
    torch.manual_seed(0)
    names = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 99} if model_type == "distilbert" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **names, num_labels=3 if "classification" in task else 2)
    model = getattr(transformers, HEADS[task]).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer_of_letters(folder)
    return folder
