"""The licence of a merge from those of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.checkpoint import open_checkpoint
from evomerge.licences import combined_licence, stated_licence


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "apache-2.0", "cc0-1.0"), "apache-2.0"),
        (("apache-2.0", "cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (("llama3.1", "llama3.1"), "llama3.1"),
        (("llama3.1", "apache-2.0"), "llama3.1"),
        (("gpl-3.0", "lgpl-3.0", "mit"), "gpl-3.0"),
        (("gpl-3.0", "agpl-3.0"), "agpl-3.0"),
        (("llama3.1", "gemma"), "other"),
        (("cc-by-nc-4.0", "gpl-3.0"), "other"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "cc-by-nc-sa-4.0"),
        (("mit", "unknown"), "unknown"),
        (("gpl-2.0", "mit"), "gpl-2.0"),
        (("gpl-2.0", "apache-2.0"), "other"),
        (("gpl-3.0", "apache-2.0"), "gpl-3.0"),
    ],
)
def test_rules(sources: tuple[str, ...], expected: str) -> None:
    for order in (sources, sources[::-1]):
        named = {f"m{number}": licence for number, licence in enumerate(order)}
        found = combined_licence(named)
        assert found.identifier == expected
        assert len(set(order)) == 1 or all(
            f"{n}: {name}" in found.note for n, name in named.items()
        )


def test_notes() -> None:
    unknown = combined_licence({"base": "mit", "math": "unknown"})
    assert unknown.note.startswith("The licence of math is not known, so the merge's is not (")
    assert "none of them covers all" in combined_licence({"a": "gemma", "b": "llama2"}).note
    nameless = combined_licence({"a": "other", "b": "other"})
    assert nameless.note.endswith("their cards do not name (a: other, b: other), see each.")
    kept = combined_licence({"a": "cc-by-nc-nd-4.0", "b": "mit"})
    assert kept.note.endswith("cc-by-nc-nd-4.0 does not allow changed versions to be shared.")


def test_front_matter() -> None:
    assert combined_licence({"a": "mit"}).front_matter() == {"license": "mit"}
    mixed = combined_licence({"a": "gemma", "b": "llama2"}).front_matter()
    assert mixed == {"license": "other", "license_name": "several-see-the-model-card"}
    own = combined_licence({"a": "other (acme-1)", "b": "other (acme-1)"}).front_matter()
    assert own == {"license": "other", "license_name": "acme-1"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: MIT\n---\n# a\n", "mit"),
        ("---\nlicense: [apache-2.0]\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: acme-1\n---\n", "other (acme-1)"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, gemma]\n---\n", "unknown"),
        ("---\nlicense: 3\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\n- mit\n---\n", "unknown"),
        ("# a\n---\nlicense: mit\n---\n", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_what_a_card_states(
    save_llama: Callable[..., Path], tmp_path: Path, card: str | None, expected: str
) -> None:
    base = open_checkpoint(str(save_llama("licensed", 1)), "base", "base")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert stated_licence(replace(base, directory=tmp_path, source=str(tmp_path))) == expected


def test_a_model_of_the_hub_is_asked_for_its_card(
    save_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_checkpoint(str(save_llama("hub", 1)), "base", "base")
    base = replace(base, source="owner/base@v2", directory=tmp_path / "snapshot")
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    asked = []

    def download(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert stated_licence(base) == "gemma"
    assert asked == [("owner/base", "README.md", "v2")]

    def fail(repo: str, name: str, revision: str | None) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert stated_licence(base) == "unknown"
