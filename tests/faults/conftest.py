"""The trials and their outcomes, kind by kind, at the end of a run."""

import pytest

from faults import trials


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if trials.REPORTS:
        terminalreporter.section("faults: trials and outcomes")
        columns = "".join(f"{name:>10}" for name in ("trials", *trials.OUTCOMES))
        terminalreporter.line(f"{'':24}{columns}")
    for report in trials.REPORTS:
        numbers = [report.outcomes.total(), *(report.outcomes[name] for name in trials.OUTCOMES)]
        columns = "".join(f"{number:>10}" for number in numbers)
        terminalreporter.line(f"{report.kind:24}{columns}")
