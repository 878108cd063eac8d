"""python -m cmt_mae"""

import sys

from cmt_mae.core.cli import main

sys.exit(main())
