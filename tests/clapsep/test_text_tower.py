"""The default's text tower: its tokenizer, the joint space, and what distillation learns."""

import numpy as np
import torch

from clapsep.training import pretrain, text_tower, tokens, vocabulary
from tests.clapsep.training_runs import tiny_mini


def test_words_are_spelled_in_parts_and_case_does_not_matter():
    tokenizer = tokens.build_tokenizer(["dog", "bark", "##ing", "a"], 8)
    assert tokenizer.encode("A dog, barking!").tokens == ["<s>", "a", "dog", "bark", "##ing", "</s>"]
    assert tokenizer.encode("a cat").tokens == ["<s>", "a", "<unk>", "</s>"]


def test_joint_space_draws_classes_apart_and_their_wordings_together():
    rng = torch.Generator().manual_seed(0)
    # What all texts share, a little that tells classes apart, and much that tells wordings apart.
    shared, classes = torch.randn(1, 384, generator=rng), torch.randn(6, 384, generator=rng)
    wordings = torch.randn(12, 384, generator=rng)

    def texts(number):
        noise = torch.randn(8, 12, generator=rng) @ wordings
        return torch.nn.functional.normalize(4 * shared + classes[number] + 0.7 * noise, dim=-1)

    def closeness(rows):
        return float((rows @ rows.T).mean())

    given = {str(number): texts(number) for number in range(6)}
    space = text_tower.JointSpace(given, 16)
    fresh = [texts(number) for number in range(6)]
    means = torch.stack([space(rows).mean(0) for rows in fresh])
    assert means.shape == (6, 16)
    assert closeness(torch.cat(fresh)) > 0.6 > 0.2 > closeness(torch.cat([space(rows) for rows in fresh]))
    told = [int((space(row[None]) @ means.T).argmax()) for rows in fresh for row in rows]
    assert np.mean([number == index // 8 for index, number in enumerate(told)]) > 0.9


def test_the_joint_space_is_the_same_whatever_order_its_wordings_come_in():
    rng = torch.Generator().manual_seed(0)
    # As of real texts, a few directions hold most of the variance.
    scales = 2.0 * 0.8 ** torch.arange(384)
    given = {str(number): scales * torch.randn(20, 384, generator=rng) for number in range(6)}
    turned = {name: rows.flip(0) for name, rows in reversed(given.items())}
    one, other = text_tower.JointSpace(given, 16), text_tower.JointSpace(turned, 16)
    texts = torch.randn(20, 384, generator=rng)
    torch.testing.assert_close(one(texts), other(texts), atol=1e-5, rtol=1e-5)


def test_text_tower_learns_its_lesson():
    wordings = {name: vocabulary.all_wordings()[name] for name in ("dog", "speech", "drums")}
    lesson = text_tower.Lesson.prepare(
        wordings, 16, count=300, seed=0, most_words=300, held_out={"drizzle", "string quartet"}
    )
    assert {"dog", "speech", "##s", "q"} <= set(lesson.vocabulary)
    known = {word for word in lesson.vocabulary if len(word) > 1 and not word.startswith(("#", "<"))}
    assert known - set(lesson.texts) == {"drizzle"}
    assert "string quartet" not in lesson.texts
    # What is near to a sound is drawn more often than what is not.
    drawn = dict(zip(lesson.texts, lesson.weights.tolist(), strict=True))
    assert min(drawn["barking"], drawn["drum kit"]) > 0.8 > 0.5 > drawn["office"] > 0
    clap, tokenizer = pretrain.pretrain_text(tiny_mini(), lesson, steps=400, seed=0)
    with torch.no_grad():
        learned = clap.embed_text(*tokens.tokens(tokenizer, lesson.named))
    assert float((learned * lesson.named_aims).sum(-1).mean()) > 0.5
    found = text_tower.retrieved(clap, tokenizer, wordings, {"dog": ["a dog that barks"]})
    assert found == {"dog": [("a dog that barks", "dog")]}
    one, other = (pretrain.pretrain_text(tiny_mini(), lesson, steps=5, seed=0)[0] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def test_texts_that_measure_free_wording_are_not_trained_on():
    trained = {text for texts in vocabulary.all_wordings().values() for text in texts}
    assert set(vocabulary.UNSEEN) == set(vocabulary.BY_NAME)
    assert not trained & {text for texts in vocabulary.UNSEEN.values() for text in texts}
