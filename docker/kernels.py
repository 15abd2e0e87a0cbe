"""Compile the kernels of the models in $KERNELS for the architectures in $ARCHITECTURES into the image.

A model is a folder of docker/models with a config.json: only the shape of its matrices counts, so one folder serves
every model of that shape. Runs while the image is built; needs no GPU.
"""

import os
import subprocess
import sys

SHARE = "/usr/local/share/octavo"

for model in os.environ["KERNELS"].split():
    for architecture in os.environ["ARCHITECTURES"].split():
        command = ["compile-kernels", f"{SHARE}/models/{model}", "--architecture", architecture]
        command += ["--output", f"{SHARE}/kernels"]
        environment = {**os.environ, "HOME": "/tmp", "TRITON_CACHE_DIR": "/tmp/triton"}
        subprocess.run([sys.executable, "-m", "octavo_engine.cli", *command], env=environment, check=True)
