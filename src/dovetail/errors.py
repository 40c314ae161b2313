"""The errors a user can meet. Each says what was found, why it is wrong, and what to do.

Responsible for: the exception tree below. The command line prints `message` and `hint`, never a traceback.
Not responsible for: our own mistakes, which are assertions and keep their traceback.

    DovetailError
    ├── ConfigError          a setting, recipe or override is wrong
    ├── DataError            a file, row or column cannot be used
    ├── ModelError           a model or tokenizer cannot be loaded or used
    ├── CheckpointError      a checkpoint or run folder is damaged, foreign or cannot be written
    ├── GenerationError      a request cannot be generated
    ├── LabelError           a label, or the database that keeps labels, cannot be used
    ├── LaunchError          the processes of a run could not start or find one another
    │   └── ProcessFailed    one of them failed or was lost
    ├── ParityError          generation or training disagrees with the model's own forward
    ├── TrainingStopped      a run that was stopped on purpose (NaN loss, KL run-away), with a diagnosis
    └── RunInterrupted       a run that a signal asked to end: its state is saved, the same command goes on
"""


class DovetailError(Exception):
    """A problem the user can solve; `hint` says how. `exit_code` is what a command leaves with."""

    exit_code = 2
    is_everywhere = False
    """All processes of the run raise it at the same place."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(DovetailError):
    """A setting, recipe or override is wrong."""


class DataError(DovetailError):
    """A file, row or column cannot be used."""


class ModelError(DovetailError):
    """A model or tokenizer cannot be loaded or used."""


class CheckpointError(DovetailError):
    """A checkpoint or run folder is damaged, belongs to another run, or cannot be written."""


class GenerationError(DovetailError):
    """A request cannot be generated: too long, empty, or more than the cache can hold."""


class LabelError(DovetailError):
    """A label, or the database that keeps labels, cannot be used."""


class LaunchError(DovetailError):
    """The processes of a run could not start, or could not find one another."""

    exit_code = 3


class ProcessFailed(LaunchError):
    """One process of a run failed or was lost; the exit code is that of its error, 3 if it was killed."""

    def __init__(self, message: str, *, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class ParityError(DovetailError):
    """Generation, or the training forward, disagrees with the plain forward of the same modules."""


class TrainingStopped(DovetailError):
    """A run stopped on purpose, with what was seen and what to change."""


class RunInterrupted(DovetailError):
    """A signal asked the run to end, and its state is saved; the exit code is EX_TEMPFAIL of sysexits.h: try again."""

    exit_code = 75

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="the same command goes on from there")
