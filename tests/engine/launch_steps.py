"""Launch steps of every kind for a GPU that is not there, and print what had to be compiled for them.

python launch_steps.py MODEL ARCHITECTURE           what the folder of OCTAVO_PREBUILT_KERNELS lacks, a line for each
python launch_steps.py MODEL ARCHITECTURE FOLDER    what two processes leave to compile, which fill this one meanwhile

Run by test_compile_ahead.py in a process of its own, as kernels may be interpreted in that one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import torch

from octavo_engine.kernels.gpu import prebuilt
from octavo_engine.models.config import load_config
from octavo_engine.runner import compile_ahead, compile_beside

DECODES = (1, 2, 15, 16, 33, 64, 65, 130)
MIXED = ((0, 2), (0, 300), (1, 7), (2, 8), (56, 72), (64, 13), (65, 7), (120, 8))


def main() -> None:
    model, architecture = Path(sys.argv[1]), sys.argv[2]
    target, shared_memory = compile_ahead.ARCHITECTURES[architecture]
    folder = Path(sys.argv[3]) if sys.argv[3:] else None
    compile_beside.LIMIT_S = 270.0  # a machine may be busy with other tests
    prebuilt.FEW = 0  # so that all that is compiled here is what the processes left
    fill = functools.partial(compile_beside.compile_beside, model, architecture, 64, "bfloat16", 2)
    compilations = prebuilt.use()
    absent = compile_ahead.Absent(load_config(model), 64, torch.bfloat16)
    with (
        tempfile.TemporaryDirectory() as nothing,
        compile_ahead._absent_gpu(target, shared_memory, folder or Path(nothing)) as launched,
        prebuilt.filling(fill) if folder else contextlib.nullcontext(),
    ):
        for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            for deterministic in (False, True):
                decoder = absent.decoder(kv_dtype, deterministic)
                for decodes, chunk in (*((decodes, 0) for decodes in DECODES), *MIXED):
                    for wide in (False, True) if chunk and decoder.wide_tile_tokens else (False,):
                        known = compilations.count
                        absent.step(decoder, decodes, chunk, wide)
                        if compilations.count > known:
                            print(kv_dtype, deterministic, decodes, chunk, wide, launched[-1].name, flush=True)
    assert len(launched) > 30, launched


if __name__ == "__main__":
    main()
