"""The commented study file that ``evomerge init`` writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import partial


def study_template(
    base: str | None,
    experts: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    adapters: tuple[str, int] | None = None,
    include: Sequence[str] = (),
    ungraded: Collection[str] = (),
) -> str:
    """Return a study file to edit; it loads as it stands once the models exist.

    Args:
        base: directory or hub id, None for a placeholder.
        experts: (name, directory or hub id); placeholders where empty.
        tasks: lm-eval task names; two that run no code where empty.
        adapters: a folder of LoRA adapters and how many it holds, instead of experts: they are
            merged as factors.
        include: folders with task files of the user's own.
        ungraded: tasks without reference answers; they keep their own metric beside adapters.
    """
    named = list(experts) or [("math", "models/math"), ("code", "models/code")]
    expert_lines = "\n".join(f"    {_text(name)}: {_text(source)}" for name, source in named)
    entry = _task if adapters is None else partial(_reference, ungraded=ungraded)
    task_lines = "\n".join(f"    - {entry(task)}" for task in tasks or list(_TASKS))
    comment = "  # Fine-tunes of that base, with short names. Their order is kept.\n"
    parts = {"experts": f"{comment}  experts:\n{expert_lines}", "space": _SPACE, "search": _SEARCH}
    scales = "[0.3, 0.5, 0.7, 0.9, 1.1]"
    if adapters is not None:
        folder, count = adapters
        trials = max(150, 1200 * count // 100)
        comment = "  # Adapters of that base: every subfolder is one, by its name.\n"
        task_lines = _NATS + task_lines
        parts = {
            "experts": f"{comment}  experts: {_text(folder)}",
            "space": _FACTORS,
            "search": _EVO_MERGING.format(trials=trials),
        }
        scales = f"[{1 / count:.2g}, {4 / count:.2g}]"
    return _TEMPLATE.format(
        base=_text(base or "models/base"), tasks=task_lines, scales=scales,
        grid=_ROOTS if adapters is not None else _GRID, include=", ".join(map(_text, include)),
        **parts,
    )  # fmt: skip


#: Tasks with several metrics or filters, and the choice that is usually reported.
_TASKS = {
    "gsm8k": "{task: gsm8k, metric: exact_match, filter: strict-match}",
    "arc_challenge": "{task: arc_challenge, metric: acc_norm}",
}


def _task(name: str) -> str:
    return _TASKS.get(name) or _text(name)


def _reference(name: str, ungraded: Collection[str]) -> str:
    """Return the task with the metric in whose unit, nats, the L1 terms of evo_merging are."""
    if name in ungraded:
        return _task(name)
    return f"{{task: {_text(name)}, metric: reference_loglikelihood}}"


def _text(value: str) -> str:
    """Return a YAML scalar; JSON strings are YAML strings."""
    plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
    return value if plain and not value[0].isdigit() and "." not in value[:1] else json.dumps(value)


_SPACE = """\
  # evomerge list methods
  method: task_arithmetic
  # Which tensors share coefficients: model, layer, module, tensor.
  partition: layer
  parameters:
    # {low, high} is searched for every block (and expert); a plain number is fixed.
    weight: {low: 0.0, high: 1.5}"""

_FACTORS = """\
  # A = sum of weight x (its largest entries), B = sum of weight x B: one adapter of their rank
  # (Evo-Merging; LoraHub with density: 1). All adapters need equal modules, rank and lora_alpha.
  method: lora_factors
  partition: model
  parameters:
    weight: {low: -1.5, high: 1.5}
    density: {low: 0.0, high: 1.0}"""

_SEARCH = """\
  # evomerge list searchers
  searcher: auto             # by trials, coefficients and objectives; check says which
  trials: 150"""

_NATS = """\
  # The log-likelihood of the right answers: smooth, and in the unit that the searcher's L1 terms
  # are made for. Where there are none, as for perplexities: - TASK, with its own metric.
"""

_EVO_MERGING = """\
  # CMA-ES on densities and weights together, which was ahead of both in turn (stages: both, as
  # published) on the adapters of experiments/lora_repository; scale is LoraHub's problem.
  # density_l1 and weight_l1 (0.05) are added to the loss, which was cross-entropy in nats.
  searcher: evo_merging
  arguments: {{stages: joint}}
  trials: {trials}"""

_GRID = """\
  # Base, experts and uniform average are always scored. These scales of the summed task
  # vectors too:"""

_ROOTS = """\
  # Base, experts and the uniform average (every weight 1/N) are always scored. Every weight the
  # root of these too, because weights act squared: each adapter's own change so many times."""

_TEMPLATE = """\
# An evomerge study. Check it: evomerge check THIS_FILE    Run it: evomerge run THIS_FILE
# Relative paths start from this file's folder. All keys: evomerge schema

seed: 0

models:
  # Directory with safetensors weights, or hub id (owner/name[@revision]).
  base: {base}
{experts}

space:
{space}
  # dtype: bfloat16          # of the merged model; the base's where absent

fitness:
  # lm-eval tasks, groups or tags; each is an objective. More control:
  #   - {{task: gsm8k, metric: exact_match, filter: flexible-extract, name: math, weight: 1.0}}
  #   - {{task: gsm8k, metric: response_tokens, name: length}}
  tasks:
{tasks}
  # Other objectives (evomerge list objectives):
  # objectives:
  #   - {{kind: kl, of: base, text: texts.txt}}
  #   - {{kind: distance, max: 0.1}}
  #   - {{kind: python, function: fitness/mine.py:score, items: fitness/mine.jsonl}}
  # Folders with your own task YAML files.
  include_path: [{include}]
  # allow_task_code: true    # for tasks that run code, such as mbpp: in a container, say
  # Disjoint items of each task: counts, or fractions such as 0.1.
  items:
    search: 300              # every trial is scored on 60 of them, see estimator
    validation: 200          # decide the reported front
    test: 500                # held out, only reported
  # Which of the search items a trial is scored on. auto takes soft_reg on 60 of 200 or more,
  # where every answer has a margin, and all of them elsewhere; `evomerge check` says which.
  # estimator: none          # all of them, always
  # estimator: {{name: soft_reg, items: 20, design: value_optimal_margins}}    # list estimators
  batch_size: 64

search:
{search}
  # items: 20000             # item evaluations of all trials, instead of trials or beside them
  # racing: {{}}               # stop trials early that cannot reach the front any more
  # parallel: 4              # outstanding trials; twice the workers where absent
  finalists: 12              # re-scored on the validation items

baselines:
{grid}
  task_arithmetic: {scales}
  # experts: 20              # scored alone: auto, all, names, or at most so many

pool:
  kind: ray                  # or serial, in this process
  workers: 2
  cpus_per_worker: 1
  gpus_per_worker: 0         # 1 gives every worker a GPU of its own

tracking:
  # A local MLflow store in the study's directory where absent.
  # uri: http://127.0.0.1:5000
  experiment: evomerge
  # log_model: knee          # or front: checkpoints as MLflow models, at the end
"""
