from pathlib import Path

import pytest

from storage import layout, registry
from storage.catalog import query
from storage.errors import ConfigError, CorruptData
from storage.lake import Lake
from storage.registry import ModelRef
from storage.repair import repair


def saved(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def registered(lake: Lake, folder: Path, role: str, parent: str | None = None) -> ModelRef:
    return registry.register(
        lake,
        folder,
        role=role,
        round=1,
        parent_id=parent,
        trained_on="f" * 32,
        config={"width": 8},
    )


def test_register_names_a_model_by_its_weights_and_keeps_its_lineage(
    lake: Lake, tmp_path: Path
) -> None:
    ref = registered(lake, saved(tmp_path / "m", b"abc"), "med")
    assert ref.model_id == "ba7816bf8f01cfea414140de5dae2223"
    assert registered(lake, tmp_path / "m", "med") == ref
    assert registry.list_models(lake) == [ref]
    assert registry.lineage_of(lake, ref.model_id)["config"] == {"width": 8}
    assert sorted(lake.root.list(ref.path)) == ["config.json", "lineage.json", "model.safetensors"]
    assert (registry.local_folder(lake, ref) / "config.json").read_text() == "{}"


def test_find_and_resolve_know_roles_and_prefixes(lake: Lake, tmp_path: Path) -> None:
    med = registered(lake, saved(tmp_path / "m", b"abc"), "med")
    captioner = registered(lake, saved(tmp_path / "c", b"def"), "captioner", med.model_id)
    assert registry.find(lake, "captioner", 1) == captioner
    assert registry.find(lake, "filter", 1) is None
    assert registry.resolve(lake, captioner.model_id[:8]) == captioner
    with pytest.raises(ConfigError, match="there is none"):
        registry.resolve(lake, "123456")
    rows = query(lake, "SELECT role, generation, ancestry FROM lineage").to_pylist()
    chain = f"{med.model_id[:8]} > {captioner.model_id[:8]}"
    assert {"role": "captioner", "generation": 1, "ancestry": chain} in rows


def test_find_gives_the_newest_model_when_a_rebuild_made_another(
    lake: Lake, tmp_path: Path
) -> None:
    first = registered(lake, saved(tmp_path / "first", b"def"), "med")
    rebuilt = registered(lake, saved(tmp_path / "rebuilt", b"abc"), "med")
    assert rebuilt.model_id < first.model_id, "the newest must not be the last by id"
    assert registry.find(lake, "med", 1) == rebuilt
    assert registered(lake, tmp_path / "first", "med") == first, "built as at first, once more"
    assert registry.find(lake, "med", 1) == first
    assert registry.list_models(lake, 1) == [rebuilt, first]


def test_promote_sets_the_champion_once_per_round(lake: Lake, tmp_path: Path) -> None:
    assert registry.champion(lake) is None
    first = registered(lake, saved(tmp_path / "a", b"abc"), "med")
    second = registered(lake, saved(tmp_path / "b", b"def"), "med")
    registry.promote(lake, first.model_id, 1, "the first")
    registry.promote(lake, second.model_id, 2, "better")
    before = lake.root.read_bytes(layout.CHAMPION)
    registry.promote(lake, second.model_id, 2, "better")
    assert lake.root.read_bytes(layout.CHAMPION) == before
    champion = registry.champion(lake)
    assert champion is not None
    assert champion.model_id == second.model_id


def test_promote_refuses_a_model_that_is_not_registered(lake: Lake) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        registry.promote(lake, "0" * 32, 1, "why not")


def test_local_folder_names_the_checkpoint_when_its_weights_changed(
    lake: Lake, tmp_path: Path
) -> None:
    ref = registered(lake, saved(tmp_path / "m", b"abc"), "med")
    lake.root.write_bytes(layout.model_file(ref.model_id, "model.safetensors"), b"abd")
    with pytest.raises(CorruptData, match=rf"{ref.model_id}.*bootstrap repair"):
        registry.local_folder(lake, ref)


def test_register_refuses_an_unknown_role_and_a_folder_without_weights(
    lake: Lake, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'teacher'"):
        registered(lake, saved(tmp_path / "m", b"abc"), "teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        registered(lake, tmp_path / "empty", "med")


def test_foreign_model_has_a_row_and_a_lineage_and_no_files(local_lake: Lake) -> None:
    model_id = "ab" * 16
    found = [
        registry.register_foreign(
            local_lake,
            model_id,
            role="foreign_scorer",
            round=1,
            reference="clip:some/model",
            config={"model_type": "clip"},
        )
        for _ in range(2)
    ]
    assert found[0] == found[1] == registry.find(local_lake, "foreign_scorer", 1)
    assert found[0].is_foreign
    rows = query(local_lake, "SELECT role, path, parent_id FROM models").to_pylist()
    assert rows == [{"role": "foreign_scorer", "path": "clip:some/model", "parent_id": None}]
    assert query(local_lake, "SELECT generation FROM lineage").to_pylist() == [{"generation": 0}]
    assert registry.lineage_of(local_lake, model_id)["config"] == {"model_type": "clip"}
    assert registry.find(local_lake, "filter", 1) is None
    assert repair(local_lake) == []
    with pytest.raises(ConfigError, match="clip:some/model: its files are not in the lake"):
        registry.local_folder(local_lake, found[0])
    with pytest.raises(ConfigError, match="one of foreign_captioner, foreign_scorer, got 'filter'"):
        registry.register_foreign(
            local_lake, model_id, role="filter", round=1, reference="clip:x", config={}
        )
