import copy
import math

import pytest
import torch
from torch import nn

from dovetail.errors import CheckpointError, ModelError, TrainingStopped
from dovetail.training import optim
from dovetail.training.optim import Optimizer, build_optimizer
from tests.training.toy import Toy, loss_of, same_bits, toy_batch, weights_of


def backward(model: nn.Module, seed: int = 0) -> None:
    batch = toy_batch(seed)
    loss = loss_of(model, batch)
    (loss.total / batch.num_targets).backward()


def adamw_by_definition(w: float, gradients: list[float], rate: float, decay: float, eps: float) -> float:
    """arXiv:1711.05101, algorithm 2, with betas 0.9 and 0.95; plain Python."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        w -= rate * decay * w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + eps)
    return w


@pytest.mark.parametrize(("shape", "decay"), [((1, 1), 0.1), ((1,), 0.0)])
def test_the_update_is_adamw_and_vectors_do_not_decay(shape: tuple[int, ...], decay: float) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.full(shape, 0.7, dtype=torch.float64))
    optimizer = Optimizer(model, learning_rate=0.01, weight_decay=0.1, eps=1e-5)
    gradients = [0.3, -0.2, 1e-7, 5.0]
    for gradient in gradients:
        model.weight.grad = torch.full(shape, gradient, dtype=torch.float64)
        optimizer.step()
    expected = adamw_by_definition(0.7, gradients, 0.01, decay, 1e-5)
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-12)


def test_norms_biases_and_the_scalar_head_do_not_decay() -> None:
    model = Toy()
    before = weights_of(model)
    optimizer = build_optimizer(model, learning_rate=0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what moves now moves by decay alone
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"embedding.weight", "layer.weight"}
    torch.testing.assert_close(model.layer.weight.detach(), before["layer.weight"] * (1 - 0.5 * 0.1))


def test_the_head_of_an_adapted_reward_model_does_not_decay() -> None:
    assert not optim._decays("base_model.model.score.modules_to_save.default.weight", torch.zeros(1, 8))
    assert optim._decays("model.layers.0.mlp.scores_proj.weight", torch.zeros(1, 8))


def test_frozen_weights_have_no_state_and_do_not_move() -> None:
    model = Toy()
    model.embedding.requires_grad_(False)
    before = weights_of(model)
    optimizer = build_optimizer(model, learning_rate=0.1)
    backward(model)
    optimizer.step()
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert "embedding.weight" not in optimizer.state_dict()["parameters"]


def test_a_weight_without_gradient_stays_with_its_moments() -> None:
    model = Toy()
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    before = weights_of(model)
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"layer.weight"}
    assert float(optimizer.state_dict()["parameters"]["score.weight"]["step"]) == 0


def test_a_model_without_trainable_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="no trainable weights"):
        build_optimizer(Toy().requires_grad_(False), learning_rate=0.1)


def test_tiny_updates_of_bf16_weights_add_up_in_the_masters() -> None:
    model = Toy(dtype=torch.bfloat16)
    start = weights_of(model)
    optimizer = build_optimizer(model, learning_rate=1e-5)
    for _ in range(200):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
            for hook in parameter._post_accumulate_grad_hooks.values():
                hook(parameter)
        optimizer.step()
        optimizer.zero_grad()
    for name, master in optimizer.weights().items():
        assert master.dtype == torch.float32
        # with a constant gradient each AdamW step moves a weight by the learning rate
        torch.testing.assert_close(master, start[name].float() - 200 * 1e-5)
    image = dict(model.named_parameters())["score.weight"]
    assert torch.equal(image, optimizer.weights()["score.weight"].bfloat16())
    assert not torch.equal(image, start["score.weight"])
    big = start["score.weight"].abs() > 0.01
    one_step = start["score.weight"][big] - torch.tensor(1e-5, dtype=torch.bfloat16)
    assert torch.equal(one_step, start["score.weight"][big])  # without masters nothing would have moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_weights_accumulate_in_float32(dtype: torch.dtype) -> None:
    model = Toy(dtype=dtype)
    optimizer = build_optimizer(model, learning_rate=0.1)
    expected: dict[str, torch.Tensor] = {}
    for seed in range(5):
        alone = Toy(dtype=dtype)
        backward(alone, seed)
        for name, parameter in alone.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.float()
        backward(model, seed)
        found = optimizer.gradients()
        # nothing is lost by keeping the only one as it came
        assert {gradient.dtype for gradient in found.values()} == {torch.float32 if seed else dtype}
        torch.testing.assert_close(
            {name: gradient.float() for name, gradient in found.items()}, expected, rtol=0, atol=0
        )
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_scales_the_gradients_in_the_precision_of_the_update(dtype: torch.dtype) -> None:
    one, other = Toy(dtype=dtype), Toy(dtype=dtype)
    first, second = (build_optimizer(model, learning_rate=0.1, eps=1.0) for model in (one, other))
    backward(one)
    first.step(torch.tensor(0.3, dtype=torch.float64))
    backward(other)
    for slot in second._slots.values():
        if slot.has_master:
            slot.master_gradient = slot.master_gradient.float() * 0.3
        else:
            slot.parameter.grad *= 0.3
    second.step()
    assert same_bits(first.weights(), second.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_no_number_leaves_everything_as_it_is(dtype: torch.dtype) -> None:
    model = Toy(dtype=dtype)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    backward(model)
    optimizer.step(torch.tensor(math.nan, dtype=torch.float64))
    assert same_bits(weights_of(model), before)
    for name, saved in optimizer.state_dict()["parameters"].items():
        assert same_bits(saved, state["parameters"][name])


def test_full_precision_weights_are_not_copied() -> None:
    model = Toy()
    optimizer = build_optimizer(model, learning_rate=0.1)
    for name, parameter in model.named_parameters():
        assert optimizer.weights()[name].data_ptr() == parameter.data_ptr()
    assert all("master" not in saved for saved in optimizer.state_dict()["parameters"].values())


def test_a_discarded_optimizer_leaves_the_models_gradients_alone() -> None:
    model = Toy(dtype=torch.bfloat16)
    build_optimizer(model, learning_rate=0.1)  # gone at once
    second = build_optimizer(model, learning_rate=0.1)
    backward(model)
    assert len(second.gradients()) == len(list(model.parameters()))
    del second
    backward(model)
    assert model.layer.weight.grad is not None


def test_the_gradient_norm_is_over_the_whole_model() -> None:
    model = Toy(dtype=torch.float64)
    optimizer = build_optimizer(model, learning_rate=0.1)
    assert float(optimizer.grad_norm()) == 0.0
    backward(model)
    flat = [float(x) for p in model.parameters() for x in p.grad.flatten()]
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(math.fsum(x * x for x in flat)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    one, other = Toy(dtype=dtype), Toy(seed=1, dtype=dtype)
    first = build_optimizer(one, learning_rate=0.01, weight_decay=0.1)
    for seed in range(3):
        backward(one, seed)
        first.step()
        first.zero_grad()
    second = build_optimizer(other, learning_rate=0.5, weight_decay=0.1)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((one, first), (other, second)):
        backward(model, 3)
        optimizer.step()
    assert same_bits(weights_of(one), weights_of(other))
    assert same_bits(first.weights(), second.weights())


def test_the_state_of_a_low_precision_model_brings_its_weights_along() -> None:
    one, other = Toy(dtype=torch.bfloat16), Toy(seed=1, dtype=torch.bfloat16)
    build_optimizer(other, learning_rate=0.1).load_state_dict(
        build_optimizer(one, learning_rate=0.1).state_dict()
    )
    assert same_bits(weights_of(one), weights_of(other))


def test_the_state_of_another_model_is_refused() -> None:
    small, large = Toy(), Toy(width=16)
    state = build_optimizer(small, learning_rate=0.1).state_dict()
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape \(11, 8\)"):
        build_optimizer(large, learning_rate=0.1).load_state_dict(state)
    without_norm = Toy()
    without_norm.norm.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"also trains norm\.bias"):
        build_optimizer(without_norm, learning_rate=0.1).load_state_dict(state)
    partial = build_optimizer(without_norm, learning_rate=0.1).state_dict()
    with pytest.raises(CheckpointError, match=r"no step of norm\.weight"):
        build_optimizer(small, learning_rate=0.1).load_state_dict(partial)


def test_only_fp16_models_have_a_loss_scale() -> None:
    assert build_optimizer(Toy(dtype=torch.float16), learning_rate=0.1).scaler is not None
    assert build_optimizer(Toy(dtype=torch.bfloat16), learning_rate=0.1).scaler is None
    adapted = Toy(dtype=torch.float16)
    adapted.layer.float()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name.startswith("layer"))
    assert build_optimizer(adapted, learning_rate=0.1).scaler is not None


def test_state_that_does_not_fit_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(optim.torch, "zeros_like", full)
    with pytest.raises(TrainingStopped, match="optimiser's state for the 264 trained weights"):
        build_optimizer(Toy(), learning_rate=0.1)


def test_gradients_that_leave_a_device_are_read_when_they_have_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2 on torch 2.11 offloads them so: the copy is ordered, hooks are called, and nobody has waited."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def depart(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        under_way.append((parameter.grad, parameter.grad.clone()))
        parameter.grad.fill_(torch.nan)

    class Stream:
        def synchronize(self) -> None:
            while under_way:
                place, values = under_way.pop()
                place.copy_(values)

    model.weight.register_post_accumulate_grad_hook(depart)
    optimizer = Optimizer(model, learning_rate=0.1)
    monkeypatch.setattr(optim, "is_offloaded", lambda _: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    for _ in range(3):
        (2 * model.weight).sum().backward()
    assert optimizer.gradients()["weight"].tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_updated_in_pieces_are_those_updated_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for num_bytes in (optim.BUCKET_BYTES, 100):
        monkeypatch.setattr(optim, "BUCKET_BYTES", num_bytes)
        model = Toy(dtype=dtype)
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
        for scale in (None, torch.tensor(0.5)):
            for number, parameter in enumerate(model.parameters()):
                (parameter.float() * (number + 1.5)).sum().backward()
            optimizer.step(scale)
            optimizer.zero_grad()
        states.append((weights_of(model), optimizer.weights()))
    for whole, pieces in zip(*states, strict=True):
        assert same_bits(whole, pieces)
