"""Where every slot of the disk lives in the model in memory.

transformers renames tensors while it loads them, and for some architectures it also rearranges
them: Mixtral's experts are one matrix each on disk and one stack in memory. The rules are code
in transformers, they differ between its versions, and the weights themselves cannot tell (the
experts of an upcycled mixture are equal at first). So the names come from transformers' own
``rename_source_key`` and the rearrangement is *probed*: transformers' own converter is run on
tensors that hold the numbers of their elements, and where each number ends up is read off. That
costs 4 to 8 bytes per element of the largest stack, once per shape, and no table per
architecture. A converter that computes something instead of moving numbers is refused, and
``require_base`` compares the outcome with the weights that the model was loaded with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.layout import Slot
from evomerge.merge.sources import Sources

if TYPE_CHECKING:
    import torch

#: torch's names of the dtypes that can be merged.
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``stop`` of a slot, and the view of a live tensor that holds them.

    The view has the shape of those rows as on disk; it may be strided.
    """

    start: int
    stop: int
    view: torch.Tensor


@dataclass(frozen=True)
class Binding:
    """The live places of all slots.

    Attributes:
        pieces: of each slot [S]; together they are all of its rows once. Empty for a tensor
            that the model's class declares as not loaded.
        dtype: safetensors name of the dtype of most of the live elements.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    dtype: str

    def direct(self, slot: int) -> torch.Tensor | None:
        """Return the flat live tensor of a slot, None where it must be copied into place.

        Copied are: slots in several or strided pieces, and slots that transformers keeps in a
        wider dtype than the model (T5's ``wo`` in float16).
        """
        pieces = self.pieces[slot]
        if len(pieces) != 1 or not pieces[0].view.is_contiguous():
            return None
        flat = pieces[0].view.view(-1)
        return flat if dtype_name(flat) == self.dtype else None

    def require_base(self, slots: Sequence[Slot], sources: Sources) -> None:
        """Compare every slot with the live model, which must hold the base's weights.

        Raises:
            ModelError: names the first tensor that differs.
        """
        import torch

        for number, (slot, pieces) in enumerate(zip(slots, self.pieces, strict=True)):
            bits, dtype = sources.base(number)
            # A copy: torch refuses to share memory that is mapped read-only without a warning.
            stored = torch.from_numpy(bits.copy()).view(getattr(torch, TORCH_DTYPES[dtype]))
            stored = stored.reshape(slot.shape)
            for piece in pieces:
                rows = stored[piece.start : piece.stop] if slot.shape else stored
                same = rows.to(piece.view.device, piece.view.dtype) == piece.view
                if not bool(same.all()):
                    raise ModelError(
                        f"models.base: {slot.name}: the loaded model does not hold what the "
                        "file stores (this architecture is not supported with this version of "
                        "transformers; please report it with the name of the model)"
                    )


def bind(slots: Sequence[Slot], model: torch.nn.Module) -> Binding:
    """Find the live place of every slot.

    Args:
        slots: of the layout, named and shaped as on disk.
        model: a transformers model of the architecture.

    Raises:
        ModelError: a slot has no live place, or a parameter no slot or more than one.
    """
    live = dict(model.state_dict(keep_vars=True))
    moved, converted = _routes(slots, model, live)
    pieces: list[tuple[Piece, ...]] = [()] * len(slots)
    for number, name in moved.items():
        view = live[name].detach()
        if tuple(view.shape) != slots[number].shape:
            raise ModelError(
                f"{slots[number].name} is {list(slots[number].shape)} on disk and "
                f"{list(view.shape)} in {type(model).__name__} (config.json does not describe "
                "these weights)"
            )
        pieces[number] = (Piece(0, slots[number].rows, view),)
    cache: dict[Any, Any] = {}
    for name, (converter, sources) in converted.items():
        for number, found in _converted(name, converter, sources, slots, model, live, cache):
            pieces[number] = found
    _require_cover(slots, pieces, model, live)
    return Binding(tuple(pieces), _main_dtype(pieces))


_Route = tuple[Any, list[tuple[str, int]]]


def _routes(
    slots: Sequence[Slot], model: torch.nn.Module, live: dict[str, Any]
) -> tuple[dict[int, str], dict[str, _Route]]:
    """Sort slots into those that are only renamed and those that a converter takes.

    This is the first half of transformers' ``convert_and_load_state_dict_in_model``.

    Returns:
        slot → live name; first live name → (converter, [(source pattern, slot)] in its order).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    owner = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    moved: dict[int, str] = {}
    converted: dict[str, _Route] = {}
    for number in sorted(range(len(slots)), key=lambda n: dot_natural_key(slots[n].name)):
        disk = slots[number].name
        name, pattern = rename_source_key(disk, renamings, converters, prefix, live)
        if name not in live and disk in live:
            name, pattern = rename_source_key(disk, [], [], prefix, live)
        if name not in live:
            _require_ignored(disk, model)
        elif pattern is None:
            moved[number] = name
        else:
            converted.setdefault(name, (owner[pattern], []))[1].append((pattern, number))
    return moved, converted


def _require_ignored(name: str, model: torch.nn.Module) -> None:
    """Refuse a tensor that the model lacks, unless its class says that old files have it."""
    import re

    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if not any(re.search(pattern, name) for pattern in patterns):
        raise ModelError(
            f"{type(model).__name__} has no place for {name} (this architecture is not "
            "supported, or config.json names another one)"
        )


def _converted(
    name: str,
    converter: Any,
    sources: list[tuple[str, int]],
    slots: Sequence[Slot],
    model: torch.nn.Module,
    live: dict[str, Any],
    cache: dict[Any, Any],
) -> Iterator[tuple[int, tuple[Piece, ...]]]:
    """Yield the pieces of the slots that one converter rearranges together."""
    import torch

    where = f"{slots[sources[0][1]].name} → {name}"
    shapes = [(pattern, slots[number].shape) for pattern, number in sources]
    ghosts = [torch.empty(shape, device="meta") for _, shape in shapes]
    targets = list(_run(converter, name, sources, slots, ghosts, model, where))
    unknown = [target for target in targets if target not in live]
    if unknown:
        raise ModelError(f"{where}: {type(model).__name__} has no {unknown[0]}")
    tensors = [live[target].detach() for target in targets]
    key = (id(converter), tuple(shapes), tuple(tuple(tensor.shape) for tensor in tensors))
    if key not in cache:
        probes = list(_numbered([shape for _, shape in shapes]))
        outcome = _run(converter, name, sources, slots, probes, model, where)
        cache[key] = _strides(outcome, [shape for _, shape in shapes], tensors, where)
    for (_, number), runs in zip(sources, cache[key], strict=True):
        shape = slots[number].shape
        yield (
            number,
            tuple(
                Piece(
                    start,
                    stop,
                    tensors[target].as_strided(
                        (stop - start, *shape[1:]) if shape else (),
                        strides,
                        tensors[target].storage_offset() + offset,
                    ),
                )
                for start, stop, target, offset, strides in runs
            ),
        )


def _run(
    converter: Any,
    name: str,
    sources: list[tuple[str, int]],
    slots: Sequence[Slot],
    tensors: Sequence[torch.Tensor],
    model: torch.nn.Module,
    where: str,
) -> dict[str, torch.Tensor]:
    """Run a copy of a converter on ``tensors``; return live name → tensor."""
    copy = deepcopy(converter)
    for (pattern, number), tensor in zip(sources, tensors, strict=True):
        copy.add_tensor(name, slots[number].name, pattern, tensor)
    try:
        made = copy.convert(name, model=model, config=getattr(model, "config", None))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: transformers cannot convert it: {error}") from error
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _numbered(shapes: Sequence[tuple[int, ...]]) -> Iterator[torch.Tensor]:
    """Yield tensors whose elements are numbered from 0 through all of them."""
    import torch

    sizes = [torch.Size(shape).numel() for shape in shapes]
    dtype = torch.int32 if sum(sizes) < 2**31 else torch.int64
    first = 0
    for shape, size in zip(shapes, sizes, strict=True):
        yield torch.arange(first, first + size, dtype=dtype).reshape(shape)
        first += size


_Run = tuple[int, int, int, int, tuple[int, ...]]


def _strides(
    outcome: dict[str, torch.Tensor],
    shapes: Sequence[tuple[int, ...]],
    live: Sequence[torch.Tensor],
    where: str,
) -> list[list[_Run]]:
    """Read off where the numbered elements of each source went.

    Args:
        outcome: live name → numbers, in the order of ``live``.
        shapes: of the sources.
        live: the tensors that the converter fills.
        where: for messages.

    Returns:
        Per source, runs of rows (start, stop, target, offset, strides) in elements.
    """
    import torch

    total = sum(torch.Size(shape).numel() for shape in shapes)
    place = torch.full((total,), -1, dtype=torch.int64)
    begins, begin = [], 0
    for numbers, tensor in zip(outcome.values(), live, strict=True):
        if numbers.shape != tensor.shape or not tensor.is_contiguous():
            raise ModelError(f"{where}: the live tensor is not laid out as transformers makes it")
        flat = numbers.reshape(-1).long()
        inside = bool(((flat >= 0) & (flat < total)).all()) if len(flat) else True
        if not inside:
            raise ModelError(f"{where}: transformers computes new numbers while loading it")
        place[flat] = torch.arange(begin, begin + len(flat))
        begins.append(begin)
        begin += len(flat)
    if begin != total or bool((place < 0).any()):
        raise ModelError(f"{where}: transformers drops or repeats numbers while loading it")
    edges = torch.tensor([*begins, total])
    result, first = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        result.append(list(_row_runs(place[first : first + size].reshape(shape), edges, where)))
        first += size
    return result


def _row_runs(place: torch.Tensor, edges: torch.Tensor, where: str) -> Iterator[_Run]:
    """Cut the rows of one source into runs of equal distance within one live tensor.

    Args:
        place: position of each element of the source, in its shape.
        edges: first position of each live tensor, and the end.
        where: for messages.
    """
    import torch

    if place.numel() == 0:
        return
    rows = place.reshape(len(place), -1) if place.dim() else place.reshape(1, 1)
    inner = place[0] if place.dim() else place
    strides = []
    affine = torch.zeros_like(inner)
    for axis, length in enumerate(inner.shape):
        step = int(inner.select(axis, 1).reshape(-1)[0] - inner.reshape(-1)[0]) if length > 1 else 1
        strides.append(step)
        shape = [-1 if other == axis else 1 for other in range(inner.dim())]
        affine = affine + (torch.arange(length) * step).reshape(shape)
    starts = rows[:, 0].contiguous()
    targets = torch.bucketize(starts, edges, right=True) - 1
    one = bool((rows == starts[:, None] + affine.reshape(1, -1)).all())
    last = torch.bucketize(rows[:, -1].contiguous(), edges, right=True) - 1
    if not one or min(strides, default=1) < 1 or not bool((last == targets).all()):
        raise ModelError(f"{where}: transformers scatters its rows while loading it")
    steps, owners = starts.diff().tolist(), targets.tolist()
    start = 0
    while start < len(rows):
        stop, step = start + 1, steps[start] if start < len(steps) else 1
        while stop < len(rows) and step > 0 and steps[stop - 1] == step:
            if owners[stop] != owners[start]:
                break
            stop += 1
        owner = owners[start]
        offset = int(starts[start] - edges[owner])
        yield start, stop, owner, offset, (max(step, 1), *strides) if place.dim() else ()
        start = stop


def _require_cover(
    slots: Sequence[Slot],
    pieces: Sequence[tuple[Piece, ...]],
    model: torch.nn.Module,
    live: dict[str, Any],
) -> None:
    """Check that slots fill every parameter exactly once and that aliases are tied."""
    # Counted by storage, because tied parameters are one, and views of one could be several.
    filled: dict[int, int] = {}
    wanted: dict[int, tuple[int, str]] = {}
    for slot, parts in zip(slots, pieces, strict=True):
        for part in parts:
            storage = part.view.untyped_storage().data_ptr()
            filled[storage] = filled.get(storage, 0) + part.view.numel()
        for alias in slot.aliases:
            if parts and alias in live and live[alias].data_ptr() != parts[0].view.data_ptr():
                raise ModelError(
                    f"{alias} should be tied to {slot.name}, but is a tensor of its own"
                )
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage().data_ptr()
        wanted[storage] = wanted.get(storage, (0, ""))[0] + parameter.numel(), name
    for storage, (count, name) in wanted.items():
        if filled.get(storage, 0) < count:
            raise ModelError(
                f"{type(model).__name__} has parameters that the checkpoint does not store "
                f"(e.g. {name}); transformers would start them at random (save the checkpoint "
                "from the model that is meant, or correct architectures in config.json)"
            )
        if filled.get(storage, 0) > count:
            raise ModelError(f"{name}: several tensors of the checkpoint are this one parameter")


def _main_dtype(pieces: Sequence[tuple[Piece, ...]]) -> str:
    counts: dict[str, int] = {}
    for parts in pieces:
        for part in parts:
            name = dtype_name(part.view)
            counts[name] = counts.get(name, 0) + part.view.numel()
    return max(sorted(counts), key=lambda name: counts[name])


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the safetensors name of a tensor's dtype.

    Raises:
        ModelError: the model is not in a dtype that can be merged.
    """
    names = {f"torch.{name}": code for code, name in TORCH_DTYPES.items()}
    if str(tensor.dtype) not in names:
        raise ModelError(f"the live model is {tensor.dtype} (use float32, bfloat16 or float16)")
    return names[str(tensor.dtype)]
