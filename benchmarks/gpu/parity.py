"""The layers and a small decoder on the device, against the same weights on the CPU in float64.

Outputs and every gradient are compared by their relative distance |found - wanted| / |wanted| (2-norms, each tensor by
itself, the worst counts). Weights and inputs are rounded to the tested precision before either side sees them, so that
only the arithmetic differs. One tensor rank; layouts are compared elsewhere.

Legend: B batch, S sequence, D hidden size, V vocabulary, H heads, G key and value heads, K head size.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.gpu.facts import pick_device
from benchmarks.gpu.isolate import Emit, short_error
from megalite import rng
from megalite.config.schema import ModelConfig, RotaryScalingConfig
from megalite.layers.attention import Attention
from megalite.layers.cross_entropy import LossTerms, Target, Vocabulary
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.mlp import MLP
from megalite.layers.norm import LayerNorm, RMSNorm
from megalite.layers.positions import LearnedPositions, rotary_tables
from megalite.layers.shard import Init, replace_parameter
from megalite.layers.vocab import VocabParallelEmbedding, VocabParallelLinear
from megalite.mesh import Axis, single_mesh
from megalite.models import build_model, iter_parameter_slots, named_logical_parameters

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Measured on CPUs with room above: bf16 keeps 8 bits, and the CPU sums gradients of biases in it (2.8e-2).
LAYER_TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 4e-2}
DECODER_TOLERANCE = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 5e-2}
RECOMPUTE = ("none", "selective", "full")
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How big the compared tensors are."""

    B: int
    S: int
    D: int
    H: int
    G: int
    V: int


SIZES = Sizes(B=2, S=256, D=512, H=8, G=2, V=50257)
TINY_SIZES = Sizes(B=2, S=16, D=32, H=4, G=2, V=200)


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer and how to call it: `build(axis)`, then `call(layer, inputs)` with `floats` random and `ints` given."""

    build: Callable[[Axis], nn.Module]
    call: Callable[[Any, Tensors], Tensor]
    floats: Mapping[str, tuple[int, ...]]
    ints: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def layer_cases(sizes: Sizes) -> dict[str, LayerCase]:
    """Every layer of the library by name; `ints` are drawn from the vocabulary."""
    B, S, D, H, G, V = dataclasses.astuple(sizes)
    K = D // H
    init, x = Init(std=0.05), {"x": (B, S, D)}

    def plain(layer: nn.Module, inputs: Tensors) -> Tensor:
        return layer(inputs["x"])

    def rotated(layer: nn.Module, inputs: Tensors) -> Tensor:
        x_BSD = inputs["x"]
        positions_S = torch.arange(S, device=x_BSD.device)
        return layer(x_BSD, rotary_tables(positions_S, K, 10000.0, RotaryScalingConfig(), x_BSD.dtype))

    def loss(head: VocabParallelLinear, inputs: Tensors) -> Tensor:
        weights_BS = inputs["weights"].detach().to(torch.promote_types(inputs["x"].dtype, torch.float32)).abs()
        return head(inputs["x"], Target(inputs["labels"], weights_BS, LossTerms(0.1, 1e-3)))

    def mlp(activation: str, bias: bool) -> Callable[[Axis], nn.Module]:
        return lambda axis: MLP(D, 4 * D, activation, bias, axis, init, init)

    def attention(heads: int) -> Callable[[Axis], nn.Module]:
        config = ModelConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=heads)
        return lambda axis: Attention(config, axis, init, init)

    return {
        "layernorm": LayerCase(lambda axis: LayerNorm(D, 1e-5, axis), plain, x),
        "rmsnorm": LayerCase(lambda axis: RMSNorm(D, 1e-5, axis), plain, x),
        "column linear": LayerCase(lambda axis: ColumnParallelLinear(D, (D, D), True, axis, init), plain, x),
        "row linear": LayerCase(lambda axis: RowParallelLinear(D, D, True, axis, init), plain, x),
        "mlp gelu": LayerCase(mlp("gelu", True), plain, x),
        "mlp gelu_tanh": LayerCase(mlp("gelu_tanh", True), plain, x),
        "mlp relu_squared": LayerCase(mlp("relu_squared", True), plain, x),
        "mlp swiglu": LayerCase(mlp("swiglu", False), plain, x),
        "attention": LayerCase(attention(H), plain, x),
        "attention grouped rotary": LayerCase(attention(G), rotated, x),
        "positions": LayerCase(
            lambda axis: LearnedPositions(V, D, axis, init), lambda layer, t: layer(t["ids"]), {}, {"ids": (S,)}
        ),
        "embedding": LayerCase(
            lambda axis: VocabParallelEmbedding(V, D, axis, init), lambda layer, t: layer(t["ids"]), {}, {"ids": (B, S)}
        ),
        "head and loss": LayerCase(
            lambda axis: VocabParallelLinear(Vocabulary(V, axis), D, init),
            loss,
            x | {"weights": (B, S)},
            {"labels": (B, S)},
        ),
    }


def layers(emit: Emit, device_name: str, tiny: bool) -> None:
    """A row a layer with its error in each precision, and one for the dropout mask, which must be equal bit for bit."""
    device, sizes = pick_device(device_name), TINY_SIZES if tiny else SIZES
    for name, case in layer_cases(sizes).items():
        errors = _attempt({dtype: partial(layer_error, case, sizes.V, dtype, device) for dtype in DTYPES})
        emit({"case": name, **_verdict(errors, LAYER_TOLERANCE)})
    emit({"case": "dropout mask", **_verdict(_attempt({"bits": partial(mask_error, device)}), {"bits": 0.0})})


def layer_error(case: LayerCase, vocab_size: int, dtype: str, device: torch.device) -> float:
    """The worst relative distance of one layer's output and gradients from the CPU's in float64."""
    generator = torch.Generator().manual_seed(1)
    meta = case.build(single_mesh(CPU).tensor)
    values = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in named_logical_parameters(meta)}
    floats = {name: torch.randn(shape, generator=generator) for name, shape in case.floats.items()}
    values, floats = ({name: t.to(DTYPES[dtype]).double() for name, t in ts.items()} for ts in (values, floats))
    ints = {name: torch.randint(vocab_size, shape, generator=generator) for name, shape in case.ints.items()}
    wanted = _run_layer(case, values, floats, ints, torch.float64, CPU)
    return worst_distance(_run_layer(case, values, floats, ints, DTYPES[dtype], device), wanted)


def _run_layer(
    case: LayerCase, values: Tensors, floats: Tensors, ints: Tensors, dtype: torch.dtype, device: torch.device
) -> Tensors:
    layer = case.build(single_mesh(device).tensor)
    load_values(layer, values, device, dtype)
    leaves = {name: t.to(device, dtype, copy=True).requires_grad_() for name, t in floats.items()}
    output = case.call(layer, leaves | {name: t.to(device) for name, t in ints.items()})
    output.backward(random_gradient(output))
    grads = {f"gradient of {name}": t.grad for name, t in (*leaves.items(), *named_logical_parameters(layer))}
    return {"output": output.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def mask_error(device: torch.device) -> float:
    """The share of elements that the device drops and the CPU keeps, or the other way round."""
    masks = [rng.keep_mask(257, 129, 0.1, rng.micro_batch_key(1, 2, 3, 0, where)).cpu() for where in (device, CPU)]
    return (masks[0] != masks[1]).double().mean().item()


GPT = ModelConfig(max_sequence_length=1024, num_layers=2, activation="gelu_tanh", init_std=0.05)
LLAMA = dataclasses.replace(
    GPT,
    norm="rmsnorm",
    activation="swiglu",
    positions="rotary",
    rotary_scaling=RotaryScalingConfig(original_max_sequence_length=128),
    bias=False,
    tied_embeddings=False,
)


def decoder_config(family: str, sizes: Sizes) -> ModelConfig:
    """A decoder of two blocks: `gpt`, or `llama` with grouped heads."""
    shape: dict[str, Any] = {"vocab_size": min(sizes.V, 2000), "hidden_size": sizes.D, "num_attention_heads": sizes.H}
    if family == "gpt":
        return dataclasses.replace(GPT, **shape)
    return dataclasses.replace(LLAMA, **shape, num_key_value_heads=sizes.G, ffn_hidden_size=3 * sizes.D)


def decoder(emit: Emit, device_name: str, tiny: bool, family: str, compiled: bool) -> None:
    """A row a precision (and one with dropout) with the error of each recompute mode."""
    device, sizes = pick_device(device_name), TINY_SIZES if tiny else SIZES
    config, label = decoder_config(family, sizes), f"{family}{' compiled' if compiled else ''}"
    # Attention in float64 has no fused kernel, and nobody trains in it: once, eager, is enough.
    for dtype in ("float32", "bfloat16") if compiled else DTYPES:
        started = time.perf_counter()
        wanted = run_decoder(config, sizes, "none", False, DTYPES[dtype], torch.float64, CPU)

        def error(mode: str, dtype: str = dtype, wanted: Tensors = wanted) -> float:
            found = run_decoder(config, sizes, mode, compiled, DTYPES[dtype], DTYPES[dtype], device)
            return worst_distance(found, wanted)

        # Each mode compiles anew, for ten seconds or so: all of them in the precision of training.
        modes = ("none",) if compiled and dtype != "bfloat16" else RECOMPUTE
        errors = _attempt({mode: partial(error, mode) for mode in modes})
        verdict = _verdict(errors, dict.fromkeys(modes, DECODER_TOLERANCE[dtype]))
        emit({"case": f"{label} {dtype}", **verdict, "seconds": time.perf_counter() - started})
    if not compiled:
        emit({"case": f"{label} dropout", **_dropout_verdict(dataclasses.replace(config, dropout=0.1), sizes, device)})


def _dropout_verdict(config: ModelConfig, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """With dropout, what is computed again must be dropped again: every mode against `none` on the same device."""

    def run(mode: str) -> Tensors:
        return run_decoder(config, sizes, mode, False, torch.float32, torch.float32, device)

    wanted = run("none")
    errors = _attempt({mode: partial(lambda m: worst_distance(run(m), wanted), mode) for mode in RECOMPUTE})
    return _verdict(errors, dict.fromkeys(RECOMPUTE, DECODER_TOLERANCE["float32"]))


def run_decoder(
    config: ModelConfig,
    sizes: Sizes,
    recompute: Any,
    compiled: bool,
    rounding: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensors:
    """Losses and gradients of one training pass in `dtype`; the weights are first rounded to `rounding`."""
    model = build_model(config, single_mesh(device), recompute)
    generator = torch.Generator().manual_seed(1)
    values = {
        name: (torch.randn(parameter.shape, generator=generator) * config.init_std).to(rounding).double()
        for name, parameter in named_logical_parameters(model)
    }
    load_values(model, values, device, dtype)
    tokens_BS = torch.randint(config.known_vocab_size, (sizes.B, sizes.S), generator=generator)
    labels_BS = tokens_BS.roll(-1, 1)
    labels_BS[:, -1] = -1  # ignored
    if compiled:
        torch._dynamo.reset()  # each configuration counts from zero towards torch's limit of recompilations
        # Without a device the graphs are traced, but not lowered: that would need a C++ compiler and half a minute.
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    rng.seed_attention_stream(1, 2, 3, 0, 0)
    key = rng.micro_batch_key(1, 2, 3, 0, device) if config.dropout else None
    target = Target(labels_BS.to(device), torch.ones(labels_BS.shape, device=device))
    loss = model.train()(tokens_BS.to(device), target, key)
    loss.backward()
    grads = {f"gradient of {name}": p.grad for name, p in named_logical_parameters(model) if p.grad is not None}
    return {"loss": loss.detach()} | grads


def load_values(module: nn.Module, values: Tensors, device: torch.device, dtype: torch.dtype) -> None:
    """Put `values` (logical name -> tensor of the local shape) in the place of the module's parameters."""
    for name, owner, attribute in list(iter_parameter_slots(module)):
        replace_parameter(owner, attribute, values[name].to(device, dtype))


def random_gradient(output: Tensor) -> Tensor:
    """The same random gradient for every device and precision, up to rounding."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)


def worst_distance(found: Tensors, wanted: Tensors) -> float:
    """The largest |found - wanted| / |wanted| over the tensors; infinite where one is missing or not finite."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, want in wanted.items():
        have = found[name].detach().double().cpu()
        if not torch.isfinite(have).all():
            return float("inf")
        want = want.double().cpu()
        worst = max(worst, ((have - want).norm() / want.norm().clamp(min=1e-30)).item())
    return worst


def _attempt(measurements: Mapping[str, Callable[[], float]]) -> dict[str, float | str]:
    """Each measurement's result, or what it raised."""
    results: dict[str, float | str] = {}
    for name, measure in measurements.items():
        try:
            results[name] = measure()
        except Exception as error:
            results[name] = short_error(error)
    return results


def _verdict(errors: Mapping[str, float | str], tolerances: Mapping[str, float]) -> dict[str, Any]:
    good = all(isinstance(error, float) and error <= tolerances[name] for name, error in errors.items())
    # JSON has no infinity.
    shown = {name: str(error) if error == float("inf") else error for name, error in errors.items()}
    used = {name: tolerances[name] for name in errors}
    return {"status": "ok" if good else "failed", "errors": shown, "tolerances": used}
