"""What is installed, what importing costs, and that every command explains itself at once."""

from __future__ import annotations

import os
import pkgutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import medllava
from medllava.__main__ import COMMANDS, main
from medllava.doctor import read_requirements
from medllava.model import TRANSFORMERS

FOLDERS = ("instruct_gen", "train", "serve", "eval")
"""Where a person runs and edits a stage; none of it is code."""

STEPS = {
    "instruct_gen": ("narrate", "correct", "generate", "card", "check", "export"),
    "train": ("preview",),
    "model": ("inspect", "merge", "export", "convert", "assemble", "tiny"),
    "eval": ("fetch", "answer", "score", "judge", "report", "rescore", "compare", "encoder", "harness"),
}


def test_the_wheel_holds_the_package_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(repository)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"medllava", f"medllava-{medllava.__version__}.dist-info"}
    modules = {path.relative_to(repository).as_posix() for path in (repository / "medllava").rglob("*.py")}
    assert modules <= set(names)
    # What the web chat is made of: without one of these it starts and shows nothing.
    serve = repository / "medllava" / "serve"
    parts = [path for kind in ("*.html", "*.css", "*.js", "vendor/*") for path in serve.glob(kind)]
    assert len(parts) >= 14
    assert {path.relative_to(repository).as_posix() for path in parts} <= set(names)


def test_folders_of_recipes_hold_no_code(repository: Path) -> None:
    for name in FOLDERS:
        assert (repository / name / "README.md").is_file()
        assert list((repository / name).rglob("*.py")) == []


COMMAND_LINES = [
    [], *([name] for name in COMMANDS), *([name, step] for name, steps in STEPS.items() for step in steps),
]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_help_comes_at_once_and_has_an_example(
    words: list[str], repository: Path, seconds_of_children: Callable[[], float]
) -> None:
    seconds = []
    for _ in range(3):
        began = seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-m", "medllava", *words, "--help"], cwd=repository, capture_output=True, text=True,
            check=False,
        )
        seconds.append(seconds_of_children() - began)
        assert (done.returncode, done.stderr) == (0, "")
    assert statistics.median(seconds) < 1
    # A line that a person can copy, beyond the usage line that argparse makes.
    name = " ".join(words)
    forms = {f"medllava {name}".strip(), f"python -m medllava.{name}"}
    if words[:1] == ["demo"]:
        forms.add("make demo")
    body = done.stdout.partition("\n\n")[2] if words else done.stdout
    assert any(form in body for form in forms), done.stdout


@pytest.mark.parametrize(("word", "hint"), [
    ("evl", "did you mean eval?"), ("serve", "did you mean serve.cli or serve.worker or serve.web?"),
    ("zzz", "choose one of: demo, doctor, phantom,"),
])
def test_a_misspelt_command_is_told_what_was_meant(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert hint in capsys.readouterr().err


def test_make_alone_explains_itself(repository: Path) -> None:
    # As a person types it, not as a part of the make that runs the tests.
    clean = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make"], cwd=repository, env=clean, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["demo", "test", "check", "bench"]


def test_no_module_takes_cuda_for_granted(repository: Path) -> None:
    """Devices are chosen in one place, and everything goes to the one that was chosen."""
    modules = (repository / "medllava").rglob("*.py")
    assert [path.name for path in modules if ".cuda()" in path.read_text(encoding="utf-8")] == []


def test_help_loads_nothing_heavy(repository: Path) -> None:
    """What makes ``--help`` quick on any machine."""
    script = (
        "import contextlib, sys\nfrom medllava.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main([*sys.argv[1:], '--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'gradio', 'openai', 'fastapi', 'uvicorn', 'sklearn',"
        " 'scipy', 'pandas', 'matplotlib', 'cv2', 'av', 'ray', 'openslide', 'pyarrow', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    for words in COMMAND_LINES:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=repository, capture_output=True, text=True, check=False
        )
        assert (words, done.stderr, done.returncode) == (words, "", 0)


def test_importing_the_package_takes_no_time(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import medllava"], cwd=repository, capture_output=True, text=True,
        check=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.endswith("| medllava")]
    assert int(line.split("|")[1]) < 100_000  # microseconds


@pytest.mark.parametrize("words", [["phantom"], ["serve.cli"], ["eval", "answer"], ["train"]], ids=" ".join)
def test_both_forms_of_a_command_are_the_same(words: list[str], repository: Path) -> None:
    shown = [
        subprocess.run(
            [sys.executable, "-m", module, *rest, "--help"], cwd=repository, capture_output=True, text=True, check=True
        ).stdout
        for module, rest in (("medllava", words), (f"medllava.{words[0]}", words[1:]))
    ]
    assert shown[0] == shown[1]


def test_every_module_can_be_imported(repository: Path) -> None:
    names = [module.name for module in pkgutil.walk_packages(medllava.__path__, "medllava.")]
    assert len(names) > 80
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_version_of_transformers_that_is_not_supported_is_told_in_one_line(repository: Path, tmp_path: Path) -> None:
    (line,) = [line for line in read_requirements()[""] if line.startswith("transformers")]
    assert SpecifierSet(line.removeprefix("transformers")) == TRANSFORMERS
    (tmp_path / "transformers-4.37.2.dist-info").mkdir()
    (tmp_path / "transformers-4.37.2.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.37.2\n")
    said = []
    for path in ([str(tmp_path)], []):
        script = f"import sys; sys.path[:0] = {path!r}; import medllava.model"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
        )
        said.append(done.stderr)
    assert said[0].startswith("transformers 4.37.2 is not supported; mend it with: pip install 'transformers")
    assert (said[0].count("\n"), said[1]) == (1, "")


@pytest.mark.parametrize("package", ["medllava", "llm", "instruct_gen", "phantom", "serve.web", "serve.client", "demo"])
def test_what_needs_no_torch_imports_none(package: str, repository: Path) -> None:
    name = "medllava" if package == "medllava" else f"medllava.{package}"
    folder = repository / Path(*name.split("."))
    own = [name]
    if package != "medllava" and folder.is_dir():
        own += [module.name for module in pkgutil.iter_modules([str(folder)], f"{name}.")]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'accelerate'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script, *own], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
