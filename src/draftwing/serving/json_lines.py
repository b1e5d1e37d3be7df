"""A log whose every line is a JSON object, from the first one on and whoever writes it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager


class JsonLines(logging.Formatter):
    """A record as a line: its time in seconds, and its `facts` if it has some, else its level and its message."""

    def format(self, record: logging.LogRecord) -> str:
        if (facts := getattr(record, "facts", None)) is None:
            facts = {"level": record.levelname.lower(), "message": record.getMessage()}
            if record.exc_info:
                facts["error"] = self.formatException(record.exc_info)
        return json.dumps({"time": round(record.created, 3)} | facts)


@contextmanager
def json_lines() -> Iterator[None]:
    """Let all that is logged, and warnings, go to stderr as such lines; transformers shows no progress bars."""
    from transformers.utils import logging as of_transformers

    handler, root = logging.StreamHandler(), logging.getLogger()
    handler.setFormatter(JsonLines())
    ours = logging.getLogger("draftwing")
    kept, ours.handlers = ours.handlers, []
    root.addHandler(handler)
    logging.captureWarnings(True)
    of_transformers.disable_progress_bar()
    of_transformers.disable_default_handler()  # it has one of its own
    of_transformers.enable_propagation()
    try:
        yield
    finally:
        of_transformers.disable_propagation()
        of_transformers.enable_default_handler()
        of_transformers.enable_progress_bar()
        logging.captureWarnings(False)
        root.removeHandler(handler)
        ours.handlers = kept
