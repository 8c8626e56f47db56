"""Where several commands of compress keep a teacher's predictions."""

from pathlib import Path

TEACHER_CACHE = Path("~/.cache/edgewright/teacher")
