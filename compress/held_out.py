"""Text to learn from and text to be judged on, apart: the last tenth of every file is held out.

    learn, judge = split_text(options, folder)       # two JSONL files, {"text": ...} a line

Documents are read and cleaned as `options` (DataOptions) says. Within each file, in its order, the first nine tenths of
the characters are learned from; the document at the border is cut between two words. The same files give the same split.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from models.data.corpus import DataOptions, read_documents
from models.data.records import find_sources
from runtime.errors import UserError
from runtime.files import new_file

HELD_OUT = 0.1


def split_text(options: DataOptions, folder: Path) -> tuple[Path, Path]:
    """Write the two sides into `folder`. Raises UserError for data that cannot be used, or too short to split."""
    sides = folder / "learn.jsonl", folder / "held-out.jsonl"
    with (new_file(sides[1]) as judged, new_file(sides[0]) as learned,            # the last to appear says that both are there
          open(learned, "w", encoding="utf-8") as learn, open(judged, "w", encoding="utf-8") as judge):
        for source in find_sources(options.data):
            characters = sum(map(len, read_documents(options, [source], Counter(), "measure")))
            left = round(characters * (1 - HELD_OUT))
            for text in read_documents(options, [source], Counter(), "split"):
                first, second = _cut(text, left)
                left -= len(text)
                for file, part in ((learn, first), (judge, second)):
                    if part.strip():
                        file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
        if not learn.tell() or not judge.tell():
            raise UserError(f"{options.data[0]}: too little text to hold a tenth of it out: give more, or --valid FILES")
    return sides


def _cut(text: str, length: int) -> tuple[str, str]:
    """`text` in two, before the last blank within its first `length` characters; a text without blanks right there."""
    if length >= len(text) or length <= 0:
        return (text, "") if length > 0 else ("", text)
    place = max(text.rfind("\n", 0, length), text.rfind(" ", 0, length))
    if place < 0:
        place = 0 if " " in text or "\n" in text else length
    return text[:place], text[place:]
