"""One engine answers with several adapters at once, each request as with its adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from errors import ConfigError
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from serving.engine import Engine
from serving.requests import Request
from tests.adapters import LINEAR, make_adapter
from tests.models import write_later_checkpoint
from tests.serving import GREEDY, alone, answers, load_engine, prompts

OPTIONS = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 8},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [300, 301, 302]}},
}
TOGETHER = ("plain", "rslora", "dora", "embeddings")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_later_checkpoint(tmp_path_factory.mktemp("adapters") / "base", "qwen2")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {name: make_adapter(base, base.parent / name, **options) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def engine(base: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    with load_engine(base, {name: folders[name] for name in TOGETHER}) as loaded:
        yield loaded


def expected_of(base: Path, folder: Path | None, request: Request) -> tuple[int, ...]:
    model = load_for_inference(load_checkpoint(str(base)), None if folder is None else str(folder))
    return alone(model, request)


def test_each_request_is_answered_with_its_adapter(base: Path, folders: dict[str, Path], engine: Engine) -> None:
    asked = [Request((300, *prompts(1)[0], 301), GREEDY, adapter=name) for name in (None, *TOGETHER)]
    expected = [expected_of(base, folders.get(each.adapter or ""), each) for each in asked]
    assert len(set(expected)) == len(expected), "every adapter changes the answer"
    assert answers(engine, asked) == expected
    for request, each in zip(asked, expected, strict=True):
        assert answers(engine, [request]) == [each]


def test_adapters_that_share_a_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, set[str | None]]] = []
    adapters = engine._scheduler._runner.adapters
    original = adapters.use

    def use(group: str | None, names: list[str | None]) -> None:
        seen.append((group, set(names)))
        original(group, names)

    monkeypatch.setattr(adapters, "use", use)
    answers(engine, [Request(prompts(1)[0], GREEDY, adapter=name) for name in (None, *TOGETHER)])
    assert {group for group, _ in seen} == {None, "dora", "embeddings"}
    assert (None, {None, "plain", "rslora"}) in seen


def test_name_of_an_adapter_picks_it(base: Path, engine: Engine, folders: dict[str, Path]) -> None:
    assert engine.adapters == TOGETHER
    for name in ("a:b", "", "base", "a\nb"):
        with pytest.raises(ConfigError, match="cannot be its name"):
            load_engine(base, {name: folders["plain"]})
    with pytest.raises(ConfigError, match="tiny is the model's name"):
        load_engine(base, {"tiny": folders["plain"]}, model_name="tiny")
    assert engine.adapter_of("dora") == engine.adapter_of("base:dora") == "dora"


@pytest.mark.parametrize("names", [("dora",), ("rows", "plain")])
def test_base_beside_an_adapter_that_runs_alone(base: Path, folders: dict[str, Path], names: tuple[str, ...]) -> None:
    prompt, short = (300, *prompts(1)[0], 301), replace(GREEDY, max_tokens=4)
    asked = [Request(prompt, short, adapter=name) for name in (None, *names, None)]
    expected = [expected_of(base, folders.get(each.adapter or ""), each) for each in asked]
    with load_engine(base, {name: folders[name] for name in names}) as engine:
        assert answers(engine, asked) == expected


def test_trained_biases_are_refused(base: Path) -> None:
    folder = make_adapter(base, base.parent / "biases", target_modules=LINEAR, bias="lora_only")
    with pytest.raises(ConfigError, match="biased has trained biases"):
        load_engine(base, {"biased": folder})


def test_adapters_that_exclude_each_other_are_refused(base: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="embeddings has trained embeddings, rows trained rows"):
        load_engine(base, {name: folders[name] for name in ("rows", "embeddings")})


def test_adapters_with_a_cache_in_8_bits_answer_together_as_alone(base: Path, folders: dict[str, Path]) -> None:
    """Each key and value is quantised on its own, so no row depends on the others, whatever their adapters."""
    names = (None, "plain", "rslora", "dora")
    with load_engine(base, {name: folders[name] for name in names if name}, kv_cache="int8") as engine:
        asked = [Request((300, *prompts(1)[0], 301), GREEDY, adapter=name) for name in names]
        together = answers(engine, asked)
        assert together == [answers(engine, [request])[0] for request in asked]
        assert len(set(together)) == len(together), "every adapter changes the answer"
