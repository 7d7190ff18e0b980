"""Commands of the third moment: write merges as checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from evomerge.cli_arguments import (
    AS_JSON,
    DTYPE,
    MODEL_FOLDERS,
    PICK_HELP,
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
@click.option("--pick", metavar="HOW", default=None, help=f"A member of the front: {PICK_HELP}.")
@click.option("--knee", is_flag=True, help="The recommended compromise, as --pick knee.")
@click.option(
    "--best", metavar="OBJECTIVE", default=None, help="The best of one, as --pick best:OBJECTIVE."
)
@click.option("--trial", type=int, default=None, help="Any trial by its number.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="New directory for the checkpoint.",
)
@click.option("--dtype", type=DTYPE, default=None, help="Instead of the one that was scored.")
@click.option(
    "--tokenizer", metavar="base|expert:NAME|DIR", default=None,
    help="Where tokenizer, chat template and generation settings come from; the base, as scored, "
    "where absent.",
)  # fmt: skip
@click.option("--recipe-only", is_flag=True, help="Recipe, scores and card without weights.")
@click.option(
    "--lora", is_flag=False, flag_value=0, type=click.IntRange(0), metavar="[RANK]", default=None,
    help="As a LoRA adapter of the base, with what it loses measured. Without a rank: the merged "
    "factors of lora_factors, which lose nothing.",
)  # fmt: skip
@click.option(
    "--push-to-hub", metavar="OWNER/NAME", default=None,
    help="Also upload it, as whom `hf auth login` or HF_TOKEN say.",
)  # fmt: skip
@click.option("--public", is_flag=True, help="Make a new repository on the Hub public.")
@SHARD_SIZE
@AS_JSON
def export(
    study: str, pick: str | None, knee: bool, best: str | None, trial: int | None, out: Path,
    dtype: str | None, tokenizer: str | None, recipe_only: bool, lora: int | None,
    push_to_hub: str | None, public: bool, max_shard_size: str, as_json: bool,
) -> None:  # fmt: skip
    """Write a merge as a checkpoint that transformers, lm-eval and mergekit can read.

    \b
    The directory holds model shards with config and tokenizer, README.md (model card),
    evomerge_recipe.json, evomerge_scores.json with the lm_eval command that reproduces the
    scores, mergekit_config.yml where mergekit can express the merge, and SHA256SUMS.
    `evomerge verify DIR` checks all of it later.
    """
    from evomerge.export import ExportOptions
    from evomerge.facts import export_facts, export_lines
    from evomerge.hub import push, require_hub
    from evomerge.one_shot import DTYPES
    from evomerge.take_home import export_trial, study_root

    if sum((pick is not None, knee, best is not None, trial is not None)) != 1:
        raise InputError(
            "export: choose exactly one of --pick HOW, --knee, --best OBJECTIVE, --trial N"
        )
    if public and push_to_hub is None:
        raise InputError("export: --public is for --push-to-hub")
    view = open_view(study)
    if push_to_hub is not None:
        require_hub(push_to_hub)
    options = ExportOptions(
        dtype=DTYPES[dtype] if dtype else None, tokenizer=tokenizer, recipe_only=recipe_only,
        lora=lora,
    )  # fmt: skip
    exported = export_trial(
        view, best=best, trial=trial, pick="knee" if knee else pick, out=out,
        shards=max_shard_size, options=options,
    )  # fmt: skip
    facts = export_facts(exported, study_root(view.directory))
    if push_to_hub is not None:
        facts["hub"] = push(exported.out, push_to_hub, private=not public)
    show(facts if as_json else export_lines(facts), as_json)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--digests-only", is_flag=True, help="Only compare files with SHA256SUMS.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path(), metavar="FOLDER",
    help="Folder that paths of tasks start from (of the study file); the current one where absent.",
)  # fmt: skip
@click.option(
    "--include", multiple=True, metavar="FOLDER",
    help="Task files, instead of the recorded folders; repeat for each.",
)  # fmt: skip
@click.option("--allow-task-code", is_flag=True, help="Let tasks and objectives run Python code.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--tolerance", type=click.FloatRange(0), default=0.0, show_default=True,
    help="How far the score of an item may be off, relative above 1; on other machines "
    "log-likelihoods differ in their last bits.",
)  # fmt: skip
@MODEL_FOLDERS
@click.option("--base", default=None, metavar="MODEL", help="Where the base is.")
@click.option(
    "--expert", "experts", multiple=True, metavar="NAME=MODEL",
    help="Where an expert is; repeat for each.",
)  # fmt: skip
@AS_JSON
def verify(
    directory: Path, digests_only: bool, root: Path, include: tuple[str, ...],
    allow_task_code: bool, device: str, tolerance: float, folders: tuple[Path, ...],
    base: str | None, experts: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Check an export: its files against their digests, its scores by scoring it again.

    The study is not needed, only its tasks. The models that were merged are needed where an
    objective compares with them, and the base where DIR holds an adapter. Files that have changed
    are not loaded. Exits with 1 where anything differs from what was recorded.
    """
    from evomerge.verification import Where, verify_digests
    from evomerge.verification import verify as verify_export

    if digests_only:
        found = verify_digests(directory)
    else:
        sources = dict(expert_pairs(experts)) | ({"base": base} if base is not None else {})
        where = Where(root, include, allow_task_code, device, folders, sources, tolerance)
        found = verify_export(directory, where)
    if as_json:
        print_json(found.facts())
    else:
        click.echo("\n".join(found.lines()))
    if not found.equal:
        raise click.exceptions.Exit(1)


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
@MODEL_FOLDERS
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
    recipe: Path, out: Path, base: str | None, experts: tuple[str, ...],
    folders: tuple[Path, ...], dtype: str | None, max_memory: str, max_shard_size: str,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the merge of one recipe as a checkpoint, without a study.

    RECIPE.json is what `evomerge export` writes as evomerge_recipe.json. Its models are looked
    for below --models by the digests of their weights, beside it, on the hub, or where --base and
    --expert say; other weights are refused, so the merge is the same bit for bit. Weights stream
    from disk to disk, so that the merge of a large model needs little memory.
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
            recipe, out, overrides, DTYPES[dtype] if dtype else None, settings, progress, folders
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
