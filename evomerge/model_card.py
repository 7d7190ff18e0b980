"""The README.md of an exported merge: front matter that the Hugging Face Hub reads, and a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from evomerge.front_table import cell
from evomerge.licences import Licence
from evomerge.recipe import Recipe
from evomerge.trial import Direction, Evaluation, Objective


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        title: of the model.
        recipe: the merge.
        sources: hub id or ``./directory`` of each model, by its name in the recipe.
        objectives: [m].
        scores: evaluations by split, of this trial.
        rivals: name and evaluation of what it is compared with, on ``rival_split``.
        rival_split: the split of the comparison.
        place: one sentence on its place in the study.
        mergekit: the mergekit configuration; empty when there is none.
        mergekit_reason: why there is none.
        commands: lm_eval commands that repeat the scores.
        notes: what else it takes to repeat them.
        version: of evomerge.
        licence: of the merge, from its sources.
        metrics: of the first objectives, empty for a task's own [<= m].
        tasks: of the first objectives [<= m].
        form: whether the directory holds the merge, an adapter of its base, or its recipe only.
        base: what the user calls the base; its source where empty.
    """

    title: str
    recipe: Recipe
    sources: Mapping[str, str]
    objectives: tuple[Objective, ...]
    scores: Mapping[str, Evaluation]
    rivals: Sequence[tuple[str, Evaluation]]
    rival_split: str
    place: str
    mergekit: str
    mergekit_reason: str
    commands: Sequence[str]
    notes: Sequence[str]
    version: str
    licence: Licence
    metrics: Sequence[str] = ()
    tasks: Sequence[str] = ()
    form: Literal["merge", "adapter", "recipe"] = "merge"
    base: str = ""


def hub_ids(sources: Mapping[str, str]) -> list[str]:
    """Return the models that the hub knows, without revision, in order, each once."""
    ids = (source.partition("@")[0] for source in sources.values() if source[:1] not in "./~")
    return list(dict.fromkeys(ids))


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    what = {
        "merge": "This is a merge of pre-trained language models",
        "adapter": "This is a LoRA adapter that turns its base into a merge of language models",
        "recipe": "This is the recipe of a merge of pre-trained language models, without weights",
    }
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False)}---\n",
        f"# {facts.title}\n",
        f"{what[facts.form]}, from a study with evomerge {facts.version}. {facts.place}\n",
        *([_loading(facts)] if facts.form == "adapter" else []),
        _method(facts),
        _scores(facts),
        _configuration(facts),
        _reproduction(facts),
        f"## Licence\n\n{facts.licence.note}\n",
    ]
    return "\n".join(sections)


#: What a split was for, as the card says it.
_USES = {
    "search": "the search optimised these",
    "validation": "the study chose on these",
    "test": "held out",
}


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    ids = hub_ids(facts.sources)
    if facts.form == "adapter":  # loads on one model; the others are told in the text
        ids = hub_ids({"base": facts.sources[facts.recipe.base.name]})
    relation = "adapter" if facts.form == "adapter" else "merge"
    matter: dict[str, Any] = {}
    if ids:
        matter |= {"base_model": ids, "base_model_relation": relation}
    matter |= facts.licence.front_matter()
    if facts.form != "recipe":
        matter |= {
            "library_name": "peft" if facts.form == "adapter" else "transformers",
            "pipeline_tag": "text-generation",
        }
    matter["tags"] = ["merge", "evomerge", *(["lora"] if facts.form == "adapter" else [])]
    if facts.scores and facts.form == "merge":
        matter["model-index"] = [{"name": facts.title, "results": _results(facts)}]
    return matter


def _results(facts: CardFacts) -> list[dict[str, Any]]:
    """Return the measured scores as the Hub's model-index has them, one result per split and task.

    Objectives of one task are metrics of one result.
    """
    results: list[dict[str, Any]] = []
    for split, evaluation in facts.scores.items():
        by_task: dict[str, list[dict[str, Any]]] = {}
        for number, (objective, score) in enumerate(
            zip(facts.objectives, evaluation.scores, strict=True)
        ):
            task = facts.tasks[number] if number < len(facts.tasks) else objective.name
            metric = facts.metrics[number] if number < len(facts.metrics) else ""
            by_task.setdefault(task, []).append(
                {
                    "type": metric or objective.unit,
                    "value": score.value,
                    "name": f"{objective.name} ({objective.direction.value})",
                    "args": {"items": len(score.items), "standard_error": score.standard_error},
                }
            )
        results += [
            {
                "task": {"type": "text-generation"},
                "dataset": {
                    "name": f"{task}, {split} items ({_USES[split]})",
                    "type": task,
                    "split": split,
                },
                "metrics": metrics,
            }
            for task, metrics in by_task.items()
        ]
    return results


def _method(facts: CardFacts) -> str:
    recipe = facts.recipe
    base = facts.sources[recipe.base.name]
    lines = [
        "## Merge Details",
        "### Merge Method",
        "",
        f"`{recipe.method}` over the partition `{recipe.partition}` ({len(recipe.table)} blocks), "
        f"with {_link(base)} as the base, in {recipe.dtype}.",
        "",
        "### Models Merged",
        "",
    ]
    lines += [f"* {_link(facts.sources[expert.name])}" for expert in recipe.experts]
    return "\n".join(lines) + "\n"


def _base(facts: CardFacts) -> str:
    """Return the base as its user calls it."""
    return facts.base or facts.sources[facts.recipe.base.name]


def _loading(facts: CardFacts) -> str:
    """Return how an adapter is put on its base."""
    source = facts.sources[facts.recipe.base.name]
    base, revision, named = _base(facts), "", source
    if source[:1] not in "./~":
        base, _, commit = source.partition("@")
        named, revision = base, f", revision={commit!r}" if commit else ""
    return (
        "## Load\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r}{revision})\n"
        f"model = PeftModel.from_pretrained(base, {facts.title!r})\n```\n\n"
        f"`base_model_name_or_path` in `adapter_config.json` is `{named}`: edit it where the base "
        "lies elsewhere and something looks for it by that name (`evomerge verify` then names "
        "the file as changed; `SHA256SUMS` is of the original).\n"
    )


def _link(source: str) -> str:
    if source[:1] in "./~":
        return f"`{source.removeprefix('./')}` (local)"
    return f"[{source}](https://huggingface.co/{source.partition('@')[0]})"


def _scores(facts: CardFacts) -> str:
    names = [
        cell(one.name) + (" (less is better)" if one.direction is Direction.MINIMIZE else "")
        for one in facts.objectives
    ]
    head = f"| {' | '.join(['', *names])} |\n|---|{'---:|' * len(names)}\n"
    lines = ["## Scores", ""]
    lines.append(
        "The search optimised the *search* items and the study chose on the *validation* items; "
        "only the *test* items are held out. ± is one standard error."
    )
    rows = "".join(_row(f"{split} items", one) for split, one in facts.scores.items())
    text = "\n".join(lines) + f"\n\n{head}{rows}"
    if facts.rivals and facts.rival_split in facts.scores:
        rivals = _row("**this merge**", facts.scores[facts.rival_split])
        rivals += "".join(_row(name, evaluation) for name, evaluation in facts.rivals)
        text += f"\nBeside it, on the {facts.rival_split} items:\n\n{head}{rivals}"
    return text


def _row(name: str, evaluation: Evaluation) -> str:
    cells = [f"{score.value:.4f} ± {score.standard_error:.4f}" for score in evaluation.scores]
    return f"| {' | '.join([name, *cells])} |\n"


def _configuration(facts: CardFacts) -> str:
    if facts.mergekit:
        return (
            "## Configuration\n\nThe same merge for "
            f"[mergekit](https://github.com/arcee-ai/mergekit):\n\n```yaml\n{facts.mergekit}```\n"
        )
    return (
        "## Configuration\n\nThe coefficients are in `evomerge_recipe.json`. mergekit cannot "
        f"express this merge: {facts.mergekit_reason}.\n"
    )


def _reproduction(facts: CardFacts) -> str:
    notes = "".join(f"\n{note}\n" for note in facts.notes)
    again = (
        "`evomerge merge evomerge_recipe.json --out DIR --models FOLDER` makes the same weights "
        "again, bit for bit, from the models below FOLDER or on the Hub: each is known by a digest "
        "of its weights."
    )
    if facts.form != "recipe":
        local = facts.sources[facts.recipe.base.name][:1] in "./~"
        base = f" --base {_base(facts)}" if facts.form == "adapter" and local else ""
        again += (
            f" `evomerge verify DIR{base}` compares this directory's files with their digests "
            "and its scores with those above."
        )
    if not facts.commands:
        return f"## Reproduce\n\n{again}\n{notes}"
    commands = "\n".join(facts.commands)
    return (
        f"## Reproduce\n\n{again}\n\nThe scores, from the folder of the study file, with this "
        f"directory's path in the place of the model's:\n\n```sh\n{commands}\n```\n{notes}"
    )
