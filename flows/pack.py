"""pack: one task per mix."""

from flows.part import part_task

pack = part_task("pack")
