"""State that waits in host memory comes back bit for bit, and references to it stay good."""

import pytest
import torch

from dovetail.training.offload import OffloadableTensors
from dovetail.training.optim import Ema, build_optimizer
from tests.training.toy import Toy, loss_of, same_bits, toy_batch, weights_of

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


def train(model: Toy, device: str, *, offload: bool) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """Three steps, with everything offloaded in between or not: weights, and both states."""
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    ema = Ema(model, decay=0.9, optimizer=optimizer)
    for step in range(3):
        if offload:
            optimizer.offload(), ema.offload()
            ema.restore(), optimizer.restore()
        batch = toy_batch(step).to(torch.device(device))
        (loss_of(model, batch).total / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return weights_of(model), optimizer.state_dict(), ema.state_dict()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_pauses_in_host_memory_ends_with_the_same_bits(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    model = Toy().to(device=device, dtype=dtype)
    other = Toy().to(device=device, dtype=dtype)
    other.load_state_dict(model.state_dict())
    plain, offloaded = train(model, device, offload=False), train(other, device, offload=True)
    assert same_bits(plain[0], offloaded[0])
    for name, state in plain[1]["parameters"].items():
        assert same_bits(state, offloaded[1]["parameters"][name])
    assert same_bits(plain[2]["averages"], offloaded[2]["averages"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_parked_tensor_is_the_same_object_elsewhere(device: str) -> None:
    tensor = torch.arange(5.0, device=device)
    values, place = tensor.tolist(), tensor.data_ptr()
    space = OffloadableTensors([tensor])
    space.offload()
    assert (tensor.device.type, tensor.is_pinned()) == ("cpu", device == "cuda")
    assert tensor.data_ptr() != place
    assert tensor.tolist() == values
    space.restore()
    assert tensor.device.type == device
    assert tensor.tolist() == values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_parking_frees_the_memory_of_the_device() -> None:
    tensor = torch.zeros(2**20, device="cuda")
    space, before = OffloadableTensors([tensor]), torch.cuda.memory_allocated()
    space.offload()
    assert torch.cuda.memory_allocated() == before - 4 * 2**20
    space.restore()
    assert torch.cuda.memory_allocated() == before


def test_nothing_learns_while_it_is_parked() -> None:
    optimizer = build_optimizer(Toy(), learning_rate=0.1)
    ema = Ema(Toy(), decay=0.9)
    optimizer.offload()
    ema.offload()
    with pytest.raises(AssertionError, match="offloaded"):
        optimizer.step()
    with pytest.raises(AssertionError, match="offloaded"):
        ema.update()
