"""The official client against a running gateway: openai_client.py URL MODEL OTHER BROKEN"""

import sys

import openai

url, model, other, broken = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
ask = {"messages": [{"role": "user", "content": "who are you?"}], "max_tokens": 8}


def expect(error, **request):
    try:
        client.chat.completions.create(**{**ask, **request})
    except error as raised:
        print(f"{error.__name__}: {raised.message[:100]}")
        return raised
    sys.exit(f"expected {error.__name__} from {request}")


names = [entry.id for entry in client.models.list()]
assert {model, other} <= set(names), names
print("models.list():", ", ".join(names))

for name in (model, other):
    reply = client.chat.completions.create(model=name, **ask)
    assert reply.choices[0].message.content.strip().startswith(f"{name}-1"), reply
    assert reply.usage.completion_tokens > 0, reply
    print(f"{name}:", reply.choices[0].message.content.strip()[:30])

stream = client.chat.completions.create(model=model, stream=True, **ask)
chunks = [chunk for chunk in stream]
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text.strip().startswith(f"{model}-1"), text
assert all(chunk.choices for chunk in chunks), "no usage chunk was asked for"
print(f"{model}, streamed in {len(chunks)} chunks:", text.strip()[:30])

stream = client.chat.completions.create(
    model=model, stream=True, stream_options={"include_usage": True}, **ask
)
usage = [chunk.usage for chunk in stream if chunk.usage]
assert usage and usage[-1].completion_tokens > 0, usage
print("usage, when asked for:", usage[-1].completion_tokens, "tokens")

missing = expect(openai.NotFoundError, model=model + "x")
assert missing.code == "model_not_found" and model in missing.message, missing
expect(openai.BadRequestError, model="")
error = expect(openai.InternalServerError, model=broken)
assert error.status_code == 503 and error.response.headers["retry-after"], error
print("typed exceptions: ok")
