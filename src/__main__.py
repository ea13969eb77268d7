"""`python -m sotto`, or `python -m src` in a checkout."""

from .cli import main

if __name__ == "__main__":
    main()
