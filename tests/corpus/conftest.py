"""Small real tokenizers with the kinds of chat templates that are in use."""

import pytest

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "An iterable is an object capable of returning its members one at a time.",
    "Wörter mit Umlauten, naïve café, 東京, and an emoji 🙂 or two 🙃🙂.",
    "user assistant system What is the capital of France? The capital is Paris.",
    "def function(argument):\n    return argument + 1\n\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# keeps the reasoning of the last turn alone (as Qwen 3 does), and so is not stable under prefixes
STRIPS_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# opens a thought in the prompt that the rendered history does not have (as DeepSeek R1 does)
THINKING_PROMPT = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<Assistant>' + message['content'].split('</think>')[-1] + '<|endoftext|>' }}"
    "{% else %}{{ '<User>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
# has no generation prompt: the user's turn ends with its own marker (as Mistral's does); trims, refuses system turns
NO_PROMPT = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + '<|endoftext|>' }}{% endif %}{% endfor %}"
)
UPPERCASE = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ '\n' + message['content'] }}{% endfor %}"

TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "strips-thinking": STRIPS_THINKING,
    "thinking-prompt": THINKING_PROMPT,
    "no-prompt": NO_PROMPT,
    "uppercase": UPPERCASE,
    "dated": DATED,
    "broken": "{% for message in messages %}",
}


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
