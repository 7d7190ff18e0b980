"""The requests of lm-eval on the hot path: what HFLM answers, in less time."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from evomerge.fitness.hot.batch_size import found_tokens
from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.generate import Prompts, Stops, arranged_prompts, generate
from evomerge.fitness.hot.likelihood import (
    Arrangement,
    Continuation,
    arranged,
    log_likelihoods,
)

_LOG = logging.getLogger(__name__)

#: Sets of items whose arrangement is kept: search, validation, test and a few more.
PLANS = 16
#: Settings of a generation config under which the most likely token is not simply taken.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1),
    "bad_words_ids": (None,), "min_length": (None, 0), "min_new_tokens": (None,),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "encoder_repetition_penalty": (None, 1.0),
    "sequence_bias": (None,), "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0), "watermarking_config": (None,), "penalty_alpha": (None, 0.0),
    "stop_strings": (None,), "max_time": (None,), "prompt_lookup_num_tokens": (None,),
    "max_new_tokens": (None,),  # of a model's own, before what a task asks for
}  # fmt: skip


class Runner:
    """Answers requests with the weights that a live causal model holds now.

    Prompts are tokenised once and arranged once per set of items. The answers are those of
    lm-eval's HFLM up to the last bits, which depend on how prompts are batched there too.

    Args:
        lm: an ``HFLM`` around the model; it tokenises, and answers what is not on the hot path.
        budget: tokens per forward pass; None to find it by memory, see ``batch_size``.
        found: an earlier run found ``budget`` so: it shrinks where it does not fit any more.
        share: of a GPU that this process may fill; what is found fits into it.
    """

    def __init__(
        self, lm: Any, budget: int | None = None, found: bool = False, share: float = 1.0
    ) -> None:
        self._lm = lm
        self._forward = Forward(lm.model)
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._stops: dict[tuple[str, ...], Stops] = {}
        self.budget = budget or found_tokens(self._forward, share)
        self._given = budget is not None and not found

    def facts(self) -> dict[str, str]:
        """Return what decides the last bits of the answers, for the record."""
        return {
            "batch_tokens": str(self.budget),
            "shared_prefixes": str(self._forward.prefixes).lower(),
            "token_trees": str(self._forward.trees).lower(),
        }

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy) of each context and continuation [n]."""
        key = ("loglikelihood", *(request.args for request in requests))
        plan = self._plan(key, lambda: self._continuations([one.args for one in requests]))
        answers: list[tuple[float, bool]] = self._fitting(
            lambda: log_likelihoods(self._forward, plan, self.budget)
        )
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in nats [n]."""
        texts = [request.args[0] for request in requests]
        plan, owners = self._plan(("rolling", *texts), lambda: self._windows(texts))
        answers = self._fitting(lambda: log_likelihoods(self._forward, plan, self.budget))
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the generated text of each prompt, cut before the first stop string [n]."""
        results: list[str | None] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        for kind, numbers in kinds.items():
            chosen = [requests[number] for number in numbers]
            for number, text in zip(numbers, self._generated(kind, chosen), strict=True):
                results[number] = text
        return [text for text in results if text is not None]

    def _generated(self, kind: str, requests: Sequence[Any]) -> list[str]:
        from evomerge.fitness.lm_eval import before_stops, generation_settings

        lm = self._lm
        until, most, others = generation_settings(lm, requests[0].args[1])
        texts = [request.args[0] for request in requests]
        if not self._greedy(others):
            return list(lm.generate_until(list(requests), disable_tqdm=True))
        plan, within, beyond = self._plan(
            ("generate", kind, *texts), lambda: self._prompts(texts, most)
        )
        config = lm.model.generation_config.eos_token_id
        ends = frozenset(config if isinstance(config, list) else [config]) - {None}
        stops = self._stops.setdefault(tuple(until), Stops(lm.tokenizer, until))
        found = self._fitting(
            lambda: generate(self._forward, plan, self.budget, most, ends, stops.reached)
        )
        answers = dict(
            zip(within, (before_stops(lm.tok_decode(new), until) for new in found), strict=True)
        )
        if beyond:
            rest = lm.generate_until([requests[number] for number in beyond], disable_tqdm=True)
            answers |= zip(beyond, rest, strict=True)
        return [answers[number] for number in range(len(texts))]

    def _greedy(self, others: dict[str, Any]) -> bool:
        """Return whether plain greedy decoding with a plain cache is what lm-eval would do."""
        lm, forward = self._lm, self._forward
        if any(others.values()) or others.keys() - {"do_sample", "temperature"}:
            return False
        config = lm.model.generation_config
        if any(getattr(config, name, values[0]) not in values for name, values in _PLAIN.items()):
            return False
        # Rows of different lengths stand side by side, so the model must be told positions.
        if not forward.prefixes or "position_ids" not in forward.takes:
            return False
        return getattr(lm, "think_end_token", None) is None

    def _prompts(self, texts: Sequence[str], most: int) -> tuple[Prompts, list[int], list[int]]:
        """Return prompts whose texts stay within the window, and which these and the others are.

        What others are asked for beside a prompt does not decide how it is answered.
        """
        prompts = [self._prompt(text)[-(self._lm.max_length - most) :] for text in texts]
        window = self._forward.window
        within = [
            number
            for number, tokens in enumerate(prompts)
            if window is None or len(tokens) + most <= window
        ]
        beyond = sorted(set(range(len(texts))) - set(within))
        return arranged_prompts(self._forward, [prompts[n] for n in within]), within, beyond

    def _continuations(self, pairs: Sequence[tuple[str, str]]) -> Arrangement:
        """Tokenise contexts and continuations as ``LM.loglikelihood`` does."""
        lm = self._lm
        asked = []
        for context, continuation in pairs:
            if context == "":
                target = lm.tok_encode(continuation, add_special_tokens=False)
                start = [lm.prefix_token_id]
                if target[0] == lm.prefix_token_id:
                    start, target = target[:1], target[1:]
            else:
                start, target = lm._encode_pair(context, continuation)
            asked.append(Continuation(tuple(start), tuple(target)))
        return arranged(self._forward, asked, lm.max_length)

    def _windows(self, texts: Sequence[str]) -> tuple[Arrangement, list[int]]:
        """Cut texts into windows as ``HFLM.loglikelihood_rolling`` does."""
        from evomerge.fitness.lm_eval import rolling_windows

        lm = self._lm
        asked, owners = [], []
        for owner, text in enumerate(texts):
            for context, target in rolling_windows(lm, text):
                asked.append(Continuation(tuple(context), tuple(target)))
                owners.append(owner)
        return arranged(self._forward, asked, lm.max_length), owners

    def _prompt(self, text: str) -> list[int]:
        """Tokenise a prompt; one without tokens is read as an empty context is, see above."""
        tokens: list[int] = self._lm.tok_batch_encode([text])[0][0].tolist()
        return tokens or [self._lm.prefix_token_id]

    def _plan(self, key: Hashable, make: Any) -> Any:
        """Return what was made for the same requests before."""
        if key not in self._plans:
            self._plans[key] = make()
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _fitting(self, work: Any) -> Any:
        """Do some work with as large a batch as fits; once found, the size stays."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self._given or self.budget <= 64:
                    raise
                self.budget //= 2
                torch.cuda.empty_cache()
                _LOG.info("batches of %d tokens from now on: larger ones do not fit", self.budget)
