"""The documentation is built, without a warning and without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiotracker
from aiotracker import analytics, causes, copying, doctor, testing
from aiotracker.urls import _COMMON, _SCHEMES

ROOT = Path(__file__).parents[2]
SPHINX = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [*SPHINX, "-d", str(folder / "read"), str(ROOT / "docs"), str(folder / "html")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return folder / "html"


def test_every_public_name_is_in_the_reference(built: Path) -> None:
    pages = "".join(page.read_text() for page in (built / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', pages))
    public = {f"aiotracker.{name}" for name in aiotracker.__all__}
    for module in (analytics, causes, testing):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    public |= {copying.copy.__module__ + ".copy", doctor.examine.__module__ + ".examine"}
    assert sorted(public - anchors) == []


def test_all_that_a_url_may_say_is_explained() -> None:
    text = (ROOT / "docs" / "reference" / "urls.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert explained == {name for scheme in _SCHEMES.values() for name in scheme.parameters} | set(_COMMON)


def test_the_reference_says_what_the_code_says(built: Path) -> None:
    reference = built / "reference"
    record = (reference / "record.html").read_text()
    assert "claims that count: a released or postponed one is given back" in record
    assert "names one claim; every write of that claim shows it" in record
    assert "inclusive, like all <code" in (reference / "trackers.html").read_text()
    assert "TaskLockedError           somebody holds it" in (reference / "errors.html").read_text()
    assert "Before the second attempt; doubled with each further." in (reference / "commands.html").read_text()


def test_every_picture_is_shown_and_readable_in_the_dark() -> None:
    shown = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert f"pictures/{picture.name}" in shown
        if picture.name.startswith("performance-"):
            continue  # a plot brings its own background, and the page says in a table what it shows
        text = picture.read_text()
        assert "prefers-color-scheme: dark" in text
        assert "<title " in text  # for those who do not see it
