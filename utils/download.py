"""Fetch files over HTTP on lines that break: resume, retry, check, and only then give the file its name.

While NAME is fetched, its bytes are in NAME.part, and NAME.part.json says which version of the file they belong to.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import requests
import urllib3

from utils.cli import UserError
from utils.files import file_sha256, flush_to_disk, told
from utils.logging import Progress, say

ATTEMPTS = 4          # tries in a row that bring no new bytes; between them the wait doubles
FIRST_WAIT_S = 1.0
TIMEOUT_S = (15, 60)  # to connect; without a single byte
BUSY = (408, 425, 429, 500, 502, 503, 504)
CHUNK_BYTES = 1 << 16


class PlaceFailed(Exception):
    """This place does not deliver the file; the text is its answer."""


def fetch(url, path, checksum=""):
    """Download `url` to `path` and extract it if it is a .zip; goes on with what an earlier call left, and does nothing if it is here.

    checksum: the file's sha256 in hex digits, or the first of them, where known. It is checked before the file gets its name.
    Raises PlaceFailed with the answer of the place; UserError if the disk is full or another process fetches the same file.
    """
    if is_here(path):
        return
    if not path.is_file():
        _download(url, path, checksum)
    if path.suffix == ".zip":
        unzip(path)


def is_here(path):
    """True if the file is there or, of a .zip, all that was in it."""
    note = Path(f"{path}.unzipped")
    if path.suffix != ".zip":
        return path.is_file()
    return note.is_file() and all((path.parent / name).is_file() for name in json.loads(note.read_text()))


def _download(url, path, checksum):
    say(f"{url} -> {path}")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_Part(path)) as part:
            _receive_whole(url, part)
            digest = file_sha256(part.path) if checksum else ""
            if not digest.startswith(checksum):
                part.start_over()
                raise PlaceFailed(f"delivered a file with sha256 {digest}, but it should be {checksum}")
            flush_to_disk(part.path)
            os.replace(part.path, path)


def _receive_whole(url, part):
    """Ask for the rest until the part is whole; gives up after ATTEMPTS requests in a row that brought nothing new."""
    failures = furthest = 0
    while part.size == 0 or part.size != part.total:
        try:
            return _receive(url, part)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            failures = 1 if part.size > furthest else failures + 1
            furthest = max(furthest, part.size)
            if failures == ATTEMPTS:
                raise PlaceFailed(f"{_reason(error)}; given up after {failures} tries without progress") from error
            say(f"  {_reason(error)}; {_size(part.size)} are here, trying again")
            time.sleep(FIRST_WAIT_S * 2 ** (failures - 1))


def _receive(url, part):
    """One request, for what is missing if the file is still the same version, else for all of it.

    Raises PlaceFailed, or an error of requests or urllib3 if the next request may bring the rest.
    """
    headers = {"Accept-Encoding": "identity"}  # ranges of a compressed transfer would not count bytes of the file
    if part.size and part.etag:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.etag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        _judge(response, part)
        room, missing = shutil.disk_usage(part.path.parent).free, (part.total or 0) - part.size
        if room < missing:
            raise UserError(f"{part.path.parent} has {_size(room)} free, {_size(missing)} are needed; make room or choose another --dest")
        with Progress(part.total, part.path.stem, unit="B", initial=part.size) as progress:
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                part.append(chunk)
                progress.update(len(chunk))
    if part.total not in (None, part.size):
        raise requests.ConnectionError(f"connection closed before byte {part.total}")


def _judge(response, part):
    """Look at status and headers, and bring the part to where the body goes on."""
    headers, etag = response.headers, response.headers.get("ETag", "")
    if response.status_code == 200:
        if "text/html" in headers.get("Content-Type", ""):
            raise PlaceFailed("200, but with a web page instead of the file")
        length = headers.get("Content-Length")
        part.start_over(etag if etag.startswith('"') else None, int(length) if length else None)  # a weak ETag promises no bytes
    elif response.status_code in BUSY:
        raise requests.RequestException(f"{response.status_code} {response.reason}")
    elif response.status_code not in (206, 416):
        raise PlaceFailed(f"{response.status_code} {response.reason}")
    elif not headers.get("Content-Range", "").startswith(f"bytes {part.size}-") or etag not in ("", part.etag):
        part.start_over()
        raise requests.RequestException("the file changed since its first part was fetched")


def _reason(error):
    """The innermost cause of an error, whose own text may be a page of nested objects."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args or [None])[0], BaseException):
        error = inner
    return str(inner or error).rpartition(": ")[2]


class _Part:
    """NAME.part, locked against other processes. etag, total: version and length of the file, None where the place does not say."""

    def __init__(self, path):
        self.path, self.note = (path.with_name(path.name + ending) for ending in (".part", ".part.json"))
        self.file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being fetched by another process; wait for it or end it") from error
        try:
            self.etag, self.total = json.loads(self.note.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or cut short while it was written
            self.etag = self.total = None

    @property
    def size(self):
        return os.fstat(self.file.fileno()).st_size

    def append(self, chunk):
        self.file.write(chunk)

    def start_over(self, etag=None, total=None):
        """Empty the part before the note changes: killed in between, the next run starts from nothing."""
        self.file.truncate(0)
        self.etag, self.total = etag, total
        self.note.write_text(json.dumps([etag, total]))

    def close(self):
        if self.size == 0:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():  # it holds nothing, or the file has its name now
            self.note.unlink(missing_ok=True)
        self.file.close()


def _size(num_bytes):
    return Progress.format_sizeof(num_bytes, "B", 1024)


def unzip(archive):
    """Extract `archive` beside itself, then put a list of its files, NAME.unzipped, in its place. Raises PlaceFailed if it is damaged.

    If all files of a.zip are in a folder a/, they are extracted without it. zipfile writes plain files, never outside the folder.
    """
    folder = archive.parent
    say(f"unzipping {archive}")
    try:
        with told(folder), zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            if all(member.filename.startswith(f"{archive.stem}/") for member in members):
                for member in members:
                    member.filename = member.filename.removeprefix(f"{archive.stem}/")
            names = [os.path.relpath(file.extract(member, folder), folder) for member in members]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PlaceFailed(f"{archive} is damaged ({error}); delete it and download it again") from error
    Path(f"{archive}.unzipped").write_text(json.dumps(names))
    archive.unlink()
