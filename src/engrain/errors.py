"""What can go wrong, by whose fault it is.

`InputError` and its children are the user's to fix (exit code 2) and say what was expected, what came and what to do.
Every other `EngrainError` is ours (exit code 1). A tool that fails while an agent runs is neither: it raises
`ToolFailure`, which the runtime turns into an observation.
"""


class EngrainError(Exception):
    """Any error that Engrain raises on purpose."""

    exit_code = 1


class InputError(EngrainError):
    """Something the user gave is missing or malformed."""

    exit_code = 2


class WorkflowError(InputError):
    """A workflow module, tool, tenant or task does not have the expected form."""


class DataError(InputError):
    """A record in a data file is malformed. The message names file, line and field."""

    def __init__(self, problem: str, *, file: str = "", line: int = 0, field: str = "") -> None:
        place = ":".join(str(part) for part in (file, line or "") if part)
        super().__init__(": ".join(part for part in (place, f"field {field!r}" if field else "", problem) if part))
        self.file, self.line, self.field = file, line, field


class RenderError(InputError):
    """A trajectory cannot be turned into tokens that are safe to train on."""


class ModelError(InputError):
    """A base, adapter, agent or checkpoint directory is missing, malformed or does not fit."""


class Overloaded(EngrainError):
    """More is asked for at once than is taken; the same may be asked again later."""


class ToolFailure(Exception):
    """Raised by a tool for a failure the agent should see, for example `ToolFailure("http_429", "slow down")`."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code
