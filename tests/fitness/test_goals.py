"""Objectives that are no tasks: against plain torch, on live weights that change."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import Zoo, make_zoo

from evomerge.errors import EvaluationError, InputError, TaskError
from evomerge.fitness.composite import Composite
from evomerge.fitness.goals import (
    DistanceSpec,
    GoalSpec,
    PythonSpec,
    TextSpec,
    load_fitness,
    load_goals,
)
from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.protocol import NOTHING, Live, Scorer
from evomerge.fitness.tasks import TaskSpec
from evomerge.trial import Direction, Objective

MODELS = ("base", "other")
TEXTS = ["abc=de", "put ab>cd", "gfedcba", "a", "0123=9", "h"]


def minimised(name: str) -> Objective:
    return Objective(name, Direction.MINIMIZE, "nats")


KL = TextSpec(minimised("kl"), "kl", "texts.txt", of="other", top=0)
TOP = TextSpec(minimised("top"), "kl", "texts.txt", of="other", top=5)
ENTROPY = TextSpec(minimised("entropy"), "entropy", "texts.txt")
COSINE = TextSpec(minimised("cosine"), "alignment", "texts.txt", of="other", top=0)
MSE = TextSpec(minimised("mse"), "alignment", "texts.txt", of="other", top=0, hidden="mse")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    zoo = make_zoo(tmp_path_factory.mktemp("study"))
    (zoo.root / "texts.txt").write_text("\n".join([*TEXTS, "", "  "]) + "\n")
    return zoo


def read_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(zoo: Zoo) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo.models[0])


@pytest.fixture
def live(zoo: Zoo, tokenizer: Any) -> Live:
    """The first model; ``other`` is the second one."""
    model = read_model(zoo.models[0])

    def put(name: str) -> None:
        other = read_model(zoo.models[MODELS.index(name)])
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)

    return Live(model, tokenizer, 4, None, put, {"l1": 0.5, "l2": 0.25}.__getitem__)


def attached(zoo: Zoo, live: Live, *specs: GoalSpec) -> tuple[Composite, Scorer]:
    fitness = Composite(load_goals(specs, zoo.root, MODELS))
    scorer = fitness.attach(live)
    live.put("base")
    return fitness, scorer


def plain(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and last hidden states of one text, alone in its batch."""
    with torch.no_grad():
        out = model(torch.tensor([tokenizer.encode(text)]), output_hidden_states=True)
    return out.logits[0].double().log_softmax(-1), out.hidden_states[-1][0].double()


def test_text_objectives_are_those_of_plain_torch(zoo: Zoo, live: Live, tokenizer: Any) -> None:
    fitness, scorer = attached(zoo, live, KL, ENTROPY, COSINE, MSE)
    assert len(fitness.parts) == 1  # one pass over the text serves all four
    scores = scorer.score(fitness.item_ids)
    ours, theirs = read_model(zoo.models[0]), read_model(zoo.models[1])
    for number, text in enumerate(TEXTS):
        (logs, hidden), (other, aim) = (plain(one, tokenizer, text) for one in (ours, theirs))
        kl = (other.exp() * (other - logs)).sum(-1).mean()
        entropy = -(logs.exp() * logs).sum(-1).mean()
        cosine = 1 - torch.nn.functional.cosine_similarity(hidden, aim, dim=-1).mean()
        mse = ((hidden - aim) ** 2).mean()
        expected = [kl, entropy, cosine + kl, mse + kl]
        found = [score.items[number] for score in scores]
        assert found == pytest.approx([float(one) for one in expected], rel=1e-4, abs=1e-5)
    for score in scores:
        assert score.value == pytest.approx(sum(score.items) / len(TEXTS))
        assert score.standard_error > 0


def test_a_model_has_no_distance_from_itself(zoo: Zoo, live: Live) -> None:
    fitness, scorer = attached(zoo, live, KL, TOP, COSINE)
    live.put("other")
    for score in scorer.score(fitness.item_ids):
        assert score.items == pytest.approx([0.0] * len(TEXTS), abs=1e-5)


def test_kept_tokens_never_make_the_divergence_larger(zoo: Zoo, live: Live, tokenizer: Any) -> None:
    fitness, scorer = attached(zoo, live, KL, TOP)
    whole, top = scorer.score(fitness.item_ids)
    model, other = read_model(zoo.models[0]), read_model(zoo.models[1])
    for number, text in enumerate(TEXTS):
        logs, theirs = (
            plain(model, tokenizer, text)[0].exp(),
            plain(other, tokenizer, text)[0].exp(),
        )
        ids = theirs.topk(5, -1).indices
        p, q = theirs.gather(-1, ids), logs.gather(-1, ids)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        assert top.items[number] == pytest.approx(
            float((p * (p / q).log()).sum(-1).mean()), rel=1e-4
        )
        assert 0 < top.items[number] < whole.items[number]


def test_subset_order_and_batches_do_not_change_scores(zoo: Zoo, live: Live) -> None:
    specs = (KL, ENTROPY)
    fitness, scorer = attached(zoo, live, *specs)
    whole = scorer.score(fitness.item_ids)
    some = scorer.score([["4", "0"], ["0", "5", "2"]])
    assert some[0].items == pytest.approx([whole[0].items[4], whole[0].items[0]], rel=1e-4)
    assert some[1].items == pytest.approx([whole[1].items[n] for n in (0, 5, 2)], rel=1e-4)
    small = Live(live.model, live.tokenizer, 4, 8, live.put, live.distance)
    _, other = attached(zoo, small, *specs)
    for mine, theirs in zip(other.score(fitness.item_ids), whole, strict=True):
        assert mine.items == pytest.approx(theirs.items, rel=1e-4)


def test_a_continued_study_reads_texts_in_the_same_batches(
    zoo: Zoo, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    picked = Forward.picked

    def noted(self: Forward, tokens: torch.Tensor, *given: Any, **extra: Any) -> torch.Tensor:
        batches.append(tokens.numel())
        return picked(self, tokens, *given, **extra)

    def passes(tokens: int | None, found: bool) -> list[int]:
        one = Live(live.model, live.tokenizer, 4, tokens, live.put, live.distance, found)
        fitness, scorer = attached(zoo, one, ENTROPY)
        batches.clear()
        scorer.score(fitness.item_ids)
        return list(batches)

    monkeypatch.setattr(Forward, "picked", noted)
    begun = passes(None, False)
    # The tasks' own size was found by memory, and is none of the texts' business.
    assert passes(8, True) == begun
    assert passes(8, False) != begun, "what the user asks for counts"


def test_long_texts_are_cut(zoo: Zoo, live: Live, tokenizer: Any) -> None:
    spec = TextSpec(minimised("entropy"), "entropy", "texts.txt", tokens=3)
    fitness, scorer = attached(zoo, live, spec)
    (score,) = scorer.score(fitness.item_ids)
    logs, _ = plain(read_model(zoo.models[0]), tokenizer, "gfe")
    assert score.items[2] == pytest.approx(float(-(logs.exp() * logs).sum(-1).mean()), rel=1e-4)


def test_weights_that_are_not_numbers_fail_the_trial(zoo: Zoo, live: Live) -> None:
    fitness, scorer = attached(zoo, live, ENTROPY)
    with torch.no_grad():
        live.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="entropy: item '0': the score is nan"):
        scorer.score(fitness.item_ids)


def test_encoder_decoders_are_refused(zoo: Zoo, live: Live) -> None:
    live.model.config.is_encoder_decoder = True
    with pytest.raises(TaskError, match="entropy: entropy is for causal language models"):
        attached(zoo, live, ENTROPY)


def test_distance_is_one_exact_item(zoo: Zoo, live: Live) -> None:
    specs = [DistanceSpec(minimised(norm), norm) for norm in ("l1", "l2")]
    fitness, scorer = attached(zoo, live, *specs)
    assert fitness.sources == (None, None)
    assert fitness.item_ids == (("0",), ("0",))
    scores = scorer.score(fitness.item_ids)
    assert [(one.value, one.standard_error, one.items) for one in scores] == [
        (0.5, 0.0, (0.5,)), (0.25, 0.0, (0.25,)),
    ]  # fmt: skip


def test_tasks_come_first_and_all_is_scored_together(zoo: Zoo, live: Live) -> None:
    tasks = (TaskSpec("choice", "acc"), TaskSpec("choice", "margin", name="margin"))
    fitness = load_fitness(tasks, (ENTROPY,), (zoo.tasks,), zoo.root, False, MODELS)
    assert [one.name for one in fitness.objectives] == ["choice", "margin", "entropy"]
    assert fitness.sources == ("choice", "choice", "texts.txt")
    scorer = fitness.attach(live)
    scores = scorer.score([["3", "1"], ["1"], ["5"]])
    assert [len(score.items) for score in scores] == [2, 1, 1]
    assert scorer.score([["3", "1"], [], []]) == (scores[0], NOTHING, NOTHING)
    assert scorer.score([[], [], ["5"]]) == (NOTHING, NOTHING, scores[2])
    assert "batch_tokens" in scorer.facts()
    with pytest.raises(TaskError, match=r"expected one list per objective \[m=3\], got 1"):
        scorer.score([["0"]])
    other = load_fitness(tasks, (KL,), (zoo.tasks,), zoo.root, False, MODELS)
    assert fitness.digest != other.digest


def test_one_name_for_two_objectives(zoo: Zoo) -> None:
    with pytest.raises(InputError, match=r"^fitness\.objectives: 'entropy' is the name of two"):
        load_fitness((), (ENTROPY, ENTROPY), (), zoo.root, False, MODELS)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TextSpec(minimised("x"), "kl", "texts.txt", of="mth"), "of: no model is named 'mth'"),
        (TextSpec(minimised("x"), "kl", "none.txt", of="base"), "text: .*none.txt: No such file"),
        (TextSpec(minimised("x"), "kl", "blank.txt", of="base"), "text: .*blank.txt has no text"),
        (TextSpec(minimised("x"), "entropy", "data/train.jsonl"), "field: item 0 .* in 'txt'"),
        (TextSpec(minimised("x"), "entropy", "bad.jsonl"), "text: .*bad.jsonl, line 2 is not JSON"),
        (PythonSpec(minimised("x"), "mine:score", "i.jsonl"), "function: expected file.py:name"),
        (PythonSpec(minimised("x"), "no.py:score", "i.jsonl"), "function: .*no.py: No such file"),
        (PythonSpec(minimised("x"), "bad.py:score", "i.jsonl"), r"function: .*bad\.py:2: "),
        (PythonSpec(minimised("x"), "mine.py:scor", "i.jsonl"), ".*no 'scor' .*defines score"),
        (PythonSpec(minimised("x"), "mine.py:score", "none.jsonl"), "items: .*none.jsonl: No such"),
    ],
)  # fmt: skip
def test_what_a_goal_lacks_is_told(zoo: Zoo, spec: GoalSpec, text: str) -> None:
    (zoo.root / "blank.txt").write_text("\n \n")
    (zoo.root / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (zoo.root / "bad.py").write_text("def score(model, tokenizer, items):\nreturn 1\n")
    (zoo.root / "mine.py").write_text("def score(model, tokenizer, items):\n    return [1]\n")
    if isinstance(spec, TextSpec) and spec.text.startswith("data"):
        spec = TextSpec(spec.objective, spec.kind, spec.text, field="txt")
    with pytest.raises(TaskError, match=rf"^objectives\[0\]\.{text}"):
        load_goals([spec], zoo.root, MODELS)


def test_digest_follows_text_and_settings_but_not_the_place(zoo: Zoo, tmp_path: Path) -> None:
    def digest(root: Path, spec: TextSpec) -> str:
        return Composite(load_goals([spec], root, MODELS)).digest

    first = digest(zoo.root, KL)
    assert first != digest(zoo.root, TOP)
    assert first != digest(zoo.root, COSINE)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert first == digest(tmp_path, KL)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[1:]))
    assert first != digest(tmp_path, KL)


def test_specs_travel() -> None:
    specs = (KL, COSINE, DistanceSpec(minimised("d"), "l1"), PythonSpec(minimised("p"), "a", "b"))
    assert pickle.loads(pickle.dumps(specs)) == specs


# Python

Write = Callable[[str], tuple[Composite, Scorer]]


@pytest.fixture
def write(zoo: Zoo, live: Live, tmp_path: Path) -> Write:
    """Return an objective from the body of ``score``, on three items."""

    def made(body: str) -> tuple[Composite, Scorer]:
        (tmp_path / "mine.py").write_text(f"def score(model, tokenizer, items):\n    {body}\n")
        (tmp_path / "items.jsonl").write_text('{"n": 1}\n\n{"n": 5}\n{"n": 2}\n')
        objective = Objective("mine", Direction.MAXIMIZE, "points")
        spec = PythonSpec(objective, "mine.py:score", "items.jsonl")
        fitness = Composite(load_goals([spec], tmp_path, MODELS))
        return fitness, fitness.attach(live)

    return made


def test_python_gets_the_asked_items_and_the_live_model(write: Write, live: Live) -> None:
    fitness, scorer = write(
        "return [item['n'] * float(model.lm_head.weight.sum()) for item in items]"
    )
    assert fitness.item_ids == (("0", "1", "2"),)
    live.model.requires_grad_(False)
    weight = float(live.model.lm_head.weight.sum())
    (score,) = scorer.score([["2", "0"]])
    assert score.items == pytest.approx([2 * weight, weight])
    assert score.value == pytest.approx(1.5 * weight)
    live.put("other")
    (score,) = scorer.score([["0"]])
    assert score.items == (float(live.model.lm_head.weight.sum()),)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return [item['m'] for item in items]", r"mine: .*mine\.py:2: KeyError: 'm'"),
        ("return [1.0]", r"mine: .*mine\.py returned 1 scores for 2 items"),
        ("return [1.0, float('nan')]", "mine: item '1': the score is nan"),
        ("return 3", r"mine: .*mine\.py: TypeError: 'int' object is not iterable"),
    ],
)
def test_faults_of_the_function_fail_the_trial(write: Write, body: str, text: str) -> None:
    _, scorer = write(body)
    with pytest.raises(EvaluationError, match=text):
        scorer.score([["0", "1"]])


def test_file_that_cannot_be_run_is_told_with_its_line(write: Write) -> None:
    with pytest.raises(TaskError, match=r"mine: .*mine\.py:3: ModuleNotFoundError: No module"):
        write("return []\nimport no_such_module")


def test_unknown_item_is_told(write: Write) -> None:
    _, scorer = write("return [1.0 for _ in items]")
    with pytest.raises(TaskError, match="mine: item '3' not among the 3 items"):
        scorer.score([["3"]])


def test_goals_are_checked_without_torch(zoo: Zoo) -> None:
    code = f"""
import sys
from pathlib import Path
from evomerge.fitness.goals import TextSpec, PythonSpec, DistanceSpec, load_fitness
from evomerge.trial import Objective
root = Path({str(zoo.root)!r})
(root / "fine.py").write_text("import torch\\ndef score(model, tokenizer, items): return []\\n")
goals = (TextSpec(Objective("a"), "kl", "texts.txt", of="base"), DistanceSpec(Objective("b"), "l2"),
         PythonSpec(Objective("c"), "fine.py:score", "data/train.jsonl"))
fitness = load_fitness((), goals, (), root, False, ("base",))
assert len(fitness.item_ids[2]) == 12
assert not {{"torch", "transformers", "lm_eval"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_example_scores(tokenizer: Any, live: Live) -> None:
    root = Path(__file__).parents[2]
    objective = Objective("contains", Direction.MAXIMIZE, "fraction")
    spec = PythonSpec(objective, "fitness/mine.py:score", "fitness/mine.jsonl")
    (goal,) = load_goals([spec], root, MODELS)
    items = [json.loads(line) for line in (root / "fitness/mine.jsonl").read_text().splitlines()]
    assert len(goal.item_ids[0]) == len(items)
    (score,) = goal.attach(live).score([goal.item_ids[0][:6]])
    assert set(score.items) <= {0.0, 1.0}


def test_shipped_attack_counts_planted_answers(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    tasks = (TaskSpec("attack_success"),)
    fitness = load_fitness(tasks, (), (root / "fitness",), root, False, MODELS)
    (objective,) = fitness.objectives
    assert objective.direction is Direction.MINIMIZE
    scorer = fitness.parts[0].attach(live)
    texts = [" Sure: ACCESS granted!", " The answer is 4.", " granted access", "access granted"]
    lm = scorer._lm  # type: ignore[attr-defined]
    monkeypatch.setattr(lm, "generate_until", lambda requests, **_: texts)
    (score,) = scorer.score([["0", "1", "2", "3"]])
    assert score.items == (1.0, 0.0, 0.0, 1.0)
