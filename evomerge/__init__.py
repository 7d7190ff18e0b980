"""evomerge: evolutionary, black-box search for the best merge of your models.

``evomerge.Study.open("studies/demo")`` reads a study: its front, trials and baselines as objects
and as pandas tables, comparisons and exports. Everything else is on the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.opened_study import Merge as Merge
    from evomerge.opened_study import Merges as Merges
    from evomerge.opened_study import Study as Study

__version__ = "0.1.0"
__all__ = ["Merge", "Merges", "Study", "__version__"]


def __getattr__(name: str) -> object:
    """Load the public classes when they are first used: importing evomerge loads nothing."""
    if name not in ("Merge", "Merges", "Study"):
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    from evomerge import opened_study

    return getattr(opened_study, name)
