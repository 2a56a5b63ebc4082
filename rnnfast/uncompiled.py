"""Functions that torch.compile must not trace.

`torch.compiler.disable` imports all of torch._dynamo. So this module is imported only where Dynamo
already runs.
"""

from __future__ import annotations

import torch
from torch import _VF

lstm = torch.compiler.disable(
    lambda *arguments: _VF.lstm(*arguments),
    reason="torch 2.13 cannot differentiate its oneDNN LSTM in a compiled graph",
)
