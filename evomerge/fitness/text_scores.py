"""What a model predicts on text, against a reference or by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from evomerge.errors import EvaluationError, TaskError
from evomerge.fitness.aggregate import Aggregate
from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.likelihood import batches
from evomerge.fitness.hot.trie import Row
from evomerge.fitness.protocol import NOTHING, Live
from evomerge.trial import Score

if TYPE_CHECKING:
    from evomerge.fitness.goals import TextSpec

#: Tokens of a forward pass where the study does not say.
TOKENS = 4096
#: Elements of the logits that are in work at a time: float32 and a few copies make 1 GiB.
LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference model predicts on one text, in main memory.

    Attributes:
        ids: its likeliest tokens at each place [L, k].
        logs: their log-probabilities [L, k], nats.
        rest: log-probability of all others together [L].
        hidden: last hidden states [L, H]; None where they are not compared.
    """

    ids: torch.Tensor
    logs: torch.Tensor
    rest: torch.Tensor
    hidden: torch.Tensor | None


class TextScores:
    """Scores on one set of texts; the model reads each asked text once for all of them.

    The references are computed when this object is made, with the references' weights put into
    the live model, and kept: 8 bytes x ``top`` for each token, and for alignment the hidden
    states in the model's own dtype.

    Args:
        specs: of one set of texts [m].
        texts: all [I].
        live: the model.

    Raises:
        TaskError: the model is no causal language model, or a text has no tokens.
    """

    def __init__(self, specs: Sequence[TextSpec], texts: Sequence[str], live: Live) -> None:
        name = specs[0].objective.name
        if live.model.config.is_encoder_decoder or live.model.get_output_embeddings() is None:
            raise TaskError(f"{name}: {specs[0].kind} is for causal language models")
        self._specs = tuple(specs)
        self._forward = Forward(live.model)
        self._hidden: torch.Tensor | None = None
        if any(spec.kind == "alignment" for spec in specs):
            # Behind the hook that picks the wanted positions.
            live.model.get_output_embeddings().register_forward_pre_hook(self._keep)
        self._budget = TOKENS if live.found else live.batch_tokens or TOKENS
        self._width = live.model.get_input_embeddings().weight.shape[0]
        limit = getattr(live.model.config, "max_position_embeddings", None) or specs[0].tokens
        self._tokens = [
            live.tokenizer.encode(text)[: min(specs[0].tokens, limit)] for text in texts
        ]
        for number, tokens in enumerate(self._tokens):
            if not tokens:
                raise TaskError(f"{name}: item '{number}' has no tokens")
        self._references: dict[tuple[str, int, bool], list[Reference]] = {}
        for spec in specs:
            key = _key(spec)
            if spec.of and key not in self._references:
                live.put(spec.of)
                self._references[key] = self._refer(spec)

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        """Score the model as it is now; see ``Scorer``."""
        known = {str(number): number for number in range(len(self._tokens))}
        for spec, ids in zip(self._specs, items, strict=True):
            unknown = [item for item in ids if item not in known]
            if unknown:
                raise TaskError(
                    f"{spec.objective.name}: item {unknown[0]!r} not among the {len(known)} texts"
                )
        wanted = sorted({known[item] for ids in items for item in ids})
        found: list[dict[str, float]] = [{} for _ in self._specs]

        def measure(number: int, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
            for spec, ids, scores in zip(self._specs, chosen, found, strict=True):
                if str(number) in ids:
                    scores[str(number)] = self._measured(spec, number, logits, hidden)

        chosen = [set(ids) for ids in items]
        self._read(wanted, measure)
        return tuple(
            self._scored(spec, ids, scores)
            for spec, ids, scores in zip(self._specs, items, found, strict=True)
        )

    def facts(self) -> Mapping[str, str]:
        """Return nothing beside what the tasks say of batches."""
        return {}

    def _scored(self, spec: TextSpec, ids: Sequence[str], scores: Mapping[str, float]) -> Score:
        if not ids:
            return NOTHING
        values = tuple(scores[item] for item in ids)
        for item, value in zip(ids, values, strict=True):
            if not math.isfinite(value):
                raise EvaluationError(f"{spec.objective.name}: item '{item}': the score is {value}")
        return Score(*Aggregate().estimate(ids, values), values)

    def _read(
        self,
        numbers: Sequence[int],
        use: Callable[[int, torch.Tensor, torch.Tensor | None], None],
    ) -> None:
        """Run the model over some texts and hand on logits [L, V] and hidden states [L, H]."""
        rows = []
        for number in sorted(numbers, key=lambda one: -len(self._tokens[one])):
            tokens = np.asarray(self._tokens[number], np.int64)
            places = np.arange(len(tokens))
            rows.append(Row(tokens, places, None, ((number, places),)))
        for batch in batches(rows, self._budget, max(LOGITS // self._width, 1)):
            length = len(batch[0].tokens)
            padded = torch.zeros((len(batch), length), dtype=torch.long)
            wanted = []
            for at, row in enumerate(batch):
                padded[at, : len(row.tokens)] = torch.from_numpy(row.tokens)
                wanted.append(torch.arange(len(row.tokens)) + at * length)
            # Padding on the right is seen by nobody.
            logits = self._forward.picked(padded.to(self._forward.device), torch.cat(wanted))
            hidden = self._hidden
            self._hidden = None
            start = 0
            with torch.inference_mode():
                for row in batch:
                    stop = start + len(row.tokens)
                    states = None if hidden is None else hidden[start:stop]
                    use(row.wanted[0][0], logits[start:stop].float(), states)
                    start = stop

    def _keep(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keep what the head is given [1, N, H]."""
        self._hidden = arguments[0].flatten(0, -2)

    def _refer(self, spec: TextSpec) -> list[Reference]:
        """Return what the weights that are in the model now predict on every text [I]."""
        found: dict[int, Reference] = {}
        aligned = spec.kind == "alignment"

        def keep(number: int, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
            logs = logits.log_softmax(-1)
            top, ids = logs.topk(min(spec.top or self._width, logs.shape[-1]), -1)
            states = hidden.cpu() if aligned and hidden is not None else None
            found[number] = Reference(
                ids.to(torch.int32).cpu(), top.cpu(), _rest(logs, ids).cpu(), states
            )

        self._read(range(len(self._tokens)), keep)
        return [found[number] for number in range(len(self._tokens))]

    def _measured(
        self, spec: TextSpec, number: int, logits: torch.Tensor, hidden: torch.Tensor | None
    ) -> float:
        """Return the score of one text: the mean over its tokens."""
        logs = logits.log_softmax(-1)
        if spec.kind == "entropy":
            # A token of probability zero adds nothing, not NaN.
            return float(torch.special.entr(logs.exp()).sum(-1).double().mean())
        reference = self._references[_key(spec)][number]
        value = divergence(reference, logs)
        if spec.kind == "alignment":
            assert hidden is not None
            assert reference.hidden is not None
            theirs, mine = reference.hidden.to(hidden.device).float(), hidden.float()
            if spec.hidden == "mse":
                value += float((theirs - mine).square().mean(-1).double().mean())
            else:
                close = torch.nn.functional.cosine_similarity(theirs, mine, dim=-1)
                value += 1.0 - float(close.double().mean())
        return value


def _key(spec: TextSpec) -> tuple[str, int, bool]:
    return (spec.of, spec.top, spec.kind == "alignment")


def _rest(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of all tokens but some [L]; -inf where there are no others."""
    if ids.shape[-1] == logs.shape[-1]:
        return logs.new_full(logs.shape[:-1], -math.inf)
    return logs.scatter(-1, ids.long(), -math.inf).logsumexp(-1)


def divergence(reference: Reference, logs: torch.Tensor) -> float:
    """Return the mean over a text's tokens of KL(reference || model), in nats.

    All tokens beside the reference's likeliest ones count as one, which makes it a little
    smaller than over the whole vocabulary, never larger (data-processing inequality), and exact
    where all are kept.

    Args:
        reference: of the text.
        logs: the model's log-probabilities [L, V].
    """
    ids = reference.ids.to(logs.device).long()
    theirs, rest = reference.logs.to(logs.device), reference.rest.to(logs.device)
    mine = logs.gather(-1, ids)
    each = (theirs.exp() * (theirs - mine)).sum(-1)
    others = rest.exp()
    # Without others both logarithms are -inf, and their difference is none.
    beside = torch.where(others > 0, others * (rest - _rest(logs, ids)), torch.zeros_like(others))
    return float((each + beside).double().mean())
