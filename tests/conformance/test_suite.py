"""The suite itself."""

from collections import Counter

from aiotracker.testing import ConformanceSuite


def test_no_test_of_the_suite_is_hidden_by_another_of_the_same_name() -> None:
    names = Counter(
        name for part in ConformanceSuite.__mro__ for name, value in vars(part).items() if name.startswith("test_")
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 150
