import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


async def test_a_folder_of_json_files_goes_on_as_one_file_a_task(
    load_program: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    await load_program("migrated").main(tmp_path)
    record = json.loads((tmp_path / "1.json").read_text())
    assert (record["id"], record["status"], record["result"]) == ("1", "succeeded", 42)
