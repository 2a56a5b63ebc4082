"""The implementations that are compared.

A builder takes a problem and returns the step that solves it with the problem's weights. It raises
`UnsupportedError` if the peer cannot run the problem, and ImportError if a package is missing. All
peers use as many threads as torch does. They take and return their own kind of array, so no
conversion is timed. Each peer has the settings that were fastest for it; the settings for spinning
threads are left at their defaults.
"""

import copy
import functools
import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnfast

from . import custom_cells
from .steps import Case, Problem, Step, module_step, outputs

Builder = Callable[[Problem], Step]


class UnsupportedError(Exception):
    """This peer cannot run this case; the message says why."""


class Peer(NamedTuple):
    build: Builder
    tolerance: float = 0.0  # relative to the largest element; above 0 for peers in lower precision


def build_rnnfast(problem: Problem) -> Step:
    report = rnnfast.accelerate(copy.deepcopy(problem.module), backend="fused")
    if report.left:
        raise AssertionError(f"accelerate left the module as it is: {report}")
    return module_step(report.module, problem)


def build_frozen(problem: Problem, weights: str) -> Step:
    """Builds a module that `rnnfast.freeze` makes."""
    demand_inference_in_float32(problem)
    return module_step(rnnfast.freeze(problem.module, weights), problem)


def build_torch(problem: Problem) -> Step:
    twin = copy.deepcopy(problem.module)
    if isinstance(twin, nn.RNNBase):
        twin.flatten_parameters()  # cuDNN needs one block of weights, which a copy does not keep
    return module_step(twin, problem)


def build_torch_int8(problem: Problem) -> Step:
    """Builds torch's dynamic quantisation: int8 weights; every product quantises x and h too."""
    demand_inference_in_float32(problem)
    if isinstance(problem.module, (nn.RNN, nn.RNNCellBase)):
        raise UnsupportedError("no Elman layers and no cells")
    demand_no_projection(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = nn.Sequential(copy.deepcopy(problem.module))
        quantized = torch.ao.quantization.quantize_dynamic(holder, {type(problem.module)})
    return module_step(quantized[0], problem)


def demand_float32(problem: Problem) -> None:
    if problem.x.is_cuda or problem.x.dtype != torch.float32:
        raise UnsupportedError("float32 on the CPU only")


def demand_inference_in_float32(problem: Problem) -> None:
    demand_float32(problem)
    if problem.mode != "inference":
        raise UnsupportedError("inference only")


def demand_no_projection(problem: Problem) -> None:
    if getattr(problem.module, "proj_size", 0):
        raise UnsupportedError("no projection")


def cell_of(problem: Problem) -> str:
    """Returns "RNN", "GRU" or "LSTM"."""
    return type(problem.module).__name__.removesuffix("Cell")


def directions_of(problem: Problem) -> int:
    return 2 if getattr(problem.module, "bidirectional", False) else 1


def weights_by_layer(problem: Problem) -> list[list[list[Tensor]]]:
    """Returns the weights, in torch.nn's order, of each direction of each layer."""
    weights = [weight.detach() for weight in problem.module.parameters()]
    count = 5 if getattr(problem.module, "proj_size", 0) else 4
    each = [weights[k : k + count] for k in range(0, len(weights), count)]
    directions = directions_of(problem)
    return [each[k : k + directions] for k in range(0, len(each), directions)]


def reordered(weight: Tensor, order: str, wanted: str) -> Tensor:
    """Reorders the gate blocks of `weight` (rows) from `order` to `wanted`."""
    blocks = dict(zip(order, weight.chunk(len(order)), strict=True))
    return torch.cat([blocks[gate] for gate in wanted])


def onnx_model(problem: Problem) -> bytes:
    """Returns a model with one ONNX node for each layer.

    D is the number of directions. The results are the last layer's y (T, D, B, H) and then the
    final h (D, B, H) and, for LSTM, c of each layer. The inputs are x (T, B, I) and, of a cell, the
    states; the model of a cell has T = 1.
    """
    import onnx

    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    cell, H, D = cell_of(problem), problem.module.hidden_size, directions_of(problem)
    T, B, I = problem.x.shape
    T = 1 if problem.state else T
    order, wanted = {"RNN": ("h", "h"), "GRU": ("rzh", "zrh"), "LSTM": ("ifco", "iofc")}[cell]
    options = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    options |= {"linear_before_reset": 1} if cell == "GRU" else {}
    options |= {"activations": ["Tanh"] * D} if cell == "RNN" else {}
    inputs = {"x": [T, B, I]} | {f"initial {k}": [1, B, H] for k in range(len(problem.state))}
    states = ("h", "c") if cell == "LSTM" else ("h",)
    constants, nodes, y, results = {}, [], "x", {}
    constants["flat"] = torch.tensor([0, 0, -1])  # the shape (T, B, D*H) for a node of Reshape
    constants["axis"] = torch.tensor([1])
    for k, directions in enumerate(weights_by_layer(problem)):
        blocks = [[reordered(w, order, wanted) for w in weights] for weights in directions]
        w_ih, w_hh, b_ih, b_hh = (torch.stack(each) for each in zip(*blocks, strict=True))
        weights = {f"W{k}": w_ih, f"R{k}": w_hh, f"bias{k}": torch.cat([b_ih, b_hh], 1)}
        constants |= weights
        given = ["", *(name for name in inputs if name != "x")] if problem.state else []
        made = {f"y{k}": [T, D, B, H], **{f"{name}{k}": [D, B, H] for name in states}}
        nodes.append(helper.make_node(cell, [y, *weights, *given], [*made], **options))
        y, following = f"y{k}", f"x{k + 1}"
        results |= {name: shape for name, shape in made.items() if name != y}
        if k + 1 == getattr(problem.module, "num_layers", 1):
            results = {y: made[y]} | results
        elif D == 1:
            nodes.append(helper.make_node("Squeeze", [y, "axis"], [following]))
        else:
            swapped = f"swapped{k}"
            nodes.append(helper.make_node("Transpose", [y], [swapped], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [swapped, "flat"], [following]))
        y = following
    described = [
        [helper.make_tensor_value_info(name, floats, shape) for name, shape in each.items()]
        for each in (inputs, results)
    ]
    used = {name for node in nodes for name in node.input}
    values = [
        onnx.numpy_helper.from_array(value.numpy(), name)
        for name, value in constants.items()
        if name in used
    ]
    graph = helper.make_graph(nodes, cell, *described, values)
    opset = [helper.make_opsetid("", 14)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def onnx_step(
    problem: Problem, feed: Callable[[list[Any]], Any], call: Callable[[Any], list[Any]]
) -> Step:
    """Returns the step of a runtime that runs `onnx_model`.

    `feed` brings the inputs of the model into the form that `call` takes; `call` returns the
    results.
    """
    kinds = 2 if cell_of(problem) == "LSTM" else 1
    if problem.state:
        xs = [x[None].numpy() for x in problem.x.clone()]
        first = [value[None].numpy() for value in problem.state]

        def run_cell() -> list[Any]:
            state = first
            for x in xs:
                _, *state = call(feed([x, *state]))
            return state

        def numbers_of_cell(arrays: list[Any]) -> dict[str, Tensor]:
            state = tuple(torch.from_numpy(array)[0] for array in arrays)
            return outputs((state[0], state))

        return Step(run_cell, numbers_of_cell)

    def numbers(arrays: list[Any]) -> dict[str, Tensor]:
        y, *states = (torch.from_numpy(array) for array in arrays)
        state = tuple(torch.cat(states[kind::kinds]) for kind in range(kinds))
        return outputs((y.transpose(1, 2).flatten(2), state))

    fed = feed([problem.x.numpy()])
    return Step(lambda: call(fed), numbers)


def build_onnxruntime(
    problem: Problem, make_model: Callable[[Problem], bytes] = onnx_model
) -> Step:
    demand_inference_in_float32(problem)
    demand_no_projection(problem)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        make_model(problem), options, providers=["CPUExecutionProvider"]
    )
    inputs, results = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    call = functools.partial(session.run, results)
    return onnx_step(problem, lambda given: dict(zip(inputs, given, strict=True)), call)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the advice that onnxruntime's quantisation logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def int8_onnx_model(problem: Problem) -> bytes:
    """Returns `onnx_model` with DynamicQuantizeLSTM in place of LSTM.

    Weights have 7 bits (reduce_range). With 8 the sums of 16 bits saturate on processors without
    VNNI, and outputs are then off by more than 10 %.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder, "int8.onnx")
        quantize_dynamic(
            onnx.load_from_string(onnx_model(problem)),
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return path.read_bytes()


def build_onnxruntime_int8(problem: Problem) -> Step:
    if cell_of(problem) != "LSTM":
        raise UnsupportedError("int8 for LSTM only")
    return build_onnxruntime(problem, int8_onnx_model)


def build_openvino(problem: Problem) -> Step:
    demand_inference_in_float32(problem)
    demand_no_projection(problem)
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 if the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    model = core.compile_model(core.read_model(onnx_model(problem)), "CPU", options)
    request, count = model.create_infer_request(), len(model.outputs)

    def call(given: list[Any]) -> list[Any]:
        result = request.infer(given, share_inputs=True, share_outputs=True)
        return [result[k] for k in range(count)]

    return onnx_step(problem, list, call)


def jax_direction(
    cell: str, weights: tuple[Any, ...], x: Any, state: Any, reverse: bool
) -> tuple[Any, Any]:
    """Returns (y, state) of one direction of a layer; the weights are transposed."""
    import jax
    from jax import numpy as jnp

    w_ih, w_hh, b_ih, b_hh, *w_hr = weights

    def elman(h: Any, projected: Any) -> tuple[Any, Any]:
        h = jnp.tanh(projected + h @ w_hh)
        return h, h

    def gru(h: Any, projected: Any) -> tuple[Any, Any]:
        from_x, from_h = jnp.split(projected, 3, -1), jnp.split(h @ w_hh + b_hh, 3, -1)
        r, z = (jax.nn.sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
        n = jnp.tanh(from_x[2] + r * from_h[2])
        h = n + z * (h - n)
        return h, h

    def lstm(state: Any, projected: Any) -> tuple[Any, Any]:
        h, c = state
        i, f, g, o = jnp.split(projected + h @ w_hh, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        h = h @ w_hr[0] if w_hr else h
        return (h, c), h

    step = {"RNN": elman, "GRU": gru, "LSTM": lstm}[cell]
    projected = x @ w_ih + (b_ih if cell == "GRU" else b_ih + b_hh)
    state, y = jax.lax.scan(step, state, projected, reverse=reverse)
    return y, state


def jax_layers(cell: str, weights: list[list[tuple[Any, ...]]], x: Any) -> tuple[Any, Any]:
    """Returns (y, state) of a stack that starts from zeros; see `weights_by_layer`."""
    import jax
    from jax import numpy as jnp

    states = []
    for directions in weights:
        found = []
        for k, each in enumerate(directions):
            gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[cell]
            h = jnp.zeros((x.shape[1], each[1].shape[0]), x.dtype)
            c = jnp.zeros((x.shape[1], each[1].shape[1] // gates), x.dtype)
            state = (h, c) if cell == "LSTM" else h
            found.append(jax_direction(cell, each, x, state, reverse=k == 1))
        x = jnp.concatenate([y for y, _ in found], -1)
        states += [state for _, state in found]
    return x, jax.tree.map(lambda *values: jnp.stack(values), *states)


@functools.cache
def start_jax(threads: int) -> Any:
    """Imports jax. XLA fixes its number of threads when the first array is made."""
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    return jax


def build_jax(problem: Problem) -> Step:
    demand_float32(problem)
    if isinstance(problem.module, custom_cells.Loop):
        return build_jax_scan(problem)
    jax = start_jax(torch.get_num_threads())
    cell, names = cell_of(problem), [name for name, _ in problem.module.named_parameters()]

    def to_jax(value: Tensor) -> Any:
        return jax.numpy.array(value.numpy())

    def to_torch(value: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(value).copy())

    weights = [
        [tuple(to_jax(w.t()) for w in each) for each in directions]
        for directions in weights_by_layer(problem)
    ]
    x, grad_y = to_jax(problem.x), to_jax(problem.grad_y)
    first = tuple(map(to_jax, problem.state))

    def model(weights: Any, x: Any) -> tuple[Any, Any]:
        if not first:
            return jax_layers(cell, weights, x)
        given = first if cell == "LSTM" else first[0]
        _, state = jax_direction(cell, weights[0][0], x, given, reverse=False)
        return (state[0] if cell == "LSTM" else state), state

    if problem.mode == "inference":
        infer = jax.jit(model)

        def state_numbers(result: tuple[Any, Any]) -> dict[str, Tensor]:
            return outputs(jax.tree.map(to_torch, result))

        return Step(lambda: jax.block_until_ready(infer(weights, x)), state_numbers)

    @jax.jit
    def train(weights: Any, x: Any, grad_y: Any) -> tuple[Any, ...]:
        if problem.input_grad:
            y, backward = jax.vjp(lambda w, x: model(w, x)[0], weights, x)
        else:
            y, backward = jax.vjp(lambda w: model(w, x)[0], weights)
        return y, *backward(grad_y)

    def gradients(result: tuple[Any, ...]) -> dict[str, Tensor]:
        y, of_weights, *of_x = jax.tree.map(to_torch, result)
        flat = [w for directions in of_weights for each in directions for w in each]
        numbers = {f"grad of {n}": w.t() for n, w in zip(names, flat, strict=True)}
        return {"y": y, **numbers, **dict(zip(["grad of x"], of_x, strict=False))}

    return Step(lambda: jax.block_until_ready(train(weights, x, grad_y)), gradients)


# Cells that users write (benchmarks.custom): the module of a problem is a Loop.

COMPILED_STEPS = 25  # the longest loop that is given to torch.compile, which unrolls it
COMPILE_SECONDS = 60.0  # the most that this may take


def loop_of(problem: Problem) -> custom_cells.Loop:
    """Returns the loop in PyTorch that is the module of a problem.

    Raises:
        UnsupportedError: The module is something else.
    """
    if not isinstance(problem.module, custom_cells.Loop):
        raise UnsupportedError("cells that users write only")
    return problem.module


def build_written(problem: Problem) -> Step:
    """Builds the module of rnnfast that runs a user's cell."""
    loop = loop_of(problem)
    make = rnnfast.LayerCell if loop.single else rnnfast.Layer
    module = make(loop.kind.cell, loop.input_size, loop.hidden_size, backend="fused")
    module.load_state_dict(loop.state_dict())
    return module_step(module, problem)


def build_loop(problem: Problem) -> Step:
    return module_step(copy.deepcopy(loop_of(problem)), problem)


def build_builtin(problem: Problem) -> Step:
    """Builds rnnfast's own layer or cell of the same formula."""
    loop = loop_of(problem)
    if loop.kind.builtin is None:
        raise UnsupportedError("not a built-in cell")
    make = loop.kind.builtin[loop.single]
    module = make(loop.input_size, loop.hidden_size, backend="fused")
    module.load_state_dict(loop.state_dict())
    return module_step(module, problem)


def compiled_step(problem: Problem) -> Step:
    torch._dynamo.reset()  # forget the loops of earlier problems
    loop = copy.deepcopy(loop_of(problem))
    loop.compile()
    return module_step(loop, problem)


def try_to_compile(name: str, case: Case, mode: str, input_grad: bool, threads: int) -> None:
    """Compiles the loop of a problem, so that torch's cache on disk has it."""
    torch.set_num_threads(threads)
    problem = custom_cells.make_problem(name, case, mode, case.T == 1, input_grad)
    with torch.inference_mode(mode == "inference"):
        compiled_step(problem).run()


def build_compiled(problem: Problem) -> Step:
    """Builds the loop under torch.compile, if a process of its own can compile it in time."""
    loop, (T, B, I) = loop_of(problem), problem.x.shape
    if T > COMPILED_STEPS:
        raise UnsupportedError(f"no loops of more than {COMPILED_STEPS} steps")
    case = Case(T, B, I, loop.hidden_size)
    given = (loop.name, case, problem.mode, problem.input_grad, torch.get_num_threads())
    attempt = multiprocessing.get_context("spawn").Process(target=try_to_compile, args=given)
    attempt.start()
    attempt.join(COMPILE_SECONDS)
    if attempt.is_alive():
        attempt.kill()
        attempt.join()
        raise UnsupportedError(f"torch.compile took more than {COMPILE_SECONDS:.0f} s")
    if attempt.exitcode:
        raise UnsupportedError("torch.compile failed")
    return compiled_step(problem)


def build_jax_scan(problem: Problem) -> Step:
    """Builds a user's cell as a scan, or as a single step."""
    loop, jax = loop_of(problem), start_jax(torch.get_num_threads())
    kind, m = loop.kind, custom_cells.jax_functions()

    def to_jax(value: Tensor) -> Any:
        return jax.numpy.array(value.detach().numpy())

    def to_torch(value: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(value).copy())

    weights = {name: to_jax(weight) for name, weight in loop.named_parameters()}
    x, grad_y = to_jax(problem.x), to_jax(problem.grad_y)
    zeros = torch.zeros(problem.x.shape[1], loop.hidden_size)
    first = tuple(map(to_jax, problem.state or [zeros] * len(kind.cell.state)))

    def model(weights: Any, x: Any) -> tuple[Any, Any]:
        w = {name.removesuffix("_l0"): weight for name, weight in weights.items()}

        def step(state: Any, from_x: Any) -> tuple[Any, Any]:
            state = tuple(custom_cells.advance(m, kind, w, from_x, state))
            return state, state[0]

        from_x = custom_cells.project(m, kind, w, x)
        if loop.single:
            state, y = step(first, from_x[0])
            return y, state
        state, y = jax.lax.scan(step, first, from_x)
        return y, tuple(value[None] for value in state)

    if problem.mode == "inference":
        infer = jax.jit(model)

        def numbers(result: Any) -> dict[str, Tensor]:
            return outputs(jax.tree.map(to_torch, result))

        return Step(lambda: jax.block_until_ready(infer(weights, x)), numbers)

    @jax.jit
    def train(weights: Any, x: Any, grad_y: Any) -> tuple[Any, ...]:
        given = (weights, x) if problem.input_grad else (weights,)
        y, backward = jax.vjp(lambda w, x=x: model(w, x)[0], *given)
        return y, *backward(grad_y)

    def gradients(result: Any) -> dict[str, Tensor]:
        y, of_weights, *of_x = jax.tree.map(to_torch, result)
        found = {f"grad of {name}": value for name, value in of_weights.items()}
        return {"y": y, **found, **dict(zip(["grad of x"], of_x, strict=False))}

    return Step(lambda: jax.block_until_ready(train(weights, x, grad_y)), gradients)


PEERS: dict[str, Peer] = {
    "torch": Peer(build_torch),
    "onnxruntime": Peer(build_onnxruntime),
    "openvino": Peer(build_openvino),
    "jax": Peer(build_jax),
    "torch_int8": Peer(build_torch_int8, tolerance=0.1),
    "onnxruntime_int8": Peer(build_onnxruntime_int8, tolerance=0.1),
    "unfrozen": Peer(build_rnnfast),
    "loop": Peer(build_loop),
    "compiled": Peer(build_compiled),
    "builtin": Peer(build_builtin),
}
