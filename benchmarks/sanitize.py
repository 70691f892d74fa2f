"""Something for compute-sanitizer to watch: forced steps, a drawn image and its pixels on a GPU.

    aim export --bundle BUNDLE --cuda --cuda-precision fp16-state16
    compute-sanitizer --tool memcheck --report-api-errors no \\
        python benchmarks/sanitize.py BUNDLE fp16-state16 --draw
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py BUNDLE fp16 --steps 3

Buffers are allocated one by one, so that their ends can be seen. Without
`--report-api-errors no` the driver's answer that a kernel has no further parameter is counted.
"""

from __future__ import annotations

import argparse

import numpy as np

from aim_runtime import Bundle
from aim_runtime.engines.cuda.engine import CudaEngine
from aim_runtime.engines.gpu.driver import CudaDevice
from aim_runtime.noise import uniforms
from aim_runtime.sampling import SamplingOptions


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a bundle folder with CUDA kernels")
    parser.add_argument("precision")
    parser.add_argument("--steps", type=int, default=34, help="steps; the default folds two chunks")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--draw", action="store_true", help="draw and decode an image too")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    model = bundle.manifest.model
    engine = CudaEngine(bundle, CudaDevice(0, one_block=False), options.precision)
    for count in options.rows:
        classes = np.arange(count, dtype=np.int64) % model.num_classes
        with engine.start(count, engine.prologue(classes)) as rows:
            for step in range(options.steps):
                scores = rows.step(np.full(count, step + 3), np.full(count, step))
        print(f"{count} rows: largest score {np.abs(scores).max():.3f}", flush=True)
    if options.draw:
        drawing = engine.draw(
            np.array([5]), uniforms([1], model.num_tokens), SamplingOptions(3.0, 0.8, 50, 0.95)
        )
        tokens = np.concatenate(list(drawing), axis=1)
        print(f"one image: mean pixel {engine.decode(tokens).mean():.2f}", flush=True)


if __name__ == "__main__":
    main()
