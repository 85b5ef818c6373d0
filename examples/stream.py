"""Stream a steered answer, chosen by the model's name alone: ``python examples/stream.py BASE_URL WORKER``."""

import sys

from openai import OpenAI

base_url, worker = sys.argv[1:3]
client = OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id + "+costeer"
messages = [{"role": "user", "content": "Help me invite my friends to the Harbor Lantern Walk."}]

for chunk in client.chat.completions.create(model=model, messages=messages, user=worker, temperature=0, stream=True):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
