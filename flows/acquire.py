"""acquire: one task per source. A crash is retried, because img2dataset goes on from its finished shards."""

from flows.part import part_task

acquire = part_task("acquire", retries=2, retry_delay_seconds=5, tags=["network"])
