"""An encoder that a server has: the folder that `python -m export.onnx MODEL -o OUT --task sentence-similarity` writes, on ONNX Runtime.

Texts become one vector each, normalized. Rows of one call are padded to the longest of them, so rows of like length go together.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from ..bundle import MANIFEST
from ..errors import UserError, pip_line, shown
from ..files import read_json
from ..machine import cpu_threads
from ..text import Tokenizer

GRAPH, OUTPUT = "model.onnx", "sentence_embedding"
_MOST_TOKENS, _MOST_ROWS = 4096, 64               # padded tokens and rows of one call
_SHIFTED = ("roberta", "xlm-roberta", "mpnet")    # whose positions begin behind the padding's id


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an exported encoder, and no bundle."""
    return (folder / GRAPH).is_file() and not (folder / MANIFEST).is_file()


class Encoder:
    """Raises UserError for a folder that gives no embeddings, or damaged files.

    name: of its folder. vocab: token ids there are. context: tokens of an input at most, those around it included. size: of an
    embedding.
    """

    def __init__(self, folder: Path, threads: int | None = None):
        self.folder, self.name, self.created = folder, folder.resolve().name, int((folder / GRAPH).stat().st_mtime)
        config = read_json(folder / "config.json", strict=False)
        sizes = [config.get("vocab_size"), config.get("max_position_embeddings"), config.get("pad_token_id") or 0]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise UserError(f"{folder / 'config.json'}: vocab_size, max_position_embeddings and pad_token_id are {shown(sizes)}; "
                            "export the model again")
        self.vocab, self.context, self._pad = sizes
        if config.get("model_type") in _SHIFTED:
            self.context -= self._pad + 1
        self.tokenizer = Tokenizer(folder / "tokenizer.json")
        self._before, self._behind = self._around()
        self._session, self._turn = self._open(threads), threading.Lock()
        self.size = self._session.get_outputs()[0].shape[-1]
        self._types = any(put.name == "token_type_ids" for put in self._session.get_inputs())
        self.size_bytes = sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))

    @property
    def there(self) -> bool:
        """As of a model: whether it can be asked for."""
        return True

    def tokens(self, given: str | list[int]) -> np.ndarray:
        """int64 ids of a text or of token ids, with those that the tokenizer puts around a text."""
        if isinstance(given, str):
            return self.tokenizer.encode(given)
        inner, before, behind = list(given), self._before, self._behind
        if inner[:len(before)] == before and inner[len(inner) - len(behind):] == behind and len(inner) >= len(before) + len(behind):
            return np.array(inner, np.int64)
        return np.array([*before, *inner, *behind], np.int64)

    def batches(self, inputs: list[np.ndarray]) -> list[list[int]]:
        """Which inputs go together into a call of `embed`: their numbers, the shortest first."""
        found: list[list[int]] = []
        for number in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
            if not found or len(found[-1]) >= _MOST_ROWS or (len(found[-1]) + 1) * len(inputs[number]) > _MOST_TOKENS:
                found.append([])
            found[-1].append(number)
        return found

    def embed(self, inputs: list[np.ndarray]) -> np.ndarray:
        """float32 [n, size] of n inputs (int64 ids, not empty), in one call."""
        ids = np.full((len(inputs), max(map(len, inputs))), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, :len(tokens)], mask[row, :len(tokens)] = tokens, 1
        feeds = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": np.zeros_like(ids)} if self._types else {})
        with self._turn:                          # two at once would be slower than one after the other
            return self._session.run([OUTPUT], feeds)[0]

    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and behind a text's own."""
        whole, inner = self.tokenizer.encode("a").tolist(), self.tokenizer.encode("a", special_tokens=False).tolist()
        first = next((i for i in range(len(whole)) if whole[i:i + len(inner)] == inner), 0)
        return whole[:first], whole[first + len(inner):]

    def _open(self, threads: int | None):
        path = self.folder / GRAPH
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: an encoder runs on ONNX Runtime: {pip_line('cpu')}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = cpu_threads(threads), 3
        options.enable_cpu_mem_arena = False
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:                # one class per ORT status, with no useful common one
            raise UserError(f"{path}: ONNX Runtime cannot load it ({' '.join(str(error).split())[:200]}); export the model again") from None
        if [put.name for put in session.get_outputs()] != [OUTPUT]:
            raise UserError(f"{path}: gives {', '.join(put.name for put in session.get_outputs())} and no embeddings of texts; export "
                            "the model with --task sentence-similarity")
        return session
