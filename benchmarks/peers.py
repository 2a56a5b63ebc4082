"""The implementations that are compared.

A builder takes a problem and returns the step that solves it with the problem's weights. It raises
`UnsupportedError` if the peer cannot run the problem, and ImportError if a package is missing. All
peers use as many threads as torch does. They take and return their own kind of array, so no
conversion is timed. Each peer has the settings that were fastest for it; the settings for spinning
threads are left at their defaults.
"""

import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnfast

from .steps import Problem, Step, module_step, outputs

Builder = Callable[[Problem], Step]


class UnsupportedError(Exception):
    """This peer cannot run this case; the message says why."""


class Peer(NamedTuple):
    build: Builder
    tolerance: float = 0.0  # relative to the largest element; above 0 for peers in lower precision


def build_rnnfast(problem: Problem) -> Step:
    module = problem.module
    twin = getattr(rnnfast, type(module).__name__)(
        module.input_size,
        module.hidden_size,
        backend="fused",
        device=problem.x.device,
        dtype=problem.x.dtype,
    )
    twin.load_state_dict(module.state_dict())
    return module_step(twin, problem)


def build_torch(problem: Problem) -> Step:
    twin = copy.deepcopy(problem.module)
    twin.flatten_parameters()  # cuDNN needs the weights in one block, which a copy does not keep
    return module_step(twin, problem)


def build_torch_int8(problem: Problem) -> Step:
    """Builds torch's dynamic quantisation: int8 weights; every product quantises x and h too."""
    demand_inference_in_float32(problem)
    if isinstance(problem.module, nn.RNN):
        raise UnsupportedError("no Elman cells")
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


def reordered(weight: Tensor, order: str, wanted: str) -> Tensor:
    """Reorders the gate blocks of `weight` (rows) from `order` to `wanted`."""
    blocks = dict(zip(order, weight.detach().chunk(len(order)), strict=True))
    return torch.cat([blocks[gate] for gate in wanted])


def onnx_model(problem: Problem) -> bytes:
    """Returns a model of one ONNX node: x -> y (T, 1, B, H), h (1, B, H) and, for LSTM, c."""
    import onnx

    module, (T, B, I) = problem.module, problem.x.shape
    cell, H = type(module).__name__, module.hidden_size
    order, wanted = {"RNN": ("h", "h"), "GRU": ("rzh", "zrh"), "LSTM": ("ifco", "iofc")}[cell]
    w_ih, w_hh, b_ih, b_hh = (reordered(w, order, wanted) for w in module.parameters())
    constants = {"W": w_ih[None], "R": w_hh[None], "bias": torch.cat([b_ih, b_hh])[None]}
    after = {"linear_before_reset": 1} if cell == "GRU" else {}
    outputs = {"y": [T, 1, B, H], "h": [1, B, H], "c": [1, B, H]}
    if cell != "LSTM":
        del outputs["c"]
    node = onnx.helper.make_node(cell, ["x", *constants], [*outputs], hidden_size=H, **after)
    graph = onnx.helper.make_graph(
        [node],
        cell,
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [T, B, I])],
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 14)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def onnx_numbers(arrays: list[Any]) -> dict[str, Tensor]:
    y, *state = (torch.from_numpy(array) for array in arrays)
    return outputs((y.squeeze(1), tuple(state)))


def build_onnxruntime(problem: Problem) -> Step:
    demand_inference_in_float32(problem)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(problem), options, providers=["CPUExecutionProvider"]
    )
    feed, names = {"x": problem.x.numpy()}, [output.name for output in session.get_outputs()]
    return Step(lambda: session.run(names, feed), onnx_numbers)


def build_openvino(problem: Problem) -> Step:
    demand_inference_in_float32(problem)
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 if the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    model = core.compile_model(core.read_model(onnx_model(problem)), "CPU", options)
    request, x = model.create_infer_request(), problem.x.numpy()

    def run() -> list[Any]:
        result = request.infer([x], share_inputs=True, share_outputs=True)
        return [result[k] for k in range(len(model.outputs))]

    return Step(run, onnx_numbers)


def jax_layer(cell: str, weights: tuple[Any, ...], x: Any) -> tuple[Any, Any]:
    """Returns (y, state) of a layer with weights of shape (I, G*H) and (H, G*H)."""
    import jax
    from jax import numpy as jnp

    w_ih, w_hh, b_ih, b_hh = weights

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
        return (h, c), h

    step = {"RNN": elman, "GRU": gru, "LSTM": lstm}[cell]
    zeros = jnp.zeros((x.shape[1], w_hh.shape[0]), x.dtype)
    projected = x @ w_ih + (b_ih if cell == "GRU" else b_ih + b_hh)
    state, y = jax.lax.scan(step, (zeros, zeros) if cell == "LSTM" else zeros, projected)
    return y, state


@functools.cache
def start_jax(threads: int) -> Any:
    """Imports jax. XLA fixes its number of threads when the first array is made."""
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    return jax


def build_jax(problem: Problem) -> Step:
    demand_float32(problem)
    jax = start_jax(torch.get_num_threads())
    cell, names = type(problem.module).__name__, [n for n, _ in problem.module.named_parameters()]
    layer = functools.partial(jax_layer, cell)
    values = [w.detach() for w in problem.module.parameters()]
    weights = tuple(jax.numpy.array(w.t().numpy()) for w in values)
    x, grad_y = jax.numpy.array(problem.x.numpy()), jax.numpy.array(problem.grad_y.numpy())

    def to_torch(value: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(value).copy())

    if problem.mode == "inference":
        infer = jax.jit(layer)

        def state_numbers(result: tuple[Any, Any]) -> dict[str, Tensor]:
            y, state = jax.tree.map(to_torch, result)
            return outputs((y, jax.tree.map(lambda value: value[None], state)))

        return Step(lambda: jax.block_until_ready(infer(weights, x)), state_numbers)

    @jax.jit
    def train(weights: Any, x: Any, grad_y: Any) -> tuple[Any, ...]:
        if problem.input_grad:
            y, backward = jax.vjp(lambda w, x: layer(w, x)[0], weights, x)
        else:
            y, backward = jax.vjp(lambda w: layer(w, x)[0], weights)
        return y, *backward(grad_y)

    def gradients(result: tuple[Any, ...]) -> dict[str, Tensor]:
        y, of_weights, *of_x = jax.tree.map(to_torch, result)
        numbers = {f"grad of {n}": w.t() for n, w in zip(names, of_weights, strict=True)}
        return {"y": y, **numbers, **dict(zip(["grad of x"], of_x, strict=False))}

    return Step(lambda: jax.block_until_ready(train(weights, x, grad_y)), gradients)


PEERS: dict[str, Peer] = {
    "torch": Peer(build_torch),
    "onnxruntime": Peer(build_onnxruntime),
    "openvino": Peer(build_openvino),
    "jax": Peer(build_jax),
    "torch_int8": Peer(build_torch_int8, tolerance=0.1),
}
