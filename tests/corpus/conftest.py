"""Small real tokenizers with the kinds of chat templates that are in use."""

import pytest

from chat_templates import TEMPLATES

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "An iterable is an object capable of returning its members one at a time.",
    "Wörter mit Umlauten, naïve café, 東京, and an emoji 🙂 or two 🙃🙂.",
    "user assistant system What is the capital of France? The capital is Paris.",
    "def function(argument):\n    return argument + 1\n\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


@pytest.fixture(scope="session")
def build_tokenizer():
    """build_tokenizer(template=None, bos=False): byte-level BPE of about 380 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def build(template=None, *, bos=False, **options):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(LINES * 3, trainer)
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", model_max_length=64, **options
        )
        tokenizer.chat_template = TEMPLATES[template] if template else None
        return tokenizer

    return build


@pytest.fixture(scope="session")
def tokenizer(build_tokenizer):
    """The plain one."""
    return build_tokenizer()
