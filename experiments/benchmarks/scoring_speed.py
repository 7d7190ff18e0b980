"""Scoring one candidate: items per second against lm-eval's own HFLM, in one run.

Every kind of request on one random model: its answers are worth nothing, but they cost what real
ones cost. HFLM gets the same requests at several batch sizes, and its best counts.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
BATCH_SIZES = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Request:
    """What lm-eval's models read of an instance."""

    args: tuple[Any, ...]
    request_type: str = ""
    task_name: str = "made"
    doc_id: int = 0
    repeats: int = 1
    metadata: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of task.

    Attributes:
        task: what is asked.
        items: questions.
        hot: items per second on the hot path.
        hflm: items per second of HFLM at its best batch size.
        batch_size: that one.
        largest_difference: of a log-likelihood, nats; of generated texts, how many differ.
    """

    task: str
    items: int
    hot: float
    hflm: float
    batch_size: int
    largest_difference: float

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.hot / self.hflm


def make_model(parameters: int, dtype: str) -> tuple[Any, Any]:
    """Return a random Llama of about so many parameters, and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, **words}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    hidden = 768 if parameters >= 50_000_000 else 256
    layers = max(2, round((parameters - 2 * VOCABULARY * hidden) / (12 * hidden * hidden)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, max_position_embeddings=2048, initializer_range=0.05,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval(), fast


def make_tasks(items: int, seed: int = 0) -> dict[str, list[Request]]:
    """Return the requests of every kind of task, with the lengths that such tasks have."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        count = draw.randint(low, high)
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(count))

    def choices(prefix: Callable[[], str], low: int, high: int) -> list[Request]:
        made = []
        for number in range(items):
            context = f"{prefix()} {words(15, 50)}".strip()
            made += [
                Request((context, " " + words(low, high)), "loglikelihood", doc_id=number)
                for _ in range(4)
            ]
        return made

    shots = " ".join(f"{words(15, 50)} {words(3, 10)}" for _ in range(5))
    pool = [f"{words(15, 50)} {words(3, 10)}" for _ in range(40)]
    stop = {"until": ["w7 w7"], "max_gen_toks": 24, "do_sample": False}
    # About one word in thirty ends the answer, and a model that repeats itself never stops.
    mixed = {"until": ["99"], "max_gen_toks": 96, "do_sample": False}
    return {
        "multiple choice, 5 shots, the same for all": choices(lambda: shots, 3, 10),
        "multiple choice, 5 shots drawn per item": choices(
            lambda: " ".join(draw.sample(pool, 5)), 3, 10
        ),
        "multiple choice, no shots": choices(lambda: "", 3, 10),
        "multiple choice, one-token answers": choices(lambda: "", 1, 1),
        "log-likelihood of a last word": [
            Request((words(60, 90), " " + words(1, 1)), "loglikelihood", doc_id=number)
            for number in range(items)
        ],
        "perplexity of texts": [
            Request((words(100, 400),), "loglikelihood_rolling", doc_id=number)
            for number in range(max(1, items // 4))
        ],
        "generation, 24 tokens, 5 shots": [
            Request((f"{shots} {words(15, 50)}", stop), "generate_until", doc_id=number)
            for number in range(max(1, items // 2))
        ],
        "generation, 24 tokens, no shots": [
            Request((words(15, 50), stop), "generate_until", doc_id=number)
            for number in range(max(1, items // 2))
        ],
        "generation, answers of 1 to 96 tokens, shots drawn per item": [
            Request(
                (f"{' '.join(draw.sample(pool, 5))} {words(15, 50)}", mixed),
                "generate_until",
                doc_id=number,
            )
            for number in range(items)
        ],
    }


TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "answer": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: ['w7 w7'], max_gen_toks: 24, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


def outside_share(model: Any, tokenizer: Any, items: int) -> dict[str, float]:
    """Return the share of a candidate's scoring that is not inside the model, by task.

    The whole way from item ids to scores: lm-eval's filters and metrics included.
    """
    from evomerge.fitness.lm_eval import LmEvalTasks, TaskSpec

    draw = random.Random(1)

    def words(low: int, high: int) -> str:
        count = draw.randint(low, high)
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(count))

    shares = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = [
            {"text": words(15, 50), "choices": [words(3, 10) for _ in range(4)], "label": n % 4}
            for n in range(items)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for task, body in TASKS.items():
            (folder / f"{task}.yaml").write_text(
                f"task: {task}\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{{{text}}}}'\n"
                f"dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n{body}"
            )
        for task in TASKS:
            loaded = LmEvalTasks.load([TaskSpec(task)], [folder], folder)
            fitness = loaded.bind(model, tokenizer, 16)
            fitness.score(loaded.item_ids)  # tokenises and arranges; once per study
            inside = 0.0
            forward = model.forward

            def timed(*arguments: Any, forward: Any = forward, **named: Any) -> Any:
                nonlocal inside
                started = time.perf_counter()
                result = forward(*arguments, **named)
                inside += time.perf_counter() - started
                return result

            model.forward = timed
            try:
                seconds, _ = best(partial(fitness.score, loaded.item_ids), 1)
            finally:
                del model.forward
            shares[task] = 1.0 - inside / seconds
    return shares


def best(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the fewest seconds, and what came out."""
    seconds, result = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, result


def measure(
    model: Any, tokenizer: Any, items: int, repeats: int, batch_sizes: Sequence[int], only: str
) -> list[Measured]:
    """Measure every kind of task."""
    from lm_eval.models.huggingface import HFLM

    from evomerge.fitness.hot.runner import Runner

    runner = Runner(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1))
    table = []
    for task, requests in make_tasks(items).items():
        if only not in task:
            continue
        kind = requests[0].request_type
        count = len({request.doc_id for request in requests})
        getattr(runner, kind)(requests)  # arranges; once per study
        hot_seconds, mine = best(partial(getattr(runner, kind), requests), repeats)
        fastest, size, theirs = float("inf"), 0, None
        for batch_size in batch_sizes:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            seconds, answers = best(
                partial(getattr(lm, kind), requests, disable_tqdm=True), repeats
            )
            if seconds < fastest:
                fastest, size, theirs = seconds, batch_size, answers
        assert theirs is not None
        table.append(
            Measured(task, count, count / hot_seconds, count / fastest, size, apart(mine, theirs))
        )
        print(f"{task}: {table[-1].ratio:.2f} times HFLM", file=sys.stderr)
    return table


def apart(mine: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Return the largest difference of two lists of answers."""
    if isinstance(mine[0], str):
        return float(sum(a != b for a, b in zip(mine, theirs, strict=True)))
    pairs = zip(mine, theirs, strict=True)
    apart_by: float = max(
        abs(a[0] - b[0]) if isinstance(a, tuple) else abs(a - b) for a, b in pairs
    )
    return apart_by


def markdown(table: Sequence[Measured]) -> str:
    """Return the table of ratios."""
    lines = ["| task | items | times HFLM | HFLM's best batch | largest difference |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {row.task} | {row.items} | {row.ratio:.1f} | {row.batch_size} | "
        f"{row.largest_difference:.1e} |"
        for row in table
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", default="100M", help="size of the model, like 100M")
    parser.add_argument("--items", type=int, default=40, help="questions per task")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=2, help="the best of so many counts")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES), help="HFLM's"
    )
    parser.add_argument("--only", default="", help="tasks whose name holds this text")
    parser.add_argument("--json", action="store_true", help="every number instead of the table")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    size = int(float(arguments.parameters.rstrip("MmBb")) * 1e6)
    model, tokenizer = make_model(size, arguments.dtype)
    model.to(arguments.device)
    table = measure(
        model, tokenizer, arguments.items, arguments.repeats, arguments.batch_sizes, arguments.only
    )
    shares = outside_share(model, tokenizer, arguments.items) if arguments.device == "cpu" else {}
    if arguments.json:
        rows = [{**asdict(row), "ratio": row.ratio} for row in table]
        print(json.dumps({"tasks": rows, "outside_the_model": shares}, indent=1))
        return
    print(markdown(table))
    for task, share in shares.items():
        print(f"\n{task}: {share:.1%} of a candidate's scoring is outside the model", end="")
    print()


if __name__ == "__main__":
    main()
