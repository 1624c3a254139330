"""``python -m llavactl``."""

from llavactl.cli import main

if __name__ == "__main__":
    main()
