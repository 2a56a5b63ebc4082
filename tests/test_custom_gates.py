"""record_gates on cells of users: the variables of the function, by their names."""

from __future__ import annotations

import pytest
import torch
from custom_layers import gated, normal

import rnnfast
from rnnfast.explain import record_gates


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_the_variables_of_a_step(backend: str) -> None:
    torch.manual_seed(0)
    layer = rnnfast.Layer(gated, 3, 5, bidirectional=True, backend=backend, dtype=torch.float64)
    x, h, c = (torch.randn(n, 2, k, dtype=torch.float64) for n, k in ((4, 3), (2, 5), (2, 5)))
    hx = (h, c)
    with record_gates(layer) as record:
        y, _ = layer(x, hx)
    assert list(record) == ["l0", "l0_reverse"]
    for key, direction, order in (("l0", 0, 1), ("l0_reverse", 1, -1)):
        own = record[key]
        assert sorted(own) == ["c", "hidden", "keep"]
        suffix = "_l0" + "_reverse" * direction
        w = {n.removesuffix(suffix): p for n, p in layer.named_parameters() if n.endswith(suffix)}
        h, c = hx[0][direction], hx[1][direction]
        for t in range(4)[::order]:
            gates = (x[t] @ w["weight_ih"].T + w["bias_ih"]).chunk(3, -1)
            of_h = (h @ w["weight_hh"].T + w["bias_hh"]).chunk(3, -1)
            keep = (gates[0] + of_h[0] + w["p"] * c).sigmoid()
            c = keep * c + (gates[1] + of_h[1]).tanh()
            h = (gates[2] + of_h[2]).sigmoid() * c.tanh()
            for name, value in (("keep", keep), ("c", c), ("hidden", h)):
                torch.testing.assert_close(own[name][t], value)
            torch.testing.assert_close(y[t].chunk(2, -1)[direction], h)


def test_lengths_and_single_steps() -> None:
    torch.manual_seed(0)
    layer = rnnfast.Layer(normal, 3, 5, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    with record_gates(layer) as record:
        y, _ = layer(x, lengths=[2, 4])
    assert {name: tuple(t.shape) for name, t in record["l0"].items()} == {
        "update": (2, 4, 5),
        "hidden": (2, 4, 5),
    }
    assert record["l0"]["update"][0, 2:].eq(0).all()
    torch.testing.assert_close(record["l0"]["hidden"], y)

    step = rnnfast.LayerCell(normal, 3, 5, dtype=torch.float64)
    step.load_state_dict({name[:-3]: value for name, value in layer.state_dict().items()})
    with record_gates(step) as single:
        h = step(x[:, 0])
        step(x[:, 1], h)
    torch.testing.assert_close(single["l0"]["update"][:, 1], record["l0"]["update"][1, :2])
