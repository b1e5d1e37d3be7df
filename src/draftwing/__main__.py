"""`draftwing` and `python -m draftwing`."""

import signal
import sys


def run() -> int:
    """Run the command line; Ctrl-C ends it in one line, also while modules are being imported."""
    try:
        from draftwing.cli import main

        return main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more, while Python ends: no traceback


if __name__ == "__main__":
    sys.exit(run())
