"""The estimated fitness that a study file asks for, from the registries of estimators."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.config import StudyFile
from evomerge.economy_sections import BY_ITEMS, EstimatorSection
from evomerge.errors import InputError, suggest
from evomerge.estimate import Answers, Endpoint, Estimate, Estimation, Estimator
from evomerge.fitness.aggregate import Aggregate, MeanEstimator
from evomerge.fitness.composite import Composite
from evomerge.fitness.irt.bank import ItemBank, load_bank
from evomerge.fitness.irt.design import ANCHORS, DESIGNS, choose_items
from evomerge.fitness.irt.estimators import ESTIMATORS, NEEDS, SubsetEstimator
from evomerge.fitness.irt.population import Design, Endpoints, Population
from evomerge.fitness.measures import MEASURES
from evomerge.items import drawn
from evomerge.study_space import scored_alone

logger = logging.getLogger(__name__)

Items = tuple[tuple[str, ...], ...]


def estimation(file: StudyFile, root: Path, fitness: Composite) -> Estimation | None:
    """Return how a study file estimates its fitness, None where it does not.

    Args:
        file: the study file.
        root: its folder.
        fitness: all objectives.

    Raises:
        InputError: every problem of ``fitness.estimator``.
    """
    section = file.fitness.estimated
    if section is None:
        return None
    names = [objective.name for objective in fitness.objectives]
    problems = []
    if section.name not in ESTIMATORS:
        problems.append(f"name: unknown {section.name!r}{suggest(section.name, ESTIMATORS)}")
    if section.design not in DESIGNS:
        problems.append(f"design: unknown {section.design!r}{suggest(section.design, DESIGNS)}")
    if section.design in ANCHORS and section.refresh != "never":
        others = ", ".join(sorted(DESIGNS.keys() - ANCHORS))
        problems.append(
            f"refresh: {section.refresh}: {section.design} items are not drawn, so that another "
            f"choice would be nearly the same one (take refresh: never, or a design of {others})"
        )
    if section.refresh != "never" and file.search.searcher in BY_ITEMS:
        problems.append(
            f"refresh: {section.refresh}: {file.search.searcher} compares merges item by item, so "
            "that all must have the same ones (take refresh: never, or another searcher)"
        )
    banks: dict[int, ItemBank] = {}
    for name, path in section.banks.items():
        if name not in names:
            problems.append(f"banks.{name}: no such objective{suggest(name, names)}")
            continue
        try:
            banks[names.index(name)] = load_bank(root / path)
        except InputError as error:
            problems.append(f"banks.{name}: {error}")
    if section.name in ESTIMATORS and "bank" in ESTIMATORS[section.name].needs and not banks:
        problems.append(f"banks: {section.name} needs an item bank of at least one objective")
    graded = (True,) * len(names)
    if not problems:
        if _needs_margins(section.name, section.design):
            graded = tuple(not reason for reason in fitness.ungraded)
        problems += _unfit(section, fitness, len(file.fitness.tasks))
    if not scored_alone(file) and not section.calibration:
        problems.append(
            f"name: {section.name} learns from models that are scored before the search, and "
            "baselines.experts leaves out every expert (name one, or set calibration)"
        )
    if problems:
        raise InputError("\n".join(f"fitness.estimator.{problem}" for problem in problems))
    return Estimation(
        name=section.name,
        prepare=Preparation(
            section.name, section.design, section.items, file.seed, tuple(names),
            fitness.aggregates, fitness.sources, banks, graded, file.search.racing is not None,
        ),
        full_every=section.full_every,
        calibration=section.calibration,
        refresh=None if section.refresh == "never" else section.refresh,
        settings={
            "items": section.items,
            "design": section.design,
            "banks": {names[number]: bank.digest for number, bank in banks.items()},
        },
    )  # fmt: skip


def _unfit(section: EstimatorSection, fitness: Composite, tasks: int) -> list[str]:
    """Return what can be seen without a model to be missing, before anything is scored.

    Args:
        section: the estimator.
        fitness: all objectives.
        tasks: how many of them are lm-eval tasks; they come first.
    """
    problems = []
    if section.design == "stratified" and not any(one.strata for one in fitness.aggregates):
        problems.append(
            "design: stratified draws by task, but no objective has several (name a group or tag "
            "in fitness.tasks, or take random)"
        )
    if not _needs_margins(section.name, section.design):
        return problems
    own = {measure.unit for measure in MEASURES.values()}
    judged = [
        number
        for number in range(tasks)
        if fitness.aggregates[number].link == "mean" and fitness.objectives[number].unit not in own
    ]
    wanting = section.name if "margins" in ESTIMATORS[section.name].needs else section.design
    key = "name" if wanting == section.name else "design"
    reasons = fitness.ungraded
    problems += [
        f"{key}: {wanting} needs margins, {fitness.objectives[number].name} has none: "
        f"{reasons[number]} ({NEEDS['margins']}; cells needs none)"
        for number in judged
        if reasons[number]
    ]
    if not judged:
        problems.append(
            f"{key}: {wanting} needs margins, which no objective has ({NEEDS['margins']})"
        )
    return problems


def _needs_margins(name: str, design: str) -> bool:
    return "margins" in ESTIMATORS[name].needs or design.endswith("margins")


@dataclass(frozen=True)
class Preparation:
    """From the endpoints to items and estimator; see ``evomerge.estimate.Prepare``.

    An estimator that needs scores in [0, 1], margins, or an item bank, leaves the objectives that
    have none to the mean of items drawn at random; so do values that are no mean of item scores
    (perplexities), and those whose scores do not go with their margins. Objectives with the same
    source share their items; where only some of them are left to the mean, all take items that
    stand for the rest, and none that a design picked.

    Attributes:
        name: of the estimator.
        design: how items are chosen.
        count: of the items of each objective, all of them where there are fewer.
        seed: of the study.
        objectives: names [m].
        aggregates: how values are made of item scores [m].
        sources: what the items are drawn from [m].
        banks: by number of the objective.
        graded: whether an objective can have margins [m].
        raced: the first items of a trial are looked at before the others are scored, so that items
            by task come in an order by chance. (Optimal designs begin with what tells most.)
    """

    name: str
    design: str
    count: int
    seed: int
    objectives: tuple[str, ...]
    aggregates: tuple[Aggregate, ...]
    sources: tuple[str | None, ...]
    banks: Mapping[int, ItemBank]
    graded: tuple[bool, ...]
    raced: bool = False

    def __call__(self, endpoints: Sequence[Endpoint], draw: int = 0) -> tuple[Items, Estimator]:
        """Choose the items and fit whatever there is to fit.

        Args:
            endpoints: base and experts, and merges by chance.
            draw: number of the draw; the items of the next one are others.

        Raises:
            InputError: something that the estimator needs is missing.
        """
        if len(endpoints) < 2:
            raise InputError(
                f"fitness.estimator: {self.name}: expected base and experts with scores, got "
                f"{len(endpoints)} (the others failed; see their errors)"
            )
        items: list[tuple[str, ...]] = []
        parts: dict[int, SubsetEstimator] = {}
        shared: dict[tuple[str, tuple[str, ...]], Design] = {}
        numbers = range(len(self.objectives))
        populations = [self._population(number, endpoints) for number in numbers]
        modelled = [
            self._modelled(number, populations[number])
            and self._usable(number, populations[number], said=draw > 0)
            for number in numbers
        ]
        seed = self.seed if draw == 0 else _seed(self.seed, draw)
        keys = [
            (self.objectives[number] if source is None else source, populations[number].ids)
            for number, source in enumerate(self.sources)
        ]
        for number, objective in enumerate(self.objectives):
            population, key = populations[number], keys[number]
            count = min(self.count, len(population))
            try:
                if key not in shared:
                    way = self._way(population, [modelled[n] for n in numbers if keys[n] == key])
                    shared[key] = choose_items(way, population, count, seed, key[0])
                ids = shared[key].ids
                if self.raced and shared[key].name == "stratified":
                    (ids,) = drawn((ids,), self.seed, draw, None)
                items.append(ids)
                if modelled[number]:
                    parts[number] = SubsetEstimator(self.name, [population.on(shared[key])])
            except InputError as error:
                raise InputError(f"fitness.estimator: {objective}: {error}") from error
        pools = [population.ids for population in populations]
        return tuple(items), _Parts(parts, MeanEstimator(self.aggregates, pools))

    def _way(self, population: Population, modelled: Sequence[bool]) -> str:
        """Return how the items are chosen of objectives that share them [k]."""
        if self.design == "stratified":
            return "stratified" if any(modelled) and population.groups else "random"
        return self.design if all(modelled) else "random"

    def _modelled(self, number: int, population: Population) -> bool:
        """Return whether the estimator is meant for an objective."""
        needs = ESTIMATORS[self.name].needs
        assert population.endpoints is not None
        scores = population.endpoints.scores
        fractions = bool((scores >= 0).all() and (scores <= 1).all())
        return (
            self.aggregates[number].link == "mean"
            and len(population) > 1
            and ("fractions" not in needs or fractions)
            and (self.graded[number] or not _needs_margins(self.name, self.design))
            and ("bank" not in needs or number in self.banks)
        )

    def _usable(self, number: int, population: Population, said: bool) -> bool:
        """Return whether an objective's margins say anything of its scores.

        Only scored endpoints can show that they do not. A study that got so far goes on, with the
        mean of items drawn at random.
        """
        if "margins" not in ESTIMATORS[self.name].needs:
            return True
        try:
            SubsetEstimator(self.name, [population])
        except InputError as error:
            if not said:
                logger.warning(
                    "fitness.estimator: %s: %s cannot be used, its value is the mean of items "
                    "drawn at random instead: %s",
                    self.objectives[number], self.name, error,
                )  # fmt: skip
            return False
        return True

    def _population(self, number: int, endpoints: Sequence[Endpoint]) -> Population:
        answers = [one.answers[number] for one in endpoints]
        ids = answers[0].ids
        labels = tuple(one.label for one in endpoints)
        margins = [one.margins for one in answers]
        aggregate = self.aggregates[number]
        return Population(
            ids=ids,
            weights=np.array(_weights(aggregate, ids)),
            groups=tuple(aggregate.strata[item] for item in ids) if aggregate.strata else (),
            endpoints=Endpoints(
                names=labels,
                scores=np.array([one.scores for one in answers]),
                margins=np.array(margins) if all(margins) else None,
                base=labels.index("base") if "base" in labels else None,
            ),
            bank=self.banks.get(number),
        )


class _Parts:
    """The estimator on the objectives that it is meant for, the mean on all others."""

    def __init__(self, parts: Mapping[int, SubsetEstimator], mean: Estimator) -> None:
        self._parts = parts
        self._mean = mean

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        """Return the estimate of one objective; see ``Estimator``."""
        if objective in self._parts:
            return self._parts[objective].estimate(0, answers)
        return self._mean.estimate(objective, answers)


def _seed(seed: int, draw: int) -> int:
    """Return the seed of a later draw; the first one has the study's own."""
    digest = hashlib.blake2b(repr((seed, "refresh", draw)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _weights(aggregate: Aggregate, ids: Sequence[str]) -> list[float]:
    """Return what each item counts in the value of an objective [I]; only ratios matter."""
    own = [aggregate.weights[item] if aggregate.weights else 1.0 for item in ids]
    if not aggregate.strata:
        return own
    totals: dict[str, float] = {}
    for item, weight in zip(ids, own, strict=True):
        name = aggregate.strata[item]
        totals[name] = totals.get(name, 0.0) + weight
    return [w / totals[aggregate.strata[item]] for item, w in zip(ids, own, strict=True)]
