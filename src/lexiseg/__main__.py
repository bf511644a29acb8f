"""`python -m lexiseg` is the `lexiseg` command."""

from lexiseg.cli import main

main()
