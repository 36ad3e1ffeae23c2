"""stub"""

from pathlib import Path

LOG_NAME = "training_log.json"


def write_report(folder: Path) -> None:
    """stub."""


REPORT_NAME = "report.html"
