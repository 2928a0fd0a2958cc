"""The checkout's `benchmarks` can be imported; it comes last, so that `torchintro` stays the installed one."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
