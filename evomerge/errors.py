"""Every error that evomerge raises on purpose.

    EvomergeError                1   unexpected; also the root of the tree
    ├── InputError               2   invalid input or usage
    │   ├── StudyFileError       2   problems of a study file, all at once
    │   ├── ModelError           2   a model directory cannot be used
    │   ├── RecipeError          2   a recipe is malformed or does not fit the models
    │   └── TaskError            2   a fitness task cannot be used
    ├── NothingUsableError       3   finished, but there is nothing to report or export
    ├── SetupError               4   missing package, device, or unreachable service
    ├── LockedError              5   another driver owns the study
    ├── StorageError             6   storage is full or corrupt
    │   └── ReplayError          6   the journal does not replay to the same asks
    ├── EvaluationError          1   one trial failed on a worker (becomes a failed trial)
    └── CallOrderError           1   ask/tell, submit/wait were called out of order

    Interrupted            128 + n   stopped by signal n (130 SIGINT, 143 SIGTERM); no Exception, so
                                     that nothing takes it for the failure of a trial

The number is the exit code of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EvomergeError(Exception):
    """Root of all errors raised on purpose; knows its exit code."""

    exit_code = 1


class InputError(EvomergeError):
    """The user's input cannot be used; the message says where and what to do."""

    exit_code = 2


class StudyFileError(InputError):
    """Problems of one study file, reported together.

    Attributes:
        problems: one line each, ``dotted.path: problem (remedy)``.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class ModelError(InputError):
    """A model directory is unreadable, unsafe, or does not match the base."""


class RecipeError(InputError):
    """A recipe is malformed or does not fit the models it is applied to."""


class TaskError(InputError):
    """A fitness task is unknown, unsafe, or lacks the asked metric or items."""


class NothingUsableError(EvomergeError):
    """The search finished without one usable result."""

    exit_code = 3


class SetupError(EvomergeError):
    """The environment lacks something: a device, a package, a reachable service."""

    exit_code = 4


class LockedError(EvomergeError):
    """Another driver owns the study."""

    exit_code = 5


class StorageError(EvomergeError):
    """Storage is full or what it holds is corrupt."""

    exit_code = 6


class ReplayError(StorageError):
    """The journal does not replay to the asks that it records.

    Attributes:
        trial: the first one that is not repeated, None where it is not known.
    """

    def __init__(self, message: str, trial: int | None = None) -> None:
        self.trial = trial
        super().__init__(message)


class EvaluationError(EvomergeError):
    """One trial failed on a worker; the study records it and goes on."""


class CallOrderError(EvomergeError):
    """Methods were called in an order that their protocol forbids."""


class Interrupted(BaseException):
    """The study was stopped by a signal; running it again continues it.

    A signal handler raises it wherever the program happens to be, so like ``KeyboardInterrupt``
    it passes every ``except Exception``.

    Attributes:
        signal_number: the signal that asked for the stop.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(message)


#: Words that are all listed: more than there are searchers or methods.
_LISTED = 60


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` or the list of valid words, for error messages.

    Of more words than fit a few lines the first, and how many more there are.
    """
    choices = sorted(known)
    near = get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    shown = choices if len(choices) <= _LISTED else choices[: _LISTED // 3]
    more = len(choices) - len(shown)
    return f" (choose from: {', '.join(shown)}{f' and {more} more' if more else ''})"
