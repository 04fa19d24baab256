"""The deployment files start commands that exist, with flags that they take."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medllava.serve import web, worker

PARSERS = {"medllava.serve.worker": worker.parser, "medllava.serve.web": web.parser}


def parsed(words: list[str]) -> dict[str, object]:
    module, *flags = words
    return vars(PARSERS[module]().parse_args(flags))


def test_the_compose_file(repository: Path) -> None:
    services = yaml.safe_load((repository / "serve" / "compose.yaml").read_text())["services"]
    for service in services.values():
        told = parsed(service["command"])
        mounted = [volume.rsplit(":", 2)[1] for volume in service["volumes"]]
        files = [str(told[name]) for name in ("api_key_file", "auth_file") if told.get(name)]
        models = told["model_path"] or []
        assert isinstance(models, list) and set(mounted) == {*files, *models}
        assert service["read_only"] and "/tmp" in service["tmpfs"]
        build = service["build"]
        assert (repository / "serve" / build["context"] / build["dockerfile"]).is_file()
    # Nobody but this machine, and a password for those who are let in.
    assert all(port.startswith("127.0.0.1:") for port in services["web"]["ports"]) and "ports" not in services["worker"]


def test_the_dockerfile(repository: Path) -> None:
    lines = (repository / "serve" / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((repository / source).exists() for source in line.split()[1:-1])
    assert any(line.startswith("USER ") and "root" not in line for line in lines)
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    project = (repository / "pyproject.toml").read_text()
    assert all(re.search(rf"(?m)^{extra} = \[", project) for extra in extras)


def test_the_vllm_replicas_name_the_model_by_place(repository: Path) -> None:
    """The image runs ``vllm serve``, whose ``--model`` is going away."""
    services = yaml.safe_load((repository / "serve" / "replicas.yaml").read_text())["services"]
    named = re.findall(r"server (\w+):8000", (repository / "serve" / "nginx.conf").read_text())
    assert named == [name for name in services if name.startswith("vllm")]
    for name in named:
        assert services[name]["command"][0] == "/model" and "--model" not in services[name]["command"]


def test_the_systemd_unit(repository: Path, tmp_path: Path) -> None:
    text = (repository / "serve" / "medllava-worker.service").read_text()
    (command,) = re.findall(r"ExecStart=((?:.*\\\n)*.*)", text)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[1] == "-m" and parsed(words[2:])["log_json"]
    # A key file that only root can read: the service's own user cannot open it.
    (credential,) = re.findall(r"LoadCredential=(\w+):", text)
    assert f"${{CREDENTIALS_DIRECTORY}}/{credential}" in words
    drain, stop = parsed(words[2:])["drain_s"], re.findall(r"TimeoutStopSec=(\d+)", text)
    assert isinstance(drain, int) and int(stop[0]) > drain
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "medllava-worker.service"
    unit.write_text(text.replace(words[0], sys.executable))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
