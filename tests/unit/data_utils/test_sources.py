"""Values of ``--data_path`` and the sampling of their records; placeholders of ``--fill``."""

from __future__ import annotations

from pathlib import Path

import pytest

from chat.turns import Turn
from data_utils.sources import RecordSampler, Source, fill_turns, parse_fill, parse_source
from errors import ConfigError


@pytest.mark.parametrize(
    ("suffix", "sample", "factor"),
    [("", None, 1), ("#5", 5, 1), ("@x2", None, 2), ("@x.5", None, 0.5), ("@x2.25", None, 2.25), ("#5@x3", 5, 3)],
)
def test_suffixes_give_sample_and_factor(suffix: str, sample: int | None, factor: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    name = f"{path}{suffix}"
    assert parse_source(name) == Source(name, path, sample, factor)


def test_existing_file_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a#5@x2"
    path.touch()
    assert parse_source(str(path)) == Source(str(path), path)
    assert parse_source(f"{path}#7").path == path
    assert parse_source(f"{path}#7").sample == 7


@pytest.mark.parametrize("suffix", ["#", "#x", "@2", "@x", "@x2#5", "#-1", "@xnan", "#5.5"])
def test_invalid_suffix_is_part_of_the_name(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(ConfigError, match="there is no such file"):
        parse_source(f"{tmp_path}/a.json{suffix}")


@pytest.mark.parametrize("suffix", ["#0", "@x0", "@x0.0"])
def test_sample_or_factor_of_0_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(ConfigError, match="takes nothing"):
        parse_source(f"{tmp_path}/a.json{suffix}")


def draw(
    total: int, sample: int | None = None, factor: float = 1, eval_share: float = 0, seed: int = 1
) -> list[tuple[int, int]]:
    sampler = RecordSampler(Source("a", Path("a"), sample, factor), total, eval_share, seed)
    return [sampler.next_copies() for _ in range(total)]


def test_numbers_of_copies_are_exact() -> None:
    for seed in range(50):
        assert sum(train for train, _ in draw(97, 10, seed=seed)) == 10
        assert sum(train for train, _ in draw(10, 99, seed=seed)) == 10
        assert sum(train for train, _ in draw(100, factor=0.3, seed=seed)) == 30
        copies = draw(100, 80, 2.5, 0.1, seed)
        assert sum(held_out for _, held_out in copies) == 8
        assert sum(train for train, _ in copies) == 2 * 72 + 36
        assert not any(train and held_out for train, held_out in copies)
        assert sum(held_out for _, held_out in draw(5, eval_share=0.01, seed=seed)) == 1


def test_every_record_is_equally_likely() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for index, (train, _) in enumerate(draw(10, 3, seed=seed)):
            counts[index] += train
    assert sum(counts) == 6000
    assert all(500 < count < 700 for count in counts)


def test_seed_determines_the_choice() -> None:
    assert draw(1000, 100) == draw(1000, 100)
    assert draw(1000, 100) != draw(1000, 100, seed=2)


def test_fill_values_are_parsed() -> None:
    assert parse_fill(["name=Linden", " a =x=y", "empty="]) == {"name": "Linden", "a": "x=y", "empty": ""}
    for value in ("name", "=x", ""):
        with pytest.raises(ConfigError, match="is not name=text"):
            parse_fill([value])


def test_placeholders_in_texts_and_thinking_are_filled() -> None:
    turns = [
        Turn("user", "I am {{ name }}, {{ who }}?"),
        Turn("assistant", "{{name}}", weight=0.5, thinking="{{name}} {{what}}"),
    ]
    assert fill_turns(turns, {"name": "{{who}}"}) == (
        (
            Turn("user", "I am {{who}}, {{ who }}?"),
            Turn("assistant", "{{who}}", weight=0.5, thinking="{{who}} {{what}}"),
        ),
        {"name", "who", "what"},
    )
