"""Findings as they come in, for people, or all of them in one JSON object, and the exit code they mean."""

import json
from typing import Any

from toolkit.findings import Finding
from toolkit.wording import visible

INDENT = " " * 11


class Report:
    """What `toolkit check` says.

    Args:
        recipe: the file, as it was named.
        as_json: say nothing until the end.
        strict: warnings are errors.
    """

    def __init__(self, recipe: str, as_json: bool = False, strict: bool = False):
        self.recipe, self.as_json, self.strict = recipe, as_json, strict
        self.findings: list[Finding] = []
        self.stages: dict[str, Any] = {}
        """Stage name -> its numbers, for machines."""

    def part(self, title: str, found: list[Finding]) -> None:
        """Findings on one subject; `ok` where there are none."""
        self.findings += found
        if self.as_json:
            return
        print(visible(title))
        for f in found:
            said = "\n".join(INDENT + line for line in visible(f"{f} [{f.check}]").split("\n")).lstrip()
            print(f"  {f.level:<8} {said}")
        print(end="" if found else "  ok\n", flush=True)

    def finish(self) -> int:
        """Say how many there were; 2 where a run would be stopped, else 0."""
        n = {level: sum(f.level == level for f in self.findings) for level in ("error", "warning", "note")}
        if self.as_json:
            found = [f.as_dict() for f in self.findings]
            print(json.dumps({"recipe": self.recipe, "findings": found, "stages": self.stages, "counts": n}))
        else:
            counted = ", ".join(f"{k} {level}{'' if k == 1 else 's'}" for level, k in n.items())
            print(f"\n{counted}" + (" (--strict: warnings are errors)" if self.strict and n["warning"] else ""))
        return 2 if n["error"] or (self.strict and n["warning"]) else 0
