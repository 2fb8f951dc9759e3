"""`python -m dino_search`, the same as `dino-search`."""

from dino_search.cli import main

main()
