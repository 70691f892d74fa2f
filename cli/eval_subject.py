"""What `aim eval` is asked to measure: pictures, a bundle, a checkpoint, or two of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli.errors import bad_arguments
from aim_cli.options import EngineOptions, load_generator
from aim_cli.sample_drawing import OneMachine
from aim_cli.sample_folder import Sample

if TYPE_CHECKING:
    from aim_cli.eval_checkpoint import CheckpointModel
    from aim_evaluation.models import BundleModel
    from aim_runtime import Manifest
    from aim_runtime.request import RequestOptions

_MANIFEST = "manifest.json"
_SCORE_BATCH = 32
"""Pictures that are scored together, at most."""


@dataclass(frozen=True)
class Target:
    """What the command line names.

    Attributes:
        samples: pictures that are there.
        bundle: draws pictures, and decodes and scores codes.
        checkpoint: encodes pictures; decodes and scores codes where there is no bundle.
    """

    samples: Path | None = None
    bundle: Path | None = None
    checkpoint: Path | None = None

    @classmethod
    def of(cls, path: Path | None, checkpoint: Path | None) -> Target:
        """Tell a bundle, pictures and a checkpoint apart.

        Raises UsageError for a path that does not exist, or a second checkpoint.
        """
        if path is None:
            return cls(checkpoint=checkpoint)
        if not path.exists():
            raise click.UsageError(f"{path} does not exist; expected pictures or a bundle")
        if (path / _MANIFEST).is_file() or path.suffix.lower() == ".zip":
            return cls(bundle=path, checkpoint=checkpoint)
        if path.is_dir() or path.suffix.lower() == ".npz":
            return cls(samples=path, checkpoint=checkpoint)
        if checkpoint is not None:
            raise click.UsageError(
                f"{path} is neither pictures nor a bundle, and --ckpt names the checkpoint already"
            )
        return cls(checkpoint=path)


@dataclass(frozen=True)
class Drawing:
    """How a bundle draws the pictures that are measured.

    Attributes:
        count: N.
        preset: "fid" or "preview".
        asked: seed and sampling options.
        backend: name, or "auto".
        engine: what it is loaded with.
    """

    count: int | None
    preset: str
    asked: RequestOptions
    backend: str
    engine: EngineOptions

    @property
    def changes_pictures(self) -> bool:
        """Whether anything was asked that has no meaning for pictures that are there."""
        given = (value for name, value in self.asked.items() if name != "seed")
        return self.count is not None or any(value is not None for value in given)


def draw_sample(bundle: Path, drawing: Drawing, out: Path, *, quiet: bool) -> None:
    """Draw what is missing of a sample in `out`, as `aim sample` does."""
    from aim_cli.commands.sample import preset_options
    from aim_runtime.request import check_seed

    assert drawing.count is not None
    with load_generator(bundle, drawing.backend, drawing.engine, quiet=quiet) as generator:
        asked: Any = {name: value for name, value in drawing.asked.items() if name != "seed"}
        with bad_arguments():
            seed = check_seed(drawing.asked["seed"], drawing.count)
            options = preset_options(generator.sampling, drawing.preset).replace(**asked)
            drawer = OneMachine(generator)
            batch_size = drawer.batch_size(drawing.count, options.cfg_scale)
        sample = Sample(out, drawing.count, seed, options, drawer)
        with sample.open(drawing.preset):
            sample.draw(batch_size, quiet=quiet)


@dataclass(frozen=True)
class Model:
    """A model whose tokenizer or predictions are measured.

    Attributes:
        checkpoint: encodes, and does the rest where there is no bundle.
        bundle: decodes and scores, if there is one.
        about: what it is, for the report.
        size: (height, width) of its pictures; None where nothing says it.
        class_names: of its classes; empty where nothing says it.
        score_batch: pictures that are scored together.
    """

    checkpoint: CheckpointModel
    bundle: BundleModel | None
    about: dict[str, Any]
    size: tuple[int, int] | None
    class_names: tuple[str, ...]
    score_batch: int

    @property
    def decoder(self) -> BundleModel | CheckpointModel:
        """What turns codes into pictures."""
        return self.bundle or self.checkpoint


def open_model(target: Target, drawing: Drawing, device: str) -> Model:
    """The model of a target.

    Raises ClickException where no checkpoint is named, which encodes the pictures.
    """
    if target.checkpoint is None:
        raise click.UsageError(
            "--ckpt is missing: pictures become codes by the encoder, which bundles do not hold; "
            "name the checkpoint that the bundle was exported from"
        )
    from aim_cli.eval_checkpoint import CheckpointModel, check_belongs

    checkpoint = CheckpointModel(target.checkpoint, device)
    if target.bundle is None:
        side = checkpoint.image_size()
        return Model(
            checkpoint,
            None,
            checkpoint.describe(),
            None if side is None else (side, side),
            tuple(checkpoint.checkpoint.class_names or ()),
            _SCORE_BATCH,
        )
    from aim_evaluation.models import BundleModel
    from aim_runtime import Bundle
    from aim_runtime.engines.backends import load_engine

    opened = Bundle.open(target.bundle)
    manifest = opened.manifest
    check_belongs(checkpoint, manifest)
    with bad_arguments():
        engine = load_engine(
            opened,
            backend=drawing.backend,
            device=drawing.engine.device,
            precision=drawing.engine.precision,
            threads=drawing.engine.threads,
        )
        plan = engine.plan(_SCORE_BATCH, 1.0, drawing.engine.memory_limit_mb)
    about = {
        **_about(manifest),
        "bundle_sha256": opened.manifest_sha256,
        "backend": engine.backend,
        "precision": engine.precision,
        **checkpoint.describe(),
    }
    size = (manifest.model.image_height, manifest.model.image_width)
    model = BundleModel(opened, engine)
    return Model(checkpoint, model, about, size, manifest.class_names, plan.batch_size)


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "bundle": manifest.name,
        "weights": manifest.precision,
        "position_offset": manifest.model.position_offset,
    }
