"""The command line, as `python -m hf_aselect`."""

import sys

from .cli import main

sys.exit(main())
