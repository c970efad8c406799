"""shard: one task per source; its tars are written by a process pool inside the task."""

from flows.part import part_task

shard = part_task("shard")
