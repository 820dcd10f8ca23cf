"""Writes cpu.txt and cuda.txt: every package that the set-up commands install, with its version and hashes.

    python requirements/lock.py        needs uv on the PATH; versions that are pinned already stay
    python requirements/lock.py --new  resolves them anew

A universal resolution for Python 3.10 to 3.13. What only the CUDA builds of torch ask for goes to cuda.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = re.compile(r"(nvidia-|cuda-|triton\b)")
OPTIONS = ["--universal", "--python-version", "3.10", "--no-annotate", "--no-header", "--generate-hashes", "--quiet"]
HEAD = "# Written by requirements/lock.py. Install with: pip install --require-hashes --no-deps -r {name}\n"


def compile_requirements(*arguments: str) -> list[str]:
    """One text a package, hashes included, as uv resolves them."""
    done = subprocess.run(
        ["uv", "pip", "compile", *arguments, *OPTIONS], cwd=HERE.parent, check=True, capture_output=True, text=True
    )
    return re.split(r"\n(?=\S)", done.stdout.strip())


def main() -> None:
    """Resolve, split and write."""
    pinned = [] if "--new" in sys.argv[1:] else [f"-c{HERE / name}" for name in ("cpu.txt", "cuda.txt")]
    pinned = [option for option in pinned if Path(option[2:]).is_file()]
    inputs = ["pyproject.toml", "--extra", "dev", *(f"requirements/{name}.in" for name in ("torch", "set_up"))]
    packages = compile_requirements(*inputs, *pinned)
    packages += compile_requirements("requirements/embedded.in", "--no-deps")
    for name in ("cpu.txt", "cuda.txt"):
        chosen = sorted(p for p in packages if bool(CUDA.match(p)) == (name == "cuda.txt"))
        text = HEAD.format(name=f"requirements/{name}") + "\n".join(chosen) + "\n"
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
