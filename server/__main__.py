"""``python -m server`` is the command ``gale``."""

if __name__ == "__main__":
    import sys

    from server.cli import main

    sys.exit(main())
