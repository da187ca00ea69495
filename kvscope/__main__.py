"""``python -m kvscope``, and the start of the command ``kvscope``."""

import sys


def main() -> None:
    """Run the command line of this process and exit.

    The command line is imported here, so that an interruption during the import ends as any other one does.
    """
    try:
        from kvscope.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
