"""Perplexities, groups and our own metrics: values equal lm-eval's, or plain torch's."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import Zoo, make_zoo, write_task

from evomerge.errors import EvaluationError, TaskError
from evomerge.estimate import Answers, mean_of
from evomerge.fitness.aggregate import Aggregate, MeanEstimator
from evomerge.fitness.lm_eval import LmEvalFitness, LmEvalTasks, TaskSpec
from evomerge.fitness.measures import Choices, margin
from evomerge.trial import Direction, Score

BATCH = 8
#: Log-likelihoods of float32 differ in the last bits between batches, and perplexities of 1e9
#: take that twentyfold.
REL = 3e-6

ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "put {{text}} {{first}}={{next}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""

GROUPS = {
    "sized": "group: sized\ntask: [choice, [sub], likely]\n".replace("[sub]", "short_choice")
    + "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    "plain": "group: plain\ntask: [choice, inner]\n"
    "aggregate_metric_list: [{metric: acc, weight_by_size: false, filter_list: none}]\n",
    "inner": "group: inner\ntask: [short_choice, likely]\n",
    "surprise": "group: surprise\ntask: [likely, short_likely]\n"
    "aggregate_metric_list: [{metric: perplexity, weight_by_size: false}]\n",
}

SPECS = (
    TaskSpec("rolling", "word_perplexity", name="words"),
    TaskSpec("rolling", "byte_perplexity", name="bytes"),
    TaskSpec("rolling", "bits_per_byte", name="bits"),
    TaskSpec("likely", "perplexity", name="likely"),
    TaskSpec("sized"),
    TaskSpec("plain"),
    TaskSpec("surprise"),
)

OWN = (
    TaskSpec("gen_regex", "exact_match", filter="strict", name="right"),
    TaskSpec("gen_regex", "response_tokens", name="length"),
    TaskSpec("gen_regex", "reference_loglikelihood", name="reference"),
    TaskSpec("choice", "margin", name="margin"),
    TaskSpec("choice", "acc", name="acc"),
    TaskSpec("choice", "acc_norm", name="acc_norm"),
    TaskSpec("choice", "reference_loglikelihood", name="right_choice"),
    TaskSpec("likely", "reference_loglikelihood", name="next"),
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    zoo = make_zoo(tmp_path_factory.mktemp("study"))
    write_task(zoo.tasks, "rolling", ROLLING)
    for name in ("choice", "likely"):
        text = (zoo.tasks / f"{name}.yaml").read_text()
        text = text.replace(f"task: {name}", f"task: short_{name}").replace(
            "data/test", "data/short"
        )
        (zoo.tasks / f"short_{name}.yaml").write_text(text + "tag: short_tasks\n")
    lines = (zoo.root / "data" / "test.jsonl").read_text().splitlines(keepends=True)
    (zoo.root / "data" / "short.jsonl").write_text("".join(lines[3:10]))
    for name, body in GROUPS.items():
        (zoo.tasks / f"{name}.yaml").write_text(body)
    return zoo


def read_model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tasks(zoo: Zoo) -> LmEvalTasks:
    return LmEvalTasks.load(SPECS, (zoo.tasks,), zoo.root)


@pytest.fixture(scope="module")
def fitness(zoo: Zoo, tasks: LmEvalTasks) -> LmEvalFitness:
    return tasks.bind(*read_model(zoo.models[0]), batch_size=BATCH)


@functools.cache
def reference(zoo: Zoo, task: str, samples: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
    """Run lm-eval itself on a task or group; all documents where samples are empty."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(zoo.root)
        results = simple_evaluate(
            model=HFLM(
                pretrained=str(zoo.models[0]), device="cpu", dtype="float32", batch_size=BATCH
            ),
            tasks=[task],
            task_manager=TaskManager(include_path="tasks", include_defaults=False),
            samples={name: list(items) for name, items in samples} or None,
            log_samples=True,
            bootstrap_iters=200 if task == "likely" else 2,
        )
    assert results is not None
    return results


def lm_eval_value(
    zoo: Zoo, spec: TaskSpec, metric: str, samples: tuple[tuple[str, tuple[int, ...]], ...] = ()
) -> float:
    results = reference(zoo, spec.task, samples)
    found = results["groups" if spec.task in GROUPS else "results"][spec.task]
    return float(found[f"{metric},none"])


METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "acc", "acc",
           "perplexity")  # fmt: skip


def test_values_over_all_items_are_lm_evals(
    zoo: Zoo, tasks: LmEvalTasks, fitness: LmEvalFitness
) -> None:
    scores = fitness.score(tasks.item_ids)
    for spec, metric, score in zip(SPECS, METRICS, scores, strict=True):
        assert score.value == pytest.approx(lm_eval_value(zoo, spec, metric), rel=REL), spec


@pytest.mark.parametrize(("number", "metric"), [*enumerate(METRICS[:4])])
def test_aggregates_of_lm_evals_own_answers_are_lm_evals_values(
    zoo: Zoo, tasks: LmEvalTasks, number: int, metric: str
) -> None:
    spec = SPECS[number]
    rows = reference(zoo, spec.task, ())["samples"][spec.task]
    rows = [(str(row["doc_id"]), row[metric]) for row in rows]
    scores = [-one[0] / one[1] if isinstance(one, tuple | list) else -one for _, one in rows]
    value, _ = tasks.aggregates[number].estimate([name for name, _ in rows], scores)
    assert value == pytest.approx(lm_eval_value(zoo, spec, metric), rel=1e-12)


def test_values_over_some_items_are_lm_evals(
    zoo: Zoo, tasks: LmEvalTasks, fitness: LmEvalFitness
) -> None:
    draw = random.Random(4)
    asked: list[tuple[str, ...]] = []
    for ids in tasks.item_ids:
        few = draw.sample(ids, 9)
        # lm-eval scores all documents of a task that is not named.
        few += [one for one in dict.fromkeys(name.rpartition("/")[0] + "/4" for name in ids)
                if "/" in ids[0] and one not in few]  # fmt: skip
        asked.append(tuple(few))
    scores = fitness.score(asked)
    for number in (0, 4, 5):  # the others are no different
        spec, metric, ids, score = SPECS[number], METRICS[number], asked[number], scores[number]
        samples: dict[str, list[int]] = {}
        for name in ids:
            task, _, index = name.rpartition("/")
            samples.setdefault(task or spec.task, []).append(int(index))
        chosen = tuple((task, tuple(sorted(one))) for task, one in samples.items())
        value = lm_eval_value(zoo, spec, metric, chosen)
        assert score.value == pytest.approx(value, rel=REL), spec


def test_driver_finds_the_same_value_and_error_from_item_scores(
    tasks: LmEvalTasks, fitness: LmEvalFitness
) -> None:
    estimator = MeanEstimator(tasks.aggregates)
    draw = random.Random(1)
    for number, score in enumerate(fitness.score(tasks.item_ids)):
        order = list(range(len(score.items)))
        draw.shuffle(order)
        ids = tuple(tasks.item_ids[number][place] for place in order)
        estimate = estimator.estimate(number, Answers(ids, tuple(score.items[p] for p in order)))
        assert (estimate.value, estimate.standard_error) == (score.value, score.standard_error)


def test_objectives_of_perplexities_are_minimised(tasks: LmEvalTasks) -> None:
    assert [one.direction for one in tasks.objectives] == [
        Direction.MINIMIZE, Direction.MINIMIZE, Direction.MINIMIZE, Direction.MINIMIZE,
        Direction.MAXIMIZE, Direction.MAXIMIZE, Direction.MINIMIZE,
    ]  # fmt: skip
    assert tasks.objectives[0].unit == "word_perplexity"
    assert tasks.item_ids[4][:2] == ("choice/0", "choice/1")
    assert [len(ids) for ids in tasks.item_ids] == [24, 24, 24, 24, 55, 55, 31]


def test_item_scores_are_nats_per_unit(
    zoo: Zoo, tasks: LmEvalTasks, fitness: LmEvalFitness
) -> None:
    scores = fitness.score(tasks.item_ids)
    words, size, bits = (tasks.aggregates[number] for number in range(3))
    for item, word, byte, bit in zip(
        tasks.item_ids[0], scores[0].items, scores[1].items, scores[2].items, strict=True
    ):
        assert word * words.weights[item] == pytest.approx(byte * size.weights[item])
        assert byte == bit
        assert 2 <= words.weights[item] < size.weights[item]
    assert bits.weights == size.weights


def bootstrap(value: Any, count: int, draws: int = 1000) -> float:
    draw = random.Random(0)
    found = [value([draw.randrange(count) for _ in range(count)]) for _ in range(draws)]
    return torch.tensor(found, dtype=torch.float64).std().item()


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_standard_errors_are_those_of_a_bootstrap(
    tasks: LmEvalTasks, fitness: LmEvalFitness, number: int
) -> None:
    score = fitness.score(tasks.item_ids)[number]
    ids, aggregate = tasks.item_ids[number], tasks.aggregates[number]
    strata: dict[str, list[int]] = {}
    for place, item in enumerate(ids):
        strata.setdefault(aggregate.strata.get(item, ""), []).append(place)
    copies = {f"{item}#{n}": item for item in ids for n in range(len(ids))}
    again = Aggregate(
        aggregate.link,
        {copy: aggregate.weights[item] for copy, item in copies.items()}
        if aggregate.weights
        else {},
        {copy: aggregate.strata[item] for copy, item in copies.items()} if aggregate.strata else {},
    )
    draw = random.Random(number)

    def value(_: list[int]) -> float:
        chosen = [place for own in strata.values() for place in draw.choices(own, k=len(own))]
        names = [f"{ids[place]}#{n}" for n, place in enumerate(chosen)]
        found = again.estimate(names, [score.items[place] for place in chosen])[0]
        # The delta method is about small errors: that of a perplexity is so in its logarithm.
        return math.log(found) if aggregate.link == "exp" else found

    error = score.standard_error / (score.value if aggregate.link == "exp" else 1.0)
    assert error == pytest.approx(bootstrap(value, len(ids)), rel=0.15)


class TestAggregate:
    SCORES = (0.2, 1.4, 0.9, 3.0, 0.1)
    IDS = ("0", "1", "2", "3", "4")

    def test_mean_is_that_of_the_contract(self) -> None:
        value, error = Aggregate().estimate(self.IDS, self.SCORES)
        assert (value, error) == pytest.approx(mean_of(self.SCORES))
        value, error = Aggregate().estimate(self.IDS, self.SCORES, [str(n) for n in range(9)])
        assert (value, error) == pytest.approx(mean_of(self.SCORES, 9))

    def test_one_item_has_no_error(self) -> None:
        for aggregate in (Aggregate(), Aggregate("exp", {"0": 3.0}), Aggregate(strata={"0": "a"})):
            assert aggregate.estimate(["0"], [0.5])[1] == 0.0

    def test_everything_seen_has_no_error(self) -> None:
        assert Aggregate("exp").estimate(self.IDS, self.SCORES, self.IDS)[1] == 0.0

    def test_strata_count_the_same_and_single_items_spread_as_the_others(self) -> None:
        strata = {"0": "a", "1": "a", "2": "a", "3": "a", "4": "b"}
        value, error = Aggregate(strata=strata).estimate(self.IDS, self.SCORES)
        mean, own = mean_of(self.SCORES[:4])
        assert value == pytest.approx((mean + 0.1) / 2)
        assert error == pytest.approx(math.sqrt(own**2 + 4 * own**2) / 2)

    def test_strata_of_single_items_spread_among_each_other(self) -> None:
        strata = dict(zip(self.IDS, "abcde", strict=True))
        value, error = Aggregate(strata=strata).estimate(self.IDS, self.SCORES)
        assert (value, error) == pytest.approx(mean_of(self.SCORES))

    def test_perplexity_beyond_numbers_is_a_failed_trial(self) -> None:
        with pytest.raises(EvaluationError, match="800 nats per unit: the perplexity is too large"):
            Aggregate("exp").estimate(["0"], [800.0])


# Our own metrics


@pytest.fixture(scope="module")
def own(zoo: Zoo) -> tuple[LmEvalTasks, Any, Any, tuple[Score, ...]]:
    tasks = LmEvalTasks.load(OWN, (zoo.tasks,), zoo.root)
    model, tokenizer = read_model(zoo.models[0])
    fitness = tasks.bind(model, tokenizer, batch_size=BATCH)
    return tasks, model, tokenizer, fitness.score(tasks.item_ids)


def plain_likelihood(model: Any, tokenizer: Any, context: str, target: str) -> tuple[float, int]:
    """Return log-likelihood and number of tokens, with transformers alone."""
    first, both = tokenizer.encode(context), tokenizer.encode(context + target)
    with torch.no_grad():
        chosen = model(torch.tensor([both])).logits[0].log_softmax(-1)
    return sum(chosen[place - 1, both[place]].item() for place in range(len(first), len(both))), (
        len(both) - len(first)
    )


def docs(tasks: LmEvalTasks, number: int) -> Iterator[dict[str, Any]]:
    yield from tasks._tasks[tasks._columns[number].parts[0].task].docs


def test_units_and_directions_of_own_metrics(own: Any) -> None:
    objectives = {one.name: one for one in own[0].objectives}
    assert (objectives["length"].direction, objectives["length"].unit) == ("minimize", "tokens")
    assert (objectives["margin"].direction, objectives["margin"].unit) == ("maximize", "nats")
    assert (objectives["next"].direction, objectives["next"].unit) == ("maximize", "nats")


def test_margin_is_that_of_plain_likelihoods(own: Any) -> None:
    tasks, model, tokenizer, scores = own
    for doc, item, raw, normed, acc, acc_norm in zip(
        docs(tasks, 3), scores[3].items, scores[4].margins, scores[5].margins, scores[4].items,
        scores[5].items, strict=True,
    ):  # fmt: skip
        values = [
            plain_likelihood(model, tokenizer, f"{doc['text']}:", choice)[0]
            for choice in doc["choices"]
        ]
        right = values.pop(doc["label"])
        assert item == pytest.approx(right - max(values), abs=1e-4)
        assert raw == item
        assert (raw > 0) == (acc == 1.0)
        assert (normed > 0) == (acc_norm == 1.0)
    assert scores[4].margins != scores[5].margins
    assert scores[3].margins == scores[3].items


def test_reference_likelihoods_are_plain_ones_per_token(own: Any) -> None:
    tasks, model, tokenizer, scores = own
    for doc, generated, chosen, likely in zip(
        docs(tasks, 2), scores[2].items, scores[6].items, scores[7].items, strict=True
    ):
        for score, context, target in (
            (generated, f"{doc['text']}=", f" {doc['first']}"),
            (chosen, f"{doc['text']}:", doc["choices"][doc["label"]]),
            (likely, doc["text"], doc["next"]),
        ):
            total, count = plain_likelihood(model, tokenizer, context, target)
            assert score == pytest.approx(total / count, abs=1e-4)


def test_response_tokens_are_those_of_the_answer_and_cost_no_generation(
    own: Any, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, model, tokenizer, scores = own
    samples = reference(zoo, "gen_regex", ())["samples"]["gen_regex"]
    texts = {row["doc_id"]: row["resps"][0][0] for row in samples}
    expected = [len(tokenizer.encode(texts[number])) for number in range(24)]
    assert list(scores[1].items) == expected
    assert len(set(expected)) > 1
    fitness = tasks.bind(model, tokenizer, batch_size=BATCH)
    asked: list[int] = []
    generate = fitness._lm.generate_until

    def counted(requests: Any, **kwargs: Any) -> Any:
        asked.append(len(requests))
        return generate(requests, **kwargs)

    monkeypatch.setattr(fitness._lm, "generate_until", counted)
    fitness.score(tasks.item_ids)
    assert asked == [24]


def test_tag_counts_its_tasks_the_same(zoo: Zoo) -> None:
    tasks = LmEvalTasks.load([TaskSpec("short_tasks", "acc")], (zoo.tasks,), zoo.root)
    (score,) = tasks.bind(*read_model(zoo.models[0]), batch_size=BATCH).score(tasks.item_ids)
    values = [
        lm_eval_value(zoo, TaskSpec(name), "acc") for name in ("short_choice", "short_likely")
    ]
    assert score.value == pytest.approx(sum(values) / 2)


def test_items_without_a_wrong_choice_have_no_margin(zoo: Zoo) -> None:
    body = (zoo.tasks / "choice.yaml").read_text().replace("task: choice", "task: odd")
    path = zoo.root / "odd_tasks" / "odd.yaml"
    path.parent.mkdir()
    path.write_text(body.replace("doc_to_target: label", "doc_to_target: [0, 1, 2]"))
    with pytest.raises(TaskError, match="metric: 'margin': 'odd' judges its answers by code"):
        LmEvalTasks.load([TaskSpec("odd", "margin")], (path.parent,), zoo.root)
    tasks = LmEvalTasks.load([TaskSpec("odd", "acc")], (path.parent,), zoo.root)
    (score,) = tasks.bind(*read_model(zoo.models[0]), batch_size=BATCH).score(tasks.item_ids)
    assert score.items == (1.0,) * 24
    assert score.margins == ()


def test_margins_of_several_right_choices_and_of_mutual_information() -> None:
    choices = Choices((0, 2), (1, 2, 4), (1, 2, 8))
    assert margin("acc", [-3.0, -2.0, -1.0], choices) == 1.0
    assert margin("acc_norm", [-3.0, -2.0, -1.0], choices) == -0.25 + 1.0
    assert margin("acc_bytes", [-3.0, -2.0, -1.0], choices) == -0.125 + 1.0
    alone = [-3.0, -5.0, -1.0]
    assert margin("acc_mutual_info", [-3.0, -2.0, -1.0, *alone], choices) == -3.0


def test_digest_tells_metrics_and_groups_apart(zoo: Zoo) -> None:
    specs = [
        (TaskSpec("choice", "acc"),), (TaskSpec("choice", "margin"),),
        (TaskSpec("sized", "acc"),), (TaskSpec("plain", "acc"),),
    ]  # fmt: skip
    digests = {LmEvalTasks.load(one, (zoo.tasks,), zoo.root).digest for one in specs}
    assert len(digests) == len(specs)


GENERATED = (
    TaskSpec("gen_regex", "exact_match", filter="strict", name="right"),
    TaskSpec("gen_regex", "response_tokens", name="length"),
    TaskSpec("choice", "acc", name="acc"),
    TaskSpec("targetless", "exact_match", filter="strict", name="targetless"),
)


def test_generated_answers_have_margins_only_where_they_are_wanted(zoo: Zoo) -> None:
    text = (zoo.tasks / "gen_regex.yaml").read_text()
    # Some items have no reference answer: then no item has a margin.
    text = text.replace("gen_regex", "targetless").replace(
        'doc_to_target: "{{first}}"', "doc_to_target: \"{{'' if first in 'abcd' else first}}\""
    )
    (zoo.tasks / "targetless.yaml").write_text(text)
    model, tokenizer = read_model(zoo.models[0])
    plain = LmEvalTasks.load(GENERATED, (zoo.tasks,), zoo.root)
    wanted = LmEvalTasks.load(GENERATED, (zoo.tasks,), zoo.root, margins=True)
    likely = LmEvalTasks.load(
        (TaskSpec("gen_regex", "reference_loglikelihood"),), (zoo.tasks,), zoo.root
    )
    items = [ids[:9] for ids in plain.item_ids]
    with_margins = wanted.bind(model, tokenizer, BATCH).score(items)
    without = plain.bind(model, tokenizer, BATCH).score(items)
    (reference_scores,) = likely.bind(model, tokenizer, BATCH).score(items[:1])
    assert [score.items for score in with_margins] == [score.items for score in without]
    assert with_margins[0].margins == pytest.approx(reference_scores.items, rel=1e-5)
    assert len(set(with_margins[0].margins)) > 3
    assert [bool(score.margins) for score in with_margins] == [True, False, True, False]
    assert [bool(score.margins) for score in without] == [False, False, True, False]
