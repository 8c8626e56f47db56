"""What tasks there are: how their records are read, asked and scored. The task itself is runtime/task.py's."""

from .defaults import DECODER_TASKS, TASKS
from .examples import Example, read_examples
from .options import TaskOptions, open_task

__all__ = ["DECODER_TASKS", "TASKS", "Example", "TaskOptions", "open_task", "read_examples"]
