"""``python -m freezeplan``: the same as the command ``freezeplan``."""

from freezeplan.cli import main

if __name__ == "__main__":
    main()
