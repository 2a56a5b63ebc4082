"""What torch.compile calls without looking into it.

`torch.compiler.disable` imports all of torch._dynamo. This module is therefore imported where
Dynamo runs already, and nowhere else.
"""

from __future__ import annotations

import torch
from torch import _VF

lstm = torch.compiler.disable(
    lambda *arguments: _VF.lstm(*arguments),
    reason="torch 2.13 cannot differentiate its oneDNN LSTM in a compiled graph",
)
