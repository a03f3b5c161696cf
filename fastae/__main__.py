"""`python -m fastae` is the command `fastae`."""

from fastae.cli.main import main

main()
