"""The size of the house: lines of Python in each room, and of the longest file. `python3 tests/test_house.py` prints them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The most lines that each room may have ("." is the scripts at the top); after "to": what the plan of the house gives it.
MOST_LINES = {
    "models": 993,
    "dataset": 1318,  # to 1,300
    "fid": 997,
    "sampling": 586,  # to 520
    "training": 1108,  # to 1,000
    "utils": 1302,
    ".": 445,
    "scripts": 248,
    "benchmarks": 1113,
    "benchmarks/gpu_check": 506,
    "benchmarks/launches.py": 169,
}
MOST_LINES_IN_ALL = 7000  # without benchmarks, experiments and tests
LONGEST_FILE = 350
LONGEST_LINE = 140


def files_of(room):
    """Paths of the Python files of a room, a folder or a file, without those of rooms in it."""
    apart = [ROOT / other for other in MOST_LINES if other.startswith(f"{room}/")]
    paths = (ROOT / room).glob("*.py" if room == "." else "**/*.py") if (ROOT / room).is_dir() else [ROOT / room]
    return sorted(path for path in paths if not any(path.is_relative_to(other) for other in apart))


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def size_of(room):
    return sum(len(lines_of(path)) for path in files_of(room))


def size_in_all():
    return sum(size_of(room) for room in MOST_LINES if not room.startswith("benchmarks"))


@pytest.mark.parametrize("room", MOST_LINES)
def test_rooms_stay_small(room):
    assert size_of(room) <= MOST_LINES[room]


def test_the_house_stays_small():
    assert size_in_all() <= MOST_LINES_IN_ALL


def test_no_file_and_no_line_is_too_long():
    files = [path for room in MOST_LINES for path in files_of(room)]
    assert [f"{path}: {len(lines_of(path))}" for path in files if len(lines_of(path)) > LONGEST_FILE] == []
    assert [f"{path}:{number}" for path in files for number, line in enumerate(lines_of(path), 1) if len(line) > LONGEST_LINE] == []


if __name__ == "__main__":
    for name, most in MOST_LINES.items():
        longest = max(files_of(name), key=lambda path: len(lines_of(path)))
        print(f"{name:24}{size_of(name):6} of {most:5}   longest: {longest.relative_to(ROOT)} ({len(lines_of(longest))})")
    print(f"{'in all':24}{size_in_all():6} of {MOST_LINES_IN_ALL:5}   without benchmarks, experiments and tests")
