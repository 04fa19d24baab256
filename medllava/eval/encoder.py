"""Figures of an image-text encoder (CLIP or SigLIP folder), each with a 95 % interval and what chance would give.

zero-shot     classes are told by their names in sentences: accuracy, balanced accuracy
linear-probe  a logistic regression on the frozen encoder's pictures: accuracy, balanced accuracy
retrieval     is the right text (picture) among the 1, 10, 50 nearest: recall, both ways

Classes are folders of pictures, one for each class; pairs are what stage contrastive trains on: a LLaVA JSON file with
--images, a folder with metadata.jsonl, or WebDataset shards. --benchmark NAME reads a published data set (or your own
folders) as eval/benchmarks/encoder/NAME.yaml says and gives all three.

Examples:
  python -m medllava.eval encoder --model-path my-clip --benchmark nct_crc_he --images data/nct --out nct.json
  python -m medllava.eval encoder --model-path my-clip --task zero-shot --data tissue/test --out zero-shot.json
  python -m medllava.eval encoder --model-path my-clip --task linear-probe --train tissue/train --data tissue/test
  python -m medllava.eval encoder --model-path my-clip --task retrieval --data shards
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medllava.errors import ConfigError, DataError

if TYPE_CHECKING:
    from medllava.model.embeddings import ImageTextEncoder
    from medllava.model.image_text import ImageText

HELP = "zero-shot, linear-probe and retrieval figures of an image-text encoder"

TASKS = ("zero-shot", "linear-probe", "retrieval")
TEMPLATES = (
    "{}.", "a histopathology image of {}.", "a photomicrograph showing {}.", "an H&E image of {}.",
    "there is {} in this tissue.",
)
"""Sentences that a class's name is put into, unless --prompts gives others."""
NEAREST = (1, 10, 50)
STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""Values of scikit-learn's ``C`` that the linear probe chooses from, on a fifth of the training pictures."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Figure:
    """A mean over ``n`` with its 95 % interval (bootstrap over groups), and what ``chance`` would give."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    chance: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", type=Path, required=True, help="folder of a CLIP or SigLIP model")
    parser.add_argument("--benchmark", help="name in eval/benchmarks/encoder, or path of a YAML definition")
    parser.add_argument("--task", choices=TASKS, help="default with --benchmark: all of them")
    parser.add_argument("--data", type=Path, help="folder of classes (a folder each), or pairs")
    parser.add_argument(
        "--images", type=Path, help="folder of the benchmark, or that image names in a LLaVA JSON file start from"
    )
    parser.add_argument("--train", type=Path, help="linear-probe: folder of classes to learn from")
    parser.add_argument("--prompts", type=Path, help="zero-shot: YAML with 'templates' and 'names' (folder: [names])")
    parser.add_argument("--kinds", default="caption", help="retrieval: kinds of LLaVA samples (default: %(default)s)")
    parser.add_argument(
        "--group-pattern", help="regular expression whose first group finds the case in a picture's name; intervals"
        " resample whole cases (default: each picture, or its video, is one)",
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures or texts at once (default %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the probe's split; default 0")


def run(arguments: argparse.Namespace) -> int:
    from medllava.eval.encoder_sets import groups_of
    from medllava.eval.provenance import command, folder_hash
    from medllava.jsonl import write_json
    from medllava.model.embeddings import load_encoder
    from medllava.model.image_text import data_sha256, read_classes, read_image_texts
    from medllava.model.manifest import current_versions, now

    if arguments.benchmark:
        return _run_benchmark(arguments)
    if arguments.task is None or arguments.data is None:
        raise ConfigError("give --benchmark NAME and --images FOLDER, or --task and --data")
    if arguments.task == "linear-probe" and arguments.train is None:
        raise ConfigError("--task linear-probe needs --train FOLDER of classes to learn from")
    retrieval = arguments.task == "retrieval"
    pairs = (
        read_image_texts(arguments.data, arguments.images, tuple(arguments.kinds.split(",")))
        if retrieval else read_classes(arguments.data)
    )
    groups = groups_of(pairs, arguments.group_pattern)
    encoder = load_encoder(arguments.model_path, device=arguments.device)
    size, seed = arguments.batch_size, arguments.seed
    facts: dict[str, Any] = {}
    if retrieval:
        figures = retrieve(encoder, pairs, groups, batch_size=size, seed=seed)
    elif arguments.task == "zero-shot":
        templates, names = _prompts(arguments.prompts, sorted({pair.texts[0] for pair in pairs}))
        facts = {"templates": templates, "names": names}
        figures = zero_shot(encoder, pairs, groups, templates, names, batch_size=size, seed=seed)
    else:
        figures, facts["C"] = linear_probe(
            encoder, read_classes(arguments.train), pairs, groups, batch_size=size, seed=seed
        )
    print(as_text(figures))
    if arguments.out:
        write_json(arguments.out, {
            "task": arguments.task, "figures": {name: asdict(figure) for name, figure in figures.items()}, **facts,
            "model": str(arguments.model_path), "model_sha256": folder_hash(arguments.model_path),
            "data": str(arguments.data), "data_sha256": data_sha256(arguments.data), "pictures": len(pairs),
            "groups": len(set(groups)), "seed": seed, "command": command("encoder"), "versions": current_versions(),
            "at": now(),
        })
    return 0


def _run_benchmark(arguments: argparse.Namespace) -> int:
    from medllava.eval.encoder_sets import groups_of, load_set, names_of, read_set
    from medllava.eval.provenance import command, folder_hash
    from medllava.jsonl import write_json
    from medllava.model.embeddings import load_encoder
    from medllava.model.manifest import current_versions, now

    if arguments.images is None or arguments.data or arguments.train or arguments.prompts:
        raise ConfigError("--benchmark needs --images FOLDER, and none of --data, --train and --prompts")
    definition = load_set(arguments.benchmark)
    pattern = arguments.group_pattern or definition.group_pattern
    found = read_set(definition, arguments.images, pattern)
    groups = groups_of(found.test, pattern)
    names = names_of(definition, found.test)
    templates = definition.templates or list(TEMPLATES)
    told = f"{definition.name}: {len(found.train):,} pictures to learn from, {len(found.test):,} to test on"
    print(f"{told}, {len(names)} classes, {len(set(groups)):,} groups; read from {found.layout}")
    encoder = load_encoder(arguments.model_path, device=arguments.device)
    common: dict[str, int] = {"batch_size": arguments.batch_size, "seed": arguments.seed}
    tasks: dict[str, dict[str, Figure]] = {}
    facts: dict[str, Any] = {}
    for task in (arguments.task,) if arguments.task else TASKS:
        if task == "zero-shot":
            tasks[task] = zero_shot(encoder, found.test, groups, templates, names, **common)
        elif task == "linear-probe":
            tasks[task], facts["C"] = linear_probe(encoder, found.train, found.test, groups, **common)
        else:
            # The text of a picture is a sentence with its class's first name: any picture of the class is right.
            said = [
                replace(pair, texts=[templates[-1].format(names[pair.texts[0]][0])]) for pair in found.test
            ]
            tasks[task] = retrieve(encoder, said, groups, **common)
        print(f"\n{task}\n{as_text(tasks[task])}")
    if arguments.out:
        write_json(arguments.out, {
            "benchmark": definition.model_dump(mode="json"), "data": f"{told}; read from {found.layout}",
            "tasks": {task: {name: asdict(each) for name, each in figures.items()} for task, figures in tasks.items()},
            "templates": templates, "names": names, **facts, "images": str(arguments.images),
            "model": str(arguments.model_path), "model_sha256": folder_hash(arguments.model_path),
            "groups": len(set(groups)), "seed": arguments.seed, "command": command("encoder"),
            "versions": current_versions(), "at": now(),
        })
    return 0


def zero_shot(
    encoder: ImageTextEncoder, pairs: Sequence[ImageText], groups: Sequence[str], templates: Sequence[str],
    names: dict[str, list[str]], *, batch_size: int = 64, seed: int = 0,
) -> dict[str, Figure]:
    """The class whose sentences' mean direction is nearest (Radford et al. 2021, section 3.1.4). ``names``: of each
    class."""
    classes = sorted(names)
    meant = np.stack([
        encoder.embed_texts([template.format(name) for name in names[each] for template in templates]).mean(0).numpy()
        for each in classes
    ])
    meant /= np.linalg.norm(meant, axis=1, keepdims=True)
    seen = _embed(encoder.embed_images, pairs, batch_size)
    chosen = [classes[index] for index in (seen @ meant.T).argmax(1)]
    return _accuracy(chosen, [pair.texts[0] for pair in pairs], groups, seed)


def linear_probe(
    encoder: ImageTextEncoder, training: Sequence[ImageText], pairs: Sequence[ImageText], groups: Sequence[str], *,
    batch_size: int = 64, seed: int = 0,
) -> tuple[dict[str, Figure], float]:
    """Logistic regression (L2) on standardised features; its strength is chosen on a fifth of ``training``. Returns
    the figures on ``pairs``, and the strength. Raises DataError if the classes or pictures of both do not go together.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    wanted, known = [pair.texts[0] for pair in pairs], [pair.texts[0] for pair in training]
    if strange := sorted(set(wanted) - set(known)):
        raise DataError(f"no pictures of class {strange[0]!r} to learn from, which is tested")
    if few := [name for name, count in Counter(known).items() if count < 5]:
        raise DataError(f"fewer than 5 pictures of class {few[0]!r} to learn from")
    both = {pair.where[0].resolve() for pair in training} & {pair.where[0].resolve() for pair in pairs}
    if both:
        raise DataError(f"{len(both)} pictures are learnt from and tested ({sorted(both)[0]}); hold them apart")
    features = _embed(encoder.pool_images, training, batch_size)

    def fitted(rows: NDArray[Any], labels: Sequence[str], strength: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(rows, labels)

    learn, check = train_test_split(
        np.arange(len(known)), test_size=max(0.2, len(set(known)) / len(known)), random_state=seed, stratify=known
    )
    labels = np.asarray(known)
    scores = [
        fitted(features[learn], labels[learn], strength).score(features[check], labels[check]) for strength in STRENGTHS
    ]
    best = STRENGTHS[int(np.argmax(scores))]  # the smallest of the best: the stiffest
    model = fitted(features, known, best)
    chosen = [str(name) for name in model.predict(_embed(encoder.pool_images, pairs, batch_size))]
    return _accuracy(chosen, wanted, groups, seed), best


def retrieve(
    encoder: ImageTextEncoder, pairs: Sequence[ImageText], groups: Sequence[str], *, batch_size: int = 64, seed: int = 0
) -> dict[str, Figure]:
    """Recall at 1, 10, 50 among all texts (pictures) of ``pairs``. Equal texts are one; any right one counts."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.texts))
    number = {text: index for index, text in enumerate(texts)}
    right = np.zeros((len(pairs), len(texts)), bool)
    for row, pair in enumerate(pairs):
        right[row, [number[text] for text in pair.texts]] = True
    told = np.concatenate([
        encoder.embed_texts(texts[start : start + batch_size]).numpy() for start in range(0, len(texts), batch_size)
    ])
    likeness = _embed(encoder.embed_images, pairs, batch_size) @ told.T
    # A text is resampled with the pictures that it was said of first.
    text_groups = [groups[int(right[:, column].argmax())] for column in range(len(texts))]
    figures: dict[str, Figure] = {}
    for name, scores, hits, units in (
        ("image_to_text", likeness, right, list(groups)), ("text_to_image", likeness.T, right.T, text_groups),
    ):
        for nearest in NEAREST:
            if nearest < scores.shape[1]:
                found = _found(scores, hits, nearest)
                figures[f"{name}_recall_at_{nearest}"] = _figure(found, units, _by_chance(hits, nearest), seed=seed)
    return figures


def as_text(figures: dict[str, Figure]) -> str:
    """A table."""
    lines = [f"{'figure':<28}{'value':>8}  {'95 % interval':<18}{'n':>7}{'chance':>9}"]
    for name, figure in figures.items():
        value = "" if figure.value is None else f"{figure.value:.3f}"
        interval = "" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}"
        lines.append(f"{name:<28}{value:>8}  {interval:<18}{figure.n:>7}{figure.chance:>9.3f}")
    return "\n".join(lines)


def _embed(embed: Callable[[list[Any]], Any], pairs: Sequence[ImageText], batch_size: int) -> Vectors:
    from tqdm import tqdm

    made = [
        embed([pair.load() for pair in pairs[start : start + batch_size]]).numpy()
        for start in tqdm(range(0, len(pairs), batch_size), desc="embed images", unit="batch", mininterval=0.5)
    ]
    return np.concatenate(made)


def _accuracy(
    chosen: Sequence[str], wanted: Sequence[str], groups: Sequence[str], seed: int
) -> dict[str, Figure]:
    right = [float(one == other) for one, other in zip(chosen, wanted, strict=True)]
    counts = Counter(wanted)
    # Without looking, the commonest class is right most often; balanced, each class counts alike.
    constant = max(counts.values()) / len(wanted)
    return {
        "accuracy": _figure(right, groups, constant, seed=seed),
        "balanced_accuracy": _figure(right, groups, 1 / len(counts), strata=wanted, seed=seed),
    }


def _figure(
    scores: Sequence[float], groups: Sequence[str], chance: float, *, strata: Sequence[str] = (), seed: int
) -> Figure:
    from medllava.eval.metrics import bounded, estimate

    found = bounded(scores, groups, estimate(scores, groups, strata, seed=seed))
    return Figure(found.value, found.low, found.high, len(scores), chance)


def _found(scores: Vectors, right: NDArray[np.bool_], nearest: int) -> list[float]:
    """1 for each row in which a right column is among the ``nearest`` best, else 0. Ties count as worse."""
    best_right = np.where(right, scores, -np.inf).max(1, keepdims=True)
    before = (np.where(right, -np.inf, scores) >= best_right).sum(1)
    return [float(rank < nearest) for rank in before]


def _by_chance(right: NDArray[np.bool_], nearest: int) -> float:
    """Mean probability that a random order puts a right column among the first ``nearest``."""
    rows, total = right.shape
    missed: float = sum(
        times * (math.comb(total - int(count), nearest) / math.comb(total, nearest))
        for count, times in Counter(right.sum(1).tolist()).items()
    )
    return 1.0 - missed / float(rows)


def _prompts(path: Path | None, classes: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(templates, names of each class). Raises ConfigError."""
    names = {name: [name.replace("_", " ")] for name in classes}
    if path is None:
        return list(TEMPLATES), names
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        templates = [str(text) for text in given.get("templates", TEMPLATES)]
        own = {str(name): [str(text) for text in texts] for name, texts in given.get("names", {}).items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: expected YAML with 'templates' and 'names' ({error})") from error
    if wrong := next((text for text in templates if text.count("{}") != 1), None):
        raise ConfigError(f"{path}: template {wrong!r} needs one {{}} for the class's name")
    if strange := sorted(own.keys() - names.keys()):
        raise ConfigError(f"{path}: names of {strange[0]!r}, but --data has no such class: {', '.join(classes)}")
    return templates, names | own
