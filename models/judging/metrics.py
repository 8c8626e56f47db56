"""Metrics of a model's answers, and the interval that belongs beside each.

Every function takes per-example lists and gives per-example scores (`exact_match`, `token_f1`, `rouge`, `meteor`), or
a corpus score that is not a mean (`bleu`, `chrf`, `classification`). `bootstrap` turns either into a 95% interval.

Sources: SQuAD's exact match and F1 (Rajpurkar et al. 2016); ROUGE (Lin 2004) through `rouge-score`; BLEU and chrF
through `sacrebleu` (Post 2018); METEOR (Banerjee and Lavie 2005) through `nltk`; the percentile bootstrap (Efron 1979).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

WORDNET = Path("/usr/share/wordnet")    # where Debian's package wordnet-base puts the dictionary METEOR looks synonyms up in


def bootstrap(items: Sequence, statistic: Callable[[Sequence], float] = np.mean, *, resamples: int = 1000,
              confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic`, called on lists of examples drawn from `items` with replacement.

    One example or none gives an interval of (nan, nan): nothing is known of its spread.
    """
    n = len(items)
    if n < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = [statistic([items[i] for i in rng.integers(n, size=n)]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ---- question answering ---------------------------------------------------------------------------------------------

def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no English articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_tokens(text: str) -> list[str]:
    """Words of a normalized answer; each Han, kana or Hangul character counts as a word, as those have no spaces."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+",
                      normalize_answer(text))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 when the normalized answer equals one of the normalized references."""
    return float(any(normalize_answer(answer) == normalize_answer(r) for r in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of shared words over the references (SQuAD)."""
    def f1(a: list[str], b: list[str]) -> float:
        if not a or not b:
            return float(a == b)
        shared = sum((Counter(a) & Counter(b)).values())
        return 2 * shared / (len(a) + len(b))
    return max(f1(answer_tokens(answer), answer_tokens(r)) for r in references)


# ---- generation -----------------------------------------------------------------------------------------------------

def rouge(answer: str, references: Sequence[str], kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL")) -> dict[str, float]:
    """F-measures of ROUGE against the best reference, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer
    words = SimpleNamespace(tokenize=answer_tokens)           # its own tokenizer drops everything but a-z and 0-9
    scores = RougeScorer(list(kinds), tokenizer=words).score_multi(list(references), answer)
    return {kind: scores[kind].fmeasure for kind in kinds}


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], *, chinese: bool = False) -> float:
    """Corpus BLEU, 0 to 100, against all references of an answer; `chinese` splits Han text into characters."""
    from sacrebleu.metrics import BLEU
    streams = [[right[n] if n < len(right) else None for right in references] for n in range(max(map(len, references)))]
    return BLEU(tokenize="zh" if chinese else "13a", effective_order=False).corpus_score(list(answers), streams).score


def self_bleu(answers: Sequence[str]) -> float:
    """Mean BLEU of each answer against all others, 0 to 100: the higher, the more they are alike (Zhu et al. 2018). Of more
    than 50 answers the first 50."""
    from sacrebleu.metrics import BLEU
    one, kept = BLEU(effective_order=True), list(answers[:50])
    if len(kept) < 2:
        return float("nan")
    return float(np.mean([one.sentence_score(answer, kept[:n] + kept[n + 1:]).score for n, answer in enumerate(kept)]))


def distinct(answers: Sequence[str], n: int) -> float:
    """Share of different runs of n words among all of them, 0 to 1 (Li et al. 2016); nan where there is none."""
    runs = [tuple(words[i:i + n]) for words in map(answer_tokens, answers) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else float("nan")


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF (character F-score, beta 2), 0 to 100, against the first reference of each."""
    from sacrebleu.metrics import CHRF
    return CHRF().corpus_score(list(answers), [[right[0] for right in references]]).score


@cache
def wordnet():
    """WordNet as METEOR wants it, from Debian's wordnet-base, or a stand-in that knows no synonyms: METEOR then matches
    exact words and stems only."""
    if not (WORDNET / "data.noun").is_file():
        return SimpleNamespace(synsets=lambda word: [])
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    return WordNetCorpusReader(str(WORDNET), None)


def meteor(answer: str, reference: str) -> float:
    """METEOR of one answer, 0 to 1; synonyms count only where WordNet is installed."""
    from nltk.translate.meteor_score import single_meteor_score
    return float(single_meteor_score(answer_tokens(reference), answer_tokens(answer), wordnet=wordnet()))


# ---- classification -------------------------------------------------------------------------------------------------

def classification(predicted: Sequence[str], actual: Sequence[str]) -> dict:
    """Accuracy, macro-averaged precision, recall and F1, and the confusion matrix (rows: actual, columns: predicted)."""
    labels, pairs = sorted({*actual, *predicted}), Counter(zip(actual, predicted, strict=True))
    matrix = np.array([[pairs[a, p] for p in labels] for a in labels])
    hits = np.diag(matrix).astype(np.float64)
    precision = hits / np.maximum(matrix.sum(0), 1)
    recall = hits / np.maximum(matrix.sum(1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"accuracy": float(hits.sum() / max(matrix.sum(), 1)), "precision": float(precision.mean()),
            "recall": float(recall.mean()), "macro_f1": float(f1.mean()), "matthews": _matthews(matrix.astype(np.float64)),
            "labels": labels, "confusion": matrix.tolist()}


def _matthews(matrix: np.ndarray) -> float:
    """Matthews' correlation of many classes (Gorodkin 2004); 0 where one side knows one label only."""
    count, actual, predicted = matrix.sum(), matrix.sum(1), matrix.sum(0)
    spread = (count**2 - predicted @ predicted) * (count**2 - actual @ actual)
    return float((np.trace(matrix) * count - actual @ predicted) / np.sqrt(spread)) if spread else 0.0


# ---- numbers --------------------------------------------------------------------------------------------------------

def pearson(predicted: Sequence[float], actual: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant, as in a bootstrap of few."""
    a, b = (np.asarray(x, np.float64) - np.mean(x) for x in (predicted, actual))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else 0.0


def spearman(predicted: Sequence[float], actual: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""
    def ranks(values):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]
    return pearson(ranks(predicted), ranks(actual))


# ---- entities -------------------------------------------------------------------------------------------------------

def entities(predicted: Sequence[Sequence], actual: Sequence[Sequence]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of the entities of each text, any hashable (kind, first, end), or (kind, name).
    Of spans that is what seqeval calls f1_score; an entity listed twice must be there twice."""
    found, wanted = [Counter(some) for some in predicted], [Counter(some) for some in actual]
    hits = sum((a & b).total() for a, b in zip(found, wanted, strict=True))
    told, there = (sum(some.total() for some in side) for side in (found, wanted))
    return {"precision": hits / told if told else 0.0, "recall": hits / there if there else 0.0,
            "f1": 2 * hits / (told + there) if told + there else 0.0}
