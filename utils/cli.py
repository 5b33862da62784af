"""How every script starts and ends: settings apart from options, mistakes of the user in one line, bugs with their traceback."""

import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
EXIT_USER_ERROR = 2
EXIT_OTHER_FAILED = 1
EXIT_BAD = 3  # finished, but the result is bad: most steps failed, or images had NaN
WAIT_FOR_FIRST_S = 5.0
EXIT_STOPPED = 75  # the run was asked to stop, saved, and can go on: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_NOTICE_S = 3.0  # Ctrl-C reaches a worker from the terminal and from its launcher: within this time it is one signal


class UserError(ValueError):
    """A mistake that the user can mend. The text says which key or file, what it was, what is wanted and what to do."""


def parse_with_overrides(parser, argv=None):
    """(args, overrides) of a command line in which overrides of the config, such as train.lr=1e-4, may stand anywhere.

    They are taken out first: argparse would read one after `--class_idx 3` as another class. What argparse does not know
    is left among the overrides, where `load_config` refuses it.
    """
    argv = sys.argv[1:] if argv is None else argv
    overrides = [text for text in argv if re.match(r"\w+(\.\w+)+=", text)]
    args, unknown = parser.parse_known_args([text for text in argv if text not in overrides])
    return args, overrides + unknown


def run(main):
    """Call `main()` and exit with its return value (None means 0).

    A UserError is one line on stderr and exit code 2. Every other exception is a bug and shows its traceback. A process that ends
    because another one failed says which. MASKDIT_DEBUG=1 shows all tracebacks.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        code = _report(error)
    if "RANK" in os.environ:  # PyTorch's threads sometimes abort while Python shuts down, and the exit code would be lost
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _report(error):
    """Print what `error` means for the user, and note it for the other processes; returns the exit code."""
    distributed = sys.modules.get("utils.distributed")
    connected = distributed is not None and distributed.world_size() > 1
    if connected and (lost := distributed.explain_loss(error)):
        print(f"rank {distributed.rank()} {lost}", file=sys.stderr, flush=True)
        return EXIT_OTHER_FAILED
    if connected:
        speaks = distributed.note_failure(f"{type(error).__name__}: {error}")  # what all processes find is told once
    else:
        speaks = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0  # all find the same
    if not isinstance(error, UserError) or os.environ.get("MASKDIT_DEBUG"):
        traceback.print_exception(error)
        return EXIT_OTHER_FAILED
    if speaks:
        where = f" on rank {distributed.rank()}" if connected else ""
        print(f"error{where}: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    elif not connected:
        time.sleep(WAIT_FOR_FIRST_S)  # the launcher ends all processes when the first one ends, which must be the one that speaks
    return EXIT_USER_ERROR


def str_to_bool(text):
    """argparse type for flags that take True or False, as in `--use_ckpt_path False`."""
    return bool(("false", "true").index(text.lower()))


class StopNotice:
    """A context in which the first SIGTERM, SIGINT or SIGUSR1 sets `requested`, and a second one ends the process at once.

    After a stop that was asked for, signals are ignored: a launcher may send some more while it tidies up, and they must not
    change the exit code.
    """

    def __init__(self):
        self.requested = False
        self.first_at = 0.0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested and error is None else handler)

    def _receive(self, number, frame):
        now = time.monotonic()
        if not self.requested:
            self.requested, self.first_at = True, now
        elif "RANK" not in os.environ or now - self.first_at > SAME_NOTICE_S:
            os._exit(128 + number)
