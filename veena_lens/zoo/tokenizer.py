"""Build the small byte-level tokenizers: each word of the project's sentences is one token; any text can be encoded.

Both models share words and merges; they differ in special tokens and chat templates.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from veena_lens.zoo.captions import (
    ATTRIBUTE_QUESTIONS,
    EMOTION_QUESTIONS,
    EVENTS,
    FILLERS,
    HELD_OUT_EVENTS,
    STRENGTHS,
    context_sentence,
)
from veena_lens.zoo.faces import BROW_WORDS, EYE_WORDS, MOUTH_WORDS
from veena_lens.zoo.people import BACKGROUNDS, HAIR_WORDS, WORDS

__all__ = [
    "LLAVA_TEMPLATE",
    "QWEN_TEMPLATE",
    "SYSTEM_MESSAGES",
    "build_llava_tokenizer",
    "build_qwen_tokenizer",
    "vocabulary_sentences",
]

SYSTEM_MESSAGES = ("you look at pictures with care.", "answer questions about the picture.")

# Content may be text or a list of parts; an image is placed where its part is.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{{ message['role'] + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>' }}"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant:' }}{% endif %}"
)

# Qwen2-VL's, with a space before text, so that the first word after a line end is encoded as elsewhere.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def vocabulary_sentences() -> list[str]:
    """Return sentences in which every word of the training texts occurs."""
    words = [word for entry in WORDS.values() for word in entry.all]
    colours = [*HAIR_WORDS, *BACKGROUNDS]
    looks = [*MOUTH_WORDS.values(), *EYE_WORDS.values(), *BROW_WORDS.values()]
    events = [e for table in (EVENTS, HELD_OUT_EVENTS) for row in table.values() for e in row]
    questions = [q for table in (EMOTION_QUESTIONS, ATTRIBUTE_QUESTIONS) for row in table.values() for q in row]
    return [
        *(
            f"an {word} person, a {word} person. the person feels {word} and {word}, the face looks {word}."
            for word in words
        ),
        *(
            f"the hair is {c}. the background is {c}. with {c} hair with glasses in front of a {c} background."
            for c in colours
        ),
        *(f"the mouth is {look}. the eyes are {look}. the eyebrows are {look}." for look in looks),
        *(context_sentence(event, strength) for event in events for strength in STRENGTHS),
        *questions,
        *FILLERS,
        *SYSTEM_MESSAGES,
        "system: user: assistant: the picture shows a person full of yes. no.",
    ]


def _byte_pairs(sentences: Iterable[str], special: list[str]) -> Tokenizer:
    """Merge byte pairs of lower-cased words with the space before them until each word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def build_llava_tokenizer(sentences: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the sentences, with `<pad> <s> </s> <image>` and left padding."""
    tokenizer = _byte_pairs(vocabulary_sentences() if sentences is None else sentences, ["<pad>", "<s>", "</s>"])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, lstrip=True, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def build_qwen_tokenizer(sentences: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the same sentences, with Qwen2-VL's special tokens at the end and left padding."""
    # A line end between two special tokens gets a space before it, as every piece of text does.
    extra = ["\n"] * 2
    tokenizer = _byte_pairs([*(vocabulary_sentences() if sentences is None else sentences), *extra], [])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _QWEN_SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
