"""`imagekiln doctor`: is this machine fit to train?"""

from __future__ import annotations

from imagekiln.cli.output import DebugOption, JsonOption, answer


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check the installation and say what helps and what hinders."""
    from imagekiln.engine.machine import examine

    findings = examine()
    lines = [f"{'ok  ' if finding.fine else 'look'}  {finding.what}: {finding.sentence}" for finding in findings]
    answer("\n".join(lines), [finding.__dict__ for finding in findings], as_json)
