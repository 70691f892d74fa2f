"""A plan whose kernels are yet to be compiled, and what becomes of it when they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aim_export.cuda.launch import KernelSpec
from aim_runtime.engines.cuda.plan import (
    Bucket,
    Code,
    DecoderBucket,
    Kernel,
    Launch,
    Plan,
    Program,
    Repeat,
    Setup,
    Weight,
    flat,
)


@dataclass(frozen=True)
class Draft:
    """All of a plan but machine code, for one precision.

    Attributes:
        conversions: what brings stored weights to their types, by the names that plans give them.
    """

    precision: str
    weights: Mapping[str, Weight]
    conversions: Mapping[str, KernelSpec]
    setup: Setup[KernelSpec]
    buckets: tuple[Bucket[KernelSpec], ...]
    decoder: tuple[DecoderBucket[KernelSpec], ...]

    def kernels(self) -> dict[str, KernelSpec]:
        """Every kernel of the plan by its id."""
        programs = [self.setup.launches]
        programs += [part for bucket in self.buckets for part in (bucket.begin, bucket.step)]
        programs += [bucket.launches for bucket in self.decoder]
        found = [launch.kernel for program in programs for launch in flat(program)]
        return {kernel.id: kernel for kernel in (*self.conversions.values(), *found)}

    def plan(self, compiler: str, code: Mapping[str, Mapping[str, Code]]) -> Plan:
        """The plan; `code` says where each kernel's binaries lie, by id and architecture."""
        return Plan(
            precision=self.precision,
            compiler=compiler,
            kernels={
                name: Kernel(
                    symbol=kernel.function.__name__,
                    threads=kernel.threads,
                    overlaps=kernel.overlaps,
                    resident=kernel.resident,
                    code=code[name],
                )
                for name, kernel in self.kernels().items()
            },
            weights=self.weights,
            setup=Setup(self.setup.buffers, _by_id(self.setup.launches)),
            buckets=tuple(
                Bucket(
                    bucket.rows,
                    bucket.buffers,
                    _by_id(bucket.begin),
                    _by_id(bucket.step),
                    bucket.memory,
                )
                for bucket in self.buckets
            ),
            decoder=tuple(
                DecoderBucket(bucket.images, bucket.buffers, _by_id(bucket.launches))
                for bucket in self.decoder
            ),
        )


def _by_id(program: Program[KernelSpec]) -> Program[str]:
    """The program with kernels' ids in place of what they are compiled from."""

    def named(launch: Launch[KernelSpec]) -> Launch[str]:
        return Launch(launch.kernel.id, launch.grid, launch.arguments, launch.every)

    return tuple(
        Repeat(item.times, tuple(map(named, item.body)), item.strides)
        if isinstance(item, Repeat)
        else named(item)
        for item in program
    )
