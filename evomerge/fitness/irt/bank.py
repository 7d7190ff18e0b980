"""Item banks: how hard items are and what they ask of a model, by item id.

The model is the multidimensional two-parameter one in slope-intercept form,
p = sigmoid(slope . theta - intercept), with theta ~ N(0, I). One slope for all items is the 1PL.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError

Floats = NDArray[np.float64]
FORMAT = "evomerge item bank 1"


@dataclass(frozen=True, slots=True, eq=False)
class ItemBank:
    """Parameters of items.

    Attributes:
        kind: ``1pl``, ``2pl`` (one dimension) or ``m2pl``.
        ids: of the items [I], each once; whoever asks for an item asks by its id.
        slopes: [I, D]; negative where the ability hurts.
        intercepts: [I].
        error: mean absolute error of the mean score of models that the fit did not see, from the
            even items to the odd ones; 0.0 where it was not measured.
        variance: of an item score within a model, mean over the models; 0.0 where not measured.
        responses: scores of the models that it was fitted to [M, I], for anchors; None where they
            are not known, or not of every item.
    """

    kind: str
    ids: tuple[str, ...]
    slopes: Floats
    intercepts: Floats
    error: float = 0.0
    variance: float = 0.0
    responses: Floats | None = None

    def __post_init__(self) -> None:
        count = len(self.ids)
        if len(set(self.ids)) != count or count == 0:
            raise InputError(
                f"item bank: expected ids [I >= 1], each once, got {count} with "
                f"{len(set(self.ids))} different"
            )
        if self.slopes.ndim != 2 or len(self.slopes) != count or self.slopes.shape[1] == 0:
            raise InputError(
                f"item bank: slopes: expected [I={count}, D >= 1], got {list(self.slopes.shape)}"
            )
        if self.intercepts.shape != (count,):
            raise InputError(
                f"item bank: intercepts: expected [I={count}], got {list(self.intercepts.shape)}"
            )
        if not (np.isfinite(self.slopes).all() and np.isfinite(self.intercepts).all()):
            raise InputError("item bank: a parameter is not finite")
        if self.responses is not None and (
            self.responses.ndim != 2
            or self.responses.shape[1] != count
            or not np.isfinite(self.responses).all()
        ):
            raise InputError(
                f"item bank: responses: expected finite numbers [M, I={count}], got "
                f"{list(self.responses.shape)}"
            )

    @property
    def dimensions(self) -> int:
        """Number of abilities D."""
        return int(self.slopes.shape[1])

    @property
    def digest(self) -> str:
        """Hash of the ids and parameters, 32 hex digits."""
        names = json.dumps([self.kind, list(self.ids), self.error, self.variance]).encode()
        known = () if self.responses is None else (self.responses,)
        arrays = (self.slopes, self.intercepts, *known)
        numbers = [array.astype("<f8").tobytes() for array in arrays]
        return hashlib.blake2b(b"".join([names, *numbers]), digest_size=16).hexdigest()

    def select(self, ids: Sequence[str]) -> ItemBank:
        """Return the bank of some items [n], in their order.

        Raises:
            InputError: an item that the bank does not have.
        """
        index = {name: row for row, name in enumerate(self.ids)}
        unknown = [name for name in ids if name not in index]
        if unknown:
            raise InputError(
                f"item bank: no item {unknown[0]!r} and {len(unknown) - 1} others among its "
                f"{len(self.ids)} (fit a bank on these items, or use an estimator without one)"
            )
        rows = [index[name] for name in ids]
        return ItemBank(
            self.kind,
            tuple(ids),
            self.slopes[rows],
            self.intercepts[rows],
            self.error,
            self.variance,
            None if self.responses is None else self.responses[:, rows],
        )

    def save(self, path: Path) -> None:
        """Write the bank as npz without pickled parts."""
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "error": self.error,
            "variance": self.variance,
            "digest": self.digest,
        }
        known: dict[str, Any] = {} if self.responses is None else {"responses": self.responses}
        with path.open("wb") as file:
            np.savez(
                file,
                header=np.array(json.dumps(header)),
                ids=np.array(json.dumps(list(self.ids))),
                slopes=self.slopes,
                intercepts=self.intercepts,
                **known,
            )


def load_bank(path: Path) -> ItemBank:
    """Read a bank that ``ItemBank.save`` wrote; nothing in the file is executed.

    Raises:
        InputError: no such file, another format, or its digest is not that of its contents.
    """
    arrays = _arrays(path, ("header", "ids", "slopes", "intercepts"), ("responses",))
    try:
        header = json.loads(str(arrays["header"]))
        ids = tuple(map(str, json.loads(str(arrays["ids"]))))
        if header["format"] != FORMAT:
            raise InputError(f"{path}: expected format {FORMAT!r}, got {header['format']!r}")
        bank = ItemBank(
            str(header["kind"]),
            ids,
            np.asarray(arrays["slopes"], dtype=np.float64),
            np.asarray(arrays["intercepts"], dtype=np.float64),
            float(header["error"]),
            float(header["variance"]),
            np.asarray(known, dtype=np.float64)
            if (known := arrays.get("responses")) is not None
            else None,
        )
        digest = header["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not an item bank: {error}") from error
    if bank.digest != digest:
        raise InputError(
            f"{path}: the contents have digest {bank.digest}, the file says {digest} "
            "(it is damaged or was edited: fit the bank again)"
        )
    return bank


def import_tiny_benchmarks(path: Path, ids: Sequence[str]) -> ItemBank:
    """Read item parameters in tinyBenchmarks' form.

    Their curve is ``sigmoid(sum_d (a_d theta_d - b))``: the difficulty is subtracted once per
    dimension, so the intercept is D times their b (or the sum of b where it has D columns).

    Args:
        path: ``best_parameters.json`` (``disc`` [I, D], ``diff`` [I, 1 or D]), or an npz with
            ``A`` [1, D, I] and ``B`` [1, 1 or D, I]. Their pickle is refused, because reading
            one can run any code; ``numpy.savez(path, A=..., B=...)`` makes the npz of it.
        ids: of the items [I], in the order of the parameters.

    Raises:
        InputError: a pickle, another form, or another number of items than ids.
    """
    if path.suffix in {".pkl", ".pickle"}:
        raise InputError(
            f"{path}: a pickle can run any code and is not read (open it where you trust it and "
            "save its irt_parameters with numpy.savez(path, A=..., B=...))"
        )
    if path.suffix == ".npz":
        arrays = _arrays(path, ("A", "B"))
        slopes, difficulty = _items_first(path, arrays["A"]), _items_first(path, arrays["B"])
    else:
        try:
            raw = json.loads(path.read_text())
            slopes = np.asarray(raw["disc"], dtype=np.float64)
            difficulty = np.asarray(raw["diff"], dtype=np.float64)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: expected JSON with 'disc' and 'diff' of numbers: {error!r}"
            ) from error
        difficulty = difficulty.reshape(len(difficulty), -1)
    if slopes.ndim != 2 or len(slopes) != len(ids) or len(difficulty) != len(ids):
        raise InputError(
            f"{path}: expected parameters of {len(ids)} items, got slopes {list(slopes.shape)} "
            f"and difficulties {list(difficulty.shape)}"
        )
    if difficulty.shape[1] not in {1, slopes.shape[1]}:
        raise InputError(
            f"{path}: expected 1 or {slopes.shape[1]} difficulties per item, "
            f"got {difficulty.shape[1]}"
        )
    intercepts = np.broadcast_to(difficulty, slopes.shape).sum(axis=1)
    return ItemBank("m2pl", tuple(ids), slopes, intercepts)


def _items_first(path: Path, array: NDArray[Any]) -> Floats:
    """Return tinyBenchmarks' [1, D, I] as [I, D]."""
    if array.ndim != 3 or len(array) != 1:
        raise InputError(f"{path}: expected arrays [1, D, I], got {list(array.shape)}")
    return np.asarray(array[0].T, dtype=np.float64)


def _arrays(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Return the named arrays of an npz file, none of which may be pickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise InputError(
                    f"{path}: expected arrays {', '.join(names)}, got {', '.join(file.files)}"
                )
            return {name: file[name] for name in (*names, *optional) if name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz file of plain arrays: {error}") from error
