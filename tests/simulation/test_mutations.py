"""A log without one of its remedies: somebody must miss each, in the simulation or in a test that is named."""

import ast
from pathlib import Path

import pytest

from .mutations import MUTATIONS, SIMULATION, Mutation
from .taking_out import ROOT, apply, copy_source, run, run_tests

PAGE = ROOT / "docs" / "concepts" / "tested.md"


def test_each_remedy_that_is_taken_out_is_still_there_and_is_told_in_the_documentation() -> None:
    page = PAGE.read_text()
    for mutation in MUTATIONS:
        ast.parse(apply(mutation, (ROOT / "aiotracker" / mutation.path).read_text()))
        found_by = mutation.found_by
        if found_by != SIMULATION:
            path, found_by = found_by.partition("::")[0], found_by.rpartition("::")[2]
            assert f"def {found_by}(" in (ROOT / path).read_text()
            found_by = f"`{found_by}`"
        assert f"| {mutation.what} | {found_by}" in page
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    copy_source(folder)
    return folder


@pytest.mark.chaos
def test_all_remedies_together_are_missed_by_nobody(source: Path) -> None:
    done = run_tests(source, sorted({mutation.found_by for mutation in MUTATIONS} - {SIMULATION}))
    assert done.returncode == 0, done.stdout


@pytest.mark.chaos
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_remedy_that_is_taken_out_is_missed(source: Path, mutation: Mutation) -> None:
    is_found, output = run(mutation, source)
    assert is_found, output
