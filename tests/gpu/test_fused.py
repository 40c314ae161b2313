"""The fused decode step on a GPU: its kernels beside the plain operations, the whole beside the modules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from dovetail.engine import HybridEngine, fused_ops
from dovetail.engine.architecture import Architecture, FeedForward, Join, Linear, Norm, NormKind
from dovetail.engine.fused import fused_step
from dovetail.engine.fused_ops import Branch
from dovetail.engine.kv_cache import KVArena
from dovetail.model.lora import add_lora
from tests.engine.test_fused import RELATIVES, deep, model_of, run
from tests.fakes import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5}
LENGTHS = (0, 3, 30, 63, 64, 70, 128, 200)


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Numbers:
    """Random tensors of one precision on the GPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator("cuda").manual_seed(0)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=self.generator).to(self.dtype)

    def linear(self, outputs: int, inputs: int, *, has_bias: bool, is_transposed: bool) -> Linear:
        weight = self(inputs, outputs).T if is_transposed else self(outputs, inputs)
        return Linear(weight * inputs**-0.5, self(outputs) if has_bias else None)


def wide(x: Any) -> Any:
    """The same numbers in float64, on which the plain operations are exact."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        return tuple(wide(one) for one in x)
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: wide(getattr(x, name)) for name in x.__dataclass_fields__})
    return x


def expect_close(found: Tensor, expected: Tensor) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < ROUNDING[found.dtype], error


@pytest.fixture(params=ROUNDING, ids=str)
def numbers(request: pytest.FixtureRequest) -> Numbers:
    return Numbers(request.param)


@pytest.mark.parametrize("num_rows", [1, 5, 20, 64, 96, 128, 200, 256, 300])
@pytest.mark.parametrize(("has_bias", "is_transposed"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("sizes", [((256, 128, 128), 512), ((96, 40, 40), 72), ((1024,), 1024)], ids=str)
def test_products_are_those_of_torch(
    numbers: Numbers, num_rows: int, has_bias: bool, is_transposed: bool, sizes: tuple[tuple[int, ...], int]
) -> None:
    from dovetail.engine.kernels import fused_ops as kernels

    outputs, inputs = sizes
    options = {"has_bias": has_bias, "is_transposed": is_transposed}
    x = numbers(num_rows, inputs)
    linears = tuple(numbers.linear(size, inputs, **options) for size in outputs)
    expect_close(kernels.products(x, linears), fused_ops.products(wide(x), wide(linears)))
    branch = kernels.branch(x, linears[0])
    found = branch.parts_SBD.double().sum(0) + (0 if branch.bias_D is None else branch.bias_D.double())
    expect_close(found.to(x.dtype), fused_ops.branch(wide(x), wide(linears[0])).parts_SBD[0])


@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [576, 2048, 2560, 5120, 8192])
@pytest.mark.parametrize("ratio", [1, 2.6875, 4])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("may_split", [False, True])
def test_tiles_fit_into_the_memory_of_a_processor(
    num_rows: int, width: int, ratio: float, is_gated: bool, may_split: bool
) -> None:
    from dovetail.engine.kernels.products import tiles_for

    inner = int(width * ratio)
    for outputs, inputs in ((inner, width), (width, inner)):
        linears = [Linear(torch.empty(outputs, inputs, dtype=torch.bfloat16, device="meta"))] * (1 + is_gated)
        x = torch.empty(num_rows, inputs, dtype=torch.bfloat16, device="meta")
        tiles = tiles_for(x, linears, is_gated=is_gated, may_split=may_split and not is_gated)
        if tiles is not None:
            rows = tiles.rows + tiles.outputs + tiles.tail
            assert 2 * tiles.stages * tiles.inputs * rows <= 227 * 1024
            assert tiles.stages >= 2
            assert tiles.split == 1 or may_split
            left = (tiles.outputs, tiles.tail) if tiles.is_swapped else (tiles.rows,)
            assert all(size % 64 == 0 for size in left)


@pytest.mark.parametrize("num_rows", [1, 33, 128, 256, 300])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations_are_those_of_torch(
    numbers: Numbers, num_rows: int, activation: str, is_gated: bool
) -> None:
    from dovetail.engine.kernels import fused_ops as kernels

    for inputs, inner in ((512, 1024), (72, 100), (256, 9600)):
        options = {"has_bias": activation != "silu", "is_transposed": False}
        up = tuple(numbers.linear(inner, inputs, **options) for _ in range(1 + is_gated))
        feed_forward = FeedForward(up=up, activation=activation, down=up[0])
        x = numbers(num_rows, inputs)
        expect_close(kernels.activated(x, feed_forward), fused_ops.activated(wide(x), wide(feed_forward)))


@pytest.mark.parametrize(("is_centred", "offset"), [(True, 0.0), (False, 0.0), (False, 1.0)])
@pytest.mark.parametrize("width", [72, 2048, 5120])
def test_joins_are_those_of_torch(numbers: Numbers, is_centred: bool, offset: float, width: int) -> None:
    from dovetail.engine.kernels import fused_ops as kernels

    def norm() -> Norm:
        return Norm(numbers(width), numbers(width) if is_centred else None)

    kind, num_rows = NormKind(1e-5, is_centred, offset), 7
    hows = [
        Join(), Join(norms=(norm(),)), Join(norms=(norm(), norm())), Join(branch_norm=norm(), norms=(norm(),)),
        Join(norms=(norm(),), keeps_normed=True),
    ]  # fmt: skip
    whole = Branch(numbers(1, num_rows, width))
    parts = Branch(numbers(2, num_rows, width).float(), numbers(width))
    for how in hows:
        for branches in ((), (whole,), (parts,), (whole, parts)):
            if how.branch_norm is not None and len(branches) == 2:
                continue
            stream = numbers(num_rows, width)
            found = kernels.join(stream, branches, how, kind, 0.7)
            expected = fused_ops.join(wide(stream), wide(branches), wide(how), kind, 0.7)
            for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
                expect_close(one, other)


def test_embeddings_are_those_of_torch(numbers: Numbers) -> None:
    from dovetail.engine.kernels import fused_ops as kernels

    ids, positions = torch.tensor([3, 0, 49], device="cuda"), torch.tensor([17, 0, 5], device="cuda")
    for positions_PD in (None, numbers(20, 72)):
        architecture = Architecture(
            embedding_VD=numbers(50, 72), embedding_scale=1.5, positions_PD=positions_PD, position_offset=2,
            norm_kind=NormKind(1e-5, True, 0.0), first=Join(), layers=(),
        )  # fmt: skip
        expected = fused_ops.embed(ids, positions, wide(architecture))
        expect_close(kernels.embed(ids, positions, architecture), expected)


def logits_of(model: Any, past: list[Tensor], num_rows: int, *, is_fused: bool) -> Tensor:
    """The logits of one decode step over these old keys and values, by the fused step or by the modules."""
    from dovetail.engine.graphs import GraphLayout

    modules = HybridEngine(model).modules
    shape = modules.kv_shape()
    assert shape is not None
    lengths = [LENGTHS[row % len(LENGTHS)] for row in range(num_rows)]
    arena = KVArena(shape, 4 * num_rows, torch.device("cuda"), dense=False)
    for layer, values in zip(arena._storage, past, strict=True):
        layer.copy_(values)
    tables = [[row + num_rows * page for page in range(4)] for row in range(num_rows)]
    next_logits = modules.next_logits
    if is_fused:
        unused = KVArena(shape, 8, torch.device("cuda"), dense=False)
        step, why_not = fused_step(modules, unused, GraphLayout.of)
        assert step is not None, why_not
        next_logits = step.next_logits  # type: ignore[assignment]
    ids = torch.arange(num_rows, device="cuda") * 7 % 250
    with torch.no_grad(), modules.our_attention():
        return next_logits(ids, torch.tensor(lengths, device="cuda"), GraphLayout.of(arena, tables, lengths))


@pytest.mark.parametrize("num_rows", [8, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*TINY, *RELATIVES])
def test_the_step_is_as_near_to_float32_as_the_modules(name: str, dtype: torch.dtype, num_rows: int) -> None:
    model = model_of(name, dtype).cuda()
    shape = HybridEngine(model).modules.kv_shape()
    assert shape is not None
    generator = torch.Generator("cuda").manual_seed(1)
    size = (2, 4 * num_rows, shape.num_heads, 64, shape.head_width)
    past = [torch.randn(size, device="cuda", generator=generator).to(dtype) for _ in range(shape.num_layers)]
    exact = logits_of(
        model_of(name, dtype).float().cuda(), [x.float() for x in past], num_rows, is_fused=False
    )
    exact = exact.double()
    plain, found = (logits_of(model, past, num_rows, is_fused=fused).double() for fused in (False, True))
    error, usual = (float((x - exact).norm() / exact.norm()) for x in (found, plain))
    assert error <= max(1.25 * usual, 1e-5), (error, usual)


@pytest.mark.parametrize("name", ["opt", "qwen3", "gpt2"])
def test_adapters_are_added_on_the_gpu_too(name: str) -> None:
    model = add_lora(model_of(name, torch.bfloat16).cuda(), rank=4, alpha=8, seed=0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    engine = HybridEngine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no falling back
        run(engine)
    assert engine.modules.why_not_fused is None


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_rounding_that_adds_up_over_many_layers_is_no_fault(kind: type[PretrainedConfig]) -> None:
    engine = HybridEngine(deep(kind).cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no falling back
        run(engine)
    assert engine.modules.why_not_fused is None


def test_the_modules_decode_where_the_step_differs_and_the_engine_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama", torch.bfloat16).cuda()
    layer = model.model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: 1.5 * forward(*args, **kwargs))
    engine = HybridEngine(model)
    with pytest.warns(
        UserWarning, match="decodes module by module, which is right but slower: the fused step's"
    ):
        run(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        run(engine)
