"""Folders that a limited process may change: none of them leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocols.local import own_folders


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    (folder / "runs" / "r1").mkdir(parents=True)
    return folder


def test_files_are_put_and_removed(work: Path, tmp_path: Path) -> None:
    (tmp_path / "upload").write_text("x")
    with own_folders.opened(work, "runs", "r1") as folder:
        folder.put(tmp_path / "upload", "1")
        assert folder.path == work / "runs" / "r1"
        assert (folder.names(), folder.is_file("1")) == (["1"], True)
        (work / "link").symlink_to(folder.path / "1")
        folder.unlink("1")
        folder.unlink("1")
        assert folder.names() == []
    with own_folders.opened(work) as folder:
        assert not folder.is_file("link")
        folder.remove_folder("runs")
        assert not (work / "runs").exists()


@pytest.mark.attack("23.4")
@pytest.mark.parametrize("part", ["runs", "runs/r1"])
def test_no_part_of_a_folder_is_a_link(part: str, work: Path, tmp_path: Path) -> None:
    """Attack: an app puts a link in place of a folder that its agent or coordinator writes to."""
    other = tmp_path / "other"
    (other / "r1").mkdir(parents=True)
    (other / "r1" / "precious").touch()
    (work / part).rename(work / "moved")
    (work / part).symlink_to(other if part == "runs" else other / "r1")
    with pytest.raises(OSError), own_folders.opened(work, "runs", "r1"):  # noqa: PT011
        pass
    with own_folders.opened(work, "runs") if part != "runs" else own_folders.opened(work) as folder:
        folder.remove_folder("r1" if part != "runs" else "runs")
    assert (other / "r1" / "precious").exists()
