"""`python -m nudging_hf` is `nudging-hf`."""

import sys

from .cli import main

sys.exit(main())
