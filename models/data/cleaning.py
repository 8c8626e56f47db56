"""Optional cleaning of documents before they are tokenized.

In this order, each step only where asked for:

1. normalize: Unicode NFC, line ends to \\n, other control characters dropped, spaces at line ends cut.
2. length: fewer than `min_chars` or more than `max_chars` characters: dropped.
3. language: dropped unless it looks like one of `languages`. A document's script is that of most of its letters; among
   languages of the Latin script the one with most function words decides. This is a coarse filter for
   whole documents (a sentence of five words may have no function word), not language identification.
4. deduplicate: exact repetitions of an earlier document dropped (128-bit hash, 16 bytes of memory a document).
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

SCRIPTS = {"zh": "CJK", "ja": "HIRAGANA", "ko": "HANGUL", "ru": "CYRILLIC", "el": "GREEK", "ar": "ARABIC",
           "he": "HEBREW", "hi": "DEVANAGARI", "th": "THAI"}
FUNCTION_WORDS = {
    "en": "the of and to in is that was for it with as on be at by this are from or have not",
    "de": "der die und das ist nicht ein eine zu den mit von auf für im sich dem auch es an",
    "fr": "le la les des et est une un dans que qui pour pas sur au par avec ce il plus",
    "es": "el los las de que y en una por con para es del se no su al lo como más",
    "it": "il di che la per una non sono è con della dei nel gli alla da come più si anche",
    "pt": "o os de que e do da em um uma para com não por mais dos na no se como",
    "nl": "de het een van en is dat niet op te met voor zijn aan er ook als maar bij door",
}
LANGUAGES = tuple(SCRIPTS) + tuple(FUNCTION_WORDS)
SAMPLE = 4000                    # characters looked at to tell a document's language
_WORDS = {language: set(words.split()) for language, words in FUNCTION_WORDS.items()}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


STEPS = ("normalize", "min_chars", "max_chars", "languages", "deduplicate")         # the options that say what is done


def normalize(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"[ \t]+(?=\n|$)", "", _CONTROL.sub("", text))


def language_of(text: str) -> str | None:
    """The language `text` seems to be in, or None."""
    letters = [c for c in text[:SAMPLE] if c.isalpha()]
    if not letters:
        return None
    scripts = Counter(unicodedata.name(c, "?").split()[0] for c in letters)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(letters):      # Japanese mixes its kana with CJK
        return "ja"
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        return next((language for language, name in SCRIPTS.items() if name == script), None)
    words = re.findall(r"[^\W\d_]+", text[:SAMPLE].lower())
    hits = {language: sum(word in known for word in words) for language, known in _WORDS.items()}
    best = max(hits, key=hits.get)
    return best if hits[best] else None


def clean(documents: Iterable[str], options, counts: Counter) -> Iterator[str]:
    """The documents that pass; `options` has STEPS, `counts` gains "kept" and, for each reason, how many were dropped."""
    seen: set[bytes] = set()
    for text in documents:
        if options.normalize:
            text = normalize(text)
        reason = _reason_to_drop(text, options)
        if reason is None and options.deduplicate:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            reason = "repeated" if digest in seen else None
            seen.add(digest)
        counts[reason or "kept"] += 1
        if reason is None:
            yield text


def _reason_to_drop(text, options):
    if not text.strip():
        return "empty"
    if len(text) < options.min_chars:
        return "too short"
    if options.max_chars is not None and len(text) > options.max_chars:
        return "too long"
    return "other language" if options.languages and language_of(text) not in options.languages else None
