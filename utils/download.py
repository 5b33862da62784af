"""Fetch files over HTTP on lines that break: resume, retry, check, and only then give the file its name.

While `NAME` is fetched, its bytes are in `NAME.part`, and `NAME.part.json` says which version of the file they belong to.
"""

import email.utils
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from utils.cli import UserError
from utils.logging import Progress, format_bytes, say

CHUNK_BYTES = 1 << 16
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


class PlaceFailed(Exception):
    """This place does not deliver the file; the text is its answer."""


class BadArchive(UserError):
    """A zip that is damaged, or that would write where it must not."""


class _TryAgain(Exception):
    """The place may deliver at the next try, `wait_s` seconds from now (None: the usual back-off)."""

    def __init__(self, answer, wait_s=None):
        super().__init__(answer)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Patience:
    """How long a place is given."""
    attempts: int = 4               # tries in a row that bring the file no further
    first_wait_s: float = 1.0       # before the second try; doubled for each further one
    longest_wait_s: float = 60.0    # also the longest Retry-After that is obeyed
    connect_s: float = 15.0
    stall_s: float = 60.0           # without a single byte


def is_complete(path, size=None):
    """True if `path` is there with `size` bytes (None: any). The checksum was checked before the file got its name."""
    path = Path(path)
    return path.is_file() and size in (None, path.stat().st_size)


def fetch(url, path, size=None, checksum="", patience=Patience()):
    """Download `url` to `path`, going on with what an earlier call left; returns at once if the file is complete.

    size: bytes, where known. checksum: "sha256:" (or another hashlib name) and the hex digest or its first digits.
    Proxies and certificates are those that requests takes from the environment.
    Raises PlaceFailed with the answer of the place; BlockingIOError if another process is fetching the same file.
    """
    import requests

    path = Path(path)
    if is_complete(path, size):
        return
    with _Part(path) as part, requests.Session() as session:
        if not is_complete(path, size):        # a process that held the lock before us may have finished it
            _try_until_whole(session, url, part, size, patience)
            _check(part, size, checksum)
            os.fsync(part.file.fileno())
            os.replace(part.path, path)
        part.forget()


def _try_until_whole(session, url, part, size, patience):
    """Repeat `_attempt` with back-off until the part is whole."""
    failures, furthest = 0, 0
    while True:
        try:
            return _attempt(session, url, part, size, patience)
        except _TryAgain as answer:
            failures = 1 if part.size > furthest else failures + 1
            furthest = max(furthest, part.size)
            if failures >= patience.attempts:
                raise PlaceFailed(f"{answer}; given up after {failures} tries without progress") from answer
            wait_s = answer.wait_s
            if wait_s is None:
                wait_s = min(patience.first_wait_s * 2 ** (failures - 1), patience.longest_wait_s)
            say(f"  {answer}; next try in {wait_s:.3g} s")
            time.sleep(wait_s)


def _attempt(session, url, part, size, patience):
    """One request; returns when the part holds the whole file, raises _TryAgain or PlaceFailed when it does not."""
    import requests
    import urllib3

    # Stored bytes as they are: with a compressed transfer neither lengths nor ranges would count bytes of the file.
    headers = {"Accept-Encoding": "identity", **part.range_headers(url)}
    try:
        with session.get(url, headers=headers, stream=True, timeout=(patience.connect_s, patience.stall_s)) as response:
            total = _open_answer(response, url, part, size, patience)
            if part.size != total:
                _receive(response, part, total)
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise _TryAgain(f"no answer for {patience.stall_s:.3g} s, {format_bytes(part.size)} are here") from error
    except requests.exceptions.SSLError as error:
        raise PlaceFailed(f"secure connection refused ({_reason(error)})") from error
    except requests.exceptions.ConnectionError as error:
        raise _TryAgain(f"no connection ({_reason(error)})") from error
    except urllib3.exceptions.HTTPError as error:
        raise _TryAgain(f"connection cut, {format_bytes(part.size)} are here") from error
    except requests.exceptions.RequestException as error:
        raise PlaceFailed(f"request impossible ({_reason(error)})") from error
    if total is not None and part.size != total:
        raise _TryAgain(f"connection closed after {part.size} of {total} bytes")


def _open_answer(response, url, part, size, patience):
    """Judge status and headers, and bring the part to where the body goes on. Returns the file's bytes, or None if unsaid."""
    status = response.status_code
    if status == 206:
        total = _continue_at(response, part)
    elif status == 416:
        return _past_the_end(response, part)
    elif status == 200:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise PlaceFailed("200, but with a web page instead of the file")
        total = _integer(response.headers.get("Content-Length"))
        part.start_over(url, response.headers, total)
    elif status in TRANSIENT_STATUS:
        raise _TryAgain(f"{status} {response.reason}", _retry_after(response, patience))
    else:
        raise PlaceFailed(f"{status} {response.reason}")
    if None not in (size, total) and size != total:
        raise PlaceFailed(f"offers {total} bytes, but the file has {size}")
    _check_room(part.path.parent, (total or 0) - part.size)
    return total


def _continue_at(response, part):
    """Total bytes by a 206 answer; a part that does not fit to it is dropped (some servers ignore If-Range)."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    etag = response.headers.get("ETag")
    changed = etag and part.version.get("etag") and etag != part.version["etag"]
    if match is None or int(match[1]) != part.size or changed:
        part.drop()
        raise _TryAgain("the file changed since its first part was fetched, starting over", wait_s=0)
    return _integer(match[2])


def _past_the_end(response, part):
    """A 416 answer: either all bytes are here already, or the part is not of this file."""
    total = _integer(response.headers.get("Content-Range", "").removeprefix("bytes */"))
    if total != part.size or part.version.get("total") not in (None, total):
        announced, here = part.version.get("total"), part.size
        part.drop()
        raise _TryAgain(f"416: {announced} bytes were announced, {here} are here, now it has {total}; starting over")
    return total


def _receive(response, part, total):
    if part.size:
        say(f"  going on after {format_bytes(part.size)}")
    name = part.path.name.removesuffix(".part")
    with Progress(total, name, unit="B", initial=part.size) as progress:
        for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
            part.append(chunk)
            progress.update(len(chunk))


def _check(part, size, checksum):
    """Raise PlaceFailed, and drop the part, if it is not the file that was wanted."""
    if size not in (None, part.size):
        found = part.size
        part.drop()
        raise PlaceFailed(f"delivered {found} bytes, but the file has {size}")
    if checksum:
        algorithm, _, wanted = checksum.partition(":")
        with open(part.path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(wanted):
            part.drop()
            raise PlaceFailed(f"delivered a file with {algorithm} {found}, but it should be {wanted}")


class _Part:
    """`NAME.part` with a lock on it, and what `NAME.part.json` says of the version that its bytes belong to."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")

    def __enter__(self):
        self.file = open(self.path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise BlockingIOError(f"{self.path} is being fetched by another process; wait for it or end it") from error
        self.version = self._read_note()
        return self

    def __exit__(self, *exception):
        if self.size == 0:
            self.forget()
        self.file.close()

    def _read_note(self):
        try:
            return json.loads(self.note.read_text())
        except (FileNotFoundError, ValueError):    # none yet, or cut short while it was written
            return {}

    @property
    def size(self):
        return os.fstat(self.file.fileno()).st_size

    def range_headers(self, url):
        """Headers that ask for the rest if the file is still the same version, and for all of it if not.

        A strong ETag names the version on every mirror; a date does so only where it was given.
        """
        etag, modified = self.version.get("etag"), self.version.get("modified")
        validator = etag or (modified if self.version.get("url") == url else None)
        return {"Range": f"bytes={self.size}-", "If-Range": validator} if self.size and validator else {}

    def start_over(self, url, headers, total):
        """Empty the part, then note the version that comes: killed in between, the next run starts from nothing."""
        self.drop()
        etag = headers.get("ETag", "")
        strong = etag if etag.startswith('"') else None
        self.version = {"url": url, "etag": strong, "modified": headers.get("Last-Modified"), "total": total}
        self.note.write_text(json.dumps(self.version))

    def append(self, chunk):
        self.file.write(chunk)
        self.file.flush()

    def drop(self):
        self.file.truncate(0)

    def forget(self):
        """Remove what is left beside the complete file."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _integer(text):
    return int(text) if text and text.isdecimal() else None


def _retry_after(response, patience):
    """Seconds that the place asks to wait (a number or a date), or None."""
    text = response.headers.get("Retry-After", "")
    wait_s = _integer(text)
    if wait_s is None and text:
        try:
            wait_s = (email.utils.parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):      # not a date either, or one without a zone
            return None
    if wait_s is not None and wait_s > patience.longest_wait_s:
        raise PlaceFailed(f"{response.status_code} {response.reason}, asks to wait {wait_s:.0f} s")
    return None if wait_s is None else max(0.0, wait_s)


def _reason(error):
    """The innermost cause of a requests error in a few words: its own text is a page of nested objects."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(inner, BaseException):
            return str(error).rpartition(": ")[2]
        error = inner


def _check_room(folder, num_bytes):
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(f"{folder} has {format_bytes(free)} free, {format_bytes(num_bytes)} are needed; make room or choose another --dest")


def unzip(archive, folder):
    """Extract `archive` below `folder`, then put the short note `NAME.unzipped` in its place.

    An archive a.zip that holds everything in a folder of its own, a/, is extracted without that folder.
    Raises BadArchive if the zip is damaged, and before anything is written if a member is a link or would leave `folder`.
    """
    archive, folder = Path(archive), Path(folder).resolve()
    try:
        with zipfile.ZipFile(archive) as file:
            targets = _targets(file, archive, folder)
            _check_room(archive.parent, sum(member.file_size for member in targets))
            with Progress(sum(member.file_size for member in targets), f"unzip {archive.name}", unit="B") as progress:
                for member, target in targets.items():
                    _extract(file, member, target, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadArchive(f"{archive} is damaged ({error}); delete it and download it again") from error
    sizes = {str(target.relative_to(folder)): member.file_size for member, target in targets.items()}
    _unzipped_note(archive).write_text(json.dumps(sizes, indent=0))
    archive.unlink()


def is_unzipped(archive, folder):
    """True if `unzip` did its work before and every file is there still."""
    note = _unzipped_note(Path(archive))
    if not note.is_file():
        return False
    return all(is_complete(Path(folder) / name, size) for name, size in json.loads(note.read_text()).items())


def _unzipped_note(archive):
    return archive.with_name(archive.name + ".unzipped")


def _targets(file, archive, folder):
    """{member: where it goes}, for the files of the archive."""
    members = [member for member in file.infolist() if not member.is_dir()]
    own_folder = archive.stem + "/"
    inside = all(member.filename.startswith(own_folder) for member in members)
    targets = {}
    for member in members:
        target = (folder / member.filename[len(own_folder) if inside else 0:]).resolve()
        if stat.S_ISLNK(member.external_attr >> 16) or folder not in target.parents:
            raise BadArchive(f"{archive}: member {member.filename!r} is a link or leaves {folder}; nothing was extracted")
        targets[member] = target
    return targets


def _extract(file, member, target, progress):
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open(member) as source, open(target, "wb") as output:
        while chunk := source.read(CHUNK_BYTES):
            output.write(chunk)
            progress.update(len(chunk))
