"""`python -m eora_lab.cli`."""

import sys

from eora_lab.cli import main

sys.exit(main())
