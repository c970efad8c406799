"""filter: one task per source; signals on a process pool, verdicts in DuckDB, both inside the task."""

from flows.part import part_task

filter = part_task("filter")
