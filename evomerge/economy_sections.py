"""How a study saves item evaluations: its keys under ``fitness`` and ``search``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from evomerge.objective_sections import ItemsSection, Section

#: Searchers that learn from the items and not from the value alone.
BY_ITEMS = ("m2n2",)


class SearchItemsSection(ItemsSection):
    """How many items of each task go where, and which of them a trial is scored on."""

    policy: Literal["fixed", "resampled"] = Field(
        "fixed",
        description="fixed: all search items, for every trial; resampled: `per_trial` of them, "
        "fresh for every generation and common within it",
    )
    per_trial: int | None = Field(
        None, ge=1, description="items of each task for a trial, where they are resampled"
    )
    every: int | None = Field(
        None, ge=1,
        description="trials that share resampled items; a generation of the searcher where absent",
    )  # fmt: skip

    @model_validator(mode="after")
    def _together(self) -> SearchItemsSection:
        if self.policy == "resampled" and self.per_trial is None:
            raise PydanticCustomError("per_trial", "policy: resampled needs per_trial")
        if self.policy == "fixed" and (self.per_trial, self.every) != (None, None):
            raise PydanticCustomError("per_trial", "per_trial and every need policy: resampled")
        return self


class EstimatorSection(Section):
    """An estimated fitness: trials are scored on few items, a model stands for the rest."""

    name: str = Field(description="see `evomerge list estimators`")
    items: int = Field(ge=1, description="items of each task that trials are scored on")
    design: str = Field("random", description="how they are chosen among the search items")
    refresh: Literal["never", "generation"] | int = Field(
        "never",
        description="when other items are chosen: never, for every generation of the searcher, or "
        "after so many trials; common to the trials between",
    )
    full_every: int | None = Field(
        20, ge=1,
        description="every so many-th trial is scored on all search items, to see how far off the "
        "estimates are; null for never",
    )  # fmt: skip
    banks: dict[str, str] = Field(
        default_factory=dict,
        description="files with item parameters by objective, for the estimators that need them",
    )
    calibration: int = Field(
        0, ge=0, le=10_000,
        description="merges by chance that are scored on all search items first, as base and "
        "experts are",
    )  # fmt: skip

    @field_validator("refresh", mode="before")
    @classmethod
    def _refreshable(cls, value: object) -> object:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not number and value not in ("never", "generation"):
            raise PydanticCustomError(
                "refresh", "must be never, generation, or a number of trials of at least 1"
            )
        return value


#: Keys of ``search.racing`` that belong to one rule.
_FRONT_KEYS, _HALVING_KEYS = {"z", "references"}, {"eta", "bracket"}


class RacingSection(Section):
    """Score trials on few items first, and only some of them on more."""

    rule: Literal["front", "halving"] = Field(
        "front",
        description="front: a trial stops when it cannot reach the front any more, on paired "
        "differences; halving: of the trials of a generation the best 1/eta go on to the next "
        "rung, and in the end to all items",
    )
    rungs: list[int] = Field(
        default_factory=lambda: [10, 20, 50, 200],
        min_length=1,
        description="items of each task after which to look, ascending; at least 10; all items "
        "come after the last one",
    )
    z: float = Field(
        1.6, gt=0, le=100,
        description="front: standard errors of the paired difference that it takes, in every "
        "objective",
    )  # fmt: skip
    references: int = Field(
        8, ge=1, le=64,
        description="front: members of the front that a trial is compared with, at most",
    )  # fmt: skip
    eta: int = Field(2, ge=2, le=64, description="halving: one in so many goes on, rounded up")
    bracket: int = Field(
        16, ge=2, le=4096,
        description="halving: trials that are compared with each other where the searcher has no "
        "generations; so many are outstanding then, instead of `parallel`",
    )  # fmt: skip

    @model_validator(mode="after")
    def _ascending(self) -> RacingSection:
        if self.rungs != sorted(set(self.rungs)) or self.rungs[0] < 10:
            raise PydanticCustomError("rungs", "rungs must ascend from 10 or more")
        strangers = _HALVING_KEYS if self.rule == "front" else _FRONT_KEYS
        for key in sorted(strangers):  # a resolved study file has all keys
            if getattr(self, key) != type(self).model_fields[key].default:
                raise PydanticCustomError("rule", f"{key} means nothing to rule: {self.rule}")
        return self

    def settings(self) -> dict[str, object]:
        """Return the keys that count under this rule."""
        return self.model_dump(exclude=_HALVING_KEYS if self.rule == "front" else _FRONT_KEYS)
