"""Check that a base is the one that adapters were trained on, from the records that finetune.py saves with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.adapter import Adapter
from checkpoints.files import load_json
from checkpoints.model_config import find_quantization, load_base_quantization
from checkpoints.names import RUN_SUMMARY
from checkpoints.shards import fingerprint
from errors import ConfigError, numbered

logger = logging.getLogger(__name__)


def check_trained_on(
    base: Path,
    adapters: Sequence[Adapter],
    any_base: bool,
    flags: tuple[str, str] = ("--adapter", "--base"),
    base_is_given: bool = True,
) -> None:
    """Compare a base with the fingerprints recorded in the adapters' folders; adapters without a record pass.

    Args:
        base: folder of the base.
        any_base: warn of a mismatch instead of raising.
        flags: the flags that named adapters and base.
        base_is_given: whether its flag named the base; otherwise it is the one that the first adapter names.

    Raises:
        ConfigError: an adapter was trained on another base, or the adapters on different ones.
    """
    faults = _different_bases(adapters, base_is_given)
    known = _fingerprints(base) if any(_recorded_fingerprint(adapter) for adapter in adapters) else set()
    for adapter in adapters:
        if _recorded_fingerprint(adapter) in (None, *known):
            continue
        if base_is_given and _trained_on_quantized_files(adapter) and find_quantization(base) is None:
            logger.info(
                "%s was trained on a quantised base: its changes are added to the unquantised weights of %s instead",
                adapter.folder,
                base,
            )
            continue
        faults.append(
            f"{flags[0]} {adapter.folder} was trained on other weights than those of {base}: the fingerprint in its "
            f"{RUN_SUMMARY} differs"
        )
    if faults and not any_base:
        fix = (
            f"Give the right base with {flags[1]}; if it has the same values in other files, or to use it anyway, "
            "add --any_base"
        )
        raise ConfigError(faults[0] if len(faults) == 1 else numbered("the adapters do not fit", faults), fix)
    for fault in faults:
        logger.warning("%s. The model may answer differently from the trained one", fault)


def _different_bases(adapters: Sequence[Adapter], base_is_given: bool) -> list[str]:
    """Return a fault per adapter that was trained on another base than the first."""
    first = adapters[0]
    faults = []
    for other in adapters[1:]:
        fingerprints = _recorded_fingerprint(first), _recorded_fingerprint(other)
        names = [str(each.config.get("base_model_name_or_path")) for each in (first, other)]
        if None not in fingerprints:
            differ = fingerprints[0] != fingerprints[1]
        else:  # with --base the names are not compared: the folder may have moved between the two runs
            differ = names[0] != names[1] and not base_is_given
        if differ:
            both = f"{first.folder} ({names[0]}) and {other.folder} ({names[1]})"
            faults.append(f"--adapter: {both} were trained on different bases")
    return faults


def _summary(adapter: Adapter) -> dict[str, Any]:
    file = adapter.folder / RUN_SUMMARY
    return load_json(file) if file.is_file() else {}


def _recorded_fingerprint(adapter: Adapter) -> str | None:
    value = _summary(adapter).get("base_fingerprint")
    return value if isinstance(value, str) else None


def _fingerprints(base: Path) -> set[str]:
    """Fingerprints of the base and, if it was converted from another layout, of its origin with the same values."""
    origin = load_json(base / "config.json").get("converted_from")
    recorded = {str(origin.get("fingerprint"))} if isinstance(origin, dict) else set()
    return {fingerprint(base), *recorded}


def _trained_on_quantized_files(adapter: Adapter) -> bool:
    """Return whether the base's files were quantised already, rather than its weights while loading."""
    recorded = _summary(adapter).get("base_is_quantized")
    if recorded is not None:
        return bool(recorded)
    quantization = load_base_quantization(adapter.folder)
    return quantization is not None and quantization.is_packed
