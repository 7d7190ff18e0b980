"""A tiny project with a folder of LoRA adapters, and evomerge as its command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_adapters import save_adapters
from tiny_project import tiny_project

from evomerge import cli

NAMES = ("chat", "code", "law", "math", "med", "poet")
STUDY = """
name: repository
models: {base: models/base, experts: adapters}
space:
  method: lora_factors
  partition: model
  parameters: {weight: {low: -1.5, high: 1.5}, density: {low: 0, high: 1}}
fitness:
  tasks: [pick_a]
  objectives: [{kind: kl, of: law, text: texts.txt}, {kind: distance, norm: l1}]
  include_path: fitness
  items: {search: 6, validation: 8, test: 10}
  batch_size: 8
search: {searcher: evo_merging, arguments: {population: 4}, trials: 16, finalists: 3}
baselines: {task_arithmetic: [0.25], experts: 4}
pool: {kind: serial, workers: 1}
tracking: {enabled: false}
"""


def lora_project(folder: Path, save_llama: Callable[..., Path]) -> Path:
    """Make the project in ``folder``."""
    tiny_project(folder, save_llama, STUDY)
    for name in ("math", "code"):
        shutil.rmtree(folder / "models" / name)
    save_adapters(folder / "adapters", NAMES)
    (folder / "texts.txt").write_text("abcdefgh\nhgfedcba\n" * 12)
    return folder


def main(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code
