"""One forward and backward of every cell and dtype on a tiny shape, for compute-sanitizer."""

import torch

from .compare import DTYPES
from .peers import build_rnnfast
from .steps import CELLS, Case, make_problem, make_step, results


def main(device: str = "cuda") -> None:
    for cell in CELLS:
        for name, dtype in DTYPES.items():
            for case in (Case(3, 2, 5, 7), Case(2, 3, 32, 32)):
                problem = make_problem(cell, case, device, dtype)
                layer = build_rnnfast(problem.module, problem.x)
                for mode in ("inference", "training"):
                    with torch.inference_mode(mode == "inference"):
                        step = make_step(layer, problem, mode, input_grad=True)
                        assert all(value.isfinite().all() for value in results(step, mode).values())
            print(f"{cell} {name}: done")


if __name__ == "__main__":
    main()
