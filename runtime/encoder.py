"""Vectors, labels and entities of texts: an encoder's bundle on ONNX Runtime or TensorRT, without torch.

    with Encoder("build/minilm") as encoder:
        encoder.embed(["A cat sits.", "A dog runs."])            # float32 [2, size]
        encoder.similarity(["A cat sits."], ["A cat is sitting."])   # float32 [1], cosines
        encoder.classify(["a fine film"])                        # [Label("positive", 0.98, {...})]; pairs of texts as tuples
        encoder.entities(["Ada Lovelace lived in London."], stride=64)   # with the characters they stand at

Texts of like length go through the graph together, padded to the longest of them. One longer than the model's positions is cut, and
`truncated` counts those; entities are also found by windows that overlap by `stride` tokens, each token judged in the window where it
stands farthest from an edge. A control token that a text spells is text. Threads may share an Encoder: calls take turns.

CPU, and ONNX Runtime's CUDA provider and TensorRT (both built, never run): the best that can be had, unless one is asked for. One that
fails while it runs is stepped down from, for good; `explain()` says why. The "fast" graph of a quantized bundle is for the CPU alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .encoder_bundle import BY_TOKEN, TASKS, EncoderBundle, open_encoder
from .entities import Entity, entities, word_starts
from .errors import DeviceError, Unavailable, UserError, pip_line, shown
from .machine import cpu_threads, has_vnni
from .onnx_files import check_external_data
from .text import Tokenizer

if TYPE_CHECKING:
    from .trt_encoder import TrtEncoder

_MOST_ROWS = 64                                   # of one call
_MOST_TOKENS = {"cpu": 256, "cuda": 4096}         # padded ones: as many as a CPU's caches hold the activations of; more are slower there
PROVIDERS = ("tensorrt", "cuda", "cpu")            # best first
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Label:
    """The likeliest label, its probability, and that of every label."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Encoded:
    """A text, or a pair, as the graph takes it: ids and types int64 [n]. offsets: characters of each id, (0, 0) of those around the
    text. cut: whether tokens were left out."""

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """Texts and pairs as token ids, with what the tokenizer puts around them, at most max_tokens of them. What training gives the
    network too."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.before, self.behind = tokenizer.around()
        self.pair = tokenizer.around_pair()

    def __call__(self, given: Text) -> Encoded:
        """Of a pair, the longer text is cut first."""
        if isinstance(given, str):
            return self.around(*self.inner(given))
        texts = [self.inner(text) for text in given]
        before, middle, behind, kind = self.pair
        room = self.max_tokens - len(before) - len(middle) - len(behind)
        sizes = [len(ids) for ids, _ in texts]
        if cut := sum(sizes) > room:
            short = min(min(sizes), room // 2)
            sizes = [short, room - short] if sizes[0] <= sizes[1] else [room - short, short]
        (a, at_a), (b, at_b) = ((ids[:size], places[:size]) for (ids, places), size in zip(texts, sizes))
        ids = np.concatenate((before, a, middle, b, behind)).astype(np.int64)
        types = np.full(len(ids), kind, np.int64)
        types[:len(before) + len(a) + (len(middle) if len(middle) == 1 else len(middle) // 2)] = 0
        return Encoded(ids, types, np.concatenate([_nowhere(before), at_a, _nowhere(middle), at_b, _nowhere(behind)]), cut)

    def inner(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids and offsets of a text's own tokens, all of them."""
        return self.tokenizer.encode_with_offsets(text)

    @property
    def room(self) -> int:
        """A text's own tokens at most."""
        return self.max_tokens - len(self.before) - len(self.behind)

    def around(self, ids: np.ndarray, offsets: np.ndarray) -> Encoded:
        """A text's own tokens, those that fit, with what stands around them."""
        kept = ids[:self.room]
        whole = np.concatenate((self.before, kept, self.behind)).astype(np.int64)
        places = np.concatenate((_nowhere(self.before), offsets[:self.room], _nowhere(self.behind)))
        return Encoded(whole, np.zeros(len(whole), np.int64), places, len(ids) > len(kept))


class Encoder:
    """An opened encoder.

    provider: one of PROVIDERS; None: the first of them that can be had. threads: CPU threads; None: the CPUs this process may use.
    verify: compare every file's sha256 first. role: of the graph; None: "fast" where the bundle has it, on the CPU.
    Raises UserError for a folder that cannot be used, CheckFailed for a changed file.
    """

    def __init__(self, folder: str | Path, *, provider: str | None = None, threads: int | None = None, verify: bool = False,
                 role: str | None = None):
        if provider not in (None, *PROVIDERS):
            raise UserError(f"provider is {shown(provider)}; an encoder runs on {', '.join(PROVIDERS[:-1])} or {PROVIDERS[-1]}")
        self.bundle: EncoderBundle = open_encoder(folder, verify=verify)
        self.truncated = 0                        # texts that were cut so far
        self._encode = TextEncoder(Tokenizer(self.bundle.path(self.bundle.manifest["tokenizer"])), self.bundle.max_tokens)
        self._turn, self._output = threading.Lock(), TASKS[self.bundle.task]
        self._threads, self._role, self._reasons = cpu_threads(threads), role, []
        self._left = [provider] if provider else [name for name in PROVIDERS if name != "tensorrt" or self.bundle.manifest["engines"]]
        self._open()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Give the graph's memory back."""
        self._graph = None

    def explain(self) -> str:
        """What computes and, line by line, why nothing better does."""
        return "\n".join([self.runs_as, *self._reasons])

    @property
    def runs_as(self) -> str:
        """What computes, in words."""
        return f"engine of the {self.role} graph on tensorrt" if self.provider == "tensorrt" else f"{self.role} graph on {self.provider}"

    @property
    def device(self) -> str:
        """"cpu" or "cuda": where it computes."""
        return "cpu" if self.provider == "cpu" else "cuda"

    @property
    def tokenizer(self) -> Tokenizer:
        return self._encode.tokenizer

    @property
    def size(self) -> int:
        """Numbers of an embedding."""
        self._needs("sentence-similarity", what="embeddings")
        return self._graph.size

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, size]: a vector of length 1 each (of as many numbers as the model has channels)."""
        self._needs("sentence-similarity", what="embeddings")
        rows = self.outputs(texts)
        return np.array(rows, np.float32) if rows else np.zeros((0, self.size), np.float32)

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """float32 [n]: the cosine of a[i]'s and b[i]'s embeddings."""
        if len(a) != len(b):
            raise UserError(f"similarity of {len(a)} texts and {len(b)}: give as many of both")
        both = self.embed([*_texts(a), *_texts(b)])
        return (both[:len(a)] * both[len(a):]).sum(1)

    def classify(self, texts: Sequence[Text]) -> list[Label]:
        """The label of each text, or of each pair of texts where the model learned pairs."""
        self._needs("text-classification", what="labels of texts")
        found = []
        for logits in self.outputs(texts):
            p = _softmax(logits)
            best = int(p.argmax())
            found.append(Label(self.bundle.labels[best], float(p[best]), dict(zip(self.bundle.labels, p.tolist()))))
        return found

    def regress(self, texts: Sequence[Text]) -> np.ndarray:
        """float32 [n]: the number that the model learned to give each text or pair."""
        self._needs("regression", what="numbers for texts")
        return np.array([float(output[0]) for output in self.outputs(texts)], np.float32)

    def entities(self, texts: Sequence[str], stride: int | None = None) -> list[list[Entity]]:
        """The entities of each text. stride: tokens by which the windows of a long text overlap; None: it is cut."""
        self._needs("token-classification", what="entities")
        room, windows, owners = self._encode.room, [], []
        if stride is not None and (not isinstance(stride, int) or not 0 <= stride < room):
            raise UserError(f"stride is {shown(stride)}; it must be a whole number from 0 to {room - 1}, less than a window's tokens")
        inner = [self._encode.inner(text) for text in _texts(texts)]
        for number, (ids, offsets) in enumerate(inner):
            step = room - (stride or 0)
            starts = [0] if stride is None else range(0, max(1, len(ids) - (stride or 0)), step)
            for start in starts:
                stop = len(ids) if stride is None else min(len(ids), start + room)
                windows.append(self._encode.around(ids[start:stop], offsets[start:stop]))
                owners.append((number, start))
        judged: list[list[tuple[int, np.ndarray]]] = [[] for _ in inner]
        for (number, start), logits in zip(owners, self.run(windows)):
            judged[number].append((start, logits[len(self._encode.before):len(logits) - len(self._encode.behind)]))
        return [self._entities(text, offsets, parts) for text, (_, offsets), parts in zip(texts, inner, judged)]

    def _entities(self, text: str, offsets: np.ndarray, parts: list[tuple[int, np.ndarray]]) -> list[Entity]:
        p, margin = np.zeros((len(offsets), len(self.bundle.labels))), np.full(len(offsets), -1)
        for start, logits in parts:
            tokens = np.arange(len(logits))
            deep = np.minimum(tokens, len(logits) - 1 - tokens)
            deep[:len(logits) // 2] += len(offsets) * (start == 0)               # the text's own edges are none
            better = deep > margin[start:start + len(logits)]
            p[start:start + len(logits)][better], margin[start:start + len(logits)][better] = _softmax(logits)[better], deep[better]
        first = [token for token in word_starts(text, offsets.tolist()) if margin[token] >= 0]
        ends = [*first[1:], int((margin >= 0).sum())]
        places = [(int(offsets[a][0]), int(offsets[b - 1][1])) for a, b in zip(first, ends)]
        best = p[first].argmax(1) if first else []
        return entities(text, places, [self.bundle.labels[i] for i in best], [float(p[token, i]) for token, i in zip(first, best)])

    def outputs(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """The graph's first output of each text or pair, float32: what embed, classify and regress are made of."""
        return self.run([self._encode(text) for text in _texts(texts, pairs=True)])

    def run(self, encoded: list[Encoded]) -> list[np.ndarray]:
        """The graph's first output of each text, in the order given; of a text's tokens without the padding."""
        self.truncated += sum(one.cut for one in encoded)
        by_token = self.bundle.task in BY_TOKEN
        found: list[np.ndarray] = [None] * len(encoded)
        for numbers in self.batches(list(map(len, encoded))):
            rows = self.call([encoded[number] for number in numbers])
            for number, row in zip(numbers, rows):
                found[number] = row[:len(encoded[number])] if by_token else row
        return found

    def batches(self, lengths: list[int]) -> list[list[int]]:
        """Which texts of so many tokens go together into a call: their numbers, the shortest first."""
        found: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if not found or len(found[-1]) >= _MOST_ROWS or (len(found[-1]) + 1) * lengths[number] > _MOST_TOKENS[self.device]:
                found.append([])
            found[-1].append(number)
        return found

    def call(self, encoded: list[Encoded]) -> np.ndarray:
        """The graph's first output [n, ...] of n texts, in one call."""
        if self._graph is None:
            raise UserError(f"{self.bundle.folder}: this encoder was closed; open the bundle again with Encoder()")
        ids, mask, types = padded(encoded, self.bundle.manifest["model"]["pad_token_id"])
        feeds = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if "token_type_ids" in self._graph.inputs else {})
        with self._turn:                          # two at once would be slower than one after the other
            while True:
                try:
                    return self._graph.run(feeds)
                except DeviceError as error:
                    if not self._left:
                        raise
                    self._step_down(error)
                    self._open()

    def _needs(self, task: str, what: str) -> None:
        if self.bundle.task != task:
            raise UserError(f"{self.bundle.folder} is a model for {self.bundle.task} and gives no {what}, which one for {task} does")

    def _open(self) -> None:
        """The first of the providers left that can be had. Raises UserError, of the last or of a mistake."""
        while True:
            self.provider = self._left.pop(0)
            try:
                self.role, self._graph = getattr(self, f"_open_{self.provider}")()
                return
            except Unavailable as error:
                if not self._left:
                    raise
                self._step_down(error)

    def _step_down(self, error: Unavailable) -> None:
        from .backends import step_down           # which brings the native core
        self._reasons.append(step_down(self.provider, error))

    def _open_tensorrt(self) -> tuple[str, TrtEncoder]:
        from .trt_encoder import TrtEncoder
        if self._role not in (None, "portable"):
            raise Unavailable(f"engines are of the portable graph, and the {self._role} one is asked for")
        return "portable", TrtEncoder(self.bundle, self._output)

    def _open_cuda(self) -> tuple[str, _OnnxGraph]:
        from .cuda_opening import usable_onnxruntime
        return "portable", self._onnx_graph("portable", usable_onnxruntime(), "CUDAExecutionProvider")

    def _open_cpu(self) -> tuple[str, _OnnxGraph]:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{self.bundle.folder}: an encoder runs on ONNX Runtime: {pip_line('cpu')}") from None
        role = self._role or ("fast" if self.bundle.graph("fast") else "portable")
        return role, self._onnx_graph(role, onnxruntime, "CPUExecutionProvider")

    def _onnx_graph(self, role: str, onnxruntime, provider: str) -> _OnnxGraph:
        graph = self.bundle.graph(role)
        if graph is None:
            roles = ", ".join(graph["role"] for graph in self.bundle.manifest["graphs"])
            raise UserError(f"{self.bundle.folder}: has no {shown(role)} graph; it has {roles}")
        path = self.bundle.path(graph["file"])
        check_external_data(self.bundle, graph["file"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self._threads, 3
        options.enable_cpu_mem_arena = False
        if role == "portable":                    # its activations are not rounded
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        elif not has_vnni():                      # there, sums of uint8 x int8 saturate unless ONNX Runtime is told
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
        except Exception as error:                # one class per ORT status, with no useful common one
            raise UserError(f"{path}: ONNX Runtime cannot load it ({' '.join(str(error).split())[:200]}); export the model again") from None
        if self._output not in [put.name for put in session.get_outputs()]:
            raise UserError(f"{path}: gives {', '.join(put.name for put in session.get_outputs())} and not {self._output}, as "
                            f"{self.bundle.task} needs; export the model again")
        return _OnnxGraph(session, self._output, self.bundle.folder)


class _OnnxGraph:
    """A session as TrtEncoder is: inputs, size, run."""

    def __init__(self, session, output: str, folder: Path):
        self._session, self._output, self._folder = session, output, folder
        self.inputs, self.size = [put.name for put in session.get_inputs()], session.get_outputs()[0].shape[-1]

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            return self._session.run([self._output], feeds)[0]
        except Exception as error:                # one class per ORT status, with no useful common one
            raise UserError(f"{self._folder}: ONNX Runtime fails on its graph ({' '.join(str(error).split())[:200]}); export the "
                            "model again") from None


def padded(encoded: list[Encoded], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, mask and types int64 [n, longest] of n texts."""
    ids = np.full((len(encoded), max(map(len, encoded))), pad, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, one in enumerate(encoded):
        ids[row, :len(one)], types[row, :len(one)], mask[row, :len(one)] = one.ids, one.types, 1
    return ids, mask, types


def _texts(texts: Sequence[Text], pairs: bool = False) -> list[Text]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise UserError(f"texts are {shown(texts)}; give a list of texts")
    for text in texts:
        pair = pairs and isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(one, str) for one in text)
        if not (isinstance(text, str) or pair):
            raise UserError(f"a text is {shown(text)}; each must be a text" + (", or a pair of texts as a tuple" if pairs else ""))
    return list(texts)


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _nowhere(ids: np.ndarray) -> np.ndarray:
    return np.zeros((len(ids), 2), np.int64)
