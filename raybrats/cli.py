"""The verbs of the command line, nothing else: parse, call, print.

    raybrats train tiny --data.cohort s3://bucket/BraTS2020

Tables and progress on a terminal; with --json one JSON document on stdout and nothing else there.
Each verb parses its words before it imports what it calls, so that help and typos cost nothing.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, TextIO

from raybrats.arguments import (
    Demo,
    Evaluate,
    Index,
    Models,
    Phantom,
    Predict,
    Report,
    Tune,
    config_of,
    parse,
    parse_known,
)
from raybrats.errors import DataError, RaybratsError, UsageError

REGION_COLUMNS = ("WT", "TC", "ET", "mean")


@dataclass(frozen=True)
class Answer:
    """What a verb found: the JSON document, and the same as a table."""

    document: Mapping[str, Any]
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def demo(args: Sequence[str]) -> Answer:
    """Run the whole line on phantoms: index, train, register, predict, evaluate, report."""
    o = parse(Demo, "demo", args)
    from raybrats.demo import run_demo

    document = run_demo(o.out)
    scores, model = document["evaluate"]["mean"], document["train"]["model"]
    rows = [[name, *(_figure(v) for v in scores[name].values())] for name in REGION_COLUMNS]
    title = (
        f"registered:  models:/{model['name']}/{model['version']} is {model['alias']}\n"
        f"predictions: {document['predictions']}\n"
        f"report:      {document['report']}\n"
        f"scores on {document['predict']['cases']} held-out cases:"
    )
    return Answer(document, title, ("region", *scores["mean"]), rows)


def phantom(args: Sequence[str]) -> Answer:
    """Write a synthetic cohort in the tree, names and label values of an edition."""
    o = parse(Phantom, "phantom", args)
    from raybrats.phantom.phantom import write_phantoms

    ids = write_phantoms(o.out, num_cases=o.cases, shape=o.shape, edition=o.edition, seed=o.seed)
    return Answer({"uri": o.out, "cases": ids}, f"{len(ids)} cases in {o.out}", ("case",), [])


def index(args: Sequence[str]) -> Answer:
    """Find, open and verify every case of a tree, and write the cohort file."""
    o = parse(Index, "index", args)
    from raybrats import cluster, storage
    from raybrats.data.cohort import index
    from raybrats.data.cohort import index as indexing

    cluster.connect()
    out = storage.absolute(o.out)
    document = index.summary(indexing.index(o.uri, out)) | {"cohort_uri": out}
    title = f"{document['ok']} of {document['cases']} cases ok, {document['editions']}: {out}"
    rows = [(bad["case_id"], bad["reason"]) for bad in document["quarantined"]]
    return Answer(document, title, ("quarantined", "reason"), rows)


def train(args: Sequence[str]) -> Answer:
    """Train one network from a recipe and register it."""
    config = config_of("train", args)
    from raybrats.runs.run import train as run

    result = run(config)
    model = result.model
    title = f"{result.run_uri}, {result.steps} steps"
    if model is not None:
        title += f"; models:/{model.name}/{model.version} is {model.alias}"
    scores = [_figure(result.scores[name]) for name in REGION_COLUMNS]
    return Answer(asdict(result), title, REGION_COLUMNS, [scores])


def tune(args: Sequence[str]) -> Answer:
    """Search over fields of a recipe, with early stopping, and register the best."""
    options, rest = parse_known(Tune, "tune", args)
    config = config_of("tune", rest)
    from raybrats.runs.sweep import search

    sweep = search(config, options.space, options.trials)
    document = asdict(sweep)
    rows = [
        (t.status, _figure(t.score), *(f"{k}={v}" for k, v in t.overrides.items()))
        for t in sweep.trials
    ]
    columns = ("trial", "mean Dice", *sweep.best.overrides)
    return Answer(document, f"best mean Dice {_figure(sweep.best.score)}", columns, rows)


def predict(args: Sequence[str]) -> Answer:
    """Segment every case of a cohort with a registered model."""
    o = parse(Predict, "predict", args)
    from raybrats.predict.predict import predict as run

    outcome = run(o.model, o.cohort, o.out, fold=o.fold, tracking_uri=o.tracking_uri)
    title = f"{outcome.model}: {outcome.written} written, {outcome.skipped} skipped, in {o.out}"
    rows = [(failed["case_id"], failed["reason"]) for failed in outcome.failed]
    return Answer(asdict(outcome), title, ("failed", "reason"), rows)


def evaluate(args: Sequence[str]) -> Answer:
    """Score predictions against references, case by case and region by region."""
    o = parse(Evaluate, "evaluate", args)
    from raybrats.predict.evaluate import SCORES
    from raybrats.predict.evaluate import evaluate as run

    found = run(o.predictions, o.references, o.edition)
    document = {"cases": found.rows, "mean": found.mean, "missing": found.missing}
    rows = [[name, *(_figure(v) for v in found.mean[name].values())] for name in REGION_COLUMNS]
    title = f"{len(found.rows) // 3} cases, {len(found.missing)} references without prediction"
    return Answer(document, title, ("region", *SCORES), rows)


def report(args: Sequence[str]) -> Answer:
    """Write one HTML page: curves of a run, scores and overlays of its predictions."""
    o = parse(Report, "report", args)
    from raybrats.predict.report import write_report

    uri = write_report(o.predictions, o.cohort, o.out, run=o.run, tracking_uri=o.tracking_uri)
    return Answer({"report_uri": uri}, uri, (), [])


def models(args: Sequence[str]) -> Answer:
    """List the versions of a registered model with their aliases and scores."""
    o = parse(Models, "models", args)
    from raybrats.registry import load, tracking

    rows = load.versions(o.tracking_uri or tracking.default_uri(), o.name)
    columns = tuple(rows[0]) if rows else ()
    return Answer(
        {"name": o.name, "versions": rows}, o.name, columns, [[*r.values()] for r in rows]
    )


VERBS: Mapping[str, Callable[[Sequence[str]], Answer]] = {
    verb.__name__: verb
    for verb in (demo, phantom, index, train, tune, predict, evaluate, report, models)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    flags = {flag for flag in ("--json", "--debug") if flag in args}
    args = [arg for arg in args if arg not in flags]
    asks = not {"-h", "--help"}.isdisjoint(args)
    if not args or args[0] in ("-h", "--help"):
        _print(_overview())
        return 0 if args else 2
    stdout = sys.stdout if asks else _only_for_the_answer()
    try:
        answer = _verb(args[0])(args[1:])
        _show(answer, stdout, as_json="--json" in flags)
        return DataError.exit_code if answer.document.get("failed") else 0
    except RaybratsError as error:
        if "--debug" in flags:
            raise
        _print(f"raybrats: {' '.join(str(error).split())}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _print(
            "raybrats: interrupted; a run goes on by its --run.name, predictions by the same --out",
            sys.stderr,
        )
        return 130


def _verb(name: str) -> Callable[[Sequence[str]], Answer]:
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no verb {name!r}; {hint}there are {', '.join(VERBS)}")
    return VERBS[name]


def _only_for_the_answer() -> TextIO:
    """The real stdout; whatever else writes to it from now on, in any library, reaches stderr."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _show(answer: Answer, stdout: TextIO, *, as_json: bool) -> None:
    if as_json:
        stdout.write(json.dumps(answer.document, indent=1) + "\n")
    else:
        from rich.console import Console
        from rich.table import Column, Table

        console = Console(file=stdout, width=None if stdout.isatty() else 160)
        console.print(answer.title, highlight=False, soft_wrap=True)
        if answer.rows:
            table = Table(*(Column(name, overflow="fold") for name in answer.columns))
            for row in answer.rows:
                table.add_row(*(str(cell) for cell in row))
            console.print(table)
    stdout.flush()


def _overview() -> str:
    verbs = [f"  {name:10}{(v.__doc__ or '').splitlines()[0]}" for name, v in VERBS.items()]
    return "\n".join(
        [
            "raybrats VERB ...: 3-D U-Nets for brain-tumour MRI, on Ray\n",
            *verbs,
            "\nEach verb has --help, --json (one document on stdout) and --debug (tracebacks).",
            "Exit codes: 0 ok, 2 usage, 3 no usable checkpoint, 4 trained but not registered,",
            "5 bad data, 6 storage or tracking out of reach, 7 not enough resources,",
            "8 training diverged, 130 interrupted; 1 anything else.",
        ]
    )


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _print(text: str, file: Any = None) -> None:  # noqa: ANN401
    print(text, file=file or sys.stdout)
