"""The questions that the demo and the explorer ask the embedded models: those that they were trained on."""

from veena_lens.zoo.captions import EMOTION_QUESTIONS

DESCRIBE = EMOTION_QUESTIONS["caption"][0]
FEELING = EMOTION_QUESTIONS["sentence"][0]
LIST = EMOTION_QUESTIONS["list"][0]  # its answer begins with the emotion's word
