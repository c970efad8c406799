"""acquire: one task per source. A crash is retried, because img2dataset goes on from its finished shards."""

from typing import Any

from flows.part import part_task


def _crashed(_task: Any, _run: Any, state: Any) -> bool:  # noqa: ANN401 - Prefect's own types
    """Whether an exception ended the task; a user's mistake ends it without one, and stays a mistake."""
    return state.data is not None


acquire = part_task("acquire", retries=2, retry_delay_seconds=5, retry_condition_fn=_crashed, tags=["network"])
