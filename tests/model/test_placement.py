import pytest
import torch

from dovetail.errors import ConfigError
from dovetail.model.placement import resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_auto_is_the_cpu_in_float32_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    assert resolve_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_the_first_gpu_in_the_precision_it_computes_in(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    device = resolve_device("auto")
    assert device == torch.device("cuda", 0)
    assert resolve_dtype("auto", device) == dtype


def test_a_named_precision_is_taken_as_it_is() -> None:
    found = [resolve_dtype(name, CPU) for name in ("bf16", "fp16", "fp32")]
    assert found == [torch.bfloat16, torch.float16, torch.float32]


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        resolve_device("gpu")
    for other in ("mps", "xpu:0", "meta"):
        with pytest.raises(ConfigError, match=f"device = '{other}': Dovetail runs on .* not on {other[:3]}"):
            resolve_device(other)


def test_a_gpu_beyond_the_last_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="'cuda:2', but this machine has 2 GPUs"):
        resolve_device("cuda:2")
