"""Open JupyterLab at the first notebook: `make lab`.

Settings come from `docs/jupyter`, beside those that the user has, which stay as they are. In a clone, git is told to
look at notebooks without their outputs (`docs/strip.py`), so that one that was run and saved counts as unchanged.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = "notebooks/00_quickstart.ipynb"
AS_ROOT = (
    "You are root, as in a container: JupyterLab gets --allow-root; to reach it from outside, add ARGS=--ip=0.0.0.0"
)
FILTER = {"filter.notebook.clean": ".venv/bin/python docs/strip.py"}


def command(arguments: Sequence[str], root: bool) -> list[str]:
    """What starts JupyterLab. root: as that user, whom it refuses unless it is told not to."""
    own = ["--allow-root"] if root and "--allow-root" not in arguments else []
    named = any(not one.startswith("-") for one in arguments)
    own += [] if named else [f"--LabApp.default_url=/lab/tree/{FIRST}"]
    return [sys.executable, "-m", "jupyterlab", *own, *arguments]


def surroundings(around: Mapping[str, str]) -> dict[str, str]:
    """The environment of JupyterLab: our settings before the user's."""
    paths = [str(ROOT / "docs" / "jupyter"), around.get("JUPYTER_CONFIG_PATH", "")]
    return {**around, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}


def keep_clean(clone: Path = ROOT) -> None:
    """Tell a clone's git to look at notebooks without outputs. Where there is no clone or no git, nothing."""
    for name, value in FILTER.items() if (clone / ".git").exists() else ():
        try:
            subprocess.run(["git", "-C", str(clone), "config", name, value], check=False, capture_output=True)
        except OSError:
            return


def main() -> None:
    """The command."""
    root = os.name == "posix" and os.geteuid() == 0
    if root:
        print(AS_ROOT, file=sys.stderr)
    keep_clean()
    os.chdir(ROOT)
    started = command(sys.argv[1:], root)
    os.execve(started[0], started, surroundings(os.environ))


if __name__ == "__main__":
    main()
