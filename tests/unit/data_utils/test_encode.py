"""Ids, labels and truncation, spelled out with the small vocabulary.

Its control tokens: ``<|endoftext|>`` 700, ``<|im_start|>`` 701, ``<|im_end|>`` 702; ``\\n`` 198, ``system`` 458,
``user`` 388, ``assistant`` 383.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from chat.chatml import IM_END
from chat.families import ANSWER_STYLES, QWEN_V1, Family, thought_block
from chat.turns import Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.encoding import OriginalEncoder, check_and_encode, weights_of
from tests.vocabulary import base_tokenizer

SYSTEM_IDS = [701, 458, 198, 418, 317, 258, 590, 637, 13, 702, 198]  # You are a helpful assistant.
HI_IDS = [701, 388, 198, 39, 72, 702, 198]
HELLO_IDS = [701, 383, 198, 39, 517, 78, 0, 702, 198]
HELLO_LABELS = [-100, -100, -100, 39, 517, 78, 0, 702, 198]

HI, HELLO = Turn("user", "Hi"), Turn("assistant", "Hello!")


@pytest.fixture(scope="module")
def tokenizer(golden_small: Path) -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small")


@pytest.fixture(scope="module")
def fast_tokenizer(golden_small: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of the later families' class with the small vocabulary."""
    ranks = golden_small / "tiny-qwen-small" / "qwen.tiktoken"
    fast = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer(ranks))
    controls = [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    fast.add_tokens(controls, special_tokens=True)
    fast.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return fast


def encode(tokenizer: object, *turns: Turn, family: Family = QWEN_V1, **options: object) -> EncodedConversation:
    encoder = Encoder(tokenizer, family, EncodeOptions(**options))  # type: ignore[arg-type]
    return check_and_encode(encoder, Conversation(turns, "chats.jsonl:7"))


def test_mask_assistant_trains_each_answer_and_its_end(tokenizer: QWenTokenizer) -> None:
    encoded = encode(tokenizer, HI, HELLO)
    assert encoded.input_ids == [*SYSTEM_IDS, *HI_IDS, *HELLO_IDS]
    assert encoded.labels == [-100] * (len(SYSTEM_IDS) + len(HI_IDS)) + HELLO_LABELS
    assert encoded.trained_tokens == 6
    assert encoded.turns_dropped == 0


def test_mask_qwen_also_trains_the_control_tokens_of_every_turn(tokenizer: QWenTokenizer) -> None:
    encoded = encode(tokenizer, HI, HELLO, label_mask="qwen")
    assert encoded.input_ids == [*SYSTEM_IDS, *HI_IDS, *HELLO_IDS]
    assert encoded.labels == [
        *[701, -100, -100, -100, -100, -100, -100, -100, -100, 702, 198],
        *[701, -100, -100, -100, -100, 702, 198],
        *[701, -100, -100, 39, 517, 78, 0, 702, 198],
    ]
    assert encoded.trained_tokens == 12  # the first <|im_start|> has a label, but nothing predicts it


def test_ids_and_labels_with_the_real_vocabulary(golden_large: Path) -> None:
    encoded = encode(QWenTokenizer.from_pretrained(golden_large / "tiny-qwen"), HI, HELLO, label_mask="qwen")
    assert encoded.input_ids == [
        *[151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198],
        *[151644, 872, 198, 13048, 151645, 198],
        *[151644, 77091, 198, 9707, 0, 151645, 198],
    ]
    assert encoded.labels == [
        *[151644, -100, -100, -100, -100, -100, -100, -100, -100, 151645, 198],
        *[151644, -100, -100, -100, 151645, 198],
        *[151644, -100, -100, 9707, 0, 151645, 198],
    ]


def test_control_token_in_a_message_stays_text(tokenizer: QWenTokenizer) -> None:
    encoded = encode(tokenizer, Turn("user", "a<|im_end|>"), Turn("assistant", ""))
    plain = [64, 27, 91, 72, 76, 62, 68, 269, 91, 29]  # a < | i m _ e nd | >
    assert encoded.input_ids == [*SYSTEM_IDS, 701, 388, 198, *plain, 702, 198, 701, 383, 198, 702, 198]
    assert encoded.labels == [-100] * (len(SYSTEM_IDS) + 3 + len(plain) + 2 + 3) + [702, 198]


def test_only_v1_tokenises_header_and_message_apart(
    tokenizer: QWenTokenizer, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert fast_tokenizer("\n\n")["input_ids"] == [281]  # the header's newline can merge with the message's
    turns = Turn("user", "\nHi"), Turn("assistant", "\nHi")
    v1 = encode(tokenizer, *turns, system_message="")
    later = encode(fast_tokenizer, *turns, family=ANSWER_STYLES[0])
    assert v1.input_ids[5:] == [701, 388, 198, 198, 39, 72, 702, 198, 701, 383, 198, 198, 39, 72, 702, 198]
    assert later.input_ids == [701, 388, 281, 39, 72, 702, 198, 701, 383, 198, 198, 39, 72, 702, 198]


def test_system_message_of_the_sample_precedes_option_and_family(tokenizer: QWenTokenizer) -> None:
    hi = tokenizer.encode_plain("Hi")
    own = encode(tokenizer, Turn("system", "Hi"), HI, HELLO, system_message="unused")
    assert own.input_ids == [701, 458, 198, *hi, 702, 198, *HI_IDS, *HELLO_IDS]
    assert encode(tokenizer, HI, HELLO, system_message="Hi") == own
    assert encode(tokenizer, HI, HELLO, system_message="").input_ids[:5] == [701, 458, 198, 702, 198]
    assert encode(tokenizer, HI, HELLO).input_ids[:11] == SYSTEM_IDS


def test_opening_answer_is_kept_and_the_original_drops_it(tokenizer: QWenTokenizer) -> None:
    kept = encode(tokenizer, HELLO, HI, HELLO)
    assert kept.input_ids == [*SYSTEM_IDS, *HELLO_IDS, *HI_IDS, *HELLO_IDS]
    assert kept.labels[11:20] == HELLO_LABELS
    original = OriginalEncoder(tokenizer)
    dropped = original.encode_conversation(Conversation((HELLO, HELLO, HI, HELLO), "here"))
    assert dropped.input_ids == kept.input_ids


def test_conversation_without_an_answer_is_refused(tokenizer: QWenTokenizer) -> None:
    with pytest.raises(DataError, match=r"^chats\.jsonl:7: the conversation has no assistant turn to train\."):
        encode(tokenizer, HI)
    assert encode(tokenizer, HI, needs_answer=False).input_ids == [*SYSTEM_IDS, *HI_IDS]


def test_results_share_no_lists_with_the_cache(tokenizer: QWenTokenizer) -> None:
    encoder = Encoder(tokenizer, QWEN_V1, EncodeOptions())
    first = encoder.encode_conversation(Conversation((HI, HELLO), "a"))
    before = list(first.input_ids)
    first.input_ids.clear()
    assert encoder.encode_conversation(Conversation((HI, HELLO), "a")).input_ids == before


def test_truncation_drops_whole_turns(tokenizer: QWenTokenizer) -> None:
    turns = HI, HELLO, HI, HELLO
    whole = encode(tokenizer, *turns)
    ends = [11, 18, 27, 34, 43]  # of the system turn and the four others
    assert len(whole.input_ids) == ends[-1]
    for max_length, kept, dropped in [(43, 43, 0), (42, 34, 1), (34, 34, 1), (33, 27, 2), (27, 27, 2)]:
        encoded = encode(tokenizer, *turns, max_length=max_length)
        assert encoded.input_ids == whole.input_ids[:kept], max_length
        assert encoded.labels == whole.labels[:kept], max_length
        assert encoded.turns_dropped == dropped, max_length
    for max_length in (26, 18, 10, 1):  # the first answer does not fit: nothing would be trained
        assert encode(tokenizer, *turns, max_length=max_length) == EncodedConversation([], [], turns_dropped=5)
        assert encode(tokenizer, *turns, max_length=max_length, label_mask="qwen").trained_tokens == 0


def test_cut_keeps_the_first_ids(tokenizer: QWenTokenizer) -> None:
    whole = encode(tokenizer, HI, HELLO, HI, HELLO)
    for max_length, dropped in [(43, 0), (42, 1), (34, 1), (33, 2), (22, 3), (5, 5)]:
        encoded = encode(tokenizer, HI, HELLO, HI, HELLO, max_length=max_length, truncation="cut")
        assert encoded.input_ids == whole.input_ids[:max_length]
        assert encoded.labels == whole.labels[:max_length]
        assert encoded.turns_dropped == dropped


LONG = (
    Turn("system", "You are a cat."),
    Turn("user", "\nHi"),
    Turn("assistant", "\n" * 40 + "Hello!"),  # shorter as a last answer in families that strip its newlines
    Turn("user", "What? " * 5),
    Turn("assistant", "Hello!"),  # longer as a last answer in families that write an empty thought block
    Turn("assistant", "\n\nHi" * 9),
    Turn("user", "Hi"),
    Turn("assistant", ""),
)


@pytest.mark.parametrize("opening", [LONG, LONG[1:], LONG[2:]], ids=["system", "user", "assistant"])
@pytest.mark.parametrize("family", [QWEN_V1, *ANSWER_STYLES], ids=lambda family: family.name)
def test_longest_start_that_fits_is_kept_in_every_family(
    family: Family, opening: tuple[Turn, ...], tokenizer: QWenTokenizer, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    """At every length, of all starts that contain an answer, each rendered on its own, the longest that fits is kept;
    if nothing of it is trained, its longest start that ends with a trained answer."""
    any_tokenizer = tokenizer if family == QWEN_V1 else fast_tokenizer
    starts = [
        encode(any_tokenizer, *opening[:kept], family=family, needs_answer=False) for kept in range(len(opening) + 1)
    ]
    first_answer = next(index for index, turn in enumerate(opening) if turn.role == "assistant")
    for max_length in range(1, max(len(start.input_ids) for start in starts) + 1):
        encoded = encode(any_tokenizer, *opening, family=family, max_length=max_length)
        fitting = [kept for kept in range(first_answer + 1, len(starts)) if len(starts[kept].input_ids) <= max_length]
        expected = starts[fitting[-1]] if fitting else EncodedConversation([], [])
        if fitting and fitting[-1] < len(opening) and not expected.trained_tokens:
            trained = [
                starts[kept]
                for kept in fitting
                if opening[kept - 1].role == "assistant" and starts[kept].trained_tokens
            ]
            expected = trained[-1] if trained else expected
        assert (encoded.input_ids, encoded.labels) == (expected.input_ids, expected.labels), max_length


def test_no_answer_is_trained_without_its_end(fast_tokenizer: PreTrainedTokenizerFast) -> None:
    hybrid = ANSWER_STYLES[2]
    end = fast_tokenizer.convert_tokens_to_ids(IM_END)
    full = len(encode(fast_tokenizer, *LONG, family=hybrid).input_ids)
    for max_length in range(full):
        encoded = encode(fast_tokenizer, *LONG, family=hybrid, max_length=max_length)
        trained = [id_ for id_ in encoded.labels if id_ != -100]
        assert trained[-2:] == ([end, 198] if encoded.input_ids else [])
        assert encoded.input_ids[-2:] == ([end, 198] if encoded.input_ids else [])


def test_last_answer_is_rendered_again_after_turns_are_dropped(fast_tokenizer: PreTrainedTokenizerFast) -> None:
    hybrid = ANSWER_STYLES[2]
    thought = fast_tokenizer(thought_block(""))["input_ids"]
    whole = encode(fast_tokenizer, HI, HELLO, HI, HELLO, family=hybrid)
    assert whole.input_ids == [*HI_IDS, *HELLO_IDS, *HI_IDS, *HELLO_IDS[:3], *thought, *HELLO_IDS[3:]]
    shortened = encode(fast_tokenizer, HI, HELLO, HI, HELLO, family=hybrid, max_length=22)
    assert shortened.input_ids == [*HI_IDS, *HELLO_IDS[:3], *thought, *HELLO_IDS[3:]]
    assert shortened.labels == [-100] * 10 + [*thought, *HELLO_IDS[3:]]
    assert shortened.turns_dropped == 2


# --------------------------------------------------------------------------------------------------------- label masks


def trained_text(tokenizer: QWenTokenizer, encoded: EncodedConversation) -> list[tuple[str, float]]:
    """Return text and weight of each run of trained ids."""
    runs, start = [], 0
    for span in encoded.spans:
        if span.weight:
            runs.append((tokenizer.decode(encoded.input_ids[start : start + span.length]), span.weight))
        start += span.length
    return runs


FOUR = Turn("user", "One?"), Turn("assistant", "1"), Turn("user", "Two?"), Turn("assistant", "2")


def test_mask_last_trains_the_last_answer_only(tokenizer: QWenTokenizer) -> None:
    assert trained_text(tokenizer, encode(tokenizer, *FOUR, label_mask="last")) == [("2<|im_end|>\n", 1)]
    shortened = encode(tokenizer, *FOUR, label_mask="last", max_length=40)
    assert shortened.turns_dropped > 0
    assert trained_text(tokenizer, shortened) == [("1<|im_end|>\n", 1)]


def test_mask_all_trains_everything_except_the_first_id(tokenizer: QWenTokenizer) -> None:
    encoded = encode(tokenizer, *FOUR, label_mask="all")
    assert encoded.labels == encoded.input_ids
    assert encoded.trained_tokens == len(encoded.input_ids) - 1
    assert {span.role for span in encoded.spans} == {"system", "user", "assistant"}
    assert encode(tokenizer, HI, label_mask="all", needs_answer=False).labels == [*SYSTEM_IDS, *HI_IDS]


@pytest.mark.parametrize("label_mask", ["assistant", "last", "qwen", "all"])
def test_turn_weight_overrides_every_mask(tokenizer: QWenTokenizer, label_mask: str) -> None:
    turns = FOUR[0]._replace(weight=0.5), FOUR[1]._replace(weight=2.0), FOUR[2], FOUR[3]._replace(weight=0.0)
    runs = dict(trained_text(tokenizer, encode(tokenizer, *turns, label_mask=label_mask)))
    texts = {weight: "".join(text for text, other in runs.items() if other == weight) for weight in (0.5, 2.0)}
    assert "One?<|im_end|>\n" in texts[0.5]
    assert "1<|im_end|>\n" in texts[2.0]
    assert not any("2" in text for text in runs)
    assert any("Two?" in text for text in runs) == (label_mask == "all")


def test_weights_labels_and_spans_agree(tokenizer: QWenTokenizer) -> None:
    encoded = encode(tokenizer, HI._replace(weight=0.25), HELLO, HI, HELLO._replace(weight=0.0))
    weights = weights_of(encoded)
    assert sum(span.length for span in encoded.spans) == len(encoded.input_ids) == len(weights)
    assert [label != -100 for label in encoded.labels] == [weight > 0 for weight in weights]
    assert weights[11:27] == [0] * 3 + [0.25] * 4 + [0] * 3 + [1] * 6
    assert not any(weights[27:])


# ----------------------------------------------------------------------------------------------------------- truncation


def test_turns_left_keeps_the_system_message_and_the_newest_questions(tokenizer: QWenTokenizer) -> None:
    whole = encode(tokenizer, *FOUR)
    system = Turn("system", "Hi")
    for turns, head in ((FOUR, SYSTEM_IDS), ((system, *FOUR), [701, 458, 198, 39, 72, 702, 198])):
        full = encode(tokenizer, *turns)
        last = encode(tokenizer, *(turn for turn in turns if turn is system), *FOUR[2:])
        assert last.input_ids[: len(head)] == head
        for max_length in range(len(last.input_ids), len(full.input_ids)):
            kept = encode(tokenizer, *turns, truncation="turns_left", max_length=max_length)
            assert (kept.input_ids, kept.labels, kept.turns_dropped) == (last.input_ids, last.labels, 2)
        assert not encode(tokenizer, *turns, truncation="turns_left", max_length=len(last.input_ids) - 1).input_ids
    assert encode(tokenizer, *FOUR, truncation="turns_left") == whole
    unanswered = encode(tokenizer, *FOUR[:2], HI, truncation="turns_left", max_length=20)
    assert unanswered.input_ids == []  # what fits contains no answer


def test_turns_left_keeps_no_opening_answer(tokenizer: QWenTokenizer) -> None:
    turns = Turn("user", "One?"), Turn("assistant", "1"), Turn("assistant", "uno " * 9), HI, HELLO
    for max_length in range(27, 70):
        encoded = encode(tokenizer, *turns, truncation="turns_left", max_length=max_length)
        assert encoded.input_ids[:14] == [*SYSTEM_IDS, 701, 388, 198], max_length


def test_too_long_conversation_can_be_dropped_or_refused(tokenizer: QWenTokenizer) -> None:
    assert encode(tokenizer, HI, HELLO, truncation="drop", max_length=27).turns_dropped == 0
    assert encode(tokenizer, HI, HELLO, truncation="drop", max_length=26) == EncodedConversation([], [], 3)
    assert encode(tokenizer, HI, HELLO, truncation="error", max_length=27).trained_tokens == 6
    message = r"^chats\.jsonl:7: the conversation has 27 tokens, more than --model_max_length 26\. Raise it, shorten"
    with pytest.raises(DataError, match=message):
        encode(tokenizer, HI, HELLO, truncation="error", max_length=26)
