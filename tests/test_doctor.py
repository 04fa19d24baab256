from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medllava import doctor


def test_doctor_tells_every_part_and_exits_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing every optional package takes long; two stand for all.
    monkeypatch.setattr(doctor, "read_requirements", lambda: {"": ["numpy>=1.0"], "gpu": ["not-there>=1.0"]})
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for part in ("python", "numpy", "Devices", "cpu", "H.264 through PyAV", "free at", "Extra gen"):
        assert part in text
    assert "Extra gpu: not complete" in text
    assert "missing not-there" in text


def test_a_broken_package_tells_its_own_error_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    fault = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN2at4')"
    (package / "__init__.py").write_text(f"print('hello')\n{fault}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    found = doctor.check_package("flash-attn>=2.8")
    assert found.state == "broken"
    assert "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN2at4" in found.text
    assert capsys.readouterr().out == ""


def test_versions_outside_the_tested_range_are_told() -> None:
    assert doctor.check_package("numpy>=1.0").state == "ok"
    assert doctor.check_package("numpy<1.0").state == "warn"
    assert doctor.check_package("surely-not-installed>=1").state == "missing"


def test_requirements_of_every_extra_are_read() -> None:
    found = doctor.read_requirements()
    assert any(line.startswith("torch") for line in found[""])
    assert set(doctor.EXTRAS) <= set(found)


def test_h264_round_trip() -> None:
    assert doctor.check_h264().state == "ok"
