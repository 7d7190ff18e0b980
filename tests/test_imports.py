"""Who may import whom, and that starting costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import evomerge

PACKAGE = Path(evomerge.__file__).parent
HEAVY = {"torch", "transformers", "ray", "mlflow", "nevergrad", "pymoo", "lm_eval"}

#: Low to high: a module may import modules of its own level and below.
LEVELS = (
    ("errors",),
    (
        "pareto",
        "blocks",
        "layout",
        "strict_yaml",
        "low_rank",
        "file_map",
        "checkpoint",
        "atomic_directory",
        "atomic_file",
        "memory",
    ),
    ("loading", "numerics"),
    ("recipe", "model_settings", "adapter", "models"),
    ("trial", "space", "driver_lock", "journal", "estimate", "item_cache", "racing", "halving"),
    ("merge", "fitness", "search"),
    (
        "worker",
        "resident",
        "pool",
        "patience",
        "spool",
        "ray_session",
        "ray_pool",
        "interrupt",
        "testing",
        "testing_pool",
    ),
    ("feasibility", "contract", "restart_record"),
    (
        "items",
        "window",
        "study_record",
        "journal_cursor",
        "valuation",
        "evaluations",
        "designs",
        "growing_front",
        "study_view",
        "comparison",
    ),
    ("choosing", "telling", "references", "brackets", "asks"),
    (
        "gain",
        "coverage",
        "lineage",
        "plain_page",
        "coefficient_page",
        "study_listener",
        "restarted",
        "study_run",
        "rerun",
        "restarting",
        "study",
        "scoring",
        "metric_names",
        "front_page",
        "front_plot",
        "front_frames",
        "pareto_view",
        "study_note",
        "front_table",
        "terminal_plot",
        "redaction",
        "presentation",
        "projection",
        "study_series",
    ),
    (
        "tracking_target",
        "ui_server",
        "tracking_client",
        "tracking_store",
        "tracking",
        "tracking_process",
        "tracking_models",
        "mergekit_yaml",
        "picking",
        "paired_tests",
        "item_comparison",
        "comparison_rows",
        "report_charts",
        "estimate_audits",
        "report_summary",
        "report",
        "licences",
        "checksums",
        "tokenizer_source",
        "model_search",
        "lora",
        "factor_adapter",
        "hub",
        "model_card",
        "export_documents",
        "export",
        "one_shot",
        "directions",
    ),
    ("objective_sections", "economy_sections", "expert_folder", "config", "partial_file"),
    (
        "estimation",
        "economy",
        "default_estimator",
        "advice",
        "fitness_file",
        "capacity",
        "starting",
        "search_facts",
        "direction_grams",
        "study_space",
        "examination",
        "prepare",
        "template",
        "mergekit_evolve",
        "catalogue",
        "listing",
    ),
    (
        "study_location",
        "rescoring",
        "verification",
        "take_home",
        "item_texts",
        "opened_study",
        "savings",
        "facts",
        "extension",
        "replay",
        "launch",
        "bench",
        "calibration",
    ),
    ("submission", "jobs"),
    ("live_progress", "terminal", "byte_progress", "waiting_line"),
    ("demo_pool", "demo", "cli_arguments", "cli_calibrate", "cli_cluster"),
    ("cli_launch", "cli_look", "cli_take_home", "cli_durable", "cli_ui", "cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    name = part(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"say in LEVELS where {name} belongs"
    for imported in imports(path):
        pieces = imported.split(".")
        if pieces[0] == "evomerge" and len(pieces) > 1 and pieces[1] in LEVEL:
            assert LEVEL[pieces[1]] <= LEVEL[name], f"{name} imports {imported}"


def test_search_fitness_and_merge_do_not_know_each_other() -> None:
    strangers = {
        "search": {"merge", "fitness", "pool", "ray_pool", "study", "tracking"},
        "fitness": {"search", "pool", "ray_pool", "study", "tracking"},
        "merge": {"search", "fitness", "pool", "ray_pool", "study", "tracking"},
    }
    for name, forbidden in strangers.items():
        for path in sorted((PACKAGE / name).rglob("*.py")):
            used = {i.split(".")[1] for i in imports(path) if i.startswith("evomerge.")}
            assert not used & forbidden, path


@pytest.mark.parametrize("library", sorted(HEAVY - {"torch", "transformers"}))
def test_one_module_per_heavy_library(library: str) -> None:
    users = {p.name for p in modules() if library in {i.split(".")[0] for i in imports(p)}}
    # A client of Ray Jobs is no member of a cluster: two seams, which never meet.
    known = {"ray": {"ray_session.py", "jobs.py"}}.get(library)
    assert users == known if known else len(users) <= 1, users


def test_package_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, evomerge, evomerge.cli\n"
        f"assert not {HEAVY | {'numpy', 'pydantic'}!r} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_modules_stay_readable() -> None:
    long = {str(p): n for p in modules() if (n := len(p.read_text().splitlines())) > 500}
    assert not long
