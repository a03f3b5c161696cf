"""`python -m fastae` is the command `fastae`."""

from fastae.cli import main

main()
