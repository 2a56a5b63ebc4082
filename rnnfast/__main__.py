"""`python -m rnnfast` is the command `rnnfast`."""

from rnnfast.cli import main

raise SystemExit(main())
