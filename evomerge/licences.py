"""The licence of a merge, computed from those that its sources state in their model cards.

It says what the sources say, by the rules below; it is no legal advice:

* a source whose licence is not known makes the merge's unknown;
* equal licences stay;
* of licences that allow any further terms (``PERMISSIVE``) the one with the most conditions stays;
* one other licence among permissive ones is the merge's, because its terms go with its weights;
* of licences that were made to go together (``STRICTER``) the stricter stays, but not beside one
  whose conditions it refuses;
* anything else is ``other``, with the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from evomerge.checkpoint import Checkpoint, is_local

#: Hub names of licences that allow further terms, from fewest conditions to most.
PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "mit-0", "mit", "isc", "zlib", "bsd-2-clause", "bsd",
    "bsd-3-clause", "bsl-1.0", "cc-by-3.0", "cc-by-4.0", "apache-2.0",
)  # fmt: skip
#: Licence → those that it may be combined into.
STRICTER: Mapping[str, tuple[str, ...]] = {
    "lgpl-2.1": ("gpl-2.0",),
    "lgpl-3.0": ("gpl-3.0", "agpl-3.0"),
    "gpl-3.0": ("agpl-3.0",),
    "cc-by-nc-4.0": ("cc-by-nc-sa-4.0",),
}
#: Licence → permissive ones with conditions that it forbids to add.
_REFUSED: Mapping[str, tuple[str, ...]] = {"gpl-2.0": ("apache-2.0",)}
#: Licences under which a changed version may not be published.
_NO_DERIVATIVES = ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model card states.

    Attributes:
        identifier: the Hub's name of it; ``unknown`` or ``other`` where there is none.
        sources: what each model states, by its name in the study; ``unknown`` among them.
        note: one sentence on where it comes from.
    """

    identifier: str
    sources: Mapping[str, str]
    note: str

    def front_matter(self) -> dict[str, str]:
        """Return the keys of a model card; what the Hub has no name for is ``other``."""
        if not self.identifier.startswith("other"):
            return {"license": self.identifier}
        name = self.identifier.removeprefix("other").strip(" ()")
        return {"license": "other", "license_name": name or "several-see-the-model-card"}


def combined_licence(sources: Mapping[str, str]) -> Licence:
    """Return the licence of a merge.

    Args:
        sources: Hub name of each model's licence, by its name in the study.
    """
    listed = ", ".join(f"{name}: {licence}" for name, licence in sources.items())
    unknown = [name for name, licence in sources.items() if licence == "unknown"]
    different = set(sources.values())
    if unknown:
        note = (
            f"The licence of {', '.join(unknown)} is not known, so the merge's is not ({listed})."
        )
        return Licence("unknown", sources, note)
    identifier = next(iter(different)) if len(different) == 1 else _strictest(different)
    note = (
        f"All models have licences of their own that their cards do not name ({listed}), see each."
        if different == {"other"}
        else f"All models have the licence {identifier}."
        if len(different) == 1
        else f"The models have different licences ({listed}); "
        + (
            "none of them covers all, see each."
            if identifier == "other"
            else f"{identifier} is the strictest."
        )
    )
    forbidden = sorted(different & set(_NO_DERIVATIVES))
    if forbidden:
        note += f" {', '.join(forbidden)} does not allow changed versions to be shared."
    return Licence(identifier, sources, note)


def _strictest(licences: set[str]) -> str:
    others = sorted(licences - set(PERMISSIVE))
    if not others:
        return max(licences, key=PERMISSIVE.index)
    for one in others:
        together = all(one == other or one in STRICTER.get(other, ()) for other in others)
        if together and licences.isdisjoint(_REFUSED.get(one, ())):
            return one
    return "other"


def stated_licence(checkpoint: Checkpoint) -> str:
    """Return the Hub name of the licence in a model's card; ``unknown`` where none is stated.

    The card is the README.md of a directory. Of a model of the Hub it is asked for there, unless
    the cache has it.
    """
    path = checkpoint.directory / "README.md"
    if not path.is_file() and not is_local(checkpoint.source):
        path = _hub_card(checkpoint) or path
    try:
        text = path.read_text(encoding="utf-8")
        head, mark, rest = text.partition("---\n")
        matter = yaml.safe_load(rest.partition("\n---")[0]) if mark and not head.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return "unknown"  # a card that cannot be read states nothing
    if not isinstance(matter, dict):
        return "unknown"
    licence = matter.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.strip():
        return "unknown"
    name = matter.get("license_name") if licence == "other" else None
    return f"other ({str(name)[:96]})" if name else licence.strip().lower()[:96]


def _hub_card(checkpoint: Checkpoint) -> Path | None:
    """Return the card of a Hub model at its commit; None where it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = checkpoint.pinned.partition("@")
    try:
        return Path(hf_hub_download(repo, "README.md", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # said to the reader as an unknown licence
