"""The forms of chat templates that models have, each in words of this project, as small as can be.

A form has one or more templates: what differs between versions of it is what they write around the
same turns, where they put the system's words, and which white space they leave.
"""

from __future__ import annotations


def turns(
    user: str,
    assistant: str,
    answer: str,
    *,
    system: str = "{{ raise_exception('no system role') }}",
    begin: str = "{{ bos_token }}",
    content: str = "m.content",
) -> str:
    """What stands around each role's words, with ``§`` for them; ``answer`` asks for an answer."""
    shown = "{{ " + content + " }}"
    parts = [text.replace("§", shown) for text in (system, user, assistant)]
    return (
        begin
        + "{% for m in messages %}{% if m.role == 'system' %}"
        + parts[0]
        + "{% elif m.role == 'user' %}"
        + parts[1]
        + "{% else %}"
        + parts[2]
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + answer
        + "{% endif %}"
    )


def headed(head: str, stop: str, *, answer: str = "assistant", **options: str) -> str:
    """One form for every role, with ``@`` for its name."""
    roles = {
        role: head.replace("@", name) + "§" + stop
        for role, name in (("system", "system"), ("user", "user"), ("assistant", answer))
    }
    return turns(**{**roles, "answer": head.replace("@", answer), **options})


def system_in_user(user: str, system: str, assistant: str, begin: str = "") -> str:
    """The system's words inside a user turn: ``system`` with ``§``, in place of ``£`` of it."""
    inside = system.replace("§", "{{ ns.system }}")
    user = user.replace("£", "{% if ns.system %}" + inside + "{% set ns.system = '' %}{% endif %}")
    user, assistant = (text.replace("§", "{{ m.content }}") for text in (user, assistant))
    return (
        "{% set ns = namespace(system='') %}"
        + begin
        + "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
        + "{% elif m.role == 'user' %}"
        + user
        + "{% else %}"
        + assistant
        + "{% endif %}{% endfor %}"
    )


TRIM = {"content": "m.content | trim"}
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
)
DATE = "Today: {{ strftime_now('%d %b %Y') }}\n\n"

TEMPLATES = {
    # <|im_start|>role ... <|im_end|>: Qwen, SmolLM, Yi, Hermes, OLMo
    "chatml": headed("<|im_start|>@\n", "<|im_end|>\n", begin=""),
    "chatml, bos": headed("<|im_start|>@\n", "<|im_end|>\n"),
    "chatml, trimmed": headed("<|im_start|>@\n", "<|im_end|>\n", **TRIM),
    "chatml, default system": headed("<|im_start|>@\n", "<|im_end|>\n", begin=DEFAULT_SYSTEM),
    "chatml, not thinking": headed("<|im_start|>@\n", "<|im_end|>\n", begin="").replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "chatml, named roles": headed("<|im_start|>@<|im_sep|>", "<|im_end|>", begin=""),  # Phi-4
    "chatml, dated": headed("<|im_start|>@\n", "<|im_end|>\n", begin=DATE),
    # [INST]: Llama 2, Mistral v1 to v7
    "llama 2": system_in_user(
        "{{ bos_token }}[INST] £§ [/INST]", "<<SYS>>\n§\n<</SYS>>\n\n", " § {{ eos_token }}"
    ),
    "mistral v1": system_in_user(
        "[INST] £§ [/INST]", "§\n\n", "§{{ eos_token }}", begin="{{ bos_token }}"
    ),
    "mistral v1, spaced": system_in_user(
        " [INST] £§ [/INST]", "§\n\n", " §{{ eos_token }}", begin="{{ bos_token }}"
    ),
    "mistral v3": system_in_user(
        "[INST] £§[/INST]", "§\n\n", " §{{ eos_token }}", begin="{{ bos_token }}"
    ),
    "mistral v3, tekken": system_in_user(
        "[INST]£§[/INST]", "§\n\n", "§{{ eos_token }}", begin="{{ bos_token }}"
    ),
    "mistral v7": turns(
        "[INST]§[/INST]", "§{{ eos_token }}", "", system="[SYSTEM_PROMPT]§[/SYSTEM_PROMPT]"
    ),
    "mistral v7, spaced": turns(
        "[INST] §[/INST]", " §{{ eos_token }}", "", system="[SYSTEM_PROMPT] §[/SYSTEM_PROMPT]"
    ),
    # headers: Llama 3 and 4, Granite, Nemotron
    "llama 3": headed("<|start_header_id|>@<|end_header_id|>\n\n", "<|eot_id|>", **TRIM),
    "llama 3.1": headed(
        "<|start_header_id|>@<|end_header_id|>\n\n",
        "<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n" + DATE + "§<|eot_id|>",
        **TRIM,
    ),
    "llama 4": headed("<|header_start|>@<|header_end|>\n\n", "<|eot|>", **TRIM),
    "granite 3": headed("<|start_of_role|>@<|end_of_role|>", "<|end_of_text|>\n", begin=""),
    "nemotron": headed("<extra_id_1>@\n", "\n", begin=""),
    # turns: Gemma
    "gemma": headed(
        "<start_of_turn>@\n",
        "<end_of_turn>\n",
        answer="model",
        system="{{ raise_exception('no system role') }}",
        **TRIM,
    ),
    "gemma 3": system_in_user(
        "<start_of_turn>user\n£§<end_of_turn>\n",
        "§\n\n",
        "<start_of_turn>model\n§<end_of_turn>\n",
        begin="{{ bos_token }}",
    ),
    "gemma 4": headed("<|turn>@\n", "<turn|>\n", answer="model", **TRIM),
    # <|role|>: Phi, Zephyr, StableLM, TinyLlama, GLM, Falcon 3, OLMo 2
    "phi 3": headed("<|@|>\n", "<|end|>\n", begin=""),
    "phi 3, trimmed": headed("<|@|>\n", "<|end|>\n", **TRIM),
    "phi 4 mini": headed("<|@|>", "<|end|>", begin=""),
    "zephyr": headed("<|@|>\n", "{{ eos_token }}\n", begin=""),
    "olmo 2": headed("<|@|>\n", "\n", assistant="<|assistant|>\n§{{ eos_token }}\n"),
    "glm 4": headed("<|@|>\n", "", begin="[gMASK]<sop>"),
    "glm 4, blank": headed("<|@|> \n ", "", begin="[gMASK]<sop>"),
    "falcon 3": headed("<|@|>\n", "\n", begin=""),
    "exaone": headed("[|@|]", "[|endofturn|]\n", begin=""),
    "solar": headed("<|begin|>@<|content|>", "<|end|>", begin=""),
    # tokens for the speakers: Command R, DeepSeek, Hunyuan, ERNIE, Kimi, MiniMax, LFM
    "command r": turns(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>§<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>§<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>§<|END_OF_TURN_TOKEN|>",
        **TRIM,
    ),
    "command a": headed(
        "<|START_OF_TURN_TOKEN|><|@_TOKEN|><|START_TEXT|>", "<|END_TEXT|><|END_OF_TURN_TOKEN|>"
    ),
    "deepseek 2": turns("User: §\n\n", "Assistant: §{{ eos_token }}", "Assistant:", system="§\n\n"),
    "deepseek 3": turns(
        "<｜User｜>§", "<｜Assistant｜>§<｜end▁of▁sentence｜>", "<｜Assistant｜>", system="§"
    ),
    "deepseek r1": turns(
        "<｜User｜>§",
        "<｜Assistant｜>§<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\n",
        system="§",
    ),
    "hunyuan": turns(
        "<｜hy_User｜>§",
        "<｜hy_Assistant｜>§<｜hy_eos｜>",
        "<｜hy_Assistant｜>",
        system="§<｜hy_3｜>",
    ),
    "ernie": turns("User: §\n", "Assistant: §</s>", "Assistant: ", system="§\n", begin="<|begin|>"),
    "kimi": headed("<|im_@|>@<|im_middle|>", "<|im_end|>", begin=""),
    "minimax": headed("]~b]@\n", "[e~[\n", begin="]~!b["),
    "seed": headed("<seed:bos>@\n", "<seed:eos>", begin=""),
    "harmony": headed(
        "<|start|>@<|message|>",
        "<|end|>",
        system="<|start|>developer<|message|># Instructions\n\n§\n\n<|end|>",
        assistant="<|start|>assistant<|channel|>final<|message|>§<|end|>",
        begin="<|start|>system<|message|>You help.\nCurrent date: {{ strftime_now('%Y-%m-%d') }}"
        "\n\nReasoning: medium<|end|>",
    ),
    "apertus": turns(
        "<|user_start|>§<|user_end|>",
        "<|assistant_start|>§<|assistant_end|>",
        "<|assistant_start|>",
        system="<|system_start|>§<|system_end|>",
    ),
    # words alone: Vicuna, Alpaca, Starling, and others from before there were templates
    "vicuna": turns("USER: § ", "ASSISTANT: §{{ eos_token }}", "ASSISTANT:", system="§ "),
    "vicuna, lines": turns(
        "### Human: §\n", "### Assistant: §\n", "### Assistant:", system="§\n\n", begin=""
    ),
    "alpaca": turns(
        "### Instruction:\n§\n\n",
        "### Response:\n§{{ eos_token }}\n\n",
        "### Response:\n",
        system="§\n\n",
    ),
    "openchat": turns(
        "GPT4 Correct User: §<|end_of_turn|>",
        "GPT4 Correct Assistant: §<|end_of_turn|>",
        "GPT4 Correct Assistant:",
        system="§<|end_of_turn|>",
    ),
    "falcon": turns("User: §\n", "Falcon: §\n", "Falcon:", system="System: §\n", begin=""),
    "metharme": turns("<|user|>§", "<|model|>§", "<|model|>", system="<|system|>§"),
    "internlm": turns("<|User|>:§<eoh>\n", "<|Bot|>:§<eoa>\n", "<|Bot|>:", system="§\n"),
    "baichuan": turns("<reserved_106>§", "<reserved_107>§", "<reserved_107>", system="§", begin=""),
    "orion": turns(
        "Human: §\n\nAssistant: {{ eos_token }}", "§{{ eos_token }}", "", system="§\n\n"
    ),
    "blank lines": turns("§\n\n", "§\n\n", "", system="§\n\n", begin=""),
}
