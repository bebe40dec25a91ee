"""``python -m rl_ebm`` is ``rl-ebm``."""

import sys

from rl_ebm.cli import main

sys.exit(main())
