"""Storage: a crash leaves the old or the new, damage is seen, and a stage is re-used only when nothing changed."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from offrl_models import storage
from offrl_models.schema import InputError


def test_canonical_json_is_one_string_per_value() -> None:
    assert storage.canonical_json({"b": 1, "a": [1.5]}) == storage.canonical_json({"a": [1.5], "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.canonical_json({"a": float("nan")})


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', "{", "[" * 100_000])
def test_json_that_others_would_take_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        storage.read_json(tmp_path / "x.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    storage.write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert storage.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_every_cut_and_flipped_bit_of_a_parquet_page_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"x": pa.array(range(5000)), "y": pa.array([i / 7 for i in range(5000)])})
    storage.write_parquet(path, table)
    whole = path.read_bytes()
    assert storage.read_parquet(path).equals(table)
    for cut in range(32):
        path.write_bytes(whole[: len(whole) * cut // 32])
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            storage.read_parquet(path)
    for at in range(100, len(whole) // 2, len(whole) // 40):  # inside the data pages
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(bytes(flipped))
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            storage.read_parquet(path)


def test_a_move_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        storage.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b" and (tmp_path / "a").exists()


class Counted:
    """A build that counts how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path) -> dict[str, int]:
        self.runs += 1
        storage.write_json(folder / "out.json", {"value": 7})
        return {"runs": self.runs}


def test_a_stage_is_reused_until_its_key_its_files_or_its_reports_change(tmp_path: Path) -> None:
    build, page = Counted(), tmp_path / "page.html"
    page.write_text("x")
    folder = tmp_path / "stage"

    def run(key: int) -> storage.Stage:
        return storage.build_stage(folder, {"key": key}, build, (page,))

    first, second = run(1), run(1)
    assert (first.reused, second.reused, build.runs) == (False, True, 1)
    assert first.digest == second.digest and first.summary == second.summary
    assert not run(2).reused
    (folder / "out.json").write_text('{"value": 8}')
    with pytest.raises(InputError, match=r"out\.json differs from what its step wrote"):
        storage.load_stage(folder)
    assert not run(2).reused and run(2).reused
    page.unlink()
    assert not run(2).reused


def test_a_stage_that_crashes_leaves_the_previous_one(tmp_path: Path) -> None:
    def crash(folder: Path) -> dict[str, int]:
        storage.write_json(folder / "half.json", {})
        raise RuntimeError("power cut")

    build = Counted()
    storage.build_stage(tmp_path / "stage", {}, build)
    with pytest.raises(RuntimeError, match="power cut"):
        storage.build_stage(tmp_path / "stage", {"new": 1}, crash)
    assert storage.load_stage(tmp_path / "stage").files.keys() == {"out.json"}  # the previous result stands
    assert storage.build_stage(tmp_path / "stage", {}, build).reused
    stage = storage.build_stage(tmp_path / "stage", {"new": 1}, build)
    assert not stage.reused and list(stage.files) == ["out.json"]
    with pytest.raises(InputError, match="was made from other logs or settings"):
        storage.load_stage(tmp_path / "stage", {"new": 2})
    with pytest.raises(InputError, match="holds no finished result"):
        storage.load_stage(tmp_path / "never")
