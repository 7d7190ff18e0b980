"""Runs the brackets of a search that halves: who goes on to the next rung, and who is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.evaluations import Evaluations, Request
from evomerge.feasibility import violation
from evomerge.halving import Halving, best_first
from evomerge.items import Chosen
from evomerge.study_view import weighted_mean
from evomerge.telling import losses_of
from evomerge.trial import Evaluation, Objective, Trial


@dataclass(frozen=True, slots=True)
class Member:
    """A trial of a bracket and what it is scored on."""

    trial: Trial
    chosen: Chosen

    def up_to(self, rung: int) -> Request:
        """Return the request for its first items."""
        return replace(self.whole, split="part", rung=rung)

    @property
    def whole(self) -> Request:
        """The request for all its items."""
        chosen = self.chosen
        return Request(self.trial, "search", chosen.items, chosen.mode, design=chosen.design)


class Brackets:
    """Halves brackets of trials.

    A rung is decided when all of its trials have their scores, by their order of asking and by
    nothing else: neither the number of workers nor their speed nor a restart changes it. A trial
    that an estimated study scores in full (mode ``check``) takes part in no rung.

    Args:
        objectives: [m].
        scalarise: compare the weighted means of the losses.
        halving: rungs and shares.
        evaluations: scores trials.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        scalarise: bool,
        halving: Halving,
        evaluations: Evaluations,
    ) -> None:
        self._objectives = tuple(objectives)
        self._scalarise = scalarise
        self._halving = halving
        self._evaluations = evaluations

    def enter(self, member: Member) -> None:
        """Let a trial start with the items of the first rung."""
        stages = self._halving.stages(member.chosen.items)
        if member.chosen.mode == "check" or not stages:
            self._evaluations.request(member.whole)
        else:
            self._evaluations.request(member.up_to(stages[0]))

    def cost(self, members: Sequence[Chosen]) -> int:
        """Return the items that a bracket of trials on such items is scored on at most."""
        checks = [one for one in members if one.mode == "check"]
        others = [one for one in members if one.mode != "check"]
        total = sum(len(ids) for one in checks for ids in one.items)
        return total + (self._halving.cost(others[0].items, len(others)) if others else 0)

    def run(self, bracket: Sequence[Member]) -> None:
        """Take the trials of a bracket through the rungs; each then has a result, or will.

        Args:
            bracket: trials that entered, in ask order; all but checks have the same items.
        """
        runners = [one for one in bracket if one.chosen.mode != "check"]
        if not runners:
            return
        stages = self._halving.stages(runners[0].chosen.items)
        for rung in stages:
            for one in runners:
                self._evaluations.request(one.up_to(rung))
            readings = [self._evaluations.reading(one.up_to(rung)) for one in runners]
            entered = len(runners)
            pairs = zip(runners, readings, strict=True)
            alive = [(one, reading) for one, reading in pairs if reading is not None]
            best = self._best([reading for _, reading in alive], self._halving.kept(entered))
            for row, (one, _) in enumerate(alive):
                if row not in best:
                    self._evaluations.leave(one.whole, stages)
            runners = [one for row, (one, _) in enumerate(alive) if row in best]
        for one in runners:
            self._evaluations.request(one.whole)

    def _best(self, readings: Sequence[Evaluation], count: int) -> frozenset[int]:
        """Return the rows of the best ``count`` readings."""
        losses = [losses_of(self._objectives, one.values) for one in readings]
        if self._scalarise:
            losses = [(weighted_mean(row, self._objectives),) for row in losses]
        violations = [violation(self._objectives, one.values) for one in readings]
        return frozenset(best_first(losses, violations)[:count])
