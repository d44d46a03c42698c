"""What the README and the docs show is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .run_page import blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "console", "json", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("AIOTRACKER_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("run_page.py")), str(page)],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_in_a_language_that_nobody_runs(page: Path) -> None:
    text = page.read_text()
    found = list(blocks(text))
    assert {block.language for block in found} <= LANGUAGES
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_inside_of_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_and_guarantees_page_word_the_guarantees_alike() -> None:
    readme = re.findall(
        r"^\d+\. (\*\*.+?)(?=\n\d+\. |\n\n)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    page = re.findall(r"^> (\*\*.+?)\n\n", (ROOT / "docs" / "guarantees.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(readme) == 11
    assert [_joined(text.replace("\n> ", "\n")) for text in page] == [_joined(text) for text in readme]


def _joined(text: str) -> str:
    return " ".join(text.split())


def test_every_test_that_the_guarantees_page_names_exists() -> None:
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "aiotracker" / "testing").rglob("*.py")]
    defined = {name for path in sources for name in re.findall(r"def (test_\w+)\(", path.read_text())}
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 11
    assert sorted(set(named) - defined) == []
