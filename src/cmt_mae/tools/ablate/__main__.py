"""``python -m cmt_mae.tools.ablate OUT NAME``: one run of the plan in OUT; `cmt-mae ablate` starts these."""

import sys
from pathlib import Path

from cmt_mae.tools.ablate.one import main

sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
