"""The items that an estimator chooses, draw by draw, and what makes values of their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.errors import InputError
from evomerge.estimate import Endpoint, Estimation, Estimator
from evomerge.item_cache import Items
from evomerge.trial import Objective


class Designs:
    """Chooses items when the first trial of a draw needs them.

    Every draw is a pure function of the endpoints and its number, so a study that is continued
    finds the same ones.

    Args:
        estimation: of the study.
        endpoints: models whose answers to all items are known.
        objectives: [m].
        pool: the search items [m][I].
        chosen: told of the estimator and the items of every new draw.

    Raises:
        InputError: from the estimator, or it chose what are no search items.
    """

    def __init__(
        self,
        estimation: Estimation,
        endpoints: Sequence[Endpoint],
        objectives: Sequence[Objective],
        pool: Items,
        chosen: Callable[[Estimator, Items], None],
    ) -> None:
        self._estimation = estimation
        self._endpoints = tuple(endpoints)
        self._objectives = tuple(objectives)
        self._pool = pool
        self._chosen = chosen
        self._items: dict[int, Items] = {}
        self(0)  # what is wrong shows before the search

    def __call__(self, draw: int) -> Items:
        """Return the items of a draw [m][n].

        Raises:
            InputError: see the class.
        """
        if draw not in self._items:
            items, estimator = self._estimation.prepare(self._endpoints, draw)
            self._require_sound(items)
            self._chosen(estimator, items)
            self._items[draw] = items
        return self._items[draw]

    def _require_sound(self, items: Items) -> None:
        first = self._items.get(0, items)
        name = self._estimation.name
        for objective, ids, known, before in zip(
            self._objectives, items, self._pool, first, strict=True
        ):
            if not ids or len(set(ids)) != len(ids) or not set(ids) <= set(known):
                raise InputError(
                    f"fitness.estimator: {name} chose {len(ids)} items for {objective.name}: "
                    f"expected at least 1 of its {len(known)} search items, each once"
                )
            if len(ids) != len(before):  # budgets count on it
                raise InputError(
                    f"fitness.estimator: {name} chose {len(ids)} items for {objective.name}: "
                    f"expected {len(before)}, as in its first draw"
                )
