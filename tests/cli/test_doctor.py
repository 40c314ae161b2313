import importlib.metadata
import shutil
import sys
from types import SimpleNamespace

import pytest
import typer

from dovetail.cli import doctor


def test_what_is_installed_is_listed_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    out = capsys.readouterr().out
    assert f"ok      torch {importlib.metadata.version('torch')}" in out
    assert "MISSING" not in out


def test_what_is_missing_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("peft", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(typer.Exit) as stopped:
        doctor.doctor()
    assert stopped.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("MISSING peft is not installed") + 1].strip().startswith("pip install peft")
    assert "wandb" in lines[lines.index("without wandb is not installed") + 1]


def test_it_works_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert list(doctor.devices()) == []


def test_a_gpu_is_named_with_its_memory_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: SimpleNamespace(name="Card 80", total_memory=80 * 2**30),
        is_bf16_supported=lambda: False,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert [finding.what for finding in doctor.devices()] == [
        "cuda:0 Card 80, 80 GiB, trains in fp16 with loss scaling"
    ]


def test_a_full_disk_is_told_but_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    disk = next(iter(doctor.surroundings()))
    assert (disk.ok, disk.needed) == (False, False)
    assert disk.what.startswith("1 GB free")
