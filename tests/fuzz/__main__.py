"""``python tests/fuzz``: see run.py."""

import faulthandler
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of small calls must not spin
sys.path[0] = str(Path(__file__).parent.parent)  # as pytest has it: no file hides a library's

from fuzz.run import main  # noqa: E402

faulthandler.enable()
sys.exit(main())
