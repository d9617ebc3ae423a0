"""What those who watch the cluster see of a run: Ray's own metrics, scraped by Prometheus."""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

_GAUGES = {
    "patches_per_s": ("raybrats_patches_per_s", "Patches a second, over all workers."),
    "step_s": ("raybrats_step_seconds", "Seconds a step."),
    "data_wait_fraction": (
        "raybrats_data_wait_fraction",
        "Fraction of them that waits for the stream.",
    ),
    "train/loss": ("raybrats_loss", "Mean loss of the last steps."),
    "train/skipped": ("raybrats_skipped_steps", "Steps without a finite gradient, of the run."),
}
_TAG = ("run",)


class Gauges:
    """The metrics of one attempt at a run, tagged with its name."""

    def __init__(self, run: str, rejected: int = 0) -> None:
        self._tags = {"run": run}
        self._gauges = {name: Gauge(*words, tag_keys=_TAG) for name, words in _GAUGES.items()}
        self._cases = _counter("raybrats_cases", "Cases opened for draws.")
        self._hits = _counter("raybrats_cache_hits", "Cases that a node's cache held.")
        self._rejected = _counter(
            "raybrats_rejected_checkpoints", "Checkpoints that did not verify."
        )
        self._seen = {"cases": 0.0, "hits": 0.0, "rejected": 0.0}
        self._count(self._rejected, "rejected", rejected)
        self._seen["rejected"] = 0.0

    def show(self, figures: Mapping[str, float], tally: Mapping[str, float]) -> None:
        """Figures of the last steps, and what the node caches were good for so far."""
        for name, gauge in self._gauges.items():
            gauge.set(float(figures[name]), tags=self._tags)
        self._count(self._cases, "cases", tally["cache/hits"] + tally["cache/misses"])
        self._count(self._hits, "hits", tally["cache/hits"])

    def reject(self, total: int) -> int:
        """Counts the checkpoints that did not verify so far; returns how many are new."""
        return int(self._count(self._rejected, "rejected", total))

    def _count(self, counter: Counter, name: str, total: float) -> float:
        new = total - self._seen[name]
        if new > 0:  # Ray refuses to add nothing
            counter.inc(new, tags=self._tags)
        self._seen[name] = total
        return new


def left_out(run: str, bad_cases: int) -> None:
    """Counts the bad cases that a run leaves out.

    Example:
        >>> left_out("one", 2)  # doctest: +SKIP
    """
    if bad_cases:
        _counter("raybrats_bad_cases", "Cases left out of training.").inc(
            bad_cases, tags={"run": run}
        )


def restarted(run: str) -> None:
    """Counts a restart of the workers of a run.

    Example:
        >>> restarted("one")  # doctest: +SKIP
    """
    _counter("raybrats_restarts", "Restarts of the workers.").inc(tags={"run": run})


def _counter(name: str, description: str) -> Counter:
    return Counter(name, description, tag_keys=_TAG)
