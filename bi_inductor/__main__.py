"""``python -m bi_inductor``."""

import sys

from bi_inductor.cli import main

sys.exit(main())
