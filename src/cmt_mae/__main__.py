"""python -m cmt_mae"""

import sys

from cmt_mae.cli import main

sys.exit(main())
