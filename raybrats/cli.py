"""The verbs of the command line, nothing else: parse, call, print.

    raybrats train tiny --data.cohort s3://bucket/BraTS2020

Tables and progress on a terminal; with --json one JSON document on stdout and nothing else there.
Each verb parses its words before it imports what it calls, so that help and typos cost nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, TextIO

import raybrats as rb
from raybrats import signals, terminal
from raybrats.arguments import (
    HELP,
    Compare,
    Demo,
    Evaluate,
    ImportNnunet,
    Index,
    Models,
    Phantom,
    Predict,
    Report,
    Segment,
    Tune,
    config_of,
    parse,
    parse_known,
    show_tune_help,
)
from raybrats.brats import MODALITIES
from raybrats.errors import DataError, UsageError, cause_of
from raybrats.terminal import Answer

if TYPE_CHECKING:
    from raybrats.predict.summary import Summary


def demo(args: Sequence[str]) -> Answer:
    """Run the whole line on phantoms: index, train, register, predict, evaluate, report.

    Example:
        >>> demo(["--out", "demo"]).document["report"]  # doctest: +SKIP
    """
    o = parse(Demo, "demo", args)
    from raybrats.demo import run_demo

    document = run_demo(o.out)
    scores, model = document["evaluate"]["mean"], document["train"]["model"]
    rows = [[name, *map(_figure, row.values())] for name, row in scores.items()]
    places = (
        f"registered:  models:/{model['name']}/{model['version']} is {model['alias']}",
        f"predictions: {document['predictions']}",
        f"report:      {document['report']}",
    )
    title = f"scores on {document['predict']['cases']} held-out cases:"
    return Answer(document, title, ("region", *scores["mean"]), rows, places)


def phantom(args: Sequence[str]) -> Answer:
    """Write a synthetic cohort in the tree, names and label values of an edition.

    Example:
        >>> phantom(["tree", "--cases", "1", "--shape", "16", "16", "16"]).title
        '1 cases in tree'
    """
    o = parse(Phantom, "phantom", args)
    from raybrats.phantom.phantom import write_phantoms

    ids = write_phantoms(o.out, num_cases=o.cases, shape=o.shape, edition=o.edition, seed=o.seed)
    return Answer({"uri": o.out, "cases": ids}, f"{len(ids)} cases in {o.out}", ("case",), [])


def index(args: Sequence[str]) -> Answer:
    """Find, open and verify every case of a tree, and write the cohort file.

    Example:
        >>> index(["s3://bucket/BraTS2020"]).document["ok"]  # doctest: +SKIP
        369
    """
    o = parse(Index, "index", args)
    document = rb.index(o.uri, o.out, o.edition).summary
    counts = f"{document['ok']} of {document['cases']} cases ok"
    title = f"{counts}, {document['editions']}: {document['cohort_uri']}"
    rows = [(bad["case_id"], bad["reason"]) for bad in document["quarantined"]]
    return Answer(document, title, ("quarantined", "reason"), rows)


def train(args: Sequence[str]) -> Answer:
    """Train one network from a recipe, or a run's config.json, and register it.

    Example:
        >>> train(["tiny", "--data.cohort", "cohort.parquet"]).rows  # doctest: +SKIP
    """
    result = rb.train(config_of("train", args))
    model = result.model
    title = f"{result.run_uri}, {result.steps} steps"
    if model is not None:
        title += f"; models:/{model.name}/{model.version} is {model.alias}"
    return Answer(
        asdict(result), title, (*result.scores,), [[*map(_figure, result.scores.values())]]
    )


def tune(args: Sequence[str]) -> Answer:
    """Search over fields of a run, with early stopping, and register the best.

    Example:
        >>> words = ["--space", "loss.dice_weight=uniform(0.2,0.8)", "--trials", "4"]
        >>> tune(["tiny", "--data.cohort", "cohort.parquet", *words]).title  # doctest: +SKIP
        'best mean Dice 0.812'
    """
    if not HELP.isdisjoint(args):
        show_tune_help(args)
        raise SystemExit(0)
    options, rest = parse_known(Tune, "tune", args)
    sweep = rb.tune(config_of("tune", rest), options.space, options.trials)
    rows = [
        (t.status, _figure(t.score), *(f"{k}={v}" for k, v in t.overrides.items()))
        for t in sweep.trials
    ]
    columns = ("trial", "mean Dice", *sweep.best.overrides)
    return Answer(asdict(sweep), f"best mean Dice {_figure(sweep.best.score)}", columns, rows)


def segment(args: Sequence[str]) -> Answer:
    """Segment one patient, whose files may have any names.

    Example:
        >>> files = ["--flair", "a.nii", "--t1", "b.nii", "--t1ce", "c.nii", "--t2", "d.nii"]
        >>> segment(["models:/raybrats@champion", *files]).document["out"]  # doctest: +SKIP
    """
    o = parse(Segment, "segment", args)
    given = {modality: getattr(o, modality) for modality in MODALITIES}
    files: dict[str, str] = {name: path for name, path in given.items() if path is not None}
    if not files:
        options = ", ".join(f"--{modality}" for modality in MODALITIES)
        raise UsageError(f"no files; give those that the model takes, of {options}")
    from raybrats import storage
    from raybrats.predict.target import check_target

    out = check_target(o.out)
    if out in map(storage.absolute, files.values()):
        raise UsageError(f"--out {o.out}: is one of the patient's files; choose another name")
    model = rb.load(o.model, o.tracking_uri, o.network)
    found = model.segment(files, resample=o.resample)
    found.save(out)
    volumes = found.volumes_mm3
    document = {"out": out, "model": found.model, "volumes_mm3": volumes, "remarks": found.remarks}
    rows = [(region, f"{volume:.0f}") for region, volume in volumes.items()]
    return Answer(document, f"{out} by {found.model}", ("region", "volume in mm3"), rows)


def predict(args: Sequence[str]) -> Answer:
    """Segment every case of a cohort with a registered model.

    Example:
        >>> predict(["models:/raybrats@champion", "cohort.parquet"]).title  # doctest: +SKIP
        'models:/raybrats/3: 74 written, 0 skipped, in predictions'
    """
    o = parse(Predict, "predict", args)
    found = rb.predict(o.model, o.cohort, o.out, fold=o.fold, tracking_uri=o.tracking_uri)
    title = f"{found.model}: {found.written} written, {found.skipped} skipped, in {o.out}"
    rows = [(failure["case_id"], failure["reason"]) for failure in found.failed]
    return Answer(asdict(found), title, ("failed", "reason"), rows)


def evaluate(args: Sequence[str]) -> Answer:
    """Score predictions against references, case by case and region by region.

    Example:
        >>> evaluate(["predictions", "cohort.parquet"]).title  # doctest: +SKIP
        '74 cases by brats2020; of labels: accuracy 0.9981, mean IoU 0.744'
    """
    o = parse(Evaluate, "evaluate", args)
    from raybrats.predict import score_file

    if o.out:
        score_file.check_place(o.out)
    found = rb.evaluate(o.predictions, o.references, o.edition, rules=o.rules, fold=o.fold)
    if o.out:
        score_file.write(found, o.out)
    rows = [
        (score, *(_interval(summary) for summary in row.values()))
        for score, row in found.shown.items()
    ]
    return Answer(found.document(), found.title, ("mean [95 %]", *found.summary), rows)


def compare(args: Sequence[str]) -> Answer:
    """Rank two or more models by their predictions of the same cases.

    Example:
        >>> compare(["ours", "theirs", "cohort.parquet"]).title  # doctest: +SKIP
        '74 cases by brats2020, ranked by dice, hd95_mm'
    """
    o = parse(Compare, "compare", args)
    *predictions, references = o.places or [""]
    found = rb.compare(
        predictions,
        references,
        o.edition,
        rules=o.rules,
        fold=o.fold,
        permutations=o.permutations,
    )
    first = found.standings[0].model
    places = [
        f"{s.place:g}. {s.model}: mean rank {s.mean_rank:.3f}, tier {s.tier}"
        + (f", p {found.p_values[first, s.model]:.4f}" if s.model != first else "")
        for s in found.standings
    ]
    rows = [
        (better, other, region, score, _span(*figures))
        for better, other, region, score, *figures in found.difference_rows()
    ]
    columns = ("better", "other", "region", "score", "difference [95 %]")
    return Answer(found.document(), found.title, columns, rows, places)


def report(args: Sequence[str]) -> Answer:
    """Write one HTML page: curves of a run, scores and slices of its predictions.

    Example:
        >>> report(["predictions", "cohort.parquet"]).title  # doctest: +SKIP
    """
    o = parse(Report, "report", args)
    uri = rb.report(
        *(o.predictions, o.cohort, o.out),
        run=o.run,
        tracking_uri=o.tracking_uri,
        cases=o.case,
        against=o.against,
        rules=o.rules,
        viewer=o.viewer,
    )
    return Answer({"report_uri": uri}, uri, (), [])


def models(args: Sequence[str]) -> Answer:
    """List the versions of a registered model with their aliases and scores.

    Example:
        >>> models(["raybrats"]).columns[:3]  # doctest: +SKIP
        ('version', 'aliases', 'dice_WT')
    """
    o = parse(Models, "models", args)
    from raybrats.registry import load, tracking

    rows = load.versions(o.tracking_uri or tracking.default_uri(), o.name)
    columns = tuple(rows[0]) if rows else ()
    return Answer(
        {"name": o.name, "versions": rows}, o.name, columns, [[*r.values()] for r in rows]
    )


def import_nnunet(args: Sequence[str]) -> Answer:
    """Register a trained fold of nnU-Net, whose checkpoint is read without running its code.

    Example:
        >>> words = ["checkpoint_final.pth", "plans.json", "dataset.json"]
        >>> import_nnunet(words).title  # doctest: +SKIP
        'models:/raybrats/4 is challenger'
    """
    o = parse(ImportNnunet, "import-nnunet", args)
    from raybrats.runs.imported import import_fold

    found = import_fold(o.checkpoint, o.plans, o.dataset, o.model, o.tracking_uri)
    title = f"models:/{found.name}/{found.version} is {found.alias}"
    return Answer({"model": asdict(found)}, title, (), [])


VERBS: Mapping[str, Callable[[Sequence[str]], Answer]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        *(demo, phantom, index, train, tune, segment, predict, evaluate, compare, report),
        models,
        import_nnunet,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb, shows its answer, and returns the exit code.

    Example:
        >>> main(["trian", "tiny"])  # doctest: +SKIP
        2
    """
    terminal.secure()
    args = list(sys.argv[1:] if argv is None else argv)
    flags = {flag for flag in ("--json", "--debug") if flag in args}
    args = [arg for arg in args if arg not in flags]
    try:
        with signals.sigterm_interrupts(), terminal.reserved_stdout() as stdout:
            return _answered(args, stdout, as_json="--json" in flags)
    except KeyboardInterrupt:
        words = "a run goes on by its --run.name, predictions by the same --out"
        terminal.complain(f"interrupted; {words}")
        return 130
    except Exception as error:
        if "--debug" in flags:
            raise
        cause = cause_of(error)  # Ray may have wrapped it
        terminal.complain(terminal.unexpected(error) if cause is None else str(cause))
        return 1 if cause is None else cause.exit_code


def _answered(args: Sequence[str], stdout: TextIO, *, as_json: bool) -> int:
    """Runs the verb and writes its answer, or help; returns the exit code."""
    if not args or args[0] in HELP:
        stdout.write(_overview())
        return 0 if args else 2
    try:
        with terminal.messages_shown(), _help_to(stdout, args):
            answer = _verb(args[0])(args[1:])
    except SystemExit as end:  # after help, or by a signal as Ray takes it
        if end.code in (0, None):
            return 0
        raise KeyboardInterrupt from end
    terminal.show(answer, stdout, as_json=as_json)
    failed = answer.document.get("failed")
    if not failed:
        return 0
    first = f"{failed[0]['case_id']}: {failed[0]['reason']}"
    terminal.complain(f"{len(failed)} of {answer.document['cases']} cases failed; {first}")
    return DataError.exit_code


def _help_to(stdout: TextIO, args: Sequence[str]) -> AbstractContextManager[object]:
    """Help is written by the parser; it is an answer like any other."""
    asks = not HELP.isdisjoint(args)
    return redirect_stdout(stdout) if asks else nullcontext()


def _verb(name: str) -> Callable[[Sequence[str]], Answer]:
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no verb {name!r}; {hint}there are {', '.join(VERBS)}")
    return VERBS[name]


def _overview() -> str:
    verbs = [f"  {name:15}{(v.__doc__ or '').splitlines()[0]}" for name, v in VERBS.items()]
    return "\n".join(
        [
            "raybrats VERB ...: 3-D U-Nets for brain-tumour MRI, on Ray\n",
            *verbs,
            "\nEach verb has --help, --json (one document on stdout) and --debug (tracebacks).",
            "Exit codes: 0 ok, 2 usage, 3 no usable checkpoint, 4 trained but not registered,",
            "5 bad data, 6 storage or tracking out of reach, 7 not enough resources,",
            "8 training diverged, 130 interrupted; 1 anything else.\n",
        ]
    )


def _interval(summary: "Summary | None") -> str:
    return "" if summary is None else _span(summary.mean, summary.low, summary.high)


def _span(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
