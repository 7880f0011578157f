"""A file is there whole or not at all."""

from __future__ import annotations

import pytest

from freezeplan.atomic import flush, whole_file


def test_what_was_there_stays_until_all_is_written(tmp_path):
    """Readers see the old text or the new one; the temporary name is gone afterwards."""
    path = tmp_path / "plan.yaml"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        flush(temporary)
        assert path.read_text() == "old"

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_half_written_is_removed(tmp_path, error):
    """Whatever ends it early; what was there stays."""
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def half():
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        half()

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    """Where there is no folder, nothing can be removed either."""
    with pytest.raises(FileNotFoundError) as error, whole_file(tmp_path / "none" / "a") as temporary:
        temporary.write_text("")
    assert error.value.filename == str(tmp_path / "none" / ".a.part")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "folder") as temporary:
        temporary.write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
