"""Files that are there whole or not at all: written beside their places, and renamed. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name in the same folder to write to; at the end what was written there takes the place of ``path``.

    Where that fails, or the block raises, the half-written file is removed and what was at ``path`` stays. A process
    that is killed leaves ``.NAME.part``, which the next attempt writes over; two at once on one path are not foreseen.

    Raises:
        OSError: If it cannot be renamed, and what the block raises.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder, "plan.yaml")) as temporary:
        ...         _ = temporary.write_text("version: 1")
        ...     temporary.name, [path.name for path in Path(folder).iterdir()]
        ('.plan.yaml.part', ['plan.yaml'])
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is made if need be: all of them or, where that fails, none.

    Args:
        folder: Files of these names in it are replaced.
        contents: Name to content.

    Raises:
        OSError: If they cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as there:
        ...     write_all(Path(there, "run"), {"a.txt": b"1", "b.txt": b"2"})
        ...     sorted(path.name for path in Path(there, "run").iterdir())
        ['a.txt', 'b.txt']
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        for name, content in contents.items():
            temporary = files.enter_context(whole_file(folder / name))
            temporary.write_bytes(content)
            flush(temporary)


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk, so that renaming it cannot outrun it when the power goes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
