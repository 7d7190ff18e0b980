"""Log-likelihoods of continuations, as lm-eval's HFLM defines them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.trie import Group, Row, Sequenced, arrange

_LOG = logging.getLogger(__name__)

#: Elements of a batch's logits; a vocabulary of 128 k leaves room for 2,000 positions.
LOGITS = 1 << 28


@dataclass(frozen=True, slots=True)
class Continuation:
    """A context and what follows it, as token ids.

    Attributes:
        context: at least one token.
        target: at least one token.
    """

    context: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Continuations in the order in which they are computed.

    Attributes:
        groups: rows; their sequences are the continuations, by index.
        targets: of each continuation.
    """

    groups: tuple[Group, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed, padding not counted."""
        return sum(
            len(group.prefix) + sum(len(row.tokens) for row in group.rows) for group in self.groups
        )


def arranged(forward: Forward, asked: Sequence[Continuation], longest: int) -> Arrangement:
    """Return how to compute some continuations; the same for every candidate.

    Args:
        forward: of the model.
        asked: any number.
        longest: most tokens that the model takes; more are cut from the left, as lm-eval does.
    """
    sequences = []
    for one in asked:
        tokens = (*one.context, *one.target)[-(longest + 1) :][:-1]
        sequences.append(Sequenced(tokens, len(tokens) - len(one.target)))
    # In a tree a token's distance in the row is not its distance in the text, so sliding
    # attention would need masks of its own; nor may a longer row change how a shorter one is read.
    within: list[int] = []
    beyond: list[int] = []
    for number, sequence in enumerate(sequences):
        whole = forward.window is None or len(sequence.tokens) <= forward.window
        (within if whole else beyond).append(number)
    groups = _arranged(sequences, within, forward.trees, forward.prefixes)
    groups += _arranged(sequences, beyond, trees=False, prefixes=False)
    return Arrangement(groups, tuple(one.target for one in asked))


def _arranged(
    sequences: Sequence[Sequenced], numbers: Sequence[int], trees: bool, prefixes: bool
) -> tuple[Group, ...]:
    """Arrange some of the sequences."""
    groups = arrange([sequences[number] for number in numbers], trees, prefixes)
    if len(numbers) == len(sequences):
        return groups
    return tuple(
        replace(
            group,
            rows=tuple(
                replace(row, wanted=tuple((numbers[place], nodes) for place, nodes in row.wanted))
                for row in group.rows
            ),
        )
        for group in groups
    )


def log_likelihoods(forward: Forward, plan: Arrangement, budget: int) -> list[tuple[float, bool]]:
    """Return the log-likelihood of every continuation, and whether it is the greedy one.

    Args:
        forward: of the model, with the weights as they are now.
        plan: what to compute.
        budget: tokens per forward pass, padding counted; one row at least.

    Returns:
        [n], in nats; the order of the plan's targets.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(plan.targets)
    width = forward.model.get_input_embeddings().weight.shape[0]
    for group in plan.groups:
        ahead = forward.prefix(group.prefix) if group.prefix else ()
        for rows in batches(group.rows, budget, LOGITS // width):
            numbers = [number for row in rows for number, _ in row.wanted]
            for number, one in zip(numbers, _answers(forward, rows, ahead, plan), strict=True):
                found[number] = one
    return found


def batches(rows: Sequence[Row], budget: int, positions: int) -> Iterator[list[Row]]:
    """Cut rows, longest first, into batches of a padded size.

    Args:
        rows: longest first.
        budget: tokens of a batch, padding counted.
        positions: wanted logits of a batch.
    """
    batch: list[Row] = []
    wanted = 0
    for row in rows:
        more = sum(len(nodes) for _, nodes in row.wanted)
        if batch and (
            (len(batch) + 1) * len(batch[0].tokens) > budget or wanted + more > positions
        ):
            yield batch
            batch, wanted = [], 0
        batch.append(row)
        wanted += more
    if batch:
        yield batch


def _answers(
    forward: Forward, rows: Sequence[Row], ahead: object, plan: Arrangement
) -> list[tuple[float, bool]]:
    """Return the answers of one batch, in the order of its rows."""
    lengths = [len(nodes) for row in rows for _, nodes in row.wanted]
    targets = [token for row in rows for number, _ in row.wanted for token in plan.targets[number]]
    logits, places = forward.logits(rows, ahead)  # type: ignore[arg-type]
    with torch.inference_mode():
        target = torch.tensor(targets, device=logits.device)
        greedy = logits.argmax(-1)[places] == target
        # In the model's own dtype, as lm-eval has it.
        chosen = logits.log_softmax(-1)[places, target]
        pieces = torch.split(chosen, lengths)
        padded = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        sums = padded.sum(-1).float().tolist()
        wrong = torch.nn.utils.rnn.pad_sequence(
            list(torch.split(~greedy, lengths)), batch_first=True
        )
        all_greedy = (~wrong.any(-1)).tolist()
    return list(zip(sums, all_greedy, strict=True))
