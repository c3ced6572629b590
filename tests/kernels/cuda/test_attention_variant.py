"""Which variant of the prefill kernel a table chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_plan.kernels.cuda import attention_variant
from miles_plan.kernels.cuda.attention_variant import VARIANTS, PrefillVariant, from_json, prefill_variant, to_json

CHOICES = {"128x128": {4096: VARIANTS[1], 32_768: VARIANTS[3]}, "64x64": {4096: VARIANTS[2]}}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table in the environment, and nothing remembered of another."""
    path = tmp_path / "table.json"
    path.write_text(to_json("a GPU", CHOICES))
    monkeypatch.setenv(attention_variant.TABLE_VARIABLE, str(path))
    for remembered in (attention_variant._table, prefill_variant):
        remembered.cache_clear()
    yield
    for remembered in (attention_variant._table, prefill_variant):
        remembered.cache_clear()


def test_a_table_survives_its_file() -> None:
    assert from_json(to_json("a GPU", CHOICES)) == CHOICES
    assert from_json(to_json("a GPU", {})) == {}


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 4096), (4096, 4096), (11_000, 4096), (12_000, 32_768), (10**6, 32_768)])
def test_the_nearest_length_is_taken(table: None, tokens: int, chosen: int) -> None:
    assert prefill_variant("a GPU", 128, 128, tokens) == CHOICES["128x128"][chosen]


def test_head_sizes_without_an_entry_take_the_default(table: None) -> None:
    assert prefill_variant("a GPU", 192, 128, 4096) == PrefillVariant() == VARIANTS[0]


def test_a_gpu_without_a_table_takes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(attention_variant.TABLE_VARIABLE, raising=False)
    assert prefill_variant("a GPU that nobody has measured", 128, 128, 4096) == PrefillVariant()
