"""What Tune asks and tells while the trials of a sweep run."""

from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from raybrats.progress import Display
from raybrats.runs.stop import Stop


class Stopped(tune.Stopper):
    """Ends all trials once the sweep is to stop."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __getstate__(self) -> dict[str, object]:
        return {}  # Tune writes down what it was given, but asks this very object

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Whether one trial is to end: none by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether all are."""
        return self._stop.error is not None


class Shown(tune.Callback):
    """Progress of the sweep: trials ended, and the latest score."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials, self._ended = num_trials, 0

    def setup(self, *_: object, **__: object) -> None:
        """Starts the display here, for Tune copies the callback before and a bar has locks."""
        self._display = Display("sweep", self._num_trials).__enter__()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_display"}

    def on_experiment_end(self, trials: list[Trial], **_: object) -> None:  # noqa: ARG002
        """All trials have ended."""
        self._display.__exit__()

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002 - Tune calls it so
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        result: dict[str, Any],
        **_: object,
    ) -> None:
        """A trial has validated."""
        score = f"step {result.get('step')}: mean Dice {result.get('mean', 0):.3f}"
        self._display.show(self._ended, f"trial {trial.trial_id}, {score}")

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        **_: object,
    ) -> None:
        """A trial has ended or was stopped."""
        self._ended += 1
        self._display.show(self._ended, f"trial {trial.trial_id} ended")

    on_trial_error = on_trial_complete
