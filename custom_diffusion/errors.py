"""How a command ends when it cannot do what the user asked for."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave is wrong; the message is one line that names it and the way out."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU or torch's allocator on a CPU had no memory left."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


class Interrupted(Exception):
    """A signal asked the run to stop, and its checkpoint is written.

    Args:
        signal_number: the signal.
        message: one line that says how to continue.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
