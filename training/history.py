"""What changed between the calls that trained a run: announced, recorded, refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aim_training.data.location import written
from aim_training.errors import TrainingError
from aim_training.options import TrainingOptions, recipe
from aim_training.saves import Saves, from_json

# Options that decide nothing about what is trained.
_HOUSEKEEPING = frozenset(
    (
        "workers",
        "resident_limit_mb",
        "log_every",
        "sample_every",
        "save_every",
        "sample_count",
        "sample_guidance",
        "allow_changed_data",
        "export_weights",
        "log_with",
        "micro_batch",
        "checkpoint_activations",
        "shard_states",
    )
)
# Parts of a fingerprint that `--allow-changed-data` lets differ.
_DATA = frozenset(("data_digest",))


def newest_of_same_run(
    saves: Saves, ours: Mapping[str, Any], options: TrainingOptions
) -> dict[str, Any] | None:
    """The newest checkpoint, None without any; nothing is changed yet.

    Args:
        saves: of the run folder.
        ours: this call's fingerprint.
        options: of this call.

    Raises:
        TrainingError: this call may not go on from it.
    """
    newest = saves.newest()
    if newest is None:
        return None
    state = saves.read(newest)
    theirs = from_json(state["fingerprint"])
    check_same_run(theirs if isinstance(theirs, dict) else {}, ours, options)
    if newest > options.steps:
        raise TrainingError(
            f"steps is {options.steps}, but {options.out} has trained {newest} already; ask for as "
            "many or more"
        )
    return state


def check_same_run(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], options: TrainingOptions
) -> None:
    """Refuse to go on with another run.

    Args:
        theirs: the checkpoint's fingerprint.
        ours: this call's.
        options: whether data may have changed, and the folder's name.

    Raises:
        TrainingError: something differs that makes two runs two.
    """
    different = sorted(
        name
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name] and not (options.allow_changed_data and name in _DATA)
    )
    if "kind" in different:
        raise TrainingError(
            f"{options.out} holds the training of a {theirs['kind']}, and this is one of a "
            f"{ours['kind']}; choose another run folder"
        )
    if "class_names" in different:
        # Before the geometry, which counts the classes.
        raise TrainingError(_other_classes(theirs["class_names"], ours["class_names"], options))
    if not different:
        return
    name = different[0]
    if name in _DATA:
        raise TrainingError(
            f"the images of {written(options.data)} are not those that {options.out} was trained "
            "on (added, removed or changed); --allow-changed-data goes on with them as they are now"
        )
    if name == "init":
        before, now = (_weights(value) for value in (theirs[name], ours[name]))
        raise TrainingError(
            f"{options.out} holds another run: that started from {before}, this one from {now}; "
            "choose another run folder or the same --init, whose file need not exist any longer"
        )
    before, now = _apart(theirs[name], ours[name])
    again = ", --init too if it had one" if name == "geometry" and options.init is None else ""
    raise TrainingError(
        f"{options.out} holds another run: its {name} is {_short(before)}, now it is "
        f"{_short(now)}; choose another run folder or the same settings{again}"
    )


def changes(theirs: Mapping[str, Any], options: TrainingOptions) -> dict[str, list[Any]]:
    """Options that decide what is trained and differ, each as [before, now]."""
    ours = json.loads(json.dumps(recipe(options)))
    return {
        name: [theirs[name], value]
        for name, value in ours.items()
        if name in theirs and theirs[name] != value and name not in _HOUSEKEEPING
    }


def _other_classes(theirs: list[str], ours: list[str], options: TrainingOptions) -> str:
    added, gone = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    parts = [
        f"{what} {_short(names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for what, names in (("has now", added), ("has no longer", gone))
        if names
    ]
    return (
        f"{options.out} was trained on other classes: {written(options.data)} "
        f"{' and '.join(parts) or 'lists them in another order'}; a model's classes cannot change, "
        "so choose another run folder"
    )


def _weights(mark: Mapping[str, str] | None) -> str:
    if mark is None:
        return "random weights"
    digest = mark.get("sha256")
    return _short(mark["name"]) + (f" (sha256 {digest[:8]}...)" if digest else "")


def _apart(theirs: Any, ours: Any) -> tuple[Any, Any]:
    """Two values; of mappings what differs, or it would be lost among what does not."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        return theirs, ours
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return {name: theirs.get(name) for name in names}, {name: ours[name] for name in names}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
