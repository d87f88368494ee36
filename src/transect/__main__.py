"""`python -m transect` is the command line."""

from transect.cli import main

main()
