"""The bounds of setup.cfg are true: the tests run with the oldest versions that it allows, and with the newest.

    python tests/versions.py lowest --tests tests/test_modeling_aselect.py tests/test_denoisers.py
    python tests/versions.py newest

makes a virtual environment in a temporary folder, installs the package with the `test` extra into it, every
requirement at its lower bound (or as new as allowed), prints the versions, and runs the fast tests there, or some of
them. Where no build of the oldest torch is at hand `--keep torch==2.13.0` takes another one.
"""

import argparse
import configparser
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def requirements(extras: tuple[str, ...] = ("train", "demo", "peft", "export", "test")) -> dict[str, str]:
    """Return the bounds of each requirement of the package and some extras, by its name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    found = {}
    for line in lines:
        if line and not line.startswith(("#", "hf_aselect")):
            name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", line).groups()
            found[name] = bounds
    return found


def lowest(bounds: str) -> str:
    """Return the lower bound as an exact version.

    Raises:
        ValueError: If there is none.
    """
    match = re.search(r">=([0-9.]+)", bounds)
    if match is None:
        raise ValueError(f"No lower bound in {bounds!r}.")
    return f"=={match[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--keep", nargs="*", default=[], metavar="NAME==VERSION", help="versions to take in any case")
    parser.add_argument("--tests", nargs="*", default=[], help="files to run (all that are fast)")
    args = parser.parse_args()
    kept = dict(each.split("==") for each in args.keep)
    wanted = []
    for name, bounds in requirements().items():
        version = f"=={kept[name]}" if name in kept else lowest(bounds) if args.which == "lowest" else bounds
        wanted.append(f"{name}{version}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *wanted], check=True)
        subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
        names = [re.split("[=<>]", each)[0] for each in wanted]
        print(subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout)
        print(f"{args.which}: {', '.join(names)}", flush=True)
        return subprocess.run(
            [python, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile", *args.tests],
            cwd=ROOT,
            check=False,
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
