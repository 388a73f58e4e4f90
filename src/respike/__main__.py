"""``python -m respike``."""

from respike.cli import main

main()
