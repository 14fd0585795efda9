"""The kinds of chat templates that are in use."""

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
# begins with two special tokens, none of which is BOS (GLM 4, but for its tools); writes nothing after the last turn
GLM = """[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- endif %}
{%- endfor %}

{%- for message in messages if message.role != 'system' %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
    {%- if role == 'user' %}
<|user|>
{{ content }}
    {%- elif role == 'assistant' %}
<|assistant|>
{{ content }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
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
