"""`python -m glmx` is the `glmx` command."""

import sys

from glmx.cli.main import main

sys.exit(main())
