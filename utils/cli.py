"""How every script ends: what a user can cause is one line, what only a bug can cause is a traceback."""

import os
import sys
import traceback
from pathlib import Path

EXIT_USER_ERROR = 2
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def run(main):
    """Call `main()` and exit with its return value (None means 0).

    ValueError and OSError raised by this project's own code are messages for the user: one line on stderr, exit code 2.
    The same classes raised inside a library, and every other class, are bugs and keep their traceback.
    MASKDIT_DEBUG=1 shows the traceback of user errors too.
    """
    try:
        code = main()
    except (ValueError, OSError) as error:
        if not _raised_here(error) or os.environ.get("MASKDIT_DEBUG"):
            raise
        _report(error)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _raised_here(error):
    """True if the innermost Python frame is a file of this project (a library's frame means a bug)."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename).resolve()
    return path.is_relative_to(PROJECT_ROOT) and "site-packages" not in path.parts


def _report(error):
    """Print the error once: rank 0 speaks for all before the process group exists, every rank for itself after."""
    distributed = sys.modules.get("utils.distributed")
    rank = int(os.environ.get("RANK", 0))
    if distributed is not None and distributed.world_size() > 1:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)


def str_to_bool(text):
    """argparse type for flags that take a word, as in `--use_ckpt_path False`."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]
