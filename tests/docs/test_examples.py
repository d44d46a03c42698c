"""What the README and the docs show is what happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .run_page import Block, blocks

ROOT = Path(__file__).parents[2]
GUARANTEES = ROOT / "docs" / "concepts" / "guarantees.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "console", "json", "yaml", "text"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def is_run(block: Block) -> bool:
    return not block.is_skipped and block.language in ("python", "console")


EXAMPLES = [page for page in PAGES if any(is_run(block) for block in blocks(page.read_text()))]


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_all_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("AIOTRACKER_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"{__package__}.run_page", str(page)],
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_is_in_a_language_that_nobody_runs(page: Path) -> None:
    text = page.read_text()
    found = list(blocks(text))
    # In braces: directives of Sphinx, which the build checks.
    assert {block.language for block in found if not block.language.startswith("{")} <= LANGUAGES
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE))
    for block in found:
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_inside_of_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_and_guarantees_page_word_the_guarantees_alike() -> None:
    readme = re.findall(
        r"^\d+\. (\*\*.+?)(?=\n\d+\. |\n\n)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    page = re.findall(r"^> (\*\*.+?)\n\n", GUARANTEES.read_text(), re.MULTILINE | re.DOTALL)
    assert len(readme) == 11
    assert [_joined(text.replace("\n> ", "\n")) for text in page] == [_joined(text) for text in readme]


def _joined(text: str) -> str:
    return " ".join(text.split())


def test_every_test_that_the_guarantees_page_names_exists() -> None:
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "aiotracker" / "testing").rglob("*.py")]
    defined = {name for path in sources for name in re.findall(r"def (test_\w+)\(", path.read_text())}
    named = re.findall(r"`(test_\w+)`", GUARANTEES.read_text())
    assert len(named) > 11
    assert sorted(set(named) - defined) == []
