"""report: one task per recipe, over every manifest."""

from flows.part import part_task

report = part_task("report")
