"""Commands of the third moment: write merges as checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from evomerge.cli_arguments import (
    AS_JSON,
    DTYPE,
    SHARD_SIZE,
    STUDY,
    expert_pairs,
    open_view,
    print_json,
    show,
)
from evomerge.errors import InputError


@click.command()
@STUDY
@click.option("--knee", is_flag=True, help="The recommended compromise.")
@click.option("--best", metavar="OBJECTIVE", default=None, help="The best of one objective.")
@click.option("--trial", type=int, default=None, help="Any trial by its number.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="New directory for the checkpoint.",
)
@SHARD_SIZE
@AS_JSON
def export(
    study: str, knee: bool, best: str | None, trial: int | None, out: Path,
    max_shard_size: str, as_json: bool,
) -> None:  # fmt: skip
    """Write a merge as a checkpoint that transformers, lm-eval and mergekit can read.

    \b
    The directory holds model shards with config and tokenizer, README.md (model card),
    evomerge_recipe.json, evomerge_scores.json with the lm_eval command that reproduces the
    scores, and mergekit_config.yml where mergekit can express the merge.
    """
    from evomerge.facts import export_facts, export_lines
    from evomerge.take_home import export_trial, study_root

    if sum((knee, best is not None, trial is not None)) != 1:
        raise InputError("export: choose exactly one of --knee, --best OBJECTIVE, --trial N")
    view = open_view(study)
    exported = export_trial(view, best=best, trial=trial, out=out, shards=max_shard_size)
    facts = export_facts(exported, study_root(view.directory))
    show(facts if as_json else export_lines(facts), as_json)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE.json")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="New directory for the checkpoint.",
)
@click.option("--base", default=None, metavar="MODEL", help="Where the base is, if not as written.")
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="NAME=MODEL",
    help="Where an expert is, if not as written; repeat for each.",
)
@click.option(
    "--dtype",
    type=DTYPE,
    default=None,
    help="Instead of the recipe's.",
)
@click.option(
    "--max-memory", default="4GB", show_default=True, help="Merged weights held at a time."
)
@SHARD_SIZE
@click.option("--threads", type=click.IntRange(1), default=None, help="All CPUs where absent.")
@AS_JSON
def merge(
    recipe: Path, out: Path, base: str | None, experts: tuple[str, ...], dtype: str | None,
    max_memory: str, max_shard_size: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the merge of one recipe as a checkpoint, without a study.

    RECIPE.json is what `evomerge export` writes as evomerge_recipe.json. Its models are looked
    for beside it, on the hub, or where --base and --expert say. Weights stream from disk to
    disk, so that the merge of a large model needs little memory.
    """
    from rich.console import Console

    from evomerge.byte_progress import byte_progress
    from evomerge.one_shot import DTYPES, MergeSettings, merge_recipe, size_bytes

    settings = MergeSettings(
        size_bytes(max_memory, "--max-memory"), size_bytes(max_shard_size, "--max-shard-size"),
        threads,
    )  # fmt: skip
    overrides = dict(expert_pairs(experts)) | ({"base": base} if base is not None else {})
    with byte_progress(out.name, Console(stderr=True)) as progress:
        merged = merge_recipe(
            recipe, out, overrides, DTYPES[dtype] if dtype else None, settings, progress
        )
    if as_json:
        print_json(merged.facts())
    else:
        click.echo(merged.line())


@click.command()
@click.argument("kind", type=click.Choice(["tsvm"]))
@click.option("--base", required=True, metavar="MODEL", help="Base model: directory or hub id.")
@click.option(
    "--expert", "experts", multiple=True, required=True, metavar="NAME=MODEL",
    help="Expert: short name and directory or hub id; repeat for each.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the checkpoints."
)
@click.option(
    "--dtype", type=DTYPE, default="float32", show_default=True,
    help="A short one rounds most of the small changes away.",
)  # fmt: skip
@SHARD_SIZE
@AS_JSON
def directions(
    kind: str, base: str, experts: tuple[str, ...], out: Path, dtype: str, max_shard_size: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Prepare parts of a published merge as further experts of a study.

    \b
    tsvm   task singular vectors (Gargiulo et al. 2025): the main directions of every task
           vector, turned until those of different experts no longer meet

    Writes the base plus the part of each expert as a checkpoint. Listed in a study beside the
    experts themselves, with task_arithmetic, one search covers task arithmetic, that merge, and
    what lies between. Takes as long as the singular values of every matrix of every expert.
    """
    from rich.console import Console

    from evomerge.byte_progress import byte_progress
    from evomerge.directions import prepare_directions
    from evomerge.one_shot import DTYPES, size_bytes

    shards = size_bytes(max_shard_size, "--max-shard-size")
    with byte_progress(out.name, Console(stderr=True)) as progress:
        found = prepare_directions(
            kind, base, expert_pairs(experts), out, DTYPES[dtype], shards, progress
        )
    if as_json:
        print_json(found.facts())
    else:
        click.echo("\n".join(found.lines()))
