"""What a recipe run on a console shows: our lines and whatever is wrong; Prefect's account of itself is in the UI."""

import logging
from pathlib import Path

import prefect

PREFECT = str(Path(prefect.__file__).parent)


class Ours(logging.Filter):
    """True for a line of this checkout, a warning or a traceback; a run's final state is said once, by `error: ...`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the console shows a record."""
        if not record.pathname.startswith(PREFECT):
            return True
        return record.levelno >= logging.WARNING and not record.getMessage().startswith("Finished in state")
