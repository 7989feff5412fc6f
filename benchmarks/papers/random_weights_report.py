"""Figures and report of ``random-weights``, from its JSON and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.papers import report
from benchmarks.papers.learners import CLASSES, DESCRIPTIONS
from neuromod_ext import analysis, continual, plotting

Record = dict[str, Any]
TITLES = {
    "rotation": "Rotations by 10°",
    "shift-1px": "Shifts by one pixel",
    "shift-2px": "Shifts by two pixels",
    "augment": "Augmentations",
}
ALIKE = ("original", "blur", "perspective", "erasing")  # T1, T4, T5 and T6


def draw(folder: Path, data: str) -> list[Path]:
    """Draw all that is in a folder; return the paths of what was written.

    Raises:
        Failure: There is nothing to draw, or no JSON of this experiment.
    """
    records = _read(folder, data)
    paths = []
    for name, record in records.items():
        paths += report.save(record, figures(record, TITLES[name]), folder)
    path = folder / f"random-weights-{data}.md"
    path.write_text("\n".join(markdown(records)) + "\n")
    return [*paths, path]


def line(record: Record) -> str:
    """The accuracies in one line."""
    means = (f"{model} {_mean(record, 'average_accuracy', model)}" for model in _models(record))
    return f"% at all tasks, after the last: {', '.join(means)}"


def figures(record: Record, title: str) -> dict[str, Figure]:
    """The figures of a stream."""
    names = record["stream"]["tasks"]
    matrices = {
        model: np.stack([continual.accuracy_matrix(run["matrix"]) for run in _runs(record, model)])
        for model in _models(record)
    }
    drawn = {"learning": plotting.plot_learning(names, matrices, title=f"{title}: what is left")}
    if not record["contexts"]:
        return drawn
    contexts = record["contexts"][0]
    similarity = {f"{k} training": torch.tensor(v) for k, v in contexts["similarity"].items()}
    drawn["similarity"] = plotting.plot_similarity(
        similarity, names, title=f"{title}: similarity of the tasks' contexts"
    )
    if record["stream"]["name"] == "augment":
        after = similarity["after training"]
        drawn["tree"] = plotting.plot_similarity_tree(
            after, analysis.cluster_tasks(after), names, title=f"{title}: contexts after training"
        )
    histograms = {f"{k} training": _histogram(v) for k, v in contexts["histograms"].items()}
    drawn["histograms"] = plotting.plot_similarity_histogram(
        histograms, title=f"{title}: similarity of representations"
    )
    images = contexts["reconstructions"]
    drawn["reconstructions"] = plotting.plot_images(
        images["images"],
        [f"“{digit}”" for digit in images["digits"]],
        images["tasks"],
        title=f"{title}: what the contexts hold of a digit",
    )
    return drawn


def markdown(records: dict[str, Record]) -> Iterator[str]:
    """The report, line by line."""
    first = next(iter(records.values()))
    yield f"# Random weights under contexts: {first['config']['data']}"
    yield ""
    yield "Drawn from the JSON files beside this one. Means over seeds, ± 95 % t-intervals."
    for name, record in records.items():
        yield from ("", f"## {TITLES[name]}", "")
        yield from _accuracies(record)
        if record["contexts"]:
            sentences = [*_contexts(record), *_reconstructions(record)]
            sentences += _clusters(record) if name == "augment" else []
            yield from ("", *(f"- {sentence}" for sentence in sentences))
        yield ""
        yield from (f"![]({report.stem(record)}-{figure}.png)" for figure in _figure_names(record))
    if {"shift-1px", "shift-2px"} <= set(records):
        yield from ("", "## One pixel and two", "")
        yield _shifts(records["shift-1px"], records["shift-2px"])
    yield from ("", "## Machine", "")
    for name, record in records.items():
        yield f"- {TITLES[name]}: {_machine(record)}"


def _accuracies(record: Record) -> Iterator[str]:
    config, tasks = record["config"], record["stream"]["tasks"]
    yield (
        f"{len(tasks)} tasks, seeds: {config['seeds']}, epochs a task: {config['epochs']}. "
        "Accuracy: at all tasks after the last. Forgetting: from a task's best moment to the end. "
        "Changed: earlier tasks of which any logit was another, to the bit, after a later task."
    )
    yield ""
    yield "| model | parameters a task | accuracy % | forgetting | changed | s a task |"
    yield "|---|---:|---:|---:|---:|---:|"
    for model in _models(record):
        runs = _runs(record, model)
        timed = [r["seconds_by_task"] for r in record["timing"]["runs"] if r["model"] == model]
        cells = (
            f"{DESCRIPTIONS[model]} (`{model}`)",
            f"{runs[0]['parameters_per_task']:,.0f}",
            f"{_mean(record, 'average_accuracy', model)}",
            f"{_mean(record, 'forgetting', model)}",
            f"{max(max(run['tasks_changed_later']) for run in runs)}",
            f"{np.mean(timed):.2f}",
        )
        yield f"| {' | '.join(cells)} |"


def _contexts(record: Record) -> Iterator[str]:
    found = record["contexts"]
    for when in ("before", "after"):
        share = np.mean([100 * c["neighbour_share"][when] for c in found])
        if record["stream"]["name"] != "augment":  # whose tasks stand in no order
            yield (
                f"{when} training, {share:.0f} % of the tasks have a neighbour in the order as "
                "their most similar task"
            )
        scores = [c["t_gsh"][when] for c in found]
        mean = {key: np.mean([score[key] for score in scores]) for key in scores[0]}
        apart = found[0]["histograms"][when]["separation"]
        yield (
            f"{when} training, points of one task and two classes have a mean similarity of "
            f"{mean['intra']:.3f}, of one class and two tasks {mean['inter']:.3f}; T-GSH score "
            f"{mean['score']:+.3f} ± {mean['half_width']:.3f} over tasks (p at most "
            f"{max(score['p_value'] for score in scores):.2g}); the first pair is the more similar "
            f"one with probability {apart:.3f}"
        )


def _reconstructions(record: Record) -> Iterator[str]:
    images, tasks = record["contexts"][0]["reconstructions"], len(record["stream"]["tasks"])
    yield (
        f"of the inputs reconstructed from contexts, {100 * images['class_found']:.0f} % match the "
        f"mean image of their own class best (by chance {100 / CLASSES:.0f} %), "
        f"{100 * images['task_found']:.0f} % that of their own task ({100 / tasks:.0f} %)"
    )


def _clusters(record: Record) -> Iterator[str]:
    names = record["stream"]["tasks"]
    alike = {names.index(name) for name in ALIKE if name in names}
    for seed, contexts in enumerate(record["contexts"]):
        similarity = torch.tensor(contexts["similarity"]["after"])
        tree = analysis.cluster_tasks(similarity)
        cuts = (tree.groups(count) for count in range(len(names), 0, -1))
        finest = next(groups for groups in cuts if any(alike <= {*group} for group in groups))
        shown = "; ".join(", ".join(names[t] for t in group) for group in finest)
        yield f"seed {seed}, the finest groups with {', '.join(ALIKE)} in one: {shown}"
        if "invert" in names:
            others = similarity[names.index("invert")].clone()
            others[names.index("invert")] = -torch.inf
            nearest = names[int(others.argmax())]
            yield f"seed {seed}, next to the inverted images: {nearest}, {float(others.max()):+.3f}"


def _shifts(one: Record, two: Record) -> str:
    """Whether the matrix of two pixels is every second row and column of that of one."""
    found = []
    for fine, coarse in zip(one["contexts"], two["contexts"], strict=False):
        every_second = torch.tensor(fine["similarity"]["after"])[::2, ::2]
        matrix = torch.tensor(coarse["similarity"]["after"])
        common = min(len(every_second), len(matrix))
        if common >= 3:
            found.append(
                analysis.mantel_test(every_second[:common, :common], matrix[:common, :common])
            )
    shown = ", ".join(f"{test.correlation:.3f} (p = {test.p_value:.2g})" for test in found)
    return (
        "Correlation of the contexts' similarities after training, of two pixels and of every "
        f"second task of one pixel, by seed (Mantel's test): {shown or 'too few tasks'}."
    )


def _machine(record: Record) -> str:
    env = record["environment"]
    text = (
        f"{env['cpu']}, threads: {env['threads']}; torch {env['torch']}, neuromod_ext "
        f"{env['neuromod_ext']} at {env['commit'] or 'no commit'}, {env['date']}"
    )
    step = record["timing"].get("step")
    if step is None:
        return text
    library, dense = (1000 * step["seconds"][name] for name in ("library", "dense"))
    return (
        f"{text}; a training step of {step['batch_size']} images takes {library:.3g} ms, in dense "
        f"code {dense:.3g} ms, {step['dense_over_library']:.1f} times as long"
    )


def _read(folder: Path, data: str) -> dict[str, Record]:
    records = {}
    for name in TITLES:
        path = folder / f"random-weights-{name}-{data}.json"
        if path.exists():
            try:
                records[name] = json.loads(path.read_text())
            except ValueError as error:
                raise report.Failure(f"--draw: expected JSON in {path}, got {error}") from error
    if not records:
        raise report.Failure(
            f"--draw: expected random-weights-…-{data}.json in {folder}, got none; run without it"
        )
    return records


def _models(record: Record) -> list[str]:
    return list(dict.fromkeys(run["model"] for run in record["runs"]))


def _runs(record: Record, model: str) -> list[Record]:
    return [run for run in record["runs"] if run["model"] == model]


def _mean(record: Record, key: str, model: str) -> report.Interval:
    return report.interval([run[key] for run in _runs(record, model)])


def _histogram(counts: Record) -> analysis.SimilarityHistogram:
    values: dict[str, Tensor] = {k: torch.tensor(counts[k]) for k in ("edges", "intra", "inter")}
    return analysis.SimilarityHistogram(**values)


def _figure_names(record: Record) -> list[str]:
    if not record["contexts"]:
        return ["learning"]
    tree = ["tree"] if record["stream"]["name"] == "augment" else []
    return ["learning", "similarity", *tree, "histograms", "reconstructions"]
