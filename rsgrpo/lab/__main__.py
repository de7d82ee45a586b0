"""Credit rules measured without training: `python -m rsgrpo.lab recipe=demo lab.batches=8 lab.reference_batches=16`.

Takes every key that training takes, plus `lab.*`. The same rollouts are credited by every rule; the learner's own
passes give the gradient of each, which is compared with the leave-one-out gradient of the weighted sum of scores.
"""

from __future__ import annotations

from rsgrpo import cli
from rsgrpo.config.checks import require_found, require_inputs, validate
from rsgrpo.lab.config import LabConfig, rules_of
from rsgrpo.running.stopping import StopRequested


def main(config: LabConfig) -> None:
    """Measure, print the tables, and write lab.json and lab.html."""
    validate(config)
    rules = rules_of(config)
    if config.lab.run and not config.lab.fresh:
        require_found("model.path", config.model.path, config.made_by)
    else:
        require_inputs(config)
    from rsgrpo.lab.experiment import measure  # loads torch: after the configuration has been checked
    from rsgrpo.lab.page import write_results
    from rsgrpo.records.console import Console

    with Console() as console:
        try:
            results = measure(config, rules, console, lambda partial: write_results(config, partial))
        except StopRequested as stopped:
            console.warning(f"Stopped by {stopped} before two batches were measured: there is nothing to show.")
            raise
        console.close()  # the tables are wider than the bars' lines
        for line in results.lines():
            print(line)
        print("\nwritten: " + ", ".join(map(str, write_results(config, results))))


if __name__ == "__main__":
    cli.run(main, LabConfig)
