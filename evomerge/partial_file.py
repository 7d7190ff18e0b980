"""What of a study file can be checked although parts of it are wrong in form.

What is wrong is taken out until the rest is in good form. What then only follows from that must
not be told to the user: ``Partial`` knows what was taken out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from evomerge.config import StudyFile, form_problems, in_other_form, named, read_data
from evomerge.errors import StudyFileError
from evomerge.expert_folder import list_experts
from evomerge.objective_sections import GOALS

#: Taking something out can show more, such as a list that is too short then.
_ROUNDS = 20
#: Stands for a model that is not named; no directory and no hub id.
_NO_MODEL = "?"
#: What is left out of a section whose keys contradict each other.
_AT_FAULT: dict[str, tuple[str, ...]] = {
    "empty_range": ("max",), "two_policies": ("estimator",), "no_budget": ("trials", "items"),
    "order": ("racing",), "per_trial": ("policy", "per_trial", "every"),
}  # fmt: skip
#: Such contradictions show only where the section's keys are right one by one. Where one of these
#: keys was taken out, the contradiction may come from that.
_OF_SEVERAL_KEYS: dict[str, tuple[str, ...]] = {
    "empty_range": (), "two_policies": (), "order": (), "rungs": (), "rule": ("rule",),
    "no_budget": ("trials", "items"), "per_trial": ("policy", "per_trial", "every"),
    "no_objective": ("tasks", "objectives"),
}  # fmt: skip

#: Parts of a study file about which nothing can be said any more.
Part = Literal[
    "expert names", "method", "parameters", "searcher", "objectives", "tasks", "items",
    "estimator",
]  # fmt: skip
_PARTS: tuple[tuple[str, tuple[Part, ...]], ...] = (
    (r"space(\.method)?", ("method", "parameters")),
    (r"space\.parameters\b.*", ("parameters",)),
    (r"search(\.searcher|\.arguments\b.*)?", ("searcher",)),
    (r"fitness\.(tasks|objectives)\[\d+\]", ("objectives",)),
    (r"fitness\.(include_path|allow_task_code)\b.*", ("tasks",)),
    (r"fitness\.items\b.*", ("items",)),
    (r"fitness\.estimator\b.*", ("estimator",)),
)


@dataclass(slots=True)
class Partial:
    """A study file without what is wrong in form.

    Attributes:
        data: the file as it is read from YAML.
        unsure: parts about which nothing can be said any more.
        further: problems of form in entries whose kind had to be guessed.
        removed: dotted paths of what was taken out or stands for something.
        numbers: of the entries of both lists in the user's file.
    """

    data: dict[str, Any]
    unsure: set[Part] = field(default_factory=set)
    further: dict[str, None] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    _guessed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Number the entries."""
        fitness = self.data.get("fitness")
        for key in ("tasks", "objectives"):
            entries = fitness.get(key) if isinstance(fitness, dict) else None
            self.numbers[key] = [*range(len(entries))] if isinstance(entries, list) else []

    def own(self, problems: Collection[str]) -> Iterator[str]:
        """Yield those problems of what is left that are the user's, with the user's numbers."""
        for problem in problems:
            text = self._in_own_numbers(problem)
            about = text.partition(": ")[0]
            if any(re.match(rf"{re.escape(one)}([.\[]|\Z)", about) for one in self.removed):
                continue
            if "parameters" in self.unsure and "nothing is searched" in text:
                continue
            if "expert names" in self.unsure and ".of: no model is named" in text:
                continue
            yield text

    def _in_own_numbers(self, text: str) -> str:
        return re.sub(r"^fitness\.(tasks|objectives)\[(\d+)\]", self._numbered, text)

    def _numbered(self, match: re.Match[str]) -> str:
        key, number = match[1], int(match[2])
        return f"fitness.{key}[{self.numbers[key][number]}]"

    # -- taking out ------------------------------------------------------------------------------

    def mend(self, error: ValidationError) -> None:
        """Take out what is wrong; an entry of a wrong kind gets the kind that it resembles."""
        places: dict[tuple[int | str, ...], Any] = {}
        for item in error.errors(include_url=False):
            place = self._place(item["loc"])
            known = places.get(place, {"type": ""})["type"] in _AT_FAULT
            if not known and not in_other_form(item["loc"], self.data):
                places[place] = item
        inside = [a for a in places if any(b[: len(a)] == a != b for b in places)]
        # From behind, so that the numbers of entries stay right.
        for place in sorted(places, key=lambda one: [*map(_order, one)], reverse=True):
            if place not in inside:
                self._take(place, places[place])

    def _place(self, location: Sequence[int | str]) -> tuple[int | str, ...]:
        """Return the keys that lead to what is wrong, or to the mapping that lacks something."""
        found: Any = self.data
        place: list[int | str] = []
        for part in location:  # between them stand pydantic's names of forms and kinds
            if isinstance(found, dict):
                there = part in found
            else:
                there = isinstance(found, list) and isinstance(part, int) and part < len(found)
            if there:
                place.append(part)
                found = found[part]
        while place and isinstance(place[-1], int) and not self._is_entry(place):
            place.pop()  # half a list is another list
        return tuple(place)

    def _is_entry(self, place: Sequence[int | str]) -> bool:
        return len(place) == 3 and place[0] == "fitness" and place[1] in self.numbers

    def _take(self, place: tuple[int | str, ...], item: Any) -> None:
        if item["type"] in _AT_FAULT:
            section = self._at(place)
            for key in _AT_FAULT[item["type"]]:
                section.pop(key, None)
            self._note((*place, _AT_FAULT[item["type"]][0]))
            return
        if item["loc"][:1] == ("models",):
            self._take_model(place[1:], item["loc"])
            return
        if place in ((), ("fitness",)):
            self._nothing_to_score()
            return
        entry = self._is_entry(place)
        if entry and item["type"] == "union_tag_invalid":
            near = get_close_matches(str(item["ctx"]["tag"]), GOALS, n=1)
            if near:
                self._at(place)["kind"] = near[0]
                self._guessed.add(int(place[2]))
                return
        self._note(place)
        del self._at(place[:-1])[place[-1]]
        if entry:
            number = int(place[2])
            del self.numbers[str(place[1])][number]
            self._guessed = {one - (one > number) for one in self._guessed if one != number}

    def _at(self, place: tuple[int | str, ...]) -> Any:
        found: Any = self.data
        for part in place:
            found = found[part]
        return found

    def _path(self, place: Sequence[int | str]) -> str:
        """Return a dotted path with the user's numbers."""
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        return self._in_own_numbers(path[1:])

    def _note(self, place: tuple[int | str, ...]) -> None:
        path = self._path(place)
        self.removed.add(path)
        for pattern, parts in _PARTS:
            if re.fullmatch(pattern, path):
                self.unsure.update(parts)

    def _take_model(self, inside: tuple[int | str, ...], location: Sequence[int | str]) -> None:
        """Put something into the place of what is wrong with the models."""
        if not isinstance(self.data.get("models"), dict):
            self.data["models"] = {}
        models = self.data["models"]
        if len(inside) == 1 and inside[0] not in ("base", "experts"):
            del models[inside[0]]  # an unknown key
        elif len(inside) == 2:
            self.removed.add(f"models.experts.{inside[1]}")
            models["experts"][inside[1]] = _NO_MODEL
            if "[key]" in location:
                del models["experts"][inside[1]]
                self.unsure.add("expert names")
        else:
            if "base" in inside or not isinstance(models.get("base"), str):
                models["base"] = _NO_MODEL
                self.removed.add("models.base")
            if "experts" in inside or not models.get("experts"):
                models["experts"] = {"expert": _NO_MODEL}
                self.removed.add("models.experts")
                self.unsure.add("expert names")

    def _nothing_to_score(self) -> None:
        self.data["fitness"] = {"objectives": [{"kind": "distance"}]}
        self.numbers = {"tasks": [], "objectives": [0]}
        self.removed.add("fitness")
        self.unsure |= {"objectives", "tasks", "items", "estimator"}

    def validated(self, path: Path) -> StudyFile | None:
        """Return the file in good form; None where that cannot be had."""
        for count in range(_ROUNDS):
            try:
                return named(StudyFile.model_validate(self.data), path)
            except ValidationError as error:
                if count:
                    self._tell(error)
                self.mend(error)
        return None

    def _tell(self, error: ValidationError) -> None:
        """Note what could not be seen at first: in guessed entries, and between keys."""
        contradictions = {
            self._path(self._place(item["loc"])): _OF_SEVERAL_KEYS[item["type"]]
            for item in error.errors(include_url=False)
            if item["type"] in _OF_SEVERAL_KEYS
        }
        for line in form_problems(error, self.data):
            text = self._in_own_numbers(line)
            path = text.partition(": ")[0]
            match = re.match(r"fitness\.objectives\[(\d+)\]", line)
            guessed = match is not None and int(match[1]) in self._guessed
            keys = contradictions.get(path)
            if guessed or (
                keys is not None
                and not any(one.startswith(f"{path}.{key}") for one in self.removed for key in keys)
            ):
                self.further.setdefault(text)


def _order(part: int | str) -> tuple[int, str]:
    return (part, "") if isinstance(part, int) else (-1, part)


def partial_file(path: Path, overrides: Sequence[str]) -> Partial | None:
    """Return a study file whose form is wrong; None where it is no YAML at all.

    Args:
        path: of the file.
        overrides: as for ``evomerge.config.load``.
    """
    try:
        data = read_data(path, overrides)
    except StudyFileError:
        return None
    # What is wrong with a folder was told before; the models in it are looked at all the same.
    left_out = list_experts(data, path.resolve().parent, partly=True)
    return Partial(data, {"expert names"} if left_out else set())
