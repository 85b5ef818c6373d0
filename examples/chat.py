"""Ask the same question plain and steered: ``python examples/chat.py BASE_URL WORKER``."""

import sys

from openai import OpenAI

base_url, worker = sys.argv[1:3]  # such as http://localhost:8000/v1 martin-laptop
client = OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Write an invitation to the Harbor Lantern Walk."}]

plain = client.chat.completions.create(model=model, messages=messages, temperature=0)
print(plain.choices[0].message.content, end="\n\n---\n\n")

steering = {"costeer": {"worker": worker, "T": 1}}
steered = client.chat.completions.create(model=model, messages=messages, temperature=0, extra_body=steering)
print(steered.choices[0].message.content)
