"""The tokenizer: nothing lost, things in one token, a frame that survives saving."""

import numpy as np
import pytest

from epo_jax.common.errors import UserError
from epo_jax.models.tokenizer import compose_embedding, load_tokenizer, train_tokenizer

TEXTS = [
    "You arrive at cabinet 3. On the cabinet 3, you see a mug 1, and a apple 2.",
    "You arrive at shelf 1. On the shelf 1, you see nothing.",
    "put some apple in cabinet",
    "take apple 2 from cabinet 3",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 500)


@pytest.mark.parametrize("text", [*TEXTS[:4], "Grüße, 世界 \n\t {}", "cabinet 17 apple", ""])
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_numbered_thing_is_one_token_and_a_task_keeps_its_words(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" apple 2 from cabinet 3")]
    assert " apple 2" in pieces and " cabinet 3" in pieces
    assert [tokenizer.decode([i]) for i in tokenizer.encode("put some apple in cabinet")] == [
        "put", " some", " apple", " in", " cabinet"
    ]  # fmt: skip


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(TEXTS, 500)
    assert again.backend.to_str() == tokenizer.backend.to_str()


def test_a_conversation_is_observation_reply_answer_stop(tokenizer):
    ids = tokenizer.first("mug 1") + tokenizer.answer("take mug 1") + tokenizer.following("shelf 1", tokenizer.stop_id)
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text == "mug 1<|agent|>take mug 1<|end|>shelf 1<|agent|>"
    assert tokenizer.answer("x")[-1] == tokenizer.stop_id


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.frame == tokenizer.frame
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_numbered_thing_starts_as_its_noun_and_its_number():
    tokenizer = train_tokenizer(["put some apple in cabinet", "a apple 2 in a cabinet 2 and a cabinet 3"] * 20, 400)
    embedding = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 8)).astype(np.float32)
    composed = compose_embedding(embedding, tokenizer, seed=0)
    ids = {word: tokenizer.encode(f" {word}")[0] for word in ("apple", "cabinet", "apple 2", "cabinet 2", "cabinet 3")}
    number = {word: composed[i] * 2**0.5 - embedding[ids[word.split()[0]]] for word, i in ids.items() if " " in word}
    np.testing.assert_allclose(number["apple 2"], number["cabinet 2"], atol=1e-5)
    assert np.abs(number["cabinet 2"] - number["cabinet 3"]).max() > 0.1
    np.testing.assert_array_equal(composed[ids["apple"]], embedding[ids["apple"]])


def test_a_set_phrase_becomes_one_token_and_the_name_in_it_another():
    texts = ["You move to the kitchen.", "You move to the greenhouse.", "go to kitchen", "go to greenhouse"] * 20
    tokenizer = train_tokenizer(texts, 400, phrases=r"(?:You move to the|go to)(?= )")
    pieces = [[tokenizer.decode([i]) for i in tokenizer.encode(text)] for text in texts[:3]]
    assert pieces == [["You move to the", " kitchen", "."], ["You move to the", " greenhouse", "."], ["go to", " kitchen"]]
