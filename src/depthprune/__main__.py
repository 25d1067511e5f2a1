"""``python -m depthprune``."""

from depthprune.cli import main

if __name__ == "__main__":
    main()
