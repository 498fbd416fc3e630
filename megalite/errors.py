"""The errors a user can meet, and the exit code of each.

Every message says what was wrong, what was found, what is allowed, and which key or file to change. The command prints
the message alone, without a traceback, and ends with the error's `exit_code`.
"""

from megalite.redaction import redact_text

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_RESOURCE = 5
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class MegaliteError(Exception):
    """Base of all errors that a user can mend; anything else is a bug and keeps its traceback."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        """The message, the user-info of every URL in it replaced: messages quote what they found."""
        return redact_text(super().__str__())


class ConfigError(MegaliteError):
    """A configuration key is unknown, mistyped, or contradicts another one."""

    exit_code = EXIT_CONFIG


class DataError(MegaliteError):
    """An input file, a tokenizer or a token store is missing, damaged or unfit."""

    exit_code = EXIT_DATA


class CheckpointError(MegaliteError):
    """A checkpoint is missing, damaged, or does not belong to this configuration."""

    exit_code = EXIT_CHECKPOINT


class ResourceError(MegaliteError):
    """The machine lacks something: a device, disk space, a process that stayed alive."""

    exit_code = EXIT_RESOURCE


class Preempted(MegaliteError):  # noqa: N818  no error
    """A signal asked the run to stop; it saved, and the same command continues."""

    exit_code = EXIT_REQUEUE
