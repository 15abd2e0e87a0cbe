"""Install Python packages into the image that this runs in. Run by the Dockerfile: install.py TOOLS REQUIREMENTS

TOOLS is the root of the build stage that has pip and strip: the image itself gets neither.
"""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

SITE = Path("/usr/local/lib/python3.12/site-packages")
PIP_FLAGS = [
    *("--prefix=/usr/local", "--no-compile", "--no-cache-dir", "--no-warn-script-location", "--progress-bar=off"),
    *("--disable-pip-version-check", "--root-user-action=ignore"),
]
SUPERFLUOUS = [
    # torch's C++ headers and programs are for extensions that nobody builds here, but for a helper that it asks for.
    *("torch/include", "torch/share", "torch/bin/[!t]*", "torch/bin/test*"),
    *("nvidia/**/include", "nvidia/**/lib/*.a", "triton/FileCheck", "triton/backends/amd/lib"),
    *("sympy/**/tests", "networkx/**/tests"),
    # The Hub's other protocol; the files come over HTTP as well, and these nine megabytes are llguidance's.
    *("hf_xet", "hf_xet-*.dist-info"),
]
# Wheels whose libraries were patched after linking do not survive strip, and those are torch's and NVIDIA's.
NOT_STRIPPED = ("torch", "triton", "nvidia", "cuda")


def main() -> None:
    tools, requirements = Path(sys.argv[1]), sys.argv[2]
    before = set(SITE.iterdir())
    pip = tools / SITE.relative_to("/") / "pip"
    subprocess.run([sys.executable, str(pip), "install", *PIP_FLAGS, "-r", requirements], check=True)
    for pattern in SUPERFLUOUS:
        for path in list(SITE.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for package in set(SITE.iterdir()) - before:
        if package.is_dir() and package.name not in NOT_STRIPPED:
            for library in package.rglob("*.so"):
                subprocess.run([str(tools / "usr/bin/strip"), "--strip-unneeded", str(library)], check=True)
        if package.is_dir():
            # Nobody can write or change these files later, so they are compiled here, and not checked at each import.
            compileall.compile_dir(
                package, quiet=1, workers=os.cpu_count() or 1, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
            )
    assert not (SITE / "torch").exists() or (SITE / "torch/bin/torch_shm_manager").exists()


if __name__ == "__main__":
    main()
