"""GPU energy: NVML's own names, joules from its counter, nothing where nobody counts."""

import sys
from types import SimpleNamespace

import pytest
import torch

from cmt_mae.engine.energy import GpuEnergy

pynvml = pytest.importorskip("pynvml", reason="needs the package nvidia-ml-py")


def test_no_gpu_no_energy() -> None:
    assert GpuEnergy(torch.device("cpu")).read() is None


def counting(monkeypatch: pytest.MonkeyPatch, millijoules: list[int]) -> list[str]:
    """NVML answers with these counts; returns the GPUs that were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle"
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: millijoules.pop(0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234-abcd")
    )
    return asked


def test_joules_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names patched are those of the real package; a driver that starts anew gives no number."""
    asked = counting(monkeypatch, [5_000, 7_500, 7_500, 100, 600])
    energy = GpuEnergy(torch.device("cuda"))
    assert [energy.read() for _ in range(4)] == [2.5, 0.0, None, 0.5]
    assert asked == ["GPU-1234-abcd"]


def test_without_driver_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    counting(monkeypatch, [])
    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert GpuEnergy(torch.device("cuda")).read() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuEnergy(torch.device("cuda")).read() is None
