"""`python -m transformers_emo` is the command `emo`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
