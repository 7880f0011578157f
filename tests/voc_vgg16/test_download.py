"""Downloading from a server that cuts, lies, redirects and sends rubbish: the right file, or a sentence and no file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import pytest

from freezeplan.errors import DataError, FreezePlanError
from freezeplan.training.voc import read_voc
from freezeplan.voc_vgg16 import command
from freezeplan.voc_vgg16 import download as download_module
from freezeplan.voc_vgg16.command import voc_vgg16
from freezeplan.voc_vgg16.download import VOC2012, Archive, check_counts, default_folder, download
from freezeplan.voc_vgg16.sample import write_sample

CONTENT = bytes(range(256)) * 4000
MIRROR = "  it is another file, or a page that says why there is none; --url URL takes it from a mirror"


@dataclass
class Server:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    ranges: bool = True
    tag: str = '"one"'
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of its answers the connection ends, one for each answer."""
    length: int | None = None
    """What it announces instead of the truth; -1: nothing."""
    status: list[int] = field(default_factory=list)
    redirect: str = ""
    pause: float = 0.0
    shift: int = 0
    asked: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                server.asked.append(dict(self.headers))
                if server.redirect and self.path != server.redirect:
                    self.send_response(302)
                    self.send_header("Location", server.redirect)
                    self.end_headers()
                    return
                if server.status:
                    self.send_error(server.status.pop(0))
                    return
                start = self.begin()
                body = server.content[start:]
                if server.length is None or server.length >= 0:
                    self.send_header("Content-Length", str(len(body) if server.length is None else server.length))
                self.end_headers()
                body = body[: server.cuts.pop(0)] if server.cuts else body
                try:
                    for at in range(0, len(body), 2**16):
                        self.wfile.write(body[at : at + 2**16])
                        time.sleep(server.pause)
                except OSError:
                    pass
                self.close_connection = True

            def begin(self) -> int:
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                same = self.headers.get("If-Range") in (None, server.tag)
                start = int(asked[1]) if asked and server.ranges and same else 0
                self.send_response(206 if start else 200)
                if server.tag:
                    self.send_header("ETag", server.tag)
                if start:
                    size = len(server.content)
                    self.send_header("Content-Range", f"bytes {start + server.shift}-{size - 1}/{size}")
                return start

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), found.handler())
    found.url = f"http://127.0.0.1:{http.server_address[1]}/voc.tar"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    http.shutdown()
    thread.join()
    http.server_close()


def archive_of(url: str, content: bytes = CONTENT, images: tuple[int, int] = (20, 20)) -> Archive:
    return Archive(url, hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content), images)


def get(server: Server, folder: Path, **options: Any) -> Path:
    return download(archive_of(server.url), folder, pause=0.001, **options)


def refusal(server: Server, folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        get(server, folder, **options)
    assert not (folder / "voc.tar").exists()
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file(server: Server, tmp_path: Path) -> None:
    told: list[int] = []

    path = get(server, tmp_path / "new" / "folder", progress=told.append)

    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["voc.tar"]
    assert told == sorted(told)
    assert told[-1] == len(CONTENT)

    assert get(server, path.parent) == path
    assert len(server.asked) == 1


def test_a_connection_that_is_cut_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 1, 200_000]

    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked.get("Range") for asked in server.asked] == [
        None,
        "bytes=300000-",
        "bytes=300001-",
        "bytes=500001-",
    ]
    assert [asked.get("If-Range") for asked in server.asked] == [None, '"one"', '"one"', '"one"']


def test_a_connection_that_is_always_cut_is_gone_on_with_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000] * 5

    assert refusal(server, tmp_path) == (
        f"{server.url}: 5 attempts, the last ended with: the connection ended at byte 5,000 of 1,024,000\n"
        "  run it again to go on at byte 5,000 of 1,024,000, or give a mirror with --url URL"
    )
    assert (tmp_path / "voc.tar.part").read_bytes() == CONTENT[:5000]

    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1]["Range"] == "bytes=5000-"
    assert names(tmp_path) == ["voc.tar"]


def test_a_file_that_changed_on_the_server_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.content, server.cuts = bytes(len(CONTENT)), [1000] * 5
    refusal(server, tmp_path)
    server.content, server.tag = CONTENT, '"two"'

    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1]["If-Range"] == '"one"'


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_mark_that_promises_equal_bytes_the_checksum_decides(
    tag: str, server: Server, tmp_path: Path
) -> None:
    server.tag, server.cuts = tag, [1000]

    assert get(server, tmp_path).read_bytes() == CONTENT
    assert (server.asked[-1]["Range"], server.asked[-1].get("If-Range")) == ("bytes=1000-", None)


def test_a_mark_that_is_damaged_is_left_aside(server: Server, tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(CONTENT[:1000])
    (tmp_path / "voc.tar.part.json").write_text("[")

    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [300_000]

    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT) + 7, len(CONTENT) - 7, 0])
def test_a_length_that_belongs_to_another_file(length: int, server: Server, tmp_path: Path) -> None:
    server.length = length

    expected = f"{server.url}: the server has {length:,} bytes, expected 1,024,000\n{MIRROR}"
    assert refusal(server, tmp_path) == expected


def test_a_length_that_is_right_of_a_file_that_is_shorter(server: Server, tmp_path: Path) -> None:
    server.content, server.length, server.ranges = CONTENT[:-9], len(CONTENT), False

    assert refusal(server, tmp_path) == (
        f"{server.url}: 5 attempts, the last ended with: the connection ended at byte 1,023,991 of 1,024,000\n"
        "  run it again to go on at byte 1,023,991 of 1,024,000, or give a mirror with --url URL"
    )


def test_no_length_at_all(server: Server, tmp_path: Path) -> None:
    server.length = -1
    assert get(server, tmp_path / "right").read_bytes() == CONTENT

    server.content = CONTENT + b"more"
    found = refusal(server, tmp_path / "more")

    assert found == f"{server.url}: the server sends more than the archive's 1,024,000 bytes"
    assert "voc.tar.part" not in names(tmp_path / "more")


def test_another_part_than_was_asked_for(server: Server, tmp_path: Path) -> None:
    server.cuts, server.shift = [1000], 5

    assert refusal(server, tmp_path) == (f"{server.url}: asked for bytes from 1,000 on, the server sends 1005-1023999")


def test_wrong_bytes_are_removed(server: Server, tmp_path: Path) -> None:
    server.content = bytes(len(CONTENT))
    wrong, right = (archive_of("", content).md5 for content in (server.content, CONTENT))

    assert refusal(server, tmp_path) == (
        f"{tmp_path / 'voc.tar'}: wrong bytes came: their md5 is {wrong}, expected {right}\n"
        "  it was removed; run it again, or give a mirror with --url URL"
    )
    assert "voc.tar.part" not in names(tmp_path)


def test_a_file_that_is_another_one_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "voc.tar").write_bytes(b"mine")
    with pytest.raises(DataError) as caught:
        get(server, tmp_path)

    mine, right = (archive_of("", content).md5 for content in (b"mine", CONTENT))
    assert str(caught.value) == (
        f"{tmp_path / 'voc.tar'}: is another file: its md5 is {mine}, expected {right}\n"
        "  move it away to download the archive, or give another folder with --data"
    )
    assert (tmp_path / "voc.tar").read_bytes() == b"mine"
    assert server.asked == []


def test_no_such_file(server: Server, tmp_path: Path) -> None:
    server.status = [404]

    assert refusal(server, tmp_path) == (
        f"{server.url}: the server answers 404 Not Found\n"
        "  --url URL takes it from a mirror; --data FILE reads an archive that is already there"
    )
    assert len(server.asked) == 1


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.status = [503, 429]
    assert get(server, tmp_path / "later").read_bytes() == CONTENT

    server.status = [503] * 5
    assert refusal(server, tmp_path / "never").startswith(
        f"{server.url}: 5 attempts, the last ended with: the server answers 503 Service Unavailable\n"
    )


def test_a_part_that_the_server_does_not_have_is_begun_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(bytes(1000))
    server.status = [416]

    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_begun_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(bytes(len(CONTENT) + 1))

    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_redirect_and_a_mirror_are_followed(server: Server, tmp_path: Path) -> None:
    server.redirect = "/elsewhere.tar"
    assert get(server, tmp_path / "redirect").read_bytes() == CONTENT

    mirror = f"{server.url}.mirror"
    found = download(archive_of("http://nowhere.invalid/voc.tar"), tmp_path / "mirror", url=mirror)
    assert (found.name, found.read_bytes()) == ("voc.tar", CONTENT)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        download(archive_of("http://127.0.0.1:9/voc.tar"), tmp_path, pause=0.001)

    assert str(caught.value) == (
        "http://127.0.0.1:9/voc.tar: 5 attempts, the last ended with: [Errno 111] Connection refused\n"
        "  run it again to go on at byte 0 of 1,024,000, or give a mirror with --url URL"
    )


def test_a_server_that_falls_silent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    server.pause = 0.5

    assert "1 attempts, the last ended with: timed out\n" in refusal(server, tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "voc.tar", "http://\xfc.example/voc.tar"])
def test_what_is_no_address(url: str, server: Server, tmp_path: Path) -> None:
    assert refusal(server, tmp_path, url=url) == (f"--url begins with http:// or https:// and is ASCII, found {url!r}")


def test_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))

    assert refusal(server, tmp_path) == (
        f"{tmp_path}: 1,024,000 bytes are to be downloaded, and the disk has 1,000,000 left\n"
        "  make room, or give --data FOLDER on another disk"
    )
    assert server.asked == []


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert refusal(server, tmp_path / "file" / "folder") == (
        f"{tmp_path / 'file' / 'folder' / 'voc.tar'}: cannot be written (Not a directory)\n"
        "  make room, or give another folder with --data"
    )


def test_two_at_once_the_second_waits_and_sees_the_first_get_on(server: Server, tmp_path: Path) -> None:
    """As the processes of a machine do under torchrun: one downloads, and the other then finds the file."""
    (tmp_path / "voc.tar.part").write_bytes(CONTENT[:5000])
    told: list[int] = []

    def first_finishes(done: int) -> None:
        told.append(done)
        (tmp_path / "voc.tar").write_bytes(CONTENT)
        lock.release()

    lock = filelock.FileLock(tmp_path / "voc.tar.part.lock")
    lock.acquire()
    path = get(server, tmp_path, progress=first_finishes)

    assert (path.read_bytes(), told, server.asked) == (CONTENT, [5000], [])


@pytest.mark.slow
def test_killed_in_the_middle(server: Server, tmp_path: Path) -> None:
    server.pause = 0.05
    archive = archive_of(server.url)
    imports = "from pathlib import Path; from freezeplan.voc_vgg16.download import Archive, download"
    code = f"{imports}; download({archive!r}, Path({str(tmp_path)!r}))"
    part = tmp_path / "voc.tar.part"
    for so_far in (100_000, 500_000):
        process = subprocess.Popen([sys.executable, "-c", code])
        while not part.exists() or part.stat().st_size < so_far:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "voc.tar").exists()

    assert get(server, tmp_path).read_bytes() == CONTENT
    assert int(server.asked[-1]["Range"][6:-1]) >= 500_000
    assert names(tmp_path) == ["voc.tar"]


def packed(folder: Path, path: Path) -> bytes:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "VOCdevkit")
    return path.read_bytes()


@pytest.mark.slow
def test_a_run_downloads_and_trains(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = packed(write_sample(tmp_path / "sample", train=20, val=20), tmp_path / "sample.tar")
    monkeypatch.setattr(command, "VOC2012", archive_of(server.url, server.content))
    quick: dict[str, Any] = {"model": "test_resnet", "weights": "random", "image_size": 16, "epochs": 1}
    more: dict[str, Any] = {"threads": 1, "workers": 1, "arm": ["frozen_convs"]}

    out = voc_vgg16(download=True, data=tmp_path / "data", out=tmp_path / "out", **quick, **more)

    found = json.loads((out / "results.json").read_text())
    assert (found["data"]["name"], found["data"]["sample"]) == ("voc.tar", False)
    assert names(tmp_path / "data") == ["voc.tar"]
    assert capsys.readouterr().err.splitlines()[0] == f"downloading voc.tar, {len(server.content):,} bytes ..."

    (tmp_path / "data" / "voc.tar").unlink()
    monkeypatch.setattr(command, "VOC2012", replace(command.VOC2012, classes=tuple(found["data"]["classes"])))
    voc_vgg16(download=True, data=tmp_path / "data", out=tmp_path / "out", resume=True, **quick, **more)
    assert capsys.readouterr().out.replace("\n", "") == f"{out}: finished already"
    assert names(tmp_path / "data") == []  # a finished run is known without its archive


def test_another_number_of_images_than_the_official(tmp_path: Path) -> None:
    data = read_voc(write_sample(tmp_path, train=20, val=20))
    check_counts(data, archive_of("", images=(20, 20)))
    with pytest.raises(DataError) as caught:
        check_counts(data, VOC2012)

    assert str(caught.value) == (f"{data.files.path}: 20 training and 20 validation images, expected 5,717 and 5,823")


def test_a_mirror_without_a_download(tmp_path: Path) -> None:
    with pytest.raises(FreezePlanError) as caught:
        voc_vgg16(url="http://localhost/", out=tmp_path)

    assert str(caught.value) == (
        "--url is a mirror for --download, which is not given\n  freezeplan run voc_vgg16 --download --url URL"
    )


def test_where_the_archive_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")

    assert (default_folder(), VOC2012.name) == (Path("/cache/freezeplan/data"), "VOCtrainval_11-May-2012.tar")
