"""Questions about a store as a whole: a summary, tables for notebooks, SQL, and files. Functions over `find`.

    summary(tracker)                        how it is going: counts, rates, durations, who is late, top causes
    to_arrow(tracker, status="failed")      a pyarrow Table
    sql(tracker, "select ...")              DuckDB's SQL over the tables tasks, errors and steps
    export(tracker, "tasks.parquet")        parquet, csv or jsonl

All read only: a tracker with `read_only=True` is enough. Whoever is called imports pyarrow or DuckDB; they come with
`pip install "aiotracker[analytics]"`.
"""

from ._export import export, to_arrow
from ._sql import sql, sql_batches
from ._summary import Cause, Durations, Failed, Minute, Rate, Running, Summary, Waiting, summary
from ._tables import TABLES, Column

__all__ = [
    "TABLES",
    "Cause",
    "Column",
    "Durations",
    "Failed",
    "Minute",
    "Rate",
    "Running",
    "Summary",
    "Waiting",
    "export",
    "sql",
    "sql_batches",
    "summary",
    "to_arrow",
]
