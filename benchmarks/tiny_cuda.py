"""One forward and backward of every cell and dtype on a tiny shape, for compute-sanitizer."""

import torch

from .compare import DTYPES
from .peers import build_rnnfast
from .steps import CELLS, MODES, Case, make_problem, results


def main(device: str = "cuda") -> None:
    for cell in CELLS:
        for name, dtype in DTYPES.items():
            for case in (Case(3, 2, 5, 7), Case(2, 3, 32, 32)):
                for mode in MODES:
                    problem = make_problem(cell, case, device, dtype, mode, input_grad=True)
                    with torch.inference_mode(mode == "inference"):
                        numbers = results(build_rnnfast(problem))
                        assert all(value.isfinite().all() for value in numbers.values())
            print(f"{cell} {name}: done")


if __name__ == "__main__":
    main()
