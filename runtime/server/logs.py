"""The server's log: a JSON object a line on stderr. Nothing of what was asked or answered stands in it.

Of an exception it tells the type and the places, not the message, which may quote a prompt.
"""

import json
import logging
import sys
import time
import traceback

log = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{seconds}.{int(record.msecs):03}Z", "level": record.levelname.lower(), "event": record.getMessage().strip()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1]:
            line["exception"] = type(record.exc_info[1]).__name__
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(record.exc_info[2])[-12:]]
        return json.dumps(line)


def say(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields) -> None:
    """A line: what happened, and figures or names with it."""
    log.log(level, event, extra={"fields": fields}, exc_info=error)


def configure() -> None:
    """Write the lines of this package, and the warnings of uvicorn and asyncio, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in ((__package__, logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
