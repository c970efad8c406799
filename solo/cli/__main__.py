"""`python -m solo.cli`, where the command is not on the path."""

from solo.cli.app import main

main()
