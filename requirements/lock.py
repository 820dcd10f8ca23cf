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
# CPU builds of torch have a version of their own, but are installed as torch 2.13.0 where pip is shown them.
TORCH_CPU_BUILDS = {
    "2.13.0": ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",),  # cp311, manylinux_2_28_x86_64
}


def compile_requirements(*arguments: str) -> list[str]:
    """One text a package, hashes included, as uv resolves them."""
    done = subprocess.run(
        ["uv", "pip", "compile", *arguments, *OPTIONS], cwd=HERE.parent, check=True, capture_output=True, text=True
    )
    return re.split(r"\n(?=\S)", done.stdout.strip())


def with_cpu_builds(package: str) -> str:
    """The same with the hashes of torch's CPU builds, if it is torch."""
    found = re.match(r"torch==(\S+)", package)
    extra = TORCH_CPU_BUILDS[found[1]] if found else ()
    return "".join([package, *(f" \\\n    --hash=sha256:{digest}" for digest in extra)])


def main() -> None:
    """Resolve, split and write."""
    pinned = [] if "--new" in sys.argv[1:] else [f"-c{HERE / name}" for name in ("cpu.txt", "cuda.txt")]
    pinned = [option for option in pinned if Path(option[2:]).is_file()]
    inputs = ["pyproject.toml", "--extra", "dev", *(f"requirements/{name}.in" for name in ("torch", "set_up"))]
    packages = compile_requirements(*inputs, *pinned)
    packages += compile_requirements("requirements/embedded.in", "--no-deps")
    for name in ("cpu.txt", "cuda.txt"):
        chosen = sorted(p for p in packages if bool(CUDA.match(p)) == (name == "cuda.txt"))
        text = HEAD.format(name=f"requirements/{name}") + "\n".join(map(with_cpu_builds, chosen)) + "\n"
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
