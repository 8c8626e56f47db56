"""Write docs/files.md, the list of every source file with the first sentence of its docstring: `python docs/make_files.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"models": "the network in PyTorch, how it learns, how it is judged", "compress": "the same model, smaller",
            "export": "ONNX, TensorRT and the proof", "runtime": "what an app embeds: no PyTorch, nothing of the other packages",
            "examples": "the case studies, from data to an app that answers"}


def first_sentence(text: str) -> str:
    """Of a docstring or C comment, less the command line that it may end with."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r": `python |(?<! al)\.(?: |$)|:$", paragraph)[0].replace("|", "\\|")


def description(file: Path) -> str:
    text = file.read_text("utf-8")
    if file.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    return first_sentence(re.sub(r"\n \*", "\n", text.split("*/")[0].removeprefix("/*")))


def files_page() -> str:
    """The whole page, in Markdown."""
    parts = ["# Files\n\nWritten by `python docs/make_files.py` from the first sentence of every file."]
    for package, about in PACKAGES.items():
        files = sorted(file for kind in ("py", "c", "h") for file in (ROOT / package).rglob(f"*.{kind}"))
        rows = [f"| `{file.relative_to(ROOT)}` | {text} |" for file in files if (text := description(file))]
        parts.append(f"## {package}/: {about}\n\n| file | |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(files_page(), "utf-8")
