"""The documentation against the tree: what it names exists, and the list of files is the tree's."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from models.families import FAMILIES
from runtime import __version__

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:models|compress|export|runtime)[\w.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")), module
    for name in re.findall(r"`((?:models|compress|export|runtime|tests)/[\w/]+\.(?:py|c|h))`", text):
        assert (ROOT / name).is_file(), name


def test_the_list_of_files_is_the_trees():
    page = runpy.run_path(str(ROOT / "docs/make_files.py"))["files_page"]()
    assert (ROOT / "docs/files.md").read_text("utf-8") == page, "run python docs/make_files.py"


def test_the_readme_is_short_and_true():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200 and all(family in text for family in FAMILIES)
    assert re.search(rf"^## {re.escape(__version__)}$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
