"""Two tiny random Llamas with a real tokenizer, and local lm-eval tasks that they half solve."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LETTERS = "abcdefgh"
WORDS = ["<pad>", "<eos>", "<unk>", *LETTERS, *"0123456789", "=", ";", ":", ">", " ", "\n", "put"]

TASKS = {
    "gen_regex": """
output_type: generate_until
doc_to_text: "{{text}}="
doc_to_target: "{{first}}"
generation_kwargs: {until: [";"], do_sample: false, max_gen_toks: 6}
filter_list:
  - name: letter
    filter:
      - {function: regex, regex_pattern: "([a-h])", group_select: 0}
      - {function: take_first}
  - name: strict
    filter:
      - {function: regex, regex_pattern: "^(.)", group_select: 0}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
""",
    "gen_stops": """
output_type: generate_until
doc_to_text: "put {{text}}>"
doc_to_target: stopped
generation_kwargs: {until: [";", "0", "\\n", "ab"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}:"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "likely": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "choice_shots": """
output_type: multiple_choice
training_split: train
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{text}}:"
doc_to_choice: "{{choices[:2]}}"
doc_to_target: "{{label % 2}}"
fewshot_delimiter: ";"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "gen_shots": """
output_type: generate_until
training_split: train
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 1
doc_to_text: "{{text}}="
doc_to_target: "{{first}}"
fewshot_delimiter: ";"
generation_kwargs: {until: [";"], do_sample: false, max_gen_toks: 1}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: data/train.jsonl, test: data/test.jsonl}}
test_split: test
"""


@dataclass(frozen=True)
class Zoo:
    """What the fitness tests share.

    Attributes:
        root: folder of the study; holds ``data/`` and ``tasks/``.
        models: two checkpoint directories.
    """

    root: Path
    models: tuple[Path, Path]

    @property
    def tasks(self) -> Path:
        return self.root / "tasks"


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"put|\s|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _model(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # peaked predictions, so that answers differ between prompts
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def _greedy(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    """Answer one prompt with transformers alone, independent of lm-eval."""
    import torch

    ids = torch.tensor([tokenizer.encode(text)])
    made = []
    with torch.no_grad():
        for _ in range(tokens):
            made.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    return str(tokenizer.decode(made, skip_special_tokens=False))


def _docs(count: int, seed: int, models: tuple[Any, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Half of the targets are what one of the two models answers, the others are drawn."""
    draw = random.Random(seed)
    docs: list[dict[str, Any]] = []
    for number in range(count):
        text = "".join(draw.choices(LETTERS, k=draw.randint(2, 7)))
        model = models[number % 2]
        answer = _greedy(model, tokenizer, f"{text}=", 6).split(";")[0].split("<")[0]
        stopped = _greedy(model, tokenizer, f"put {text}>", 5).split("<")[0]
        for stop in (";", "0", "\n", "ab"):
            stopped = stopped.split(stop)[0]
        letters = [letter for letter in answer if letter in LETTERS]
        docs.append(
            {
                "text": text,
                "first": letters[0] if letters and number % 4 < 2 else draw.choice(LETTERS),
                "stopped": stopped if number % 4 < 2 else "zzz",
                "next": _greedy(model, tokenizer, text, 1)
                if number % 4 < 2
                else draw.choice(LETTERS),
                "choices": ["".join(draw.choices(LETTERS, k=draw.randint(1, 4))) for _ in range(3)],
                "label": draw.randrange(3),
            }
        )
    return docs


def write_task(folder: Path, name: str, body: str, head: str = HEAD) -> Path:
    """Write one task file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(head.format(name=name) + body)
    return path


def make_zoo(root: Path) -> Zoo:
    """Write models, data and tasks to disk."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = _tokenizer()
    models = (_model(0), _model(1))
    folders = (root / "one", root / "two")
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (root / "data").mkdir()
    for split, count, seed in (("train", 12, 5), ("test", 24, 6)):
        lines = [json.dumps(doc) for doc in _docs(count, seed, models, tokenizer)]
        (root / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    for name, body in TASKS.items():
        write_task(root / "tasks", name, body)
    return Zoo(root, folders)
