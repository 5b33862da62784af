"""Downloads against a local HTTP server that misbehaves in every way that has been met."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import download_assets
from download_assets import Asset
from utils import download
from utils.cli import UserError
from utils.download import PlaceFailed, fetch, is_here, unzip

BODY = os.urandom(300_000)          # more than four chunks, not a multiple of one
DIGEST = hashlib.sha256(BODY).hexdigest()
PROJECT = Path(download_assets.__file__).parent


class Site:
    """A server on 127.0.0.1; each path has a list of answers, of which the last is repeated for ever."""

    def __init__(self):
        self.answers, self.requests, self.closing = {}, [], threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append((self.path, dict(self.headers)))
                answers = site.answers.get(self.path, [status(404)])
                (answers.pop(0) if len(answers) > 1 else answers[0])(self, site)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def serve(self, name, *answers):
        """Returns the address under which the file is then asked for."""
        self.answers["/" + name] = list(answers)
        return self.url + name

    def ranges(self):
        """The Range header of each request so far."""
        return [headers.get("Range") for _, headers in self.requests]

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(download, "TIMEOUT_S", (2.0, 0.3))


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def status(code, **headers):
    def answer(handler, site):
        handler.send_response(code)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(b"an explanation that is no part of any file")
    return answer


def send_piece(handler, site):
    """Answer 206 with 1000 bytes of the rest that was asked for."""
    first = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{first + 999}/{len(BODY)}")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(BODY[first:first + 1000])


def send_until_close(body):
    """Answer 200 without saying how long the file is."""
    def answer(handler, site):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def send(body=BODY, etag='"v1"', modified=None, cut=None, stall=None, length=None, honest_range=True, if_range=True):
    """Answer 200, 206 or 416 as a good server would, but for what the arguments spoil.

    cut: close after so many bytes; stall: fall silent after so many; length: what to say instead of the body's length;
    honest_range False: ignore Range; if_range False: ignore If-Range.
    """
    def answer(handler, site):
        start = 0
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        if wanted and honest_range and (not if_range or condition in (etag, modified)):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(body) and start:
            return status(416, Content_Range=f"bytes */{len(body)}")(handler, site)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str((len(body) if length is None else length) - start))
        for key, value in (("ETag", etag), ("Last-Modified", modified),
                           ("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None)):
            if value:
                handler.send_header(key, value)
        handler.end_headers()
        rest = body[start:]
        handler.wfile.write(rest[:min(x for x in (cut, stall, len(rest)) if x is not None)])
        handler.wfile.flush()
        if stall is not None:
            site.closing.wait(5)
    return answer


def test_plain_download_leaves_only_the_file(site, tmp_path):
    fetch(site.serve("f", send()), tmp_path / "sub" / "f", DIGEST)
    assert (tmp_path / "sub" / "f").read_bytes() == BODY
    assert os.listdir(tmp_path / "sub") == ["f"]


@pytest.mark.parametrize("spoiled", [{"cut": 100_000}, {"stall": 100_000}], ids=["cut", "stall"])
def test_broken_transfer_goes_on_where_it_stopped(site, tmp_path, spoiled):
    fetch(site.serve("f", send(**spoiled), send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    first, second = site.ranges()
    assert first is None and site.requests[1][1]["If-Range"] == '"v1"'
    # What the last chunk held when the line broke may be lost, no more.
    assert 100_000 - download.CHUNK_BYTES <= int(second.removeprefix("bytes=").rstrip("-")) <= 100_000


def test_ten_cuts_are_survived_while_each_try_brings_bytes(site, tmp_path):
    fetch(site.serve("f", *[send(cut=70_000)] * 10, send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert len(site.requests) == 5          # 300,000 bytes, 70,000 at a time


def test_server_that_ignores_range_is_read_from_the_start(site, tmp_path):
    fetch(site.serve("f", send(cut=100_000), send(honest_range=False)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges()[1] is not None


@pytest.mark.parametrize("if_range", [True, False], ids=["If-Range honoured", "If-Range ignored"])
def test_file_that_changed_between_tries_is_not_patched_together(site, tmp_path, if_range):
    changed = bytes(reversed(BODY))
    fetch(site.serve("f", send(cut=100_000), send(body=changed, etag='"v2"', if_range=if_range)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == changed


def test_file_that_changes_at_every_try_ends(site, tmp_path):
    answers = [send(cut=100_000, etag=f'"{number}"') for number in range(20)]
    with pytest.raises(PlaceFailed, match="without progress"):
        fetch(site.serve("f", *answers), tmp_path / "f")


@pytest.mark.parametrize("etag", ['W/"v1"', None])
def test_part_without_a_strong_version_is_fetched_again(site, tmp_path, etag):
    fetch(site.serve("f", send(cut=100_000, etag=etag), send(etag=etag)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges() == [None, None]


def test_part_without_a_version_is_not_trusted(site, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 100_000)
    fetch(site.serve("f", send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges() == [None]


def test_whole_part_of_a_killed_run_is_checked_and_renamed(site, tmp_path):
    for checksum, requests in (("6726825d", 0), (DIGEST, 0)):
        (tmp_path / "f.part").write_bytes(BODY)
        (tmp_path / "f.part.json").write_text(json.dumps(['"v1"', len(BODY)]))
        if checksum != DIGEST:
            with pytest.raises(PlaceFailed, match="sha256"):
                fetch(site.serve("f", send()), tmp_path / "f", checksum)
            assert os.listdir(tmp_path) == []
    fetch(site.serve("f", send()), tmp_path / "f", DIGEST)
    assert (tmp_path / "f").read_bytes() == BODY and os.listdir(tmp_path) == ["f"]
    assert site.requests == []


def test_part_longer_than_the_file_starts_over(site, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY + b"x")
    (tmp_path / "f.part.json").write_text(json.dumps(['"v1"', None]))
    fetch(site.serve("f", send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges() == [f"bytes={len(BODY) + 1}-", None]          # answered 416


def test_killed_process_is_continued_by_the_next(site, tmp_path):
    url = site.serve("f", send(stall=200_000), send())
    code = f"from pathlib import Path; from utils.download import fetch; fetch({url!r}, Path({str(tmp_path / 'f')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.DEVNULL)
    part = tmp_path / "f.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size >= 100_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    fetch(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges() == [None, f"bytes={kept}-"]


def test_bytes_are_on_disk_before_the_file_gets_its_name(site, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(download, "flush_to_disk", lambda path: flushed.append((path.name, path.stat().st_size)))
    fetch(site.serve("f", send()), tmp_path / "f")
    assert flushed == [("f.part", len(BODY))]


def test_finished_file_is_not_asked_for_again(site, tmp_path):
    (tmp_path / "f").write_bytes(BODY)
    fetch(site.serve("f", send()), tmp_path / "f")
    assert site.requests == []


def test_length_that_is_never_reached_ends_without_a_file(site, tmp_path):
    with pytest.raises(PlaceFailed, match="without progress"):
        fetch(site.serve("f", send(length=len(BODY) + 1000)), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_piece_is_not_taken_for_the_rest(site, tmp_path):
    fetch(site.serve("f", send(cut=100_000), send_piece, send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_file_of_unsaid_length_ends_where_the_connection_does(site, tmp_path):
    fetch(site.serve("f", send_until_close(BODY)), tmp_path / "f", DIGEST)
    assert (tmp_path / "f").read_bytes() == BODY
    with pytest.raises(PlaceFailed, match="sha256"):
        fetch(site.serve("g", send_until_close(BODY[:1000])), tmp_path / "g", DIGEST)
    assert os.listdir(tmp_path) == ["f"]


def test_wrong_checksum_is_refused_and_forgotten(site, tmp_path):
    with pytest.raises(PlaceFailed, match="sha256"):
        fetch(site.serve("f", send()), tmp_path / "f", checksum="6726825d")
    assert os.listdir(tmp_path) == []


def test_checksum_may_be_given_by_its_first_digits(site, tmp_path):
    fetch(site.serve("f", send()), tmp_path / "f", checksum=DIGEST[:8])
    assert (tmp_path / "f").is_file()


@pytest.mark.parametrize("code", [403, 404])
def test_refusal_is_not_retried_and_costs_no_part(site, tmp_path, code):
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    with pytest.raises(PlaceFailed, match=str(code)):
        fetch(site.serve("f", status(code)), tmp_path / "f")
    assert len(site.requests) == 1
    assert (tmp_path / "f.part").read_bytes() == BODY[:1000]


def test_web_page_is_not_taken_for_the_file(site, tmp_path):
    with pytest.raises(PlaceFailed, match="web page"):
        fetch(site.serve("f", status(200, Content_Type="text/html; charset=utf-8")), tmp_path / "f")


def test_busy_place_is_asked_again(site, tmp_path):
    fetch(site.serve("f", status(503), status(429), send()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_busy_place_is_given_up_after_its_attempts(site, tmp_path):
    with pytest.raises(PlaceFailed, match="503 Service Unavailable"):
        fetch(site.serve("f", status(503)), tmp_path / "f")
    assert len(site.requests) == 3


def test_an_hour_that_a_busy_place_asks_for_is_not_waited(site, tmp_path):
    started = time.monotonic()
    with pytest.raises(PlaceFailed, match="429"):
        fetch(site.serve("f", status(429, Retry_After="3600")), tmp_path / "f")
    assert time.monotonic() - started < 60


def test_waits_double_between_tries(site, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(download, "ATTEMPTS", 4)
    with pytest.raises(PlaceFailed):
        fetch(site.serve("busy", status(503)), tmp_path / "busy")
    with pytest.raises(PlaceFailed):
        fetch(site.serve("cut", send(cut=0)), tmp_path / "cut")
    assert waits == pytest.approx([0.01, 0.02, 0.04] * 2)


def test_no_connection_says_why(tmp_path):
    closed = Site()
    closed.close()
    with pytest.raises(PlaceFailed, match="refused; given up after 3 tries"):
        fetch(closed.url + "f", tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_proxy_of_the_environment_is_used(site, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("http_proxy", site.url)
    site.answers["http://weights.invalid/f"] = [send()]
    fetch("http://weights.invalid/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_two_downloads_of_one_file_do_not_mix(site, tmp_path):
    with contextlib.closing(download._Part(tmp_path / "f")):
        with pytest.raises(UserError, match="another process"):
            fetch(site.serve("f", send()), tmp_path / "f")


def test_full_disk_is_found_before_the_transfer(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0.98kB free, 293kB are needed"):
        fetch(site.serve("f", send()), tmp_path / "f")


def test_disk_that_fills_up_is_one_line_and_costs_no_part(site, tmp_path, monkeypatch):
    fetched = 100_000

    def full(part, chunk):
        if part.size >= fetched:
            raise OSError(errno.ENOSPC, "No space left on device")
        part.file.write(chunk)

    monkeypatch.setattr(download._Part, "append", full)
    with pytest.raises(UserError, match="No space left on device"):
        fetch(site.serve("f", send()), tmp_path / "f")
    assert fetched <= (tmp_path / "f.part").stat().st_size < fetched + download.CHUNK_BYTES
    monkeypatch.undo()
    fetch(site.serve("f", send()), tmp_path / "f", DIGEST)
    assert site.ranges()[1] is not None


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def test_unzip_drops_the_folder_of_the_same_name(tmp_path):
    archive = write_zip(tmp_path / "a.zip", [("a/train/data.mdb", b"12"), ("a/train/lock.mdb", b"3")])
    assert not is_here(archive)
    unzip(archive)
    assert (tmp_path / "train" / "data.mdb").read_bytes() == b"12"
    assert not archive.exists() and is_here(archive)
    (tmp_path / "train" / "lock.mdb").unlink()
    assert not is_here(archive)


def test_unzip_keeps_a_folder_that_not_all_files_share(tmp_path):
    unzip(write_zip(tmp_path / "a.zip", [("a/x", b"1"), ("y", b"2")]))
    assert (tmp_path / "a" / "x").is_file() and (tmp_path / "y").is_file()


def link():
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize("member, inside", [("../evil", "evil"), ("/tmp/evil", "tmp/evil"), ("a/../../evil", "a/evil"), (link(), "link")],
                         ids=["up", "absolute", "inside out", "link"])
def test_unzip_writes_plain_files_below_its_folder_only(tmp_path, member, inside):
    folder = tmp_path / "out"
    folder.mkdir()
    unzip(write_zip(folder / "a.zip", [("good", b"1"), (member, b"/etc/passwd")]))
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.zip.unzipped"]
    assert sorted(found) == sorted([folder / "good", folder / inside]) and not (folder / inside).is_symlink()
    assert (folder / inside).read_bytes() == b"/etc/passwd"


def test_damaged_zip_is_kept_and_named(tmp_path):
    archive = write_zip(tmp_path / "a.zip", [("x", BODY)])
    data = bytearray(archive.read_bytes())
    data[1000] ^= 255
    archive.write_bytes(data)
    with pytest.raises(PlaceFailed, match="a.zip is damaged"):
        unzip(archive)
    assert archive.exists() and not is_here(archive)


def run_main(monkeypatch, assets, *arguments):
    monkeypatch.setattr(download_assets, "ASSETS", assets)
    monkeypatch.setattr(sys, "argv", ["download_assets.py", *map(str, arguments)])
    return download_assets.main()


def test_next_place_takes_over_and_finished_files_stay(site, tmp_path, monkeypatch, capsys):
    for name, answer in {"one/a": send(), "one/b": status(403), "two/a": status(500), "two/b": send()}.items():
        site.serve(name, answer)
    places = download_assets.same_files(["a", "b"], site.url + "one/", site.url + "two/")
    assert run_main(monkeypatch, [Asset("set", "", places, folder="set")], "--name", "set", "--dest", tmp_path) == 0
    assert (tmp_path / "set" / "a").read_bytes() == (tmp_path / "set" / "b").read_bytes() == BODY
    assert f"{site.url}one/b: 403 Forbidden" in capsys.readouterr().out
    assert [path for path, _ in site.requests] == ["/one/a", "/one/b", "/two/b"]


def test_part_goes_on_at_a_mirror_with_the_same_etag(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    site.serve("one/f", send(cut=100_000), status(404))
    site.serve("two/f", send())
    places = download_assets.same_files(["f"], site.url + "one/", site.url + "two/")
    assert run_main(monkeypatch, [Asset("f", "", places)], "--name", "f", "--dest", tmp_path) == 0
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges()[2] == site.ranges()[1] != None      # both asked for the rest


def test_no_place_left_is_exit_code_1_with_every_answer_and_other_names_go_on(site, tmp_path, monkeypatch, capsys):
    site.serve("one/a", status(403))
    site.serve("c", send())
    assets = [Asset("bad", "", download_assets.same_files(["a"], site.url + "one/", site.url + "two/")),
              Asset("good", "", download_assets.same_files(["c"], site.url))]
    assert run_main(monkeypatch, assets, "--name", "all", "--dest", tmp_path) == 1
    errors = capsys.readouterr().err
    assert f"{site.url}one/a: 403 Forbidden" in errors and f"{site.url}two/a: 404 Not Found" in errors and "bad" in errors
    assert (tmp_path / "c").read_bytes() == BODY


def test_zip_and_its_unpacked_form_are_one_asset(site, tmp_path, monkeypatch):
    """The second place offers the files themselves; once they are there, the zip is not asked for again."""
    site.serve("zip/a.zip", status(403))
    site.serve("plain/train/data.mdb", send())
    places = {site.url + "zip/": {"a.zip": ""}, site.url + "plain/": {"train/data.mdb": ""}}
    for _ in range(2):
        assert run_main(monkeypatch, [Asset("a", "", places, folder="a")], "--name", "a", "--dest", tmp_path) == 0
    assert (tmp_path / "a" / "train" / "data.mdb").read_bytes() == BODY
    assert len(site.requests) == 2


def test_zip_is_fetched_unpacked_and_then_left_alone(site, tmp_path, monkeypatch):
    body = write_zip(tmp_path / "source.zip", [("train/data.mdb", BODY)]).read_bytes()
    site.serve("a.zip", send(body=body))
    places = {site.url: {"a.zip": ""}}
    for _ in range(2):
        assert run_main(monkeypatch, [Asset("a", "", places, folder="a")], "--name", "a", "--dest", tmp_path) == 0
    assert (tmp_path / "a" / "train" / "data.mdb").read_bytes() == BODY
    assert not (tmp_path / "a" / "a.zip").exists() and len(site.requests) == 1


def test_unknown_name_is_told_with_all_names(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, download_assets.ASSETS, "--name", "maskdit-finetune9", "--dest", tmp_path / "new")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "maskdit-finetune9" in said and all(asset.name in said for asset in download_assets.ASSETS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dest", ["file", "file/below", "x" * 300])
def test_dest_that_cannot_be_a_folder_is_one_line(tmp_path, monkeypatch, dest):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--dest .*(is a file|Not a directory|name too long)"):
        run_main(monkeypatch, download_assets.ASSETS, "--name", "vae", "--dest", tmp_path / dest)


def test_list_names_every_asset(monkeypatch, capsys):
    assert run_main(monkeypatch, download_assets.ASSETS, "--list") == 0
    listed = capsys.readouterr().out
    assert all(asset.name in listed and next(iter(next(iter(asset.places.values())))) in listed for asset in download_assets.ASSETS)


def test_table_is_sound():
    assert len({asset.name for asset in download_assets.ASSETS}) == len(download_assets.ASSETS)
    for asset in download_assets.ASSETS:
        for place, files in asset.places.items():
            assert place.startswith("https://") or place.startswith("http://fashion-mnist."), asset.name
            assert place.endswith("/") and files and all(set(checksum) <= set("0123456789abcdef") for checksum in files.values()), asset.name
