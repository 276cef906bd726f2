"""Chat templates of models whose prompts were made by remote code beside the checkpoint, so that no file has one.

GLM Team 2024, arXiv:2406.12793, and the prompt format that https://github.com/zai-org/ChatGLM3 documents.
"""

# Rounds of a question and an answer in plain text, numbered from 1; there is no system message.
ROUNDS = r"""{{ '[gMASK]sop' }}
{%- set round = namespace(number=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set round.number = round.number + 1 %}
        {{- '[Round ' ~ round.number ~ ']\n\n问：' ~ message.content ~ '\n\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '答：' ~ message.content ~ '\n\n' }}
    {%- else %}
        {{- raise_exception('this model knows the roles user and assistant only, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '答：' }}{% endif %}"""

# A token for each role, a line for metadata such as a tool's name, and the text. Tools stand in the system message,
# as indented JSON behind its text. Line and text were encoded apart, so each begins with the vocabulary's space: that
# of the line is put there by SentencePiece, that of the text is written.
ROLES = r"""{{ '[gMASK]sop' }}
{%- if tools and messages[0].role != 'system' %}
    {{- raise_exception('the tools of this model are part of the system message, which must come first') }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message.role == 'tool' else message.role %}
    {%- if role not in ('system', 'user', 'assistant', 'observation') %}
        {{- raise_exception('this model knows no role ' ~ role) }}
    {%- endif %}
    {{- '<|' ~ role ~ '|>' ~ (message.metadata or '') ~ '\n' ~ (' ' ~ message.content if message.content else '') }}
    {%- if loop.first and tools %}
        {%- set plain = namespace(tools=[]) %}
        {%- for tool in tools %}
            {%- set plain.tools = plain.tools + [tool.function or tool] %}
        {%- endfor %}
        {{- '\n' ~ plain.tools | tojson(indent=4) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
