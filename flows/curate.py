"""curate: one task per mix; DuckDB inside the task."""

from flows.part import part_task

curate = part_task("curate")
